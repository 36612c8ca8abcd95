"""Linear probes against scikit-learn; robustness, bias and overlap figures against arithmetic by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.distributed import run_distributed
from trainer.errors import ConfigError
from trainer.evaluation.bias import joined_classes, probe_table
from trainer.evaluation.linear_probe import Labelled, few_shot, fit_logistic_regression, linear_probe
from trainer.evaluation.robustness import read_baselines, robustness_figures
from trainer.overlap import overlap_figures


def blobs(samples: int, seed: int, classes: int = 5, width: int = 12) -> Labelled:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    features = centres[labels] + 1.3 * torch.randn(samples, width, generator=generator)
    return Labelled(torch.nn.functional.normalize(features, dim=1), labels)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 316.0])
def test_fit_equals_scikit_learn(strength):
    train, test = blobs(400, 1), blobs(300, 2)
    weight, bias = fit_logistic_regression(train, 5, strength, tolerance=1e-10)
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    reference.fit(train.features.double().numpy(), train.labels.numpy())
    scores = test.features.double() @ weight.T + bias
    expected = reference.predict_proba(test.features.double().numpy())
    assert scores.softmax(dim=1).numpy() == pytest.approx(expected, abs=2e-5)
    assert (scores.argmax(dim=1).numpy() == reference.predict(test.features.double().numpy())).all()


def probes_on_rank(rank: int, world_size: int) -> dict[str, float]:
    train, test = blobs(90, 1), blobs(150, 2)
    return linear_probe(train, test, 5) | few_shot(train, test, 5)


def test_search_on_one_and_three_ranks():
    (alone,) = run_distributed(probes_on_rank, 1)
    assert run_distributed(probes_on_rank, 3) == [alone] * 3
    assert alone["lp_acc1"] > 0.6
    assert list(alone)[-5:] == [f"few_shot_acc1@{k}" for k in (1, 2, 4, 8, 16)]
    assert alone["few_shot_acc1@1"] < alone["few_shot_acc1@16"] <= 1.0


def test_effective_robustness_is_the_distance_from_the_line():
    def shifted(accuracy: float) -> float:
        odds = accuracy / (1 - accuracy)
        return odds**0.8 * 0.5 / (1 + odds**0.8 * 0.5)

    baselines = [{"in": a, "v2": shifted(a)} for a in (0.3, 0.5, 0.7)]
    figures = robustness_figures({"in": 0.6, "v2": shifted(0.6) + 0.05, "r": 0.4}, "in", ["v2", "r"], baselines)
    assert figures["effective_robustness/v2"] == pytest.approx(0.05)
    assert figures["shifted_mean"] == pytest.approx((shifted(0.6) + 0.45) / 2)
    assert figures["drop"] == pytest.approx(0.6 - figures["shifted_mean"])
    assert "effective_robustness/r" not in figures


def test_baselines_from_csv(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,in,v2\na,0.5,0.4\nb,0.7,oops\nc,0.6,0.5\n")
    assert read_baselines(path) == [{"in": 0.5, "v2": 0.4}, {"in": 0.6, "v2": 0.5}]
    path.write_text("model,in\na,0.5\n")
    with pytest.raises(ConfigError, match="no row with two accuracies"):
        read_baselines(path)


def test_bias_table_by_hand():
    eye = torch.eye(4)
    classes, categories = joined_classes(eye[:2], {"crime": eye[2:3], "animal": eye[3:]})
    table = probe_table(eye[[0, 2, 2, 3, 1]], ["a", "a", "b", "b", "b"], classes, categories)
    assert table["a"] == {"animal": 0.0, "crime": 0.5}
    assert table["b"] == pytest.approx({"animal": 1 / 3, "crime": 1 / 3})
    assert table["all"] == pytest.approx({"animal": 0.2, "crime": 0.4})
    assert list(table) == ["a", "b", "all"]


def test_overlap_figures_by_hand():
    hit = np.array([True] * 6 + [False] * 4 + [True] * 9 + [False])
    duplicate = np.arange(20) >= 10
    figures = overlap_figures(hit, duplicate)
    assert figures["overlap"] == 0.5
    assert (figures["acc1_all"], figures["acc1_clean"], figures["acc1_overlap"]) == (0.75, 0.6, 0.9)
    assert figures["gain"] == pytest.approx(0.15)
    # P(X >= 9) of ten draws at 0.6.
    assert figures["p_value"] == pytest.approx(10 * 0.6**9 * 0.4 + 0.6**10)
    assert figures["overlap_low"] < 0.9 < figures["overlap_high"]
    clean = overlap_figures(hit, np.zeros(20, bool))
    assert "acc1_overlap" not in clean and clean["gain"] == 0.0
