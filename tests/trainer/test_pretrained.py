"""Runs that start from weights: Hugging Face towers end to end, imports and their report, mistakes."""

import open_clip
import pytest
import torch
import transformers

from models.registry import build_model
from tests.models.hugging_face import save_model, save_tokenizer
from tests.models.weights.test_open_clip_mapping import make_reference
from tests.trainer.harness import Launched, ds_config, run_trainer, steps, write_recipe, write_shards
from trainer.checkpoint.shards import read_weights
from trainer.config.sections import WEIGHT_SETTINGS, ModelConfig
from trainer.errors import ConfigError
from trainer.pretrained import load_pretrained


def test_towers_of_hugging_face_train_locked_and_resume_without_their_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vision, text = save_model("vit", tmp_path), save_tokenizer(save_model("bert", tmp_path))
    model = {
        "name": f"hf:{vision}",
        "text_name": f"hf:{text}",
        "image_pretrained": True,
        "text_pretrained": True,
        "lock_image": True,
        "lock_image_unlocked_groups": 1,
        "embed_dim": 32,
        "context_length": 20,
    }
    recipe = write_recipe(
        tmp_path / "r.yaml",
        write_shards(tmp_path / "shards"),
        model=model,
        data={"mask_token": False},
        train={"steps": 4},
        checkpoint={"every": 2},
    )
    runs = {"one": (1, 0), "two": (2, 3)}
    for name, (world_size, stage) in runs.items():
        arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / name), "--ds_config", ds_config(stage)]
        last = [] if name == "one" else ["--train.stop_after", "2"]
        finished = run_trainer([*arguments, *last], tmp_path, world_size)
        assert f"pretrained: image backbone of hf:{vision}" in finished.output
    saved = transformers.ViTModel.from_pretrained(vision).state_dict()
    (vision / "model.safetensors").unlink()
    (text / "model.safetensors").unlink()
    run_trainer([*arguments, "--resume", "auto"], tmp_path, world_size=2)
    curves = [steps(tmp_path / name) for name in runs]
    for step, record in curves[0].items():
        assert curves[1][step]["loss"] == pytest.approx(record["loss"], rel=2e-5), step
        assert curves[1][step]["data_hash"] == record["data_hash"]
    # Masked language modelling on a tower that sees both sides.
    assert curves[0][1]["loss/tss"] > 0
    weights = read_weights(tmp_path / "two" / "checkpoints" / "step_4")
    prefix = "model.image_tower.backbone."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    moved = {name for name, value in own.items() if not torch.equal(value, saved[name])}
    assert moved and all(name.startswith(("layers.1.", "layernorm.")) for name in moved), moved


def test_a_dry_run_reports_what_would_be_loaded(tmp_path):
    torch.manual_seed(0)
    recipe = write_recipe(tmp_path / "r.yaml", "none", model={"name": "vit_nano_p8_32", "context_length": 16})
    weights = make_large_vocabulary()
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    arguments = ["--recipe", str(recipe), "--dry_run", "--model.pretrained", str(tmp_path / "weights.pt")]
    output = run_trainer(arguments, tmp_path).output
    assert f"pretrained: {tmp_path / 'weights.pt'} (openclip): 110 tensors fit" in output
    assert "token_embedding.weight adapted from [49408, 128] to [49409, 128]" in output
    finished = Launched([*arguments, "--model.embed_dim", "64"], 1, tmp_path).wait()
    assert finished.codes == [2] and "Traceback" not in finished.output
    assert "is another model than model.name vit_nano_p8_32: of another shape 2" in finished.output


def make_large_vocabulary() -> dict[str, torch.Tensor]:
    text = {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4}
    vision = {"image_size": 32, "layers": 4, "width": 128, "patch_size": 8}
    return open_clip.CLIP(128, vision, text, quick_gelu=True).state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lock_image": True}, "model.lock_image would freeze a random tower; give its weights as model.pretrained"),
        ({"lock_text": True}, "model.lock_text would freeze a random tower"),
        ({"image_pretrained": True}, "model.image_pretrained needs a model.name timm:<name> or hf:<name>"),
        ({"text_pretrained": True}, "model.text_pretrained needs a model.text_name hf:"),
        ({"pretrained": "/nowhere.pt"}, "model.pretrained: weights /nowhere.pt do not exist"),
        ({"pretrained": "x", "image_pretrained": True}, "model.pretrained fills both towers; leave out"),
        ({"pretrained": "{weights}", "pretrained_format": "openai"}, "trained on pixels of mean .*0.4814"),
        ({"pretrained": "{weights}", "pretrained_format": "huggingface"}, "is another model than model.name vit_nano"),
        ({"pretrained": "{weights}", "text_projection_bias": True}, "missing 1: text_tower.text_projection.bias"),
    ],
)
def test_mistakes_are_named(settings, message, tmp_path):
    torch.save(make_reference("vit_nano_p8_32").state_dict(), tmp_path / "weights.pt")
    if settings.get("pretrained") == "{weights}":
        settings = {**settings, "pretrained": str(tmp_path / "weights.pt")}
    config = ModelConfig(name="vit_nano_p8_32", context_length=16, **settings)
    model = build_model(vocab_size=300, **config.model_dump(exclude=WEIGHT_SETTINGS))
    with pytest.raises(ConfigError, match=message):
        load_pretrained(config, model)
