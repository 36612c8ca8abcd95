"""Write a page about a run: `python -m trainer.report runs/declip`, or several runs overlaid."""

import argparse
import sys
from typing import Any

from data.paths import path_argument
from trainer.ranks.launch import Place, find_place
from trainer.ranks.shutdown import end_process, reported_errors


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
    examples = [] if arguments.curves_only else _examples(arguments, [history.name for history in histories], place)
    settings = [(history.name, (history.run_dir / "config.yaml").read_text(encoding="utf-8")) for history in histories]
    path = arguments.out or arguments.run_dirs[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(histories, examples, settings), encoding="utf-8")
    print(f"report in {path} ({path.stat().st_size / 2**20:.1f} MiB)")


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
