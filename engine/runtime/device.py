"""Device and precision of a run."""

from __future__ import annotations

from typing import Any, Literal

import torch

from engine.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return a device; auto is CUDA if there is a device, else the CPU.

    Raises:
        UserError: The device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"option device={name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"option device={name!r}: {torch.cuda.device_count()} CUDA devices were found; use device=cpu")
    return device


def resolve_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Return a precision; auto is bf16 if the device multiplies it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            flags = next((line for line in handle if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context manager of autocast: bf16, or disabled for another precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
