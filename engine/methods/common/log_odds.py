"""Log-odds of classes, and maps of them from one distribution to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

# Weight of the mean over all classes in that of one class, in samples.
_SHRINKAGE = 10.0


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-odds [n], float64, of classes `labels` [n] by logits [n, C]: z_y - logsumexp of the others."""
    others = logits.double().scatter(1, labels[:, None], -torch.inf)
    return logits.double().gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def with_log_odds(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Return logits [n, C] whose true classes `labels` [n] have the log-odds `wanted` [n]; others stay as they are."""
    true = labels[:, None]
    others = logits.double().scatter(1, true, -torch.inf).logsumexp(1)
    return logits.scatter(1, true, (others + wanted)[:, None].to(logits.dtype))


def quantiles_in_order(odds: Tensor, labels: Tensor, others: Tensor, of_others: Tensor) -> Tensor:
    """Return the quantiles of other log-odds that samples have by their order within their class.

    In each class, the sample of rank i of m gets the quantile (i + 1/2) / m of the log-odds of that class, or of all if
    there are none of the class.

    Args:
        odds, labels: Log-odds [n], and classes [n].
        others, of_others: Log-odds [h] to take the quantiles of, and their classes [h].

    Returns:
        Log-odds [n], float64.
    """
    wanted, others = torch.empty(len(odds), dtype=torch.float64), others.double()
    for label in labels.unique():
        members = torch.where(labels == label)[0]
        target = others[of_others == label] if (of_others == label).any() else others
        ranks = odds[members].argsort().argsort()
        wanted[members] = torch.quantile(target, (ranks.double() + 0.5) / len(members))
    return wanted


def quantiles_of(samples: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], after: Sequence[Tensor]) -> Tensor:
    """Map log-odds from one distribution to another by their quantiles, relative to the mean of the class.

    With m the mean of a class, shrunk towards that of all as by `_SHRINKAGE` samples of it, a sample with log-odds u of
    class y has the rank r of u - m_before(y) among those of `before`, (number below + 1/2) / (number + 1), and gets
    m_after(y) + the quantile r of u' - m_after(y') of `after`.

    Args:
        samples: Log-odds [n] to map, and classes [n].
        before: Log-odds [a] and classes [a] of the distribution that the samples are from.
        after: Those [b] of the distribution that they get.

    Returns:
        Log-odds [n], float64.
    """
    (odds, labels), (old, new) = samples, (_Centred.of(*before), _Centred.of(*after))
    below = torch.searchsorted(old.residuals, odds.double() - old.means(labels))
    ranks = (below.double() + 0.5) / (len(old.residuals) + 1)
    return new.means(labels) + torch.quantile(new.residuals, ranks)


@dataclasses.dataclass(frozen=True)
class _Centred:
    """Log-odds less the means of their classes.

    Attributes:
        residuals: [n], float64, ascending.
        overall: Mean of all log-odds.
        by_class: Shrunk mean of each class that occurs.
    """

    residuals: Tensor
    overall: float
    by_class: dict[int, float]

    @classmethod
    def of(cls, odds: Tensor, labels: Tensor) -> _Centred:
        odds = odds.double()
        overall, by_class = float(odds.mean()), {}
        for label in labels.unique():
            mine = odds[labels == label]
            by_class[int(label)] = (float(mine.sum()) + _SHRINKAGE * overall) / (len(mine) + _SHRINKAGE)
        centres = torch.tensor([by_class[int(label)] for label in labels], dtype=torch.float64)
        return cls((odds - centres).sort().values, overall, by_class)

    def means(self, labels: Tensor) -> Tensor:
        """Return the mean of the class of each label [n]; that of all for a class that does not occur."""
        return torch.tensor([self.by_class.get(int(label), self.overall) for label in labels], dtype=torch.float64)
