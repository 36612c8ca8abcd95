"""Rendering the built-in set `unicode-symbols` into shards and evaluation folders."""

import functools
import io
import itertools
import json
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL import __version__ as pillow_version

from data.builtin.captions import captions
from data.builtin.glyphs import IMAGE_SIZE, TYPEFACES, render_typeface
from data.builtin.splits import HELD_OUT_TYPEFACE, HELD_OUT_WORDS, Glyph, Splits, split
from data.rng import keyed_permutation

NAME = "unicode-symbols"
VERSION = "v1"
"""Part of the folder name: a change of the recipe below must raise it, so that old renderings are not used."""

TRAIN_SHARDS = 12
EVALUATION_SETS = ("held_out_typeface", "held_out_words")
MANIFEST = "manifest.json"


class UnicodeSymbols(NamedTuple):
    """Where the rendered set lies.

    Attributes:
        root: The folder, complete.
        train: Training shards, in order.
        evaluation: Name -> folder in CLIP_benchmark's WebDataset layout.
    """

    root: Path
    train: list[Path]
    evaluation: dict[str, Path]


def render_unicode_symbols(
    root: Path,
    code_points: Container[int] | None = None,
    num_held_out_words: int = HELD_OUT_WORDS,
    processes: int = 1,
) -> UnicodeSymbols:
    """Renders the set into a folder; equal library versions give equal bytes.

    Args:
        root: An existing empty folder.
        code_points: Restricts the characters; None for all.
        num_held_out_words: Characters kept for the held-out-words set.
        processes: How many share the work; 1 for this one alone.
    """
    with _spread_over(processes) as spread:
        pictures = spread(functools.partial(render_typeface, code_points=code_points), TYPEFACES)
        splits = split(dict(zip(TYPEFACES, pictures, strict=True)), num_held_out_words)
        (root / "train").mkdir()
        order = keyed_permutation(len(splits.train), NAME, VERSION)
        edges = [len(order) * shard // TRAIN_SHARDS for shard in range(TRAIN_SHARDS + 1)]
        glyphs = [[splits.train[index] for index in order[start:stop]] for start, stop in itertools.pairwise(edges)]
        paths = describe(root).train
        # A list, so that what a process raised is raised here.
        list(spread(_write_train_shard, paths, glyphs))
    for name in EVALUATION_SETS:
        _write_evaluation(root / name, getattr(splits, name))
    (root / MANIFEST).write_text(json.dumps(_manifest(splits), indent=2) + "\n", encoding="utf-8")
    return describe(root)


@contextmanager
def _spread_over(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over that many processes, which end with this one however it ends."""
    if processes == 1:
        yield map
        return
    # Imports torch: forks of the server that loader workers are forks of too.
    from data.worker import follow_parent, job_signals_blocked, main_module_hidden, worker_context

    with ProcessPoolExecutor(processes, worker_context(), follow_parent) as pool:

        def spread(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
            # Processes start at the first call.
            with job_signals_blocked(), main_module_hidden():
                return pool.map(function, *arguments)

        yield spread


def describe(root: Path) -> UnicodeSymbols:
    """Where everything of a rendered set lies."""
    train = [root / "train" / f"{shard:05d}.tar" for shard in range(TRAIN_SHARDS)]
    return UnicodeSymbols(root, train, {name: root / name for name in EVALUATION_SETS})


def _write_train_shard(path: Path, glyphs: list[Glyph]) -> None:
    _write_shard(path, (_sample(glyph, captions(glyph.code_point)) for glyph in glyphs))


def _write_evaluation(root: Path, glyphs: list[Glyph]) -> None:
    """Writes one folder of CLIP_benchmark's layout: every character is a class, its full name the class name."""
    (root / "test").mkdir(parents=True)
    names = [captions(glyph.code_point)[0] for glyph in glyphs]
    samples = (
        {**_sample(glyph, [name]), "cls": str(label)}
        for label, (glyph, name) in enumerate(zip(glyphs, names, strict=True))
    )
    _write_shard(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1\n", encoding="utf-8")
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (root / "zeroshot_classification_templates.txt").write_text("{c}\n", encoding="utf-8")


def _sample(glyph: Glyph, wordings: list[str]) -> dict:
    character = chr(glyph.code_point)
    metadata = {
        "captions": wordings,
        "codepoint": glyph.code_point,
        "character": character,
        "name": unicodedata.name(character),
        "category": unicodedata.category(character),
        "typeface": glyph.typeface,
    }
    return {
        "__key__": f"{glyph.code_point:05x}_{glyph.typeface}",
        "png": _png(glyph.picture),
        "txt": wordings[0],
        "json": json.dumps(metadata).encode(),
    }


def _png(picture: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("L", (IMAGE_SIZE, IMAGE_SIZE), picture).save(buffer, "PNG")
    return buffer.getvalue()


def _write_shard(path: Path, samples: Iterable[dict]) -> None:
    from webdataset import TarWriter

    # Owner and time are fixed: by default they would make two renderings of the same pictures differ.
    with TarWriter(str(path), user="declip", group="declip", mtime=0) as shard:
        for sample in samples:
            shard.write(sample)


def _manifest(splits: Splits) -> dict:
    import matplotlib

    return {
        "name": NAME,
        "version": VERSION,
        "made_with": {"matplotlib": matplotlib.__version__, "pillow": pillow_version},
        "typefaces": list(TYPEFACES),
        "held_out_typeface": HELD_OUT_TYPEFACE,
        "samples": {name: len(getattr(splits, name)) for name in ("train", *EVALUATION_SETS)},
        "characters_in_train": len({glyph.code_point for glyph in splits.train}),
        "left_out": splits.left_out,
    }
