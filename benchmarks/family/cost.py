"""What a step of each method costs: processor time, FLOPs and memory, through the real engine on real batches."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Measurement, measure
from benchmarks.processes import Job, Runner, interleave

# Before anything is measured: AdamW's moments exist, DeCLIP's queue has neighbours to offer.
_WARM_UP = 3
_STEPS = 10


def measure_steps(recipe: str) -> Measurement:
    """Per step of a recipe: the least processor time, memory on top of weights and optimizer state, and FLOPs.

    ProtoCLIP is measured over a whole episode with prototypes, the features before it and their clustering included.
    """
    from trainer.assemble import assemble
    from trainer.loading import load_config
    from trainer.loop import train_step
    from trainer.preview import look_ahead
    from trainer.ranks.launch import find_place

    overrides = {"checkpoint.every": "0"}
    config = load_config(recipe, overrides)
    episode = config.method.get("episode_steps")
    steps = episode or _STEPS
    if episode:
        overrides |= {"method.warmup_episodes": "0", "method.lit_episodes": "0"}
    # As many as are run below, and more: begin_run refuses lengths that leave no step for prototypes.
    config = load_config(recipe, overrides | {"train.steps": str(20 * steps)})
    with TemporaryDirectory() as folder:
        arguments = argparse.Namespace(ds_config=None, resume="never", dry_run=False)
        run = assemble(config, arguments, Path(folder), find_place())
        batches = run.data.steps()

        def advance(count: int) -> None:
            for _ in range(count):
                step = run.state.step + 1
                look_ahead(run, step)
                train_step(run, step, batches)
                run.state.step = step

        run.engine.deepspeed.train()
        advance(_WARM_UP)
        found = measure({"steps": lambda: advance(steps)}, repeats=2 if episode else 3)
        run.close()
    flops = found.figures["flops"]
    if episode:
        flops += _clustering_flops(config.method, episode * config.train.global_batch_size)
    return Measurement({"step": found.seconds["total"] / steps}, dict(found.mib), {"flops": flops / steps})


def _clustering_flops(method: dict[str, Any], rows: int) -> int:
    """Of the distances that k-means computes for both modalities, which torch's counter does not see."""
    passes = method["cluster_iterations"] * method["cluster_restarts"] + 1
    return 2 * 2 * rows * method["clusters"] * method["head_dim"] * passes


def measure_costs(runner: Runner, recipes: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """`seconds`, `mib` and `flops` per step by entry, all measured in turn."""
    found = interleave(
        runner, {name: Job(measure_steps, {"recipe": str(path)}) for name, path in recipes.items()}, rounds=rounds
    )
    return {
        name: {"seconds": cost.seconds["step"], "mib": cost.mib["peak"], "flops": cost.figures["flops"]}
        for name, cost in found.items()
    }
