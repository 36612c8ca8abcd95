"""The external teacher's file: what is in it, whatever the ranks."""

from unittest import mock

import numpy as np
import pytest
import torch

from data.captions.hf_tokenizer import HfTokenizer
from losses.row_store import RowStore
from models.hf_towers import HfTextTower
from tests.distributed import run_distributed
from tests.models.hugging_face import save_model, save_tokenizer
from trainer.errors import ConfigError
from trainer.ranks.launch import Place
from trainer.teacher import encode_captions, make_teacher, parse_arguments, principal_components


def make(rank: int, world_size: int, arguments: list[str]) -> None:
    # Spawned ranks may not have children.
    with mock.patch("trainer.pipeline.resolve_workers", lambda config, place: 0):
        make_teacher(parse_arguments(arguments), Place(rank, rank, world_size, world_size, "test"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a tiny RoBERTa with a tokenizer."""
    return save_tokenizer(save_model("roberta", tmp_path_factory.mktemp("teacher")))


def arguments(teacher, shards, out, **options):
    given = {"model": teacher, "data": shards, "out": out, "context_length": 20, "batch_size": 7, "dim": 5, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--device", "cpu"]


@pytest.mark.slow
def test_rows_are_those_of_the_captions_on_any_ranks(teacher, shards, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(cache))
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.npy"
        run_distributed(make, world_size, arguments(teacher, shards, out, memory_gib=2 - world_size))
    one, two = (np.load(tmp_path / f"{world_size}.npy") for world_size in (1, 2))
    assert (one.shape, one.dtype) == ((96, 5), np.float32)
    np.testing.assert_allclose(one, two, atol=1e-5)
    # An independent way to the distances: all captions of the shards, one at a time, without padding.
    names = [f"a {('red', 'green', 'blue', 'yellow')[n % 4]}" for n in range(96)]
    shapes = ("square", "bar", "column", "corner")
    captions = [f"{name} {shapes[n // 4 % 4]} number {n}" for n, name in enumerate(names)]
    features = encoded(teacher, captions)
    centred = features - features.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    expected = centred @ vectors[:, ::-1][:, :5]
    np.testing.assert_allclose(np.abs(one), np.abs(expected), atol=1e-5)


def encoded(teacher, captions: list[str], together: int = 1) -> np.ndarray:
    tokenizer = HfTokenizer(str(teacher), 20)
    tower = HfTextTower(
        str(teacher), vocab_size=91, context_length=20, embed_dim=32, pooling="mean", projection="none"
    ).eval()
    tower.load_pretrained()
    store = RowStore(len(captions), 32, 1 << 20)
    batches = [captions[start : start + together] for start in range(0, len(captions), together)]
    loader = ({"captions": [[text] for text in batch], "sample_index": torch.zeros(1)} for batch in batches)
    encode_captions(loader, tokenizer, tower, torch.device("cpu"), store)
    return store.rows(0, len(captions)).double().numpy()


def test_padding_does_not_count(teacher):
    captions = ["a red bar", "a yellow corner number 1 2 3 4 5 6 7 8 9", "blue"]
    np.testing.assert_allclose(encoded(teacher, captions, 3), encoded(teacher, captions), atol=1e-6)


def test_components_keep_the_distances_of_data_of_low_rank():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    store = RowStore(50, 30, 1 << 20)
    store.append(rows)
    mean, axes = principal_components(store, 6, torch.device("cpu"))
    reduced = (rows.double() - mean) @ axes
    found, expected = (torch.cdist(entry, entry) for entry in (reduced, rows.double()))
    # The distance of a point to itself is the root of a rounding error.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_mistakes_are_told_before_the_work(teacher, shards, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(cache))
    for options, message in (
        ({"dim": 33}, "--dim 33 is not in 1 to 32"),
        ({"out": tmp_path / "missing" / "teacher.npy"}, "cannot be written"),
    ):
        with pytest.raises(RuntimeError, match=message) as error:
            run_distributed(make, 1, arguments(teacher, shards, **{"out": tmp_path / "teacher.npy", **options}))
        assert ConfigError.__name__ in str(error.value)
