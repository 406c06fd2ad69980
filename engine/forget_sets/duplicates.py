"""Forget sets of near-duplicates: samples for which another one with nearly the same features is retained.

Forgetting such a sample is the hardest case to show: the model learns the same from its neighbour in the retain set, so
a retrained model predicts it too.

Neighbours are the nearest by cosine of the features at the input of the last layer. Samples are chosen greedily, the
closest pair first: one of the two is chosen, and the other, its partner, is retained. A sample whose nearest neighbour
was already chosen is compared by its next one. So of g copies of one image, g - 1 are chosen.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import require
from engine.forget_sets.base import Selection, Strategy, highest, register, require_candidates
from engine.forget_sets.pool import Pool

# Similarities in memory at a time, 64 MB; all pairs would be 10 GB for 50,000 samples.
BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """Options of near-duplicates.

    Attributes:
        neighbours: Neighbours of each sample that are considered; a sample with all of them chosen has no partner.
    """

    neighbours: int = 10

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, "neighbours", self.neighbours, "at least 1")


@register
class NearDuplicates(Strategy):
    name = "near-duplicates"
    summary = "samples whose nearest neighbour, by features, stays among the retained ones"
    score = "cosine of the features with those of the partner that is retained; highest first"
    Config = NearDuplicatesConfig
    needs_model = True

    def select(self, pool: Pool) -> Selection:
        features, candidates = pool.features, pool.candidates
        require_candidates(len(candidates) - 1, pool.count)  # at least one must be retained
        features = F.normalize(features[torch.from_numpy(candidates)], dim=1).to(pool.device)
        similarity, neighbours = nearest_neighbours(features, min(self.config.neighbours, len(candidates) - 1), pool)
        chosen, partners = pick_with_partners(similarity, neighbours, pool.count)
        scores = similarity[chosen, partners]
        with_partner = len(chosen)
        if with_partner < pool.count:
            # Each remaining sample is a partner or has none: those closest to their neighbours follow.
            left = np.setdiff1d(np.arange(len(candidates)), chosen)
            rest = highest(similarity[:, 0], left, pool.count - with_partner)
            chosen, scores = np.concatenate([chosen, rest.indices]), np.concatenate([scores, rest.scores])
        return Selection(candidates[chosen], scores, {"with_partner_retained": with_partner})


def nearest_neighbours(features: Tensor, count: int, pool: Pool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines, float64 [n, count], and positions, int64 [n, count], of the nearest others, nearest first.

    Args:
        features: [n, d], each of length 1; at most `BLOCK` similarities are in memory at a time.
        count: Number of neighbours.
        pool: Reports the progress, if given.
    """
    n = len(features)
    rows = max(1, BLOCK // n)
    cosines, positions = [], []
    for start in range(0, n, rows):
        block = features[start : start + rows] @ features.T
        own = torch.arange(len(block), device=block.device)
        block[own, own + start] = -torch.inf
        best = block.topk(count, dim=1)
        cosines.append(best.values.double().cpu())
        positions.append(best.indices.cpu())
        if pool is not None:
            pool.report_progress("nearest", min(n, start + rows), n)
    return torch.cat(cosines).numpy(), torch.cat(positions).numpy()


def pick_with_partners(similarity: np.ndarray, neighbours: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `count` chosen samples, each with the column of the neighbour that is retained for it.

    No sample is both chosen and retained as a partner.

    Args:
        similarity, neighbours: [n, k], nearest first.
        count: Number of samples.
    """
    known = neighbours.shape[1]
    taken, kept = np.zeros(len(neighbours), dtype=bool), np.zeros(len(neighbours), dtype=bool)
    queue = [(-value, i, 0) for i, value in enumerate(similarity[:, 0].tolist())]
    heapq.heapify(queue)
    chosen: list[int] = []
    columns: list[int] = []
    while queue and len(chosen) < count:
        _, i, column = heapq.heappop(queue)
        if kept[i]:
            continue
        partner = neighbours[i, column]
        if not taken[partner]:
            taken[i] = kept[partner] = True
            chosen.append(i)
            columns.append(column)
        elif column + 1 < known:
            heapq.heappush(queue, (-float(similarity[i, column + 1]), i, column + 1))
    return np.array(chosen, dtype=np.int64), np.array(columns, dtype=np.int64)
