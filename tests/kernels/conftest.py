"""The tolerance that every comparison with a float64 reference uses."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels run in this test, on the CPU, and backend="auto" picks them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and scratch of the Triton kernels start as NaN (or the largest integer), not as lucky zeros."""
    from lethe_kernels import _triton

    def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        worst = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max
        return torch.full(tuple(shape), worst, dtype=dtype, device=device)

    monkeypatch.setattr(_triton, "empty", poison)


AssertNear = Callable[[Tensor, Sequence[Tensor], Tensor], None]

ULPS = 16  # another order of summation, on another machine, moves cancelling sums by 8 now and then


@pytest.fixture
def assert_near() -> AssertNear:
    """assert_near(actual, same_dtype, truth): allowed is 2 x the reference's own error + a few ulp.

    same_dtype: runs of the reference in the dtype that `actual` computes in; their largest error counts. One run may
    be lucky where terms cancel, so pass several orders of summation there.
    """

    def check(actual: Tensor, same_dtype: Sequence[Tensor], truth: Tensor) -> None:
        assert truth.dtype == torch.float64
        assert actual.shape == truth.shape
        error = (actual.double() - truth).abs().max().item()
        floor = ULPS * torch.finfo(actual.dtype).eps * truth.abs().max().item()
        allowed = 2 * max((run.double() - truth).abs().max().item() for run in same_dtype) + floor
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"  # a NaN error fails too

    return check
