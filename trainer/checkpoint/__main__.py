"""Look after the checkpoints of a run: list, verify, consolidate. Needs neither ranks nor a GPU."""

import argparse
import datetime
import sys
from pathlib import Path

from data.errors import escape_unencodable, printable
from data.paths import path_argument
from data.writing import try_file
from trainer.errors import ConfigError
from trainer.ranks.shutdown import plain_errors

_EPILOG = """examples:
  python -m trainer.checkpoint list runs/declip
  python -m trainer.checkpoint verify runs/declip
  python -m trainer.checkpoint verify runs/declip --step 10000
  python -m trainer.checkpoint consolidate runs/declip --out declip.safetensors
  python -m trainer.checkpoint consolidate runs/declip --step 10000 --out w.safetensors --full_state all.safetensors

exit codes: 0 all is well, 1 verify found damage, 2 bad input
"""
_DAMAGED = 1


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|consolidate")
    listing = commands.add_parser("list", help="a table of the checkpoints, newest first")
    verify = commands.add_parser("verify", help="compare every byte with the checksums taken when it was written")
    consolidate = commands.add_parser("consolidate", help="write the weights as one safetensors file")
    for command in (listing, verify, consolidate):
        command.add_argument("run", type=path_argument, metavar="RUN", help="folder of the run")
    verify.add_argument("--step", type=int, metavar="N", help="only this checkpoint (default: all)")
    consolidate.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    consolidate.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="the file to write")
    consolidate.add_argument(
        "--full_state", type=path_argument, metavar="FILE", help="also the optimizer's and the method's state"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = parse_arguments(argv)
    escape_unencodable()
    found = _checkpoints(arguments.run, getattr(arguments, "step", None))
    if arguments.command == "list":
        _list(found)
        return 0
    if arguments.command == "verify":
        return _verify(found)
    _consolidate(found[0], arguments.out, arguments.full_state)
    return 0


def _checkpoints(run: Path, step: int | None) -> list[Path]:
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the folder of a run")
    from trainer.checkpoint.folders import list_checkpoints, step_of

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise ConfigError(f"{run} has no checkpoints; give the folder of a run (what --run_dir was)")
    if step is None:
        return found
    chosen = [folder for folder in found if step_of(folder) == step]
    if not chosen:
        steps = ", ".join(str(step_of(folder)) for folder in found[:10])
        raise ConfigError(f"{run} has no checkpoint of step {step}; it has those of steps {steps}")
    return chosen


def _list(found: list[Path]) -> None:
    from trainer.checkpoint.folders import quick_problems, read_manifest, step_of
    from trainer.tables import make_table, print_table

    rows = []
    for folder in found:
        problems = quick_problems(folder)
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            rows.append((str(step_of(folder)), "", "", "", "", "", f"damaged: {error}"))
            continue
        size = sum(entry["size"] for entry in manifest["files"].values())
        saved = datetime.datetime.fromtimestamp(manifest.get("saved", 0)).strftime("%Y-%m-%d %H:%M:%S")
        cells = [manifest.get(key, "") for key in ("samples", "world_size", "stage")]
        state = f"damaged: {problems[0]}" if problems else "complete"
        rows.append((str(step_of(folder)), *map(str, cells), f"{size / 2**20:.1f} MiB", saved, state))
    print_table(make_table(("step", "samples", "world size", "ZeRO", "size", "saved", "state"), rows))


def _verify(found: list[Path]) -> int:
    from trainer.checkpoint.folders import verify_alone

    code = 0
    for folder in found:
        problems = verify_alone(folder)
        for problem in problems:
            print(printable(f"{folder}: {problem}", None))
        if problems:
            code = _DAMAGED
        else:
            print(printable(f"{folder}: every byte is as written", None))
    return code


def _consolidate(folder: Path, out: Path, full_state: Path | None) -> None:
    from trainer.checkpoint.consolidate import consolidate
    from trainer.checkpoint.folders import verify_alone

    for path in (out, full_state):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: {path.parent} is no folder; create it or choose another file")
        if path is not None:
            try_file(path, "choose another file")
    problems = verify_alone(folder)
    if problems:
        raise ConfigError(f"checkpoint {folder} is damaged: {problems[0]}; choose another with --step")
    count = consolidate(folder, out, full_state)
    print(printable(f"wrote {count} tensors of {folder} to {out} ({out.stat().st_size / 2**20:.1f} MiB)", None))
    if full_state is not None:
        print(printable(f"wrote the optimizer's and the method's state to {full_state}", None))


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main(sys.argv[1:]))
