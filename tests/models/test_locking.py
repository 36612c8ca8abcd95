import pytest
import torch

from models.batch_norm import BatchNorm
from models.registry import build_model
from tests.models.hugging_face import save_model

GROUPS = {"vit_pico_p8_32": 5, "rn_pico_32": 6, "timm:resnet18": 9, "timm:test_vit": 7}


def build(name: str, **options):
    return build_model(name, vocab_size=91, context_length=16, embed_dim=128, image_size=64, **options)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_cover_all_of_a_tower_once(name):
    model = build(name)
    for tower in (model.image_tower, model.text_tower):
        members = [
            parameter
            for group in tower.lock_groups()
            for member in group
            for parameter in (member.parameters() if isinstance(member, torch.nn.Module) else [member])
        ]
        assert len(members) == len({id(parameter) for parameter in members})
        free = {id(parameter) for parameter in tower.parameters()} - {id(parameter) for parameter in members}
        is_new_projection = name.startswith("timm:") and tower is model.image_tower
        assert free == ({id(tower.proj.weight)} if is_new_projection else set())
    assert len(model.image_tower.lock_groups()) == GROUPS[name]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("unlocked", [0, 2])
def test_locked_groups_do_not_move(name, unlocked):
    model = build(name, lock_image=True, lock_image_unlocked_groups=unlocked)
    before = {key: value.clone() for key, value in model.image_tower.state_dict().items()}
    model.train()
    images = torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model.encode_image(images).square().sum() * model.logit_scale()).sum().backward()
    optimizer.step()
    after = model.image_tower.state_dict()
    names = {id(parameter): key for key, parameter in model.image_tower.named_parameters()}
    groups = model.image_tower.lock_groups()
    frozen_groups = groups[: len(groups) - unlocked]
    frozen = {
        names[id(parameter)]
        for group in frozen_groups
        for member in group
        for parameter in (member.parameters() if isinstance(member, torch.nn.Module) else [member])
    }
    assert all(torch.equal(after[key], before[key]) for key in frozen)
    assert unlocked == 0 or any(not torch.equal(after[key], before[key]) for key in names.values() if key not in frozen)
    for key, layer in model.image_tower.named_modules():
        if isinstance(layer, BatchNorm):
            kept = torch.equal(layer.running_mean, before[f"{key}.running_mean"])
            assert kept == (f"{key}.weight" in frozen), key


def test_a_locked_text_tower_of_transformers(tmp_path):
    folder = save_model("bert", tmp_path)
    model = build("vit_pico_p8_32", text_name=f"hf:{folder}", lock_text=True, lock_text_unlocked_groups=1)
    trained = [name for name, parameter in model.text_tower.named_parameters() if parameter.requires_grad]
    assert all(name.startswith(("backbone.encoder.layer.1.", "proj.")) for name in trained) and len(trained) == 17
