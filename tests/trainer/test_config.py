"""Recipes load, overrides apply, and what is resolved is enough to start again."""

import pytest

from trainer.config import dump_config, load_config, parse_config, recipe_names
from trainer.ds_config import plan_batch, resolve_deepspeed
from trainer.errors import ConfigError
from trainer.methods import METHODS

PUBLISHED = {
    "demo",
    "clip_demo",
    "clip_yfcc15m_vitb32",
    "declip_yfcc15m_vitb32",
    "declip_yfcc15m_rn50",
    "declip_88m_rn50",
    "declip_88m_vitb32",
    "declip_88m_regnety64",
}


def test_every_published_recipe_is_there():
    assert set(recipe_names()) >= PUBLISHED


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_round_trips_through_its_dump(name, tmp_path):
    config = load_config(name)
    assert config.recipe == name
    assert config.method["name"] in METHODS
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(str(dumped)) == config


def test_declip_recipe_holds_the_released_settings():
    config = load_config("declip_yfcc15m_vitb32")
    assert (config.train.steps, config.train.global_batch_size) == (128_000, 4096)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.eps) == (1e-3, (0.9, 0.98), 1e-8)
    assert (config.schedule.warmup_steps, config.schedule.start_lr) == (2500, 1e-4)
    assert config.model.freeze_patch_embed
    assert config.method["preset"] == "declip-code"


def test_overrides_take_yaml_values_and_leave_brace_ranges_alone():
    config = load_config(
        "clip_demo",
        {
            "optimizer.lr": "5e-4",
            "data.train": "shards/{00000..00099}.tar",
            "optimizer.betas": "[0.8, 0.9]",
            "data.workers": "auto",
            "train.stop_after": "7",
        },
    )
    assert config.optimizer.lr == 5e-4
    assert config.data.train == "shards/{00000..00099}.tar"
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.train.stop_after == 7
    mixture = load_config("clip_demo", {"data.train": "{'a/{0..3}.tar': 2, 'b.tar': 1}"})
    assert mixture.data.train == {"a/{0..3}.tar": 2.0, "b.tar": 1.0}


def test_child_recipe_replaces_the_method_whole(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: demo\nmethod: {name: clip}\ntrain: {steps: 60}\n")
    config = load_config(str(child))
    assert config.method == {
        "name": "clip",
        "logit_scale_min": 0.0,
        "logit_scale_max": config.method["logit_scale_max"],
    }
    assert config.train.steps == 60
    assert config.train.global_batch_size == load_config("demo").train.global_batch_size


def test_circular_recipes_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_missing_value_names_the_flag():
    with pytest.raises(ConfigError, match=r"'optimizer.lr' is missing: .* --optimizer.lr"):
        parse_config(
            {
                "model": {"name": "vit_b32"},
                "method": {"name": "clip"},
                "data": {"train": "x.tar"},
                "train": {"steps": 1, "global_batch_size": 2},
                "optimizer": {},
            }
        )


@pytest.mark.parametrize(
    ("micro", "world_size", "expected"), [("auto", 4, (64, 1)), (16, 4, (16, 4)), (256, 1, (256, 1)), (8, 2, (8, 16))]
)
def test_batch_arithmetic(micro, world_size, expected):
    plan = plan_batch(load_config("demo", {"train.micro_batch_size": str(micro)}), world_size)
    assert (plan.micro_batch_size, plan.accumulation_steps) == expected
    assert plan.micro_batch_size * plan.accumulation_steps * world_size == 256


def test_deepspeed_accepts_fixed_values_that_agree(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"train_batch_size": 256, "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 4,'
        ' "zero_optimization": {"stage": 1}}'
    )
    config = load_config("demo", {"train.micro_batch_size": "32"})
    resolved = resolve_deepspeed(str(path), config, plan_batch(config, 2), "fp32")
    assert resolved.stage == 1
    # The engine sees one micro-batch: accumulation is the gradient cache's.
    assert resolved.config["train_micro_batch_size_per_gpu"] == 128
    assert resolved.config["gradient_accumulation_steps"] == 1
    # DeepSpeed's own default would clip at 1.0.
    assert resolved.config["gradient_clipping"] == 0.0
    assert "torch_autocast" not in resolved.config


def test_deepspeed_lowers_precision_through_autocast():
    config = load_config("demo")
    resolved = resolve_deepspeed(None, config, plan_batch(config, 1), "bf16")
    assert resolved.config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert resolved.config["bf16"] == {"enabled": False}
