"""Check the wording of docstrings, comments, messages and Markdown files: `python tests/support/prose.py`.

`make lint` runs it. It prints FILE:LINE and the remedy for each finding, and exits with 1 if there is any. Findings are
personified models and files, words of a private dialect, and functions whose docstring does not begin with an
imperative. Messages are the strings that are given to errors, to the log, to `print` and as `help` of an option. Code
in backticks and in fenced blocks is not checked.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("engine", "kernels", "bench")
TEXT = ("*.md", "docs/**/*.md")

# Files and folders that are not converted yet. Take an entry out with the commit that converts it; add none.
NOT_YET: tuple[str, ...] = ()

# A space stands for any white space. Of each pair: what is reported, and what to write instead.
_THINGS = (
    "models?|originals?|students?|teachers?|networks?|heads?|layers?|blocks?|gates?|ranks?|process(?:es)?|records?"
    "|reports?|files?|folders?|checkpoints?|configs?|options?|methods?|functions?|samples?|images?|classes|class"
    "|labels?|loaders?|runs?|results?|verdicts?|tests?|checks?|guards?|tables?|machines?|devices?|kernels?|it|they"
)
_BETWEEN = "(?: (?:that|which|itself|themselves|do|does|did|not|no|longer|still|already|then|only|also|now|never))*"
_VERBS = "says?|knows?|knew|looks?|talks?|tells?|told|asks?|wants?|speaks?|thinks?|believes?|cares?|feels?"
WORDS = {
    rf"(?:{_THINGS}){_BETWEEN} (?:{_VERBS})": "only people say, know, look or want; name what is computed or stored",
    "beside": "write 'compared with', 'next to' or 'paired with'",
    "(?:is|are|was|as|be|been|not|what) said": "name the source, the message or the value",
    "what (?:an?|the|each|every) step (?:frees|keeps|holds|leaves|wants)": "name the quantity",
    "slow hours?": "write 'hours at a reduced rate', or the rate",
    "where there (?:is|are)": "write 'if there is' or 'if there are'",
    "where (?:none|nothing|no)": "write 'if none', 'if nothing' or 'if no'",
    "look(?:ed)? at": "write 'evaluated', 'read' or 'measured'",
    "(?:give|gives|given|gave|giving) up": "name what happens: the process stops, the request fails, the wait ends",
    "(?:give|gives|gave|giving) (?:itself|themselves|them|it) away": "write 'reveals' or 'is detected'",
    r"told apart|tells? (?:\w+ ){1,3}apart|(?:can|cannot) be told": "write 'distinguish'",
    "never (?:saw|seen|sees)": "write 'was not trained on' or 'held-out'",
    "(?:go|goes|going|went|gone) on": "write 'continue' or 'resume'",
    "(?:is|are|was|were|be) fed": "name the input, or the preprocessing",
    "coin toss": "write 'chance'",
    "asked for": "write 'requested' or 'required'",
    "not here": "write 'missing' or 'not installed'",
    "what (?:becomes?|came) of": "name the outcome",
    "gone (?:back )?through": "write 'processed' or 'differentiated'",
    "but for": "write 'except'",
    "of (?:ours|theirs|its|one) that": "name the thing a second time",
}
_PATTERNS = [
    (re.compile(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), re.IGNORECASE), remedy) for pattern, remedy in WORDS.items()
]
# Calls whose strings users read, by the last part of their names; of `_HELP` the keyword `help` alone.
_MESSAGES = re.compile(r"\w*Error|RunStopped|print|echo|debug|info|warning|error")
_HELP = ("Option", "Argument", "Typer", "command", "add_argument", "addoption")
_NO_VERB = ("The", "What", "Whether", "A", "An", "How", "Where", "Which", "That", "This", "One", "If", "Of")


def findings(text: str, name: str) -> list[str]:
    """Return "NAME:LINE: remedy" for each finding in the text of a Python or Markdown file."""
    found = []
    for start, block in _blocks(text, name):
        block = re.sub(r"`[^`]*`", lambda code: re.sub(r"[^\n]", "·", code[0]), block)
        for pattern, remedy in _PATTERNS:
            for match in pattern.finditer(block):
                words = " ".join(match[0].split())
                found.append((start + block.count("\n", 0, match.start()), f"'{words}': {remedy}"))
    if name.endswith(".py"):
        for node, doc in _docstrings(text):
            word = doc.value.split(maxsplit=1)[0] if doc.value.strip() else ""
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node) and _not_verb(word):
                found.append((doc.lineno, f"'{word}' begins the docstring of {node.name}: begin with an imperative"))
    return [f"{name}:{line}: {remedy}" for line, remedy in sorted(found)]


def _blocks(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each docstring, comment or paragraph to be checked."""
    if not name.endswith(".py"):
        yield 1, re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        return
    lines = text.splitlines()
    for _, doc in _docstrings(text):
        yield doc.lineno, "\n".join(lines[doc.lineno - 1 : doc.end_lineno])
    yield from _messages(text)
    block: list[str] = []
    last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            trailing = not token.line.lstrip().startswith("#")
            if block and (trailing or token.start != (last + 1, column)):
                yield last - len(block) + 1, "\n".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last, column = (token.start[0], -1) if trailing else token.start
    if block:
        yield last - len(block) + 1, "\n".join(block)


def _messages(text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text, in one line, of each message; a value in an f-string is one dot."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        strings = [each.value for each in node.keywords if each.arg == "help"] if name in _HELP else []
        if _MESSAGES.fullmatch(name):
            strings += node.args
        for string in strings:
            for start, words in _strings(string):
                yield start, " ".join(words.split())


def _strings(node: ast.expr) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string of an expression: alternatives, sums, calls of a string's methods."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "·" for part in node.values)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from _strings(part.value)
    elif isinstance(node, ast.BinOp):
        yield from (*_strings(node.left), *_strings(node.right))
    elif isinstance(node, ast.IfExp):
        yield from (*_strings(node.body), *_strings(node.orelse))


def _docstrings(text: str) -> Iterator[tuple[ast.AST, ast.Constant]]:
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield node, value


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(each) for each in node.decorator_list)


def _not_verb(word: str) -> bool:
    return word in _NO_VERB or (word.istitle() and re.search(r"[^su]s$", word) is not None)


def main() -> int:
    found = [f"{name}: listed in NOT_YET, but there is no such path" for name in NOT_YET if not (ROOT / name).exists()]
    paths = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    paths += [path for pattern in TEXT for path in sorted(ROOT.glob(pattern))]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if not any(name == other or name.startswith(f"{other}/") for other in NOT_YET):
            found += findings(path.read_text(encoding="utf-8"), name)
    print("\n".join(found) or f"prose: {len(paths)} files, nothing to report")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
