"""Figures against slow references, and independence of the number of ranks."""

import numpy as np
import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.harness import ds_config, metrics, run_trainer, write_eval_set, write_recipe
from trainer.evaluation.retrieval import retrieval_figures
from trainer.evaluation.zero_shot import classification_figures, zero_shot_ranks


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_zero_shot_against_sorting():
    images, classes = unit_rows(301, 8, 0), unit_rows(23, 8, 1)
    labels = torch.arange(301) * 7 % 20
    order = np.argsort(-(images @ classes.T).numpy(), axis=1)
    hit1 = order[:, 0] == labels.numpy()
    hit5 = (order[:, :5] == labels.numpy()[:, None]).any(axis=1)
    per_class = [hit1[labels.numpy() == label].mean() for label in range(20)]
    figures = classification_figures(zero_shot_ranks(images, labels, classes), labels)
    assert figures["acc1"] == pytest.approx(hit1.mean())
    assert figures["acc5"] == pytest.approx(hit5.mean())
    assert figures["mean_per_class_recall"] == pytest.approx(np.mean(per_class))


def test_zero_shot_of_a_collapsed_model_is_zero():
    same = torch.ones(10, 4) / 2
    labels = torch.arange(10) % 3
    assert classification_figures(zero_shot_ranks(same, labels, same[:3]), labels)["acc1"] == 0.0


def slow_retrieval(images: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    figures = {}
    for k in (1, 5, 10):
        order = np.argsort(-(texts @ images.T), axis=1)[:, :k]
        figures[f"image_retrieval_recall@{k}"] = np.mean(
            [owner in row for owner, row in zip(owners, order, strict=True)]
        )
        order = np.argsort(-(images @ texts.T), axis=1)[:, :k]
        figures[f"text_retrieval_recall@{k}"] = np.mean([i in owners[row] for i, row in enumerate(order)])
    return figures


def retrieval_on_rank(rank: int, world_size: int) -> dict[str, float]:
    # More rows than a tile, so that every rank has work; 1 to 3 captions an image.
    owners = torch.repeat_interleave(torch.arange(1500), torch.arange(1500) % 3 + 1)
    return retrieval_figures(unit_rows(1500, 8, 2), unit_rows(len(owners), 8, 3), owners)


@pytest.mark.parametrize("world_size", [1, 3])
def test_retrieval_against_sorting(world_size):
    owners = torch.repeat_interleave(torch.arange(1500), torch.arange(1500) % 3 + 1)
    expected = slow_retrieval(unit_rows(1500, 8, 2).numpy(), unit_rows(len(owners), 8, 3).numpy(), owners.numpy())
    for figures in run_distributed(retrieval_on_rank, world_size):
        assert figures == pytest.approx(expected)


@pytest.mark.slow
def test_in_the_loop_on_one_two_and_three_ranks(shards, cache, tmp_path):
    folder = write_eval_set(tmp_path / "set")
    found = []
    for world_size, stage in ((1, 0), (2, 3), (3, 1)):
        recipe = write_recipe(
            tmp_path / "tiny.yaml",
            shards,
            # Divisible by 1, 2 and 3, and a rate of nearly zero: the weights are those of the seed.
            train={"steps": 2, "global_batch_size": 12},
            optimizer={"lr": 1e-12},
            schedule={"warmup_steps": 0},
            eval={"every": 1, "batch_size": 8, "sets": {"shapes": {"data": str(folder)}}},
        )
        run_dir = tmp_path / f"run{world_size}"
        arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(stage)]
        run_trainer(arguments, cache, world_size)
        evals = [record for record in metrics(run_dir) if record.get("event") == "eval"]
        assert [record["step"] for record in evals] == [1, 2]
        found.append(evals[0])
    assert found[0]["samples"] == 37
    assert found[0] == found[1] == found[2]

    # A finished run that is started again adds nothing, and one that ended before its evaluation makes up for it.
    run_dir = tmp_path / "run1"
    again = ["--run_dir", str(run_dir), "--resume", "auto"]
    whole = [record for record in metrics(run_dir) if record.get("event") == "eval"]
    path = run_dir / "metrics.jsonl"
    for spoil in (False, True):
        if spoil:
            path.write_text("".join(line for line in path.open() if '"eval", "step": 2' not in line))
        run_trainer(again, cache)
        assert [record for record in metrics(run_dir) if record.get("event") == "eval"] == whole
