"""Reading weights from files that nobody vouches for: tensors come out, and no code of the file runs."""

import argparse
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where the tensors are in the files of the projects that models are imported from.
_CONTAINERS = ("state_dict", "model", "model_state_dict")
_FOLDER_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict.

    Args:
        path: A safetensors file, a file of `torch.save` (also with the state dict under `state_dict` or `model`), a
            TorchScript archive, or a folder in the layout of open_clip or Hugging Face.

    Returns:
        Tensors by name, on the CPU, in the dtype of the file; a `module.` before every name is removed.

    Raises:
        ValueError: If there is no such file, or it holds anything but tensors and plain values.
    """
    file = _find_file(Path(path))
    try:
        found = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__}: {reason})") from None
    for name in _CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name; expected a state dict")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _find_file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"folder {path} holds none of {', '.join(_FOLDER_FILES)}; name the weight file itself")
        return found
    if not path.is_file():
        raise ValueError(f"weights {path} do not exist; give a file or a folder")
    return path


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _read_torch(file: Path) -> Any:
    if _is_torchscript(file):
        return _read_torchscript(file)
    # SLIP keeps its command line in the file; a Namespace is a plain holder of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_torchscript(file: Path) -> bool:
    try:
        reader = torch._C.PyTorchFileReader(str(file))
    except RuntimeError:
        return False
    return reader.has_record("constants.pkl")


def _read_torchscript(file: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive without `torch.jit.load`, which would run the archive's own code."""
    reader = torch._C.PyTorchFileReader(str(file))

    class Unpickler(_ScriptUnpickler):
        def persistent_load(self, identity: tuple) -> torch.storage.TypedStorage:
            _, storage_type, key, _, count = identity
            flat = reader.get_storage_from_record(f"data/{key}", count, storage_type.dtype)
            wrapped = flat.untyped_storage()
            return torch.storage.TypedStorage(wrap_storage=wrapped, dtype=storage_type.dtype, _internal=True)

    module = Unpickler(io.BytesIO(reader.get_record("data.pkl"))).load()
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    return tensors


class _ScriptObject:
    """A module of a TorchScript archive: its attributes, and nothing that could be called."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


class _ScriptUnpickler(pickle.Unpickler):
    """Knows the few names that TorchScript's own pickler writes for a module's tensors, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _ScriptObject
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        if module == "torch.jit._pickle":
            # Typed lists and constants of the same kind.
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"the archive asks for {module}.{name}")


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[prefix] = value
    elif isinstance(value, _ScriptObject):
        for name, entry in value.attributes.items():
            _collect(entry, f"{prefix}.{name}" if prefix else name, tensors)
