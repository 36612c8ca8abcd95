"""The neighbour queue as DeCLIP keeps it: what it starts from, what it stores, what moves between kinds of queue."""

import pytest
import torch

from models.registry import build_model
from tests.trainer.methods.test_gradients import micro_batch
from trainer.config.sections import TrainConfig
from trainer.methods import METHODS, parse_method

WHOLE = {"name": "declip", "w_tss": 0.0, "w_iss": 0.0, "nns_queue_size": 96}


def method_of(seed: int = 0, **settings):
    torch.manual_seed(1)
    name, parsed = parse_method({**WHOLE, **settings})
    method = METHODS[name](build_model("vit_pico_p8_32", vocab_size=49_408, embed_dim=16), parsed, None)
    method.begin_run(TrainConfig(steps=3, global_batch_size=8, seed=seed), None)
    return method


def after_one_step(method) -> dict[str, torch.Tensor]:
    terms = method("train", {"micro_batches": [micro_batch(0, 8)]})
    method.after_step()
    return terms


def test_random_rows_are_of_the_seed():
    for queue in ("global", "local"):
        random = {"nns_warmup": "random", "nns_queue": queue}
        rows = [method_of(seed, **random).queue.rows for seed in (0, 0, 7)]
        assert torch.equal(rows[0], rows[1])
        assert not torch.isclose(rows[0], rows[2]).any(dim=1).all()
        torch.testing.assert_close(rows[2].norm(dim=1), torch.ones(96))
    assert not method_of(7).queue.rows.any()


def test_random_rows_are_neighbours_until_captions_take_their_place():
    skip, random = method_of(), method_of(nns_warmup="random")
    assert after_one_step(skip)["loss/nns"] == 0.0
    assert after_one_step(random)["loss/nns"] > 0.0
    assert skip.queue.filled == random.queue.filled == 16
    assert torch.equal(skip.queue.rows[:16], random.queue.rows[:16])
    assert random.queue.rows[16:].any() and not skip.queue.rows[16:].any()
    restored = method_of(5, nns_warmup="random")
    restored.load_method_state(random.method_state())
    assert restored.state_digest() == random.state_digest()


@pytest.mark.parametrize("mask_duplicates", [False, True])
def test_on_one_rank_a_queue_per_rank_is_the_queue(mask_duplicates):
    options = {"nns_warmup": "random", "nns_mask_duplicates": mask_duplicates}
    whole, own = method_of(**options), method_of(**options, nns_queue="local")
    for _ in range(3):
        torch.testing.assert_close(after_one_step(own), after_one_step(whole), rtol=1e-6, atol=1e-6)
    assert own.state_digest() == whole.state_digest()
    assert own.metrics() == pytest.approx(whole.metrics())
    # What is kept for all ranks, and what for each.
    assert (own.method_state(), whole.rank_state()) == ({}, {})
    assert own.rank_state().keys() == whole.method_state().keys() == {"queue"}
    assert (len(own.own_buffers()), whole.own_buffers()) == (2, [])
    # Vectors travel in place of slots.
    assert own.exchanged_per_sample()[0] == whole.exchanged_per_sample()[0] + 2 * 16
    for source, target in ((own, whole), (whole, own)):
        target.queue.restart(3)
        target.load_method_state(source.method_state())
        target.load_rank_states([state for state in [source.rank_state()] if state])
        assert target.state_digest() == source.state_digest()


def test_what_is_queued_is_a_choice():
    kept = {kind: method_of(nns_enqueue=kind) for kind in ("both", "orig")}
    for method in kept.values():
        after_one_step(method)
    # The edited captions go first, so that the originals are the newest.
    assert (kept["both"].queue.filled, kept["orig"].queue.filled) == (16, 8)
    assert torch.equal(kept["both"].queue.rows[8:16], kept["orig"].queue.rows[:8])
