"""End of a command: its exit code, the line on standard error, and the file with the traceback of a crash."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from engine.cli.options import RANK
from engine.errors import ExitCode, RunStopped, UserError

# Set to anything but 0: the traceback of a crash goes to standard error. `lethe --debug` sets it.
DEBUG = "LETHE_DEBUG"


def run(command: Callable[[], Any], stderr: Console) -> None:
    """Run a command, and end the process with its exit code."""
    try:
        _run(command, stderr)
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ:  # of a launcher; other commands end without importing torch
            from engine.runtime.process_group import end_rank, launched

            if launched():
                end_rank(_code_of(end))
        raise


def _code_of(end: SystemExit) -> int:
    """Return the exit code of SystemExit, as the interpreter does: 0 for None; another object is printed, and is 1."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _run(command: Callable[[], Any], stderr: Console) -> None:
    with _terminated_in_order():
        try:
            command()
        except (UserError, RunStopped) as error:
            if not error.shared:
                rank = f" (rank {RANK})" if RANK > 0 else ""
                label = "error" if isinstance(error, UserError) else "stopped"
                _print_error(stderr, f"{label}{rank}", str(error))
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(ExitCode.INTERRUPTED)
        except Exception as error:
            _report_crash(error, stderr)
            sys.exit(ExitCode.CRASH)


def _print_error(stderr: Console, label: str, text: str) -> None:
    stderr.print(f"[bold red]{label}:[/] {escape(text)}", soft_wrap=True, highlight=False)


def _report_crash(error: Exception, stderr: Console) -> None:
    """Write the traceback of a crash to a file, or to standard error if that fails; print one line that names it."""
    text = "".join(traceback.format_exception(error))
    first = next(iter(str(error).strip().splitlines()), "")
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        sys.stderr.write(text)
        _print_error(stderr, "crash", what)
        return
    for folder in filter(None, (getattr(error, "run_folder", None), tempfile.gettempdir())):
        name = f"crash-{os.getpid()}.txt"
        with contextlib.suppress(OSError):
            path = Path(folder) / (name if folder != tempfile.gettempdir() else f"lethe-{name}")
            path.write_text(f"{' '.join(sys.argv)}\n\n{text}", encoding="utf-8", errors="backslashreplace")
            _print_error(
                stderr,
                "crash",
                f"{what}; this is an error of lethe, of a package or of the machine, not wrong use. The traceback is "
                f"in {path}; LETHE_DEBUG=1 prints it",
            )
            return
    sys.stderr.write(text)
    _print_error(stderr, "crash", what)


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """End the process by an exception on SIGTERM (of a scheduler, of `kill`), so that locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != started:  # a worker that decodes images
            os._exit(ExitCode.TERMINATED)
        sys.exit(ExitCode.TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
