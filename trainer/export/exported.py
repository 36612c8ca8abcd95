"""What an export is made of."""

from dataclasses import dataclass
from pathlib import Path

from data.captions.tokenizer import CaptionTokenizer
from models.clip import ClipModel
from trainer.config.sections import RunConfig


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
