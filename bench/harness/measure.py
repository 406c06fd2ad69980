"""Measure contenders that do the same work in turn: correctness first, then peak memory, then time.

**Time.** All contenders run once in every round, in an order that turns from round to round, so that a disturbance
hits all of them; ratios are formed within a round. On CUDA by events, with the L2 cache overwritten before each call.

**Peak memory** is the maximum, during one call, of the memory allocated by PyTorch's allocator and not released, above
the value before the call. Inputs and weights are not included, results are. On CUDA that is
`torch.cuda.max_memory_allocated`; on the CPU the profiler's record of every allocation and release, which covers
fused and custom operations too. Neither includes memory that libraries take from the system directly (oneDNN's
and MKL's packing buffers, Triton's cache), memory that the allocator keeps for later, or Python objects.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
Row = dict[str, Any]

# The profiler would write its progress to the terminal; read when the first profile starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

_COUNTED = "counted call"  # in the profile
_L2_BYTES = 256 * 2**20  # more than the last-level cache of any card in `bench.harness.roofline.PEAKS`


class WrongResultError(Exception):
    """The result of a contender differs from the float64 reference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work.

    build: imports what it needs and returns the call that is measured; ImportError means that it is not installed.
    check: the error of a result against the reference; raises WrongResultError if it is too large.
    install: the command that installs it. note: how its work differs. host_bytes: main memory it is known to fill.
    """

    name: str
    build: Callable[[], Call]
    check: Callable[[Any], float]
    install: str = ""
    note: str = ""
    host_bytes: int = 0


def measure(
    contenders: Sequence[Contender], *, device: torch.device, rounds: int, seconds: float = 180.0, once: bool = False
) -> list[Row]:
    """Measure contenders and return one row for each, in their order.

    Args:
        contenders: The contenders.
        device: Device on which they run.
        rounds: Rounds at most.
        seconds: Time limit of all rounds together; at least three rounds are run.
        once: For work that takes minutes: the first call is timed, the second tracked, and no more.

    Returns:
        Rows with a status: "measured", "missing" (not installed), "not run" (memory) or "failed" (an error, or a wrong
        result: never timed).
    """
    rows: dict[str, Row] = {
        contender.name: {"contender": contender.name, "note": contender.note} for contender in contenders
    }
    calls: dict[str, Call] = {}
    for contender in contenders:
        row = rows[contender.name]
        call = _first_call(contender, row, device)
        if call is not None:
            with _outcome(row, device):
                row["peak_bytes"] = peak_bytes(call, device)
                calls[contender.name] = call
    if once:
        for name in calls:
            rows[name]["seconds"] = [rows[name]["first_seconds"]]
        return list(rows.values())
    for name, times in race(calls, device=device, rounds=rounds, seconds=seconds).items():
        rows[name]["seconds"] = times
    for contender in contenders:
        if contender.name in calls:
            with _outcome(rows[contender.name], device):  # once more: state may have piled up from call to call
                contender.check(calls[contender.name]())
    return list(rows.values())


def _first_call(contender: Contender, row: Row, device: torch.device) -> Call | None:
    """Build a contender and run it once, and store the outcome in its row; return None unless it may be timed."""
    free = free_bytes(torch.device("cpu"))
    if contender.host_bytes > free // 2:
        needed = f"copies {size(contender.host_bytes)} to main memory (computed from the shape)"
        row.update(status="not run", reason=f"{needed}, {size(free)} are free")
        return None
    with _outcome(row, device):
        try:
            call = contender.build()
        except ImportError as error:
            row.update(status="missing", reason=f"{error}; {contender.install}")
            return None
        row["first_seconds"], result = stopwatch(call, device)
        row["error"] = contender.check(result)
        return call
    return None


@contextlib.contextmanager
def _outcome(row: Row, device: torch.device) -> Iterator[None]:
    """Store an error of a contender in its row without a time, so that the others are still measured."""
    try:
        yield
        row.setdefault("status", "measured")
    except torch.OutOfMemoryError:
        row.update(status="not run", reason=f"ran out of the {size(free_bytes(device))} that are free on {device}")
    except Exception as error:
        text = str(error).strip().splitlines()
        row.update(status="failed", reason=f"{type(error).__name__}: {text[0] if text else ''}")
    if row["status"] != "measured":
        for key in ("seconds", "peak_bytes"):
            row.pop(key, None)


def race(calls: Mapping[str, Call], *, device: torch.device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of every call in every round."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for name in turns(names, rounds, seconds):
        if flush is not None:
            flush.zero_()
        times[name].append(stopwatch(calls[name], device)[0])
    return times


def turns(names: Sequence[str], rounds: int, seconds: float) -> Iterator[str]:
    """Yield every name once a round, each round beginning one name later; after three rounds no round begins late."""
    end = time.perf_counter() + seconds
    for number in range(rounds if names else 0):
        if number >= 3 and time.perf_counter() > end:
            break
        turn = number % len(names)
        yield from (*names[turn:], *names[:turn])


def stopwatch(call: Call, device: torch.device) -> tuple[float, Any]:
    """Return the seconds of one call, and its result."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


class Memory(NamedTuple):
    """Bytes of one call.

    peak: the maximum at a time above the value before the call, its result included. allocated: the sum of all
    allocations, released or not.
    """

    peak: int
    allocated: int


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the maximum allocated during the call above the value before it, its result included."""
    return tracked_memory(call, device).peak


def tracked_memory(call: Call, device: torch.device, before: int = 0) -> Memory:
    """Run the call with a record of its allocations.

    before: calls under the record ahead of the one that counts. On the CPU memory that was allocated before the record
    is released without a known size, so a call that replaces the result of the last one needs one.
    """
    if device.type == "cuda":
        for _ in range(before):
            call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        end = torch.cuda.memory_stats(device)
        return Memory(
            end["allocated_bytes.all.peak"] - start["allocated_bytes.all.current"],
            end["allocated_bytes.all.allocated"] - start["allocated_bytes.all.allocated"],
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        for _ in range(before):
            call()
        with torch.profiler.record_function(_COUNTED):
            result = call()
    del result  # not earlier: a result released inside the profile would not count at its end
    events = profile.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == _COUNTED)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    counted = [change for when, change in sorted(changes, key=lambda pair: pair[0]) if when >= began]
    return Memory(max(itertools.accumulate(counted, initial=0)), sum(change for change in counted if change > 0))


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be allocated on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ratios(row: Row, other: Row) -> list[float]:
    """Return the seconds of `row` as a multiple of those of `other`, round by round."""
    return [mine / theirs for mine, theirs in zip(row["seconds"], other["seconds"], strict=True)]


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def mean_and_half_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of the range, the summary of a few seeds."""
    return statistics.mean(values), (max(values) - min(values)) / 2


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format mean ± half of the range; of one value that alone."""
    return " ± ".join(f"{value:.{digits}f}" for value in mean_and_half_range(values)[: len(values)])


class EnergyMeter:
    """Energy that a device used in joules, as its own counters have it; never from a data sheet.

    CUDA: NVML's total energy of the card (Volta and newer), without the host's. CPU: the packages of RAPL, with
    everything else that runs on them; a package's counter may overflow at most once between two reads (at 262 kJ as
    a rule: three quarters of an hour at 100 W).
    source: name of the counter, None if there is none; reason: why there is none.
    """

    def __init__(self, device: torch.device, powercap: Path = Path("/sys/class/powercap")) -> None:
        self.source: str | None = None
        self.reason: str | None = None
        self._counters: list[tuple[Callable[[], float], float]] = []  # joules so far, joules at which it turns over
        try:
            if device.type == "cuda":
                self._counters = [(_nvml_joules(device), 0.0)]
                self.source = "NVML, total energy of the card"
            else:
                self._counters = _rapl(powercap)
                self.source = f"RAPL, {len(self._counters)} packages"
            for read, _ in self._counters:
                read()
        except (OSError, ValueError) as error:
            self.source, self.reason, self._counters = None, f"not reported: {error}", []

    def start(self) -> Callable[[], float | None]:
        """Return a function of the joules from now on, which gives None if there is no counter."""
        before = [read() for read, _ in self._counters]

        def joules() -> float | None:
            if self.source is None:
                return None
            used = 0.0
            for (read, turn), start in zip(self._counters, before, strict=True):
                now = read()
                used += now - start + (turn if now < start else 0.0)
            return used

        return joules


def _nvml_joules(device: torch.device) -> Callable[[], float]:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    # By identity: CUDA_VISIBLE_DEVICES numbers the cards as NVML does not.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

    def call(function: str, *arguments: Any) -> None:
        status = getattr(library, function)(*arguments)
        if status:
            raise OSError(f"NVML's {function} says {status}")

    call("nvmlInit_v2")
    call("nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(handle))

    def read() -> float:
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read


def _rapl(powercap: Path) -> list[tuple[Callable[[], float], float]]:
    def joules(file: Path) -> float:
        return int(file.read_text(encoding="ascii")) / 1e6

    zones = sorted(powercap.glob("intel-rapl:*"))  # the name on AMD too; parts of a package are zones of their own
    packages = [zone for zone in zones if (zone / "name").read_text(encoding="ascii").startswith("package")]
    if not packages:
        raise OSError("this machine shows no RAPL counters")
    return [
        (lambda file=zone / "energy_uj": joules(file), joules(zone / "max_energy_range_uj"))  # type: ignore[misc]
        for zone in packages
    ]


def size(count: float) -> str:
    """Format bytes in the largest binary unit in which the number is above one."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:.1f} {unit}" if unit != "GiB" else f"{count / factor:.2f} GiB"
    return f"{count:.0f} B"
