"""README says what bench/results/ says, and a difference in either is noticed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import tables
from bench.__main__ import app
from bench.readme import (
    TABLES,
    Generator,
    Sheet,
    equality_table,
    projection_table,
    retrain_cost_table,
    scaling_table,
    train_table,
)
from bench.readme_figures import FIGURES, Figure
from bench.tables import RESULTS, Outcome, kind_of, load, run_tables, sheets_of, update
from engine.environment import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = {"command": "python -m bench x", "rows": [{"name": "a", "seconds": 1.5}, {"name": "b", "seconds": 2.25}]}
TEXT = """# Title

<!-- table small -->

| name | seconds |
| --- | --- |
| a | 1.5 |
| **b** | 2.25 |

`python -m bench x` ([bench/results/small.json](bench/results/small.json))

<!-- end table -->

The fastest takes 1.5 s
of 3.75 s.
"""


def _small(report: dict[str, Any]) -> Sheet:
    rows = [[row["name"], f"{row['seconds']:g}"] for row in report["rows"]]
    return Sheet(columns=["name", "seconds"], rows=rows, marked=frozenset({1}))


SMALL = Generator(name="small", files=("small.json",), make=_small, command="not this one")
SENTENCE = Figure(
    name="fastest",
    file="small.json",
    text="The fastest takes {least} s of {all} s",
    values=lambda report: {
        "least": f"{min(row['seconds'] for row in report['rows']):g}",
        "all": f"{sum(row['seconds'] for row in report['rows']):g}",
    },
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.json").write_text(json.dumps(REPORT))
    return tmp_path / "results"


def outcome(text: str, results: Path, *generators: Generator, figures: tuple[Figure, ...] = (SENTENCE,)) -> Outcome:
    return update(text, results, generators or (SMALL,), figures)


def clean(found: Outcome) -> bool:
    return not found.errors and not found.differing


# --- the README of the repository -------------------------------------------------------------------------------------


def test_readme_is_up_to_date() -> None:
    found = update(README, RESULTS, TABLES, FIGURES)
    assert not found.errors
    assert not found.differing, f"run `make tables`:\n{found.differing}"
    assert found.text == README
    assert found.tables >= 7


@pytest.mark.parametrize(
    ("figure", "wrong"),
    [("| 4.95 |", "| 4.94 |"), ("built in 12.7 s", "built in 12.6 s"), ("7,802 MiB", "802 MiB"), ("984 ", "1,984 ")],
)
def test_one_changed_figure_is_noticed_and_brought_back(figure: str, wrong: str) -> None:
    assert README.count(figure) == 1
    found = update(README.replace(figure, wrong), RESULTS, TABLES, FIGURES)
    assert (len(found.differing), found.errors) == (1, [])
    assert found.text == README


def _otherwise(value: Any) -> Any:
    """The same file from a run that went otherwise: other numbers, other verdicts, names as they were."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 3 + 1
    if isinstance(value, list):
        return [_otherwise(each) for each in value]
    return {key: _otherwise(each) for key, each in value.items()} if isinstance(value, dict) else value


USED = {file for table in TABLES for file in table.files} | {figure.file for figure in FIGURES}


@pytest.mark.parametrize("file", sorted(file for file in USED if (RESULTS / file).is_file()))
def test_all_that_readme_says_of_a_file_depends_on_it(file: str, tmp_path: Path) -> None:
    for other in RESULTS.glob("*.json"):
        shutil.copy(other, tmp_path)
    content = load(RESULTS / file)
    if file == "mutation.json":
        content["rows"][0]["killed_by"] = None
    else:
        content = _otherwise(content)
        content.pop("settings", None)
    (tmp_path / file).write_text(json.dumps(content))
    found = update(README, tmp_path, TABLES, FIGURES)
    names = {f"table {table.name}" for table in TABLES if file in table.files}
    names |= {f"figure {figure.name}" for figure in FIGURES if figure.file == file}
    errors = {error.split(":")[0] for error in found.errors}
    assert set(found.differing) | errors == names


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_with_its_command_and_link_is_up_to_date(results: Path) -> None:
    found = outcome(TEXT, results)
    assert clean(found), found
    assert found.text == TEXT


@pytest.mark.parametrize(("old", "new"), [("| 2.25 |", "| 2.26 |"), ("bench x`", "bench y`"), ("**b**", "b")])
def test_a_table_that_differs_is_named_with_its_difference(results: Path, old: str, new: str) -> None:
    found = outcome(TEXT.replace(old, new), results)
    assert found.text == TEXT
    assert not found.errors
    (diff,) = found.differing.values()
    assert list(found.differing) == ["table small"]
    removed, added = diff.splitlines()
    assert removed.startswith("-")
    assert new in removed
    assert added.startswith("+")
    assert old in added


def test_a_changed_file_is_noticed(results: Path) -> None:
    changed = {**REPORT, "rows": [{"name": "a", "seconds": 1.75}, {"name": "b", "seconds": 2.25}]}
    (results / "small.json").write_text(json.dumps(changed))
    found = outcome(TEXT, results)
    assert list(found.differing) == ["table small", "figure fastest"]
    assert "| a | 1.75 |" in found.text
    assert "The fastest takes 1.75 s\nof 4 s." in found.text
    assert found.differing["figure fastest"] == "- least 1.5, all 3.75\n+ least 1.75, all 4  (small.json)"


def test_a_file_without_a_command_has_the_generators(results: Path) -> None:
    (results / "small.json").write_text(json.dumps(REPORT["rows"]))  # a file of rows alone, too
    assert "`not this one` ([bench/results/small.json]" in outcome(TEXT, results).text


def _drop(start: str, text: str = TEXT) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith(start))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (_drop("<!-- table"), "table small: README.md has no <!-- table small --> for it"),
        (_drop("<!-- end"), "README.md has <!-- table small --> without <!-- end table -->"),
        (TEXT + "<!-- end table -->\n", "README.md has an <!-- end table --> too many"),
        (TEXT + TEXT.split("The fastest")[0], "README.md has <!-- table small --> twice"),
        (TEXT.replace("table small", "table smell"), "README.md has <!-- table smell -->, which no generator"),
        (_drop("<!-- end") + TEXT.split("The fastest")[0], "<!-- table small --> without <!-- end table -->"),
    ],
)
def test_markers_that_are_missing_or_too_many_are_errors(results: Path, text: str, error: str) -> None:
    assert any(error in found for found in outcome(text, results).errors), outcome(text, results).errors


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "small.json is missing"),
        ("{", "small.json is no JSON"),
        (json.dumps({**REPORT, "settings": {"quick": True}}), "small.json was made with --quick"),
        (json.dumps({"command": "x"}), "small.json does not have what is read there (KeyError: 'rows')"),
    ],
)
def test_files_that_are_missing_or_of_no_use_are_errors(results: Path, content: str | None, error: str) -> None:
    if content is None:
        (results / "small.json").unlink()
    else:
        (results / "small.json").write_text(content)
    found = outcome(TEXT, results)
    assert [line.split(":")[0] for line in found.errors] == ["table small", "figure fastest"]
    assert all(error in line for line in found.errors)
    assert found.text == TEXT  # what cannot be made stays


def test_a_table_still_to_come_may_be_missing_altogether_and_not_in_part(results: Path) -> None:
    coming = dataclasses.replace(SMALL, name="coming", files=("coming.json",), expected=False)
    assert clean(outcome(TEXT, results, SMALL, coming))
    marked = TEXT + "\n<!-- table coming -->\n<!-- end table -->\n"
    assert "coming.json is missing" in outcome(marked, results, SMALL, coming).errors[0]
    (results / "coming.json").write_text(json.dumps(REPORT))
    assert "README.md has no <!-- table coming -->" in outcome(TEXT, results, SMALL, coming).errors[0]
    assert list(outcome(marked, results, SMALL, coming).differing) == ["table coming"]


def test_cells_cannot_end_a_column() -> None:
    assert Sheet(columns=["a|b", "c"], rows=[["|d|", "e"]]).markdown().splitlines()[::2] == [
        "| a\\|b | c |",
        "| \\|d\\| | e |",
    ]


# --- figures in sentences ---------------------------------------------------------------------------------------------


def test_a_figure_is_found_over_the_end_of_a_line_and_nothing_else_is_touched(results: Path) -> None:
    text = TEXT.replace("1.5 s\nof 3.75 s.", "9 s\nof 1,234.5 s. Of 3.75 others").replace("# Title", "# 9 of 1,234.5")
    found = outcome(text, results)
    assert list(found.differing) == ["figure fastest"]
    assert found.text == text.replace("9 s\nof 1,234.5 s.", "1.5 s\nof 3.75 s.")


@pytest.mark.parametrize("text", [TEXT.replace("The fastest", "A fast one"), TEXT + "The fastest takes 1.5 s of 3 s."])
def test_a_sentence_that_is_gone_or_there_twice_is_an_error(results: Path, text: str) -> None:
    (error,) = outcome(text, results).errors
    assert error.startswith("figure fastest: README.md has its sentence")


@pytest.mark.parametrize(("file", "key"), [("two-hosts.json", "passed"), ("chaos.json", "full_disk")])
def test_a_sentence_that_is_no_longer_true_is_an_error(file: str, key: str, tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(json.dumps({**load(RESULTS / file), key: {}}))
    (error,) = update(README, tmp_path, TABLES, FIGURES).errors
    assert "change the sentence" in error


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "README.md").write_text(README.replace("| 4.95 |", "| 3.95 |"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path / "README.md"


def test_the_command_checks_or_rewrites(checkout: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    before = checkout.read_text()
    result = run(app, ["tables", "--check"])
    assert result.exit_code == 1
    assert "table yardstick-quality: out of date; run `make tables`" in result.output
    assert "3.95" in result.output
    assert checkout.read_text() == before
    assert run(app, ["tables"]).exit_code == 0
    assert checkout.read_text() == README
    result = run(app, ["tables", "--check"])
    assert (result.exit_code, "agree" in result.output) == (0, True)
    checkout.write_text(README.replace("<!-- table memory -->", ""))
    assert run(app, ["tables"]).exit_code == 1  # an error is one without --check too


def test_what_is_not_a_checkout_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"README\.md: no such file"):
        run_tables(True, tmp_path / "README.md")


# --- generators -------------------------------------------------------------------------------------------------------


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
        "accuracy": {"forget": 0.9, "test": 0.55}, "mia": {"efficacy": 0.2}, "gap": {"average": 12.0}, "agreement": 0.7
    }  # fmt: skip
    task = {"untouched": untouched, "noise_floor": 2.0, "summary": [found, {**found, "method": "retrain"}]}
    sheet = retrain_cost_table({"tasks": {"digits": task}})
    assert [list(row) for row in sheet.rows[::2]] == [
        ["digits, lethe", "3", "100.0 ± 10.0", "25.0 ± 2.5%", "5.00 ± 0.50", "-", "60.0 ± 6.0", "50.0 ± 5.0",
         "40.0 ± 4.0", "-", "0"],
        ["digits, untouched", "-", "-", "-", "12.00", "6.0", "90.0", "55.0", "20.0", "70.0", "-"],
    ]  # fmt: skip
    assert sheet.marked == {0}
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
    names = [table.name for table, _ in sheets_of("kernels-cuda", load(RESULTS / "kernels-cpu.json"))]
    assert names == ["kernels-masks", "kernels-info-nce"]
    assert sheets_of("chaos", {}) == []
