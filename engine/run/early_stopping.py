"""Early stopping: end a run once accuracy on the forget set is no higher than on samples that were never trained on.

o is the original, u the model, F the forget set, and H the held-out set, which neither was trained on. The last stage
is the last phases of one name; all earlier stages are then complete. After an epoch of the last stage, the run ends if

    acc_u(F) <= v               v = acc_o(H), H weighted to the classes of F; 0 in a class of which nothing is retained
    acc_u(H') >= acc_o(H')      H': the held-out samples of classes of which something is retained

The first line is LoTUS's stopping rule (Spartalis et al., CVPR 2025, arXiv 2503.18314) for any method, without a
retrained model: v stands for the retrained model's accuracy, and does not depend on u.

The second line is ours, and applies if a stage trains on retain samples alone. Such a stage repairs the damage of an
earlier one. Before it has, accuracy on the forget set is low because accuracy on all samples is. A stage that includes
forget samples can only increase the damage, so it ends by the first line.

`stop_tolerance` loosens both lines: a small held-out set determines an accuracy only to within some points.

The rest of a learning-rate schedule is lost: a one-cycle phase that ends early ends before its rate is low. Edits that
follow the last stage (SCRUB+R's rewind) still run.
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
    """The rule of `stop_when=held_out`, evaluated after each epoch of the last stage.

    Args:
        method: The method.
        phases: Phases of the run in order.

    Attributes:
        stage: Numbers of the phases of the last stage.
        tolerance: `stop_tolerance`.
        target: v.
        needed: acc_o(H'); 1 if H' is empty.
        stopped: Row of the epoch that ended the run, with the number of its phase; None until then.
    """

    def __init__(self, method: Method, phases: Sequence[Phase]) -> None:
        self.method, self.context = method, method.context
        self.stage = last_stage(phases)
        self.tolerance = self.context.run.stop_tolerance
        self.target = self.needed = float("nan")  # v and acc_o(H'); computed in `prepare`
        self.stopped: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Compute `target` and `needed` with the original on the held-out set."""
        held_out = predictions_of(self.context.original, self._held_out, self.context)
        self.target = unseen_accuracy(held_out, self.context.forget.labels, self.context.retain.labels)
        self.needed = self._kept(held_out)

    @property
    def _held_out(self) -> Any:
        return self.method.held_out("to stop when the model fits the forget samples no better")

    def _kept(self, held_out: Predictions) -> float:
        """Return the accuracy on H'; 1 if H' is empty, as there is no accuracy to preserve."""
        kept = np.flatnonzero(np.isin(held_out.labels, self.context.retain.labels))
        return held_out.take(kept).accuracy if len(kept) else 1.0

    def evaluate(self, model: nn.Module, phase: Phase, number: int, epoch: int, step: int) -> dict[str, Any]:
        """Evaluate the rule after an epoch, and set `stopped` if the run ends with it.

        Args:
            model: The model that is changed.
            phase: The phase.
            number: Position of the phase in the run.
            epoch: Epoch of the phase.
            step: Last step that was taken.

        Returns:
            Measured accuracies, as a row for the history.
        """
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
    """Return the numbers of the last phases of one name that take steps; edits between and after them do not count."""
    steps = [(number, phase.name) for number, phase in enumerate(phases) if phase.epochs > 0]
    stage: set[int] = set()
    for number, name in reversed(steps):
        if name != steps[-1][1]:
            break
        stage.add(number)
    return stage


def check_stop(method: Method, phases: Sequence[Phase]) -> None:
    """Check that early stopping by `stop_when` fits the method and the data.

    Raises:
        UserError: The method does not read forget samples or takes no steps, or there is no held-out set.
    """
    option = f"option stop_when={method.context.run.stop_when!r}"
    if method.exact or not len(method.context.forget):
        raise UserError(
            f"{option}: {method.name} does not use forget samples, so there is nothing to stop by; leave it out"
        )
    if not last_stage(phases):
        raise UserError(f"{option}: {method.name} edits weights and has no epochs after which it could stop")
    if method.context.held_out is None:
        raise UserError(
            f"{option}: needs samples that the model was not trained on; give validation=..., or a data source with a "
            "validation split"
        )
