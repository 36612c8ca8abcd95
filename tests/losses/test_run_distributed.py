"""Tests of the helper that runs a function on several ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def _sum_of_ranks(rank: int, world_size: int, offset: float) -> torch.Tensor:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value


def _fail_on_last_rank(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ValueError("planted failure")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    os._exit(3)


def _sleep(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_returns_results_by_rank() -> None:
    results = run_distributed(_sum_of_ranks, 2, 10.0)
    assert [result.item() for result in results] == [21.0, 21.0]


def test_failures_are_reported() -> None:
    with pytest.raises(RuntimeError, match="planted failure"):
        run_distributed(_fail_on_last_rank, 2)
    with pytest.raises(RuntimeError, match="died without a traceback"):
        run_distributed(_die, 1)


def test_timeout_kills_the_ranks() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="still running"):
        run_distributed(_sleep, 1, timeout_s=2)
    assert time.monotonic() - started < 30
