"""Any timm backbone as an image tower."""

import difflib
from typing import Any

from torch import Tensor, nn

from models.backbone import refuse_scalars, replace_batch_norms
from models.transformer import Linear
from models.vit import check_image_shape
from models.weights.weight_files import read_weights


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

    takes_views = False
    has_patch_dropout = False
    has_tokens = False

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
        self.model_name = model_name
        self.image_size = image_size or config.input_size[-1]
        self.embed_dim = embed_dim
        self.has_fixed_size = bool(config.fixed_input_size)
        self._size_argument = {"img_size": self.image_size} if self.has_fixed_size else {}
        self.trunk = timm.create_model(model_name, pretrained=False, num_classes=0, **self._size_argument)
        self.has_batch_norm = replace_batch_norms(self.trunk, sync_batch_norm) > 0
        refuse_scalars(self.trunk, f"timm architecture {model_name!r}")
        if activation_checkpointing:
            self._enable_activation_checkpointing()
        features = getattr(self.trunk, "head_hidden_size", None) or self.trunk.num_features
        self.pooled_dim = features
        self.proj = Linear(features, embed_dim, bias=False, weight_std=features**-0.5)

    def forward(self, images: Tensor, *, with_pooled: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Encodes images: one view per call where `has_batch_norm`, else any number of stacked views.

        Args:
            images: float [n, 3, image_size, image_size], normalised.
            with_pooled: Also return what the projection reads.

        Returns:
            [n, embed_dim], not normalised; with `with_pooled` a pair, the second [n, pooled_dim].

        Raises:
            ValueError: On images of another size.
        """
        check_image_shape(images, self.image_size)
        pooled = self.trunk(images.to(self.proj.weight.dtype))
        features = self.proj(pooled)
        return (features, pooled) if with_pooled else features

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together: timm's own layer groups, which leave out the projection."""
        from timm.models import group_parameters

        if not hasattr(self.trunk, "group_matcher"):
            return [[self.trunk]]
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        return [[self.trunk.get_parameter(name) for name in groups[key]] for key in sorted(groups)]

    def load_pretrained(self, weights: str | None) -> None:
        """Loads weights into the backbone; position tables of another image size are interpolated by timm.

        Args:
            weights: A file of the architecture's weights, or None for those that timm downloads.

        Raises:
            ValueError: If there are none, or they do not fit.
        """
        overlay = {} if weights is None else {"state_dict": read_weights(weights)}
        try:
            loaded = self._create_filled(overlay)
            self.trunk.load_state_dict(loaded.state_dict())
        except (RuntimeError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"weights of timm's {self.model_name!r} cannot be loaded from {weights or 'the hub'} ({reason})"
            ) from None

    def _create_filled(self, overlay: dict[str, Any]) -> nn.Module:
        """Has timm load weights with or without a classifier; it is strict only where their numbers agree."""
        import timm

        options = {"pretrained": True, **self._size_argument}
        try:
            loaded = timm.create_model(self.model_name, pretrained_cfg_overlay=overlay, **options)
            loaded.reset_classifier(0)
            return loaded
        except RuntimeError:
            if not overlay:
                raise
        overlay = {**overlay, "num_classes": 0}
        return timm.create_model(self.model_name, pretrained_cfg_overlay=overlay, num_classes=0, **options)

    def expected_pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels that timm's weights were trained on."""
        config = self.trunk.pretrained_cfg
        return tuple(config["mean"]), tuple(config["std"])

    def _enable_activation_checkpointing(self) -> None:
        try:
            self.trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"timm architecture {self.model_name!r} has no activation checkpointing; "
                f"turn activation_checkpointing off"
            ) from error


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("this image tower needs timm; install it: pip install timm") from error
    return timm
