"""From a checkpoint to a folder that other libraries read."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.writing import os_reason, try_folder, writing_to
from trainer.config.recipe import dump_config
from trainer.errors import ConfigError
from trainer.export.card import write_card
from trainer.export.exported import Exported
from trainer.trained import load_trained

_ADVICE = "choose another --out"


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


def check_out(out: Path) -> None:
    """Find out early whether a folder can be made there.

    Raises:
        ConfigError, DataError: There is something already, or the folder above cannot be written.
    """
    with writing_to(out, _ADVICE):
        if out.exists():
            raise ConfigError(f"{out} exists already; remove it or choose another --out")
    try_folder(out.parent, _ADVICE)


@torch.no_grad()
def export(exported: Exported, layout: str, out: Path) -> None:
    """Write a model to a folder, which appears complete or not at all.

    Args:
        exported: From `load_run`.
        layout: One of `trainer.export.FORMATS`.
        out: A folder that does not exist yet.

    Raises:
        ConfigError: The format cannot hold this model, or the folder cannot be written.
    """
    if not exported.has_embeddings and layout != "safetensors":
        raise ConfigError(
            f"{exported.run} compares images and captions token by token, which {layout} cannot hold; export "
            "--to safetensors, or train with method.w_clip above 0"
        )
    check_out(out)
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
    except (OSError, SafetensorError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise ConfigError(f"{out} cannot be written ({reason}); {_ADVICE}") from None
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
