"""The wording check finds a planted sentence of each kind and is silent about plain ones."""

from __future__ import annotations

import prose
import pytest


@pytest.mark.parametrize(
    ("sentence", "word"),
    [
        ("The model no longer knows the forget set.", "model no longer knows"),
        ("A file that does not say its format is refused.", "file that does not say"),
        ("Each rank asks for its shard.", "rank asks"),
        ("The record says which samples were removed.", "record says"),
        ("Accuracy beside that of the reference model.", "beside"),
        ("The learning rate is said in the report.", "is said"),
        ("This is what a step frees.", "what a step frees"),
        ("The price of slow hours.", "slow hours"),
        ("Zero where there is none.", "where there is"),
        ("The samples that are looked at.", "looked at"),
        ("A model that never saw the forget set.", "never saw"),
        ("Models that cannot be told apart.", "cannot be told"),
        ("The run goes on after a kill.", "goes on"),
        ("The samples that are fed to it.", "are fed"),
        ("The ids that were asked for.", "asked for"),
    ],
)
def test_a_planted_sentence_is_found(sentence: str, word: str) -> None:
    words = sentence.split()
    broken = f"{' '.join(words[:3])}\n    {' '.join(words[3:])}"
    docstring = f'"""Module.\n\nText.\n    {broken}\n"""\n'
    comment = "x = 1\n\n# " + broken.replace("\n   ", "\n#") + "\n"
    for text, name in ((docstring, "a.py"), (comment, "a.py"), (broken, "a.md")):
        (found,) = prose.findings(text, name)
        assert f"'{word}'" in found
        line = int(found.split(":")[1])
        assert word.split()[0] in text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ('raise UserError(\n    f"{path}: "\n    "the file does "\n    f"not say its {kind}"\n)', 2),
        ('raise ValueError(f"{name}: " + ("the file does not say it" if name else "none"))', 1),
        ('app: Annotated[str, typer.Option("--a", help="A " "file that does not say" " its format.")] = ""', 1),
        ('log.warning("%s: the file does not say its format", path)', 1),
        ("x = 1\nprint(f\"{x}: {'the file does not say it' if x else x}\")", 2),
    ],
)
def test_a_planted_message_is_found(code: str, line: int) -> None:
    (found,) = prose.findings(code, "a.py")
    assert found.startswith(f"a.py:{line}: 'file ")
    assert "does not say'" in found


@pytest.mark.parametrize("word", ["Makes", "Gives", "Returns", "The", "What", "Whether", "A"])
def test_a_docstring_without_an_imperative_is_found(word: str) -> None:
    text = f'class A:\n    def f(self) -> None:\n        """{word} loss."""\n'
    (found,) = prose.findings(text, "a.py")
    assert found.startswith(f"a.py:3: '{word}' begins the docstring of f")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            '"""The model, and whether it is saved. Besides, files hold keys; they record a run."""\n',
            "a.py",
        ),
        ('def f() -> None:\n    """Process the forget set."""\n', "a.py"),
        ('class A:\n    @property\n    def f(self) -> int:\n        """The number of ranks."""\n', "a.py"),
        ("x = 'the model says beside'  # `beside` is a field\n", "a.py"),
        ("x = 1  # the model\ny = 2  # says nothing here\n", "a.py"),
        ('raise UserError(f"{path}: no option `beside`" f", and {x} is none either")\n', "a.py"),
        ("The report lists `beside`.\n```\nthe model says\n```\nUsers know their data.\n", "a.md"),
    ],
)
def test_plain_text_passes(text: str, name: str) -> None:
    assert prose.findings(text, name) == []


@pytest.mark.slow
def test_converted_files_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code = prose.main()
    assert code == 0, capsys.readouterr().out
