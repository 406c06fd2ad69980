"""What every result file says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.harness import report
from bench.harness.report import Report
from bench.kernel_speed.kernels import PEERS, _versions


def test_a_report_has_its_heading_and_keeps_the_load_it_began_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "data", "--json", f"{tmp_path}/a b.json", "--quick"])
    monkeypatch.chdir(tmp_path)
    loads = iter([(0.123, 1, 2), (3, 4, 5)])
    monkeypatch.setattr(report.os, "getloadavg", lambda: next(loads))
    made = Report(environment={"deepspeed": "0.1"})
    written = made.write({"rows": [1]}, tmp_path / "a b.json")
    assert json.loads((tmp_path / "a b.json").read_text()) == written
    assert list(written) == ["command", "finished", "commit", "environment", "load_average", "rows"]
    assert written["command"] == "python -m bench data --json 'a b.json' --quick"
    assert written["load_average"] == {"before": [0.12, 1, 2], "after": [3, 4, 5]}
    assert written["environment"]["deepspeed"] == "0.1"
    assert written["environment"]["threads"] >= 1


def test_versions_are_of_what_is_installed() -> None:
    assert _versions(["pytest", "no-such-distribution"]) == {"pytest": pytest.__version__}
    assert "info-nce-pytorch" in PEERS
