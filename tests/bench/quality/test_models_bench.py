"""`python -m bench models`: counts, and what a refusal and a crash are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.publish.sheets import models_table
from bench.quality.models import _each, counted, outcome, subjects, summary, supported
from engine.errors import UserError


def _refuse() -> None:
    raise UserError("no attention")


def test_a_refusal_is_no_crash() -> None:
    assert outcome(lambda: None) == "yes"
    assert outcome(_refuse) == "refused: no attention"
    assert outcome(lambda: 1 / 0) == "crash: ZeroDivisionError: division by zero"


def test_names_are_counted_by_what_accepts_them() -> None:
    rows = [counted(name) for name in ("test_vit", "xcit_nano_12_p16_224", "resnet18")]
    found = summary(rows)
    counts = {key: found[key] for key in ("names", "classifiers", "logits", "columnar", "lethe", "crashes")}
    assert counts == {"names": 3, "classifiers": 3, "logits": 3, "columnar": 2, "lethe": 1, "crashes": 0}
    assert list(found["not_lethe"]) == ["xcit_nano_12_p16_224"]
    assert "attends over channels" in found["not_lethe"]["xcit_nano_12_p16_224"]


def test_every_module_of_timm_has_a_row() -> None:
    import timm

    assert {row[0] for row in subjects()} == {m for m in timm.list_modules() if timm.list_models(module=m)}


def test_a_row_runs_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.quality.models.count_cost", lambda *_, **__: None)
    row = supported(("vision_transformer", "", "test_vit", {"img_size": 32, "patch_size": 8}))
    assert [row[key] for key in ("opens", "lethe", "lethe_plus", "verify", "plan")] == ["yes"] * 5
    row = supported(("resnet", "", "test_resnet", {}))
    assert [row[key].partition(":")[0] for key in ("opens", "lethe", "lethe_plus")] == ["yes", "refused", "yes"]


def test_a_run_goes_on_with_the_rows_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"name": "resnet18", "kept": True}) + "\n")
    assert _each(counted, ["resnet18"], 1, file) == [{"name": "resnet18", "kept": True}]


def test_the_table_shows_what_runs() -> None:
    row = {"module": "eva", "kind": "rotary", "name": "n", "opens": "yes", "lethe": "refused: why", "plan": "crash: x"}
    count: dict[str, Any] = {"classifiers": 9, "logits": 8, "columnar": 5, "lethe": 4, "crashes": 1}
    count |= {"by_module": {"eva": {"classifiers": 3, "logits": 2, "lethe": 2}}}
    sheet = models_table({"count": count, "table": [row, {**row, "name": "m", "kind": ""}]})
    assert [list(cells) for cells in sheet.rows] == [
        ["eva", "2 of 3", "2", "n (rotary)", "yes", "-", "", "", "crash"],
        ["", "", "", "m", "yes", "-", "", "", "crash"],
        ["all", "8 of 9", "4 of 5 columnar", "3 crashes", "2 of 2", "0 of 2", "0 of 2", "0 of 2", "0 of 2"],
    ]
