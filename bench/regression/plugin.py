"""Pytest plugin that measures the cases of `bench/regression/test_regression.py` and fails the test of a regression.

    pytest --benchmark                     compares with the stored baseline, if it has figures of this machine and this
                                           release of PyTorch; otherwise with the merge base with the main branch
    pytest --benchmark --against REV       compares with a git revision, which is measured in the same run
    pytest --benchmark --update-baseline   stores the figures of the cases that ran; -k chooses some

Without these, and without an option of pytest-benchmark's own, the cases run once as smoke tests.

It is loaded before coverage starts, so it imports measured modules only when measurement is requested.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.regression.against import Compared, Comparison, Revision
    from bench.regression.baseline import Baseline, Place, Verdict

SUITE = Path(__file__).resolve().parent
BASELINE = SUITE / "baseline.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="Measure the suite in bench/ and fail if it is worse than the baseline or than a git revision.",
    )
    group.addoption("--update-baseline", action="store_true", help="With --benchmark: store the figures instead.")
    group.addoption(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="--baseline=FILE, in one word; default: bench/regression/baseline.json, if it fits this machine.",
    )
    group.addoption(
        "--against",
        metavar="REV",
        help="With --benchmark: compare with this git revision, measured in the same run. Default, if no stored "
        "baseline fits: the merge base with the main branch.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    chosen = early_config.known_args_namespace
    if chosen.benchmark and not chosen.file_or_dir:
        args.append(str(SUITE))
        chosen.file_or_dir = [str(SUITE)]
    early_config.stash[_THEIR_OPTIONS] = any(argument.startswith("--benchmark-") for argument in args)


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not option.benchmark:
        if option.update_baseline:
            raise pytest.UsageError("--update-baseline stores what --benchmark measures; give both")
        if option.against is not None:
            raise pytest.UsageError("--against compares what --benchmark measures; give both")
        if not config.stash.get(_THEIR_OPTIONS, False):
            option.benchmark_disable = True
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark; pip install 'lethe-unlearning[bench]'")
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--benchmark times one case at a time; leave out xdist's -n and --dist, or give -n0")
    for name in ("disable", "skip"):
        if config.getoption(f"benchmark_{name}"):
            raise pytest.UsageError(f"--benchmark-{name} disables what --benchmark measures; leave out one")

    if option.against is not None and (option.update_baseline or option.baseline is not None):
        other = "--update-baseline" if option.update_baseline else "--baseline"
        raise pytest.UsageError(f"--against compares with a git revision, {other} with a file; leave out one")

    from bench.regression.against import choose_revision
    from bench.regression.baseline import Baseline
    from engine.errors import UserError

    file = option.baseline or BASELINE
    try:
        if option.against is not None:
            gate = Gate(Baseline(), file, False, choose_revision(option.against))
        else:
            gate = Gate(Baseline.read(file, must_exist=not option.update_baseline), file, option.update_baseline)
    except UserError as error:
        raise pytest.UsageError(f"--benchmark: {error}") from None
    gate.any_machine = option.against is None and option.baseline is None and not option.update_baseline
    config.stash[_GATE] = gate


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Make cases in bfloat16 slow tests if nothing is measured: some CPUs take ten times as long for them."""
    if not config.option.benchmark:
        for item in items:
            if _is_case(item) and "bf16" in item.name:
                item.add_marker("slow")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.benchmark and not any(map(_is_case, session.items)):
        raise pytest.UsageError("--benchmark: no case is among the chosen tests; give no path, or bench/")


def _is_case(item: pytest.Item) -> bool:
    return "baseline_gate" in getattr(item, "fixturenames", ())


@pytest.fixture
def baseline_gate(request: pytest.FixtureRequest) -> Gate | None:
    """Return the gate that judges measured cases; None if nothing is to be judged."""
    return request.config.stash.get(_GATE, None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    gate = session.config.stash.get(_GATE, None)
    if gate is not None:
        gate.save()
        gate.close()
        if gate.compared_nothing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    gate = config.stash.get(_GATE, None)
    if gate is not None:
        gate.show(terminalreporter)


class Gate:
    """The baseline or the revision, and the measurements of this pytest run.

    any_machine: if the baseline has no figures of this machine and this PyTorch, compare with a revision.
    """

    def __init__(self, baseline: Baseline, path: Path, updating: bool, revision: Revision | None = None) -> None:
        self.baseline, self.path, self.updating, self.revision = baseline, path, updating, revision
        self.any_machine = False
        self.compared: dict[str, Compared] = {}
        self.not_compared: dict[str, str] = {}
        self._comparison: Comparison | None = None
        self.place: Place | None = None
        self.measured: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
        self.verdicts: dict[str, list[Verdict]] = {}
        self.second_quotients: dict[str, tuple[float, float]] = {}
        from bench.harness.report import Report

        self._report = Report("pytest --benchmark --update-baseline")
        self._saved = False

    def stored(self, case: str, place: Place) -> dict[str, float] | None:
        """Return the baseline of a case, None while it is being updated. Fails the test if there is none."""
        from bench.regression.baseline import TIME
        from engine.errors import UserError

        self.place = place
        if self.updating:
            return None
        try:
            return {**self.baseline.counts(case, place), TIME: self.baseline.time(case, place)}
        except UserError as error:
            pytest.fail(f"{case}: {error}", pytrace=False)

    def against_revision(self, place: Place) -> bool:
        """Return whether cases are compared with a revision, not with stored figures.

        Fails the test if neither can be.
        """
        from bench.regression.against import choose_revision
        from bench.regression.baseline import UPDATE
        from engine.errors import UserError

        self.place = place
        if self.revision is None and self.any_machine and (lacking := self.baseline.lacking(place)):
            try:
                self.revision = choose_revision(None)
            except UserError as error:
                pytest.fail(f"{lacking}; measure it: `{UPDATE}`; {error}", pytrace=False)
        return self.revision is not None

    def compare(self, case: str, threshold: float | None = None) -> None:
        """Compare a case with the revision.

        Fail the test of a regression, skip that of a case that cannot be compared.
        """
        from bench.regression.against import Comparison, NotComparable, SideError
        from bench.regression.baseline import THRESHOLDS, TIME

        assert self.revision is not None
        limit = threshold or THRESHOLDS[TIME]
        try:
            self._comparison = self._comparison or Comparison(self.revision)
            self.compared[case] = compared = self._comparison.compare(case, limit)
        except SideError as error:
            pytest.fail(f"{case}: {error}", pytrace=False)
        except NotComparable as reason:
            what = "new" if reason.new else "not comparable"
            self.not_compared[case] = f"{what}: {self.revision.short} cannot run it ({reason})"
            pytest.skip(self.not_compared[case])
        self.verdicts[case] = compared.verdicts(case, limit, self.revision.short)
        if len(compared.quotients) > 1:
            self.second_quotients[case] = (compared.quotients[0], compared.quotients[1])
        worse = [str(verdict) for verdict in self.verdicts[case] if verdict.state == "regression"]
        if worse:
            pytest.fail("\n".join([*worse, *self._both_quotients(case)]), pytrace=False)

    @property
    def compared_nothing(self) -> bool:
        """Whether a revision was to be compared with, and none of its cases could be."""
        return not self.compared and any(text.startswith("not") for text in self.not_compared.values())

    def judge(self, case: str, times: dict[str, Any], counts: dict[str, float], threshold: float | None = None) -> None:
        """Store the figures of a case; fail the test of a regression."""
        from bench.regression.baseline import TIME, judge

        assert self.place is not None
        self.measured[case] = times, counts
        stored = self.stored(case, self.place)
        if stored is None:
            return
        self.verdicts[case] = judge(case, {TIME: times[TIME], **counts}, stored, threshold)
        worse = [str(verdict) for verdict in self.verdicts[case] if verdict.state == "regression"]
        if worse:
            pytest.fail("\n".join([*worse, *self._both_quotients(case)]), pytrace=False)

    def _both_quotients(self, case: str) -> Iterable[str]:
        if case in self.second_quotients:
            first, second = self.second_quotients[case]
            what = "the reference" if self.revision is None else f"that of {self.revision.short}"
            yield f"{case}: time was {first:.3f} x {what} at first, {second:.3f} x in a second, longer measurement"

    def close(self) -> None:
        """End the processes of a comparison."""
        if self._comparison is not None:
            self._comparison.close()

    def save(self) -> None:
        """Rewrite the cases that were measured, if the option for it was given."""
        if not (self.updating and self.measured):
            return
        assert self.place is not None
        self.baseline = self.baseline.updated(self.place, self._report.write({}, None), self.measured)
        self.baseline.write(self.path)
        self._saved = True

    def show(self, reporter: Any) -> None:
        from bench.regression.table import lines, lines_against

        if self.place is None:
            return
        where = "the baseline" if self.revision is None else f"{self.revision.short}, {self.revision.text}"
        reporter.section(f"benchmark: against {where}", sep="-")
        load = ", ".join(f"{value:.2f}" for value in self._report.load)
        reporter.write_line(f"{self.place.machine}; load average {load} at the beginning")
        width = max(120, reporter._tw.fullwidth)
        if self.revision is None:
            table = lines(self.measured, self.verdicts, width)
        else:
            table = lines_against(self.compared, self.verdicts, self.revision.short, width)
        for line in table:
            reporter.write_line(line)
        for case, reason in self.not_compared.items():
            reporter.write_line(f"{case}: {reason}", yellow=True)
        if self.compared_nothing:
            reporter.write_line("no case could be compared; name a later revision by --against REV", red=True)
        for case, verdicts in self.verdicts.items():
            for verdict in verdicts:
                if verdict.state != "same":
                    reporter.write_line(
                        str(verdict), red=verdict.state == "regression", green=verdict.state == "better"
                    )
            for line in self._both_quotients(case):
                reporter.write_line(line)
        if self._saved:
            reporter.write_line(f"stored in {self.path.name}: {', '.join(self.measured)}")


_THEIR_OPTIONS = pytest.StashKey[bool]()
_GATE = pytest.StashKey[Gate]()
