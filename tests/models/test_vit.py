import pytest
import torch
import torch.nn.functional as F

from models.transformer import Transformer, quick_gelu
from models.vit import VisionTransformer, unfold_patches

SIZES = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 3, "heads": 2, "embed_dim": 48}


def make_tower(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **options})


def make_images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


def test_patch_embedding_is_the_strided_convolution():
    images, patch_size = make_images(), 8
    weight = torch.randn(16, 3, patch_size, patch_size)
    expected = F.conv2d(images, weight, stride=patch_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(unfold_patches(images, patch_size) @ weight.flatten(1).T, expected, atol=1e-4, rtol=1e-5)


def test_quick_gelu_is_the_textbook_form():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(quick_gelu, x)


@pytest.mark.parametrize("causal", [False, True])
def test_pooled_last_block_equals_the_full_one(causal):
    torch.manual_seed(0)
    transformer = Transformer(64, 3, 2, causal=causal).double()
    x = torch.randn(5, 7, 64, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 6, 3, 3, 1])
    rows = torch.arange(5)
    upstream = torch.randn(5, 64, dtype=torch.float64)
    (transformer(x)[rows, positions] * upstream).sum().backward()
    expected, expected_grad = gradients(transformer), x.grad
    x.grad = None
    transformer.zero_grad()
    pooled = transformer(x, positions)
    assert pooled.shape == (5, 1, 64)
    torch.testing.assert_close(pooled[:, 0], transformer(x)[rows, positions])
    (pooled[:, 0] * upstream).sum().backward()
    torch.testing.assert_close(x.grad, expected_grad)
    torch.testing.assert_close(gradients(transformer), expected)


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    transformer = Transformer(64, 1, 4, causal=True)
    attention = transformer.resblocks[0].attn
    reference = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    reference.load_state_dict(attention.state_dict())
    x = torch.randn(2, 6, 64)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    torch.testing.assert_close(attention(x), reference(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_initial_weights_follow_clip():
    tower = make_tower(width=256, heads=4, layers=2, embed_dim=512)
    width, linear_bound = 256, lambda fan_in: fan_in**-0.5
    assert tower.positional_embedding.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert tower.class_embedding.std().item() == pytest.approx(width**-0.5, rel=0.15)
    assert tower.proj.weight.std().item() == pytest.approx(width**-0.5, rel=0.02)
    # A convolution's default: uniform with bound fan_in^-0.5.
    assert tower.patch_embed.weight.abs().max().item() == pytest.approx(linear_bound(3 * 8 * 8), rel=0.01)
    block = tower.transformer.resblocks[0]
    xavier_bound = (6 / (width + 3 * width)) ** 0.5
    assert block.attn.in_proj_weight.abs().max().item() == pytest.approx(xavier_bound, rel=0.01)
    assert block.attn.out_proj.weight.abs().max().item() == pytest.approx(linear_bound(width), rel=0.01)
    assert block.mlp.c_fc.weight.abs().max().item() == pytest.approx(linear_bound(width), rel=0.01)
    assert block.mlp.c_proj.weight.abs().max().item() == pytest.approx(linear_bound(4 * width), rel=0.01)
    assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
    assert block.mlp.c_fc.bias.abs().max().item() == pytest.approx(linear_bound(width), rel=0.02)


def test_activation_checkpointing_changes_nothing_and_recomputes():
    plain, recomputing = make_tower(patch_dropout=0.5), make_tower(patch_dropout=0.5, activation_checkpointing=True)
    calls = []
    recomputing.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for tower in (plain, recomputing):
        torch.manual_seed(2)
        tower(make_images()).square().sum().backward()
    assert len(calls) == 2
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(recomputing)[name]), name


def test_stacked_views_equal_separate_passes():
    tower = make_tower()
    views = make_images(6).unflatten(0, (2, 3))
    together = tower(views.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(together, torch.stack([tower(view) for view in views]), atol=1e-6, rtol=1e-5)


def test_patch_dropout_keeps_a_random_subset_and_replays():
    tower = make_tower(patch_dropout=0.5)
    assert tower.num_kept_patches == 8
    lengths = []
    tower.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    images = make_images()
    torch.manual_seed(3)
    first = tower(images)
    second = tower(images)
    torch.manual_seed(3)
    assert torch.equal(tower(images), first)
    assert not torch.allclose(first, second)
    tower.eval()
    torch.testing.assert_close(tower(images), make_tower().eval()(images))
    assert lengths == [9, 9, 9, 17]


def test_patch_dropout_equals_attending_to_the_kept_patches_only(monkeypatch):
    tower = make_tower(patch_dropout=0.75)
    kept = torch.tensor([[5, 0, 9, 12], [1, 2, 3, 4], [15, 14, 13, 0]])
    monkeypatch.setattr(tower, "_draw_kept_patches", lambda patches: kept)
    images = make_images()
    features = tower(images)
    for row, indices in enumerate(kept):
        reference = make_tower()
        positions = reference.positional_embedding.data
        reference.positional_embedding.data = positions[torch.cat([torch.tensor([0]), 1 + indices])]
        patches = unfold_patches(images[row : row + 1], 8)[:, indices]
        tokens = reference.patch_embed(patches) + reference.positional_embedding[1:]
        class_token = (reference.class_embedding + reference.positional_embedding[0])[None, None]
        states = reference.transformer(reference.ln_pre(torch.cat([class_token, tokens], dim=1)))
        torch.testing.assert_close(features[row], reference.proj(reference.ln_post(states[0, 0])))


def test_every_patch_is_equally_likely_to_be_kept():
    tower = make_tower(patch_dropout=0.75)
    torch.manual_seed(0)
    kept = tower._draw_kept_patches(torch.zeros(4000, 16, 1))
    assert kept.shape == (4000, 4)
    assert all(len(set(row)) == 4 for row in kept[:50].tolist())
    frequencies = torch.bincount(kept.flatten(), minlength=16) / 4000
    torch.testing.assert_close(frequencies, torch.full((16,), 0.25), atol=0.03, rtol=0)


def test_frozen_patch_embedding_gets_no_gradient():
    tower = make_tower(freeze_patch_embed=True)
    tower(make_images()).sum().backward()
    without = [name for name, gradient in gradients(tower).items() if gradient is None]
    assert without == ["patch_embed.weight"]
    assert torch.equal(tower.patch_embed.weight, make_tower().patch_embed.weight)


@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16_stays_close_to_fp32(pure):
    tower = make_tower(patch_dropout=0.5)
    images = make_images()
    torch.manual_seed(4)
    expected = tower(images).detach()
    torch.manual_seed(4)
    if pure:
        features = tower.to(torch.bfloat16)(images)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(images)
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), expected).min() > 0.999
    features.float().square().sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(tower).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 8; use 24 or 32"),
        ({"patch_dropout": 1.0}, "patch_dropout 1.0 is out of range"),
        ({"heads": 3}, "width 128 is not divisible by heads 3"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_tower(**options)


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 64, 64\); expected \[n, 3, 32, 32\]"):
        make_tower()(make_images(size=64))
