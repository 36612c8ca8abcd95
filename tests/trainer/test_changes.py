"""What a resumed run may change: each difference is listed with what it does, or refused."""

from pathlib import Path

import pytest
import yaml

from trainer.changes import find_changes
from trainer.checkpoint import TrainerState
from trainer.config.recipe import dump_config
from trainer.errors import ConfigError
from trainer.loading import load_config
from trainer.run import choose_run_dir

# Begins at 0, is at 1e-3 from step 3 on, and at 0 again at step 20.
BASE = {
    "train.steps": "20",
    "schedule.warmup_steps": "3",
    "schedule.start_lr": "0.0",
    "schedule.end_lr": "0.0",
    "optimizer.lr": "1e-3",
    "train.precision": "fp32",
    "data.train": "{d1/a: 1, d1/b: 1}",
}
SETUP = {"ranks": 2, "precision": "fp32", "deepspeed": {"zero_optimization": {"stage": 2}, "aio": {"block_size": 1}}}


def changes(overrides, *, step=10, recipe="demo", setup=SETUP, text=None):
    """A run of `demo` at a step, continued by `recipe` with other values."""
    saved = TrainerState(step, text or dump_config(load_config("demo", BASE)), "", "", "", {}, setup=SETUP)
    return find_changes(saved, load_config(recipe, BASE | overrides), setup, "runs/x/checkpoints/step_10")


def test_nothing_changed_says_nothing():
    assert changes({}).lines == []
    assert changes({"train.stop_after": "3"}).lines == []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("data.workers", "3", "data.workers: 2 -> 3"),
        ("data.train", "{d2/a: 1, d2/b: 1}", 'data.train: {"d1/a": 1.0, "d1/b": 1.0} -> {"d2/a": 1.0, "d2/b": 1.0} '),
        ("data.cache_dir", "/x", "data.cache_dir: null -> /x"),
        ("data.augmentation", "{augmented: none}", "(other views from here on)"),
        ("checkpoint.every", "7", "checkpoint.every: "),
        ("eval.sets", "{}", "eval.sets: "),
        ("logging.tensorboard", "false", "logging.tensorboard: true -> false"),
        ("guard.max_rollbacks", "9", "guard.max_rollbacks: 3 -> 9"),
        ("train.log_every", "3", "train.log_every: "),
        ("train.timeout_minutes", "3", "train.timeout_minutes: 30.0 -> 3.0"),
        ("train.precision", "bf16", "train.precision: fp32 -> bf16 (other rounding from here on)"),
        ("train.ema_decay", "0.9", "train.ema_decay: null -> 0.9 (another average from here on)"),
        ("train.micro_batch_size", "8", "train.micro_batch_size: auto -> 8 (the same run but for rounding)"),
        ("optimizer.weight_decay", "0.5", "-> 0.5 (from here on)"),
        ("method.w_iss", "0.5", "method.w_iss: null -> 0.5 (another loss from here on)"),
        ("model.pretrained", "x", "model.pretrained: null -> x (only a new run begins with it)"),
        ("model.patch_dropout", "0.5", "model.patch_dropout: 0.0 -> 0.5 (trained so from here on)"),
    ],
)
def test_what_may_change_is_a_line(key, value, line):
    found = changes({key: value})
    assert list(found.values) == [key]
    assert found.lines[0].startswith("changed since the saved run: ")
    assert line in found.lines[0]
    assert len(found.lines) == 1


@pytest.mark.parametrize(
    ("overrides", "step", "expected"),
    [
        (
            {"train.steps": "40"},
            20,
            ["train.steps: 20 -> 40 (the schedule ends at step 40)", "step 20 was trained at 0.00e+00; step 21 is at ",
             "with the saved settings 0.00e+00 (the saved run had finished its schedule)"],
        ),
        ({"train.steps": "12"}, 10, ["train.steps: 20 -> 12", "step 10 was trained at ", "step 11 is at 3.02e-05"]),
        ({"optimizer.lr": "5e-4"}, 10, ["optimizer.lr: 0.001 -> 0.0005 (from here on)", "step 11 is at "]),
        ({"schedule.end_lr": "1e-4"}, 10, ["schedule.end_lr: 0.0 -> 0.0001", "step 11 is at "]),
        ({"schedule.warmup_steps": "15"}, 10, ["schedule.warmup_steps: 3 -> 15", "step 11 is at 7.14e-04"]),
    ],
)  # fmt: skip
def test_what_changes_the_rate_says_what_it_jumps_to(overrides, step, expected):
    lines = changes(overrides, step=step).lines
    assert len(lines) == 2
    assert lines[1].startswith("learning rate: step ")
    assert all(words in "\n".join(lines) for words in expected), lines


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.seed": "5"}, "another data order (train.seed 0, now 5)"),
        ({"train.global_batch_size": "64"}, "another data order (train.global_batch_size "),
        ({"data.shuffle_window": "3"}, "another data order (data.shuffle_window "),
        ({"model.embed_dim": "64"}, "another model (model.embed_dim null, now 64)"),
        ({"model.activation": "gelu"}, "another model (model.activation quick_gelu, now gelu)"),
        ({"model.pixel_mean": "[0, 0, 0]"}, "another model (model.pixel_mean "),
        ({"model.name": "vit_b32", "train.seed": "1"}, "another model and another data order (model.name "),
        ({"train.steps": "9"}, "train.steps 9 is before checkpoint runs/x/checkpoints/step_10, which is of step 10"),
    ],
)
def test_what_would_be_a_wrong_run_is_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        changes(overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_method_is_refused_and_a_tower_may_move(tmp_path):
    with pytest.raises(ConfigError, match=r"another method \(method.name declip, now clip\)"):
        changes({}, recipe="clip_demo")
    text = dump_config(load_config("demo", BASE | {"model.name": "hf:vit"}))
    assert list(changes({"model.name": "hf:/elsewhere/vit"}, text=text).values) == ["model.name"]
    with pytest.raises(ConfigError, match="another model"):
        changes({"model.name": "hf:/elsewhere/bert"}, text=text)


def test_the_setup_around_the_configuration():
    setup = {"ranks": 1, "precision": "bf16", "device": "cpu", "deepspeed": {"zero_optimization": {"stage": 1}}}
    assert changes({}, setup=setup).lines == [
        "changed since the saved run: ranks: 2 -> 1 (the same run but for rounding)",
        "changed since the saved run: precision: fp32 -> bf16 (other rounding from here on)",
        "changed since the saved run: deepspeed.zero_optimization.stage: 2 -> 1 (the same run but for rounding)",
        "changed since the saved run: deepspeed.aio.block_size: 1 -> null (the same run but for rounding)",
    ]
    # Once, where it follows from a setting.
    assert list(changes({"train.precision": "bf16"}, setup=SETUP | {"precision": "bf16"}).values) == ["train.precision"]


def test_settings_that_one_version_does_not_know():
    tree = yaml.safe_load(dump_config(load_config("demo", BASE)))
    del tree["train"]["ema_decay"], tree["method"]["logit_scale_min"], tree["guard"]
    tree["data"]["no_more"] = 3
    text = yaml.safe_dump(tree)
    found = changes({"train.ema_decay": "0.5", "guard.spike_steps": "4"}, text=text)
    assert found.values == {
        "data.no_more": (3, "(no longer a setting)"),
        "train.ema_decay": (None, 0.5),
        "guard.spike_steps": (10, 4),
    }
    assert changes({}, text="no: [configuration").lines == []


@pytest.mark.parametrize(
    ("given", "resume", "expected"),
    [
        ("runs/y", "auto", "runs/y"),
        ("runs/y", "runs/x/checkpoints/step_3", "runs/y"),
        (None, "never", None),
        (None, "runs/x", "runs/x"),
        (None, "runs/x/checkpoints/step_3", "runs/x"),
    ],
)
def test_which_folder_a_run_goes_on_in(given, resume, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/x/checkpoints/step_3").mkdir(parents=True)
    Path("backup/step_3").mkdir(parents=True)
    assert choose_run_dir(given, resume) == (expected and Path(expected))
    with pytest.raises(ConfigError, match="add --run_dir DIR"):
        choose_run_dir(None, "auto")
    for nowhere in ("Auto", "backup/step_3", "backup"):
        with pytest.raises(ConfigError, match=f"--resume {nowhere}: neither the folder of a run.*add --run_dir DIR"):
            choose_run_dir(None, nowhere)
