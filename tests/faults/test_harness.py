"""The harness sees what it is there to see: changed numbers, lost steps, leftovers."""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import ClassVar

import pytest

from benchmarks.chaos import markdown, problems, summary
from tests.faults import processes, records
from tests.faults.attempt import Attempt, Options
from tests.faults.campaign import Outcome, lost_at_end, plan
from tests.faults.disk import SmallDisk, limit_files
from tests.faults.kinds import KINDS
from tests.faults.server import ShardServer

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def write_metrics(run_dir, *found):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def test_differences_are_bitwise_and_ignore_the_clock():
    reference = records.steps([{"step": 1, "loss": 0.5, "step_seconds": 1.0}, {"step": 2, "loss": 0.25}])
    same = records.steps([{"step": 1, "loss": 0.5, "step_seconds": 9.0}, {"event": "checkpoint", "step": 1}])
    assert records.differences(same, reference, whole=False) == []
    assert records.differences(same, reference, whole=True) == ["2: missing"]
    close = records.steps([{"step": 1, "loss": 0.5 + 2**-53}, {"step": 3, "loss": 0.0}])
    assert records.differences(close, reference, whole=False) == [
        f"1: loss {0.5 + 2**-53} instead of 0.5",
        "3: not in the reference",
    ]
    lacking = records.steps([{"step": 2}])
    assert records.differences(lacking, reference, whole=False) == ["2: loss None instead of 0.25"]


def test_evaluations_count_by_step_and_set():
    first = {"event": "eval", "step": 5, "set": "a", "acc1": 0.5, "seconds": 1.0}
    untimed = {key: value for key, value in first.items() if key != "seconds"}
    assert records.evaluations([first, {"step": 5}]) == {(5, "a"): untimed}
    ours, theirs = records.evaluations([{**first, "acc1": 0.25}]), records.evaluations([first])
    assert records.differences(ours, theirs, whole=True) == ["(5, 'a'): acc1 0.25 instead of 0.5"]


def test_only_what_an_attempt_wrote_itself_is_its_own(tmp_path):
    old = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    write_metrics(tmp_path / "run", *old)
    attempt = Attempt([sys.executable, "-c", ""], [], tmp_path / "run", tmp_path / "log", "own", Options())
    attempt.process.wait()
    assert not attempt.begun()
    write_metrics(tmp_path / "run", old[0], {"event": "resumed", "step": 1})
    assert (attempt.begun(), attempt.advanced()) == (True, 0)
    write_metrics(tmp_path / "run", old[0], {"event": "resumed", "step": 1}, *({"step": step} for step in (2, 3, 4)))
    assert attempt.advanced() == 3
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert attempt.advanced() == 3


def test_published_and_half_written(tmp_path):
    assert (records.published(tmp_path), records.half_written(tmp_path)) == (0, {})
    for name in ("step_5", "step_10", ".partial", ".removing-step_1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_10")
    assert records.published(tmp_path) == 10
    left = records.half_written(tmp_path)
    assert set(left) == {".partial", ".removing-step_1"}
    assert records.half_written(tmp_path) == left
    (tmp_path / "checkpoints" / ".partial" / "file").touch()
    assert records.half_written(tmp_path)[".partial"] != left[".partial"]


@pytest.mark.parametrize(
    ("kind", "last_step", "published", "before", "said"),
    [
        ("kill_ranks", 11, 10, 10, ""),
        ("kill_ranks", 15, 10, 10, ""),
        ("kill_ranks", 16, 10, 10, "step 16 was logged before step 15 was published"),
        ("kill_ranks", 8, 5, 10, "step 10 was published, the newest is 5 now"),
        ("disk_full", 18, 10, 10, ""),
        ("term_rank", 13, 13, 10, ""),
        ("term_rank", 13, 10, 10, "told to stop after step 13, saved only step 10"),
    ],
)
def test_what_counts_as_lost(kind, last_step, published, before, said):
    outcome = Outcome(1, kind, 2, "deepspeed", last_step=last_step, published=published)
    assert lost_at_end(outcome, before, KINDS[kind](random.Random(0))) == said


def test_processes_are_found_whoever_their_parent_is(tmp_path):
    spawn = f"import subprocess; subprocess.Popen({SLEEPER!r})"
    attempt = Attempt([sys.executable, "-c", spawn], [], tmp_path, tmp_path / "log", "orphan", Options())
    attempt.process.wait()
    orphans = processes.marked("orphan")
    assert len(orphans) == 1
    assert processes.marked("another") == {}
    assert processes.left_over("orphan", 0.2) == orphans
    processes.send(list(orphans), signal.SIGKILL)
    assert processes.left_over("orphan", 30.0) == {}


def test_an_attempt_that_hangs_is_ended_and_said_to_hang(tmp_path):
    attempt = Attempt(SLEEPER, [], tmp_path, tmp_path / "log", "hang", Options())
    ending = attempt.end(0.2)
    assert (ending.in_time, ending.code) == (False, -signal.SIGKILL)
    assert processes.marked("hang") == {}


def test_ranks_are_told_from_launchers(tmp_path):
    script = tmp_path / "trainer" / "run.py"
    script.parent.mkdir()
    script.write_text("import time; time.sleep(600)")
    children = [
        subprocess.Popen(command, env={**os.environ, processes.MARK: "told", **variables})
        for command, variables in (
            ([sys.executable, "-u", str(script)], {"RANK": "1"}),
            ([*SLEEPER, str(script)], {"RANK": "0"}),
        )
    ]
    deadline = time.monotonic() + 30
    while len(processes.marked("told")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    found = processes.ranks("told")
    for child in children:
        child.kill()
        child.wait()
    assert found == {1: children[0].pid}


def get(url):
    with urllib.request.urlopen(url, timeout=2) as response:
        return response.read()


def test_server_misbehaves_as_told_and_recovers(tmp_path):
    content = random.Random(0).randbytes(300_000)
    (tmp_path / "0.tar").write_bytes(content)
    server = ShardServer(tmp_path)
    url = f"{server.address}/0.tar"
    try:
        assert get(url) == content
        server.misbehave("half", 1)
        assert get(url) == content[:150_000]
        assert get(url) == content
        for mode, error in (
            ("drop", (OSError, http.client.IncompleteRead)),
            ("stall", TimeoutError),
            ("down", urllib.error.HTTPError),
        ):
            server.misbehave(mode, 1)
            with pytest.raises(error):
                get(url)
            assert get(url) == content
        with pytest.raises(urllib.error.HTTPError):
            get(f"{server.address}/../{tmp_path.name}/none")
    finally:
        server.close()


def test_disk_fills_to_the_byte_count_and_empties(tmp_path):
    disk = SmallDisk(tmp_path / "disk", 8)
    try:
        if disk.is_mounted:
            disk.fill(1 << 20)
            with pytest.raises(OSError, match="No space left"):
                (disk.folder / "file").write_bytes(bytes(2 << 20))
            disk.free()
            (disk.folder / "file").write_bytes(bytes(2 << 20))
    finally:
        disk.close()
    write = f"open({str(tmp_path / 'limited')!r}, 'wb', buffering=0).write(bytes(4096))"
    code = f"{write}; {write.replace('wb', 'ab')}"
    limited = subprocess.run([sys.executable, "-c", code], preexec_fn=limit_files(6000), capture_output=True, text=True)
    assert (tmp_path / "limited").stat().st_size == 6000, limited.stderr


def test_plan_is_the_same_again_and_holds_every_kind():
    first, again, other = (plan(seed, 50, list(KINDS)) for seed in (0, 0, 1))
    assert [[vars(fault) for fault in line.faults] for line in first] == [
        [vars(fault) for fault in line.faults] for line in again
    ]
    names = [[fault.name for fault in line.faults] for line in first]
    assert names != [[fault.name for fault in line.faults] for line in other]
    assert [line.ranks for line in first] == [2, 1]
    assert sum(map(len, names)) == 50
    assert set(names[0]) == set(KINDS)
    assert not {"kill_rank_1", "stop_rank"} & set(names[1])


def test_report_counts_each_consequence():
    class Finished:
        disk_method = "tmpfs"
        final_problems: ClassVar[list[str]] = []
        outcomes = (
            Outcome(
                1, "kill_ranks", 2, "deepspeed", struck=True, seconds=3.2, last_step=13, published=10, resumed_at=10
            ),
            Outcome(2, "kill_ranks", 2, "torchrun", struck=True, hang=True, divergent=["3: loss 1 instead of 2"]),
            Outcome(3, "term_rank", 1, "python", struck=True, lost="step 5", left_over=["a"], half_written=["b"]),
        )

    assert summary(Finished.outcomes)[0][1:] == ["2", "0", "3", "120", "at most 3", "0", "1", "1", "0", "0"]
    assert summary(Finished.outcomes)[-1][6:] == ["1", "1", "1", "1", "1"]
    assert Finished.outcomes[0].clean
    assert [text.split(":")[0] for text in problems(Finished)] == [
        "fault 2, kill_ranks (torchrun)",
        "fault 3, term_rank (python)",
    ]
    assert "differs: 3: loss 1 instead of 2" in markdown(Finished, "command", complete=True)
    assert "has not come to its end" in markdown(Finished, "command", complete=False)
