"""Linear probes on frozen embeddings, as CLIP measures them, and few-shot curves.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, appendix A.3:
multinomial logistic regression by L-BFGS, its L2 strength searched on held-out data first coarsely, then by halving the
interval around the best, down to eight steps per decade. Few-shot validation as Zhou et al., "Learning to Prompt for
Vision-Language Models", 2022: min(shots, 4) further pictures per class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.rng import keyed_permutation
from trainer.evaluation.zero_shot import classification_figures, score_ranks

SHOTS = (1, 2, 4, 8, 16)
FEW_SHOT_DRAWS = 3
_MAX_VALIDATION_SHOTS = 4
_MAX_ITERATIONS = 1000
_TOLERANCE = 1e-6
# Decades of the inverse strength C, and the search's finest step: an eighth of a decade.
_COARSE = tuple(range(-6, 7, 2))
_FINEST = 1 / 8
_HELD_OUT = 5


@dataclass(frozen=True)
class Labelled:
    """Pictures as a probe sees them.

    Attributes:
        features: [N, d], the same on every rank.
        labels: int64 [N] in [0, C).
    """

    features: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> "Labelled":
        """The chosen rows."""
        return Labelled(self.features[index], self.labels[index])

    def joined(self, other: "Labelled") -> "Labelled":
        """Both, one after the other."""
        return Labelled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


def fit_logistic_regression(
    data: Labelled, num_classes: int, inverse_strength: float, tolerance: float = _TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with scikit-learn's objective: C * sum of losses + ||weight||^2 / 2.

    Args:
        data: Computed with in float64.
        num_classes: C of the shapes below.
        inverse_strength: scikit-learn's C.
        tolerance: Largest component of the gradient of the mean objective at which to end.

    Returns:
        (weight [C, d], bias [C]), float64; the bias is not penalised.
    """
    features, labels = data.features.double(), data.labels
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    decay = 1.0 / (2.0 * inverse_strength * len(labels))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(torch.addmm(bias, features, weight.t()), labels)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def linear_probe(train: Labelled, test: Labelled, num_classes: int) -> dict[str, float]:
    """Fits on the training pictures and scores the test pictures. Collective: the search is spread over the ranks.

    Every fifth training picture of a seeded order is held out to choose the strength; the last fit has them all.

    Returns:
        `lp_acc1`, `lp_acc5`, `lp_mean_per_class_recall` in CLIP_benchmark's names, and `lp_inverse_strength`.
    """
    order = torch.from_numpy(keyed_permutation(len(train.labels), "linear probe")).to(train.labels.device)
    held_out = train.rows(order[::_HELD_OUT])
    fitted = train.rows(order[torch.arange(len(order), device=order.device) % _HELD_OUT != 0])
    best = search_strength(fitted, held_out, num_classes)
    figures = _score(train, test, num_classes, best)
    return {**{f"lp_{name}": value for name, value in figures.items()}, "lp_inverse_strength": best}


def few_shot(train: Labelled, test: Labelled, num_classes: int) -> dict[str, float]:
    """Linear probes on 1, 2, 4, 8 and 16 pictures per class, each the mean of three draws. Collective.

    Returns:
        `few_shot_acc1@k` for every k such that all classes have enough pictures (k, and one to choose the strength).
    """
    fewest = int(torch.bincount(train.labels, minlength=num_classes).min())
    figures = {}
    for shots in SHOTS:
        if fewest <= shots:
            break
        accuracies = []
        for draw in range(FEW_SHOT_DRAWS):
            chosen, validation = _draw(train, num_classes, shots, draw)
            best = search_strength(chosen, validation, num_classes)
            accuracies.append(_score(chosen, test, num_classes, best)["acc1"])
        figures[f"few_shot_acc1@{shots}"] = sum(accuracies) / len(accuracies)
    return figures


def search_strength(fitted: Labelled, held_out: Labelled, num_classes: int) -> float:
    """The inverse strength with the best held-out accuracy; of equals the smallest. Collective."""

    def accuracy(exponents: list[float]) -> list[float]:
        return _spread(exponents, lambda exponent: _accuracy(fitted, held_out, num_classes, 10.0**exponent))

    tried = dict(zip(_COARSE, accuracy(list(_COARSE)), strict=True))
    step = (_COARSE[1] - _COARSE[0]) / 2
    while step >= _FINEST:
        best = min(tried, key=lambda exponent: (-tried[exponent], exponent))
        around = [exponent for exponent in (best - step, best + step) if _COARSE[0] <= exponent <= _COARSE[-1]]
        tried.update(zip(around, accuracy(around), strict=True))
        step /= 2
    return 10.0 ** min(tried, key=lambda exponent: (-tried[exponent], exponent))


def _spread(items: list[float], work: Callable[[float], float]) -> list[float]:
    """`work` of every item, each done whole by one rank, so that values do not depend on their number. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts: list[list[tuple[int, float]]] = [[]] * world_size
    mine = [(number, work(items[number])) for number in range(rank, len(items), world_size)]
    dist.all_gather_object(parts, mine)
    found = dict(pair for part in parts for pair in part)
    return [found[number] for number in range(len(items))]


def _accuracy(fitted: Labelled, held_out: Labelled, num_classes: int, inverse_strength: float) -> float:
    weight, bias = fit_logistic_regression(fitted, num_classes, inverse_strength)
    scores = torch.addmm(bias, held_out.features.double(), weight.t())
    return float((scores.argmax(dim=1) == held_out.labels).double().mean())


def _score(train: Labelled, test: Labelled, num_classes: int, inverse_strength: float) -> dict[str, float]:
    box: list[dict[str, float] | None] = [None]
    if dist.get_rank() == 0:
        weight, bias = fit_logistic_regression(train, num_classes, inverse_strength)
        scored = torch.addmm(bias, test.features.double(), weight.t())
        box = [classification_figures(score_ranks(scored, test.labels), test.labels)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _draw(train: Labelled, num_classes: int, shots: int, draw: int) -> tuple[Labelled, Labelled]:
    chosen, validation = [], []
    labels = train.labels.tolist()
    by_class: list[list[int]] = [[] for _ in range(num_classes)]
    for row in keyed_permutation(len(labels), "few shot", shots, draw).tolist():
        by_class[labels[row]].append(row)
    for rows in by_class:
        chosen += rows[:shots]
        validation += rows[shots : shots + min(shots, _MAX_VALIDATION_SHOTS)]
    device = train.labels.device
    return train.rows(torch.tensor(chosen, device=device)), train.rows(torch.tensor(validation, device=device))
