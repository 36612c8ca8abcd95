"""The training loop: next batch, forward, backward, step; log, evaluate, save, stop."""

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint import prune_checkpoints, save_checkpoint
from trainer.engine.ema import averaged_weights, update_average
from trainer.engine.replicas import average_local_statistics, verify_replicas
from trainer.errors import ConfigError, SaveError
from trainer.metrics import evaluated_sets, writable
from trainer.preview import look_ahead
from trainer.ranks.agreement import on_main
from trainer.ranks.preemption import STOPPED_EARLY, Preemption
from trainer.recovery import roll_back
from trainer.reporting import judge_steps, log_step, rate, report_pending_bad_samples
from trainer.state import Run


def train(run: Run) -> None:
    """Train from `run.state.step` to the end, to `train.stop_after`, or until told to stop; always ends saved.

    Between logged steps nothing here waits for the device where `run.engine.decides_on_device`.
    """
    config = run.config
    first = run.state.step
    last = config.train.steps
    if config.train.stop_after is not None:
        last = min(last, first + config.train.stop_after)
    run.watchdog.start(first)
    preemption = Preemption(run.place.world_size)
    stopped = False
    run.console.start(config.train.steps, first)
    try:
        run.engine.deepspeed.train()
        # Due at this step already, if the process before this one ended between saving and evaluating.
        _evaluate_if_due(run)
        batches = run.data.steps()
        while run.state.step < last and not stopped:
            step = run.state.step + 1
            look_ahead(run, step)
            terms, grad_norm, micro_batches = train_step(run, step, batches)
            run.state.step = step
            if step % config.train.log_every == 0 or step == last:
                run.watchdog.enter(step, "log")
                log_step(run, terms, grad_norm, micro_batches)
                trouble = run.guard.trouble()
                if trouble is not None:
                    run.watchdog.enter(step, "rollback")
                    roll_back(run, trouble)
                    batches = run.data.steps()
            run.console.advance(run.state.step)
            # Before the evaluation, which may take longer than the time a scheduler leaves.
            stopped = preemption.should_stop()
            if run.state.step == step:
                _after_step(run, stopped)
        if run.last_saved != run.state.step and run.state.step > first:
            _save(run, final=True)
        if run.state.step == config.train.steps:
            _evaluate_if_due(run)
        if stopped and run.place.is_main and run.state.step < config.train.steps:
            with writable(run.run_dir):
                (run.run_dir / STOPPED_EARLY).touch()
        run.watchdog.enter(run.state.step, "end")
        # Not after an error: the vote in flight may be waiting for a rank that is gone.
        preemption.close()
        run.watchdog.stop()
    finally:
        run.console.stop()


def train_step(
    run: Run, step: int, batches: Iterator[list[dict[str, Any]]]
) -> tuple[dict[str, Tensor], Tensor, list[dict[str, Any]]]:
    """Step `step` on the next batch: its terms, the gradient's norm, and the micro-batches. Collective."""
    config, engine, enter = run.config, run.engine, run.watchdog.enter
    enter(step, "data")
    micro_batches = _next_batches(run, batches)
    enter(step, "forward")
    # A fresh stream each step, so that a tower which draws from torch's generator (timm's drop path) leaves nothing to
    # save and continues exactly; patch dropout is keyed by sample instead.
    torch.manual_seed(((config.train.seed * 1_000_003 + step) * 65_537 + run.place.rank) % 2**63)
    terms = engine("train", {"micro_batches": [run.data.to_device(batch) for batch in micro_batches]})
    enter(step, "backward")
    engine.backward(terms["loss"])
    enter(step, "step")
    engine.set_learning_rate(functools.partial(rate, config, step))
    skipped, grad_norm = engine.step()
    engine.project(engine.method.bounded_parameters())
    update_average(engine)
    engine.method.after_step()
    run.window.steps += 1
    run.window.outcomes.append((step, skipped, terms["loss"].detach()))
    return terms, grad_norm, micro_batches


def _next_batches(run: Run, batches: Iterator[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    waited = time.perf_counter()
    micro_batches = next(batches)
    run.window.data_seconds += time.perf_counter() - waited
    for batch in micro_batches:
        run.window.bad.extend(batch.pop("bad_samples"))
    return micro_batches


def _after_step(run: Run, stopped: bool) -> None:
    """What is due once a step is done: verify, save, evaluate. Collective."""
    config, step = run.config, run.state.step
    if config.train.verify_replicas_every and step % config.train.verify_replicas_every == 0:
        run.watchdog.enter(step, "verify")
        verify_replicas(run.engine, step)
    if stopped:
        run.console.line(f"told to stop: saving at step {step}")
        return
    if config.checkpoint.every and step % config.checkpoint.every == 0:
        _save(run)
    if step < config.train.steps:
        _evaluate_if_due(run)


def _save(run: Run, final: bool = False) -> None:
    """Save and prune. A failed save is retried at the next interval, unless it was the last. Collective."""
    started = time.perf_counter()
    state, engine = run.state, run.engine
    run.watchdog.enter(state.step, "save")
    judge_steps(run)
    report_pending_bad_samples(run)
    average_local_statistics(engine)
    state.method_digest = _agreed_digest(run)
    state.method_state = engine.method.method_state() if run.place.is_main else {}
    state.samples_seen = run.data.samples_seen(state.step)
    state.guard = run.guard.state()
    scaler = engine.grad_scaler()
    state.grad_scaler = None if scaler is None else scaler.state_dict()
    checkpoints = run.run_dir / "checkpoints"
    try:
        folder = save_checkpoint(engine, checkpoints, state, run.place.rank, run.place.world_size)
    except SaveError as error:
        _go_on_unsaved(run, str(error), final)
        return
    finally:
        state.method_state = {}
    run.last_saved = state.step
    if run.metrics:
        # Not while steps go wrong: the run may have to go back to the oldest one kept.
        if run.guard.is_calm:
            prune_checkpoints(checkpoints, run.config.checkpoint.keep_last, run.config.checkpoint.keep_every)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        seconds = time.perf_counter() - started
        details = {"state_hash": state.method_digest[:16]} if state.method_digest else {}
        run.metrics.event("checkpoint", state.step, path=str(folder), mib=size, seconds=seconds, **details)
        run.console.line(f"saved {folder} ({size:.0f} MiB, {seconds:.1f} s)")


def _go_on_unsaved(run: Run, problem: str, final: bool) -> None:
    if run.metrics:
        run.metrics.event("checkpoint_failed", run.state.step, reason=problem)
    if final:
        kept = f"checkpoint of step {run.last_saved}" if run.last_saved else "start, as there is no other checkpoint"
        raise ConfigError(f"{problem}; free some space or repair the disk, then --resume auto goes on from the {kept}")
    run.console.warn(
        f"{problem}; earlier checkpoints are untouched, training goes on and tries again at the next interval"
    )


def _agreed_digest(run: Run) -> str:
    """The hash of the method's state, once all ranks hold the same. Collective."""
    digests: list[str] = [""] * run.place.world_size
    dist.all_gather_object(digests, run.engine.method.state_digest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise ConfigError(
            f"step {run.state.step}: the method's state on rank {differing[0]} is not that of rank 0; nothing was "
            "saved, continue from the last checkpoint with --resume auto and check that node's memory"
        )
    return digests[0]


def _evaluate_if_due(run: Run) -> None:
    """Evaluate every set on all ranks and report, unless this step's figures are on record. Collective."""
    config, step = run.config.eval, run.state.step
    at_end = step == run.config.train.steps
    if not step or not (config.at_end if at_end else config.every and step % config.every == 0):
        return
    run.watchdog.enter(step, "evaluate")
    recorded = on_main(lambda: evaluated_sets(run.run_dir, step))
    if recorded.issuperset(config.sets):
        return
    average_local_statistics(run.engine)
    with averaged_weights(run.engine):
        for result in run.evaluation.run(run.engine):
            run.watchdog.enter(step, "evaluate")
            if run.metrics and result.name not in recorded:
                run.metrics.event("eval", step, set=result.name, **result.figures)
                run.console.line(f"eval {result.name}: {result.summary()}")
    # Evaluation time is not training time.
    run.window.restart()
