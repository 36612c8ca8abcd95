"""The built-in data set `unicode-symbols`: pictures of named characters, made on first use from installed typefaces.

python -m data.demo                 make it in the cache folder (or find it there) and print what it holds
python -m data.demo --out DIR       make it under DIR
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Before what takes a second to import.
    from data.command import leave_on_interrupt, run_command

    leave_on_interrupt()

from filelock import FileLock
from PIL import Image
from PIL import __version__ as pillow_version

from data.builtin.captions import captions
from data.builtin.glyphs import IMAGE_SIZE, TYPEFACES, render_typeface
from data.builtin.splits import HELD_OUT_TYPEFACE, HELD_OUT_WORDS, Glyph, Splits, split
from data.errors import DataError
from data.paths import path_argument
from data.rng import keyed_permutation
from data.shards.cache import cache_dir as default_cache_dir
from data.shards.cache import writing_cache
from data.writing import try_folder, writing_to

__all__ = ["NAME", "VERSION", "UnicodeSymbols", "ensure_unicode_symbols", "render_unicode_symbols", "resolve_builtin"]

NAME = "unicode-symbols"
VERSION = "v1"
"""Part of the folder name: a change of the recipe below must raise it, so that old renderings are not used."""

TRAIN_SHARDS = 12
EVALUATION_SETS = ("held_out_typeface", "held_out_words")
_MANIFEST = "manifest.json"
_LOCK_TIMEOUT_S = 600


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


def ensure_unicode_symbols(cache_dir: Path) -> UnicodeSymbols:
    """Returns the set, rendering it first (some seconds) where the cache folder lacks it.

    Any number of processes may call this at once: one renders, the others wait, and nobody sees a half-finished folder.

    Args:
        cache_dir: Folder for made files; created if needed.

    Raises:
        DataError: The folder cannot be written.
    """
    with writing_cache(cache_dir):
        return _ensure(Path(cache_dir) / f"{NAME}-{VERSION}")


def _ensure(root: Path) -> UnicodeSymbols:
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock", timeout=_LOCK_TIMEOUT_S):
            if not root.is_dir():
                _render_and_publish(root)
    return _describe(root)


def resolve_builtin(name: str, cache_dir: Path | None) -> list[str] | None:
    """Returns the training shards of a built-in set, or None if there is no such set.

    Args:
        name: For example "unicode-symbols".
        cache_dir: Folder for made files; None for the project's own.
    """
    if name != NAME:
        return None
    return [str(shard) for shard in ensure_unicode_symbols(cache_dir or default_cache_dir()).train]


def render_unicode_symbols(
    root: Path, code_points: Container[int] | None = None, num_held_out_words: int = HELD_OUT_WORDS
) -> UnicodeSymbols:
    """Renders the set into a folder; equal library versions give equal bytes.

    Args:
        root: An existing empty folder.
        code_points: Restricts the characters; None for all.
        num_held_out_words: Characters kept for the held-out-words set.
    """
    splits = split({face: render_typeface(face, code_points) for face in TYPEFACES}, num_held_out_words)
    (root / "train").mkdir()
    order = keyed_permutation(len(splits.train), NAME, VERSION)
    for shard in range(TRAIN_SHARDS):
        start, stop = (len(order) * edge // TRAIN_SHARDS for edge in (shard, shard + 1))
        glyphs = (splits.train[index] for index in order[start:stop])
        _write_shard(root / "train" / f"{shard:05d}.tar", map(_train_sample, glyphs))
    for name in EVALUATION_SETS:
        _write_evaluation(root / name, getattr(splits, name))
    (root / _MANIFEST).write_text(json.dumps(_manifest(splits), indent=2) + "\n", encoding="utf-8")
    return _describe(root)


def _render_and_publish(root: Path) -> None:
    partial = f".{root.name}.partial-"
    for leftover in root.parent.glob(f"{partial}*"):
        # The lock is ours, so whoever made this is dead.
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=partial, dir=root.parent))
    try:
        render_unicode_symbols(temporary)
        # mkdtemp makes private folders; a cache may be shared.
        temporary.chmod(0o755)
        temporary.rename(root)
    except OSError:
        # Without working locks (some network file systems) another process may have been faster: its folder is as good.
        if not root.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe(root: Path) -> UnicodeSymbols:
    train = [root / "train" / f"{shard:05d}.tar" for shard in range(TRAIN_SHARDS)]
    return UnicodeSymbols(root, train, {name: root / name for name in EVALUATION_SETS})


def _train_sample(glyph: Glyph) -> dict:
    return _sample(glyph, captions(glyph.code_point))


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


def _ensure_in(out: Path) -> UnicodeSymbols:
    advice = "choose another --out"
    if not (out / f"{NAME}-{VERSION}").is_dir():
        try_folder(out, advice)
    with writing_to(out, advice):
        return _ensure(out / f"{NAME}-{VERSION}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.demo", description="Make the built-in set unicode-symbols.")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="folder to make it under (default: the cache folder)"
    )
    options = parser.parse_args(arguments)
    try:
        symbols = _ensure_in(options.out) if options.out else ensure_unicode_symbols(default_cache_dir())
    except DataError as error:
        print(f"error: cannot make {NAME}: {error}", file=sys.stderr)
        return 2
    manifest = json.loads((symbols.root / _MANIFEST).read_text(encoding="utf-8"))
    print(symbols.root)
    for name, count in manifest["samples"].items():
        print(f"{name:<20}{count:>8} samples")
    print(f"{'characters in train':<20}{manifest['characters_in_train']:>8}")
    return 0


if __name__ == "__main__":
    run_command(main)
