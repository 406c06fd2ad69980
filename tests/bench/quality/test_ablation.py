"""The ablations run end to end at toy size, and continue where they ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import tiny_vit

from bench.publish.sheets import ablation_table
from bench.quality.ablation import ACCELERATORS, ALL_STAGES, VARIANTS, run_ablation, table_rows
from engine.errors import UserError
from engine.models.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # runs of the engine, in processes of their own

QUICK = ["max_steps=1", "batch_size=16", "precision=fp32"]
PLUS = ["small_share=0", "max_steps=4", "lr=0.01", "augment=flip", "batch_size=16", "precision=fp32"]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(save_checkpoint(tiny_vit(seed=seed), tmp_path / str(seed))) for seed in range(3)]


def test_every_choice_of_lethe_plus_changes_its_result(models: list[str]) -> None:
    arguments = ("lethe_plus", models[0], "digits", "random:0.01@0", models[1:])
    report = run_ablation(*arguments, seeds=1, jobs=1, settings=PLUS, json_file=None)
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS["lethe_plus"])
    assert len({row["kl"] for row in report["rows"]}) == len(VARIANTS["lethe_plus"])
    assert {name for name, *_ in table_rows(report)} == set(VARIANTS["lethe_plus"])


def test_ways_to_train_less_are_measured_with_any_method(tmp_path: Path) -> None:
    models = [str(save_checkpoint(tiny_vit(seed=seed, depth=4), tmp_path / str(seed))) for seed in range(2)]
    arguments = (models[0], "digits", "random:0.01@0", models[1:])
    settings = ["batch_size=64", "precision=fp32", "retain_epochs=2", "lr=0.01", "stop_tolerance=0.99"]
    report = run_ablation("neg_grad_plus", *arguments, 1, 1, settings, None, accelerators=True)
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == list(ACCELERATORS)
    assert len({row["kl"] for row in rows.values()}) == len(rows)  # each does something, and something of its own
    images = {variant: row["images"] for variant, row in rows.items()}
    whole = images["default: all weights, all retained images"]
    assert images["the last three blocks"] == images["low-rank updates, rank 8"] == whole
    for choice in ("random", "hard", "near"):
        assert images[f"half of the retained images, {choice}"] == pytest.approx(0.5 * whole, rel=0.05)
    assert images["retained images pruned by SeTa"] < 0.95 * whole
    assert images["until forget samples look held out"] < 0.8 * whole
    assert all(row["seconds"] > 0 for row in rows.values())
    assert {stage for _, stage, *_ in table_rows(report)} == {ALL_STAGES}
    assert ablation_table(report).columns[:3] == ["variant", "seconds", "images"]
    with pytest.raises(UserError, match="unknown method 'nosuch'"):
        run_ablation("nosuch", *arguments, 1, 1, [], None, accelerators=True)


def test_ablation_runs_every_variant_and_goes_on_where_it_ended(models: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    arguments = ("lethe", models[0], "digits", "random:0.01@0", models[1:])
    report = run_ablation(*arguments, seeds=1, jobs=1, settings=QUICK, json_file=file)
    stages = [(row["variant"], row["stage"]) for row in report["rows"]]
    expected = [(variant, "retain") for variant in VARIANTS["lethe"]]
    expected += [(variant, "forget") for variant in VARIANTS["lethe"] if variant != "retain stage alone"]
    assert sorted(stages) == sorted(expected)
    # Variants differ in what they do, so their results do.
    gaps = {row["variant"]: (row["gap"], row["auc"]) for row in report["rows"] if row["stage"] == "retain"}
    assert len(set(gaps.values())) == len(VARIANTS["lethe"])
    cut = json.loads(file.read_text())
    cut["rows"] = [row for row in cut["rows"] if row["variant"] != "features"]
    file.write_text(json.dumps(cut))
    again = run_ablation(*arguments, seeds=1, jobs=1, settings=QUICK, json_file=file)
    again_rows, rows = ([{**row, "seconds": None} for row in each["rows"]] for each in (again, report))
    assert sorted(map(str, again_rows)) == sorted(map(str, rows))
    with pytest.raises(UserError, match="--method finetune: there are variants of lethe and lethe_plus; --acc"):
        run_ablation("finetune", *arguments[1:], seeds=1, jobs=1, settings=QUICK, json_file=None)
    with pytest.raises(UserError, match="ablation of another options"):
        run_ablation(*arguments, seeds=1, jobs=1, settings=["max_steps=2"], json_file=file)
