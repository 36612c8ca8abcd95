"""How saved state is cut up: every ZeRO layout is an index map onto one vector per parameter group.

A group's vector is its parameters, flattened and joined in the optimizer's order. ZeRO 0 keeps it whole, ZeRO 1 and 2
cut it into one partition per rank, ZeRO 3 cuts each parameter on its own. Moving state from one layout to another is
then the intersection of two lists of runs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Run(NamedTuple):
    """`length` elements that lie at `begin` of the group's vector and at `offset` of what a rank holds of it."""

    begin: int
    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """What a checkpoint, or an engine, holds and how it is cut up.

    Attributes:
        stage: ZeRO stage.
        world_size: Number of ranks.
        optimizer: Family of the optimizer (`trainer.engine.optimizer.optimizer_family`).
        parameter_names: Trained parameters by group, in the optimizer's order.
        parameter_shapes: Their whole shapes.
        frozen_shapes: Whole shapes of the parameters that are not trained.
        partition_sizes: Elements of each group on one rank, padding included; ZeRO 1 and 2 only.
    """

    stage: int
    world_size: int
    optimizer: str
    parameter_names: list[list[str]]
    parameter_shapes: dict[str, tuple[int, ...]]
    frozen_shapes: dict[str, tuple[int, ...]]
    partition_sizes: list[int]

    def group_sizes(self, group: int) -> list[int]:
        """Element counts of the group's parameters, in order."""
        return [math.prod(self.parameter_shapes[name]) for name in self.parameter_names[group]]

    def shares(self, group: int) -> list[int]:
        """ZeRO 3: elements of each parameter on one rank, padding included."""
        return [-(-size // self.world_size) for size in self.group_sizes(group)]

    def runs(self, group: int, rank: int) -> list[Run]:
        """What `rank` holds of the group's vector, in order; padding is in no run."""
        sizes = self.group_sizes(group)
        if self.stage == 0:
            return [Run(0, 0, sum(sizes))]
        if self.stage < 3:
            partition = self.partition_sizes[group]
            begin = rank * partition
            return _non_empty([Run(begin, 0, min(partition, sum(sizes) - begin))])
        found, begin, offset = [], 0, 0
        for size, share in zip(sizes, self.shares(group), strict=True):
            found.append(Run(begin + rank * share, offset, min(share, size - rank * share)))
            begin += size
            offset += share
        return _non_empty(found)

    @property
    def num_shards(self) -> int:
        """Number of optimizer state files."""
        return self.world_size if self.stage else 1


def overlaps(left: list[Run], right: list[Run]) -> Iterator[tuple[int, int, int]]:
    """Where two holdings of the same vector meet: (offset in left, offset in right, length), in order."""
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = left[i], right[j]
        begin, end = max(a.begin, b.begin), min(a.begin + a.length, b.begin + b.length)
        if begin < end:
            yield a.offset + begin - a.begin, b.offset + begin - b.begin, end - begin
        if a.begin + a.length <= b.begin + b.length:
            i += 1
        else:
            j += 1


def _non_empty(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.length > 0]
