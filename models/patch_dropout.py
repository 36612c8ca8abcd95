"""Which patches of an image stay in training, as a pure function of a key."""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def kept_patches(keys: Tensor, num_patches: int, num_kept: int) -> Tensor:
    """Draws a uniform random subset of patches per image.

    The subset depends on the key and nothing else, so it is the same in any batch, on any number of ranks and when a
    forward is repeated.

    Args:
        keys: int64 [n], hashes: close keys would overlap in their random numbers.
        num_patches: Size of the whole set.
        num_kept: Size of the subsets, in [1, num_patches].

    Returns:
        Distinct indices, int64 [n, num_kept], on the device of the keys.
    """
    return splitmix64(keys, num_patches).topk(num_kept, dim=1).indices


def splitmix64(seeds: Tensor, count: int) -> Tensor:
    """The first numbers of the SplitMix64 generator.

    Args:
        seeds: int64 [n], taken as the bits of unsigned words.
        count: How many numbers.

    Returns:
        int64 [n, count], uniform over all 64-bit words.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    steps = torch.arange(1, count + 1, device=seeds.device)
    words = seeds[:, None] + steps * _GOLDEN
    words = (words ^ _shift_right(words, 30)) * _MULTIPLIERS[0]
    words = (words ^ _shift_right(words, 27)) * _MULTIPLIERS[1]
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    # torch's shift of signed integers copies the sign bit; these words are unsigned.
    return (words >> bits) & ((1 << (64 - bits)) - 1)
