"""What the contrastive losses send between ranks and compute on each: exact counts on real process groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Measurement, count_flops
from benchmarks.processes import Job, Peer, Runner, check_agreement
from benchmarks.ranks import Traffic, run_on_ranks
from benchmarks.report import OURS, Row, Target, compare
from losses import contrastive_terms, normalize

NAME = "collectives"
_DENSE = "dense DeCLIP"
_LOGIT_SCALE = 1 / 0.07
_QUEUE_SIZE = 1024
_CLIP_TARGET = Target(0.51)
_DECLIP_TARGET = Target(0.35)


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        world_sizes: Numbers of ranks.
        batch_size: Samples per rank.
        width: Of a feature.
    """

    world_sizes: tuple[int, ...] = (2, 4)
    batch_size: int = 256
    width: int = 512


FULL = Settings()
QUICK = Settings(world_sizes=(2,))


@dataclass(frozen=True)
class _Inputs:
    """Of one rank; the queue and the slots of one step are the same in every implementation."""

    image: Tensor
    text: Tensor
    scale: Tensor
    queue: Tensor
    slots: Tensor


def _make_inputs(views: int, batch_size: int, width: int) -> _Inputs:
    generator = torch.Generator().manual_seed(dist.get_rank())
    image, text = (
        normalize(torch.randn(views, batch_size, width, generator=generator)).requires_grad_() for _ in range(2)
    )
    slots = torch.randint(_QUEUE_SIZE, (views, batch_size), generator=generator)
    queue = normalize(torch.randn(_QUEUE_SIZE, width, generator=torch.Generator().manual_seed(99)))
    return _Inputs(image, text, torch.tensor([_LOGIT_SCALE]).requires_grad_(), queue, slots)


def _our_clip(inputs: _Inputs) -> Tensor:
    return contrastive_terms(inputs.image, inputs.text, inputs.scale).clip[0, 0]


def _peer_clip(inputs: _Inputs) -> Tensor:
    from open_clip.loss import ClipLoss

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
    return loss(inputs.image[0], inputs.text[0], inputs.scale)


def _our_declip(inputs: _Inputs) -> Tensor:
    terms = contrastive_terms(
        inputs.image, inputs.text, inputs.scale, queue_rows=inputs.queue, neighbour_slots=inputs.slots
    )
    return terms.clip.mean() + terms.nns.mean()


def _dense_declip(inputs: _Inputs) -> Tensor:
    """The direct way: gather every set of features with gradient, then one logits matrix per direction and term."""
    from torch.distributed.nn import all_gather

    rows = inputs.image.shape[1]
    labels = torch.arange(rows) + dist.get_rank() * rows
    all_images = [torch.cat(all_gather(view)) for view in inputs.image]
    all_texts = [torch.cat(all_gather(view)) for view in inputs.text]
    neighbours = inputs.queue[inputs.slots].requires_grad_()
    all_neighbours = [torch.cat(all_gather(view)) for view in neighbours]

    def classify(rows: Tensor, columns: Tensor) -> Tensor:
        return F.cross_entropy(inputs.scale * rows @ columns.T, labels)

    clip, nns = [], []
    for image, all_image in zip(inputs.image, all_images, strict=True):
        for text, all_text, all_neighbour in zip(inputs.text, all_texts, all_neighbours, strict=True):
            clip.append((classify(image, all_text) + classify(text, all_image)) / 2)
            nns.append(classify(image, all_neighbour))
    return torch.stack(clip).mean() + torch.stack(nns).mean()


Loss = Callable[[_Inputs], Tensor]
_LOSSES: dict[str, tuple[int, Loss]] = {
    "our clip": (1, _our_clip),
    "peer clip": (1, _peer_clip),
    "our declip": (2, _our_declip),
    "dense declip": (2, _dense_declip),
}


def count_on_rank(losses: list[str], batch_size: int, width: int) -> dict[str, float]:
    """Traffic, FLOPs and global value of one forward and backward of each loss, under "<loss> <figure>"."""
    counts: dict[str, float] = {}
    for name in losses:
        views, function = _LOSSES[name]
        counts |= {f"{name} {figure}": value for figure, value in _count(function, views, batch_size, width).items()}
    return counts


def _count(function: Loss, views: int, batch_size: int, width: int) -> dict[str, float]:
    inputs = _make_inputs(views, batch_size, width)
    value = torch.zeros(())

    def step() -> None:
        loss = function(inputs)
        loss.backward()
        value.copy_(loss.detach())

    with Traffic() as traffic:
        flops = count_flops(step)
    dist.all_reduce(value)
    mean = value.item() / dist.get_world_size()
    return {"received": traffic.received_bytes, "calls": traffic.calls, "flops": flops, "value": mean}


def measure(losses: list[str], world_size: int, batch_size: int, width: int) -> Measurement:
    """The counts of rank 0; those of the other ranks are the same."""
    arguments = {"losses": losses, "batch_size": batch_size, "width": width}
    by_rank = run_on_ranks(count_on_rank, world_size, arguments)
    if any(counts != by_rank[0] for counts in by_rank):
        raise RuntimeError(f"ranks differ in their counts or in the global loss: {by_rank}")
    return Measurement(figures=by_rank[0])


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of bytes, calls and FLOPs per rank for the losses of CLIP and DeCLIP."""
    rows = []
    for world_size in settings.world_sizes:
        sizes = {"world_size": world_size, "batch_size": settings.batch_size, "width": settings.width}
        ours = runner(Job(measure, {"losses": ["our clip", "our declip", "dense declip"], **sizes})).figures
        clip = {OURS: _select(ours, "our clip")}
        for peer in peers:
            theirs = runner(Job(measure, {"losses": ["peer clip"], **sizes}, peer)).figures
            clip[peer.name] = _select(theirs, "peer clip")
        declip = {OURS: _select(ours, "our declip"), _DENSE: _select(ours, "dense declip")}
        rows += _rows(f"CLIP, W = {world_size}", clip, _CLIP_TARGET)
        rows += _rows(f"DeCLIP, W = {world_size}", declip, _DECLIP_TARGET)
    return rows


def _select(figures: dict[str, float], loss: str) -> Measurement:
    prefix = f"{loss} "
    return Measurement(figures={k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)})


def _rows(case: str, results: dict[str, Measurement], target: Target) -> list[Row]:
    check_agreement(results, "value", relative=1e-5)

    def values(figure: str, divisor: float = 1.0) -> dict[str, float]:
        return {name: result.figures[figure] / divisor for name, result in results.items()}

    return [
        *compare(NAME, case, "received per rank", "KiB", values("received", 1024), target),
        *compare(NAME, case, "collectives", "calls", values("calls")),
        *compare(NAME, case, "FLOPs per rank", "GFLOP", values("flops", 1e9)),
    ]
