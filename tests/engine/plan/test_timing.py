"""Rates when a measurement is disturbed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.models.spec import ModelSpec
from engine.plan import timing
from engine.plan.timing import measure_rates


def test_a_disturbed_run_does_not_make_steps_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step takes 10 seconds and four take 8: the rate is that of the four with their start. It was 1e10 before."""

    def pretended(*sets: object, config: dict[str, Any], **rest: object) -> Any:
        seconds = 10.0 if config["max_steps"] == 1 else 8.0
        return SimpleNamespace(seconds={"prepare": 1.0, "forget_phase": seconds, "retain_phase": 5.0})

    monkeypatch.setattr(timing, "unlearn", pretended)
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = ModelSpec(architecture="vit_tiny_patch16_224", num_classes=10, model_args=tiny, pretrained_cfg={})
    rates = measure_rates(model, "lethe", {}, 4, "cpu").rates
    assert (rates["forget"], rates["retain"]) == (4 * 4 / 8, 4 * 4 / 5)
