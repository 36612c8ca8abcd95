"""Shard indexes: right against webdataset's writer and reader, clear about every kind of damage, kept and found."""

import io
import tarfile

import numpy as np
import pytest
import webdataset

from data.errors import DataError
from data.index import main
from data.shards import index_store as index_module
from data.shards.index_store import IndexStore, fingerprint, index_shards, load_sources, scan_shard, sidecar_path
from data.shards.shard_index import CAPTION, CLS, IMAGE, JSON, ShardIndex, split_member_name
from data.shards.sources import Source
from tests.data.tiny_shards import json_member, sample_members, write_shards, write_tar


def keys(index):
    return [index.key(row) for row in range(index.num_samples)]


def test_shards_of_webdataset(tmp_path):
    expected = {}
    with webdataset.ShardWriter(f"file:{tmp_path}/%05d.tar", maxcount=7, verbose=0) as writer:
        for number in range(20):
            extra = {"json": {"n": number}} if number % 3 == 0 else {}
            extra |= {"cls": number % 5} if number % 4 == 0 else {}
            writer.write(
                {"__key__": f"part/{number:04d}", "jpg": b"j" * (number * 97), "txt": f"text {number}", **extra}
            )
            expected[f"part/{number:04d}"] = number
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert [scan_shard(shard).num_samples for shard in shards] == [6, 7, 6]  # sample 0 has an empty image
    for shard in shards:
        index = scan_shard(shard)
        with open(shard, "rb") as stream:  # noqa: PTH123
            for row in range(index.num_samples):
                number = expected.pop(index.key(row))
                offset, size = index.extent(row, IMAGE)
                assert size == number * 97
                offset, size = index.extent(row, CAPTION)
                stream.seek(offset)
                assert stream.read(size) == f"text {number}".encode()
                assert (index.extent(row, JSON) is not None) == (number % 3 == 0)
                assert (index.extent(row, CLS) is not None) == (number % 4 == 0)
    assert list(expected) == ["part/0000"]


@pytest.mark.parametrize(
    "name", ["a/b.c.jpg", "a.b/c.txt", "./x.JPG", "noext", ".hidden.jpg", "d.d/.h", "k.", "x.tar.gz"]
)
def test_keys_are_those_of_webdataset(name):
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert split_member_name(name) == (None if key is None else (key, extension.lower()))


def test_long_names_and_any_member_order(tmp_path):
    long_key = "folder/" * 30 + "k" * 120
    members = [("b.txt", b"cap"), (f"{long_key}.png", b"1"), ("b.webp", b"2"), (f"{long_key}.txt", b"text")]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        index = scan_shard(str(write_tar(tmp_path / f"{tar_format}.tar", members, format=tar_format)))
        assert keys(index) == ["b", long_key]


def test_samples_without_image_or_caption_are_excluded_with_a_reason(tmp_path):
    members = [
        *sample_members(1),
        ("noimg.txt", b"x"),
        ("nocap.jpg", b"x"),
        ("empty.jpg", b""),
        ("empty.txt", b"x"),
        ("blank.jpg", b"x"),
        ("blank.txt", b""),
        ("listed.jpg", b"x"),
        json_member("listed", captions=["one", "two"]),
        ("single.jpg", b"x"),
        json_member("single", caption="one"),
        ("useless.jpg", b"x"),
        json_member("useless", caption="  "),
        ("broken.jpg", b"x"),
        ("broken.json", b"{"),
    ]
    index = scan_shard(str(write_tar(tmp_path / "x.tar", members)))
    assert keys(index) == ["000001", "listed", "single"]
    reasons = dict(index.excluded)
    assert {key: reasons[key] for key in ("noimg", "nocap", "empty", "blank", "useless")} == {
        "noimg": "no image",
        "nocap": "no caption",
        "empty": "the image is empty",
        "blank": "the caption is empty",
        "useless": "no caption",
    }
    assert "not JSON" in reasons["broken"]


def test_a_fixed_image_wins_where_there_are_several(tmp_path):
    members = [("a.webp", b"1"), ("a.png", b"22"), ("a.jpg", b"333"), ("a.txt", b"x"), ("a.jpeg", b"4444")]
    assert scan_shard(str(write_tar(tmp_path / "x.tar", members))).extent(0, IMAGE)[1] == 3


def test_links_are_named_as_the_reason(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, payload in sample_members(1):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "000001.jpg"
        archive.addfile(info)
    assert scan_shard(str(tmp_path / "x.tar")).excluded == (("b", "its image is a link"),)


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.tar"
    good = write_tar(tmp_path / "good.tar", [m for n in range(9) for m in sample_members(n)]).read_bytes()
    blobs = {
        "empty_file": b"",
        "empty_large": bytes(2 << 20),
        "truncated": good[: 512 * 16 + 100],
        "garbage_inside": good[: 512 * 16] + b"?" * 1024 + good[512 * 18 :],
        "text": b"Not Found\n" * 100,
    }
    if kind in blobs:
        path.write_bytes(blobs[kind])
    elif kind == "duplicate":
        write_tar(path, [*sample_members(1), *sample_members(2), *sample_members(1)])
    elif kind == "no_samples":
        write_tar(path, [("README", b"x")])
    elif kind == "nothing_usable":
        write_tar(path, [("a.gif", b"1"), ("a.txt", b"x"), ("b.bmp", b"1"), ("b.txt", b"x")])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file"),
        ("empty_file", "empty file"),
        ("empty_large", "without a single member"),
        ("no_samples", "without samples"),
        ("truncated", "'000003'"),
        ("garbage_inside", "'000003'"),
        ("text", "not a tar"),
        ("duplicate", "'000001.jpg' twice"),
        ("nothing_usable", "bmp, gif, txt"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, kind, words):
    path = damaged(tmp_path, kind)
    with pytest.raises(DataError) as caught:
        scan_shard(path)
    message = str(caught.value)
    assert words in message
    assert path in message
    assert "\n" not in message


def test_saved_and_loaded(tmp_path):
    members = [*sample_members(1), ("é☃.jpg", b"1"), ("é☃.txt", b"x"), ("lonely.jpg", b"x")]
    index = scan_shard(str(write_tar(tmp_path / "x.tar", members)))
    index.save(tmp_path / "x.npz")
    again = ShardIndex.load(tmp_path / "x.npz")
    assert keys(again) == keys(index) == ["000001", "é☃"]
    assert again.excluded == index.excluded == (("lonely", "no caption"),)
    for name in ("offset_blocks", "sizes", "key_ends"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
    blob = (tmp_path / "x.npz").read_bytes()
    for size in (0, 10, len(blob) // 2, len(blob) - 30):
        (tmp_path / "cut.npz").write_bytes(blob[:size])
        with pytest.raises(DataError, match="not a readable shard index"):
            ShardIndex.load(tmp_path / "cut.npz")
    np.savez(tmp_path / "evil.npz", meta=np.array([object()]))
    with pytest.raises(DataError, match="not a readable shard index"):
        ShardIndex.load(tmp_path / "evil.npz")


def test_scanned_once_then_found_until_the_shard_changes(tmp_path, monkeypatch):
    scans = []
    monkeypatch.setattr(index_module, "scan_shard", lambda shard: scans.append(shard) or scan_shard(shard))
    shards = write_shards(tmp_path / "data", [4, 5, 6])
    store = IndexStore.create(tmp_path / "cache")
    for rank in range(2):
        index_shards(shards, rank, 2, store=store)
    assert sorted(scans) == shards
    (source,) = load_sources([Source("train", tuple(shards))], store)
    assert source.counts.tolist() == [4, 5, 6]
    assert sorted(scans) == shards
    write_tar(tmp_path / "data" / "00001.tar", [m for n in range(8) for m in sample_members(n)])
    assert load_sources([Source("train", tuple(shards))], store)[0].counts.tolist() == [4, 8, 6]
    assert len(scans) == 4


def test_an_index_beside_the_shard_is_used_if_it_belongs_to_it(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "data", [4, 5])
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cli"))
    assert main([str(tmp_path / "data")]) == 0
    monkeypatch.setattr(index_module, "scan_shard", lambda shard: pytest.fail(f"scanned {shard}"))
    store = IndexStore.create(tmp_path / "other")
    assert load_sources([Source("train", tuple(shards))], store)[0].counts.tolist() == [4, 5]
    monkeypatch.setattr(index_module, "scan_shard", scan_shard)
    write_tar(tmp_path / "data" / "00000.tar", [m for n in range(90) for m in sample_members(n)])
    assert load_sources([Source("train", tuple(shards))], store)[0].counts.tolist() == [90, 5]
    sidecar_path(shards[1]).write_bytes(b"PK damaged")
    assert load_sources([Source("train", tuple(shards))], store)[0].counts.tolist() == [90, 5]


def test_many_shards_use_one_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_SUMMARY_FROM", 3)
    shards = write_shards(tmp_path / "data", [4, 5, 6])
    store = IndexStore.create(tmp_path / "cache")
    first = load_sources([Source("train", tuple(shards))], store)[0]
    opened = []
    monkeypatch.setattr(index_module, "load_meta", lambda path: opened.append(path))
    again = load_sources([Source("train", tuple(shards))], store)[0]
    assert np.array_equal(first.counts, again.counts)
    assert np.array_equal(first.sizes, again.sizes)
    assert not opened


def test_all_bad_shards_are_named_at_once(tmp_path):
    good = write_shards(tmp_path / "data", [4, 4])
    torn = tmp_path / "data" / "torn.tar"
    torn.write_bytes(open(good[0], "rb").read()[:700])  # noqa: PTH123, SIM115
    missing = [str(tmp_path / "data" / f"no{number:02d}.tar") for number in range(24)]
    shards = [good[0], *missing, str(torn), good[1]]
    store = IndexStore.create(tmp_path / "cache")
    assert list(index_shards(shards, store=store)) == [*missing, str(torn)]
    assert list(index_shards(shards, 1, 3, store=store)) == [shard for shard in shards[1::3] if shard not in good]
    with pytest.raises(DataError) as caught:
        load_sources([Source("train", tuple(shards))], store)
    message = str(caught.value)
    assert message.startswith(f"25 of 27 shards cannot be used: {missing[0]}, {missing[1]}, ")
    assert message.endswith(f"{missing[19]}: No such file or directory; check the path and its permissions; and 5 more")
    assert missing[20] not in message
    with pytest.raises(DataError) as caught:
        load_sources([Source("train", (good[0], missing[0], str(torn)))], store)
    assert f"{missing[0]}: No such file" in str(caught.value)
    assert f"{torn}: found the end of the file" in str(caught.value)


def empty_tar(path):
    with tarfile.open(path, "w"):
        return str(path)


def test_empty_shards_are_left_out_and_change_nothing(tmp_path, monkeypatch, capsys):
    first, last = write_shards(tmp_path / "data", [4, 5])
    empty = empty_tar(tmp_path / "data" / "00000a.tar")
    store = IndexStore.create(tmp_path / "cache")
    plain, mixed = (
        load_sources([Source("train", shards)], store)[0] for shards in ((first, last), (first, empty, last))
    )
    assert mixed.shards == plain.shards == (first, last)
    assert mixed.counts.tolist() == plain.counts.tolist()
    assert fingerprint([mixed]) == fingerprint([plain])
    assert (plain.empty, mixed.empty) == ((), (empty,))
    with pytest.raises(DataError, match=r"all of its 1 shards are empty archives.*00000a\.tar"):
        load_sources([Source("train", (empty,))], store)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cli"))
    for _ in range(2):
        assert main([str(tmp_path / "data")]) == 0
        captured = capsys.readouterr()
        assert "total: 3 shards, 9 samples" in captured.out
        assert captured.err.startswith("warning: 1 shard(s) are archives without a single member")
        assert empty in captured.err
    monkeypatch.setattr(index_module, "scan_shard", lambda shard: pytest.fail(f"scanned {shard}"))
    assert load_sources([Source("train", (first, empty, last))], store)[0].empty == (empty,)


def test_dots_in_keys_are_explained(tmp_path):
    dotted = [(f"img.{number}.{kind}", b"x") for number in range(3) for kind in ("jpg", "txt")]
    with pytest.raises(DataError) as caught:
        scan_shard(str(write_tar(tmp_path / "x.tar", dotted)))
    assert "none of its 3 samples" in str(caught.value)
    assert "ends at the first dot of a name, so 'img.0.jpg' has the key 'img' and the extension '0.jpg'" in str(
        caught.value
    )
    # Each is counted, although all have one key; what else a whole sample brings is no picture of its own.
    members = [*sample_members(1), ("000001.mask.png", b"x"), *dotted]
    index = scan_shard(str(write_tar(tmp_path / "y.tar", members)))
    assert keys(index) == ["000001"]
    assert [key for key, _ in index.excluded] == ["img.0.jpg", "img.1.jpg", "img.2.jpg"]
    assert "a key ends at the first dot, so this name has the key 'img'" in index.excluded[0][1]
    with pytest.raises(DataError, match="KEY has no dot"):
        scan_shard(str(write_tar(tmp_path / "z.tar", [("a.gif", b"1"), ("a.txt", b"x")])))


def test_fingerprint_follows_content_not_place(tmp_path):
    def make(folder, counts):
        shards = write_shards(tmp_path / folder, counts)
        return load_sources([Source("train", tuple(shards))], IndexStore.create(tmp_path / "cache"))

    assert fingerprint(make("a", [4, 5])) == fingerprint(make("b", [4, 5]))
    assert fingerprint(make("a", [4, 5])) != fingerprint(make("c", [5, 4]))
    assert fingerprint(make("a", [4, 5])) != fingerprint(make("d", [4, 5, 1]))


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "0.tar", [*sample_members(1), ("x.jpg", b"1")])
    assert main([str(tmp_path / "{0..0}.tar"), "--excluded", "--cache"]) == 0
    out = capsys.readouterr().out
    assert "1 samples, 1 excluded" in out
    assert "excluded x: no caption" in out
    assert not sidecar_path(str(tmp_path / "0.tar")).exists()
    assert main([str(tmp_path / "none" / "{0..3}.tar")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
