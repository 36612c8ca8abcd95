"""The train step benchmark on a toy model: FLOPs against closed forms, and captions as described."""

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.processes import Peer, run_inline
from benchmarks.workload import CAPTION_LENGTHS, CONTEXT_LENGTH, caption_lengths, make_batch, split_batch
from models.architectures import ARCHITECTURES

NAME, SAMPLES = "vit_pico_p8_32", 4


def peer_flops_per_sample() -> float:
    """Forward and backward of open_clip's CLIP, from its sizes."""

    def tower(tokens: int, width: int, layers: int) -> int:
        linear = 3 * 2 * 12 * width**2 * tokens
        # A backward through attention computes the scores again: 5 products beside the forward's 2.
        attention = 7 * 2 * tokens**2 * width
        return layers * (linear + attention)

    sizes = ARCHITECTURES[NAME]
    patches = (sizes.image_size // sizes.image.patch_size) ** 2
    # No gradient of pixels.
    embedding = 2 * 2 * patches * 3 * sizes.image.patch_size**2 * sizes.image.width
    projections = 3 * 2 * sizes.embed_dim * (sizes.image.width + sizes.text.width)
    towers = tower(1 + patches, sizes.image.width, sizes.image.layers)
    towers += tower(CONTEXT_LENGTH, sizes.text.width, sizes.text.layers)
    return embedding + towers + projections + 6 * 2 * SAMPLES * sizes.embed_dim


def test_rows_and_flops():
    settings = train_step.Settings(cases=((NAME, SAMPLES),), declip_cases=((NAME, SAMPLES),), repeats=1, rounds=1)
    rows = train_step.run(run_inline, [Peer("open_clip")], settings)
    flops = {(row.case, row.reference): row for row in rows if row.quantity == "FLOPs per sample"}
    clip = flops[f"CLIP {NAME}, b = {SAMPLES}", "open_clip"]
    assert clip.reference_value * 1e9 == pytest.approx(peer_flops_per_sample(), rel=1e-12)
    # 77 positions against 13.5 on average.
    assert clip.ours < 0.4 * clip.reference_value
    declip = flops[f"DeCLIP {NAME}, b = {SAMPLES}", "our CLIP step"]
    assert declip.reference_value == clip.ours
    # Two views of everything, and the heads.
    assert declip.ours > 2 * clip.ours
    assert len({row.quantity for row in rows}) == 5


def test_caption_lengths_follow_the_table():
    table = np.repeat(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()))
    assert len(table) == 1000
    assert table.mean() == pytest.approx(13.5, abs=0.05)
    assert np.percentile(table, 99) == 23
    for size in (8, 16, 256):
        assert caption_lengths(size).mean() == pytest.approx(13.5, abs=0.35)


def test_micro_batches_are_cut_to_their_own_captions():
    batch = make_batch(8, 32)
    micro_batches = split_batch(batch, 2)
    assert len(micro_batches) == 4
    for index, micro_batch in enumerate(micro_batches):
        longest = int(batch["text_lengths"][0, 2 * index : 2 * index + 2].max())
        assert micro_batch["token_ids"].shape == (1, 2, longest)
        assert micro_batch["images"].shape == (1, 2, 3, 32, 32)
        assert (micro_batch["token_ids"][0] != 0).sum(-1).equal(micro_batch["text_lengths"][0])
