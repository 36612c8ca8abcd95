"""Recipes load, overrides apply, and what is resolved is enough to start again."""

import json
import re
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.ds_config import plan_batch, resolve_deepspeed
from trainer.config.recipe import dump_config, recipe_names
from trainer.errors import ConfigError
from trainer.loading import load_config, parse_config
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
    "slip_demo",
    "slip_yfcc15m_vitb16",
    "slip_yfcc15m_vitb32",
    "siglip_demo",
    "siglip_webli_vitb16",
    "align_demo",
    "align_coyo700m_b7",
    "filip_demo",
    "filip_yfcc15m_vitb32",
    "defilip_demo",
    "defilip_yfcc15m_vitb32",
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


def test_sources_with_names_of_their_own(tmp_path):
    named = {"cc": {"path": "a/{0..3}.tar", "weight": 2}, "yfcc": {"path": ["b.tar", "c.tar"]}}
    expected = {"cc": {"path": "a/{0..3}.tar", "weight": 2.0}, "yfcc": {"path": ["b.tar", "c.tar"], "weight": 1.0}}
    for text in (yaml.safe_dump(named, default_flow_style=True), json.dumps(named)):
        assert load_config("clip_demo", {"data.train": text}).data.train == expected
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": "clip_demo", "data": {"train": named}}))
    config = load_config(str(child))
    assert config.data.train == expected
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config
    # A part of it from the command line.
    config = load_config(str(child), {"data.train.cc.path": "d/{0..3}.tar", "data.train.yfcc.weight": "0.5"})
    assert config.data.train["cc"]["path"] == "d/{0..3}.tar"
    assert config.data.train["yfcc"]["weight"] == 0.5
    # A weight in the other form, and braces that are no mapping.
    assert load_config("clip_demo", {"data.train": "{a/x: 1, b: 2}"}).data.train == {"a/x": 1.0, "b": 2.0}
    for text in ("{0..9}", "{a,b}", "{a,b}/{0..9}.tar"):
        assert load_config("clip_demo", {"data.train": text}).data.train == text


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"a": {"pth": "x"}}, "data.train: the source 'a' takes path and weight, got pth"),
        ({"a": {"weight": 1}}, "data.train: the source 'a' takes path and weight, got weight"),
        ({"a": {"path": []}}, "the path of the source 'a' must be a path or a list of paths"),
        ({"a": {"path": 3}}, "the path of the source 'a' must be a path or a list of paths"),
        ({"a": {"path": "x", "weight": "much"}}, "the weight of the source 'a' must be a number above 0, got 'much'"),
        ({"a": 0}, "the weight of the source 'a' must be a number above 0, got 0"),
        ({"a": True}, "the weight of the source 'a' must be a number above 0, got True"),
        ({"a": "Infinity"}, "the weight of the source 'a' must be a number above 0, got 'Infinity'"),
    ],
)
def test_sources_that_are_written_wrong(train, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config("clip_demo", {"data.train": json.dumps(train)})


def test_child_recipe_replaces_the_method_whole(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: demo\nmethod: {name: clip}\ntrain: {steps: 60}\n")
    config = load_config(str(child))
    assert config.method == {
        "name": "clip",
        "logit_scale_min": 0.0,
        "logit_scale_max": config.method["logit_scale_max"],
        "image_views": ("base",),
        "text_views": ("original",),
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
    ("micro", "world_size", "expected"), [("auto", 4, (32, 1)), (8, 4, (8, 4)), (128, 1, (128, 1)), (4, 2, (4, 16))]
)
def test_batch_arithmetic(micro, world_size, expected):
    plan = plan_batch(load_config("demo", {"train.micro_batch_size": str(micro)}), world_size)
    assert (plan.micro_batch_size, plan.accumulation_steps) == expected
    assert plan.micro_batch_size * plan.accumulation_steps * world_size == 128


def test_deepspeed_accepts_fixed_values_that_agree(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"train_batch_size": 128, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4,'
        ' "zero_optimization": {"stage": 1}}'
    )
    config = load_config("demo", {"train.micro_batch_size": "16"})
    resolved = resolve_deepspeed(str(path), config, plan_batch(config, 2), "fp32")
    assert resolved.stage == 1
    # The engine sees one micro-batch: accumulation is the gradient cache's.
    assert resolved.config["train_micro_batch_size_per_gpu"] == 64
    assert resolved.config["gradient_accumulation_steps"] == 1
    # DeepSpeed's own default would clip at 1.0.
    assert resolved.config["gradient_clipping"] == 0.0
    assert "torch_autocast" not in resolved.config


def test_deepspeed_lowers_precision_through_autocast():
    config = load_config("demo")
    resolved = resolve_deepspeed(None, config, plan_batch(config, 1), "bf16")
    assert resolved.config["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert resolved.config["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch evil']", "tags"),
        ("model: !!python/name:os.system ''", "tags"),
        ("a: !!set {x}", "tags"),
        ("a: &a [x]\nb: *a", "aliases"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "aliases"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "the key 'train' is given twice (line 2)"),
        ("[" * 300_000, "nested deeper than 20"),
        ("{a: " * 200_000, "nested deeper than 20"),
        ("- " * 200_000, "nested deeper than 20"),
        ("train: {steps: 0x" + "f" * 50_000 + "}", "does not fit into 64 bits"),
        ("train: {steps: " + "9" * 50_000 + "}", "Exceeds the limit"),
        ("train: {steps: 2020-13-45}", "month must be in"),
        ("a: \x00", "special characters are not allowed"),
        ("a: b\n---\nc: d", "expected a single document"),
        ("? [a]\n: b", "unhashable"),
        ("- a", "must be a mapping"),
        ("1: a", "must be a mapping"),
        ("extends: [demo]", "'extends' must be the name of one recipe"),
        ("extends: " + "x" * 5000, "unknown recipe"),
        ("extends: demo\nmethod: {name: [clip]}", "unknown method.name"),
        ("extends: demo\nmethod: {1: 2}", "method"),
        ("extends: demo\noptimizer: {lr: .inf}", "optimizer.lr: got inf"),
        ("extends: demo\noptimizer: {lr: .nan}", "optimizer.lr: got nan"),
        ("extends: demo\ndata: {cache_gib: .inf}", "data.cache_gib: got inf"),
        ("extends: demo\n'literal[x': 1", "unknown key 'literal[x'"),
        ('extends: demo\n"two\\nlines": 1', "unknown key"),
    ],
    ids=lambda value: value[:40] if "\x00" not in value else "nul",
)
def test_hostile_recipes_are_one_line(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert words in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1500
    assert time.process_time() - started < 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_recipes_that_are_no_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    for name in ("binary.yaml", "large.yaml", "", ".", "a" * 300, "\0", "\udcff"):
        with pytest.raises(ConfigError):
            load_config(str(tmp_path / name) if name.endswith("yaml") else name)


TREE = load_config("demo").model_dump(mode="json")
KEYS = [(section, key) for section in TREE if isinstance(TREE[section], dict) for key in TREE[section]]
SCALARS = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "1e400", "0x", "*a", "!!x y", "{", "2020-13-45", "-", "\udcff"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(place=st.sampled_from([*KEYS, *((section,) for section in TREE)]), value=VALUES)
def test_any_value_at_any_key_is_taken_or_named(place, value):
    tree = {section: dict(content) if isinstance(content, dict) else content for section, content in TREE.items()}
    if len(place) == 1:
        tree[place[0]] = value
    else:
        tree[place[0]][place[1]] = value
    try:
        config = parse_config(tree)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) <= 1500
    else:
        assert parse_config(yaml.safe_load(dump_config(config))) == config


@settings(max_examples=400)
@given(
    cut=st.integers(0, 600),
    text=st.text(max_size=40),
    overrides=st.dictionaries(
        st.sampled_from([".".join(key) for key in KEYS]) | st.text(max_size=8), st.text(max_size=12), max_size=2
    ),
)
def test_any_recipe_text_and_override_is_taken_or_named(tmp_path_factory, cut, text, overrides):
    base = "extends: clip_demo\ntrain: {steps: 7, seed: 1}\noptimizer:\n  lr: 1.0e-3\ndata: {workers: auto}\n"
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(base[:cut] + text + base[cut:], encoding="utf-8")
    try:
        load_config(str(path), overrides)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) <= 1500
