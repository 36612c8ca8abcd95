"""Reading weights from files that nobody vouches for: tensors come out, and no code of the file runs."""

import argparse
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights.weight_locations import find_weight_files
from models.weights.wrappers import find_tensors, without_wrappers

# Beside the tensors of a training checkpoint stand numbers of numpy and objects of DeepSpeed.
_BESIDE = (
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_MAX_HEADER_BYTES = 100 << 20


class _Ignored:
    """Stands in for what is known to be harmless and of no use; none of its own code runs."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict.

    Args:
        path: A safetensors file, a file of `torch.save` (also with the state dict inside of other things), a
            TorchScript archive, an index of several files, or a folder in the layout of open_clip, Hugging Face or
            DeepSpeed.

    Returns:
        Tensors by name, on the CPU, in the dtype of the file; the prefixes of wrappers (`module.`, `_orig_mod.`,
        `model.`) are removed where all names have them.

    Raises:
        ValueError: If there is no such file, or it holds anything but tensors and plain values.
    """
    files = find_weight_files(Path(path))
    tensors: dict[str, Tensor] = {}
    for file, wanted in files.items():
        found = _read_file(file)
        lacking = sorted((wanted or set()) - found.keys())
        if lacking:
            raise ValueError(f"{file} lacks {lacking[0]}, which the index says it holds; download both again")
        tensors |= found if wanted is None else {name: found[name] for name in wanted}
    try:
        return without_wrappers(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        found = _read_safetensors(file) if _is_safetensors(file) else _read_torch(file)
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        RuntimeError,
        pickle.UnpicklingError,
        ValueError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} cannot be read as weights ({type(error).__name__}: {reason}); is it whole, and safe to load?"
        ) from None
    tensors = find_tensors(found)
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name; expected a state dict")
    return tensors


def _is_safetensors(file: Path) -> bool:
    """Told by the content, as caches and mirrors drop or change endings: a length, and JSON of it."""
    with file.open("rb") as stream:
        begin = stream.read(9)
    is_headed = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= _MAX_HEADER_BYTES
    return is_headed or (file.suffix == ".safetensors" and not begin.startswith(b"PK\x03\x04"))


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
    allowed = [argparse.Namespace, *((_Ignored, name) for name in _BESIDE)]
    # A stream, as torch goes by the ending of a path.
    with torch.serialization.safe_globals(allowed), file.open("rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


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
