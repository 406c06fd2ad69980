"""A convolutional model through a whole job: unlearned, evaluated, reported, proven; what needs attention is left out
with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import few

from engine.data import Source, open_source
from engine.errors import UserError
from engine.jobs.evaluate import evaluate_models
from engine.jobs.evidence import gather_proof
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.jobs.verify import Verifier
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.info import input_size_of
from engine.models.spec import ModelSpec
from engine.requests.intake import init_store

SPEC = ModelSpec(
    architecture="test_resnet",
    num_classes=10,
    model_args={"in_chans": 1},
    pretrained_cfg={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)},
)
QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 16, "workers": 0, "collapse_drop": 100.0, "device": "cpu"}


@pytest.fixture(scope="module")
def task() -> Task:
    whole = open_source("digits")
    source = Source("digits", few(whole.train, 120), few(whole.validation, 20), few(whole.test, 40))
    return Task.of_ids(source, list(source.train.ids)[:40], spec="forty")


@pytest.fixture
def cnn(tmp_path: Path) -> Path:
    return save_checkpoint(SPEC.build(seed=0).eval(), tmp_path / "cnn")


@pytest.mark.slow
def test_a_cnn_is_unlearned_evaluated_and_reported(task: Task, cnn: Path, tmp_path: Path) -> None:
    outcome = run_job(task, str(cnn), tmp_path / "run", method="random_labels", config=QUICK)
    assert input_size_of(outcome.result.model) == (32, 32)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Neither attention nor a mask is shown" in page
    assert "<em>Attention</em>" not in page
    metrics = evaluate_models(task, str(tmp_path / "run"), str(cnn), [], {"device": "cpu", "workers": 0})
    assert metrics["seconds"]["evaluate"] > 0
    assert input_size_of(load_checkpoint(tmp_path / "run")) == (32, 32)


def test_a_store_of_requests_is_not_made_for_a_method_that_cannot_take_the_model(cnn: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method lethe needs the attention of the model"):
        init_store(tmp_path / "store", str(cnn), "digits", method="lethe")
    assert not (tmp_path / "store").exists()
    init_store(tmp_path / "store", str(cnn), "digits", method="lethe_plus")


@pytest.mark.slow
def test_the_proof_of_a_cnn_says_why_attention_is_missing(task: Task) -> None:
    original, model = SPEC.build(seed=0).eval(), SPEC.build(seed=1).eval()
    examiner = Verifier(task, original, [], config={"device": "cpu", "workers": 0})
    evidence = examiner.evidence(model)
    proof = gather_proof(examiner, evidence, model, examiner.judge(evidence))
    assert proof["representation"]["layers"] == ["features"]
    assert "ResNet is not a Vision Transformer of timm" in proof["unmeasured"]["attention"]
    assert set(proof) >= {"attacks", "agreement", "relearning", "representation"}
