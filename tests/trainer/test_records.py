"""Files of records that end early, or hold what crashes and full disks leave, are read for what is whole in them."""

import json
from pathlib import Path

import pytest

from trainer.config.sections import LoggingConfig
from trainer.errors import ConfigError
from trainer.export.card import _figures
from trainer.metrics import MetricsWriter, evaluated_sets, truncate_records
from trainer.records import read_records
from trainer.report.history import read_histories

STEPS = [{"step": step, "samples": 8 * step, "loss": 1.0} for step in (1, 2, 3)]
EVALUATED = {"event": "eval", "step": 2, "set": "mine", "acc1": 0.5}
# Of a killed process, a full disk, a power cut, another program, and what is JSON but no record.
TORN = [
    b'{"step": 2, "lo',
    b'{"event": "eval", "step": 2, "set": "mi',
    b"\0" * 4096,
    b"\x93NUMPY\xff\xfe\x00",
    b"[" * 100_000,
    b"3",
    b"null",
    b'[{"step": 1}]',
    b'{"event": "eval", "set": "mine"}',
    b'{"step": "2"}',
    b'{"step": ' + b"9" * 5000 + b"}",
    "café".encode("utf-16"),
]


def line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def whole(run_dir: Path, *before: bytes, end: bytes = b"") -> Path:
    run_dir.mkdir(exist_ok=True)
    parts = [line(STEPS[0]), line(STEPS[1]), *before, line(EVALUATED), line(STEPS[2]), end]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(parts))
    return run_dir


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
@pytest.mark.parametrize("where", ["middle", "end"])
def test_torn_lines_cost_no_other(where, torn, tmp_path):
    run = whole(tmp_path / "run", torn + b"\n") if where == "middle" else whole(tmp_path / "run", end=torn)
    path = run / "metrics.jsonl"
    assert read_records(path).whole == [*STEPS[:2], EVALUATED, STEPS[2]]
    (history,) = read_histories([run])
    assert history.steps == STEPS and history.final_evaluations() == {"mine": EVALUATED} and history.torn
    assert "| mine | 50.00 |" in _figures(path, 3)
    assert evaluated_sets(run, 2) == {"mine"}
    assert truncate_records(run, 2)
    assert path.read_bytes() == line(STEPS[0]) + line(STEPS[1]) + line(EVALUATED)


def test_a_record_that_lacks_only_its_end_of_line_is_whole(tmp_path):
    run = whole(tmp_path / "run", end=b'{"event": "checkpoint", "step": 3}')
    assert len(read_records(run / "metrics.jsonl").whole) == 5
    assert truncate_records(run, 3) == 0
    assert (run / "metrics.jsonl").read_bytes().endswith(b'{"event": "checkpoint", "step": 3}\n')


def test_nothing_is_appended_to_a_torn_line(tmp_path):
    run = whole(tmp_path / "run", end=b'{"step": 4, "lo')
    writer = MetricsWriter(run, LoggingConfig(tensorboard=False))
    writer.event("resumed", 3)
    writer.close()
    records, torn = read_records(run / "metrics.jsonl")
    assert records[-1] == {"event": "resumed", "step": 3} and torn == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\0\0\0\0", b'{"step": 1, "sam'])
def test_a_file_without_a_record_is_said_to_have_none(content, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_records(tmp_path / "metrics.jsonl").whole == []
    assert "The run was not evaluated." in _figures(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(ConfigError, match="no logged step yet"):
        read_histories([tmp_path])
    truncate_records(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
