"""Settings of the whole suite."""

import os
from collections import Counter

import pytest
from hypothesis import settings

from tests.forked import start_server

# The same examples in every run and on every machine: a failure is one that can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# Else every process that a test starts compiles the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers() -> int:
    """Half as many workers again as cores: runs wait for each other, for disks and for time-outs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores + cores // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first: whichever worker got one of them last would leave the others idle."""
    seconds = Counter()
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds[item.path] += mark.kwargs.get("seconds", 20)
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of forks beside the first tests, before a loader worker would start one that lacks imports."""
    if not session.config.option.collectonly and any("trainer" in item.path.parts for item in session.items):
        start_server()
