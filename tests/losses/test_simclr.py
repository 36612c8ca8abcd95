"""SimCLR's loss on one rank: against a slow reference, closed forms, and what must not matter."""

import math

import pytest
import torch

from losses import simclr_loss
from tests.losses import reference


def draw(batch: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + dim)
    return torch.randn(2, batch, dim, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 2.0])
@pytest.mark.parametrize(("batch", "tile_rows"), [(9, None), (9, 4), (1, None), (2, 1)])
def test_matches_the_slow_reference(batch, tile_rows, temperature):
    projections = draw(batch, 6)
    loss = simclr_loss(projections, temperature=temperature, tile_rows=tile_rows)
    expected = reference.simclr(*(projections / projections.norm(dim=-1, keepdim=True)), temperature)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(3 * loss, projections)
    (wanted,) = torch.autograd.grad(3 * expected, projections)
    torch.testing.assert_close(gradient, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("batch", "temperature"), [(5, 0.1), (8, 0.5)])
def test_equal_orthonormal_views_have_a_closed_form(batch, temperature):
    eye = torch.eye(batch).expand(2, -1, -1)
    expected = math.log1p((2 * batch - 2) * math.exp(-1 / temperature))
    assert simclr_loss(eye, temperature=temperature).item() == pytest.approx(expected, abs=1e-6)
    if batch == 5:
        assert expected == pytest.approx(3.63e-4, rel=1e-3)


def test_one_sample_has_no_negatives():
    # Its own view would be the only other candidate: a loss above 0 means that an anchor met itself.
    assert simclr_loss(draw(1, 4)).item() == 0.0


def test_views_may_be_swapped_and_samples_permuted():
    projections = draw(7, 5)
    loss = simclr_loss(projections)
    torch.testing.assert_close(simclr_loss(projections.flip(0)), loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(simclr_loss(projections[:, torch.arange(7).roll(3)]), loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(simclr_loss(5 * projections), loss, atol=1e-12, rtol=0)
    assert not torch.isclose(simclr_loss(torch.stack([projections[0], projections[1].roll(1, 0)])), loss)


def test_half_precision_and_autocast_compute_in_fp32():
    projections = draw(9, 6).detach().bfloat16().requires_grad_()
    expected = simclr_loss(projections.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = simclr_loss(projections)
        (gradient,) = torch.autograd.grad(loss, projections)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert gradient.dtype == torch.bfloat16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"got projections \(3, 4, 5\), expected two views"):
        simclr_loss(torch.zeros(3, 4, 5))
    for temperature in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive number"):
            simclr_loss(torch.zeros(2, 4, 5), temperature=temperature)
