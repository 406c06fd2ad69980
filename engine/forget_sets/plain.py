"""Forget sets that do not depend on a model: a random draw, and samples of one class."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.errors import UserError, nearest
from engine.forget_sets.base import Selection, Strategy, register
from engine.forget_sets.pool import Pool


@register
class Random(Strategy):
    """The set of `--forget random:SHARE@SEED`, in the order of the draw."""

    name = "random"
    summary = "drawn at random, the usual case"
    score = "none: every sample is as likely as another"

    def select(self, pool: Pool) -> Selection:
        return _drawn(np.arange(len(pool.samples)), pool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Options of the strategy class.

    Attributes:
        name: Name of the class; null: the largest, and the first of several.
    """

    name: str | None = None


@register
class OfClass(Strategy):
    """Samples of one class, drawn at random if it has more than needed.

    A whole class needs no list: `--forget class:NAME` names it.
    """

    name = "class"
    summary = "drawn from one class"
    score = "none: every sample of the class is as likely as another"
    Config = ClassConfig

    def select(self, pool: Pool) -> Selection:
        samples = pool.samples
        sizes = np.bincount(samples.labels)
        names = samples.class_names or [str(i) for i in range(len(sizes))]
        wanted = self.config.name
        if wanted is None:
            label = int(sizes.argmax())
        elif wanted in names:
            label = names.index(wanted)
        else:
            raise UserError(f"option name={wanted!r}: no such class{nearest(wanted, names)}")
        members = np.flatnonzero(samples.labels == label)
        if len(members) < pool.count:
            raise UserError(
                f"strategy class: {pool.count} samples were requested, and class {names[label]!r} has {len(members)}; "
                "ask for fewer"
            )
        drawn = _drawn(members, pool)
        return dataclasses.replace(drawn, facts={"class": names[label], "samples_of_class": len(members)})


def _drawn(members: np.ndarray, pool: Pool) -> Selection:
    order = np.random.default_rng(pool.seed).permutation(len(members))[: pool.count]
    return Selection(members[order], np.zeros(pool.count))
