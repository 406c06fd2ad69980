"""The Triton kernels, one operation a file; imported when a kernel first runs, so that triton stays optional."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# The annotation of a kernel's whole numbers. For `int` Triton would make every one an i32, and no longer compile a
# stride of 1 in, without which features that lie side by side are loaded one by one.
Scalar = tl.tensor

# `triton.jit` decides when it decorates, that is when a module of this package is loaded.
INTERPRETED: bool = triton.knobs.runtime.interpret


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate memory for results and scratch; tests replace this function to fill all of it with NaN first."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def platform() -> str:
    """Return what kernels are compiled for: "cuda", "hip" or "interpreter"."""
    return "interpreter" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend
