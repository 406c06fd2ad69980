"""`python -m bench ulira`: one ensemble for all methods, and a file without places of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.quality.ulira
from bench.quality.ulira import run_ulira


@pytest.mark.slow
def test_methods_share_one_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.quality.ulira, "state_needs", lambda *_: None)  # starts processes
    monkeypatch.chdir(tmp_path)
    run_ulira(16, ["finetune", "retrain"], Path("cache"), 1, True, tmp_path / "ulira.json")
    written = json.loads((tmp_path / "ulira.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["finetune", "retrain"]
    first, second = written["rows"]
    assert first["untouched"] == second["untouched"]
    assert first["ulira"] != second["ulira"]
    assert first["models"]["with_each_target"] == 3
    assert second["options"]["lr"] == second["recipe"]["lr"] == 2e-3
    assert len(list(Path("cache").glob("model-*"))) == 6
    assert str(tmp_path) not in json.dumps(written["rows"])
