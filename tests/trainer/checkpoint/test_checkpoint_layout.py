"""Runs of every layout cover each element once, and state moves between any two layouts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.layout import Layout, overlaps
from trainer.checkpoint.shards import Joined

SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=7)
CUT = st.tuples(st.sampled_from([0, 1, 2, 3]), st.integers(1, 6), st.integers(1, 4))


def make_layout(sizes: list[int], cut: tuple[int, int, int]) -> Layout:
    stage, world_size, alignment = cut
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    # As DeepSpeed pads: the group's size, rounded up to a multiple of alignment x ranks.
    unit = alignment * world_size
    partition = -(-sum(sizes) // unit) * unit // world_size
    return Layout(stage, world_size, "adam", [list(shapes)], shapes, {}, [partition])


def cut_up(vector: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """What each rank holds, padding NaN; written out for each stage, without `runs`."""
    ranks = layout.num_shards
    if layout.stage == 0:
        return [vector.clone()]
    if layout.stage < 3:
        padded = torch.full((ranks * layout.partition_sizes[0],), torch.nan)
        padded[: vector.numel()] = vector
        return list(padded.chunk(ranks))
    held: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for parameter in vector.split(layout.group_sizes(0)):
        share = -(-parameter.numel() // ranks)
        padded = torch.full((ranks * share,), torch.nan)
        padded[: parameter.numel()] = parameter
        for rank, piece in enumerate(padded.split(share)):
            held[rank].append(piece)
    return [torch.cat(pieces) for pieces in held]


@settings(max_examples=200, deadline=None)
@given(SIZES, CUT, CUT, st.integers(1, 9))
def test_state_moves_between_any_two_layouts(sizes, old_cut, new_cut, tear):
    vector = torch.arange(1.0, sum(sizes) + 1)
    old, new = make_layout(sizes, old_cut), make_layout(sizes, new_cut)
    shards = cut_up(vector, old)
    for rank, expected in enumerate(cut_up(vector, new)):
        # Torn into tensors that follow each other, as sub-groups and single parameters are.
        local = torch.full_like(expected, torch.nan)
        target = Joined(list(local.split(tear)))
        for shard, content in enumerate(shards):
            for source_offset, offset, length in overlaps(old.runs(0, shard), new.runs(0, rank)):
                Joined(list(content.split(tear + 1))).copy_to(target, source_offset, offset, length)
        assert torch.equal(local.nan_to_num(-1), expected.nan_to_num(-1))


def test_in_the_same_layout_a_rank_needs_its_own_shard_only():
    for stage in (1, 2, 3):
        layout = make_layout([9, 30, 1, 17], (stage, 4, 2))
        for rank in range(4):
            needed = [s for s in range(4) if next(overlaps(layout.runs(0, s), layout.runs(0, rank)), None)]
            assert needed == [rank]
