"""`trainer/run.py` with faults: `faulty_run.py FAULTS ARGUMENTS...`, FAULTS a JSON object of the functions below."""

import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

RANK = int(os.environ["RANK"])


def spoil_loss(batches: list[int] = (), steps: list[int] = (), value: str = "nan", rank: int = 0) -> None:
    """Add to the loss of one rank, when a step trains on one of these global batches, or is one of these steps."""
    import trainer.loop

    original = trainer.loop.train_step

    def train_step(run, step, iterator):
        method = run.engine.method
        objective = type(method).objective

        def spoiled(features):
            terms = objective(method, features)
            return {**terms, "loss": terms["loss"] + float(value)}

        if rank == RANK and (step + run.state.data_offset in batches or step in steps):
            method.objective = spoiled
        try:
            return original(run, step, iterator)
        finally:
            method.__dict__.pop("objective", None)

    trainer.loop.train_step = train_step


def fail(phase: str, step: int, rank: int, hang: bool = False) -> None:
    """Raise, or never return, on one rank when it comes to a phase of a step."""
    import trainer.ranks.watchdog

    original = trainer.ranks.watchdog.Watchdog.enter

    def enter(self, at, name):
        original(self, at, name)
        if rank == RANK and at >= step and name == phase:
            while hang:
                time.sleep(0.1)
            raise OSError(f"rank {rank} broke in {phase}")

    trainer.ranks.watchdog.Watchdog.enter = enter


def die(place: str, calls: int, rank: int) -> None:
    """End one rank by SIGKILL when it calls a function, `module:name`, for so many times."""
    module, name = place.split(":")
    module = importlib.import_module(module)
    original, counted = getattr(module, name), itertools.count(1)

    def called(*args, **kwargs):
        if next(counted) == calls and rank == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, called)


def corrupt(step: int, rank: int) -> None:
    """Flip one bit of a weight of one rank after a step."""
    import torch

    import trainer.loop

    original = trainer.loop.train_step

    def train_step(run, at, iterator):
        result = original(run, at, iterator)
        if rank == RANK and at == step:
            weight = run.engine.method.model.text_tower.ln_final.weight
            weight.data.view(torch.int32)[3] ^= 1
        return result

    trainer.loop.train_step = train_step


if __name__ == "__main__":
    from trainer.ranks.shutdown import end_process
    from trainer.run import main

    for name, values in json.loads(sys.argv[1]).items():
        for entry in values if isinstance(values, list) else [values]:
            globals()[name](**entry)
    end_process(main, sys.argv[2:])
