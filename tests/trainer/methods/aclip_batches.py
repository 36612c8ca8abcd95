"""Micro-batches for A-CLIP without a loader."""

import torch

SAMPLES, WIDTH = 16, 14
SETTINGS = {"mask_block": 1, "head_hidden_dim": 32, "head_out_dim": 16, "teacher_image_size": 16}


def micro_batch(first: int, last: int) -> dict[str, torch.Tensor]:
    """Samples [first, last) of one fixed global batch: views of 32 pixels in crops of 16."""
    generator = torch.Generator().manual_seed(5)

    def draw(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    images = draw(256, 2, SAMPLES, 3, 32, 32).to(torch.uint8)
    context = draw(256, 1, SAMPLES, 3, 16, 16).to(torch.uint8)
    token_ids = draw(49_000, 1, SAMPLES, WIDTH, low=1)
    lengths = draw(WIDTH + 1, 1, SAMPLES, low=4)
    corners = torch.cat([draw(20, 2, SAMPLES, 2, low=10), draw(90, 2, SAMPLES, 2, low=50)], dim=-1)
    around = torch.cat([draw(10, 1, SAMPLES, 2), draw(120, 1, SAMPLES, 2, low=90)], dim=-1)
    whole = {
        "images": images,
        "context_images": context,
        "crop_boxes": torch.cat([around, corners]),
        "token_ids": token_ids,
        "text_lengths": lengths,
    }
    return {name: tensor[:, first:last].clone() for name, tensor in whole.items()}
