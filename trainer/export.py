"""Export the model of a run for other libraries."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import DataError
from data.tokenizer import CaptionTokenizer
from models.clip import ClipModel
from models.registry import build_model
from trainer.checkpoint.folders import list_checkpoints, step_of, verify_alone
from trainer.checkpoint.shards import read_optimizer_state, read_weights
from trainer.config import RunConfig, dump_config, load_config
from trainer.ema import AVERAGE
from trainer.errors import ConfigError
from trainer.export_card import write_card
from trainer.pipeline import build_tokenizer
from trainer.pretrained import WEIGHT_SETTINGS

FORMATS = ("openclip", "huggingface", "safetensors", "onnx")
# The model inside the method, whose heads stay behind.
_PREFIX = "model."
_EPILOG = """examples:
  python -m trainer.export runs/declip --to openclip
  python -m trainer.export runs/declip --to huggingface --step 10000 --out exports/declip
  python -m trainer.export runs/declip --to safetensors --weights trained

openclip     open_clip.create_model_and_transforms('local-dir:DIR'), open_clip.get_tokenizer('local-dir:DIR')
huggingface  transformers.CLIPModel.from_pretrained('DIR'), transformers.CLIPProcessor.from_pretrained('DIR')
safetensors  this project's names; start another run from it with --model.pretrained DIR
onnx         image_encoder.onnx and text_encoder.onnx; needs pip install 'declip-trainer[export]'
"""


@dataclass(frozen=True)
class Exported:
    """What is written: a model in evaluation mode, and where it comes from."""

    model: ClipModel
    tokenizer: CaptionTokenizer
    config: RunConfig
    run: Path
    step: int
    weights: str


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: RUN/export/<format>-step_<N>)")
    parser.add_argument(
        "--weights",
        choices=("auto", "trained", "ema"),
        default="auto",
        help="the trained weights or their moving average (default: the average where the run kept one)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Export one checkpoint; returns the exit code."""
    arguments = parse_arguments(argv)
    exported = load_run(Path(arguments.run), arguments.step, arguments.weights)
    out = Path(arguments.out or exported.run / "export" / f"{arguments.to}-step_{exported.step}")
    export(exported, arguments.to, out)
    print(f"wrote {arguments.to} of {exported.run} step {exported.step} ({exported.weights} weights) to {out}")
    return 0


def load_run(run: Path, step: int | None = None, weights: str = "auto") -> Exported:
    """Build the model of a checkpoint on the CPU, from any ZeRO stage and world size.

    Args:
        run: Folder of the run.
        step: Which checkpoint; None means the newest.
        weights: `trained`, `ema`, or `auto`: the average where the run kept one.

    Raises:
        ConfigError: There is no such run, checkpoint or average, or the checkpoint is damaged.
    """
    folder = _find_checkpoint(run, step)
    config = load_config(str(run / "config.yaml"))
    tokenizer = build_tokenizer(config)
    try:
        model = build_model(vocab_size=tokenizer.vocab_size, **config.model.model_dump(exclude=WEIGHT_SETTINGS))
    except ValueError as error:
        raise ConfigError(f"model of {run}: {error}") from None
    state = dict(read_weights(folder))
    averaged = read_optimizer_state(folder)[0].get(AVERAGE) if weights != "trained" and config.train.ema_decay else None
    if averaged is None and weights == "ema":
        raise ConfigError(f"{folder} holds no moving average; train with --train.ema_decay, or use --weights trained")
    state |= averaged or {}
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    model.load_state_dict(own)
    return Exported(model.eval(), tokenizer, config, run, step_of(folder), "trained" if averaged is None else "ema")


@torch.no_grad()
def export(exported: Exported, layout: str, out: Path) -> None:
    """Write a model to a folder, which appears complete or not at all.

    Args:
        exported: From `load_run`.
        layout: One of `FORMATS`.
        out: A folder that does not exist yet.

    Raises:
        ConfigError: The format cannot hold this model, or the folder cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _WRITERS[layout](exported, partial)
        card = partial / "README.md"
        write_card(exported, layout, card)
        for path in partial.iterdir():
            # The safetensors library makes files that only their owner can read.
            path.chmod(card.stat().st_mode)
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_checkpoint(run: Path, step: int | None) -> Path:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml; give the folder of a run (what --run_dir was)")
    found = [folder for folder in list_checkpoints(run / "checkpoints") if step in (None, step_of(folder))]
    if not found:
        steps = ", ".join(str(step_of(folder)) for folder in list_checkpoints(run / "checkpoints")[:10])
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ConfigError(f"{run} has no {what}; it has those of steps {steps or 'none'}")
    problems = verify_alone(found[0])
    if problems:
        raise ConfigError(f"checkpoint {found[0]} is damaged: {problems[0]}; choose another with --step")
    return found[0]


def _write_openclip(exported: Exported, out: Path) -> None:
    from trainer.export_openclip import write_openclip

    write_openclip(exported.model, exported.tokenizer, exported.config, out)


def _write_huggingface(exported: Exported, out: Path) -> None:
    from trainer.export_huggingface import write_huggingface

    write_huggingface(exported.model, exported.tokenizer, exported.config, out)


def _write_safetensors(exported: Exported, out: Path) -> None:
    from trainer.export_openclip import save_tensors

    save_tensors(exported.model.state_dict(), out / "model.safetensors")
    (out / "config.yaml").write_text(dump_config(exported.config), encoding="utf-8")


def _write_onnx(exported: Exported, out: Path) -> None:
    from trainer.export_onnx import write_onnx

    write_onnx(exported.model, exported.config, out)


_WRITERS = {
    "openclip": _write_openclip,
    "huggingface": _write_huggingface,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
