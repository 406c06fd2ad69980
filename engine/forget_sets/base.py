"""What a strategy is, and the registry of all of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engine.core.registry import Registry
from engine.errors import UserError
from engine.forget_sets.pool import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For strategies that have nothing to set."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """indices: int64 [count], positions in the samples, first rank first, no two the same.

    scores: float64 [count], what each was chosen by. facts: further numbers of the strategy, for people and for JSON.
    """

    indices: np.ndarray
    scores: np.ndarray
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Strategy:
    """Base of all strategies. A subclass gives `select`, and `Config` where it has options.

    needs_model: looks at a model, so that one has to be given. score: what the scores are, and which way they go.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    score: ClassVar[str]
    Config: ClassVar[type[Any]] = NoOptions
    needs_model: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def select(self, pool: Pool) -> Selection:
        """Exactly `pool.count` samples; the same ones for the same seed."""
        raise NotImplementedError


def highest(scores: np.ndarray, candidates: np.ndarray, count: int) -> Selection:
    """The `count` candidates (positions) with the highest scores [n]; of equal ones, those that come first."""
    require_candidates(len(candidates), count)
    order = candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
    return Selection(order, scores[order].astype(np.float64))


def require_candidates(there: int, count: int) -> None:
    if there < count:
        raise UserError(f"forget set: {count} samples were asked for, and {there} can be chosen; ask for fewer")


_REGISTRY: Registry[Strategy] = Registry("strategy")
register = _REGISTRY.register


def get_strategy(name: str) -> type[Strategy]:
    return _REGISTRY.find(name)


def list_strategies() -> dict[str, type[Strategy]]:
    """All strategies by name, in the order of registration."""
    return dict(_REGISTRY)
