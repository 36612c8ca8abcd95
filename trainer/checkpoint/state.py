"""What a run needs besides the engine's tensors."""

from dataclasses import dataclass, field, fields
from typing import Any

FORMAT = 1


@dataclass
class TrainerState:
    """Everything a run needs besides the engine's tensors; the same on every rank.

    Attributes:
        samples_seen: By source, in the run's order; the names are part of every random key.
        setup: What is not in the configuration: `ranks`, `precision`, `device`, `deepspeed`.
        sources: A line on each data source, for messages.
    """

    step: int
    config: str
    tokenizer_hash: str
    data_fingerprint: str
    order_fingerprint: str
    samples_seen: dict[str, int]
    bad_samples: int = 0
    method_state: dict[str, Any] = field(default_factory=dict)
    method_digest: str = ""
    grad_scaler: dict[str, Any] | None = None
    # Step n trains on global batch n + data_offset of the order: what rollbacks have left out.
    data_offset: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def as_saved(self) -> dict[str, Any]:
        """The fields by name; tensors are the state's own, not copies."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}
