import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from models.weights.weight_files import read_weights


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4).half())
        self.register_buffer("table", torch.arange(12).view(3, 4)[:, 1:3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.float()


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.Sequential(Part(), torch.nn.Linear(4, 2))
        self.scale = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) * self.scale


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_every_container_gives_the_same_tensors(tmp_path):
    state = {"a.weight": torch.randn(3, 2), "b": torch.tensor([1, 2])}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "slip.pt")
    torch.save({"model": state, "optimizer": None, "last_iter": 5}, tmp_path / "declip.pth")
    for path in (tmp_path, *tmp_path.iterdir()):
        assert_same(read_weights(path), state)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archives_are_read_without_being_loaded(how, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Whole()
    example = torch.randn(2, 3)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, example)
    scripted.save(tmp_path / "model.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    assert_same(read_weights(tmp_path / "model.pt"), dict(model.state_dict()))


@pytest.mark.parametrize("where", ["pickle", "zip", "torchscript"])
def test_files_that_would_run_code_are_refused(where, tmp_path):
    trap, path = tmp_path / "ran", tmp_path / "weights.pt"
    if where == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Trap(trap)}))
    elif where == "zip":
        torch.save({"state_dict": {"a": torch.zeros(1), "b": Trap(trap)}}, path)
    else:
        torch.jit.script(Whole()).save(tmp_path / "good.pt")
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as bad:
            for entry in good.infolist():
                is_pickle = entry.filename.endswith("/data.pkl")
                bad.writestr(entry.filename, pickle.dumps(Trap(trap)) if is_pickle else good.read(entry))
    with pytest.raises(ValueError, match=r"weights.pt cannot be read as weights"):
        read_weights(path)
    assert not trap.exists()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="do not exist; give a file or a folder"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"holds none of open_clip_model.safetensors, model.safetensors"):
        read_weights(tmp_path)
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x01 no weights at all")
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_weights(tmp_path / "empty.pt")
