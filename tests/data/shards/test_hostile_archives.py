"""Tars and indexes that lie about themselves: refused in one line or read within bounds."""

import gzip
import io
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadSample, DataError
from data.shards import tar_reader
from data.shards.index_file import read_arrays
from data.shards.index_store import IndexStore, load_sources, scan_shard, sidecar_path
from data.shards.reader import ReadLimits, SampleReader
from data.shards.shard_index import IMAGE, ShardIndex, load_meta
from data.shards.sources import Source
from tests.data.tiny_shards import json_member, sample_members, write_shards, write_tar


def header(name: str = "a.jpg", size: int = 0, kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    """A tar header in GNU format."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block: bytes) -> bytes:
    blob = bytearray(block)
    blob[148:156] = b" " * 8
    blob[148:156] = f"{sum(blob):06o}\0 ".encode()
    return bytes(blob)


def raw_size(field: bytes) -> bytes:
    """A header with these twelve bytes as its size."""
    block = bytearray(header())
    block[124:136] = field
    return with_checksum(block)


def pax(records: bytes) -> bytes:
    return header("pax", len(records), tarfile.XHDTYPE) + records + bytes(-len(records) % 512)


GOOD = b"".join(header(name, 3) + b"abc" + bytes(509) for name in ("ok.jpg", "ok.txt"))


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (header(size=9 << 30) + b"x" * 512, "end of the file inside the member"),
        (raw_size(b"\x80" + b"\xff" * 11), "end of the file inside the member"),
        (raw_size(b"\xff" * 12), "a negative size"),
        (raw_size(b"-0000000001\0"), "without a number"),
        (raw_size(b"999999999999"), "without a number"),
        (header(kind=tarfile.GNUTYPE_SPARSE, size=512) + bytes(512), "a sparse member"),
        (pax(b"22 GNU.sparse.major=1\n") + header(size=1) + bytes(512), "a sparse member"),
        (pax(b"19 size=9999999999\n") + header() + bytes(512), "end of the file"),
        (pax(b"31 size=9999999999999999999999\n") + header() + bytes(512), "a damaged size"),
        (pax(b"99 path=a.jpg\n"), "a damaged pax header"),
        (pax(b"0 path=a.jpg\n"), "a damaged pax header"),
        (pax(b"99999999999999999999 path=a\n"), "a damaged pax header"),
        (header("pax", (1 << 20) + 1, tarfile.XHDTYPE) + bytes(2 << 20), "an extended header of"),
        (header("@", (1 << 20) + 1, tarfile.GNUTYPE_LONGNAME) + bytes(2 << 20), "an extended header of"),
        (header("@", 5000, tarfile.GNUTYPE_LONGNAME) + b"n" * 5000 + bytes(120) + header(), "a name of 5000 bytes"),
        (gzip.compress(GOOD) + bytes(512), "gzip compressed"),
        (GOOD[:512], "end of the file inside the member"),
        (GOOD[:1300], "end of the file inside the header"),
        (bytes(2 << 20), "without a single member"),
        (GOOD + GOOD, "'ok.jpg' twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_are_refused_in_one_line(tmp_path, blob, words):
    (tmp_path / "x.tar").write_bytes(blob)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        scan_shard(str(tmp_path / "x.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert peak < 8 << 20


def test_names_are_only_names(tmp_path):
    names = ["/abs/evil", "../../evil", "a/../b", "C:\\evil", "\x1b[2J", "two\nlines"]
    members = [(f"{name}{end}", b"abc") for name in names for end in (".jpg", ".txt")]
    index = scan_shard(str(write_tar(tmp_path / "set" / "x.tar", members)))
    assert [index.key(row) for row in range(index.num_samples)] == names
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "x.tar"]
    # A message about such a key is still one line.
    write_tar(tmp_path / "set" / "y.tar", [*members, members[-2], ("z.txt", b"")])
    with pytest.raises(DataError, match="twice") as caught:
        scan_shard(str(tmp_path / "set" / "y.tar"))
    assert str(caught.value).isprintable()


def test_links_devices_and_empty_members_are_no_samples(tmp_path):
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "chr": tarfile.CHRTYPE, "blk": tarfile.BLKTYPE}
    blob = b"".join(header(f"{name}.jpg", 0, kind, linkname="/etc/passwd") for name, kind in kinds.items())
    blob += header("empty.jpg") + header("empty.txt", 3) + b"abc" + bytes(509) + header("dir.jpg/", 0, tarfile.DIRTYPE)
    (tmp_path / "x.tar").write_bytes(blob + GOOD)
    index = scan_shard(str(tmp_path / "x.tar"))
    assert [index.key(row) for row in range(index.num_samples)] == ["ok"]
    assert dict(index.excluded) == {
        "soft": "its image is a link",
        "hard": "its image is a link",
        "empty": "the image is empty",
    }


def test_the_memory_of_a_scan_is_bounded(tmp_path, monkeypatch):
    # A shard of nothing but names. The true bound is 2 GiB, five million members; one of 2 MiB behaves alike.
    blob = b"".join(header(f"{number}.jpg") for number in range(20_000))
    (tmp_path / "x.tar").write_bytes(blob)
    monkeypatch.setattr(tar_reader, "_MAX_SCAN_BYTES", 2 << 20)
    tracemalloc.start()
    with pytest.raises(DataError, match="more members than an index may have"):
        scan_shard(str(tmp_path / "x.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.fixture
def shard(tmp_path):
    (path,) = write_shards(tmp_path / "data", [6])
    return path


def arrays_of(shard: str) -> dict[str, np.ndarray]:
    scan_shard(shard).save(sidecar_path(shard))
    with np.load(sidecar_path(shard)) as arrays:
        return {name: arrays[name].copy() for name in arrays.files}


def tamper(shard: str, **changes) -> None:
    arrays = arrays_of(shard)
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(sidecar_path(shard), **arrays)


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": put(0, 99)},
        {"meta": put(3, 2**62)},
        {"meta": put(3, 0)},
        {"meta": put(3, -1)},
        {"meta": put(4, 2**40)},
        {"meta": put(5, 7)},
        {"meta": lambda array: array.astype(np.float64)},
        {"meta": lambda array: array[:3]},
        {"offset_blocks": lambda array: array[:2]},
        {"offset_blocks": put((2, IMAGE), 0)},
        {"offset_blocks": put((2, 1), 0)},
        {"offset_blocks": put((2, IMAGE), 2**32 - 1)},
        {"sizes": put((2, IMAGE), 2**32 - 1)},
        {"sizes": lambda array: array.T},
        {"sizes": lambda array: np.asfortranarray(array)},
        {"captioned": put(1, False)},
        {"key_ends": put(3, -5)},
        {"key_ends": put(5, 10**9)},
        {"key_ends": lambda array: array[::-1].copy()},
        {"key_bytes": lambda array: array[:3]},
        {"excluded": lambda _: np.frombuffer(b"5", dtype=np.uint8)},
        {"excluded": lambda _: np.frombuffer(b"[" * 100_000, dtype=np.uint8)},
        {"excluded": lambda _: np.frombuffer(b'[["a", "b"]]', dtype=np.uint8)},
        {"key_bytes": lambda array: array.astype(object)},
    ],
)
def test_an_index_that_contradicts_itself_is_made_again(shard, tmp_path, changes):
    tamper(shard, **changes)
    with pytest.raises(DataError, match="not a readable shard index"):
        ShardIndex.load(sidecar_path(shard))
    store = IndexStore.create(tmp_path / "cache")
    assert store.load(shard).num_samples == 6


def test_an_index_that_lies_within_its_shard_makes_bad_samples(shard, tmp_path):
    arrays = arrays_of(shard)
    blocks, sizes = arrays["offset_blocks"], arrays["sizes"]
    # To another place, to the middle of a payload, and to another size.
    blocks[0, IMAGE], blocks[1, IMAGE], sizes[2, IMAGE] = (
        blocks[0, IMAGE] + 1,
        blocks[1, IMAGE] - 1,
        sizes[2, IMAGE] + 9,
    )
    np.savez(sidecar_path(shard), **arrays)
    store = IndexStore.create(tmp_path / "cache")
    reader = SampleReader(load_sources([Source("train", (shard,))], store), store, ReadLimits())
    for sample in range(3):
        with pytest.raises(BadSample, match="another content than its index"):
            reader.read(0, sample)
    assert reader.read(0, 3).image == b"3"
    reader.close()


def test_totals_and_index_may_differ_only_to_the_loss_of_samples(shard, tmp_path):
    # `load_meta` reads no more than the totals.
    tamper(shard, meta=put([3, 5], 3))
    assert load_meta(sidecar_path(shard)).num_samples == 3
    store = IndexStore.create(tmp_path / "cache")
    reader = SampleReader(load_sources([Source("train", (shard,))], store), store, ReadLimits())
    with pytest.raises(BadSample, match="has 6 samples now, other than at the start"):
        reader.read(0, 0)


def npy(shape: str, payload: bytes = b"", descr: str = "<i8") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


@pytest.mark.parametrize(
    ("content", "compression"),
    [
        (npy("(1000000000000,)"), zipfile.ZIP_STORED),
        (npy("(6,)", bytes(40)), zipfile.ZIP_STORED),
        (npy("(2,)", bytes(16), "|O"), zipfile.ZIP_STORED),
        (npy("(" * 5000), zipfile.ZIP_STORED),
        (npy("__import__('os').system('touch evil')"), zipfile.ZIP_STORED),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4, zipfile.ZIP_STORED),
        (npy("(30000000,)") + bytes(240_000_000), zipfile.ZIP_DEFLATED),
    ],
    ids=["huge", "short", "objects", "nested", "code", "version", "deflated"],
)
def test_index_files_are_believed_as_far_as_their_bytes_go(tmp_path, content, compression):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("meta.npy", content)
    del content
    tracemalloc.start()
    with pytest.raises(DataError, match="not a readable shard index") as caught:
        read_arrays(tmp_path / "x.npz", {"meta": "<i8"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert peak < 4 << 20


@pytest.fixture(scope="module")
def index_blob(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    members = [m for n in range(4) for m in sample_members(n)] + [("x.jpg", b"1"), ("y.jpg", b"1"), ("y.cls", b"3")]
    scan_shard(str(write_tar(folder / "x.tar", members))).save(folder / "x.npz")
    return (folder / "x.npz").read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_any_damage_to_an_index_is_a_data_error_or_a_consistent_index(index_blob, data):
    blob = bytearray(index_blob)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        index = ShardIndex.load(io.BytesIO(bytes(blob)))
    except DataError as error:
        assert str(error).isprintable()
        return
    for row in range(index.num_samples):
        assert isinstance(index.key(row), str)
        offset, size = index.extent(row, IMAGE)
        assert 0 < offset <= offset + size <= index.file_size


def test_samples_with_a_label_only_serve_evaluation(tmp_path):
    members = [
        *sample_members(1),
        ("cls.jpg", b"5"),
        ("cls.cls", b"3"),
        ("blank.jpg", b"6"),
        ("blank.txt", b""),
        ("blank.cls", b"4"),
        ("broken.jpg", b"7"),
        ("broken.json", b"{"),
        ("broken.cls", b"5"),
        ("none.jpg", b"8"),
        ("empty.jpg", b"9"),
        ("empty.cls", b""),
        ("both.jpg", b"10"),
        ("both.cls", b"6"),
        json_member("both", caption="c"),
    ]
    shard = str(write_tar(tmp_path / "x.tar", members))
    store = IndexStore.create(tmp_path / "cache")
    (training,) = load_sources([Source("train", (shard,))], store)
    (evaluation,) = load_sources([Source("test", (shard,))], store, captions=False)
    assert (training.num_samples, training.num_excluded, training.num_uncaptioned) == (2, 5, 0)
    assert (evaluation.num_samples, evaluation.num_excluded, evaluation.num_uncaptioned) == (5, 2, 3)
    reader = SampleReader([training, evaluation], store, ReadLimits())
    assert [reader.read(0, sample).key for sample in range(2)] == ["000001", "both"]
    reader.close()
    reader = SampleReader([evaluation], store, ReadLimits())
    found = {raw.key: (raw.captions, raw.metadata.get("cls")) for raw in (reader.read(0, n) for n in (0, 1, 2, 4))}
    assert found == {"000001": (["abab"], None), "cls": ([], 3), "blank": ([], 4), "both": (["c"], 6)}
    with pytest.raises(BadSample, match="not JSON"):
        reader.read(0, 3)
    reader.close()
    saved = ShardIndex.load(next((tmp_path / "cache" / "index").rglob("*.npz")))
    assert dict(saved.with_captions().excluded) == dict.fromkeys(
        ("none", "empty", "cls", "blank", "broken"), "no caption"
    )
    assert saved.with_captions().with_captions().num_samples == 2


def test_shards_of_labels_only_are_no_training_data(tmp_path):
    shard = str(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.cls", b"0")]))
    with pytest.raises(DataError, match=r"x\.tar: no sample has a caption, only class labels"):
        load_sources([Source("train", (shard,))], IndexStore.create(tmp_path / "cache"))


@settings(max_examples=200)
@given(st.lists(st.integers(0, 7), max_size=8))
def test_any_sequence_of_headers_ends(kinds):
    parts = [
        GOOD,
        header("x", 600) + bytes(1024),
        pax(b"14 path=pp.jpg\n"[:14]),
        header("@", 12, tarfile.GNUTYPE_LONGNAME) + b"long/name.jpg"[:12] + bytes(500),
        header("g", 20, tarfile.XGLTYPE) + b"20 comment=aaaaaaaa\n" + bytes(492),
        header("k", 4, tarfile.GNUTYPE_LONGLINK) + b"link" + bytes(508),
        header("s.jpg", 0, tarfile.SYMTYPE, linkname="x"),
        bytes(512),
    ]
    blob = b"".join(parts[kind] for kind in kinds)
    try:
        for member in tar_reader.scan_members(io.BytesIO(blob), len(blob)):
            assert 0 < member.offset <= member.offset + member.size <= len(blob)
    except tar_reader.TarError as error:
        assert "\n" not in error.reason
