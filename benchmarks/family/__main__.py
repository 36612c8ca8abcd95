"""Every method of the family on the same data, at equal samples and at CLIP's equal compute, with several seeds.

python -m benchmarks.family                           everything: hours on two CPU cores; goes on where it was ended
python -m benchmarks.family --epochs 3 --seeds 0      a look
python -m benchmarks.family --table                   the page again, from what is on record

Trains on --data, a folder with train/ and val/ (and test/, held back), by default ../shared/data/pictograms beside the
checkout, and without that on the built-in set. Writes results.md, results.json and results_curves.png to --out.
"""

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.family.cost import measure_costs
from benchmarks.family.methods import CONTROL, ENTRIES, Data, settings_of
from benchmarks.family.report import Comparison, draw, markdown
from benchmarks.family.runs import Records, RunKey, control_steps, train, write_recipe
from benchmarks.family.sets import open_built_in, open_folder
from benchmarks.processes import Runner, run_in_fresh_process
from data.errors import DataError
from data.paths import path_argument
from data.writing import try_folder

_ROOT = Path(__file__).resolve().parents[2]
_USUAL = _ROOT.parent / "shared" / "data" / "pictograms"


def main(argv: list[str] | None = None, runner: Runner = run_in_fresh_process) -> int:
    """Trains what is not on record, then writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=path_argument, metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--built-in", action="store_true", help="the built-in set, whatever else is there")
    parser.add_argument("--out", type=path_argument, metavar="DIR", default=_ROOT / "benchmarks" / "out" / "family")
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--epochs", type=int, default=5, help="of the short runs (default: 5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 3:
        parser.error("--epochs must be at least 3: ProtoCLIP's first and last have no prototypes")
    names = [name for name in ENTRIES if name in arguments.methods or name == CONTROL]
    out = arguments.out.resolve()
    try:
        try_folder(out, "choose another --out")
        data = _open_data(arguments, out)
        steps = arguments.epochs * data.steps_per_epoch
        records = Records(out / "results.json", settings_of(data, steps))
    except (ValueError, DataError) as error:
        parser.error(str(error))
    recipes = {name: write_recipe(name, data, out / "recipes") for name in names}
    if not arguments.table and any(name not in records.costs for name in names):
        # All again: processor times are compared only where they were taken in turn.
        records.costs = measure_costs(runner, recipes, rounds=2)
        records.save()
    measured = [name for name in names if name in records.costs]
    if CONTROL not in measured:
        parser.error(f"{out / 'results.json'} has no measurements; run without --table first")
    compute = {name: _compute(name, records, arguments.epochs) for name in measured}
    controls = control_steps(measured, compute, steps)
    if not arguments.table:
        _train_all(names, controls, steps, arguments, recipes, records, out)
    comparison = Comparison(data, steps, arguments.seeds, compute, controls, records)
    draw(comparison, out / "results_curves.png")
    (out / "results.md").write_text(markdown(comparison, _command(arguments, names), "results_curves.png"))
    print(f"{out / 'results.md'}, results.json and results_curves.png are written")
    return 0


def _command(arguments: argparse.Namespace, names: list[str]) -> str:
    """What repeats the page, without the folders of this machine."""
    words = ["python -m benchmarks.family", *(["--built-in"] if arguments.built_in else [])]
    words += ["--methods", *names] if len(names) < len(ENTRIES) else []
    return " ".join([*words, f"--epochs {arguments.epochs}", "--seeds", *map(str, arguments.seeds)])


def _open_data(arguments: argparse.Namespace, out: Path) -> Data:
    folder = arguments.data or (_USUAL if _USUAL.is_dir() else None)
    return open_built_in(out) if folder is None or arguments.built_in else open_folder(folder.resolve(), out)


def _compute(name: str, records: Records, epochs: int) -> float:
    """FLOPs of a run over those of CLIP's; what was measured of ProtoCLIP are the episodes with prototypes."""
    ratio = records.costs[name]["flops"] / records.costs[CONTROL]["flops"]
    plain = 2 / epochs if name == "protoclip" else 0.0
    return plain + (1 - plain) * ratio


def _train_all(
    names: list[str],
    controls: dict[str, int],
    steps: int,
    arguments: argparse.Namespace,
    recipes: dict[str, Path],
    records: Records,
    out: Path,
) -> None:
    keys = []
    for seed in arguments.seeds:
        keys += [RunKey(name, steps, seed) for name in names]
        keys += [RunKey(CONTROL, length, seed) for length in sorted(set(controls.values()) - {steps})]
    missing = [key for key in keys if not records.has(key)]

    def run(key: RunKey) -> float:
        started = time.monotonic()
        run_dir = out / "runs" / str(key)
        records.add(key, train(key, recipes[key.name], run_dir))
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return time.monotonic() - started

    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(run, key): key for key in missing}
        try:
            for number, finished in enumerate(as_completed(running), 1):
                print(f"{number}/{len(missing)}  {running[finished]}  {finished.result():.0f} s", flush=True)
        except BaseException:
            # Runs that have not begun; those under way end by the error or the interrupt themselves.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    sys.exit(main())
