import pytest
import torch
from torch import nn

from models.batch_norm import BatchNorm
from models.heads import ByolHead, MlmHead, SimSiamHead
from tests.distributed import run_distributed


def make_head(batch_norm: str = "sync") -> SimSiamHead:
    torch.manual_seed(0)
    return SimSiamHead(12, 32, 24, 16, batch_norm=batch_norm)


def make_features(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 12, generator=generator) * torch.tensor([1.0, 3.0])[:, None, None]


@pytest.mark.parametrize(("in_dim", "expected"), [(512, 3_681_792), (1024, 4_206_080)])
def test_parameter_counts(in_dim, expected):
    def linear(inputs, outputs):
        return inputs * outputs + outputs

    layers = linear(in_dim, 1024) + 2 * linear(1024, 1024) + linear(1024, 512) + linear(512, 1024)
    assert expected == layers + 2 * (3 * 1024 + 512)
    assert sum(parameter.numel() for parameter in SimSiamHead(in_dim).parameters()) == expected
    mlm = MlmHead(512, 49409)
    assert sum(parameter.numel() for parameter in mlm.parameters()) == 512 * 49409 + 49409


def test_structure_is_that_of_the_recipe():
    head = make_head()
    kinds = [type(layer) for layer in head.projector]
    assert kinds == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm]
    assert [type(layer) for layer in head.predictor] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
    assert all(layer.bias is not None for layer in head.modules() if isinstance(layer, nn.Linear))
    z, p = head(make_features())
    assert z.shape == p.shape == (2, 8, 24)


def test_views_do_not_see_each_other():
    features, other = make_features(), make_features()
    other[1] *= -5
    z, p = make_head()(features)
    z_other, p_other = make_head()(other)
    torch.testing.assert_close(z[0], z_other[0])
    torch.testing.assert_close(p[0], p_other[0])
    z_alone, p_alone = make_head()(features[1:])
    torch.testing.assert_close(z[1:], z_alone)
    torch.testing.assert_close(p[1:], p_alone)


def project_on_rank(rank: int, world_size: int, batch_norm: str) -> tuple[torch.Tensor, torch.Tensor, list]:
    head = make_head(batch_norm)
    features = make_features().chunk(world_size, dim=1)[rank].contiguous().requires_grad_()
    z, p = head(features)
    (z * p.detach().roll(1, -1) + p * z.detach().roll(2, -1)).sum().backward()
    return z.detach(), features.grad, [parameter.grad for parameter in head.parameters()]


def test_synchronised_ranks_equal_one_process_and_local_ones_do_not():
    z, grad, parameter_grads = project_on_rank(0, 1, "sync")
    results = run_distributed(project_on_rank, 2, "sync")
    torch.testing.assert_close(torch.cat([result[0] for result in results], dim=1), z, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([result[1] for result in results], dim=1), grad, atol=1e-5, rtol=1e-4)
    for index, expected in enumerate(parameter_grads):
        total = sum(result[2][index] for result in results)
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)
    local = run_distributed(project_on_rank, 2, "local")
    assert (torch.cat([result[0] for result in local], dim=1) - z).abs().max() > 0.01


def test_bfloat16_weights_work():
    head = make_head().to(torch.bfloat16)
    z, p = head(make_features())
    assert z.dtype == p.dtype == torch.bfloat16
    (z.float().sum() + p.float().square().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_mlm_head_is_linear_and_accepts_no_rows():
    torch.manual_seed(0)
    head = MlmHead(6, 11)
    rows = torch.randn(4, 6)
    torch.testing.assert_close(head(rows), rows @ head.decoder.weight.T + head.decoder.bias)
    empty = head(torch.zeros(0, 6))
    assert empty.shape == (0, 11)
    empty.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="use one of sync, local"):
        make_head("global")
    with pytest.raises(ValueError, match=r"expected \[V, n, in_dim\]"):
        make_head()(torch.zeros(8, 12))


def test_byol_head_is_that_of_the_paper():
    head = ByolHead(768)
    for layers, width in ((head.projector, 768), (head.predictor, 256)):
        assert [type(layer) for layer in layers] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
        expected = width * 4096 + 2 * 4096 + 4096 * 256
        assert sum(parameter.numel() for parameter in layers.parameters()) == expected
    small, features = ByolHead(12, 32, 16), make_features()
    together = small(features)
    assert together.shape == (2, 8, 16)
    torch.testing.assert_close(small(features[1:])[0], together[1])
    with pytest.raises(ValueError, match=r"expected \[V, n, in_dim\]"):
        small(features[0])
