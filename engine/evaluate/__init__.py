"""Evaluation: accuracy, membership inference and agreement with retrained models, one file a question."""

from engine.evaluate.metrics import Evaluation, Evaluator, compare

__all__ = ["Evaluation", "Evaluator", "compare"]
