"""BYOL's loss: known values, a slow reference, and a teacher that is never pulled."""

import math

import pytest
import torch

from losses import byol_loss


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.0), (-1.0, 4.0)])
def test_equal_and_opposite(sign, expected):
    targets = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    predictions = torch.stack([sign * targets, 3.0 * sign * targets])
    assert float(byol_loss(predictions, targets)) == pytest.approx(expected, abs=1e-6)


def test_orthogonal():
    assert float(byol_loss(torch.eye(4)[None, :2], torch.eye(4)[2:])) == 2.0


def test_value_and_gradient_against_loops():
    generator = torch.Generator().manual_seed(1)
    predictions = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = byol_loss(predictions, targets)
    total = 0.0
    for view in range(2):
        for row in range(3):
            p, z = predictions[view, row].tolist(), targets[row].tolist()
            lengths = [math.sqrt(sum(value * value for value in vector)) for vector in (p, z)]
            total += sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(p, z, strict=True))
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert torch.autograd.gradcheck(lambda values: byol_loss(values, targets), predictions)
    loss.backward()
    assert targets.grad is None


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"expected \[V, n, D\] and \[n, D\]"):
        byol_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4))
