"""Tables: whole words in pipes and logs, nothing taken for markup."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.evaluation.results import SetResult, results_table
from trainer.metrics import Console
from trainer.tables import make_table, print_table

ROOT = Path(__file__).resolve().parents[2]
LONG = "a-collection-of-received-" + "x" * 200
HOSTILE = [
    "[red]name[/red]",
    "[/]",
    "[link=http://x]y",
    ":warning:",
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "\u202ertl",
    "[bold",
]


@pytest.fixture(params=[None, "20"])
def columns(request, monkeypatch):
    """COLUMNS unset or small; colours asked for, which rich takes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    if request.param is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", request.param)


def test_whole_words_where_nobody_watches(columns, capsys):
    result = SetResult(
        LONG,
        {
            "retrieval": dict.fromkeys(
                [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)], 0.5
            )
        },
        7,
        0,
    )
    Console(True).table(results_table([result]))
    rows = [line for line in capsys.readouterr().out.splitlines() if "50.00" in line]
    assert len(rows) == 6
    assert all(LONG in row and "_retrieval_recall@" in row for row in rows)


def test_no_text_is_markup_or_control(columns, capsys):
    print_table(make_table(["name", "value"], [(name, "1") for name in HOSTILE], ["value"]))
    out = capsys.readouterr().out
    for shown in (
        "[red]name[/red]",
        "[/]",
        "[link=http://x]y",
        ":warning:",
        r"\x1b[31mred\x1b[0m",
        r"a\nb",
        r"\u202ertl",
    ):
        assert f" {shown} " in out
    assert "\x1b[31m" not in out and "\u202e" not in out


def test_nothing_is_cut_off_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    print_table(make_table(["name", "value"], [(LONG, "1")]))
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.count("x") == 200


def test_lines_and_warnings(capsys):
    console = Console(True)
    for name in HOSTILE:
        console.line(name)
        console.warn(name)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b" not in text and "\u202e" not in text
        assert all(name in text for name in HOSTILE if name.isprintable())


def test_every_table_is_made_in_one_place():
    for package in ("trainer", "data", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            if path != ROOT / "trainer" / "tables.py":
                assert ".add_row(" not in path.read_text(encoding="utf-8"), path


def test_an_encoding_that_lacks_a_letter_does_not_end_the_program():
    code = (
        "from data.errors import escape_unencodable; from trainer.tables import make_table, print_table\n"
        "escape_unencodable(); print('\u00fc'); print_table(make_table(['n'], [('\u6f22',)]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert r"\xfc" in finished.stdout and r"\u6f22" in finished.stdout
