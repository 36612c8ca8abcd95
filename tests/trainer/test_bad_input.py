"""Every mistake a user can make: one clear line, exit code 2, nothing lost, no rank left hanging."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.data.bad_files import write_hostile_shard
from tests.trainer.harness import WORKER, Launched, ds_config, metrics, run_trainer, write_recipe, write_shards


def refused(arguments, cache, world_size=1):
    """Run, require exit code 2 without a traceback, and return the single line that says why."""
    finished = Launched([str(word) for word in arguments], world_size, cache).wait(timeout_s=120)
    assert 2 in finished.codes, finished.output
    assert "Traceback" not in finished.output
    assert "leaked" not in finished.output
    lines = [line for line in finished.output.splitlines() if "error: " in line]
    assert lines, finished.output
    assert len({line.split("error: ")[1] for line in lines}) == 1, finished.output
    return lines[0].split("error: ")[1]


@pytest.fixture
def recipe(shards, tmp_path):
    """A good recipe to spoil."""
    return write_recipe(tmp_path / "tiny.yaml", shards)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "declip_yfc15m_vitb32"], "did you mean 'declip_yfcc15m_vitb32'"),
        (["--optimiser.lr", "1e-3"], "unknown key 'optimiser': did you mean 'optimizer'"),
        (["--train.step", "10"], "unknown key 'train.step': did you mean 'train.steps'"),
        (["--optimizer.lr", "fast"], "optimizer.lr: got 'fast'"),
        (["--train.steps", "1.5"], "train.steps: got 1.5"),
        (["--method.name", "declipp"], "did you mean 'declip'"),
        (["--method.w_nn", "1"], "unknown key 'method.w_nn': did you mean 'method.w_nns'"),
        (["--model.name", "vit_b33"], "did you mean vit_b32"),
        (["--data.augmentation", "{augmented: {flip: 1.0}}"], "unknown field 'flip'"),
        (["--data.mask_token", "false"], "set data.mask_token true"),
        (["--train.micro_batch_size", "3"], "train.micro_batch_size 3 does not divide"),
        (["--optimizer.name", "fused_adam"], "needs a CUDA device"),
        (["--frobnicate"], "unknown argument '--frobnicate'"),
        (["--ds_config", "zero7.json"], "no such file"),
        (["--resume", "/nowhere/step_3"], "neither a checkpoint folder"),
        (["--eval.sets", "{x: {data: /nowhere}}"], "eval.sets.x: data source '/nowhere' does not exist"),
    ],
)
def test_settings(arguments, expected, recipe, cache, tmp_path):
    base = [] if "--recipe" in arguments else ["--recipe", recipe]
    assert expected in refused([*base, "--run_dir", tmp_path / "run", *arguments], cache)


def test_shards(cache, tmp_path):
    pattern = write_shards(tmp_path / "shards", shards=6)
    missing, empty, cut, garbage, nothing, _ = sorted((tmp_path / "shards").glob("*.tar"))
    missing.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:20000])
    garbage.write_bytes(b"<html>not a tar</html>" * 100)
    # Of no samples, but whole: no fault.
    nothing.write_bytes(bytes(10240))
    recipe = write_recipe(tmp_path / "tiny.yaml", pattern)
    message = refused(["--recipe", recipe, "--run_dir", tmp_path / "run"], cache, world_size=2)
    assert message.startswith("4 of 6 shards cannot be used: ")
    for path, expected in (
        (missing, "No such file"),
        (empty, "found an empty file"),
        (cut, "found the end of the file inside"),
        (garbage, "found not a tar"),
    ):
        assert f"{path}: {expected}" in message
    assert str(nothing) not in message


def test_pictures_that_are_none(cache, tmp_path):
    pattern = write_shards(tmp_path / "shards", bad=40)
    recipe = write_recipe(tmp_path / "tiny.yaml", pattern, **WORKER)
    message = refused(["--recipe", recipe, "--run_dir", tmp_path / "run"], cache, world_size=2)
    assert "could not be read" in message
    assert "data.max_bad_fraction" in message
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert records[0]["shard"].endswith(".tar")
    assert records[0]["reason"]


def test_a_hostile_shard_trains_and_each_bad_sample_is_named_and_counted(cache, tmp_path):
    expected = write_hostile_shard(tmp_path / "hostile.tar", good=100)
    data = {"train": str(tmp_path / "hostile.tar"), "max_bad_fraction": 0.9, "shuffle_window": 512}
    # Just above one epoch. That ranks and workers change nothing is shown in tests/data/test_untrusted.py.
    recipe = write_recipe(tmp_path / "tiny.yaml", "", data=data, train={"steps": 13})
    run_dir = tmp_path / "run"
    run_trainer(["--recipe", str(recipe), "--run_dir", str(run_dir)], cache, world_size=2)
    records = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {record["key"]: record["reason"] for record in records}
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[key] for key, words in expected.items())
    assert sum(record["count"] for record in metrics(run_dir) if record.get("event") == "bad_sample") == len(records)


def test_captions_missing(cache, tmp_path):
    pattern = write_shards(tmp_path / "shards")
    for shard in (tmp_path / "shards").glob("*.tar"):
        kept = shard.with_suffix(".kept")
        with tarfile.open(shard) as old, tarfile.open(kept, "w") as new:
            for member in old:
                if not (member.name.endswith("5.txt") or member.name.endswith("7.txt")):
                    new.addfile(member, old.extractfile(member))
        shutil.move(kept, shard)
    recipe = write_recipe(tmp_path / "tiny.yaml", pattern)
    message = refused(["--recipe", recipe, "--run_dir", tmp_path / "run"], cache)
    assert "lack an image or a caption" in message


def test_world_size_that_does_not_divide(recipe, cache, tmp_path):
    message = refused(["--recipe", recipe, "--run_dir", tmp_path / "run"], cache, world_size=3)
    assert "train.global_batch_size 16 is not divisible by world size 3; use 15 or 18" in message


def test_run_dir_in_use(recipe, cache, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        message = refused(["--recipe", recipe, "--run_dir", tmp_path / "run"], cache, world_size=2)
    assert "in use" in message


def test_run_dir_with_checkpoints(recipe, cache, tmp_path):
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--train.stop_after", "1"]
    run_trainer(arguments, cache)
    assert "--resume auto" in refused(arguments, cache)
    other = [*arguments, "--resume", "auto", "--train.seed", "5"]
    assert "another data order" in refused(other, cache)
    smaller = [*arguments, "--resume", "auto", "--model.embed_dim", "64"]
    assert "another model" in refused(smaller, cache)
    for name in ("step_1",):
        (tmp_path / "run" / "checkpoints" / name / "manifest.json").write_text("{")
    assert "no checkpoint of" in refused([*arguments, "--resume", "auto"], cache)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train_batch_size", 99, "train_batch_size is 99 but train.global_batch_size gives 16"),
        ("gradient_clipping", 1.0, "gradient_clipping is 1.0 but optimizer.gradient_clipping gives 0.0"),
        ("bf16", {"enabled": True}, "bf16.enabled is true but train.precision"),
        ("optimizer", {"type": "Adam"}, "remove 'optimizer'"),
        ("zero_optimization", {"stage": 5}, "expected 0, 1, 2 or 3"),
        ("zero_optimization", {"stage": 2, "overlap_com": True}, "overlap_com"),
        ("zero_optimization", {"stage": 2, "round_robin_gradients": True}, "round_robin_gradients is not supported"),
        ("zero_optimisation", {"stage": 3}, "did you mean 'zero_optimization'"),
    ],
)
def test_deepspeed_config_that_contradicts(key, value, expected, recipe, cache, tmp_path):
    tree = json.loads(Path(ds_config(2)).read_text())
    tree[key] = value
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    assert expected in refused(["--recipe", recipe, "--run_dir", tmp_path / "run", "--ds_config", path], cache)


def test_yaml_bombs_and_other_files(cache, tmp_path):
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n")
    assert "aliases" in refused(["--recipe", bomb], cache)
    code = tmp_path / "code.yaml"
    code.write_text("model: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refused(["--recipe", code], cache)
    listing = tmp_path / "list.yaml"
    listing.write_text(yaml.safe_dump([1, 2]))
    assert "must be a mapping" in refused(["--recipe", listing], cache)
