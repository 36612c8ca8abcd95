"""Rows, targets and the files made of them."""

import json

import pytest

from benchmarks.report import Row, Target, compare, markdown_table, number_text, write_results


def test_one_row_per_reference_with_the_target_on_the_first():
    rows = compare("loss", "B = 2", "peak", "MiB", {"ours": 1.0, "theirs": 4.0, "older": 2.0}, Target(0.3))
    assert [(row.reference, row.ratio, row.met) for row in rows] == [("theirs", 0.25, True), ("older", 0.5, None)]


def test_ours_alone_is_a_row():
    (row,) = compare("loss", "B = 2", "peak", "MiB", {"ours": 700.0}, Target(600, of="value"))
    assert (row.ratio, row.met, row.reference_value) == (None, False, None)


@pytest.mark.parametrize(
    ("target", "met", "text"),
    [
        (Target(2.0), True, "<= 2x"),
        (Target(2.0, at_most=False), False, ">= 2x"),
        (Target(2.9, of="value"), False, "<= 2.9"),
    ],
)
def test_targets(target, met, text):
    assert target.met(value=3.0, ratio=1.5) is met
    assert str(target) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345, "12,345"), (1234.5, "1,234"), (600.0, "600"), (123.4, "123"), (0.5, "0.500"), (3e-7, "3.0e-07"), (0, "0")],
)
def test_numbers(value, text):
    assert number_text(value) == text


def test_files(tmp_path):
    rows = [Row("loss", "B = 2", "peak", "MiB", 1.0, "theirs", 4.0, Target(0.3))]
    write_results(tmp_path, "python -m benchmarks", rows)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python -m benchmarks"
    assert results["machine"].keys() >= {"processor", "cores", "memory_gib", "python", "torch", "open_clip_torch"}
    assert results["rows"] == [
        {
            "benchmark": "loss",
            "case": "B = 2",
            "quantity": "peak",
            "unit": "MiB",
            "ours": 1.0,
            "reference": "theirs",
            "reference_value": 4.0,
            "target": "<= 0.3x",
            "ratio": 0.25,
            "met": True,
        }
    ]
    header, rule, line = markdown_table(rows).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    assert line == "| loss | B = 2 | peak | MiB | 1 | theirs | 4 | 0.250 | <= 0.3x | yes |"
