"""Gradients as lists of tensors: inner products, norms, and means over a set of samples.

Passes over a set run the model in eval mode, use each sample once without augmentation, and leave `.grad` unchanged. A
list holds one tensor for each parameter that requires a gradient, in the model's order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.data import Batch, Loader

# Computes a scalar mean over a batch.
Loss = Callable[[nn.Module, Batch], Tensor]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the inner product, a differentiable scalar."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm, a scalar."""
    return dot(a, a).sqrt()


def trainable(model: nn.Module) -> list[Tensor]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return the gradient of a scalar; zero for parameters that it does not depend on."""
    return list(torch.autograd.grad(loss, trainable(model), allow_unused=True, materialize_grads=True))


def mean_gradient(
    model: nn.Module, loader: Loader, loss: Loss, autocast: Autocast = contextlib.nullcontext
) -> list[Tensor]:
    """Return the gradient of the mean of `loss` over all readable samples of a loader.

    Args:
        model: The model; set to eval mode.
        loader: Loader of the samples.
        loss: Computes a scalar mean over a batch.
        autocast: Returns the context manager of the forward pass; none by default, which keeps the model's precision.
    """
    model.eval()

    def of(batch: Batch) -> Tensor:
        with autocast():
            return loss(model, batch)

    return mean_over(loader.ordered(), of, trainable(model))[1]


def mean_over(
    batches: Iterable[Batch], loss: Callable[[Batch], Tensor], parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], int]:
    """Return the mean of a loss over all readable samples of batches, its gradient, and the number of these samples.

    Args:
        batches: The batches.
        loss: Computes a scalar mean over a batch.
        parameters: What to differentiate by; the gradient is zero for those that the loss does not depend on. Without
            any, the value alone is computed.
    """
    value: Tensor = torch.zeros(())
    total, count = [torch.zeros_like(parameter) for parameter in parameters], 0
    for batch in readable(batches):
        with torch.set_grad_enabled(bool(parameters)):
            mean = loss(batch)
        if parameters:
            found = torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, found, alpha=len(batch))
        value, count = value.to(mean.device) + mean.detach() * len(batch), count + len(batch)
    if parameters:
        torch._foreach_div_(total, max(1, count))
    return value / max(1, count), total, count


def mean_importance(
    model: nn.Module,
    loader: Loader,
    loss: Loss,
    *,
    size: int,
    power: Literal[1, 2],
    autocast: Autocast = contextlib.nullcontext,
) -> list[Tensor]:
    """Return the mean over groups of samples of |gradient of the group's mean loss| ** power.

    With power 2 and size 1 this is the diagonal of the empirical Fisher matrix. Samples come in a random order that
    depends on the loader's seed. Each batch is cut into groups of about equal size.

    Args:
        model: The model; set to eval mode.
        loader: Loader of the samples.
        loss: Computes a scalar mean over a batch.
        size: Largest number of samples in a group.
        power: 1: absolute gradient; 2: squared gradient.
        autocast: Returns the context manager of the forward pass; none by default, which keeps the model's precision.
    """
    raised = Tensor.square if power == 2 else Tensor.abs
    model.eval()
    total, count = [torch.zeros_like(parameter) for parameter in trainable(model)], 0
    for batch in readable(loader.epoch(0)):
        parts = math.ceil(len(batch) / size)
        pieces = (each.tensor_split(parts) for each in (batch.images, batch.labels, batch.index))
        for images, labels, index in zip(*pieces, strict=True):
            with autocast():
                value = loss(model, Batch(images, labels, index))
            torch._foreach_add_(total, [raised(each) for each in gradient(model, value)])
            count += 1
    torch._foreach_div_(total, max(1, count))
    return total


def readable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Yield the batches, without the black placeholders for batches of which no image can be read."""
    return (batch for batch in batches if batch.weight)
