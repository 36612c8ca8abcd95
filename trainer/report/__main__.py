"""Write a page about a run: `python -m trainer.report runs/declip`, or several runs overlaid."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.paths import path_argument
from data.writing import os_reason, try_file, writing_to
from trainer.ranks.launch import Place, find_place
from trainer.ranks.shutdown import end_process, reported_errors

_ADVICE = "choose another file with --out"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", type=path_argument, metavar="RUN", help="folders of training runs")
    parser.add_argument("--step", type=int, help="whose checkpoint shows examples (default: the newest complete one)")
    parser.add_argument("--curves_only", action="store_true", help="leave the model and its pictures out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="default: report.html in the first run's folder"
    )
    return parser.parse_args(argv)


def write_report(arguments: argparse.Namespace, place: Place) -> None:
    """Read the runs, look at the models, write the page."""
    from trainer.errors import ConfigError
    from trainer.report.history import read_histories
    from trainer.report.page import render_page

    if place.world_size > 1:
        raise ConfigError("a report is written by one process; start it as python -m trainer.report")
    histories = read_histories(arguments.run_dirs)
    for history in histories:
        if history.torn:
            where = history.run_dir / "metrics.jsonl"
            print(f"warning: {history.torn} line(s) of {where} are torn and left out", file=sys.stderr)
    path = arguments.out or arguments.run_dirs[0] / "report.html"
    try_file(path, _ADVICE)
    settings = [(history.name, _settings(history.run_dir / "config.yaml")) for history in histories]
    examples = [] if arguments.curves_only else _examples(arguments, [history.name for history in histories], place)
    page = render_page(histories, examples, settings)
    with writing_to(path, _ADVICE):
        path.write_text(page, encoding="utf-8")
    print(f"report in {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _settings(path: Path) -> str:
    from trainer.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({os_reason(error)}); give the --run_dir of a training run") from None


def _examples(arguments: argparse.Namespace, names: list[str], place: Place) -> list[tuple[str, Any]]:
    from trainer.engine.device import select_device
    from trainer.engine.engine import init_distributed
    from trainer.report.examples import collect_examples
    from trainer.trained import TrainedModel, load_trained, run_config

    device = select_device(arguments.device, place)
    init_distributed(device, place)
    found = []
    for name, run_dir in zip(names, arguments.run_dirs, strict=True):
        config = run_config(run_dir)
        if not config.eval.sets:
            continue
        trained = load_trained(run_dir, arguments.step)
        model = TrainedModel(trained.method, device)
        found += [(name, part) for part in collect_examples(config, model, trained.tokenizer, place)]
    return found


def main(argv: list[str]) -> None:
    """Parse and write."""
    arguments = parse_arguments(argv)
    place = find_place()
    with reported_errors(place):
        write_report(arguments, place)


if __name__ == "__main__":
    end_process(main, sys.argv[1:])
