"""metrics.jsonl: valid JSON whatever the numbers, and cut back to the checkpoint on resume."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from trainer.config.sections import LoggingConfig
from trainer.errors import ConfigError
from trainer.metrics import MetricsWriter, evaluated_sets, truncate_records

QUIET = LoggingConfig(tensorboard=False)


def test_non_finite_numbers_become_null(tmp_path):
    writer = MetricsWriter(tmp_path, QUIET)
    writer.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    writer.event("skipped_step", 1, in_a_row=1)
    writer.close()
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
    assert second == {"event": "skipped_step", "step": 1, "in_a_row": 1}


def test_truncation_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 2, "lo')
    bad = tmp_path / "bad_samples.jsonl"
    bad.write_text("".join(json.dumps({"step": step, "key": "a"}) + "\n" for step in (2, 3, 4)))
    assert truncate_records(tmp_path, 3) == 3
    assert path.read_text() == "".join(lines[:3])
    assert [json.loads(line)["step"] for line in bad.read_text().splitlines()] == [2, 3]
    assert truncate_records(tmp_path, 3) == 0
    assert truncate_records(tmp_path / "nowhere", 3) == 0


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, LoggingConfig())
    writer.log({"step": 1, "loss": 2.0, "state_hash": "ab"})
    writer.log({"step": 2, "loss": 1.5})
    writer.event("eval", 2, set="val", acc1=0.25, samples=10)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/val/acc1")] == [(2, 0.25)]


def test_wandb_continues_a_run_and_keeps_namesakes_apart(tmp_path, monkeypatch):
    opened = []

    def init(**settings):
        opened.append(settings)
        return SimpleNamespace(log=lambda numbers, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = LoggingConfig(tensorboard=False, wandb_project="clips")
    for parent in ("first", "first", "second"):
        run_dir = tmp_path / parent / "seed0"
        run_dir.mkdir(parents=True, exist_ok=True)
        MetricsWriter(run_dir, config).close()
    assert [settings["name"] for settings in opened] == ["seed0"] * 3
    started, resumed, namesake = [settings["id"] for settings in opened]
    assert started == resumed != namesake


def test_a_full_disk_is_one_clear_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path, QUIET)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
        writer.event("eval", 1, set="a")


def test_sets_on_record(tmp_path):
    writer = MetricsWriter(tmp_path, QUIET)
    writer.event("eval", 1, set="a", acc1=0.5)
    writer.event("eval", 2, set="a", acc1=0.5)
    writer.event("eval", 2, set="b", acc1=0.5)
    writer.close()
    assert evaluated_sets(tmp_path, 1) == {"a"}
    assert evaluated_sets(tmp_path, 2) == {"a", "b"}
    assert evaluated_sets(tmp_path / "nowhere", 2) == set()
