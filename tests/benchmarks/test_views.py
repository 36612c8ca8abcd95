"""The views benchmark on two small pictures: every implementation runs, and those that must be close are."""

from benchmarks import views
from benchmarks.processes import run_inline
from benchmarks.report import OURS


def test_rows_and_distances():
    settings = views.Settings(sizes=(256,), num_photos=2, repeats=1)
    found = views.run(run_inline, [], settings)
    one, two = views.summary(found).split("\n\n")
    assert [line.split("|")[1].strip() for line in one.splitlines()[2:]] == list(views._ONE_VIEW)
    assert [line.split("|")[1].strip() for line in two.splitlines()[2:]] == list(views._TWO_VIEWS)
    assert "256 px: images/s | 256 px: mean distance" in one.splitlines()[0]
    rows = {(row.case, row.quantity, row.reference): row for row in found}
    for group, implementations in (("one view", views._ONE_VIEW), ("two moco_v2 views", views._TWO_VIEWS)):
        for name in set(implementations) - {OURS}:
            row = rows[f"{group}, JPEGs of 256 pixels", "one core", name]
            assert row.ours > 0 and row.reference_value > 0
    case = "one view, JPEGs of 256 pixels"
    mean, largest = (
        {name: row for (where, what, name), row in rows.items() if where == case and what.startswith(kind)}
        for kind in ("mean distance", "max distance")
    )
    # Integer weights instead of Pillow's: a level here and there.
    assert mean["Pillow box"].ours < 0.05
    assert largest["Pillow box"].ours <= 3
    assert mean["Pillow bicubic, cropped first"].reference_value < 1
    assert mean["Pillow box"].reference_value > mean["Pillow bilinear"].reference_value > 0.1
    assert "Pillow bicubic, normalised floats" not in mean
