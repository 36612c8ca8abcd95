"""What an evaluation found: CLIP_benchmark's JSON records and a table for the screen."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trainer.tables import make_table

# CLIP_benchmark's names of the tasks it knows.
TASK_NAMES = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
_SHOWN = {
    "zero_shot": ("acc1", "acc5", "mean_per_class_recall"),
    "retrieval": tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
}


@dataclass(frozen=True)
class SetResult:
    """Figures of one evaluation set.

    Attributes:
        name: Its name in the recipe.
        tasks: Task to figures; those of `bias` are tables {group: {category: share}}.
        samples: Samples that were evaluated.
        unreadable: Samples that were left out because they cannot be read.
        num_classes: 0 without classification.
        seen_classes: How many of them have samples.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    samples: int
    unreadable: int
    num_classes: int = 0
    seen_classes: int = 0

    @property
    def figures(self) -> dict[str, Any]:
        """All figures in one mapping, as the run's log has them."""
        found = {name: value for figures in self.tasks.values() for name, value in figures.items()}
        return found | {"samples": self.samples, "unreadable": self.unreadable}

    def summary(self) -> str:
        """One line for the console, with chance level beside the figures."""
        figures, parts = self.figures, []
        if "acc1" in figures:
            few = 0 < self.seen_classes < self.num_classes
            # A list that is longer than the set has classes may be another set's.
            lacking = f", samples of only {self.seen_classes}" if few else ""
            parts.append(
                f"zero-shot top-1 {figures['acc1']:.1%} top-5 {figures['acc5']:.1%} "
                f"({self.num_classes} classes{lacking}, chance {1.0 / self.num_classes:.2%})"
            )
        if "image_retrieval_recall@1" in figures:
            parts.append(
                f"retrieval R@1 {figures['image_retrieval_recall@1']:.1%} (text to image) "
                f"{figures['text_retrieval_recall@1']:.1%} (image to text), "
                f"R@10 {figures['image_retrieval_recall@10']:.1%} / {figures['text_retrieval_recall@10']:.1%} "
                f"({self.samples} images, chance R@1 {1.0 / self.samples:.2%})"
            )
        if "lp_acc1" in figures:
            parts.append(f"linear probe top-1 {figures['lp_acc1']:.1%}")
        shots = [name for name in figures if name.startswith("few_shot_acc1@")]
        if shots:
            parts.append("few-shot top-1 " + " ".join(f"{name[14:]}: {figures[name]:.1%}" for name in shots))
        if self.unreadable:
            parts.append(f"{self.unreadable} of {self.samples + self.unreadable} samples unreadable")
        return "; ".join(parts)


def benchmark_records(results: list[SetResult], model: str, pretrained: str) -> list[dict[str, Any]]:
    """One record per set and task in CLIP_benchmark's schema.

    Args:
        results: What was found.
        model: Name of the architecture.
        pretrained: Where the weights come from.
    """
    return [
        {
            "dataset": result.name,
            "model": model,
            "pretrained": pretrained,
            "task": TASK_NAMES.get(task, task),
            "metrics": figures,
            "language": "en",
            "samples": result.samples,
            "unreadable": result.unreadable,
        }
        for result in results
        for task, figures in result.tasks.items()
    ]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def results_table(results: list[SetResult]) -> Table:
    """Sets by figures, in per cent."""
    rows = []
    for result in results:
        for task, figures in result.tasks.items():
            if task == "bias":
                for group, shares in figures.items():
                    for category, share in shares.items():
                        rows.append((result.name, task, f"{group}: {category}", f"{share:.2%}"[:-1], ""))
                continue
            for name in _SHOWN.get(task) or figures:
                rows.append((result.name, task, name, f"{figures[name]:.2%}"[:-1], str(result.samples)))
    return make_table(("set", "task", "figure", "%", "samples"), rows)
