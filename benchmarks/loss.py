"""The contrastive loss alone: forward and backward over a batch of unit-length features on one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Measurement, measure
from benchmarks.processes import Job, Peer, Runner, check_agreement, interleave
from benchmarks.report import OURS, Row, Target, compare
from losses import contrastive_terms, normalize

NAME = "loss"
_RECOMPUTING = "ours, recomputing"
_LOGIT_SCALE = 1 / 0.07
_WARM_UP_ROWS = 64
_REPEATED_BATCH = 8192
_CPU_TARGETS = {4096: Target(0.60)}
_PEAK_TARGETS = {4096: Target(0.35), 16384: Target(0.08), 32768: Target(600, of="value")}


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        batch_sizes: Rows of both feature matrices.
        largest_peer_batch: Beyond it only ours runs: the peer's memory grows with the square.
        largest_recomputed_batch: Up to which ours runs a second time without keeping logits for the backward; larger
            ones do not fit the budget anyway.
        width: Of a feature.
        repeats: Runs per process, see `harness.measure`; for the largest batches, of many seconds, one.
        rounds: Processes per implementation.
    """

    batch_sizes: tuple[int, ...] = (4096, 8192, 16384, 32768)
    largest_peer_batch: int = 16384
    largest_recomputed_batch: int = 4096
    width: int = 512
    repeats: int = 3
    rounds: int = 2


FULL = Settings()
QUICK = Settings(batch_sizes=(4096,), rounds=1)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure_ours(batch_size: int, width: int, repeats: int, keep_logits: bool = True) -> Measurement:
    """Our contrastive core, by default with as many logits kept for the backward as its budget allows."""
    budget = {} if keep_logits else {"slab_budget_bytes": 0}

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return contrastive_terms(image_features[None], text_features[None], logit_scale, **budget).clip[0, 0]

    return _measure(loss, batch_size, width, repeats)


def measure_peer(batch_size: int, width: int, repeats: int) -> Measurement:
    """open_clip's ClipLoss."""
    from open_clip.loss import ClipLoss

    return _measure(ClipLoss(), batch_size, width, repeats)


def _measure(loss: Loss, batch_size: int, width: int, repeats: int) -> Measurement:
    values: list[float] = []

    def make_step(rows: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        image, text = (normalize(torch.randn(rows, width, generator=generator)).requires_grad_() for _ in range(2))
        scale = torch.tensor([_LOGIT_SCALE]).requires_grad_()

        def step() -> None:
            value = loss(image, text, scale)
            value.backward()
            values.append(value.item())
            image.grad = text.grad = scale.grad = None

        return step

    make_step(_WARM_UP_ROWS)()
    measurement = measure({"step": make_step(batch_size)}, repeats=repeats)
    return Measurement(measurement.seconds, measurement.mib, {**measurement.figures, "loss": values[-1]})


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of processor time, peak memory and FLOPs per batch size."""
    rows = []
    for batch_size in settings.batch_sizes:
        repeats = settings.repeats if batch_size <= _REPEATED_BATCH else 1
        arguments = {"batch_size": batch_size, "width": settings.width, "repeats": repeats}
        jobs = {OURS: Job(measure_ours, arguments)}
        if batch_size <= settings.largest_recomputed_batch:
            jobs[_RECOMPUTING] = Job(measure_ours, {**arguments, "keep_logits": False})
        if batch_size <= settings.largest_peer_batch:
            jobs |= {peer.name: Job(measure_peer, arguments, peer) for peer in peers}
        results = interleave(runner, jobs, rounds=settings.rounds if len(jobs) > 1 else 1)
        check_agreement(results, "loss", relative=1e-5)
        recomputed = results.pop(_RECOMPUTING, None)
        rows += _rows(f"B = {batch_size}", batch_size, settings.width, results)
        if recomputed is not None:
            case = f"B = {batch_size}, no logits kept"
            rows += _rows(case, batch_size, settings.width, {**results, OURS: recomputed})
    return rows


def _rows(case: str, batch_size: int, width: int, results: dict[str, Measurement]) -> list[Row]:
    product = 2 * batch_size**2 * width
    seconds = {name: result.seconds["total"] for name, result in results.items()}
    peaks = {name: result.mib["peak"] for name, result in results.items()}
    products = {name: result.figures["flops"] / product for name, result in results.items()}
    return [
        *compare(NAME, case, "processor time", "s", seconds, _CPU_TARGETS.get(batch_size)),
        *compare(NAME, case, "peak memory", "MiB", peaks, _PEAK_TARGETS.get(batch_size)),
        *compare(NAME, case, "matrix products", "B*B*d", products),
    ]
