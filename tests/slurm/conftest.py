"""The two-node cluster, shared by the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_tools


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster; skips where SLURM is not installed."""
    missing = missing_tools()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    running = Cluster()
    try:
        running.start()
        yield running
    finally:
        running.stop()
