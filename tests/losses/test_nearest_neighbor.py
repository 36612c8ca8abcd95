"""The neighbour queue: order, search, faults, saving; and its identity across ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import (
    NearestNeighborQueue,
    contrastive_terms,
    neighbour_statistics,
    normalize,
    reshard_queue_states,
)
from tests.distributed import run_distributed
from tests.losses.reference import ListQueue


def draw(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def filled_queue(size: int, dim: int, rows: int, **options: Any) -> NearestNeighborQueue:
    queue = NearestNeighborQueue(size, dim, **options)
    queue.enqueue(draw(1, rows, dim, seed=7))
    return queue


@pytest.mark.parametrize("block", [1, 4, 10, 13, 27])
def test_first_in_first_out(block: int) -> None:
    queue, reference = NearestNeighborQueue(10, 3), ListQueue(10)
    for step in range(8):
        rows = draw(1, block, 3, seed=step)
        queue.enqueue(rows)
        reference.enqueue(rows[0])
        assert queue.pointer == reference.pointer
        assert queue.filled == min(10, block * (step + 1))
        assert list(map(tuple, queue.rows_by_age().tolist())) == reference.rows


def test_views_are_enqueued_last_view_first() -> None:
    views = draw(2, 3, 4)
    queue = NearestNeighborQueue(8, 4)
    queue.enqueue(views)
    assert torch.equal(queue.rows_by_age(), torch.cat([views[1], views[0]]))
    original = NearestNeighborQueue(8, 4, enqueue_views="orig")
    original.enqueue(views)
    assert torch.equal(original.rows_by_age(), views[0])


def test_planted_neighbours_are_found() -> None:
    angle = math.radians(10)
    queries = torch.eye(6, 12)
    rotated = math.cos(angle) * queries + math.sin(angle) * torch.eye(6, 12).roll(6, dims=1)
    far = -draw(20, 12).abs()
    order = torch.randperm(26, generator=torch.Generator().manual_seed(0))
    queue = NearestNeighborQueue(40, 12)
    queue.enqueue(normalize(torch.cat([rotated, far]))[None, order])
    slots, cosine = queue.search(queries.view(2, 3, 12))
    assert slots.shape == cosine.shape == (2, 3)
    assert slots.dtype == torch.int64
    assert torch.equal(slots.flatten(), order.argsort()[:6])
    assert cosine.mean().item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_search_in_chunks_takes_the_lowest_of_equal_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(5, 8).repeat(6, 1)
    queue = NearestNeighborQueue(64, 8)
    queue.enqueue(rows[None])
    queries = rows[None, [3, 0, 4, 1]].double()
    for chunk_rows in (1, 2, 7, 64):
        monkeypatch.setattr("losses.nearest_neighbor._SEARCH_CHUNK_BYTES", 4 * 4 * chunk_rows)
        slots, cosine = queue.search(queries)
        assert slots.tolist() == [[3, 0, 4, 1]]
        assert cosine.dtype == torch.float32


def test_unfilled_slots_are_never_found() -> None:
    queue = NearestNeighborQueue(32, 4)
    queue.enqueue(draw(1, 3, 4).abs())
    # An empty slot's zero vector would be nearer to these queries than any stored row.
    slots, cosine = queue.search(-draw(1, 5, 4, seed=1).abs())
    assert slots.max() < 3
    assert (cosine < 0).all()


def test_warmup() -> None:
    skip = NearestNeighborQueue(16, 4)
    assert not skip.ready
    with pytest.raises(ValueError, match="empty queue"):
        skip.search(draw(1, 2, 4))
    skip.enqueue(draw(1, 2, 4))
    assert skip.ready

    random = NearestNeighborQueue(16, 4, warmup="random", seed=5)
    assert random.ready
    assert random.filled == 0
    torch.testing.assert_close(random.rows.norm(dim=1), torch.ones(16))
    assert torch.equal(random.search(random.rows[None])[0][0], torch.arange(16))
    assert torch.equal(random.rows, NearestNeighborQueue(16, 4, warmup="random", seed=5).rows)
    assert not torch.equal(random.rows, NearestNeighborQueue(16, 4, warmup="random", seed=6).rows)


def test_no_self_match_in_a_step_but_in_the_next() -> None:
    queue = filled_queue(64, 8, rows=10)
    views = draw(2, 5, 8, seed=1)
    assert queue.search(views)[1].max() < 0.999
    queue.enqueue(views)
    slots, cosine = queue.search(views)
    torch.testing.assert_close(cosine, torch.ones(2, 5))
    assert torch.equal(slots, torch.stack([torch.arange(15, 20), torch.arange(10, 15)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_refuses_the_block(bad: float) -> None:
    queue = filled_queue(16, 4, rows=10)
    before, rows = queue.content_hash(), draw(2, 3, 4)
    rows[1, 2, 0] = bad
    assert not queue.enqueue(rows)
    assert queue.skipped_blocks == 1
    assert queue.content_hash() == before
    assert queue.enqueue(draw(2, 3, 4))
    assert queue.content_hash() != before


def test_slots_of_a_refused_block_are_never_found(tmp_path: Any) -> None:
    queue = NearestNeighborQueue(32, 4)
    bad = torch.full((1, 5, 4), math.nan)
    queue.enqueue(bad)
    # The device alone knows that nothing was stored; the term then rests on a zero row, which has no gradient.
    assert queue.ready
    slots, cosine = queue.search(draw(1, 2, 4))
    assert slots.tolist() == [[0, 0]]
    assert cosine.tolist() == [[-math.inf, -math.inf]]
    assert torch.count_nonzero(queue.rows) == 0
    queue.enqueue(draw(1, 3, 4).abs())
    queue.enqueue(bad)
    assert (queue.pointer, queue.filled, queue.skipped_blocks) == (3, 3, 2)
    restored = NearestNeighborQueue(32, 4)
    torch.save(queue.state(), tmp_path / "queue.pt")
    restored.load_state(torch.load(tmp_path / "queue.pt", weights_only=True))
    for one in (queue, restored):
        slots, cosine = one.search(-draw(1, 5, 4, seed=1).abs())
        assert slots.max() < 3
        assert (cosine < 0).all()
    assert restored.skipped_blocks == 2


def test_searching_and_evaluating_change_nothing() -> None:
    queue = filled_queue(16, 4, rows=10)
    before = queue.content_hash()
    images, texts = draw(1, 3, 4).requires_grad_(), draw(1, 3, 4, seed=2).requires_grad_()
    scale = torch.tensor([10.0], requires_grad=True)
    for _ in range(2):
        slots, _ = queue.search(texts)
        terms = contrastive_terms(images, texts, scale, queue_rows=queue.rows, neighbour_slots=slots)
        terms.nns.sum().backward()
    assert queue.content_hash() == before
    assert texts.grad is None or torch.count_nonzero(texts.grad) == 0
    assert torch.count_nonzero(images.grad)
    assert torch.count_nonzero(scale.grad)


def test_hash_sees_rows_pointer_and_filled() -> None:
    queue = filled_queue(16, 4, rows=10)
    digests = {queue.content_hash()}
    queue.counters[0] += 1
    digests.add(queue.content_hash())
    queue.counters[1] += 1
    digests.add(queue.content_hash())
    queue.rows[3, 2] += 1e-6
    digests.add(queue.content_hash())
    assert len(digests) == 4


def test_rows_stay_float32_and_out_of_the_state_dict() -> None:
    queue = filled_queue(16, 4, rows=10)
    before = queue.content_hash()
    assert torch.nn.Sequential(queue).bfloat16()[0].rows.dtype == torch.float32
    assert queue.half().double().content_hash() == before
    assert queue.state_dict() == {}
    queue.enqueue(draw(1, 2, 4).bfloat16())
    assert queue.rows.dtype == torch.float32
    assert queue.to("meta").rows.device.type == "meta"


@pytest.mark.parametrize("rows", [0, 7, 16, 41])
def test_save_and_load_is_exact(rows: int, tmp_path: Any) -> None:
    queue = NearestNeighborQueue(16, 4, warmup="random")
    if rows:
        queue.enqueue(draw(1, rows, 4))
    torch.save(queue.state(), tmp_path / "queue.pt")
    queue_state = torch.load(tmp_path / "queue.pt", weights_only=True)
    restored = NearestNeighborQueue(16, 4, warmup="random", seed=9)
    restored.load_state(queue_state)
    assert restored.content_hash() == queue.content_hash()
    for one in (queue, restored):
        one.enqueue(draw(2, 6, 4, seed=3))
    assert restored.content_hash() == queue.content_hash()
    assert not torch.equal(queue_state["rows"], queue.rows)


@pytest.mark.parametrize("new_size", [5, 12, 40])
@pytest.mark.parametrize("rows", [3, 16, 41])
def test_another_size_keeps_the_newest_rows(rows: int, new_size: int) -> None:
    queue = filled_queue(16, 4, rows=rows)
    resized = NearestNeighborQueue(new_size, 4)
    resized.load_state(queue.state())
    kept = min(new_size, queue.filled)
    assert resized.filled == kept
    assert torch.equal(resized.rows_by_age(), queue.rows_by_age()[queue.filled - kept :])
    resized.enqueue(draw(1, 2, 4, seed=1))
    assert torch.equal(resized.rows_by_age()[-2:], draw(1, 2, 4, seed=1)[0])


def test_mistakes_are_refused() -> None:
    queue = filled_queue(16, 4, rows=3)
    with pytest.raises(ValueError, match="needs width 5"):
        NearestNeighborQueue(16, 5).load_state(queue.state())
    with pytest.raises(ValueError, match=r"expected \[K, B, 4\]"):
        queue.enqueue(draw(3, 4))
    with pytest.raises(ValueError, match="at least 1"):
        NearestNeighborQueue(0, 4)
    with pytest.raises(ValueError, match="warmup"):
        NearestNeighborQueue(4, 4, warmup="none")
    with pytest.raises(ValueError, match="enqueue_views"):
        NearestNeighborQueue(4, 4, enqueue_views="all")


def test_local_queues_are_dealt_to_other_ranks_by_age() -> None:
    def shard(ages: list[int], size: int) -> dict[str, Any]:
        queue = NearestNeighborQueue(size, 1)
        queue.enqueue(torch.tensor(ages, dtype=torch.float32).view(1, -1, 1))
        return queue.state()

    def values(state: dict[str, Any]) -> list[float]:
        queue = NearestNeighborQueue(3, 1)
        queue.load_state(state)
        return queue.rows_by_age().flatten().tolist()

    states = [shard([13, 12, 11, 10], 3), shard([21, 20], 3)]
    # By age the rows are 10, 20, 11, 21, 12.
    assert [values(state) for state in reshard_queue_states(states, 1)] == [[11, 20, 10]]
    assert [values(state) for state in reshard_queue_states(states, 2)] == [[12, 11, 10], [21, 20]]
    assert [values(state) for state in reshard_queue_states(states, 6)] == [[10], [20], [11], [21], [12], []]


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_resharded_queues_start_from_random_rows_where_nothing_was_stored(rows: int) -> None:
    saved = [filled_queue(4, 6, rows, warmup="random").state() for _ in range(2)]
    for state in reshard_queue_states(saved, 3):
        queue = NearestNeighborQueue(4, 6, warmup="random", seed=3)
        start = queue.rows.clone()
        queue.load_state(state)
        assert queue.filled == state["filled"] == len(state["rows"])
        assert torch.equal(queue.rows[queue.filled :], start[queue.filled :])
        torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(4))


def test_identities_tell_own_rows_from_those_all_ranks_start_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(2):
        monkeypatch.setattr("losses.nearest_neighbor.rank", lambda rank=rank: rank)
        queue = filled_queue(8, 4, 3, warmup="random")
        found.append(queue.identities(torch.arange(8)))
    assert torch.equal(found[0][3:], found[1][3:])
    assert len(torch.cat([found[0], found[1][:3]]).unique()) == 11


def test_a_restarted_queue_is_a_new_one() -> None:
    for warmup in ("skip", "random"):
        queue = filled_queue(16, 4, 10, warmup=warmup)
        queue.restart(7)
        new = NearestNeighborQueue(16, 4, warmup=warmup, seed=7)
        assert queue.content_hash() == new.content_hash()
        assert queue.ready == new.ready


def test_statistics() -> None:
    slots = torch.tensor([[0, 1, 2, 3], [5, 5, 5, 6]])
    statistics = neighbour_statistics(slots, torch.tensor([[1.0, 0.5], [0.0, 0.5]]))
    assert statistics == {"distinct_ratio": pytest.approx(0.75), "mean_cosine": pytest.approx(0.5)}


def train_queue(rank: int, world_size: int, communication_dtype: torch.dtype | None) -> NearestNeighborQueue:
    """Four steps on a global batch that does not depend on the number of ranks."""
    queue = NearestNeighborQueue(30, 8)
    rows = 8 // world_size
    own = slice(rank * rows, (rank + 1) * rows)
    for step in range(4):
        images, texts = draw(2, 8, 8, seed=step)[:, own], draw(2, 8, 8, seed=100 + step)[:, own]
        slots = queue.search(texts)[0] if queue.ready else None
        terms = contrastive_terms(
            images,
            texts,
            torch.tensor([10.0]),
            queue_rows=None if slots is None else queue.rows,
            neighbour_slots=slots,
            communication_dtype=communication_dtype,
        )
        queue.enqueue(terms.gathered_text)
    return queue


def check_replicas(rank: int, world_size: int, saved: dict[str, Any]) -> dict[str, Any]:
    exact = train_queue(rank, world_size, None)
    rounded = train_queue(rank, world_size, torch.bfloat16)
    results: dict[str, Any] = {
        "hashes": (exact.content_hash(), rounded.content_hash()),
        "rows": exact.rows,
        "agree": exact.replicas_agree() and rounded.replicas_agree(),
    }
    texts = draw(2, 3, 8, seed=rank)
    if rank == world_size - 1:
        texts[0, 1, 2] = math.nan
    terms = contrastive_terms(texts, texts, torch.tensor([10.0]), extra_sums=None)
    results["refused"] = not rounded.enqueue(terms.gathered_text)
    results["skipped"] = rounded.skipped_blocks
    results["agree after a bad block"] = rounded.replicas_agree()
    if rank == 1:
        rounded.rows[4, 0] += 1e-7
    results["agree after poison"] = rounded.replicas_agree()

    resumed = NearestNeighborQueue(30, 8)
    resumed.load_state(saved)
    results["resumed"] = (resumed.content_hash(), resumed.replicas_agree())
    return results


def test_replicas_are_identical_on_all_ranks() -> None:
    single = train_queue(0, 1, None)
    by_rank = run_distributed(check_replicas, 2, single.state())
    for result in by_rank:
        assert result["hashes"] == by_rank[0]["hashes"]
        assert result["agree"]
        assert result["refused"]
        assert result["skipped"] == 1
        assert result["agree after a bad block"]
        assert not result["agree after poison"]
        assert result["resumed"] == (single.content_hash(), True)
        torch.testing.assert_close(result["rows"], single.rows, atol=1e-6, rtol=0)
    assert by_rank[0]["hashes"][0] != by_rank[0]["hashes"][1]
    assert single.replicas_agree()
