"""The documentation site: it builds without a warning, and its commands, options and names exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from import_graph import LAYERS

import engine
from engine.cli.app import app
from engine.methods import list_methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What is written for users, page by page; results and lab pages show what was run when they were written.
GUIDES = sorted(
    {DOCS / "index.md", DOCS / "getting-started.md", *(DOCS / "guides").glob("*.md"), *(DOCS / "concepts").glob("*.md")}
)
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
_BLOCK = re.compile(r"^```(?P<kind>[^`\n]*)\n(?P<text>.*?)^```", flags=re.S | re.M)
_LAUNCHED = re.compile(r"""(?:^\s*(?:\$LETHE|lethe)|--module engine|-m engine|'__main__'\)")\s+(?P<rest>[a-z-].*)""")
_INLINE = re.compile(r"`(lethe [a-z][^`]*)`")


def blocks(page: Path, kinds: tuple[str, ...]) -> Iterator[str]:
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["kind"] in kinds:
            yield found["text"]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `lethe` of each command, however it is launched."""
    for line in text.replace("\\\n", " ").splitlines():
        found = _LAUNCHED.search(line)
        if found and not line.lstrip().startswith("#"):
            yield shlex.split(found["rest"].partition("||")[0], comments=True)


def problems(words: list[str]) -> list[str]:
    """What in the words of a command the `lethe` command does not have."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest else "--help"
        if name.startswith("--"):
            return []
        if name not in command.commands:
            return [f"no command {name!r}"]
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    found = [f"no option {word}" for word in rest if word.startswith("--") and word not in {*known, "--help"}]
    options = {field.name for field in dataclasses.fields(engine.RunConfig)} | {"epochs"}
    for method in list_methods().values():
        options |= {field.name for field in dataclasses.fields(method.Config)}
    given = [rest[place + 1] for place, word in enumerate(rest) if word == "--set" and place + 1 < len(rest)]
    return found + [f"no option --set {each}" for each in given if re.split("[=.]", each)[0] not in options]


def test_commands_in_blocks_exist() -> None:
    found = [
        (path.name, words)
        for path in [*GUIDES, *SCRIPTS]
        for text in (blocks(path, ("", "bash", "sh")) if path.suffix == ".md" else [path.read_text(encoding="utf-8")])
        for words in command_lines(text)
    ]
    assert len(found) > 25
    assert [(name, " ".join(words), wrong) for name, words in found if (wrong := problems(words))] == []


def test_commands_in_sentences_exist() -> None:
    found = [
        (page.name, words)
        for page in GUIDES
        for text in _INLINE.findall(page.read_text(encoding="utf-8"))
        for words in command_lines(text)
    ]
    assert len(found) > 15
    assert [(name, " ".join(words), wrong) for name, words in found if (wrong := problems(words))] == []


@pytest.mark.parametrize("words", ["unlern --out x", "unlearn --reprt x", "request ad", "unlearn --set batchsize=3"])
def test_a_wrong_command_is_found(words: str) -> None:
    assert problems(words.split())


def test_names_of_python_blocks_exist() -> None:
    count = 0
    for page in GUIDES:
        for text in blocks(page, ("python",)):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "engine":
                    assert hasattr(engine, node.attr), f"{page.name}: engine.{node.attr}"
                    count += 1
    assert count >= 2


def test_architecture_is_drawn_from_packages_that_exist() -> None:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.draw(), "run python docs/_architecture.py"
    drawn = {name for _, boxes in module.LAYERS for name, _ in boxes}
    order = [name.removeprefix("engine/") for _, boxes in module.LAYERS for name, _ in boxes if name != "kernels"]
    assert order == list(LAYERS), "the picture has the order that tests/test_architecture.py holds"
    there = {f"engine/{path.parent.name}" for path in (ROOT / "engine").glob("*/__init__.py")}
    assert drawn == {*there, "kernels"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site needs the extra docs (pip install 'lethe-unlearning[docs]')")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_site_has_the_reference(site: Path) -> None:
    page = (site / "api" / "engine" / "index.html").read_text(encoding="utf-8")
    for name in ("engine.unlearn", "engine.train", "engine.evaluate"):
        assert name in page
    assert "rollout_topk_mask" in (site / "api" / "kernels" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"?https?://|<link[^>]+rel=\"?(?:stylesheet|preconnect)\"?[^>]+https?://"
    )
    assert [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))] == []
