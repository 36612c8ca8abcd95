"""A shard of all that an attacker or the web may put into one: each sample is read, or named, counted and replaced."""

import itertools
from pathlib import Path

import pytest
import torch

from data.captions.tokenizer import ClipTokenizer
from data.loader import build_eval_loader, build_train_loader
from data.sample import EvalTransform, SampleTransform
from tests.data.bad_files import ODD_KEYS, odd_pictures, odd_texts, write_hostile_shard
from tests.data.tiny_shards import indexed

GOOD = 24


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "er" / "set"
    folder.mkdir(parents=True)
    expected = write_hostile_shard(folder / "0.tar", GOOD)
    source, store = indexed(folder, [str(folder / "0.tar")])
    return source, store, expected, folder


def batches(hostile, steps, **options):
    source, store, _, _ = hostile
    tokenizer = ClipTokenizer(mask_token=True)
    transform = SampleTransform(tokenizer, ("clip", "moco_v2"), ("original", "masked"), 32)
    loader = build_train_loader(
        [source], transform, seed=1, global_batch_size=16, shuffle_window=32, store=store, **options
    )
    try:
        return list(itertools.islice(loader, steps * loader.micro_batches_per_step))
    finally:
        loader.close()


def test_every_sample_is_read_or_named_and_replaced_alike_everywhere(hostile):
    source, _, expected, folder = hostile
    readable = len(odd_pictures()) + len(odd_texts()) + len(ODD_KEYS) + GOOD
    assert source.num_samples == len(expected) + readable
    # Two links; a device and a pipe are no files at all.
    assert source.num_excluded == 2
    # One epoch and the beginning of the next.
    steps = -(-source.num_samples // 16) + 1
    straight = batches(hostile, steps, micro_batch_size=16)
    records = [record for batch in straight for record in batch["bad_samples"]]
    reasons = {record["key"]: record["reason"] for record in records}
    assert {key for key, words in expected.items() if words not in reasons.get(key, "")} == set()
    assert reasons.keys() == expected.keys()
    assert {record["shard"] for record in records} == {str(folder / "0.tar")}
    assert all(reason.isprintable() and len(reason) <= 300 for reason in reasons.values())
    assert all(batch["images"].shape == (2, 16, 3, 32, 32) for batch in straight)
    halves = [batches(hostile, steps, micro_batch_size=8, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    for whole, *parts in zip(straight, *halves, strict=True):
        assert torch.equal(whole["images"], torch.cat([part["images"] for part in parts], dim=1))
        assert torch.equal(whole["sample_hash"], torch.cat([part["sample_hash"] for part in parts]))
        named = [sorted(map(str, part["bad_samples"])) for part in (whole, *parts)]
        assert named[0] == sorted(named[1] + named[2])
    # Nothing was unpacked: beside the shard there is only the cache, and above it nothing.
    assert {path.name for path in folder.iterdir()} == {"0.tar", "cache"}
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_evaluation_leaves_them_out_and_names_them(hostile):
    source, store, expected, _ = hostile
    loader = build_eval_loader([source], EvalTransform(32), batch_size=32, store=store)
    found = list(loader)
    # What only a tokenizer can tell stays in an evaluation.
    unreadable = {key for key, words in expected.items() if words != "no readable character"}
    assert {record["key"] for record in loader.bad_samples} == unreadable
    by_key = {
        meta["key"]: (captions, meta)
        for batch in found
        for captions, meta in zip(batch["captions"], batch["metadata"], strict=True)
    }
    assert set(ODD_KEYS) <= by_key.keys()
    assert by_key["odd_json_infinite"][1]["a"] == float("inf")
    assert by_key["odd_json_twice"][0] == ["cat"]
    assert by_key["odd_json_types"][0] == ["cat"]
    assert by_key["odd_json_surrogate"][0] == ["a \ud800 cat"]
    assert by_key["odd_bom"][0] == ["a cat"]
    assert not Path("/etc/cron.d/evil").exists()
