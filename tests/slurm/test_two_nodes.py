"""A published template on a real two-node cluster: a preemption, a time limit, and the result of an untouched run."""

import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.trainer.harness import WORKER, ds_config, metrics, run_trainer, steps, write_recipe, write_shards

BIN = Path(sys.executable).parent
SEED = 3
# As many as nothing reaches: how far the job comes before each interruption depends on the machine.
STEPS = 10_000
# Without the vocabulary-sized head of the masked captions, which is most of the work and nothing to the scheduler.
LIGHT = ("--method.w_tss", "0")
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--array={SEED}")


class Job:
    """The one job of this test and everything it has said."""

    def __init__(self, cluster, folder, recipe, cache):
        self.cluster, self.recipe = cluster, recipe
        self.log, self.run_dir = folder / "job.out", folder / f"run-seed{SEED}"
        environment = {
            "PATH": f"{BIN}:{cluster.environment['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DECLIP_CACHE": str(cache),
            "RECIPE": str(recipe),
            "RUN_DIR": str(folder / "run"),
        }
        flags = ("--time=30", "--signal=B:USR1@120", f"--output={self.log}")
        self.started = time.monotonic()
        array = cluster.run("sbatch", "--parsable", *SIZE, *flags, "slurm/declip_88m.sh", *LIGHT, **environment)
        self.name = f"{array.strip()}_{SEED}"

    def steps(self):
        """Step numbers logged by now; the last line may be half written."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [int(number) for number in re.findall(r'^\{"step": (\d+),.*\}$', text, re.MULTILINE)]

    def wait_for(self, condition, timeout_s=240):
        """Poll until the condition holds; a failure shows the whole story."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                printed = self.log.read_text() if self.log.exists() else ""
                pytest.fail(f"{printed}\n{self.cluster.run('squeue')}{self.cluster.logs()}")
            time.sleep(0.1)

    def wait_for_steps(self, after):
        """Wait for training; returns how long that took since the last start."""
        self.wait_for(lambda: max(self.steps(), default=0) > after)
        return time.monotonic() - self.started

    def wait_for_requeue(self, count):
        """Wait until SLURM has put the job back; returns the last step."""
        described = lambda: self.cluster.run("scontrol", "show", "job", self.name)  # noqa: E731
        self.wait_for(lambda: f"Restarts={count}" in described() and self.cluster.state(self.name) == "PENDING")
        return max(self.steps())

    def release(self):
        """Start again now."""
        self.cluster.release(self.name)
        self.started = time.monotonic()


@pytest.mark.slow(seconds=200)
def test_interruptions_change_nothing(cluster, tmp_path, capsys):
    """One element of a job array, interrupted twice in two ways, logs what a plain run of its seed logs."""
    shards = write_shards(tmp_path / "shards")
    recipe = write_recipe(tmp_path / "tiny.yaml", shards, train={"steps": STEPS}, **WORKER)
    cache = tmp_path / "cache"
    cache.mkdir()

    job = Job(cluster, tmp_path, recipe, cache)
    start_up = job.wait_for_steps(after=3)
    cluster.run("scontrol", "requeue", job.name)
    first = job.wait_for_requeue(1)

    # SLURM looks at the clock twice a minute: be training when it next does.
    time.sleep((cluster.until_limit_check() - start_up - 6) % 30)
    job.release()
    minutes = int(job.wait_for_steps(after=first + 1) // 60) + 2
    cluster.run("scontrol", "update", f"JobId={job.name}", f"TimeLimit={minutes}")
    second = job.wait_for_requeue(2)

    # The rest of the run: two more steps.
    tree = yaml.safe_load(recipe.read_text())
    tree["train"]["stop_after"] = 2
    recipe.write_text(yaml.safe_dump(tree))
    cluster.run("scontrol", "update", f"JobId={job.name}", "TimeLimit=30")
    job.release()
    job.wait_for(lambda: cluster.state(job.name) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))

    printed = job.log.read_text()
    with capsys.disabled():
        print("\n" + "\n".join(line for line in printed.splitlines() if not line.startswith("step ")))
    assert cluster.state(job.name) == "COMPLETED", printed + cluster.logs()
    assert [int(count) for count in re.findall(r"job \d+ on n\[1-2\], requeued (\d) times", printed)] == [0, 1, 2]
    assert printed.count("2 rank(s) on cpu by srun") == 3
    assert "DUE TO JOB REQUEUE" in printed
    assert "told to stop by SLURM" in printed
    # Both times the ranks saved where they were; this recipe saves nowhere else.
    assert [record["step"] for record in metrics(job.run_dir) if record.get("event") == "resumed"] == [first, second]
    assert yaml.safe_load((job.run_dir / "config.yaml").read_text())["train"]["seed"] == SEED
    assert not (job.run_dir / "logs").exists()
    assert not (job.run_dir / "stopped_early").exists()

    flags = ["--recipe", str(recipe), "--train.seed", str(SEED), "--ds_config", ds_config(1), *LIGHT]
    reference = tmp_path / "reference"
    run_trainer([*flags, "--run_dir", str(reference), "--train.stop_after", str(second + 2)], cache, world_size=2)
    assert steps(job.run_dir) == steps(reference)
