"""The contrastive core on one rank against dense references, closed forms and open_clip."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losses import contrastive_terms, normalize
from tests.distributed import recorded_collectives
from tests.losses import reference

SLABS = {
    "kept": {},
    "recomputed": {"slab_budget_bytes": 0},
    "uneven tiles": {"tile_rows": 5},
    "partly kept": {"tile_rows": 4, "slab_budget_bytes": 30 * 13 * 8},
}


def make_inputs(
    views: int, texts: int, batch: int, dim: int, scale: float = 20.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + dim)
    images = torch.randn(views, batch, dim, generator=generator, dtype=torch.float64)
    captions = torch.randn(texts, batch, dim, generator=generator, dtype=torch.float64) + 0.5 * images[:1]
    features = [normalize(images), normalize(captions), torch.tensor([scale], dtype=torch.float64)]
    return [value.to(dtype).requires_grad_() for value in features]


def compare(ours: Tensor, expected: Tensor, inputs: list[Tensor], atol: float) -> None:
    """Value and the gradient with respect to every input, under one random weighting of the terms."""
    torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=atol)
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
    actual = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    for one, other, leaf in zip(actual, wanted, inputs, strict=True):
        one, other = (torch.zeros_like(leaf) if value is None else value for value in (one, other))
        torch.testing.assert_close(one, other, atol=atol, rtol=atol)


@pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS.keys())
@pytest.mark.parametrize(("views", "texts"), [(1, 1), (2, 2), (3, 1), (1, 2)])
def test_clip_matches_dense_reference(views: int, texts: int, slab: dict[str, Any]) -> None:
    images, captions, scale = inputs = make_inputs(views, texts, batch=13, dim=8)
    terms = contrastive_terms(images, captions, scale, **slab)
    assert terms.nns is None
    assert terms.gathered_slots is None
    torch.testing.assert_close(terms.gathered_text, captions.detach())
    assert not terms.gathered_text.requires_grad
    compare(terms.clip, reference.clip_terms(images, captions, scale), inputs, atol=1e-12)


@pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS.keys())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_neighbours_match_dense_reference(symmetric: bool, masked: bool, slab: dict[str, Any]) -> None:
    images, captions, scale = inputs = make_inputs(2, 2, batch=13, dim=8)
    queue = normalize(torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    slots = torch.arange(26).view(2, 13) % 6
    terms = contrastive_terms(
        images,
        captions,
        scale,
        queue_rows=queue,
        neighbour_slots=slots,
        neighbour_symmetric=symmetric,
        neighbour_mask_duplicates=masked,
        **slab,
    )
    expected = reference.neighbour_terms(
        images, queue[slots], scale, symmetric=symmetric, slots=slots if masked else None
    )
    compare(terms.nns, expected, inputs, atol=1e-12)
    compare(terms.clip + terms.nns, reference.clip_terms(images, captions, scale) + expected, inputs, atol=1e-12)
    text_gradient = torch.autograd.grad(terms.nns.sum(), captions)[0]
    assert torch.count_nonzero(text_gradient) == 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 100.0])
@pytest.mark.parametrize("batch", [2, 7])
def test_orthogonal_features_have_a_closed_form(batch: int, scale: float) -> None:
    eye = torch.eye(batch).unsqueeze(0)
    loss = contrastive_terms(eye, eye, torch.tensor([scale])).clip.item()
    assert loss == pytest.approx(reference.orthogonal_info_nce(batch, scale), abs=1e-7)
    mismatched = contrastive_terms(eye, eye.roll(1, dims=1), torch.tensor([scale])).clip.item()
    assert mismatched == pytest.approx(scale + reference.orthogonal_info_nce(batch, scale), rel=1e-6)


def test_equal_features_cannot_be_told_apart() -> None:
    rows = normalize(torch.ones(1, 9, 4))
    assert contrastive_terms(rows, rows, torch.tensor([50.0])).clip.item() == pytest.approx(math.log(9), abs=1e-6)


@pytest.mark.parametrize("scale", [100.0, 300.0])
@pytest.mark.parametrize("slab", [SLABS["kept"], {"slab_budget_bytes": 0, "tile_rows": 3}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("opposite", ["text", "image"])
def test_sums_do_not_underflow(opposite: str, scale: float, slab: dict[str, Any]) -> None:
    # One row of one side is opposite to every row of the other side, where all else matches perfectly: with a shift
    # common to rows and columns its sum is exp(-2 * scale), which single precision cannot hold.
    generator = torch.Generator().manual_seed(3)
    aligned = normalize(torch.randn(12, 6, generator=generator, dtype=torch.float64) * 0.1 + torch.eye(6)[0].double())
    outlier = torch.cat([-normalize(aligned.mean(0, keepdim=True)), aligned[1:]])
    pair = (aligned, outlier) if opposite == "text" else (outlier, aligned)
    inputs = [value[None].clone().requires_grad_() for value in pair]
    inputs.append(torch.tensor([scale], dtype=torch.float64, requires_grad=True))
    single = [value.detach().float().requires_grad_() for value in inputs]
    ours = contrastive_terms(*single, **slab).clip.sum()
    expected = reference.clip_terms(*inputs).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(ours, single), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-6 * scale, rtol=1e-4)


def test_symmetries() -> None:
    images, captions, scale = make_inputs(1, 1, batch=11, dim=6)
    loss = contrastive_terms(images, captions, scale).clip
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for other in (
        contrastive_terms(captions, images, scale),
        contrastive_terms(images[:, order], captions[:, order], scale),
        contrastive_terms(images @ rotation, captions @ rotation, scale),
    ):
        torch.testing.assert_close(other.clip, loss, atol=1e-12, rtol=0)


def test_views_are_separate_terms() -> None:
    images, captions, scale = make_inputs(2, 2, batch=9, dim=6)
    together = contrastive_terms(images, captions, scale).clip
    for v in range(2):
        for k in range(2):
            alone = contrastive_terms(images[v : v + 1], captions[k : k + 1], scale).clip
            torch.testing.assert_close(together[v, k], alone[0, 0], atol=1e-12, rtol=0)
    same = contrastive_terms(images[:1].expand(2, -1, -1), captions[:1].expand(2, -1, -1), scale).clip
    torch.testing.assert_close(same.mean(), together[0, 0], atol=1e-12, rtol=0)


def test_own_captions_as_neighbours_equal_one_direction_of_clip() -> None:
    images, captions, scale = make_inputs(1, 1, batch=9, dim=6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    terms = contrastive_terms(
        images, captions, scale, queue_rows=captions.detach()[0, order], neighbour_slots=order.argsort()[None]
    )
    expected = reference.direction(images[0], captions[0].detach(), scale)
    compare(terms.nns, expected.view(1, 1), [images, captions, scale], atol=1e-12)


def test_rows_sharing_a_neighbour() -> None:
    images, captions, scale = make_inputs(1, 1, batch=9, dim=6)
    queue = captions.detach()[0, :1]
    slots = torch.zeros(1, 9, dtype=torch.int64)
    shared = contrastive_terms(images, captions, scale, queue_rows=queue, neighbour_slots=slots)
    assert shared.nns.item() == pytest.approx(math.log(9), abs=1e-12)
    masked = contrastive_terms(
        images, captions, scale, queue_rows=queue, neighbour_slots=slots, neighbour_mask_duplicates=True
    )
    assert masked.nns.item() == pytest.approx(0.0, abs=1e-12)


def test_neighbour_vectors_equal_queue_slots_bitwise() -> None:
    images, captions, scale = make_inputs(2, 2, batch=9, dim=6, dtype=torch.float32)
    queue = normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)))
    slots = torch.arange(18).view(2, 9) % 5
    options = {"neighbour_mask_duplicates": True, "neighbour_symmetric": True, "neighbour_slots": slots}
    by_slot = contrastive_terms(images, captions, scale, queue_rows=queue, **options)
    by_vector = contrastive_terms(images, captions, scale, neighbour_vectors=queue[slots], **options)
    assert torch.equal(by_slot.nns, by_vector.nns)


def test_parity_with_open_clip() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    images, captions, scale = inputs = make_inputs(1, 1, batch=64, dim=32, dtype=torch.float32)
    expected = open_clip_loss.ClipLoss()(images[0], captions[0], scale)
    ours = contrastive_terms(images, captions, scale).clip
    torch.testing.assert_close(ours[0, 0], expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_rounded_features_pass_the_gradient_straight_through() -> None:
    images, captions, scale = inputs = make_inputs(2, 2, batch=9, dim=6, dtype=torch.float32)
    terms = contrastive_terms(images, captions, scale, communication_dtype=torch.bfloat16)
    rounded = captions + (captions.bfloat16().float() - captions).detach()
    assert torch.equal(terms.gathered_text, rounded.detach())
    assert not torch.equal(rounded, captions)
    compare(terms.clip, contrastive_terms(images, rounded, scale).clip.double(), inputs, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    images, captions, scale = inputs = make_inputs(1, 1, batch=9, dim=6, dtype=torch.float32)
    expected = contrastive_terms(images, captions, scale, slab_budget_bytes=0).clip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_terms(images, captions, scale, slab_budget_bytes=0).clip
        gradients = torch.autograd.grad(loss.sum(), inputs)
    assert torch.equal(loss, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(one, other)


def test_backward_twice_and_frozen_towers() -> None:
    images, captions, scale = inputs = make_inputs(2, 1, batch=9, dim=6)
    loss = contrastive_terms(images, captions, scale).clip.sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    frozen_image = torch.autograd.grad(contrastive_terms(images.detach(), captions, scale).clip.sum(), inputs[1:])
    frozen_text = torch.autograd.grad(contrastive_terms(images, captions.detach(), scale).clip.sum(), images)
    only_scale = torch.autograd.grad(contrastive_terms(images.detach(), captions.detach(), scale).clip.sum(), scale)
    for one, other in zip(
        (*first, *first[1:], first[0], first[2]), (*second, *frozen_image, *frozen_text, *only_scale), strict=True
    ):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert not contrastive_terms(images.detach(), captions.detach(), scale.detach()).clip.requires_grad


def test_chosen_pairs() -> None:
    images, captions, scale = inputs = make_inputs(2, 2, batch=9, dim=6)
    full = reference.clip_terms(images, captions, scale)
    chosen = torch.tensor([[True, False], [False, True]])
    terms = contrastive_terms(images, captions, scale, clip_pairs=[(1, 1), (0, 0)])
    compare(terms.clip, torch.where(chosen, full, 0.0), inputs, atol=1e-12)
    nothing = contrastive_terms(images, captions, scale, clip_pairs=[])
    assert torch.count_nonzero(nothing.clip) == 0


def test_one_rank_starts_no_collective_and_returns_the_extra_sums() -> None:
    images, captions, scale = make_inputs(1, 1, batch=4, dim=4)
    extra = torch.tensor([3.0, 0.5], dtype=torch.float64)
    with recorded_collectives() as records:
        terms = contrastive_terms(images, captions, scale, extra_sums=extra)
        terms.clip.sum().backward()
    assert records == []
    assert torch.equal(terms.extra_sums, extra)
    assert not terms.extra_sums.requires_grad


def test_mistakes_are_refused() -> None:
    images, captions, scale = make_inputs(1, 1, batch=4, dim=4, dtype=torch.float32)
    slots = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[V, b, d\]"):
        contrastive_terms(images[0], captions[0], scale)
    with pytest.raises(ValueError, match="expected"):
        contrastive_terms(images, captions[:, :3], scale)
    with pytest.raises(ValueError, match="float32"):
        contrastive_terms(images.bfloat16(), captions, scale)
    with pytest.raises(ValueError, match="one element"):
        contrastive_terms(images, captions, scale.expand(2))
    with pytest.raises(ValueError, match="either queue_rows"):
        contrastive_terms(images, captions, scale, neighbour_slots=slots)
    with pytest.raises(ValueError, match="needs neighbour_slots"):
        contrastive_terms(images, captions, scale, queue_rows=captions[0])
    with pytest.raises(ValueError, match="neighbour_slots"):
        contrastive_terms(images, captions, scale, queue_rows=captions[0], neighbour_slots=slots[:, :2])
    with pytest.raises(ValueError, match="clip_pairs"):
        contrastive_terms(images, captions, scale, clip_pairs=[(0, 1)])


class MatrixProducts(TorchDispatchMode):
    """Counts multiply-adds of matrix products by the shapes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def count_products(weights: Tensor | None = None, **options: Any) -> float:
    """Matrix products of one block (forward and backward) in units of b * B * d."""
    images, captions, scale = make_inputs(2, 2, batch=16, dim=8)
    with MatrixProducts() as products:
        loss = contrastive_terms(images, captions, scale, tile_rows=5, **options).clip
        (loss * (torch.ones_like(loss) if weights is None else weights)).sum().backward()
    return products.multiply_adds / (16 * 16 * 8)


def test_number_of_matrix_products() -> None:
    assert count_products() == 4 * 3
    assert count_products(slab_budget_bytes=0) == 4 * 4
    assert count_products(clip_pairs=[(0, 0)]) == 3
    # A weight of zero is known only in backward: the forward product remains, its two gradients are skipped.
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert count_products(weights) == 4 + 2


class Exponentials(TorchDispatchMode):
    """Counts elements that went through exp()."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") == "exp":
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [1.0, 60.0, 100.0, 300.0])
@pytest.mark.parametrize("slab", SLABS.values(), ids=SLABS.keys())
def test_one_exponential_per_logit_and_two_where_the_range_is_too_wide(slab: dict[str, Any], scale: float) -> None:
    batch = 30
    images, captions, logit_scale = inputs = make_inputs(1, 1, batch, dim=8, scale=scale)
    single = [value.detach().float().requires_grad_() for value in inputs]
    with MatrixProducts() as products, Exponentials() as exponentials:
        ours = contrastive_terms(*single, **slab).clip.sum()
    expected = reference.clip_terms(images, captions, logit_scale).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    wide = products.multiply_adds > batch * batch * 8
    assert wide == (scale == 300.0)
    # One exponential in the pass that was given up, then one for each direction; per row and column a few more.
    assert 0 <= exponentials.elements - (3 if wide else 1) * batch * batch < 20 * batch
    for one, other in zip(torch.autograd.grad(ours, single), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize("length", [3.0, math.nan])
def test_features_that_are_not_unit_length_lose_nothing(length: float) -> None:
    images, captions, scale = make_inputs(1, 1, batch=9, dim=6, dtype=torch.float32)
    images, captions = images.detach() * length, captions.detach() * length
    ours = contrastive_terms(images, captions, scale).clip.item()
    expected = reference.clip_terms(images.double(), captions.double(), scale.double()).item()
    assert ours == pytest.approx(expected, rel=1e-6, nan_ok=True)


def peak_bytes(run: Any) -> tuple[int, int]:
    """Peak of the bytes allocated while `run` is running, and the largest single allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = largest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak, largest = max(peak, live), max(largest, event.nbytes())
    return peak, largest


def test_memory() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    images, captions, scale = make_inputs(1, 1, batch=2048, dim=32, dtype=torch.float32)
    dense, _ = peak_bytes(lambda: open_clip_loss.ClipLoss()(images[0], captions[0], scale).backward())
    images.grad = captions.grad = scale.grad = None
    kept, _ = peak_bytes(lambda: contrastive_terms(images, captions, scale).clip.sum().backward())
    images.grad = captions.grad = scale.grad = None
    recomputed, largest = peak_bytes(
        lambda: contrastive_terms(images, captions, scale, slab_budget_bytes=0, tile_rows=128).clip.sum().backward()
    )
    matrix = 4 * 2048 * 2048
    assert dense > 4 * matrix
    assert kept < 0.30 * dense
    assert recomputed < 0.04 * dense
    assert largest <= matrix / 16
