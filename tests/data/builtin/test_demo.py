"""The built-in set: deterministic bytes, honest splits, and safe creation by many processes."""

import io
import json
import multiprocessing
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import demo
from data.builtin.captions import captions
from data.builtin.glyphs import IMAGE_SIZE, TYPEFACES, render_typeface
from data.builtin.rendering import EVALUATION_SETS, VERSION, render_unicode_symbols
from data.builtin.splits import HELD_OUT_TYPEFACE, split
from data.demo import ensure_unicode_symbols, main, resolve_builtin

# Latin letters, Greek (with Latin lookalikes), accents, arrows and chess pieces.
SUBSET = frozenset((*range(0x41, 0x180), *range(0x391, 0x3CA), *range(0x2190, 0x21A0), *range(0x2654, 0x2660)))


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(path) as shard:
        for member in shard:
            assert (member.mtime, member.uid, member.uname) == (0, 0, "declip")
            key, _, extension = member.name.partition(".")
            samples[key][extension] = shard.extractfile(member).read()
    return samples


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return render_unicode_symbols(tmp_path_factory.mktemp("small"), SUBSET, num_held_out_words=20)


def check_splits(symbols, num_words: int) -> None:
    """What must hold for any rendering."""
    train = [sample for shard in symbols.train for sample in read_shard(shard).values()]
    records = [json.loads(sample["json"]) for sample in train]
    characters = {record["codepoint"] for record in records}
    pictures = {sample["png"] for sample in train}
    words = Counter(word for point in characters for word in captions(point)[0].split())
    assert HELD_OUT_TYPEFACE not in {record["typeface"] for record in records}
    assert len({(record["codepoint"], sample["png"]) for record, sample in zip(records, train, strict=True)}) == len(
        train
    )

    typeface, unseen = (read_shard(symbols.evaluation[name] / "test" / "0.tar") for name in EVALUATION_SETS)
    for samples in (typeface, unseen):
        points = [json.loads(sample["json"])["codepoint"] for sample in samples.values()]
        assert len(set(points)) == len(points), "a class with two pictures"
        assert len({sample["png"] for sample in samples.values()}) == len(samples), "a picture with two answers"
        assert not pictures & {sample["png"] for sample in samples.values()}, "an evaluation picture was trained on"
    assert {json.loads(sample["json"])["typeface"] for sample in typeface.values()} == {HELD_OUT_TYPEFACE}
    assert {json.loads(sample["json"])["codepoint"] for sample in typeface.values()} <= characters
    assert len(unseen) == num_words
    for sample in unseen.values():
        record = json.loads(sample["json"])
        assert record["codepoint"] not in characters
        assert record["typeface"] != HELD_OUT_TYPEFACE
        assert all(words[word] >= 3 for word in sample["txt"].decode().split())


def test_rendering_twice_gives_the_same_bytes(small, tmp_path):
    again = render_unicode_symbols(tmp_path, SUBSET, num_held_out_words=20)
    assert tree(small.root) == tree(again.root)


def test_splits_of_a_subset(small):
    check_splits(small, num_words=20)


def test_samples_are_complete(small):
    for shard in small.train:
        for key, sample in read_shard(shard).items():
            assert sorted(sample) == ["json", "png", "txt"]
            record = json.loads(sample["json"])
            assert record["captions"] == captions(record["codepoint"])
            assert sample["txt"].decode() == record["captions"][0]
            assert key == f"{record['codepoint']:05x}_{record['typeface']}"
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.mode, image.size) == ("L", (IMAGE_SIZE, IMAGE_SIZE))
            assert np.asarray(image).min() < 128, "no dark pixel"


def test_training_shards_are_shuffled_and_even(small):
    shards = [list(read_shard(shard)) for shard in small.train]
    sizes = [len(keys) for keys in shards]
    assert max(sizes) - min(sizes) <= 1
    keys = [key for shard in shards for key in shard]
    assert keys != sorted(keys)
    typefaces = Counter(key.split("_")[1] for key in shards[0])
    assert len(typefaces) > 8


@pytest.mark.parametrize("name", EVALUATION_SETS)
def test_evaluation_folders_follow_clip_benchmark(small, name):
    root = small.evaluation[name]
    names = (root / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert (root / "test" / "nshards.txt").read_text().strip() == "1"
    assert (root / "zeroshot_classification_templates.txt").read_text().splitlines() == ["{c}"]
    samples = list(read_shard(root / "test" / "0.tar").values())
    assert sorted(samples[0]) == ["cls", "json", "png", "txt"]
    assert [int(sample["cls"]) for sample in samples] == list(range(len(names)))
    assert [sample["txt"].decode() for sample in samples] == names
    assert len(set(names)) == len(names)
    assert [json.loads(sample["json"])["captions"] for sample in samples] == [[name] for name in names]


def test_webdataset_reads_the_shards(small):
    from webdataset import WebDataset

    samples = list(WebDataset(str(small.train[0]), shardshuffle=False).decode("pil"))
    assert len(samples) == len(read_shard(small.train[0]))
    assert samples[0]["json"]["captions"][0] == samples[0]["txt"]


def test_lookalikes_are_evaluated_once(small):
    names = (small.evaluation["held_out_typeface"] / "classnames.txt").read_text().splitlines()
    assert "latin capital letter a" in names
    assert "greek capital letter alpha" not in names
    assert {"greek capital letter omega", "greek small letter pi"} <= set(names)


def test_split_keeps_ambiguous_pictures_out():
    same, bold = b"same", b"bold"
    pictures = {
        "DejaVuSans": {0x41: same, 0x391: same, 0x42: b"B", 0x1D401: bold, 0x43: b"C"},
        HELD_OUT_TYPEFACE: {0x41: b"A2", 0x391: b"A3", 0x42: b"B2", 0x1D401: bold, 0x43: b"C", 0x44: b"D"},
    }
    splits = split(pictures, num_held_out_words=0)
    assert [glyph.code_point for glyph in splits.held_out_typeface] == [0x41, 0x42]
    assert sum(splits.left_out.values()) == 4
    assert len(splits.train) == 5


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        ("\u265e", ["black chess knight"]),
        (
            "\u00e1",
            ["latin small letter a with acute", "lowercase latin letter a with acute", "small letter a with acute"],
        ),
        ("\u03a9", ["greek capital letter omega", "uppercase greek letter omega"]),
        ("\u2190", ["leftwards arrow", "left arrow"]),
        ("\u281b", ["braille pattern dots 1 2 4 5"]),
        ("\U0001f041", ["domino tile horizontal 2 2"]),
        ("\u2684", ["die face 5"]),
        ("\u00bd", ["fraction one half"]),
        ("/", ["solidus", "slash"]),
    ],
)
def test_captions_read_naturally(character, expected):
    assert captions(ord(character)) == expected


def test_pictures_share_size_and_baseline():
    pictures = render_typeface("DejaVuSans", {ord(character) for character in "oO.'\u2014"})
    rows = {chr(point): np.flatnonzero((array(picture) < 128).any(axis=1)) for point, picture in pictures.items()}
    assert len(rows["o"]) < len(rows["O"])
    assert rows["'"].max() < rows["."].min()
    assert all(picture[:IMAGE_SIZE] == b"\xff" * IMAGE_SIZE for picture in pictures.values()), "no margin at the top"


def array(picture: bytes) -> np.ndarray:
    return np.frombuffer(picture, dtype=np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE)


def test_spaces_marks_and_private_characters_are_left_out():
    assert render_typeface("DejaVuSans", {0x20, 0xA0, 0x2003, 0x301, 0xE000, 0xF6C5, 0x41}).keys() == {0x41}


def ensure_in_process(cache: str, results) -> None:
    results.put(str(ensure_unicode_symbols(Path(cache)).root))


@pytest.fixture
def quick(monkeypatch):
    """Counts renderings and makes them small."""
    calls = []

    def render(root, processes):
        calls.append(root)
        return render_unicode_symbols(root, SUBSET, num_held_out_words=20)

    monkeypatch.setattr(demo, "render_unicode_symbols", render)
    return calls


def test_ensure_renders_once_and_publishes_a_whole_folder(quick, tmp_path):
    leftover = tmp_path / f".unicode-symbols-{VERSION}.partial-dead"
    leftover.mkdir()
    (leftover / "half.tar").write_bytes(b"x")
    first, second = ensure_unicode_symbols(tmp_path), ensure_unicode_symbols(tmp_path)
    assert first == second
    assert len(quick) == 1
    assert all(path.is_file() for path in first.train)
    assert not leftover.exists()
    assert resolve_builtin("unicode-symbols", tmp_path) == [str(path) for path in first.train]
    assert resolve_builtin("something-else", tmp_path) is None


def test_a_failed_rendering_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(root, processes):
        (root / "half.tar").write_bytes(b"x")
        raise RuntimeError("killed")

    monkeypatch.setattr(demo, "render_unicode_symbols", fail)
    with pytest.raises(RuntimeError, match="killed"):
        ensure_unicode_symbols(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_many_processes_may_ask_at_once(quick, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=ensure_in_process, args=(str(tmp_path), results)) for _ in range(3)]
    for process in processes:
        process.start()
    roots = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(roots) == 1
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert json.loads((Path(roots.pop()) / "manifest.json").read_text())["version"] == VERSION


def test_command_line_prints_counts(quick, tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^train\s+\d{4} samples$", printed, re.MULTILINE)
    assert re.search(r"^held_out_words\s+20 samples$", printed, re.MULTILINE)
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot make unicode-symbols" in capsys.readouterr().err


def test_processes_render_the_same_bytes(small, tmp_path):
    shared = render_unicode_symbols(tmp_path, SUBSET, num_held_out_words=20, processes=2)
    assert tree(shared.root) == tree(small.root)


@pytest.mark.slow
def test_the_whole_set(tmp_path):
    symbols = render_unicode_symbols(tmp_path, processes=2)
    check_splits(symbols, num_words=400)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["typefaces"] == list(TYPEFACES)
    # Library releases may add or lose a few glyphs.
    assert 35_000 < manifest["samples"]["train"] < 40_000
    assert 1_600 < manifest["samples"]["held_out_typeface"] < 2_000
    assert 6_000 < manifest["characters_in_train"] < 7_000
