"""A web server for shards that can be told to misbehave."""

import http.server
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any


class ShardServer:
    """Serves the files of a folder on this machine.

    Attributes:
        mode: What happens to requests: "good"; "drop" closes the connection somewhere in the answer; "stall" sends a
            part and falls silent until the client gives up; "slow" pauses in the middle; "half" sends the first half
            as if it were the whole file; "down" answers 503.
        times: How many requests of each file are treated so (of any one file if "stall"); the next are answered well.
        served: Requests by path.
    """

    def __init__(self, folder: Path) -> None:
        self.mode, self.times = "good", 0
        self.pause_s = 0.0
        self.served: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self, folder)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Start of every URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def misbehave(self, mode: str, times: int, pause_s: float = 0.0) -> None:
        """Begin a fault."""
        self._counted.clear()
        self._release.clear()
        self.times, self.pause_s, self.mode = times, pause_s, mode

    def behave(self) -> None:
        """End the fault and let go of whoever waits."""
        self.mode = "good"
        self._release.set()

    def close(self) -> None:
        """Stop serving."""
        self.behave()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler, folder: Path) -> None:
        path = folder / request.path.strip("/")
        self.served[path.name] += 1
        if path.parent != folder or not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes()
        mode = self._mode_for(path.name)
        if mode == "down":
            request.send_error(503)
            return
        if mode == "half":
            content = content[: len(content) // 2]
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        try:
            if mode in ("good", "half"):
                request.wfile.write(content)
                return
            request.wfile.write(content[: len(content) // 3])
            if mode == "drop":
                # A reset, as from a balancer that lost its back end; without this the client sees an orderly end.
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.connection.close()
            elif mode == "stall":
                self._release.wait()
            else:
                time.sleep(self.pause_s)
                request.wfile.write(content[len(content) // 3 :])
        except OSError:
            # The client has gone, as a killed run does.
            return

    def _mode_for(self, name: str) -> str:
        # Whoever waits for a stalled file waits for the client's whole timeout: one file is enough.
        key = "any" if self.mode == "stall" else name
        self._counted[key] += 1
        return self.mode if self._counted[key] <= self.times else "good"
