"""When a run may end before its epochs do: once the forget samples are known no better than samples never seen.

o is the original, u the model, F the forget samples, H held-out ones, which neither was trained on. After an epoch of
the last stage (the last phases of one name, so that the stages before have done their part) the run ends where

    acc_u(F) <= v               v = acc_o(H), H weighted to the classes of F; 0 in a class of which nothing is retained
    acc_u(H') >= acc_o(H')      H': the held-out samples of classes of which something is retained

This is LoTUS's stopping rule (Spartalis et al., CVPR 2025, arXiv 2503.18314) for any method, without a retrained model:
v stands for the retrained model's accuracy, and does not move with u. The second line is ours, and is asked where a
stage trains on retained samples alone: such a stage repairs what another broke, and until it has, forget samples are
unknown because everything is. A stage in which forget samples take part may only make that worse, so it ends by the
first line. `stop_tolerance` loosens both lines: few held-out samples tell accuracies by points alone.

What a learning rate schedule had in store is lost: a one-cycle phase that ends early has not come down. Edits that
follow the last stage (SCRUB+R's way back) still run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from engine.core.heldout import format_accuracies, predictions_of, unseen_accuracy
from engine.errors import UserError
from engine.methods import Method, Phase
from engine.models.predict import Predictions


class HeldOutStop:
    """Looks at the model after epochs of the last stage, and remembers that the run has ended."""

    def __init__(self, method: Method, phases: Sequence[Phase]) -> None:
        self.method, self.context = method, method.context
        self.stage = last_stage(phases)
        self.tolerance = self.context.run.stop_tolerance
        self.target = self.needed = float("nan")  # v and acc_o(H'); known once prepared
        self.stopped: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Passes of the original over the held-out samples."""
        held_out = predictions_of(self.context.original, self._held_out, self.context)
        self.target = unseen_accuracy(held_out, self.context.forget.labels, self.context.retain.labels)
        self.needed = self._kept(held_out)

    @property
    def _held_out(self) -> Any:
        return self.method.held_out("to stop where the forget samples are known no better")

    def _kept(self, held_out: Predictions) -> float:
        """Accuracy on H'; 1 where there is none, as there is nothing to keep up."""
        kept = np.flatnonzero(np.isin(held_out.labels, self.context.retain.labels))
        return held_out.take(kept).accuracy if len(kept) else 1.0

    def evaluate(self, model: nn.Module, phase: Phase, number: int, epoch: int, step: int) -> dict[str, Any]:
        """A row for the history: what was measured after an epoch. `stopped` is set where the run ends with it."""
        forget = predictions_of(model, self.context.forget, self.context).accuracy
        row: dict[str, Any] = {"phase": phase.name, "epoch": epoch, "step": step, "forget_accuracy": forget}
        row["unseen_accuracy"] = self.target
        enough = forget <= self.target + self.tolerance
        if phase.samples == "retain" and phase.paired is None:
            row["held_out_accuracy"] = self._kept(predictions_of(model, self._held_out, self.context))
            row["held_out_before"] = self.needed
            enough &= row["held_out_accuracy"] >= self.needed - self.tolerance
        if enough:
            row["ended"] = format_accuracies(forget, self.target)
            self.stopped = row | {"number": number}
        return row

    def state(self) -> dict[str, Any]:
        return {"target": self.target, "needed": self.needed, "stopped": self.stopped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.target, self.needed, self.stopped = state["target"], state["needed"], state["stopped"]


def last_stage(phases: Sequence[Phase]) -> set[int]:
    """Numbers of the last phases of one name that take steps; edits between and after them do not count."""
    steps = [(number, phase.name) for number, phase in enumerate(phases) if phase.epochs > 0]
    stage: set[int] = set()
    for number, name in reversed(steps):
        if name != steps[-1][1]:
            break
        stage.add(number)
    return stage


def check_stop(method: Method, phases: Sequence[Phase]) -> None:
    """Raises UserError where a run could not stop so."""
    option = f"option stop_when={method.context.run.stop_when!r}"
    if method.exact or not len(method.context.forget):
        raise UserError(f"{option}: {method.name} never looks at forget samples, so they say nothing; leave it out")
    if not last_stage(phases):
        raise UserError(f"{option}: {method.name} edits weights and has no epochs after which it could stop")
    if method.context.held_out is None:
        raise UserError(
            f"{option}: needs samples that the model was not trained on; give validation=..., or a data source with a "
            "validation split"
        )
