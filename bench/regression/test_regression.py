"""The suite of `pytest --benchmark`; without the option each case runs once, and has to be right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.regression.cases import CASES, Case
from bench.regression.measuring import run_case
from bench.regression.plugin import Gate
from engine.runtime.allocator import keeping_freed_memory
from engine.runtime.device import resolve_device

DEVICE = resolve_device("auto")


@pytest.fixture(autouse=True, scope="module")
def _alike() -> Iterator[None]:
    """Run every case under the same conditions: waiting threads spin, and the process keeps the memory it frees."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with keeping_freed_memory(DEVICE):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, benchmark: object, baseline_gate: Gate | None) -> None:
    run_case(case, benchmark, baseline_gate, DEVICE)
