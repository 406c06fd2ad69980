"""Progress bar of a run in Python: one bar for each phase, in a notebook or a terminal."""

from __future__ import annotations

import contextlib
import html
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

Report = Callable[[str, int, int, dict[str, float]], None]

# Seconds between two updates of a bar in a notebook.
_EVERY_S = 0.2


def format_numbers(numbers: Mapping[str, float]) -> str:
    """Return the numbers of a step in one line, without the norm of the gradient."""
    return "  ".join(f"{key} {value:.3g}" for key, value in numbers.items() if key != "grad_norm")


class NotebookBar:
    """One line of HTML for each phase, rewritten in place; needs IPython alone."""

    def __init__(self) -> None:
        display = importlib.import_module("IPython.display").display
        self._handle: Any = display({"text/plain": "", "text/html": ""}, raw=True, display_id=True)
        self._shown = 0.0
        self._lines: dict[str, str] = {}

    def __call__(self, phase: str, step: int, total: int, numbers: dict[str, float]) -> None:
        name, shown = html.escape(phase), html.escape(format_numbers(numbers))
        self._lines[phase] = f"{name} <progress value={step} max={total}></progress> {step}/{total} {shown}"
        now = time.monotonic()
        if self._handle is not None and (now - self._shown > _EVERY_S or step >= total):
            self._shown = now
            page = {"text/plain": f"{phase} {step}/{total}", "text/html": "<br>".join(self._lines.values())}
            self._handle.update(page, raw=True)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class TerminalBars:
    """A tqdm bar for each phase, on standard error."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: Any = None

    def __call__(self, phase: str, step: int, total: int, numbers: dict[str, float]) -> None:
        if self._bar is None or phase != self._phase:
            self.close()
            self._phase, self._bar = phase, tqdm(total=total, desc=phase, file=sys.stderr)
        self._bar.set_postfix_str(format_numbers(numbers), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar of the phase as it is."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def automatic_progress(wanted: bool = False) -> Iterator[Report | None]:
    """Yield a progress bar in a notebook or a terminal; None for files, pipes and tests.

    Args:
        wanted: Yield a bar there as well.
    """
    if in_notebook():
        yield NotebookBar()
    elif wanted or ("PYTEST_CURRENT_TEST" not in os.environ and sys.stderr.isatty()):
        bars = TerminalBars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield None
