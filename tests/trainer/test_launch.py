"""Ranks from every launcher's environment."""

import os

import pytest

from trainer.errors import ConfigError
from trainer.launch import Place, find_place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
NAMES += ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "PMI_SIZE")
NAMES += ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch):
    """An environment without any launcher's variables."""
    for name in NAMES:
        # Set first: what find_place exports must be undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_alone(environment):
    place = find_place()
    assert place == Place(0, 0, 1, 1, "python")
    assert place.is_main


def test_torchrun(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")
    environment(TORCHELASTIC_RUN_ID="x")
    assert find_place() == Place(5, 1, 8, 4, "torchrun")


def test_srun(environment, monkeypatch):
    environment(SLURM_PROCID="9", SLURM_STEP_NUM_TASKS="16", SLURM_LOCALID="1", SLURM_JOB_ID="71234", MASTER_ADDR="n1")
    environment(SLURM_STEP_TASKS_PER_NODE="8(x2)")
    assert find_place() == Place(9, 1, 16, 8, "srun")
    assert os.environ["RANK"] == "9"
    assert os.environ["MASTER_PORT"] == str(20000 + 71234 % 20000)


def test_batch_script_without_srun_is_one_process(environment):
    environment(SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_JOB_ID="71234")
    assert find_place().world_size == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "rank 2 is outside world size 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_broken_environments(values, message, environment):
    environment(**values)
    with pytest.raises(ConfigError, match=message):
        find_place()
