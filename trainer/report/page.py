"""The page itself: one HTML file with everything inside, no scripts, no requests."""

import re
import statistics
from typing import Any

from trainer.report.curves import all_curves, evaluation_curves
from trainer.report.history import History

_NOT_FIGURES = {"event", "step", "set", "samples", "unreadable"}
# Line ends and tabs are the only ones that a page has a use for; the last ones turn the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def render_page(histories: list[History], examples: list[tuple[str, Any]], settings: list[tuple[str, str]]) -> str:
    """HTML of the page.

    Args:
        histories: The runs; their records are embedded as JSON under the id `records`.
        examples: (run name, `Examples`) for each evaluation set of each model shown.
        settings: (run name, config.yaml) of each run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Captions and class names come from the data: everything is escaped unless it is a picture made here.
    environment = Environment(
        loader=PackageLoader("trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_without_controls,
    )
    return environment.get_template("page.html.j2").render(
        title=" / ".join(history.name for history in histories),
        histories=histories,
        overview=[_overview(history) for history in histories],
        evaluations=_evaluations(histories),
        evaluation_pictures=evaluation_curves(histories),
        pictures=all_curves(histories),
        models=examples,
        settings=settings,
        records=[{"name": history.name, "steps": history.steps, "events": history.events} for history in histories],
    )


def _without_controls(value: Any) -> Any:
    # Pictures made here are no longer plain strings.
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], value) if type(value) is str else value


def _overview(history: History) -> dict[str, Any]:
    last = history.steps[-1]
    rates = [record["samples_per_second"] for record in history.steps if record.get("samples_per_second")]
    kinds = [event["event"] for event in history.events]
    return {
        "name": history.name,
        "step": last["step"],
        "samples": last["samples"],
        "loss": "not finite" if last["loss"] is None else f"{last['loss']:.4f}",
        "rate": f"{statistics.median(rates):.0f}" if rates else "",
        "skipped": kinds.count("skipped_step"),
        "bad": sum(event["count"] for event in history.events if event["event"] == "bad_sample"),
        "resumed": kinds.count("resumed"),
    }


def _evaluations(histories: list[History]) -> list[dict[str, Any]]:
    finals = [history.final_evaluations() for history in histories]
    rows: dict[tuple[str, str], None] = {}
    for final in finals:
        for name, event in final.items():
            figures = [key for key, value in event.items() if key not in _NOT_FIGURES and isinstance(value, float)]
            rows.update({(name, key): None for key in figures})
    return [
        {"set": name, "figure": key, "values_": [_shown(key, final.get(name, {}).get(key)) for final in finals]}
        for name, key in rows
    ]


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    # The one figure that is not a share.
    return f"{value:.3g}" if key == "lp_inverse_strength" else f"{value:.2%}"
