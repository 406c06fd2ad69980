"""A run keeps the memory that its steps free, and gives it back at its end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from engine.runtime import allocator
from engine.runtime.allocator import keeping_freed_memory

CPU = torch.device("cpu")
# Page faults of blocks that are taken and freed again, before, within and after; resident memory after the exit.
SCRIPT = """
import resource, torch
from engine.runtime.allocator import keeping_freed_memory

def faults():
    torch.ones(6 << 20).add_(1)  # 24 MiB: glibc maps blocks beyond 32 MiB whatever it has learned
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(16 << 20) for _ in range(2)]  # 64 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize() >> 20

outside = faults()
with keeping_freed_memory(torch.device("cpu")):
    faults()
    within = faults()
    held = resident()
print(outside, within, faults(), held, resident())
"""

glibc = pytest.mark.skipif(allocator._glibc() is None, reason="no glibc, or the environment sets its malloc")


@glibc
@pytest.mark.slow
def test_freed_memory_is_not_faulted_in_again_and_goes_back_afterwards() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    outside, within, after, held, left = map(int, run.stdout.split())
    assert within < outside / 20
    assert after > within
    assert left < held - 48  # one of the two blocks of 64 MiB, at least


class _Libc:
    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.calls.append((pad,))
        return 1


def test_the_outermost_of_two_runs_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _Libc()
    monkeypatch.setattr(allocator, "_glibc", lambda: libc)
    with keeping_freed_memory(CPU):
        with keeping_freed_memory(CPU):
            pass
        assert (0,) not in libc.calls
        assert libc.calls[-1] == (allocator._TOP_PAD, 64 << 20)
    assert libc.calls[-1] == (0,)
    assert libc.calls[-2] == (allocator._TOP_PAD, 128 << 10)


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")]
)
def test_what_the_environment_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert allocator._glibc() is None


def test_a_gpu_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: pytest.fail("asked for"))
    with keeping_freed_memory(torch.device("cuda")):
        pass
