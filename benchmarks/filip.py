"""FILIP's loss on one rank of many: forward and backward, beside the direct way where that fits.

The other ranks are played by their tokens, made in place of the gather: all of a rank's memory and work is there, and
nothing waits for a network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import losses.filip
import losses.late_interaction
from benchmarks.harness import Measurement, measure, return_freed_memory
from benchmarks.processes import Job, Peer, Runner, check_agreement, interleave
from benchmarks.report import OURS, Row, Target, compare
from losses import KeySelection, filip_loss, normalize

NAME = "filip"
_DIRECT = "direct"
_LOGIT_SCALE = 1 / 0.07
_PEAK_TARGETS = {4096: Target(1536, of="value")}


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        ranks: World sizes.
        largest_direct: Up to which world size the direct way runs too: it needs several times the token similarities.
        samples: Of a rank.
        patches: Tokens of an image.
        positions: Tokens of a caption, all of them real.
        width: Of a token.
        selected: Keys per sample besides all of them.
        rounds: Processes per implementation.
    """

    ranks: tuple[int, ...] = (2, 32)
    largest_direct: int = 2
    samples: int = 128
    patches: int = 49
    positions: int = 77
    width: int = 256
    selected: int = 16
    rounds: int = 1


FULL = Settings()
QUICK = Settings(ranks=(2,), samples=32)


def measure_loss(
    implementation: str, ranks: int, samples: int, patches: int, positions: int, width: int, keys: int | None, bits: int
) -> Measurement:
    """One step of the loss on rank 0; `bits` of the numbers that travel."""
    return_freed_memory()
    values: list[float] = []

    def make_step(samples: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        images, texts = (
            normalize(torch.randn(samples, count, width, generator=generator)).requires_grad_()
            for count in (patches, positions)
        )
        scale = torch.tensor([_LOGIT_SCALE]).requires_grad_()

        def step() -> None:
            with _playing_ranks(ranks):
                if implementation == OURS:
                    loss = _ours(images, texts, scale, keys, torch.bfloat16 if bits == 16 else None)
                else:
                    loss = _direct(images, texts, scale, ranks)
                loss.backward()
            values.append(loss.item())
            images.grad = texts.grad = scale.grad = None

        return step

    make_step(2)()
    measurement = measure({"step": make_step(samples)}, repeats=1)
    return Measurement(measurement.seconds, measurement.mib, {**measurement.figures, "loss": values[-1]})


def _others(own: Tensor, ranks: int) -> Tensor:
    """Unit tokens [ranks * b, K, d] of all ranks, those of the first given; without gradient."""
    gathered = own.new_empty(ranks * len(own), *own.shape[1:])
    generator = torch.Generator().manual_seed(1)
    for number, place in enumerate(gathered.split(len(own))):
        place.copy_(normalize(torch.randn(own.shape, generator=generator)) if number else own.detach())
    return gathered


@contextmanager
def _playing_ranks(ranks: int) -> Iterator[None]:
    """The collectives of the loss as rank 0 of so many would find them."""
    collectives = {
        "all_gather_rows": lambda local: _others(local[0], ranks)[None],
        "reduce_scatter_rows": lambda partial: partial[:, : partial.shape[1] // ranks].clone(),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(losses.late_interaction, world_size=lambda: ranks, **collectives))
        stack.enter_context(mock.patch.object(losses.filip, "world_size", lambda: ranks))
        yield


def _ours(images: Tensor, texts: Tensor, scale: Tensor, keys: int | None, dtype: torch.dtype | None) -> Tensor:
    samples, positions, width = texts.shape
    return filip_loss(
        images,
        texts.view(-1, width),
        torch.full((samples,), positions),
        scale,
        keys=KeySelection(keys),
        max_text_length=positions,
        communication_dtype=dtype,
    )


def _direct(images: Tensor, texts: Tensor, scale: Tensor, ranks: int) -> Tensor:
    """The definition, token similarities of all pairs at once."""
    own = torch.cat([images, texts], dim=1)
    keys = torch.cat([own, _others(own, ranks)[len(own) :]])
    image_keys, text_keys = keys.split([images.shape[1], texts.shape[1]], dim=1)
    labels = torch.arange(len(images))
    by_image = torch.einsum("ipd,jwd->ijpw", images, text_keys).amax(-1).mean(-1)
    by_text = torch.einsum("iwd,jpd->ijwp", texts, image_keys).amax(-1).mean(-1)
    return sum(F.cross_entropy(scale * scores, labels) for scores in (by_image, by_text)) / 2


def run(runner: Runner, _peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of memory, processor time and products per world size."""
    sizes = {name: getattr(settings, name) for name in ("samples", "patches", "positions", "width")}
    rows = []
    for ranks in settings.ranks:
        arguments = {**sizes, "ranks": ranks, "bits": 32}
        cases = {
            f"{ranks} ranks": {"keys": None},
            f"{ranks} ranks, 16 bits travel": {"keys": None, "bits": 16},
            f"{ranks} ranks, {settings.selected} keys": {"keys": settings.selected},
        }
        for case, changes in cases.items():
            jobs = {OURS: Job(measure_loss, {"implementation": OURS, **arguments, **changes})}
            if ranks <= settings.largest_direct and changes == {"keys": None}:
                jobs[_DIRECT] = Job(measure_loss, {"implementation": _DIRECT, **arguments, **changes})
            results = interleave(runner, jobs, rounds=settings.rounds)
            check_agreement(results, "loss", relative=1e-5)
            rows += _rows(f"B = {ranks * settings.samples}: {case}", ranks, settings, results)
    return rows


def _rows(case: str, ranks: int, settings: Settings, results: dict[str, Measurement]) -> list[Row]:
    pairs = ranks * settings.samples**2 * settings.patches * settings.positions
    seconds = {name: result.seconds["total"] for name, result in results.items()}
    peaks = {name: result.mib["peak"] for name, result in results.items()}
    products = {name: result.figures["flops"] / (2 * pairs * settings.width) for name, result in results.items()}
    return [
        *compare(NAME, case, "peak memory", "MiB", peaks, _PEAK_TARGETS.get(ranks * settings.samples)),
        *compare(NAME, case, "processor time", "s", seconds),
        *compare(NAME, case, "products of all token pairs", "b*P*B*T*d", products),
    ]
