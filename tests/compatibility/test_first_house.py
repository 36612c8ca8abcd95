"""What the code wrote before it had rooms is still read: checkpoints, indexes beside shards, exports, configurations.

`written_by_first_house.tar.gz` was made by commit 16869b5: six steps of DeCLIP (ZeRO 1, a queue, a moving average) and
of CLIP on a mixture, each with its checkpoint of step 3 and the metrics of the whole run; indexes by
`python -m data.index`; an export of step 6 of the first run.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.shards.index_store import IndexStore
from tests.trainer.harness import VOLATILE, metrics, run_trainer, steps
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


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run", "mixture"])
def test_a_run_goes_on_where_it_was(run, old):
    before = recorded(old / run / "metrics.jsonl")
    run_trainer(["--run_dir", run, "--resume", "auto"], old)
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
