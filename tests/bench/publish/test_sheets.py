"""What the tables of the documents make of a result file."""

from __future__ import annotations

from typing import Any

import pytest

from bench.publish.results import RESULTS, kind_of, load
from bench.publish.sheets import (
    equality_table,
    leaderboard_table,
    peers_table,
    projection_table,
    retrain_cost_table,
    scaling_table,
    sheets_of,
    summary_table,
    train_table,
)


def test_ranks_that_are_alike_in_every_figure_are_one_row() -> None:
    def row(case: str, loss: float, points: float = 0.0, precision: str = "fp32") -> dict[str, Any]:
        return {"case": case, "precision": precision, "tensor": 2.51e-6, "weight": 1e-5, "loss": loss, "points": points}

    rows = [row("one process", 0), row("DeepSpeed, one process", 1e-6), row("two ranks, zero1", 4e-6)]
    rows += [row("two ranks, zero2", 4e-6), row("two ranks, zero3", 4e-6, 0.5), row("two ranks, zero3", 9, 0, "bf16")]
    assert equality_table({"rows": rows}).rows == [
        ["DeepSpeed, one process", "2.5e-6", "1.0e-5", "1.0e-6", "equal"],
        ["two ranks, ZeRO-1 and ZeRO-2", "2.5e-6", "1.0e-5", "4.0e-6", "equal"],
        ["two ranks, ZeRO-3", "2.5e-6", "1.0e-5", "4.0e-6", "0.50 points"],
    ]


def test_training_steps_are_charged_with_their_preparation() -> None:
    def row(name: str, **facts: Any) -> dict[str, Any]:
        return {"contender": name, "status": "measured", "batch": 8, "median": 2.0, "prepare_a_step": 0.0, **facts}

    ours = row(
        "ours", median=0.5, prepare_a_step=0.3, mfu=0.404,
        times_with_prepare={"best plain fp32": [2.0, 9.0, 2.5], "best plain bf16": [1.2]},
    )  # fmt: skip
    rows = [
        ours,
        row("ours, compiled", status="failed"),
        row("plain a"),
        row("plain b", median=4.0),
        row("SalUn's loop"),
    ]
    case = {"case": "forget", "best": {"best plain fp32": "plain b", "best plain bf16": "plain a"}, "rows": rows}
    (cells,) = train_table({"cases": [case]}).rows
    assert cells == ["forget", "10.0", "failed", "2.0", "4.0", "4.0", "-", "2.50", "1.20", "40%"]


def test_costs_of_retraining_and_what_they_project_to() -> None:
    def spread(mean: float) -> dict[str, float]:
        return {"mean": mean, "half_range": mean / 10}

    found: dict[str, Any] = {
        "method": "lethe", "seeds": 3, "seconds": spread(100), "share": spread(0.25), "gap": spread(5), "collapsed": 0,
        "gap_to_floor": None, "forget": spread(0.6), "test": spread(0.5), "efficacy": spread(0.4), "agreement": None,
    }  # fmt: skip
    untouched = {
        "accuracy": {"forget": 0.9, "test": 0.55}, "mia": {"efficacy": 0.2}, "gap": {"average": 12.0},
        "gap_to_floor": 6.0, "agreement": 0.7,
    }  # fmt: skip
    rows = [
        {"method": method, "seed": seed, "samples_seen": {"forget": images, "retain": 100}}
        for seed, images in ((0, 20), (1, 60))
        for method, images in (("lethe", images), ("retrain", 300))
    ]
    task = {"untouched": untouched, "summary": [found, {**found, "method": "retrain"}], "rows": rows}
    sheet = retrain_cost_table({"tasks": {"digits": task}})
    assert [list(row) for row in sheet.rows[::2]] == [
        ["digits, lethe", "3", "100.0 ± 10.0", "25.0 ± 2.5%", "35.0 ± 5.0%", "5.00 ± 0.50", "-", "-", "60.0 ± 6.0",
         "50.0 ± 5.0", "40.0 ± 4.0", "0"],
        ["digits, untouched", "-", "-", "-", "-", "12.00", "6.0", "70.0", "90.0", "55.0", "20.0", "-"],
    ]  # fmt: skip
    assert sheet.marked == {0}
    assert not {"retain", "score"} & set(sheet.columns), "no column of what no row has"
    hours = {
        "work": "lethe",
        "recipe": None,
        "device_hours": 1234.56,
        "share": {"DeiT": 0.031},
        "kwh": None,
        "money": 9.0,
    }
    projection = {"model": "ViT-S/16 224", "precision": "bf16", "hours": [hours]}
    assert projection_table({"projection": [projection]}).rows == [
        ["ViT-S/16 224, lethe", "bf16", "1,234.6", "3.1% of DeiT", "-", "9.0"]
    ]


def test_a_leaderboard_has_the_smallest_gap_first_and_no_spread_of_one_seed() -> None:
    def entry(method: str, gap: float | None, seeds: int) -> dict[str, Any]:
        found = None if gap is None else {"mean": gap, "half_range": 0.25}
        return {"method": method, "seeds": seeds, "gap": found, "share": {"mean": 0.5, "half_range": 0}, "collapsed": 0}

    summary = [entry("ssd", 9, 3), entry("new", None, 1), entry("lethe_plus", 2, 1), entry("lethe", 4, 3)]
    untouched = {"gap": {"average": 5.0}, "accuracy": {"retain": 0.84}, "score": 7.25}
    rows = [
        {"method": method, "seed": 0, "samples_seen": {"retain": images}}
        for method, images in (("lethe_plus", 30), ("lethe", 80), ("retrain", 100))
    ]
    task = {"untouched": untouched, "summary": summary, "rows": rows}
    sheet = leaderboard_table({"tasks": {"a": task, "b": task}})
    assert sheet.columns == [
        "task, method",
        "seeds",
        "of retrain",
        "images",
        "average gap",
        "retain",
        "score",
        "collapsed",
    ]
    assert [list(row) for row in sheet.rows[:5]] == [
        ["a, lethe_plus", "1", "50.0%", "30.0%", "2.00", "-", "-", "0"],
        ["a, lethe", "3", "50.0 ± 0.0%", "80.0 ± 0.0%", "4.00 ± 0.25", "-", "-", "0"],
        ["a, untouched", "-", "-", "-", "5.00", "84.0", "7.25", "-"],
        ["a, ssd", "3", "50.0 ± 0.0%", "-", "9.00 ± 0.25", "-", "-", "0"],
        ["a, new", "1", "50.0%", "-", "-", "-", "-", "0"],
    ]
    assert sheet.rows[5][0] == "b, lethe_plus"
    assert sheet.marked == {0, 1, 5, 6}
    summary = summary_table({"tasks": {"a": task}})
    assert [list(row) for row in summary.rows] == [
        ["lethe_plus", "2.00", "-", "-", "30.0%"],
        ["lethe", "4.00 ± 0.25", "-", "-", "80.0 ± 0.0%"],
    ]
    assert summary.marked == {0, 1}
    with pytest.raises(ValueError, match="too many values"):
        summary_table({"tasks": {"a": task, "b": task}})


def test_peers_of_one_seed_have_no_spread() -> None:
    mean = {"mean": 0.5, "half_range": 0.125}
    side = dict.fromkeys(("gap", "forget", "test", "efficacy", "agreement", "seconds"), mean)
    found = {
        "method": "ssd", "library": "l", "setting": "equal", "ours": side, "theirs": side, "verdict": "v", "times": mean
    }  # fmt: skip
    comparisons = [{**found, "seeds": seeds} for seeds in (1, 2)]
    one, two = peers_table({"tasks": {"digits": {"comparisons": comparisons}}}).rows
    assert [one[column] for column in (2, 3, 4, -1)] == ["1", "0.50", "0.50", "0.50"]
    assert [two[column] for column in (2, 3, 4, -1)] == ["2", *["0.50 ± 0.12"] * 3]


def test_a_curve_reads_look_where_it_is_not_within() -> None:
    curve = {
        "name": "rollout", "quantity": "seconds", "variable": "tokens N", "labels": ["64 px", "96 px", "128 px"],
        "exponent": 1.996, "uncertainty": 0.1, "exponent_of_largest_two": 2.4, "expected": 2, "tolerance": 0.25,
        "within": False,
    }  # fmt: skip
    (cells,) = scaling_table({"curves": [curve]}).rows
    assert cells == ["rollout: seconds by tokens N", "64 px to 128 px", "2.00 ± 0.10", "2.40", "2.00 ± 0.25", "LOOK"]


def test_tables_of_a_gpu_are_those_of_a_cpu() -> None:
    assert [kind_of(name) for name in ("kernels-cpu.json", "kernels-cuda", "kernels-compile.json", "memory-bf16")] == [
        "kernels", "kernels", "kernels-compile", "memory-bf16"
    ]  # fmt: skip
    assert list(sheets_of("kernels-cuda", load(RESULTS / "kernels-cpu.json"))) == ["kernels-masks", "kernels-info-nce"]
    assert list(sheets_of("leaderboard-yardstick", load(RESULTS / "leaderboard-yardstick.json"))) == [
        "leaderboard-yardstick"  # the summary would be the same again
    ]
    assert sheets_of("chaos", {}) == {}
