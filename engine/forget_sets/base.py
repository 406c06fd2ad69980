"""The interface of a strategy, and the registry of strategies."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engine.core.registry import Registry
from engine.errors import UserError
from engine.forget_sets.pool import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of strategies without options."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Result of a strategy.

    Attributes:
        indices: int64 [count], positions in the samples, first rank first, without repeats.
        scores: float64 [count], the score of each.
        facts: Further numbers of the strategy, for people and for JSON.
    """

    indices: np.ndarray
    scores: np.ndarray
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Strategy:
    """Base class of strategies. A subclass defines `select`, and `Config` if it has options.

    Attributes:
        name: Name for `choose_forget_set`.
        summary: One line for the command line.
        score: Meaning of the scores, and which come first.
        Config: Frozen dataclass of the options.
        needs_model: The strategy needs a model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    score: ClassVar[str]
    Config: ClassVar[type[Any]] = NoOptions
    needs_model: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def select(self, pool: Pool) -> Selection:
        """Return exactly `pool.count` samples; they depend on pool, options and seed alone."""
        raise NotImplementedError


def highest(scores: np.ndarray, candidates: np.ndarray, count: int) -> Selection:
    """Return the candidates with the highest scores; among equal ones, those that come first.

    Args:
        scores: Scores [n] of all samples.
        candidates: Positions that may be chosen.
        count: Number of samples.

    Raises:
        UserError: There are fewer candidates.
    """
    require_candidates(len(candidates), count)
    order = candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
    return Selection(order, scores[order].astype(np.float64))


def require_candidates(there: int, count: int) -> None:
    """Check that there are enough candidates.

    Raises:
        UserError: There are fewer than `count`.
    """
    if there < count:
        raise UserError(f"forget set: {count} samples were requested, and {there} can be chosen; request fewer")


_REGISTRY: Registry[Strategy] = Registry("strategy")
register = _REGISTRY.register


def get_strategy(name: str) -> type[Strategy]:
    return _REGISTRY.find(name)


def list_strategies() -> dict[str, type[Strategy]]:
    """Return all strategies by name, in the order of registration."""
    return dict(_REGISTRY)
