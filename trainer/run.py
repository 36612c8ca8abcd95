"""Train a model: `deepspeed trainer/run.py --ds_config ds_configs/zero2.json`.

Also starts under torchrun, srun, mpirun and plain python. With nothing else it trains the `demo` recipe, DeCLIP on the
built-in set, on the GPUs or the CPU it finds.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script, Python puts trainer/ first on the path, where its files would shadow other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.errors import DataError
from data.paths import given_path
from trainer.config.ds_config import plan_batch, read_ds_config
from trainer.config.start import read_run_config, run_ds_config
from trainer.errors import ConfigError
from trainer.ranks.launch import find_place
from trainer.ranks.shutdown import end_process, reported_errors
from trainer.ranks.signals import follow_launcher, listen

_EPILOG = """examples:
  deepspeed trainer/run.py --ds_config ds_configs/zero2.json
  deepspeed trainer/run.py --ds_config ds_configs/zero1.json --recipe declip_yfcc15m_vitb32 \\
      --data.train '/data/yfcc15m/{00000..01538}.tar' --run_dir runs/declip
  deepspeed trainer/run.py --recipe clip_demo --train.steps 200 --optimizer.lr 5e-4
  deepspeed trainer/run.py --run_dir runs/declip --resume auto

any value of the recipe can be set with --section.key VALUE; --dry_run prints them all
"""


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command line: the fixed flags, and the recipe overrides as dotted key to text."""
    parser = argparse.ArgumentParser(
        prog="trainer/run.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Launchers pass flags of their own; an abbreviation must never swallow one.
        allow_abbrev=False,
    )
    parser.add_argument("--ds_config", "--deepspeed_config", metavar="PATH", help="DeepSpeed JSON (default: ZeRO 0)")
    parser.add_argument("--recipe", default=None, metavar="NAME|PATH", help="recipe (default: demo)")
    parser.add_argument("--run_dir", metavar="DIR", help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--resume", default="never", metavar="auto|never|PATH", help="auto: go on in --run_dir")
    parser.add_argument("--dry_run", action="store_true", help="resolve everything, print the plan and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args(argv)
    for name in ("ds_config", "run_dir", "resume"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, _path(name, getattr(arguments, name)))
    return arguments, _overrides(rest)


def _path(name: str, text: str) -> str:
    try:
        return given_path(text)
    except DataError as error:
        raise ConfigError(f"--{name}: {error}") from None


def _overrides(rest: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise ConfigError(f"unknown argument '{word}': flags are listed by --help, recipe values are --section.key")
        if not equals:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"--{key} needs a value")
        found[key] = value
    return found


def choose_run_dir(given: str | None, resume: str) -> Path | None:
    """The run's folder as far as the command line says it; None: a new one under `runs`.

    A run that is continued by the path of its folder, or of a checkpoint in it, stays there.

    Raises:
        ConfigError: `--resume auto` without a folder to look in, or a path that is neither.
    """
    if given:
        return Path(given)
    if resume == "never":
        return None
    if resume == "auto":
        raise ConfigError("--resume auto continues the run in --run_dir, which is missing; add --run_dir DIR")
    path = Path(resume)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if not (path / "checkpoints").is_dir():
        raise ConfigError(
            f"--resume {resume}: neither the folder of a run nor a checkpoint (step_<N>) in one; add --run_dir DIR to "
            "continue a checkpoint that lies elsewhere"
        )
    return path


def _folder_name(recipe: str) -> str:
    """The recipe's name as the name of a folder: it may come from anywhere, and must not lead elsewhere."""
    return "".join(character if character.isprintable() and character != "/" else "_" for character in recipe)


def main(argv: list[str]) -> None:
    """Parse, assemble, train."""
    listen()
    arguments, overrides = parse_arguments(argv)
    follow_launcher()
    place = find_place()
    with reported_errors(place):
        run_dir = choose_run_dir(arguments.run_dir, arguments.resume)
        config = read_run_config(arguments.recipe, run_dir, arguments.resume, overrides)
        ds_config = run_ds_config(arguments.ds_config, run_dir, arguments.resume)
        if ds_config is not None:
            read_ds_config(ds_config)
        plan_batch(config, place.world_size)
        run_dir = run_dir or Path("runs") / f"{_folder_name(config.recipe)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        if config.train.cpu_threads == "all":
            # OpenMP reads it when torch is loaded: threads that wait for each other soon leave the core to a worker.
            os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        # After the mistakes that can be told without the seconds which torch takes to import.
        from trainer.assemble import assemble
        from trainer.loading import check_method
        from trainer.loop import train
        from trainer.ranks.preemption import ToldToStop

        config = check_method(config)
        try:
            run = assemble(config, arguments, run_dir, place)
        except ToldToStop:
            return
        if run is not None:
            train(run)
            run.close()


if __name__ == "__main__":
    end_process(main, sys.argv[1:])
