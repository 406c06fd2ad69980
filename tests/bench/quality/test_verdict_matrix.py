"""`python -m bench verdicts`: the planted models are what they are said to be; the whole matrix on digits is slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import tiny_vit

from bench.quality.retrain_cost import DIGITS
from bench.quality.verdict_matrix import run_verdict_matrix, with_fresh_head, with_new_head, with_noise
from engine.evaluate.representation import compare_weights
from engine.jobs.task import Task


def test_heads_are_all_that_changes() -> None:
    original, task = tiny_vit(), Task.open("digits", "random:0.1@0")
    for model in (with_fresh_head(original), with_new_head(original, task)):
        found = compare_weights(model, original)
        assert found["untouched_backbone"]
        assert not found["identical"]


def test_a_new_head_reads_the_features_of_the_original() -> None:
    original, task = tiny_vit(), Task.open("digits", "random:0.1@0")
    evaluator = task.evaluator()
    before, after = (
        evaluator(model).numbers["accuracy"]["retain"] for model in (original, with_new_head(original, task))
    )
    assert after > before + 0.2  # random features already tell digits apart


def test_noise_is_fresh_or_a_function_of_the_image() -> None:
    original, images = tiny_vit(), torch.rand(64, 1, 8, 8)
    clean = original.eval()(images)
    for fixed in (False, True):
        noisy = with_noise(original, fixed=fixed).eval()
        first, second = noisy(images), noisy(images)
        assert torch.equal(first, second) == fixed
        assert 0.5 < float((first - clean).std() / clean.std()) < 2
    assert torch.equal(original(images), clean)


@pytest.mark.slow
@pytest.mark.minutes
def test_the_matrix_on_digits(tmp_path: Path) -> None:
    run_verdict_matrix([DIGITS], [], [], [], None, tmp_path / "verdicts.json")
    models = json.loads((tmp_path / "verdicts.json").read_text())["subjects"]["digits"]["models"]
    assert len(models) == 8
    assert {name: row["verdict"]["status"] for name, row in models.items()} == {
        name: row["expected"] for name, row in models.items()
    }
