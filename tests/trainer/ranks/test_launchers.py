"""The same entry point under every launcher."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.trainer.harness import BIN, WORKER, command_of, ds_config, steps, write_recipe


def launch(command, cache):
    """Run a launcher to the end; returns its exit code and everything it printed."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"OMP_NUM_THREADS": "1", "DECLIP_CACHE": str(cache), "PATH": f"{BIN}:{os.environ['PATH']}"}
    finished = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=240)
    return finished.returncode, finished.stdout + finished.stderr


# How launchers and communication libraries complain about a process that left without saying goodbye.
NOISE = re.compile(r"BAD TERMINATION|Traceback|terminate called|leaked|not been destroyed|Aborted|MPI_Finalize")
RANKS = {"deepspeed": 2, "torchrun": 2, "mpirun": 2, "python": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_launcher_trains(name, shards, cache, tmp_path):
    command, world_size = command_of(name, RANKS[name]), RANKS[name]
    if name == "mpirun" and not Path(command[0]).is_file():
        pytest.skip("needs the extra: pip install 'declip-trainer[mpi]'")
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, train={"steps": 4}, **WORKER)
    arguments = ["--recipe", str(recipe), "--run_dir", str(tmp_path / "run"), "--ds_config", ds_config(2)]
    code, output = launch([*command, *arguments], cache)
    assert code == 0, output
    assert f"{world_size} rank(s) on cpu by {name}" in output
    assert not NOISE.search(output), output
    assert list(steps(tmp_path / "run")) == [1, 2, 3, 4]
    assert f"everything is in {tmp_path / 'run'}" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_launcher_passes_on_a_mistake(name, shards, cache, tmp_path):
    command = command_of(name, RANKS[name])
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, train={"steps": 4})
    code, output = launch([*command, "--recipe", str(recipe), "--optimizer.lrr", "1"], cache)
    assert code == 2 if name == "deepspeed" else code != 0, output
    assert "unknown key 'optimizer.lrr': did you mean 'optimizer.lr'" in output
