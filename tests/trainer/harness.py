"""Tiny shards, and the real entry point in real processes."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
import yaml
from PIL import Image

from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
# Of this environment's commands.
BIN = Path(sys.executable).parent
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ("square", "bar", "column", "corner")
# Of a recipe: one loader process per rank.
WORKER = {"data": {"workers": 1}}
# Fields that depend on the clock or the machine; everything else must be reproducible to the bit.
VOLATILE = {"samples_per_second", "step_seconds", "data_seconds", "memory_gib"}


def picture(colour: str, shape: str, rng: np.random.Generator) -> bytes:
    """A PNG of one coloured shape on a noisy background."""
    pixels = rng.integers(230, 256, (40, 40, 3), dtype=np.uint8)
    top, left = rng.integers(2, 14, 2)
    height, width = {"square": (20, 20), "bar": (7, 24), "column": (24, 7), "corner": (12, 12)}[shape]
    pixels[top : top + height, left : left + width] = COLOURS[colour]
    if shape == "corner":
        pixels[top + 6 : top + 18, left + 6 : left + 18] = COLOURS[colour]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, shards: int = 4, per_shard: int = 24, bad: int = 0) -> str:
    """WebDataset shards of coloured shapes; the first `bad` samples hold bytes that are no image.

    Returns:
        The brace range that names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as sink:
            for index in range(per_shard):
                number = shard * per_shard + index
                colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
                image = b"no image" if number < bad else picture(colour, shape, rng)
                caption = f"a {colour} {shape} number {number}"
                sink.write({"__key__": f"{number:06d}", "png": image, "txt": caption})
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def write_eval_set(folder: Path, samples: int = 37) -> Path:
    """A classification and retrieval set in CLIP_benchmark's layout; an odd size leaves ranks unequal shares."""
    test = folder / "test"
    test.mkdir(parents=True, exist_ok=True)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    (test / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    rng = np.random.default_rng(1)
    with webdataset.TarWriter(str(test / "0.tar")) as sink:
        for number in range(samples):
            label = number % len(names)
            colour, shape = names[label].split()
            captions = f"a {colour} {shape} {number}\n{shape} in {colour} {number}"
            image = picture(colour, shape, rng)
            sink.write({"__key__": f"s{number:07d}", "png": image, "txt": captions, "cls": label})
    return folder


def write_recipe(path: Path, shards: str, method: str = "declip", **sections: dict) -> Path:
    """A recipe small enough for a test: 20 steps of 16 samples in fp32, read without workers.

    A worker gives the same samples and takes more seconds than the steps: tests ask for one (`WORKER`) where processes
    start, end or die.
    """
    methods = {
        "aclip": {"name": "aclip", "mask_block": 1, "head_hidden_dim": 32, "head_out_dim": 16},
        "clip": {"name": "clip"},
        "declip": {"name": "declip", "nns_queue_size": 80, "iss_hidden_dim": 32, "iss_predictor_dim": 16},
        "slip": {"name": "slip", "simclr_hidden_dim": 32, "simclr_out_dim": 16},
        "siglip": {"name": "siglip"},
        "align": {"name": "align", "logit_scale_init": 5.0},
        "filip": {"name": "filip", "filip_dim": 32, "filip_topk": 4, "w_clip": 0.5},
        "protoclip": {
            "name": "protoclip",
            "episode_steps": 4,
            "warmup_episodes": 1,
            "lit_episodes": 1,
            "clusters": 6,
            "cluster_iterations": 5,
            "cluster_restarts": 2,
            "head_dim": 8,
            "head_hidden_dim": 16,
        },
    }
    methods["defilip"] = {**methods["declip"], **methods["filip"], "name": "defilip"}
    recipe = {
        "recipe": path.stem,
        "model": {"name": "vit_femto_p8_32"},
        "method": methods[method],
        "data": {
            "train": shards,
            "mask_token": True,
            "workers": 0,
            "shuffle_window": 16,
            # The published one takes longer than the step.
            "augmentation": {"augmented": "clip"},
        },
        "train": {"steps": 20, "global_batch_size": 16, "log_every": 1, "precision": "fp32", "device": "cpu"},
        # Slowly: at a higher rate twenty steps may turn a rounding, on other ranks, into another nearest neighbour.
        "optimizer": {"lr": 2e-4},
        "schedule": {"warmup_steps": 3},
        "logging": {"tensorboard": False},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass
class Finished:
    """How a run ended."""

    codes: list[int]
    output: str
    seconds: float


class Launched:
    """A run in progress: one process per rank, as a launcher would start them.

    Args:
        arguments: Of `trainer/run.py`.
        world_size: Ranks.
        cache: Cache of the project, and working directory.
        faults: See `tests/trainer/faulty_run.py`.
        fresh: Start interpreters, for tests of how processes start, end or die and of their workers. Else each is a
            fork of one that has imported the libraries, which takes most of a short run's time.
    """

    def __init__(
        self, arguments: list[str], world_size: int, cache: Path, faults: dict | None = None, fresh: bool = False
    ) -> None:
        script = [str(ROOT / "trainer" / "run.py")]
        if faults is not None:
            script = [str(ROOT / "tests" / "trainer" / "faulty_run.py"), json.dumps(faults)]
        self.started = time.monotonic()
        port = free_port()
        self.processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DECLIP_CACHE": str(cache),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self.processes.append(_start([*script, *arguments], environment, cache, fresh))

    def wait(self, timeout_s: float = 240) -> Finished:
        """Wait as a launcher does: the first rank that fails takes the others with it."""
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() not in (None, 0) for process in self.processes):
                time.sleep(2)
                self.kill()
            if time.monotonic() > deadline:
                self.kill()
                output = "".join(process.communicate()[0] for process in self.processes)
                raise TimeoutError(f"the run was still going after {timeout_s} s:\n{output}")
            time.sleep(0.05)
        output = "".join(process.communicate()[0] for process in self.processes)
        return Finished([process.returncode for process in self.processes], output, time.monotonic() - self.started)

    def leave(self, timeout_s: float = 120, ranks: range | None = None) -> Finished:
        """Wait until ranks (all, unless named) have ended by themselves, as they must under any launcher."""
        waited = list(self.processes) if ranks is None else [self.processes[rank] for rank in ranks]
        try:
            output = "".join(process.communicate(timeout=timeout_s)[0] for process in waited)
        finally:
            self.kill()
            for process in self.processes:
                process.wait()
        return Finished([process.returncode for process in waited], output, time.monotonic() - self.started)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal every rank that is still alive."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _start(arguments: list[str], environment: dict[str, str], cwd: Path, fresh: bool) -> subprocess.Popen[str] | Forked:
    if fresh:
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    handle, output = tempfile.mkstemp(prefix="printed-", dir=cwd)
    os.close(handle)
    return Forked(arguments, environment, cwd, Path(output))


def run_trainer(
    arguments: list[str], cache: Path, world_size: int = 1, faults: dict | None = None, fresh: bool = False
) -> Finished:
    """Run to the end and require success."""
    finished = Launched(arguments, world_size, cache, faults, fresh).wait()
    assert finished.codes == [0] * world_size, finished.output
    return finished


def metrics(run_dir: Path) -> list[dict]:
    """All records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> dict[int, dict]:
    """Reproducible part of the logged steps by step number."""
    return {
        record["step"]: {key: value for key, value in record.items() if key not in VOLATILE}
        for record in metrics(run_dir)
        if "event" not in record
    }


def state_hashes(run_dir: Path) -> dict[int, str]:
    """Hash of the method's state in each checkpoint on record that has some, by step."""
    saved = (record for record in metrics(run_dir) if record.get("event") == "checkpoint")
    return {record["step"]: record["state_hash"] for record in saved if "state_hash" in record}


def ds_config(stage: int) -> str:
    """Path of the shipped DeepSpeed configuration of a stage."""
    return str(ROOT / "ds_configs" / f"zero{stage}.json")


def command_of(launcher: str, world_size: int) -> list[str]:
    """How `deepspeed`, `torchrun`, `mpirun` or Python itself starts the trainer on ranks of this machine."""
    script = str(ROOT / "trainer" / "run.py")
    return {
        # Its ports are not its own: tests run side by side.
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(world_size), "--master_port", str(free_port())],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(world_size)],
        "mpirun": [str(BIN / "mpirun"), "-np", str(world_size), sys.executable],
        "python": [sys.executable],
    }[launcher] + [script]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
