"""Our step and the plain one do the same mathematics, and the split of our step adds up."""

from __future__ import annotations

import time

import pytest
import torch

from bench.harness.cases import TINY, StepCase
from bench.training_cost.steps import PARTS, EngineStep, PlainStep

CPU = torch.device("cpu")


def _case(phase: str, **options: object) -> StepCase:
    return StepCase(model=TINY, phase=phase, precision="fp32", batch=16, **options)  # type: ignore[arg-type]


def test_forget_steps_have_the_losses_of_the_plain_ones() -> None:
    # One batch, so that both see the same images whatever their order.
    ours, plain = (kind(_case("forget"), CPU, images=16) for kind in (EngineStep, PlainStep))
    assert ours.prepare_seconds > 0
    expected = [float(plain()) for _ in range(4)]
    assert [float(ours()) for _ in range(4)] == pytest.approx(expected, rel=1e-3)
    assert expected[0] == pytest.approx(expected[3], rel=0.3)
    assert expected[0] != expected[3]
    ours.close()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_retain_steps_have_the_losses_of_the_plain_ones(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip = torch.rand
    monkeypatch.setattr(
        "bench.training_cost.steps.torch.rand", lambda *size, **o: flip(*size, **o) + 1
    )  # the plain one flips none
    ours, plain = EngineStep(_case("retain"), CPU, images=16), PlainStep(_case("retain"), CPU, attention, images=16)
    ours._loader.augment = "none"
    expected = [float(plain()) for _ in range(4)]
    assert [float(ours()) for _ in range(4)] == pytest.approx(expected, rel=1e-3)
    ours.close()


def test_parts_add_up_to_the_step_and_leave_no_trace() -> None:
    step = EngineStep(_case("retain"), CPU)
    step()
    with step.timed():
        began = time.perf_counter()
        step()
        elapsed = time.perf_counter() - began
    assert set(step.parts) == set(PARTS)
    assert 0.6 * elapsed < sum(step.parts.values()) <= elapsed
    assert all(step.parts[part] > 0 for part in ("data", "forward", "backward", "optimizer"))
    before = dict(step.parts)
    step()
    assert step.parts == before
    step.close()


def test_batches_never_end() -> None:
    step = EngineStep(_case("retain"), CPU, images=32)
    assert [step().shape for _ in range(5)] == [torch.Size([])] * 5
    step.close()
