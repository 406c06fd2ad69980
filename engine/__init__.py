"""Makes a trained Vision Transformer forget chosen samples, and proves it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine._version import __version__

if TYPE_CHECKING:
    from engine import evaluate
    from engine.config import RunConfig
    from engine.core.result import UnlearnResult
    from engine.errors import BadResult, RunStopped, UserError
    from engine.methods import list_methods
    from engine.models.checkpoint import load_checkpoint, save_checkpoint
    from engine.models.spec import remember_model_args
    from engine.run.unlearn import train, unlearn
    from engine.tuning import tune


# Loaded at the first access, so that `lethe --help` is quick and `lethe env` can report an installation in which
# the models or kernels cannot be imported.
_LAZY_EXPORTS = {
    "BadResult": "engine.errors",
    "RunConfig": "engine.config",
    "RunStopped": "engine.errors",
    "UserError": "engine.errors",
    "evaluate_samples": "engine.jobs.evaluate",
    "UnlearnResult": "engine.core.result",
    "train": "engine.run.unlearn",
    "tune": "engine.tuning",
    "unlearn": "engine.run.unlearn",
    "list_methods": "engine.methods",
    "load_checkpoint": "engine.models.checkpoint",
    "remember_model_args": "engine.models.spec",
    "save_checkpoint": "engine.models.checkpoint",
}

__all__ = [
    "BadResult",
    "RunConfig",
    "RunStopped",
    "UnlearnResult",
    "UserError",
    "__version__",
    "evaluate",
    "list_methods",
    "load_checkpoint",
    "remember_model_args",
    "save_checkpoint",
    "train",
    "tune",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # the package itself, which can be called
        return importlib.import_module("engine.evaluate")
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)
