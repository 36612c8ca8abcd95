"""Saves that fail on one rank, damage on disk, hostile files, and the command line that looks after it all."""

import argparse
import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from data.errors import DataError
from tests.distributed import run_distributed
from tests.trainer.engines import build_engine, full_state, train_steps
from tests.trainer.harness import ROOT, ds_config, metrics, write_recipe
from trainer.checkpoint import (
    TrainerState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prepare_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from trainer.checkpoint.__main__ import main
from trainer.errors import ConfigError, SaveError


class Marker:
    """Unpickling one leaves a trace: this is what a hostile file would do worse."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def message_of(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


def live_through_failures(rank: int, world_size: int, run_dir: Path) -> dict:
    """One engine at ZeRO 2 on two ranks, and everything that can go wrong with its checkpoints."""
    checkpoints = run_dir / "checkpoints"
    engine = build_engine("zero2", 1, rank, world_size)
    found = {"estimate": prepare_checkpoints(engine, checkpoints, must_fit=True).total}
    state = TrainerState(0, "config", "", "", "", {"a": 32})

    def save(step: int) -> Path:
        state.step = step
        state.method_state = engine.method.method_state() if rank == 0 else {}
        return save_checkpoint(engine, checkpoints, state, rank, world_size)

    train_steps(engine, rank, world_size, 1)
    save(1)
    found["state"] = full_state(engine)
    train_steps(engine, rank, world_size, 1)
    # What a process killed in the middle of a save leaves behind.
    if rank == 0:
        (checkpoints / ".partial" / "step_2").mkdir(parents=True)
        (checkpoints / ".partial" / "step_2" / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    save(2)

    # The second rank sees a full file system.
    free = 1 << 20 if rank == 1 else 1 << 40
    with mock.patch("trainer.checkpoint.space.free_bytes", lambda folder: free):
        found["no room"] = message_of(SaveError, lambda: save(3))
        found["no room at start"] = message_of(ConfigError, lambda: prepare_checkpoints(engine, checkpoints, True))
        prepare_checkpoints(engine, checkpoints, must_fit=False)
    # The file system fills up while the second rank writes its second megabyte.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    found["torn"] = message_of(SaveError, lambda: save(3))
    found["no probe"] = message_of(ConfigError, lambda: prepare_checkpoints(engine, checkpoints, True))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # Flushing is where network file systems report a full disk or a used-up quota.
    full = OSError(errno.EDQUOT, "quota")
    with mock.patch("os.fsync", side_effect=full if rank == 1 else None):
        found["quota"] = message_of(SaveError, lambda: save(3))
    with mock.patch("pathlib.Path.rename", side_effect=OSError(errno.EIO, "Input/output error")):
        found["rename"] = message_of(SaveError, lambda: save(2))
    found["after failures"] = sorted(path.name for path in checkpoints.iterdir())
    # The next save starts with a folder of its own.
    torch.distributed.barrier()
    save(3)
    found["after success"] = sorted(path.name for path in checkpoints.iterdir())
    found["verified"] = [verify_checkpoint(folder) for folder in list_checkpoints(checkpoints)]

    # Only this rank's own shard and the shared small files are opened in the layout they were written in.
    opened = []
    with mock.patch("trainer.checkpoint.shards.torch.load", side_effect=recording(opened, torch.load)):
        load_checkpoint(engine, checkpoints / "step_3", rank, world_size)
    found["opened"] = opened
    other = build_engine("zero2", 1, rank, world_size, "sgd")
    found["sgd"] = message_of(ConfigError, lambda: load_checkpoint(other, checkpoints / "step_3", rank, world_size))
    other = dataclasses.replace(state, method_state={})
    found["fields"] = other.as_saved().keys() == {entry.name for entry in dataclasses.fields(state)}

    torch.distributed.barrier()
    if rank == 0:
        flip_byte(checkpoints / "step_3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
        shard = checkpoints / "step_2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": Marker(str(run_dir / "marker"))}, shard)
    torch.distributed.barrier()
    found["damaged"] = verify_checkpoint(checkpoints / "step_3")
    found["fallback"] = find_checkpoint(run_dir, "auto")
    found["code"] = message_of(ConfigError, lambda: load_checkpoint(engine, checkpoints / "step_2", rank, world_size))
    return found


def recording(opened: list[str], function):
    def recorded(path, **options):
        opened.append(Path(path).name)
        return function(path, **options)

    return recorded


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_distributed(live_through_failures, 2, run_dir, timeout_s=300)


@pytest.mark.slow
def test_failed_saves_leave_what_was_there(lived):
    run_dir, ranks = lived
    for found in ranks:
        assert "rank 1" not in found["no room"]
        assert "GiB and" in found["no room"]
        assert "GiB free" in found["no room"]
        assert found["no room at start"].startswith("no room for a checkpoint")
        assert "rank 1: " in found["torn"]
        assert "the file is too big" in found["torn"]
        assert "rank 1 cannot write checkpoints" in found["no probe"]
        assert "the quota is used up" in found["quota"]
        assert "Input/output error" in found["rename"]
        assert found["after failures"] == ["latest", "step_1", "step_2"]
        assert found["after success"] == ["latest", "step_1", "step_2", "step_3"]
        assert found["verified"] == [[], [], []]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_3"


@pytest.mark.slow
def test_estimate_is_close_and_never_too_small(lived):
    run_dir, ranks = lived
    written = sum(path.stat().st_size for path in (run_dir / "checkpoints" / "step_1").iterdir())
    assert ranks[0]["estimate"] == ranks[1]["estimate"]
    assert written <= ranks[0]["estimate"] <= 1.02 * written


@pytest.mark.slow
def test_damage_is_agreed_and_code_is_refused(lived):
    run_dir, ranks = lived
    shard = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    for rank, found in enumerate(ranks):
        assert found["damaged"] == [f"{shard.format(1)} has changed (checksum differs)"]
        folder, warnings = found["fallback"]
        assert folder.name == "step_1"
        assert [warning.split(" is damaged: ")[0].rsplit("/", 1)[1] for warning in warnings] == ["step_3", "step_2"]
        assert "holds more than tensors and plain values" in found["code"]
        assert shard.format(rank) in found["opened"]
        assert shard.format(1 - rank) not in found["opened"]
        assert "holds the state of adam" in found["sgd"]
        assert "sgd with momentum" in found["sgd"]
        assert found["fields"]
    assert not (run_dir / "marker").exists()


@pytest.mark.slow
def test_command_line(lived, tmp_path, capsys):
    run_dir, ranks = lived
    assert main(["list", str(run_dir)]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[1].strip() for row in rows] == ["3", "2", "1"]
    assert [row[3].strip() for row in rows] == ["2", "2", "2"]
    # A flipped bit shows only when every byte is read; another size shows at once.
    assert [row[7].strip().split(":")[0] for row in rows] == ["complete", "damaged", "complete"]

    assert main(["verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "step_3: zero_pp_rank_1_mp_rank_00_optim_states.pt has changed" in lines[0]
    assert lines[-1].endswith("step_1: every byte is as written")
    assert main(["verify", str(run_dir), "--step", "1"]) == 0

    out, rest = tmp_path / "weights.safetensors", tmp_path / "rest.safetensors"
    arguments = ["consolidate", str(run_dir), "--step", "1", "--out", str(out), "--full_state", str(rest)]
    assert main(arguments) == 0
    weights, state = load_file(out), load_file(rest)
    assert weights.keys() == ranks[0]["state"].keys()
    for name, value in ranks[0]["state"].items():
        assert torch.equal(weights[name], value), name
    trained = {name for name in state if name.startswith("optimizer/exp_avg_sq/")}
    frozen = {"model.image_tower.patch_embed.weight"} & weights.keys()
    assert 0 < len(trained) < len(weights) - len(frozen)
    assert state["method/queue/rows"].shape[0] == 96
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rest.safetensors", "weights.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "/nowhere"], "no such folder"),
        (["verify", "{empty}"], "has no checkpoints"),
        (["verify", "{run}", "--step", "7"], "no checkpoint of step 7; it has those of steps 3, 2, 1"),
        (["consolidate", "{run}", "--out", "{empty}/w.safetensors"], "step_3 is damaged"),
        (["consolidate", "{run}", "--step", "1", "--out", "{empty}/a/w.safetensors"], "is no folder"),
        (["consolidate", "{run}", "--step", "1", "--out", "{empty}"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message, lived, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        main([text.format(run=lived[0], empty=tmp_path) for text in arguments])


def test_module_runs_and_exits_with_two(tmp_path):
    command = [sys.executable, "-m", "trainer.checkpoint", "list", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        f"error: {tmp_path} has no checkpoints; give the folder of a run (what --run_dir was)"
    ]


def train_on_a_full_disk(rank: int, world_size: int, recipe: Path, run_dir: Path) -> list[str]:
    """A run whose first and last save find no room, and its continuation."""
    from trainer.assemble import assemble
    from trainer.loading import load_config
    from trainer.loop import train
    from trainer.ranks.launch import Place

    def start(resume: str, problems: list[str | None]) -> str:
        arguments = argparse.Namespace(ds_config=ds_config(0), resume=resume, dry_run=False)
        config = load_config(str(recipe))
        run = assemble(config, arguments, run_dir, Place(0, 0, 1, 1, "test"))
        with mock.patch("trainer.checkpoint.save.shortage", side_effect=problems):
            try:
                train(run)
            except ConfigError as error:
                return str(error)
            finally:
                run.close()
        return ""

    # Saves of steps 2, 4, 6 and 7.
    return [start("never", ["it needs 9 GiB", None, None, "it needs 8 GiB"]), start("auto", [None])]


@pytest.mark.slow
def test_training_goes_on_when_a_save_fails_unless_it_is_the_last(shards, tmp_path):
    train = {"steps": 7, "global_batch_size": 8}
    sections = {"checkpoint": {"every": 2}, "train": train}
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, "clip", **sections)
    failed, continued = run_distributed(train_on_a_full_disk, 1, recipe, tmp_path / "run", timeout_s=300)[0]
    assert failed.startswith("no checkpoint of step 7 was written: it needs 8 GiB; ")
    assert failed.endswith("--resume auto goes on from the checkpoint of step 6")
    assert continued == ""
    saves = [(record["event"], record["step"]) for record in metrics(tmp_path / "run") if "event" in record]
    assert saves == [
        ("checkpoint_failed", 2),
        ("checkpoint", 4),
        ("checkpoint", 6),
        ("resumed", 6),
        ("checkpoint", 7),
    ]
