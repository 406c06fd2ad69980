"""Environment of a run: versions, devices, backends, and checks of the installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy", "scikit-learn", "safetensors", "pyarrow")
EXTRAS = {
    "deepspeed": "distributed",
    "xformers": "xformers",
    "cryptography": "record",
    "optuna": "tune",
    "pytest-benchmark": "bench",
}


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """Return the hash of the commit that runs, and whether files differ from it; None outside a checkout of this
    project.
    """
    if not (root / ".git").exists():  # installed: a repository further up belongs to another program
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Return versions and hardware for record.json; nothing in it identifies the user or the host."""
    import torch

    from engine._version import __version__

    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "lethe": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda_devices": devices,
    }


def kernels_problem() -> str | None:
    """Return why the imported package `lethe_kernels` is not that of this project; None if it is."""
    try:
        kernels = importlib.import_module("lethe_kernels")
    except ImportError as error:
        return f"the package `lethe_kernels` cannot be imported ({error}); reinstall lethe-unlearning"
    if getattr(kernels, "DISTRIBUTION", None) == "lethe-unlearning":
        return None
    owners = importlib.metadata.packages_distributions().get("lethe_kernels", [])
    others = ", ".join(sorted(set(owners) - {"lethe-unlearning"})) or "a folder on sys.path"
    return (
        f"the package `lethe_kernels` imported from "
        f"{getattr(kernels, '__file__', None) or next(iter(kernels.__path__))} is not lethe's; "
        f"it comes from {others}: uninstall that and reinstall lethe-unlearning, or use a virtual environment "
        "of its own"
    )


def kernel_backends() -> dict[str, str]:
    """Return the backend of `auto` on each device of this machine, and why it is not Triton if it is not."""
    import torch

    from lethe_kernels import triton_problems

    states = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        problems = triton_problems(device)
        states[device] = f"eager; {'; '.join(problems)}" if problems else "triton"
    return states


def rollout_launches() -> str:
    """Return how `lethe_kernels._triton.rollout.plan` divides the work on this machine's GPU, as text."""
    import torch

    images = "as many images as it has processors"
    if torch.cuda.is_available():
        images = f"{torch.cuda.get_device_properties(0).multi_processor_count} images"
    return (
        f"on a GPU all layers in one launch from a batch of {images} on; below that a launch a layer, shared out "
        "over heads and query rows"
    )


def extras() -> dict[str, str]:
    """Return the version of each optional package, or the command that installs it."""
    states = {}
    for package, extra in EXTRAS.items():
        version = _version(package)
        states[package] = version or f"not installed; pip install 'lethe-unlearning[{extra}]'"
    return states


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            name = next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{name or platform.processor() or 'unknown'}, {os.cpu_count()} cores"
