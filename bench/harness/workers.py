"""Contenders in separate processes, so that process-wide settings (allocator, threads) of one do not affect others.

A process builds one contender and runs steps on a message. In between it waits on its pipe, which costs
nothing. All contenders take their turns in every round, in an order that turns from round to round
(`bench.harness.measure.turns`), so that ratios can be formed within a round. Each process has compiler caches of its
own, empty at the start: the first step includes the compilation that a user waits for.

A contender that raises, runs out of memory or is killed becomes a row with the reason; the others continue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.harness.measure import Row, free_bytes, size, turns

# Imports of every contender, made once for all. None may initialise a device: CUDA does not survive the fork.
_PRELOADED = ("bench.training_cost.train", "bench.__main__")
# Time limits of a contender in seconds: to build, to compile and step, or for one turn.
PATIENCE = 600.0
# A turn takes about this many seconds of the fastest contender, and at most so many steps.
_TURN_SECONDS, _MOST_STEPS = 0.25, 20
# After its last product a thread of OpenMP waits for the next one in a busy loop, for some milliseconds.
_SETTLE_SECONDS = 0.02
# A contender that waits ends at once; one that computes, because the command was interrupted, is not waited for.
_CLOSE_SECONDS = 3.0
# Main memory that stays free when another contender is started.
_SPARE_BYTES = 2**30


class Step(Protocol):
    """One optimizer step a call, its batch included. batch: images a step."""

    batch: int

    def __call__(self) -> object: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """build: makes the step on a device; it is pickled, so a function of a module or a `functools.partial` of one.

    note: how its work differs. parts: whether its time by part is measured too
    (`bench.training_cost.steps.EngineStep`).
    """

    name: str
    build: Callable[[torch.device], Step]
    note: str = ""
    parts: bool = False


class ContenderError(Exception):
    """A contender cannot be measured. status: "not run" (memory) or "failed"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def race_workers(
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    threads: int,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Measure contenders and return one row for each, in their order.

    rounds: at most, and no more than about `seconds` in all, though never fewer than three.

    A row has: status: "measured", "not run" (memory) or "failed". seconds: mean of the steps of each round; steps: all
    of them. build_seconds: until the first step could begin. first_seconds: of that step, which includes compilation.
    prepare_seconds: the contender's own measure of its work before the first step, a part of build_seconds.
    page_faults: minor ones a step. peak_bytes: the maximum memory of the process since it began, Python and libraries
    included; on CUDA that of PyTorch's allocator. parts: seconds a step by part, measured after the race.
    """
    rows: dict[str, Row] = {each.name: {"contender": each.name, "note": each.note} for each in contenders}
    with contextlib.ExitStack() as processes:
        workers = {}
        for each in contenders:
            workers[each.name] = Worker(each, device, threads)
            processes.callback(workers[each.name].close)

        def ask(name: str, *message: Any) -> list[Any]:
            """Return the answer, or an empty list: the row then has the reason, and the contender is out."""
            if name not in workers:
                return []
            try:
                return [workers[name].ask(*message)]
            except ContenderError as error:
                rows[name].update(status=error.status, reason=error.reason)
                workers.pop(name).close()
                return []

        for each in contenders:
            if reason := _too_large(rows.values(), device):
                rows[each.name].update(status="not run", reason=reason)
                workers.pop(each.name).close()
            for built in ask(each.name, "build"):
                rows[each.name].update(built)
        steps = _steps_a_turn([rows[name]["second_seconds"] for name in workers])
        collected: dict[str, list[Row]] = {name: [] for name in workers}
        for name in turns(list(workers), rounds, seconds):
            collected[name].extend(ask(name, "steps", steps))
        for each in contenders:
            if each.parts:
                for parts in ask(each.name, "parts", steps):
                    rows[each.name]["parts"] = parts
    for row in rows.values():
        _finish(row, collected.get(row["contender"], []))
    return list(rows.values())


def _finish(row: Row, rounds: Sequence[Row]) -> None:
    """Compute the row's figures from its turns; a contender that ended early has none."""
    row.setdefault("status", "measured")
    if row["status"] != "measured":
        for key in ("first_seconds", "second_seconds", "peak_bytes", "parts"):
            row.pop(key, None)
        return
    row["steps"] = [turn["seconds"] for turn in rounds]
    row["seconds"] = [sum(steps) / len(steps) for steps in row["steps"]]
    row["page_faults"] = sum(turn["page_faults"] for turn in rounds) / sum(len(steps) for steps in row["steps"])
    row["peak_bytes"] = max(turn["peak_bytes"] for turn in rounds)


def _steps_a_turn(seconds: Sequence[float]) -> int:
    return min(_MOST_STEPS, max(1, math.ceil(_TURN_SECONDS / min(seconds)))) if seconds else 1


def _too_large(rows: Iterable[Row], device: torch.device) -> str:
    """Return why no further contender is built (the present ones stay in memory), or "" if there is room.

    On CUDA memory is released after each turn, and a contender that lacks memory reports an error itself.
    """
    if device.type != "cpu":
        return ""
    largest = max((row.get("peak_bytes", 0) for row in rows), default=0)
    free = free_bytes(device)
    if free >= largest + _SPARE_BYTES:
        return ""
    return f"{size(free)} of memory are free, and the largest contender before it took {size(largest)}"


class Worker:
    """The parent's end of one contender's process."""

    def __init__(self, contender: Contender, device: torch.device, threads: int) -> None:
        # Forked from a process that has imported and no more: CUDA and OpenMP of this one would not survive it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self._patience = PATIENCE
        self._pipe, theirs = context.Pipe()
        self._caches = tempfile.TemporaryDirectory(prefix="lethe-bench-")
        arguments = (theirs, contender, str(device), threads, self._caches.name)
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """Return the answer to a message. Raises ContenderError if there is none.

        The worker cannot be used after that.
        """
        try:
            self._pipe.send(message)
            if not self._pipe.poll(self._patience):
                self.process.kill()
                raise ContenderError("failed", f"no answer to {message[0]!r} in {self._patience:g} s")
            status, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise ContenderError("failed", self._ending()) from None
        if status != "measured":
            raise ContenderError(status, answer)
        return answer

    def _ending(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            killed = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{killed}"
        return f"its process ended with exit code {code}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(("close",))
        self.process.join(_CLOSE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._pipe.close()
        self._caches.cleanup()


# --- in the contender's process ---------------------------------------------------------------------------------------


def _serve(pipe: Any, contender: Contender, device_name: str, threads: int, caches: str) -> None:
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{caches}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{caches}/triton"
    device = torch.device(device_name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current one
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        step: Step | None = None
        while True:  # until "close", or the end of the parent, which ends the pipe
            kind, *values = pipe.recv()
            if kind == "close":
                break
            try:
                if kind == "build":
                    began = time.perf_counter()
                    step = contender.build(device)
                    answer: Any = _first(step, device, time.perf_counter() - began)
                elif kind == "steps":
                    answer = _turn(step, device, *values)  # type: ignore[arg-type]
                else:
                    answer = _parts(step, *values)
                status = "measured"
            except (torch.OutOfMemoryError, MemoryError):
                status, answer = "not run", f"ran out of memory on {device}"
            except Exception as error:
                lines = str(error).strip().splitlines()
                status, answer = "failed", f"{type(error).__name__}: {lines[0] if lines else ''}"
            time.sleep(_SETTLE_SECONDS)
            pipe.send((status, answer))
        if step is not None:
            step.close()


def _first(step: Step, device: torch.device, build_seconds: float) -> dict[str, Any]:
    """Run the first step, which includes compilation, and a second one, from which the length of a turn follows."""
    (first,) = _seconds(step, device, 1)
    (second,) = _seconds(step, device, 1)
    return {
        "batch": step.batch,
        "build_seconds": build_seconds,
        "prepare_seconds": getattr(step, "prepare_seconds", 0.0),
        "first_seconds": first,
        "second_seconds": second,
        "peak_bytes": _peak(device),
    }


def _turn(step: Step, device: torch.device, count: int) -> dict[str, Any]:
    if device.type == "cuda":
        step()  # allocates the memory again that the turn before released
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = _seconds(step, device, count)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    peak = _peak(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the other contenders
    return {"seconds": seconds, "page_faults": faults, "peak_bytes": peak}


def _seconds(step: Step, device: torch.device, count: int) -> list[float]:
    """Return the seconds of each of some steps in a row.

    On CUDA the device is synchronised at the end alone, as in a run.
    """
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def _parts(step: Any, count: int) -> dict[str, float]:
    """Return the seconds a step by part, and `all`: whole steps by the same clock, which no part may exceed."""
    step.reset_parts()
    began = time.perf_counter()
    with step.timed():
        for _ in range(count):
            step()
    whole = time.perf_counter() - began
    return {**{part: total / count for part, total in step.parts.items()}, "all": whole / count}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        # Not ru_maxrss: a process that was started by a larger one inherits that one's.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
