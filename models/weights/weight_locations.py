"""Which files hold the weights: a file, a folder of other projects, or the parts that an index lists."""

import json
import re
from pathlib import Path

FOLDER_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
INDEX = ".index.json"
_MAX_INDEX_BYTES = 64 << 20
_DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
_POINTER = b"version https://git-lfs.github.com/spec/"
_NAMED = 3


def find_weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, and which tensors to take from each; None for all there are.

    Args:
        path: A weight file, an index of several, or a folder in the layout of open_clip, Hugging Face or DeepSpeed.

    Raises:
        ValueError: There is no such file, a part of an index is missing, or it is the pointer to a file elsewhere.
    """
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"weights {path} do not exist; give a file or a folder")
    files = _read_index(file) if file.name.endswith(INDEX) else {file: None}
    for part in files:
        check_content(part)
    return files


def check_content(file: Path) -> None:
    """Tells what stands in a file's place where it was not downloaded.

    Raises:
        ValueError: It is a pointer of Git LFS, a web page, or empty.
    """
    with file.open("rb") as stream:
        begin = stream.read(512)
    if begin.startswith(_POINTER):
        size = re.search(rb"^size (\d{1,15})$", begin, re.MULTILINE)
        what = f" to a file of {int(size[1]):,} bytes" if size else ""
        raise ValueError(f"{file} is a Git LFS pointer{what}, not the file itself; fetch it with `git lfs pull`")
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{file} is a web page, not weights; download it again, by the link to the file itself")
    if not begin:
        raise ValueError(f"{file} is empty; copy or download it again")


def _in_folder(folder: Path) -> Path:
    wanted = [name for plain in FOLDER_FILES for name in (plain, plain + INDEX)]
    found = next((folder / name for name in wanted if (folder / name).is_file()), None)
    if found is not None:
        return found
    tag = _latest(folder)
    for place in (folder, *([] if tag is None else [folder / tag])):
        if (place / f"zero_pp_rank_0_{_DEEPSPEED_FILE}").is_file():
            raise ValueError(
                f"{place} is a checkpoint that DeepSpeed cut up (ZeRO 3); put it together with the zero_to_fp32.py "
                "beside it, and give the file that makes"
            )
        if (place / _DEEPSPEED_FILE).is_file() and not (place / _DEEPSPEED_FILE.replace("00", "01", 1)).is_file():
            return place / _DEEPSPEED_FILE
    raise ValueError(
        f"folder {folder} holds none of {', '.join(FOLDER_FILES)}, nor an index of parts; name the weight file itself"
    )


def _latest(folder: Path) -> str | None:
    """The checkpoint that DeepSpeed's `latest` names, a folder beside it."""
    path = folder / "latest"
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        name = stream.read(256).decode("utf-8", "replace").strip()
    return name if _is_plain(name) and (folder / name).is_dir() else None


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    """The parts an index lists; they lie beside it."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{index} has more than {_MAX_INDEX_BYTES} bytes; that is no index of weights")
    try:
        content = json.loads(index.read_bytes())
        pairs = [(str(name), str(part)) for name, part in content["weight_map"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        check_content(index)
        raise ValueError(f"{index} is no index of weights: expected JSON with a weight_map, tensors to files") from None
    parts: dict[str, set[str]] = {}
    for name, part in pairs:
        parts.setdefault(part, set()).add(name)
    if not parts:
        raise ValueError(f"{index} lists no tensors; download it again")
    outside = next((part for part in parts if not _is_plain(part)), None)
    if outside is not None:
        raise ValueError(f"{index} names the part {outside!r}, which is not a file beside it; it is not followed")
    missing = sorted(part for part in parts if not (index.parent / part).is_file())
    if missing:
        shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ValueError(
            f"{len(missing)} of the {len(parts)} parts that {index} lists are missing: {shown}; download them beside it"
        )
    return {index.parent / part: names for part, names in parts.items()}


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and not re.search(r"[/\\:]", name) and name not in (".", "..")
