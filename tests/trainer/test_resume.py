"""A killed run that is resumed is the run that was never interrupted."""

import json
import random
import signal
import time

import pytest

from tests.trainer.harness import Launched, ds_config, metrics, run_trainer, state_hashes, steps, write_recipe
from tests.trainer.test_world_size import compare

EVERY = {"checkpoint": {"every": 5, "keep_last": 2}}
# Of runs that are killed or told to stop; those they are compared with read without, which changes no sample.
WORKER = ["--data.workers", "1"]


@pytest.fixture(scope="module")
def uninterrupted(shards, cache, tmp_path_factory):
    """Recipe and records of a whole run on one rank at ZeRO 2."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(folder / "tiny.yaml", shards, **EVERY)
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run"), "--ds_config", ds_config(2)], cache)
    return recipe, folder / "run"


def kill_after(arguments, cache, run_dir, step, world_size=1):
    """Start a run and SIGKILL all its ranks once it has logged `step`."""
    launched = Launched([*arguments, *WORKER], world_size, cache, fresh=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        logged = (run_dir / "metrics.jsonl").is_file() and any(
            record["step"] >= step for record in metrics_so_far(run_dir)
        )
        if logged or all(process.poll() is not None for process in launched.processes):
            break
        time.sleep(0.02)
    launched.kill()
    launched.wait()


def metrics_so_far(run_dir):
    """Complete lines only: the writer may be in the middle of one."""
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.slow
def test_resume_after_sigkill_is_bitwise(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(2)]
    kill_after(arguments, cache, tmp_path / "run", random.randint(6, 17))
    run_trainer([*arguments, "--resume", "auto"], cache)
    assert steps(tmp_path / "run") == steps(reference)
    # The event of the checkpoint it was killed at may be missing.
    assert state_hashes(reference).items() >= state_hashes(tmp_path / "run").items()
    assert state_hashes(tmp_path / "run")[20] == state_hashes(reference)[20]
    events = [record for record in metrics(tmp_path / "run") if record.get("event") == "resumed"]
    assert len(events) == 1
    assert events[0]["step"] in (5, 10, 15)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [((2, 2), (1, 2)), ((1, 1), (2, 3)), ((2, 3), (1, 0))])
def test_resume_on_other_ranks_and_stages(first, second, uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    run_dir = tmp_path / "run"
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir)]
    run_trainer(
        [*arguments, "--ds_config", ds_config(first[1]), "--train.stop_after", "10"], cache, world_size=first[0]
    )
    assert list(steps(run_dir)) == list(range(1, 11))
    run_trainer([*arguments, "--ds_config", ds_config(second[1]), "--resume", "auto"], cache, world_size=second[0])
    compare(steps(run_dir), steps(reference))


@pytest.mark.slow
def test_resume_without_naming_the_recipe(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    run_dir = tmp_path / "run"
    run_trainer(
        ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(2), "--train.stop_after", "7"],
        cache,
    )
    finished = run_trainer(["--run_dir", str(run_dir), "--resume", "auto"], cache)
    assert "ZeRO 2" in finished.output
    assert steps(run_dir) == steps(reference)


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    run_dir = tmp_path / "run"
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(2)]
    run_trainer([*arguments, "--train.stop_after", "10"], cache)
    newest = run_dir / "checkpoints" / "step_10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    finished = run_trainer([*arguments, "--resume", "auto"], cache)
    assert "step_10 is damaged" in finished.output
    assert "checksum differs" in finished.output
    assert steps(run_dir) == steps(reference)


@pytest.mark.slow
def test_signal_saves_and_leaves_cleanly(uninterrupted, cache, tmp_path):
    recipe, reference = uninterrupted
    run_dir = tmp_path / "run"
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(2)]
    launched = Launched([*arguments, *WORKER], 2, cache, fresh=True)
    while launched.processes[0].poll() is None and not (run_dir / "metrics.jsonl").is_file():
        time.sleep(0.02)
    time.sleep(0.5)
    # One rank alone is told; both leave.
    launched.processes[1].send_signal(signal.SIGUSR1)
    finished = launched.wait()
    assert finished.codes == [0, 0], finished.output
    last = max(steps(run_dir))
    assert (run_dir / "checkpoints" / f"step_{last}").is_dir()
    assert (run_dir / "stopped_early").exists() == (last < 20)
    run_trainer([*arguments, "--resume", "auto"], cache, world_size=2)
    assert not (run_dir / "stopped_early").exists()
    compare(steps(run_dir), steps(reference))
