"""How often the collapse guard measures, and on how many samples."""

from __future__ import annotations

import pytest

from engine.core.phase import Phase, paired_phase
from engine.run.collapse_guard import checks, watched_count


@pytest.mark.parametrize(("steps", "number"), [(0, 1), (1, 1), (8, 1), (9, 2), (64, 8), (10_000, 8)])
def test_a_short_phase_is_measured_less_often(steps: int, number: int) -> None:
    assert checks(steps) == number


def test_the_samples_that_are_watched_follow_those_of_the_steps() -> None:
    """A quarter of what the steps take, from 200 to 500."""
    part = paired_phase(0.12, 1e-3)
    assert watched_count([part], 10, 10_000) == 300  # 1,200 retained ones
    assert watched_count([paired_phase(0.01, 1e-3)], 10, 10_000) == 200
    assert watched_count([part, Phase(name="all", samples="all", epochs=1, lr=1.0)], 10, 10_000) == 500
    assert watched_count([Phase(name="forget", samples="forget", epochs=2, lr=1.0)], 700, 10_000) == 350
