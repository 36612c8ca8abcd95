"""The short campaign: one run, four faults of different kinds, two launchers, and the run nothing happened to."""

import random

import pytest

from tests.faults.campaign import Campaign, Line
from tests.faults.kinds import KINDS

SHORT = ("kill_in_save", "http_half", "kill_rank_1", "disk_full")


@pytest.mark.slow(seconds=150)
def test_a_run_survives_faults_in_a_row(tmp_path):
    faults = tuple(KINDS[name](random.Random(name)) for name in SHORT)
    campaign = Campaign(tmp_path)
    outcomes = campaign.run(Line(2, ("deepspeed", "torchrun"), faults))
    assert [outcome for outcome in outcomes if not outcome.clean] == []
    assert campaign.final_problems == []
