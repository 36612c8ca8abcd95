import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.batch_norm import BatchNorm, check_batch_norm_mode, frozen_running_statistics
from tests.distributed import recorded_collectives, run_distributed

C = 5


def make_layer(seed: int = 0, **options) -> BatchNorm:
    generator = torch.Generator().manual_seed(seed)
    layer = BatchNorm(C, **{"sync": True, **options})
    with torch.no_grad():
        layer.weight.copy_(torch.rand(C, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(C, generator=generator))
    return layer


def make_input(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(shape, generator=generator)


def buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def normalise_in_numpy(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    out = np.empty_like(x)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        out[:, channel] = (values - values.mean()) / np.sqrt(values.var() + eps) * weight[channel] + bias[channel]
    return out


@pytest.mark.parametrize("shape", [(6, C), (4, C, 3, 3)])
def test_matches_torch_layer_in_training_and_evaluation(shape):
    layer, reference = make_layer(), nn.BatchNorm2d(C) if len(shape) == 4 else nn.BatchNorm1d(C)
    reference.load_state_dict(layer.state_dict())
    for seed in range(3):
        torch.testing.assert_close(layer(make_input(shape, seed)), reference(make_input(shape, seed)))
    assert layer.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    layer.eval()
    reference.eval()
    torch.testing.assert_close(layer(make_input(shape, 9)), reference(make_input(shape, 9)))


def test_views_are_normalised_one_after_another():
    layer, reference = make_layer(), make_layer()
    x = make_input((3, 6, C)) * torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    expected = torch.stack([reference(view) for view in x])
    torch.testing.assert_close(layer(x), expected)
    for name, value in buffers(reference).items():
        torch.testing.assert_close(buffers(layer)[name], value)
    assert layer.num_batches_tracked == 3
    together = make_layer()(x.flatten(0, 1)).view_as(x)
    assert (together - expected).abs().max() > 0.5
    layer.eval()
    reference.eval()
    torch.testing.assert_close(layer(x), torch.stack([reference(view) for view in x]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sync", [True, False])
def test_stacked_views_equal_sequential_calls_bitwise_on_one_rank(layout, sync):
    together, apart = (
        run_views(make_layer(sync=sync), make_views(3, 4).to(memory_format=layout), 3, split=split)
        for split in (False, True)
    )
    assert together["output"].is_contiguous(memory_format=layout)
    for name, value in apart.items():
        assert torch.equal(together[name], value), name
    assert together["num_batches_tracked"] == 3


def test_stacked_views_in_other_shapes_and_modes():
    layer, x = make_layer(), make_views(3, 4)
    torch.testing.assert_close(
        make_layer()(x[..., 0, 0], 3), make_layer()(x[..., 0, 0].unflatten(0, (3, 4))).flatten(0, 1)
    )
    assert (layer(x, 3) - layer(x)).abs().max() > 0.5
    assert layer.num_batches_tracked == 4
    before = buffers(layer)
    with frozen_running_statistics(layer):
        layer(x, 3)
    layer.eval()
    assert torch.equal(layer(x, 3), layer(x))
    assert all(torch.equal(buffers(layer)[name], value) for name, value in before.items())


def test_matches_a_float64_loop():
    layer, x = make_layer(), make_input((7, C, 2, 3))
    expected = normalise_in_numpy(x.double().numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy())
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=2e-6)


def test_half_precision_weights_and_input_use_fp32_statistics():
    layer = make_layer().to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    x = (100 + make_input((64, C))).to(torch.bfloat16).requires_grad_()
    output = layer(x)
    reference = make_layer().to(torch.bfloat16).float()
    expected = reference(x.detach().float())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(layer.running_mean, reference.running_mean, atol=1e-5, rtol=1e-6)
    output.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.bfloat16
    assert torch.isfinite(x.grad).all()
    layer.eval()
    assert layer(x).dtype == torch.bfloat16


def test_casting_keeps_the_exact_running_statistics():
    layer = make_layer()
    layer(make_input((6, C)))
    before = buffers(layer)
    layer.to(torch.bfloat16)
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value)
    layer.double()
    assert layer.running_mean.dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_updates_running_statistics_once(use_reentrant):
    plain, recomputed = make_layer(), make_layer()
    x = make_input((6, C)).requires_grad_()
    y = make_input((6, C)).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(recomputed, y, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for name, value in buffers(plain).items():
        assert torch.equal(buffers(recomputed)[name], value)
    assert recomputed.num_batches_tracked == 1


def test_frozen_running_statistics_still_normalises_by_the_batch():
    layer = nn.Sequential(nn.Identity(), make_layer())
    before = buffers(layer)
    x = make_input((6, C))
    with frozen_running_statistics(layer):
        inside = layer(x)
    for name, value in before.items():
        assert torch.equal(buffers(layer)[name], value)
    assert torch.equal(layer(x), inside)
    assert layer[1].num_batches_tracked == 1


def test_errors_name_the_fix():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"expected \[n, C\], \[V, n, C\] or \[n, C, H, W\] with C = 5"):
        layer(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="not 2 equal views"):
        layer(torch.zeros(3, C, 1, 1), 2)
    with pytest.raises(ValueError, match="not 2 equal views"):
        layer(torch.zeros(2, 3, C), 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, C))
    with pytest.raises(ValueError, match="use one of sync, local"):
        check_batch_norm_mode("global")
    assert check_batch_norm_mode("sync") and not check_batch_norm_mode("local")


def loss_weights(shape: tuple[int, ...]) -> torch.Tensor:
    return make_input(shape, seed=5)


def run_and_collect(
    layer: BatchNorm, x: torch.Tensor, weights: torch.Tensor, views: int = 1
) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    output = layer(x, views)
    (output.float() * weights).square().sum().backward()
    return {
        "output": output.detach(),
        "grad_x": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        **buffers(layer),
    }


def make_views(views: int, size: int) -> torch.Tensor:
    scale = torch.arange(1.0, 1 + views).square().repeat_interleave(size)
    return make_input((views * size, C, 2, 3)) * scale[:, None, None, None]


def run_views(
    layer: BatchNorm, x: torch.Tensor, views: int, *, split: bool = False, recompute: bool = False
) -> dict[str, torch.Tensor]:
    """What comes of views in one call, or in a call each; the weights of the loss depend on the place in the view."""
    x = x.detach().clone().requires_grad_()
    size = x.shape[0] // views
    if split:
        output = torch.cat([layer(part) for part in x.chunk(views)])
    else:
        output = checkpoint(layer, x, views, use_reentrant=False) if recompute else layer(x, views)
    weights = (
        torch.linspace(-1, 2, x[0].numel()).view(x[0].shape)
        + torch.arange(views).repeat_interleave(size)[:, None, None, None]
    )
    (output.float() * weights).square().sum().backward()
    gradients = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {"output": output.detach(), **gradients, **buffers(layer)}


def views_on_rank(rank: int, world_size: int, layout: torch.memory_format, dtype: torch.dtype) -> list[tuple]:
    x = make_views(3, 6)
    # Ranks of unequal batch.
    rows = [slice(0, 4), slice(4, 6)][rank]
    x = x.unflatten(0, (3, 6))[:, rows].flatten(0, 1).to(dtype=dtype, memory_format=layout)
    results = []
    for options in ({}, {"split": True}, {"recompute": True}):
        with recorded_collectives() as collectives:
            result = run_views(make_layer(), x, 3, **options)
        assert result["output"].dtype == result["x"].dtype == dtype
        assert result["output"].is_contiguous(memory_format=layout)
        results.append((result, [name for name, _ in collectives]))
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_views_share_the_collectives_of_one(layout, dtype):
    for together, apart, recomputed in run_distributed(views_on_rank, 2, layout, dtype):
        assert together[1] == ["all_reduce"] * 2
        assert apart[1] == ["all_reduce"] * 6
        assert recomputed[1] == ["all_reduce"] * 3
        for name, value in apart[0].items():
            scale = value.abs().max()
            torch.testing.assert_close(together[0][name] / scale, value / scale, atol=2e-6, rtol=0, msg=name)
            assert torch.equal(together[0][name], recomputed[0][name]), name
        assert together[0]["num_batches_tracked"] == 3


def test_stacked_views_of_two_ranks_equal_one_process():
    expected = run_views(make_layer(), make_views(3, 6), 3)
    ranks = [results[0][0] for results in run_distributed(views_on_rank, 2, torch.channels_last, torch.float32)]
    for name, value in expected.items():
        if name in ("output", "x"):
            merged = torch.cat([rank[name].unflatten(0, (3, -1)) for rank in ranks], dim=1).flatten(0, 1)
        else:
            merged = ranks[0][name] + ranks[1][name] if name in ("weight", "bias") else ranks[0][name]
        scale = value.abs().max()
        torch.testing.assert_close(merged / scale, value / scale, atol=5e-6, rtol=0, msg=name)


def sync_on_rank(rank: int, world_size: int, shape, sizes, sync: bool) -> tuple[dict, list[torch.Size]]:
    batch_dim = 1 if len(shape) == 3 else 0
    x = make_input(shape).split(sizes, dim=batch_dim)[rank]
    weights = loss_weights(shape).split(sizes, dim=batch_dim)[rank]
    collectives = []
    all_reduce = torch.distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        collectives.append(tensor.shape)
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    return run_and_collect(make_layer(sync=sync), x, weights), collectives


@pytest.mark.parametrize(
    ("shape", "sizes"), [((8, C), (4, 4)), ((8, C, 2, 3), (5, 3)), ((2, 8, C), (4, 4)), ((3, 6, C), (5, 1))]
)
def test_ranks_equal_one_process_with_the_whole_batch(shape, sizes):
    results = run_distributed(sync_on_rank, 2, shape, sizes, True)
    expected = run_and_collect(make_layer(), make_input(shape), loss_weights(shape))
    batch_dim = 1 if len(shape) == 3 else 0
    close = {"atol": 1e-6, "rtol": 2e-6}
    for name in ("output", "grad_x"):
        merged = torch.cat([result[name] for result, _ in results], dim=batch_dim)
        scale = expected[name].abs().max()
        torch.testing.assert_close(merged / scale, expected[name] / scale, **close)
    for name in ("grad_weight", "grad_bias"):
        torch.testing.assert_close(sum(result[name] for result, _ in results), expected[name], atol=0, rtol=5e-6)
    for result, collectives in results:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(result[name], expected[name], **close)
        assert len(collectives) == 2


def test_local_statistics_differ_and_do_not_communicate():
    shape, sizes = (2, 8, C), (4, 4)
    results = run_distributed(sync_on_rank, 2, shape, sizes, False)
    expected = run_and_collect(make_layer(), make_input(shape), loss_weights(shape))
    merged = torch.cat([result["output"] for result, _ in results], dim=1)
    assert (merged - expected["output"]).abs().max() > 0.1
    assert all(collectives == [] for _, collectives in results)


def far_from_zero_on_rank(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = (1000 + make_input((2, 16, C), seed=3))[rank]
    layer = make_layer()
    half = BatchNorm(C, sync=True).to(torch.bfloat16)
    half_input = make_input((2, 16, C), seed=4)[rank].to(torch.bfloat16).requires_grad_()
    output = half(half_input)
    output.float().sum().backward()
    assert half.running_mean.dtype == torch.float32
    assert half_input.grad.dtype == torch.bfloat16
    return layer(x).detach(), output.detach()


def test_ranks_keep_accuracy_far_from_zero_and_in_bfloat16():
    results = run_distributed(far_from_zero_on_rank, 2)
    x = (1000 + make_input((2, 16, C), seed=3)).flatten(0, 1)
    layer = make_layer()
    expected = normalise_in_numpy(x.double().numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy())
    # One ulp at 1000 is 6e-5 of a standard deviation of 2; naive fp32 moments would be off by more than 1e-2.
    np.testing.assert_allclose(torch.cat([far for far, _ in results]).numpy(), expected, atol=2e-4)
    half_input = make_input((2, 16, C), seed=4).flatten(0, 1).to(torch.bfloat16)
    half_output = torch.cat([half for _, half in results])
    assert half_output.dtype == torch.bfloat16
    expected = normalise_in_numpy(half_input.double().numpy(), np.ones(C), np.zeros(C))
    np.testing.assert_allclose(half_output.float().numpy(), expected, atol=0.02)


def recomputation_on_rank(rank: int, world_size: int) -> list[torch.Tensor]:
    gradients = []
    for recompute in (False, True):
        layer = make_layer()
        x = make_input((4, C), seed=rank).requires_grad_()
        output = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        output.square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten(), layer.weight.grad, layer.running_mean, layer.running_var]))
        assert layer.num_batches_tracked == 1
    return gradients


def test_synchronised_recomputation_is_bitwise_equal():
    for plain, recomputed in run_distributed(recomputation_on_rank, 2):
        assert torch.equal(plain, recomputed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("views", [1, 3])
def test_cuda_kernels_match_the_portable_formulas(channels_last, views, monkeypatch):
    monkeypatch.setattr("models.batch_norm._world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    x, weights = make_input((6, C, 4, 4)), loss_weights((6, C, 4, 4))
    expected = run_and_collect(make_layer(), x, weights, views)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    on_device = x.cuda().contiguous(memory_format=layout)
    for name, value in run_and_collect(make_layer().cuda(), on_device, weights.cuda(), views).items():
        torch.testing.assert_close(value.cpu(), expected[name], atol=1e-5, rtol=1e-4)
