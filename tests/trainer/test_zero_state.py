"""Saved state placed into engines of other world sizes, stages and offload settings, bit for bit."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.harness import ROOT
from tests.trainer.test_gradients import SETTINGS, micro_batch
from trainer.checkpoint import TrainerState, load_checkpoint, save_checkpoint

SAMPLES = 32


def build_engine(ds_name: str, seed: int, rank: int, world_size: int, optimizer: str):
    """An engine on a small DeCLIP with a frozen patch embedding."""
    from trainer.assemble import build_method
    from trainer.config import parse_config
    from trainer.ds_config import plan_batch, resolve_deepspeed
    from trainer.engine import Engine, init_distributed
    from trainer.launch import Place
    from trainer.pipeline import build_tokenizer

    tree = {
        "model": {"name": "vit_nano_p8_32", "freeze_patch_embed": True},
        "method": SETTINGS,
        "data": {"train": "none", "mask_token": True},
        "train": {"steps": 9, "global_batch_size": SAMPLES},
        # A large epsilon: Adam would turn rounding noise (the gradient of a key bias is zero) into whole steps.
        "optimizer": {"lr": 1e-3, "name": optimizer, "eps": 1e-3},
    }
    config = parse_config(tree)
    device = torch.device("cpu")
    init_distributed(device, Place(rank, rank, world_size, world_size, "test"))
    resolved = resolve_deepspeed(
        str(ROOT / "ds_configs" / f"{ds_name}.json"), config, plan_batch(config, world_size), "fp32"
    )
    torch.manual_seed(seed)
    return Engine(build_method(config, build_tokenizer(config)), config, resolved, device)


def train_steps(engine, rank: int, world_size: int, steps: int) -> None:
    share = SAMPLES // world_size
    for _ in range(steps):
        terms = engine("train", {"micro_batches": [micro_batch(rank * share, (rank + 1) * share)]})
        engine.backward(terms["loss"])
        engine.step()
        engine.method.after_step()


def full_parameters(engine) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {}
    for name, parameter in engine.method.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            found[name] = parameter.detach().clone()
    return found


def save_on_rank(rank: int, world_size: int, ds_name: str, optimizer: str, folder: Path) -> dict:
    """Three steps, a checkpoint, and two more steps: the state at the checkpoint and after."""
    engine = build_engine(ds_name, 1, rank, world_size, optimizer)
    train_steps(engine, rank, world_size, 3)
    state = TrainerState(3, "", "", "", "", {}, method_state=engine.method.method_state())
    save_checkpoint(engine, folder, state, rank, world_size)
    at_checkpoint = full_parameters(engine)
    train_steps(engine, rank, world_size, 2)
    return {"saved": at_checkpoint, "after": full_parameters(engine)}


def load_on_rank(rank: int, world_size: int, ds_name: str, optimizer: str, folder: Path) -> dict:
    """Another initialisation, the checkpoint, two steps."""
    engine = build_engine(ds_name, 2, rank, world_size, optimizer)
    state = load_checkpoint(engine, folder / "step_3", rank, world_size)
    engine.method.load_method_state(state.method_state)
    loaded = full_parameters(engine)
    train_steps(engine, rank, world_size, 2)
    return {"loaded": loaded, "after": full_parameters(engine)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer"),
    [
        ((1, "zero2"), (1, "zero2"), "adamw"),
        ((2, "zero3"), (2, "zero3"), "adamw"),
        ((2, "zero2"), (1, "zero3"), "adamw"),
        ((2, "zero3"), (1, "zero0"), "adamw"),
        ((1, "zero0"), (2, "zero1"), "adamw"),
        ((2, "zero1"), (2, "zero2_offload"), "adamw"),
        ((1, "zero2_offload"), (2, "zero3"), "adamw"),
        ((2, "zero1"), (1, "zero2"), "sgd"),
    ],
)
def test_state_moves_bitwise(saved, loaded, optimizer, tmp_path):
    before = run_distributed(save_on_rank, saved[0], saved[1], optimizer, tmp_path)[0]
    after = run_distributed(load_on_rank, loaded[0], loaded[1], optimizer, tmp_path)
    same_layout = saved == loaded
    for ranks in after:
        for name, value in before["saved"].items():
            assert torch.equal(ranks["loaded"][name], value), name
        for name, value in before["after"].items():
            if same_layout:
                assert torch.equal(ranks["after"][name], value), name
            else:
                moved = (value - before["saved"][name]).abs().max()
                assert (ranks["after"][name] - value).abs().max() <= 1e-6 + 1e-3 * moved, name
