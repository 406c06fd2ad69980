"""The tolerance that every comparison with a float64 reference uses."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

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
