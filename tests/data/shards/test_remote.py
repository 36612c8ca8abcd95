"""Remote shards against a server on this machine: whole, short, missing, failing for a while; the bounded cache."""

import errno
import itertools
import multiprocessing
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import build_eval_loader, build_train_loader
from data.prefetch import ShardPrefetcher
from data.shards.index_store import IndexStore, load_sources, scan_shard
from data.shards.remote import FetchError, RemoteCache, display_name
from data.shards.sources import Source
from tests.data.tiny_shards import TinyTransform, tiny_eval, write_shards


class Server:
    """Serves files of a folder and records requests; `faults[name]` is a list of faults for the next requests.

    A fault is a status, "short" for an answer that ends early, or the part of the file that is sent as if it were all.
    """

    def __init__(self, folder):
        self.requests = []
        self.faults = {}
        self.delay_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.partition("?")[0].lstrip("/")
                server.requests.append(name)
                time.sleep(server.delay_s)
                faults = server.faults.get(name, [])
                fault = faults.pop(0) if faults else None
                path = folder / name
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault or 404)
                    return
                body = path.read_bytes()
                if isinstance(fault, float):
                    body = body[: int(fault * len(body))]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    server = Server(tmp_path / "www")
    yield server
    server.close()


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "www", [11, 5, 17, 8])


def make_cache(tmp_path, **options):
    options.setdefault("backoff_s", 0.01)
    return RemoteCache(tmp_path / "remote", **options)


def kept(tmp_path):
    return {path.name for path in (tmp_path / "remote").iterdir() if path.is_file()}


def test_fetched_once_and_whole(tmp_path, server, shards):
    cache = make_cache(tmp_path)
    url = f"{server.url}/00000.tar"
    for _ in range(3):
        with cache.open(url) as stream:
            assert stream.read() == Path(shards[0]).read_bytes()
    assert server.requests == ["00000.tar"]
    assert kept(tmp_path) == {cache.path(url).name}


@pytest.mark.parametrize("faults", [["short"], [500, 503, "short"], [429]])
def test_passing_faults_are_retried(tmp_path, server, shards, faults):
    server.faults["00000.tar"] = list(faults)
    with make_cache(tmp_path).open(f"{server.url}/00000.tar") as stream:
        assert stream.read() == Path(shards[0]).read_bytes()
    assert len(server.requests) == len(faults) + 1


def test_lasting_faults_end_in_one_line_and_leave_nothing(tmp_path, server, shards):
    cache = make_cache(tmp_path, attempts=3)
    server.faults["00000.tar"] = ["short"] * 10
    with pytest.raises(FetchError, match=r"got \d+ of \d+ bytes"):
        cache.fetch(f"{server.url}/00000.tar")
    assert len(server.requests) == 3
    with pytest.raises(FetchError, match="HTTP status 404"):
        cache.fetch(f"{server.url}/none.tar")
    assert server.requests[3:] == ["none.tar"]
    # Both failures are remembered: the next samples of these shards must not wait again.
    for name in ("00000.tar", "none.tar"):
        with pytest.raises(FetchError):
            cache.fetch(f"{server.url}/{name}")
    assert len(server.requests) == 4
    assert kept(tmp_path) == set()


def test_an_unreachable_server(tmp_path):
    with pytest.raises(FetchError, match="refused"):
        make_cache(tmp_path, attempts=2).fetch("http://127.0.0.1:9/x.tar")


def _fetch_in_process(folder, url):
    RemoteCache(folder).fetch(url)


def test_several_processes_fetch_once(tmp_path, server, shards):
    server.delay_s = 0.5
    context = multiprocessing.get_context("forkserver")
    arguments = (tmp_path / "remote", f"{server.url}/00000.tar")
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.requests == ["00000.tar"]


def test_least_recently_used_goes_first_and_open_files_stay_readable(tmp_path, server):
    for name in "abcd":
        (tmp_path / "www" / name).write_bytes(name.encode() * 1000)
    cache = make_cache(tmp_path, max_bytes=3000)
    for name in "abc":
        cache.fetch(f"{server.url}/{name}")
        time.sleep(0.02)
    with cache.open(f"{server.url}/b") as in_use:
        time.sleep(0.02)
        cache.fetch(f"{server.url}/a")
        time.sleep(0.02)
        cache.fetch(f"{server.url}/d")
        assert kept(tmp_path) == {cache.path(f"{server.url}/{name}").name for name in "bad"}
        time.sleep(0.02)
        cache.fetch(f"{server.url}/c")
        assert not cache.path(f"{server.url}/b").exists()
        assert in_use.read() == b"b" * 1000
    cache.fetch(f"{server.url}/b")
    assert server.requests == list("abcdcb")


def test_a_file_larger_than_the_cache_still_works(tmp_path, server, shards):
    cache = make_cache(tmp_path, max_bytes=10)
    for name in ("00000.tar", "00001.tar", "00000.tar"):
        with cache.open(f"{server.url}/{name}") as stream:
            assert len(stream.read()) > 10
        assert len(kept(tmp_path)) == 1


def test_files_of_a_writer_that_died_are_cleared(tmp_path, server, shards):
    cache = make_cache(tmp_path)
    cache.fetch(f"{server.url}/00000.tar")
    for name, age_s in ((".dead.shard", 7 * 3600), (".alive.shard", 60)):
        (tmp_path / "remote" / name).write_bytes(b"x")
        os.utime(tmp_path / "remote" / name, (time.time() - age_s,) * 2)
    cache.fetch(f"{server.url}/00001.tar")
    assert {name for name in kept(tmp_path) if name.startswith(".")} == {".alive.shard"}


def test_a_full_disk_is_named(tmp_path, server, shards, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.shards.remote._copy", full)
    with pytest.raises(DataError, match=r"No space left.*free some space"):
        make_cache(tmp_path).fetch(f"{server.url}/00000.tar")
    assert kept(tmp_path) == set()


def test_other_schemes(tmp_path):
    import fsspec

    cache = make_cache(tmp_path, attempts=1)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/x.tar", b"content")
    with cache.open("memory://bucket/x.tar") as stream:
        assert stream.read() == b"content"
    with pytest.raises(FetchError, match="no such file"):
        cache.fetch("memory://bucket/none.tar")
    with pytest.raises(DataError, match="nonsense://x/y"):
        cache.fetch("nonsense://x/y")


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x.tar", "s3fs"), ("gs://bucket/x.tar", "gcsfs")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, url, package):
    import fsspec

    def missing(name):
        raise ImportError(f"install {name}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=f"pip install {package}"):
        make_cache(tmp_path).fetch(url)


def test_pipe_runs_only_when_allowed(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    with pytest.raises(DataError, match=r"data\.allow_pipe"):
        make_cache(tmp_path).fetch(f"pipe:cat {tmp_path}/x")
    cache = make_cache(tmp_path, allow_pipe=True, attempts=2)
    with cache.open(f"pipe:cat {tmp_path}/x") as stream:
        assert stream.read() == b"content"
    with pytest.raises(FetchError, match="status 3"):
        cache.fetch("pipe:exit 3")


def test_names_in_messages_hide_secrets():
    assert display_name("https://me:pass@host:80/a/b.tar?token=1#x") == "https://host:80/a/b.tar"
    assert display_name("/local/a?b.tar") == "/local/a?b.tar"


def remote_source(tmp_path, server, shards, **options):
    store = IndexStore.create(tmp_path / "cache", backoff_s=0.01, **options)
    urls = tuple(f"{server.url}/{Path(shard).name}" for shard in shards)
    return load_sources([Source("train", urls)], store)[0], store


def take(source, store, number, **options):
    loader = build_train_loader(
        [source], TinyTransform(), seed=5, global_batch_size=8, micro_batch_size=4, store=store, **options
    )
    try:
        return list(itertools.islice(loader, number))
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_server_equals_training_from_disk(tmp_path, server, shards, workers):
    local_store = IndexStore.create(tmp_path / "local")
    (local,) = load_sources([Source("train", tuple(shards))], local_store)
    source, store = remote_source(tmp_path, server, shards)
    assert np.array_equal(source.counts, local.counts)
    remote_batches = take(source, store, 12, workers=workers)
    for left, right in zip(take(local, local_store, 12), remote_batches, strict=True):
        assert torch.equal(left["images"], right["images"])
        assert torch.equal(left["sample_hash"], right["sample_hash"])
        assert not right["bad_samples"]
    data_requests = [name for name in server.requests if name.endswith(".tar")]
    assert sorted(data_requests) == sorted(Path(shard).name for shard in shards)


def test_an_index_beside_a_remote_shard_saves_the_scan(tmp_path, server, shards):
    for shard in shards:
        scan_shard(shard).save(Path(f"{shard}.index.npz"))
    source, store = remote_source(tmp_path, server, shards)
    assert source.counts.tolist() == [11, 5, 17, 8]
    assert sorted(server.requests) == [f"{Path(shard).name}.index.npz" for shard in shards]
    loader = build_eval_loader([source], tiny_eval, batch_size=16, store=store)
    assert sum(len(batch["sample_index"]) for batch in loader) == 41
    # The indexes are kept: a second start asks for nothing.
    server.requests.clear()
    load_sources([Source("train", source.shards)], store)
    assert server.requests == []


def test_a_remote_shard_other_than_its_index_makes_bad_samples(tmp_path, server, shards):
    for shard in shards:
        scan_shard(shard).save(Path(f"{shard}.index.npz"))
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes() + bytes(512))
    Path(shards[1]).unlink()
    source, store = remote_source(tmp_path, server, shards)
    batches = take(source, store, 10)
    reasons = {Path(record["shard"]).name: record["reason"] for batch in batches for record in batch["bad_samples"]}
    assert reasons.keys() == {"00001.tar", "00002.tar"}
    assert "HTTP status 404" in reasons["00001.tar"]
    assert "its index says" in reasons["00002.tar"]


def cut_between_members(shard):
    """The part of a shard up to the end of some sample, as a fraction of its size."""
    index = scan_shard(str(shard))
    size, middle = Path(shard).stat().st_size, index.num_samples // 2
    end = max(sum(extent) for extent in (index.extent(middle, role) for role in range(4)) if extent)
    return -(-end // 512) * 512 / size


def test_a_part_sent_as_the_whole_is_not_taken_for_it(tmp_path, server, shards):
    names = [Path(shard).name for shard in shards]
    # One is cut inside a member and one between two, where nothing but the end mark is missing.
    server.faults = {names[0]: [0.4], names[2]: [cut_between_members(shards[2])]}
    source, store = remote_source(tmp_path, server, shards)
    assert source.counts.tolist() == [11, 5, 17, 8]
    assert sorted(server.requests) == sorted([f"{name}.index.npz" for name in names] + names + [names[0], names[2]])
    # A node that knows the index and has yet to fetch the shard.
    for path in (tmp_path / "remote").glob("*.shard"):
        path.unlink()
    server.faults = {name: [0.5] for name in names}
    assert sum(len(batch["bad_samples"]) for batch in take(source, store, 10)) == 0


def test_a_part_kept_from_before_is_fetched_again(tmp_path, server, shards):
    cache = make_cache(tmp_path)
    url, size = f"{server.url}/00000.tar", Path(shards[0]).stat().st_size
    server.faults = {"00000.tar": [0.5]}
    assert cache.fetch(url).stat().st_size == size // 2
    assert cache.fetch(url, size).stat().st_size == size
    assert len(server.requests) == 2
    server.faults = {"00001.tar": [0.5] * 10}
    with pytest.raises(FetchError, match=r"got \d+ bytes, its index says \d+; index it again"):
        cache.fetch(f"{server.url}/00001.tar", Path(shards[1]).stat().st_size)
    assert kept(tmp_path) == {cache.path(url).name}


def test_a_shard_without_an_end_mark_is_believed_in_the_end(tmp_path, server, shards):
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[: int(cut_between_members(shards[1]) * len(content))])
    source, _ = remote_source(tmp_path, server, shards)
    assert source.counts.tolist() == [11, 3, 17, 8]


def test_a_damaged_remote_shard_is_not_kept(tmp_path, server, shards):
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[:700])
    with pytest.raises(DataError, match=r"00001\.tar: found the end of the file"):
        remote_source(tmp_path, server, shards)
    Path(shards[1]).write_bytes(content)
    source, _ = remote_source(tmp_path, server, shards)
    assert source.counts.tolist() == [11, 5, 17, 8]


def test_missing_remote_shards_stop_the_start(tmp_path, server, shards):
    with pytest.raises(DataError, match=r"none\.tar: HTTP status 404"):
        remote_source(tmp_path, server, [*shards, "none.tar"])


def test_a_cache_smaller_than_the_data_set(tmp_path, server, shards):
    source, store = remote_source(tmp_path, server, shards, max_bytes=Path(shards[0]).stat().st_size + 1)
    whole = take(source, store, 12)
    assert sum(len(batch["bad_samples"]) for batch in whole) == 0


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_prefetch_stays_ahead_within_its_budget(tmp_path, server):
    for number in range(20):
        (tmp_path / "www" / f"{number}").write_bytes(bytes(1000))
    cache = make_cache(tmp_path, max_bytes=8000)
    # Step s reads shard s; half of the cache is four shards.
    prefetcher = ShardPrefetcher(cache, lambda step: {f"{server.url}/{step}": 1000}, 2)
    wait_until(lambda: len(server.requests) >= 4)
    time.sleep(0.1)
    assert sorted(map(int, server.requests)) == [2, 3, 4, 5]
    prefetcher.advance(6)
    wait_until(lambda: len(server.requests) >= 8)
    time.sleep(0.1)
    assert sorted(map(int, server.requests)) == list(range(2, 10))
    prefetcher.close()


def test_prefetch_survives_faults_and_ends(tmp_path, server):
    (tmp_path / "www" / "1").write_bytes(b"x")
    cache = make_cache(tmp_path)
    threads = threading.active_count()
    prefetcher = ShardPrefetcher(cache, lambda step: {f"{server.url}/{step}": 10**9}, 0)
    for step in (0, 1):
        prefetcher.advance(step)
        wait_until(lambda step=step: str(step) in server.requests)
    wait_until(lambda: cache.path(f"{server.url}/1").exists())
    prefetcher.close()
    wait_until(lambda: threading.active_count() <= threads + 1)
