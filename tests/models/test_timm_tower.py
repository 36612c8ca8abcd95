import sys

import pytest
import timm
import torch

from models.batch_norm import BatchNorm
from models.timm_tower import TimmTower
from tests.distributed import run_distributed


def make_tower(name: str = "regnety_002", **options) -> TimmTower:
    torch.manual_seed(0)
    return TimmTower(name, **{"image_size": 64, "embed_dim": 20, **options})


def make_images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["regnety_002", "resnet18", "test_vit", "mobilenetv3_small_050"])
def test_equals_the_timm_backbone_and_a_projection(name):
    tower = make_tower(name)
    size = {"img_size": 64} if name == "test_vit" else {}
    reference = timm.create_model(name, num_classes=0, **size)
    reference.load_state_dict(tower.trunk.state_dict())
    for training in (True, False):
        tower.train(training)
        reference.train(training)
        expected = reference(make_images()) @ tower.proj.weight.T
        torch.testing.assert_close(tower(make_images()), expected, atol=1e-5, rtol=1e-4)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(tower.trunk.state_dict()[key], value, msg=key)


def test_batch_norms_are_found_and_replaced():
    tower = make_tower()
    torch.manual_seed(0)
    initial = timm.create_model("regnety_002", num_classes=0).state_dict()
    assert initial.keys() == tower.trunk.state_dict().keys()
    assert all(torch.equal(value, initial[key]) for key, value in tower.trunk.state_dict().items())
    assert tower.has_batch_norm
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in tower.modules())
    assert all(layer.sync for layer in tower.modules() if isinstance(layer, BatchNorm))
    local = make_tower(sync_batch_norm=False)
    assert not any(layer.sync for layer in local.modules() if isinstance(layer, BatchNorm))
    assert not make_tower("test_vit").has_batch_norm


def test_activation_checkpointing_changes_neither_gradients_nor_running_statistics():
    towers = make_tower(), make_tower(activation_checkpointing=True)
    for tower in towers:
        tower(make_images()).square().sum().backward()
    for (name, one), other in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), other in zip(towers[0].named_buffers(), towers[1].buffers(), strict=True):
        assert torch.equal(one, other), name


def encode_on_rank(rank: int, world_size: int) -> torch.Tensor:
    return make_tower()(make_images().chunk(world_size)[rank]).detach()


@pytest.mark.slow
def test_synchronised_ranks_equal_one_process():
    results = run_distributed(encode_on_rank, 2)
    torch.testing.assert_close(torch.cat(results), encode_on_rank(0, 1), atol=1e-5, rtol=1e-4)


def test_bfloat16_weights_work():
    tower = make_tower().to(torch.bfloat16)
    features = tower(make_images())
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tower.parameters())


def test_image_size_defaults_to_that_of_the_architecture():
    with torch.device("meta"):
        assert TimmTower("regnety_640", image_size=None, embed_dim=20).image_size == 384


def test_unusable_architectures_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="timm has no architecture 'hf-hub:someone/model'"):
        make_tower("hf-hub:someone/model")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        make_tower()


@pytest.mark.parametrize(
    ("name", "size", "classes"), [("resnet18", 64, 1000), ("test_vit", 64, 1000), ("test_vit", 96, 0)]
)
def test_weights_are_loaded_from_a_file(name, size, classes, tmp_path):
    saved = timm.create_model(name, num_classes=classes, **({"img_size": 64} if name == "test_vit" else {}))
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "weights.pt")
    tower = make_tower(name, image_size=size)
    tower.load_pretrained(str(tmp_path / "weights.pt"))
    for key, value in tower.trunk.state_dict().items():
        if key != "pos_embed" or size == 64:
            assert torch.equal(value, saved.state_dict()[key]), key
        else:
            assert value.shape[1] == 37 and torch.isfinite(value).all()
    assert tower.expected_pixels() == (saved.pretrained_cfg["mean"], saved.pretrained_cfg["std"])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = timm.create_model("resnet18").state_dict()
    del weights["layer1.0.conv1.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    for name in ("test_vit", "resnet18"):
        with pytest.raises(ValueError, match=f"weights of timm's '{name}' cannot be loaded from"):
            make_tower(name).load_pretrained(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="do not exist"):
        make_tower().load_pretrained(str(tmp_path / "none.pt"))
