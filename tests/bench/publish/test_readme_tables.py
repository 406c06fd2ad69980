"""README and docs/results.md say what bench/results/ says, and a difference in any of them is noticed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness import plots
from bench.publish import tables
from bench.publish.pictures import PICTURES
from bench.publish.readme import IN_FULL, README, TABLES, Generator, Sheet
from bench.publish.readme_figures import FIGURES, Figure
from bench.publish.tables import RESULTS, Outcome, documents, load, run_tables, update
from engine.runtime.environment import ROOT

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents()}
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


# --- the documents of the repository ----------------------------------------------------------------------------------


def test_there_are_two_documents() -> None:
    assert documents() == [README, IN_FULL]


@pytest.mark.parametrize(("document", "tables"), [(README, 2), (IN_FULL, 14)])
def test_the_documents_are_up_to_date(document: str, tables: int) -> None:
    found = update(TEXTS[document], RESULTS, TABLES, FIGURES, document)
    assert not found.errors
    assert not found.differing, f"run `make tables`:\n{found.differing}"
    assert found.text == TEXTS[document]
    assert found.tables >= tables


@pytest.mark.parametrize(
    ("document", "figure", "wrong"),
    [
        (README, "| 57.9 | PASS |", "| 57.8 | PASS |"),
        (README, "984 ", "1,984 "),
        (IN_FULL, "4.95 ± 0.31", "4.94 ± 0.31"),
        (IN_FULL, "built in 12.7 s", "built in 12.6 s"),
        (IN_FULL, "7,802 MiB", "802 MiB"),
    ],
)
def test_one_changed_figure_is_noticed_and_brought_back(document: str, figure: str, wrong: str) -> None:
    text = TEXTS[document]
    assert text.count(figure) == 1
    found = update(text.replace(figure, wrong), RESULTS, TABLES, FIGURES, document)
    assert (len(found.differing), found.errors) == (1, [])
    assert found.text == text


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_to_files_and_headings_that_are_there(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", TEXTS[document])
    assert len(links) > 10
    for path, anchor in links:
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_picture_is_of_the_numbers() -> None:
    """It says in words what it shows; bytes may differ with the version of matplotlib."""
    with Image.open(RESULTS / "leaderboard-yardstick.png") as picture:
        found = picture.info["Description"]
    ((_, words),) = PICTURES["leaderboard-yardstick"](load(RESULTS / "leaderboard-yardstick.json"), plots.LIGHT)
    assert found == words, "draw it anew by `python -m bench plot`, see docs/results.md"


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
def test_all_that_is_said_of_a_file_depends_on_it(file: str, tmp_path: Path) -> None:
    for other in RESULTS.glob("*.json"):
        shutil.copy(other, tmp_path)
    content = load(RESULTS / file)
    if file == "mutation.json":
        content["rows"][0]["killed_by"] = None
    else:
        content = _otherwise(content)
        content.pop("settings", None)
    (tmp_path / file).write_text(json.dumps(content))
    names = {f"table {table.name}" for table in TABLES if file in table.files and table.document}
    names |= {f"figure {figure.name}" for figure in FIGURES if figure.file == file}
    outcomes = [update(text, tmp_path, TABLES, FIGURES, document) for document, text in TEXTS.items()]
    errors = {error.split(":")[0] for found in outcomes for error in found.errors}
    assert {name for found in outcomes for name in found.differing} | errors == names


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


def test_a_table_still_to_come_says_so_and_may_not_be_there_in_part(results: Path) -> None:
    coming = dataclasses.replace(SMALL, name="coming", files=("coming.json", "small.json"), expected=False)
    assert "README.md has no <!-- table coming -->" in outcome(TEXT, results, SMALL, coming).errors[0]
    marked = TEXT + "\n<!-- table coming -->\n<!-- end table -->\n"
    assert "coming.json is missing" in outcome(marked, results, SMALL, coming).errors[0]
    coming = dataclasses.replace(coming, files=("coming.json",))
    found = outcome(marked, results, SMALL, coming)
    assert list(found.differing) == ["table coming"]
    assert found.text.endswith("<!-- table coming -->\n\nNot measured yet.\n\n<!-- end table -->\n")
    assert clean(outcome(found.text, results, SMALL, coming))
    (results / "coming.json").write_text(json.dumps(REPORT))
    assert "Not measured yet" not in outcome(found.text, results, SMALL, coming).text


def test_each_document_has_its_own_tables_and_sentences_with_links_from_its_folder(results: Path) -> None:
    document = "docs/all/full.md"
    mine, moved = (dataclasses.replace(each, document=document) for each in (SMALL, SENTENCE))
    others = [dataclasses.replace(mine, name="other")], [dataclasses.replace(moved, text="not in README")]
    assert clean(update(TEXT, results, [SMALL, *others[0]], [SENTENCE, *others[1]], README))
    found = update(TEXT, results, [mine], [moved], document)
    assert not found.errors
    assert "([bench/results/small.json](../../bench/results/small.json))" in found.text
    (error,) = update(TEXT, results, [mine], [SENTENCE], README).errors
    assert error == f"README.md has <!-- table small -->, which belongs in {document}; move it, or take it out"
    page_alone = dataclasses.replace(SMALL, document=None)
    (error,) = update(TEXT, results, [page_alone], [], README).errors
    assert "belongs in no document" in error
    assert documents([page_alone, mine], [SENTENCE]) == [document, README]
    errors = update("<!-- end table -->", results, [mine], [moved], document).errors
    assert [error.count(document) for error in errors] == [1, 1, 1], errors


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
    (error,) = update(TEXTS[README], tmp_path, TABLES, FIGURES).errors
    assert "change the sentence" in error


def test_lethe_may_not_be_called_no_better_than_finetune_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    content = load(RESULTS / "leaderboard-yardstick.json")
    (entry,) = content["tasks"].values()
    (lethe,) = (found for found in entry["summary"] if found["method"] == "lethe")
    lethe["gap"]["mean"] = 0.1
    (tmp_path / "leaderboard-yardstick.json").write_text(json.dumps(content))
    (error,) = update(TEXTS[README], tmp_path, TABLES, FIGURES).errors
    assert "figure standing: leaderboard-yardstick.json has lethe better than finetune; change the sentence" in error


# --- the command ------------------------------------------------------------------------------------------------------


# A figure of each document, and the table that has it.
SHOWN = {README: ("| 57.9 | PASS |", "verdicts"), IN_FULL: ("7,802 MiB", "memory")}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", TEXTS)
def test_the_command_checks_or_rewrites_each_document(checkout: Path, document: str) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    (shown, table), file = SHOWN[document], checkout / document
    before = TEXTS[document].replace(shown, shown.replace("7", "6"))
    assert before != TEXTS[document]
    file.write_text(before)
    result = run(app, ["tables", "--check"])
    assert result.exit_code == 1
    assert f"{document}, table {table}: out of date; run `make tables`" in result.output
    assert shown.replace("7", "6") in result.output
    assert file.read_text() == before
    assert run(app, ["tables"]).exit_code == 0
    assert {name: (checkout / name).read_text() for name in TEXTS} == TEXTS
    result = run(app, ["tables", "--check"])
    assert (result.exit_code, result.output.count("agree")) == (0, 2)
    file.write_text(TEXTS[document].replace(f"<!-- table {table} -->", ""))
    assert run(app, ["tables"]).exit_code == 1  # an error is one without --check too


def test_what_is_not_a_checkout_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"README\.md: no such file"):
        run_tables(True, tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match=r"docs/results\.md: no such file"):
        run_tables(True, tmp_path)
