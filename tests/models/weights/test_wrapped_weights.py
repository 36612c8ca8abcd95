"""Weights as training code and mirrors leave them: wrapped, in parts, beside numbers, or not there at all."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.weights.foreign_layouts import find_model
from models.weights.weight_files import read_weights
from tests.models.weights.test_weight_files import Trap, assert_same

STATE = {"visual.a": torch.arange(6.0).view(2, 3), "visual.b.weight": torch.tensor([1, 2]), "scale": torch.tensor(2.5)}
BESIDE = {
    "epoch": 3,
    "name": "ViT-B-32",
    "loss": 0.25,
    "best": np.float64(0.75),
    "half": np.float16(0.5),
    "step": np.int64(7),
    "done": np.bool_(True),
    "text": np.str_("word"),
    "history": np.arange(3.0),
    "objects": np.array(["a", None], dtype=object),
    "random": random.Random(0).getstate(),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float32(1e-3)}]},
    "scaler": None,
}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module.module.",
        "model._orig_mod.module.model.",
        "_fsdp_wrapped_module._orig_mod.",
        "state_dict.model.",
    ],
)
def test_prefixes_come_off_in_any_order(prefix, tmp_path):
    wrapped = {prefix + name: tensor for name, tensor in STATE.items()}
    torch.save(wrapped, tmp_path / "w.pt")
    assert_same(read_weights(tmp_path / "w.pt"), STATE)
    # As torch's average of weights has it.
    torch.save({"state_dict": {**wrapped, "n_averaged": torch.tensor(9)}}, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    found.pop("n_averaged", None)
    assert_same(found, STATE)


def test_parts_of_a_model_may_be_wrapped(tmp_path):
    parts = {
        "visual._orig_mod.a": STATE["visual.a"],
        "visual.b._checkpoint_wrapped_module.weight": STATE["visual.b.weight"],
        "scale": STATE["scale"],
    }
    save_file(parts, tmp_path / "w.safetensors")
    assert_same(read_weights(tmp_path / "w.safetensors"), STATE)


def test_names_are_never_made_equal(tmp_path):
    torch.save({"a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: two tensors are called a without the prefixes"):
        read_weights(tmp_path / "w.pt")
    # A prefix that not all have says which part it is.
    mixed = {"model.a": torch.ones(1), "head.a": torch.zeros(1)}
    torch.save(mixed, tmp_path / "w.pt")
    assert_same(read_weights(tmp_path / "w.pt"), mixed)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": {"name": "ViT", "width": 512}, "model_state_dict": state},
        lambda state: {"model": {"state_dict": {"module." + name: tensor for name, tensor in state.items()}}},
        lambda state: {"module": state, "ds_version": "0.15", "ds_config": {"zero": 1}},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_stands_beside_the_tensors_does_not_matter(legacy, wrap, tmp_path):
    content = {**BESIDE, **wrap(STATE)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(read_weights(tmp_path / "w.pt"), STATE)


@pytest.mark.parametrize("name", ["numpy._core.multiarray.scalar", "numpy.dtype", "numpy.core.multiarray.scalar"])
def test_nothing_of_numpy_runs(name, tmp_path, monkeypatch):
    torch.save({"state_dict": STATE, "best": np.float64(1)}, tmp_path / "w.pt")
    for holder, entry in ((np._core.multiarray, "scalar"), (np, "dtype")):
        monkeypatch.setattr(holder, entry, None)
    assert read_weights(tmp_path / "w.pt").keys() == STATE.keys()


def test_code_inside_what_is_ignored_is_refused(tmp_path):
    hidden = np.empty(1, dtype=object)
    hidden[0] = Trap(tmp_path / "ran")
    torch.save({"state_dict": STATE, "history": hidden}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_the_content_decides_not_the_ending(tmp_path):
    save_file(STATE, tmp_path / "blob")
    torch.save(STATE, tmp_path / "renamed.safetensors")
    for name in ("blob", "renamed.safetensors"):
        assert_same(read_weights(tmp_path / name), STATE)


def write_parts(folder, kind: str) -> dict:
    """Two files and their index, as Hugging Face and open_clip cut large models."""
    folder.mkdir(exist_ok=True)
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(STATE)
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, part in enumerate((names[:1], names[1:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        tensors = {name: STATE[name] for name in part}
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_parts_are_read_by_their_index(kind, tmp_path):
    write_parts(tmp_path / "m", kind)
    (path,) = (tmp_path / "m").glob("*.index.json")
    for given in (tmp_path / "m", path):
        assert_same(read_weights(given), STATE)
    # Caches hold links to files elsewhere.
    (part, *_) = sorted((tmp_path / "m").glob("*-00001-*"))
    part.rename(tmp_path / "blob")
    part.symlink_to("../blob")
    assert_same(read_weights(path), STATE)
    part.unlink()
    with pytest.raises(ValueError, match=rf"1 of the 2 parts that .* lists are missing: {part.name}"):
        read_weights(path)


@pytest.mark.parametrize(
    "part", ["../secret.bin", "/etc/passwd", "sub/x.bin", "..", "..\\x.bin", "c:x.bin", "", "a\0b"]
)
def test_an_index_stays_in_its_folder(part, tmp_path):
    torch.save(STATE, tmp_path / "secret.bin")
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"scale": part}}))
    with pytest.raises(ValueError, match="which is not a file beside it") as caught:
        read_weights(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no index of weights"),
        (b"[1]", "is no index of weights"),
        (b'{"weight_map": 3}', "is no index of weights"),
        (b"[" * 100_000, "is no index of weights"),
        (b'{"weight_map": {}}', "lists no tensors"),
    ],
)
def test_a_broken_index_is_named(content, words, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path)


def test_a_part_without_its_tensor_is_named(tmp_path):
    index = write_parts(tmp_path / "m", "bin")
    index["weight_map"]["more"] = "pytorch_model-00001-of-00002.bin"
    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00001-of-00002\.bin lacks more, which the index says"):
        read_weights(tmp_path / "m")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 605157884\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a Git LFS pointer to a file of 605,157,884 bytes, not the file itself; fetch it"),
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "model.safetensors"])
def test_what_was_not_downloaded_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path if name.startswith("model") else tmp_path / name)
    write_parts(tmp_path / "m", "bin")
    (tmp_path / "m" / "pytorch_model-00002-of-00002.bin").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path / "m")


@pytest.mark.parametrize("cut", [1, 8, 100, -50])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_that_end_early_are_one_line(name, cut, tmp_path):
    save_file(STATE, tmp_path / name) if name.endswith("safetensors") else torch.save(STATE, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cannot be read as weights .* is it whole") as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).isprintable()


def test_folders_of_deepspeed(tmp_path):
    place = tmp_path / "global_step5"
    place.mkdir()
    (tmp_path / "latest").write_text("global_step5\n")
    torch.save({"module": STATE, "ds_version": "0.15", "mp_world_size": 1}, place / "mp_rank_00_model_states.pt")
    for given in (tmp_path, place, place / "mp_rank_00_model_states.pt"):
        assert_same(read_weights(given), STATE)
    (place / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match=r"cut up \(ZeRO 3\); put it together with the zero_to_fp32\.py"):
        read_weights(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="holds none of"):
        read_weights(tmp_path)


def test_a_model_beside_heads_is_found_and_two_are_not_guessed():
    native = {"image_tower.x": torch.ones(1), "text_tower.x": torch.ones(1)}
    beside = {"predictor.weight": torch.zeros(1), "queue": torch.zeros(2)}
    held = {f"model.{name}": tensor for name, tensor in native.items()}
    layout, tensors, left_out = find_model({**held, **beside})
    assert layout == "native" and left_out == list(beside)
    assert_same(tensors, native)
    assert find_model(native, "native") == ("native", native, [])
    with pytest.raises(ValueError, match=r"several models, below 'model\.' and 'module\.model\.'"):
        find_model({**held, **{f"module.{name}": tensor for name, tensor in held.items()}})
    with pytest.raises(ValueError, match="of no known project"):
        find_model(beside)
