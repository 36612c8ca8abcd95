"""CLIP's vision transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attentive_mask import ClassAttention
from models.patch_dropout import kept_patches
from models.sequences import Sequences, UniformSequences
from models.transformer import POSITIONAL_EMBEDDING_STD, Linear, Transformer, TransformerInit
from models.weights.positions import resize_positions


class VisionTransformer(nn.Module):
    """Image tower: patch embedding, class token, pre-norm transformer, projection of the class token.

    Initial weights follow OpenAI's CLIP: embeddings and projection normal with std width^-0.5, torch's defaults
    elsewhere. With `init` "declip" they follow DeCLIP's released code: positional embedding with std 0.01, and in the
    blocks the scheme of CLIP's text tower.

    Args:
        image_size: Side of the square input in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Number of attention heads.
        embed_dim: Width of the output.
        freeze_patch_embed: Leave the patch embedding at its random start.
        patch_dropout: Fraction of patches left out in training, in [0, 1).
        activation: Of the MLPs, "quick_gelu" or "gelu".
        init: "clip" or "declip".
        activation_checkpointing: Recompute the blocks' activations in the backward.

    Raises:
        ValueError: If the sizes do not divide, or `patch_dropout` is out of range.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; frozen patch
    embedding: Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers"; patch dropout:
    Li et al. 2023, "Scaling Language-Image Pre-training via Masking".
    """

    has_batch_norm = False
    takes_views = False
    has_tokens = True

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        freeze_patch_embed: bool = False,
        patch_dropout: float = 0.0,
        activation: str = "quick_gelu",
        init: str = "clip",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            below = max(1, image_size // patch_size) * patch_size
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}; "
                f"use {below} or {below + patch_size}"
            )
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout {patch_dropout} is out of range; use a fraction in [0, 1), 0 for none")
        self.image_size = image_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.pooled_dim = self.token_dim = width
        self.num_patches = (image_size // patch_size) ** 2
        self.num_kept_patches = max(1, round(self.num_patches * (1 - patch_dropout)))
        self.has_patch_dropout = self.num_kept_patches < self.num_patches
        self.num_tokens = self.num_kept_patches
        std = width**-0.5
        as_declip = init == "declip"
        position_std = POSITIONAL_EMBEDDING_STD if as_declip else std
        # A linear layer on unfolded patches is the strided convolution, and spends nothing on dropped patches.
        self.patch_embed = Linear(3 * patch_size**2, width, bias=False)
        self.patch_embed.requires_grad_(not freeze_patch_embed)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(position_std * torch.randn(1 + self.num_patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width,
            layers,
            heads,
            init=TransformerInit.clip_text(width, layers) if as_declip else None,
            activation=activation,
            activation_checkpointing=activation_checkpointing,
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = Linear(width, embed_dim, bias=False, weight_std=std)

    def forward(
        self,
        images: Tensor,
        dropout_keys: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        with_pooled: bool = False,
        with_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encodes images; views of one sample may be stacked along the first dimension.

        Args:
            images: float [n, 3, image_size, image_size], normalised.
            dropout_keys: int64 [n] on the images' device, well mixed; an image's key alone decides which of its
                patches are kept. Used in training with patch dropout only.
            kept: int64 [n, k], row-major indices of the patches to encode; None means all, or in training those that
                patch dropout keeps.
            with_pooled: Also return what the projection reads.
            with_tokens: Instead return the states of the patches as well.

        Returns:
            [n, embed_dim], not normalised; with `with_pooled` a pair, the second [n, pooled_dim]; with `with_tokens` a
            pair, the second [n, P, token_dim], the P patches that were not dropped before the final LayerNorm.

        Raises:
            ValueError: On images of another size, or without keys where they are needed.
        """
        check_image_shape(images, self.image_size)
        if kept is None and self.training and self.has_patch_dropout:
            kept = self._kept_patches(dropout_keys, len(images))
        tokens = self._tokens(images, self.positional_embedding, kept)
        sequences = UniformSequences(*tokens.shape[:2])
        if with_tokens:
            states = self.transformer(tokens.flatten(0, 1), sequences).view_as(tokens)
            return self.proj(self.ln_post(states[:, 0])), states[:, 1:]
        pooled = self._pooled(tokens, sequences)
        features = self.proj(pooled)
        return (features, pooled) if with_pooled else features

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the projection reads, and which patches the class token attends to on the way there.

        For a tower whose parameters are not trained in place: ZeRO 3 knows nothing of this method. No gradient.

        Args:
            images: float [n, 3, H, H], normalised, H any multiple of `patch_size`; position embeddings are
                interpolated to its grid.

        Returns:
            [n, pooled_dim], and float32 [n, G, G] with G = H / patch_size: the softmax of the class token over all
            tokens, the mean over heads and blocks, for the patches. It sums up to less than 1, as the class token's
            attention to itself is left out.

        Raises:
            ValueError: On images that are not square or do not divide into patches.
        """
        side = images.shape[-1]
        check_image_shape(images, side - side % self.patch_size)
        grid = side // self.patch_size
        with torch.no_grad():
            tokens = self._tokens(images, resize_positions(self.positional_embedding, 1 + grid**2), None)
            total = torch.zeros(tokens.shape[:2], device=images.device)
            pooled = self._pooled(tokens, ClassAttention(*tokens.shape[:2], total))
        return pooled, total[:, 1:].unflatten(1, (grid, grid)) / len(self.transformer.resblocks)

    def _tokens(self, images: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        """Embeds the class token and the patches, all or those kept; [n, 1 + patches, width]."""
        patches = unfold_patches(images.to(self.patch_embed.weight.dtype), self.patch_size)
        class_position, patch_positions = positions.split([1, len(positions) - 1])
        if kept is not None:
            patches = patches.take_along_dim(kept[..., None], dim=1)
            patch_positions = F.embedding(kept, patch_positions)
        tokens = self.patch_embed(patches) + patch_positions
        class_token = (self.class_embedding + class_position).expand(images.shape[0], 1, -1)
        return self.ln_pre(torch.cat([class_token, tokens], dim=1))

    def _pooled(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        class_rows = torch.arange(tokens.shape[0], device=tokens.device) * tokens.shape[1]
        return self.ln_post(self.transformer(tokens.flatten(0, 1), sequences, class_rows))

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together, from the pixels to the projection."""
        *blocks, last = self.transformer.resblocks
        embeddings = [self.patch_embed, self.class_embedding, self.positional_embedding, self.ln_pre]
        return [embeddings, *([block] for block in blocks), [last, self.ln_post], [self.proj]]

    def head_modules(self) -> list[nn.Module]:
        """What only the pooled features need."""
        return [self.ln_post, self.proj]

    def _kept_patches(self, dropout_keys: Tensor | None, num_images: int) -> Tensor:
        if dropout_keys is None or dropout_keys.shape != (num_images,):
            given = "None" if dropout_keys is None else f"shape {tuple(dropout_keys.shape)}"
            raise ValueError(
                f"patch dropout in training needs one int64 key per image, got dropout_keys {given} for {num_images} "
                f"images; pass the keys or build the model with patch_dropout=0"
            )
        return kept_patches(dropout_keys, self.num_patches, self.num_kept_patches)


def unfold_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches in row-major order.

    Args:
        images: [n, 3, H, W], sides multiples of `patch_size`.
        patch_size: Side of a patch.

    Returns:
        [n, H * W / patch_size^2, 3 * patch_size^2], pixels of a patch in the order channel, row, column.
    """
    num_images, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    blocks = images.reshape(num_images, channels, rows, patch_size, columns, patch_size)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(num_images, rows * columns, channels * patch_size**2)


def check_image_shape(images: Tensor, image_size: int) -> None:
    """Raises ValueError unless `images` is [n, 3, image_size, image_size]."""
    if images.ndim != 4 or images.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected [n, 3, {image_size}, {image_size}]: "
            f"resize them or build the model with another image_size"
        )
