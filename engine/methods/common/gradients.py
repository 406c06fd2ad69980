"""Gradients as lists of tensors, one for each parameter: products, lengths, and what they are over sets of samples.

The passes over a set run the model in eval mode, look at every sample once and unaugmented, and leave `.grad` alone.
Lists hold one tensor for each parameter that requires a gradient, in the model's order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.data import Batch, Loader

# The mean of something over a batch, a scalar.
Loss = Callable[[nn.Module, Batch], Tensor]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product, a scalar; can be differentiated."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """Euclidean length, a scalar."""
    return dot(a, a).sqrt()


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradient of a scalar; zero for parameters that it does not reach."""
    return list(torch.autograd.grad(loss, trainable(model), allow_unused=True, materialize_grads=True))


def mean_gradient(
    model: nn.Module, loader: Loader, loss: Loss, autocast: Autocast = contextlib.nullcontext
) -> list[Tensor]:
    """Gradient of the mean of `loss` over all samples of a loader that can be read."""
    model.eval()
    total, count = [torch.zeros_like(parameter) for parameter in trainable(model)], 0
    for batch in _readable(loader.ordered()):
        with autocast():
            value = loss(model, batch)
        torch._foreach_add_(total, gradient(model, value), alpha=len(batch))
        count += len(batch)
    torch._foreach_div_(total, max(1, count))
    return total


def mean_importance(
    model: nn.Module,
    loader: Loader,
    loss: Loss,
    *,
    size: int,
    power: Literal[1, 2],
    autocast: Autocast = contextlib.nullcontext,
) -> list[Tensor]:
    """Mean over groups of samples of |gradient of the group's mean loss| ** power; power 2 is the diagonal of the
    empirical Fisher matrix where size is 1.

    The samples are in random order, that of the loader's seed; each batch is cut into groups of about equal size, at
    most `size`.
    """
    raised = Tensor.square if power == 2 else Tensor.abs
    model.eval()
    total, count = [torch.zeros_like(parameter) for parameter in trainable(model)], 0
    for batch in _readable(loader.epoch(0)):
        parts = math.ceil(len(batch) / size)
        pieces = (each.tensor_split(parts) for each in (batch.images, batch.labels, batch.index))
        for images, labels, index in zip(*pieces, strict=True):
            with autocast():
                value = loss(model, Batch(images, labels, index))
            torch._foreach_add_(total, [raised(each) for each in gradient(model, value)])
            count += 1
    torch._foreach_div_(total, max(1, count))
    return total


def _readable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Without the black images that stand for batches of which no image can be read."""
    return (batch for batch in batches if batch.weight)
