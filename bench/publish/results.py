"""Reading of result files, the JSON of bench/results/."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import UserError
from engine.runtime.environment import ROOT

T = TypeVar("T")
Report = dict[str, Any]

RESULTS = ROOT / "bench" / "results"


def load(path: Path) -> Report:
    """Read a result file.

    Raises:
        UserError: The file is missing, or is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{_shown(path)} is missing; run the command that makes it, or take it out") from None
    except ValueError as error:
        raise UserError(f"{_shown(path)} is no JSON ({error}); make it again") from None
    if isinstance(content, list):  # tests/mutation/mutation.py wrote its rows alone until it had a heading
        content = {"rows": content}
    return content


def measured(path: Path) -> Report:
    """Read a result file that was not made with --quick.

    Raises:
        UserError: The file is missing, is not JSON, or was made with --quick.
    """
    report = load(path)
    if report.get("settings", {}).get("quick"):
        raise UserError(f"{_shown(path)} was made with --quick, which is a smoke test; make it without --quick")
    return report


def fitted(files: Sequence[str], make: Callable[..., T], *reports: Report) -> T:
    """Return make(*reports).

    Raises:
        UserError: The reports, read from `files`, do not have what `make` reads.
    """
    try:
        return make(*reports)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{', '.join(files)} lacks a value that the documents need ({type(error).__name__}: {error}); "
            "make it again, or change `bench/publish`"
        ) from error


def kind_of(name: str) -> str:
    """Return `kernels` for kernels-cpu.json and for kernels-cuda.json."""
    return re.sub(r"-(cpu|cuda)$", "", name.removesuffix(".json"))


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"{path.parent.name}/{path.name}"
