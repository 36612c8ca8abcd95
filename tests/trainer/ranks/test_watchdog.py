"""A rank that falls silent, hangs or fails ends the job on all ranks, which leave by themselves and say why."""

import signal
import time

import pytest

from tests.trainer.harness import WORKER, Launched, ds_config, metrics, write_eval_set, write_recipe

# Long enough for a slow step on a busy machine: 15 seconds.
TIMEOUT = ["--train.timeout_minutes", "0.25"]


def start(shards, cache, tmp_path, *arguments, faults=None, **sections):
    """Two ranks of a long run."""
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, "clip", train={"steps": 100_000}, **WORKER, **sections)
    base = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(2)]
    return Launched([*base, *TIMEOUT, *arguments], 2, cache, faults, fresh=True)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_stopped_rank_ends_the_others(silent, shards, cache, tmp_path):
    launched = start(shards, cache, tmp_path)
    while not (tmp_path / "run" / "metrics.jsonl").is_file() or len(metrics(tmp_path / "run")) < 3:
        assert all(process.poll() is None for process in launched.processes)
        time.sleep(0.1)
    launched.processes[silent].send_signal(signal.SIGSTOP)
    other = 1 - silent
    finished = launched.leave(ranks=range(other, other + 1))
    assert finished.codes == [1], finished.output
    assert f"rank {other}: error: no progress for 0.25 minutes (train.timeout_minutes) in step " in finished.output
    if silent:
        assert "rank 1 gives no sign of life, it was last in step " in finished.output
    else:
        # The meeting place was in its process.
        assert "rank 0, or the process that started it, does not answer" in finished.output


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_shows_where(shards, cache, tmp_path):
    faults = {"fail": {"phase": "data", "step": 3, "rank": 1, "hang": True}}
    finished = start(shards, cache, tmp_path, faults=faults).leave()
    assert finished.codes == [1, 1], finished.output
    assert "(train.timeout_minutes) in step 3, forward: rank 1 is still in step 3, data" in finished.output
    assert "time.sleep(0.1)" in finished.output


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [("data", 1), ("backward", 0), ("save", 1), ("evaluate", 0)])
def test_a_failing_rank_ends_all(phase, rank, shards, cache, tmp_path):
    sets = {"tiny": {"data": str(write_eval_set(tmp_path / "eval", 6))}}
    sections = {"checkpoint": {"every": 2}, "eval": {"every": 2, "sets": sets}}
    faults = {"fail": {"phase": phase, "step": 2, "rank": rank}}
    # Long before the watchdog would speak.
    arguments = ["--train.timeout_minutes", "30"]
    finished = start(shards, cache, tmp_path, *arguments, faults=faults, **sections).leave(timeout_s=240)
    assert finished.codes == [1, 1], finished.output
    assert f"OSError: rank {rank} broke in {phase}" in finished.output
    assert "train.timeout_minutes" not in finished.output


@pytest.mark.slow
def test_a_full_disk_ends_all_with_one_line(shards, cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    finished = start(shards, cache, tmp_path).leave()
    assert finished.codes == [2, 2], finished.output
    assert "metrics.jsonl cannot be written (No space left on device); make room" in finished.output
    assert "Traceback" not in finished.output
