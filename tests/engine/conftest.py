"""The command in this process, and a store of deletion requests over a part of digits.

Test files whose runs are planted have a store of their own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Lethe, command
from digit_requests import QUICK
from toys import few

from engine.data import Source, open_source
from engine.requests import intake
from engine.requests.intake import init_store


@pytest.fixture(autouse=True)
def _no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have empty pictures, except in their own tests: drawing takes half of the time of a short run."""
    if "/report/" not in request.path.as_posix():
        for module in ("engine.report.plots", "engine.report.proof.plots"):
            monkeypatch.setattr(f"{module}.svg", lambda figure: "data:image/svg+xml;base64,")


@pytest.fixture
def lethe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lethe:
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def digits() -> Source:
    """Not all samples: the evaluation of a run takes most of these tests' time."""
    whole = open_source("digits")
    return Source("digits", few(whole.train, 240), whole.validation, few(whole.test, 80))


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path, digits: Source, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The evidence of its runs is an empty report: `engine.jobs.task`'s is tested elsewhere."""
    monkeypatch.setattr(intake, "open_source", {"digits": digits}.__getitem__)
    monkeypatch.setattr("engine.jobs.unlearn._write_evidence", lambda job, *rest: (job.folder / "report.html").touch())
    init_store(tmp_path / "store", str(checkpoint), "digits", method="finetune", config=QUICK)
    return tmp_path / "store"
