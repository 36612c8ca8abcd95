"""A run that is broken again and again, resumed each time, and compared bit by bit with an uninterrupted one.

python -m benchmarks.chaos                          50 faults drawn from seed 0, most of an hour on two CPU cores
python -m benchmarks.chaos --faults 12 --seed 3     another dozen
python -m benchmarks.chaos --only kill_in_save --faults 5

Writes chaos.json and chaos.md to --out. Linux only: processes and the full disk are those of its kernel.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from benchmarks.report import machine_description
from data.errors import DataError
from data.paths import path_argument
from data.writing import try_folder
from tests.faults.campaign import Campaign, Outcome, plan
from tests.faults.kinds import KINDS
from trainer.tables import make_table, print_table

_DEFAULT_FOLDER = Path(__file__).parent / "out"
_COLUMNS = (
    "fault",
    "struck",
    "run went on",
    "ended after (s)",
    "limit (s)",
    "steps repeated",
    "lost checkpoints",
    "divergent",
    "hangs",
    "processes left",
    "folders left",
)


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row per kind and one for all: how often, how long at most, and what went wrong."""
    names = [name for name in KINDS if any(outcome.fault == name for outcome in outcomes)]
    rows = [
        _row(KINDS[name].what, [o for o in outcomes if o.fault == name], f"{KINDS[name].limit_s:g}") for name in names
    ]
    return [*rows, _row("all", list(outcomes), "")]


def _row(title: str, outcomes: list[Outcome], limit: str) -> list[str]:
    repeated = [max(0, o.last_step - o.resumed_at) for o in outcomes if o.resumed_at is not None and o.last_step]
    counts = (
        sum(bool(outcome.lost) for outcome in outcomes),
        sum(bool(outcome.divergent) for outcome in outcomes),
        sum(outcome.hang for outcome in outcomes),
        sum(bool(outcome.left_over) for outcome in outcomes),
        sum(bool(outcome.half_written) for outcome in outcomes),
    )
    return [
        title,
        str(sum(outcome.struck for outcome in outcomes)),
        str(sum(outcome.survived for outcome in outcomes)),
        f"{max(outcome.seconds for outcome in outcomes):.0f}",
        limit,
        f"at most {max(repeated)}" if repeated else "",
        *map(str, counts),
    ]


def markdown(campaign: Campaign, command: str, *, complete: bool) -> str:
    """The table, what it needs to be read, and every problem."""
    rules = ["---", *["---:"] * (len(_COLUMNS) - 1)]
    lines = [list(_COLUMNS), rules, *summary(campaign.outcomes)]
    text = f"`{command}`, disk filled through a {campaign.disk_method}:\n\n"
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    found = problems(campaign)
    if not complete:
        found.append("the campaign has not come to its end")
    return text + "\n" + ("".join(f"- {problem}\n" for problem in found) if found else "No problems.\n")


def problems(campaign: Campaign) -> list[str]:
    """Every fault that did not strike or had a consequence, and what was wrong at the end, in words."""
    found = []
    for outcome in campaign.outcomes:
        reasons = [] if outcome.struck else ["the attempt ended before it"]
        reasons += ["the run ended, although the fault passes"] if outcome.gave_up else []
        reasons += ["did not end in time"] if outcome.hang else []
        reasons += [outcome.lost] if outcome.lost else []
        reasons += [f"differs: {text}" for text in outcome.divergent[:3]]
        reasons += [f"process left: {text}" for text in outcome.left_over]
        reasons += [f"folder left: {text}" for text in outcome.half_written]
        if reasons:
            found.append(f"fault {outcome.number}, {outcome.fault} ({outcome.launcher}): {'; '.join(reasons)}")
    return found + campaign.final_problems


def console_table(outcomes: Sequence[Outcome]) -> Table:
    """The summary as a rich table."""
    return make_table(_COLUMNS, summary(outcomes), [name for name in _COLUMNS if name != "fault"])


def write_results(folder: Path, command: str, seed: int, campaign: Campaign, *, complete: bool) -> None:
    """Write chaos.json, with every fault, and chaos.md."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "command": command,
        "machine": machine_description(),
        "seed": seed,
        "complete": complete,
        "disk_filled_through": campaign.disk_method,
        "limits_s": {name: kind.limit_s for name, kind in KINDS.items()},
        "problems": problems(campaign),
        "faults": [asdict(outcome) for outcome in campaign.outcomes],
    }
    (folder / "chaos.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "chaos.md").write_text(markdown(campaign, command, complete=complete), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; exit code 1 if anything was lost, changed or left behind."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="faults in a row (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="draws kinds, order and moments (default: 0)")
    parser.add_argument("--only", metavar="KIND", action="append", choices=KINDS, help=", ".join(KINDS))
    parser.add_argument(
        "--out", metavar="DIR", type=path_argument, default=_DEFAULT_FOLDER, help="folder for the results"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs and say where it is")
    arguments = parser.parse_args(argv)
    if arguments.faults < 1:
        parser.error(f"--faults {arguments.faults}: give at least 1")
    try:
        try_folder(arguments.out, "choose another --out")
    except DataError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "benchmarks.chaos", *(sys.argv[1:] if argv is None else argv)])
    # The disk that is mounted and the processes that run are given back however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = arguments.out, command, arguments.seed

    def report(outcome: Outcome) -> None:
        print(_line(outcome, arguments.faults), flush=True)
        write_results(*results, campaign, complete=False)

    campaign = Campaign(folder, report)
    try:
        for line in plan(arguments.seed, arguments.faults, arguments.only or list(KINDS)):
            print(
                f"{line.ranks} rank(s), {len(line.faults)} faults, {line.steps} steps: first without faults ...",
                flush=True,
            )
            campaign.run(line)
        write_results(*results, campaign, complete=True)
    finally:
        if arguments.keep:
            print(f"logs in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print_table(console_table(campaign.outcomes))
    found = problems(campaign)
    for problem in found:
        print(problem)
    print(f"results in {arguments.out}")
    return 1 if found else 0


def _line(outcome: Outcome, count: int) -> str:
    how = "struck too late" if not outcome.struck else "went on" if outcome.survived else f"exit code {outcome.code}"
    return (
        f"{outcome.number}/{count} {outcome.fault} ({outcome.launcher}, {outcome.ranks} rank(s)) after {outcome.after} "
        f"steps: {how} in {outcome.seconds:.1f} s, at step {outcome.last_step}, {outcome.published} published"
    )


if __name__ == "__main__":
    sys.exit(main())
