"""Prototype loss against the definition, its known answers and its limits."""

import math

import pytest
import torch
from torch import Tensor

import losses.prototypes
from losses import prototype_loss

EVERY = torch.ones(2, dtype=torch.bool)
AXES = torch.eye(2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(features, prototypes, scale, labels, members, teacher, temperature):
    """One row after the other, on the prototypes that have members only."""
    kept = members.nonzero().flatten().tolist()
    total = 0.0
    for row, label in zip(features, labels.tolist(), strict=True):
        if label < 0:
            continue
        logits = torch.stack([scale.reshape(()) * torch.dot(row, prototypes[k]) for k in kept])
        if temperature > 0:
            targets = torch.stack([torch.dot(teacher[label], teacher[k]) / temperature for k in kept])
            targets = targets.exp() / targets.exp().sum()
        else:
            targets = torch.tensor([float(k == label) for k in kept], dtype=features.dtype)
        total = total - (targets * (logits - logits.exp().sum().log())).sum()
    return total / len(features)


@pytest.mark.parametrize(
    ("feature", "temperature", "expected"),
    [((1.0, 0.0), 1.0, 0.582203), ((0.0, 1.0), 1.0, 1.044320), ((1.0, 0.0), 0.0, 0.313262)],
)
def test_known_answers(feature, temperature, expected):
    rows = torch.tensor([feature], requires_grad=True)
    loss = prototype_loss(
        rows,
        AXES,
        torch.ones(1),
        torch.tensor([0]),
        members=EVERY,
        teacher=AXES,
        target_temperature=temperature,
    )
    assert loss.item() == pytest.approx(expected, abs=5e-7)
    loss.backward()
    # Where the student already is the teacher there is nothing to learn, exactly.
    assert torch.equal(rows.grad, torch.zeros(1, 2)) == (feature == (1.0, 0.0) and temperature > 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prototypes_that_say_nothing_cost_the_log_of_their_number(temperature):
    clusters = 20_000
    loss = prototype_loss(
        draw(3, 4).float(),
        torch.zeros(clusters, 4),
        torch.ones(1),
        torch.tensor([0, 7, 19_999]),
        members=torch.ones(clusters, dtype=torch.bool),
        teacher=torch.zeros(clusters, 4),
        target_temperature=temperature,
    )
    assert loss.item() == pytest.approx(9.903488, abs=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
def test_value_and_gradients_equal_the_definition(temperature, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(losses.prototypes, "_CHUNK_BYTES", rows_at_a_time * 7 * 8)
    prototypes, teacher = draw(7, 4, seed=1), draw(7, 3, seed=2)
    labels = torch.tensor([0, 6, -1, 3, 1], dtype=torch.int32)
    members = torch.tensor([True, True, False, True, True, False, True])
    values = []
    for implementation in (prototype_loss, by_definition):
        rows, scale = draw(5, 4).requires_grad_(), torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        options = {"members": members, "teacher": teacher}
        if implementation is prototype_loss:
            loss = prototype_loss(rows, prototypes, scale, labels, target_temperature=temperature, **options)
        else:
            loss = by_definition(rows, prototypes, scale, labels, temperature=temperature, **options)
        (2.5 * loss).backward()
        assert torch.count_nonzero(rows.grad[2]) == 0
        values.append((loss.detach(), rows.grad, scale.grad))
    for found, expected in zip(*values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_temperature_limits():
    rows, prototypes = draw(5, 4), draw(7, 4, seed=1)
    teacher = torch.nn.functional.normalize(draw(7, 4, seed=2), dim=1)
    labels, members = torch.tensor([0, 1, 2, 3, 6]), torch.ones(7, dtype=torch.bool)

    def loss(temperature: float) -> float:
        scale = torch.tensor([2.0], dtype=torch.float64)
        return prototype_loss(
            rows, prototypes, scale, labels, members=members, teacher=teacher, target_temperature=temperature
        ).item()

    assert loss(1e-4) == pytest.approx(loss(0.0), abs=1e-12)
    uniform = torch.logsumexp(2 * rows @ prototypes.T, dim=1) - (2 * rows @ prototypes.T).mean(dim=1)
    assert loss(1e9) == pytest.approx(uniform.mean().item(), abs=1e-6)


def test_a_larger_neighbour_beats_the_own_cluster_unless_the_teacher_is_normalised():
    # Raw similarities 0.25 and 0.45: the teacher's first choice is the other cluster.
    teacher, rows = torch.tensor([[0.5, 0.0], [0.9, 0.1]]), torch.tensor([[10.0, 0.0]])
    losses_of = [
        prototype_loss(
            rows,
            AXES,
            torch.ones(1),
            torch.tensor([0]),
            members=EVERY,
            teacher=given,
            target_temperature=0.001,
        ).item()
        for given in (teacher, torch.nn.functional.normalize(teacher, dim=1))
    ]
    assert losses_of == [pytest.approx(10.0, abs=1e-3), pytest.approx(math.log1p(math.exp(-10)) + 0.06, abs=0.1)]


def test_permuting_the_clusters_changes_nothing():
    rows, prototypes, teacher = draw(6, 4), draw(5, 4, seed=1), draw(5, 4, seed=2)
    labels, members = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([True, True, True, True, False])
    order = torch.tensor([3, 0, 4, 1, 2])
    scale = torch.tensor([2.0], dtype=torch.float64)
    for temperature in (0.0, 0.5):
        options = {"target_temperature": temperature}
        one = prototype_loss(rows, prototypes, scale, labels, members=members, teacher=teacher, **options)
        other = prototype_loss(
            rows,
            prototypes[order],
            scale,
            order.argsort()[labels],
            members=members[order],
            teacher=teacher[order],
            **options,
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_row_without_a_cluster_may_be_anything():
    rows = torch.tensor([[torch.nan, torch.inf], [1.0, 0.0]], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    for members, labels, expected in ((EVERY, [-1, 0], 0.313262 / 2), (~EVERY, [-1, -1], 0.0)):
        rows.grad = scale.grad = None
        loss = prototype_loss(rows, AXES, scale, torch.tensor(labels), members=members)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert rows.grad.isfinite().all()
        assert scale.grad.isfinite().all()


def test_half_precision_is_computed_in_single():
    rows, prototypes = draw(5, 4).bfloat16().requires_grad_(), draw(7, 4, seed=1).float()
    labels, members = torch.arange(5), torch.ones(7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prototype_loss(rows, prototypes, torch.tensor([9.0]), labels, members=members)
    loss.backward()
    exact = prototype_loss(
        rows.detach().double(), prototypes.double(), torch.tensor([9.0]).double(), labels, members=members
    )
    assert (loss.dtype, rows.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
