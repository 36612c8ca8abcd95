"""Captions, batches and models of equal weights that the benchmarks share."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architectures import ARCHITECTURES, HEAD_WIDTH
from models.clip import IMAGENET_MEAN, IMAGENET_STD, ClipModel
from models.registry import build_model
from models.weights.open_clip_mapping import to_open_clip
from trainer.methods import METHODS, Method, parse_method

CONTEXT_LENGTH = 77
# CLIP's 49,408 ids and the mask token of masked language modelling; without that task the last one is never used.
VOCAB_SIZE = 49_409
SOT_ID, EOT_ID, MASK_ID = 49_406, 49_407, 49_408
MASKED_SHARE = 0.15
# Tokens of a caption, start and end included, per thousand captions, after COCO's: mean 13.5, 99th percentile 23.
CAPTION_LENGTHS = {
    10: 55,
    11: 140,
    12: 205,
    13: 205,
    14: 140,
    15: 90,
    16: 55,
    17: 35,
    18: 22,
    19: 15,
    20: 11,
    21: 8,
    22: 6,
    23: 5,
    24: 3,
    26: 2,
    29: 2,
    34: 1,
}


def caption_lengths(num_captions: int) -> np.ndarray:
    """Lengths of typical captions in a fixed random order.

    They are evenly spaced quantiles of `CAPTION_LENGTHS`, so that even a small batch has the table's mean and spread.
    """
    table = np.repeat(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()))
    quantiles = (np.arange(num_captions) + 0.5) / num_captions
    return np.random.default_rng(0).permutation(table[(quantiles * len(table)).astype(int)])


def make_captions(num_captions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids between the start and the end token.

    Returns:
        token_ids int64 [n, T] padded with 0 to the longest caption, and their lengths int64 [n].
    """
    lengths = torch.from_numpy(caption_lengths(num_captions))
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(1, SOT_ID, (num_captions, int(lengths.max())), generator=generator)
    token_ids[:, 0] = SOT_ID
    token_ids[torch.arange(token_ids.shape[1]) >= lengths[:, None]] = 0
    token_ids[torch.arange(num_captions), lengths - 1] = EOT_ID
    return token_ids, lengths


def make_batch(num_samples: int, image_size: int, *, views: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A micro-batch as our loader makes it, with `views` views of images and of captions.

    With two views the first captions are masked for masked language modelling.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = [make_captions(num_samples, seed + view) for view in range(views)]
    batch = {
        "images": torch.randint(
            256, (views, num_samples, 3, image_size, image_size), dtype=torch.uint8, generator=generator
        ),
        "token_ids": torch.stack([token_ids for token_ids, _ in captions]),
        "text_lengths": torch.stack([lengths for _, lengths in captions]),
        "view_keys": torch.randint(2**62, (views, num_samples), generator=generator),
    }
    if views > 1:
        words = (batch["token_ids"][0] > 0) & (batch["token_ids"][0] < SOT_ID)
        candidates = words.flatten().nonzero().flatten()
        order = torch.randperm(len(candidates), generator=generator)
        batch["mlm_index"] = candidates[order[: round(MASKED_SHARE * len(candidates))]].sort().values
        batch["mlm_targets"] = batch["token_ids"][0].flatten()[batch["mlm_index"]]
        batch["token_ids"][0].view(-1)[batch["mlm_index"]] = MASK_ID
    return batch


def split_batch(batch: dict[str, Tensor], micro_batch_size: int) -> list[dict[str, Tensor]]:
    """A batch without masked captions as micro-batches, each cut to its own longest caption as by our loader."""
    columns = {name: tensor.split(micro_batch_size, dim=1) for name, tensor in batch.items()}
    micro_batches = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    for micro_batch in micro_batches:
        longest = int(micro_batch["text_lengths"].max())
        micro_batch["token_ids"] = micro_batch["token_ids"][:, :, :longest]
    return micro_batches


def peer_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first views of a batch as open_clip's loader hands them over: normalised images, ids padded to the context.

    Returns:
        images float32 [n, 3, H, W] and token_ids int64 [n, 77].
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    token_ids = batch["token_ids"][0]
    padded = F.pad(token_ids, (0, CONTEXT_LENGTH - token_ids.shape[1]))
    return (batch["images"][0] / 255 - mean) / std, padded


def make_model(architecture: str, *, patch_dropout: float = 0.0) -> ClipModel:
    """Our model in training mode; the weights depend on the name only."""
    torch.manual_seed(0)
    return build_model(architecture, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, patch_dropout=patch_dropout)


def make_method(name: str, model: ClipModel, **settings: Any) -> Method:
    """One of our training methods around a model."""
    _, settings = parse_method({"name": name, **settings})
    return METHODS[name](model, settings, None).train()


def make_peer(model: ClipModel, architecture: str, *, patch_dropout: float = 0.0) -> nn.Module:
    """open_clip's model of the same sizes with the weights of ours, in training mode."""
    from open_clip.model import CLIP

    sizes = ARCHITECTURES[architecture]
    vision = {
        "image_size": sizes.image_size,
        "layers": sizes.image.layers,
        "width": sizes.image.width,
        "patch_size": sizes.image.patch_size,
        "patch_dropout": patch_dropout,
    }
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "width": sizes.text.width,
        "heads": sizes.text.width // HEAD_WIDTH,
        "layers": sizes.text.layers,
    }
    peer = CLIP(sizes.embed_dim, vision, text, quick_gelu=True)
    peer.load_state_dict(to_open_clip(model.state_dict()))
    return peer.train()
