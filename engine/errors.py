"""The exceptions that the engine raises for its users, and the exit codes of the command."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class ExitCode(enum.IntEnum):
    """What the exit code of a command means."""

    GOOD = 0
    FAILED = 1
    WRONG_USE = 2
    INSUFFICIENT_EVIDENCE = 3
    STOPPED = 4
    CRASH = 70
    INTERRUPTED = 130
    TERMINATED = 143


# Printed by `lethe --help`.
EXIT_CODES = {
    ExitCode.GOOD: "done; a verdict is PASS",
    ExitCode.FAILED: "done, and the result is bad: verdict FAIL, a collapsed model, a record that was changed",
    ExitCode.WRONG_USE: "wrong use: one line names what to change; nothing was written",
    ExitCode.INSUFFICIENT_EVIDENCE: "the verdict is INSUFFICIENT EVIDENCE",
    ExitCode.STOPPED: "the run could not continue (a loss that is not finite, a full disk, a lost rank): no result yet",
    ExitCode.CRASH: "an unexpected error: the line on standard error names the file with the traceback",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C); --resume continues",
    ExitCode.TERMINATED: "terminated (SIGTERM); --resume continues",
}


class UserError(ValueError):
    """Wrong use: the message is one line that names the thing and the remedy.

    shared: another rank raised it too and shows it.
    """

    shared = False
    exit_code = ExitCode.WRONG_USE


class RunStopped(RuntimeError):
    """A run that cannot continue (a loss that is not finite, no space left)."""

    shared = False
    exit_code = ExitCode.STOPPED


class BadResult(RunStopped):
    """A run that came to its end with a result that is not to be used."""

    exit_code = ExitCode.FAILED


def nearest(name: str, known: Iterable[str]) -> str:
    """`'lehte', known=...` -> `"; did you mean 'lethe'? known: finetune, lethe, ..."`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"
