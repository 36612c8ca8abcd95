import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.batch_norm import BatchNorm
from models.resnet import AttentionPool, Bottleneck, ModifiedResNet
from tests.distributed import recorded_collectives, run_distributed

SIZES = {"image_size": 64, "layers": (1, 2, 1, 1), "width": 16, "heads": 8, "embed_dim": 24}


def make_tower(**options) -> ModifiedResNet:
    torch.manual_seed(0)
    tower = ModifiedResNet(**{**SIZES, **options})
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(0.5)
    return tower


def make_images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_block_starts_as_its_shortcut():
    tower = ModifiedResNet(**SIZES)
    blocks = [module for module in tower.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 5
    assert all(not block.bn3.weight.any() for block in blocks)
    assert all(norm.weight.eq(1).all() for norm in (tower.bn1, tower.bn2, tower.bn3, blocks[0].bn1, blocks[0].bn2))
    identity = tower.layer2[1]
    x = torch.rand(2, 128, 4, 4)
    assert torch.equal(identity(x), x)


def test_attention_pool_weights_start_with_the_inverse_root_of_the_width():
    torch.manual_seed(0)
    pool = AttentionPool(49, 512, 8, 256)
    for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert layer.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert pool.positional_embedding.std().item() == pytest.approx(512**-0.5, rel=0.05)


def test_strides_are_antialiased():
    tower = ModifiedResNet(**SIZES)
    strides = {name: module.stride[0] for name, module in tower.named_modules() if isinstance(module, nn.Conv2d)}
    assert [name for name, stride in strides.items() if stride > 1] == ["conv1"]
    assert [block.stride for layer in (tower.layer1, tower.layer2, tower.layer3) for block in layer] == [1, 2, 1, 2]
    assert tower(make_images(2)).shape == (2, 24)


def test_activation_checkpointing_changes_neither_gradients_nor_running_statistics():
    towers = make_tower(), make_tower(activation_checkpointing=True)
    for tower in towers:
        tower(make_images()).square().sum().backward()
    for (name, one), other in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(towers[0].named_buffers(), towers[1].buffers(), strict=True):
        assert torch.equal(one, other), name


def encode_views(images: torch.Tensor, views: int, *, split: bool, **options) -> dict[str, torch.Tensor]:
    tower = make_tower(**options)
    if split:
        features, tokens = (
            torch.cat(parts)
            for parts in zip(*[tower(part, with_tokens=True) for part in images.chunk(views)], strict=True)
        )
    else:
        features, tokens = tower(images, views=views, with_tokens=True)
    (features.square().sum() + tokens.square().sum()).backward()
    gradients = {name: p.grad for name, p in tower.named_parameters() if "k_proj.bias" not in name}
    return {"features": features.detach(), "tokens": tokens.detach(), **gradients, **dict(tower.named_buffers())}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found[name] / scale, value / scale, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("sync", [True, False])
def test_views_in_one_pass_equal_a_pass_each(sync):
    images = torch.cat([make_images(4), 3 * make_images(4).flip(0) + 1])
    expected = encode_views(images, 2, split=True, sync_batch_norm=sync)
    together = encode_views(images, 2, split=False, sync_batch_norm=sync)
    assert_same(together, expected)
    assert together["layer2.0.downsample.1.num_batches_tracked"] == 2
    recomputed = encode_views(images, 2, split=False, sync_batch_norm=sync, activation_checkpointing=True)
    assert all(torch.equal(recomputed[name], value) for name, value in together.items())
    mixed = make_tower(sync_batch_norm=sync)(images)
    assert (mixed - expected["features"]).abs().max() > 0.1 * expected["features"].abs().max()
    tower = make_tower().eval()
    assert torch.equal(tower(images, views=2), tower(images))


def encode_views_on_rank(rank: int, world_size: int) -> list[tuple[dict[str, torch.Tensor], int]]:
    results = []
    # The image's share, then its other view's.
    images = torch.cat([make_images(4)[rank::2], 3 * make_images(4)[rank::2] + 1])
    for options in ({"split": True}, {"split": False}, {"split": False, "activation_checkpointing": True}):
        with recorded_collectives() as collectives:
            result = encode_views(images, 2, **options)
        assert {name for name, _ in collectives} == {"all_reduce"}
        results.append((result, len(collectives)))
    return results


@pytest.mark.slow
def test_synchronised_views_take_the_collectives_of_one_pass():
    norms = [name for name, layer in make_tower().named_modules() if isinstance(layer, BatchNorm)]
    in_blocks = [name for name in norms if name.startswith("layer")]
    for apart, together, recomputed in run_distributed(encode_views_on_rank, 2):
        assert_same(together[0], apart[0])
        assert (apart[1], together[1]) == (4 * len(norms), 2 * len(norms))
        assert recomputed[1] == together[1] + len(in_blocks)
        assert all(torch.equal(recomputed[0][name], value) for name, value in together[0].items())


def encode_on_rank(rank: int, world_size: int, recompute: bool = False) -> dict[str, torch.Tensor]:
    tower = make_tower(activation_checkpointing=recompute)
    features = tower(make_images().chunk(world_size)[rank])
    features.square().sum().backward()
    # A gradient whose value is zero but for rounding says nothing: the bias of the keys does not affect a softmax.
    gradients = {name: p.grad for name, p in tower.named_parameters() if "k_proj.bias" not in name}
    return {"features": features.detach(), **gradients, **dict(tower.named_buffers())}


def encode_both_ways_on_rank(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    return [encode_on_rank(rank, world_size, recompute) for recompute in (False, True)]


@pytest.mark.slow
def test_synchronised_ranks_equal_one_process():
    expected = encode_on_rank(0, 1)
    buffer_names = dict(make_tower().named_buffers())
    for ranks in zip(*run_distributed(encode_both_ways_on_rank, 2), strict=True):
        for name, value in expected.items():
            parts = [rank[name] for rank in ranks]
            merged = torch.cat(parts) if name == "features" else parts[0] if name in buffer_names else sum(parts)
            scale = value.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(merged / scale, value / scale, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16_stays_close_to_fp32(pure):
    tower = make_tower()
    expected = tower(make_images()).detach()
    if pure:
        features = tower.to(torch.bfloat16)(make_images())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(make_images())
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), expected).min() > 0.99
    features.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters())
    assert all(norm.running_var.dtype == torch.float32 for norm in tower.modules() if isinstance(norm, BatchNorm))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_size 100 is not a multiple of 32; use 96 or 128"):
        make_tower(image_size=100)
    with pytest.raises(ValueError, match=r"expected \[n, 3, 64, 64\]"):
        make_tower()(torch.zeros(2, 3, 96, 96))
