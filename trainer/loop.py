"""The training loop: next batch, forward, backward, step; log, evaluate, save, stop."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from trainer.checkpoint import TrainerState, prune_checkpoints, save_checkpoint
from trainer.config import RunConfig
from trainer.ds_config import BatchPlan
from trainer.engine import Engine
from trainer.errors import ConfigError
from trainer.evaluation import Evaluation
from trainer.launch import Place
from trainer.metrics import Console, MetricsWriter
from trainer.pipeline import TrainData
from trainer.preemption import STOPPED_EARLY, Preemption
from trainer.schedule import learning_rate

# The logged data_hash is a sum of sample fingerprints modulo this: the same number at any world size, and 2^15 ranks
# fit into an int64.
_HASH_MODULUS = 1 << 48


@dataclass
class Run:
    """Everything the loop works on, assembled by `trainer.run`."""

    config: RunConfig
    place: Place
    plan: BatchPlan
    run_dir: Path
    engine: Engine
    data: TrainData
    evaluation: Evaluation
    console: Console
    metrics: MetricsWriter | None
    state: TrainerState
    lock: FileLock | None
    last_saved: int
    skipped_in_a_row: int = 0
    window: "Window" = field(default_factory=lambda: Window())

    def close(self) -> None:
        """Stop the loader's workers and close the files. The last line says where everything is."""
        self.data.close()
        if self.metrics:
            self.metrics.close()
        if self.lock is not None:
            self.lock.release()
        self.console.line(f"done: step {self.state.step} of {self.config.train.steps}, everything is in {self.run_dir}")


@dataclass
class Window:
    """What has gathered since the last logged step on this rank."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    data_seconds: float = 0.0
    bad: list[dict[str, str]] = field(default_factory=list)


def train(run: Run) -> None:
    """Train from `run.state.step` to the end, to `train.stop_after`, or until told to stop; always ends saved."""
    config = run.config
    first = run.state.step
    last = config.train.steps
    if config.train.stop_after is not None:
        last = min(last, first + config.train.stop_after)
    batches = run.data.steps()
    preemption = Preemption(run.place.world_size)
    stopped = False
    run.console.start(config.train.steps, first)
    try:
        for step in range(first + 1, last + 1):
            micro_batches = _next_batches(run, batches)
            terms, applied, grad_norm = _train_step(run, step, micro_batches)
            run.state.step = step
            _check_applied(run, applied)
            if step % config.train.log_every == 0 or step == last:
                _log_step(run, terms, grad_norm, micro_batches)
            run.console.advance(step)
            # Before the evaluation, which may take longer than the time a scheduler leaves.
            stopped = preemption.should_stop()
            if stopped:
                run.console.line(f"told to stop: saving at step {step}")
                break
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                _save(run)
            if config.eval.every and step % config.eval.every == 0 and step < config.train.steps:
                _evaluate(run)
        if run.last_saved != run.state.step and run.state.step > first:
            _save(run)
        if run.state.step == config.train.steps and config.eval.at_end:
            _evaluate(run)
        if stopped and run.place.is_main and run.state.step < config.train.steps:
            (run.run_dir / STOPPED_EARLY).touch()
        # Not after an error: the vote in flight may be waiting for a rank that is gone.
        preemption.close()
    finally:
        run.console.stop()


def _next_batches(run: Run, batches: Iterator[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    waited = time.perf_counter()
    micro_batches = next(batches)
    run.window.data_seconds += time.perf_counter() - waited
    for batch in micro_batches:
        run.window.bad.extend(batch.pop("bad_samples"))
    return micro_batches


def _train_step(run: Run, step: int, micro_batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], bool, float]:
    config, engine = run.config, run.engine
    engine.deepspeed.train()
    # A fresh stream each step, so that a tower which draws from torch's generator (timm's drop path) leaves nothing to
    # save and continues exactly; patch dropout is keyed by sample instead.
    torch.manual_seed(((config.train.seed * 1_000_003 + step) * 65_537 + run.place.rank) % 2**63)
    terms = engine("train", {"micro_batches": [run.data.to_device(batch) for batch in micro_batches]})
    engine.backward(terms["loss"])
    engine.set_learning_rate(_rate(config, step))
    applied, grad_norm = engine.step()
    engine.project(engine.method.bounded_parameters())
    engine.method.after_step()
    return terms, applied, grad_norm


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(
        step,
        peak_lr=config.optimizer.lr,
        start_lr=config.schedule.start_lr,
        end_lr=config.schedule.end_lr,
        warmup_steps=config.schedule.warmup_steps,
        steps=config.train.steps,
    )


def _check_applied(run: Run, applied: bool) -> None:
    run.window.steps += 1
    if applied:
        run.skipped_in_a_row = 0
        return
    run.skipped_in_a_row += 1
    if run.metrics:
        run.metrics.event("skipped_step", run.state.step, in_a_row=run.skipped_in_a_row)
    run.console.warn(f"step {run.state.step} skipped: a gradient is not finite ({run.skipped_in_a_row} in a row)")
    if run.skipped_in_a_row >= run.config.guard.max_skipped:
        raise ConfigError(
            f"{run.skipped_in_a_row} steps in a row had non-finite gradients (last: step {run.state.step}); "
            "lower optimizer.lr or set optimizer.gradient_clipping, then --resume auto from the last checkpoint"
        )


def _log_step(run: Run, terms: dict[str, Tensor], grad_norm: float, micro_batches: list[dict[str, Any]]) -> None:
    """Average the terms over ranks, agree on bad samples, write the record."""
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
    if bad:
        _report_bad_samples(run, bad)
    if run.metrics is not None:
        run.metrics.log(_record(run, averaged, grad_norm, data_hash % _HASH_MODULUS))
        rate = window.steps * run.plan.global_batch_size / (time.perf_counter() - window.started)
        shown = " ".join(f"{name[5:]} {averaged[name]:.3f}" for name in names if name.startswith("loss/"))
        run.console.line(
            f"step {step}/{run.config.train.steps}  loss {averaged['loss']:.4f}  ({shown})  "
            f"scale {averaged['logit_scale']:.2f}  lr {_rate(run.config, step):.2e}  {rate:.0f} samples/s"
        )
    run.window = Window()


def _record(run: Run, averaged: dict[str, float], grad_norm: float, data_hash: int) -> dict[str, Any]:
    step, window = run.state.step, run.window
    elapsed = time.perf_counter() - window.started
    record = {"step": step, "samples": step * run.plan.global_batch_size, "epoch": run.data.epoch(step), **averaged}
    record |= {"lr": _rate(run.config, step), "grad_norm": grad_norm, "data_hash": f"{data_hash:012x}"}
    digest = run.engine.method.state_digest()
    if digest:
        record["state_hash"] = digest[:16]
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
    seen = run.state.step * run.plan.global_batch_size
    fraction = run.state.bad_samples / seen
    if fraction > run.config.data.max_bad_fraction:
        raise ConfigError(
            f"{run.state.bad_samples} of {seen} samples ({fraction:.1%}) could not be read, more than "
            f"data.max_bad_fraction {run.config.data.max_bad_fraction}; e.g. {first['shard']} sample '{first['key']}': "
            f"{first['reason']}; see bad_samples.jsonl, repair the shards or raise the limit"
        )


def _save(run: Run) -> None:
    """Save and prune. Collective."""
    started = time.perf_counter()
    state, engine = run.state, run.engine
    bad = torch.tensor([len(run.window.bad)], device=engine.device)
    dist.all_reduce(bad)
    if int(bad):
        _report_bad_samples(run, int(bad))
    state.method_digest = _agreed_digest(run)
    state.method_state = engine.method.method_state() if run.place.is_main else {}
    state.samples_seen = run.data.samples_seen(state.step)
    scaler = engine.grad_scaler()
    state.grad_scaler = None if scaler is None else scaler.state_dict()
    checkpoints = run.run_dir / "checkpoints"
    folder = save_checkpoint(engine, checkpoints, state, run.place.rank, run.place.world_size)
    state.method_state = {}
    run.last_saved = state.step
    if run.metrics:
        prune_checkpoints(checkpoints, run.config.checkpoint.keep_last, run.config.checkpoint.keep_every)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        seconds = time.perf_counter() - started
        run.metrics.event("checkpoint", state.step, path=str(folder), mib=size, seconds=seconds)
        run.console.line(f"saved {folder} ({size:.0f} MiB, {seconds:.1f} s)")


def _agreed_digest(run: Run) -> str:
    """The hash of the method's state, once all ranks hold the same. Collective."""
    digests: list[str] = [""] * run.place.world_size
    dist.all_gather_object(digests, run.engine.method.state_digest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise ConfigError(
            f"step {run.state.step}: the queue of rank {differing[0]} is not that of rank 0; nothing was saved, "
            "continue from the last checkpoint with --resume auto and check that node's memory"
        )
    return digests[0]


def _evaluate(run: Run) -> None:
    """Evaluate every set on all ranks and report. Collective."""
    for name, figures in run.evaluation.run(run.engine):
        if run.metrics:
            run.metrics.event("eval", run.state.step, set=name, **figures)
            run.console.line(f"eval {name}: {run.evaluation.summary(name, figures)}")
    # Evaluation time is not training time.
    run.window = Window(bad=run.window.bad)
