"""The command lines about a trained run: evaluate, overlap, report."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.trainer.harness import ROOT, metrics, run_trainer, write_eval_set, write_recipe

TASKS = ["zero_shot", "retrieval", "linear_probe", "bias"]


@pytest.fixture(scope="module")
def run(shards, cache, tmp_path_factory) -> Path:
    """A run of four steps with an evaluation set whose training half has the same pictures' classes."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = write_eval_set(folder / "set")
    write_eval_set(folder / "train_set", samples=100)
    (folder / "train_set" / "test").rename(data / "train")
    entry = {"data": str(data), "tasks": TASKS, "probe": {"odd": ["red bar", "green bar"]}, "probe_group": "key"}
    recipe = write_recipe(
        folder / "tiny.yaml",
        shards,
        train={"steps": 4, "log_every": 2},
        eval={"batch_size": 8, "sets": {"shapes": entry}},
    )
    run_trainer(["--recipe", str(recipe), "--run_dir", str(folder / "run")], cache)
    return folder / "run"


def command(module: str, *arguments: object, cache: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run a module of the trainer, on several ranks through torchrun."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    environment = {**os.environ, "DECLIP_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*launcher, module, *map(str, arguments)]
    return subprocess.run(words, env=environment, cwd=cache, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_evaluate_on_one_and_three_ranks_finds_what_training_logged(run, cache, tmp_path):
    alone = command("trainer.evaluate", run, "--device", "cpu", cache=cache)
    assert alone.returncode == 0, alone.stderr
    records = json.loads((run / "evaluation" / "step_4.json").read_text())
    assert [record["task"] for record in records] == [
        "zeroshot_classification", "zeroshot_retrieval", "linear_probe", "bias",
    ]  # fmt: skip
    assert {(record["dataset"], record["model"], record["language"]) for record in records} == {
        ("shapes", "vit_nano_p8_32", "en")
    }
    logged = [record for record in metrics(run) if record.get("event") == "eval"][-1]
    for record in records:
        for name, value in record["metrics"].items():
            assert logged[name] == value, name
    three = command("trainer.evaluate", run, "--device", "cpu", "--out", tmp_path / "three.json", cache=cache, ranks=3)
    assert three.returncode == 0, three.stderr
    assert json.loads((tmp_path / "three.json").read_text()) == records


@pytest.mark.slow
def test_overlap_finds_training_pictures_in_the_evaluation_set(run, cache):
    finished = command("trainer.overlap", run, "--device", "cpu", "--distance", 0, cache=cache)
    assert finished.returncode == 0, finished.stderr
    content = json.loads((run / "evaluation" / "overlap_step_4.json").read_text())
    (entry,) = content["sets"]
    assert content["train_samples"] == 96
    assert entry["metrics"]["overlap"] == len(entry["duplicates"]) / 37


class Page(HTMLParser):
    """Collects what a browser would load or run, and the embedded records."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str | None] = []
        self.pictures = self.curves = 0
        self.records = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.loads += [values[name] for name in ("src", "href", "xlink:href") if values.get(name)]
        self.pictures += tag == "img"
        self.curves += tag == "svg"
        if tag == "script":
            self.scripts.append(values.get("type"))

    def handle_data(self, data: str) -> None:
        if data.lstrip().startswith('[{"'):
            self.records = data


@pytest.mark.slow
def test_report_is_one_file_that_says_what_was_logged(run, cache, tmp_path):
    finished = command("trainer.report", run, "--device", "cpu", "--out", tmp_path / "page.html", cache=cache)
    assert finished.returncode == 0, finished.stderr
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.scripts == ["application/json"]
    assert all(re.match(r"data:|#", target) for target in page.loads)
    (embedded,) = json.loads(page.records)
    logged = metrics(run)
    assert embedded["steps"] == [record for record in logged if "event" not in record]
    assert embedded["events"] == [record for record in logged if "event" in record]
    assert page.curves >= 10 and page.pictures >= 72


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("trainer.evaluate", ["nowhere"], "nowhere has no config.yaml"),
        ("trainer.evaluate", ["RUN", "--set", "x"], "expected NAME=DATA"),
        ("trainer.evaluate", ["RUN", "--tasks", "zero_shot"], "--tasks is of the sets given"),
        ("trainer.evaluate", ["RUN", "--reference", "shapes"], "robustness needs that set and a shifted one"),
        ("trainer.evaluate", ["RUN", "--step", "3"], "no checkpoint of step 3"),
        ("trainer.overlap", ["RUN", "--distance", "16"], "not in 0 to 15"),
        ("trainer.report", ["nowhere"], "cannot be read"),
    ],
)
def test_one_line_for_a_mistake(run, cache, module, arguments, expected):
    given = [str(run) if word == "RUN" else word for word in arguments]
    finished = command(module, *given, cache=cache)
    assert finished.returncode == 2
    assert expected in finished.stderr
    assert "Traceback" not in finished.stderr
