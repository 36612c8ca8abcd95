"""Export the model of a run for other libraries."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import DataError
from data.captions.tokenizer import CaptionTokenizer
from models.clip import ClipModel
from trainer.config.sections import RunConfig, dump_config
from trainer.errors import ConfigError
from trainer.export.card import write_card
from trainer.trained import load_trained

FORMATS = ("openclip", "huggingface", "safetensors", "onnx")
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
    """What is written: a model in evaluation mode, and where it comes from.

    Attributes:
        has_embeddings: Whether its features are trained to be compared; a method may compare something else.
    """

    model: ClipModel
    tokenizer: CaptionTokenizer
    config: RunConfig
    run: Path
    step: int
    weights: str
    has_embeddings: bool = True


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
    """The model of a checkpoint, without the method's heads; see `trainer.trained.load_trained`."""
    trained = load_trained(run, step, weights)
    method = trained.method
    return Exported(
        method.model,
        trained.tokenizer,
        trained.config,
        run,
        trained.step,
        trained.weights,
        method.has_global_embeddings,
    )


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
    if not exported.has_embeddings and layout != "safetensors":
        raise ConfigError(
            f"{exported.run} compares images and captions token by token, which {layout} cannot hold; export "
            "--to safetensors, or train with method.w_clip above 0"
        )
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


def _write_openclip(exported: Exported, out: Path) -> None:
    from trainer.export.openclip import write_openclip

    write_openclip(exported.model, exported.tokenizer, exported.config, out)


def _write_huggingface(exported: Exported, out: Path) -> None:
    from trainer.export.huggingface import write_huggingface

    write_huggingface(exported.model, exported.tokenizer, exported.config, out)


def _write_safetensors(exported: Exported, out: Path) -> None:
    from trainer.export.openclip import save_tensors

    save_tensors(exported.model.state_dict(), out / "model.safetensors")
    (out / "config.yaml").write_text(dump_config(exported.config), encoding="utf-8")


def _write_onnx(exported: Exported, out: Path) -> None:
    from trainer.export.onnx import write_onnx

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
