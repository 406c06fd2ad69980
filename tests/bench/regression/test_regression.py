"""The judgement of `pytest --benchmark`, its file, what it measures, and a case from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.harness.measure import WrongResultError, tracked_memory
from bench.regression import measuring as regression
from bench.regression.baseline import COUNTED, THRESHOLDS, TIME, Baseline, Place, Verdict, judge
from bench.regression.cases import CASES, Case, Work
from bench.regression.measuring import Pair, Times, check, counts, fast_mean, run_case, seconds_of
from bench.regression.plugin import BASELINE, SUITE
from bench.regression.table import lines
from engine.errors import UserError
from lethe_kernels import attention_rollout, mask_patches

CPU = torch.device("cpu")
HERE = Place("a CPU, threads: 1, torch 2.0", "torch 2.0, cpu")
COUNTS = dict.fromkeys(COUNTED, 1000.0)
FIGURES = {TIME: 0.5, **COUNTS}
ROOT = SUITE.parents[1]


def stored(*names: str, ratio: float = 0.5, place: Place = HERE) -> Baseline:
    return Baseline().updated(place, {}, {name: ({TIME: ratio}, COUNTS) for name in names})


# --- judgement --------------------------------------------------------------------------------------------------------


def states(now: dict[str, float], threshold: float | None = None) -> dict[str, str]:
    return {
        verdict.measure: verdict.state for verdict in judge("a", now, FIGURES, threshold) if verdict.state != "same"
    }


def test_a_measure_beyond_its_threshold_is_a_regression() -> None:
    assert set(FIGURES) == set(THRESHOLDS)
    assert states(FIGURES) == {}
    for measure, threshold in THRESHOLDS.items():
        assert 1 < threshold <= 1.15
        for factor, state in ((0.9999, None), (1.00001, "regression")):
            changed = FIGURES | {measure: FIGURES[measure] * threshold * factor}
            assert states(changed).get(measure) == state
            assert len(states(changed)) <= 1
        assert states(FIGURES | {measure: FIGURES[measure] / threshold * 0.9999}) == {measure: "better"}
        assert states(FIGURES | {measure: math.nan}) == {measure: "regression"}


def test_a_case_may_have_a_threshold_of_its_own_for_time_alone() -> None:
    slower = FIGURES | {TIME: 0.62, "bytes": 1002.0}
    assert states(slower) == {TIME: "regression", "bytes": "regression"}
    assert states(slower, threshold=1.25) == {"bytes": "regression"}


def test_a_copy_of_one_batch_in_a_training_step_is_beyond_the_threshold() -> None:
    step = {"bytes": 465_519_896, "allocated": 164_972_580}  # of the retain step in fp32, as counted
    images = 64 * 3 * 32 * 32 * 4
    assert 1 + 2 * images / step["bytes"] > THRESHOLDS["bytes"]
    assert 1 + images / step["allocated"] > THRESHOLDS["allocated"]


def test_what_was_nothing_and_is_something_is_a_regression() -> None:
    assert Verdict("a", "flops", 0, 0, 1.0).state == "same"
    assert Verdict("a", "flops", 5, 0, 1.0).state == "regression"


def test_a_verdict_says_case_measure_numbers_and_threshold() -> None:
    slower, _ = Verdict("a step", TIME, 0.65, 0.5, 1.15), None
    assert str(slower) == (
        "a step: time is 1.3 x the baseline's (0.650 x the reference, baseline 0.500 x the reference), threshold 1.15"
    )
    more = Verdict("a step", "bytes", 2_000, 1_000, 1.001)
    assert str(more) == "a step: bytes is 2 x the baseline's (2,000, baseline 1,000), threshold 1.001"
    assert "faster than the baseline: update it" in str(Verdict("a step", TIME, 0.2, 0.5, 1.15))
    assert "less than the baseline: update it" in str(Verdict("a step", "peak", 1, 2, 1.01))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_baseline_that_lacks_something_says_how_to_get_it() -> None:
    baseline = stored("a")
    assert baseline.time("a", HERE) == 0.5
    assert baseline.counts("a", HERE) == COUNTS
    elsewhere = dataclasses.replace(HERE, machine="another CPU")
    for ask, message in (
        (lambda: baseline.time("b", HERE), "no time of 'b'"),
        (lambda: baseline.counts("b", HERE), "no counts of 'b'"),
        (lambda: baseline.time("a", elsewhere), r"no times of this machine, another CPU \(it has: a CPU"),
        (lambda: baseline.counts("a", Place(HERE.machine, "torch 3.0, cpu")), "no counts of torch 3.0, cpu"),
        (lambda: Baseline().time("a", HERE), r"\(it has: nothing\)"),
    ):
        with pytest.raises(UserError, match=f"{message}.*`pytest --benchmark --update-baseline`$"):
            ask()
    assert baseline.counts("a", elsewhere) == COUNTS  # what is counted holds on every machine
    del baseline.values["counts"][HERE.software]["a"]["bytes"]
    with pytest.raises(UserError, match="no counts of 'a'"):
        baseline.counts("a", HERE)


def test_an_update_rewrites_what_ran_and_nothing_else(tmp_path: Path) -> None:
    elsewhere = Place("another CPU", "torch 3.0, cpu")
    both = stored("a", "b").updated(elsewhere, {"when": 1}, {"a": ({TIME: 9.0}, COUNTS)})
    before = json.dumps(both.values)
    after = both.updated(HERE, {"when": 2}, {"b": ({TIME: 0.7}, {**COUNTS, "flops": 7})})
    assert json.dumps(both.values) == before
    after.write(tmp_path / "baseline.json")
    read = Baseline.read(tmp_path / "baseline.json")
    assert [read.time(name, HERE) for name in "ab"] == [0.5, 0.7]
    assert [read.counts(name, HERE)["flops"] for name in "ab"] == [1000, 7]
    assert read.time("a", elsewhere) == 9.0
    assert [read.values["times"][each.machine]["measured"] for each in (HERE, elsewhere)] == [{"when": 2}, {"when": 1}]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    with pytest.raises(UserError, match="there is no baseline"):
        Baseline.read(file)
    assert Baseline.read(file, must_exist=False).values == {"times": {}, "counts": {}}
    for text, message in (("{", "is not JSON"), ("[]", "is no baseline"), ('{"times": {}}', "is no baseline")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            Baseline.read(file, must_exist=False)


def test_the_stored_baseline_has_exactly_the_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    values = Baseline.read(BASELINE).values
    assert values["times"]
    assert values["counts"]
    for machine in values["times"].values():
        assert set(machine["cases"]) == set(names)
    for cases in values["counts"].values():
        assert {name: set(each) for name, each in cases.items()} == {name: set(COUNTED) for name in names}


# --- measuring --------------------------------------------------------------------------------------------------------


def test_times() -> None:
    assert fast_mean([5.0, 1.0, 3.0, 2.0, 4.0]) == 3.0
    assert fast_mean([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 8.0]) == 2.0
    times = Times(ours=[3.0] * 9 + [90.0], reference=[70.0] + [2.0] * 9)
    assert times.ratio == 1.5
    assert times.kept()["seconds"]["ours"] == {"fast_mean": 3.0, "median": 3.0, "least": 3.0}
    # Three calls of ten that take twice as long are a slowdown of 1.3, and beyond the threshold.
    assert Times(ours=[2.0] * 12 + [1.0] * 28, reference=[1.0] * 40).ratio > THRESHOLDS[TIME]


def test_the_processor_taken_away_does_not_count_and_waiting_does(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([5, 5, 5, 6])
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=next(switches)))
    assert seconds_of(lambda: time.sleep(0.05), CPU) >= 0.05
    assert seconds_of(lambda: time.sleep(0.05), CPU) < 0.04


def test_ours_and_the_reference_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    pair = Pair(Work(ours=lambda: time.sleep(0.004), reference=lambda: time.sleep(0.009)), CPU)
    assert pair.calls["ours"] in (4, 5)
    assert pair.calls["reference"] in (2, 3)
    monkeypatch.setattr(pair, "sample", order.append)
    setup, target, teardown = pair.interleaved()
    for _ in range(4):
        setup()
        target()
        teardown()
    assert order == ["reference", "ours", "ours", "reference"] * 2


def test_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=0))
    pair = Pair(Work(ours=lambda: time.sleep(0.004), reference=lambda: time.sleep(0.008)), CPU)
    for name in pair.samples:
        pair.sample(name)
    assert 0.004 <= pair.times().ours[0] < 0.008 <= pair.times().reference[0] < 0.016


def test_results_that_differ_are_refused() -> None:
    good = Work(ours=lambda: torch.ones(3), reference=lambda: torch.ones(3))
    check(Case(name="a", build=lambda device: good), good)
    for ours in (lambda: torch.ones(3) * 1.01, lambda: torch.ones(4), lambda: torch.ones(3) * torch.nan):
        with pytest.raises(WrongResultError, match="a: ours and the reference"):
            check(Case(name="a", build=lambda device: good), dataclasses.replace(good, ours=ours))
    pairs = Work(ours=lambda: (torch.ones(3), torch.ones(2)), reference=lambda: (torch.ones(3), torch.zeros(2) + 0.5))
    with pytest.raises(WrongResultError):
        check(Case(name="a", build=lambda device: pairs), pairs)


def test_counted_by_hand() -> None:
    x, y = torch.ones(100, 50), torch.ones(50, 30)

    def call() -> torch.Tensor:
        product = x @ y  # 20,000 + 6,000 read, 12,000 written
        turned = product.T[:5].reshape(-1, 1)  # a copy of 5 x 100: 2,000 read and written
        turned.add_(turned)  # 4,000 read, 2,000 returned
        torch.empty(1000)  # allocated, and nobody writes to it
        return turned.squeeze(1)

    found = counts(call, CPU)
    assert found["flops"] == 2 * 100 * 50 * 30
    assert found["bytes"] == 38_000 + 4_000 + 6_000
    assert found["allocated"] == 12_000 + 2_000 + 4_000
    assert found["peak"] == 18_000


def test_counts_see_inside_our_own_operations() -> None:
    images, mask = torch.ones(2, 3, 8, 8), torch.zeros(2, 16, dtype=torch.bool)
    found = counts(lambda: mask_patches(images, mask, patch_size=2, backend="eager"), CPU)
    assert found["bytes"] > 2 * images.numel() * 4 + mask.numel()  # more than what goes in and comes out
    queries = [torch.randn(1, 2, 5, 4) for _ in range(2)]
    found = counts(lambda: attention_rollout(queries, queries, backend="eager"), CPU)
    whole, row, product = 2 * 2 * 5 * 5 * 4, 2 * 2 * 1 * 5 * 4, 2 * 5 * 5
    assert found["flops"] == whole + row + product


def test_memory_that_replaces_what_the_last_call_left() -> None:
    held: list[torch.Tensor] = []

    def call() -> None:
        held.clear()
        held.append(torch.ones(1000))

    call()
    assert tracked_memory(call, CPU, before=1) == (0, 4000)
    assert tracked_memory(lambda: torch.ones(1000) + torch.ones(500).sum(), CPU) == (8004, 10_004)


# --- a case from end to end, with times that are given ----------------------------------------------------------------


class FakeBenchmark:
    """Of pytest-benchmark's fixture what is used."""

    def __init__(self, disabled: bool = False) -> None:
        self.disabled, self.extra_info, self.ran = disabled, {}, 0  # type: ignore[var-annotated]

    def pedantic(self, target: Any, args: Any = (), **options: Any) -> None:
        self.ran += 1
        target(*args)


class FakeGate:
    def __init__(self, baseline: float | None) -> None:
        self.baseline, self.updating = baseline, baseline is None
        self.second_quotients, self.judged = {}, []  # type: ignore[var-annotated]

    def against_revision(self, place: Place) -> bool:
        return False

    def stored(self, case: str, place: Place) -> dict[str, float] | None:
        return None if self.baseline is None else FIGURES | {TIME: self.baseline}

    def judge(self, case: str, times: dict[str, Any], counted: dict[str, float], threshold: float | None) -> None:
        self.judged.append(times[TIME])


@pytest.mark.parametrize(
    ("baseline", "threshold", "judged", "second"),
    [(1.8, None, 2.0, False), (1.7, None, 1.5, True), (1.7, 1.2, 2.0, False), (None, None, 2.0, False)],
)
def test_a_second_look_is_taken_at_what_seems_slower_and_alone_counts(
    monkeypatch: pytest.MonkeyPatch, baseline: float | None, threshold: float | None, judged: float, second: bool
) -> None:
    closed: list[bool] = []
    work = Work(ours=lambda: torch.ones(3), reference=lambda: torch.ones(3), close=lambda: closed.append(True))
    rounds: list[int] = []

    def measured(_work: Work, _benchmark: Any, _device: torch.device, count: int) -> Times:
        rounds.append(count)
        return Times(ours=[2.0], reference=[1.0])

    monkeypatch.setattr(regression, "_measured", measured)
    monkeypatch.setattr(regression, "_second_look", lambda *_: Times(ours=[1.5], reference=[1.0]))
    gate, benchmark = FakeGate(baseline), FakeBenchmark()
    run_case(Case(name="a", build=lambda device: work, threshold=threshold), benchmark, gate, CPU)
    assert gate.judged == [judged]
    assert gate.second_quotients == ({"a": (2.0, 1.5)} if second else {})
    assert set(COUNTED) <= set(benchmark.extra_info)
    assert ("second_look" in benchmark.extra_info) is second
    assert closed == [True]
    assert rounds == [regression.ROUNDS * (1 if baseline else regression.SECOND_LOOK)]


def test_a_second_look_measures_anew_over_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "ROUNDS", 2)
    monkeypatch.setattr(regression, "SAMPLE_SECONDS", 1e-5)
    built: list[int] = []

    def build(device: torch.device) -> Work:
        built.append(1)
        return Work(ours=lambda: torch.ones(3), reference=lambda: torch.ones(3))

    times = regression._second_look(Case(name="a", build=build), CPU)
    assert len(built) == 1
    assert len(times.ours) == len(times.reference) == 2 * regression.SECOND_LOOK > 2


def test_without_the_option_a_case_runs_once_and_must_be_right() -> None:
    ran: list[str] = []
    work = Work(
        ours=lambda: ran.append("ours") or torch.ones(2), reference=lambda: ran.append("reference") or torch.ones(2)
    )
    run_case(Case(name="a", build=lambda device: work), FakeBenchmark(disabled=True), None, CPU)
    assert ran == ["ours", "reference"]
    wrong = dataclasses.replace(work, ours=lambda: torch.zeros(2))
    with pytest.raises(WrongResultError):
        run_case(Case(name="a", build=lambda device: wrong), FakeBenchmark(disabled=True), None, CPU)


def test_the_table() -> None:
    counted = COUNTS | {"bytes": 1010.0}
    measured = {"a": ({TIME: 0.6}, counted), "b": ({TIME: 0.7}, COUNTS)}
    head, first, second = lines(measured, {"a": judge("a", {TIME: 0.6, **counted}, FIGURES)}, 140)
    assert head.split() == ["case", "ratio", "baseline", "quotient", "threshold", *COUNTED]
    assert first.split()[:5] == ["a", "0.600", "0.500", "1.200", "1.150"]
    assert "1010 B (+1.00%)" in first
    assert first.count("%") == 1
    assert second.split()[:5] == ["b", "0.700", "-", "-", "-"]
