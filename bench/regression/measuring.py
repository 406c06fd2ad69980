"""Measurements of `pytest --benchmark`: a case and its reference in turn, and the memory, flops and bytes of one call.

**Time** is the ratio of the case to its reference. Both run in every round, the order turning from round to round, and
a sample is as many calls as take `SAMPLE_SECONDS`. A sample is its wall-clock time, or the processor time of this
process if another process ran in between. The ratio is that of the means of the fastest nine tenths: a slowdown
in one call of three changes it, unlike a median or a quartile, and most disturbance (shared caches and memory) is in
the slowest tenth. On a busy machine it varied between runs by a factor of 1.01 to 1.05, and by 1.14
if tensors of 1 MB just miss a cache; lower quartiles of wall-clock times varied by up to 1.3.
A first ratio beyond the threshold is measured again: the case is built anew and measured over more rounds, and the
second ratio alone is judged. A real slowdown occurs both times.

**Memory** is as in `bench.harness.measure`. **Flops** are counted by torch's FlopCounterMode (products of matrices,
attention and convolution), **bytes** are inputs and outputs of every operation that is not a view; both include
custom operations.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.measure import Call, stopwatch, tracked_memory, turns
from bench.kernel_speed.kernel_peers import close
from bench.regression.baseline import THRESHOLDS, TIME, Place
from bench.regression.cases import Case, Work
from engine.runtime.environment import environment

SAMPLE_SECONDS = 0.02
# Rounds of the first measurement; of the second, and of what the baseline stores, as multiples of them.
ROUNDS, SECOND_LOOK = 40, 3
# Calls before anything is counted or timed: the training steps have then seen all of their images, which the loader
# keeps decoded, and their optimizer has its moments.
WARM_UP = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one call in every round, of the case and of the reference."""

    ours: list[float]
    reference: list[float]

    @property
    def ratio(self) -> float:
        return fast_mean(self.ours) / fast_mean(self.reference)

    def kept(self) -> dict[str, Any]:
        """Return the figures of the baseline; seconds are for information."""
        seconds = {
            name: {"fast_mean": fast_mean(values), "median": statistics.median(values), "least": min(values)}
            for name, values in (("ours", self.ours), ("reference", self.reference))
        }
        return {TIME: self.ratio, "seconds": seconds, "rounds": len(self.ours)}


def fast_mean(values: Sequence[float]) -> float:
    """Return the mean without the slowest tenth."""
    return statistics.fmean(sorted(values)[: len(values) - len(values) // 10])


def run_case(case: Case, benchmark: Any, gate: Any, device: torch.device) -> None:
    """Run a case on pytest-benchmark's fixture: once if that is disabled, else measured.

    gate: judges the measurement (`bench.regression.plugin.Gate`); None for no judgement.
    """
    if gate is not None and gate.against_revision(place(device)):
        benchmark.disabled = True  # two other processes measure
        benchmark.pedantic(gate.compare, (case.name, case.threshold))
        return
    stored = gate.stored(case.name, place(device)) if gate else None
    work = case.build(device)
    try:
        if benchmark.disabled:
            benchmark.pedantic(check, (case, work))
            return
        check(case, work)
        counted = counts(work.ours, device)
        updating = gate is not None and gate.updating  # what is stored, every later run is compared with
        times = _measured(work, benchmark, device, ROUNDS * (SECOND_LOOK if updating else 1))
        benchmark.extra_info.update({**times.kept(), **counted, "reference_seconds": times.reference})
    finally:
        work.close()
    if gate is None:
        return
    limit = case.threshold or THRESHOLDS[TIME]
    if stored and times.ratio > limit * stored[TIME]:
        second = _second_look(case, device)
        gate.second_quotients[case.name] = times.ratio, second.ratio
        benchmark.extra_info["second_look"] = {**second.kept(), "ours_seconds": second.ours}
        times = second
    gate.judge(case.name, times.kept(), counted, case.threshold)


def check(case: Case, work: Work) -> None:
    """Raise bench.harness.measure.WrongResultError if the case and the reference differ."""
    pairs = (
        (each if isinstance(each, tuple) else (each,)) for each in map(work.summary, (work.ours(), work.reference()))
    )
    for mine, other in zip(*pairs, strict=True):
        close(f"{case.name}: ours and the reference", mine, other.double(), work.tolerance)


def _measured(work: Work, benchmark: Any, device: torch.device, rounds: int) -> Times:
    """Return the rounds of pytest-benchmark: those of the case, with the reference before or after each."""
    pair = Pair(work, device)
    setup, target, teardown = pair.interleaved()
    benchmark.pedantic(target, setup=setup, teardown=teardown, rounds=rounds)
    benchmark.extra_info["calls_per_round"] = pair.calls
    return pair.times()


def _second_look(case: Case, device: torch.device) -> Times:
    work = case.build(device)
    try:
        pair = Pair(work, device)
        for name in turns(tuple(pair.samples), SECOND_LOOK * ROUNDS, math.inf):
            pair.sample(name)
        return pair.times()
    finally:
        work.close()


class Pair:
    """A case and its reference, ready to be timed."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {"ours": [], "reference": []}
        self.calls: dict[str, int] = {}
        self.samples: dict[str, Call] = {}
        for name, call in (("ours", work.ours), ("reference", work.reference)):
            least = min(stopwatch(call, device)[0] for _ in range(WARM_UP))
            self.calls[name] = math.ceil(SAMPLE_SECONDS / least)
            self.samples[name] = repeated(call, self.calls[name])

    def sample(self, name: str) -> None:
        self.seconds[name].append(seconds_of(self.samples[name], self.device) / self.calls[name])

    def times(self) -> Times:
        return Times(**self.seconds)

    def interleaved(self) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
        """Return (setup, target, teardown) for `benchmark.pedantic`.

        The reference runs before the case in every other round, after it in the rest.
        """
        number = iter(range(1 << 30))
        first = {"reference": True}

        def setup() -> None:
            first["reference"] = next(number) % 2 == 0
            if first["reference"]:
                self.sample("reference")

        def teardown() -> None:
            if not first["reference"]:
                self.sample("reference")

        return setup, lambda: self.sample("ours"), teardown


def seconds_of(call: Call, device: torch.device) -> float:
    """Return the wall-clock time, without the time of other processes that ran in between."""
    taken, processor = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.process_time()
    wall, _ = stopwatch(call, device)
    processor = time.process_time() - processor
    disturbed = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > taken
    return processor if disturbed and device.type == "cpu" else wall


def repeated(call: Call, times: int) -> Call:
    def run() -> None:
        for _ in range(times):
            call()

    return run


# --- what is counted --------------------------------------------------------------------------------------------------


def counts(call: Call, device: torch.device) -> dict[str, float]:
    """Return peak and allocated bytes, flops and moved bytes of one call each.

    Calls before them are not counted.
    """
    for _ in range(WARM_UP):
        call()
    gc.collect()  # otherwise pending garbage would be released during some counted call
    memory = tracked_memory(call, device, before=1)
    with FlopCounterMode(display=False) as flops, _Moved() as moved:
        call()
    return {
        "peak": memory.peak,
        "allocated": memory.allocated,
        "flops": flops.get_total_flops(),
        "bytes": moved.bytes,
    }


class _Moved(TorchDispatchMode):
    """Sum of the bytes of tensors that operations read and write; views and uninitialised memory do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lethe":
            # A custom operation is one opaque call to a mode; its kernel, run under this mode again, is not.
            device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        result = func(*args, **kwargs)
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        view = not func._schema.is_mutable and all(each.untyped_storage()._cdata in known for each in outputs)
        if not view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


# --- where figures hold -----------------------------------------------------------------------------------------------


def place(device: torch.device) -> Place:
    """Return the fingerprint of this machine and of its software."""
    torch_version = f"torch {'.'.join(torch.__version__.split('.')[:2])}"
    about = environment()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{about['cpu']}{_cpu_model()}"
    return Place(f"{hardware}, threads: {about['threads']}, {torch_version}", f"{torch_version}, {device.type}")


def _cpu_model() -> str:
    """Return family and model number: the name of a virtual machine's CPU may be "AMD EPYC" and no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f" (family {known['cpu family']}, model {known['model']})" if {"cpu family", "model"} <= set(known) else ""
