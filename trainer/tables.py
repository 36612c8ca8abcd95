"""Tables for the screen and for logs: whole words where nobody watches, and no text taken for markup."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.errors import printable

# Beyond any row: a pipe or a file has no columns.
_WIDE = 100_000


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[str] = ()) -> Table:
    """A table of plain texts.

    Args:
        columns: Headings.
        rows: A text for each column; may come from anywhere, so brackets are brackets and control characters escaped.
        numbers: Headings of the columns that are set to the right.
    """
    table = Table()
    right = set(numbers)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell, None)) for cell in row))
    return table


def print_table(table: Table) -> None:
    """Print a table: fitted to a terminal, as wide as its rows everywhere else."""
    # Not rich's own judgement, which environment variables for colours change.
    size = {} if sys.stdout.isatty() else {"width": _WIDE, "height": 100}
    Console(file=sys.stdout, highlight=False, **size).print(table)
