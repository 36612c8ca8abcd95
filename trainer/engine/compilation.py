"""`train.compile`: the towers through torch.compile."""

import getpass
import os
import shutil
import tempfile

import torch

from trainer.errors import ConfigError
from trainer.methods import Method


def compile_towers(method: Method, device: torch.device) -> None:
    """Compile both towers in place, so that parameters and checkpoints keep their names.

    Captions differ in length from batch to batch, so the text tower is compiled for any length.

    Raises:
        ConfigError: torch.compile has no compiler here.
    """
    _check_compiler(device)
    _name_cache()
    method.model.image_tower.compile()
    method.model.text_tower.compile(dynamic=True)


def _name_cache() -> None:
    """torch calls its cache by the user's name, which nobody may know in a container."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")


def _check_compiler(device: torch.device) -> None:
    # Asked now, as otherwise the first step fails in the middle of a traceback through the compiler's own code.
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                "train.compile needs Triton on a GPU (pip install triton, compute capability 7.0 or later); "
                "or set train.compile false"
            )
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            raise ConfigError("train.compile needs a C compiler (gcc or clang) for Triton; or set train.compile false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "train.compile needs a C++ compiler on a CPU: install g++ or name one in the environment variable CXX; "
            "or set train.compile false"
        ) from None
