"""Loaders: the same samples for any world size, worker count and start; bad samples replaced and reported."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import collate_views
from data.errors import DataError
from data.loader import build_eval_loader, build_train_loader
from data.shards.reader import ReadLimits, SampleReader
from data.shards.shard_index import ShardIndex
from tests.data.tiny_shards import (
    TinyTransform,
    TinyViews,
    indexed,
    json_member,
    sample_members,
    tiny_eval,
    write_shards,
    write_tar,
)

COUNTS = [11, 5, 17, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return indexed(folder, write_shards(folder / "set", COUNTS))


def take(source_and_store, number, *, transform=None, batch=8, micro=2, **options):
    source, store = source_and_store
    loader = build_train_loader(
        [source],
        transform or TinyTransform(),
        seed=5,
        global_batch_size=batch,
        micro_batch_size=micro,
        shuffle_window=6,
        store=store,
        **options,
    )
    try:
        return list(itertools.islice(loader, number))
    finally:
        loader.close()


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for first, second in zip(left, right, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


def columns(batches):
    """Rows of the batches, one after the other, whatever the micro-batch sizes were."""
    images = torch.cat([batch["images"] for batch in batches], dim=1)
    view_keys = torch.cat([batch["view_keys"] for batch in batches], dim=1)
    return images, torch.cat([batch["sample_hash"] for batch in batches]), view_keys


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_samples_and_views_for_any_world_size(data, world_size):
    expected = columns(take(data, 20))
    per_rank = [take(data, 20 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    accumulation = 4 // world_size
    merged = [
        batch
        for step in range(5)
        for rank in range(world_size)
        for batch in per_rank[rank][step * accumulation : (step + 1) * accumulation]
    ]
    assert all(torch.equal(*pair) for pair in zip(expected, columns(merged), strict=True))


def test_micro_batch_size_does_not_change_the_data(data):
    assert all(
        torch.equal(*pair) for pair in zip(columns(take(data, 24)), columns(take(data, 6, micro=8)), strict=True)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_data(data, workers):
    assert_equal_batches(take(data, 12), take(data, 12, workers=workers))


@pytest.mark.parametrize("start_step", [1, 4, 5, 23])
def test_a_resumed_run_equals_the_straight_one(data, start_step):
    straight = take(data, 4 * start_step + 8)
    assert_equal_batches(straight[4 * start_step :], take(data, 8, start_step=start_step))


def test_an_epoch_holds_every_sample_once(data):
    class Recorder(TinyTransform):
        seen: list[str] = []  # noqa: RUF012

        def __call__(self, image_bytes, captions, key):
            self.seen.append((key[2], int(image_bytes)))
            return super().__call__(image_bytes, captions, key)

    take(data, 41, batch=4, micro=2, transform=Recorder())
    for epoch in range(2):
        assert sorted(number for at, number in Recorder.seen if at == epoch)[: sum(COUNTS)] == list(range(sum(COUNTS)))


def test_every_view_of_every_visit_has_its_own_key(data):
    # Two epochs and a little, so that samples come again.
    batches = take(data, 44, batch=2, micro=2)
    keys = columns(batches)[2]
    assert keys.shape == (2, 88) and keys.dtype == torch.int64
    assert keys.min() >= 0
    assert keys.unique().numel() == keys.numel()


def test_collation_follows_the_contract():
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2)
    views = [
        TinyViews(image, [[1, 5, 2], [1, 9, 2]], [1], [5]),
        TinyViews(image + 1, [[1, 5, 6, 7, 2], [1, 5, 9, 9, 2]], [2, 3], [6, 7]),
    ]
    batch = collate_views(views, masked=True)
    assert batch["images"].shape == (2, 2, 3, 2, 2)
    assert torch.equal(batch["images"][1, 1], torch.from_numpy(image[1] + 1))
    assert batch["token_ids"].tolist() == [[[1, 5, 2, 0, 0], [1, 5, 6, 7, 2]], [[1, 9, 2, 0, 0], [1, 5, 9, 9, 2]]]
    assert batch["text_lengths"].tolist() == [[3, 5], [3, 5]]
    assert batch["mlm_index"].tolist() == [1, 7, 8]
    assert batch["token_ids"][1].reshape(-1)[batch["mlm_index"]].tolist() == [9, 9, 9]
    assert batch["mlm_targets"].tolist() == [5, 6, 7]
    assert {value.dtype for name, value in batch.items() if name != "images"} == {torch.int64}
    assert "mlm_index" not in collate_views(views, masked=False)


def test_masked_targets_come_only_with_a_masked_view(data):
    assert "mlm_index" in take(data, 1)[0]
    assert "mlm_index" not in take(data, 1, transform=TinyTransform(("original", "eda")))[0]


def test_bad_samples_are_replaced_the_same_way_everywhere(tmp_path):
    damaged = indexed(tmp_path, write_shards(tmp_path / "set", COUNTS, bad=(3, 12, 13, 30)))
    straight = take(damaged, 41)
    assert_equal_batches(straight, take(damaged, 41, workers=2))
    assert_equal_batches(straight[20:], take(damaged, 21, start_step=5))
    records = [record for batch in straight for record in batch["bad_samples"]]
    assert {record["key"] for record in records} == {"000003", "000012", "000013", "000030"}
    assert {record["reason"] for record in records} == {"cannot decode the image"}
    assert {Path(record["shard"]).name for record in records} == {"00000.tar", "00001.tar", "00002.tar"}
    halves = [take(damaged, 10, rank=rank, world_size=2) for rank in range(2)]
    merged = [batch for step in range(5) for rank in range(2) for batch in halves[rank][2 * step : 2 * step + 2]]
    assert torch.equal(columns(straight[:20])[0], columns(merged)[0])


def test_places_are_those_of_the_slot_and_of_the_sample_used(tmp_path):
    class Numbered(TinyTransform):
        def __call__(self, image_bytes, captions, key):
            views = super().__call__(image_bytes, captions, key)
            views.images[:] = int(image_bytes)
            return views

    damaged = indexed(tmp_path, write_shards(tmp_path / "set", COUNTS, bad=(3, 12)))
    without, batches = (take(damaged, 24, transform=Numbered(), with_places=places) for places in (False, True))
    for batch in batches:
        assert torch.equal(batch["sample_index"], batch["images"][0, :, 0, 0, 0].long())
    assert torch.cat([batch.pop("position") for batch in batches]).tolist() == list(range(48))
    seen = torch.cat([batch.pop("sample_index") for batch in batches])
    assert set(seen.tolist()) == set(range(41)) - {3, 12}
    assert_equal_batches(batches, without)


def test_a_set_of_bad_samples_stops_with_one_line(tmp_path):
    hopeless = indexed(tmp_path, write_shards(tmp_path / "set", [4], bad=tuple(range(4))))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"100 samples in a row.*cannot decode") as caught:
            take(hopeless, 1, workers=workers)
        assert "\n" not in str(caught.value)


def test_errors_in_the_transform_are_not_swallowed(data):
    class Broken(TinyTransform):
        def __call__(self, image_bytes, captions, key):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        take(data, 1, transform=Broken())


def test_shards_that_vanish_shrink_or_change_make_bad_samples(tmp_path):
    shards = write_shards(tmp_path / "set", [20, 20, 20, 20])
    changing = indexed(tmp_path, shards)
    Path(shards[0]).unlink()
    with open(shards[1], "r+b") as stream:  # noqa: PTH123
        stream.truncate(3000)
    blob = bytearray(Path(shards[2]).read_bytes())
    status = Path(shards[2]).stat()
    blob[: 1024 * 10] = os.urandom(1024 * 10)
    Path(shards[2]).write_bytes(bytes(blob))
    os.utime(shards[2], ns=(status.st_atime_ns, status.st_mtime_ns))
    batches = take(changing, 40)
    reasons = {}
    for record in (record for batch in batches for record in batch["bad_samples"]):
        reasons.setdefault(Path(record["shard"]).name, set()).add(record["reason"].rpartition(": ")[2])
    assert reasons.keys() == {"00000.tar", "00001.tar", "00002.tar"}
    assert "No such file" in str(reasons["00000.tar"])
    assert "another content" in str(reasons["00002.tar"])
    assert all(len(batch["sample_hash"]) == 2 for batch in batches)


def test_large_members_are_refused_unread(tmp_path):
    members = [m for n in range(6) for m in sample_members(n)]
    members += [("big.jpg", b"1" * 5000), ("big.txt", b"x"), ("long.jpg", b"1"), ("long.txt", b"x" * 3000)]
    data = indexed(tmp_path, [str(write_tar(tmp_path / "x.tar", members))])
    batches = take(data, 4, limits=ReadLimits(max_image_bytes=4000, max_caption_bytes=2000))
    reasons = {record["key"]: record["reason"] for batch in batches for record in batch["bad_samples"]}
    assert reasons == {
        "big": "the image member has 5000 bytes, above the limit of 4000",
        "long": "the caption member has 3000 bytes, above the limit of 2000",
    }


def test_sizes_that_do_not_divide_are_named(data):
    with pytest.raises(DataError, match="micro_batch_size 3"):
        take(data, 1, micro=3)


def test_loader_reports_and_leaves_the_global_generator_alone(data):
    source, store = data
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    loader = build_train_loader([source], TinyTransform(), seed=0, global_batch_size=8, micro_batch_size=2, store=store)
    next(loader)
    assert torch.equal(torch.rand(3), expected)
    assert loader.micro_batches_per_step == 4
    assert loader.samples_seen(5) == {"train": 40}
    assert loader.epochs_seen(5) == {"train": 40 / 41}
    assert len(loader.fingerprint) == len(loader.order_fingerprint) == 32
    assert loader.num_excluded == 0
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (2, 2), (7, 0)])
def test_evaluation_visits_every_sample_once_in_order(data, world_size, workers):
    source, store = data
    seen = []
    for rank in range(world_size):
        loader = build_eval_loader(
            [source, source], tiny_eval, rank=rank, world_size=world_size, batch_size=5, workers=workers, store=store
        )
        assert loader.num_samples == 82
        for _ in range(2):
            batches = list(loader)
        for batch in batches:
            assert len(batch["images"]) == len(batch["captions"]) == len(batch["metadata"]) <= 5
            assert batch["images"].dtype == torch.uint8
            numbers = batch["sample_index"] % 41
            assert torch.equal(batch["images"][:, 0, 0, 0], numbers.to(torch.uint8))
            assert [meta["key"] for meta in batch["metadata"]] == [f"{number:06d}" for number in numbers]
            seen += batch["sample_index"].tolist()
    assert sorted(seen) == list(range(82))


def test_evaluation_captions_metadata_and_bad_samples(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("a.txt", b"from text"),
        json_member("a", captions=["one", " two ", ""], width=7),
        ("a.cls", b"12"),
        *sample_members(1, image=b"bad"),
        ("c.jpg", b"2"),
        ("c.txt", "caf\u00e9\n".encode()),
        json_member("c", caption="other"),
        ("d.jpg", b"2"),
        ("d.txt", b"\xff\xff"),
        *sample_members(4),
    ]
    source, store = indexed(tmp_path, [str(write_tar(tmp_path / "x.tar", members))])
    loader = build_eval_loader([source], tiny_eval, batch_size=2, store=store)
    batches = list(loader)
    assert [caption for batch in batches for caption in batch["captions"]][:2] == [["one", "two"], ["caf\u00e9"]]
    assert batches[0]["metadata"][0] == {"key": "a", "captions": ["one", " two ", ""], "width": 7, "cls": 12}
    assert [index for batch in batches for index in batch["sample_index"].tolist()] == [0, 2, 4]
    assert [(record["key"], record["reason"]) for record in loader.bad_samples] == [
        ("000001", "cannot decode the image"),
        ("d", "the caption is not UTF-8"),
    ]


def test_many_open_shards_and_indexes_stay_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.reader._MAX_OPEN_FILES", 3)
    monkeypatch.setattr("data.shards.reader._MAX_INDEX_BYTES", 500)
    many = indexed(tmp_path, write_shards(tmp_path / "set", [2] * 30))
    source, store = many
    reader = SampleReader([source], store, ReadLimits())
    for sample in np.random.default_rng(0).integers(60, size=200):
        assert reader.read(0, int(sample)).image == str(sample).encode()
        assert len(reader._files) <= 3
        assert sum(index.num_bytes for index in reader._indexes.values()) == reader._index_bytes <= 500
    assert all(isinstance(index, ShardIndex) for index in reader._indexes.values())
    reader.close()


SCRIPT = """
import os, signal, sys, time
print("imported", flush=True)
if __name__ == "__main__":
    from pathlib import Path
    from data.loader import build_train_loader
    from tests.data.tiny_shards import TinyTransform, indexed, write_shards
    folder = Path(sys.argv[1])
    source, store = indexed(folder, write_shards(folder / "set", [50]))
    loader = build_train_loader([source], TinyTransform(), seed=0, global_batch_size=4, micro_batch_size=2, workers=2,
                                store=store)
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    # As a scheduler does: to all processes of the job, when the workers have just been started and later.
    for pause_s in (0, 1, 2):
        time.sleep(pause_s)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.killpg(0, number)
        for _ in range(20):
            next(loader)
    assert len(received) == 9, received
    workers = [process.pid for process in loader._pipeline._processes]
    print(*workers, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["normal", "killed"])
def test_workers_outlive_signals_but_not_the_trainer(tmp_path, end):
    script = tmp_path / "scripts" / "main_script.py"
    # A user's own folder of this name in the working directory must not be taken for our package.
    for folder in ("scripts", "work/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "work" / "data" / "__init__.py").write_text("")
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), end],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path / "work",
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = result.stdout.splitlines()
    # Once: the workers did not run the main script's imports again.
    assert lines.count("imported") == 1, result.stderr
    assert result.returncode == (0 if end == "normal" else -9), result.stderr
    deadline = 50
    while any(is_running(int(pid)) for pid in lines[-1].split()) and deadline:
        deadline -= 1
        time.sleep(0.1)
    assert deadline
