"""Check the wording of docstrings, comments and Markdown files: `python tests/support/prose.py`, run by `make lint`.

Prints FILE:LINE and the remedy for each finding, and exits with 1 if there is any. Findings are personified models and
files, words of a private dialect, and functions whose docstring does not begin with an imperative. Code in backticks
and in fenced blocks is not checked.
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
    "(?:is|are) given up": "name what happens: the process is stopped, the request fails, the wait ends",
    "what becomes? of": "name the outcome",
    "gone (?:back )?through": "write 'processed' or 'differentiated'",
    "but for": "write 'except'",
    "of (?:ours|theirs|its|one) that": "name the thing a second time",
}
_PATTERNS = [
    (re.compile(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), re.IGNORECASE), remedy) for pattern, remedy in WORDS.items()
]
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
