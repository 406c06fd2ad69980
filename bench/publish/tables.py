"""`python -m bench tables`: render README.md and pages of docs/ from docs/templates/ and bench/results/, or compare.

docs/templates/README.md.j2 makes README.md, any other NAME.md.j2 there makes docs/NAME.md. The templates have the text,
`bench.publish.values` has the numbers.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from bench.publish.results import RESULTS
from bench.publish.values import values
from engine.cli.console import console
from engine.errors import UserError
from engine.runtime.environment import ROOT
from engine.runtime.files import replacing

TEMPLATES = "docs/templates"
_SUFFIX = ".md.j2"
_MOST_LINES = 8


def run_tables(check: bool, root: Path | None = None, results: Path = RESULTS) -> bool:
    """Render the documents, or with `check` only compare them.

    Args:
        root: Folder that holds the templates and the documents; default: the repository.
        results: Folder of the result files.

    Returns:
        Whether all is well: nothing was missing and, with `check`, every document was up to date.

    Raises:
        UserError: There are no templates or no results.
    """
    root = root or ROOT
    names = documents(root)
    if not results.is_dir():
        raise UserError(f"{results}: no such folder with the results; run it in a checkout of the repository")
    given, errors = values(results)
    for error in errors:
        _print(error, style="red")
    if errors:
        return False
    texts: dict[str, str] = {}
    for document, template in names.items():
        try:
            texts[document] = render(root, document, given)
        except jinja2.TemplateError as error:
            _print(f"{TEMPLATES}/{template}:{_line_of(error)}: {error}", style="red")
    right = len(texts) == len(names)
    for document, text in texts.items():
        path = root / document
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        differing = list(differences(before, text))
        for line, diff in differing:
            state = "out of date; run `make tables`" if check else "brought up to date"
            _print(f"{document}:{line}: {state}; its text is in {TEMPLATES}/{names[document]}\n{diff}")
        if differing and not check:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        if not differing:
            _print(f"{document}: up to date with {results.name}/")
        right = right and not (check and differing)
    return right


def documents(root: Path = ROOT) -> dict[str, str]:
    """Return the documents, by their paths from the root, and the name of each one's template.

    Raises:
        UserError: There are no templates.
    """
    names = sorted(path.name for path in (root / TEMPLATES).glob(f"*{_SUFFIX}"))
    if not names:
        raise UserError(f"{TEMPLATES}: no such folder with templates; run it in a checkout of the repository")
    stems = {name: name.removesuffix(_SUFFIX) for name in names}
    return {f"{stem}.md" if stem == "README" else f"docs/{stem}.md": name for name, stem in stems.items()}


def render(root: Path, document: str, given: Mapping[str, Any]) -> str:
    """Return the text of a document.

    Args:
        given: The dictionary of `bench.publish.values`.

    Raises:
        jinja2.TemplateError: The template is not valid, or uses a name that is not in `given`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root / TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    # A link is followed from the folder of the document.
    template = environment.get_template(documents(root)[document], globals={"up": "../" * document.count("/")})
    return template.render(given)


def differences(old: str, new: str) -> Iterator[tuple[int, str]]:
    """Yield for each place that differs its line in the old text and the lines, `-` old and `+` new."""
    before, after = old.splitlines(), new.splitlines()
    for tag, first, last, start, stop in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag != "equal":
            lines = [f"- {line}" for line in before[first:last]] + [f"+ {line}" for line in after[start:stop]]
            more = [f"... {len(lines) - _MOST_LINES} lines more"] if len(lines) > _MOST_LINES else []
            yield first + 1, "\n".join([*lines[:_MOST_LINES], *more])


def _line_of(error: jinja2.TemplateError) -> int:
    """Return the template's line at which an error arose; jinja's tracebacks have the lines of templates."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(_SUFFIX)]
    return (lines or [0])[-1] or 0


def _print(text: str, **options: Any) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False, **options)
