"""When too many samples are bad, and what is said where a batch is larger than its set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.errors import BadSample
from data.images.decode import open_image
from data.order import GlobalOrder, OrderSource
from trainer import reporting
from trainer.assemble import _check_batch
from trainer.errors import ConfigError
from trainer.reporting import allowed_bad_samples


@pytest.mark.parametrize(
    ("fraction", "tried", "size", "most"),
    [
        (0.01, 33, 400, 4),
        (0.01, 33, 12_000_000, 10),
        (0.01, 5000, 400, 50),
        (0.01, 33, 40, 0),
        (0.0, 33, 400, 0),
        (1.0, 33, 400, 400),
    ],
)
def test_a_share_is_judged_over_a_thousand_or_the_whole_set(fraction, tried, size, most):
    allowed = allowed_bad_samples(fraction, tried, size)
    assert most <= allowed < most + 1


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_the_run_ends_at_the_first_bad_sample_that_is_too_many(fraction, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting.dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), [mine]))
    run = SimpleNamespace(
        place=SimpleNamespace(world_size=1),
        plan=SimpleNamespace(global_batch_size=32),
        config=SimpleNamespace(data=SimpleNamespace(max_bad_fraction=fraction)),
        state=SimpleNamespace(step=0, bad_samples=0),
        window=SimpleNamespace(bad=[]),
        data=SimpleNamespace(loader=SimpleNamespace(order=SimpleNamespace(num_samples=(300, 100)))),
        metrics=None,
        run_dir=tmp_path,
    )
    ended = None
    for step in range(1, 10):
        run.state.step = step
        run.window.bad = [{"shard": "0.tar", "key": f"k{step}", "reason": "broken"}]
        try:
            reporting._report_bad_samples(run, 1)
        except ConfigError as error:
            ended = str(error)
            break
    # 1 % of 400 samples is 4.
    assert step == (1 if fraction == 0.0 else 5)
    assert f"{step} of {step * 32 + step} samples could not be read" in ended
    assert f"0.tar sample 'k{step}': broken" in ended


def test_the_reason_is_the_same_in_every_run():
    # Pillow's message has the address of a buffer in it.
    broken = b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x10\x00\x10\x03" + bytes(9) + b"\xff\xda\x00\x08\x03" + bytes(40)
    with pytest.raises(BadSample) as caught:
        open_image(broken).decode()
    assert "0x" not in caught.value.reason, caught.value.reason
    assert BadSample("cannot identify <_io.BytesIO object at 0x7f3a5c0d1e40>").reason == (
        "cannot identify <_io.BytesIO object>"
    )
    assert json.dumps(BadSample("a bad marker at 0xffd9").reason) == '"a bad marker at 0xffd9"'


def test_a_batch_larger_than_its_set_is_told():
    lines = []
    console = SimpleNamespace(warn=lines.append)
    sources = [OrderSource("big", np.array([100])), OrderSource("small", np.array([7, 8]))]
    _check_batch(console, GlobalOrder(sources, seed=0, global_batch_size=30))
    assert lines == []
    _check_batch(console, GlobalOrder(sources, seed=0, global_batch_size=32))
    assert len(lines) == 1
    assert lines[0].startswith("data source 'small' has 15 samples and each global batch draws 16 from it")
    assert "train.global_batch_size" in lines[0]
