"""Settings of the whole suite."""

import os
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings

from tests.forked import start_server

# The same examples in every run and on every machine: a failure is one that can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# Else every process that a test starts compiles the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# DeepSpeed chooses while it is imported; a test on a GPU starts a process of its own for what needs it there.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hide GPUs, also from child processes, unless the test has the mark; what uses one all the same fails."""
    if item.get_closest_marker("gpu"):
        return (yield)
    refused = AssertionError("a test without the mark `gpu` uses CUDA: name the device, or mark it")
    with (
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.cuda._lazy_init", side_effect=refused),
    ):
        return (yield)


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
