"""Ctrl-C ends the commands of this package in one line."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("moment", ["importing", "reading"])
def test_an_interrupt_is_one_line(tmp_path, moment):
    # Takes connections and never answers.
    connected = []
    server = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}/{{0..99}}.tar"
    if moment == "importing":
        # The module that everything needs, still being imported.
        (tmp_path / "numpy").mkdir()
        (tmp_path / "numpy" / "__init__.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "data.index", url],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "DECLIP_CACHE": str(tmp_path / "cache")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background gives its children an ignored one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        if moment == "importing":
            assert process.stdout.readline() == "here\n"
        else:
            connected.append(server.accept())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        server.close()
    assert process.returncode == 130
    assert errors == "interrupted\n"
