"""Small engines inside spawned ranks, for tests that need DeepSpeed but no whole run."""

import torch

from tests.trainer.harness import ROOT
from tests.trainer.methods.test_gradients import SETTINGS, micro_batch

SAMPLES = 32
_LINEAR = torch.nn.functional.linear


def build_engine(ds_name: str, seed: int, rank: int, world_size: int, optimizer: str = "adamw"):
    """An engine on a small DeCLIP with a frozen patch embedding."""
    from trainer.assemble import build_method
    from trainer.config.ds_config import plan_batch, resolve_deepspeed
    from trainer.engine.engine import Engine, init_distributed
    from trainer.loading import parse_config
    from trainer.pipeline import build_tokenizer
    from trainer.ranks.launch import Place

    tree = {
        "model": {"name": "vit_femto_p8_32", "freeze_patch_embed": True},
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
    # ZeRO 3 replaces it for the rest of the process, and its sums round differently; a run has one stage only.
    torch.nn.functional.linear = _LINEAR
    return Engine(build_method(config, build_tokenizer(config)), config, resolved, device)


def train_steps(engine, rank: int, world_size: int, steps: int, accumulation: int = 1) -> None:
    """Steps on one global batch, each rank's share cut into `accumulation` micro-batches."""
    share = SAMPLES // world_size
    size = share // accumulation
    bounds = [rank * share + i * size for i in range(accumulation)]
    for _ in range(steps):
        terms = engine("train", {"micro_batches": [micro_batch(begin, begin + size) for begin in bounds]})
        engine.backward(terms["loss"])
        engine.step()
        engine.method.after_step()


def full_state(engine) -> dict[str, torch.Tensor]:
    """The method's state dict with whole parameters, copied."""
    import deepspeed

    found = {}
    for name, value in engine.method.state_dict(keep_vars=True).items():
        partitioned = engine.stage == 3 and isinstance(value, torch.nn.Parameter)
        with deepspeed.zero.GatheredParameters([value] if partitioned else [], enabled=partitioned):
            found[name] = value.detach().clone()
    return found
