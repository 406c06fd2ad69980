"""The tolerance that every comparison with a float64 reference uses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

AssertNear = Callable[[Tensor, Tensor, Tensor], None]

ULPS = 4


@pytest.fixture
def assert_near() -> AssertNear:
    """assert_near(actual, same_dtype_reference, truth): allowed is 2 x the reference's own error + a few ulp."""

    def check(actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        assert truth.dtype == torch.float64
        assert actual.shape == truth.shape
        error = (actual.double() - truth).abs().max().item()
        floor = ULPS * torch.finfo(actual.dtype).eps * truth.abs().max().item()
        allowed = 2 * (same_dtype.double() - truth).abs().max().item() + floor
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"  # a NaN error fails too

    return check
