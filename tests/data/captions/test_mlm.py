"""Statistics and limits of token masking."""

import numpy as np
import pytest

from data.captions.mlm import mask_tokens
from data.rng import keyed_rng

MASK, SOT, EOT = 49406, 49407, 49408
CAPTION = [SOT, *range(1000, 1020), EOT]


def test_shares_over_20k_draws():
    draws = [mask_tokens(CAPTION, keyed_rng("mlm", index), mask_id=MASK) for index in range(20_000)]
    selected = sum(len(draw.positions) for draw in draws)
    replacements = [
        (draw.token_ids[position], target)
        for draw in draws
        for position, target in zip(draw.positions, draw.targets, strict=True)
    ]
    masked = sum(new == MASK for new, _ in replacements)
    kept = sum(new == old for new, old in replacements)
    assert abs(selected / (20_000 * 20) - 0.15) < 0.003
    assert abs(masked / selected - 0.8) < 0.006
    assert abs(kept / selected - 0.1) < 0.005
    random_ids = np.array([new for new, old in replacements if new not in (MASK, old)])
    assert random_ids.max() < MASK
    # Uniform over the vocabulary: mean and spread of U{0, ..., 49405}.
    assert abs(random_ids.mean() / MASK - 0.5) < 0.02
    assert abs(random_ids.std() / MASK - 12**-0.5) < 0.01


def test_every_position_is_equally_likely():
    counts = np.zeros(len(CAPTION))
    for index in range(10_000):
        counts[mask_tokens(CAPTION, keyed_rng("position", index), mask_id=MASK).positions] += 1
    assert counts[0] == counts[-1] == 0
    assert np.abs(counts[1:-1] / 10_000 - 0.15).max() < 0.02


def test_targets_are_the_original_ids_and_the_rest_is_untouched():
    for index in range(200):
        masked = mask_tokens(CAPTION, keyed_rng("targets", index), mask_id=MASK, probability=0.5)
        assert masked.targets == [CAPTION[position] for position in masked.positions]
        assert masked.positions == sorted(masked.positions)
        others = set(range(len(CAPTION))) - set(masked.positions)
        assert all(masked.token_ids[position] == CAPTION[position] for position in others)


def test_specials_are_never_selected():
    caption = [SOT, MASK, 5, EOT]
    masked = mask_tokens(caption, keyed_rng("specials"), mask_id=MASK, probability=1.0)
    assert masked.positions == [2]
    assert masked.targets == [5]


def test_empty_caption_and_zero_probability_select_nothing():
    assert mask_tokens([SOT, EOT], keyed_rng(0), mask_id=MASK) == ([SOT, EOT], [], [])
    assert mask_tokens(CAPTION, keyed_rng(0), mask_id=MASK, probability=0.0) == (CAPTION, [], [])


@pytest.mark.parametrize("text_ids", [None, np.array([*range(900, 1004), *range(1010, 2000)])])
def test_every_choice_is_that_of_its_own_draws(text_ids):
    ids = np.array(CAPTION)
    is_text = ids < MASK if text_ids is None else np.isin(ids, text_ids)
    seen = 0
    for index in range(300):
        found = mask_tokens(CAPTION, keyed_rng("own", index), mask_id=MASK, probability=0.4, text_ids=text_ids)
        rng = keyed_rng("own", index)
        draws = rng.random(len(ids))
        others = rng.integers(MASK if text_ids is None else len(text_ids), size=len(ids))
        others = others if text_ids is None else text_ids[others]
        selected = (draws < 0.4) & is_text
        edited = np.where(draws < 0.8 * 0.4, MASK, np.where(draws < (0.8 + 0.1) * 0.4, others, ids))
        assert found.token_ids == np.where(selected, edited, ids).tolist()
        assert found.positions == np.flatnonzero(selected).tolist()
        seen += sum(new not in (MASK, old) for new, old in zip(found.token_ids, CAPTION, strict=True))
    assert seen > 50
