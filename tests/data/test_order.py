"""The global order: exactly once, independent of everything but the seed, and exact mixtures."""

import math
from fractions import Fraction

import numpy as np
import pytest

from data.errors import DataError
from data.order import GlobalOrder, OrderSource, auto_lanes


def make_order(counts, batch, **options):
    options.setdefault("seed", 3)
    return GlobalOrder([OrderSource("train", np.array(counts))], global_batch_size=batch, **options)


def stream(order, steps, first=0):
    plans = [order.batch(step) for step in range(first, steps)]
    return (
        np.concatenate([plan.source for plan in plans]),
        np.concatenate([plan.epoch for plan in plans]),
        np.concatenate([plan.sample for plan in plans]),
    )


@pytest.mark.parametrize("counts", [[1], [5], [7, 1, 3], [40] * 8, [3, 0, 9, 0, 1], [11, 29, 17, 2, 31, 5, 1]])
@pytest.mark.parametrize("batch", [1, 4, 12, 64])
@pytest.mark.parametrize("window", [1, 2, 7, 10_000])
@pytest.mark.parametrize("lanes", ["auto", 1, "batch"])
def test_every_sample_exactly_once_per_epoch(counts, batch, window, lanes):
    order = make_order(counts, batch, lanes=batch if lanes == "batch" else lanes, shuffle_window=window)
    total = sum(counts)
    epochs = 3
    steps = -(-epochs * total // batch)
    _, epoch, sample = stream(order, steps)
    for number in range(epochs):
        assert sorted(sample[epoch == number]) == list(range(total))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rank_slices_are_the_global_batch(world_size):
    order = make_order([13, 50, 8, 29], 16, shuffle_window=9)
    for step in (0, 3, 6, 7, 41):
        whole = order.batch(step)
        parts = [order.rank_slice(step, rank, world_size) for rank in range(world_size)]
        for field in ("source", "epoch", "sample", "slot"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(joined, getattr(whole, field))


def test_any_step_alone_equals_the_straight_run():
    straight = make_order([100, 30, 71], 24, shuffle_window=16)
    expected = [straight.batch(step).sample for step in range(30)]
    for step in reversed(range(30)):
        fresh = make_order([100, 30, 71], 24, shuffle_window=16)
        assert np.array_equal(fresh.slots(step, 5, 19).sample, expected[step][5:19])


def reference_epoch(order, counts, epoch):
    """Samples of an epoch by position, from the definition of lanes and windows, shard order taken from the order."""
    source = order._orders[0]
    permutation, _ = source._shards_of_epoch(epoch)
    starts = np.concatenate(([0], np.cumsum(counts)))
    line = [sample for shard in permutation for sample in range(starts[shard], starts[shard + 1])]
    lanes, base = [], 0
    for lane in range(source.lanes):
        length = len(line) // source.lanes + (lane < len(line) % source.lanes)
        lanes.append(line[base : base + length])
        base += length
    return lanes


def test_samples_stay_in_their_lane_and_window():
    counts, window = [40, 13, 25, 60, 30], 8
    order = make_order(counts, 12, lanes=4, shuffle_window=window)
    total = sum(counts)
    for epoch in range(2):
        lanes = reference_epoch(order, counts, epoch)
        got, sample = order._orders[0].samples(np.arange(epoch * total, (epoch + 1) * total))
        assert (got == epoch).all()
        for position in range(total):
            lane, place = position % 4, position // 4
            start = place // window * window
            assert sample[position] in lanes[lane][start : start + window]


def test_batch_is_lane_major():
    order = make_order([64] * 8, 32, lanes=8, shuffle_window=1)
    lanes = reference_epoch(order, [64] * 8, 0)
    batch = order.batch(2).sample
    for lane in range(8):
        assert list(batch[4 * lane : 4 * lane + 4]) == lanes[lane][8:12]


def test_shuffle_depends_on_seed_epoch_and_name_and_mixes():
    counts = [500] * 4
    first = stream(make_order(counts, 100), 20)[2]
    assert not np.array_equal(first, stream(make_order(counts, 100, seed=4), 20)[2])
    assert not np.array_equal(first, stream(make_order(counts, 100), 40, first=20)[2])
    renamed = GlobalOrder([OrderSource("other", np.array(counts))], seed=3, global_batch_size=100)
    assert not np.array_equal(first, stream(renamed, 20)[2])
    assert np.array_equal(first, stream(make_order(counts, 100), 20)[2])
    # Neighbours in the data set are not neighbours in the order more often than chance (1999 pairs, p = 1/500).
    assert (np.diff(stream(make_order([2000], 100), 20)[2]) == 1).sum() < 20


def test_every_epoch_lane_and_window_has_its_own_shuffle():
    # One shard, so that nothing but the windows is random: lane, window and epoch must each matter.
    order = make_order([800], 2, lanes=2, shuffle_window=100)
    sample = stream(order, 800)[2]
    shuffles = {tuple(block % 100) for lane in range(2) for block in sample[lane::2].reshape(8, 100)}
    assert len(shuffles) == 16


WEIGHTS = [0.7, "1/3", 0.1, 2]


def test_mixture_counts_follow_the_formula():
    batch = 100
    sources = [OrderSource(f"s{i}", np.array([50, 60]), weight) for i, weight in enumerate(WEIGHTS)]
    order = GlobalOrder(sources, seed=0, global_batch_size=batch)
    exact = [Fraction(str(weight)) for weight in WEIGHTS]
    shares = [weight / sum(exact) for weight in exact]
    previous = order.samples_seen(0)
    assert set(previous.values()) == {0}
    for step in range(10_000):
        seen = order.samples_seen(step + 1)
        taken = [seen[f"s{i}"] - previous[f"s{i}"] for i in range(4)]
        for i in range(3):
            assert taken[i] == math.floor((step + 1) * shares[i] * batch) - math.floor(step * shares[i] * batch)
        assert taken[3] == batch - sum(taken[:3]) >= 0
        previous = seen
        if step % 2500 == 0:
            assert np.array_equal(np.bincount(order.batch(step).source, minlength=4), taken)
    assert [abs(previous[f"s{i}"] - 1_000_000 * share) < 4 for i, share in enumerate(shares)] == [True] * 4


def test_mixture_sources_have_their_own_epochs_and_every_rank_its_share():
    sources = [OrderSource("small", np.array([30]), 1), OrderSource("large", np.array([500, 400]), 3)]
    order = GlobalOrder(sources, seed=1, global_batch_size=64)
    source, epoch, sample = stream(order, 60)
    for number, size in enumerate((30, 900)):
        mine = source == number
        for whole in range(int(epoch[mine].max())):
            assert sorted(sample[mine & (epoch == whole)]) == list(range(size))
    for rank in range(4):
        assert np.bincount(order.rank_slice(5, rank, 4).source).tolist() == [4, 12]


def test_auto_lanes():
    assert auto_lanes(4096, 10_000) == 1024
    assert auto_lanes(4096, 100) == 64
    assert auto_lanes(96, 7) == 6
    assert auto_lanes(7, 100) == 7
    assert auto_lanes(64, 1) == 1


def test_a_hundred_thousand_shards_and_late_steps():
    order = make_order(np.full(100_000, 10_000), 32_768)
    plan = order.rank_slice(10**7, 3, 64)
    assert len(np.unique(plan.sample)) == 512
    assert plan.sample.max() < 10**9
    assert plan.epoch[0] == 10**7 * 32_768 // 10**9


def test_fingerprint_changes_with_what_the_order_depends_on():
    base = make_order([10, 20], 8)
    assert base.fingerprint == make_order([10, 20], 8).fingerprint
    others = [
        make_order([20, 10], 8),
        make_order([10, 20], 4),
        make_order([10, 20], 8, seed=9),
        make_order([10, 20], 8, lanes=1),
        make_order([10, 20], 8, shuffle_window=5),
    ]
    assert len({order.fingerprint for order in others} | {base.fingerprint}) == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_order([0], 4), "no samples"),
        (lambda: make_order([4], 0), "global_batch_size"),
        (lambda: make_order([4], 4, lanes=3), "divisor"),
        (lambda: make_order([4], 4, shuffle_window=0), "shuffle_window"),
        (lambda: make_order([4], 4).rank_slice(0, 0, 3), "not a multiple"),
        (lambda: GlobalOrder([], seed=0, global_batch_size=4), "no data sources"),
        (lambda: GlobalOrder([OrderSource("a", np.array([1]), -1)], seed=0, global_batch_size=4), "above 0"),
        (lambda: GlobalOrder([OrderSource("a", np.array([1]))] * 2, seed=0, global_batch_size=4), "differ"),
        (
            lambda: GlobalOrder([OrderSource(str(i), np.array([1])) for i in range(9)], seed=0, global_batch_size=4),
            "do not fit",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(call, words):
    with pytest.raises(DataError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
