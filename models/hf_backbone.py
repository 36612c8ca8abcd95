"""Building and filling backbones of Hugging Face's transformers, without running code from the hub."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.weights.positions import resize_positions
from models.weights.weight_locations import check_content

Part = Literal["vision", "text"]
# Configurations that ship with this package, for the ids of CLIP's tokenizer and its mask token; without weights.
BUILTIN_PREFIX = "builtin/"
_BUILTIN = Path(__file__).resolve().parent / "hf_configs"
_POSITION_TABLES = ("position_embeddings", "position_embedding.weight")


def read_hf_config(source: str, part: Part) -> Any:
    """Reads the configuration of one half of a model.

    Args:
        source: Name on the Hugging Face hub, a local folder with a config.json, or builtin/<name>.
        part: Which half of a configuration that describes both, such as CLIP's.

    Returns:
        The configuration, every dropout in it switched off: ranks draw different random numbers, so W ranks would not
        equal one.

    Raises:
        ValueError: If there is none, or it needs code that transformers does not have itself.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_locate(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"'{source}' gives no Hugging Face configuration ({reason}); give a hub name or a folder with a "
            f"config.json of an architecture that transformers itself has (code from the hub is never run)"
        ) from None
    config = copy.deepcopy(getattr(config, f"{part}_config", None) or config)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    return config


def _locate(source: str) -> str:
    if not source.startswith(BUILTIN_PREFIX):
        return source
    known = sorted(folder.name for folder in _BUILTIN.iterdir())
    name = source.removeprefix(BUILTIN_PREFIX)
    if name not in known:
        raise ValueError(f"no configuration of that name; known: {', '.join(BUILTIN_PREFIX + name for name in known)}")
    return str(_BUILTIN / name)


def build_backbone(config: Any, *, keep_pooler: bool) -> nn.Module:
    """Builds a randomly initialised backbone.

    Args:
        config: From `read_hf_config`.
        keep_pooler: Keep the extra pooling layer of BERT, ViT and their kind, which is trained for another task.

    Returns:
        The model in fp32; of an encoder-decoder, its encoder.

    Raises:
        ValueError: If transformers has no such backbone.
    """
    # transformers writes into the configuration it is given.
    config = copy.deepcopy(config)
    if not keep_pooler:
        try:
            return _from_config(config, add_pooling_layer=False)
        except TypeError:
            # An architecture without that layer.
            pass
    return _from_config(config)


def _from_config(config: Any, **options: Any) -> nn.Module:
    import transformers

    loader = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
    try:
        return loader.from_config(config, dtype=torch.float32, **options)
    except ValueError:
        # Halves of two-tower models are not all in the tables of the Auto classes, but follow their naming.
        name = type(config).__name__.removesuffix("Config") + "Model"
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ValueError(f"transformers has no encoder for a {type(config).__name__}") from None
        return model_class(config, **options).float()


def unused_parameters(build: Any, run: Any) -> tuple[set[str], Any]:
    """Finds the parameters that a forward pass leaves without gradient, with a twin that holds no memory.

    Args:
        build: Makes the backbone on the current device.
        run: Runs it on a small input and returns its output and the tensor that the tower goes on with.

    Returns:
        Their names, and the output.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device(device):
                twin = build()
                output, used = run(twin)
                used.sum().backward()
            return {name for name, parameter in twin.named_parameters() if parameter.grad is None}, output
        except (RuntimeError, NotImplementedError):
            # Some architectures read a tensor's values on the way, which a meta tensor does not have.
            if device == "cpu":
                raise
    raise AssertionError


def enable_activation_checkpointing(backbone: nn.Module, source: str) -> None:
    """Recomputes activations in the backward; raises ValueError if the architecture cannot."""
    if not backbone.supports_gradient_checkpointing:
        raise ValueError(f"'{source}' has no activation checkpointing; turn activation_checkpointing off")
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_backbone(backbone: nn.Module, source: str) -> None:
    """Fills a backbone with the weights of its source; image positions are interpolated to another grid.

    Args:
        backbone: From `build_backbone`, its batch norms maybe replaced under the same names.
        source: Hub name or local folder.

    Raises:
        ValueError: If the weights are missing or do not fit.
    """
    import transformers

    if source.startswith(BUILTIN_PREFIX):
        raise ValueError(f"'{source}' is a configuration without weights; name a model of the hub, or train it")
    config = copy.deepcopy(backbone.config)
    original = read_hf_config(source, "vision" if hasattr(config, "image_size") else "text")
    if hasattr(config, "image_size"):
        config.image_size = original.image_size
    for pattern in ("*.safetensors", "*.bin"):
        for file in Path(source).glob(pattern) if Path(source).is_dir() else ():
            check_content(file)
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded, report = type(backbone).from_pretrained(
            source, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights of '{source}' cannot be loaded ({reason})") from None
    state = loaded.state_dict()
    missing = sorted(set(backbone.state_dict()) & set(report["missing_keys"]))
    if missing:
        raise ValueError(f"weights of '{source}' lack {len(missing)} tensors, such as {', '.join(missing[:3])}")
    fill_backbone(backbone, state, source)


def fill_backbone(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state dict of the same architecture, image positions interpolated; more tensors than needed are fine."""
    own = backbone.state_dict()
    for name, tensor in own.items():
        if name in state and name.endswith(_POSITION_TABLES) and state[name].shape != tensor.shape:
            grid = state[name].flatten(0, -2)
            state[name] = resize_positions(grid, tensor.flatten(0, -2).shape[0]).view_as(tensor)
    try:
        backbone.load_state_dict({name: state[name] for name in own if name in state})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights of '{source}' do not fit ({reason})") from None


def read_pixel_statistics(source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the pixels a model was trained on, from its processor's configuration, if any."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = _read_json(source, name)
        values = values.get("image_processor", values)
        if values.get("image_mean") and values.get("image_std"):
            return tuple(values["image_mean"]), tuple(values["image_std"])
    return None


def _read_json(source: str, name: str) -> dict[str, Any]:
    path = Path(source) / name
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        path = Path(found) if found else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
