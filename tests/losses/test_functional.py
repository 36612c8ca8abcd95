"""Normalisation in single precision, and the precision of what losses take."""

import pytest
import torch

from losses import normalize
from losses.functional import check_precision


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


def test_inputs_of_a_loss_have_one_precision() -> None:
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    check_precision("some_loss", features=single, scale=single)
    check_precision("some_loss", features=double, scale=double)
    message = r"^some_loss got features in float32, scale in float64, expected float32 for all; "
    with pytest.raises(ValueError, match=message):
        check_precision("some_loss", features=single, scale=double)
    with pytest.raises(ValueError, match="features in bfloat16"):
        check_precision("some_loss", features=single.bfloat16(), scale=single.bfloat16())
