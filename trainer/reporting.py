"""What is said about the steps: records of metrics.jsonl, events of bad steps and bad samples."""

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.sections import RunConfig
from trainer.engine.replicas import has_finite_buffers
from trainer.engine.schedule import learning_rate
from trainer.errors import ConfigError
from trainer.guard import BadStep
from trainer.state import Run

# A share is judged over so many samples at least, or over the whole set where it is smaller.
_JUDGED_OVER = 1000
# The logged data_hash is a sum of sample fingerprints modulo this: the same number at any world size, and 2^15 ranks
# fit into an int64.
_HASH_MODULUS = 1 << 48


def rate(config: RunConfig, step: int, last_step: int | None = None) -> float:
    """The learning rate of a step, for parameters that are trained up to `last_step` (None: to the end)."""
    if last_step is not None and step > last_step:
        return 0.0
    return learning_rate(
        step,
        peak_lr=config.optimizer.lr,
        start_lr=config.schedule.start_lr,
        end_lr=config.schedule.end_lr,
        warmup_steps=config.schedule.warmup_steps,
        steps=last_step or config.train.steps,
    )


def log_step(run: Run, terms: dict[str, Tensor], grad_norm: Tensor, micro_batches: list[dict[str, Any]]) -> None:
    """Average the terms over ranks, judge the steps, agree on bad samples, write the record. Collective."""
    window, world_size, step = run.window, run.place.world_size, run.state.step
    extras = run.engine.method.metrics()
    names = [*sorted(terms), *sorted(extras)]
    values = torch.stack([terms[name].detach().double().reshape(()) for name in sorted(terms)])
    values = torch.cat([values, values.new_tensor([extras[name] for name in sorted(extras)])])
    fingerprints = torch.cat([batch["sample_hash"] for batch in micro_batches]).sum()
    counts = torch.tensor([len(window.bad), int(fingerprints) % _HASH_MODULUS], dtype=torch.int64)
    counts = counts.to(run.engine.device)
    dist.all_reduce(values)
    dist.all_reduce(counts)
    averaged = dict(zip(names, (values / world_size).tolist(), strict=True))
    bad, data_hash = counts.tolist()
    judge_steps(run)
    if bad:
        _report_bad_samples(run, bad)
    if run.metrics is not None:
        run.metrics.log(_record(run, averaged, float(grad_norm), data_hash % _HASH_MODULUS))
        speed = window.steps * run.plan.global_batch_size / (time.perf_counter() - window.started)
        shown = " ".join(f"{name[5:]} {averaged[name]:.3f}" for name in names if name.startswith("loss/"))
        run.console.line(
            f"step {step}/{run.config.train.steps}  loss {averaged['loss']:.4f}  ({shown})  "
            f"scale {averaged['logit_scale']:.2f}  lr {rate(run.config, step):.2e}  {speed:.0f} samples/s"
        )
    window.restart()


def _record(run: Run, averaged: dict[str, float], grad_norm: float, data_hash: int) -> dict[str, Any]:
    step, window = run.state.step, run.window
    elapsed = time.perf_counter() - window.started
    record = {"step": step, "samples": step * run.plan.global_batch_size, "epoch": run.data.epoch(step), **averaged}
    record |= {"lr": rate(run.config, step), "grad_norm": grad_norm, "data_hash": f"{data_hash:012x}"}
    return record | {
        "samples_per_second": window.steps * run.plan.global_batch_size / elapsed,
        "step_seconds": elapsed / max(1, window.steps),
        "data_seconds": window.data_seconds / max(1, window.steps),
        "memory_gib": _peak_memory_gib(run.engine.device),
    }


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def judge_steps(run: Run) -> None:
    """Show the guard the steps since it was last asked, and report the bad ones. Collective; waits for the device."""
    outcomes, run.window.outcomes = run.window.outcomes, []
    if not outcomes:
        return
    # Which steps were skipped is equal on all ranks already; their losses become so here.
    losses = torch.stack([loss.double().reshape(()) for _, _, loss in outcomes])
    dist.all_reduce(losses)
    skipped = torch.stack([flag for _, flag, _ in outcomes]).tolist()
    judged = zip(outcomes, skipped, (losses / run.place.world_size).tolist(), strict=True)
    bad = [entry for (step, _, _), flag, loss in judged if (entry := run.guard.judge(step, flag, loss))]
    if any(skipped):
        finite = has_finite_buffers(run.engine).to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not int(finite):
            first = next(step for (step, _, _), flag in zip(outcomes, skipped, strict=True) if flag)
            run.guard.poison(first, "a skipped step left running statistics that are not finite")
    for entry in bad:
        _report_bad_step(run, entry)


def _report_bad_step(run: Run, entry: BadStep) -> None:
    if entry.bound is None:
        text, name, details = "skipped: the loss or a gradient is not finite", "skipped_step", {}
    else:
        text, name = f"has loss {entry.loss:.4f}, expected below {entry.bound:.4f}", "loss_spike"
        details = {"bound": entry.bound}
    run.console.warn(f"step {entry.step} {text} ({entry.in_a_row} in a row)")
    if run.metrics:
        run.metrics.event(name, entry.step, loss=entry.loss, in_a_row=entry.in_a_row, **details)


def report_pending_bad_samples(run: Run) -> None:
    """Report the bad samples since the last logged step, if any rank met one. Collective."""
    bad = torch.tensor([len(run.window.bad)], device=run.engine.device)
    dist.all_reduce(bad)
    if int(bad):
        _report_bad_samples(run, int(bad))


def _report_bad_samples(run: Run, count: int) -> None:
    """Collect the records on rank 0 and end the run when too many samples fail. Collective."""
    records: list[Any] = [None] * run.place.world_size
    dist.all_gather_object(records, run.window.bad)
    run.state.bad_samples += count
    if run.metrics:
        run.data.write_bad_samples(run.run_dir, [record for part in records for record in part], run.state.step)
        run.metrics.event("bad_sample", run.state.step, count=count, total=run.state.bad_samples)
    first = next(record for part in records for record in part)
    run.window.bad = []
    # Replacements that cannot be read either count too, so more than one may stand for a sample trained on.
    tried = run.state.step * run.plan.global_batch_size + run.state.bad_samples
    allowed = allowed_bad_samples(run.config.data.max_bad_fraction, tried, sum(run.data.loader.order.num_samples))
    if run.state.bad_samples > allowed:
        raise ConfigError(
            f"{run.state.bad_samples} of {tried} samples could not be read, more than the {allowed:g} that "
            f"data.max_bad_fraction {run.config.data.max_bad_fraction} allows so far; e.g. {first['shard']} sample "
            f"'{first['key']}': {first['reason']}; see bad_samples.jsonl, repair the shards or raise the limit"
        )


def allowed_bad_samples(fraction: float, tried: int, set_size: int) -> float:
    """How many samples may be bad once so many were tried.

    Args:
        fraction: `data.max_bad_fraction`.
        tried: Samples read so far, the bad ones included.
        set_size: Samples of the training set: what a share of few is, a share of all of them need not be.
    """
    return fraction * max(tried, min(set_size, _JUDGED_OVER))
