"""Choice of a backend, and checks that name operation, argument and shape.

No device is queried at import time.
"""

import difflib
import importlib.metadata
import importlib.util
import math
import numbers
import operator
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "eager", "triton"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve_backend(
    op: str, backend: str, device: torch.device | str = "cpu", unsupported: Sequence[str] = ()
) -> Literal["eager", "triton"]:
    """Return the backend that will run an operation.

    Args:
        op: Name of the operation, for error messages.
        backend: "eager", "triton", or "auto": Triton if it can run, otherwise eager.
        device: Device of the tensors.
        unsupported: Further reasons why the Triton kernel of this operation cannot run.

    Raises:
        ValueError: There is no backend of this name.
        RuntimeError: The backend "triton" cannot run; the message lists every reason.
    """
    check_choice(op, "backend", backend, get_args(Backend))
    if backend == "eager":
        return "eager"
    reasons = [*triton_problems(torch.device(device).type), *unsupported]
    if not reasons:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"{op}: backend 'triton' cannot run: {'; '.join(reasons)}. Use backend='auto' or 'eager'.")
    return "eager"


@torch.compiler.assume_constant_result
def triton_problems(device_type: str) -> list[str]:
    """List the reasons why Triton cannot run on tensors of a type of device; empty if it can.

    TRITON_INTERPRET is read again at each call, because tests change it within a process.
    """
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed"]
    import triton

    interpret = triton.knobs.runtime.interpret
    if device_type not in ("cpu", "cuda"):
        return [f"the tensors are on {device_type}, expected cuda"]
    if device_type == "cpu" and not interpret:
        return [
            "the tensors are on the CPU, which Triton serves only as an interpreter (TRITON_INTERPRET=1, set"
            " before Python starts; for tests, it is slow)"
        ]
    loaded = sys.modules.get(f"{__package__}._triton")
    if loaded is not None and loaded.INTERPRETED != interpret:
        return ["TRITON_INTERPRET was changed after the kernels had been loaded"]
    return []


@torch.compiler.assume_constant_result
def triton_has_float64_products() -> bool:
    """Return whether `tl.dot` accepts float64: Triton 3.5 and later."""
    try:
        major, minor, *_ = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 5)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation type: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast does not round float32 products to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_choice(op: str, argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name, unless `value` is one of `choices`."""
    if value in choices:
        return
    expected = ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{op}: {argument} is {value!r}, expected {expected}{hint}")


def check_number(op: str, argument: str, value: object, expected: str) -> float:
    """Return `value` as a float; raise ValueError unless it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{op}: {argument} is {value!r}, expected {expected}")
    return float(value)


def check_int(op: str, argument: str, value: object, low: int, high: int, meaning: str) -> int:
    """Return `value` as an int; raise ValueError unless it is a whole number with low <= value <= high."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{op}: {argument} is {value!r}, expected a whole number from {low} to {high} ({meaning})")
    return number


def check_tensor(op: str, argument: str, value: object, dims: str) -> None:
    """Raise ValueError unless `value` is a tensor with the dimensions that `dims` names, none of size zero.

    `dims` reads like "B, H, N, d".
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {argument} is a {type(value).__name__}, expected a tensor of shape ({dims})")
    if value.dim() != len(dims.split(",")):
        raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, expected ({dims})")
    if 0 in value.shape:
        raise ValueError(
            f"{op}: {argument} has shape {tuple(value.shape)}, expected ({dims}) with every size 1 or more"
        )


def check_float(op: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has one of the float types that the operations compute with."""
    if tensor.dtype not in FLOAT_DTYPES:
        expected = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES[:-1])
        raise ValueError(
            f"{op}: {argument} has dtype {dtype_name(tensor.dtype)},"
            f" expected {expected} or {dtype_name(FLOAT_DTYPES[-1])}"
        )


def check_shape(op: str, argument: str, tensor: Tensor, expected: tuple[int, ...], like: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`, which follows from the argument `like`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {argument} has shape {tuple(tensor.shape)}, expected {expected} to match {like}")


def check_dtype(op: str, argument: str, tensor: Tensor, expected: torch.dtype, like: str) -> None:
    """Raise ValueError unless `tensor` has the dtype of the argument `like`."""
    if tensor.dtype != expected:
        raise ValueError(
            f"{op}: {argument} has dtype {dtype_name(tensor.dtype)}, expected {dtype_name(expected)} to match {like}"
        )


def check_device(op: str, argument: str, tensor: Tensor, expected: torch.device, like: str) -> None:
    """Raise ValueError unless `tensor` is on the device of the argument `like`."""
    if tensor.device != expected:
        raise ValueError(f"{op}: {argument} is on {tensor.device}, expected {expected} to match {like}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")
