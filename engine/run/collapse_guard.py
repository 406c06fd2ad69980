"""Collapse guard: ends a phase that destroys the model, and restores the last good weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from engine.core.phase import Phase
from engine.core.plausibility import is_far_below
from engine.errors import UserError
from engine.run.train_engine import TrainEngine

logger = logging.getLogger(__name__)

# Measurements during a guarded phase, at equal distances over its steps: one for every 8 steps, 8 at most.
_CHECKS, _STEPS_BETWEEN = 8, 8
# Samples of a measurement: one for every 4 samples that the steps take, within these. Of 200, the standard error of a
# difference is 5 points at most, where a collapse is 35.
_FEWEST_WATCHED, _MOST_WATCHED = 200, 500


def checks(total: int) -> int:
    """Return the number of measurements during a guarded phase of `total` steps."""
    return max(1, min(_CHECKS, math.ceil(total / _STEPS_BETWEEN)))


def watched_count(phases: Sequence[Phase], forget: int, retain: int) -> int:
    """Return the number of samples, at most, whose accuracy is measured in a run with these phases.

    Args:
        phases: Phases of the run.
        forget, retain: Number of samples of the forget set and of the retain set.
    """
    taken = sum(
        phase.epochs * (phase.retained(retain) + (0 if phase.samples == "retain" else forget)) for phase in phases
    )
    return int(min(_MOST_WATCHED, max(_FEWEST_WATCHED, taken / 4)))


def accuracy_before(labels: np.ndarray, original: float, model: float) -> float:
    """Return the accuracy that a run is measured from if the original is the model before earlier requests.

    Args:
        labels: Labels of the watched samples.
        original, model: Accuracy [0, 1] of that model, and of the one that is unlearned, on them.

    Raises:
        UserError: The former is far below: it is another model.
    """
    if is_far_below(np.arange(len(labels)) < round(original * len(labels)), model):
        raise UserError(
            f"original: its accuracy on {len(labels)} watched samples is {100 * original:.1f}%, that of the model "
            f"{100 * model:.1f}%; give the model that the earlier requests were forgotten from"
        )
    return max(original, model)


class CollapseGuard:
    """Measures the watched accuracy at some steps of a phase and keeps the weights of the last good measurement.

    Args:
        phase: Name of the phase.
        total: Steps of the phase.
        train_engine: The model that is changed, and its weights.
        watch: Returns the accuracy [0, 1] of a model on the watched samples.
        before: That accuracy before the run.
        limit: Points of accuracy that the phase may lose (`RunConfig.collapse_drop`).
        record: Called with a row for the history.
        is_main: Whether this rank holds the weights.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        *,
        train_engine: TrainEngine,
        watch: Callable[[nn.Module], float],
        before: float,
        limit: float,
        record: Callable[[dict[str, Any]], None],
        is_main: bool,
    ) -> None:
        self.phase, self.train_engine, self.watch, self.before = phase, train_engine, watch, before
        self.limit, self.record, self.is_main = limit, record, is_main
        number = checks(total)
        self.steps = {math.ceil(total * (i + 1) / number) for i in range(number)}
        self.good_step, self.good = 0, train_engine.weights()

    def state(self) -> dict[str, Any]:
        return {"step": self.good_step, "weights": self.good}

    def load_state(self, state: dict[str, Any]) -> None:
        self.good_step, self.good = state["step"], state["weights"] if self.is_main else None

    def collapsed(self, step: int) -> bool:
        """Measure the watched accuracy; if more than `limit` is lost, restore the last good weights.

        Args:
            step: Number of steps taken.

        Returns:
            Whether the model has collapsed, so that the phase ends.
        """
        now = self.watch(self.train_engine.model)
        self.record({"phase": self.phase, "step": step - 1, "watched_accuracy": now})
        if 100 * (self.before - now) <= self.limit:
            self.good = None  # before the next copy is made, so that only one copy is held
            self.good_step, self.good = step, self.train_engine.weights()
            return False
        self.train_engine.load_weights(self.good)
        self.record(
            {
                "event": "collapse",
                "phase": self.phase,
                "step": step - 1,
                "watched_accuracy": now,
                "back_to_step": self.good_step,
            }
        )
        logger.warning(
            "collapse in phase %s at step %d: accuracy on the watched samples %.1f%%, before the run %.1f%%; "
            "taken back to step %d and the phase ended (raise collapse_drop to continue, or lower the rate)",
            self.phase,
            step - 1,
            100 * now,
            100 * self.before,
            self.good_step,
        )
        return True
