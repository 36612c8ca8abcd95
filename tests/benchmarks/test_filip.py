"""The FILIP benchmark at toy size: exact numbers of products, and the direct way agrees."""

import pytest

from benchmarks import filip
from benchmarks.processes import run_inline


def test_products():
    settings = filip.Settings(ranks=(1, 3), largest_direct=3, samples=4, patches=3, positions=5, width=8, selected=2)
    rows = filip.run(run_inline, [], settings)
    products = {(row.case, row.reference): row for row in rows if row.quantity == "products of all token pairs"}
    assert len(products) == 6
    for ranks in (1, 3):
        direct = products[f"B = {4 * ranks}: {ranks} ranks", "direct"]
        # Forward, and the gradient of the keys, for each direction; the direct way also multiplies for the queries.
        assert direct.ours == pytest.approx(4)
        assert direct.reference_value == pytest.approx(6)
        # Two of five keys for each of three queries, and two of three for each of five; the choice costs next to this.
        selected = products[f"B = {4 * ranks}: {ranks} ranks, 2 keys", ""]
        assert selected.ours == pytest.approx(2 * (2 / 5 + 2 / 3), abs=0.2)
