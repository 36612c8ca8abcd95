"""What the small members of a sample say: captions and metadata."""

import json
from typing import Any

from data.errors import BadSample


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


def caption_list(text: bytes | None, record: dict[str, Any] | None) -> list[str]:
    """Returns the captions of a sample, blank ones left out.

    A `captions` list in the JSON wins, because it usually holds the text of the `.txt` member and more; then the `.txt`
    member, then `caption` in the JSON.

    Args:
        text: Content of the `.txt` member, if there is one.
        record: Content of the `.json` member, if there is one.

    Returns:
        At least one caption.

    Raises:
        BadSample: If there is none, or the text is not UTF-8.
    """
    record = record or {}
    listed = record.get("captions")
    found = [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []
    found = [entry.strip() for entry in found if entry.strip()]
    if found:
        return found
    if text is not None:
        try:
            found = [text.decode("utf-8-sig").strip()]
        except UnicodeDecodeError:
            raise BadSample("the caption is not UTF-8") from None
    if not any(found) and isinstance(record.get("caption"), str):
        found = [record["caption"].strip()]
    if not any(found):
        raise BadSample("the caption is empty" if text is not None else "no caption")
    return found
