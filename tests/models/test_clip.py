import math

import pytest
import torch

from models.clip import ClipModel, LogitScale
from models.registry import build_model
from tests.models.hugging_face import save_model


def make_model(name: str = "vit_nano_p8_32", **options) -> ClipModel:
    torch.manual_seed(0)
    return build_model(name, **{"vocab_size": 300, "context_length": 16, **options})


def make_batch(size: int = 32, count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    token_ids = torch.randint(1, 300, (count, 12), generator=generator)
    return images, token_ids, torch.tensor([3, 12, 7, 5])[:count]


def test_logit_scale_is_stored_as_a_logarithm_and_read_in_fp32():
    scale = LogitScale()
    assert scale.log_value.shape == (1,)
    assert scale.log_value.item() == pytest.approx(math.log(1 / 0.07))
    assert scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.log_value.fill_(5.0)
    scale().backward()
    assert scale().item() == pytest.approx(math.exp(5.0))
    assert scale.log_value.grad.item() == pytest.approx(math.exp(5.0))
    assert scale.to(torch.bfloat16)().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert LogitScale()().dtype == torch.float32


@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_32"])
def test_encoders_return_unnormalised_features(name):
    model = make_model(name, embed_dim=40)
    images, token_ids, text_lengths = make_batch()
    image_features, text_features, logit_scale = model(images, token_ids, text_lengths)
    assert model.embed_dim == 40
    assert image_features.shape == text_features.shape == (4, 40)
    assert logit_scale.shape == (1,)
    text = model.encode_text(token_ids, text_lengths, state_rows=torch.tensor([0, 2, 13]))
    assert text.states.shape == (3, 128)
    torch.testing.assert_close(text.features, text_features)
    assert model.encode_text(token_ids, text_lengths).states is None
    assert (text.features.norm(dim=-1) - 1).abs().min() > 0.1


@pytest.mark.parametrize(("name", "passes"), [("vit_nano_p8_32", 1), ("rn_nano_32", 1), ("timm:resnet18", 2)])
def test_views_share_a_pass_unless_they_would_share_batch_statistics(name, passes):
    model, reference = make_model(name, image_size=32), make_model(name, image_size=32)
    views = torch.stack([make_batch()[0], 5 * make_batch()[0] + 2])
    calls = []
    model.image_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    features = model.encode_image_views(views)
    assert features.shape == (2, 4, model.embed_dim)
    assert len(calls) == passes
    expected = torch.stack([reference.encode_image(view) for view in views])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    for (buffer_name, found), buffer in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, buffer, msg=buffer_name)


@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_32", "timm:resnet18", "hf:vit"])
def test_pooled_features_are_what_the_projection_reads(name, tmp_path):
    if name == "hf:vit":
        name = f"hf:{save_model('vit', tmp_path)}"
    model = make_model(name, image_size=32).eval()
    views = torch.stack([make_batch()[0], 5 * make_batch()[0] + 2])
    features, pooled = model.encode_pooled_image_views(views)
    assert pooled.shape == (2, 4, model.image_tower.pooled_dim)
    assert torch.equal(features, model.encode_image_views(views))
    tower = model.image_tower
    projection = tower.attnpool.c_proj if hasattr(tower, "attnpool") else tower.proj
    assert torch.equal(features, projection(pooled))


def test_each_view_drops_patches_by_its_own_keys():
    model = make_model(patch_dropout=0.5)
    images, keys = make_batch()[0], torch.randint(2**62, (2, 4))
    views = torch.stack([images, images])
    features = model.encode_image_views(views, keys)
    expected = torch.stack([model.encode_image(images, view_keys) for view_keys in keys])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert not torch.isclose(features[0], features[1]).all(dim=1).any()
    torch.testing.assert_close(model(*make_batch(), keys[1])[0], expected[1])


@pytest.mark.parametrize("name", ["rn_nano_32", "timm:test_vit"])
def test_towers_without_patch_dropout_ignore_the_keys(name):
    model = make_model(name, image_size=32 if name == "rn_nano_32" else 64).eval()
    views = make_batch(model.image_tower.image_size)[0][None]
    keys = torch.arange(4)[None]
    assert torch.equal(model.encode_image_views(views, keys), model.encode_image_views(views))


@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_64", "timm:regnety_002", "timm:test_vit"])
def test_every_parameter_has_a_dimension_and_gets_a_gradient(name):
    model = make_model(name, text_projection_bias=True, image_size=64)
    assert all(parameter.ndim > 0 for parameter in model.parameters())
    images, token_ids, text_lengths = make_batch(64)
    image_features, text_features, logit_scale = model(images, token_ids, text_lengths)
    (logit_scale * image_features @ text_features.T).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_all_parameters_belong_to_the_towers_and_the_scale():
    # ZeRO-3 gathers a parameter for the forward of its owner, and encode_image is not one.
    assert list(make_model()._parameters) == []
    names = {name.split(".")[0] for name, _ in make_model().named_parameters()}
    assert names == {"image_tower", "text_tower", "logit_scale"}


def test_weights_are_set_in_the_constructor_of_their_owner(monkeypatch):
    # deepspeed.zero.Init partitions a module's own parameters as soon as its constructor returns, so changes that a
    # parent makes later would be lost. Freeze the values at that moment and compare.
    recorded = {}
    original = torch.nn.Module.__setattr__

    def recording(module, name, value):
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters(recurse=False):
                recorded.setdefault(parameter, parameter.detach().clone())
        original(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", recording)
    model = make_model("vit_nano_p8_32")
    resnet = make_model("rn_nano_32")
    assert len(recorded) > 60
    for parameter in (*model.parameters(), *resnet.parameters()):
        if parameter in recorded:
            assert torch.equal(parameter, recorded[parameter])


@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_32"])
def test_seed_decides_the_initial_weights(name):
    one, other = make_model(name), make_model(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_32"])
def test_a_few_steps_overfit_a_batch(name):
    model = make_model(name)
    batch = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        image_features, text_features, logit_scale = model(*batch)
        normalised = (torch.nn.functional.normalize(features, dim=-1) for features in (image_features, text_features))
        image_features, text_features = normalised
        logits = logit_scale * image_features @ text_features.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("name", ["vit_pico_p8_32", "rn_pico_32"])
def test_image_tokens_come_beside_the_features(name):
    model = make_model(name).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    features, tokens = model.encode_image_tokens(images)
    torch.testing.assert_close(features, model.encode_image(images))
    positions = 16 if name.startswith("vit") else 1
    assert tokens.shape == (3, positions, model.image_tower.token_dim)
    # A token belongs to its own image.
    torch.testing.assert_close(model.encode_image_tokens(images[1:2])[1][0], tokens[1])
    trained = {id(parameter) for module in model.image_tower.head_modules() for parameter in module.parameters()}
    tokens.square().sum().backward()
    for parameter in model.image_tower.parameters():
        assert (parameter.grad is None) == (id(parameter) in trained)


def test_tokens_are_those_of_the_kept_patches():
    model = make_model("vit_pico_p8_32", patch_dropout=0.5).train()
    images, keys = torch.randn(3, 3, 32, 32), torch.arange(3) << 40
    features, tokens = model.encode_image_tokens(images, keys)
    assert tokens.shape == (3, 8, 128)
    torch.testing.assert_close(features, model.encode_image(images, keys))
