"""Two ONNX graphs: pixels to image embeddings, token ids to text embeddings."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from models.clip import ClipModel
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError

_BATCH = 2


class _ImageEncoder(nn.Module):
    """Pixels in [0, 1] to unit-norm embeddings; the normalisation of pixels is part of the graph."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self.tower = model.image_tower
        self.register_buffer("mean", torch.tensor(model.pixel_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.pixel_std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower((pixels - self.mean) / self.std), dim=1)


class _TextEncoder(nn.Module):
    """Token ids and caption lengths to unit-norm embeddings."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self.tower = model.text_tower

    def forward(self, token_ids: Tensor, text_lengths: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower.encode_padded(token_ids, text_lengths), dim=1)


def write_onnx(model: ClipModel, config: RunConfig, out: Path) -> None:
    """Write `image_encoder.onnx` and `text_encoder.onnx`, for any batch size.

    Inputs: `pixels` float32 [n, 3, S, S] in [0, 1]; `token_ids` int64 [n, context_length] and `text_lengths` int64 [n].
    Output of both: `embeddings` float32 [n, embed_dim], unit norm. The logit scale, and the bias where there
    is one, are in the metadata of both graphs.

    Raises:
        ConfigError: The exporter is not installed, or cannot translate a tower.
    """
    side, length = model.image_tower.image_size, config.model.context_length
    pixels = torch.rand(_BATCH, 3, side, side)
    ids, lengths = torch.ones(_BATCH, length, dtype=torch.int64), torch.full((_BATCH,), length)
    numbers = {"logit_scale": math.exp(float(model.logit_scale.log_value))}
    if model.logit_bias is not None:
        numbers["logit_bias"] = float(model.logit_bias())
    _write(_ImageEncoder(model), {"pixels": pixels}, numbers, out / "image_encoder.onnx")
    _write(_TextEncoder(model), {"token_ids": ids, "text_lengths": lengths}, numbers, out / "text_encoder.onnx")


def _write(module: nn.Module, inputs: dict[str, Tensor], numbers: dict[str, float], path: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("--to onnx needs onnx and onnxscript: pip install 'declip-trainer[export]'") from None
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["embeddings"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"torch cannot translate this tower to ONNX ({reason}); use --to safetensors") from None
    program.save(path, external_data=False)
    graph = onnx.load(path)
    for name, value in numbers.items():
        graph.metadata_props.add(key=name, value=repr(value))
    onnx.save(graph, path)
