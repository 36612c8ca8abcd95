"""Heads of the terms beside the contrastive one."""

from torch import Tensor, nn

from models.batch_norm import BatchNorm, check_batch_norm_mode


def _check_views(features: Tensor) -> None:
    if features.ndim != 3:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [V, n, in_dim], views first")


class SimSiamHead(nn.Module):
    """Projector and predictor of SimSiam on image features.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the projector's hidden layers.
        out_dim: Width of projection and prediction.
        predictor_dim: Width of the predictor's bottleneck.
        batch_norm: "sync" for statistics over all ranks, "local" for those of this rank. Always per view.

    Raises:
        ValueError: On another `batch_norm`.

    Source: Chen and He 2021, "Exploring Simple Siamese Representation Learning"; sizes from Li et al. 2021,
    "Supervision Exists Everywhere", whose projector ends in an affine batch norm and normalises per rank.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 1024,
        out_dim: int = 1024,
        predictor_dim: int = 512,
        *,
        batch_norm: str = "sync",
    ):
        super().__init__()
        sync = check_batch_norm_mode(batch_norm)
        self.projector = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            BatchNorm(hidden_dim, sync=sync),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            BatchNorm(hidden_dim, sync=sync),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
            BatchNorm(out_dim, sync=sync),
        )
        self.predictor = nn.Sequential(
            nn.Linear(out_dim, predictor_dim),
            BatchNorm(predictor_dim, sync=sync),
            nn.ReLU(),
            nn.Linear(predictor_dim, out_dim),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Projects and predicts all views at once; no view sees the statistics of another.

        Args:
            features: [V, n, in_dim] image features before their normalisation.

        Returns:
            Projections z and predictions p, each [V, n, out_dim], not normalised and not detached.

        Raises:
            ValueError: If `features` is not three-dimensional.
        """
        _check_views(features)
        projections = self.projector(features.to(self.projector[0].weight.dtype))
        return projections, self.predictor(projections)


class SimClrHead(nn.Module):
    """SLIP's projector on the image backbone, in front of SimCLR's loss.

    Args:
        in_dim: Width of the backbone's features, before the projection to the shared space.
        hidden_dim: Width of the two hidden layers.
        out_dim: Width of a projection.
        batch_norm: "sync" for statistics over all ranks, "local" for those of this rank. Always per view.

    Raises:
        ValueError: On another `batch_norm`.

    Source: Mu et al. 2022, "SLIP: Self-supervision meets Language-Image Pre-training".
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256, *, batch_norm: str = "sync"):
        super().__init__()
        sync = check_batch_norm_mode(batch_norm)
        self.projector = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            BatchNorm(hidden_dim, sync=sync),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            BatchNorm(hidden_dim, sync=sync),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Projects all views at once, [V, n, in_dim] to [V, n, out_dim]; no view sees the statistics of another.

        Raises:
            ValueError: If `pooled` is not three-dimensional.
        """
        _check_views(pooled)
        return self.projector(pooled.to(self.projector[0].weight.dtype))


class TokenHead(nn.Module):
    """Maps states of image or text tokens to the space in which FILIP compares them, with one linear layer.

    Args:
        width: Width of the states.
        token_dim: Width of the space.

    Source: Yao et al. 2022, "FILIP: Fine-grained Interactive Language-Image Pre-Training".
    """

    def __init__(self, width: int, token_dim: int):
        super().__init__()
        self.projection = nn.Linear(width, token_dim)

    def forward(self, states: Tensor) -> Tensor:
        """Maps [..., width] to [..., token_dim], not normalised."""
        return self.projection(states.to(self.projection.weight.dtype))


class ByolHead(nn.Module):
    """BYOL's projector and predictor on the image backbone, both of one form and without biases.

    Args:
        in_dim: Width of the backbone's features, before the projection to the shared space.
        hidden_dim: Width of the hidden layer of both.
        out_dim: Width of a projection and of its prediction.
        batch_norm: "sync" for statistics over all ranks, "local" for those of this rank. Always per view.

    Raises:
        ValueError: On another `batch_norm`.

    Source: Grill et al. 2020, "Bootstrap your own latent"; sizes from Yang et al. 2023, "Attentive Mask CLIP".
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256, *, batch_norm: str = "sync"):
        super().__init__()
        sync = check_batch_norm_mode(batch_norm)
        self.projector, self.predictor = (
            nn.Sequential(
                nn.Linear(width, hidden_dim, bias=False),
                BatchNorm(hidden_dim, sync=sync),
                nn.ReLU(),
                nn.Linear(hidden_dim, out_dim, bias=False),
            )
            for width in (in_dim, out_dim)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Predicts from all views at once, [V, n, in_dim] to [V, n, out_dim]; no view sees the statistics of another.

        Raises:
            ValueError: If `pooled` is not three-dimensional.
        """
        _check_views(pooled)
        return self.predictor(self.projector(pooled.to(self.projector[0].weight.dtype)))


class PrototypeHead(nn.Module):
    """Projects features into the space in which they are clustered.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        hidden_layers: Linear layers with batch norm and ReLU before the last one; 0 leaves one linear layer.
        batch_norm: "sync" for statistics over all ranks, "local" for those of this rank.

    Raises:
        ValueError: On another `batch_norm`.

    Source: Chen et al. 2022, "Prototypical Contrastive Language Image Pretraining", whose batch norm is per rank.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, hidden_layers: int = 1, *, batch_norm: str = "sync"):
        super().__init__()
        sync = check_batch_norm_mode(batch_norm)
        layers: list[nn.Module] = []
        for _ in range(hidden_layers):
            layers += [nn.Linear(in_dim, hidden_dim), BatchNorm(hidden_dim, sync=sync), nn.ReLU()]
            in_dim = hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Maps [n, in_dim] features before their normalisation to [n, out_dim], not normalised."""
        return self.layers(features.to(self.layers[0].weight.dtype))


class MlmHead(nn.Module):
    """Predicts masked tokens from text states with one linear layer, not tied to the token table.

    Args:
        width: Width of the text tower.
        vocab_size: Number of token ids.

    Source: Li et al. 2021, "Supervision Exists Everywhere".
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, rows: Tensor) -> Tensor:
        """Maps the states of the masked positions only, [n, width] with n >= 0, to logits [n, vocab_size]."""
        return self.decoder(rows.to(self.decoder.weight.dtype))
