"""Label smoothing from means alone, against cross-entropy with smoothed targets."""

import math

import pytest
import torch

from losses import contrastive_terms, normalize, smoothing_sums, smoothing_term


def smoothed(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, smoothing: float) -> torch.Tensor:
    sums = smoothing_sums(images, texts)
    terms = contrastive_terms(images[None], texts[None], scale, extra_sums=sums)
    return terms.clip[0, 0] + smoothing * smoothing_term(images, texts, scale, terms.extra_sums)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_matches_torch(scale, smoothing):
    generator = torch.Generator().manual_seed(0)
    rows = [normalize(torch.randn(13, 6, generator=generator, dtype=torch.float64)) for _ in range(2)]
    inputs = [value.requires_grad_() for value in (*rows, torch.tensor([scale], dtype=torch.float64))]
    images, texts, factor = inputs
    labels = torch.arange(13)
    logits = factor * images @ texts.T
    expected = sum(
        torch.nn.functional.cross_entropy(matrix, labels, label_smoothing=smoothing) for matrix in (logits, logits.T)
    )
    ours = smoothed(images, texts, factor, smoothing)
    torch.testing.assert_close(ours, expected / 2, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad(ours, inputs)
    for one, other in zip(found, torch.autograd.grad(expected / 2, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_orthogonal_features_have_a_closed_form():
    batch, scale, smoothing = 8, 12.0, 0.1
    eye = torch.eye(batch, dtype=torch.float64)
    plain = math.log1p((batch - 1) * math.exp(-scale))
    expected = plain + smoothing * scale * (1 - 1 / batch)
    loss = smoothed(eye, eye, torch.tensor([scale], dtype=torch.float64), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-13)
