"""Shards and cache shared by the tests that start the trainer."""

from pathlib import Path

import pytest

from tests.trainer import harness


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """An empty project cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """Brace range of four good shards."""
    return harness.write_shards(tmp_path_factory.mktemp("shards"))
