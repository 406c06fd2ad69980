"""README.md and the pages with results agree with bench/results/, and a difference in any of them is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness import plots
from bench.publish import tables, values
from bench.publish.pictures import PICTURES
from bench.publish.results import RESULTS, load
from bench.publish.sheet import Sheet
from bench.publish.sheets import TABLES, Table
from bench.publish.tables import TEMPLATES, differences, documents, render, run_tables
from engine.runtime.environment import ROOT

DOCUMENTS = ["README.md", "docs/evidence.md", "docs/results.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents()}
PAGES = [*sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")), "README.md"]


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    found, errors = values.values(RESULTS)
    assert not errors
    return found


# --- the documents of the repository ----------------------------------------------------------------------------------


def test_the_documents_are_those_with_a_template() -> None:
    assert sorted(documents()) == DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_documents_are_up_to_date(document: str, given: dict[str, Any]) -> None:
    differing = [
        f"{document}:{line}\n{diff}" for line, diff in differences(TEXTS[document], render(ROOT, document, given))
    ]
    assert not differing, "run `make tables`"


@pytest.mark.parametrize(
    ("document", "figure", "wrong"),
    [
        ("README.md", "| 61.2 ± 0.2 |", "| 61.1 ± 0.2 |"),
        ("README.md", "a step on 109,", "a step on 110,"),
        ("docs/evidence.md", "| 57.9 | PASS |", "| 57.8 | PASS |"),
        ("docs/evidence.md", "984 ", "1,984 "),
        ("docs/results.md", "4.95 ± 0.31", "4.94 ± 0.31"),
        ("docs/results.md", "built in 12.7 s", "built in 12.6 s"),
        ("docs/results.md", "7,802 MiB", "802 MiB"),
    ],
)
def test_one_changed_figure_is_found_at_its_line(
    document: str, figure: str, wrong: str, given: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = TEXTS[document]
    assert text.count(figure) == 1
    line = 1 + text[: text.index(figure)].count("\n")
    monkeypatch.setattr(tables, "values", lambda _: (given, []))
    shutil.copytree(ROOT / TEMPLATES, tmp_path / TEMPLATES)
    for name, content in TEXTS.items():
        (tmp_path / name).write_text(content.replace(figure, wrong) if name == document else content)
    assert not run_tables(True, tmp_path)
    output = capsys.readouterr().out
    assert f"{document}:{line}: out of date; run `make tables`; its text is in {TEMPLATES}/" in output
    assert output.count("out of date") == 1
    assert wrong in output
    assert wrong in (tmp_path / document).read_text()  # a check changes nothing
    assert run_tables(False, tmp_path)
    assert {name: (tmp_path / name).read_text() for name in TEXTS} == TEXTS
    assert run_tables(True, tmp_path)


class Watched(dict[str, Any]):
    """A dictionary that notes what is read from it, also in those that it holds."""

    def __init__(self, content: dict[str, Any], name: str, read: set[str]) -> None:
        super().__init__({
            key: Watched(value, f"{name}{key}.", read) if isinstance(value, dict) else value
            for key, value in content.items()
        })  # fmt: skip
        self.name, self.read = name, read

    def __getitem__(self, key: str) -> Any:
        self.read.add(f"{self.name}{key}")
        return super().__getitem__(key)


def test_every_value_stands_in_a_document(given: dict[str, Any]) -> None:
    read: set[str] = set()
    for document in DOCUMENTS:
        # What jinja is given at the top it copies into a dictionary of its own.
        render(ROOT, document, {name: Watched(part, f"{name}.", read) for name, part in given.items()})
    figures = {f"{name}.{key}" for name in values.FIGURES for key in given[name]}
    assert figures - read == set()
    shown = {f"tables.{name}" for name in TABLES} - {"tables.retrain-cost"}  # which is on the page of results alone
    assert {name for name in read if re.fullmatch(r"tables\.[^.]+", name)} == shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_figure_is_typed_in_a_template(document: str, given: dict[str, Any]) -> None:
    """Only figures with a point, or long ones, are searched: `256` may mean anything."""
    template = (ROOT / TEMPLATES / documents()[document]).read_text(encoding="utf-8")
    figures = {f"{name}.{key}": value for name in values.FIGURES for key, value in given[name].items()}
    numbers = set(re.findall(r"\d(?:[\d.,]*\d)?(?:e-?\d+)?", template))
    telling = {name: value for name, value in figures.items() if "." in value or len(value) > 5}
    assert {name: value for name, value in telling.items() if value in numbers} == {}


def _anchors(text: str) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    for path, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", (ROOT / page).read_text(encoding="utf-8")
    ):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_readme_is_short_and_its_picture_small() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert (ROOT / "docs" / "assets" / "report.png").stat().st_size <= 300_000
    summary = TABLES["summary"].make(load(RESULTS / "leaderboard-yardstick.json"))
    assert (len(summary.columns), len(summary.rows)) == (5, 5)


def test_the_picture_is_of_the_numbers() -> None:
    """Its description has the numbers; bytes may differ with the version of matplotlib."""
    with Image.open(RESULTS / "leaderboard-yardstick.png") as picture:
        found = picture.info["Description"]
    ((_, words),) = PICTURES["leaderboard-yardstick"](load(RESULTS / "leaderboard-yardstick.json"), plots.LIGHT)
    assert found == words, "draw it anew by `python -m bench plot`, see docs/results.md"


# --- what is made of the files ----------------------------------------------------------------------------------------


def _otherwise(value: Any) -> Any:
    """The same file from a run that went otherwise: other numbers, other verdicts, names as they were."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 3 + 1
    if isinstance(value, list):
        return [_otherwise(each) for each in value]
    return {key: _otherwise(each) for key, each in value.items()} if isinstance(value, dict) else value


USED = sorted(
    {file for table in TABLES.values() for file in table.files} | {file for file, _ in values.FIGURES.values()}
)
# Figures that count or order entries, which other numbers leave as they are.
COUNTS = {
    "yardstick.references", "yardstick.place", "yardstick.lethe_place", "yardstick.methods", "yardstick_alone.seeds",
    "yardstick_alone.least", "yardstick_alone.most", "yardstick_alone.whole", "chaos.runs", "chaos.before",
    "chaos.after", "mutation.planted", "compiled.kernels", "timm_models.tried", "agreement.models",
    "agreement.impostors", "agreement.by_references",
}  # fmt: skip


def _leaves(found: dict[str, Any]) -> dict[str, Any]:
    made = {f"table {name}": table["markdown"] for name, table in found["tables"].items()}
    parts = {name: part for name, part in found.items() if name != "tables"}
    return made | {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


@pytest.mark.parametrize("file", USED)
def test_every_figure_of_a_file_depends_on_it(file: str, tmp_path: Path) -> None:
    for other in RESULTS.glob("*.json"):
        (tmp_path / other.name).symlink_to(other)
    before = _leaves(values.values(tmp_path, file)[0])
    content = load(RESULTS / file)
    if file == "mutation.json":
        content["rows"][0]["killed_by"] = None
    elif file == "models.json":
        content["table"] = [{**row, "lethe": "crash", "lethe_plus": "crash"} for row in content["table"]]
    else:
        kept = {key: content[key] for key in ("full_disk", "settings") if key in content}
        content = {**_otherwise(content), **kept}
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(content))
    found, errors = values.values(tmp_path, file)
    after, failed = _leaves(found), {error.split(":")[0] for error in errors}
    same = {name for name, value in before.items() if after.get(name) == value}
    assert same <= COUNTS, same - COUNTS
    assert {name for name in before if name not in after and name.split(".")[0] not in failed} == set()


@pytest.mark.parametrize(
    ("file", "key", "error"),
    [
        ("two-hosts.json", "passed", "two_hosts: two-hosts.json did not pass; change the sentence"),
        ("chaos.json", "full_disk", "chaos: chaos.json has no full disk after which the result was the same; change"),
    ],
)
def test_a_sentence_that_is_no_longer_true_is_an_error(file: str, key: str, error: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps({**load(RESULTS / file), key: {}}))
    (line,) = values.values(tmp_path, file)[1]
    assert line.startswith(error)


def test_lethe_may_not_be_called_no_better_than_finetune_if_it_is(tmp_path: Path) -> None:
    content = load(RESULTS / "leaderboard-yardstick.json")
    (entry,) = content["tasks"].values()
    (lethe,) = (found for found in entry["summary"] if found["method"] == "lethe")
    lethe["gap"]["mean"] = 0.1
    (tmp_path / "leaderboard-yardstick.json").write_text(json.dumps(content))
    errors = values.values(tmp_path, "leaderboard-yardstick.json")[1]
    assert errors == ["yardstick: leaderboard-yardstick.json has lethe better than finetune; change the sentence"]


# --- a checkout with two small documents ------------------------------------------------------------------------------

REPORT = {"command": "python -m bench x", "rows": [{"name": "a", "seconds": 1.5}, {"name": "b", "seconds": 2.25}]}
TEXT = """# Title

| name | seconds |
| --- | --- |
| a | 1.5 |
| **b** | 2.25 |

`python -m bench x` ([bench/results/small.json](bench/results/small.json))

The fastest takes 1.5 s
of 3.75 s.
"""
TEMPLATE = """{% from "table.j2" import table with context %}
# Title

{{ table("small") }}

The fastest takes {{ fastest.least }} s
of {{ fastest.all }} s.
"""


def _small(report: dict[str, Any]) -> Sheet:
    rows = [[row["name"], f"{row['seconds']:g}"] for row in report["rows"]]
    return Sheet(columns=["name", "seconds"], rows=rows, marked=frozenset({1}))


def _fastest(report: dict[str, Any]) -> dict[str, str]:
    seconds = [row["seconds"] for row in report["rows"]]
    return {"least": f"{min(seconds):g}", "all": f"{sum(seconds):g}"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md and docs/full.md of one template, up to date."""
    (tmp_path / TEMPLATES).mkdir(parents=True)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / TEMPLATES / "table.j2", tmp_path / TEMPLATES)
    for name, text in (("README", TEXT), ("docs/full", TEXT.replace("(bench", "(../bench"))):
        (tmp_path / TEMPLATES / f"{Path(name).name}.md.j2").write_text(TEMPLATE)
        (tmp_path / f"{name}.md").write_text(text)
    (tmp_path / "results" / "small.json").write_text(json.dumps(REPORT))
    small = Table(files=("small.json",), make=_small, command="not this one")
    monkeypatch.setattr(values, "TABLES", {"small": small})
    monkeypatch.setattr(values, "FIGURES", {"fastest": ("small.json", _fastest)})
    return tmp_path


def check(root: Path) -> bool:
    return run_tables(True, root, root / "results")


def test_a_table_has_its_command_and_a_link_from_the_documents_folder(checkout: Path) -> None:
    assert check(checkout)


def test_a_changed_file_is_found_in_both_documents_and_brings_them_up_to_date(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**REPORT, "rows": [{"name": "a", "seconds": 1.75}, {"name": "b", "seconds": 2.25}]}
    (checkout / "results" / "small.json").write_text(json.dumps(changed))
    assert not check(checkout)
    output = capsys.readouterr().out
    for document in ("README.md", "docs/full.md"):
        assert f"{document}:5: out of date" in output
        assert f"{document}:10: out of date" in output
    assert "- | a | 1.5 |\n+ | a | 1.75 |\n" in output
    assert run_tables(False, checkout, checkout / "results")
    assert "The fastest takes 1.75 s\nof 4 s." in (checkout / "README.md").read_text()
    assert check(checkout)


def test_a_file_without_a_command_has_the_tables(checkout: Path) -> None:
    (checkout / "results" / "small.json").write_text(json.dumps(REPORT["rows"]))  # a file of rows alone, too
    run_tables(False, checkout, checkout / "results")
    assert "`not this one` ([bench/results/small.json]" in (checkout / "README.md").read_text()


def test_a_document_that_is_missing_is_out_of_date_and_made(checkout: Path) -> None:
    (checkout / "README.md").unlink()
    assert not check(checkout)
    assert run_tables(False, checkout, checkout / "results")
    assert (checkout / "README.md").read_text() == TEXT


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "small.json is missing"),
        ("{", "small.json is no JSON"),
        (json.dumps({**REPORT, "settings": {"quick": True}}), "small.json was made with --quick"),
        (json.dumps({"command": "x"}), "small.json lacks a value that the documents need (KeyError: 'rows')"),
    ],
)
def test_files_that_are_missing_or_of_no_use_are_errors(
    checkout: Path, content: str | None, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "README.md").write_text("stays")
    if content is None:
        (checkout / "results" / "small.json").unlink()
    else:
        (checkout / "results" / "small.json").write_text(content)
    assert not run_tables(False, checkout, checkout / "results")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fastest", "table small"]
    assert all(error in line for line in lines)
    assert (checkout / "README.md").read_text() == "stays"


@pytest.mark.parametrize(
    ("line", "wrong", "error"),
    [
        ('{{ table("small") }}', '{{ table("smell") }}', "README.md.j2:4: 'dict object' has no attribute 'smell'"),
        ("{{ fastest.all }}", "{{ fastest.al }}", "README.md.j2:7: 'dict object' has no attribute 'al'"),
        ("{{ fastest.all }}", "{{ fastest.all }", "README.md.j2:7: unexpected '}'"),
        ("# Title", "{{ titel }}", "README.md.j2:2: 'titel' is undefined"),
    ],
)
def test_a_template_with_an_error_is_named_with_its_line_and_its_document_stays(
    checkout: Path, line: str, wrong: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TEMPLATE.count(line) == 1
    (checkout / TEMPLATES / "README.md.j2").write_text(TEMPLATE.replace(line, wrong))
    (checkout / "docs" / "full.md").write_text("old")
    assert not run_tables(False, checkout, checkout / "results")
    assert f"{TEMPLATES}/{error}" in capsys.readouterr().out
    assert (checkout / "README.md").read_text() == TEXT
    assert (checkout / "docs" / "full.md").read_text() != "old"


def test_long_differences_are_cut(checkout: Path) -> None:
    ((line, diff),) = differences("a\n", "a\n" + "b\n" * 20)
    assert (line, diff.splitlines()[-1], len(diff.splitlines())) == (2, "... 12 lines more", 9)
    assert list(differences("a\nb\n", "a\nb\n")) == []


def test_the_command_exits_with_1_if_a_document_is_out_of_date(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "run_tables", lambda check: run_tables(check, checkout, checkout / "results"))
    (checkout / "README.md").write_text(TEXT.replace("3.75 s", "3.85 s"))
    result = CliRunner().invoke(app, ["tables", "--check"])
    assert (result.exit_code, "- of 3.85 s.\n+ of 3.75 s.\n" in result.output) == (1, True)
    assert CliRunner().invoke(app, ["tables"]).exit_code == 0
    result = CliRunner().invoke(app, ["tables", "--check"])
    assert (result.exit_code, result.output.count("up to date")) == (0, 2)


def test_what_is_not_a_checkout_is_wrong_use(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(ValueError, match=r"docs/templates: no such folder"):
        run_tables(True, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"nothing: no such folder with the results"):
        run_tables(True, checkout, tmp_path / "nothing")


def test_cells_cannot_end_a_column() -> None:
    assert Sheet(columns=["a|b", "c"], rows=[["|d|", "e"]]).markdown().splitlines()[::2] == [
        "| a\\|b | c |",
        "| \\|d\\| | e |",
    ]
