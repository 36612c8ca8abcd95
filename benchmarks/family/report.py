"""The comparison as Markdown tables and pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.family.methods import CHOICES, CONTROL, ENTRIES, Data, describe, samples
from benchmarks.family.runs import Records, RunKey

_FIGURES = {
    "acc1": "zero-shot top-1",
    "acc5": "zero-shot top-5",
    "image_retrieval_recall@10": "text to image R@10",
    "text_retrieval_recall@10": "image to text R@10",
}
_DRAWN = ("acc5", "image_retrieval_recall@10")


@dataclass(frozen=True)
class Comparison:
    """What was planned and recorded.

    Attributes:
        data: What was trained on.
        steps: Of the runs with equal samples.
        seeds: In order.
        compute: FLOPs of each entry's run over those of CLIP's.
        controls: How long CLIP trains to spend them, by entry.
        records: The figures.
    """

    data: Data
    steps: int
    seeds: list[int]
    compute: dict[str, float]
    controls: dict[str, int]
    records: Records

    def values(self, name: str, steps: int, subset: str, figure: str) -> np.ndarray:
        """A figure at the end of each recorded run of an entry, in percent."""
        keys = [key for seed in self.seeds if self.records.has(key := RunKey(name, steps, seed))]
        return np.array([100 * [r for r in self.records.curve(key) if r["set"] == subset][-1][figure] for key in keys])

    def spread(self, values: np.ndarray) -> str:
        """Mean and standard deviation, and over how many seeds where some are not on record."""
        if not len(values):
            return "not run"
        if len(values) == 1:
            return f"{values[0]:.1f} (one seed)"
        missing = "" if len(values) == len(self.seeds) else f" ({len(values)} seeds)"
        return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}{missing}"


def markdown(comparison: Comparison, command: str, picture: str) -> str:
    """The page: both tables for each evaluation set, and what all runs share."""
    data, seeds = comparison.data, comparison.seeds
    lines = [
        "# Results of the family",
        "",
        f"`{command}`",
        "",
        f"Trained on {data.name} ({data.num_samples:,} pairs), {samples(comparison.steps):,} samples a run "
        f"({comparison.steps:,} steps, {samples(comparison.steps) / data.num_samples:.1f} epochs), seeds "
        f"{', '.join(map(str, seeds))}. All methods: {describe(data)}. {CHOICES}",
        "",
        "Every figure is the mean over the seeds ± their standard deviation, in percent. Compute is counted "
        "(FLOPs of matrix products, convolutions and attentions, forward and backward, of whole runs, ProtoCLIP's "
        "passes before its episodes included) relative to CLIP's run. Equal compute: CLIP alone, trained longer, with "
        "its schedule stretched, until it has spent what the method spends; methods within 10 % of each other share "
        "a run in their middle, and the column says what CLIP has spent over the method. Differences are between means "
        "± their standard error.",
        "",
        *_cost_table(comparison),
    ]
    for subset in data.sets:
        role = "settings were chosen on it" if subset == data.chosen_on else "held back: no setting was chosen on it"
        lines += ["", f"## {subset}: {role}", "", "### Equal samples", "", *_samples_table(comparison, subset)]
        lines += ["", "### Equal compute", "", *_compute_table(comparison, subset)]
    return "\n".join([*lines, "", "## Curves", "", f"![Figures over samples and over compute]({picture})", ""])


def _cost_table(comparison: Comparison) -> list[str]:
    costs = comparison.records.costs
    base = costs[CONTROL]
    lines = [
        "| method | compute of a run | FLOPs per step | samples/s | memory of a step (MiB) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, cost in costs.items():
        lines.append(
            f"| {ENTRIES[name].title} | {comparison.compute[name]:.2f} | {cost['flops'] / base['flops']:.2f} | "
            f"{base['seconds'] / cost['seconds']:.2f} | {cost['mib']:.0f} |"
        )
    return [
        "## Cost",
        "",
        *lines,
        "",
        "Compute, FLOPs and samples/s are relative to CLIP; samples/s is the inverse of a step's processor time on one "
        f"thread ({base['seconds'] * 1e3:.0f} ms for CLIP), without loading. Memory is the peak on top of weights and "
        "optimizer state.",
    ]


def _samples_table(comparison: Comparison, subset: str) -> list[str]:
    lines = ["| method | " + " | ".join(_FIGURES.values()) + " |", "|---|" + "---:|" * len(_FIGURES)]
    for name in comparison.records.costs:
        cells = [comparison.spread(comparison.values(name, comparison.steps, subset, figure)) for figure in _FIGURES]
        lines.append(f"| {ENTRIES[name].title} | " + " | ".join(cells) + " |")
    return lines


def _compute_table(comparison: Comparison, subset: str) -> list[str]:
    titles = [f"{label}: method, CLIP, difference" for label in (_FIGURES[figure] for figure in _DRAWN)]
    lines = ["| method | CLIP's steps | CLIP / method | " + " | ".join(titles) + " |"]
    lines += ["|---|---:|---:|" + "---|" * len(titles)]
    for name, steps in comparison.controls.items():
        cells = []
        for figure in _DRAWN:
            own = comparison.values(name, comparison.steps, subset, figure)
            control = comparison.values(CONTROL, steps, subset, figure)
            cells.append(f"{comparison.spread(own)}, {comparison.spread(control)}, {_difference(own, control)}")
        spent = steps / comparison.steps / comparison.compute[name]
        lines.append(f"| {ENTRIES[name].title} | {steps:,} | {spent:.2f} | " + " | ".join(cells) + " |")
    return lines


def _difference(own: np.ndarray, control: np.ndarray) -> str:
    if min(len(own), len(control)) < 2:
        return "-"
    error = np.sqrt(own.var(ddof=1) / len(own) + control.var(ddof=1) / len(control))
    return f"{own.mean() - control.mean():+.1f} ± {error:.1f}"


def draw(comparison: Comparison, path: Path) -> None:
    """Figures of the first set over samples and over compute, mean over the seeds; CLIP's longer runs by their ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    subset = next(iter(comparison.data.sets))
    figure, axes = plt.subplots(len(_DRAWN), 2, figsize=(10, 3.6 * len(_DRAWN)), sharey="row", squeeze=False)
    colours = plt.get_cmap("tab10").colors
    for row, drawn in zip(axes, _DRAWN, strict=True):
        for colour, name in zip(colours, comparison.records.costs, strict=False):
            steps, values = _curve(comparison, name, subset, drawn)
            if not len(steps):
                continue
            for axis, factor in zip(row, (1.0, comparison.compute[name]), strict=True):
                positions = samples(1) * steps * factor / 1e3
                axis.plot(
                    positions, values.mean(axis=0), marker="o", markersize=3, color=colour, label=ENTRIES[name].title
                )
                axis.fill_between(positions, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12)
        lengths = sorted({comparison.steps, *comparison.controls.values()})
        ends = {length: comparison.values(CONTROL, length, subset, drawn) for length in lengths}
        ends = {length: values.mean() for length, values in ends.items() if len(values)}
        for axis in row:
            axis.plot(
                [samples(length) / 1e3 for length in ends],
                list(ends.values()),
                "k--",
                marker="s",
                markersize=4,
                label="CLIP, longer",
            )
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{_FIGURES[drawn]}, {subset} (%)")
    axes[-1][0].set_xlabel("samples (thousands)")
    axes[-1][1].set_xlabel("compute (thousands of CLIP samples with the same FLOPs)")
    axes[0][0].legend(frameon=False, fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(comparison: Comparison, name: str, subset: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    curves = []
    for seed in comparison.seeds:
        key = RunKey(name, comparison.steps, seed)
        if comparison.records.has(key):
            curves.append({r["step"]: 100 * r[figure] for r in comparison.records.curve(key) if r["set"] == subset})
    if not curves:
        return np.array([]), np.array([])
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])
