"""The loss benchmark at toy size: exact numbers of matrix products."""

import pytest

from benchmarks import loss
from benchmarks.processes import Peer, run_inline


def test_products():
    settings = loss.Settings(
        batch_sizes=(32, 64), largest_peer_batch=32, largest_recomputed_batch=32, width=16, repeats=1, rounds=1
    )
    rows = loss.run(run_inline, [Peer("open_clip")], settings)
    products = {(row.case, row.reference): row for row in rows if row.quantity == "matrix products"}
    assert products.keys() == {
        ("B = 32", "open_clip"),
        ("B = 32, no logits kept", "open_clip"),
        ("B = 64", ""),
    }
    # The gradient of the logit scale is one dot product per row.
    assert products["B = 32", "open_clip"].ours == pytest.approx(3 + 1 / 32, rel=1e-12)
    assert products["B = 32", "open_clip"].reference_value == 6
    assert products["B = 32, no logits kept", "open_clip"].ours == pytest.approx(4 + 1 / 32, rel=1e-12)
    assert products["B = 64", ""].ours == pytest.approx(3 + 1 / 64, rel=1e-12)
    assert {row.quantity for row in rows} == {"processor time", "peak memory", "matrix products"}
