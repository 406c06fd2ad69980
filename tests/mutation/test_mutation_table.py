"""The table of mutants fits the code, and the tool that runs it tells a killed mutant from one that proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant
from mutation import ROOT, Proofless, applied, first_failure, misfits


def test_every_mutant_still_applies() -> None:
    assert misfits(MUTANTS, ROOT) == []


CODE = "def double(x):\n    return 2 * x\n"
TEST = "from code_under_test import double\ndef test_double():\n    assert double(3) == 6\n"


def mutant(old: str, new: str) -> Mutant:
    return Mutant("m", "code_under_test.py", old, new, ("test_double.py",))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_double.py").write_text(TEST)
    return tmp_path


def test_misfits_are_named(root: Path) -> None:
    assert misfits([mutant("2 * x", "x")], root) == []
    assert misfits([mutant("x", "y")], root) == [
        "m: its old text occurs 2 times in code_under_test.py, expected once: 'x'"
    ]
    assert misfits([mutant("3 * x", "x"), mutant("2 * x", "x")], root) == [
        "m: its old text occurs 0 times in code_under_test.py, expected once: '3 * x'",
        "m: two mutants have this name",
    ]
    gone = Mutant("m", "code_under_test.py", "2 * x", "x", ("test_gone.py::test_it",))
    assert misfits([gone], root) == ["test_gone.py::test_it: no such test file"]


@pytest.mark.slow
def test_killed_survived_crash_timeout_and_proofless(root: Path) -> None:
    def outcome(broken: Mutant) -> str | None:
        with applied(broken, root):
            return first_failure(root, broken.targets, timeout=120)

    assert outcome(mutant("2 * x", "x * 3")) == "test_double.py::test_double"
    assert outcome(mutant("2 * x", "x * 2")) is None
    assert outcome(mutant("2 * x", "__import__('os').abort()")) == "signal 6"
    with pytest.raises(Proofless, match="pytest ended with 2"):
        outcome(mutant("2 * x", "2 *"))
    assert (root / "code_under_test.py").read_text() == CODE
    with applied(mutant("    return", "    while True: pass\n    return"), root):
        assert first_failure(root, ("test_double.py",), timeout=0.5) == "timeout"
