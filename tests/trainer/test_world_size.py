"""The same global batch on one and on two ranks gives the same run, at every ZeRO stage."""

import pytest

from tests.trainer.harness import ds_config, run_trainer, steps, write_recipe

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def reference(shards, cache, tmp_path_factory):
    """Records of one rank at ZeRO 0, by method."""
    folder = tmp_path_factory.mktemp("reference")
    records = {}
    for method in ("clip", "declip"):
        recipe = write_recipe(folder / f"{method}.yaml", shards, method)
        run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / method), "--ds_config", ds_config(0)], cache)
        records[method] = steps(folder / method)
    return records


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [("clip", 2), *(("declip", stage) for stage in range(4))])
def test_two_ranks_log_what_one_rank_logs(method, stage, reference, shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / f"{method}.yaml", shards, method)
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(stage)]
    run_trainer(arguments, cache, world_size=2)
    compare(steps(tmp_path / "run"), reference[method])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 3)])
def test_gradient_cache_logs_what_the_whole_batch_logs(world_size, stage, reference, shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / "declip.yaml", shards, train={"micro_batch_size": 2})
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(stage)]
    finished = run_trainer(arguments, cache, world_size)
    assert f"16 = 2 x {8 // world_size} x {world_size}" in finished.output
    compare(steps(tmp_path / "run"), reference["declip"])


def compare(found: dict[int, dict], expected: dict[int, dict]) -> None:
    """Same steps and data to the bit; every number to float tolerance."""
    assert found.keys() == expected.keys()
    assert len(expected) == 20
    for step, record in expected.items():
        assert found[step].keys() == record.keys()
        assert found[step]["data_hash"] == record["data_hash"], step
        for key, value in record.items():
            if isinstance(value, float):
                assert found[step][key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (step, key)
