"""Trackers are tried before a run, and one that fails in the middle is left out with one warning."""

import sys
from types import SimpleNamespace

import pytest

from data.errors import DataError
from trainer.config.sections import LoggingConfig
from trainer.errors import ConfigError
from trainer.metrics import MetricsWriter
from trainer.trackers import try_trackers

WANDB = LoggingConfig(tensorboard=False, wandb_project="clips")


def fake(monkeypatch, *, key="secret", init=None, log=None):
    """A wandb of ours; returns what was logged."""
    logged = []
    run = SimpleNamespace(log=log or (lambda numbers, step: logged.append(step)), finish=lambda: logged.append("end"))
    module = SimpleNamespace(init=init or (lambda **_: run), api=SimpleNamespace(api_key=key))
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    return logged


def test_wandb_is_refused_before_the_work(tmp_path, monkeypatch):
    fake(monkeypatch, key=None)
    with pytest.raises(ConfigError, match=r"no API key on this machine; run `wandb login`, set WANDB_API_KEY or"):
        try_trackers(tmp_path, WANDB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    try_trackers(tmp_path, WANDB)

    def no_network(**settings):
        raise RuntimeError("timed out\nafter 90 s")

    fake(monkeypatch, init=no_network)
    try_trackers(tmp_path, WANDB)
    with pytest.raises(ConfigError, match=r"W&B cannot be used \(timed out after 90 s\); run `wandb login`"):
        MetricsWriter(tmp_path, WANDB)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'declip-trainer\[tracking\]'"):
        try_trackers(tmp_path, WANDB)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl", "wandb_id"]


def test_tensorboard_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(DataError, match=r"tensorboard cannot be written .*; repair it, or set logging.tensorboard f"):
        try_trackers(tmp_path, LoggingConfig())
    with pytest.raises(ConfigError, match=r"tensorboard cannot be written .*; repair it, or set logging.tensorboard f"):
        MetricsWriter(tmp_path, LoggingConfig())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="needs the tensorboard package: pip install tensorboard, or set it false"):
        try_trackers(tmp_path, LoggingConfig())


def records(writer, steps):
    for step in steps:
        writer.log({"step": step, "loss": 1.0})


def test_wandb_that_fails_later_is_left_out_with_one_warning(tmp_path, monkeypatch, capsys):
    def log(numbers, step):
        if step == 2:
            raise ConnectionError("the network\nis gone")
        assert step < 2

    ended = fake(monkeypatch, log=log)
    writer = MetricsWriter(tmp_path, WANDB)
    records(writer, range(1, 5))
    writer.close()
    assert capsys.readouterr().err == (
        "warning: W&B fails (the network is gone) and gets no more numbers; all of them are in metrics.jsonl\n"
    )
    assert ended == []
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4
    # At the very end as well.
    fake(monkeypatch, init=lambda **_: SimpleNamespace(log=log, finish=lambda: 1 / 0))
    MetricsWriter(tmp_path, WANDB).close()
    assert capsys.readouterr().err.startswith("warning: W&B fails (division by zero)")


def test_a_full_disk_under_tensorboard_does_not_end_the_run(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, LoggingConfig())
    log = writer._trackers._open["TensorBoard"][0]
    (summary,) = [cell.cell_contents for cell in log.__closure__]
    events = summary.file_writer.event_writer._async_writer
    with open("/dev/full", "wb", buffering=0) as disk:  # noqa: PTH123 - in place of the writer's own file
        events._writer._writer = disk
        records(writer, [1])
        # The thread that writes has met the disk.
        events._worker.join(timeout=20)
        records(writer, [2, 3])
    writer.close()
    said = capsys.readouterr()
    assert said.err == (
        "warning: TensorBoard fails (No space left on device) and gets no more numbers; all of them are in "
        "metrics.jsonl\n"
    )
    assert said.out == ""
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
