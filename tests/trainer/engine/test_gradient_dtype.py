"""In what gradients travel: one setting, at every stage, whatever class a module has. Buckets that fit the model."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.harness import ds_config
from tests.trainer.methods.test_gradients import SAMPLES, SETTINGS, micro_batch
from trainer.config.ds_config import plan_batch, resolve_deepspeed
from trainer.loading import load_config, parse_config

# Of torch's own classes, for which DeepSpeed has rules of its own, and of this project's.
WEIGHTS = ("simsiam.projector.0.weight", "mlm.decoder.weight", "model.text_tower.text_projection.weight")


def travelled_in_bf16(rank: int, world_size: int, cases: list[tuple[int, str, str]]) -> list[dict]:
    """For each (stage, precision, gradient_dtype), by weight: whether a bf16 could hold all its averaged gradients.

    And whether ZeRO 3 gathers that weight as it is.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from trainer.building import build_method
    from trainer.engine.engine import Engine, init_distributed
    from trainer.pipeline import build_tokenizer
    from trainer.ranks.launch import Place

    device, share, results = torch.device("cpu"), SAMPLES // world_size, []
    init_distributed(device, Place(rank, rank, world_size, world_size, "test"))
    for stage, precision, dtype in cases:
        tree = {
            "model": {"name": "vit_femto_p8_32"},
            "method": SETTINGS,
            "data": {"train": "none", "mask_token": True},
            "train": {"steps": 1, "global_batch_size": SAMPLES, "gradient_dtype": dtype},
            "optimizer": {"lr": 1e-9},
        }
        config = parse_config(tree)
        torch.manual_seed(0)
        method = build_method(config, build_tokenizer(config))
        before = {name: method.get_parameter(name).detach().clone() for name in WEIGHTS}
        resolved = resolve_deepspeed(ds_config(stage), config, plan_batch(config, world_size), precision)
        engine = Engine(method, config, resolved, device)
        engine.backward(engine("train", {"micro_batches": [micro_batch(rank * share, (rank + 1) * share)]})["loss"])
        found = {}
        for name in WEIGHTS:
            parameter = engine.method.get_parameter(name)
            gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
            with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else [], enabled=stage == 3):
                kept = torch.equal(parameter.detach(), before[name])
            found[name] = (torch.equal(gradient, gradient.bfloat16().float()), kept)
        if stage:
            elements = sum(value.numel() for value in method.parameters()) if stage < 3 else None
            assert elements is None or engine.optimizer.reduce_bucket_size <= elements + 1
        results.append(found)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_travel_in_the_type_of_the_setting_at_every_stage(precision):
    cases = [(stage, precision, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
    for found in run_distributed(travelled_in_bf16, 2, cases, timeout_s=300):
        for (stage, _, dtype), by_weight in zip(cases, found, strict=True):
            for name, (in_bf16, kept) in by_weight.items():
                assert in_bf16 == (dtype == "bf16"), (stage, dtype, name)
                assert kept, (stage, dtype, name)


def test_what_deepspeed_is_told():
    config = load_config("demo", {"train.gradient_dtype": "bf16"})
    plan = plan_batch(config, 2)
    for precision, lowered in (("fp32", False), ("tf32", False), ("bf16", True), ("fp16", True)):
        resolved = resolve_deepspeed(ds_config(2), config, plan, precision)
        assert resolved.config["communication_data_type"] == "bf16"
        # Not said by the file, so neither by what the run folder keeps.
        assert "communication_data_type" not in resolved.portable
        assert ("torch_autocast" in resolved.config) == lowered
        if lowered:
            assert resolved.config["torch_autocast"]["lower_precision_safe_modules"] == []
