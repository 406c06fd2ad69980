"""The command `lethe` in this process, and what its tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.cli import app as cli
from engine.errors import UserError

ARCH = "vit_tiny_patch16_224"

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


def invoke(*words: object) -> tuple[int, str]:
    """Exit code and message of a command, errors as `engine.cli.app.run_app` has them."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def saved(tmp_path: Path, contents: Any, name: str = "x.pth") -> Path:
    torch.save(contents, tmp_path / name)
    return tmp_path / name


def one_line(err: str) -> str:
    lines = [line for line in err.strip().splitlines() if line.strip()]
    assert "Traceback" not in err
    return lines[-1]
