import open_clip
import pytest
import torch

from models.clip import ClipModel
from models.registry import build_model
from models.weights.open_clip_mapping import from_open_clip, to_open_clip

TEXT = {"context_length": 16, "vocab_size": 300, "width": 128, "heads": 2, "layers": 4}
VISION = {
    "vit_nano_p8_32": {"image_size": 32, "layers": 4, "width": 128, "patch_size": 8},
    "rn_nano_64": {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None},
}


def make_reference(name: str, *, proj_bias: bool = False) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(128, VISION[name], {**TEXT, "proj_bias": proj_bias}, quick_gelu=True)


def make_model(name: str, *, bias: bool = False) -> ClipModel:
    return build_model(name, vocab_size=300, context_length=16, text_projection_bias=bias)


def randomise(model: torch.nn.Module) -> None:
    """Moves away from the start, where zero gains and biases would hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "bn3.weight")):
                parameter.copy_(0.3 * torch.rand(parameter.shape, generator=generator) + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def make_captions(vocab_size: int, positions: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(1, vocab_size - 1, (len(lengths), positions), generator=generator)
    for row, length in enumerate(lengths):
        token_ids[row, length - 1] = vocab_size - 1
        token_ids[row, length:] = 0
    return token_ids, torch.tensor(lengths)


def assert_same_outputs(model: ClipModel, reference: open_clip.CLIP, image_size: int, captions) -> None:
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(3))
    token_ids, text_lengths = captions
    model.eval()
    reference.eval()
    with torch.no_grad():
        image_features, text_features = reference.encode_image(images), reference.encode_text(token_ids)
        assert image_features.std() > 1e-3 and text_features.std() > 1e-3
        torch.testing.assert_close(model.encode_image(images), image_features, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            model.encode_text(token_ids, text_lengths).features, text_features, atol=2e-5, rtol=0
        )
        torch.testing.assert_close(model.logit_scale(), reference.logit_scale.exp().reshape(1))


def assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", VISION)
def test_outputs_equal_open_clip_and_round_trips_are_bitwise(name, bias):
    reference, model = make_reference(name, proj_bias=bias), make_model(name, bias=bias)
    randomise(reference)
    model.load_state_dict(from_open_clip(reference.state_dict()), strict=True)
    assert_same_outputs(model, reference, VISION[name]["image_size"], make_captions(300, 16, [5, 16]))
    assert_bitwise_equal(to_open_clip(model.state_dict()), dict(reference.state_dict()))
    assert_bitwise_equal(from_open_clip(to_open_clip(model.state_dict())), dict(model.state_dict()))
    make_reference(name, proj_bias=bias).load_state_dict(to_open_clip(make_model(name, bias=bias).state_dict()))


@pytest.mark.parametrize("name", VISION)
def test_gradients_equal_open_clip(name):
    reference, model = make_reference(name).double(), make_model(name).double()
    randomise(reference)
    model.load_state_dict(from_open_clip(reference.state_dict()))
    size = VISION[name]["image_size"]
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    token_ids, text_lengths = make_captions(300, 16, [5, 16, 9])
    model(images, token_ids, text_lengths)[0].square().sum().backward()
    model.encode_text(token_ids, text_lengths).features.square().sum().backward()
    reference.encode_image(images).square().sum().backward()
    reference.encode_text(token_ids).square().sum().backward()
    model.logit_scale().sum().backward()
    reference.logit_scale.exp().backward()
    expected = from_open_clip({key: parameter.grad for key, parameter in reference.named_parameters()})
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-8, rtol=1e-6, msg=key)


def test_timm_towers_map_to_open_clip():
    vision = {"image_size": 64, "timm_model_name": "regnety_002", "timm_pool": "", "timm_proj": "linear"}
    reference = open_clip.CLIP(128, vision, {**TEXT, "width": 512, "heads": 8, "layers": 12}, quick_gelu=True)
    randomise(reference)
    model = build_model("timm:regnety_002", vocab_size=300, context_length=16, embed_dim=128, image_size=64)
    model.load_state_dict(from_open_clip(reference.state_dict()), strict=True)
    assert_same_outputs(model, reference, 64, make_captions(300, 16, [5, 16]))
    assert_bitwise_equal(to_open_clip(model.state_dict()), dict(reference.state_dict()))


def test_foreign_names_are_refused():
    with pytest.raises(ValueError, match=r"ClipModel: 2 unknown names, such as mlm_head.decoder.weight"):
        to_open_clip({**make_model("rn_nano_64").state_dict(), "mlm_head.decoder.weight": torch.zeros(1), "x": None})
    with pytest.raises(ValueError, match=r"open_clip.CLIP: 1 unknown names, such as input_resolution"):
        from_open_clip({**make_reference("rn_nano_64").state_dict(), "input_resolution": torch.tensor(224)})


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours"), [("ViT-B-32-quickgelu", "vit_b32"), ("RN50-quickgelu", "rn50")])
def test_full_size_outputs_equal_open_clip(theirs, ours):
    torch.manual_seed(0)
    reference = open_clip.create_model(theirs, pretrained=None)
    if ours == "rn50":
        for name, parameter in reference.named_parameters():
            if name.endswith("bn3.weight"):
                torch.nn.init.constant_(parameter, 0.3)
    model = build_model(ours, vocab_size=49408)
    model.load_state_dict(from_open_clip(reference.state_dict()), strict=True)
    assert_same_outputs(model, reference, 224, make_captions(49408, 77, [9, 77]))
    assert_bitwise_equal(to_open_clip(model.state_dict()), dict(reference.state_dict()))
