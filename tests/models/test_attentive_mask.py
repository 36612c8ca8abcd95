"""Class attention against the full matrix, maps carried over to views, and the patches that stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attentive_mask import carry_over, most_attended, patches_of_blocks
from models.vit import VisionTransformer
from tests.models.test_vit import make_images, make_tower


def full_attention(tower: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and the class token's row of the whole attention matrices, written out."""
    patches = F.unfold(images, tower.patch_size, stride=tower.patch_size).transpose(1, 2)
    tokens = patches @ tower.patch_embed.weight.T + tower.positional_embedding[1:]
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(len(images), 1, -1)
    x, rows = tower.ln_pre(torch.cat([first, tokens], dim=1)), []
    for block in tower.transformer.resblocks:
        attention = block.attn
        packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        rows.append(weights[:, :, 0])
        x = x + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return tower.ln_post(x[:, 0]), torch.stack(rows).mean((0, 2))


def test_class_attention_is_a_row_of_the_full_matrix():
    tower, images = make_tower().double(), make_images().double()
    pooled, expected = full_attention(tower, images)
    found_pooled, found = tower.attend(images)
    torch.testing.assert_close(found_pooled, pooled)
    torch.testing.assert_close(found.double(), expected[:, 1:].unflatten(1, (4, 4)), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(expected.sum(1), torch.ones(3, dtype=torch.float64))
    # The class token's own share completes it to one.
    torch.testing.assert_close(found.sum((1, 2)).double() + expected[:, 0], torch.ones(3).double())
    torch.testing.assert_close(found_pooled, tower(images, with_pooled=True)[1])
    assert not found_pooled.requires_grad


def test_attention_at_another_resolution():
    tower = make_tower()
    pooled, scores = tower.attend(make_images(size=16))
    assert pooled.shape == (3, 128)
    assert scores.shape == (3, 2, 2)
    # The grid of positions averages to itself, whatever its size, when all are equal.
    with torch.no_grad():
        tower.positional_embedding[1:] = 0.5
    small = make_tower(image_size=16)
    state = {**tower.state_dict(), "positional_embedding": tower.positional_embedding[:5]}
    small.load_state_dict(state)
    torch.testing.assert_close(tower.attend(make_images(size=16)), small.attend(make_images(size=16)))
    with pytest.raises(ValueError, match=r"expected \[n, 3, 16, 16\]"):
        tower.attend(make_images(size=20))


def test_kept_tokens_are_attention_restricted_to_them():
    tower, images = make_tower().double(), make_images().double()
    kept = torch.tensor([[0, 3, 5, 10], [15, 2, 1, 7], [4, 5, 6, 7]])
    found = tower(images, kept=kept)
    x = tower.ln_pre(
        torch.cat(
            [
                (tower.class_embedding + tower.positional_embedding[0]).expand(3, 1, -1),
                F.unfold(images, 8, stride=8).transpose(1, 2) @ tower.patch_embed.weight.T
                + tower.positional_embedding[1:],
            ],
            dim=1,
        )
    )
    visible = torch.zeros(3, 17, dtype=torch.bool)
    visible[:, 0] = True
    visible[torch.arange(3)[:, None], kept + 1] = True
    for block in tower.transformer.resblocks:
        packed = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        attended = F.scaled_dot_product_attention(*heads, attn_mask=visible[:, None, None])
        x = x + block.attn.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(found, tower.proj(tower.ln_post(x[:, 0])))
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(tower(images, kept=everything), tower(images), atol=1e-12, rtol=0)
    # Without `kept` the tower encodes all patches, in training and in evaluation.
    torch.testing.assert_close(tower(images), tower.eval()(images), atol=0, rtol=0)


def ramp(box: list[int], grid: int) -> Tensor:
    """A map over a box whose value in each cell is the source row of the cell's centre."""
    rows = box[1] + (torch.arange(grid, dtype=torch.float64) + 0.5) * (box[3] - box[1]) / grid
    return rows[:, None].expand(grid, grid)


@pytest.mark.parametrize("grid", [7, 14])
def test_a_ramp_is_carried_over_exactly(grid):
    context = [[10, 20, 210, 300], [0, 0, 375, 500]]
    views = [[[60, 80, 160, 200], [100, 90, 300, 400]], [[50, 60, 190, 240], [40, 60, 330, 430]]]
    boxes = torch.tensor([context, *views])
    scores = torch.stack([ramp(box, grid) for box in context])
    found = carry_over(scores, boxes, 14)
    assert found.shape == (2, 2, 14, 14)
    for view, view_boxes in zip(found, views, strict=True):
        torch.testing.assert_close(view, torch.stack([ramp(box, 14) for box in view_boxes]), rtol=1e-6, atol=0)
    # And along the other axis.
    turned = carry_over(scores.transpose(1, 2), boxes[..., [1, 0, 3, 2]], 14)
    torch.testing.assert_close(turned.transpose(2, 3), found)


def test_a_view_that_is_the_whole_crop_gets_the_map_itself():
    scores = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3, 5, 203, 105], [0, 0, 224, 224], [7, 7, 21, 21]]).expand(2, -1, -1)
    torch.testing.assert_close(carry_over(scores, boxes, 14)[0], scores, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(carry_over(scores[:, ::2, ::2], boxes, 7)[0], scores[:, ::2, ::2], atol=2e-6, rtol=1e-5)


def test_the_map_goes_on_beyond_its_outermost_centres():
    scores = torch.arange(4.0).view(1, 2, 2)
    found = carry_over(scores, torch.tensor([[[0, 0, 8, 8]], [[0, 0, 2, 2]]]), 2)
    assert found.flatten().tolist() == [0.0] * 4


def test_exactly_the_best_blocks_stay():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 5, 7, 7, generator=generator)
    kept = most_attended(scores, 25)
    for values, found in zip(scores.flatten(2).flatten(0, 1), kept.flatten(0, 1), strict=True):
        expected = sorted(range(49), key=lambda block: (-float(values[block]), block))[:25]
        assert found.tolist() == sorted(expected)
    patches = patches_of_blocks(kept, 14, 2)
    assert patches.shape == (2, 5, 100)
    assert all(len(set(row)) == 100 for row in patches.flatten(0, 1).tolist())
    # Raising the score of a block that stays never drops it.
    raised = scores.flatten(2).scatter_add(2, kept[..., 7:8], torch.full((2, 5, 1), 0.3)).view_as(scores)
    assert (most_attended(raised, 25) == kept[..., 7:8]).any(-1).all()


def test_ties_go_to_the_first_and_no_input_changes_the_count():
    assert most_attended(torch.zeros(4, 4), 9).tolist() == list(range(9))
    # The 17 that are higher come first, then the earliest of the others.
    values = torch.zeros(7, 7)
    values.view(-1)[-17:] = 1.0
    assert most_attended(values, 25).tolist() == [*range(8), *range(32, 49)]
    for odd in (math.nan, math.inf, -math.inf):
        values.view(-1)[3] = odd
        assert len(set(most_attended(values, 25).tolist())) == 25


def test_one_hot_block_keeps_its_four_patches():
    scores = torch.zeros(14, 14)
    scores[6:8, 10:12] = 1.0
    blocks = F.avg_pool2d(scores[None], 2)[0]
    kept = patches_of_blocks(most_attended(blocks, 1), 14, 2)
    assert sorted(kept.tolist()) == [6 * 14 + 10, 6 * 14 + 11, 7 * 14 + 10, 7 * 14 + 11]
    assert sorted(patches_of_blocks(most_attended(blocks, 49), 14, 2).tolist()) == list(range(196))
    assert patches_of_blocks(torch.tensor([0, 5, 15]), 4, 1).tolist() == [0, 5, 15]
