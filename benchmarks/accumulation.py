"""A share of the global batch in micro-batches: our gradient cache beside open_clip's --accum-freq and one whole batch.

open_clip's algorithm, described from its training script: features of every micro-batch without a graph; then, for
each micro-batch, a second forward, the loss of the whole share with the other micro-batches' features as constants,
and a backward. The random state of the first forward is not restored for the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Measurement, count_flops, measure
from benchmarks.processes import Job, Peer, Runner, interleave
from benchmarks.report import OURS, Row, Target, compare
from benchmarks.workload import make_batch, make_method, make_model, make_peer, peer_inputs, split_batch
from losses import contrastive_terms, normalize
from models.architectures import ARCHITECTURES
from models.weights.open_clip_mapping import from_open_clip

NAME = "accumulation"
_WHOLE = "our whole batch"
_PATCH_DROPOUT = 0.5
_LOSS_WIDTH = 512
_PARTS = {"image tower": "image_tower.", "text tower": "text_tower.", "logit_scale": "logit_scale."}
# Whole batch: one forward and a backward of two. Cached: one forward more.
_FLOPS_TARGET = Target(1.34)
_ERROR_TARGET = Target(1e-5, of="value")


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        architecture: A vision transformer.
        micro_batches: A.
        micro_batch_size: Samples of each.
        loss_batch_size: At which the FLOPs of the loss alone are counted.
    """

    architecture: str = "vit_s32"
    micro_batches: int = 8
    micro_batch_size: int = 8
    loss_batch_size: int = 4096


FULL = Settings()
QUICK = Settings(micro_batches=4, loss_batch_size=1024)

Gradients = dict[str, Tensor]


def measure_ours(architecture: str, micro_batches: int, micro_batch_size: int, whole: bool) -> Measurement:
    """Forward and backward of our CLIP method over the micro-batches, or over all their samples at once."""
    method = make_method("clip", make_model(architecture))
    batches = _our_batches(architecture, micro_batches, micro_batch_size, whole=whole)
    return _measure(method, lambda: method("train", {"micro_batches": batches})["loss"].backward())


def measure_peer(architecture: str, micro_batches: int, micro_batch_size: int) -> Measurement:
    """The same with open_clip's model, loss and algorithm."""
    peer = make_peer(make_model(architecture), architecture)
    batches = _peer_batches(architecture, micro_batches, micro_batch_size)
    return _measure(peer, lambda: _accumulate(peer, batches))


def _measure(trained: nn.Module, differentiate: Callable[[], Any]) -> Measurement:
    def step() -> None:
        trained.zero_grad()
        differentiate()

    # Every step starts without gradients, as in training: their memory is part of the peak.
    step()
    trained.zero_grad()
    return measure({"step": step}, repeats=3)


def gradient_errors(
    implementation: str, architecture: str, micro_batches: int, micro_batch_size: int, patch_dropout: float
) -> Measurement:
    """Relative error and norm of each part's gradient against one graph over all samples with the same masks.

    Args:
        implementation: "ours" or "peer".
        architecture: A vision transformer.
        micro_batches: A.
        micro_batch_size: Samples of each.
        patch_dropout: Of the image tower.
    """
    model = make_model(architecture, patch_dropout=patch_dropout)
    sizes = (architecture, micro_batches, micro_batch_size)
    if implementation == OURS:
        found, reference = _our_gradients(model, sizes)
    else:
        found, reference = _peer_gradients(make_peer(model, architecture, patch_dropout=patch_dropout), sizes)
    figures = {}
    for part, prefix in _PARTS.items():
        found_part, reference_part = (_flatten(gradients, prefix) for gradients in (found, reference))
        figures[f"{part} error"] = ((found_part - reference_part).norm() / reference_part.norm()).item()
        figures[f"{part} norm"] = (found_part.norm() / reference_part.norm()).item()
    return Measurement(figures=figures)


def _our_gradients(model: nn.Module, sizes: tuple[str, int, int]) -> tuple[Gradients, Gradients]:
    method = make_method("clip", model)
    results = []
    for whole in (False, True):
        model.zero_grad()
        method("train", {"micro_batches": _our_batches(*sizes, whole=whole)})["loss"].backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return results[0], results[1]


def _peer_gradients(peer: nn.Module, sizes: tuple[str, int, int]) -> tuple[Gradients, Gradients]:
    from open_clip.loss import ClipLoss

    batches = _peer_batches(*sizes)
    torch.manual_seed(1)
    states = _accumulate(peer, batches)
    found = _as_ours(peer)
    peer.zero_grad()
    features = []
    for batch, state in zip(batches, states, strict=True):
        torch.set_rng_state(state)
        features.append(peer(*batch)[:2])
    image_features, text_features = map(torch.cat, zip(*features, strict=True))
    ClipLoss()(image_features, text_features, peer.logit_scale.exp()).backward()
    return found, _as_ours(peer)


def _accumulate(peer: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """open_clip's algorithm; returns the random state before each forward that has a gradient."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    states = []
    with torch.no_grad():
        cached = [peer(*batch)[:2] for batch in batches]
    for index, batch in enumerate(batches):
        states.append(torch.get_rng_state())
        image_features, text_features, logit_scale = peer(*batch)[:3]
        pairs = [*cached[:index], (image_features, text_features), *cached[index + 1 :]]
        all_images, all_texts = map(torch.cat, zip(*pairs, strict=True))
        loss(all_images, all_texts, logit_scale).backward()
    return states


def loss_flops(implementation: str, batch_size: int, width: int) -> Measurement:
    """FLOPs of one forward and backward of the loss over a whole share of features."""
    image, text = (torch.randn(batch_size, width).requires_grad_() for _ in range(2))
    scale = torch.ones(1).requires_grad_()
    if implementation == OURS:

        def loss() -> Tensor:
            return contrastive_terms(normalize(image)[None], normalize(text)[None], scale).clip[0, 0]
    else:
        from open_clip.loss import ClipLoss

        def loss() -> Tensor:
            return ClipLoss()(image, text, scale)

    return Measurement(figures={"flops": count_flops(lambda: loss().backward())})


def _our_batches(
    architecture: str, micro_batches: int, micro_batch_size: int, *, whole: bool = False
) -> list[dict[str, Tensor]]:
    batch = make_batch(micro_batches * micro_batch_size, ARCHITECTURES[architecture].image_size)
    return [batch] if whole else split_batch(batch, micro_batch_size)


def _peer_batches(architecture: str, micro_batches: int, micro_batch_size: int) -> list[tuple[Tensor, Tensor]]:
    return [peer_inputs(batch) for batch in _our_batches(architecture, micro_batches, micro_batch_size)]


def _as_ours(peer: nn.Module) -> Gradients:
    return from_open_clip({name: parameter.grad for name, parameter in peer.named_parameters()})


def _flatten(gradients: Gradients, prefix: str) -> Tensor:
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.startswith(prefix)])


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of work and memory beside the whole batch and open_clip, and of gradient errors."""
    sizes = {name: getattr(settings, name) for name in ("architecture", "micro_batches", "micro_batch_size")}
    case = f"CLIP {settings.architecture}, A = {settings.micro_batches}, micro-batch {settings.micro_batch_size}"
    return [
        *_cost_rows(runner, peers, sizes, case),
        *_loss_rows(runner, peers, settings),
        *_error_rows(runner, peers, sizes, case, 0.0),
        *_error_rows(runner, peers, sizes, case, _PATCH_DROPOUT),
    ]


def _cost_rows(runner: Runner, peers: Sequence[Peer], sizes: dict[str, Any], case: str) -> list[Row]:
    jobs = {
        OURS: Job(measure_ours, {**sizes, "whole": False}),
        _WHOLE: Job(measure_ours, {**sizes, "whole": True}),
        **{peer.name: Job(measure_peer, sizes, peer) for peer in peers},
    }
    results = interleave(runner, jobs, rounds=1)
    seconds = {name: result.seconds["total"] for name, result in results.items()}
    peaks = {name: result.mib["peak"] for name, result in results.items()}
    gflops = {name: result.figures["flops"] / 1e9 for name, result in results.items()}
    return [
        *compare(NAME, case, "FLOPs", "GFLOP", gflops, _FLOPS_TARGET),
        *compare(NAME, case, "peak memory", "MiB", peaks),
        *compare(NAME, case, "processor time", "s", seconds),
    ]


def _loss_rows(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    arguments = {"batch_size": settings.loss_batch_size, "width": _LOSS_WIDTH}
    values = {OURS: runner(Job(loss_flops, {"implementation": OURS, **arguments})).figures["flops"] / 1e9}
    for peer in peers:
        one = runner(Job(loss_flops, {"implementation": "peer", **arguments}, peer)).figures["flops"]
        values[peer.name] = settings.micro_batches * one / 1e9
    case = f"share of {settings.loss_batch_size}, A = {settings.micro_batches}"
    return compare(NAME, case, "FLOPs of the loss", "GFLOP", values)


def _error_rows(
    runner: Runner, peers: Sequence[Peer], sizes: dict[str, Any], case: str, patch_dropout: float
) -> list[Row]:
    arguments = {**sizes, "patch_dropout": patch_dropout}
    jobs = {OURS: Job(gradient_errors, {"implementation": OURS, **arguments})}
    jobs |= {peer.name: Job(gradient_errors, {"implementation": "peer", **arguments}, peer) for peer in peers}
    results = interleave(runner, jobs, rounds=1)
    if patch_dropout:
        case = f"{case}, patch dropout {patch_dropout}"

    def values(figure: str) -> dict[str, float]:
        return {name: result.figures[figure] for name, result in results.items()}

    rows = []
    for part in _PARTS:
        rows += compare(NAME, case, f"gradient error, {part}", "relative", values(f"{part} error"), _ERROR_TARGET)
    return [*rows, *compare(NAME, case, "gradient norm, logit_scale", "of exact", values("logit_scale norm"))]
