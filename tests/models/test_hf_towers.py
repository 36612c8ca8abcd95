import json

import pytest
import torch
import transformers

from models.batch_norm import BatchNorm
from models.hf_towers import HfImageTower, HfTextTower
from models.registry import build_model
from models.weights.positions import resize_positions
from tests.models.hugging_face import TEXT, VISION, VOCAB_SIZE, save_model

LENGTHS = torch.tensor([5, 12, 1])
POOLING = {"bert": "cls", "roberta": "mean", "gpt2": "last", "t5": "mean", "deberta": "cls", "clip": "last"}
IMAGE_POOLING = {"vit": "cls", "dinov2": "pooler", "swin": "mean", "resnet": "pooler"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_ids() -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(2))


def make_text_tower(folder, **options) -> HfTextTower:
    sizes = {"vocab_size": VOCAB_SIZE, "context_length": 20, "embed_dim": 24}
    tower = HfTextTower(str(folder), **{**sizes, **options})
    tower.load_pretrained()
    return tower


def pool(states: torch.Tensor, lengths: torch.Tensor, pooling: str) -> torch.Tensor:
    rows = zip(states, lengths.tolist(), strict=True)
    how = {"cls": lambda s, n: s[0], "mean": lambda s, n: s[:n].mean(dim=0), "last": lambda s, n: s[n - 1]}[pooling]
    return torch.stack([how(row, length) for row, length in rows])


@pytest.mark.parametrize("name", [*TEXT, "clip"])
def test_text_tower_equals_transformers_one_caption_at_a_time(name, tmp_path):
    folder = save_model(name, tmp_path)
    loader = transformers.AutoModelForTextEncoding if name == "t5" else transformers.AutoModel
    reference = (transformers.CLIPTextModel if name == "clip" else loader).from_pretrained(folder).eval()
    tower = make_text_tower(folder)
    assert tower.pooling == POOLING[name]
    ids, state_rows = make_ids(), torch.tensor([24, 0, 12 + 11])
    features, states = tower(ids, LENGTHS, state_rows)
    with torch.no_grad():
        alone = [reference(input_ids=row[None, :n]).last_hidden_state[0] for row, n in zip(ids, LENGTHS, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    torch.testing.assert_close(features, pool(padded, LENGTHS, tower.pooling) @ tower.proj.weight.T, atol=2e-5, rtol=0)
    torch.testing.assert_close(states, torch.stack([alone[2][0], alone[0][0], alone[1][11]]), atol=2e-5, rtol=1e-4)
    # Every parameter that is called trained gets a gradient, whatever the batch.
    features.square().sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad == (p.grad is None)] == []


def test_siglip_text_is_padded_to_its_length_and_read_through_its_head(tmp_path):
    folder = save_model("siglip", tmp_path)
    reference = transformers.SiglipModel.from_pretrained(folder).eval()
    tower = make_text_tower(folder, projection="none", embed_dim=32)
    padded = torch.full((3, 20), tower.pad_id)
    for row, ids, length in zip(padded, make_ids(), LENGTHS.tolist(), strict=True):
        row[:length] = ids[:length]
    expected = reference.text_model(input_ids=padded).pooler_output
    features, states = tower(make_ids(), LENGTHS, torch.tensor([13]))
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)
    assert states.shape == (1, 32)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_text_pooling_can_be_chosen(pooling, tmp_path):
    folder = save_model("bert", tmp_path)
    reference = transformers.BertModel.from_pretrained(folder).eval()
    tower = make_text_tower(folder, pooling=pooling)
    output = reference(input_ids=make_ids()[:1])
    lengths = torch.tensor([12])
    pooled = output.pooler_output if pooling == "pooler" else pool(output.last_hidden_state, lengths, pooling)
    expected = pooled @ tower.proj.weight.T
    torch.testing.assert_close(tower(make_ids()[:1], lengths)[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VISION)
def test_image_tower_equals_transformers(name, tmp_path):
    folder = save_model(name, tmp_path)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    tower = HfImageTower(str(folder), image_size=32, embed_dim=24)
    tower.load_pretrained()
    tower.eval()
    assert tower.pooling == IMAGE_POOLING[name] and tower.has_batch_norm == (name == "resnet")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    output = reference(pixel_values=images)
    states = output.last_hidden_state
    pooled = {"cls": states[:, 0], "mean": states.mean(dim=1)}.get(tower.pooling)
    pooled = output.pooler_output.flatten(1) if pooled is None else pooled
    features = tower(images)
    torch.testing.assert_close(features, pooled @ tower.proj.weight.T, atol=2e-5, rtol=1e-4)
    features.square().sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad == (p.grad is None)] == []


def test_mean_pooling_leaves_out_the_class_token(tmp_path):
    folder = save_model("vit", tmp_path)
    tower = HfImageTower(str(folder), image_size=32, embed_dim=32, pooling="mean", projection="none")
    images = torch.randn(2, 3, 32, 32)
    expected = tower.backbone(pixel_values=images).last_hidden_state[:, 1:].mean(dim=1)
    torch.testing.assert_close(tower(images), expected)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_half_of_a_two_tower_model(name, tmp_path):
    folder = save_model(name, tmp_path)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    tower = HfImageTower(str(folder), image_size=32, embed_dim=32, projection="none")
    tower.load_pretrained()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(images), reference.vision_model(pixel_values=images).pooler_output)


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip"])
def test_another_image_size_interpolates_the_positions(name, tmp_path):
    folder = save_model(name, tmp_path)
    small, large = (HfImageTower(str(folder), image_size=size, embed_dim=24) for size in (32, 64))
    for tower in (small, large):
        tower.load_pretrained()
    (key,) = (name for name in small.state_dict() if "position_embedding" in name)
    grids = [tower.state_dict()[key].reshape(-1, 32) for tower in (small, large)]
    prefix = len(grids[0]) - 16
    assert [len(grid) for grid in grids] == [16 + prefix, 64 + prefix]
    assert torch.equal(grids[0][:prefix], grids[1][:prefix])
    assert torch.equal(grids[1], resize_positions(grids[0], 64 + prefix))
    assert large(torch.randn(1, 3, 64, 64)).shape == (1, 24)


def test_batch_norm_and_activation_checkpointing(tmp_path):
    folder = save_model("resnet", tmp_path)
    tower = HfImageTower(str(folder), image_size=32, embed_dim=24, sync_batch_norm=False)
    assert all(not layer.sync for layer in tower.modules() if isinstance(layer, BatchNorm))
    with pytest.raises(ValueError, match="has no activation checkpointing"):
        HfImageTower(str(folder), image_size=32, embed_dim=24, activation_checkpointing=True)
    folder = save_model("bert", tmp_path)
    towers = make_text_tower(folder), make_text_tower(folder, activation_checkpointing=True)
    towers[1].proj.load_state_dict(towers[0].proj.state_dict())
    for tower in towers:
        tower.train()
        tower(make_ids(), LENGTHS)[0].square().sum().backward()
    for (name, one), other in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_registry_builds_both_towers_from_the_configuration_alone(device, tmp_path):
    transformers.ViTConfig(hidden_size=32, num_attention_heads=2, image_size=32, patch_size=8).save_pretrained(
        tmp_path / "vit"
    )
    TEXT["roberta"]().save_pretrained(tmp_path / "roberta")
    options = {"vocab_size": VOCAB_SIZE, "context_length": 20, "embed_dim": 16}
    with torch.device(device):
        model = build_model(f"hf:{tmp_path / 'vit'}", text_name=f"hf:{tmp_path / 'roberta'}", **options)
    assert model.image_tower.image_size == 32 and model.text_tower.width == 32
    assert all(parameter.device.type == device for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_name": "hf:nowhere"}, "'nowhere' gives no Hugging Face configuration"),
        ({"text_name": "bert"}, "text_name 'bert' is not known; use hf:"),
        ({"text_name": "hf:{bert}", "vocab_size": 92}, "the tokenizer has 92 ids, the text model '.*' only 91"),
        ({"text_name": "hf:{bert}", "context_length": 25}, "context_length 25 is more than the 24 positions"),
        ({"text_name": "hf:{roberta}", "context_length": 23}, "context_length 23 is more than the 22 positions"),
        ({"text_name": "hf:{bert}", "text_projection": "none"}, "text_projection none needs embed_dim 32"),
        ({"text_name": "hf:{gpt2}", "text_pooling": "pooler"}, "no pooled output of its own; use text_pooling"),
        (
            {"text_name": "hf:{bert}", "text_projection_bias": True},
            "text_projection_bias is for the text tower",
        ),
        ({"text_pooling": "mean"}, "text_pooling mean and text_projection linear need a text_name hf:"),
        ({"image_pooling": "mean"}, "image_pooling mean and image_projection linear need a name hf:"),
        ({"lock_image_unlocked_groups": 1}, "lock_image_unlocked_groups 1 has no effect without lock_image"),
        ({"lock_text": True, "lock_text_unlocked_groups": 9}, "lock_text_unlocked_groups 9 is more than the 4 groups"),
    ],
)
def test_mistakes_are_named_with_their_fix(options, message, tmp_path):
    folders = {name: str(save_model(name, tmp_path)) for name in TEXT if f"{{{name}}}" in str(options)}
    options = {key: value.format(**folders) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        build_model("vit_pico_p8_32", **{"vocab_size": VOCAB_SIZE, "context_length": 20, "embed_dim": 24, **options})


def test_code_of_a_model_folder_is_never_run(tmp_path):
    trap = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="code from the hub is never run"):
        build_model(f"hf:{tmp_path}", vocab_size=VOCAB_SIZE)
    assert not trap.exists()
