"""Servers that lie, drip, never end or point elsewhere; URLs and commands that are not to be followed."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.index_store import IndexStore, load_sources
from data.shards.remote import FetchError, RemoteCache, display_name
from data.shards.sources import Source, expand_braces
from data.sources import expand_pattern, parse_sources
from tests.data.tiny_shards import write_shards


class Server:
    """Answers every request by a function of the handler."""

    def __init__(self):
        self.requests = []
        self.answers = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                answer = server.answers.get(self.path)
                try:
                    answer(self) if answer else self.send_error(404)
                except OSError:
                    self.close_connection = True

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def respond(body=b"", status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for piece in [body] if isinstance(body, bytes) else body():
            handler.wfile.write(piece)
            handler.wfile.flush()

    return answer


def cache_of(tmp_path, **options):
    return RemoteCache(tmp_path / "remote", backoff_s=0.01, **{"attempts": 2, **options})


def kept(tmp_path):
    return [path for path in (tmp_path / "remote").iterdir() if path.is_file()]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "FILE:/etc/hostname", "gopher://x/"])
def test_redirects_stay_with_http(tmp_path, server, target):
    server.answers["/a.tar"] = respond(status=302, Location=target)
    with pytest.raises(FetchError, match=r"redirected to|HTTP status 302"):
        cache_of(tmp_path).fetch(f"{server.url}/a.tar")
    # Permanent: asked once.
    assert server.requests == ["/a.tar"]
    assert not kept(tmp_path)


def test_redirects_within_http_are_followed_but_not_round_and_round(tmp_path, server):
    server.answers["/a.tar"] = respond(status=302, Location=f"{server.url}/b.tar")
    server.answers["/b.tar"] = respond(b"content", Content_Length="7")
    server.answers["/loop.tar"] = respond(status=302, Location="/loop.tar")
    assert cache_of(tmp_path).fetch(f"{server.url}/a.tar").read_bytes() == b"content"
    with pytest.raises(FetchError, match="HTTP status 302"):
        cache_of(tmp_path, attempts=1).fetch(f"{server.url}/loop.tar")
    assert len(server.requests) < 20


def test_https_is_never_left(tmp_path):
    import urllib.request

    from data.shards.remote import _SafeRedirects

    request = urllib.request.Request("https://user:secret@host/a.tar?token=1")
    with pytest.raises(FetchError, match=r"https://host/a\.tar: redirected to http://host/b") as caught:
        _SafeRedirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://host/b?token=2")
    assert "secret" not in caught.value.reason and "token" not in caught.value.reason


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("100", "got 7 of 100"),
        (str(10**30), ""),
        (str(1 << 40), "more than 1000 bytes"),
        ("2", ""),
        ("many", ""),
        ("-5", ""),
    ],
)
def test_lies_about_the_length(tmp_path, server, length, words):
    server.answers["/a.tar"] = respond(b"content", Content_Length=length)
    try:
        path = cache_of(tmp_path, max_file_bytes=1000).fetch(f"{server.url}/a.tar")
    except FetchError as error:
        assert words and words in error.reason
        assert not kept(tmp_path)
    else:
        # Without a believable length, what comes is taken; its index or its scan tells whether it is whole.
        assert path.read_bytes() == (b"co" if length == "2" else b"content")


def test_endless_streams_end_at_the_limit(tmp_path, server):
    sent = []

    def endless():
        while len(sent) < 10_000:
            sent.append(1)
            yield bytes(1 << 16)

    server.answers["/a.tar"] = respond(endless)
    with pytest.raises(FetchError, match="more than 1000000 bytes, the largest file"):
        cache_of(tmp_path, max_file_bytes=1_000_000).fetch(f"{server.url}/a.tar")
    assert len(server.requests) == 1
    assert len(sent) < 1000
    assert not kept(tmp_path)
    # Announced, it is not even begun; and an index has a limit of its own.
    server.answers["/b.tar"] = respond(endless, Content_Length=str(1 << 40))
    for fetch in (cache_of(tmp_path).fetch, cache_of(tmp_path).fetch_bytes):
        with pytest.raises(FetchError, match="the largest file that is fetched"):
            fetch(f"{server.url}/b.tar")


def test_dripping_servers_are_left(tmp_path, server):
    def drip():
        for _ in range(100):
            yield b"x"
            time.sleep(0.1)

    server.answers["/a.tar"] = respond(drip, Content_Length="100000")
    started = time.monotonic()
    with pytest.raises(FetchError, match="bytes in"):
        cache_of(tmp_path, timeout_s=0.5, attempts=1).fetch(f"{server.url}/a.tar")
    # The whole would take ten seconds; a read of a whole chunk would wait for it.
    assert time.monotonic() - started < 8


def test_endless_commands_end_at_the_limit(tmp_path):
    with pytest.raises(FetchError, match="more than 1000 bytes"):
        cache_of(tmp_path, allow_pipe=True, max_file_bytes=1000).fetch("pipe:cat /dev/zero")
    assert not kept(tmp_path)


@pytest.mark.parametrize("command", ["pipe:touch evil", "PIPE:touch evil", "pipe:", "Pipe:touch evil"])
def test_commands_run_only_when_allowed(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    cache = cache_of(tmp_path)
    with pytest.raises(DataError, match="allow_pipe"):
        cache.fetch(command)
    with pytest.raises(DataError, match=r"allow_pipe|does not exist"):
        load_sources(parse_sources(command), IndexStore(tmp_path, cache))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "url",
    [
        "local:///etc/hostname",
        "zip://x.tar",
        "reference://x",
        "simplecache://x",
        "github://a:b@c/d",
        "data:,x",
        "ftp://h/x",
        "smb://h/x",
        "javascript://x",
    ],
)
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="URLs are not read"):
        cache_of(tmp_path).fetch(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://[::1",
        "http://a..b/x",
        "http://h:port/x",
        "http://h/\x00x",
        "http://h/a b\r\nX: 1",
        "http://\udcff/x",
    ],
)
def test_urls_that_are_none(tmp_path, url):
    with pytest.raises(FetchError) as caught:
        cache_of(tmp_path, attempts=1).fetch(url)
    assert caught.value.reason.isprintable()


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_names_in_the_cache_stay_in_the_cache(text):
    cache = RemoteCache(Path("/cache/remote"))
    for url in (text, f"http://h/{text}", f"http://h/../../{text}"):
        path = cache.path(url)
        assert path.parent == Path("/cache/remote")
        assert path.name.endswith(".shard") and len(path.name) == 30
        assert display_name(url).isprintable()


def test_a_file_url_is_a_path(tmp_path):
    (shard,) = write_shards(tmp_path / "set", [1])
    for scheme in ("file://", "FILE://"):
        assert expand_pattern(f"{scheme}{shard}") == [shard]
    with pytest.raises(DataError, match="NUL"):
        expand_pattern("a\0.tar")


def test_an_answer_that_is_no_index_is_no_index(tmp_path, server):
    (shard,) = write_shards(tmp_path / "set", [3])
    body = Path(shard).read_bytes()
    server.answers["/0.tar"] = respond(body, Content_Length=str(len(body)))
    server.answers["/0.tar.index.npz"] = respond(b"<html>welcome</html>", Content_Length="20")
    store = IndexStore(tmp_path / "cache", cache_of(tmp_path))
    (source,) = load_sources([Source("train", (f"{server.url}/0.tar",))], store)
    assert source.num_samples == 3


@settings(max_examples=300)
@given(st.text(alphabet="{},.0129-a/\\*[]?:\n\ud800", max_size=30))
def test_any_pattern_is_names_or_a_data_error(pattern):
    try:
        names = expand_braces(pattern)
    except DataError as error:
        assert str(error).isprintable()
    else:
        assert 0 < len(names) <= 1_000_000


@pytest.mark.parametrize(
    "pattern",
    [
        "{" * 100_000,
        "}" * 100_000,
        "{a," * 50_000,
        "{" * 5000 + "a" + "}" * 5000,
        "{1..999999}{1..999999}",
        "{" + "9" * 10_000 + "..1}",
    ],
)
def test_bombs_in_patterns(pattern):
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        expand_braces(pattern)
        raise DataError("no expansion")
    assert len(str(caught.value)) <= 1500
    assert time.process_time() - started < 20
