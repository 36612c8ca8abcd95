"""The comparison of the methods."""

import json
import re

import numpy as np
import pytest
import webdataset

from benchmarks.family import __main__ as command
from benchmarks.family import runs
from benchmarks.family.cost import measure_costs
from benchmarks.family.runs import Records, RunKey, control_steps, write_recipe
from benchmarks.family.sets import open_folder
from benchmarks.harness import Measurement
from benchmarks.processes import run_in_fresh_process
from tests.trainer.harness import COLOURS, SHAPES, picture

SLIP_COST = 2.5


@pytest.fixture
def folder(tmp_path):
    """Shards as the comparison wants them: 256 pairs to train on, 20 to choose on, 12 held back."""
    for part, count in (("train", 256), ("val", 20), ("test", 12)):
        rng = np.random.default_rng(count)
        (tmp_path / "data" / part).mkdir(parents=True)
        with webdataset.TarWriter(str(tmp_path / "data" / part / "000000.tar")) as sink:
            for number in range(count):
                colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
                name = f"{colour} {shape}"
                image = picture(colour, shape, rng)
                sink.write(
                    {"__key__": f"{number:06d}", "png": image, "txt": f"{name}, {number}", "json": {"name": name}}
                )
    return tmp_path / "data"


def measured(job):
    """Costs as if they had been measured."""
    slip = "slip" in job.arguments["recipe"].rpartition("/")[2]
    return Measurement({"step": 0.25 if slip else 0.125}, {"peak": 10.0}, {"flops": SLIP_COST * 1e9 if slip else 1e9})


def rows(page, heading):
    """Cells of the table below a heading, without its header."""
    table = page.split(heading, 1)[1].split("\n\n", 2)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.slow(seconds=40)
def test_from_shards_to_the_page(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--out", str(out), "--methods", "slip", "--epochs", "3", "--seeds", "0"]
    assert command.main(arguments, runner=measured) == 0
    records = json.loads((out / "results.json").read_text())
    # Two steps an epoch: CLIP and SLIP for six steps, and CLIP for as much compute as SLIP.
    assert list(records["runs"]) == ["clip-15-0", "clip-6-0", "slip-6-0"]
    assert [(r["step"], r["set"]) for r in records["runs"]["slip-6-0"]] == [
        (step, subset) for step in (2, 4, 6) for subset in ("val", "test")
    ]
    assert str(tmp_path) not in (out / "results.json").read_text()
    page = (out / "results.md").read_text()
    assert "`python -m benchmarks.family --methods clip slip --epochs 3 --seeds 0`" in page
    assert str(tmp_path) not in page
    assert rows(page, "## Cost") == [["CLIP", "1.00", "1.00", "1.00", "10"], ["SLIP", "2.50", "2.50", "0.50", "10"]]
    assert "## test: held back" in page
    last = records["runs"]["slip-6-0"][-2]
    assert rows(page, "### Equal samples")[1][1] == f"{100 * last['acc1']:.1f} (one seed)"
    assert rows(page, "### Equal compute")[0][:3] == ["SLIP", "15", "1.00"]
    assert (out / "results_curves.png").stat().st_size > 10_000

    # What is on record is not run again, nor with --table anything at all.
    monkeypatch.setattr(command, "train", None)
    assert command.main(arguments, runner=None) == 0
    assert command.main([*arguments, "--seeds", "0", "1", "--table"], runner=None) == 0
    assert re.search(r"\| SLIP \| \S+ \(one seed\)", (out / "results.md").read_text())
    with pytest.raises(SystemExit):
        command.main([*arguments, "--epochs", "4"], runner=None)
    assert "with other settings" in capsys.readouterr().err


@pytest.mark.slow(seconds=25)
def test_costs_are_those_of_whole_steps(folder, tmp_path):
    data = open_folder(folder, tmp_path)
    paths = {name: write_recipe(name, data, tmp_path / "recipes") for name in ("clip", "protoclip")}
    few = paths["protoclip"].read_text().replace("clusters: 500", "clusters: 8")
    paths["protoclip"].write_text(few)
    costs = measure_costs(run_in_fresh_process, paths, rounds=1)
    # One more forward pass over every sample, a third of a step, and small heads.
    assert 1.3 < costs["protoclip"]["flops"] / costs["clip"]["flops"] < 1.5
    assert all(min(cost.values()) > 0 for cost in costs.values())


def test_controls_spend_what_the_methods_spend():
    compute = {"clip": 1.0, "siglip": 1.04, "aclip": 1.4, "filip": 1.5, "slip": 2.6, "declip": 2.9}
    assert control_steps(list(compute), compute, 1000) == {
        "siglip": 1000,
        "aclip": 1449,
        "filip": 1449,
        "slip": 2600,
        "declip": 2900,
    }


def test_figures_of_other_settings_are_not_mixed(tmp_path):
    records = Records(tmp_path / "results.json", {"steps": 5})
    records.add(RunKey("clip", 5, 0), [{"step": 5, "set": "val", "acc1": 0.5}])
    again = Records(tmp_path / "results.json", {"steps": 5})
    assert again.has(RunKey("clip", 5, 0))
    assert not again.has(RunKey("clip", 5, 1))
    assert again.curve(RunKey("clip", 5, 0))[0]["acc1"] == 0.5
    with pytest.raises(ValueError, match="other settings"):
        Records(tmp_path / "results.json", {"steps": 6})


def test_folders_without_shards_or_names_are_refused(folder, tmp_path, capsys):
    def refused(match):
        with pytest.raises(SystemExit):
            command.main(["--data", str(folder), "--out", str(tmp_path / "out")], runner=None)
        assert match in capsys.readouterr().err

    with webdataset.TarWriter(str(folder / "test" / "000001.tar")) as sink:
        sink.write({"__key__": "n", "png": b"", "txt": "no name", "json": {"keywords": []}})
    refused("n.json has no 'name'")
    for path in (folder / "val").iterdir():
        path.unlink()
    refused("val holds no .tar")


def test_a_run_that_fails_says_why(folder, tmp_path):
    data = open_folder(folder, tmp_path)
    path = write_recipe("clip", data, tmp_path / "recipes")
    path.write_text(path.read_text().replace("vit_pico_p8_32", "vit_pica"))
    with pytest.raises(RuntimeError, match=r"clip-4-0 failed:[\s\S]*unknown model 'vit_pica'"):
        runs.train(RunKey("clip", 4, 0), path, tmp_path / "run")
