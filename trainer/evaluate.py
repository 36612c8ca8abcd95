"""Evaluate a trained model: `python -m trainer.evaluate runs/declip`.

Without --set it takes the sets of the run's recipe. Several ranks share the work and find the same figures:
`torchrun --nproc_per_node 8 -m trainer.evaluate runs/declip`.
"""

import argparse
import re
import sys
from typing import Any

from data.paths import path_argument
from data.writing import try_folder, writing_to
from trainer.config.start import saved_config
from trainer.errors import ConfigError
from trainer.ranks.launch import Place, find_place
from trainer.ranks.shutdown import end_process, reported_errors

_ADVICE = "choose another folder with --out"
_EPILOG = """examples:
  python -m trainer.evaluate runs/declip
  python -m trainer.evaluate runs/declip --step 2000 --set symbols=unicode-symbols/typeface
  python -m trainer.evaluate runs/declip --set imagenet=/data/imagenet --class_names imagenet \\
      --templates openai_imagenet --tasks zero_shot linear_probe few_shot
  python -m trainer.evaluate runs/declip --set imagenet=/data/in --set v2=/data/in_v2 --reference imagenet \\
      --baselines published.csv

a set is a folder in CLIP_benchmark's WebDataset layout (test/*.tar, classnames.txt), an image folder (one folder per
class, under test/ and train/ where probes need both), shards for retrieval, or a built-in set
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN", help="folder of a training run")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest complete one)")
    parser.add_argument(
        "--weights", choices=("auto", "trained", "ema"), default="auto", help="auto: the average if kept"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=DATA", help="evaluation set, repeatable")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="of the sets given: zero_shot retrieval linear_probe few_shot bias"
    )
    parser.add_argument("--class_names", metavar="FILE|imagenet", help="class names of the sets given")
    parser.add_argument("--templates", metavar="FILE|NAME", help="prompts: a file, openai_imagenet, simple_imagenet")
    parser.add_argument("--max_samples", type=int, help="only the first so many samples of the sets given")
    parser.add_argument("--reference", metavar="NAME", help="effective robustness: the set all others are shifts of")
    parser.add_argument(
        "--baselines", type=path_argument, metavar="CSV", help="accuracies of other models for the robustness line"
    )
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--workers", type=int, help="loader processes per rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="for the JSON files (default: RUN/evaluation/step_N)"
    )
    return parser.parse_args(argv)


def configure(arguments: argparse.Namespace) -> Any:
    """The run's configuration with the sets to evaluate.

    Raises:
        ConfigError: No run, a malformed set, a value out of range, or nothing to evaluate.
    """
    from trainer.loading import parse_config
    from trainer.trained import run_config

    tree = run_config(arguments.run_dir).model_dump(mode="json")
    given = {
        key: getattr(arguments, key)
        for key in ("tasks", "class_names", "templates", "max_samples")
        if getattr(arguments, key) is not None
    }
    if given and not arguments.set:
        raise ConfigError(f"--{next(iter(given))} is of the sets given by --set NAME=DATA, and there is none")
    if arguments.set:
        tree["eval"]["sets"] = {}
    for entry in arguments.set:
        name, equals, data = entry.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"--set {entry!r}: expected NAME=DATA, e.g. imagenet=/data/imagenet")
        tree["eval"]["sets"][name] = {"data": data, **given}
    if not tree["eval"]["sets"]:
        raise ConfigError(f"the recipe of {arguments.run_dir} has no evaluation sets; give some by --set NAME=DATA")
    for section, key, value in (
        ("eval", "batch_size", arguments.batch_size),
        ("data", "workers", arguments.workers),
        ("train", "device", arguments.device),
    ):
        if value is not None:
            tree[section][key] = value
    return parse_config(tree)


def evaluate(arguments: argparse.Namespace, place: Place) -> None:
    """Load, evaluate, report. Collective."""
    from trainer.engine.device import select_device
    from trainer.engine.engine import init_distributed
    from trainer.evaluation import Evaluation
    from trainer.evaluation.results import benchmark_records, results_table, write_json
    from trainer.evaluation.robustness import read_baselines
    from trainer.metrics import Console
    from trainer.pipeline import resolve_workers
    from trainer.ranks.agreement import on_main, together
    from trainer.trained import TrainedModel, load_trained

    config = configure(arguments)
    device = select_device(config.train.device, place)
    init_distributed(device, place, resolve_workers(config, place))
    console = Console(place.is_main)
    out = arguments.out or arguments.run_dir / "evaluation"
    on_main(lambda: try_folder(out, _ADVICE))
    baselines = on_main(lambda: read_baselines(arguments.baselines) if arguments.baselines else None)
    trained = together(lambda: load_trained(arguments.run_dir, arguments.step, arguments.weights))
    evaluation = together(lambda: Evaluation(config, trained.tokenizer, place))
    shifted = together(lambda: _shifted(evaluation, arguments.reference))
    model, folder = TrainedModel(trained.method, device, arguments.precision), trained.checkpoint
    where = f"{place.world_size} rank(s), {device.type}"
    console.line(f"{folder}, {trained.weights} weights: {len(evaluation.sets)} evaluation set(s) on {where}")
    results = []
    for result in evaluation.run(model):
        console.line(f"eval {result.name}: {result.summary()}")
        results.append(result)
    if not place.is_main:
        return
    records = benchmark_records(results, config.model.name, str(folder))
    if shifted:
        records.append(_robustness(results, arguments.reference, shifted, baselines, records[0]))
    out = arguments.out or out / folder.name
    # A file for each, as CLIP_benchmark writes them: its `build` makes a table of a folder.
    with writing_to(out, _ADVICE):
        for record in records:
            # The name of a set may hold anything, and must not lead elsewhere.
            write_json(out / f"{record['dataset'].replace('/', '_')}_{record['task']}.json", record)
    console.table(results_table(results))
    if shifted:
        console.line("  ".join(f"{name} {value:.2%}" for name, value in records[-1]["metrics"].items()))
    console.line(f"figures in {out}")


def _shifted(evaluation: Any, reference: str | None) -> list[str]:
    if reference is None:
        return []
    classified = [data.name for data in evaluation.sets if "zero_shot" in data.tasks]
    if reference not in classified or len(classified) < 2:
        raise ConfigError(
            f"--reference {reference}: robustness needs that set and a shifted one, both with zero_shot; "
            f"there is {', '.join(classified) or 'none'}"
        )
    return [name for name in classified if name != reference]


def _robustness(
    results: list, reference: str, shifted: list[str], baselines: list[dict[str, float]] | None, like: dict[str, Any]
) -> dict[str, Any]:
    from trainer.evaluation.robustness import robustness_figures

    accuracies = {result.name: result.figures["acc1"] for result in results if "zero_shot" in result.tasks}
    figures = robustness_figures(accuracies, reference, shifted, baselines)
    identity = {key: like[key] for key in ("model", "pretrained", "language")}
    return {"dataset": reference, **identity, "task": "effective_robustness", "metrics": figures}


def main(argv: list[str]) -> None:
    """Parse and evaluate."""
    arguments = parse_arguments(argv)
    place = find_place()
    with reported_errors(place):
        # What is no run is said before the seconds that torch takes to import.
        saved_config(arguments.run_dir)
        evaluate(arguments, place)


if __name__ == "__main__":
    end_process(main, sys.argv[1:])
