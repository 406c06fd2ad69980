"""Choose the part of the retain set that a run uses. Every pass over it then takes that share of the time.

random   the same share of each class: the k-th of a class, in random order and counted from 0, has the key
         k / (samples of the class), and the lowest keys are taken; so every class is represented, unless there are
         more classes than samples to take
hard     the highest cross-entropy of the original
near     the smallest cosine distance, in the original's features, to any forget sample

hard and near read every retain image once, unaugmented. Of samples with equal scores, the first ones are taken. Images
that are left out as bad come last. A choice depends only on the seed, the samples and the original.
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

# Cosines in memory at a time: 64 MB.
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
    """Choose `retain_share` of the retain set by the rule of `retain_choice`.

    Args:
        run: Options of the run.
        original: The model before unlearning.
        forget, retain: Forget set and retain set.
        loader: Makes a `Loader` of samples with an augmentation.
        autocast: Returns the context manager in which the model computes.
        world: Process group.

    Returns:
        The chosen samples in the order of the retain set; the same ones on every rank.

    Raises:
        UserError: `near` without forget samples, or a share with fewer samples than ranks.
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
    """Return the positions [count] of the rule "random", see the top of the file."""
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
    """Return the largest cosine of each retain sample to a forget sample, [retain samples]; -inf for a bad image."""

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
