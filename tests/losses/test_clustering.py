"""K-Means over ranks, clusters of an episode, back-translation."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import losses.clustering
import losses.episode
from losses import Clusters, EpisodeFeatures, cluster_episode, kmeans
from losses.clustering import ClusterSums, nearest
from losses.episode import EXTERNAL, IMAGE, TEXT
from losses.row_store import RowStore
from tests.distributed import recorded_collectives, run_distributed

SIZE, FIRST, CLUSTERS = 240, 480, 12
CPU = torch.device("cpu")


def unit_rows(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def fit(rows: Tensor, clusters: int, **options):
    return kmeans(rows, torch.arange(len(rows)), len(rows), clusters, **options)


def blobs(count: int, each: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count * each, 16, generator=torch.Generator().manual_seed(seed + 1))
    return unit_rows(count, 16, seed).repeat_interleave(each, 0) + 0.01 * noise


def test_separated_blobs_are_recovered():
    rows = blobs(4, 30)
    found = fit(rows, 4, restarts=10)
    labels = nearest(rows, found.centroids)[0].view(4, 30)
    assert (labels == labels[:, :1]).all()
    assert sorted(labels[:, 0].tolist()) == [0, 1, 2, 3]
    expected = rows.view(4, 30, 16).double().mean(1)
    torch.testing.assert_close(found.centroids[labels[:, 0]].double(), expected, atol=1e-7, rtol=0)
    # The best of several starts, which alone may end in a poor place.
    alone = [fit(rows, 4, seed=seed).objectives[-1] for seed in range(10)]
    assert found.objectives[-1] == min(alone) < max(alone)


def test_extremes():
    rows = unit_rows(50, 8)
    assert nearest(rows, fit(rows, 50).centroids)[1].max() < 1e-6
    torch.testing.assert_close(fit(rows, 1).centroids[0], rows.mean(0), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="50 rows for 51 clusters"):
        fit(rows, 51)


def test_the_objective_never_rises_and_no_cluster_stays_empty():
    rows = unit_rows(600, 8)
    objectives = fit(rows, 60, iterations=25).objectives
    assert len(objectives) == 25
    assert all(later <= earlier for earlier, later in itertools.pairwise(objectives))
    assert objectives[-1] < 0.8 * objectives[0]
    # Half of the rows are one point, so half of the initial centroids coincide, and all but one of them are empty.
    rows[:300] = rows[0]
    labels = nearest(rows, fit(rows, 60, iterations=25).centroids)[0]
    assert len(labels.unique()) == 60


def test_search_without_faiss_for_the_device_finds_the_same(monkeypatch):
    rows, centroids = unit_rows(100, 8), unit_rows(7, 8, seed=1)
    labels, distances = nearest(rows, centroids)
    exact = torch.cdist(rows.double(), centroids.double()).square().min(dim=1)
    assert torch.equal(labels, exact.indices)
    torch.testing.assert_close(distances.double(), exact.values, atol=1e-6, rtol=0)
    monkeypatch.setattr(losses.clustering, "_faiss_search", lambda device: None)
    monkeypatch.setattr(losses.clustering, "_SEARCH_CHUNK_BYTES", 4 * 7 * 9)
    other_labels, other_distances = nearest(rows, centroids)
    assert torch.equal(other_labels, labels)
    torch.testing.assert_close(other_distances, distances, atol=1e-6, rtol=0)
    assert nearest(rows[:0], centroids)[0].shape == (0,)


def test_sums_do_not_depend_on_the_order(monkeypatch):
    rows, labels = unit_rows(500, 8), torch.arange(500) % 7
    results = []
    for order in (torch.arange(500), torch.randperm(500, generator=torch.Generator().manual_seed(3))):
        sums = ClusterSums(8, 8, CPU)
        sums.add(rows[order], labels[order], rows[order, 0].square())
        results.append(sums.means())
        monkeypatch.setattr(losses.clustering, "_SUM_CHUNK_ROWS", 17)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][2].item() == pytest.approx(rows[:, 0].double().square().sum().item(), rel=1e-6)
    assert torch.equal(results[0][0][7], torch.zeros(8))
    torch.testing.assert_close(results[0][0][2], rows[labels == 2].mean(0), atol=1e-7, rtol=0)


def test_back_translation_known_answer():
    sums = ClusterSums(3, 2, CPU)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    sums.add(rows, torch.tensor([0, 0, 1, 1]), torch.empty(0))
    table, counts, _ = sums.means()
    assert table.tolist() == [[0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]
    assert torch.equal((table * counts.unsqueeze(1)).sum(0), rows.sum(0))


def episode(rank: int, world_size: int, *, bad: int = 0, memory_bytes: int = 1 << 30, **options) -> Clusters:
    """Clusters of an episode whose rows a rank holds as in training: its slots of each global batch of 24."""
    external = unit_rows(SIZE, 4, seed=3)
    image, text = blobs(CLUSTERS, SIZE // CLUSTERS), blobs(CLUSTERS, SIZE // CLUSTERS, seed=5).flip(0)
    image[:bad] = torch.nan
    features = EpisodeFeatures(SIZE // world_size, [16, 16, 4], memory_bytes)
    share = 24 // world_size
    for begin in range(0, SIZE, 24):
        local = torch.arange(begin + rank * share, begin + (rank + 1) * share)
        # As in a shuffled data set, neighbours in order have nothing in common.
        sample = local * 77 % SIZE
        features.append([image[sample], text[sample], external[sample]], FIRST + local)
    settings = {"iterations": 8, "restarts": 2, "sample": SIZE, "seed": 5, "back_translation": True} | options
    return cluster_episode(features, FIRST, SIZE, CLUSTERS, device=CPU, **settings)


def episode_on_rank(rank: int, world_size: int) -> list[dict]:
    with recorded_collectives() as records:
        found = episode(rank, world_size, bad=3)
    # One for the initial rows and one an iteration of each start, whatever the number of rows; then labels, tables, ...
    assert len(records) == (3 * 2 * (1 + 8) + 7 if world_size > 1 else 0)
    return [found.state(), episode(rank, world_size, sample=100).state()]


def test_clusters_do_not_depend_on_the_ranks():
    reference = episode_on_rank(0, 1)
    assert (reference[0]["labels"] < 0).sum() == 9
    for world_size in (2, 4):
        for states in run_distributed(episode_on_rank, world_size):
            for state, expected in zip(states, reference, strict=True):
                assert state.keys() == expected.keys()
                for name in ("labels", "counts", "centroids", "tables"):
                    assert torch.equal(state[name], expected[name]), (world_size, name)
                torch.testing.assert_close(state["inertia"], expected["inertia"], rtol=1e-12, atol=0)


def test_an_episode_is_what_it_says():
    found = episode(0, 1)
    assert found.labels.shape == (3, SIZE)
    assert torch.equal(found.counts.sum(1), torch.full((3,), SIZE))
    assert found.left_out == 0
    positions = torch.tensor([FIRST + 5, FIRST, FIRST + SIZE - 1])
    assert torch.equal(found.of(positions), found.labels[:, [5, 0, SIZE - 1]])
    sample = torch.arange(SIZE) * 77 % SIZE
    image = blobs(CLUSTERS, SIZE // CLUSTERS)[sample]
    for table, labels in ((0, found.labels[TEXT]), (2, found.labels[EXTERNAL])):
        means = torch.stack([image[labels == k].double().sum(0) / max(1, (labels == k).sum()) for k in range(CLUSTERS)])
        torch.testing.assert_close(found.tables[table].double(), means, atol=1e-7, rtol=0)
    # Back-translating a modality's own converged clusters gives its centroids.
    own = torch.stack([image[found.labels[IMAGE] == k].mean(0) for k in range(CLUSTERS)])
    torch.testing.assert_close(own, found.centroids[IMAGE], atol=1e-6, rtol=0)
    for other in ({"seed": 6}, {"sample": 100}):
        assert not torch.equal(episode(0, 1, **other).centroids, found.centroids)
    assert len(episode(0, 1, back_translation=False).tables) == 0


def test_state_round_trip_and_hash():
    found = episode(0, 1)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in found.state().items()}
    restored = Clusters.from_state(state, CPU)
    assert restored.content_hash() == found.content_hash() == episode(0, 1).content_hash()
    assert all(torch.is_tensor(value) or isinstance(value, int) for value in found.state().values())
    restored.tables[0, 0, 0] += 1e-6
    assert restored.content_hash() != found.content_hash()


def test_too_few_finite_features_leave_no_clusters():
    found = episode(0, 1, bad=SIZE - CLUSTERS + 1)
    assert found.left_out == SIZE
    assert not found.counts.any()
    assert found.tables.shape == (4, CLUSTERS, 16)


def test_rows_beyond_the_memory_go_to_a_file(monkeypatch):
    monkeypatch.setattr(losses.episode, "_CHUNK_ROWS", 50)
    assert episode(0, 1, memory_bytes=0).content_hash() == episode(0, 1).content_hash()
    mapped, kept = RowStore(10, 3, 10 * 3 * 4 - 1), RowStore(10, 3, 10 * 3 * 4)
    assert (mapped.is_mapped, kept.is_mapped) == (True, False)
    rows = unit_rows(7, 3)
    for store in (mapped, kept):
        store.append(rows[:4])
        store.append(rows[4:].bfloat16())
        assert len(store) == 7
        assert torch.equal(store.rows(2, 99), torch.cat([rows[2:4], rows[4:].bfloat16().float()]))
        assert torch.equal(store.select(torch.tensor([0, 3])), rows[[0, 3]])
    assert isinstance(mapped._rows, np.memmap)
