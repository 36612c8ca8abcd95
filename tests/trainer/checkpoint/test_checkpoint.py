"""Which checkpoint is found, which are kept, and what damage is noticed."""

import hashlib
import json

import pytest
import torch.distributed as dist

from trainer.checkpoint import find_checkpoint, list_checkpoints, prune_checkpoints, verify_checkpoint
from trainer.errors import ConfigError


@pytest.fixture(autouse=True, scope="module")
def alone(tmp_path_factory):
    """A process group of this process only: finding a checkpoint is collective."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_checkpoint(run_dir, step, content=b"weights"):
    folder = run_dir / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": {"model.pt": entry}}))
    return folder


def rename_in_manifest(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: manifest["files"]["model.pt"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_newest_is_by_number_and_partial_ones_do_not_count(tmp_path):
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / ".partial" / "step_200").mkdir(parents=True)
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["step_100", "step_20", "step_5"]
    assert find_checkpoint(tmp_path, "auto") == (tmp_path / "checkpoints" / "step_100", [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.pt").unlink(), "model.pt is missing"),
        (lambda folder: (folder / "model.pt").write_bytes(b"weight"), "6 bytes instead of 7"),
        (lambda folder: (folder / "model.pt").write_bytes(b"weighty"), None),
        (lambda folder: (folder / "model.pt").write_bytes(b"Weights"), "checksum differs"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda folder: rename_in_manifest(folder, "../../../elsewhere"), "manifest.json is missing or damaged"),
    ],
)
def test_damage_is_noticed_and_the_one_before_is_used(damage, reason, tmp_path):
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    damage(bad)
    problems = verify_checkpoint(bad)
    assert len(problems) == 1
    assert reason is None or reason in problems[0]
    found, warnings = find_checkpoint(tmp_path, "auto")
    assert found == good
    assert len(warnings) == 1
    assert problems[0] in warnings[0]
    with pytest.raises(ConfigError, match="choose another checkpoint"):
        find_checkpoint(tmp_path, str(bad))


def test_nothing_usable_is_an_error_and_nothing_at_all_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path, "auto") == (None, [])
    (make_checkpoint(tmp_path, 1) / "model.pt").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be used"):
        find_checkpoint(tmp_path, "auto")


def test_resume_from_elsewhere(tmp_path):
    folder = make_checkpoint(tmp_path / "a", 3)
    assert find_checkpoint(tmp_path / "b", str(folder))[0] == folder
    assert find_checkpoint(tmp_path / "b", str(tmp_path / "a"))[0] == folder


def test_another_run_does_not_continue_in_this_folder(tmp_path):
    make_checkpoint(tmp_path / "a", 3)
    folder = make_checkpoint(tmp_path / "b", 5)
    with pytest.raises(ConfigError, match="is of another run"):
        find_checkpoint(tmp_path / "a", str(folder))


def test_going_back_leaves_the_later_branch(tmp_path):
    from trainer.recovery import leave_later_branch

    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".partial").mkdir()
    leave_later_branch(tmp_path, checkpoints / "step_20")
    assert [folder.name for folder in list_checkpoints(checkpoints)] == ["step_20", "step_10"]
    assert (checkpoints / ".abandoned-step_30" / "model.pt").is_file()
    assert not (checkpoints / ".partial").exists()
    assert find_checkpoint(tmp_path, "auto")[0].name == "step_20"


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(10, 110, 10):
        make_checkpoint(tmp_path, step)
    removed = prune_checkpoints(tmp_path / "checkpoints", keep_last=2, keep_every=50)
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["step_100", "step_90", "step_50"]
    assert len(removed) == 7
    assert not list((tmp_path / "checkpoints").glob(".removing*"))


def test_damaged_checkpoints_never_push_out_the_last_good_one(tmp_path):
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    for step in (30, 40):
        (tmp_path / "checkpoints" / f"step_{step}" / "model.pt").write_bytes(b"torn")
    removed = prune_checkpoints(tmp_path / "checkpoints", keep_last=1, keep_every=0)
    assert [folder.name for folder in removed] == ["step_10"]
    assert find_checkpoint(tmp_path, "auto")[0].name == "step_20"
    make_checkpoint(tmp_path, 50)
    prune_checkpoints(tmp_path / "checkpoints", keep_last=1, keep_every=0)
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["step_50"]
