"""The exceptions that the engine raises for its users; everything else that escapes is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong use: the message is one line that names the thing and the remedy. The command exits with 2.

    shared: another rank raised it too and shows it.
    """

    shared = False


class RunStopped(RuntimeError):
    """A run that cannot go on (a loss that is not finite, no space left). The command exits with 1."""

    shared = False


def nearest(name: str, known: Iterable[str]) -> str:
    """`'lehte', known=...` -> `"; did you mean 'lethe'? known: finetune, lethe, ..."`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"
