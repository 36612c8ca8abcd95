"""Putting a run together: configuration, ranks, data, method, engine, checkpoint."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from data.order import GlobalOrder
from data.shards.index_store import describe_sources
from data.sources import continue_sources
from data.writing import os_reason
from models.sequences import has_unequal_length_kernel
from trainer.building import build_method
from trainer.changes import Changes, find_changes
from trainer.checkpoint import (
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    load_method_state,
    prepare_checkpoints,
    read_state,
)
from trainer.config.ds_config import BatchPlan, ResolvedDeepSpeed, plan_batch, resolve_deepspeed
from trainer.config.recipe import dump_config
from trainer.config.sections import RunConfig
from trainer.config.start import run_ds_config
from trainer.engine.compilation import compile_towers
from trainer.engine.device import resolve_precision, select_device, set_precision_of_products
from trainer.engine.engine import Engine, init_distributed, share_out_cores
from trainer.errors import ConfigError
from trainer.evaluation import Evaluation
from trainer.files import write_atomically
from trainer.guard import Guard
from trainer.metrics import Console, MetricsWriter, truncate_records, writable
from trainer.pipeline import TrainData, build_tokenizer, index_sources, resolve_workers
from trainer.plan import describe_plan
from trainer.pretrained import load_pretrained
from trainer.ranks.agreement import on_main, together
from trainer.ranks.launch import Place
from trainer.ranks.preemption import STOPPED_EARLY, stop_if_told
from trainer.ranks.watchdog import Watchdog
from trainer.recovery import leave_later_branch
from trainer.state import Run
from trainer.trackers import try_trackers
from trainer.views import sample_transform, unused_augmentations


def assemble(config: RunConfig, arguments: argparse.Namespace, run_dir: Path, place: Place) -> Run | None:
    """Build everything a run needs. Collective.

    Args:
        config: The configuration.
        arguments: Parsed command line (`ds_config`, `resume`, `dry_run`).
        run_dir: The run's folder; rank 0's counts.
        place: This rank.

    Returns:
        The run, ready to train; None after a dry run.

    Raises:
        ConfigError, DataError: A mistake the user can fix.
        ToldToStop: A signal came before there was anything to save.
    """
    device = select_device(config.train.device, place)
    plan = plan_batch(config, place.world_size)
    precision = resolve_precision(config.train.precision, device)
    set_precision_of_products(precision, device)
    ds_path = run_ds_config(arguments.ds_config, run_dir, arguments.resume)
    resolved = resolve_deepspeed(ds_path, config, plan, precision)
    console = Console(place.is_main)
    for name in unused_augmentations(config):
        console.warn(f"data.augmentation.{name} is not used: method.image_views names no such view")
    tokenizer = build_tokenizer(config)
    if arguments.dry_run:
        with torch.device("meta"):
            method = build_method(config, tokenizer)
            method.begin_run(config.train, None)
        sample_transform(config, method, tokenizer)
        if place.is_main:
            console.line(describe_plan(config, method, resolved, plan, precision))
            for line in load_pretrained(config.model, method.model):
                console.line(f"  {line}")
        return None
    with_cores = 0 if config.train.cpu_threads == "all" else resolve_workers(config, place)
    init_distributed(device, place, with_cores, config.train.timeout_minutes)
    if resolved.offload_optimizer:
        share_out_cores(place)
    # The default name holds the time of day, which ranks need not agree on.
    run_dir = on_main(lambda: run_dir)
    lock = together(lambda: _lock_run_dir(run_dir) if place.is_main else None)
    together(lambda: try_trackers(run_dir, config.logging) if place.is_main else None)
    checkpoint, warnings = find_checkpoint(run_dir, arguments.resume)
    for warning in warnings:
        console.warn(warning)
    _check_same_settings(config, resolved, precision)
    setup = {"ranks": place.world_size, "precision": precision, "device": device.type, "deepspeed": resolved.portable}
    before, changes = _compare(checkpoint, config, setup)
    for line in changes.lines:
        console.line(line)
    console.line(f"{config.recipe} -> {run_dir}: opening the data (shards are scanned, and built-in sets made, once)")
    stop_if_told(run_dir)
    sources = index_sources(config, place)
    if before is not None:
        sources = continue_sources(sources, list(before.samples_seen), before.data_fingerprint)
    stop_if_told(run_dir)
    evaluation = together(lambda: Evaluation(config, tokenizer, place))
    torch.manual_seed(config.train.seed)
    method = together(lambda: build_method(config, tokenizer))
    num_samples = sum(source.num_samples for source in sources)
    together(lambda: method.begin_run(config.train, num_samples))
    if checkpoint is None:
        # The engine gives every rank the parameters of rank 0, which alone needs the files.
        for line in on_main(lambda: load_pretrained(config.model, method.model)):
            console.line(line)
    _check_queue(config, sources)
    if config.train.compile:
        together(lambda: compile_towers(method, device))
    engine = Engine(method, config, resolved, device)
    engine.broadcast_buffers()
    saved = None if checkpoint is None else load_checkpoint(engine, checkpoint, place.rank, place.world_size)
    start_step, offset = (saved.step, saved.data_offset) if saved else (0, 0)

    def open_data(step: int, offset: int, preview: bool = False) -> TrainData:
        return TrainData(config, method, tokenizer, sources, plan, place, device, step, offset, preview)

    def open_metrics(step: int) -> MetricsWriter | None:
        return MetricsWriter(run_dir, config.logging, step) if place.is_main else None

    data = together(lambda: open_data(start_step, offset))
    _check_batch(console, data.loader.order)
    state = TrainerState(
        start_step,
        dump_config(config),
        tokenizer.hash,
        data.loader.fingerprint,
        data.loader.order_fingerprint,
        {},
        setup=setup,
        sources=describe_sources(sources),
    )
    guard = Guard(config.guard)
    if saved is not None:
        _continue_from(saved, state, engine, checkpoint, console)
        guard.load_state(saved.guard)
    # Only once nothing can refuse to go on from there.
    together(lambda: leave_later_branch(run_dir, checkpoint) if place.is_main else None)
    estimate = prepare_checkpoints(engine, run_dir / "checkpoints", must_fit=checkpoint is None)
    dropped = together(lambda: _open_run_dir(run_dir, config, resolved, state.step) if place.is_main else 0)
    metrics = together(lambda: open_metrics(state.step))
    if metrics is not None and checkpoint is not None:
        details = {"world_size": place.world_size, "dropped_records": dropped, "damaged_checkpoints": len(warnings)}
        details["changed"] = {key: list(values) for key, values in changes.values.items()}
        metrics.event("resumed", state.step, checkpoint=str(checkpoint), **details)
    stop_if_told(run_dir)
    _announce(console, config, run_dir, engine, plan, precision, place, data)
    console.line(str(estimate))
    if estimate.total * (config.checkpoint.keep_last + 1) > estimate.free:
        console.warn(
            f"{run_dir} has no room for checkpoint.keep_last {config.checkpoint.keep_last} checkpoints and the next "
            "one; lower keep_last or free some space, or saving will fail later"
        )
    return Run(
        config=config,
        place=place,
        plan=plan,
        run_dir=run_dir,
        engine=engine,
        open_data=open_data,
        data=data,
        evaluation=evaluation,
        console=console,
        open_metrics=open_metrics,
        metrics=metrics,
        state=state,
        guard=guard,
        watchdog=Watchdog(place, config.train.timeout_minutes),
        lock=lock,
        last_saved=state.step,
    )


def _lock_run_dir(run_dir: Path) -> FileLock:
    """Take the folder for this run; the lock falls with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        raise ConfigError(
            f"run_dir {run_dir} is in use by another process; wait for it to end or choose another --run_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        # The latter on file systems without locks.
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise ConfigError(f"run_dir {run_dir} cannot be written ({reason}); choose another --run_dir") from None


def _check_same_settings(config: RunConfig, resolved: ResolvedDeepSpeed, precision: str) -> None:
    """Refuse ranks that resolved the run differently (mixed GPUs, another checkout on a node). Collective."""
    mine = json.dumps([config.model_dump(mode="json"), resolved.config, precision], sort_keys=True)
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ConfigError(
                f"rank {rank} resolved other settings than rank 0; use the same checkout and kind of device on all "
                "nodes, and set train.precision explicitly"
            )


def _compare(checkpoint: Path | None, config: RunConfig, setup: dict[str, Any]) -> tuple[TrainerState | None, Changes]:
    """The state of the run that is continued, and what differs from it. Collective."""
    if checkpoint is None:
        return None, Changes({}, [])
    before, _ = together(lambda: read_state(checkpoint))
    # The queue or clusters are read where they are needed.
    before.method_state = {}
    if "deepspeed" not in before.setup:
        before.setup |= on_main(lambda: _saved_deepspeed(checkpoint))
    return before, together(lambda: find_changes(before, config, setup, str(checkpoint)))


def _saved_deepspeed(checkpoint: Path) -> dict[str, Any]:
    """Of a checkpoint that does not say: the DeepSpeed file of its run."""
    try:
        return {"deepspeed": json.loads((checkpoint.parent.parent / "ds_config.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {}


def _check_queue(config: RunConfig, sources: list) -> None:
    size = config.method.get("nns_queue_size")
    samples = sum(source.num_samples for source in sources)
    if size and config.method.get("w_nns") != 0 and size >= 2 * samples and dist.get_rank() == 0:
        Console(True).warn(
            f"method.nns_queue_size {size} holds whole epochs of {samples} samples: a caption's nearest neighbour "
            "will often be itself; use a smaller queue"
        )


def _check_batch(console: Console, order: GlobalOrder) -> None:
    """Warn where a global batch is larger than what it is drawn from."""
    for name, weight, num_samples in zip(order.sources, order.weights, order.num_samples, strict=True):
        share = float(weight * order.global_batch_size)
        if share > num_samples:
            console.warn(
                f"data source '{name}' has {num_samples} samples and each global batch draws {share:.0f} from it: "
                "samples stand several times in a batch, as negatives of themselves; lower train.global_batch_size "
                "or the weight of the source, or give it more samples"
            )


def _continue_from(
    saved: TrainerState, state: TrainerState, engine: Engine, checkpoint: Path, console: Console
) -> None:
    """Take over the method's state, refusing a checkpoint that this run could not continue exactly."""
    checks = {
        "tokenizer": (saved.tokenizer_hash, state.tokenizer_hash, "data.tokenizer, data.mask_token, context_length"),
        "training set": (saved.data_fingerprint, state.data_fingerprint, "data.train"),
        "data order": (
            saved.order_fingerprint,
            state.order_fingerprint,
            "train.seed, train.global_batch_size, data.lanes and data.shuffle_window",
        ),
    }
    for what, (old, new, keys) in checks.items():
        if old != new:
            sources = _differing_source(saved.sources, state.sources) if what == "training set" else None
            raise ConfigError(
                f"checkpoint {checkpoint} was made with another {what} ({sources or f'{old[:12]}, now {new[:12]}'}); "
                f"restore {keys} as they were, or start a new --run_dir"
            )
    load_method_state(engine, saved, checkpoint)
    if engine.method.state_digest() != saved.method_digest:
        console.warn(f"the method's state in {checkpoint.name} was adapted to this configuration")
    state.bad_samples, state.data_offset = saved.bad_samples, saved.data_offset


def _differing_source(saved: dict[str, str], now: dict[str, str]) -> str | None:
    """Where two mixtures differ: in their sources, or in what one of them holds."""
    if not saved or len(saved) != len(now):
        return f"{len(saved)} sources, now {len(now)}" if saved else None
    for (name, old), (new_name, new) in zip(saved.items(), now.items(), strict=True):
        if old != new:
            return f"source '{name}' was {old}; now '{new_name}' is {new}"
    return "names of its shards, or the samples in each of them"


def _open_run_dir(run_dir: Path, config: RunConfig, resolved: ResolvedDeepSpeed, step: int) -> int:
    """Write down what the run is, and drop the records after `step`; returns how many."""
    # How long this process runs is not part of the run.
    whole = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": None})})
    with writable(run_dir):
        write_atomically(run_dir / "config.yaml", dump_config(whole))
        write_atomically(run_dir / "ds_config.json", json.dumps(resolved.portable, indent=2) + "\n")
        (run_dir / STOPPED_EARLY).unlink(missing_ok=True)
        return truncate_records(run_dir, step)


def _announce(
    console: Console,
    config: RunConfig,
    run_dir: Path,
    engine: Engine,
    plan: BatchPlan,
    precision: str,
    place: Place,
    data: TrainData,
) -> None:
    parameters = sum(_numel(shape) for shape in engine.parameter_shapes.values())
    samples = sum(data.loader.order.num_samples)
    console.line(
        f"{config.recipe}: {config.method['name']} on {config.model.name}, {parameters / 1e6:.1f} M trained "
        f"parameters, {samples} training pairs"
    )
    console.line(
        f"{place.world_size} rank(s) on {engine.device.type} by {place.launcher}, ZeRO {engine.stage}, {precision}; "
        f"batch {plan.global_batch_size} = {plan.micro_batch_size} x {plan.accumulation_steps} x {plan.world_size} "
        "(micro x accumulation x ranks)"
    )
    for line in (engine.method.describe_views(), *engine.method.describe(plan.global_batch_size)):
        console.line(line)
    # Towers of Hugging Face have an attention of their own.
    if engine.device.type == "cuda" and config.model.text_name is None:
        console.line(_attention_of_captions(engine.device, precision))


def _attention_of_captions(device: torch.device, precision: str) -> str:
    """Which way captions of unequal lengths take, of which one is much slower."""
    if precision not in ("bf16", "fp16"):
        return f"captions: attention length by length, as no kernel takes them all in {precision}"
    if not has_unequal_length_kernel(device):
        return f"captions: attention length by length, as torch {torch.__version__} has no kernel for all on this GPU"
    return "captions: attention of all lengths in one kernel"


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
