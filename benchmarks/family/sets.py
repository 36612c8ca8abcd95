"""The data of the comparison: a folder of shards with names, or the built-in set."""

import io
import json
import tarfile
from pathlib import Path

from benchmarks.family.methods import Data
from data.shards.index_store import IndexStore, load_sources
from data.sources import parse_sources

_TASKS = ["zero_shot", "retrieval"]
_MAX_MEMBER_BYTES = 16 << 20


def open_folder(folder: Path, out: Path) -> Data:
    """A folder with `train/`, `val/` and, held back for the last comparison, `test/`.

    Its `.json` members have a `name`: evaluation gets a copy in CLIP_benchmark's layout whose classes are the names.

    Raises:
        ValueError: Shards or names are missing.
    """
    _check(folder)
    sources = load_sources(parse_sources(str(folder / "train"), out), IndexStore.create(out / "index"))
    sets = {}
    for part in ("val", "test"):
        if any((folder / part).glob("*.tar")):
            target = out / "sets" / part
            if not (target / "classnames.txt").is_file():
                _with_classes(sorted((folder / part).glob("*.tar")), target)
            sets[part] = {"data": str(target), "tasks": _TASKS}
    return Data(folder.name, str(folder / "train"), sum(source.num_samples for source in sources), sets, "val")


def _check(folder: Path) -> None:
    """Raises ValueError unless a folder holds the shards of a comparison."""
    for part in ("train", "val"):
        if not any((folder / part).glob("*.tar")):
            raise ValueError(
                f"{folder / part} holds no .tar; give a folder with train/ and val/ (and test/, held back)"
            )


def open_built_in(out: Path) -> Data:
    """The built-in set; its unseen words are the set that no setting is chosen on."""
    from trainer.loading import load_config
    from trainer.pipeline import index_store, project_cache

    config = load_config("clip_demo")
    sources = load_sources(parse_sources(config.data.train, project_cache(config)), index_store(config))
    sets = {name: {"data": entry.data, "tasks": _TASKS} for name, entry in config.eval.sets.items()}
    return Data(
        "unicode-symbols", config.data.train, sum(source.num_samples for source in sources), sets, "held_out_typeface"
    )


def _with_classes(shards: list[Path], target: Path) -> None:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if member.isfile() and member.size <= _MAX_MEMBER_BYTES:
                    samples.setdefault(f"{shard.stem}-{key}", {})[suffix] = tar.extractfile(member).read()
    names = {key: _name_of(key, sample) for key, sample in samples.items()}
    classes = sorted(set(names.values()))
    number = {name: index for index, name in enumerate(classes)}
    (target / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(target / "test" / "0.tar", "w") as tar:
        for index, (key, sample) in enumerate(samples.items()):
            picture = next((suffix for suffix in ("png", "jpg", "jpeg", "webp") if suffix in sample), None)
            if picture is None or "txt" not in sample:
                raise ValueError(f"{key} of {shards[0].parent} has no picture or no caption; every sample needs both")
            content = {picture: sample[picture], "txt": sample["txt"], "cls": str(number[names[key]]).encode()}
            for suffix, data in content.items():
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    # Last: it says that the set is complete.
    (target / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))


def _name_of(key: str, sample: dict[str, bytes]) -> str:
    try:
        name = json.loads(sample["json"])["name"]
    except (KeyError, TypeError, ValueError):
        name = None
    if not isinstance(name, str) or not name.split():
        raise ValueError(f"{key}.json has no 'name', which is the class that zero-shot classification looks for")
    return " ".join(name.split())
