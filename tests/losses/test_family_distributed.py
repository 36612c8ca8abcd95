"""SimCLR, the sigmoid loss and label smoothing on several ranks: equal to one rank, in few collectives."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import losses.sigmoid
import losses.simclr
from losses import contrastive_terms, normalize, sigmoid_loss, simclr_loss, smoothing_sums, smoothing_term
from tests.distributed import recorded_collectives, run_distributed
from tests.losses import reference

BATCH, INPUT, WIDTH, SMOOTHING = 12, 7, 6, 0.1
VARIANTS = {
    "whole": (torch.float64, {}),
    "tiled": (torch.float64, {"tile_rows": 2}),
    "fp32": (torch.float32, {}),
    "rounded": (torch.float32, {"communication_dtype": torch.bfloat16}),
}
LOSSES = ("simclr", "sigmoid", "smoothed")
MISTAKES = {
    "simclr": (losses.simclr, "rank", lambda rank, world_size: lambda: (rank + 1) % world_size),
    "sigmoid": (losses.sigmoid, "rank", lambda rank, world_size: lambda: (rank + 1) % world_size),
    "sigmoid without gradient of the others": (
        losses.sigmoid,
        "reduce_scatter_rows",
        lambda rank, world_size: lambda partial: partial.chunk(world_size, dim=1)[rank],
    ),
    "simclr of local anchors": (
        losses.simclr,
        "all_gather_rows",
        lambda rank, world_size: lambda local: torch.cat([local.detach()] * world_size, dim=1),
    ),
}


def encode(own: slice, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Replicated parameters (two encoders, scale, bias), and unit-length features of these samples."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    samples = draw(2, BATCH, INPUT)
    parameters = [
        draw(INPUT, WIDTH),
        draw(INPUT, WIDTH),
        torch.full((1,), 2.0).to(dtype),
        torch.full((1,), -2.0).to(dtype),
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    features = [normalize(view[own] @ encoder) for view, encoder in zip(samples, parameters[:2], strict=True)]
    return parameters, features


def loss_of(name: str, parameters: list[Tensor], features: list[Tensor], options: dict[str, Any]) -> Tensor:
    first, second = features
    scale, bias = parameters[2].exp(), parameters[3]
    if name == "simclr":
        return simclr_loss(torch.stack(features), **options)
    if name == "sigmoid":
        return sigmoid_loss(first, second, scale, bias, **options)
    sums = smoothing_sums(first, second)
    terms = contrastive_terms(first[None], second[None], scale, extra_sums=sums, **options)
    return terms.clip[0, 0] + SMOOTHING * smoothing_term(first, second, scale, terms.extra_sums)


def on_rank(rank: int, world_size: int, name: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    rows = BATCH // world_size
    parameters, features = encode(slice(rank * rows, (rank + 1) * rows), dtype)
    with recorded_collectives() as forward:
        loss = loss_of(name, parameters, features, options)
    with recorded_collectives() as backward:
        loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return {"loss": loss.detach(), "gradients": gradients, "collectives": (forward, backward)}


def run_all(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    results = {}
    for name in LOSSES:
        for variant, (dtype, options) in VARIANTS.items():
            results[name, variant] = on_rank(rank, world_size, name, dtype, options)
    for mistake, (module, function, wrong) in MISTAKES.items():
        with mock.patch.object(module, function, wrong(rank, world_size)):
            results[mistake] = on_rank(rank, world_size, mistake.split()[0], torch.float64, {})
    return results


def expected(name: str, rounded: bool = False) -> dict[str, Any]:
    """Value and gradients from the slow reference on the whole batch."""
    parameters, (first, second) = encode(slice(0, BATCH), torch.float64)
    if rounded:
        first = first + (first.float().bfloat16().double() - first).detach() if name == "simclr" else first
        second = second + (second.float().bfloat16().double() - second).detach()
    scale, bias = parameters[2].exp(), parameters[3]
    loss = {
        "simclr": lambda: reference.simclr(first, second, 0.1),
        "sigmoid": lambda: reference.sigmoid(first, second, scale, bias),
        "smoothed": lambda: reference.smoothed_info_nce(first, second, scale, SMOOTHING),
    }[name]()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return {"loss": loss.detach(), "gradients": filled}


def check(by_rank: list[dict[str, Any]], wanted: dict[str, Any], tolerance: float) -> None:
    """Averages over ranks, as a data-parallel engine does, and compares."""
    mean_loss = torch.stack([result["loss"].double() for result in by_rank]).mean()
    torch.testing.assert_close(mean_loss, wanted["loss"], atol=tolerance, rtol=tolerance)
    for parts in zip(*(result["gradients"] for result in by_rank), wanted["gradients"], strict=True):
        averaged = torch.stack([part.double() for part in parts[:-1]]).mean(0)
        torch.testing.assert_close(averaged, parts[-1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_to_one_rank(world_size: int) -> None:
    by_rank = run_distributed(run_all, world_size)
    for name in LOSSES:
        for variant, tolerance in (("whole", 1e-12), ("tiled", 1e-12), ("fp32", 1e-5)):
            check([ranks[name, variant] for ranks in by_rank], expected(name), tolerance)
    for name in ("simclr", "sigmoid"):
        check([ranks[name, "rounded"] for ranks in by_rank], expected(name, rounded=True), 1e-5)
        assert (
            by_rank[0][name, "rounded"]["collectives"][0][0][1] * 4 == by_rank[0][name, "whole"]["collectives"][0][0][1]
        )
    features = BATCH * WIDTH * 8
    assert by_rank[0]["simclr", "whole"]["collectives"] == (
        [("all_gather_into_tensor", 2 * features), ("all_gather_into_tensor", 2 * BATCH * 8)],
        [],
    )
    assert by_rank[0]["sigmoid", "whole"]["collectives"] == (
        [("all_gather_into_tensor", features), ("reduce_scatter_tensor", features)],
        [],
    )
    # Smoothing adds two vectors to a sum that travels anyway.
    assert by_rank[0]["smoothed", "whole"]["collectives"] == (
        [("all_gather_into_tensor", features), ("all_reduce", 8 * (BATCH + 2 * WIDTH))],
        [("reduce_scatter_tensor", features)],
    )
    for mistake in MISTAKES:
        with pytest.raises(AssertionError):
            check([ranks[mistake] for ranks in by_rank], expected(mistake.split()[0]), 1e-3)
