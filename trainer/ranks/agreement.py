"""Decisions all ranks take together, so that a mistake seen by one rank ends all of them with its message."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data.errors import DataError
from data.writing import refusal
from trainer.errors import ConfigError

_T = TypeVar("_T")


def together(action: Callable[[], _T]) -> _T:
    """Run `action` on every rank; if it fails for any, every rank raises that message. Collective.

    Args:
        action: Must not contain a collective of its own: a rank that fails would leave the others in it.

    Returns:
        What it returned on this rank.

    Raises:
        ConfigError: The message of the lowest rank that failed.
    """
    result, message = None, None
    try:
        result = action()
    except (ConfigError, DataError) as error:
        message = str(error)
    except (OSError, RuntimeError) as error:
        message = refusal(error)
        if message is None:
            raise
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for text in messages:
        if text is not None:
            raise ConfigError(text)
    return result


def on_main(action: Callable[[], _T]) -> _T:
    """Run `action` on rank 0 and give its result, or its error, to every rank. Collective."""
    result = together(lambda: action() if dist.get_rank() == 0 else None)
    box: list[Any] = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]
