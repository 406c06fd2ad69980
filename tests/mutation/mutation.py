"""Do the tests notice when the code is broken?  python tests/mutation/mutation.py [--only GLOB] [--json FILE]
[--timeout S]

Breaks a copy of the repository in the ways that `tests/mutation/mutants.py` lists, one at a time, and runs the tests
that each names. Exit status: 0 all are killed, 1 one or more survive, 2 the table does not fit the code or a run proves
nothing (the tests fail unbroken, or a mutant does not load).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("engine", "kernels", "bench", "tests", "lethe_kernels.py", "pyproject.toml")


class Proofless(Exception):
    """A run from which nothing follows."""


@dataclasses.dataclass(frozen=True)
class Result:
    """killed_by: the first test that failed, "timeout", "signal N" for a crash, or None for a survivor."""

    mutant: str
    file: str
    killed_by: str | None
    seconds: float


def misfits(mutants: list[Mutant], root: Path) -> list[str]:
    """What keeps the table from being applied to the code below `root`, one line each; empty where it fits."""
    problems = [
        f"{mutant.name}: its old text occurs {count} times in {mutant.file}, expected once: {mutant.old!r}"
        for mutant in mutants
        if (count := (root / mutant.file).read_text(encoding="utf-8").count(mutant.old)) != 1
    ]
    names = [mutant.name for mutant in mutants]
    problems += [f"{name}: two mutants have this name" for name in sorted(set(names)) if names.count(name) > 1]
    missing = {target for mutant in mutants for target in mutant.targets if not (root / target.split("::")[0]).exists()}
    return problems + [f"{target}: no such test file" for target in sorted(missing)]


@contextlib.contextmanager
def copy_of_repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, Path(folder) / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(ROOT / name, folder)
        yield Path(folder)


@contextlib.contextmanager
def applied(mutant: Mutant, root: Path) -> Iterator[None]:
    path = root / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def first_failure(root: Path, targets: tuple[str, ...], timeout: float) -> str | None:
    """`Result.killed_by` of the code as it lies there. Raises Proofless where no test has been run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--hypothesis-seed=0"]
    # No byte code: two mutants of one size within a second would pass for the same file.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root), "COLUMNS": "200"}
    process = subprocess.Popen(
        [*command, *targets],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        if process.poll() is None:  # too slow, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests start
            process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode < 0:  # a kernel that writes past its result may take the process with it
        return f"signal {-process.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode != 1 or failed is None:
        raise Proofless(f"pytest ended with {process.returncode}:\n{output[-2000:]}")
    return failed[1]


def run(mutants: list[Mutant], timeout: float) -> list[Result]:
    """One result a mutant, each printed as it comes. Raises Proofless where a run says nothing about the tests."""
    results = []
    width = max(len(mutant.name) for mutant in mutants)
    file_width = max(len(mutant.file) for mutant in mutants)
    with copy_of_repository() as root:
        for targets in sorted({mutant.targets for mutant in mutants}):
            if failure := first_failure(root, targets, timeout):
                raise Proofless(f"{' '.join(targets)}: fails without a mutant: {failure}")
        for mutant in mutants:
            start = time.perf_counter()
            try:
                with applied(mutant, root):
                    killed_by = first_failure(root, mutant.targets, timeout)
            except Proofless as error:
                raise Proofless(f"{mutant.name}: {error}") from None
            results.append(Result(mutant.name, mutant.file, killed_by, round(time.perf_counter() - start, 1)))
            print(
                f"{mutant.name:{width}}  {mutant.file:{file_width}}  {results[-1].seconds:6.1f} s  "
                f"{killed_by or 'SURVIVED'}",
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="GLOB", help="mutants whose name matches, such as 'mask-*'")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=300, help="a run longer than this kills")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if fnmatch.fnmatch(mutant.name, options.only or "*")]
    if not chosen:
        parser.error(
            f"--only {options.only}: no mutant has such a name; there are {', '.join(m.name for m in MUTANTS)}"
        )
    if problems := misfits(MUTANTS, ROOT):
        print("\n".join(problems), file=sys.stderr)
        return 2
    sys.path.append(str(ROOT))  # a script's path begins with its own folder, and lethe need not be installed
    from bench.harness.report import Report

    report = Report(shlex.join(["python", "tests/mutation/mutation.py", *sys.argv[1:]]))
    try:
        results = run(chosen, options.timeout)
    except Proofless as error:
        print(error, file=sys.stderr)
        return 2
    report.write({"rows": [dataclasses.asdict(result) for result in results]}, options.json)
    survivors = [result.mutant for result in results if result.killed_by is None]
    print(f"{len(results) - len(survivors)} of {len(results)} killed" + "".join(f"\nSURVIVED {s}" for s in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
