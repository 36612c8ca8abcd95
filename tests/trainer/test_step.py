"""A step that is not logged: no reads on the host, no update from gradients that are not finite, clipping as asked."""

import math
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.trainer.methods.test_gradients import SAMPLES, SETTINGS, micro_batch

# Operations that make the host wait for a CUDA device: they hand a value, or a size that depends on values, to Python.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "item"}
# Caption lengths and masked positions stay on the host (`trainer.pipeline`), where these files read them for nothing.
READ_HOST_TENSORS = ("models/text.py", "models/sequences.py")


class HostReads(TorchDispatchMode):
    """Collects the lines of code, ours or DeepSpeed's, that read values on the host."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in READS:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            line = frames[-1].line
            if not frames[-1].filename.endswith(READ_HOST_TENSORS) and 'device.type == "cpu"' not in line:
                self.places.append(line)
        return func(*args, **(kwargs or {}))


def build(stage: int, method: dict | None = None, model: str = "vit_femto_p8_32", compiled: bool = False, **optimizer):
    """An engine on the tiny model, its micro-batches, and a run that the loop's step works on."""
    from tests.trainer.harness import ds_config
    from trainer.assemble import build_method
    from trainer.config.ds_config import plan_batch, resolve_deepspeed
    from trainer.engine.compilation import compile_towers
    from trainer.engine.engine import Engine, init_distributed
    from trainer.loading import parse_config
    from trainer.pipeline import TrainData, build_tokenizer
    from trainer.ranks.launch import Place
    from trainer.state import Window

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device, place = torch.device("cpu"), Place(rank, rank, world_size, world_size, "test")
    init_distributed(device, place)
    tree = {
        "model": {"name": model},
        "method": {**SETTINGS, **(method or {})},
        "data": {"train": "none", "mask_token": True},
        "train": {"steps": 100, "global_batch_size": SAMPLES},
        "optimizer": {"lr": 1e-3, **optimizer},
    }
    config = parse_config(tree)
    resolved = resolve_deepspeed(ds_config(stage), config, plan_batch(config, world_size), "fp32")
    torch.manual_seed(0)
    method = build_method(config, build_tokenizer(config))
    if compiled:
        compile_towers(method, device)
    engine = Engine(method, config, resolved, device)
    data = TrainData.__new__(TrainData)
    data._device = device
    watchdog = SimpleNamespace(enter=lambda step, phase: None)
    run = SimpleNamespace(config=config, place=place, engine=engine, data=data, watchdog=watchdog, window=Window())
    share = SAMPLES // world_size
    batch = {**micro_batch(rank * share, (rank + 1) * share), "bad_samples": []}
    return run, batch


def reads_of_steps(rank, world_size, stages):
    from trainer.loop import train_step

    found = {}
    for stage in stages:
        run, batch = build(stage)
        # ZeRO 3 records and checks the order of parameters in its first steps.
        for step in range(1, 5):
            train_step(run, step, iter([[dict(batch)]]))
        with HostReads() as reads:
            terms, _, _ = train_step(run, 5, iter([[dict(batch)]]))
        with HostReads() as control:
            float(terms["loss"].detach())
        assert len(control.places) == 1
        found[stage] = reads.places
    return found


def test_a_step_reads_nothing_on_the_host():
    for found in run_distributed(reads_of_steps, 2, [0, 1, 2, 3], timeout_s=300):
        assert found[0] == found[1] == found[2] == []
        # DeepSpeed's own check of the norm, which cannot be turned off at ZeRO 3.
        assert len(found[3]) == 1
        assert "isfinite(norm)" in found[3][0]


def state_of(engine):
    """Copies of the weights, moments and step counters of this rank."""
    # ZeRO 3 keeps parameters whole or cut as it needs them; its masters stay where they are.
    sharded = engine.optimizer.fp32_partitioned_groups_flat if engine.stage == 3 else engine.method.parameters()
    values = [weight.detach().clone() for weight in sharded]
    for state in engine.base_optimizer.state.values():
        values += [torch.as_tensor(state[key]).clone() for key in ("exp_avg", "exp_avg_sq", "step")]
    return values


def moment_norm(engine):
    """Norm of the first moment over all parameters and ranks."""
    squared = sum(state["exp_avg"].square().sum() for state in engine.base_optimizer.state.values())
    if engine.stage:
        torch.distributed.all_reduce(squared)
    return float(squared.sqrt())


def spoiling(objective, spoiled):
    """The same objective, with an infinite loss where `spoiled`."""

    def spoil(features):
        terms = objective(features)
        return {**terms, "loss": terms["loss"] + math.inf} if spoiled else terms

    return spoil


def skip_and_clip(rank, world_size, stages):
    from trainer.loop import train_step

    clip, beta = 0.25, 0.9
    for stage in stages:
        run, batch = build(stage, gradient_clipping=clip)
        engine = run.engine
        assert engine.decides_on_device == (stage < 3)
        _, norm, _ = train_step(run, 1, iter([[dict(batch)]]))
        assert float(norm) > 4 * clip
        assert moment_norm(engine) == pytest.approx((1 - beta) * clip, rel=1e-4), stage
        before = state_of(engine)
        assert len(before) >= 4 * len(engine.base_optimizer.state)
        for step, spoiled in ((2, rank == 1), (3, rank == 0)):
            # In the loss only: by themselves its gradients would be finite.
            with mock.patch.object(engine.method, "objective", spoiling(engine.method.objective, spoiled)):
                _, norm, _ = train_step(run, step, iter([[dict(batch)]]))
            assert not norm.isfinite()
            assert all(torch.equal(old, new) for old, new in zip(before, state_of(engine), strict=True)), (stage, step)
        train_step(run, 4, iter([[dict(batch)]]))
        assert not any(torch.equal(old, new) for old, new in zip(before[:2], state_of(engine)[:2], strict=True))
        assert [bool(skipped) for _, skipped, _ in run.window.outcomes] == [False, True, True, False]


def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any():
    run_distributed(skip_and_clip, 2, [0, 1, 2, 3], timeout_s=300)


def bound_temperature(rank, world_size, stages):
    from deepspeed.utils import safe_get_full_fp32_param

    from trainer.loop import train_step

    bound = 2.0
    for stage in stages:
        # A step may move the logarithm by the learning rate at most, so it starts 0.65 above its bound.
        run, batch = build(stage, method={"logit_scale_max": bound})
        for step in (1, 2, 3):
            train_step(run, step, iter([[dict(batch)]]))
            scale = run.engine.method.model.logit_scale.log_value
            master = scale if stage == 0 else safe_get_full_fp32_param(scale)
            assert master.numel() == 1
            assert bound - 5e-3 < float(master) <= bound, (stage, step)
            assert stage == 3 or float(scale) == float(master)


def test_the_bound_of_the_temperature_reaches_the_master():
    run_distributed(bound_temperature, 2, [0, 1, 2, 3], timeout_s=300)
