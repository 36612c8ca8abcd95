"""`python -m benchmarks`: every measurement, a table, a JSON file."""

import argparse
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

from benchmarks import accumulation, collectives, filip, loader, loss, train_step, views
from benchmarks.processes import Peer, run_in_fresh_process
from benchmarks.report import Row, console_table, write_results
from data.paths import path_argument
from data.writing import try_folder
from trainer.tables import print_table

_BENCHMARKS = {module.NAME: module for module in (loss, collectives, filip, train_step, loader, views, accumulation)}
_DEFAULT_FOLDER = Path(__file__).parent / "out"


def find_peers(checkout: Path | None) -> list[Peer]:
    """The installed open_clip and, if given, a checkout.

    Raises:
        ValueError: The folder holds no open_clip.
    """
    peers = [Peer(f"open_clip {importlib.metadata.version('open_clip_torch')}")]
    if checkout is None:
        return peers
    for root in (checkout / "src", checkout):
        version_file = root / "open_clip" / "version.py"
        if version_file.is_file():
            version = re.search(r"__version__ = ['\"](.+)['\"]", version_file.read_text(encoding="utf-8"))
            return [*peers, Peer(f"open_clip {version[1] if version else 'checkout'}", str(root.resolve()))]
    raise ValueError(f"--peer-path {checkout} has neither src/open_clip nor open_clip; give the root of a checkout")


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", metavar="NAME", choices=_BENCHMARKS, action="append", help=f"{', '.join(_BENCHMARKS)}"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one round: minutes become seconds")
    parser.add_argument(
        "--peer-path", metavar="DIR", type=path_argument, help="open_clip checkout to compare with as well"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=path_argument, default=_DEFAULT_FOLDER, help="folder for the results"
    )
    arguments = parser.parse_args(argv)
    try:
        try_folder(arguments.out, "choose another --out")
        peers = find_peers(arguments.peer_path)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)])
    rows: list[Row] = []
    for name in arguments.only or _BENCHMARKS:
        module = _BENCHMARKS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = module.run(run_in_fresh_process, peers, module.QUICK if arguments.quick else module.FULL)
        print_table(console_table(found))
        rows += found
        # After each benchmark: what has been measured survives an interruption.
        write_results(arguments.out, command, rows)
        if module is views:
            (arguments.out / "views.md").write_text(views.summary(found), encoding="utf-8")
    print(f"results in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
