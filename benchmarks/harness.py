"""How one measurement is taken: processor time, peak memory and exact counts, inside the process that runs the code."""

import ctypes
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_PROC = Path("/proc/self")
# Asks the kernel to restart the peak of the resident set at its present value.
_RESET_PEAK = "5"
# Of glibc's malloc: from which size on a block is a mapping of its own, and how much free memory may stay at the end of
# the heap. Its own rule starts at the smallest and moves up to the largest as blocks are freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALLEST_THRESHOLD, _LARGEST_THRESHOLD = 128 << 10, 32 << 20


@dataclass
class Measurement:
    """What one process found.

    Attributes:
        seconds: Processor seconds by part, the least over repeats.
        mib: Memory in MiB.
        figures: Numbers that are the same in every run: counts of work, values that prove equal computation.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def merged(self, other: Self) -> "Measurement":
        """This measurement and its repetition in another process as one.

        Raises:
            RuntimeError: A figure differs, so the two did not do the same.
        """
        for name, value in self.figures.items():
            if other.figures[name] != value:
                raise RuntimeError(f"'{name}' must repeat exactly but was {value} and then {other.figures[name]}")
        return Measurement(
            {name: min(value, other.seconds[name]) for name, value in self.seconds.items()},
            {name: max(value, other.mib[name]) for name, value in self.mib.items()},
            dict(self.figures),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON; `Measurement(**...)` reads it back."""
        return asdict(self)


def measure(parts: dict[str, Callable[[], Any]], *, repeats: int) -> Measurement:
    """Runs all parts in order and keeps the least processor time of each and of their sum, over `repeats` runs.

    The first run is watched for memory and timed only if it is the only one; one run more counts the work, which holds
    tensors and takes time of its own. The caller warms up before: on a small input, so that neither one-time
    allocations of libraries count nor freed memory of a large run is used again unseen, or by a whole step where that
    is what leaves the state of a running program.

    Args:
        parts: Name to code.
        repeats: At least 1.

    Returns:
        `seconds` has every part and "total"; `mib` has "peak", what came on top of the memory in use before;
        `figures` has "flops", see `count_flops`.
    """
    times: list[list[float]] = []

    def run_once() -> None:
        marks = [time.process_time()]
        for part in parts.values():
            part()
            marks.append(time.process_time())
        times.append([end - start for start, end in itertools.pairwise(marks)])

    before = _start_watching_memory()
    run_once()
    peak = _status_mib("VmHWM") - before
    _set_malloc_thresholds(_LARGEST_THRESHOLD)
    for _ in range(repeats - 1):
        run_once()
    counted = times[1:] or times[:1]
    seconds = {name: min(column) for name, column in zip(parts, zip(*counted, strict=True), strict=True)}
    seconds["total"] = min(map(sum, counted))
    return Measurement(seconds, {"peak": peak}, {"flops": count_flops(run_once)})


def count_flops(code: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products and attentions in `code`, two per multiply-add.

    Causal attention is counted as if all pairs of positions were computed.
    """
    with FlopCounterMode(display=False, custom_mapping=_NOT_IN_TORCH) as counter:
        code()
    return counter.get_total_flops()


def _addmm_flops(_input: torch.Size, left: torch.Size, right: torch.Size, **_options: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_rest: Any, **_options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_rest: Any, **_options: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# What the table of some release of torch lacks: an in-place form, and attention on a CPU.
_NOT_IN_TORCH = {
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def return_freed_memory() -> None:
    """From now on freed tensors go back to the system at once, until `measure` has watched the memory.

    To be called before the first large allocation: what malloc holds already it hands out again and keeps. Without this
    the holes between living tensors count as used, up to as much again as the tensors.
    """
    _set_malloc_thresholds(_SMALLEST_THRESHOLD)


def _set_malloc_thresholds(num_bytes: int) -> None:
    c_library = ctypes.CDLL(None)
    c_library.mallopt(_M_MMAP_THRESHOLD, num_bytes)
    c_library.mallopt(_M_TRIM_THRESHOLD, 2 * num_bytes)


def _start_watching_memory() -> float:
    gc.collect()
    # Memory that the allocator keeps after a free would be handed out again without a rise of the resident set.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
    except OSError as error:
        raise RuntimeError(f"peak memory needs Linux with a writable /proc/self/clear_refs: {error}") from None
    return _status_mib("VmRSS")


def _status_mib(key: str) -> float:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
