"""Random numbers as a pure function of a key: the same on any rank, in any worker and after any restart."""

import hashlib
from numbers import Integral

import numpy as np
from numpy.random.bit_generator import ISeedSequence

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_CONSTANTS = tuple(np.uint64((number * int(_GOLDEN)) % 2**64) for number in range(1, 9))


class _Key(ISeedSequence):
    """Hands a bit generator its key; without one it would ask the system for entropy, and throw that away."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return self._words


def _digest(key: tuple[int | str, ...], size: int) -> bytes:
    text = "".join([f"i{part};" if type(part) is int else _encoded(part) for part in key])
    text = text.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=size, person=b"declip-data").digest()


def _encoded(part: int | str) -> str:
    if isinstance(part, str):
        # The length makes the encoding of a tuple unambiguous: ("a", "b") and ("ab",) differ.
        return f"s{len(part)}:{part}"
    if isinstance(part, Integral):
        return f"i{int(part)};"
    raise TypeError(f"a random key is made of int and str, got {type(part).__name__}")


def keyed_hash(*key: int | str) -> int:
    """Returns a 64-bit hash of a key, uniform and the same on every machine.

    Args:
        *key: Any mixture of integers and strings.

    Returns:
        An integer in [0, 2**64).
    """
    return int.from_bytes(_digest(key, 8), "little")


def keyed_rng(*key: int | str) -> np.random.Generator:
    """Returns a counter-based generator whose whole stream is a function of the key.

    Args:
        *key: Any mixture of integers and strings, for example (seed, source, epoch, sample, view).

    Returns:
        A numpy Generator over Philox; equal keys give equal streams, other keys independent ones.
    """
    words = np.frombuffer(_digest(key, 16), dtype="<u8")
    return np.random.Generator(np.random.Philox(_Key(words)))


def keyed_permutation(size: int, *key: int | str) -> np.ndarray:
    """Returns a random permutation of range(size) that depends on the key only.

    Args:
        size: Number of elements, >= 0.
        *key: Any mixture of integers and strings.

    Returns:
        int64 array [size].
    """
    # numpy promises stable streams for bit generators but not for Generator.permutation, and a resumed run
    # may have another numpy: sort raw draws instead.
    draws = keyed_rng(*key).bit_generator.random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


def mix64(words: np.ndarray) -> np.ndarray:
    """Returns a bijective avalanche mix of 64-bit words (the finaliser of SplitMix64).

    Args:
        words: uint64 array of any shape.

    Returns:
        uint64 array of the same shape.

    Source paper: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def combine64(base: int, *columns: np.ndarray) -> np.ndarray:
    """Hashes rows of integer columns under a base key, vectorised.

    Args:
        base: 64-bit key, for example from `keyed_hash`.
        *columns: Integer arrays [n], at least one.

    Returns:
        uint64 array [n].
    """
    state = np.full(len(columns[0]), base, dtype=np.uint64)
    for column in columns:
        state = mix64((state ^ column.astype(np.uint64)) + _GOLDEN)
    return state


def _feistel(index: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    low_bits = bits >> np.uint64(1)
    one = np.uint64(1)
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
    low, high = index & low_mask, index >> low_bits
    for number, constant in enumerate(_ROUND_CONSTANTS):
        round_key = mix64(key + constant)
        if number % 2 == 0:
            high = high ^ (mix64(low ^ round_key) & high_mask)
        else:
            low = low ^ (mix64(high ^ round_key) & low_mask)
    return (high << low_bits) | low


def shuffled_index(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Maps places to elements under keyed permutations without building them.

    Each row is its own query: row i asks which element stands at place index[i] of the permutation of
    range(size[i]) keyed by key[i]. Time and memory do not depend on the sizes, so a shuffle window may be as
    large as the data set. A Feistel network permutes the next power of two; places that land outside are walked
    on until they land inside.

    Args:
        index: Integer array [n], 0 <= index < size.
        size: Integer array [n], > 0.
        key: uint64 array [n].

    Returns:
        int64 array [n], 0 <= result < size.

    Source paper: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    size = size.astype(np.uint64)
    # frexp gives the exponent e with 2**(e-1) <= size-1 < 2**e: the bits of the largest index.
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    result = _feistel(index.astype(np.uint64), bits, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], bits[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    # On a handful of elements eight rounds leave some places a few percent too likely; a keyed rotation makes every
    # element exactly as likely as any other at every place.
    result = (result + mix64(~key) % size) % size
    return result.astype(np.int64)
