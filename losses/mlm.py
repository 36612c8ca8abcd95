"""Masked language modelling: text self-supervision."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.distributed import world_size
from losses.functional import at_least_fp32

IGNORED_TARGET = -100


def masked_lm_loss(logits: Tensor, targets: Tensor, global_count: Tensor | int) -> Tensor:
    """Cross-entropy over the masked tokens of all ranks, each token counting the same wherever it lies.

    A mean over each rank's own tokens would weight tokens by rank and be 0/0 on a rank that masked none. Dividing
    the rank's sum by the global count, times the number of ranks, makes the mean over ranks the exact token mean.

    Args:
        logits: [n, vocab_size], the head's output at the masked positions only; n may be 0.
        targets: int64 [n], original token ids; -100 marks a row to ignore.
        global_count: Number of counted targets over all ranks, one element (see `ContrastiveTerms.extra_sums`); 0 is
            allowed.

    Returns:
        Scalar float32, this rank's share; exactly 0, with a zero gradient on the head, when n is 0.

    Source: Li et al., "Supervision Exists Everywhere" (DeCLIP, 2022), text self-supervision. Deviation: the token
    mean is global instead of per rank.
    """
    total = F.cross_entropy(at_least_fp32(logits), targets, ignore_index=IGNORED_TARGET, reduction="sum")
    count = torch.as_tensor(global_count, dtype=total.dtype, device=total.device).reshape(()).clamp_min(1)
    return total * world_size() / count
