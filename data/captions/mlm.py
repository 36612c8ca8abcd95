"""Random masking of token ids for masked language modelling."""

import itertools
from typing import NamedTuple

import numpy as np

__all__ = ["MaskedTokens", "mask_tokens"]

_MASKED_SHARE = 0.8
_REPLACED_SHARE = 0.1


class MaskedTokens(NamedTuple):
    """A masked caption.

    Attributes:
        token_ids: the ids with some replaced; same length, SOT and EOT untouched.
        positions: ascending positions that were selected.
        targets: the original ids there.
    """

    token_ids: list[int]
    positions: list[int]
    targets: list[int]


def mask_tokens(
    token_ids: list[int],
    rng: np.random.Generator,
    *,
    mask_id: int,
    probability: float = 0.15,
    text_ids: np.ndarray | None = None,
) -> MaskedTokens:
    """Selects tokens at random; 80 % of them become the mask id, 10 % a random id, 10 % stay.

    Args:
        token_ids: ids of one caption with SOT and EOT, without padding.
        rng: keyed generator of this sample and view.
        mask_id: id of the mask token.
        probability: chance of each text token to be selected, 0 to 1.
        text_ids: the ids that are text, int64, ascending; no others are selected or drawn. None means those below
            the mask id.

    Source paper: Devlin et al. 2019 (BERT), section 3.1, as used by Li et al. 2022 (DeCLIP). Deviation: special ids are
    not drawn as replacements, because an EOT before the real one would move the pooled position.
    """
    # One uniform number per token decides both questions: the selected interval is cut into 80, 10 and 10 percent.
    draws = rng.random(len(token_ids)).tolist()
    masked_below = _MASKED_SHARE * probability
    replaced_below = (_MASKED_SHARE + _REPLACED_SHARE) * probability
    # Captions are short and few of their tokens selected: a loop is cheaper than arrays.
    selected = [position for position, draw in enumerate(draws) if draw < probability]
    ids = [token_ids[position] for position in selected]
    is_text = [index < mask_id for index in ids] if text_ids is None else np.isin(ids, text_ids).tolist()
    positions = list(itertools.compress(selected, is_text))
    edited = list(token_ids)
    for position in positions:
        if draws[position] < masked_below:
            edited[position] = mask_id
    replaced = [position for position in positions if masked_below <= draws[position] < replaced_below]
    if replaced:
        # One for every token, used or not.
        random_ids = rng.integers(mask_id if text_ids is None else len(text_ids), size=len(token_ids))
        for position in replaced:
            edited[position] = int(random_ids[position] if text_ids is None else text_ids[random_ids[position]])
    return MaskedTokens(edited, positions, [token_ids[position] for position in positions])
