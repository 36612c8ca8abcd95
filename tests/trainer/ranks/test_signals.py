"""Told to stop from outside: by a signal at any moment, through any launcher, or by the launcher's death."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.trainer.harness import BIN, WORKER, Launched, command_of, ds_config, metrics, steps, write_recipe


def catches(process, number):
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def session(leader):
    """Processes of a session that are still there, without the dead that nobody has collected."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_signal_before_training_ends_all_ranks_cleanly(shards, cache, tmp_path):
    """While one rank imports: both leave where they next agree, and the job script sees that it was no end."""
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, **WORKER)
    launched = Launched(
        ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(1)], 2, cache, fresh=True
    )
    early = launched.processes[1]
    while early.poll() is None and not catches(early.pid, signal.SIGUSR1):
        time.sleep(0.001)
    early.send_signal(signal.SIGUSR1)
    finished = launched.wait()
    assert finished.codes == [0, 0], finished.output
    assert finished.output.count("told to stop before the first step") == 1
    assert (run_dir / "stopped_early").exists()
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "whole_group"),
    [
        # What `kill` and a scheduler do: deepspeed's upper process dies of it alone, the ranks' parent lives on.
        ("deepspeed", signal.SIGTERM, False),
        # Ctrl-C in a terminal, where the reader of a pipe (`| tee log`) dies as well.
        ("deepspeed", signal.SIGINT, True),
        # torchrun passes Ctrl-C on to ranks that already have it.
        ("torchrun", signal.SIGINT, True),
        # The ranks' store dies with torchrun, so they can leave but no longer agree on a checkpoint.
        ("torchrun", signal.SIGKILL, False),
    ],
)
def test_stopped_launcher_leaves_a_checkpoint_and_no_ranks(name, number, whole_group, shards, cache, tmp_path):
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, train={"steps": 5000}, **WORKER)
    flags = ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(1), "--method.w_tss", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DECLIP_CACHE": str(cache)}
    launcher = subprocess.Popen(
        [*command_of(name, 2), *flags],
        env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        records = run_dir / "metrics.jsonl"
        while launcher.poll() is None and not (records.is_file() and records.read_text().count("\n") >= 2):
            time.sleep(0.05)
        assert launcher.poll() is None, launcher.stdout.read().decode()
        launcher.stdout.close()
        (os.killpg if whole_group else os.kill)(launcher.pid, number)
        launcher.wait(timeout=60)
        deadline = time.monotonic() + 60
        while session(launcher.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert session(launcher.pid) == []
    finally:
        for process in session(launcher.pid):
            os.kill(process, signal.SIGKILL)
    if number == signal.SIGKILL:
        return
    last = max(steps(run_dir))
    assert [record["step"] for record in metrics(run_dir) if record.get("event") == "checkpoint"] == [last]
    assert (run_dir / "checkpoints" / f"step_{last}").is_dir()
    assert (run_dir / "stopped_early").exists()
