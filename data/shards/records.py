"""What the small members of a sample say: captions and metadata."""

import json
from typing import Any

from data.errors import BadSample

# Parsed, a megabyte of the worst JSON takes 32.
MAX_JSON_BYTES = 4 << 20


def parse_json(payload: bytes) -> dict[str, Any]:
    """Returns the object in a `.json` member.

    Args:
        payload: UTF-8 JSON text.

    Raises:
        BadSample: If it is not a JSON object.
    """
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the .json member is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadSample(f"the .json member holds a {type(record).__name__}, not an object")
    return record


def caption_list(text: bytes | None, record: dict[str, Any] | None, *, by_line: bool = False) -> list[str]:
    """Returns the captions of a sample, blank ones left out.

    A `captions` list in the JSON wins, because it usually holds the text of the `.txt` member and more; then the `.txt`
    member, then `caption` in the JSON.

    Args:
        text: Content of the `.txt` member, if there is one.
        record: Content of the `.json` member, if there is one.
        by_line: Whether each line of the `.txt` member is a caption of its own, as in CLIP_benchmark's retrieval sets.

    Returns:
        At least one caption.

    Raises:
        BadSample: If there is none, or the text is not UTF-8.
    """
    record = record or {}
    listed = record.get("captions")
    found = _not_blank(listed) if isinstance(listed, list) else []
    if not found and text is not None:
        try:
            decoded = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample("the caption is not UTF-8") from None
        found = _not_blank(decoded.splitlines() if by_line else [decoded])
    found = found or _not_blank([record.get("caption")])
    if not found:
        raise BadSample("the caption is empty" if text is not None else "no caption")
    return found


def _not_blank(captions: list[Any]) -> list[str]:
    stripped = (caption.strip() for caption in captions if isinstance(caption, str))
    return [caption for caption in stripped if caption]
