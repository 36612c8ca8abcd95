"""The model card of an export: what was trained, on what, how well, and how to load it."""

import html
import re
from pathlib import Path
from typing import Any

from data.errors import printable
from trainer.export.exported import Exported
from trainer.records import read_records

# An underscore within a word means nothing.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")
_FIGURES = {
    "acc1": "zero-shot top-1",
    "acc5": "zero-shot top-5",
    "image_retrieval_recall@1": "text to image R@1",
    "image_retrieval_recall@5": "text to image R@5",
    "text_retrieval_recall@1": "image to text R@1",
    "text_retrieval_recall@5": "image to text R@5",
}
_LOADING = {
    "openclip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH")
tokenizer = open_clip.get_tokenizer("local-dir:PATH")
""",
    "huggingface": """from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("PATH")
processor = CLIPProcessor.from_pretrained("PATH")
""",
    "safetensors": """from safetensors.torch import load_file

state_dict = load_file("PATH/model.safetensors")  # of models.clip.ClipModel, built as config.yaml says
""",
    "onnx": """import onnxruntime

images = onnxruntime.InferenceSession("PATH/image_encoder.onnx")  # pixels: float32 [n, 3, S, S] in [0, 1]
texts = onnxruntime.InferenceSession("PATH/text_encoder.onnx")  # token_ids: int64 [n, T]; text_lengths: int64 [n]
""",
}


def write_card(exported: Exported, layout: str, path: Path) -> None:
    """Write a README.md in the form of a Hugging Face model card.

    Args:
        exported: The model and its run.
        layout: Format of the export.
        path: Where to write it.
    """
    config, model = exported.config, exported.model
    train, optimizer = config.train, config.optimizer
    samples = exported.step * train.global_batch_size
    data = config.data.train
    sources = list(data) if isinstance(data, list | dict) else [data]
    size = sum(parameter.numel() for parameter in model.parameters())
    name = _plain(config.model.name + (f" with {config.model.text_name}" if config.model.text_name else ""))
    rows = {
        "Recipe": _plain(config.recipe),
        "Method": config.method["name"],
        "Model": f"{name}, {size / 1e6:.1f} M parameters, embeddings of width {model.embed_dim}",
        "Images": f"{model.image_tower.image_size} px, mean {list(model.pixel_mean)}, std {list(model.pixel_std)}",
        "Captions": f"up to {config.model.context_length} tokens",
        "Data": ", ".join(_code(source) for source in sources),
        "Samples seen": f"{samples:,} in {exported.step:,} of {train.steps:,} steps of {train.global_batch_size:,}",
        "Optimizer": f"{optimizer.name}, lr {optimizer.lr}, weight decay {optimizer.weight_decay}",
        "Weights": "moving average" if exported.weights == "ema" else "as trained",
        "Logit scale": f"{float(model.logit_scale()):.3f}",
    }
    if model.logit_bias is not None:
        rows["Logit bias"] = f"{float(model.logit_bias()):.3f}"
    if config.model.pretrained:
        rows["Started from"] = _code(config.model.pretrained)
    lines = ["---", f"library_name: {_LIBRARIES.get(layout, 'declip-trainer')}"]
    lines += ["pipeline_tag: zero-shot-image-classification", "tags: [clip]", "---", ""]
    lines += [f"# {rows['Recipe']}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines += _figures(exported.run / "metrics.jsonl", exported.step)
    lines += ["## Loading", "", "```python", _LOADING[layout].rstrip(), "```", ""]
    lines += _notes(config, layout)
    path.write_text("\n".join(lines), encoding="utf-8")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table as elsewhere."""
    return _MARKDOWN.sub(r"\\\1", html.escape(printable(text, None), quote=False))


def _code(text: str) -> str:
    """Text as code in a table, whatever it holds: the fence is longer than any run of backticks in it."""
    text = printable(text, None).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}"


_LIBRARIES = {"openclip": "open_clip", "huggingface": "transformers", "onnx": "onnx"}


def _figures(metrics: Path, step: int) -> list[str]:
    """The evaluations of this step, or of the newest one before it."""
    records = read_records(metrics).whole if metrics.is_file() else []
    evaluations = [
        record for record in records if record.get("event") == "eval" and record["step"] <= step and "set" in record
    ]
    if not evaluations:
        return ["## Figures", "", "The run was not evaluated.", ""]
    newest = max(record["step"] for record in evaluations)
    found = {record["set"]: record for record in evaluations if record["step"] == newest}
    names = [name for name in _FIGURES if any(name in record for record in found.values())]
    lines = ["## Figures", "", f"Measured in the run at step {newest:,}, in percent.", ""]
    lines += ["| set | " + " | ".join(_FIGURES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, record in found.items():
        cells = (f"{100 * record[key]:.2f}" if key in record else "" for key in names)
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _notes(config: Any, layout: str) -> list[str]:
    notes = []
    if config.data.mask_token and layout in ("openclip", "huggingface"):
        notes.append("Token ids are stock CLIP's: the mask token of the training vocabulary was left out.")
    if config.eval.resize_size and layout == "openclip":
        notes.append(
            f"The figures were measured with the shorter side resized to {config.eval.resize_size} before the centre "
            "crop, which open_clip's configuration cannot say."
        )
    return [*notes, ""] if notes else []
