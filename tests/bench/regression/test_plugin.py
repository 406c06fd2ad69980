"""`pytest --benchmark`: the option and its runs, and planted regressions that have to be found."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_regression import COUNTS, HERE, ROOT, stored

from bench.regression.baseline import Baseline
from bench.regression.cases import CASES

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs in here are no workers of the run around them, where pytest-benchmark would not measure."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


# --- the plugin -------------------------------------------------------------------------------------------------------

SUITE_FILE = """
    import pytest
    from bench.regression.baseline import COUNTED, Place

    PLACE = Place("a CPU, threads: 1, torch 2.0", "torch 2.0, cpu")

    @pytest.mark.parametrize(("name", "ratio", "bytes_"), [("a", {a}, 1000), ("b", 0.5, {b})])
    def test_case(benchmark, baseline_gate, name, ratio, bytes_):
        assert not benchmark.disabled
        benchmark.pedantic(lambda: None)
        baseline_gate.stored(name, PLACE)
        baseline_gate.judge(name, {{"time": ratio}}, {{**dict.fromkeys(COUNTED, 1000), "bytes": bytes_}})
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest with the plugin on a suite with two cases: a with this ratio, b with these bytes."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(*options: str, a: float = 0.5, b: int = 1000, suite: str = SUITE_FILE) -> pytest.RunResult:
        file = pytester.makepyfile(test_suite=suite.format(a=a, b=b))
        baseline = f"--baseline={pytester.path / 'baseline.json'}"
        return pytester.runpytest_inprocess(
            "-p", "bench.regression.plugin", "-p", "no:cacheprovider", "-q", baseline, *options, str(file)
        )

    return run


@pytest.fixture
def known(pytester: pytest.Pytester) -> Path:
    file = pytester.path / "baseline.json"
    stored("a", "b").write(file)
    return file


def test_a_run_like_the_baseline_is_green(run: Run, known: Path) -> None:
    before = known.read_bytes()
    result = run("--benchmark", a=0.57)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*benchmark: against the baseline*", "a CPU, threads: 1, *", "case *", "a * 0.570 * 0.500 * 1.140 * 1.150*"]
    )
    assert known.read_bytes() == before


def test_a_regression_is_red_and_named(run: Run, known: Path) -> None:
    result = run("--benchmark", a=0.65, b=1002)
    assert result.ret == 1
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "a: time is 1.3 x the baseline's (*), threshold 1.15",
            "b: bytes is 1.002 x the baseline's (1,002, baseline 1,000), threshold 1.001",
        ]
    )
    result.stdout.fnmatch_lines(["*FAILED*a-0.65*a: time is 1.3 x*"])


def test_better_than_the_baseline_is_said_and_green(run: Run, known: Path) -> None:
    result = run("--benchmark", a=0.4)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["a: time is 0.8 x *faster than the baseline: update it with*--update-baseline*"])


def test_what_the_baseline_lacks_is_red(run: Run, known: Path) -> None:
    stored("b").write(known)
    result = run("--benchmark")
    assert result.ret == 1
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["a: the baseline has no counts of 'a'*`pytest --benchmark --update-baseline`"])
    stored("a", "b", place=dataclasses.replace(HERE, machine="another CPU")).write(known)
    result = run("--benchmark")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["a: the baseline has no times of this machine*it has: another CPU*--update-baseline*"])


def test_update_stores_the_cases_that_ran(run: Run, known: Path) -> None:
    result = run("--benchmark", "--update-baseline", "-k", "b-", a=0.9, b=3000)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["stored in baseline.json: b"])
    assert result.stdout.str().count("stored in") == 1
    baseline = Baseline.read(known)
    assert baseline.counts("b", HERE)["bytes"] == 3000
    assert baseline.counts("a", HERE) == COUNTS
    measured = baseline.values["times"][HERE.machine]["measured"]
    assert measured["command"] == "pytest --benchmark --update-baseline"
    assert {"environment", "commit", "load_average", "finished"} <= set(measured)
    known.unlink()
    assert run("--benchmark", "--update-baseline").ret == 0
    assert run("--benchmark").ret == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update-baseline"], "*--update-baseline stores what --benchmark measures; give both"),
        (["--benchmark"], "*there is no baseline *; make it: `pytest --benchmark --update-baseline`"),
        (["--benchmark", "--update-baseline", "-n2"], "*one case at a time*-n0"),
        (["--benchmark", "--update-baseline", "--dist=load"], "*one case at a time*-n0"),
        (["--benchmark", "--update-baseline", "--benchmark-disable"], "*--benchmark-disable disables what*"),
        (["--benchmark", "--update-baseline", "--benchmark-skip"], "*--benchmark-skip disables what*"),
        (["--benchmark", "--update-baseline", "-p", "no:benchmark"], "*--benchmark needs pytest-benchmark; pip*bench*"),
        (["--benchmark", "--update-baseline", "-k", "nothing"], "*no case is among the chosen tests*"),
    ],
)
def test_wrong_use(run: Run, options: list[str], message: str) -> None:
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


SMOKE = """
    def test_case(benchmark, baseline_gate):
        assert benchmark.disabled is {a}
        assert baseline_gate is None
        benchmark.pedantic(lambda: None)
"""


def test_without_the_option_benchmarks_run_once(run: Run) -> None:
    assert run(a=True, suite=SMOKE).ret == 0
    assert run("--benchmark-min-rounds=1", a=False, suite=SMOKE).ret == 0


@pytest.mark.slow
def test_without_the_option_xdist_neither_warns_nor_measures(run: Run) -> None:
    result = run("-n1", a=True, suite=SMOKE)
    result.assert_outcomes(passed=1)
    assert "xdist plugin is active" not in result.stdout.str() + result.stderr.str()
    assert "warning" not in result.stdout.str()


def test_without_paths_the_suite_alone_is_measured(pytester: pytest.Pytester, tmp_path: Path) -> None:
    stored("a").write(tmp_path / "baseline.json")
    pytester.makepyfile("def test_other(): pass")
    options = [
        "-p",
        "bench.regression.plugin",
        "--benchmark",
        f"--baseline={tmp_path / 'baseline.json'}",
        "--collect-only",
        "-q",
    ]
    output = pytester.runpytest_inprocess(*options).stdout.str()
    assert f"{len(CASES)} tests collected" in output
    assert all(f"test_regression.py::test_case[{case.name}]" in output for case in CASES)


def test_the_plugin_brings_nothing_that_coverage_is_to_see() -> None:
    names = {"torch", "engine", "kernels", "lethe_kernels"}
    code = f"import sys, bench.regression.plugin; print(sorted({names} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- planted regressions, really measured -----------------------------------------------------------------------------

# In each the original does its own work and then part of it again, or copies what it need not copy.
PLANTED = {
    "mask_patches, eager": """
        import lethe_kernels.mask as module
        real = module._mask_patches_eager
        def slower(images, mask, fill, patch_size):
            more = round(0.3 * len(images))
            real(images[:more], mask[:more], fill, patch_size)
            return real(images, mask, fill, patch_size)
        module._mask_patches_eager = slower
    """,
    "attention_rollout, eager": """
        import lethe_kernels.rollout as module
        real, extra = module._rollout_row_eager, [0.0]
        def slower(queries, keys, **options):
            extra[0] += 0.3 * len(queries[0])
            more, extra[0] = int(extra[0]), extra[0] % 1
            if more:
                real([q[:more] for q in queries], [k[:more] for k in keys], **options)
            return real(queries, keys, **options)
        module._rollout_row_eager = slower
    """,
    "retain step, fp32": """
        import dataclasses
        from engine.methods.lethe import Lethe
        real = Lethe.loss
        def copying(self, model, batch, phase):
            return real(self, model, dataclasses.replace(batch, images=batch.images.clone()), phase)
        Lethe.loss = copying
    """,
}


@pytest.mark.slow
@pytest.mark.minutes
def test_planted_regressions_are_found_and_named(tmp_path: Path) -> None:
    def pytest_run(*options: str, plant: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "planted.py").write_text("\n".join(line[8:] for line in plant.splitlines()))
        chosen = [f"bench/regression/test_regression.py::test_case[{name}]" for name in PLANTED]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--benchmark", f"--baseline={tmp_path / 'baseline.json'}", "-q",
             "-p", "no:cacheprovider", "-p", "planted", *chosen, *options],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    updated = pytest_run("--update-baseline")
    assert updated.returncode == 0, updated.stdout
    clean = pytest_run()
    assert clean.returncode == 0, clean.stdout
    for name, plant in PLANTED.items():
        found = pytest_run(plant=plant)
        assert found.returncode == 1, found.stdout
        measure = "bytes" if "step" in name else "time"
        assert f"{name}: {measure} is 1." in found.stdout, found.stdout
        others = [other for other in PLANTED if other != name]
        assert not any(
            f"FAILED bench/regression/test_regression.py::test_case[{other}]" in found.stdout for other in others
        )
