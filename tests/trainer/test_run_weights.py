"""A run's folder as weights to start from: the newest complete checkpoint, averaged where the run kept an average."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from tests.compatibility.test_first_house import ARCHIVE
from trainer.building import build_method
from trainer.checkpoint.consolidate import consolidate
from trainer.errors import ConfigError
from trainer.loading import load_config
from trainer.pipeline import build_tokenizer
from trainer.pretrained import load_pretrained
from trainer.trained import load_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs of six steps: `run` keeps an average, `mixture` does not."""
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def runs(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def started(run: str, pretrained: str, **settings: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The towers of a new run of a run's recipe, and what was said about them."""
    given = {"model.pretrained": pretrained, **{f"model.{key}": value for key, value in settings.items()}}
    config = load_config(f"{run}/config.yaml", given)
    method = build_method(config, build_tokenizer(config))
    lines = load_pretrained(config.model, method.model)
    return method.model.state_dict(), lines


@pytest.mark.parametrize(("run", "weights"), [("run", "ema"), ("mixture", "trained")])
def test_a_run_is_taken(run, weights, runs):
    expected = load_trained(Path(run)).method.model.state_dict()
    for given in (run, f"{run}/checkpoints", f"{run}/checkpoints/step_3"):
        found, lines = started(run, given)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert lines[0].startswith(f"pretrained: {run}/checkpoints/step_3, {weights} weights (native): ")
    heads = [line for line in lines if "left out" in line]
    assert bool(heads) == (run == "run")


def test_a_consolidated_checkpoint_is_taken(runs, tmp_path):
    consolidate(Path("run/checkpoints/step_3"), tmp_path / "w.safetensors")
    found, _ = started("run", str(tmp_path / "w.safetensors"))
    expected = load_trained(Path("run"), weights="trained").method.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_damaged_checkpoints_are_passed_over_aloud(runs, tmp_path):
    shutil.copytree("mixture", tmp_path / "mine")
    checkpoints = tmp_path / "mine" / "checkpoints"
    shutil.copytree(checkpoints / "step_3", checkpoints / "step_4")
    (checkpoints / "step_4" / "trainer_state.pt").write_bytes(b"PK")
    _, lines = started("mixture", str(tmp_path / "mine"))
    assert "step_3, trained weights" in lines[0]
    assert "step_4 is damaged (trainer_state.pt has 2 bytes instead of" in lines[-1]
    shutil.rmtree(checkpoints / "step_3")
    with pytest.raises(ConfigError, match=r"without a complete checkpoint \(step_4 is damaged.*trainer\.export"):
        started("mixture", str(tmp_path / "mine"))
    shutil.rmtree(checkpoints)
    with pytest.raises(ConfigError, match=r"without a complete checkpoint \(it has saved none yet\).*trainer\.export"):
        started("mixture", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pixel_mean": "[0.5, 0.5, 0.5]"}, r"step_3 was trained on pixels of mean \[0.485"),
        ({"activation": "gelu"}, "step_3 was trained with quick_gelu, model.activation is gelu"),
        ({"context_length": "5", "embed_dim": "64"}, "is another model than model.name"),
    ],
)
def test_another_model_is_refused(settings, words, runs):
    with pytest.raises(ConfigError, match=words):
        started("mixture", "mixture", **settings)
