"""Masked-token loss: closed forms, empty ranks, and equality over numbers of ranks."""

import math
from typing import Any

import pytest
import torch

from losses import masked_lm_loss
from losses.distributed import all_reduce_sum_
from tests.distributed import run_distributed

VOCABULARY, WIDTH = 11, 5


def test_uniform_logits() -> None:
    loss = masked_lm_loss(torch.zeros(6, 49409), torch.arange(6), 6)
    assert loss.item() == pytest.approx(math.log(49409), rel=1e-6)


def test_ignored_rows_do_not_matter() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, -100, 5, -100])
    changed = logits + 10 * (targets == -100)[:, None] * torch.arange(VOCABULARY)
    torch.testing.assert_close(masked_lm_loss(logits, targets, 2), masked_lm_loss(changed, targets, 2))
    expected = -logits.double().log_softmax(1)[[0, 2], [3, 5]].mean()
    torch.testing.assert_close(masked_lm_loss(logits, targets, 2).double(), expected, atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_single() -> None:
    logits = 8 * torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = masked_lm_loss(logits, torch.arange(64) % VOCABULARY, 64)
    assert loss.dtype == torch.float32
    expected = masked_lm_loss(logits.double(), torch.arange(64) % VOCABULARY, 64)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [0, torch.zeros(1, dtype=torch.float64)])
def test_no_masked_token_gives_zero_and_a_zero_gradient(count: Any) -> None:
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    loss = masked_lm_loss(head(torch.empty(0, WIDTH)), torch.empty(0, dtype=torch.int64), count)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0.0
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0


def head_and_tokens() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
        head.bias.zero_()
    states = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    return head, states, torch.randint(0, VOCABULARY, (9,), generator=generator)


def uneven_ranks(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 holds every token, the others none."""
    head, states, targets = head_and_tokens()
    own = slice(0, 9) if rank == 0 else slice(0, 0)
    count = all_reduce_sum_(torch.tensor([float(len(targets[own]))], dtype=torch.float64))
    loss = masked_lm_loss(head(states[own]), targets[own], count)
    loss.backward()
    return loss.detach(), head.weight.grad


def test_mean_over_ranks_is_the_token_mean() -> None:
    head, states, targets = head_and_tokens()
    expected = torch.nn.functional.cross_entropy(head(states), targets)
    expected.backward()
    losses, gradients = zip(*run_distributed(uneven_ranks, 2), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach())
    torch.testing.assert_close(torch.stack(gradients).mean(0), head.weight.grad)
