"""The moving average of the weights at every ZeRO stage: its values, evaluation with it, checkpoints and resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.trainer.engines import build_engine, full_state, train_steps
from tests.trainer.harness import ds_config, metrics, run_trainer, steps, write_eval_set, write_recipe, write_shards
from trainer.checkpoint import TrainerState, load_checkpoint, read_weights, save_checkpoint
from trainer.checkpoint.shards import read_optimizer_state
from trainer.engine.ema import AVERAGE, averaged_weights, update_average
from trainer.export.export import load_run

DECAY = 0.8
# What is saved by number of ranks: name of the DeepSpeed file, optimizer.
SAVED = {
    1: [("zero0", "adamw"), ("zero2_offload", "adamw")],
    2: [("zero1", "sgd"), ("zero2", "adamw"), ("zero3", "adamw")],
}
# What continues which: saved with, loaded into, optimizer.
LOADED = {
    1: [("zero0", "zero0", "adamw"), ("zero3", "zero0", "adamw")],
    2: [("zero3", "zero3", "adamw"), ("zero2_offload", "zero2", "adamw"), ("zero1", "zero1", "sgd")],
}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def next_average(engine, rank: int, world_size: int) -> dict[str, Tensor]:
    """One step, and the state that an evaluation after it would see."""
    train_steps(engine, rank, world_size, 1)
    update_average(engine)
    with averaged_weights(engine):
        return full_state(engine)


def average_on_rank(rank: int, world_size: int, folder: Path) -> list[str]:
    """Four steps, a checkpoint and one more step; what is not as it should be."""
    problems = []
    for ds_name, optimizer in SAVED[world_size]:
        engine = build_engine(ds_name, 1, rank, world_size, optimizer)
        engine.ema_decay = DECAY
        trained = [name for group in engine.parameter_names for name in group]
        expected = {}
        for _ in range(4):
            evaluated = next_average(engine, rank, world_size)
            state = full_state(engine)
            for name in trained:
                expected[name] = torch.lerp(expected.get(name, state[name]), state[name], 1 - DECAY)
            # Frozen parameters and buffers are not averaged, and the exchange leaves nothing behind.
            problems += differing({**state, **expected}, evaluated) + differing(state, full_state(engine))
        path = folder / f"{ds_name}_{optimizer}"
        state_of_run = TrainerState(4, "", "", "", "", {}, method_state=engine.method.method_state())
        save_checkpoint(engine, path, state_of_run, rank, world_size)
        problems += differing(expected, read_optimizer_state(path / "step_4")[0][AVERAGE])
        after = next_average(engine, rank, world_size)
        if rank == 0:
            torch.save({"at": {**state, **expected}, "after": after}, path / "expected.pt")
    return problems


def resume_on_rank(rank: int, world_size: int, folder: Path) -> list[str]:
    """The checkpoints in other engines, and one more step; what is not as it was."""
    problems = []
    for source, ds_name, optimizer in LOADED[world_size]:
        expected = torch.load(folder / f"{source}_{optimizer}" / "expected.pt")
        engine = build_engine(ds_name, 2, rank, world_size, optimizer)
        engine.ema_decay = DECAY
        loaded = load_checkpoint(engine, folder / f"{source}_{optimizer}" / "step_4", rank, world_size)
        engine.method.load_method_state(loaded.method_state)
        with averaged_weights(engine):
            problems += differing(expected["at"], full_state(engine))
        if source == ds_name:
            problems += differing(expected["after"], next_average(engine, rank, world_size))
    return problems


@pytest.mark.slow(seconds=80)
def test_the_average_is_exact_at_every_stage_and_moves_between_them(tmp_path):
    for world_size in SAVED:
        assert run_distributed(average_on_rank, world_size, tmp_path, timeout_s=400) == [[]] * world_size
    for world_size in LOADED:
        assert run_distributed(resume_on_rank, world_size, tmp_path, timeout_s=400) == [[]] * world_size


@pytest.mark.slow(seconds=80)
def test_a_run_evaluates_and_exports_its_average_and_resumes_bitwise(tmp_path):
    evaluation = {"every": 2, "sets": {"shapes": {"data": str(write_eval_set(tmp_path / "eval"))}}, "batch_size": 16}
    train = {"steps": 6, "ema_decay": 0.5, "global_batch_size": 16}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        write_shards(tmp_path / "shards"),
        train=train,
        eval=evaluation,
        checkpoint={"every": 2},
        optimizer={"lr": 0.01},
    )
    common = ["--recipe", str(recipe), "--ds_config", ds_config(3)]
    run_trainer([*common, "--run_dir", str(tmp_path / "whole")], tmp_path, world_size=2)
    parts = [*common, "--run_dir", str(tmp_path / "parts"), "--resume", "auto"]
    run_trainer([*parts, "--train.stop_after", "3"], tmp_path, world_size=2)
    run_trainer(parts, tmp_path, world_size=2)
    assert steps(tmp_path / "whole") == steps(tmp_path / "parts")
    figures = [
        [{**record, "time": None} for record in metrics(tmp_path / name) if record.get("event") == "eval"]
        for name in ("whole", "parts")
    ]
    assert len(figures[0]) == 3 and figures[0] == figures[1]
    folders = [tmp_path / name / "checkpoints" / "step_6" for name in ("whole", "parts")]
    averages = [read_optimizer_state(folder)[0][AVERAGE] for folder in folders]
    weights = read_weights(folders[0])
    assert all(torch.equal(averages[1][name], value) for name, value in averages[0].items())
    exported = load_run(tmp_path / "whole")
    assert exported.weights == "ema" and load_run(tmp_path / "whole", weights="trained").weights == "trained"
    name = "text_tower.ln_final.bias"
    assert torch.equal(exported.model.state_dict()[name], averages[0][f"model.{name}"])
    assert not torch.equal(exported.model.state_dict()[name], weights[f"model.{name}"])
