"""The registry of training methods: one file each, one line here."""

import difflib
from typing import Any

from trainer.config.sections import Section, validate_section
from trainer.errors import ConfigError
from trainer.methods.aclip import AclipMethod
from trainer.methods.align import AlignMethod
from trainer.methods.base import Method
from trainer.methods.clip import ClipMethod
from trainer.methods.declip import DeclipMethod
from trainer.methods.defilip import DefilipMethod
from trainer.methods.filip import FilipMethod
from trainer.methods.protoclip import ProtoclipMethod
from trainer.methods.siglip import SiglipMethod
from trainer.methods.slip import SlipMethod

METHODS: dict[str, type[Method]] = {
    "aclip": AclipMethod,
    "align": AlignMethod,
    "clip": ClipMethod,
    "declip": DeclipMethod,
    "defilip": DefilipMethod,
    "filip": FilipMethod,
    "protoclip": ProtoclipMethod,
    "siglip": SiglipMethod,
    "slip": SlipMethod,
}


def parse_method(values: dict[str, Any]) -> tuple[str, Section]:
    """Split a recipe's `method` section into the method's name and its validated settings.

    Raises:
        ConfigError: Unknown method, unknown key or value out of range.
    """
    settings = dict(values)
    name = settings.pop("name")
    if not isinstance(name, str) or name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"unknown method.name '{name}': {hint}known: {', '.join(sorted(METHODS))}")
    return name, validate_section(METHODS[name].Settings, settings, "method.")


__all__ = ["METHODS", "Method", "parse_method"]
