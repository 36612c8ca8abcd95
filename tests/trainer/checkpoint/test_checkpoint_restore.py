"""Saved state placed into engines of other world sizes, stages, offload and accumulation settings, bit for bit."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.engines import build_engine, full_state, train_steps
from trainer.checkpoint import TrainerState, load_checkpoint, read_weights, save_checkpoint

# What is saved: name of the DeepSpeed file, optimizer, by number of ranks.
SAVED = {
    1: [("zero0", "adamw"), ("zero2_offload", "adamw")],
    2: [("zero1", "adamw"), ("zero2", "adamw"), ("zero3", "adamw"), ("zero3_offload", "adamw"), ("zero1", "sgd")],
}
# Where it goes: (ranks, DeepSpeed file), micro-batches per step, DeepSpeed file; by number of ranks.
LOADED = {
    1: [((1, "zero2_offload"), 1, "zero3"), ((2, "zero3"), 2, "zero0"), ((2, "zero1"), 1, "zero2")],
    2: [
        ((2, "zero3"), 1, "zero3"),
        ((2, "zero2"), 1, "zero2"),
        ((1, "zero0"), 2, "zero1"),
        ((2, "zero1"), 1, "zero2_offload"),
        ((2, "zero3_offload"), 1, "zero2"),
        ((2, "zero2"), 1, "zero3_offload"),
    ],
    4: [((2, "zero3"), 2, "zero3"), ((2, "zero1"), 1, "zero3"), ((2, "zero3"), 1, "zero2")],
}


def save_on_rank(rank: int, world_size: int, folder: Path) -> dict:
    """Three steps, a checkpoint, and two more steps: the state at the checkpoint and after."""
    found = {}
    for ds_name, optimizer in SAVED[world_size]:
        engine = build_engine(ds_name, 1, rank, world_size, optimizer)
        train_steps(engine, rank, world_size, 3)
        state = TrainerState(3, "", "", "", "", {}, method_state=engine.method.method_state())
        save_checkpoint(engine, folder / f"{world_size}_{ds_name}_{optimizer}", state, rank, world_size)
        at_checkpoint = full_state(engine)
        train_steps(engine, rank, world_size, 2)
        found[ds_name, optimizer] = {"saved": at_checkpoint, "after": full_state(engine)}
    return found


def load_on_rank(rank: int, world_size: int, folder: Path, cases: list) -> list[dict]:
    """Another initialisation, the checkpoint, two steps; for each case."""
    found = []
    for (saved_ranks, saved_name), accumulation, ds_name, optimizer in cases:
        engine = build_engine(ds_name, 2, rank, world_size, optimizer)
        path = folder / f"{saved_ranks}_{saved_name}_{optimizer}" / "step_3"
        state = load_checkpoint(engine, path, rank, world_size)
        engine.method.load_method_state(state.method_state)
        loaded = full_state(engine)
        train_steps(engine, rank, world_size, 2, accumulation)
        found.append({"loaded": loaded, "after": full_state(engine)})
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the checkpoints, and what was saved by (ranks, DeepSpeed file, optimizer)."""
    folder = tmp_path_factory.mktemp("saved")
    states = {}
    for world_size in SAVED:
        for key, state in run_distributed(save_on_rank, world_size, folder, timeout_s=300)[0].items():
            states[world_size, *key] = state
    return folder, states


@pytest.mark.slow
@pytest.mark.parametrize("world_size", list(LOADED))
def test_state_moves_bitwise(world_size, saved, tmp_path):
    folder, states = saved
    cases = [(*case, "adamw") for case in LOADED[world_size]]
    if world_size == 1:
        cases.append(((2, "zero1"), 1, "zero2", "sgd"))
    for rank_states in run_distributed(load_on_rank, world_size, folder, cases, timeout_s=300):
        for (source, accumulation, ds_name, optimizer), found in zip(cases, rank_states, strict=True):
            before = states[*source, optimizer]
            same_layout = source == (world_size, ds_name) and accumulation == 1
            for name, value in before["saved"].items():
                assert torch.equal(found["loaded"][name], value), (source, ds_name, name)
            for name, value in before["after"].items():
                if same_layout:
                    assert torch.equal(found["after"][name], value), (source, ds_name, name)
                elif value.is_floating_point():
                    moved = (value - before["saved"][name]).abs().max()
                    assert (found["after"][name] - value).abs().max() <= 1e-6 + 1e-3 * moved, (source, ds_name, name)


@pytest.mark.slow
def test_weights_are_read_without_ranks(saved):
    folder, states = saved
    for (world_size, ds_name, optimizer), state in states.items():
        found = read_weights(folder / f"{world_size}_{ds_name}_{optimizer}" / "step_3")
        assert list(found) == list(state["saved"])
        for name, value in state["saved"].items():
            assert torch.equal(found[name], value), (ds_name, name)
