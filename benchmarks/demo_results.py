"""The README's results: CLIP and DeCLIP on the built-in set at equal samples and at equal compute, three seeds.

python -m benchmarks.demo_results --out benchmarks/out/demo      about an hour on two CPU cores
python -m benchmarks.demo_results --out DIR --table              the table again, from runs that are there

"Equal compute" trains CLIP longer, until its counted FLOPs are those of DeCLIP. Without this control a method with two
views of everything looks better than it is.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SETS = ("held_out_typeface", "held_out_words")
FIGURES = {
    "acc1": "zero-shot top-1",
    "image_retrieval_recall@1": "text to image R@1",
    "text_retrieval_recall@1": "image to text R@1",
}


def step_flops(recipe: str) -> float:
    """FLOPs of one training step (forward and backward) of a recipe, counted on its first real batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from data.index import load_sources
    from data.sources import parse_sources
    from trainer.assemble import build_method
    from trainer.config import load_config
    from trainer.ds_config import plan_batch
    from trainer.launch import Place
    from trainer.pipeline import TrainData, build_tokenizer, index_store, project_cache

    config = load_config(recipe, {"data.workers": "0"})
    tokenizer = build_tokenizer(config)
    method = build_method(config, tokenizer)
    sources = load_sources(parse_sources(config.data.train, project_cache(config)), index_store(config))
    place, device = Place(0, 0, 1, 1, "python"), torch.device("cpu")
    data = TrainData(config, method, tokenizer, sources, plan_batch(config, 1), place, device, 0)
    batches = data.steps()
    for _ in range(2):
        # The second step: the first has no neighbours to search yet.
        counter = FlopCounterMode(display=False)
        with counter:
            method("train", {"micro_batches": [data.to_device(batch) for batch in next(batches)]})["loss"].backward()
        method.after_step()
    data.close()
    return float(counter.get_total_flops())


def train(name: str, recipe: str, steps: int, seed: int, out: Path) -> None:
    """Train one run to the end unless it is already there."""
    run_dir = out / f"{name}-seed{seed}"
    if final_figures(run_dir):
        return
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), "--recipe", recipe, "--run_dir", str(run_dir)]
    command += ["--ds_config", str(ROOT / "ds_configs" / "zero2.json"), "--resume", "auto"]
    command += ["--train.steps", str(steps), "--train.seed", str(seed), "--train.precision", "fp32"]
    command += ["--eval.every", "60", "--data.workers", "1"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    (run_dir / "done").touch()


def evaluations(run_dir: Path) -> list[dict]:
    """Evaluation records of a run."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record.get("event") == "eval"]


def final_figures(run_dir: Path) -> dict[str, dict]:
    """Last evaluation of each set, once the run has reached its last step."""
    if not (run_dir / "done").is_file():
        return {}
    return {record["set"]: record for record in evaluations(run_dir)}


def table(runs: dict[str, str], out: Path) -> str:
    """Markdown: a row per set and figure, a column per run, mean and standard deviation over seeds in percent."""
    lines = ["| evaluation set | figure | " + " | ".join(runs.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(runs))
    for name in SETS:
        for key, label in FIGURES.items():
            cells = []
            for run in runs:
                values = [100 * final_figures(out / f"{run}-seed{seed}")[name][key] for seed in SEEDS]
                cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
            lines.append(f"| {name.replace('_', ' ')} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(runs: dict[str, str], cost: dict[str, float], out: Path, path: Path) -> None:
    """Zero-shot accuracy over samples and over compute, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for run, label in runs.items():
        curves = []
        for seed in SEEDS:
            records = [r for r in evaluations(out / f"{run}-seed{seed}") if r["set"] == SETS[0]]
            curves.append({record["step"]: 100 * record["acc1"] for record in records})
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        for axis, scale in zip(axes, (256e-3, cost[run] / 1e12), strict=True):
            positions = np.array(steps) * scale
            axis.plot(positions, values.mean(axis=0), marker="o", markersize=3, label=label)
            axis.fill_between(positions, values.min(axis=0), values.max(axis=0), alpha=0.2)
    axes[0].set_xlabel("samples (thousands)")
    axes[1].set_xlabel("training compute (TFLOP, counted)")
    axes[0].set_ylabel("zero-shot top-1, unseen typeface (%)")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train what is missing, then print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=360, help="steps of the short runs")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    costs_path = arguments.out / "flops.json"
    if not costs_path.is_file():
        costs_path.write_text(json.dumps({recipe: step_flops(recipe) for recipe in ("clip_demo", "demo")}))
    costs = json.loads(costs_path.read_text())
    ratio = costs["demo"] / costs["clip_demo"]
    long = round(arguments.steps * ratio)
    plan = {
        "clip": ("clip_demo", arguments.steps),
        "declip": ("demo", arguments.steps),
        "clip_long": ("clip_demo", long),
    }
    if not arguments.table:
        jobs = [(name, recipe, steps, seed) for seed in SEEDS for name, (recipe, steps) in plan.items()]
        # One thread a run, two runs at a time.
        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(train, *job, arguments.out) for job in jobs]:
                job.result()
    runs = {
        "clip": f"CLIP, {arguments.steps} steps",
        "declip": f"DeCLIP, {arguments.steps} steps",
        "clip_long": f"CLIP, {long} steps (DeCLIP's compute)",
    }
    print(f"one DeCLIP step costs {ratio:.2f} CLIP steps ({costs['demo']:.3g} and {costs['clip_demo']:.3g} FLOP)\n")
    print(table(runs, arguments.out))
    cost = {"clip": costs["clip_demo"], "declip": costs["demo"], "clip_long": costs["clip_demo"]}
    picture(runs, cost, arguments.out, arguments.out / "curves.png")


if __name__ == "__main__":
    main()
