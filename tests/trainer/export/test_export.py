"""Exported folders as open_clip, transformers and onnxruntime read them, and as a new run starts from them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from data.sample import EvalTransform
from models.weights.open_clip_mapping import from_open_clip
from tests.models.hugging_face import save_model, save_tokenizer
from tests.models.weights.test_open_clip_mapping import randomise
from tests.trainer.harness import ROOT, ds_config, picture, run_trainer, write_eval_set, write_recipe, write_shards
from trainer.building import build_method
from trainer.checkpoint.shards import read_weights
from trainer.errors import ConfigError
from trainer.export.__main__ import main
from trainer.export.export import export, load_run
from trainer.export.exported import Exported
from trainer.loading import load_config, parse_config
from trainer.pipeline import build_tokenizer
from trainer.pretrained import load_pretrained

CAPTIONS = ["a red square", "the blue corner, number 12!", "Caf\u00e9 \u2014 it's yellow", "a " * 90]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A DeCLIP run on two ranks at ZeRO 3, evaluated at its end."""
    folder = tmp_path_factory.mktemp("export")
    evaluation = {
        "sets": {"shapes": {"data": str(write_eval_set(folder / "eval"))}},
        "batch_size": 16,
        "resize_size": 36,
    }
    recipe = write_recipe(
        folder / "r.yaml", write_shards(folder / "shards"), train={"steps": 3}, eval=evaluation, checkpoint={"every": 2}
    )
    arguments = ["--recipe", str(recipe), "--run_dir", str(folder / "run"), "--ds_config", ds_config(3)]
    run_trainer(arguments, folder, world_size=2)
    return folder / "run"


def make_exported(tmp_path, name: str, method: str = "clip", **model) -> Exported:
    """An untrained model as if it came from a run."""
    recipe = {
        "recipe": "made",
        "model": {"name": name, **model},
        "method": {"name": method},
        "data": {"train": "none"},
        "train": {"steps": 9, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
    }
    config = parse_config(recipe)
    tokenizer = build_tokenizer(config)
    torch.manual_seed(5)
    built = build_method(config, tokenizer).model
    randomise(built)
    return Exported(built.eval(), tokenizer, config, tmp_path, 4, "trained")


def pictures() -> list[bytes]:
    return [picture(colour, "bar", np.random.default_rng(i)) for i, colour in enumerate(["red", "blue", "green"])]


@torch.no_grad()
def own_embeddings(exported: Exported) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm embeddings of the pictures and captions by this project's own pipeline."""
    model, eval_config = exported.model, exported.config.eval
    transform = EvalTransform(model.image_tower.image_size, eval_config.resize_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixel_mean, model.pixel_std))
    images = torch.stack([torch.from_numpy(transform(data)).float() / 255 for data in pictures()])
    ids = [exported.tokenizer.encode(caption) for caption in CAPTIONS]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    texts = model.encode_text(padded, lengths).features
    return torch.nn.functional.normalize(model.encode_image((images - mean) / std)), torch.nn.functional.normalize(
        texts
    )


def open_images(size: int) -> list[Image.Image]:
    """The pictures, already of the model's size, so that two libraries' resizing does not come into it."""
    import io

    return [Image.open(io.BytesIO(data)).convert("RGB").resize((size, size)) for data in pictures()]


@torch.no_grad()
def encode_pil(exported: Exported, images: list[Image.Image]) -> torch.Tensor:
    model = exported.model
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixel_mean, model.pixel_std))
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])
    return torch.nn.functional.normalize(model.encode_image((pixels - mean) / std))


@torch.no_grad()
def assert_open_clip_agrees(exported: Exported, folder) -> torch.nn.Module:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    images = open_images(exported.model.image_tower.image_size)
    theirs = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    torch.testing.assert_close(encode_pil(exported, images), theirs, **TOLERANCE)
    texts = model.encode_text(tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(own_embeddings(exported)[1], texts, **TOLERANCE)
    torch.testing.assert_close(model.logit_scale.exp(), exported.model.logit_scale().squeeze())
    return model


def test_weights_of_a_run_are_those_of_its_checkpoint(run_dir):
    exported = load_run(run_dir)
    saved = read_weights(run_dir / "checkpoints" / "step_3")
    assert exported.step == 3 and exported.weights == "trained"
    for name, value in exported.model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"]), name
    earlier = load_run(run_dir, step=2).model.state_dict()
    assert not torch.equal(earlier["text_tower.ln_final.bias"], exported.model.state_dict()["text_tower.ln_final.bias"])


def test_open_clip_loads_a_run(run_dir, tmp_path):
    command = [sys.executable, "-m", "trainer.export", str(run_dir), "--to", "openclip", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert f"step 3 (trained weights) to {tmp_path / 'out'}" in finished.stdout
    exported = load_run(run_dir)
    model = assert_open_clip_agrees(exported, tmp_path / "out")
    # The mask token of DeCLIP's vocabulary is gone; everything else came through bit for bit.
    back = from_open_clip(model.state_dict())
    for name, value in exported.model.state_dict().items():
        if name == "text_tower.token_embedding.weight":
            value = torch.cat([value[:49406], value[49407:]])
        assert torch.equal(back[name], value), name


def test_transformers_loads_a_run(run_dir, tmp_path):
    exported = load_run(run_dir)
    export(exported, "huggingface", tmp_path / "out")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    size = exported.model.image_tower.image_size
    assert processor.image_processor.size["shortest_edge"] == 36
    images = open_images(size)
    inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True, truncation=True)
    # Resized to 36 and cropped to 32 by theirs; ours gets the same pixels, so that only the towers are compared.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (exported.model.pixel_mean, exported.model.pixel_std))
    assert inputs["pixel_values"].shape == (3, 3, size, size)
    assert inputs["pixel_values"].min() > -3 and (inputs["pixel_values"] * std + mean).max() <= 1 + 1e-5
    with torch.no_grad():
        output = model(**inputs)
        ours = torch.nn.functional.normalize(exported.model.encode_image(inputs["pixel_values"]))
    torch.testing.assert_close(ours, output.image_embeds, **TOLERANCE)
    torch.testing.assert_close(own_embeddings(exported)[1], output.text_embeds, **TOLERANCE)
    torch.testing.assert_close(model.logit_scale.exp(), exported.model.logit_scale().squeeze())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_export_resizes_as_the_run_was_evaluated(interpolation, tmp_path):
    exported = make_exported(tmp_path, "vit_pico_p8_32", context_length=16)
    config = exported.config
    evaluated = config.model_copy(update={"eval": config.eval.model_copy(update={"interpolation": interpolation})})
    exported = dataclasses.replace(exported, config=evaluated)
    for layout in ("openclip", "huggingface"):
        export(exported, layout, tmp_path / layout)
    described = json.loads((tmp_path / "openclip" / "open_clip_config.json").read_text())
    assert described["preprocess_cfg"]["interpolation"] == interpolation
    processor = json.loads((tmp_path / "huggingface" / "preprocessor_config.json").read_text())
    assert processor["resample"] == Image.Resampling[interpolation.upper()]


@pytest.mark.parametrize("layout", ["openclip", "huggingface", "safetensors"])
def test_import_of_an_export_is_bitwise(layout, tmp_path):
    exported = make_exported(tmp_path, "vit_nano_p8_32", activation="gelu", context_length=16)
    export(exported, layout, tmp_path / "out")
    config = exported.config.model.model_copy(update={"pretrained": str(tmp_path / "out")})
    again = make_exported(tmp_path, "vit_nano_p8_32", activation="gelu", context_length=16).model
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    lines = load_pretrained(config, again)
    layout_read = "native" if layout == "safetensors" else layout
    assert lines == [f"pretrained: {tmp_path / 'out'} ({layout_read}): {len(again.state_dict())} tensors loaded"]
    for name, value in exported.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    export(
        Exported(again, *[getattr(exported, f) for f in ("tokenizer", "config", "run", "step", "weights")]),
        layout,
        tmp_path / "second",
    )
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    other = config.model_copy(update={"activation": "quick_gelu"})
    if layout != "safetensors":
        with pytest.raises(ConfigError, match=r"was trained with gelu, .* set --model.activation gelu"):
            load_pretrained(other, again)
        with pytest.raises(ConfigError, match=r"pixels of mean \[0.485, 0.456, 0.406\]"):
            load_pretrained(config.model_copy(update={"pixel_mean": (0.5, 0.5, 0.5)}), again)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rn_pico_32", {"text_projection_bias": True}),
        ("timm:resnet18", {"image_size": 64, "embed_dim": 64}),
        ("timm:test_vit", {"image_size": 160, "embed_dim": 64, "activation": "gelu"}),
    ],
)
def test_open_clip_loads_other_towers(name, options, tmp_path):
    exported = make_exported(tmp_path, name, context_length=77, **options)
    export(exported, "openclip", tmp_path / "out")
    assert_open_clip_agrees(exported, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"no CLIP class with the image tower of {name}; use --to openclip"):
        export(exported, "huggingface", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_logit_bias_goes_along_or_is_refused(tmp_path):
    exported = make_exported(tmp_path, "vit_nano_p8_32", method="siglip", context_length=16)
    with torch.no_grad():
        exported.model.logit_bias.value.fill_(-11.5)
    export(exported, "openclip", tmp_path / "openclip")
    theirs = assert_open_clip_agrees(exported, tmp_path / "openclip")
    assert theirs.logit_bias.item() == -11.5
    assert "| Logit bias | -11.500 |" in (tmp_path / "openclip" / "README.md").read_text()
    export(exported, "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "text_encoder.onnx")
    assert float(session.get_modelmeta().custom_metadata_map["logit_bias"]) == -11.5
    export(exported, "safetensors", tmp_path / "native")
    with pytest.raises(ConfigError, match="CLIPModel has no logit bias, which siglip trains; use --to openclip"):
        export(exported, "huggingface", tmp_path / "huggingface")
    for folder in ("openclip", "native"):
        config = exported.config.model.model_copy(update={"pretrained": str(tmp_path / folder)})
        again = make_exported(tmp_path, "vit_nano_p8_32", method="siglip", context_length=16).model
        assert len(load_pretrained(config, again)) == 1
        for name, value in exported.model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        # Into a method without a bias, and from one into a method with it.
        plain = make_exported(tmp_path, "vit_nano_p8_32", context_length=16).model
        assert load_pretrained(config, plain)[1:] == ["pretrained: logit_bias left out: this method has none"]
    export(make_exported(tmp_path, "vit_nano_p8_32", context_length=16), "openclip", tmp_path / "clip")
    config = exported.config.model.model_copy(update={"pretrained": str(tmp_path / "clip")})
    (note,) = load_pretrained(config, again)[1:]
    assert note == "pretrained: the weights have no logit_bias; it starts at method.logit_bias_init"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["vit_nano_p8_32", "rn_pico_32", "hf"])
def test_onnxruntime_agrees(name, tmp_path):
    options = {"context_length": 16}
    if name == "hf":
        name = f"hf:{save_model('vit', tmp_path)}"
        options |= {"text_name": f"hf:{save_tokenizer(save_model('roberta', tmp_path))}"}
    exported = make_exported(tmp_path, name, **options)
    export(exported, "onnx", tmp_path / "out")
    images, texts = own_embeddings(exported)
    sessions = {
        part: onnxruntime.InferenceSession(tmp_path / "out" / f"{part}_encoder.onnx") for part in ("image", "text")
    }
    transform = EvalTransform(exported.model.image_tower.image_size)
    pixels = np.stack([transform(data) for data in pictures()]).astype(np.float32) / 255
    (theirs,) = sessions["image"].run(None, {"pixels": pixels})
    torch.testing.assert_close(images, torch.from_numpy(theirs), **TOLERANCE)
    ids = np.zeros((len(CAPTIONS), 16), dtype=np.int64)
    lengths = np.zeros(len(CAPTIONS), dtype=np.int64)
    for row, caption in enumerate(CAPTIONS):
        encoded = exported.tokenizer.encode(caption)
        ids[row, : len(encoded)], lengths[row] = encoded, len(encoded)
    (theirs,) = sessions["text"].run(None, {"token_ids": ids, "text_lengths": lengths})
    torch.testing.assert_close(texts, torch.from_numpy(theirs), **TOLERANCE)
    scale = sessions["text"].get_modelmeta().custom_metadata_map["logit_scale"]
    assert float(scale) == pytest.approx(float(exported.model.logit_scale()))


def test_the_card_holds_the_recipe_and_the_figures(run_dir, tmp_path):
    export(load_run(run_dir), "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (figures,) = [record for record in records if record.get("event") == "eval"]
    assert f"| shapes | {100 * figures['acc1']:.2f} | {100 * figures['acc5']:.2f} |" in card
    assert "| Method | declip |" in card and "| Samples seen | 48 in 3 of 3 steps of 16 |" in card
    assert load_config(str(tmp_path / "out" / "config.yaml")) == load_config(str(run_dir / "config.yaml"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_mistakes_are_named(run_dir, tmp_path):
    for arguments, message in (
        ([str(tmp_path), "--to", "onnx"], "has no config.yaml; give the folder of a run"),
        ([str(run_dir), "--to", "onnx", "--step", "7"], "no checkpoint of step 7; it has those of steps 3, 2"),
        (
            [str(run_dir), "--to", "openclip", "--weights", "ema"],
            "holds no moving average; train with --train.ema_decay",
        ),
        ([str(run_dir), "--to", "openclip", "--out", str(run_dir)], "exists already"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(arguments)
    towers = {"text_name": f"hf:{save_tokenizer(save_model('bert', tmp_path))}", "context_length": 16}
    exported = make_exported(tmp_path, "vit_nano_p8_32", **towers)
    for layout in ("openclip", "huggingface"):
        with pytest.raises(ConfigError, match=f"--to {layout} needs CLIP's text tower and tokenizer"):
            export(exported, layout, tmp_path / "out")
    exported = make_exported(tmp_path, "vit_nano_p8_32", text_projection_bias=True)
    with pytest.raises(ConfigError, match="no bias in its text projection, this run has; use --to openclip"):
        export(exported, "huggingface", tmp_path / "out")
    exported = make_exported(tmp_path, "timm:test_vit", image_size=64)
    with pytest.raises(ConfigError, match="for images of 160 pixels only, this run has 64"):
        export(exported, "openclip", tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    import shutil

    shutil.copytree(run_dir, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints" / "step_3").glob("zero_pp_rank_1*optim_states.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"step_3 is damaged: .* has changed .*choose another with --step"):
        load_run(tmp_path / "run")
