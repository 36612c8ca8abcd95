"""The contrastive core on several ranks: equal to one rank, in few collectives, and planted mistakes are caught."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import losses.contrastive
import losses.similarity
from losses import contrastive_terms, normalize
from tests.distributed import recorded_collectives, run_distributed
from tests.losses import reference

BATCH, INPUT, WIDTH, SLOTS = 12, 7, 6, 10
VIEWS, TEXTS = 2, 2

KEPT: dict[str, Any] = {}
RECOMPUTED: dict[str, Any] = {"slab_budget_bytes": 0, "tile_rows": 2}
CASES: dict[str, dict[str, Any]] = {
    "clip": {"terms": "clip"},
    "nns": {"terms": "nns", "neighbours": "slots"},
    "both": {"terms": "both", "neighbours": "slots"},
    "symmetric": {"terms": "both", "neighbours": "slots", "neighbour_symmetric": True},
    "masked": {"terms": "both", "neighbours": "slots", "neighbour_mask_duplicates": True},
    "symmetric masked": {
        "terms": "both",
        "neighbours": "slots",
        "neighbour_symmetric": True,
        "neighbour_mask_duplicates": True,
    },
    "vectors": {"terms": "both", "neighbours": "vectors", "neighbour_symmetric": True},
    "one pair": {"terms": "clip", "clip_pairs": [(1, 0)]},
}
MISTAKES = ("gather without gradient", "labels off by one rank", "temperature gradient times W")


def make_problem(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of the global batch, replicated encoders and a queue: the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "images": draw(VIEWS, BATCH, INPUT),
        "texts": draw(TEXTS, BATCH, INPUT),
        "image_encoder": draw(INPUT, WIDTH),
        "text_encoder": draw(INPUT, WIDTH),
        "log_scale": torch.full((1,), 2.0, dtype=dtype),
        "queue": normalize(draw(SLOTS, WIDTH)),
        "slots": torch.randint(0, 4, (TEXTS, BATCH), generator=generator),
        "weights": torch.rand(2, VIEWS, TEXTS, generator=generator, dtype=torch.float64).to(dtype),
    }


def encode(problem: dict[str, Tensor], own: slice) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    parameters = [problem[name].clone().requires_grad_() for name in ("image_encoder", "text_encoder", "log_scale")]
    images = normalize(problem["images"][:, own] @ parameters[0])
    texts = normalize(problem["texts"][:, own] @ parameters[1])
    return parameters, images, texts, parameters[2].exp()


def combine(clip: Tensor, nns: Tensor | None, weights: Tensor, terms: str) -> Tensor:
    total = (clip * weights[0]).sum() if terms in ("clip", "both") else clip.new_zeros(())
    return total + (nns * weights[1]).sum() if terms in ("nns", "both") else total


def run_case(
    rank: int, world_size: int, case: dict[str, Any], slab: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """What data-parallel training computes on one rank: this rank's loss and its gradients, before averaging."""
    case = dict(case)
    terms, neighbours = case.pop("terms"), case.pop("neighbours", None)
    problem = make_problem(dtype)
    rows = BATCH // world_size
    own = slice(rank * rows, (rank + 1) * rows)
    parameters, images, texts, scale = encode(problem, own)
    if neighbours == "slots":
        case |= {"queue_rows": problem["queue"], "neighbour_slots": problem["slots"][:, own]}
    elif neighbours == "vectors":
        case |= {"neighbour_vectors": problem["queue"][problem["slots"][:, own]]}
    with recorded_collectives() as forward_records:
        result = contrastive_terms(
            images, texts, scale, extra_sums=torch.tensor([rank + 1.0], dtype=torch.float64), **case, **slab
        )
    loss = combine(result.clip, result.nns, problem["weights"], terms)
    with recorded_collectives() as backward_records:
        loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters],
        "gathered_text": result.gathered_text,
        "gathered_slots": result.gathered_slots,
        "extra_sums": result.extra_sums,
        "collectives": (forward_records, backward_records),
    }


def run_all(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name, "kept"] = run_case(rank, world_size, case, KEPT, torch.float64)
        results[name, "recomputed"] = run_case(rank, world_size, case, RECOMPUTED, torch.float64)
        results[name, "fp32"] = run_case(rank, world_size, case, RECOMPUTED, torch.float32)
    rounded = CASES["both"] | {"communication_dtype": torch.bfloat16}
    results["both", "rounded"] = run_case(rank, world_size, rounded, KEPT, torch.float32)
    for mistake in MISTAKES:
        with planted(mistake, rank, world_size):
            results[mistake] = run_case(rank, world_size, CASES["clip"], KEPT, torch.float64)
    return results


def planted(mistake: str, rank: int, world_size: int) -> ExitStack:
    stack = ExitStack()
    if mistake == "gather without gradient":
        rows = BATCH // world_size

        def own_part_only(partial: Tensor) -> Tensor:
            return partial[:, rank * rows : (rank + 1) * rows]

        stack.enter_context(mock.patch.object(losses.similarity, "reduce_scatter_rows", own_part_only))
    elif mistake == "labels off by one rank":
        stack.enter_context(mock.patch.object(losses.contrastive, "rank", lambda: (rank + 1) % world_size))
    else:
        correct = losses.similarity._scale_gradient
        wrong = mock.patch.object(losses.similarity, "_scale_gradient", lambda *args: correct(*args) * world_size)
        stack.enter_context(wrong)
    return stack


def expected(case: dict[str, Any], rounded: bool = False) -> dict[str, Any]:
    """The same loss and gradients from the dense reference on the whole batch."""
    problem = make_problem(torch.float64)
    parameters, images, texts, scale = encode(problem, slice(0, BATCH))
    if rounded:
        texts = texts + (texts.float().bfloat16().double() - texts).detach()
    clip = reference.clip_terms(images, texts, scale)
    if "clip_pairs" in case:
        chosen = torch.zeros(VIEWS, TEXTS, dtype=torch.float64)
        chosen[tuple(zip(*case["clip_pairs"], strict=True))] = 1
        clip = clip * chosen
    nns = reference.neighbour_terms(
        images,
        problem["queue"][problem["slots"]],
        scale,
        symmetric=case.get("neighbour_symmetric", False),
        slots=problem["slots"] if case.get("neighbour_mask_duplicates") else None,
    )
    loss = combine(clip, nns, problem["weights"], case["terms"])
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


def check_traffic(result: dict[str, Any], case: dict[str, Any], world_size: int, element: int) -> None:
    """At most one gather of features, one of slots, one all-reduce, one reduce-scatter; their exact bytes."""
    forward, backward = result["collectives"]
    features = TEXTS * BATCH * WIDTH * element
    wanted = [("all_gather_into_tensor", features)]
    if case.get("neighbours") == "slots":
        wanted.append(("all_gather_into_tensor", TEXTS * BATCH * 8))
    if case.get("neighbours") == "vectors":
        wanted.append(("all_gather_into_tensor", features))
    symmetric = len(case.get("clip_pairs", range(VIEWS * TEXTS)))
    symmetric += VIEWS * TEXTS if case.get("neighbour_symmetric") else 0
    wanted.append(("all_reduce", 8 * (symmetric * BATCH + 1)))
    assert forward == wanted
    assert backward == [("reduce_scatter_tensor", features)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_to_one_rank(world_size: int) -> None:
    by_rank = run_distributed(run_all, world_size)
    problem = make_problem(torch.float64)
    texts = encode(problem, slice(0, BATCH))[2].detach()
    for name, case in CASES.items():
        wanted = expected(case)
        for variant, tolerance in (("kept", 1e-12), ("recomputed", 1e-12), ("fp32", 1e-6)):
            results = [ranks[name, variant] for ranks in by_rank]
            check(results, wanted, tolerance)
            check_traffic(results[0], case, world_size, 4 if variant == "fp32" else 8)
            assert all(result["extra_sums"].item() == world_size * (world_size + 1) / 2 for result in results)
        results = [ranks[name, "kept"] for ranks in by_rank]
        for result in results:
            torch.testing.assert_close(result["gathered_text"], texts, atol=1e-14, rtol=0)
            if case.get("neighbours") == "slots":
                assert torch.equal(result["gathered_slots"], problem["slots"])

    rounded = [ranks["both", "rounded"] for ranks in by_rank]
    check(rounded, expected(CASES["both"], rounded=True), 1e-5)
    assert rounded[0]["collectives"][0][0] == ("all_gather_into_tensor", TEXTS * BATCH * WIDTH * 2)
    assert all(torch.equal(result["gathered_text"], rounded[0]["gathered_text"]) for result in rounded)

    # Queue indices and the vectors they stand for must be the same neighbours, bit for bit.
    for ranks in by_rank:
        assert torch.equal(ranks["vectors", "kept"]["loss"], ranks["symmetric", "kept"]["loss"])

    wanted = expected(CASES["clip"])
    for mistake in MISTAKES:
        with pytest.raises(AssertionError):
            check([ranks[mistake] for ranks in by_rank], wanted, 1e-3)


def test_one_rank_passes_the_same_check() -> None:
    for case in CASES.values():
        check([run_case(0, 1, case, RECOMPUTED, torch.float64)], expected(case), 1e-12)
