"""Evaluation in the loop and by `trainer.evaluate`: every set of the recipe, on all ranks."""

from trainer.evaluation.evaluation import Evaluation

__all__ = ["Evaluation"]
