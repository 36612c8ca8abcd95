"""Who am I: rank and rendezvous from whichever launcher started this process, before anything heavy is imported."""

import ipaddress
import os
import socket
import subprocess
from dataclasses import dataclass

from trainer.errors import ConfigError

# Below the range the kernel hands out to outgoing connections, so that none of those is in the way.
_FIRST_PORT, _PORTS = 20000, 12000
# Reserved for documentation: a route to it exists wherever there is a default route, and nothing is ever sent.
_ELSEWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Place:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """True on rank 0, the rank that logs and writes shared files."""
        return self.rank == 0


def find_place() -> Place:
    """Read ranks from the environment of deepspeed, torchrun, srun, mpirun or none, and export them for torch.

    Raises:
        ConfigError: The launcher's variables are incomplete or no address of the first node can be found.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed"
        return _export(launcher, _integer("RANK"), _integer("LOCAL_RANK", 0), _integer("WORLD_SIZE"), _local_size())
    # Of SLURM's variables only srun's own count: inside a batch script, without srun, there is one process.
    if _integer("SLURM_STEP_NUM_TASKS", 1) > 1:
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _slurm_first_address()
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port_of_job())
        size = _integer("SLURM_STEP_NUM_TASKS")
        return _export("srun", _integer("SLURM_PROCID"), _integer("SLURM_LOCALID"), size, _local_size())
    if max(_integer("OMPI_COMM_WORLD_SIZE", 1), _integer("PMI_SIZE", 1)) > 1:
        return _from_mpi()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    return _export("python", 0, 0, 1, 1)


def _export(launcher: str, rank: int, local_rank: int, world_size: int, local_world_size: int) -> Place:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is outside world size {world_size}; check the launcher's environment variables")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"{name} is not set although WORLD_SIZE is {world_size}; start through a launcher")
    place = Place(rank, local_rank, world_size, min(local_world_size, world_size), launcher)
    if launcher == "deepspeed" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _settle_port(place)
    _choose_gloo_interface(place)
    return place


def _settle_port(place: Place) -> None:
    """`deepspeed` says port 29500 to every run: a lone rank meets nobody there, others need one that is free."""
    if place.world_size == 1:
        os.environ["MASTER_PORT"] = str(_free_port())
    elif place.is_main and not _is_free(_integer("MASTER_PORT")):
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} is taken on this node, perhaps by another run; give this one a port of "
            "its own: deepspeed --master_port 29501 trainer/run.py ..."
        )


def _from_mpi() -> Place:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by mpirun, but mpi4py cannot be used ({error}); pip install 'declip-trainer[mpi]'"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = os.environ.get("MASTER_ADDR") or _own_address(alone=node.Get_size() == world.Get_size())
    port = os.environ.get("MASTER_PORT") or str(_free_port())
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = world.bcast((address, port), root=0)
    return _export("mpirun", world.Get_rank(), node.Get_rank(), world.Get_size(), node.Get_size())


def _local_size() -> int:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        # SLURM writes "4(x2),3"; the first number is the fullest node's.
        digits = value.split("(")[0].split(",")[0]
        if digits.isdigit():
            return int(digits)
    return 1


def _slurm_first_address() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    hosts = _scontrol("show", "hostnames", nodes).split()
    if not hosts:
        raise ConfigError("srun gave no node list (SLURM_JOB_NODELIST); set MASTER_ADDR to the first node's address")
    try:
        socket.getaddrinfo(hosts[0], None)
        return hosts[0]
    except OSError:
        # Clusters without name service know the address all the same.
        for field in _scontrol("show", "node", hosts[0]).split():
            if field.startswith("NodeAddr="):
                return field.removeprefix("NodeAddr=")
    raise ConfigError(f"node {hosts[0]} has no resolvable name; set MASTER_ADDR to the first node's address")


def _scontrol(*arguments: str) -> str:
    try:
        result = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"scontrol {' '.join(arguments)} failed ({error}); set MASTER_ADDR by hand") from None
    return result.stdout


def _port_of_job() -> int:
    """Every rank derives the same port without talking; jobs that share a node, and steps of a job, get others."""
    port = _FIRST_PORT + (_integer("SLURM_JOB_ID", 0) + 101 * _integer("SLURM_STEP_ID", 0)) % _PORTS
    if _integer("SLURM_PROCID") == 0 and not _is_free(port):
        raise ConfigError(
            f"port {port}, derived from the SLURM job, is taken on this node; export MASTER_PORT with a free one, or "
            "start through slurm/launch.sh of a checkout, which looks for one"
        )
    return port


def _own_address(alone: bool) -> str:
    """An address of this node that the other nodes reach; with no other nodes, the loopback one."""
    named = _address_of(socket.gethostname())
    if alone or (named and not _is_loopback(named)):
        return named or "127.0.0.1"
    return _address_towards(_ELSEWHERE) or named or "127.0.0.1"


def _choose_gloo_interface(place: Place) -> None:
    """Have gloo listen where other nodes can reach it.

    It takes the address that the host's own name stands for, and many images write that as 127.0.1.1.

    Raises:
        ConfigError: No interface leads to the first node.
    """
    if place.world_size == place.local_world_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    named, first = _address_of(socket.gethostname()), os.environ["MASTER_ADDR"]
    # A first node that is literally this machine means that all "nodes" are.
    if (named and not _is_loopback(named)) or first == "localhost" or _is_loopback(first):
        return
    address = _address_towards(first)
    if address is None or _is_loopback(address):
        # The first node itself, which finds its own name at home.
        address = _address_towards(_ELSEWHERE)
    interface = _interface_of(address)
    if interface is None:
        raise ConfigError(
            f"the name of this node, {socket.gethostname()}, stands for {named or 'no address'}, where other nodes "
            "cannot reach it; export GLOO_SOCKET_IFNAME with its network interface (`ip -br address` lists them)"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = interface


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _address_towards(host: str) -> str | None:
    # Connecting a datagram socket chooses the route and sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _interface_of(address: str | None) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if address is not None and any(entry.address == address for entry in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _integer(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"environment variable {name} is {value!r}, expected an integer from the launcher") from None
