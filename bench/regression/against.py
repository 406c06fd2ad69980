"""Compare the working tree with a git revision: `pytest --benchmark --against REV`, measured in turn in one run.

No stored figure is needed. So this comparison is the default if `bench/regression/baseline.json` has no figures of the
machine or of the release of PyTorch. Each tree has a process of its own (`bench.regression.against_worker`), both run
the cases of the working tree, and one is idle while the other computes.

**Time** is the quotient of the two trees' times. Both are sampled in every round, the order turning from round to
round, so that both times of a quotient are measured under the same conditions. A tenth of the rounds' quotients is left
out at either end; the geometric mean of the rest is the result. It takes `LEAST` rounds, and more (to `MOST`, or
`MOST_SECONDS`) until the distance of the mean from the threshold is `CLEAR` standard errors. A quotient beyond the
threshold is measured again: by two new processes, over at least twice the rounds, and the second quotient alone is
judged. A real slowdown occurs both times; the effect of an unlucky memory layout of a process does not.

**Counts** (memory, flops, bytes) are taken in both processes, with the same release of PyTorch, and compared with
the thresholds of `bench.regression.baseline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.regression.baseline import THRESHOLDS, TIME, Verdict
from bench.regression.measuring import SAMPLE_SECONDS
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("against_worker.py")
# Paths of a revision that the measurement needs.
FOLDERS = ("engine", "kernels", "lethe_kernels.py", "bench")
BRANCHES = ("origin/main", "origin/master", "main", "master")

LEAST, MOST, MOST_SECONDS, CLEAR = 20, 80, 25.0, 4.0
TRIMMED = 0.1


class SideError(Exception):
    """One side cannot measure a case: the first line of its error."""


@dataclasses.dataclass(frozen=True)
class Revision:
    """commit: the full hash. text: its description in the summary."""

    commit: str
    text: str

    @property
    def short(self) -> str:
        return self.commit[:10]


@dataclasses.dataclass(frozen=True)
class Against(Verdict):
    """A verdict by comparison with another revision, not with stored figures."""

    revision: str = ""

    def __str__(self) -> str:
        numbers = f"{_number(self.measure, self.now)}, there {_number(self.measure, self.baseline)}"
        text = f"{self.case}: {self.measure} is {self.quotient:.4g} x that of {self.revision} ({numbers})"
        return text if self.state == "better" else f"{text}, threshold {self.threshold:g}"


def _number(measure: str, value: float) -> str:
    return f"{1e3 * value:.4g} ms" if measure == TIME else f"{value:,.0f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Measurements of a case. seconds: (working tree, revision); quotients: one or two, the last is judged."""

    seconds: tuple[float, float]
    counts: tuple[Mapping[str, float], Mapping[str, float]]
    quotients: tuple[float, ...]
    rounds: int

    def verdicts(self, case: str, limit: float, revision: str) -> list[Verdict]:
        ours, theirs = self.counts
        time_ = Against(case, TIME, self.quotients[-1] * self.seconds[1], self.seconds[1], limit, revision)
        rest = [Against(case, name, ours[name], theirs[name], THRESHOLDS[name], revision) for name in ours]
        return [time_, *rest]


# --- revisions --------------------------------------------------------------------------------------------------------


def choose_revision(name: str | None, root: Path = ROOT) -> Revision:
    """Return the named revision, or else the merge base with the main branch.

    Raises UserError if this is no git checkout or there is no such revision.
    """
    if not (root / ".git").exists():
        raise UserError(f"--against: {root} is no git checkout, so there is no revision to compare with")
    if name is not None:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if not commit:
            raise UserError(f"--against {name}: git has no such revision here, expected a commit, branch or tag")
        return Revision(commit, name)
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        raise UserError("--against: this checkout has no commit yet")
    for branch in BRANCHES:
        base = _git(root, "merge-base", "HEAD", branch)
        if base and base != head:
            return Revision(base, f"the merge base with {branch}")
        if base:
            break
    if _git(root, "status", "--porcelain", "--untracked-files=no", "--", *FOLDERS):
        return Revision(head, "HEAD, without the changes of the working tree")
    return Revision(head, "HEAD, from which the working tree does not differ: quotients show this machine's noise; "
                    "name a revision by --against REV")  # fmt: skip


def _git(root: Path, *arguments: str) -> str:
    """Return the output of a git command, or "" if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--against needs git ({error})") from None
    return done.stdout.strip() if done.returncode == 0 else ""


def write_tree(revision: Revision, folder: Path, root: Path = ROOT) -> None:
    """Write the code of a revision into a folder, without a change to the repository."""
    known = set(_git(root, "ls-tree", "--name-only", revision.commit).splitlines())
    paths = [name for name in FOLDERS if name in known]
    command = ["git", "-C", str(root), "archive", "--format=tar", revision.commit, "--", *paths]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not paths:
        raise UserError(f"--against: git cannot read the code of {revision.short} ({done.stderr.decode().strip()})")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            if member.isfile() and not member.name.startswith("bench/results/"):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())


# --- two processes ----------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures with the code of one tree."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tree)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=tree,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a command. Raises SideError if there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SideError(f"its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class NotComparable(Exception):
    """The revision cannot run a case. new: the revision does not have the case either."""

    def __init__(self, reason: str, new: bool) -> None:
        super().__init__(reason)
        self.new = new


class Comparison:
    """Comparison of the working tree with a revision: two processes, and new ones for a second measurement."""

    def __init__(self, revision: Revision, root: Path = ROOT) -> None:
        self.revision, self.root = revision, root
        self._folder = tempfile.TemporaryDirectory(prefix="against-")
        self._tree = Path(self._folder.name)
        write_tree(revision, self._tree, root)
        self._pair: tuple[Worker, Worker] | None = None
        self._names: set[str] | None = None

    def close(self) -> None:
        self._restart()
        self._folder.cleanup()

    def _restart(self) -> None:
        for worker in self._pair or ():
            worker.close()
        self._pair = None

    def compare(self, case: str, limit: float) -> Compared:
        """Measure a case on both sides, twice if the first quotient is beyond the limit.

        Raises SideError if the working tree cannot run it, NotComparable if the revision cannot.
        """
        first = self._look(case, limit, LEAST)
        if first.quotients[-1] <= limit:
            return first
        self._restart()
        second = self._look(case, limit, 2 * LEAST)
        return dataclasses.replace(
            second, quotients=(*first.quotients, *second.quotients), rounds=first.rounds + second.rounds
        )

    def _look(self, case: str, limit: float, least: int) -> Compared:
        if self._pair is None:
            self._pair = Worker(self.root), Worker(self._tree)
        ours, theirs = self._pair
        try:
            ours.ask("build", case=case)
            counts = ours.ask("count")["counts"]
        except SideError:
            self._restart()
            raise
        try:
            theirs.ask("build", case=case)
            their_counts = theirs.ask("count")["counts"]
        except SideError as error:
            self._restart()
            raise NotComparable(str(error), case not in self._known()) from None
        fastest = min(worker.ask("calibrate")["seconds"] for worker in self._pair)
        seconds = self._rounds(math.ceil(SAMPLE_SECONDS / fastest), limit, least)
        for worker in self._pair:
            worker.ask("close")
        quotient, _ = trimmed([math.log(mine / other) for mine, other in seconds])
        middle = tuple(statistics.median(column) for column in zip(*seconds, strict=True))
        return Compared(seconds=(middle[0], middle[1]), counts=(counts, their_counts), quotients=(math.exp(quotient),),
                        rounds=len(seconds))  # fmt: skip

    def _rounds(self, calls: int, limit: float, least: int) -> list[tuple[float, float]]:
        """Return the seconds of a call, (working tree, revision) of each round."""
        assert self._pair is not None
        ours, theirs = self._pair
        seconds: list[tuple[float, float]] = []
        until = time.monotonic() + MOST_SECONDS * least / LEAST
        while True:
            order = (ours, theirs) if len(seconds) % 2 else (theirs, ours)
            taken = {worker: worker.ask("sample", calls=calls)["seconds"] for worker in order}
            seconds.append((taken[ours], taken[theirs]))
            if len(seconds) < least // 2:
                continue
            mean, error = trimmed([math.log(mine / other) for mine, other in seconds])
            clear = abs(mean - math.log(limit)) > CLEAR * error
            late = len(seconds) >= MOST * least / LEAST or time.monotonic() > until
            if late or (clear and len(seconds) >= least):
                return seconds

    def _known(self) -> set[str]:
        """Return the names of the cases in the revision's own bench."""
        if self._names is None:
            code = "from bench.regression.cases import CASES; import json; print(json.dumps([c.name for c in CASES]))"
            code = f"import sys; sys.path[0] = {str(self._tree)!r}; {code}"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=self._tree)
            self._names = set(json.loads(done.stdout)) if done.returncode == 0 else set()
        return self._names


def trimmed(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean without the tenth at either end, and its standard error (Tukey and McLaughlin's)."""
    ordered = sorted(values)
    cut = int(TRIMMED * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    spread = statistics.stdev(winsorised) if len(winsorised) > 1 else math.inf
    return statistics.fmean(kept), spread / ((1 - 2 * TRIMMED) * math.sqrt(len(ordered)))
