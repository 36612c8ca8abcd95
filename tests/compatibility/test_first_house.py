"""What the code wrote before it had rooms is still read: checkpoints, indexes beside shards, exports, configurations.

`written_by_first_house.tar.gz` was made by commit 16869b5: six steps of DeCLIP (ZeRO 1, a queue, a moving average) and
of CLIP on a mixture, each with its checkpoint of step 3 and the metrics of the whole run; indexes by
`python -m data.index`; an export of step 6 of the first run.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.order import GlobalOrder, OrderSource
from data.shards.index_store import IndexStore, load_sources
from data.sources import continue_sources, parse_sources
from tests.trainer.harness import VOLATILE, metrics, run_trainer, steps
from trainer.checkpoint import read_state
from trainer.trained import load_trained

ARCHIVE = Path(__file__).parent / "written_by_first_house.tar.gz"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The folder everything was made in; the runs name their files relative to it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recorded(path: Path) -> dict[int, dict]:
    """Logged steps of a metrics file without what the clock decides."""
    records = map(json.loads, path.read_text().splitlines())
    return {
        record["step"]: {key: value for key, value in record.items() if key not in VOLATILE}
        for record in records
        if "event" not in record
    }


def moved(old: Path) -> list[str]:
    """Put the shards elsewhere; how the mixture is continued from there, by the path of its folder alone."""
    (old / "elsewhere").mkdir()
    (old / "shards").rename(old / "elsewhere" / "again")
    first, second = (f"{old}/elsewhere/again/0000{number}.tar" for number in (0, 1))
    # In another form as well; that the order alone does no harm is shown below.
    spec = {"one": {"path": first, "weight": 1}, "two": {"path": [second], "weight": 2}}
    return ["--resume", "mixture", "--data.train", json.dumps(spec), "--checkpoint.keep_last", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run", "mixture"])
def test_a_run_goes_on_where_it_was(run, old):
    before = recorded(old / run / "metrics.jsonl")
    # Nothing changes for the one, and what may change does for the other.
    finished = run_trainer(["--run_dir", run, "--resume", "auto"] if run == "run" else moved(old), old)
    listed = [line for line in finished.output.splitlines() if line.startswith("changed since the saved run: ")]
    (event,) = [record for record in metrics(old / run) if record.get("event") == "resumed"]
    assert set(event["changed"]) == ({"data.train", "checkpoint.keep_last"} if run == "mixture" else set())
    assert len(listed) == len(event["changed"])
    after = steps(old / run)
    assert after.keys() == before.keys() == set(range(1, 7))
    assert any(record.get("event") == "resumed" and record["step"] == 3 for record in metrics(old / run))
    for step, record in before.items():
        assert after[step].keys() >= record.keys()
        for name, value in record.items():
            # Samples and rates to the bit; sums in another order on another processor to a rounding.
            if isinstance(value, float):
                assert after[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
            else:
                assert after[step][name] == value, (step, name)


def test_a_mixture_is_the_same_wherever_it_lies_and_however_it_is_written(old):
    state, _ = read_state(Path("mixture/checkpoints/step_3"))
    first, second = "shards/00000.tar", "shards/00001.tar"
    shutil.copytree("shards", "elsewhere")
    specs = [
        {first: 1.0, second: 2.0},
        {f"./{first}": 1.0, str(old / second): 2.0},
        {"elsewhere/00000.tar": 1.0, "elsewhere/00001.tar": 2.0},
        {"elsewhere/00001.tar": 2.0, "elsewhere/00000.tar": 1.0},
        {"cc": {"path": first, "weight": 1.0}, "yfcc": {"path": ["elsewhere/00001.tar"], "weight": 2.0}},
    ]
    for spec in specs:
        sources = load_sources(parse_sources(spec), IndexStore.create(old / "cache"))
        found = continue_sources(sources, list(state.samples_seen), state.data_fingerprint)
        assert [source.name for source in found] == [first, second]
        assert all(Path(shard).exists() for source in found for shard in source.shards)
        order = GlobalOrder(
            [OrderSource(source.name, source.counts, source.weight) for source in found],
            seed=0,
            global_batch_size=16,
            shuffle_window=16,
        )
        assert order.fingerprint == state.order_fingerprint
    # Other data keeps its own names, and is refused by its fingerprint.
    for spec in ({first: 1.0, second: 3.0}, {first: 1.0}, {"a": {"path": second}, "b": {"path": first}}):
        sources = load_sources(parse_sources(spec), IndexStore.create(old / "cache"))
        assert continue_sources(sources, list(state.samples_seen), state.data_fingerprint) == sources


def test_indexes_beside_shards_are_used(old, monkeypatch):
    monkeypatch.setattr("data.shards.index_store.scan_shard", lambda shard: pytest.fail(f"scanned {shard}"))
    for shard in ("shards/00000.tar", "shards/00001.tar"):
        index = IndexStore.create(old / "cache").load(shard)
        assert index.num_samples == 24
        assert not index.excluded


def test_the_model_of_a_checkpoint_is_read(old):
    trained = load_trained(Path("run"), 3)
    assert trained.weights == "ema"
    assert all(torch.isfinite(parameter).all() for parameter in trained.method.parameters())


def test_an_export_is_read(old):
    from trainer.building import build_method
    from trainer.loading import load_config
    from trainer.pipeline import build_tokenizer
    from trainer.pretrained import load_pretrained

    config = load_config("export/config.yaml", {"model.pretrained": "export"})
    method = build_method(config, build_tokenizer(config))
    load_pretrained(config.model, method.model)
    exported = load_file("export/model.safetensors")
    loaded = method.model.state_dict()
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)
