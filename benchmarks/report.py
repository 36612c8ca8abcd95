"""Rows of results, and the table, the JSON file and the Markdown made of them."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from trainer.tables import make_table

OURS = "ours"
_PACKAGES = ("torch", "open_clip_torch", "webdataset", "torchvision", "numpy", "pillow")
_COLUMNS = ("benchmark", "case", "quantity", "unit", "ours", "reference", "its value", "ratio", "target", "met")
_NUMBER_COLUMNS = ("ours", "its value", "ratio")


@dataclass(frozen=True)
class Target:
    """What a row should reach.

    Attributes:
        limit: The bound.
        of: Whether the bound is for the ratio to the reference or for our value itself.
        at_most: True if smaller is better.
    """

    limit: float
    of: Literal["ratio", "value"] = "ratio"
    at_most: bool = True

    def met(self, value: float, ratio: float | None) -> bool:
        """Whether a row with these numbers reaches the target."""
        number = value if self.of == "value" else ratio
        return number <= self.limit if self.at_most else number >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}{'x' if self.of == 'ratio' else ''}"


@dataclass(frozen=True)
class Row:
    """One number of ours beside one of a reference.

    Attributes:
        benchmark: Name of the benchmark.
        case: Sizes it ran at.
        quantity: What was measured or counted.
        unit: Of both numbers.
        ours: Our number.
        reference: What it is compared with; empty where there is nothing.
        reference_value: Its number.
        target: For the ratio or for our number.
    """

    benchmark: str
    case: str
    quantity: str
    unit: str
    ours: float
    reference: str = ""
    reference_value: float | None = None
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the reference's."""
        return self.ours / self.reference_value if self.reference_value else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.target.met(self.ours, self.ratio)

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        target = None if self.target is None else str(self.target)
        return {**asdict(self), "ratio": self.ratio, "target": target, "met": self.met}

    def cells(self) -> list[str]:
        """One text per column of the tables."""
        return [
            self.benchmark,
            self.case,
            self.quantity,
            self.unit,
            number_text(self.ours),
            self.reference,
            "" if self.reference_value is None else number_text(self.reference_value),
            "" if self.ratio is None else number_text(self.ratio),
            "" if self.target is None else str(self.target),
            {None: "", True: "yes", False: "no"}[self.met],
        ]


def compare(
    benchmark: str, case: str, quantity: str, unit: str, values: dict[str, float], target: Target | None = None
) -> list[Row]:
    """One row per reference in `values`, which holds our number under "ours"; the target is for the first of them."""
    ours = values[OURS]
    references = [name for name in values if name != OURS]
    rows = [Row(benchmark, case, quantity, unit, ours, name, values[name]) for name in references]
    rows = rows or [Row(benchmark, case, quantity, unit, ours)]
    return [dataclasses.replace(rows[0], target=target), *rows[1:]]


def number_text(value: float) -> str:
    """Three significant digits, all digits of an integer, two in scientific notation for what is tiny."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def console_table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table."""
    return make_table(_COLUMNS, [row.cells() for row in rows], _NUMBER_COLUMNS)


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    rules = ["---:" if name in _NUMBER_COLUMNS else "---" for name in _COLUMNS]
    lines = [_COLUMNS, rules, *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine_description() -> dict[str, Any]:
    """Cores, memory and versions: all that the numbers depend on besides the code."""
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def write_results(folder: Path, command: str, rows: Sequence[Row]) -> None:
    """Writes results.json and table.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"command": command, "machine": machine_description(), "rows": [row.as_dict() for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(rows), encoding="utf-8")
