"""The command `lethe` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from engine import cli

Lethe = Callable[..., tuple[int, str, str]]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lethe:
    """Runs the command; gives exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lethe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        code: Any = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
