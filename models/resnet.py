"""CLIP's modified ResNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.batch_norm import BatchNorm
from models.transformer import Linear
from models.vit import check_image_shape

STRIDE = 32
EXPANSION = 4


class ModifiedResNet(nn.Module):
    """Image tower: three-convolution stem, anti-aliased bottleneck stages, attention pooling.

    Args:
        image_size: Side of the square input in pixels, a multiple of 32.
        layers: Number of bottlenecks in each of the four stages.
        width: Channels after the stem; the last stage has 32 times as many.
        heads: Heads of the attention pooling.
        embed_dim: Width of the output.
        sync_batch_norm: Take batch statistics over all ranks.
        activation_checkpointing: Recompute the bottlenecks' activations in the backward.

    Raises:
        ValueError: If `image_size` is not a multiple of 32.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4;
    anti-aliased strides: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
    """

    has_batch_norm = True
    takes_views = True
    has_patch_dropout = False
    has_tokens = True

    def __init__(
        self,
        *,
        image_size: int,
        layers: tuple[int, int, int, int],
        width: int,
        heads: int,
        embed_dim: int,
        sync_batch_norm: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if image_size < STRIDE or image_size % STRIDE:
            below = max(1, image_size // STRIDE) * STRIDE
            raise ValueError(f"image_size {image_size} is not a multiple of {STRIDE}; use {below} or {below + STRIDE}")
        self.image_size = image_size
        self.embed_dim = embed_dim
        self.activation_checkpointing = activation_checkpointing
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(width // 2, sync=sync_batch_norm)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(width // 2, sync=sync_batch_norm)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm(width, sync=sync_batch_norm)
        channels = width
        for stage, depth in enumerate(layers):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, planes, stride=stride, sync_batch_norm=sync_batch_norm))
                channels = planes * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.pooled_dim = self.token_dim = channels
        self.num_tokens = (image_size // STRIDE) ** 2
        self.attnpool = AttentionPool(self.num_tokens, channels, heads, embed_dim)

    def forward(
        self, images: Tensor, *, views: int = 1, with_pooled: bool = False, with_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encodes one or more views of the batch, each with its own batch statistics.

        Args:
            images: float [n, 3, image_size, image_size], normalised; the views, of equal sizes, follow each other.
            views: How many views these are.
            with_pooled: Also return what the projection reads.
            with_tokens: Instead return the last feature map as well.

        Returns:
            [n, embed_dim], not normalised; with `with_pooled` a pair, the second [n, pooled_dim]; with `with_tokens` a
            pair, the second [n, P, token_dim], the positions of the feature map row by row, before their pooling.

        Raises:
            ValueError: On images of another size, or in training a batch that is not `views` equal parts.
        """
        check_image_shape(images, self.image_size)
        # The layout of tensor-core convolutions, and the faster one on processors; every layer hands it on.
        x = images.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x), views), inplace=True)
        x = F.relu(self.bn2(self.conv2(x), views), inplace=True)
        x = F.relu(self.bn3(self.conv3(x), views), inplace=True)
        x = F.avg_pool2d(x, 2)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                if recompute:
                    x = checkpoint(block, x, views, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, views)
        features, pooled = self.attnpool(x)
        if with_tokens:
            return features, x.flatten(2).transpose(1, 2)
        return (features, pooled) if with_pooled else features

    def head_modules(self) -> list[nn.Module]:
        """What only the pooled features need."""
        return [self.attnpool]

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together, from the pixels to the attention pooling, which holds the projection."""
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4], [self.attnpool]]


class Bottleneck(nn.Module):
    """Residual bottleneck whose stride is an average pooling after the 3x3 convolution."""

    def __init__(self, channels: int, planes: int, *, stride: int, sync_batch_norm: bool):
        super().__init__()
        out_channels = planes * EXPANSION
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = BatchNorm(planes, sync=sync_batch_norm)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(planes, sync=sync_batch_norm)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        # Every block starts as the identity.
        self.bn3 = BatchNorm(out_channels, sync=sync_batch_norm, zero_init_weight=True)
        self.downsample = None
        if stride > 1 or channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False), BatchNorm(out_channels, sync=sync_batch_norm)
            )

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """Maps [V * n, channels, H, W] to [V * n, 4 * planes, H / stride, W / stride]."""
        residual = F.relu(self.bn1(self.conv1(x), views), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual), views), inplace=True)
        residual = self.bn3(self.conv3(self._pool(residual)), views)
        return F.relu(residual + self._shortcut(x, views), inplace=True)

    def _shortcut(self, x: Tensor, views: int) -> Tensor:
        if self.downsample is None:
            return x
        # Sequential, whose names the state dict has, would not hand on the number of views.
        conv, norm = self.downsample
        return norm(conv(self._pool(x)), views)

    def _pool(self, x: Tensor) -> Tensor:
        return x if self.stride == 1 else F.avg_pool2d(x, self.stride)


class AttentionPool(nn.Module):
    """Pools a feature map by attending from its mean to every position.

    Args:
        num_positions: Height times width of the feature map.
        channels: Channels of the feature map.
        heads: Number of attention heads.
        embed_dim: Width of the output.
    """

    def __init__(self, num_positions: int, channels: int, heads: int, embed_dim: int):
        super().__init__()
        std = channels**-0.5
        self.heads = heads
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + num_positions, channels))
        self.q_proj = Linear(channels, channels, weight_std=std)
        self.k_proj = Linear(channels, channels, weight_std=std)
        self.v_proj = Linear(channels, channels, weight_std=std)
        self.c_proj = Linear(channels, embed_dim, weight_std=std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pools [n, channels, H, W] to [n, embed_dim], and to [n, channels] before the projection."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)
        return self.c_proj(pooled), pooled
