"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd in a temporary folder."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
# Debian keeps daemons where only root's PATH looks.
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# slurmctld looks for jobs near their limit this often, counted from its start.
LIMIT_CHECK_SECONDS = 30
# More cores than the machine may have, and a GPU that is none: the templates ask for them and nothing here uses them.
_CPUS = 8
_GPU_DEVICE = "/dev/zero"
# Ends everything when its input does: when the cluster is stopped, and when the tests are killed. It reads the daemons'
# process ids, newest last.
_JANITOR = """
trap '' INT TERM
daemons=
while read -r daemon; do daemons="$daemon $daemons"; done
scancel --full --signal=KILL --user "$1"
for i in $(seq 100); do [ -n "$(squeue -h)" ] || break; sleep 0.2; done
for number in TERM KILL; do
  for i in $(seq 50); do
    kill -0 $daemons || break
    kill -$number $daemons
    sleep 0.2
  done
done
rm -rf "$2"
"""


def missing_tools() -> list[str]:
    """What is not installed of SLURM and munge."""
    return [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]


class Cluster:
    """Two nodes, `n1` and `n2`, each a slurmd of this machine; start with `start`, always end with `stop`."""

    def __init__(self) -> None:
        # Not pytest's folder: socket paths have 107 characters, and munge wants a folder that others can enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        self._janitor = subprocess.Popen(
            ["bash", "-c", _JANITOR, "janitor", getpass.getuser(), str(self.folder)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={_GPU_DEVICE}\n")
        (self.folder / "slurm.conf").write_text(self._configuration(_free_ports(3)))
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        if version and (int(version[1]), int(version[2])) >= (23, 11):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        files = {name: f"--{name}-file={self.folder}/munged.{name}" for name in ("log", "pid", "seed")}
        socket_path = self.folder / "munge.socket"
        # --force: a temporary folder may be open to others.
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={self.folder}/munge.key",
            *files.values(),
        )  # fmt: skip
        self._wait_until(socket_path.exists, "munged")
        self.started = time.time()
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        self._wait_until(
            lambda: set(self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split()) == {"idle"}, "nodes"
        )

    def stop(self) -> None:
        """End every job and daemon and remove the folder."""
        self._janitor.stdin.close()
        # Collected as they die: a dead child still answers the janitor's question whether it is there.
        for daemon in reversed(self._daemons):
            daemon.wait(60)
        self._janitor.wait(60)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run one of SLURM's commands in the repository's root and give what it printed."""
        finished = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and finished.returncode:
            raise RuntimeError(f"{' '.join(command)}: {finished.stderr}{self.logs()}")
        return finished.stdout

    def state(self, job: str) -> str:
        """State of a job, e.g. PENDING, RUNNING, COMPLETED."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        return found[1]

    def release(self, job: str) -> None:
        """Start a requeued job now; SLURM would hold it back for two minutes, in which nodes forget the last start."""
        time.sleep(5)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def until_limit_check(self) -> float:
        """Seconds until slurmctld next looks for jobs near their time limit."""
        return LIMIT_CHECK_SECONDS - (time.time() - self.started) % LIMIT_CHECK_SECONDS

    def logs(self) -> str:
        """The last lines of every daemon."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"\n--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "".join(parts)

    def _spawn(self, *command: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{command[0]}.log").open("w") as log:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._daemons.append(daemon)
        print(daemon.pid, file=self._janitor.stdin, flush=True)

    def _wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"the test cluster did not start ({what}){self.logs()}")
            time.sleep(0.1)

    def _configuration(self, ports: list[int]) -> str:
        host, user, folder = socket.gethostname().split(".")[0], getpass.getuser(), self.folder
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={_CPUS} Gres=gpu:1\n"
            for name, port in zip(("n1", "n2"), ports[1:], strict=True)
        )
        return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=60
ReturnToService=2
GresTypes=gpu
{nodes}PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
