"""A training step of the losses never waits for the device, and planted waits are caught."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losses import (
    NearestNeighborQueue,
    contrastive_terms,
    masked_lm_loss,
    normalize,
    sigmoid_loss,
    simclr_loss,
    simsiam_loss,
    smoothing_sums,
    smoothing_term,
)

_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result, or its shape, the host must learn, and copies between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _WAITING or _by_mask(name, args) or _between_devices(name, args, kwargs):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


def _by_mask(name: str, args: Any) -> bool:
    indices = args[1] if name in ("index", "index_put", "index_put_") else []
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _between_devices(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name == "copy_":
        return args[0].device != args[1].device
    return name == "_to_copy" and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type


def step(device: str, options: dict[str, Any], plant: Callable[[Tensor], Any] | None = None) -> list[Tensor]:
    """Every loss, forward and backward, then the queue; returns the gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, 8), (2, 12, 8), (5, 11)]
    leaves = [torch.randn(*shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    leaves.append(torch.full((1,), 2.0, device=device, requires_grad=True))
    images, texts, token_logits, log_scale = leaves
    targets = torch.arange(5, device=device)
    count = torch.tensor([5.0], dtype=torch.float64, device=device)
    queue = NearestNeighborQueue(40, 8).to(device)
    queue.enqueue(torch.ones(1, 4, 8, device=device))
    # Autocast knows no device "meta"; where it exists it waits for nothing.
    autocast = mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with NoWaiting(), autocast:
        slots, _ = queue.search(normalize(texts))
        terms = contrastive_terms(
            normalize(images),
            normalize(texts),
            log_scale.exp(),
            queue_rows=queue.rows,
            neighbour_slots=slots,
            extra_sums=count,
            **options,
        )
        tss = masked_lm_loss(token_logits, targets, terms.extra_sums[0])
        loss = terms.clip.sum() + terms.nns.sum() + simsiam_loss(images, images * 0.5) + tss
        pair = normalize(images[0]), normalize(texts[0]), log_scale.exp()
        loss = (
            loss
            + simclr_loss(images)
            + sigmoid_loss(*pair, -log_scale)
            + smoothing_term(*pair, smoothing_sums(*pair[:2]))
        )
        loss.backward()
        queue.enqueue(terms.gathered_text)
        assert queue.ready
        if plant is not None:
            plant(terms.gathered_text)
    return [leaf.grad for leaf in leaves]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recomputed": {"slab_budget_bytes": 0, "tile_rows": 5},
    "masked": {"neighbour_mask_duplicates": True, "neighbour_symmetric": True},
    "pairs": {"clip_pairs": [(1, 0)], "communication_dtype": torch.bfloat16},
}


# Meta tensors take every branch that an accelerator takes, and have no values that could be read.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_loss_waits(options: dict[str, Any], device: str) -> None:
    for gradient in step(device, options):
        assert gradient.device.type == device
        assert device == "meta" or gradient.isfinite().all()


def look_in_backward(values: Tensor) -> None:
    values.register_hook(lambda gradient: gradient.sum().item())
    values.sum().backward()


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "branch": lambda values: bool(values.sum().isfinite()),
    "number": lambda values: values.sum().item(),
    "index": lambda values: values[values > 0],
    "places": lambda values: values.nonzero(),
    "copy": lambda values: values.to("cpu" if values.is_meta else "meta"),
    "backward": lambda values: look_in_backward(values.clone().requires_grad_()),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("plant", WAITS.values(), ids=WAITS.keys())
def test_a_planted_wait_is_caught(plant: Callable[[Tensor], Any], device: str) -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        step(device, {}, plant)


def test_queue_decides_on_the_device() -> None:
    queue = NearestNeighborQueue(16, 4)
    good = normalize(torch.arange(1.0, 13.0).view(1, 3, 4))
    bad = good.clone()
    bad[0, 1, 2] = math.nan
    with NoWaiting():
        stored = [queue.enqueue(block) for block in (good, bad, good)]
    assert [bool(answer) for answer in stored] == [True, False, True]
    assert queue.counters.tolist() == [6, 6, 1]
    assert torch.equal(queue.rows_by_age(), torch.cat([good[0], good[0]]))
