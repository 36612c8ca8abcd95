"""Measurements: counts are exact, memory is seen, jobs are isolated and their repetitions must agree."""

import pytest
import torch

from benchmarks import loss
from benchmarks.harness import Measurement, count_flops, measure
from benchmarks.processes import Job, Peer, check_agreement, interleave, run_in_fresh_process

FAKE_LOSS = """
class ClipLoss:
    def __call__(self, image_features, text_features, logit_scale):
        return 0 * (image_features * text_features).sum() * logit_scale.sum() + 123
"""


def test_flops_of_every_form_of_product():
    left, right, out = torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5)
    batched = torch.ones(7, 2, 3)
    assert count_flops(lambda: left @ right) == 60
    assert count_flops(lambda: torch.mm(left, right, out=out)) == 60
    assert count_flops(lambda: out.addmm_(left, right)) == 60
    assert count_flops(lambda: torch.addmm(out, left, right)) == 60
    assert count_flops(lambda: batched @ batched.transpose(1, 2)) == 7 * 24


def test_measure_counts_the_work_of_one_run_and_times_every_part():
    left = torch.ones(4, 4)
    calls = []
    found = measure({"product": lambda: calls.append(left @ left), "nothing": lambda: None}, repeats=3)
    assert len(calls) == 3 + 1
    assert found.figures == {"flops": 128}
    assert found.seconds.keys() == {"product", "nothing", "total"}
    assert 0 <= found.seconds["nothing"] <= found.seconds["total"]


def test_peak_memory_sees_what_was_freed_again():
    mib = 64
    torch.ones(mib * 2**18).sum()
    found = measure({"allocate": lambda: torch.ones(mib * 2**18).sum()}, repeats=1)
    assert mib - 1 <= found.mib["peak"] <= mib + 16


def test_repetitions_keep_least_time_and_largest_memory_and_must_agree():
    first = Measurement({"total": 2.0}, {"peak": 5.0}, {"flops": 7})
    merged = first.merged(Measurement({"total": 3.0}, {"peak": 6.0}, {"flops": 7}))
    assert merged == Measurement({"total": 2.0}, {"peak": 6.0}, {"flops": 7})
    with pytest.raises(RuntimeError, match="'flops' must repeat exactly but was 7 and then 8"):
        first.merged(Measurement({"total": 2.0}, {"peak": 5.0}, {"flops": 8}))


def test_implementations_must_compute_the_same():
    results = {"ours": Measurement(figures={"loss": 1.0}), "theirs": Measurement(figures={"loss": 1.01})}
    check_agreement(results, "loss", relative=0.1)
    with pytest.raises(RuntimeError, match=r"did not compute the same loss.*1\.01"):
        check_agreement(results, "loss", relative=1e-3)


def test_jobs_alternate():
    order = []

    def runner(job):
        order.append(job.arguments["name"])
        return Measurement()

    interleave(runner, {name: Job(measure, {"name": name}) for name in "ab"}, rounds=2)
    assert order == ["a", "b", "a", "b"]


@pytest.mark.slow
def test_fresh_process_imports_the_peer_it_is_told_to(tmp_path):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "loss.py").write_text(FAKE_LOSS)
    arguments = {"batch_size": 4, "width": 8, "repeats": 1}
    found = run_in_fresh_process(Job(loss.measure_peer, arguments, Peer("fake", str(tmp_path))))
    assert found.figures["loss"] == 123
    # What the FLOP counter imports at its first use is not charged to whoever has not imported it before.
    assert found.mib["peak"] < 16
    assert found.seconds["total"] > 0


@pytest.mark.slow
def test_failure_in_a_fresh_process_is_shown():
    with pytest.raises(RuntimeError, match=r"benchmarks\.loss\.measure_ours(?s:.)*unexpected keyword argument 'depth'"):
        run_in_fresh_process(Job(loss.measure_ours, {"depth": 3}))


def measure_holes() -> Measurement:
    """Of every mebibyte all but the last bytes are freed again, in the middle of the heap."""

    def allocate():
        return [(torch.ones(2**18), torch.ones(16))[1] for _ in range(64)]

    allocate()
    return measure({"allocate": allocate}, repeats=1)


@pytest.mark.slow
def test_peak_memory_in_a_fresh_process_has_no_holes_between_living_blocks():
    assert run_in_fresh_process(Job(measure_holes, {})).mib["peak"] < 8
