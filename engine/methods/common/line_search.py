"""How far to go along a direction: until the forget samples look held out, and no further than the rest allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.config import require
from engine.core.heldout import LOOKS, predictions_of, unseen_accuracy
from engine.core.method import Method
from engine.core.phase import ExtraPasses
from engine.core.search_space import Range, tunable
from engine.data.samples import evenly_spaced
from engine.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of a search. max_drop: points of held-out accuracy that may be lost. search_steps: steps it looks at.
    held_out_samples: of the held-out and of the forget samples, at most, that it looks at.
    """

    max_drop: float = tunable(2.0, Range(0.5, 10, log=True))
    search_steps: int = 8
    held_out_samples: int = 1000

    def __post_init__(self) -> None:
        require(self.max_drop >= 0, "max_drop", self.max_drop, "0 or more")
        for key in ("search_steps", "held_out_samples"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")


class LineSearch:
    """Searches by accuracy on the forget samples and on held-out ones, some of each.

    A step is enough where the forget samples are answered no better than the original answers held-out samples of the
    same classes (of classes of which nothing is retained: not at all). It is allowed where the accuracy on held-out
    samples has not fallen by more than `max_drop` percentage points.

    Raises UserError without held-out samples of a class that is retained; `why` says what they are for.
    """

    def __init__(self, method: Method, config: SearchConfig, why: str) -> None:
        self.context = context = method.context
        # What becomes of a class that is forgotten whole is not to hold a step back.
        kept = method.held_out(why).of_classes(context.retain.labels)
        if not len(kept):
            raise UserError(
                f"{method.name}: no held-out sample is of a class that is retained; give others as validation=..."
            )
        self.watched = evenly_spaced(kept, config.held_out_samples)
        self.forget = evenly_spaced(context.forget, config.held_out_samples)
        self.config = config
        self.enough = self.lowest = 0.0

    def begin(self, model: nn.Module) -> None:
        """Takes the measure of the original; called before any step."""
        predictions = predictions_of(model, self.watched, self.context)
        self.lowest = predictions.accuracy - self.config.max_drop / 100
        self.enough = unseen_accuracy(predictions, self.forget.labels, self.context.retain.labels)

    def reached(self, model: nn.Module) -> bool:
        return predictions_of(model, self.forget, self.context).accuracy <= self.enough

    @torch.no_grad()
    def along(self, model: nn.Module, step: Mapping[str, Tensor], most: float) -> float:
        """Adds eta `step` (by parameter name) to the weights, eta the smallest that is enough or the largest allowed.

        Halves [0, most] `search_steps` times, and returns eta: 0 where nothing that was tried is allowed.
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


def looks(config: SearchConfig, searches: int, held_out: int, forget: int) -> ExtraPasses:
    """The passes of so many searches, at most, in a run with so many held-out and forget samples."""
    held_out, forget = (min(config.held_out_samples, count) for count in (held_out, forget))
    return ExtraPasses(name=LOOKS, images=held_out + searches * config.search_steps * (held_out + forget))


def go(model: nn.Module, step: Sequence[Tensor], length: float, search: LineSearch | None) -> None:
    """Adds `length` times a step to the weights that require a gradient, or less, as far as a search says."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if search:
        search.begin(model)
        search.along(model, dict(zip(weights, step, strict=True)), length)
    else:
        with torch.no_grad():
            torch._foreach_add_(list(weights.values()), list(step), alpha=length)
