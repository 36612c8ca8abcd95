"""Samples of an evaluation set that cannot be read are counted where people look."""

import tarfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from data.captions.tokenizer import ClipTokenizer
from tests.trainer.harness import write_eval_set, write_recipe, write_shards
from trainer.evaluation import Evaluation
from trainer.loading import load_config
from trainer.ranks.launch import Place


@pytest.fixture(autouse=True)
def _alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Encoder:
    """Any unit vectors."""

    device = torch.device("cpu")
    method = SimpleNamespace(model=SimpleNamespace(embed_dim=4, image_tower=SimpleNamespace(image_size=32)))

    def __call__(self, phase, inputs):
        rows = len(inputs["images"] if phase == "image" else inputs["token_ids"])
        return {"embeddings": torch.nn.functional.normalize(torch.ones(rows, 4), dim=1)}

    def evaluating(self):
        return nullcontext()


def test_unreadable_pictures_and_empty_shards_are_on_the_screen(tmp_path, capsys):
    folder = write_eval_set(tmp_path / "set", samples=6)
    write_shards(tmp_path / "bad", shards=1, per_shard=5, bad=2)
    (tmp_path / "bad" / "00000.tar").rename(folder / "test" / "1.tar")
    with tarfile.open(folder / "test" / "2.tar", "w"):
        pass
    (folder / "test" / "nshards.txt").write_text("3\n")
    entry = {"data": str(folder), "tasks": ["retrieval"]}
    recipe = write_recipe(tmp_path / "tiny.yaml", "x", method="clip", eval={"sets": {"shapes": entry}})
    config = load_config(str(recipe), {"data.cache_dir": str(tmp_path / "cache")})
    evaluation = Evaluation(config, ClipTokenizer(), Place(0, 0, 1, 1, "python"))
    warning = capsys.readouterr().err
    assert "eval set 'shapes': 1 shard(s) are archives without a single member and are left out" in warning
    assert f"{folder}/test/2.tar" in warning
    (result,) = evaluation.run(Encoder())
    assert (result.samples, result.unreadable) == (9, 2)
    assert result.summary().endswith("; 2 of 11 samples unreadable")
    warning = capsys.readouterr().err
    assert "eval set 'shapes': 2 of 11 samples cannot be read and are left out, e.g. " in warning
    assert "1.tar sample '000000': found bytes of no known format" in warning
