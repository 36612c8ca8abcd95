"""What training code and its tools put around a model's tensors: dictionaries, and prefixes of the names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Keys under which files of projects keep the state dict; the first that holds tensors counts.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
_MAX_DEPTH = 8
# Of DistributedDataParallel, Lightning and other holders of a model.
_HOLDERS = frozenset(("module", "model", "state_dict", "net", "network"))
# Of torch.compile, FSDP and activation checkpointing; they may wrap any part of a model.
_COMPILED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def find_tensors(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, below any containers; what stands beside them is left out."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return {}
    for name in _CONTAINERS:
        tensors = find_tensors(content.get(name), depth + 1)
        if tensors:
            return tensors
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes the prefixes of holders off, in any order and number, where all names have them.

    Numbers beside the model, such as the `n_averaged` of an average, do not keep a prefix on, and go with it.

    Raises:
        ValueError: Two tensors would have one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _COMPILED)
        if short in found:
            raise ValueError(f"two tensors are called {short} without the prefixes of wrappers, one of them {name}")
        found[short] = tensor
    while True:
        named = {name: tensor for name, tensor in found.items() if not _is_count(name, tensor)}
        holders = {name.partition(".")[0] for name in named}
        if len(holders) != 1 or not holders <= _HOLDERS or not all("." in name for name in named):
            return found
        found = {name.partition(".")[2]: tensor for name, tensor in named.items()}


def by_holder(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The names below each prefix of holders: prefix to the rest of the name to the whole name."""
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        parts = name.split(".")
        count = next((number for number, part in enumerate(parts[:-1]) if part not in _HOLDERS), len(parts) - 1)
        prefix = "".join(f"{part}." for part in parts[:count])
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = name
    return groups


def _is_count(name: str, tensor: Tensor) -> bool:
    return "." not in name and tensor.ndim == 0 and not tensor.is_floating_point()
