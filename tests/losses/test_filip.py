"""FILIP's loss against loops over single tokens, its known answers, its memory and its ranks."""

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses.filip
import losses.late_interaction
from losses import KeySelection, filip_loss, normalize
from losses.late_interaction import Packing, late_interaction_scores
from tests.distributed import recorded_collectives, run_distributed

BATCH, PATCHES, WIDTH, POSITIONS = 8, 5, 6, 9
LENGTHS = torch.tensor([3, 9, 1, 4, 7, 2, 4, 5])
SELECTIONS = {
    "all": KeySelection(),
    "own_pair": KeySelection(3),
    "local_max": KeySelection(3, "local_max", group=2),
    "one key": KeySelection(1),
}


def make_problem(dtype: torch.dtype) -> dict[str, Tensor]:
    """Encoders and what they see, for the global batch: the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "images": draw(BATCH, PATCHES, WIDTH),
        "texts": draw(BATCH, POSITIONS, WIDTH),
        "image_encoder": draw(WIDTH, WIDTH),
        "text_encoder": draw(WIDTH, WIDTH),
        "log_scale": torch.full((1,), 1.5, dtype=dtype),
    }


def encode(problem: dict[str, Tensor], own: slice) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Parameters, image tokens, text tokens of each caption, scale."""
    parameters = [problem[name].clone().requires_grad_() for name in ("image_encoder", "text_encoder", "log_scale")]
    images = normalize(problem["images"][own] @ parameters[0])
    texts = normalize(problem["texts"][own] @ parameters[1])
    captions = [tokens[:length] for tokens, length in zip(texts, LENGTHS[own].tolist(), strict=True)]
    return parameters, images, captions, parameters[2].exp()


def slow_scores(queries: Any, keys: Any) -> Tensor:
    """Scores token by token."""
    rows = []
    for query in queries:
        row = []
        for key in keys:
            best = [torch.stack([token @ other for other in key]).max() for token in query]
            row.append(sum(best) / len(best))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def chosen_keys(selection: KeySelection, images: Any, captions: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The keys of every sample, from the definition."""
    if selection.count is None:
        return list(images), list(captions)

    def best(tokens: Tensor, others: Tensor) -> Tensor:
        similarities = tokens @ others.t()
        values = similarities.sum(1) if selection.by == "own_pair" else similarities.max(1).values
        order = sorted(range(len(tokens)), key=lambda token: -float(values[token].detach()))
        return tokens[order[: selection.count]]

    size = 1 if selection.by == "own_pair" else selection.group
    image_keys, text_keys = [], []
    for sample, (image, caption) in enumerate(zip(images, captions, strict=True)):
        group = slice(sample // size * size, sample // size * size + size)
        image_keys.append(best(image, torch.cat(captions[group])))
        text_keys.append(best(caption, torch.cat(list(images[group]))))
    return image_keys, text_keys


def slow_loss(images: Any, captions: Any, scale: Tensor, selection: KeySelection) -> Tensor:
    image_keys, text_keys = chosen_keys(selection, images, captions)
    loss = torch.zeros((), dtype=torch.float64)
    for queries, keys in ((images, text_keys), (captions, image_keys)):
        logits = scale * slow_scores(queries, keys)
        loss = loss + sum(torch.logsumexp(row, 0) - row[i] for i, row in enumerate(logits)) / (2 * len(logits))
    return loss


def expected(selection: KeySelection) -> tuple[Tensor, tuple[Tensor, ...]]:
    parameters, images, captions, scale = encode(make_problem(torch.float64), slice(None))
    loss = slow_loss(images, captions, scale, selection)
    return loss.detach(), torch.autograd.grad(loss, parameters)


def run_case(rank: int, world_size: int, selection: KeySelection, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """This rank's share and its gradients, before data-parallel averaging."""
    rows = BATCH // world_size
    own = slice(rank * rows, (rank + 1) * rows)
    parameters, images, captions, scale = encode(make_problem(dtype), own)
    with recorded_collectives() as forward_records:
        loss = filip_loss(
            images,
            torch.cat(captions),
            LENGTHS[own],
            scale,
            keys=selection,
            max_text_length=POSITIONS,
            **options,
        )
    with recorded_collectives() as backward_records:
        loss.backward()
    gradients = [parameter.grad for parameter in parameters]
    return {"loss": loss.detach(), "gradients": gradients, "collectives": (forward_records, backward_records)}


def average(by_rank: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
    """What data-parallel training makes of the ranks' results."""
    gradients = zip(*(result["gradients"] for result in by_rank), strict=True)
    losses = torch.stack([result["loss"].double() for result in by_rank])
    return losses.mean(), [torch.stack(found).double().mean(0) for found in gradients]


def check(found: tuple[Tensor, Any], wanted: tuple[Tensor, Any], tolerance: float) -> None:
    torch.testing.assert_close(found[0].double(), wanted[0].double(), atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", [{}, {"winners_budget_bytes": 0, "tile_bytes": 1}, {"winners_budget_bytes": 150}])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_value_and_gradient_are_those_of_loops(selection, options):
    found = run_case(0, 1, selection, torch.float64, **options)
    check((found["loss"], found["gradients"]), expected(selection), 1e-12)
    found = run_case(0, 1, selection, torch.float32, **options)
    check((found["loss"], found["gradients"]), expected(selection), 2e-6)


def cases_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for name, selection in SELECTIONS.items():
        results[name] = run_case(rank, world_size, selection, torch.float32)
        results[f"{name}, recomputed"] = run_case(
            rank, world_size, selection, torch.float64, winners_budget_bytes=0, tile_bytes=300
        )
    results["rounded"] = run_case(rank, world_size, KeySelection(), torch.float64, communication_dtype=torch.bfloat16)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_loss(world_size):
    by_rank = run_distributed(cases_on_rank, world_size)
    for name, selection in SELECTIONS.items():
        one = run_case(0, 1, selection, torch.float32)
        check(average([result[name] for result in by_rank]), (one["loss"], one["gradients"]), 1e-6)
        check(average([result[f"{name}, recomputed"] for result in by_rank]), expected(selection), 1e-12)
    # The rounding of the keys is seen by their owners too, so that it is the same on any number of ranks.
    one = run_case(0, 1, KeySelection(), torch.float64, communication_dtype=torch.bfloat16)
    check(average([result["rounded"] for result in by_rank]), (one["loss"], one["gradients"]), 1e-12)
    assert 1e-6 < abs(one["loss"] - expected(KeySelection())[0]) < 1e-2
    for name, itemsize in (("all", 4), ("rounded", 2)):
        forward, backward = by_rank[0][name]["collectives"]
        keys = BATCH * (PATCHES + POSITIONS) * WIDTH
        assert [record[0] for record in forward] == ["all_gather_into_tensor"]
        assert forward[0][1] == keys * itemsize
        # Gradients are summed unrounded.
        assert [record[0] for record in backward] == ["reduce_scatter_tensor"]
        assert backward[0][1] == keys * (8 if name == "rounded" else 4)


def tokens_of(*shape: int, seed: int = 1) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def loss_of(images: Tensor, captions: list[Tensor], selection: KeySelection = SELECTIONS["all"]) -> Tensor:
    lengths = torch.tensor([len(caption) for caption in captions])
    scale = torch.tensor([4.0], dtype=torch.float64)
    return filip_loss(
        images, torch.cat(captions), lengths, scale, keys=selection, max_text_length=max(lengths.tolist())
    )


def test_one_token_each_is_clip():
    images, texts = tokens_of(BATCH, 1, WIDTH), tokens_of(BATCH, 1, WIDTH, seed=2)
    logits = 4 * images[:, 0] @ texts[:, 0].t()
    labels = torch.arange(BATCH)
    cross_entropy = torch.nn.functional.cross_entropy
    wanted = (cross_entropy(logits, labels) + cross_entropy(logits.t(), labels)) / 2
    torch.testing.assert_close(loss_of(images, list(texts)), wanted)


def test_order_and_repetition_of_tokens_change_nothing():
    images, texts = tokens_of(3, 4, WIDTH), list(tokens_of(3, 5, WIDTH, seed=2))
    loss = loss_of(images, texts)
    torch.testing.assert_close(loss_of(images[:, [2, 0, 3, 1]], [text.flip(0) for text in texts]), loss)
    # Every query twice is the same mean, every key twice the same maximum.
    torch.testing.assert_close(loss_of(images.repeat(1, 2, 1), [text.repeat(2, 1) for text in texts]), loss)


def test_all_tokens_selected_is_no_selection():
    images, texts = tokens_of(3, 4, WIDTH), [tokens_of(length, WIDTH, seed=length) for length in (2, 5, 3)]
    for by in ("own_pair", "local_max"):
        torch.testing.assert_close(loss_of(images, texts, KeySelection(9, by)), loss_of(images, texts))


def test_equal_samples_and_perfect_ones():
    same = tokens_of(1, 4, WIDTH).expand(5, -1, -1)
    assert float(loss_of(same, list(same))) == pytest.approx(math.log(5))
    axes = torch.eye(6, dtype=torch.float64)
    images = axes.view(3, 2, 6)
    # Every token finds itself in its own sample and nothing elsewhere.
    assert float(loss_of(images, list(images))) == pytest.approx(math.log1p(2 * math.exp(-4)))


def test_evaluation_scores_are_those_of_loops():
    images, captions = tokens_of(BATCH, PATCHES, WIDTH), tokens_of(BATCH, POSITIONS, WIDTH, seed=2)
    real = torch.arange(POSITIONS) < LENGTHS[:, None]
    padded = captions * real[..., None]
    words = [caption[:length] for caption, length in zip(captions, LENGTHS.tolist(), strict=True)]
    for tile_bytes in (None, 1):
        torch.testing.assert_close(late_interaction_scores(images, padded, tile_bytes), slow_scores(images, words))
        torch.testing.assert_close(late_interaction_scores(padded, images, tile_bytes), slow_scores(words, images))


def test_chunks_hold_whole_samples():
    packing = Packing.of(torch.tensor([4, 2, 3, 9, 1]), torch.device("cpu"))
    chunks = [(samples.start, samples.stop, tokens.start, tokens.stop) for samples, tokens in packing.chunks(6)]
    assert chunks == [(0, 2, 0, 6), (2, 3, 6, 9), (3, 4, 9, 18), (4, 5, 18, 19)]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def peak_of_a_step(ranks: int, loss_of_step: Any) -> int:
    """Bytes at the most, on one of so many ranks; meta tensors have sizes and no values."""
    samples, patches, positions, width = 32, 10, 12, 16
    images = torch.empty(samples, patches, width, device="meta", requires_grad=True)
    texts = torch.empty(samples * positions, width, device="meta", requires_grad=True)
    scale = torch.ones(1, device="meta", requires_grad=True)
    collectives = {
        "world_size": lambda: ranks,
        "all_gather_rows": lambda local: local.new_empty(1, ranks * local.shape[1], *local.shape[2:]),
        "reduce_scatter_rows": lambda partial: partial[:, :samples].clone(),
    }
    with (
        mock.patch.multiple(losses.late_interaction, **collectives),
        mock.patch.object(losses.filip, "world_size", lambda: ranks),
        # Autocast knows no device "meta".
        mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),
        PeakBytes() as memory,
    ):
        loss_of_step(images, texts, torch.full((samples,), positions), scale, ranks).backward()
    return memory.peak


def tiled_step(images: Tensor, texts: Tensor, lengths: Tensor, scale: Tensor, ranks: int) -> Tensor:
    options = {"max_text_length": 12, "tile_bytes": 1 << 17, "winners_budget_bytes": 1 << 14}
    return filip_loss(images, texts, lengths, scale, keys=KeySelection(), **options)


def direct_step(images: Tensor, texts: Tensor, lengths: Tensor, scale: Tensor, ranks: int) -> Tensor:
    """The image's side alone, without tiles."""
    keys = texts.unflatten(0, (-1, 12)).repeat(ranks, 1, 1)
    scores = torch.einsum("ipd,jwd->ijpw", images, keys).amax(-1).mean(-1)
    return torch.nn.functional.cross_entropy(scale * scores, torch.arange(32, device="meta"))


def test_memory_grows_by_keys_and_scores_only():
    def growth(step: Any) -> float:
        """Bytes per further rank."""
        return (peak_of_a_step(9, step) - peak_of_a_step(5, step)) / 4

    keys, scores = 4 * 32 * (10 + 12) * 16, 4 * 32 * 32
    # Keys and their gradient; two matrices of scores, each with its logits, log-softmax and gradient at the most.
    assert 2 * keys < growth(tiled_step) <= 2 * keys + 8 * scores
    similarities = 4 * 32 * 10 * 32 * 12
    assert growth(direct_step) > similarities


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_tokens": tokens_of(4, WIDTH)}, "that add up to the 4 text_tokens"),
        ({"text_lengths": torch.tensor([5, 2])}, r"text_lengths in \[2, 5\]"),
        ({"image_tokens": tokens_of(3, 2, WIDTH)}, "expected \\[b, P, d\\]"),
        ({"logit_scale": torch.ones(1)}, "pass features through normalize"),
        ({"keys": KeySelection(2, "local_max", group=4)}, "group of 4 samples for 2 samples"),
    ],
)
def test_wrong_input_is_named(change, words):
    arguments = {
        "image_tokens": tokens_of(2, 2, WIDTH),
        "text_tokens": tokens_of(7, WIDTH),
        "text_lengths": torch.tensor([4, 3]),
        "logit_scale": torch.ones(1, dtype=torch.float64),
        "keys": KeySelection(),
        "max_text_length": 4,
    }
    with pytest.raises(ValueError, match=words):
        filip_loss(**{**arguments, **change})
