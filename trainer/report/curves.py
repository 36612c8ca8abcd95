"""Curves over samples as SVG, all runs in each picture."""

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from data.errors import printable
from trainer.report.history import History

_WIDTH, _HEIGHT = 5.4, 3.2

# (samples, values) of one run.
Series = Callable[[History], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Picture:
    """One picture of the page: a caption and inline SVG."""

    caption: str
    svg: str


def all_curves(histories: list[History]) -> list[Picture]:
    """Loss and its terms, temperature, learning rate, gradient norm, throughput, data wait, and every evaluation."""
    keys = {key for history in histories for key in history.keys}
    terms = sorted(key for key in keys if key.startswith("loss/"))
    wanted = ["loss", *terms, "logit_scale", "lr", "grad_norm", "samples_per_second", "memory_gib"]
    pictures = [_logged(histories, key) for key in wanted if key in keys]
    pictures.append(_plot("time spent waiting for data", histories, _waiting, is_share=True))
    known = {
        "loss",
        "logit_scale",
        "lr",
        "grad_norm",
        "samples_per_second",
        "memory_gib",
        "step_seconds",
        "data_seconds",
    }
    extras = sorted(key for key in keys - known if "/" in key and not key.startswith("loss/"))
    return pictures + [_logged(histories, key) for key in extras]


def evaluation_curves(histories: list[History]) -> list[Picture]:
    """Accuracy and recall over samples, the headline picture of each evaluation set."""
    names = sorted({name for history in histories for name in history.final_evaluations()})
    figures = {
        "acc1": "zero-shot top-1",
        "image_retrieval_recall@1": "text to image R@1",
        "lp_acc1": "linear probe top-1",
    }
    pictures = []
    for name in names:
        for figure, title in figures.items():
            if any(history.evaluations(name, figure)[0] for history in histories):
                series = functools.partial(History.evaluations, set_name=name, figure=figure)
                pictures.append(_plot(f"{name}: {title}", histories, series, marker="o", is_share=True))
    return pictures


def _logged(histories: list[History], key: str) -> Picture:
    return _plot(key, histories, lambda history: history.series(key))


def _waiting(history: History) -> tuple[list[float], list[float]]:
    points = [
        (record["samples"], record["data_seconds"] / record["step_seconds"])
        for record in history.steps
        if record.get("step_seconds")
    ]
    return [x for x, _ in points], [y for _, y in points]


def _plot(
    title: str,
    histories: list[History],
    series: Series,
    marker: str | None = None,
    is_share: bool = False,
) -> Picture:
    from matplotlib.ticker import PercentFormatter

    figure, axes = new_figure(_WIDTH, _HEIGHT)
    for history in histories:
        axes.plot(*series(history), marker=marker, markersize=3, linewidth=1.3, label=_plain(history.name))
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("samples")
    axes.set_title(_plain(title))
    axes.grid(alpha=0.3)
    if len(histories) > 1:
        axes.legend(fontsize="small")
    return Picture(title, to_svg(figure))


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollars, and no label that it would leave out."""
    text = printable(text, None).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def new_figure(width: float, height: float):
    """(figure, axes) outside pyplot, whose global list of figures would keep every one alive."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure) -> str:
    """Inline SVG of a figure, the same bytes for the same content."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}), warnings.catch_warnings():
        # The browser has the letters that the font measured with lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
