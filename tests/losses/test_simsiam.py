"""SimSiam loss and its collapse detector against their definitions."""

import math

import pytest
import torch

from losses import feature_std, simsiam_loss


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_matches_the_definition() -> None:
    z, p = draw(2, 5, 8).requires_grad_(), draw(4, 5, 8)[2:].clone().requires_grad_()
    cosines = [
        torch.dot(p[v, i], z[1 - v, i].detach()) / p[v, i].norm() / z[1 - v, i].detach().norm()
        for v in range(2)
        for i in range(5)
    ]
    expected = -0.5 * (sum(cosines[:5]) / 5 + sum(cosines[5:]) / 5)
    loss = simsiam_loss(z, p)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, p)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, p)[0])


def test_extremes_and_symmetry() -> None:
    same = draw(1, 5, 8).expand(2, -1, -1)
    assert simsiam_loss(same, same).item() == pytest.approx(-1.0)
    orthogonal = torch.eye(10).view(2, 5, 10)
    assert simsiam_loss(orthogonal, orthogonal).item() == 0.0
    z, p = draw(2, 5, 8), draw(4, 5, 8)[2:]
    torch.testing.assert_close(simsiam_loss(z.flip(0), p.flip(0)), simsiam_loss(z, p))


def test_no_gradient_through_the_target() -> None:
    z, p = draw(2, 5, 8).requires_grad_(), draw(2, 5, 8).requires_grad_()
    simsiam_loss(z, p).backward()
    assert z.grad is None
    assert torch.count_nonzero(p.grad)


def test_half_precision_is_computed_in_single() -> None:
    z, p = draw(2, 5, 8).bfloat16(), draw(4, 5, 8)[2:].bfloat16()
    loss = simsiam_loss(z, p)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), simsiam_loss(z.double(), p.double()), atol=1e-6, rtol=0)


def test_std_tells_healthy_from_collapsed() -> None:
    assert feature_std(draw(2, 2000, 64)).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert feature_std(draw(1, 1, 64).expand(2, 50, -1)).item() == pytest.approx(0.0, abs=1e-7)
    # Both views collapsed, onto different points: the statistics must not mix views.
    assert feature_std(draw(2, 1, 64).expand(-1, 50, -1)).item() == pytest.approx(0.0, abs=1e-7)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, n, D\]"):
        simsiam_loss(draw(3, 5, 8), draw(3, 5, 8))
    with pytest.raises(ValueError, match=r"\[2, n, D\]"):
        simsiam_loss(draw(2, 5, 8), draw(2, 4, 8))
