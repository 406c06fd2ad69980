"""Watches a phase that may destroy the model; takes it back to its last good weights and ends the phase."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from engine.methods import Phase

if TYPE_CHECKING:
    from engine.run.trainer import Trainer

logger = logging.getLogger(__name__)

# Looks at a guarded phase, spread over its steps.
CHECKS = 8


class Guard:
    """Looks at the watched accuracy `CHECKS` times in a phase, and keeps the weights of the last look that was good."""

    def __init__(self, trainer: Trainer, phase: Phase, total: int) -> None:
        self.trainer, self.phase = trainer, phase
        self.steps = {math.ceil(total * (i + 1) / CHECKS) for i in range(CHECKS)}
        self.good_step, self.good = 0, trainer.updater.weights()

    def state(self) -> dict[str, Any]:
        return {"step": self.good_step, "weights": self.good}

    def load_state(self, state: dict[str, Any]) -> None:
        self.good_step, self.good = state["step"], state["weights"] if self.trainer.world.is_main else None

    def collapsed(self, step: int) -> bool:
        trainer = self.trainer
        before, now = trainer.watched["before"], trainer.watch(trainer.model)
        trainer.event({"phase": self.phase.name, "step": step - 1, "watched_accuracy": now})
        if 100 * (before - now) <= trainer.run.collapse_drop:
            self.good = None  # before the next copy is made: one is enough to hold
            self.good_step, self.good = step, trainer.updater.weights()
            return False
        trainer.updater.load_weights(self.good)
        trainer.event(
            {
                "event": "collapse",
                "phase": self.phase.name,
                "step": step - 1,
                "watched_accuracy": now,
                "back_to_step": self.good_step,
            }
        )
        logger.warning(
            "collapse in phase %s at step %d: accuracy on the watched samples %.1f%%, before the run %.1f%%; "
            "taken back to step %d and the phase ended (raise collapse_drop to go on, or lower the rate)",
            self.phase.name,
            step - 1,
            100 * now,
            100 * before,
            self.good_step,
        )
        return True
