import open_clip.model
import pytest
import torch

from models.weights.positions import resize_positions


class _Visual:
    grid_size = (9, 9)


class _Model:
    visual = _Visual()


@pytest.mark.parametrize(("before", "after"), [(7, 9), (12, 9)])
def test_equals_open_clip(before, after):
    positions = torch.randn(1 + before**2, 8)
    state = {"visual.positional_embedding": positions}
    open_clip.model.resize_pos_embed(state, _Model())
    torch.testing.assert_close(
        resize_positions(positions, 1 + after**2), state["visual.positional_embedding"], atol=0, rtol=0
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_positions_without_a_patch_stay_and_constants_stay_constant(prefix):
    positions = torch.cat([torch.randn(prefix, 4), torch.full((16, 4), 0.5)])
    resized = resize_positions(positions, prefix + 49)
    assert torch.equal(resized[:prefix], positions[:prefix])
    torch.testing.assert_close(resized[prefix:], torch.full((49, 4), 0.5))
    assert resize_positions(positions, prefix + 16) is positions


def test_grids_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="51 positions cannot be interpolated to 81"):
        resize_positions(torch.zeros(51, 4), 81)
