"""bf16 and fp16 at every kind of ZeRO, against fp32."""

import pytest

from tests.trainer.harness import ds_config, metrics, run_trainer, steps, write_recipe
from trainer.config.ds_config import plan_batch, resolve_deepspeed
from trainer.errors import ConfigError
from trainer.loading import load_config

# At the harness's rate eight steps turn a rounding into a tenth of the gradient.
SLOW = {"lr": 1e-4}


@pytest.fixture(scope="module")
def fp32(shards, cache, tmp_path_factory):
    """Records of eight steps in fp32."""
    folder = tmp_path_factory.mktemp("fp32")
    recipe = write_recipe(folder / "tiny.yaml", shards, train={"steps": 8}, optimizer=SLOW)
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run"), "--ds_config", ds_config(0)], cache)
    return steps(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 2)])
def test_lower_precision_follows_fp32(precision, stage, fp32, shards, cache, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, train={"steps": 8, "precision": precision}, optimizer=SLOW)
    run_trainer(
        ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(stage)], cache, 2
    )
    found = steps(tmp_path / "run")
    for step, record in fp32.items():
        assert found[step]["loss"] == pytest.approx(record["loss"], rel=0.005), step
        assert found[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=0.03), step
    assert found[8]["loss"] != fp32[8]["loss"]
    assert not [record for record in metrics(tmp_path / "run") if record.get("event") == "skipped_step"]


def test_fp16_clipping_is_refused_where_it_would_be_wrong():
    config = load_config("demo", {"optimizer.gradient_clipping": "1.0"})
    plan = plan_batch(config, 1)
    with pytest.raises(ConfigError, match=r"does not work with train\.precision fp16"):
        resolve_deepspeed(ds_config(2), config, plan, "fp16")
    assert resolve_deepspeed(ds_config(0), config, plan, "fp16").config["gradient_clipping"] == 1.0
    assert resolve_deepspeed(ds_config(2), config, plan, "bf16").config["gradient_clipping"] == 1.0
