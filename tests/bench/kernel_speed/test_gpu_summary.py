"""bench/gpu.sh and its summary: what failed is named, and turns the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_speed import gpu_summary

ROOT = Path(__file__).resolve().parents[3]


def fill(folder: Path, codes: dict[str, int], results: dict[str, Any]) -> None:
    (folder / "parts.tsv").write_text("".join(f"{name}\t{code}\t7\t60\n" for name, code in codes.items()), "utf-8")
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def rows(*pairs: tuple[str, str]) -> dict[str, Any]:
    contenders = [{"contender": name, "status": status, "reason": "why"} for name, status in pairs]
    return {"cases": [{"case": "a case", "rows": contenders}]}


def test_what_failed_is_named(tmp_path: Path) -> None:
    wrong = rows(("ours, triton", "failed"), ("ours, eager", "not run"), ("a peer", "failed"), ("ours", "measured"))
    late = {"targets": [{"passed": passed} for passed in (True, False, False, None)], "not_begun": ["x", "y"]}
    fill(tmp_path, {"check": 0, "train": 124, "unlearn": 3, "gone": 0, "good": 0}, {
        "check": wrong, "train": late, "unlearn": {}, "good": {},
    })  # fmt: skip
    summary = gpu_summary.summarise(tmp_path)
    assert summary["problems"] == [
        "check: a case: ours, triton: why",
        "train: not done within 60 s; results up to then are stored",
        "unlearn: exit code 3",
        "gone: no result",
    ]
    train = summary["parts"][1]
    assert train["targets"] == {"passed": 1, "missed": 2, "not measured": 1}
    assert (train["not_begun"], train["seconds"], train["budget"]) == (["x", "y"], 7, 60)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["parts"] == summary["parts"]
    assert not (tmp_path / "parts.tsv").exists()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (137, 1)])
def test_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: int) -> None:
    fill(tmp_path, {"train": code}, {"train": {"targets": [{"passed": False}]}})
    monkeypatch.setattr(sys, "argv", ["gpu_summary", str(tmp_path)])
    assert gpu_summary.main() == expected


def script(tmp_path: Path, *arguments: str, fails: str = "") -> tuple[int, list[str], str]:
    """Runs gpu.sh with an interpreter that writes down how it was called: (exit code, calls, output)."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >>"{tmp_path}/calls"\n'
        'case "$*" in\n'
        '*"import torch"*) exit 1 ;;\n'
        f'*"bench.kernel_speed.gpu_summary"*) exec "{sys.executable}" "$@" ;;\n'
        f'*"bench {fails or "nothing"} "*) exit 9 ;;\n'
        "esac\n"
        'for last; do :; done; echo "{}" >"$last"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    out.mkdir()
    (out / "unlearn.json").write_text("of an earlier run", encoding="utf-8")
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out)}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text("utf-8").splitlines() if calls.exists() else [], done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_goes_on_after_a_part_that_fails(tmp_path: Path) -> None:
    code, calls, output = script(tmp_path, "--dry-run", fails="unlearn")
    assert code == 1, output
    assert [call.split()[2] for call in calls[:-1]] == [*["kernels"] * 4, "train", "unlearn", "retrain-cost"]
    assert all("--quick" in call and "cpu" in call for call in calls[:-1])
    assert "unlearn: exit code 9" in output


def test_the_script_wants_a_gpu_and_no_other_words(tmp_path: Path) -> None:
    code, _, output = script(tmp_path)
    assert code == 2
    assert "--dry-run runs every part on the CPU" in output
    (tmp_path / "out" / "unlearn.json").unlink()
    (tmp_path / "out").rmdir()
    assert script(tmp_path, "--dry")[0] == 2


def test_the_budgets_add_up_to_less_than_nine_minutes() -> None:
    lines = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8").splitlines()
    budgets = [int(line.split()[2]) for line in lines if line.startswith("part ")]
    assert len(budgets) == 7
    assert sum(budgets) < 9 * 60
