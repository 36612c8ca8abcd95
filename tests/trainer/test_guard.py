"""Steps that went wrong: what is counted, when a run goes back, and where it goes on."""

import math

import pytest

from tests.trainer.harness import Launched, ds_config, metrics, run_trainer, state_hashes, steps, write_recipe
from tests.trainer.test_world_size import compare
from trainer.config.sections import GuardConfig
from trainer.guard import Guard

# Global batches 8 to 12 give no finite loss, 21 and 22 one that is far off.
FAULTS = {
    "spoil_loss": [
        {"batches": [8, 9, 10, 11, 12], "value": "nan"},
        {"batches": [21, 22], "value": "1e4"},
    ]
}
GUARD = {"max_skipped": 3, "spike_factor": 100, "spike_window": 4, "spike_steps": 2, "max_rollbacks": 2}
SECTIONS = {"guard": GUARD, "checkpoint": {"every": 5}}


def events(run_dir, name):
    return [record for record in metrics(run_dir) if record.get("event") == name]


def test_skipped_steps_count_in_a_row_only():
    guard = Guard(GuardConfig(max_skipped=3))
    seen = [guard.judge(step, skipped, 1.0) for step, skipped in enumerate([1, 1, 0, 1, 1], 1)]
    assert [entry and entry.in_a_row for entry in seen] == [1, 2, None, 1, 2]
    assert guard.trouble() is None
    assert not guard.is_calm
    guard.judge(6, True, math.nan)
    assert guard.trouble().first_step == 4


def test_spikes_are_measured_against_good_steps_only():
    guard = Guard(GuardConfig(spike_factor=5, spike_window=4, spike_steps=2))
    losses = [3.0, 3.2, 2.9, 3.1]
    assert [guard.judge(step, False, loss) for step, loss in enumerate([9.0, *losses], 1)] == [None] * 5
    # Median 3.05, median deviation 0.1: up to 3.05 + 5 * 0.14826.
    bound = 3.05 + 5 * 1.4826 * 0.1
    assert guard.judge(6, False, bound - 0.001) is None
    restored = Guard(GuardConfig(spike_factor=5, spike_window=4, spike_steps=2))
    restored.load_state(guard.state())
    for one in (guard, restored):
        spike = one.judge(7, False, 8.0)
        assert spike.in_a_row == 1
        assert one.trouble() is None
        assert one.judge(8, False, math.nan).bound == spike.bound
        assert one.trouble().first_step == 7
    off = Guard(GuardConfig(spike_window=2))
    assert [off.judge(step, False, 10.0**step) for step in range(9)] == [None] * 9


@pytest.fixture(scope="module")
def order(shards, cache, tmp_path_factory):
    """data_hash of each global batch, by number from 1."""
    folder = tmp_path_factory.mktemp("order")
    recipe = write_recipe(folder / "tiny.yaml", shards, "clip", train={"steps": 27})
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run")], cache)
    return {step: record["data_hash"] for step, record in steps(folder / "run").items()}


@pytest.mark.slow(seconds=80)
def test_going_back_leaves_the_bad_batches_out(order, shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, **SECTIONS)
    base = ["--recipe", str(recipe), "--ds_config", ds_config(2)]
    whole = [*base, "--run_dir", str(tmp_path / "whole")]
    # Going back ends its worker; the same run below has none.
    run_trainer([*whole, "--data.workers", "1"], cache, faults=FAULTS)
    found = steps(tmp_path / "whole")
    # Steps 8 to 10 were bad: back to 5. Batches 11 and 12 are bad too, but two in a row are let pass. Steps 16 and 17
    # met batches 21 and 22: back to 15.
    batches = {step: step + (0 if step <= 5 else 5 if step <= 15 else 7) for step in range(1, 21)}
    assert {step: record["data_hash"] for step, record in found.items()} == {n: order[b] for n, b in batches.items()}
    assert [step for step, record in found.items() if record["loss"] is None] == [6, 7]
    records = [record["step"] for record in metrics(tmp_path / "whole")]
    assert records == sorted(records)
    first, second = events(tmp_path / "whole", "rollback")
    keys = ("step", "from_step", "first_bad_step", "data_offset", "rollbacks")
    assert [first[key] for key in keys] == [5, 10, 8, 5, 1]
    assert [second[key] for key in keys] == [15, 17, 16, 7, 2]
    assert [event["step"] for event in events(tmp_path / "whole", "skipped_step")] == [6, 7]

    # Stopped between the two, and continued: bitwise the same.
    resumed = [*base, "--run_dir", str(tmp_path / "resumed")]
    run_trainer([*resumed, "--train.stop_after", "12"], cache, faults=FAULTS)
    assert max(steps(tmp_path / "resumed")) == 12
    run_trainer([*resumed, "--resume", "auto"], cache, faults=FAULTS)
    assert steps(tmp_path / "resumed") == found
    hashes, again = state_hashes(tmp_path / "whole"), state_hashes(tmp_path / "resumed")
    assert again.pop(12)
    assert hashes == again
    assert set(hashes) == {5, 10, 15, 20}

    # On two ranks, of which one alone sees the bad values, and in other pieces.
    rank_one = {"spoil_loss": [{**entry, "rank": 1} for entry in FAULTS["spoil_loss"]]}
    split = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "split"), "--ds_config", ds_config(3)]
    run_trainer(split, cache, world_size=2, faults=rank_one)
    compare(steps(tmp_path / "split"), found)
    assert len(events(tmp_path / "split", "rollback")) == 2


@pytest.mark.slow
def test_what_recurs_ends_the_run(shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, "clip", **SECTIONS)
    faults = {"spoil_loss": {"steps": list(range(8, 21)), "rank": 1}}
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--guard.max_rollbacks", "1"]
    finished = Launched([*arguments, "--ds_config", ds_config(0)], 2, cache, faults).leave()
    assert finished.codes == [2, 2]
    assert "not finite in 3 steps in a row (since step 8), and the run has gone back 1 times" in finished.output
    assert "Traceback" not in finished.output
    assert [event["from_step"] for event in events(tmp_path / "run", "rollback")] == [10]

    # Bad from before the first checkpoint on.
    without = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "other"), "--checkpoint.every", "2"]
    faults = {"spoil_loss": {"steps": [2, 3, 4, 5]}}
    finished = Launched([*without, "--checkpoint.keep_last", "1", "--guard.max_skipped", "4"], 1, cache, faults).leave()
    assert finished.codes == [2]
    assert "(since step 2), and there is no checkpoint from before to go back to" in finished.output
    # None is deleted while steps go wrong.
    assert sorted(folder.name for folder in (tmp_path / "other" / "checkpoints").glob("step_*")) == ["step_2", "step_4"]
