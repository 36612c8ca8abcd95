import pytest
import torch
import torch.nn.functional as F

from models.patch_dropout import kept_patches
from models.sequences import PackedSequences, UniformSequences
from models.transformer import Transformer, quick_gelu
from models.vit import VisionTransformer, unfold_patches

SIZES = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 3, "heads": 2, "embed_dim": 48}


def make_tower(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **options})


def make_images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def make_keys(count: int = 3, seed: int = 2) -> torch.Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize(
    ("sequences", "rows"),
    [
        (UniformSequences(5, 7), [0, 13, 17, 24, 29]),
        (PackedSequences.of(torch.tensor([4, 7, 7, 17]), torch.device("cpu")), [0, 3, 4, 20, 33, 34]),
    ],
    ids=["uniform", "packed"],
)
def test_last_block_for_some_rows_equals_the_full_one(sequences, rows):
    torch.manual_seed(0)
    transformer = Transformer(64, 3, 2).double()
    x = torch.randn(35, 64, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor(rows)
    upstream = torch.randn(len(rows), 64, dtype=torch.float64)
    (transformer(x, sequences)[rows] * upstream).sum().backward()
    expected, expected_grad = gradients(transformer), x.grad
    x.grad = None
    transformer.zero_grad()
    pooled = transformer(x, sequences, rows)
    assert pooled.shape == (len(rows), 64)
    torch.testing.assert_close(pooled, transformer(x, sequences)[rows])
    (pooled * upstream).sum().backward()
    torch.testing.assert_close(x.grad, expected_grad)
    torch.testing.assert_close(gradients(transformer), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch_multihead_attention(causal):
    torch.manual_seed(0)
    attention = Transformer(64, 1, 4).resblocks[0].attn
    reference = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    reference.load_state_dict(attention.state_dict())
    x = torch.randn(2, 6, 64)
    mask = torch.full((6, 6), float("-inf")).triu(1) if causal else None
    lengths = torch.tensor([6, 6])
    sequences = PackedSequences.of(lengths, x.device) if causal else UniformSequences(2, 6)
    expected = reference(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(attention(x.flatten(0, 1), sequences).unflatten(0, (2, 6)), expected)


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
        tower(make_images(), make_keys()).square().sum().backward()
    assert len(calls) == 2
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(recomputing)[name]), name


def test_stacked_views_equal_separate_passes():
    tower = make_tower()
    views = make_images(6).unflatten(0, (2, 3))
    together = tower(views.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(together, torch.stack([tower(view) for view in views]), atol=1e-6, rtol=1e-5)


def test_patch_dropout_depends_on_the_key_of_an_image_alone():
    tower = make_tower(patch_dropout=0.5).double()
    assert tower.num_kept_patches == 8
    counts = []
    tower.transformer.register_forward_pre_hook(lambda _, args: counts.append(args[1].length))
    images, keys = make_images(6).double(), make_keys(6)
    whole = tower(images, keys)
    parts = [tower(images[rows], keys[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
    assert not torch.isclose(tower(images, keys + 1), whole).all(dim=1).any()
    assert counts == [9, 9, 9, 9, 9]


def test_no_patch_is_dropped_in_evaluation_or_at_zero():
    images, keys = make_images(), make_keys()
    expected = make_tower()(images)
    torch.testing.assert_close(make_tower(patch_dropout=0.5).eval()(images, keys), expected)
    assert torch.equal(make_tower(patch_dropout=0.5).eval()(images), make_tower(patch_dropout=0.5).eval()(images, keys))
    assert torch.equal(make_tower()(images, keys), expected)


def test_patch_dropout_equals_attending_to_the_kept_patches_only():
    tower, images, keys = make_tower(patch_dropout=0.75), make_images(), make_keys()
    features = tower(images, keys)
    for row, indices in enumerate(kept_patches(keys, 16, 4)):
        reference = make_tower()
        positions = reference.positional_embedding.data
        reference.positional_embedding.data = positions[torch.cat([torch.tensor([0]), 1 + indices])]
        patches = unfold_patches(images[row : row + 1], 8)[0, indices]
        tokens = reference.patch_embed(patches) + reference.positional_embedding[1:]
        class_token = (reference.class_embedding + reference.positional_embedding[0])[None]
        states = reference.transformer(reference.ln_pre(torch.cat([class_token, tokens])), UniformSequences(1, 5))
        torch.testing.assert_close(features[row], reference.proj(reference.ln_post(states[0])))


@pytest.mark.parametrize("keys", [None, make_keys(2), make_keys(3)[:, None]])
def test_patch_dropout_without_a_key_per_image_is_refused(keys):
    with pytest.raises(ValueError, match=r"one int64 key per image.*for 3 images"):
        make_tower(patch_dropout=0.5)(make_images(), keys)


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
    expected = tower(images, make_keys()).detach()
    if pure:
        features = tower.to(torch.bfloat16)(images, make_keys())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(images, make_keys())
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
