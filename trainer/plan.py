"""What a run will take, before it takes it: parameters, memory per rank, communication per step."""

import os

from trainer.config.ds_config import BatchPlan, ResolvedDeepSpeed
from trainer.config.recipe import dump_config
from trainer.config.sections import RunConfig
from trainer.methods.base import Method

_FP32 = 4


def memory_per_rank(
    parameters: int, stage: int, world_size: int, offload_optimizer: bool, averages: bool = False
) -> dict[str, float]:
    """Bytes of model state on one rank's device: fp32 parameters, gradients, Adam's two moments, ZeRO's master copy.

    Args:
        parameters: Trained parameters.
        stage: ZeRO stage.
        world_size: Ranks.
        offload_optimizer: Moments and master live in host memory.
        averages: The optimizer also keeps a moving average of the weights.
    """
    share = parameters / world_size
    masters = 0.0 if stage == 0 else share
    moments = (3.0 if averages else 2.0) * (parameters if stage == 0 else share)
    return {
        "parameters": _FP32 * (share if stage == 3 else parameters),
        "gradients": _FP32 * (share if stage >= 2 else parameters),
        "optimizer": 0.0 if offload_optimizer else _FP32 * (masters + moments),
    }


def communication_per_step(
    parameters: int, stage: int, plan: BatchPlan, exchanged_per_sample: tuple[int, int], feature_bytes: int
) -> dict[str, float]:
    """Bytes one rank contributes to collectives in a step: gradients and parameters by stage, features by method.

    Args:
        parameters: Trained parameters.
        stage: ZeRO stage.
        plan: Batch and ranks.
        exchanged_per_sample: See `Method.exchanged_per_sample`.
        feature_bytes: Of one number on its way in the forward.
    """
    if plan.world_size == 1:
        return {"gradients": 0.0, "parameters": 0.0, "features": 0.0}
    # The gradient cache runs one backward a step, so gradients are reduced once; ZeRO 3 gathers for every pass.
    passes = 2.0 if plan.accumulation_steps == 1 else 3.0 * plan.accumulation_steps
    gathers = {0: 0.0, 1: 1.0, 2: 1.0, 3: passes}[stage]
    gathered, reduced = exchanged_per_sample
    features = gathered * plan.rank_batch_size * feature_bytes
    backward = reduced * plan.global_batch_size * _FP32
    return {
        "gradients": _FP32 * parameters,
        "parameters": _FP32 * parameters / plan.world_size * gathers,
        "features": features + backward,
    }


def describe_plan(
    config: RunConfig, method: Method, resolved: ResolvedDeepSpeed, plan: BatchPlan, precision: str
) -> str:
    """The text of `--dry_run`: the resolved recipe, then sizes."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    towers = {"image tower": method.model.image_tower, "text tower": method.model.text_tower}
    counts = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    counts["heads and temperature"] = sum(p.numel() for p in method.parameters()) - sum(counts.values())
    averages = config.train.ema_decay is not None
    memory = memory_per_rank(trained, resolved.stage, plan.world_size, resolved.offload_optimizer, averages)
    feature_bytes = 2 if config.train.communication_dtype == "bf16" else _FP32
    traffic = communication_per_step(trained, resolved.stage, plan, method.exchanged_per_sample(), feature_bytes)
    buffers = sum(b.numel() * b.element_size() for b in method.buffers())
    lines = [dump_config(config).rstrip(), "", "plan:"]
    lines += [f"  {name}: {count / 1e6:.2f} M parameters" for name, count in counts.items()]
    lines.append(f"  trained: {trained / 1e6:.2f} M parameters")
    lines.append(
        f"  batch: {plan.global_batch_size} = {plan.micro_batch_size} x {plan.accumulation_steps} x {plan.world_size} "
        f"(micro x accumulation x ranks); {precision}; ZeRO {resolved.stage}; {os.cpu_count()} CPU cores"
    )
    lines += [f"  {line}" for line in (method.describe_views(), *method.describe(plan.global_batch_size))]
    lines.append(
        "  memory per rank, without activations: "
        + ", ".join(f"{name} {_mib(size)}" for name, size in memory.items())
        + f", queue and buffers {_mib(buffers)}; total {_mib(sum(memory.values()) + buffers)}"
    )
    lines.append("  sent per rank and step: " + ", ".join(f"{name} {_mib(size)}" for name, size in traffic.items()))
    return "\n".join(lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
