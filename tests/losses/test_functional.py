"""Normalisation in single precision."""

import torch

from losses import normalize


def test_unit_length_in_single_precision() -> None:
    features = 100 * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    unit = normalize(features.bfloat16())
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(normalize(features), normalize(features.clone()))
        assert normalize(features.bfloat16()).dtype == torch.float32
    assert normalize(features.double()).dtype == torch.float64


def test_zero_vector_has_a_finite_gradient() -> None:
    features = torch.zeros(2, 4, requires_grad=True)
    unit = normalize(features)
    unit.sum().backward()
    assert torch.count_nonzero(unit) == 0
    assert features.grad.isfinite().all()
