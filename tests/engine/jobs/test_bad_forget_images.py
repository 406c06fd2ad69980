"""on_bad_image from the first step to the last page: forget images that cannot be read, and all who read images."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Lethe, one_line
from toys import few, tiny_vit

from engine.audit.record import recorded
from engine.audit.record_check import verify_record
from engine.data import BadImageError, Samples, open_source
from engine.data.readable import bad_images
from engine.errors import RunStopped, UserError
from engine.evaluate.metrics import Evaluator
from engine.jobs.evaluate import evaluate_models
from engine.jobs.evidence import gather_proof
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.jobs.verify import Verifier
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.preprocessing import preprocessing_of
from engine.run.unlearn import unlearn

SKIP = {"on_bad_image": "skip", "max_bad_share": 0.2}
RUN = {"max_steps": 2, "batch_size": 8, "precision": "fp32"}


def spoiled(samples: Samples, bad: set[str], name: str = "s") -> Samples:
    """Samples of which some cannot be decoded."""

    def decode(i: int) -> object:
        if samples.ids[i] in bad:
            raise OSError("truncated")
        return samples.image(i)

    return Samples(name, list(samples.ids), samples.labels, decode)


@pytest.fixture
def job(parquet_folder: Callable[..., Path], tmp_path: Path) -> tuple[Task, str]:
    """A request for 10 of 60 samples, 2 of whose images are broken, as is 1 of the retained ones."""
    folder = parquet_folder(train=60, test=40, spoil={3: b"broken", 7: b"", 33: b"broken"})
    (tmp_path / "ids.txt").write_text("".join(f"train/{row:04d}.png\n" for row in range(10)))
    return Task.open(f"parquet:{folder}", str(tmp_path / "ids.txt")), f"parquet:{folder}"


def test_a_bad_forget_image_is_found_before_anything_is_done(job: tuple[Task, str], tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(BadImageError, match=r"image 'train/0003.png' .*does not decode"):
        unlearn(
            tiny_vit(),
            job[0].forget,
            job[0].retain,
            method="finetune",  # which reads no forget image in its steps
            config=RUN,
            output_dir=tmp_path / "run",
            progress=lambda *row: steps.append(1),
        )
    assert not steps
    assert not (tmp_path / "run").exists()


def test_skipped_forget_images_are_left_out_and_recorded(job: tuple[Task, str], tmp_path: Path) -> None:
    task, _ = job
    original = save_checkpoint(tiny_vit(), tmp_path / "original")
    outcome = run_job(task, str(original), tmp_path / "run", method="lethe", config={**RUN, **SKIP})
    assert set(outcome.result.bad_images) >= {"train/0003.png", "train/0007.png"}
    assert outcome.result.config["samples"]["forget"] == 8
    assert outcome.metrics["unreadable"] == {"forget": 2}
    assert outcome.metrics["evaluated"]["forget"] == 8
    assert outcome.metrics["evaluated"]["retain"] == 49
    assert verify_record(tmp_path / "run") == []
    request = recorded(tmp_path / "run", "request")
    assert request is not None
    assert (request["forget"], request["unreadable"], len(request["ids"]["forget"])) == (10, 2, 10)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 images of the request could not be read" in page
    assert "train/0003.png" not in page


def test_evaluate_leaves_them_out(job: tuple[Task, str], tmp_path: Path) -> None:
    task, _ = job
    original = str(save_checkpoint(tiny_vit(), tmp_path / "original"))
    with pytest.raises(BadImageError, match=r"train/0003.png"):
        evaluate_models(task, original, None, [], {})
    metrics = evaluate_models(task, original, None, [], SKIP)
    assert metrics["unreadable"] == {"forget": 2}
    assert metrics["evaluated"] == {"forget": 8, "retain": 49, "test": 32}
    whole = Evaluator(task.forget.subset([0, 1, 2, 4, 5, 6, 8, 9]), task.retain, task.source.test, **SKIP)
    assert metrics["accuracy"] == whole(load_checkpoint(original)).numbers["accuracy"]


@pytest.mark.slow
def test_verdict_relearning_and_proof_pages_leave_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("digits")
    bad = {str(source.train.ids[i]) for i in (1, 5, 130)} | {str(source.test.ids[2])}
    train, test = spoiled(few(source.train, 300), bad), spoiled(few(source.test, 80), bad)
    task = Task(
        type(source)("s", train, few(source.validation, 60), test),
        None,  # type: ignore[arg-type]
        train.subset(range(120), "forget"),
        train.subset(range(120, 300), "retain"),
    )
    monkeypatch.setattr("engine.jobs.verify.check_reference", lambda *_, **__: None)
    references = [tiny_vit(1), tiny_vit(2)]
    with pytest.raises(BadImageError):
        Verifier(task, tiny_vit(0), references, config={"precision": "fp32"})
    examiner = Verifier(task, tiny_vit(0), references, config={"precision": "fp32", **SKIP})
    evidence = examiner.evidence(tiny_vit(3))
    verdict = examiner.judge(evidence)
    assert verdict.samples["forget"] == 118
    assert verdict.samples["forget_unreadable"] == 2
    proof = gather_proof(examiner, evidence, tiny_vit(3), verdict)
    assert proof["unmeasured"] == {}


def test_an_exact_method_still_drops_what_cannot_be_read() -> None:
    train = spoiled(few(open_source("digits").train, 60), {str(open_source("digits").train.ids[2])})
    result = unlearn(
        tiny_vit(), train.subset(range(10)), train.subset(range(10, 60)), method="retrain", config={**RUN, **SKIP}
    )
    assert result.config["samples"]["forget"] == 10
    assert result.config["samples"]["forget_unreadable"] == 1
    assert len(result.bad_images) == 1


def test_what_cannot_be_a_forget_set(tmp_path: Path) -> None:
    digits = few(open_source("digits").train, 20)
    wanted = preprocessing_of(tiny_vit())
    all_bad = spoiled(few(digits, 3), {str(i) for i in digits.ids})
    with pytest.raises(UserError, match="not one of the 3 images can be read"):
        bad_images(all_bad, wanted, on_bad_image="skip", max_bad_share=1.0, out_of=20)
    some = spoiled(few(digits, 5), {str(digits.ids[1])})
    with pytest.raises(RunStopped, match=r"1 of 5 images .* max_bad_share=0\.01 of the 20 training samples"):
        bad_images(some, wanted, on_bad_image="skip", out_of=20)
    assert list(bad_images(some, wanted, on_bad_image="skip", out_of=100)) == [str(digits.ids[1])]
    assert bad_images(digits, wanted) == {}


def test_the_look_at_the_images_draws_no_random_numbers() -> None:
    def decode(i: int) -> torch.Tensor:
        return torch.randn(1, 8, 8) + float(np.random.rand()) + random.random()

    noisy = Samples("noisy", [str(i) for i in range(20)], np.arange(20) % 10, decode)
    drawn = []
    for look in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        if look:
            bad_images(noisy, preprocessing_of(tiny_vit()))
        drawn.append((float(torch.rand(1)), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_the_commands_take_the_option(lethe: Lethe, job: tuple[Task, str], tmp_path: Path) -> None:
    original = save_checkpoint(tiny_vit(), tmp_path / "original")
    words = ["--checkpoint", original, "--data", job[1], "--forget", tmp_path / "ids.txt", "--accept-accuracy"]
    code, _, err = lethe("evaluate", *words)
    assert (code, "image 'train/0033.png'" in one_line(err)) == (2, True)  # the check reads retained samples first
    skip = ["--on-bad-image", "skip", "--set", "max_bad_share=0.2", "--json", tmp_path / "m.json"]
    code, _, err = lethe("evaluate", *words, *skip)
    assert code == 0, err
    assert json.loads((tmp_path / "m.json").read_text())["unreadable"] == {"forget": 2}
    code, _, err = lethe("verify", *words, "--original", original, *skip)
    assert code in (1, 3), err
    assert json.loads((tmp_path / "m.json").read_text())["samples"]["forget_unreadable"] == 2
