"""Weights of other projects under our names: the same outputs, and the same bytes after a round trip."""

import open_clip
import pytest
import timm
import torch
import transformers

from models.clip import LogitBias
from models.registry import build_model
from models.weights.fitting import fit_state
from models.weights.foreign_layouts import convert, detect_format
from models.weights.hugging_face_mapping import from_hugging_face, to_hugging_face
from models.weights.weight_files import read_weights
from tests.models.hugging_face import VOCAB_SIZE, save_model
from tests.models.weights.test_open_clip_mapping import (
    assert_bitwise_equal,
    assert_same_outputs,
    make_captions,
    make_model,
    make_reference,
    randomise,
)

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 128, "intermediate_size": 512}


def make_hugging_face(activation: str = "quick_gelu") -> transformers.CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 299, "hidden_act": activation}
    vision = {"image_size": 32, "patch_size": 8, "hidden_act": activation}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**SIZES, **text}, vision_config={**SIZES, **vision}, projection_dim=128)
    )
    randomise(model)
    return model.eval()


def load(model: torch.nn.Module, state: dict[str, torch.Tensor], layout: str) -> list[str]:
    assert detect_format(state) == layout
    converted = convert(state, layout)
    model.load_state_dict(fit_state(model, converted.tensors)[0], strict=True)
    return converted.left_out


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face_clip_gives_the_same_outputs_and_round_trips(activation):
    reference = make_hugging_face(activation)
    model = build_model("vit_nano_p8_32", vocab_size=300, context_length=16, activation=activation).eval()
    assert load(model, reference.state_dict(), "huggingface") == []
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    token_ids, lengths = make_captions(300, 16, [5, 16])
    with torch.no_grad():
        image_features = reference.visual_projection(reference.vision_model(pixel_values=images).pooler_output)
        text_features = reference.text_projection(reference.text_model(input_ids=token_ids).pooler_output)
        torch.testing.assert_close(model.encode_image(images), image_features, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.encode_text(token_ids, lengths).features, text_features, atol=2e-5, rtol=1e-4)
    assert_bitwise_equal(to_hugging_face(model.state_dict()), dict(reference.state_dict()))
    assert_bitwise_equal(from_hugging_face(to_hugging_face(model.state_dict())), dict(model.state_dict()))


def test_hugging_face_siglip_becomes_two_towers_with_the_same_outputs(tmp_path):
    folder = save_model("siglip", tmp_path)
    reference = transformers.SiglipModel.from_pretrained(folder).eval()
    tower = {"image_projection": "none", "text_projection": "none", "text_name": f"hf:{folder}", "embed_dim": 32}
    model = build_model(f"hf:{folder}", vocab_size=VOCAB_SIZE, context_length=20, **tower).eval()
    assert load(model, reference.state_dict(), "huggingface") == []
    model.logit_bias = LogitBias(0.0)
    assert load(model, reference.state_dict(), "huggingface") == []
    assert torch.equal(model.logit_bias(), reference.logit_bias)
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(5, VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        output = reference(input_ids=ids, pixel_values=images)
        ours = torch.nn.functional.normalize(model.encode_image(images), dim=1)
        torch.testing.assert_close(ours, output.image_embeds, atol=1e-5, rtol=1e-4)
        ours = torch.nn.functional.normalize(model.encode_text(ids, torch.tensor([20, 20])).features, dim=1)
        torch.testing.assert_close(ours, output.text_embeds, atol=1e-5, rtol=1e-4)
        assert torch.equal(model.logit_scale(), reference.logit_scale.exp())


def test_what_hugging_face_clip_has_no_place_for_is_refused():
    for model in (make_model("rn_nano_64"), make_model("vit_nano_p8_32", bias=True)):
        with pytest.raises(ValueError, match="have no place in a Hugging Face CLIPModel"):
            to_hugging_face(model.state_dict())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_64"])
def test_openai_archives(name, tmp_path):
    reference = make_reference(name)
    randomise(reference)
    reference = reference.half().float().eval()
    images = torch.randn(1, 3, *[32 if name.startswith("vit") else 64] * 2)
    captions = make_captions(300, 16, [5, 16])
    # OpenAI's archives hold these sizes as tensors, and weights in half precision.
    for size in ("input_resolution", "context_length", "vocab_size"):
        vars(reference).pop(size, None)
        reference.register_buffer(size, torch.tensor(16))
    inputs = {"encode_image": (images,), "encode_text": (captions[0],)}
    torch.jit.trace_module(reference, inputs, check_trace=False).half().save(tmp_path / "model.pt")
    reference.float()
    model = make_model(name)
    assert load(model, read_weights(tmp_path / "model.pt"), "openai") == []
    assert_same_outputs(model, reference, images.shape[-1], captions)


@pytest.mark.parametrize("prefix", ["encode_text.", "text_encoder."])
@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_nano_64"])
def test_declip_checkpoints(name, prefix, tmp_path):
    reference = make_reference(name, proj_bias=True)
    randomise(reference)
    heads = {
        "projector.linear1.weight": torch.zeros(8, 128),
        "encode_text.head": None,
        "visual.fc.weight": torch.ones(2),
    }
    state = {}
    for key, value in reference.state_dict().items():
        is_text = not key.startswith(("visual.", "logit_scale"))
        state[f"module.{prefix if is_text else ''}{key}"] = value.reshape(1) if key == "logit_scale" else value
    state |= {f"module.{key}": value for key, value in heads.items()}
    torch.save({"model": state, "last_iter": 7, "optimizer": {}}, tmp_path / "ckpt.pth.tar")
    model = make_model(name, bias=True)
    left_out = load(model, read_weights(tmp_path / "ckpt.pth.tar"), "declip")
    assert sorted(left_out) == ["projector.linear1.weight", "visual.fc.weight"]
    assert_same_outputs(model, reference, 32 if name.startswith("vit") else 64, make_captions(300, 16, [5, 16]))


def make_slip(width: int) -> tuple[dict[str, torch.Tensor], torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(4)
    trunk = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1, embed_dim=width, num_heads=4)
    text = make_reference("vit_nano_p8_32")
    state = {f"visual.{key}": value for key, value in trunk.state_dict().items()}
    state |= {key: value for key, value in text.state_dict().items() if not key.startswith("visual.")}
    state |= {"image_projection": torch.randn(width, 128), "image_mlp.layer1.weight": torch.zeros(3)}
    return state, trunk, text


def test_slip_checkpoints(tmp_path, monkeypatch):
    import argparse

    state, trunk, text = make_slip(64)
    checkpoint = {"epoch": 25, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save({**checkpoint, "args": argparse.Namespace(model="SLIP_VITB16")}, tmp_path / "slip_base_25ep.pt")
    created = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **o: created(name, **o, depth=1, embed_dim=64, num_heads=4))
    model = build_model("timm:vit_base_patch16_224", vocab_size=300, context_length=16, embed_dim=128)
    # The text tower of the tiny stand-in is smaller than SLIP's own, which is the default of a timm model.
    model.text_tower = make_model("vit_nano_p8_32").text_tower
    assert load(model, read_weights(tmp_path / "slip_base_25ep.pt"), "slip") == ["image_mlp.layer1.weight"]
    images = torch.randn(1, 3, 224, 224)
    token_ids, lengths = make_captions(300, 16, [5, 16])
    trunk.eval()
    text.eval()
    model.eval()
    with torch.no_grad():
        expected = trunk(images) @ state["image_projection"]
        torch.testing.assert_close(model.encode_image(images), expected, atol=2e-5, rtol=1e-4)
        expected = text.encode_text(token_ids)
        torch.testing.assert_close(model.encode_text(token_ids, lengths).features, expected, atol=2e-5, rtol=1e-4)


def test_slips_small_model_is_refused_for_its_heads():
    with pytest.raises(ValueError, match="12 heads, timm's has 6"):
        convert(make_slip(384)[0], "slip")


def test_models_that_compute_otherwise_are_refused():
    state = make_reference("vit_nano_p8_32").state_dict()
    with pytest.raises(ValueError, match="of a SigLIP model, whose text tower is not causal"):
        text = {f"text.{k}": v for k, v in state.items() if not k.startswith(("visual.", "logit"))}
        convert({**text, "logit_bias": torch.zeros(())}, "openclip")
    with pytest.raises(ValueError, match=r"of no known project \(they hold fc.weight, ...\); known: native, openclip"):
        detect_format(["fc.weight"])


def test_open_clip_with_a_text_module_of_its_own():
    reference = make_reference("vit_nano_p8_32")
    text = {f"text.{k}": v for k, v in reference.state_dict().items() if not k.startswith(("visual.", "logit"))}
    rest = {k: v for k, v in reference.state_dict().items() if k.startswith(("visual.", "logit"))}
    model = make_model("vit_nano_p8_32")
    assert load(model, {**text, **rest}, "openclip") == []
    assert_same_outputs(model, reference, 32, make_captions(300, 16, [5, 16]))


def test_another_image_size_equals_open_clips_own_resizing():
    reference = make_reference("vit_nano_p8_32")
    state = dict(reference.state_dict())
    model = build_model("vit_nano_p8_32", vocab_size=300, context_length=16, image_size=64)
    load(model, dict(state), "openclip")
    vision = {"image_size": 64, "layers": 4, "width": 128, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 300, "width": 128, "heads": 2, "layers": 4}
    larger = open_clip.CLIP(128, vision, text, quick_gelu=True)
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    assert_same_outputs(model, larger, 64, make_captions(300, 16, [5, 16]))
