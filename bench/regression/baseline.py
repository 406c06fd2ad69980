"""The baseline of `pytest --benchmark`: the stored figures of each case, and what counts as a regression.

Time is stored as the ratio of this project's case to its reference, both timed in one run, so that the machine's speed
and much of its noise cancel; it holds for one machine. Memory, flops and bytes are counted and the same on every
machine; they hold for one release of PyTorch, which may split an operation otherwise, and for one kind of device.

The file: {"times": {MACHINE: {"measured": heading of the last update, "cases": {NAME: {"time": ratio, "seconds": of
one call, for information}}}}, "counts": {SOFTWARE: {NAME: {MEASURE: number}}}}.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError
from engine.runtime.files import write_json

UPDATE = "pytest --benchmark --update-baseline"

TIME = "time"
# Largest allowed quotient of a measure and the baseline's. Time: runs without a change on a busy virtual machine with
# two cores stay within about 1.1, and a slowdown of 1.3 has to be detected. Counts are the same in every run. Flops and
# bytes agree to the last digit, so that a copy of one batch of images in a training step, a few thousandths of its
# bytes, is detected; the tolerance is one more operation on a handful of numbers. Memory has a larger tolerance,
# because libraries below PyTorch use scratch space of a size that depends on the processor.
THRESHOLDS = {TIME: 1.15, "peak": 1.001, "allocated": 1.001, "flops": 1.0001, "bytes": 1.001}
COUNTED = tuple(measure for measure in THRESHOLDS if measure != TIME)

State = Literal["same", "regression", "better"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One measure of one case compared with the baseline. quotient: now / baseline."""

    case: str
    measure: str
    now: float
    baseline: float
    threshold: float

    @property
    def quotient(self) -> float:
        if self.now == self.baseline:
            return 1.0
        return self.now / self.baseline if self.baseline else math.inf

    @property
    def state(self) -> State:
        if not self.quotient <= self.threshold:  # NaN is a regression
            return "regression"
        return "better" if self.quotient < 1 / self.threshold else "same"

    def __str__(self) -> str:
        numbers = f"{_number(self.measure, self.now)}, baseline {_number(self.measure, self.baseline)}"
        text = f"{self.case}: {self.measure} is {self.quotient:.4g} x the baseline's ({numbers})"
        if self.state == "better":
            return (
                f"{text}: {'faster' if self.measure == TIME else 'less'} than the baseline: update it with `{UPDATE}`"
            )
        return f"{text}, threshold {self.threshold:g}"


def _number(measure: str, value: float) -> str:
    return f"{value:.3f} x the reference" if measure == TIME else f"{value:,.0f}"


def judge(
    case: str, now: Mapping[str, float], stored: Mapping[str, float], time_threshold: float | None = None
) -> list[Verdict]:
    """Return a verdict on each measure of `now`; time_threshold: the case's own, if it has one."""
    thresholds = THRESHOLDS if time_threshold is None else {**THRESHOLDS, TIME: time_threshold}
    return [Verdict(case, measure, now[measure], stored[measure], thresholds[measure]) for measure in now]


@dataclasses.dataclass(frozen=True)
class Place:
    """Scope of figures. machine: of times. software: of counts."""

    machine: str
    software: str


class Baseline:
    """The stored figures."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = values or {"times": {}, "counts": {}}

    @classmethod
    def read(cls, path: Path, must_exist: bool = True) -> Baseline:
        """Read the file. Raises UserError if it is missing or is no baseline."""
        if not path.exists() and not must_exist:
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no baseline {path}; make it: `{UPDATE}`") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); take it from version control, or remove it and make it "
                            f"anew: `{UPDATE}`") from None  # fmt: skip
        if not isinstance(values, dict) or not {"times", "counts"} <= set(values):
            raise UserError(f"{path} is no baseline: it has no `times` and `counts`; remove it and make it: `{UPDATE}`")
        return cls(values)

    def lacking(self, place: Place) -> str | None:
        """Return what has no figures at all, times or counts; None if the baseline fits this place."""
        for kind, where, what in (
            ("times", place.machine, "times of this machine,"),
            ("counts", place.software, "counts of"),
        ):
            if where not in self.values[kind]:
                return f"the baseline has no {what} {where}"
        return None

    def counts(self, case: str, place: Place) -> Mapping[str, float]:
        """Return the counted measures of a case. Raises UserError if there are none."""
        cases = self.values["counts"].get(place.software)
        if cases is None:
            raise UserError(_missing(f"counts of {place.software}", self.values["counts"]))
        if case not in cases or not set(COUNTED) <= set(cases[case]):
            raise UserError(f"the baseline has no counts of {case!r} with {place.software}; measure it: `{UPDATE}`")
        return cases[case]

    def time(self, case: str, place: Place) -> float:
        """Return the ratio of a case to its reference on this machine. Raises UserError if there is none."""
        machine = self.values["times"].get(place.machine)
        if machine is None:
            raise UserError(_missing(f"times of this machine, {place.machine}", self.values["times"]))
        if case not in machine["cases"]:
            raise UserError(f"the baseline has no time of {case!r} on {place.machine}; measure it: `{UPDATE}`")
        return float(machine["cases"][case][TIME])

    def updated(
        self, place: Place, heading: dict[str, Any], measured: Mapping[str, tuple[dict[str, Any], dict[str, float]]]
    ) -> Baseline:
        """Return a baseline with the (times, counts) of the cases that were measured; everything else is unchanged.

        heading: stored description of the circumstances.
        """
        values = copy.deepcopy(self.values)
        machine = values["times"].setdefault(place.machine, {"cases": {}})
        machine["measured"] = heading
        for name, (times, counts) in measured.items():
            machine["cases"][name] = dict(times)
            values["counts"].setdefault(place.software, {})[name] = dict(counts)
        return Baseline(values)

    def write(self, path: Path) -> None:
        write_json(path, self.values)


def _missing(what: str, known: Mapping[str, Any]) -> str:
    return f"the baseline has no {what} (it has: {'; '.join(known) or 'nothing'}); measure them: `{UPDATE}`"
