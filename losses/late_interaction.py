"""Token-wise late interaction: every token of a query finds its best match among the tokens of a key.

With unit tokens x_ip of images and y_jw of captions, the score of an image for a caption is the mean over the image's
tokens of their largest similarity to a token of the caption, and the score of a caption for an image the mean over the
caption's tokens of their largest similarity to a token of the image: two matrices, not one and its transpose.

Each rank keeps the tokens of its own samples as queries; keys of all samples are gathered once. The token similarities,
[own tokens, B * keys], exist one tile at a time. What is left of a tile are the scores and the position of each winner,
one byte; winners beyond a budget are found a second time in the backward. The mean of a maximum hands its gradient to
the winners alone, so that of the queries is a weighted sum of rows instead of a matrix product.

Source: Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022, equations 3 to 6.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.distributed import all_gather_rows, reduce_scatter_rows, world_size
from losses.functional import exact_products

DEFAULT_WINNERS_BUDGET_BYTES = 128 * 2**20
# A tile should stay in a CPU's cache between the product and the maximum; an accelerator wants large kernels.
_TILE_BYTES_CPU = 4 * 2**20
_TILE_BYTES_ACCELERATOR = 64 * 2**20
_MAX_ROWS_CPU = 1024
_MAX_ROWS_ACCELERATOR = 8192


class Packing(NamedTuple):
    """How the tokens of n samples lie one after the other.

    Args:
        counts: Tokens of each sample, known to the host.
        lengths: int64 [n], the same on the device.
        offsets: int64 [n], where each sample begins.
        owners: int64 [N], the sample of each token.
    """

    counts: Sequence[int]
    lengths: Tensor
    offsets: Tensor
    owners: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "Packing":
        """Describes samples by their numbers of tokens, int64 [n] >= 1 on the CPU; a CUDA device is not waited for."""
        on_device = lengths.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else lengths.to(device)
        return cls._of(lengths.tolist(), on_device)

    @classmethod
    def uniform(cls, samples: int, count: int, device: torch.device) -> "Packing":
        """Samples of one number of tokens."""
        return cls._of([count] * samples, torch.full((samples,), count, device=device))

    @classmethod
    def _of(cls, counts: list[int], lengths: Tensor) -> "Packing":
        samples = torch.arange(len(counts), device=lengths.device)
        owners = samples.repeat_interleave(lengths, output_size=sum(counts))
        return cls(counts, lengths, lengths.cumsum(0) - lengths, owners)

    def padded_index(self, width: int) -> tuple[Tensor, Tensor]:
        """Where the first `width` tokens of each sample lie, the first one's place for those it does not have.

        Returns:
            int64 [n, width], and which of them are real, bool [n, width].
        """
        positions = torch.arange(width, device=self.lengths.device)
        real = positions < self.lengths[:, None]
        return self.offsets[:, None] + positions * real, real

    def chunks(self, max_rows: int) -> Iterator[tuple[slice, slice]]:
        """Yields (samples, tokens) of consecutive samples with at most `max_rows` tokens, or of a single one."""
        first = token = 0
        while first < len(self.counts):
            last, end = first + 1, token + self.counts[first]
            while last < len(self.counts) and end + self.counts[last] - token <= max_rows:
                end += self.counts[last]
                last += 1
            yield slice(first, last), slice(token, end)
            first, token = last, end


class _Direction:
    """The scores of own queries against the keys of all samples, one tile of token similarities at a time.

    Args:
        queries: [N, d], tokens of this rank's samples.
        packing: Which token belongs to which sample.
        keys: [B, K, d], maybe of a lower precision; a sample with fewer keys repeats one of them, which no maximum
            notices.
        tile_bytes: Of a tile; None chooses by device.
        product_dtype: What tokens are rounded to before they are multiplied, where the device adds up such products in
            float32; None for their own.
    """

    def __init__(
        self,
        queries: Tensor,
        packing: Packing,
        keys: Tensor,
        tile_bytes: int | None,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        self.queries = queries.contiguous()
        self._product_dtype = product_dtype
        self._factors = self.queries if product_dtype is None else self.queries.to(product_dtype)
        self.packing = packing
        self.keys = keys
        self.num_keys = keys.shape[1]
        on_cpu = queries.device.type == "cpu"
        max_rows = _MAX_ROWS_CPU if on_cpu else _MAX_ROWS_ACCELERATOR
        self._chunks = list(packing.chunks(max_rows))
        self._rows = max(tokens.stop - tokens.start for _, tokens in self._chunks)
        column_bytes = self._rows * self.num_keys * queries.element_size()
        tile_bytes = tile_bytes or (_TILE_BYTES_CPU if on_cpu else _TILE_BYTES_ACCELERATOR)
        self._tile_columns = max(1, min(len(keys), tile_bytes // column_bytes))

    def winners_buffer(self, budget_bytes: int) -> Tensor:
        """Uninitialised room for the winners of as many columns as the budget allows, [N, columns]."""
        # Tokens of one sample are few; a larger number would not fit 16 bits of a signed integer before 32,768.
        dtype = torch.uint8 if self.num_keys <= 256 else torch.int16
        columns = min(len(self.keys), budget_bytes // (len(self.queries) * dtype.itemsize))
        return self.queries.new_empty(len(self.queries), columns, dtype=dtype)

    def scores(self, winners: Tensor | None) -> Tensor:
        """[n, B] scores; fills `winners`, if given, as far as it reaches."""
        scores = self.queries.new_empty(len(self.packing.counts), len(self.keys))
        work = self._work()
        for columns, keys in self._column_tiles():
            keys = self._rounded(keys)
            keep = winners is not None and columns.stop <= winners.shape[1]
            for samples, tokens in self._chunks:
                similarities = self._similarities(tokens, keys, work)
                if keep:
                    best, winner = similarities.max(dim=1)
                    winners[tokens, columns] = winner
                else:
                    best = similarities.amax(dim=1)
                scores[samples, columns] = self._mean_by_sample(best, samples, tokens)
        return scores

    def add_gradients(self, grad_scores: Tensor, winners: Tensor, grad_queries: Tensor, grad_keys: Tensor) -> None:
        """Adds the gradients of the scores to those of queries [N, d] and sets those of keys [B, K, d]."""
        # Every token of a sample has the same part in its mean.
        shares = grad_scores / self.packing.lengths[:, None]
        work = self._work()
        for columns, keys in self._column_tiles():
            kept = columns.stop <= winners.shape[1]
            factors = None if kept else self._rounded(keys)
            grad_tile = torch.zeros_like(keys)
            for _, tokens in self._chunks:
                if kept:
                    winner = winners[tokens, columns].long()
                else:
                    winner = self._similarities(tokens, factors, work).max(dim=1).indices
                weights = shares[:, columns].index_select(0, self.packing.owners[tokens])
                row = winner * weights.shape[1] + torch.arange(weights.shape[1], device=winner.device)
                grad_queries[tokens] += F.embedding_bag(row, keys, per_sample_weights=weights, mode="sum")
                # One entry per token and sample, so that no two write to one place: the product is deterministic.
                sparse = work[: weights.numel() * self.num_keys].view(len(row), -1).zero_()
                sparse.scatter_(1, row, weights)
                grad_tile.addmm_(sparse.t(), self.queries[tokens])
            grad_keys[columns] = grad_tile.unflatten(0, (self.num_keys, -1)).transpose(0, 1)

    def _work(self) -> Tensor:
        return self.queries.new_empty(self._rows * self.num_keys * self._tile_columns)

    def _column_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the columns of a tile and their keys [K * columns, d]: the first of each sample, then the second."""
        for start in range(0, len(self.keys), self._tile_columns):
            columns = slice(start, min(start + self._tile_columns, len(self.keys)))
            yield columns, self.keys[columns].to(self.queries.dtype).transpose(0, 1).flatten(0, 1)

    def _similarities(self, tokens: slice, keys: Tensor, work: Tensor) -> Tensor:
        """[tokens, K, columns], in `work` if it holds such products."""
        rows = tokens.stop - tokens.start
        if self._product_dtype is None:
            similarities = work[: rows * len(keys)].view(rows, len(keys))
            torch.mm(self._factors[tokens], keys.t(), out=similarities)
        else:
            similarities = torch.mm(self._factors[tokens], keys.t(), out_dtype=self.queries.dtype)
        return similarities.unflatten(1, (self.num_keys, -1))

    def _rounded(self, keys: Tensor) -> Tensor:
        return keys if self._product_dtype is None else keys.to(self._product_dtype)

    def _mean_by_sample(self, best: Tensor, samples: slice, tokens: slice) -> Tensor:
        index = torch.arange(len(best), device=best.device)
        return F.embedding_bag(index, best, offsets=self.packing.offsets[samples] - tokens.start, mode="mean")


class TokenScores(torch.autograd.Function):
    """Both score matrices of this rank's samples against those of all ranks.

    The gradient of a key is summed over ranks and goes back to its owner, as that of `all_gather_rows` would.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_keys: Tensor,
        text_keys: Tensor,
        image_packing: Packing,
        text_packing: Packing,
        communication_dtype: torch.dtype | None,
        winners_budget_bytes: int,
        tile_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [b, B] of own images for all captions and of own captions for all images."""
        gathered_images, gathered_texts = _gather(image_keys, text_keys, communication_dtype)
        product_dtype = _product_dtype(image_tokens)
        with exact_products(image_tokens.device):
            by_image = _Direction(image_tokens, image_packing, gathered_texts, tile_bytes, product_dtype)
            by_text = _Direction(text_tokens, text_packing, gathered_images, tile_bytes, product_dtype)
            budget = winners_budget_bytes if any(ctx.needs_input_grad) else 0
            image_winners = by_image.winners_buffer(budget // 2)
            text_winners = by_text.winners_buffer(budget - image_winners.nbytes)
            scores = by_image.scores(image_winners), by_text.scores(text_winners)
        ctx.save_for_backward(image_tokens, text_tokens, gathered_images, gathered_texts, image_winners, text_winners)
        ctx.packings, ctx.how = (image_packing, text_packing), (tile_bytes, product_dtype)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_image_scores: Tensor, grad_text_scores: Tensor) -> tuple[Any, ...]:
        image_tokens, text_tokens, image_keys, text_keys, image_winners, text_winners = ctx.saved_tensors
        num_image_keys, num_text_keys = image_keys.shape[1], text_keys.shape[1]
        grad_images, grad_texts = torch.zeros_like(image_tokens), torch.zeros_like(text_tokens)
        # One buffer for the keys of both sides, because one reduce-scatter takes both.
        grad_keys = image_tokens.new_empty(len(image_keys), num_image_keys + num_text_keys, image_tokens.shape[1])
        grad_image_keys, grad_text_keys = grad_keys.split([num_image_keys, num_text_keys], dim=1)
        with exact_products(image_tokens.device):
            by_image = _Direction(image_tokens, ctx.packings[0], text_keys, *ctx.how)
            by_image.add_gradients(grad_image_scores, image_winners, grad_images, grad_text_keys)
            by_text = _Direction(text_tokens, ctx.packings[1], image_keys, *ctx.how)
            by_text.add_gradients(grad_text_scores, text_winners, grad_texts, grad_image_keys)
        own = reduce_scatter_rows(grad_keys[None])[0].split([num_image_keys, num_text_keys], dim=1)
        return grad_images, grad_texts, *own, None, None, None, None, None


def _product_dtype(tokens: Tensor) -> torch.dtype | None:
    """The run's precision where autocast lowers it, on devices that add up its products in float32."""
    if tokens.device.type != "cuda" or not torch.is_autocast_enabled("cuda") or tokens.dtype != torch.float32:
        return None
    return torch.get_autocast_dtype("cuda")


def _gather(image_keys: Tensor, text_keys: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Keys of all samples in one gather, in the precision in which they travel."""
    if dtype is not None:
        image_keys, text_keys = image_keys.to(dtype), text_keys.to(dtype)
    gathered = [image_keys, text_keys]
    if world_size() > 1:
        sizes = [image_keys.shape[1], text_keys.shape[1]]
        gathered = all_gather_rows(torch.cat(gathered, dim=1)[None])[0].split(sizes, dim=1)
    return gathered[0], gathered[1]


@torch.no_grad()
def late_interaction_scores(queries: Tensor, keys: Tensor, tile_bytes: int | None = None) -> Tensor:
    """Scores of queries for keys, for evaluation.

    Args:
        queries: [n, Q, d] unit tokens; zero vectors are padding, and the first is a token.
        keys: [m, K, d], likewise.
        tile_bytes: Of a tile of token similarities; None chooses by device.

    Returns:
        [n, m]: mean over the tokens of a query of their largest similarity to a token of the key.
    """
    if not len(queries) or not len(keys):
        return queries.new_zeros(len(queries), len(keys))
    real = queries.any(dim=-1)
    packing = Packing.of(real.sum(dim=1).cpu(), queries.device)
    filled = torch.where(keys.any(dim=-1, keepdim=True), keys, keys[:, :1])
    return _Direction(queries[real], packing, filled, tile_bytes).scores(None)
