"""The comparison behind `python -m bench equality`, and how it reads the memory of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.training_cost.scale import _compare, _peaks, launch


def folder(path: Path, weight: float = 1.0, loss: float = 0.5, accuracy: float = 0.9) -> Path:
    path.mkdir()
    save_file({"a": torch.tensor([2.0, weight]), "b": torch.ones(3)}, path / "model.safetensors")
    rows = [{"step": 0, "lr": 0.1, "contrast": loss}, {"event": "collapse"}]
    (path / "history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "metrics.json").write_text(json.dumps({"accuracy": {"forget": accuracy, "retain": 1.0, "test": 0.8}}))
    return path


def test_equal_runs_have_no_differences(tmp_path: Path) -> None:
    same = _compare(folder(tmp_path / "a"), folder(tmp_path / "b"))
    assert same == {"steps": 1, "tensor": 0, "weight": 0, "loss": 0, "points": 0}


def test_each_difference_is_seen_in_its_own_measure(tmp_path: Path) -> None:
    other = folder(tmp_path / "b", weight=1.2, loss=0.4, accuracy=0.85)
    found = _compare(folder(tmp_path / "a"), other)
    assert found["tensor"] == pytest.approx(0.2 / 5**0.5)
    assert found["weight"] == pytest.approx(0.1)
    assert found["loss"] == pytest.approx(0.1)
    assert found["points"] == pytest.approx(5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_of_a_process_is_its_high_water_mark() -> None:
    hold = "import time; held = bytearray(300 * 2**20); del held; print(flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        ((rank, peak),) = _peaks(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert rank == 0
    assert 300 * 2**20 < peak < 400 * 2**20
    assert dict(_peaks(os.getpid())), "a process without ranks below it is looked at itself"


def test_a_run_that_fails_shows_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 2:.*No such command"):
        launch(["unlern"], 1, None, tmp_path / "log")
