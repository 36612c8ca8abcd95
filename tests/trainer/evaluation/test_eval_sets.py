"""Sets in CLIP_benchmark's layout as its exporter writes them: labels without captions, one caption per line."""

from pathlib import Path

import pytest
import webdataset

from data.loader import build_eval_loader
from data.sample import EvalTransform
from data.shards.index_store import IndexStore, load_sources
from data.sources import parse_sources
from tests.data.bad_files import encoded
from tests.trainer.harness import COLOURS, metrics, run_trainer, write_recipe
from trainer.config.sections import EvalSet
from trainer.errors import ConfigError
from trainer.evaluation.sets import open_eval_set


def write_set(folder: Path, shards: int = 2, **member) -> Path:
    """Ten samples in each of 0.tar, 1.tar, ...; `member` names what stands beside the image."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar")) as sink:
            for number in range(10):
                parts = {name: make(number) for name, make in member.items()}
                sink.write({"__key__": f"s{shard}{number:04d}", "webp": encoded("WEBP"), **parts})
    return folder


def classification(folder: Path) -> Path:
    write_set(folder, cls=lambda number: str(number % 4).encode())
    (folder / "classnames.txt").write_text("".join(f"{name} \n" for name in COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n\n a photo of {c}\n")
    return folder


def retrieval(folder: Path) -> Path:
    write_set(folder, txt=lambda number: f"caption {number}\nthe other {number}\n".encode())
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def opened(folder: Path, tmp_path: Path, **options):
    store = IndexStore.create(tmp_path / "cache")
    return open_eval_set("mine", EvalSet(data=str(folder), **options), tmp_path / "cache", store)


def test_names_and_templates_are_lines_that_are_not_blank(tmp_path):
    data = opened(classification(tmp_path / "set"), tmp_path, tasks=["zero_shot"])
    assert data.class_names == list(COLOURS)
    assert data.templates == ["a {c}", "a photo of {c}"]


def test_each_line_is_a_caption(tmp_path):
    folder = retrieval(tmp_path / "set")
    store = IndexStore.create(tmp_path / "cache")
    sources = load_sources(parse_sources(str(folder / "test")), store, captions=False)
    batches = list(build_eval_loader(sources, EvalTransform(16), store=store))
    captions = [entry for batch in batches for entry in batch["captions"]]
    assert captions[:2] == [["caption 0", "the other 0"], ["caption 1", "the other 1"]]
    assert len(captions) == 20
    # Training takes the text as one caption.
    batches = list(
        build_eval_loader(load_sources(parse_sources(str(folder / "test")), store), EvalTransform(16), store=store)
    )
    assert batches[0]["captions"][0] == ["caption 0\nthe other 0"]


def spoil_missing(folder):
    (folder / "test" / "1.tar").unlink()


def spoil_count(folder):
    (folder / "test" / "nshards.txt").write_text("two")


def spoil_huge_count(folder):
    (folder / "test" / "nshards.txt").write_text("9" * 5000)


def spoil_names(folder):
    (folder / "classnames.txt").write_bytes(b"caf\xe9\n")


def spoil_nothing(folder):
    pass


@pytest.mark.parametrize(
    ("spoil", "tasks", "words"),
    [
        (spoil_missing, ["zero_shot"], "1.tar' does not exist"),
        (spoil_count, ["zero_shot"], "must hold the number of shards, got 'two'"),
        (spoil_huge_count, ["zero_shot"], "must hold the number of shards"),
        (spoil_names, ["zero_shot"], "classnames.txt is not UTF-8"),
        (spoil_nothing, ["retrieval"], "retrieval needs captions, 20 of 20 samples"),
        (spoil_nothing, ["zero_shot", "retrieval"], "set tasks: [zero_shot]"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, spoil, tasks, words):
    folder = classification(tmp_path / "set")
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        opened(folder, tmp_path, tasks=tasks)
    assert words in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_retrieval_sets_have_no_class_names(tmp_path):
    with pytest.raises(ConfigError, match=r"classnames\.txt"):
        opened(retrieval(tmp_path / "set"), tmp_path, tasks=["zero_shot"])


def test_both_kinds_in_a_run(shards, cache, tmp_path):
    sets = {
        "labels": {"data": str(classification(tmp_path / "labels")), "tasks": ["zero_shot"]},
        "captions": {"data": str(retrieval(tmp_path / "captions")), "tasks": ["retrieval"]},
    }
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        shards,
        method="clip",
        train={"steps": 1},
        schedule={"warmup_steps": 0},
        eval={"sets": sets},
    )
    run_trainer(["--recipe", str(recipe), "--run_dir", str(tmp_path / "run")], cache, world_size=2)
    found = {record["set"]: record for record in metrics(tmp_path / "run") if record.get("event") == "eval"}
    assert {name: record["samples"] for name, record in found.items()} == {"labels": 20, "captions": 20}
