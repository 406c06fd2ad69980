"""The proof in report.html, how it is gathered, and the command that writes it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from pages import HOSTILE, PARTS, Page, draw_nothing, made, page_of, plain, row_of, section_of, share
from toys import few, tiny_vit
from typer.testing import CliRunner

from engine.cli.verify import verify
from engine.errors import UserError
from engine.evaluate import Evaluation, compare
from engine.evaluate.gates import FAIL, INSUFFICIENT, PASS, Gate, Gates, Verdict
from engine.evaluate.intervals import Interval
from engine.evaluate.membership import attacks, mean_attacks
from engine.evaluate.verdict import Evidence, ModelOutputs, judge
from engine.jobs.evidence import gather_proof
from engine.jobs.task import Task
from engine.jobs.verify import Verifier
from engine.models.predict import Predictions
from engine.report import ReportData, write_report
from engine.report.proof.page import write_proof
from engine.runtime.files import write_json


@pytest.fixture(scope="module")
def proof() -> dict[str, Any]:
    return made()


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


# --- report.html ------------------------------------------------------------------------------------------------------


def report(folder: Path, **changed: Any) -> tuple[str, Page]:
    rng = np.random.default_rng(0)
    answers = {
        part: Predictions(rng.normal(size=(30, 10)).astype(np.float32), rng.integers(0, 10, 30))
        for part in ("forget", "test")
    }
    numbers = {"accuracy": {"forget": 0.5, "retain": 0.6, "test": 0.7}, "mia": {"efficacy": 0.4, "auc": 0.5}}
    both = {name: Evaluation(numbers, answers) for name in ("original", "unlearned")}
    options: dict[str, Any] = {
        "title": "Report",
        "method": "lethe",
        "summary": "a method",
        "request": {"spec": "a", "forget": 1, "retain": 2, "duplicates": 0, "data": "digits"},
        "config": {},
        "metrics": compare(both["unlearned"], [], both["original"]),
        "history": [],
        "evaluations": both,
        "gallery": [],
        "retrain_seconds": None,
        "environment": {},
        "hashes": {},
    }
    source = write_report(folder / "report.html", ReportData(**{**options, **changed})).read_text(encoding="utf-8")
    return source, Page(source)


def test_the_report_shows_the_proof_near_the_top(proof: dict[str, Any], tmp_path: Path) -> None:
    assert "<h2>Verdict</h2>" not in report(tmp_path)[0]
    source, _ = report(tmp_path, proof={"verdict": proof["verdict"], "agreement": proof["agreement"]})
    places = ["</header>", "<h2>Verdict</h2>", "<h2>Agreement with", "<h2>Original and unlearned</h2>"]
    assert sorted(places, key=source.index) == places
    assert all(source.count(place) == 1 for place in places)


def test_the_report_shows_attacks_and_agreement_of_the_metrics(proof: dict[str, Any], tmp_path: Path) -> None:
    source, page = report(tmp_path)
    assert "Membership attacks" not in page.text
    numbers = {"accuracy": {"forget": 0.5, "retain": 0.6, "test": 0.7}, "mia": {"efficacy": 0.4, "auc": 0.5}}
    metrics = compare(Evaluation(numbers, {}), [], Evaluation(numbers, {}))
    metrics["original"]["attacks"] = proof["attacks"]["original"]
    metrics.update(attacks=proof["attacks"]["model"], agreement=proof["agreement"])
    source, page = report(tmp_path, metrics=metrics)
    attacked, agreed = re.findall(r'<table class="numbers grouped">.*?</table>', source, re.DOTALL)
    before, after = (plain(proof["attacks"][model]["loss"]["auc"]) for model in ("original", "model"))
    assert row_of(attacked, "Loss") == [before, after, "\N{EN DASH}"]
    assert re.findall(r'<th scope="col">(.*?)</th>', attacked) == ["Measure", "Original", "Unlearned", "Retrained"]
    assert row_of(agreed, "Same class")[1] == share(proof["agreement"]["model"]["forget"]["top1"])
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("abbr", "title")]
    assert len(titles) > 20
    assert all(title in page.text for title in titles)
    source, _ = report(tmp_path, metrics=metrics, proof={"attacks": proof["attacks"]})
    assert source.count("<h2>Membership attacks</h2>") == 1  # not twice
    assert "<h3>Membership attacks</h3>" not in source
    assert source.count("<h3>Agreement with") == 1


# --- what is behind the page ------------------------------------------------------------------------------------------


def test_limits_of_the_bars_are_those_that_the_gates_were_judged_by() -> None:
    classes, seen = 5, set()

    def says(number: int, knows: float, shift: float) -> ModelOutputs:
        def of(part: str, size: int, by: float) -> Predictions:
            rng = np.random.default_rng([number, size])
            labels = np.arange(size) % classes
            logits = rng.normal(0, 0.7, (size, classes))
            logits[np.arange(size), labels] += np.random.default_rng(size).normal(1, 1.5, size) + by
            return Predictions(logits.astype(np.float32), labels)

        sets = {
            "forget": of("forget", 300, knows + shift),
            "retain": of("retain", 600, 2 + shift),
            "test": of("test", 601, shift),
        }
        return ModelOutputs(sets, {"held_back": sets["forget"].take(np.arange(150)), "test": sets["test"]}, sets)

    for knows, shift in ((0.0, 0.0), (2.0, 0.0), (0.0, -3.0), (0.25, -0.1), (-0.3, 0.0), (0.4, 0.05)):
        model = says(1, knows, shift)
        evidence = Evidence(
            model=model,
            original=says(2, 2.0, 0.0),
            references=[says(3, 0.0, 0.0), says(4, 0.0, 0.0)],
            repeated=model.predictions["forget"],
            changed=0.5,
        )
        verdict = judge(evidence, Gates.read())
        for found in verdict.to_dict()["gates"]:
            if found["within"] is None:
                continue
            low, high = (
                end if end is not None else open_ for end, open_ in zip(found["within"], (-np.inf, np.inf), strict=True)
            )
            value = found["value"]
            inside = low <= value["low"] and value["high"] <= high
            outside = value["high"] < low or value["low"] > high
            assert (found["status"] == PASS, found["status"] == FAIL) == (inside, outside), found
            seen.add((found["name"], found["status"]))
    assert len({name for name, _ in seen}) == 8
    assert len({name for name, status in seen if status == FAIL}) >= 6  # a limit that is never exceeded is not tested


@pytest.fixture(scope="module")
def examined() -> Iterator[tuple[Verifier, torch.nn.Module]]:
    """Untrained models on a few digits."""
    whole = Task.open("digits", "random:0.03@0")
    less = {name: few(getattr(whole.source, name), count) for name, count in (("validation", 60), ("test", 100))}
    task = Task(dataclasses.replace(whole.source, **less), whole.request, whole.forget, few(whole.retain, 150))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.jobs.verify.check_reference", lambda *_, **__: None)
        yield Verifier(task, tiny_vit(), [tiny_vit(1), tiny_vit(2)]), tiny_vit(7)


def judged(examiner: Verifier, model: torch.nn.Module) -> tuple[Evidence, Verdict]:
    witness = examiner.evaluate(model)
    evidence = Evidence(
        model=witness,
        original=examiner.original,
        references=examiner.references,
        repeated=witness.predictions["forget"],
        changed=0.5,
    )
    return evidence, examiner.judge(evidence)


def test_a_proof_is_gathered_from_models(examined: tuple[Verifier, torch.nn.Module], tmp_path: Path) -> None:
    examiner, model = examined
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evidence, verdict = judged(examiner, model)
    proof = gather_proof(examiner, evidence, model, verdict)
    assert proof["unmeasured"] == {}
    assert set(proof["seconds"]) == set(PARTS) - {"verdict"}
    assert set(proof) == {*PARTS, "gates", "seconds", "unmeasured"}
    write_json(tmp_path / "proof.json", proof)  # refuses what is not JSON, or not finite
    said = [each.predictions for each in evidence.references]
    mine = evidence.model.predictions
    expected = attacks(mine["forget"], mine["retain"], mine["test"], said)
    assert proof["attacks"]["model"] == expected
    others = [attacks(a["forget"], a["retain"], a["test"], [b]) for a, b in (said, said[::-1])]
    assert proof["attacks"]["reference"] == mean_attacks(others)
    names = {"original", "model", "retrained 1", "retrained 2"}
    assert set(proof["representation"]["models"]) == set(proof["relearning"]["models"]) == names
    assert set(proof["relearning"]["attack"]["samples"]) == {"forget_share", "unrelated"}
    assert proof["representation"]["models"]["retrained 1"]["sets"]["forget"]["to"].keys() == {
        "original",
        "retrained 2",
    }
    assert set(proof["attention"]["overlap"]["forget"]["model"]) == {"original", "retrained 1", "retrained 2"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    source, page = page_of(proof, tmp_path)
    assert len(page.images) == 3 + 3 + 8 + 6 + 4  # too few test images for a plot of TPR at 0.1% FPR
    auc = proof["attacks"]["model"]["calibrated_loss"]["auc"]
    assert plain(auc) in row_of(section_of(source, "Membership attacks"), "Calibrated loss")
    assert not re.search(r"\b(None|nan|NaN|inf|undefined)\b", page.text)


def test_a_part_that_cannot_be_measured_says_why(
    examined: tuple[Verifier, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> dict[str, Any]:
        raise UserError("attention: this model has none")

    for name in ("agreement_report", "relearning_report", "compare_features"):
        monkeypatch.setattr(f"engine.jobs.evidence.{name}", lambda *a, **k: {})
    monkeypatch.setattr("engine.jobs.evidence.attention_report", refuse)
    examiner, model = examined
    evidence, verdict = judged(examiner, model)
    proof = gather_proof(examiner, evidence, model, verdict)
    assert proof["unmeasured"] == {"attention": "attention: this model has none"}
    assert "attention" not in proof
    alone = gather_proof(examiner, dataclasses.replace(evidence, references=evidence.references[:1]), model, verdict)
    assert "calibrated_loss" in alone["attacks"]["model"]
    assert "calibrated_loss" not in alone["attacks"]["reference"]  # a model is no reference for itself


def test_the_command_writes_page_and_evidence(
    proof: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Verdict(
        [Gate("membership", "Can it be told?", INSUFFICIENT, Interval(0.7, 0.6, 0.8), "l", "r")],
        2,
        {"forget": 1, "test": 2},
    )
    asked: list[Any] = []

    def prove(task: Any, *names: Any, **options: Any) -> tuple[Verdict, dict[str, Any]]:
        asked.append(names)
        return found, proof

    monkeypatch.setattr("engine.jobs.evidence.prove_job", prove)
    monkeypatch.setattr("engine.jobs.verify.verify_job", lambda *a, **k: found)
    monkeypatch.setattr("engine.jobs.task.Task.open", lambda *a: None)
    monkeypatch.setattr("engine.jobs.opening.Opening.prepare", lambda self, task, *a: (task, None))
    app = typer.Typer()
    app.command()(verify)
    common = ["--checkpoint", "c", "--data", "digits", "--forget", HOSTILE, "--original", "o", "--reference", "r"]
    run = CliRunner()
    assert run.invoke(app, common).exit_code == 3
    assert asked == []  # the evidence is gathered for those who look at it
    json_file, html_file = tmp_path / "new" / "v.json", tmp_path / "other" / "v.html"
    assert run.invoke(app, [*common, "--json", str(json_file), "--html", str(html_file)]).exit_code == 3
    assert asked == [("c", "o", ["r"])]
    values = json.loads(json_file.read_text())
    assert values["status"] == INSUFFICIENT
    assert values["evidence"] == {key: value for key, value in proof.items() if key != "verdict"}
    page = Page(html_file.read_text(encoding="utf-8"))
    assert "references r" in page.text
    assert HOSTILE in page.text
    refused = run.invoke(app, [*common, "--html", str(tmp_path)]).exception
    assert isinstance(refused, UserError)
    assert "is a folder" in str(refused)
    assert len(asked) == 1  # refused before the work


def test_a_key_that_cannot_sign_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("engine.jobs.task.Task.open", too_late)
    monkeypatch.setattr("engine.jobs.verify.check_recorded", lambda folder: None)
    app = typer.Typer()
    app.command()(verify)
    key = tmp_path / "key.pem"
    common = ["--checkpoint", "c", "--data", "digits", "--forget", "f", "--original", "o", "--sign", str(key)]
    for options, message in ((["--record"], str(key)), ([], "give --record too")):
        refused = CliRunner().invoke(app, [*common, *options]).exception
        assert isinstance(refused, UserError)
        assert message in str(refused)


def test_a_write_that_fails_leaves_the_earlier_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    earlier, _ = page_of({}, tmp_path)

    def broken(path: Path, text: str, **_: Any) -> int:
        path.write_bytes(text[:50].encode())
        raise OSError("no")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="no"):
        write_proof(tmp_path / "proof.html", {}, title="another", facts={})
    assert (tmp_path / "proof.html").read_text(encoding="utf-8") == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["proof.html"]
