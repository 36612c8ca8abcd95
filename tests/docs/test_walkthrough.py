"""Every command of docs/walkthrough.md, as printed but for what it installs and the port of its server."""

import json
import re
import sys

import pytest

from tests.docs import guide
from tests.trainer.harness import ROOT, free_port, metrics

STEPS = 120
# The two programs that the guide gives environments of their own: what runs instead of them.
PROGRAMS = {
    "walkthrough/env/bin/img2dataset": "tests.docs.like_img2dataset",
    "walkthrough/env_benchmark/bin/clip_benchmark": "tests.trainer.clip_benchmark_cli",
}


def commands() -> str:
    """All commands of the guide in order, without those that install."""
    script = "".join(text for _, text in guide.blocks(guide.read("walkthrough"), "bash"))
    kept = [line for line in script.splitlines() if not re.match(r"python -m venv|\S+/pip install", line)]
    assert len(kept) == len(script.splitlines()) - 4
    return "\n".join(kept).replace("8642", str(free_port())) + "\n"


@pytest.mark.slow(seconds=100)
@pytest.mark.timeout(1200)
def test_the_guide_runs_as_printed(tmp_path):
    guide.copy_project(tmp_path)
    for path, module in PROGRAMS.items():
        program = tmp_path / path
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    guide.run_commands(commands(), tmp_path, 1100, HF_HUB_OFFLINE="1")

    run = tmp_path / "walkthrough" / "run"
    records = metrics(run)
    assert max(record["step"] for record in records) == STEPS
    assert [record["step"] for record in records if record.get("event") == "resumed"] == [70]
    evaluated = json.loads((run / "evaluation" / f"step_{STEPS}" / "drawn_zeroshot_classification.json").read_text())
    judged = json.loads((tmp_path / "walkthrough" / "clip_benchmark.json").read_text())
    assert judged["metrics"] == pytest.approx(evaluated["metrics"], abs=1e-6)
    # Chance is 1/48.
    assert evaluated["metrics"]["acc1"] > 0.1
    assert (tmp_path / "walkthrough" / "table.csv").read_text().count("zeroshot_classification") == 2
    assert (run / "report.html").stat().st_size > 100_000
