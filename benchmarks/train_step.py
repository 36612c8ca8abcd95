"""A whole optimizer step: forward, loss, backward, AdamW, from equal weights on equal samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import Measurement, measure
from benchmarks.processes import Job, Peer, Runner, check_agreement, interleave
from benchmarks.report import OURS, Row, Target, compare
from benchmarks.workload import make_batch, make_method, make_model, make_peer, peer_inputs
from trainer.config.sections import OptimizerConfig
from trainer.engine.optimizer import build_optimizer, parameter_groups
from trainer.methods import Method

NAME = "train_step"
_OPTIMIZER = OptimizerConfig(name="adamw", lr=5e-4)
_STEP_TARGETS = {"vit_b32": Target(0.80)}
_DECLIP_TARGETS = {"vit_b32": Target(2.15)}


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        cases: Architecture and batch size.
        declip_cases: Those of the DeCLIP step, which is compared with our own CLIP step.
        repeats: Timed steps per process, after two that warm up.
        rounds: Processes per implementation.
    """

    cases: tuple[tuple[str, int], ...] = (("vit_ti16", 8), ("vit_s32", 8), ("vit_b32", 16))
    declip_cases: tuple[tuple[str, int], ...] = (("vit_b32", 16),)
    repeats: int = 3
    rounds: int = 2


FULL = Settings()
QUICK = Settings(cases=(("vit_s32", 8),), declip_cases=(("vit_s32", 8),), repeats=2, rounds=1)


def measure_ours(architecture: str, batch_size: int, repeats: int, method: str = "clip") -> Measurement:
    """Our step from a uint8 batch on; DeCLIP with its queue full from the start."""
    model = make_model(architecture)
    settings = {"nns_warmup": "random"} if method == "declip" else {}
    trained = make_method(method, model, **settings)
    batch = make_batch(batch_size, model.image_tower.image_size, views=len(trained.image_views))
    groups = parameter_groups(trained, _OPTIMIZER)
    optimizer = build_optimizer(groups, _OPTIMIZER, torch.device("cpu"), offload=False)

    def forward() -> Tensor:
        return trained("train", {"micro_batches": [batch]})["loss"]

    return _measure(forward, optimizer, trained, repeats)


def measure_peer(architecture: str, batch_size: int, repeats: int) -> Measurement:
    """open_clip's model, loss, and AdamW with the parameter groups and defaults of its training script."""
    from open_clip.loss import ClipLoss

    model = make_model(architecture)
    images, token_ids = peer_inputs(make_batch(batch_size, model.image_tower.image_size))
    peer = make_peer(model, architecture)
    del model
    named = list(peer.named_parameters())
    plain = {name for name, p in named if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
            {"params": [p for name, p in named if name not in plain], "weight_decay": _OPTIMIZER.weight_decay},
        ],
        lr=_OPTIMIZER.lr,
        betas=_OPTIMIZER.betas,
        eps=_OPTIMIZER.eps,
    )
    loss = ClipLoss()

    def forward() -> Tensor:
        return loss(*peer(images, token_ids)[:3])

    return _measure(forward, optimizer, peer, repeats)


def _measure(
    forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer, trained: nn.Module, repeats: int
) -> Measurement:
    losses: list[float] = []

    def differentiate() -> None:
        loss = forward()
        loss.backward()
        losses.append(loss.item())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(trained, Method):
            trained.after_step()

    # The first step allocates AdamW's moments, which a running program has.
    differentiate()
    update()
    measurement = measure({"model": differentiate, "optimizer": update}, repeats=repeats + 1)
    # The second loss has seen one update: it agrees only if the gradients and the optimizer agree too.
    return Measurement(measurement.seconds, measurement.mib, {**measurement.figures, "loss": losses[1]})


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of processor time, memory and FLOPs of our CLIP step beside open_clip's, and of our DeCLIP step."""
    rows = []
    for architecture, batch_size in settings.cases:
        arguments = {"architecture": architecture, "batch_size": batch_size, "repeats": settings.repeats}
        jobs = {OURS: Job(measure_ours, arguments)}
        jobs |= {peer.name: Job(measure_peer, arguments, peer) for peer in peers}
        results = interleave(runner, jobs, rounds=settings.rounds)
        check_agreement(results, "loss", relative=1e-3)
        rows += _rows(f"CLIP {architecture}, b = {batch_size}", batch_size, results, _STEP_TARGETS.get(architecture))
    for architecture, batch_size in settings.declip_cases:
        arguments = {"architecture": architecture, "batch_size": batch_size, "repeats": settings.repeats}
        jobs = {
            OURS: Job(measure_ours, {**arguments, "method": "declip"}),
            "our CLIP step": Job(measure_ours, arguments),
        }
        results = interleave(runner, jobs, rounds=settings.rounds)
        target = _DECLIP_TARGETS.get(architecture)
        rows += _rows(f"DeCLIP {architecture}, b = {batch_size}", batch_size, results, target)
    return rows


def _rows(case: str, batch_size: int, results: dict[str, Measurement], target: Target | None) -> list[Row]:
    def values(attribute: str, key: str, divisor: float = 1.0) -> dict[str, float]:
        return {name: getattr(result, attribute)[key] / divisor for name, result in results.items()}

    return [
        *compare(NAME, case, "processor time per step", "s", values("seconds", "total"), target),
        *compare(NAME, case, "of it forward, loss, backward", "s", values("seconds", "model")),
        *compare(NAME, case, "of it AdamW", "s", values("seconds", "optimizer")),
        *compare(NAME, case, "peak memory", "MiB", values("mib", "peak")),
        *compare(NAME, case, "FLOPs per sample", "GFLOP", values("figures", "flops", batch_size * 1e9)),
    ]
