"""info_nce against its float64 reference, gradcheck, hand-computed examples, invariants, and each error."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import info_nce
from kernels.info_nce import info_nce_reference

FORMS = ["in-batch", "own", "shared"]
SIMILARITIES = ["cosine", "dot"]
REDUCTIONS = ["mean", "sum", "none"]


def make(
    form: str, batch: int, features: int, negatives: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float64, strided, and on the scale at which dot products are of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
        return x[..., ::2] * features**-0.25

    anchors, positives = draw(batch, features), draw(batch, features)
    if form == "in-batch":
        return anchors, positives, None
    return anchors, positives, draw(batch, negatives, features) if form == "own" else draw(negatives, features)


def leaves(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]


def losses_and_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor | None], temperature: Tensor, **options: Any
) -> list[Tensor]:
    loss = function(*tensors, temperature=temperature, **options)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
    inputs = [x for x in (*tensors, temperature) if x is not None]
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def check_against_float64(
    assert_near: Any, tensors: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype, **options: Any
) -> None:
    rounded = tuple(None if x is None else x.to(dtype) for x in tensors)  # all three start from the same numbers
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def run(function: Callable[..., Tensor], in_dtype: torch.dtype) -> list[Tensor]:
        temperature = torch.tensor(0.3, dtype=compute).to(in_dtype).requires_grad_()
        return losses_and_gradients(function, leaves(rounded, in_dtype), temperature, **options)

    if dtype.itemsize == 2:  # a temperature that both can hold
        options = dict(options)
    actual = losses_and_gradients(
        info_nce, leaves(rounded, dtype), torch.tensor(0.3, dtype=compute).requires_grad_(), **options
    )
    same_dtype = run(info_nce_reference, compute)
    truth = losses_and_gradients(
        info_nce_reference,
        leaves(rounded, torch.float64),
        torch.tensor(0.3, dtype=compute).double().requires_grad_(),
        **options,
    )
    assert actual[0].dtype == compute
    for got, same, true in zip(actual, same_dtype, truth, strict=True):
        assert_near(got, same, true)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("batch", "features"), [(2, 1), (7, 7), (3, 100), (5, 197), (2, 577)])
def test_loss_and_gradients_match_float64_reference(
    assert_near: Any, form: str, similarity: str, reduction: str, batch: int, features: int
) -> None:
    tensors = make(form, batch, features)
    check_against_float64(assert_near, tensors, torch.float32, similarity=similarity, reduction=reduction)
