"""The accumulation benchmark on a toy model: work is counted, and both known faults of the other algorithm show."""

import pytest

from benchmarks import accumulation
from benchmarks.processes import Peer, run_inline


def test_rows_counts_and_errors():
    steps = 3
    settings = accumulation.Settings(
        architecture="vit_pico_p8_32", micro_batches=steps, micro_batch_size=2, loss_batch_size=16
    )
    rows = {
        (row.quantity, row.reference, "dropout" in row.case): row
        for row in accumulation.run(run_inline, [Peer("open_clip")], settings)
    }
    whole, theirs = (rows["FLOPs", name, False] for name in ("our whole batch", "open_clip"))
    # A backward costs twice the forward, less the gradient of the pixels.
    assert 1.3 < whole.ratio < 1.34
    assert theirs.ratio < 0.5
    loss = rows["FLOPs of the loss", "open_clip", False]
    product = 2 * 16 * 16 * accumulation._LOSS_WIDTH
    assert loss.reference_value * 1e9 == pytest.approx(steps * 6 * product)
    assert loss.ours * 1e9 == pytest.approx((3 + 1 / 16) * product)
    for dropout in (False, True):
        for part in ("image tower", "text tower", "logit_scale"):
            assert rows[f"gradient error, {part}", "open_clip", dropout].met, part
        norm = rows["gradient norm, logit_scale", "open_clip", dropout]
        assert norm.ours == pytest.approx(1, rel=1e-4)
    # Their logit scale receives its gradient once per micro-batch.
    assert rows["gradient norm, logit_scale", "open_clip", False].reference_value == pytest.approx(steps, rel=1e-4)
    assert rows["gradient error, image tower", "open_clip", False].reference_value < 1e-4
    # Their two forwards of a micro-batch drop different patches.
    assert rows["gradient error, image tower", "open_clip", True].reference_value > 0.01
