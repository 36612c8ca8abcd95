"""The learning rate at known steps."""

import math

import pytest

from trainer.engine.schedule import learning_rate

SETTINGS = {"peak_lr": 1e-3, "start_lr": 1e-4, "end_lr": 1e-5, "warmup_steps": 2500, "steps": 128_000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 1e-4),
        (1250, 1e-4 + 9e-4 * 1249 / 2499),
        (2499, 1e-4 + 9e-4 * 2498 / 2499),
        (2500, 1e-3),
        (65_250, 1e-5 + 9.9e-4 * 0.5),
        (128_000, 1e-5),
    ],
)
def test_against_the_formula(step, expected):
    assert learning_rate(step, **SETTINGS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_warmup_starts_at_the_peak(warmup_steps):
    rates = [
        learning_rate(step, peak_lr=2.0, start_lr=0.5, end_lr=0.0, warmup_steps=warmup_steps, steps=11)
        for step in range(1, 12)
    ]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0 + math.cos(math.pi * 0.5))
    assert rates[-1] == 0.0
    assert rates == sorted(rates, reverse=True)


def test_run_that_is_all_warmup():
    rates = [learning_rate(k, peak_lr=1.0, start_lr=0.0, end_lr=0.0, warmup_steps=3, steps=3) for k in (1, 2, 3)]
    assert rates == [0.0, 0.5, 1.0]
