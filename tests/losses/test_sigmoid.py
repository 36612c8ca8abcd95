"""SigLIP's loss on one rank: against a slow reference, closed forms and open_clip."""

import math

import pytest
import torch

from losses import normalize, sigmoid_loss
from tests.losses import reference


def make_inputs(batch: int, dim: int, scale: float = 10.0, bias: float = -10.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch + dim)
    images = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    texts = torch.randn(batch, dim, generator=generator, dtype=torch.float64) + 0.5 * images
    values = [normalize(images), normalize(texts), torch.tensor([scale]), torch.tensor([bias])]
    return [value.to(dtype).requires_grad_() for value in values]


def compare(ours: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], atol: float) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=atol)
    found = torch.autograd.grad(3 * ours, inputs, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=atol)


@pytest.mark.parametrize("tile_rows", [None, 5, 1])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (120.0, -13.0), (300.0, 40.0)])
def test_matches_the_slow_reference(scale, bias, tile_rows):
    inputs = make_inputs(13, 8, scale, bias)
    compare(sigmoid_loss(*inputs, tile_rows=tile_rows), reference.sigmoid(*inputs), inputs, atol=1e-11)


def test_parity_with_open_clip():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    inputs = make_inputs(64, 32, dtype=torch.float32)
    expected = open_clip_loss.SigLipLoss()(*inputs)
    compare(sigmoid_loss(*inputs, tile_rows=24), expected, inputs, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (50.0, -12.0)])
def test_orthogonal_features_have_a_closed_form(batch, scale, bias):
    eye = torch.eye(batch, dtype=torch.float64)
    expected = math.log1p(math.exp(-scale - bias)) + (batch - 1) * math.log1p(math.exp(bias))
    loss = sigmoid_loss(eye, eye, *torch.tensor([[scale], [bias]], dtype=torch.float64))
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_the_start_of_training_is_dominated_by_no_side():
    # The paper's start, scale 10 and bias -10: with features of no relation all negatives together weigh less than
    # the positives, where a bias of 0 would let them weigh B - 1 times as much.
    images, texts, scale, bias = make_inputs(64, 256)
    start = sigmoid_loss(images, texts.roll(1, 0), scale, bias)
    assert 9.5 < start.item() < 11
    assert sigmoid_loss(images, texts.roll(1, 0), scale, 0 * bias).item() > 40


def test_symmetries():
    images, texts, scale, bias = make_inputs(11, 6)
    loss = sigmoid_loss(images, texts, scale, bias)
    order = torch.arange(11).roll(4)
    torch.testing.assert_close(sigmoid_loss(texts, images, scale, bias), loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(sigmoid_loss(images[order], texts[order], scale, bias), loss, atol=1e-12, rtol=0)


def test_rounded_features_pass_the_gradient_straight_through():
    images, texts, scale, bias = inputs = make_inputs(9, 6, dtype=torch.float32)
    rounded = texts + (texts.bfloat16().float() - texts).detach()
    loss = sigmoid_loss(*inputs, communication_dtype=torch.bfloat16)
    compare(loss, sigmoid_loss(images, rounded, scale, bias), inputs, atol=1e-7)


def test_autocast_frozen_towers_and_a_second_backward():
    images, texts, scale, bias = inputs = make_inputs(9, 6, dtype=torch.float32)
    expected = sigmoid_loss(*inputs)
    gradients = torch.autograd.grad(expected, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sigmoid_loss(*inputs), expected)
    again = torch.autograd.grad(expected, inputs)
    frozen_image = torch.autograd.grad(sigmoid_loss(images.detach(), *inputs[1:]), inputs[1:])
    frozen_text = torch.autograd.grad(sigmoid_loss(images, texts.detach(), scale, bias), [images, scale, bias])
    for one, other in zip(
        (*gradients, *gradients[1:], *gradients[:1], *gradients[2:]), (*again, *frozen_image, *frozen_text), strict=True
    ):
        assert torch.equal(one, other)
    assert not sigmoid_loss(*(value.detach() for value in inputs)).requires_grad


def test_mistakes_are_named():
    images, texts, scale, bias = make_inputs(4, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"image_features \(4, 3\) and text_features \(3, 3\), expected both"):
        sigmoid_loss(images, texts[:3], scale, bias)
    with pytest.raises(ValueError, match="expected float32 for all"):
        sigmoid_loss(images.bfloat16(), texts, scale, bias)
    with pytest.raises(ValueError, match=r"logit_bias \(2,\), expected one element each"):
        sigmoid_loss(images, texts, scale, bias.repeat(2))
