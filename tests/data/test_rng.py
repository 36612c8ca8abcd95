"""Keyed random numbers: functions of their key, stable for ever."""

import hashlib

import numpy as np
import pytest

from data.rng import combine64, keyed_hash, keyed_permutation, keyed_rng, shuffled_index

KNOWN_HASH = 5923300867652123228
KNOWN_PERMUTATION = [2, 1, 5, 7, 6, 3, 0, 4]
KNOWN_PLACES = [2, 2, 966424]


def test_equal_keys_give_equal_streams_and_other_keys_other_ones():
    keys = [
        (1, "a", 2),
        (1, "a", 3),
        (1, "a2"),
        ("1", "a", 2),
        (1, "a", "2"),
        (12,),
        (1, 2),
        ("ab",),
        ("a", "b"),
        (-1,),
    ]
    draws = {keyed_rng(*key).integers(2**63) for key in keys}
    assert len(draws) == len(keys) == len({keyed_hash(*key) for key in keys})
    assert np.array_equal(keyed_rng(1, "a", 2).random(5), keyed_rng(np.int64(1), "a", np.int32(2)).random(5))


def test_values_never_change():
    # A change here silently reorders the data of every run in progress.
    assert keyed_hash(0, "train", 1) == KNOWN_HASH
    assert keyed_permutation(8, 0, "train").tolist() == KNOWN_PERMUTATION
    key = combine64(keyed_hash("k"), np.arange(3))
    assert shuffled_index(np.arange(3), np.array([3, 100, 10**6]), key).tolist() == KNOWN_PLACES


def test_a_generator_is_philox_with_the_hash_as_its_key():
    key = int.from_bytes(hashlib.blake2b(b"i3;s1:ai-2;", digest_size=16, person=b"declip-data").digest(), "little")
    expected, found = np.random.Generator(np.random.Philox(key=key)), keyed_rng(3, "a", -2)
    assert np.array_equal(found.random(7), expected.random(7))
    assert np.array_equal(found.integers(1000, size=7), expected.integers(1000, size=7))


def test_keys_are_int_and_str_only():
    with pytest.raises(TypeError, match="float"):
        keyed_hash(1.5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64, 65, 1000, 4096])
def test_shuffled_index_is_a_permutation(size):
    places = shuffled_index(np.arange(size), np.full(size, size), np.full(size, 77 + size, dtype=np.uint64))
    assert sorted(places) == list(range(size))
    assert sorted(keyed_permutation(size, "x")) == list(range(size))


def test_rows_are_independent_queries():
    sizes = np.array([10, 1, 77, 4096, 3])
    index = np.array([9, 0, 50, 4000, 2])
    keys = combine64(1, np.arange(5), np.arange(5) * 3)
    together = shuffled_index(index, sizes, keys)
    alone = [shuffled_index(index[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_every_element_is_equally_likely_at_every_place(size):
    draws = 50_000
    keys = combine64(7, np.arange(draws))
    for place in range(size):
        counts = np.bincount(shuffled_index(np.full(draws, place), np.full(draws, size), keys), minlength=size)
        deviation = np.sqrt(draws * (1 - 1 / size) / size)
        assert np.abs(counts - draws / size).max() < 5 * deviation
