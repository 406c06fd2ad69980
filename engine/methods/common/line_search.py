"""Line search along an editing direction.

The step should be long enough for the forget set to look like held-out data by accuracy, and short enough to keep the
accuracy on the held-out set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.config import require
from engine.core.heldout import ACCURACY_PASSES, predictions_of, unseen_accuracy
from engine.core.method import Method
from engine.core.phase import ExtraPasses
from engine.core.search_space import Range, tunable
from engine.data.samples import evenly_spaced
from engine.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of a line search.

    Attributes:
        max_drop: Percentage points of held-out accuracy that may be lost.
        search_steps: Step sizes that are evaluated.
        held_out_samples: Most samples of the held-out set, and of the forget set, that are evaluated.
    """

    max_drop: float = tunable(2.0, Range(0.5, 10, log=True))
    search_steps: int = 8
    held_out_samples: int = 1000

    def __post_init__(self) -> None:
        require(self.max_drop >= 0, "max_drop", self.max_drop, "0 or more")
        for key in ("search_steps", "held_out_samples"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")


class LineSearch:
    """Line search by accuracy on a part of the forget set and a part of the held-out set.

    A step is sufficient if the accuracy on the forget set is at most the accuracy that the original has on held-out
    samples of the same classes; a class without retain samples counts 0. A step is allowed if the accuracy on the
    held-out set has not fallen by more than `max_drop` percentage points.

    Attributes:
        watched: Held-out samples of classes that the retain set has; other classes must not limit the step.
        forget: Forget samples that are evaluated.
        sufficient: Accuracy [0, 1] on the forget set at or below which a step is sufficient.
        lowest: Accuracy [0, 1] on the held-out set from which a step is allowed.
    """

    def __init__(self, method: Method, config: SearchConfig, why: str) -> None:
        """Choose the samples that are evaluated.

        Args:
            method: The method that searches.
            config: Options of the search.
            why: What held-out samples are for, for the error message.

        Raises:
            UserError: No held-out sample has a class of the retain set.
        """
        self.context = context = method.context
        # A class that is forgotten as a whole must not limit the step.
        kept = method.held_out(why).of_classes(context.retain.labels)
        if not len(kept):
            raise UserError(
                f"{method.name}: no held-out sample is of a class that is retained; give others as validation=..."
            )
        self.watched = evenly_spaced(kept, config.held_out_samples)
        self.forget = evenly_spaced(context.forget, config.held_out_samples)
        self.config = config
        self.sufficient = self.lowest = 0.0

    def begin(self, model: nn.Module) -> None:
        """Measure the original; call it before any step."""
        predictions = predictions_of(model, self.watched, self.context)
        self.lowest = predictions.accuracy - self.config.max_drop / 100
        self.sufficient = unseen_accuracy(predictions, self.forget.labels, self.context.retain.labels)

    def reached(self, model: nn.Module) -> bool:
        """Return whether the model's accuracy on the forget set is sufficient."""
        return predictions_of(model, self.forget, self.context).accuracy <= self.sufficient

    @torch.no_grad()
    def along(self, model: nn.Module, step: Mapping[str, Tensor], most: float) -> float:
        """Add eta x `step` to the weights, with the smallest sufficient eta, or else the largest allowed one.

        The interval [0, most] is halved `search_steps` times.

        Args:
            model: The model to change.
            step: Direction by parameter name.
            most: Largest eta.

        Returns:
            eta; 0 if no step that was evaluated is allowed.
        """
        named = dict(model.named_parameters())
        weights = {name: named[name] for name in step}
        kept = {name: weight.clone() for name, weight in weights.items()}

        def move(eta: float) -> None:
            for name, weight in weights.items():
                weight.copy_(kept[name] + eta * step[name])

        low, high, best = 0.0, most, 0.0
        for _ in range(self.config.search_steps):
            eta = (low + high) / 2
            move(eta)
            allowed = predictions_of(model, self.watched, self.context).accuracy >= self.lowest
            if allowed:
                best = eta
            if allowed and not self.reached(model):
                low = eta
            else:
                high = eta
        move(best)
        return best


def search_passes(config: SearchConfig, searches: int, held_out: int, forget: int) -> ExtraPasses:
    """Return an upper bound on the forward passes of line searches, for `lethe plan`.

    Args:
        config: Options of the search.
        searches: Number of searches.
        held_out, forget: Numbers of samples in the held-out set and in the forget set.
    """
    held_out, forget = (min(config.held_out_samples, count) for count in (held_out, forget))
    return ExtraPasses(name=ACCURACY_PASSES, images=held_out + searches * config.search_steps * (held_out + forget))


def apply_step(model: nn.Module, step: Sequence[Tensor], length: float, search: LineSearch | None) -> None:
    """Add `length` x `step` to the weights that require a gradient, or the shorter step that a search finds.

    Args:
        model: The model to change.
        step: Direction, one tensor for each such weight.
        length: Factor; with a search, the largest one.
        search: Line search; None: take the whole step.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if search:
        search.begin(model)
        search.along(model, dict(zip(weights, step, strict=True)), length)
    else:
        with torch.no_grad():
            torch._foreach_add_(list(weights.values()), list(step), alpha=length)
