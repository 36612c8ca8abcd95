"""Decisions all ranks take together, so that a mistake seen by one rank ends all of them with its message."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data.errors import DataError, LoaderError
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
        LoaderError: The same, where that rank's loader could not go on.
    """
    result, failure = None, None
    try:
        result = action()
    except (ConfigError, DataError, LoaderError) as error:
        failure = isinstance(error, LoaderError), str(error)
    except (OSError, RuntimeError) as error:
        said = refusal(error)
        if said is None:
            raise
        failure = False, said
    failures: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            of_loader, text = found
            raise LoaderError(text) if of_loader else ConfigError(text, max_chars=len(text))
    return result


def on_main(action: Callable[[], _T]) -> _T:
    """Run `action` on rank 0 and give its result, or its error, to every rank. Collective."""
    result = together(lambda: action() if dist.get_rank() == 0 else None)
    box: list[Any] = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]
