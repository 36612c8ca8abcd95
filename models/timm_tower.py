"""Any timm backbone as an image tower."""

import difflib

from torch import Tensor, nn

from models.batch_norm import BatchNorm
from models.transformer import Linear
from models.vit import check_image_shape


class TimmTower(nn.Module):
    """Image tower made of a randomly initialised timm backbone with its own pooling, and a bias-free projection.

    The backbone's batch norms become `models.batch_norm.BatchNorm` under the same state-dict names.

    Args:
        model_name: Name of a timm architecture, such as "regnety_640".
        image_size: Side of the square input in pixels; None means the size that timm lists for the architecture.
        embed_dim: Width of the output.
        sync_batch_norm: Take batch statistics over all ranks.
        activation_checkpointing: Recompute activations in the backward, at the granularity that timm offers.

    Raises:
        ValueError: If timm does not know the name, or the architecture cannot be trained here.
        ImportError: If timm is not installed.
    """

    has_patch_dropout = False

    def __init__(
        self,
        model_name: str,
        *,
        image_size: int | None,
        embed_dim: int,
        sync_batch_norm: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(model_name):
            close = difflib.get_close_matches(model_name, timm.list_models(), n=5)
            raise ValueError(f"timm has no architecture {model_name!r}; close matches: {', '.join(close) or 'none'}")
        config = timm.get_pretrained_cfg(model_name)
        self.image_size = image_size or config.input_size[-1]
        self.embed_dim = embed_dim
        size_argument = {"img_size": self.image_size} if config.fixed_input_size else {}
        self.trunk = timm.create_model(model_name, pretrained=False, num_classes=0, **size_argument)
        self.has_batch_norm = _replace_batch_norms(self.trunk, sync_batch_norm) > 0
        scalars = [name for name, parameter in self.trunk.named_parameters() if parameter.ndim == 0]
        if scalars:
            raise ValueError(
                f"timm architecture {model_name!r} has 0-dim parameters, which DeepSpeed cannot hold "
                f"({', '.join(scalars[:3])}); choose another architecture"
            )
        if activation_checkpointing:
            self._enable_activation_checkpointing(model_name)
        features = getattr(self.trunk, "head_hidden_size", None) or self.trunk.num_features
        self.proj = Linear(features, embed_dim, bias=False, weight_std=features**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images: one view per call where `has_batch_norm`, else any number of stacked views.

        Args:
            images: float [n, 3, image_size, image_size], normalised.

        Returns:
            [n, embed_dim], not normalised.

        Raises:
            ValueError: On images of another size.
        """
        check_image_shape(images, self.image_size)
        return self.proj(self.trunk(images.to(self.proj.weight.dtype)))

    def _enable_activation_checkpointing(self, model_name: str) -> None:
        try:
            self.trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"timm architecture {model_name!r} has no activation checkpointing; turn activation_checkpointing off"
            ) from error


class _BatchNormAct(BatchNorm):
    """Stand-in for timm's BatchNormAct2d, which holds its activation itself."""

    def __init__(self, layer: nn.Module, *, sync: bool):
        super().__init__(layer.num_features, sync=sync, eps=layer.eps, momentum=layer.momentum)
        self.drop = layer.drop
        self.act = layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _replace_batch_norms(module: nn.Module, sync: bool) -> int:
    """Replaces the batch norms below a module, keeping their tensors, and returns how many there were."""
    from timm.layers import BatchNormAct2d

    count = 0
    for name, child in module.named_children():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            count += _replace_batch_norms(child, sync)
            continue
        if isinstance(child, BatchNormAct2d):
            replacement = _BatchNormAct(child, sync=sync)
        elif type(child) is nn.BatchNorm2d:
            replacement = BatchNorm(child.num_features, sync=sync, eps=child.eps, momentum=child.momentum)
        else:
            raise ValueError(f"batch norm {type(child).__name__} of this timm architecture is not supported")
        replacement.weight, replacement.bias = child.weight, child.bias
        for buffer_name, buffer in child.named_buffers(recurse=False):
            setattr(replacement, buffer_name, buffer)
        setattr(module, name, replacement)
        count += 1
    return count


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("this image tower needs timm; install the 'timm' extra: pip install timm") from error
    return timm
