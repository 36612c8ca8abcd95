"""What a run is made of while it runs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from trainer.checkpoint import TrainerState
from trainer.config.ds_config import BatchPlan
from trainer.config.sections import RunConfig
from trainer.engine.engine import Engine
from trainer.evaluation import Evaluation
from trainer.guard import Guard
from trainer.metrics import Console, MetricsWriter
from trainer.pipeline import TrainData
from trainer.ranks.launch import Place
from trainer.ranks.watchdog import Watchdog


@dataclass
class Window:
    """What has gathered since the last logged step on this rank.

    Attributes:
        outcomes: (step, skipped, loss) of steps the guard has not judged yet, the latter two still on the device.
    """

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    data_seconds: float = 0.0
    bad: list[dict[str, str]] = field(default_factory=list)
    outcomes: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def restart(self) -> None:
        """Measure from here on; what is still to be reported stays."""
        self.started, self.steps, self.data_seconds = time.perf_counter(), 0, 0.0


@dataclass
class Ahead:
    """Data that is read for previews: `batches` goes on at global batch `next_batch` of the order."""

    data: TrainData
    batches: Iterator[list[dict[str, Any]]]
    next_batch: int


@dataclass
class Run:
    """Everything the loop works on, assembled by `trainer.assemble`.

    Attributes:
        open_data: (start step, data offset, whether for a preview) -> the training data from there on.
        ahead: Where previews read, once there was one.
        open_metrics: Start step -> the writer, on rank 0; None elsewhere.
    """

    config: RunConfig
    place: Place
    plan: BatchPlan
    run_dir: Path
    engine: Engine
    open_data: Callable[..., TrainData]
    data: TrainData
    evaluation: Evaluation
    console: Console
    open_metrics: Callable[[int], MetricsWriter | None]
    metrics: MetricsWriter | None
    state: TrainerState
    guard: Guard
    watchdog: Watchdog
    lock: FileLock | None
    last_saved: int
    window: Window = field(default_factory=Window)
    ahead: Ahead | None = None

    def close(self) -> None:
        """Stop the loader's workers and close the files. The last line says where everything is."""
        self.data.close()
        if self.ahead is not None:
            self.ahead.data.close()
        if self.metrics:
            self.metrics.close()
        if self.lock is not None:
            self.lock.release()
        self.console.line(f"done: step {self.state.step} of {self.config.train.steps}, everything is in {self.run_dir}")
