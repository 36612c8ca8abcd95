"""Tar archives read by position: a header scan that skips the payloads, and random access to single members.

The standard library's tarfile keeps an object per member and hides where a member's header ends; a shard index wants
names, offsets and sizes only, and the place where a damaged archive stops making sense.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data.errors import BadSample

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20
# Linux opens no path longer than this.
_MAX_NAME_BYTES = 4096
# What an index takes in memory while it is made: some 400 bytes a member, and the names.
_MEMBER_BYTES = 400
_MAX_SCAN_BYTES = 2 << 30
_REGULAR = b"07\0"
_LINKS = b"12"
_NO_PAYLOAD = b"123456"
_OCTAL = re.compile(rb"[0-7]*")
_PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A sample's members usually stand side by side; one read for all of them beats several when little is wasted.
_MAX_WASTE = 16 * 1024


class TarError(Exception):
    """The archive is damaged or not a tar; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an archive.

    Args:
        name: Member name; bytes that are not UTF-8 are surrogate-escaped.
        offset: Byte position of the payload.
        size: Payload bytes.
        is_link: Whether the member is a hard or symbolic link (without a payload).
    """

    name: str
    offset: int
    size: int
    is_link: bool = False


def _number(field: bytes) -> int:
    """Parses a numeric header field: octal text, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False) & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            raise TarError("a negative size")
        return value
    text = field.split(b"\0", 1)[0].strip()
    if not _OCTAL.fullmatch(text):
        raise TarError("a number field without a number")
    return int(text or b"0", 8)


def checksum_is_valid(header: bytes) -> bool:
    """Tells whether a 512-byte block is a tar header, by its checksum.

    Args:
        header: One block.
    """
    try:
        stored = _number(header[148:156])
    except TarError:
        return False
    # The checksum field itself counts as eight blanks. Some old writers summed signed bytes.
    unsigned = sum(header) - sum(header[148:156]) + 256
    if stored == unsigned:
        return True
    signed = struct.unpack("512b", header)
    return stored == sum(signed) - sum(signed[148:156]) + 256


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax_records(payload: bytes) -> dict[str, bytes]:
    """Parses `LENGTH KEY=VALUE\\n` records of an extended header."""
    records, position = {}, 0
    while position < len(payload) and payload[position] != 0:
        match = _PAX_RECORD.match(payload, position)
        length = int(match[1]) if match else 0
        end = position + length
        if not match or end > len(payload) or end <= match.end() or payload[end - 1 : end] != b"\n":
            raise TarError("a damaged pax header")
        records[_decode(match[2])] = payload[match.end() : end - 1]
        position = end
    return records


def _pax_size(records: dict[str, bytes], default: int) -> int:
    text = records.get("size")
    if text is None:
        return default
    if not text.isdigit() or len(text) > 18:
        raise TarError("a damaged size in a pax header")
    return int(text)


def _payload(stream: BinaryIO, size: int) -> bytes:
    if size > _MAX_EXTENDED_HEADER:
        raise TarError(f"an extended header of {size} bytes")
    payload = stream.read(size)
    if len(payload) < size:
        raise TarError("the end of the file inside a header")
    return payload


def _member_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # GNU archives (magic "ustar  ") keep times where POSIX ones keep the prefix.
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _check_header(header: bytes, position: int) -> None:
    if len(header) < BLOCK:
        raise TarError(f"the end of the file inside the header at byte {position}")
    if checksum_is_valid(header):
        return
    if position == 0:
        kind = next((kind for magic, kind in _COMPRESSED.items() if header.startswith(magic)), None)
        raise TarError(f"{kind} compressed" if kind else "not a tar archive")
    raise TarError(f"no valid tar header at byte {position}")


def has_end_mark(stream: BinaryIO, file_size: int) -> bool:
    """Whether an archive ends in the two blocks of zeros that its writer puts there last."""
    stream.seek(max(0, file_size - 2 * BLOCK))
    return stream.read() == bytes(2 * BLOCK)


def scan_members(stream: BinaryIO, file_size: int) -> Iterator[TarMember]:
    """Yields the members of an archive in one pass over its headers.

    Understands ustar, old V7, GNU long names and pax headers (path, size). Folders and special files are passed over.
    Members keep the order of the archive. One that ends behind a member without an end mark is taken as whole, as
    tar and tarfile do.

    Args:
        stream: Seekable binary file, positioned anywhere. Best buffered by some 64 KiB, so that small members cost no
            read of their own.
        file_size: Size of the file in bytes, against which payloads are checked.

    Yields:
        TarMember for each file and each link.

    Raises:
        TarError: Where the archive is damaged, after the members before that place were yielded.
    """
    if file_size == 0:
        raise TarError("an empty file")
    position, room = 0, _MAX_SCAN_BYTES
    long_name: bytes | None = None
    pax: dict[str, bytes] = {}
    while position < file_size:
        stream.seek(position)
        header = stream.read(BLOCK)
        if len(header) == BLOCK and not any(header):
            return
        _check_header(header, position)
        kind, size = header[156:157], _number(header[124:136])
        payload_at = position + BLOCK
        # The extended size is about the member that follows, not about another extended header.
        if kind not in b"xgXLK":
            size = _pax_size(pax, size)
        if kind in _NO_PAYLOAD:
            size = 0
        next_position = payload_at + (size + BLOCK - 1) // BLOCK * BLOCK
        # Payloads are padded to whole blocks, so missing padding too means that the rest of the archive is lost.
        if next_position > file_size:
            raise TarError(f"the end of the file inside the member at byte {position}")
        if kind == b"L":
            long_name = _payload(stream, size).split(b"\0", 1)[0]
        elif kind in b"xX":
            pax = _pax_records(_payload(stream, size))
        elif kind not in b"gK":
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
                raise TarError(f"a sparse member at byte {position}; write the archive without --sparse")
            raw_name = pax.get("path", long_name if long_name is not None else _member_name(header))
            if len(raw_name) > _MAX_NAME_BYTES:
                raise TarError(f"a name of {len(raw_name)} bytes at byte {position}")
            room -= _MEMBER_BYTES + len(raw_name)
            if room < 0:
                raise TarError(f"more members than an index may have, at byte {position} of {file_size}")
            # V7 archives mark folders by a trailing slash only.
            if kind in _LINKS or (kind in _REGULAR and not raw_name.endswith(b"/")):
                yield TarMember(_decode(raw_name), payload_at, size, is_link=kind in _LINKS)
            long_name, pax = None, {}
        position = next_position


def _read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    pieces = []
    while size:
        piece = os.pread(descriptor, size, offset)
        if not piece:
            raise BadSample("the shard ends inside the member; it was truncated after it was indexed")
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_members(descriptor: int, extents: list[tuple[int, int]]) -> list[bytes]:
    """Reads members of one sample by position.

    The header in front of every payload is checked too, so an index that no longer fits its shard gives an error and
    never another sample's bytes.

    Args:
        descriptor: Open file descriptor; its own position is not used, so processes and threads may share it.
        extents: (payload offset, size) of each member.

    Returns:
        The payloads, in the order of `extents`.

    Raises:
        BadSample: If the file is too short or has no such member there.
        OSError: If reading fails.
    """
    start = min(offset for offset, _ in extents) - BLOCK
    end = max(offset + size for offset, size in extents)
    together = end - start <= sum(size + BLOCK for _, size in extents) + _MAX_WASTE
    buffer = memoryview(_read_exactly(descriptor, start, end - start)) if together else None
    payloads = []
    for offset, size in extents:
        if buffer is not None:
            raw = buffer[offset - BLOCK - start : offset + size - start]
        else:
            raw = memoryview(_read_exactly(descriptor, offset - BLOCK, BLOCK + size))
        header = bytes(raw[:BLOCK])
        # Sizes of 8 GiB and more are in a pax header instead, far above any limit on a member.
        if not checksum_is_valid(header) or _number(header[124:136]) != size:
            raise BadSample("the shard has another content than its index; run python -m data.index --force on it")
        payloads.append(bytes(raw[BLOCK:]))
    return payloads
