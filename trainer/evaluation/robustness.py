"""Effective robustness: what a model loses on shifted test sets, beside what other models of its accuracy lose.

Source: Taori et al., "Measuring Robustness to Natural Distribution Shifts in Image Classification", 2020; reported for
CLIP in Radford et al., 2021, section 3.3.
"""

import csv
from pathlib import Path

import numpy as np

from trainer.errors import ConfigError

_EDGE = 1e-4


def robustness_figures(
    accuracies: dict[str, float], reference: str, shifted: list[str], baselines: list[dict[str, float]] | None = None
) -> dict[str, float]:
    """How accuracy on shifted sets relates to that on the reference set.

    Args:
        accuracies: Top-1 by set, in [0, 1].
        reference: The set the shifted ones derive from.
        shifted: Names of the shifted sets.
        baselines: The same accuracies of other models; at least two that have both sets give the line.

    Returns:
        `reference`, `shifted_mean`, `drop` (reference minus shifted mean), and with baselines
        `effective_robustness/<set>`: accuracy above the line that fits logit(shifted) to logit(reference) over them.
    """
    own = accuracies[reference]
    mean = float(np.mean([accuracies[name] for name in shifted]))
    figures = {"reference": own, "shifted_mean": mean, "drop": own - mean}
    for name in shifted:
        pairs = [(row[reference], row[name]) for row in baselines or [] if reference in row and name in row]
        if len(pairs) >= 2:
            slope, offset = np.polyfit(*_logit(np.array(pairs).T), 1)
            expected = 1.0 / (1.0 + np.exp(-(slope * _logit(np.array(own)) + offset)))
            figures[f"effective_robustness/{name}"] = accuracies[name] - float(expected)
    return figures


def read_baselines(path: Path) -> list[dict[str, float]]:
    """Accuracies of other models: a CSV with the names of the sets as header, fractions below, other columns ignored.

    Raises:
        ConfigError: No such file, a name twice in its header, a row of another length, or no row with two accuracies
            in [0, 1].
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"baselines {path} cannot be read: {error}") from None
    repeated = next((name for number, name in enumerate(header) if name and name in header[:number]), None)
    if repeated is not None:
        raise ConfigError(f"baselines {path} line 1 names '{repeated}' twice; each column needs a name of its own")
    for line, row in rows:
        if len(row) != len(header):
            raise ConfigError(
                f"baselines {path} line {line} has {len(row)} cells under a header of {len(header)}; put cells with a "
                "comma in quotes"
            )
    cells = [map(_fraction, zip(header, row, strict=True)) for _, row in rows]
    found = [{name: value for name, value in row if value is not None} for row in cells]
    found = [row for row in found if len(row) >= 2]
    if not found:
        raise ConfigError(f"baselines {path} has no row with two accuracies; its header must name evaluation sets")
    return found


def _fraction(cell: tuple[str, str]) -> tuple[str, float | None]:
    name, text = cell
    try:
        value = float(text)
    except ValueError:
        return name, None
    return name, value if 0.0 <= value <= 1.0 else None


def _logit(share: np.ndarray) -> np.ndarray:
    clipped = np.clip(share, _EDGE, 1.0 - _EDGE)
    return np.log(clipped / (1.0 - clipped))
