"""The collectives benchmark at toy size: every byte and call has its formula."""

import pytest

from benchmarks import collectives
from benchmarks.processes import Peer, run_inline

RANKS, ROWS, WIDTH = 2, 4, 8
BATCH = RANKS * ROWS
FEATURES = ROWS * WIDTH * 4
# Column sums and other numbers of an all-reduce are float64, of which a rank receives 2 * (W - 1) / W.
SUMS = BATCH * 8


@pytest.mark.slow
def test_bytes_and_calls():
    settings = collectives.Settings(world_sizes=(RANKS,), batch_size=ROWS, width=WIDTH)
    rows = {(row.case, row.quantity): row for row in collectives.run(run_inline, [Peer("open_clip")], settings)}
    clip, declip = (f"{name}, W = {RANKS}" for name in ("CLIP", "DeCLIP"))
    received = rows[clip, "received per rank"]
    assert received.ours * 1024 == 2 * FEATURES + SUMS
    assert received.reference_value * 1024 == 4 * FEATURES
    calls = rows[clip, "collectives"]
    assert (calls.ours, calls.reference_value) == (3, 4)
    flops = rows[clip, "FLOPs per rank"]
    product = 2 * ROWS * BATCH * WIDTH
    assert flops.reference_value * 1e9 == pytest.approx(6 * product)
    assert flops.ours * 1e9 == pytest.approx(3 * product + 2 * ROWS * WIDTH)

    received = rows[declip, "received per rank"]
    slots = 2 * ROWS * 8
    assert received.ours * 1024 == 2 * 2 * FEATURES + slots + 4 * SUMS
    # Two image views, two text views and the neighbours of both, there and back.
    assert received.reference_value * 1024 == 2 * 6 * FEATURES
    calls = rows[declip, "collectives"]
    assert (calls.ours, calls.reference_value) == (4, 12)
