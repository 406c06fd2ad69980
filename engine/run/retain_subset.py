"""Which retained samples a run works with: a share of them, for that share of the time of every pass over them.

random   the same share of each class: the k-th of a class, in random order and counted from 0, has the key
         k / (samples of the class), and the lowest keys are taken; so no class is lost while there are no more classes
         than samples to take
hard     the highest cross-entropy of the original
near     the smallest cosine distance, in the original's features, to any forget sample

The last two read every retained image once, unaugmented. Of equal samples those that come first are taken. Images that
are left out as bad come last. A choice depends on the seed, the samples and the original alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data import Batch, Loader, Samples
from engine.errors import UserError
from engine.models.attention import attention_backend
from engine.models.vit import outputs
from engine.runtime.process_group import ProcessGroup

# Cosines that are held at once: 64 MB.
_BLOCK = 1 << 24


def choose_retained(
    run: RunConfig,
    original: nn.Module,
    forget: Samples,
    retain: Samples,
    loader: Callable[[Samples, str], Loader],
    autocast: Callable[[], Any],
    world: ProcessGroup,
) -> Samples:
    """`retain_share` of the retained samples, in their order, as `retain_choice` says; the same ones on every rank.

    Raises UserError for `near` with nothing to forget, and for a share that leaves fewer samples than ranks.
    """
    if run.retain_share == 1:
        return retain
    count = max(1, round(run.retain_share * len(retain)))
    if count < world.size:
        raise UserError(
            f"option retain_share={run.retain_share:g} leaves {count} of {len(retain)} retained samples to "
            f"{world.size} ranks; raise it"
        )
    if run.retain_choice == "near" and not len(forget):
        raise UserError("option retain_choice='near': there is nothing to forget that samples could be near to")
    if run.retain_choice == "random":
        chosen = _random(retain.labels, count, run.seed)
    else:
        with torch.no_grad(), attention_backend(original, run.attention):
            images = loader(retain, "none")
            if run.retain_choice == "hard":
                scores = _losses(original, images, autocast)
            else:
                scores = _closeness(original, images, loader(forget, "none"), autocast)
        chosen = np.argsort(-scores, kind="stable")[:count]
    return retain.subset(np.sort(chosen), f"{retain.name} ({run.retain_choice} {run.retain_share:g})")


def _random(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions [count], see the top of the file."""
    rng = np.random.default_rng([seed, len(labels)])
    draws = rng.random(len(labels))
    order = np.lexsort((draws, labels))  # by class, at random within
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    ordered = labels[order]
    keys = (np.arange(len(labels)) - starts[ordered]) / sizes[ordered]
    return order[np.lexsort((draws[order], keys))[:count]]


def _losses(original: nn.Module, images: Loader, autocast: Callable[[], Any]) -> np.ndarray:
    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast():
            logits = outputs(original, batch.images).float()
        return F.cross_entropy(logits, batch.labels, reduction="none"), batch.labels

    return _known(*images.rows(score))


def _closeness(original: nn.Module, images: Loader, forget: Loader, autocast: Callable[[], Any]) -> np.ndarray:
    """The largest cosine of each retained sample to a forget sample."""

    def directions(batch: Batch) -> Tensor:
        with autocast():
            return F.normalize(outputs(original, batch.images, "features").float(), dim=1)

    found, labels = forget.rows(lambda batch: (directions(batch), batch.labels))
    anchors = found[labels >= 0].to(images.device)

    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        mine = directions(batch)
        parts = anchors.split(max(1, _BLOCK // len(mine)))
        return torch.stack([(mine @ part.T).amax(1) for part in parts]).amax(0), batch.labels

    return _known(*images.rows(score))


def _known(scores: Tensor, labels: Tensor) -> np.ndarray:
    return torch.where(labels >= 0, scores, -torch.inf).numpy()
