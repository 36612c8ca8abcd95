"""Fetches the remote shards that a rank will read soon, ahead of its workers."""

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from data.errors import DataError, LoaderError
from data.shards.remote import FetchError, RemoteCache

_FETCHERS = 4
_MAX_STEPS_AHEAD = 1000


class ShardPrefetcher:
    """Walks the known order of the shards ahead of training, in background threads.

    It stays ahead by at most half of the cache, shared by the ranks of the node (LOCAL_WORLD_SIZE), so that what it
    fetches is not evicted before it is read. A shard that cannot be fetched is left to the workers, who meet it later;
    what else goes wrong in a thread is raised by `advance`.

    Args:
        cache: Where shards go.
        shards_of_step: Step -> {URL: bytes} of the remote shards this rank reads in it. Called from one thread.
        start_step: First step.
    """

    def __init__(self, cache: RemoteCache, shards_of_step: Callable[[int], dict[str, int]], start_step: int) -> None:
        self._cache = cache
        self._shards_of_step = shards_of_step
        self._budget = cache.max_bytes // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._current = start_step
        self._closed = False
        self._failure: BaseException | None = None
        self._moved = threading.Condition()
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for work in (lambda: self._plan(start_step), *[self._fetch] * _FETCHERS):
            threading.Thread(target=self._watched, args=(work,), daemon=True).start()

    def advance(self, step: int) -> None:
        """Tells that training has reached a step.

        Args:
            step: Not before the last one told.

        Raises:
            LoaderError: A thread has failed.
        """
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise LoaderError(f"fetching shards ahead failed: {kind}: {self._failure}") from self._failure
        with self._moved:
            self._current = step
            self._moved.notify()

    def close(self) -> None:
        """Ends the threads after the downloads in progress; does not wait."""
        with self._moved:
            self._closed = True
            self._moved.notify()

    def _watched(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = error
            self.close()

    def _plan(self, cursor: int) -> None:
        ahead: dict[str, tuple[int, int]] = {}
        while (current := self._wait_for_room(cursor, ahead)) is not None:
            cursor = max(cursor, current)
            ahead = {url: use for url, use in ahead.items() if use[0] >= current}
            for url, size in self._shards_of_step(cursor).items():
                if url not in ahead:
                    self._wanted.put(url)
                ahead[url] = cursor, size
            cursor += 1
        for _ in range(_FETCHERS):
            self._wanted.put(None)

    def _wait_for_room(self, cursor: int, ahead: dict[str, tuple[int, int]]) -> int | None:
        """Waits until the step `cursor` may be fetched; returns the step of training, or None when closed."""

        def may_go_on() -> bool:
            if self._closed or cursor <= self._current:
                return True
            used = sum(size for last_step, size in ahead.values() if last_step >= self._current)
            return used < self._budget and cursor - self._current < _MAX_STEPS_AHEAD

        with self._moved:
            self._moved.wait_for(may_go_on)
            return None if self._closed else self._current

    def _fetch(self) -> None:
        while (url := self._wanted.get()) is not None and not self._closed:
            with suppress(FetchError, DataError):
                self._cache.fetch(url)
