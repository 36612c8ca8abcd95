"""The command lines about a trained run: evaluate, overlap, report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_module
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
    environment = {**os.environ, "DECLIP_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [module, *map(str, arguments)]
    if ranks == 1:
        return run_module(words[0], words[1:], environment, cache)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return subprocess.run(
        [*launcher, *words], env=environment, cwd=cache, capture_output=True, text=True, timeout=300, check=False
    )


def read_records(folder: Path) -> dict[str, dict]:
    """What an evaluation wrote, by file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_evaluate_on_one_and_three_ranks_finds_what_training_logged(run, cache, tmp_path):
    alone = command("trainer.evaluate", run, "--device", "cpu", cache=cache)
    assert alone.returncode == 0, alone.stderr
    records = read_records(run / "evaluation" / "step_4")
    assert list(records) == [
        "shapes_bias", "shapes_linear_probe", "shapes_zeroshot_classification", "shapes_zeroshot_retrieval",
    ]  # fmt: skip
    assert {(record["dataset"], record["model"], record["language"]) for record in records.values()} == {
        ("shapes", "vit_femto_p8_32", "en")
    }
    logged = [record for record in metrics(run) if record.get("event") == "eval"][-1]
    for record in records.values():
        for name, value in record["metrics"].items():
            assert logged[name] == value, name
    three = command("trainer.evaluate", run, "--device", "cpu", "--out", tmp_path / "three", cache=cache, ranks=3)
    assert three.returncode == 0, three.stderr
    assert read_records(tmp_path / "three") == records


@pytest.mark.slow
def test_clip_benchmark_finds_the_same_on_the_export(run, cache, tmp_path):
    exported, own, peer = (tmp_path / name for name in ("exported", "own", "peer"))
    for module, words in (
        ("trainer.export", ["--to", "openclip", "--out", exported]),
        ("trainer.evaluate", ["--device", "cpu", "--out", own]),
    ):
        finished = command(module, run, *words, cache=cache)
        assert finished.returncode == 0, finished.stderr
    classification, retrieval = run.parent / "set", tmp_path / "set"
    shutil.copytree(classification, retrieval)
    (retrieval / "dataset_type.txt").write_text("retrieval")
    peer.mkdir()
    for task, root in (("zeroshot_classification", classification), ("zeroshot_retrieval", retrieval)):
        words = ["eval", "--model", f"local-dir:{exported}", "--pretrained", "", "--dataset", "wds/shapes"]
        words += ["--dataset_root", root, "--task", task, "--recall_k", 1, 5, 10, "--no_amp", "--num_workers", 0]
        words += ["--output", peer / f"shapes_{task}.json"]
        finished = command("tests.trainer.clip_benchmark_cli", *words, cache=cache)
        assert finished.returncode == 0, finished.stderr
    found = read_records(own)
    for name, record in read_records(peer).items():
        assert record.keys() <= found[name].keys()
        assert record["metrics"].keys() <= found[name]["metrics"].keys()
        for figure, value in record["metrics"].items():
            assert found[name]["metrics"][figure] == pytest.approx(value, abs=1e-6), figure
    finished = command("tests.trainer.clip_benchmark_cli", "build", own, peer, "--output", "table.csv", cache=cache)
    assert finished.returncode == 0, finished.stderr
    assert len((cache / "table.csv").read_text().splitlines()) == 1 + len(found) + 2


@pytest.mark.slow
def test_overlap_finds_training_pictures_in_the_evaluation_set(run, cache):
    finished = command("trainer.overlap", run, "--device", "cpu", "--distance", 0, cache=cache)
    assert finished.returncode == 0, finished.stderr
    content = json.loads((run / "evaluation" / "overlap_step_4.json").read_text())
    (entry,) = content["sets"]
    assert content["train_samples"] == 96
    assert entry["metrics"]["overlap"] == len(entry["duplicates"]) / 37


@pytest.fixture
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        # The root user of a container has no sandbox.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.slow
def test_report_in_a_browser_says_what_was_logged(run, cache, tmp_path, browser):
    path = tmp_path / "page.html"
    finished = command("trainer.report", run, run, "--device", "cpu", "--out", path, cache=cache)
    assert finished.returncode == 0, finished.stderr
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    page.goto(path.as_uri(), wait_until="load")
    assert messages == []
    assert requests.count("file") == 1 and set(requests) <= {"file", "data"}
    assert page.evaluate("[...document.scripts].map(script => script.type)") == ["application/json"]

    logged = metrics(run)
    steps = [record for record in logged if "event" not in record]
    for embedded in json.loads(page.text_content("#records")):
        assert embedded["steps"] == steps
        assert embedded["events"] == [record for record in logged if "event" in record]
    rows = [row.split("\t") for table in page.locator("table").all_inner_texts() for row in table.splitlines()]
    assert rows[1][1:4] == [str(steps[-1]["step"]), str(steps[-1]["samples"]), f"{steps[-1]['loss']:.4f}"]
    (evaluated,) = [record for record in logged if record.get("event") == "eval"]
    for name in ("acc1", "image_retrieval_recall@5", "lp_acc1"):
        assert ["shapes", name, *[f"{evaluated[name]:.2%}"] * 2] in rows

    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("img").count() >= 2 * 72
    boxes = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(boxes) >= 12 and min(boxes) > 100
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


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
