"""`python -m bench tables`: README.md and docs/results.md brought up to date with bench/results/, or compared with it.

A table stands between `<!-- table NAME -->` and `<!-- end table -->`, with the command that made it and a link below
it; everything between is rewritten. The figures in sentences are found by the words around them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.publish.readme import README, TABLES, Generator, Report, Sheet
from bench.publish.readme_figures import FIGURES, Figure
from engine.cli.console import console
from engine.errors import UserError
from engine.runtime.environment import ROOT
from engine.runtime.files import replacing

T = TypeVar("T")

RESULTS = ROOT / "bench" / "results"
REMEDY = "make tables"

_MARKER = re.compile(r"<!-- (table ([\w-]+)|end table) -->\n?")
_NUMBER = r"(\d(?:[\d.,]*\d)?(?:e-?\d+)?)"


@dataclasses.dataclass
class Outcome:
    """What a document should be: text. tables: those made. differing: a name with its diff. errors: one line each."""

    document: str
    text: str
    tables: int = 0
    differing: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)


def run_tables(
    check: bool, root: Path | None = None, results: Path = RESULTS, tables: Sequence[Generator] = TABLES,
    figures: Sequence[Figure] = FIGURES,
) -> bool:  # fmt: skip
    """Rewrites the documents, or with `check` only compares. False: something is wrong with one, and it was printed.

    root: the folder that the documents' names start from.
    """
    files = {name: (root or ROOT) / name for name in documents(tables, figures)}
    for path, name, what in [*((path, name, "to bring up to date") for name, path in files.items()),
                             (results, results.name, "with the results")]:  # fmt: skip
        if not path.exists():
            raise UserError(f"{name}: no such file or folder {what}; run it in a checkout of the repository")
    right = True
    for name, path in files.items():
        before = path.read_text(encoding="utf-8")
        found = update(before, results, tables, figures, name)
        for error in found.errors:
            console.print(error, soft_wrap=True, markup=False, highlight=False, style="red")
        for part, diff in found.differing.items():
            state = f"out of date; run `{REMEDY}`" if check else "brought up to date"
            console.print(f"{name}, {part}: {state}\n{diff}", soft_wrap=True, markup=False, highlight=False)
        if not check and found.text != before:
            with replacing(path) as temporary:
                temporary.write_text(found.text, encoding="utf-8")
        if not found.errors and not found.differing:
            sentences = sum(figure.document == name for figure in figures)
            console.print(f"{name}: {found.tables} tables and {sentences} sentences agree with {results.name}/")
        right = right and not found.errors and not (check and found.differing)
    return right


def documents(tables: Sequence[Generator] = TABLES, figures: Sequence[Figure] = FIGURES) -> list[str]:
    """Names, from the repository's root, of the files that hold the tables and figures."""
    named = [*(table.document for table in tables), *(figure.document for figure in figures)]
    return list(dict.fromkeys(name for name in named if name is not None))


def update(
    text: str, results: Path, tables: Sequence[Generator], figures: Sequence[Figure], document: str = README
) -> Outcome:
    """What a document should say; where something is missing, that part stays as it is and is an error."""
    outcome = Outcome(document, text)
    generators = {table.name: table for table in tables}
    pieces, end, there = [], 0, set()
    for name, start, stop in _places(outcome):
        marker = f"{document} has <!-- table {name} -->"
        if name not in generators:
            outcome.errors.append(f"{marker}, which no generator of bench/publish/readme.py makes")
        elif (home := generators[name].document) != document:
            outcome.errors.append(f"{marker}, which belongs in {home or 'no document'}; move it, or take it out")
        elif name in there:
            outcome.errors.append(f"{marker} twice")
        elif (made := _table(generators[name], results, outcome.errors)) is not None:
            pieces += [text[end:start], made]
            end = stop
            outcome.tables += 1
            if text[start:stop] != made:
                outcome.differing[f"table {name}"] = _diff(text[start:stop], made)
        there.add(name)
    outcome.text = "".join(pieces) + text[end:]
    for table in tables:
        if table.document == document and table.name not in there:
            outcome.errors.append(f"table {table.name}: {document} has no <!-- table {table.name} --> for it")
    for figure in figures:
        if figure.document == document:
            _update_figure(figure, results, outcome)
    return outcome


def _places(outcome: Outcome) -> list[tuple[str, int, int]]:
    """(name, start, end) of what lies between each pair of markers; what is not a pair is an error."""
    document, text, errors = outcome.document, outcome.text, outcome.errors
    places, opened = [], None
    for marker in _MARKER.finditer(text):
        name = marker[2]
        if name and opened:
            errors.append(f"{document} has <!-- table {opened[0]} --> without <!-- end table -->")
        elif not name and not opened:
            errors.append(f"{document} has an <!-- end table --> too many, before {text[marker.end() :][:40]!r}")
        if name:
            opened = (name, marker.end())
        elif opened:
            places.append((*opened, marker.start()))
            opened = None
    if opened:
        errors.append(f"{document} has <!-- table {opened[0]} --> without <!-- end table -->")
    return places


def load(path: Path) -> Report:
    """A result file. Raises UserError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{_shown(path)} is missing; run the command that makes it, or take it out") from None
    except ValueError as error:
        raise UserError(f"{_shown(path)} is no JSON ({error}); make it again") from None
    if isinstance(content, list):  # tests/mutation/mutation.py wrote its rows alone until it had a heading
        content = {"rows": content}
    return content


def _load_measured(path: Path) -> Report:
    report = load(path)
    if report.get("settings", {}).get("quick"):
        raise UserError(f"{_shown(path)} was made with --quick, whose numbers mean nothing; make it without")
    return report


def fitted(files: Sequence[str], make: Callable[..., T], *reports: Report) -> T:
    """make(*reports). Raises UserError where the reports do not have what it reads."""
    try:
        return make(*reports)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{', '.join(files)} does not have what is read there ({type(error).__name__}: {error}); make it again, or "
            "change what reads it"
        ) from error


def _shown(path: Path) -> str:
    """As a reader of the repository calls it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"{path.parent.name}/{path.name}"


def _table(table: Generator, results: Path, errors: list[str]) -> str | None:
    """The lines between the markers; None where they cannot be made, and why is among the errors."""
    if not table.expected and not any((results / file).exists() for file in table.files):
        return "\nNot measured yet.\n\n"
    try:
        reports = [_load_measured(results / file) for file in table.files]
        sheet = fitted(table.files, table.make, *reports)
    except UserError as error:
        errors.append(f"table {table.name}: {error}")
        return None
    command = reports[0].get("command") or table.command
    up = "../" * (table.document or README).count("/")  # a link is followed from the document's folder
    links = ", ".join(f"[bench/results/{file}]({up}bench/results/{file})" for file in table.files)
    return f"\n{sheet.markdown()}\n\n`{command}` ({links})\n\n"


def _update_figure(figure: Figure, results: Path, outcome: Outcome) -> None:
    literals = re.split(r"\{(\w+)\}", figure.text)
    pattern = "".join(
        _NUMBER if number % 2 else r"\s+".join(re.escape(word) for word in re.split(r"\s+", part))
        for number, part in enumerate(literals)
    )
    found = list(re.finditer(pattern, outcome.text))
    if len(found) != 1:
        outcome.errors.append(
            f"figure {figure.name}: {outcome.document} has its sentence {len(found)} times, expected once: "
            f"{figure.text!r}; put it back, or change FIGURES of bench/publish/readme_figures.py"
        )
        return
    try:
        values = fitted([figure.file], figure.values, _load_measured(results / figure.file))
    except UserError as error:
        outcome.errors.append(f"figure {figure.name}: {error}")
        return
    (match,) = found
    old, new, end = [], [], match.start()
    for number, name in enumerate(literals[1::2], 1):
        if match[number] != values[name]:
            old.append(f"{name} {match[number]}")
            new.append(f"{name} {values[name]}")
    if old:
        pieces = []
        for number, name in enumerate(literals[1::2], 1):
            pieces += [outcome.text[end : match.start(number)], values[name]]
            end = match.end(number)
        outcome.text = outcome.text[: match.start()] + "".join(pieces) + outcome.text[end:]
        outcome.differing[f"figure {figure.name}"] = f"- {', '.join(old)}\n+ {', '.join(new)}  ({figure.file})"


def _diff(old: str, new: str, most: int = 8) -> str:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))[2:]
    shown = [line for line in lines if not line.startswith("@@")]
    return "\n".join(shown[:most] + [f"... {len(shown) - most} lines more"] * (len(shown) > most))


def sheets_of(name: str, report: Report) -> list[tuple[Generator, Sheet]]:
    """The tables of one result file, by its name without .json; of a GPU's and a CPU's alike."""
    kind = kind_of(name)
    found = [table for table in TABLES if any(kind_of(file) == kind for file in table.files)]
    return [(table, fitted([f"{name}.json"], table.make, report)) for table in found]


def kind_of(name: str) -> str:
    """`kernels` of kernels-cpu.json and of kernels-cuda.json."""
    return re.sub(r"-(cpu|cuda)$", "", name.removesuffix(".json"))
