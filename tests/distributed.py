"""Runs one function on several real ranks: processes of their own, joined by gloo on this machine."""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forked import begin, start_server

# Once one rank has failed, the others are usually stuck in a collective that will never finish.
_GRACE_AFTER_FAILURE_S = 1.0
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120, fresh: bool = False
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on `world_size` ranks inside an initialised gloo process group.

    Args:
        fn: Module-level function (the ranks import it by name).
        world_size: Number of ranks, at least 1.
        *args: Further positional arguments, picklable.
        timeout_s: Wall-clock limit for the whole call, start-up of the processes included.
        fresh: Start interpreters without any import, for what must be set before.

    Returns:
        What each rank returned, ordered by rank. Results must be picklable; tensors are copied.

    Raises:
        RuntimeError: A rank raised or died; the message holds the tracebacks of the ranks that failed.
        TimeoutError: Some rank was still running after `timeout_s`; all ranks have been killed.
    """
    deadline = time.monotonic() + timeout_s
    # The parent holds the store, so that the port is free by construction rather than by a race-prone probe.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn") if fresh else start_server()
    # A fork has the environment of the first call. Code under test may read it while it is imported.
    call, environment = pickle.dumps((fn, args)), dict(os.environ)
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(sender, call, environment, rank, world_size, store.port, timeout_s),
                daemon=True,
            )
            process.start()
            # Only the child may hold the sending end: its death then reads as end-of-file here.
            sender.close()
            processes.append(process)
            connections.append(receiver)
        return _collect(connections, deadline, timeout_s)
    finally:
        _stop(processes)


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Records every collective started through torch.distributed inside the block, on this rank.

    Yields:
        A growing list of (name, bytes of the larger tensor argument), the latter being the traffic up to (W - 1) / W.
    """
    records: list[tuple[str, int]] = []
    with ExitStack() as stack:
        for name in filter(lambda name: hasattr(dist, name), _COLLECTIVES):
            stack.enter_context(mock.patch.object(dist, name, _recording(name, getattr(dist, name), records)))
        yield records


def _recording(name: str, collective: Callable[..., Any], records: list[tuple[str, int]]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        records.append((name, max((tensor.nbytes for tensor in tensors), default=0)))
        return collective(*args, **kwargs)

    return recorded


def _run_rank(
    sender: Connection,
    call: bytes,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    timeout_s: float,
) -> None:
    begin(environment)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # Code under test that rendezvouses by env:// must join the parent's store, not open a second one.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        result = fn(rank, world_size, *args)
        # A rank that leaves early closes its sockets under the ranks still communicating.
        dist.barrier()
        dist.destroy_process_group()
        message = (True, result)
    except BaseException:
        message = (False, traceback.format_exc())
    # Plain pickle copies tensors; the multiprocessing reducers would share memory that dies with this process.
    sender.send_bytes(pickle.dumps(message))
    sender.close()


def _collect(connections: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = {connection: rank for rank, connection in enumerate(connections)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = pending.pop(connection)
            ok, value = _receive(connection)
            (results if ok else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_AFTER_FAILURE_S)
    if failures:
        report = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
        raise RuntimeError(f"{len(failures)} of {len(connections)} ranks failed\n{report}")
    if pending:
        raise TimeoutError(f"ranks {sorted(pending.values())} were still running after {timeout_s} s")
    return [results[rank] for rank in range(len(connections))]


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "the process died without a traceback (killed, or a crash in native code)"


def _stop(processes: list[BaseProcess]) -> None:
    # A rank that has reported may still need a moment to exit by itself.
    for process in processes:
        process.join(timeout=0.5)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
