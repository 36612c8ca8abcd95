"""A loader that cannot deliver says so, in bounded time, whatever has failed and in whatever thread."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import delivery
from data.delivery import Patience, Pipeline
from data.errors import DataError, LoaderError
from data.loader import build_eval_loader, build_train_loader
from tests.data.failing_batches import FailingBatches
from tests.data.tiny_shards import TinyTransform, indexed, tiny_eval, write_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(delivery, "_LOOK_S", 0.1)
    monkeypatch.setattr(delivery, "_NOTICE_S", 1.0)
    monkeypatch.setattr(delivery, "_JOIN_S", 1.0)


def open_pipeline(kind: str, workers: int = 1, patience: Patience | None = None) -> Pipeline:
    return Pipeline(
        FailingBatches(kind),
        range(8),
        transform=None,
        workers=workers,
        prefetch=3,
        pin_memory=False,
        held_by_user=1,
        patience=patience or Patience(),
    )


def test_workers_in_the_background_take_what_is_left(tmp_path):
    source, store = indexed(tmp_path, write_shards(tmp_path / "set", [8]))
    options = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 4, "workers": 1, "store": store}
    for background in (False, True):
        loader = build_train_loader([source], TinyTransform(), background=background, **options)
        next(loader)
        (worker,) = loader._pipeline._processes
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == (19 if background else os.getpriority(os.PRIO_PROCESS, 0))
        loader.close()


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("raise", ZeroDivisionError, "a bug"),
        ("mistake", DataError, "this shard is wrong"),
        ("no_memory", DataError, "no memory for a batch; lower data.workers"),
        ("kill", LoaderError, r"worker 0 .* SIGKILL, .*memory runs out"),
        ("exit", LoaderError, "exit code 7"),
        ("unsendable", LoaderError, r"outside of its batches: RuntimeError: no way to send <Unsendable object>;"),
        ("thread", LoaderError, "outside of its batches: ZeroDivisionError: a bug;"),
    ],
)
def test_a_worker_that_fails_ends_the_wait_with_its_message(kind, error, words):
    pipeline = open_pipeline(kind)
    processes = list(pipeline._processes)
    started, taken = time.monotonic(), []
    with pytest.raises(error, match=words) as caught:
        while True:
            taken.append(next(pipeline)["numbers"].tolist())
    assert time.monotonic() - started < 20
    # What a dead worker had made is lost with it.
    assert taken == [[at, at + 1, at + 2, at + 3, at + 4] for at in range(len(taken))]
    assert len(taken) == 2 or error is LoaderError
    if error is not ZeroDivisionError:
        assert "\n" not in str(caught.value)
        with pytest.raises(StopIteration):
            next(pipeline)
    pipeline.close()
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_dies_while_it_sends_leaves_nobody_reading_for_ever():
    pipeline = open_pipeline("half_sent")
    # Nobody reads: two megabytes stay in its hands, and the kernel has the beginning.
    pipeline._processes[0].join(30)
    with pytest.raises(LoaderError, match="SIGKILL"):
        next(pipeline)


@pytest.mark.parametrize(
    ("patience", "words"),
    [
        (Patience(timeout_minutes=0.01), r"no batch for 0\.01 minutes \(train\.timeout_minutes\)"),
        (Patience(timeout_minutes=None, told_to_stop=lambda: 15), "told to stop"),
    ],
    ids=["timeout", "signal"],
)
def test_workers_that_live_and_do_nothing_are_waited_for_so_long(patience, words, monkeypatch):
    monkeypatch.setattr(delivery, "_AFTER_SIGNAL_S", 0.3)
    pipeline = open_pipeline("hang", patience=patience)
    processes = list(pipeline._processes)
    next(pipeline), next(pipeline)
    with pytest.raises(LoaderError, match=words):
        next(pipeline)
    assert not any(process.is_alive() for process in processes)


def test_every_loader_checks_the_room_in_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "_free_shared_memory", lambda: 200)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    source, store = indexed(tmp_path, write_shards(tmp_path / "set", [20]))
    words = (
        r"200 free|/dev/shm has 0\.00019 MiB free, the loader needs .* for {} batches .*in each of 2 ranks; .*docker"
    )
    train = build_train_loader(
        [source], TinyTransform(), seed=0, global_batch_size=8, micro_batch_size=2, workers=1, prefetch=3, store=store
    )
    # Three that the worker prepares, and the four of a step twice.
    with pytest.raises(DataError, match=words.format(11)):
        next(train)
    options = {"workers": 1, "store": store, "pin_memory": False}
    with pytest.raises(DataError, match=words.format(4)):
        list(build_eval_loader([source], tiny_eval, batch_size=5, **options))
    # A set of one batch needs room for one.
    monkeypatch.setattr(delivery, "_free_shared_memory", lambda: 2 * (20 * 12 + 20 * 8))
    assert (
        len(list(build_eval_loader([source], tiny_eval, batch_size=20, workers=1, store=store, pin_memory=False))) == 1
    )


def test_shared_memory_that_fills_up_is_an_error_of_its_batch(monkeypatch):
    monkeypatch.setattr(delivery, "get_worker_info", lambda: True)
    monkeypatch.setattr(delivery, "_free_shared_memory", lambda: 64 << 20)

    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    message = delivery._Delivered(FailingBatches("raise"), 3)[0]["error"]
    assert "3.8e-05 MiB cannot be put into /dev/shm, which has 64 MiB free (No space left on device (28))" in message
    assert "docker --shm-size" in message


SCRIPT = """
import sys
from trainer.ranks.launch import Place
from trainer.ranks.shutdown import reported_errors
from tests.data.test_delivery import open_pipeline
if __name__ == "__main__":
    with reported_errors(Place(0, 0, 1, 1, "python")):
        pipeline, other = open_pipeline("kill", 2), open_pipeline("hang")
        if sys.argv[1] == "killed":
            while True:
                next(pipeline)
        next(other)
        raise KeyboardInterrupt
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("killed", 1), ("interrupted", 130)])
def test_a_process_that_leaves_leaves_nothing_behind(tmp_path, how, code):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    finished = subprocess.run(
        [sys.executable, str(script), how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == code, finished.stderr
    assert "leaked" not in finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
