"""Decisions of slurm/launch.sh, with programs of SLURM's names that note how they were called."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.trainer.harness import ROOT
from trainer.config.recipe import recipe_names
from trainer.loading import load_config

TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "launch.sh")
# Each says what it was given; srun then does what the test wrote for it.
TOOLS = {
    "srun": 'echo "srun $* | port $MASTER_PORT logs $DECLIP_RANK_LOGS cores $SRUN_CPUS_PER_TASK" >>"$CALLS"\n. "$SRUN"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    "scancel": 'echo "scancel $*" >>"$CALLS"; touch "$CALLS.signalled"',
    "squeue": 'case "$*" in *%T*) echo "${STATE:-RUNNING}";; *) date -d "+100 minutes" +%Y-%m-%dT%H:%M:%S;; esac',
}


class Site:
    """A folder of such programs, and the script started among them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        (folder / "bin").mkdir()
        for name, text in TOOLS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "SRUN": str(folder / "behaviour"),
            "SLURM_JOB_ID": "4711",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "RECIPE": "clip_demo",
            "RUN_DIR": str(self.run_dir),
            "SITE": "",
        }

    def start(self, behaviour: str, *arguments: str, script: str = "launch.sh", **environment: str) -> subprocess.Popen:
        """Start the script; `behaviour` is the shell that srun runs."""
        (self.folder / "behaviour").write_text(f"RUN_DIR={self.run_dir}\n{behaviour}\n")
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, behaviour: str, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run the script to its end: exit code and output."""
        process = self.start(behaviour, *arguments, **environment)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def calls(self, tool: str) -> list[str]:
        """What a program was called with."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{tool} ") for line in lines if line.startswith(f"{tool} ")]


@pytest.fixture
def site(tmp_path):
    """Programs of SLURM's names."""
    return Site(tmp_path)


def test_a_finished_run_leaves_only_its_results(site):
    code, output = site.run("", "--train.steps", "7", DATA="/data/{0..9}.tar", SLURM_CPUS_PER_TASK="12")
    assert code == 0, output
    (call,) = site.calls("srun")
    run_dir = site.run_dir
    assert call.startswith(
        "--kill-on-bad-exit=1 python trainer/run.py --ds_config ds_configs/zero1.json --recipe clip_demo "
        f"--run_dir {run_dir} --resume auto --data.train /data/{{0..9}}.tar --train.steps 7 | "
    )
    assert call.endswith(f"port {20000 + 4711} logs {run_dir}/logs cores 12")
    assert not site.calls("scontrol")
    assert list(run_dir.iterdir()) == []


def test_site_hook_container_and_seeds(site):
    hook = site.folder / "site.sh"
    hook.write_text("CONTAINER=${CONTAINER:-image.sqsh}\nSRUN_FLAGS=--mpi=none\n")
    environment = {"SITE": str(hook), "CONTAINER_MOUNTS": "/data:/data", "SLURM_ARRAY_TASK_ID": "2"}
    code, output = site.run("", SLURM_ARRAY_JOB_ID="4700", **environment)
    assert code == 0, output
    (call,) = site.calls("srun")
    wanted = "--kill-on-bad-exit=1 --mpi=none --container-image image.sqsh --container-mounts /data:/data python"
    assert call.startswith(wanted)
    assert f"--run_dir {site.run_dir}-seed2 --resume auto --train.seed 2 |" in call


def test_a_taken_port_is_passed_over(site):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 20000 + 4711))
        taken.listen()
        code, output = site.run("")
    assert code == 0, output
    assert f"port {20000 + 4711 + 101} " in site.calls("srun")[0]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_only_a_job_that_slurm_has_not_ended_is_requeued(state, site):
    code, output = site.run('touch "$RUN_DIR/stopped_early"', STATE=state)
    assert code == 0, output
    assert site.calls("scontrol") == (["requeue 4711"] if state == "RUNNING" else [])


def test_warning_before_the_limit_reaches_the_ranks(site):
    waits = 'until [ -e "$CALLS.signalled" ]; do sleep 0.05; done; touch "$RUN_DIR/stopped_early"'
    process = site.start(waits)
    while not site.calls("srun"):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert site.calls("scancel") == ["--signal=USR1 4711"]
    assert site.calls("scontrol") == ["requeue 4711"]


def test_ranks_that_do_not_get_there_in_time_are_requeued(site):
    process = site.start('until [ -s "$CALLS.n" ]; do sleep 0.05; done; exit 143')
    while not site.calls("srun"):
        time.sleep(0.02)
    # The limit is now: the script asks SLURM for a new start before that can end the job.
    (site.folder / "bin" / "squeue").write_text(
        '#!/bin/bash\ncase "$*" in *%T*) echo RUNNING;; *) date +%FT%T;; esac\n'
    )
    process.send_signal(signal.SIGUSR1)
    while not site.calls("scontrol"):
        time.sleep(0.02)
    (site.folder / "calls.n").write_text("go")
    assert "not saved in time" in process.communicate(timeout=30)[0]


def test_ranks_killed_by_the_warning_are_requeued_too(site):
    """A signal in the first moments of a process kills it: that is no failure of the run."""
    process = site.start('until [ -e "$CALLS.signalled" ]; do sleep 0.05; done; exit 138')
    while not site.calls("srun"):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert site.calls("scontrol") == ["requeue 4711"]


def test_a_crash_is_retried_and_never_requeued(site):
    crash = 'echo "out of memory" >"$RUN_DIR/logs/rank_00003.log"; exit 137'
    code, output = site.run(crash)
    assert code == 137
    assert len(site.calls("srun")) == 3
    assert not site.calls("scontrol")
    assert "out of memory" in output
    # A new checkpoint is progress: the count starts again.
    progress = 'mkdir -p "$RUN_DIR/checkpoints"; N=$(cat "$CALLS.n" 2>/dev/null || echo 0); echo $((N + 1)) >"$CALLS.n"'
    progress += '; [ "$N" -lt 4 ] && echo "step_$N" >"$RUN_DIR/checkpoints/latest"; exit 1'
    (site.folder / "calls").unlink()
    assert site.run(progress)[0] == 1
    assert len(site.calls("srun")) == 6


def test_a_mistake_is_not_retried(site):
    code, output = site.run('touch "$RUN_DIR/logs/error_2_abc"; exit 143')
    assert code == 2, output
    assert len(site.calls("srun")) == 1


def test_requeueing_without_progress_ends(site):
    stop = 'touch "$RUN_DIR/stopped_early"'
    assert [site.run(stop)[0] for _ in range(6)] == [0, 0, 0, 0, 0, 1]
    assert len(site.calls("scontrol")) == 5
    assert "raise --time" in site.run(stop)[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_SUBMIT_DIR": "/"}, "submit from its root, or set DECLIP_ROOT"),
        ({"SITE": "/nowhere.sh"}, "SITE names /nowhere.sh, which is no file"),
        ({"VENV": "/nowhere"}, "VENV names /nowhere, which is no virtual environment"),
        ({"RECIPE": ""}, "set RECIPE to a recipe"),
    ],
)
def test_mistakes_have_one_line(environment, message, site):
    code, output = site.run("", **environment)
    assert (code, output.count("\n")) == (2, 1)
    assert message in output


def test_every_published_recipe_has_a_template():
    recipes = {}
    for template in TEMPLATES:
        text = template.read_text()
        name = re.search(r"RECIPE:-(\w+)", text)[1]
        size = {key: int(value) for key, value in re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text, re.MULTILINE)}
        recipes[name] = size["nodes"] * size["ntasks-per-node"]
        assert size["ntasks-per-node"] == size["gpus-per-node"]
        assert (ROOT / re.search(r"DS_CONFIG:-([\w/.]+)", text)[1]).is_file()
        assert "#SBATCH --signal=B:USR1@" in text
        assert "#SBATCH --requeue" in text
    assert sorted(recipes) == [name for name in recipe_names() if not name.endswith("demo")]
    for name, ranks in recipes.items():
        config = load_config(name)
        assert config.train.global_batch_size % ranks == 0, name


def test_template_starts_its_recipe(site):
    process = site.start("", "--train.steps", "5", script="declip_88m.sh", RECIPE="")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "--recipe declip_88m_rn50 " in site.calls("srun")[0]
    assert "--train.steps 5 |" in site.calls("srun")[0]
