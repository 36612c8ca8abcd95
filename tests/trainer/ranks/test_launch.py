"""Ranks from every launcher's environment."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch

from trainer.engine.device import select_device
from trainer.errors import ConfigError
from trainer.ranks import launch
from trainer.ranks.launch import Place, find_place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
NAMES += ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "PMI_SIZE")
NAMES += ("SLURM_STEP_ID", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
NAMES += ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE")
NAMES += ("TORCHELASTIC_USE_AGENT_STORE",)


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
    assert os.environ["MASTER_PORT"] == str(20000 + 71234 % 12000)


def test_port_of_a_job_is_checked_by_rank_0(environment):
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", SLURM_JOB_ID="5000", MASTER_ADDR="n1")
    with socket.socket() as taken:
        taken.bind(("", 25000))
        taken.listen()
        with pytest.raises(ConfigError, match="port 25000, derived from the SLURM job, is taken"):
            find_place()


def test_runs_on_one_machine_do_not_share_deepspeeds_port(environment):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert find_place().is_main
        assert os.environ["MASTER_PORT"] != port
        environment(RANK="0", WORLD_SIZE="2", MASTER_PORT=port)
        with pytest.raises(ConfigError, match=f"port {port} is taken on this node.*--master_port"):
            find_place()
    assert find_place().world_size == 2
    assert os.environ["MASTER_PORT"] == port


@pytest.mark.parametrize(
    ("own", "routes", "chosen"),
    [
        # The name of the host means its address on the network: gloo needs no help.
        ("10.0.0.7", {}, None),
        # Debian's 127.0.1.1: the interface that leads to the first node.
        ("127.0.1.1", {"n1": "10.0.0.7"}, "eth0"),
        # The first node itself finds its own name at home, and takes the way out.
        ("127.0.1.1", {"n1": "127.0.0.1", "192.0.2.1": "10.0.0.7"}, "eth0"),
        (None, {"n1": "192.168.5.7"}, "ib0"),
    ],
)
def test_gloo_listens_where_other_nodes_reach_it(own, routes, chosen, environment, monkeypatch):
    interfaces = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "192.168.5.7"}
    addresses = {name: [SimpleNamespace(address=address)] for name, address in interfaces.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(launch, "_address_of", lambda host: own)
    monkeypatch.setattr(launch, "_address_towards", routes.get)
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="n1", MASTER_PORT="1")
    find_place()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_gloo_without_a_way_out_says_so(environment, monkeypatch):
    monkeypatch.setattr(launch, "_address_of", lambda host: "127.0.1.1")
    monkeypatch.setattr(launch, "_address_towards", lambda host: None)
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="n1", MASTER_PORT="1")
    with pytest.raises(ConfigError, match="export GLOO_SOCKET_IFNAME"):
        find_place()
    # All on one machine, or on a cluster that is one machine: nothing to choose.
    environment(MASTER_ADDR="127.0.0.1")
    find_place()
    environment(MASTER_ADDR="n1", LOCAL_WORLD_SIZE="8")
    find_place()


@pytest.mark.parametrize(
    ("launcher", "visible", "gpus", "expected"),
    [
        # srun --gpus-per-task=1: each task sees its own GPU alone.
        ("srun", "3", 1, 0),
        ("mpirun", "3", 1, 0),
        ("srun", "0,1,2,3", 4, 2),
        ("torchrun", "", 4, 2),
        # Two ranks would share the one GPU.
        ("torchrun", "0", 1, None),
        ("srun", "", 1, None),
    ],
)
def test_device_of_a_rank(launcher, visible, gpus, expected, environment, monkeypatch):
    environment(CUDA_VISIBLE_DEVICES=visible, LOCAL_RANK="2", OMPI_COMM_WORLD_LOCAL_RANK="2", DS_ACCELERATOR="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    place = Place(2, 2, 4, 4, launcher)
    if expected is None:
        with pytest.raises(ConfigError, match="local rank 2 has no GPU: this node shows 1"):
            select_device("auto", place)
    else:
        assert select_device("auto", place) == torch.device("cuda", expected)
        # DeepSpeed takes the device that these name, and refuses two that differ.
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(expected)


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
