"""The tar scan against the standard library, on good, odd and damaged archives."""

import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadSample
from data.shards.tar_reader import TarError, read_members, scan_members
from tests.data.tiny_shards import write_tar

LONG = "a-long-folder-name/" * 12 + "image.jpg"
NAMES = ["a.jpg", "sub/b.jpg", "n" * 99 + ".x", "n" * 100 + ".x", LONG, "p/" * 40 + "q" * 60 + ".png", "ünï☃.txt"]


def scan(blob):
    return list(scan_members(io.BytesIO(blob), len(blob)))


def with_tarfile(path):
    with tarfile.open(path) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


def read_bytes(blob, tmp_path, extents):
    path = tmp_path / "blob.tar"
    path.write_bytes(blob)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_members(descriptor, extents)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equal_to_tarfile(tmp_path, tar_format):
    names = [name for name in NAMES if tar_format != tarfile.USTAR_FORMAT or len(name) < 100 or name[:2] == "p/"]
    members = [(name, bytes([number]) * (number * 331 % 1500)) for number, name in enumerate(names)]
    path = write_tar(tmp_path / "x.tar", members, format=tar_format)
    found = scan(path.read_bytes())
    assert [(m.name, m.offset, m.size) for m in found] == with_tarfile(path)
    assert read_bytes(path.read_bytes(), tmp_path, [(m.offset, m.size) for m in found]) == [body for _, body in members]


def test_folders_links_and_special_files_have_no_payload(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in [
            (tarfile.DIRTYPE, "d"),
            (tarfile.SYMTYPE, "s.jpg"),
            (tarfile.LNKTYPE, "h.jpg"),
            (tarfile.FIFOTYPE, "f"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "t" * 150
            archive.addfile(info)
        info = tarfile.TarInfo("last.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"end"))
    found = [(m.name, m.is_link) for m in scan(path.read_bytes())]
    assert found == [("s.jpg", True), ("h.jpg", True), ("last.txt", False)]


def test_v7_archives_and_names_that_are_not_utf8():
    header = bytearray(512)
    header[:6] = b"\xff\xfe.jpg"
    header[124:136] = b"00000000003\0"
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    folder = bytearray(header)
    folder[:6] = b"dir/\0\0"
    folder[124:136] = b"00000000000\0"
    folder[148:156] = b"        "
    folder[148:156] = f"{sum(folder):06o}\0 ".encode()
    (member,) = scan(bytes(folder) + bytes(header) + b"abc" + bytes(509) + bytes(1024))
    assert member.name.encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"
    assert (member.offset, member.size) == (1024, 3)


def test_sizes_in_base_256_and_in_pax_headers():
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        blob = info.tobuf(tar_format)
        # The payload is not there; only a scan against the announced file size can pass it.
        (member,) = scan_members(io.BytesIO(blob), len(blob) + info.size)
        assert (member.size, member.offset) == (9 << 30, len(blob))


def good_archive(tmp_path):
    return write_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes([n]) * 700) for n in range(5)]).read_bytes()


def test_every_truncation_inside_a_member_is_noticed(tmp_path):
    blob = good_archive(tmp_path)
    whole = scan(blob)
    boundaries = [member.offset - 512 for member in whole] + [whole[-1].offset + 1024]
    for size in [*range(1, boundaries[-1], 97), *range(512, boundaries[-1], 512)]:
        if size in boundaries:
            # A cut between two members cannot be told from an archive without an end mark.
            assert scan(blob[:size]) == whole[: boundaries.index(size)]
            continue
        with pytest.raises(TarError, match="end of the file"):
            scan(blob[:size])
    assert scan(blob[: boundaries[-1] + 600]) == whole


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"", "empty file"),
        (b"\x1f\x8b" + bytes(2000), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "zstd"),
        (b"<html>" * 200, "not a tar"),
        (b"short", "end of the file inside the header"),
    ],
)
def test_files_that_are_no_archives(blob, words):
    with pytest.raises(TarError, match=words):
        scan(blob)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_end_in_members_or_tar_error(blob):
    try:
        scan(blob)
    except TarError as error:
        assert "\n" not in error.reason


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_archives_end_in_members_or_tar_error(tmp_path_factory, data):
    members = [("x.jpg", b"1" * 600), (LONG, b"2" * 10), ("y.txt", b"")]
    tar_format = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    if tar_format == tarfile.USTAR_FORMAT:
        members = [(name[-90:], payload) for name, payload in members]
    blob = bytearray(
        write_tar(tmp_path_factory.mktemp("fuzz") / "x.tar", members, format=tar_format).read_bytes()[:6144]
    )
    header = data.draw(st.integers(0, len(blob) // 512 - 1)) * 512
    for _ in range(data.draw(st.integers(1, 8))):
        blob[header + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    # With a valid checksum the damage reaches the fields behind it.
    if data.draw(st.booleans()):
        blob[header + 148 : header + 156] = b" " * 8
        blob[header + 148 : header + 156] = f"{sum(blob[header : header + 512]):06o}\0 ".encode()
    try:
        for member in scan(bytes(blob)):
            assert member.size >= 0
            assert member.offset + member.size <= len(blob)
    except TarError as error:
        assert "\n" not in error.reason


def test_reading_checks_the_header_in_front(tmp_path):
    blob = good_archive(tmp_path)
    members = scan(blob)
    extents = [(members[3].offset, 700), (members[1].offset, 700)]
    assert read_bytes(blob, tmp_path, extents) == [b"\3" * 700, b"\1" * 700]
    for wrong in ((members[1].offset, 699), (members[1].offset + 512, 700), (members[1].offset + 1, 700)):
        with pytest.raises(BadSample, match="another content"):
            read_bytes(blob, tmp_path, [wrong])
    with pytest.raises(BadSample, match="truncated"):
        read_bytes(blob[: members[4].offset + 5], tmp_path, [(members[4].offset, 700)])


def test_distant_members_are_read_one_by_one(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("gap.bin", bytes(1 << 20)), ("a.txt", b"B")])
    members = scan(path.read_bytes())
    assert read_bytes(path.read_bytes(), tmp_path, [(members[0].offset, 1), (members[2].offset, 1)]) == [b"A", b"B"]
