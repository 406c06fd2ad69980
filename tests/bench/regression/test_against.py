"""`pytest --benchmark --against REV`: which revision, whose code, what is judged, and what cannot be compared."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from test_regression import COUNTS, ROOT, stored

from bench.regression import against
from bench.regression.against import (
    Compared,
    Comparison,
    NotComparable,
    Revision,
    SideError,
    Worker,
    choose_revision,
    trimmed,
    write_tree,
)
from bench.regression.baseline import TIME
from bench.regression.cases import CASES
from engine.errors import UserError

pytest_plugins = ["pytester"]

REVISION = Revision("0123456789abcdef", "the merge base with main")

# --- which revision ---------------------------------------------------------------------------------------------------


class Repository:
    """A git repository on a branch."""

    def __init__(self, folder: Path, branch: str = "main") -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q", "-b", branch)
        self.commit("first")

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(self.folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, content: str) -> str:
        (self.folder / "engine").mkdir(exist_ok=True)
        (self.folder / "engine" / "code.py").write_text(content)
        self.git("add", ".")
        self.git("commit", "-q", "-m", content)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_a_revision_that_is_named(repository: Repository) -> None:
    first = repository.git("rev-parse", "HEAD")
    repository.commit("second")
    assert choose_revision("HEAD~1", repository.folder) == Revision(first, "HEAD~1")
    for name in ("nothing", "--all", "HEAD:engine"):
        with pytest.raises(UserError, match=f"--against {name}: git has no such revision here, expected a commit"):
            choose_revision(name, repository.folder)


def test_a_branch_is_compared_with_its_merge_base(repository: Repository) -> None:
    base = repository.git("rev-parse", "HEAD")
    repository.git("checkout", "-q", "-b", "work")
    repository.commit("work")
    repository.git("checkout", "-q", "main")
    repository.commit("main goes on")
    repository.git("checkout", "-q", "work")
    assert choose_revision(None, repository.folder) == Revision(base, "the merge base with main")


def test_a_clone_is_compared_with_what_was_cloned(repository: Repository, tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", repository.folder, tmp_path / "clone"], check=True)
    clone = Repository.__new__(Repository)
    clone.folder = tmp_path / "clone"
    head = clone.git("rev-parse", "HEAD")
    found = choose_revision(None, clone.folder)
    assert found.commit == head
    assert "show this machine's noise; name a revision by --against REV" in found.text
    (clone.folder / "engine" / "code.py").write_text("changed")
    assert choose_revision(None, clone.folder) == Revision(head, "HEAD, without the changes of the working tree")
    clone.commit("committed")
    assert choose_revision(None, clone.folder) == Revision(head, "the merge base with origin/main")


def test_without_a_repository_or_a_commit_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no git checkout"):
        choose_revision(None, tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with pytest.raises(UserError, match="has no commit yet"):
        choose_revision(None, tmp_path)


def test_the_tree_is_that_of_the_revision(repository: Repository, tmp_path: Path) -> None:
    results = repository.folder / "bench" / "results"
    results.mkdir(parents=True)
    (results / "large.json").write_text("{}")
    (repository.folder / "bench" / "harness").mkdir()
    (repository.folder / "bench" / "harness" / "cases.py").write_text("cases")
    commit = repository.commit("then")
    (repository.folder / "engine" / "code.py").write_text("now")
    write_tree(Revision(commit, ""), tmp_path / "tree", repository.folder)
    files = sorted(path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.py"))
    assert files == ["bench/harness/cases.py", "engine/code.py"]
    assert (tmp_path / "tree" / "engine" / "code.py").read_text() == "then"
    assert not (tmp_path / "tree" / "bench" / "results").exists()
    assert repository.git("worktree", "list").count("\n") == 0


# --- whose code -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_side_runs_the_cases_of_the_working_tree() -> None:
    worker = Worker(ROOT)
    try:
        assert worker.ask("names") == {"names": [case.name for case in CASES]}
        with pytest.raises(SideError, match="KeyError: 'no such case'"):
            worker.ask("build", case="no such case")
        worker.ask("build", case="mask_tokens, eager")  # it goes on after an error
        assert worker.ask("sample", calls=1)["seconds"] > 0
    finally:
        worker.close()


def test_code_of_another_tree_is_never_taken_for_the_revisions(tmp_path: Path) -> None:
    """An installed `engine` would be found where the revision has none: the tree would be compared with itself."""
    for name in ("kernels", "lethe_kernels.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    worker = Worker(tmp_path)
    try:
        with pytest.raises(SideError, match=f"ImportError: engine was imported from .*, expected a folder of {tmp_path}"
                                            "|No module named 'engine'"):  # fmt: skip
            worker.ask("names")
    finally:
        worker.close()


def test_a_revision_from_before_files_were_renamed(tmp_path: Path) -> None:
    for name, text in (("engine/__init__.py", ""), ("engine/device.py", "here = object()"),
                       ("kernels/__init__.py", "from kernels.mask import fill"),
                       ("kernels/mask.py", "fill = object()")):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        "from pathlib import Path; from bench.regression.against_worker import import_from\n"
        f"import_from(Path({str(tmp_path)!r}))\n"
        "import kernels.mask, lethe_kernels.mask, bench\n"
        "from lethe_kernels import fill\n"
        "assert kernels.mask is lethe_kernels.mask and fill is kernels.fill\n"
        "import engine.device; from engine.runtime.device import here; assert here is engine.device.here\n"
        "print(lethe_kernels.__file__, bench.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "kernels" / "__init__.py"), str(ROOT / "bench" / "__init__.py")]


# --- what is judged ---------------------------------------------------------------------------------------------------


def test_the_trimmed_mean_leaves_out_the_disturbed_rounds_and_sees_one_slow_call_of_three() -> None:
    assert trimmed([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1.0 / (0.8 * math.sqrt(3))))
    assert trimmed([0.0] * 18 + [5.0, -90.0])[0] == 0.0
    slow = [math.log(1.9) if round_ % 3 == 0 else 0.0 for round_ in range(60)]
    assert math.exp(trimmed(slow)[0]) > 1.15


class Sides:
    """Stands in for `bench.regression.against.Worker`: seconds of a call by tree and by process pair, and noise."""

    started: ClassVar[list[Path]] = []
    asked: ClassVar[list[Path]] = []
    slower: ClassVar[Callable[[int], float]] = staticmethod(lambda pair: 1.0)  # the working tree's factor
    noise: ClassVar[float] = 0.0
    fails: ClassVar[dict[str, str]] = {}  # message by "ours" or "theirs"
    counts: ClassVar[dict[str, float]] = {}  # the working tree's, where they differ

    def __init__(self, tree: Path) -> None:
        self.tree, self.ours = tree, tree == ROOT
        self.pair = len(self.started) // 2
        self.started.append(tree)
        self.random = random.Random(len(self.started))

    def ask(self, do: str, **_: Any) -> dict[str, Any]:
        if do == "build" and (message := self.fails.get("ours" if self.ours else "theirs")):
            raise SideError(message)
        if do == "sample":
            self.asked.append(self.tree)
        factor = type(self).slower(self.pair) if self.ours else 1.0
        return {"seconds": 0.004 * factor * math.exp(self.random.gauss(0, self.noise)),
                "counts": {**COUNTS, **(self.counts if self.ours else {})}}  # fmt: skip

    def close(self) -> None: ...


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> type[Sides]:
    """A `Sides` of this test's own, in place of the processes; the revision has the case "a" and no other."""
    fresh = type("Fresh", (Sides,), {"started": [], "asked": [], "fails": {}, "counts": {}})
    monkeypatch.setattr(against, "Worker", fresh)
    monkeypatch.setattr(against, "write_tree", lambda *_: None)
    monkeypatch.setattr(Comparison, "_known", lambda self: {"a"})
    return fresh


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_a_slowdown_is_found_and_none_is_invented(sides: type[Sides], noise: float) -> None:
    sides.noise = noise
    comparison = Comparison(REVISION)
    clean = comparison.compare("a", 1.15)
    assert len(clean.quotients) == 1
    assert clean.quotients[0] == pytest.approx(1.0, abs=0.12)
    assert clean.rounds == 20 if noise < 0.1 else clean.rounds > 20  # more rounds where they are needed
    sides.slower = staticmethod(lambda pair: 1.3)
    slow = comparison.compare("a", 1.15)
    assert slow.quotients == (pytest.approx(1.3, rel=0.1), pytest.approx(1.3, rel=0.1))
    assert slow.quotients[-1] > 1.15
    assert len(sides.started) == 4  # the second look has processes of its own
    comparison.close()


def test_the_second_look_alone_is_judged(sides: type[Sides]) -> None:
    sides.slower = staticmethod(lambda pair: 1.3 if pair == 0 else 1.0)
    found = Comparison(REVISION).compare("a", 1.15)
    assert found.quotients == (pytest.approx(1.3), pytest.approx(1.0))
    assert found.verdicts("a", 1.15, REVISION.short)[0].state == "same"


def test_the_order_turns_from_round_to_round(sides: type[Sides]) -> None:
    Comparison(REVISION).compare("a", 1.15)
    firsts = [tree == ROOT for tree in sides.asked[::2]]
    assert firsts == [False, True] * 10


def test_what_is_counted_is_held_to_the_revisions(sides: type[Sides]) -> None:
    sides.counts["bytes"] = 1002.0
    found = Comparison(REVISION).compare("a", 1.15)
    worse = [verdict for verdict in found.verdicts("a", 1.15, "0123") if verdict.state == "regression"]
    assert [str(verdict) for verdict in worse] == [
        "a: bytes is 1.002 x that of 0123 (1,002, there 1,000), threshold 1.001"
    ]


@pytest.mark.parametrize(("case", "new"), [("a", False), ("b", True)])
def test_a_case_that_the_revision_cannot_run(sides: type[Sides], case: str, new: bool) -> None:
    sides.fails["theirs"] = "ImportError: no such name"
    with pytest.raises(NotComparable, match="ImportError: no such name") as caught:
        Comparison(REVISION).compare(case, 1.15)
    assert caught.value.new is new
    sides.fails["ours"] = "ValueError: ours"
    with pytest.raises(SideError, match="ValueError: ours"):  # a fault of the working tree is one
        Comparison(REVISION).compare(case, 1.15)


# --- really measured --------------------------------------------------------------------------------------------------

# The work of three tenths of the images is done twice.
PLANTED = """
_as_it_was = _mask_patches_eager


def _mask_patches_eager(images, mask, fill, patch_size):
    more = round(0.3 * len(images)) if patch_size != (1, 1) else 0  # with 1 x 1 it is mask_tokens
    _as_it_was(images[:more], mask[:more], fill, patch_size)
    return _as_it_was(images, mask, fill, patch_size)
"""


@pytest.mark.slow
@pytest.mark.minutes
def test_in_a_fresh_clone_a_planted_slowdown_is_red_and_nothing_else_is(tmp_path: Path) -> None:
    """No figures are stored for the clone's machine; the slowdown is an edit of its code."""
    clone = Repository(tmp_path / "clone")
    for name in (*against.FOLDERS, "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, clone.folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results", "__pyc*")
            )
        else:
            shutil.copy(ROOT / name, clone.folder)
    (clone.folder / "bench" / "baseline.json").write_text('{"times": {}, "counts": {}}')
    clone.commit("cloned")

    def benchmark() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark", "-k", "mask_ or info"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        return subprocess.run(command, cwd=clone.folder, env=environment, capture_output=True, text=True, check=False)

    clean = benchmark()
    assert clean.returncode == 0, clean.stdout
    assert "from which the working tree does not differ" in clean.stdout
    with (clone.folder / "kernels" / "mask.py").open("a") as file:
        file.write(PLANTED)
    planted = benchmark()
    assert planted.returncode == 1, planted.stdout
    assert "mask_patches, eager: time is 1." in planted.stdout
    failed = [line for line in planted.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.split(" - ")[0] for line in failed] == [
        "FAILED bench/regression/test_regression.py::test_case[mask_patches, eager]"
    ]


# --- the plugin -------------------------------------------------------------------------------------------------------

SUITE_FILE = """
    import pytest
    from bench.regression import against
    from bench.regression.against import Compared, NotComparable, Revision, SideError
    from bench.regression.baseline import COUNTED, Place

    COUNTS = dict.fromkeys(COUNTED, 1000)

    class Comparison:
        def __init__(self, revision): pass
        def close(self): print("closed")
        def compare(self, case, limit):
            found = {found}[case]
            if isinstance(found, Exception):
                raise found
            return Compared(seconds=(found * 1e-3, 1e-3), counts=(COUNTS, COUNTS), quotients=(found,), rounds=20)

    @pytest.fixture(autouse=True)
    def _no_processes(monkeypatch):
        monkeypatch.setattr(against, "Comparison", Comparison)

    @pytest.mark.parametrize("name", {found})
    def test_case(benchmark, baseline_gate, name):
        benchmark.disabled = True
        assert baseline_gate.against_revision(Place("a CPU, threads: 1, torch 2.0", "torch 2.0, cpu")) is {beside}
        if {beside}:
            benchmark.pedantic(baseline_gate.compare, (name,))
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest with the plugin on a suite; found: by case, its quotient or what comparing it raises."""
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(against, "choose_revision", _chosen)
    monkeypatch.setattr("bench.regression.plugin.BASELINE", pytester.path / "default.json")

    def run(*options: str, found: str = "{'a': 1.0, 'b': 1.0}", beside: bool = True) -> pytest.RunResult:
        file = pytester.makepyfile(test_suite=SUITE_FILE.format(found=found, beside=beside))
        return pytester.runpytest_inprocess(
            "-p", "bench.regression.plugin", "-p", "no:cacheprovider", "-q", "-ra", "-s", *options, str(file)
        )

    return run


def _chosen(name: str | None) -> Revision:
    if name == "nothing":
        raise UserError("--against nothing: git has no such revision here")
    return Revision("0123456789abcdef", name or "the merge base with main")


def test_a_run_without_a_regression_is_green(run: Run) -> None:
    result = run("--benchmark", "--against", "v1", found="{'a': 1.149, 'b': 0.5}")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*benchmark: against 0123456789, v1*", "case * time * 0123456789 * quotient*", "a * 1.15 ms * 1 ms * 1.149 *",
         "b: time is 0.5 x that of 0123456789 (0.5 ms, there 1 ms)"]
    )  # fmt: skip
    assert result.stdout.str().count("closed") == 1


def test_a_regression_is_red_that_case_alone(run: Run) -> None:
    result = run("--benchmark", "--against", "v1", found="{'a': 1.3, 'b': 1.0}")
    assert result.ret == 1
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        ["a: time is 1.3 x that of 0123456789 (1.3 ms, there 1 ms), threshold 1.15", "FAILED *test_case[[]a[]]*1.3 x*"]
    )


def test_what_cannot_be_compared_is_named_and_does_not_pass(run: Run) -> None:
    found = "{'a': NotComparable('ImportError: x', False), 'b': NotComparable('KeyError: y', True), 'c': 1.0}"
    result = run("--benchmark", "--against", "v1", found=found)
    assert result.ret == 0
    result.assert_outcomes(skipped=2, passed=1)
    result.stdout.fnmatch_lines(
        ["a: not comparable: 0123456789 cannot run it (ImportError: x)",
         "b: new: 0123456789 cannot run it (KeyError: y)"]
    )  # fmt: skip
    result = run("--benchmark", "--against", "v1", found="{'a': NotComparable('ImportError: x', False)}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["no case could be compared; name a later revision by --against REV"])
    assert run("--benchmark", "--against", "v1", found="{'a': NotComparable('x', True)}").ret == 0


def test_an_error_of_the_working_tree_is_red(run: Run) -> None:
    result = run("--benchmark", "--against", "v1", found="{'a': SideError('WrongResultError: off by one')}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["a: WrongResultError: off by one"])


def test_a_baseline_that_does_not_fit_gives_way_to_the_merge_base(run: Run, pytester: pytest.Pytester) -> None:
    """It was red in every case on a machine, or with a release of PyTorch, that the file does not have."""
    file = pytester.path / "default.json"
    for values in (stored("a", "b").values, stored("a", "b").values):
        values["times" if file.exists() else "counts"] = {"elsewhere": {"cases": {}}}
        file.write_text(json.dumps(values))
        result = run("--benchmark")
        assert result.ret == 0
        result.stdout.fnmatch_lines(["*benchmark: against 0123456789, the merge base with main*"])
    stored("a", "b").write(file)
    assert run("--benchmark", beside=False).ret == 0
    assert run("--benchmark", "--against", "v1").ret == 0  # what is asked for is done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "v1"], "*--against compares what --benchmark measures; give both"),
        (["--benchmark", "--against", "v1", "--update-baseline"], "*--against compares with a git revision*leave out*"),
        (["--benchmark", "--against", "v1", "--baseline=x.json"], "*--against compares with a git revision*leave out*"),
        (["--benchmark", "--against", "nothing"], "*--against nothing: git has no such revision here"),
    ],
)
def test_wrong_use(run: Run, options: list[str], message: str) -> None:
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_what_is_compared_is_said_with_both_times() -> None:
    found = Compared(seconds=(2e-3, 1e-3), counts=(COUNTS, COUNTS), quotients=(2.5, 2.0), rounds=60)
    verdicts = found.verdicts("a step", 1.15, "0123")
    assert [verdict.measure for verdict in verdicts] == [TIME, *COUNTS]
    assert str(verdicts[0]) == "a step: time is 2 x that of 0123 (2 ms, there 1 ms), threshold 1.15"
