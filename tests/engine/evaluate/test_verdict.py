"""Gates and the verdict on planted evidence: logits whose truth is known; then the command on digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from toys import tiny_vit

from engine.errors import UserError
from engine.evaluate.gates import DEFAULTS, FAIL, INSUFFICIENT, PASS, Gates, Verdict
from engine.evaluate.verdict import Evidence, ModelOutputs, judge
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.jobs.verify import check_origin, check_reference, check_references
from engine.models.checkpoint import save_checkpoint
from engine.models.predict import Predictions
from engine.run.unlearn import unlearn

CLASSES, SIZES = 5, {"forget": 300, "retain": 600, "test": 600}
_KEYS = {name: number for number, name in enumerate(SIZES)}
_MOVED = 1000  # added to the number of a model, for its answers to moved images


@dataclasses.dataclass(frozen=True)
class SyntheticModels:
    """Samples of some difficulty, and models that know what they were trained on `memory` log-odds better."""

    seed: int = 0
    memory: float = 2.0

    def labels(self, name: str) -> np.ndarray:
        return np.arange(SIZES[name]) % CLASSES

    def difficulty(self, name: str) -> np.ndarray:
        return np.random.default_rng([self.seed, _KEYS[name]]).normal(1.0, 1.5, SIZES[name])

    def says(self, name: str, model: int, knows: float = 0.0, noise: float = 1.0) -> Predictions:
        rng = np.random.default_rng([self.seed, _KEYS[name], model])
        labels = self.labels(name)
        logits = rng.normal(0.0, 0.4 * noise, (len(labels), CLASSES))
        logits[np.arange(len(labels)), labels] += self.difficulty(name) + knows
        return Predictions(logits.astype(np.float32), labels)

    def model(
        self,
        number: int,
        forget: float = 0.0,
        noise: float = 1.0,
        relearned: float = 0.0,
        shift: float = 0.0,
        moved: float | None = None,
    ) -> ModelOutputs:
        """forget: log-odds by which it knows the forget samples; relearned: those held back, after the attack; moved:
        on moved images, as much as `forget` if None."""
        before = {
            "forget": self.says("forget", number, forget + shift, noise),
            "retain": self.says("retain", number, self.memory + shift, noise),
            "test": self.says("test", number, shift, noise),
        }
        held_back = self.says("forget", number, forget + relearned, noise).take(np.arange(150))
        shifted = {
            "forget": self.says("forget", number + _MOVED, (forget if moved is None else moved) + shift, noise),
            "test": self.says("test", number + _MOVED, shift, noise),
        }
        return ModelOutputs(before, {"held_back": held_back, "test": before["test"]}, shifted)


W = SyntheticModels()


def evidence(model: ModelOutputs, references: int = 2, changed: float | None = 0.9) -> Evidence:
    return Evidence(
        model=model,
        original=W.model(1, forget=W.memory),
        references=[W.model(10 + i) for i in range(references)],
        repeated=model.predictions["forget"],
        changed=changed,
    )


def verdict_on(model: ModelOutputs, **options: float | None) -> Verdict:
    return judge(evidence(model, **options), Gates.read())  # type: ignore[arg-type]


def failing(verdict: Verdict) -> set[str]:
    return {gate.name for gate in verdict.gates if gate.status == FAIL}


def test_a_retrained_model_passes_every_gate() -> None:
    for number in range(20, 26):
        verdict = verdict_on(W.model(number))
        assert verdict.status == PASS, [gate for gate in verdict.gates if gate.status != PASS]
    assert len(verdict.gates) == 12
    assert verdict.decided_by == []


@pytest.mark.parametrize(
    ("model", "gates"),
    [
        (W.model(1, forget=2.0), {"membership"}),
        (W.model(3, forget=-2.0), {"membership", "forget accuracy"}),  # worse on them than a model that never saw them
        (W.model(3, shift=-3.0), {"test accuracy", "retain accuracy", "forget accuracy", "agreement"}),
        (W.model(3, noise=6.0), {"agreement"}),
        (W.model(3, relearned=2.0), {"relearning"}),
        (W.model(3, moved=2.0), {"shifted images"}),  # the exact images are in a table
    ],
)
def test_a_model_that_is_not_a_retrain_fails_by_the_gate_that_asks_for_it(model: ModelOutputs, gates: set[str]) -> None:
    verdict = verdict_on(model)
    assert verdict.status == FAIL
    assert gates <= failing(verdict)
    assert failing(verdict) <= set(verdict.decided_by)


def test_small_signs_of_the_samples_add_up() -> None:
    """Each gate is passed; several intervals at once are above the value of a retrained model."""
    verdict = judge(evidence(W.model(22, forget=0.2), references=4), Gates.read())
    assert verdict.status == FAIL
    assert verdict.decided_by == ["joint"]
    (joint,) = (gate for gate in verdict.gates if gate.name == "joint")
    assert joint.reason.startswith("5 of them: forget accuracy, membership")
    for number in range(20, 26):
        gates = judge(evidence(W.model(number), references=4), Gates.read()).gates
        assert next(gate for gate in gates if gate.name == "joint").status != FAIL


def test_the_original_is_detected_if_it_is_clearly_above_and_does_not_pass() -> None:
    """With an original that remembers little, the attack has power only if that little is clear."""
    for memory, power in ((0.0, INSUFFICIENT), (0.03, INSUFFICIENT), (0.3, PASS)):
        seen = dataclasses.replace(evidence(W.model(20), references=4), original=W.model(1, forget=memory))
        gates = judge(seen, Gates.read()).gates
        assert next(gate for gate in gates if gate.name == "power").status == power, memory


def test_untouched_features_and_random_answers_fail() -> None:
    assert failing(verdict_on(W.model(20), changed=0.0)) == {"changed"}
    seen = evidence(W.model(20))
    other = W.model(21).predictions["forget"]
    assert failing(judge(dataclasses.replace(seen, repeated=other), Gates.read())) == {"repeatable"}
    slightly = Predictions(seen.repeated.logits + 0.05, seen.repeated.labels)  # the same classes, other logits
    assert failing(judge(dataclasses.replace(seen, repeated=slightly), Gates.read())) == {"repeatable"}
    assert verdict_on(W.model(20), changed=None).status == PASS  # another architecture is another model


def test_what_cannot_be_told_is_never_a_pass() -> None:
    verdict = verdict_on(W.model(20), references=1)
    assert verdict.status == INSUFFICIENT
    assert verdict.decided_by == ["agreement"]
    (agreement,) = (gate for gate in verdict.gates if gate.name == "agreement")
    assert "1 retrained references, 2 required" in agreement.reason
    # The attack has no power over an original that shows no trace of the samples.
    blind = dataclasses.replace(evidence(W.model(20)), original=W.model(1))
    assert judge(blind, Gates.read()).decided_by == ["power"]
    # One that is fed wrongly knows the forget samples less than the references: that is no trace of them.
    misread = dataclasses.replace(evidence(W.model(20)), original=W.model(1, shift=-2.0))
    assert judge(misread, Gates.read()).decided_by == ["power"]
    # Nor where nobody ran the relearning attack.
    silent = dataclasses.replace(evidence(W.model(20)), model=ModelOutputs(W.model(20).predictions, {}))
    assert judge(silent, Gates.read()).decided_by == ["shifted images", "relearning"]


def test_few_samples_decide_nothing_but_an_unchanged_backbone() -> None:
    few = {name: p.take(np.arange(40)) for name, p in W.model(20).predictions.items()}
    small = dataclasses.replace(evidence(W.model(20)), model=ModelOutputs(few, {}))
    verdict = judge(small, Gates.read())
    assert verdict.decided_by == ["samples"]
    assert verdict.gates[0].reason == "40 forget and 40 test samples"
    assert judge(dataclasses.replace(small, changed=0.0), Gates.read()).decided_by == ["changed"]


def test_without_references_held_out_data_decide_where_the_user_says_so(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("references: 0\n")
    gates = Gates.read(tmp_path / "gates.yaml")
    assert judge(evidence(W.model(20), references=0), Gates.read()).status == INSUFFICIENT
    forgotten = judge(evidence(W.model(20), references=0), gates)
    assert {gate.name for gate in forgotten.gates} >= {"power", "membership", "test accuracy"}
    assert "agreement" not in {gate.name for gate in forgotten.gates}
    assert judge(evidence(W.model(1, forget=2.0), references=0), gates).status == FAIL


def test_false_positives_that_the_test_samples_cannot_show(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("membership_fpr: 0.001\n")
    verdict = judge(evidence(W.model(20)), Gates.read(tmp_path / "gates.yaml"))
    assert verdict.decided_by == ["sure members"]
    assert "600 test samples cannot show a false positive rate of 0.001" in [g.reason for g in verdict.gates]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("membership_auc: 0.2", "membership_auc: 0.2 is looser than the default 0.05"),
        ("level: 0.5", "level: 0.5 is looser"),
        ("relearning_epochs: 1", "relearning_epochs: 1.0 is looser"),
        ("membrship_auc: 0.05", "unknown option 'membrship_auc'; did you mean"),
        ("references: 1", "2 or more for the noise floor between them, or 0"),
        ("membership_fpr: 0", "membership_fpr"),
        ("- 1", "expected a mapping"),
    ],
)
def test_gates_may_be_tightened_not_loosened(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gates.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Gates.read(tmp_path / "gates.yaml")


def test_a_tighter_gate_decides_more_strictly(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("agreement_ratio: 0.5\nreferences: 3\n")
    verdict = judge(evidence(W.model(20)), Gates.read(tmp_path / "gates.yaml"))
    assert verdict.status == FAIL
    assert failing(verdict) == {"agreement"}
    assert next(gate for gate in verdict.gates if gate.name == "references").status == INSUFFICIENT


def test_every_limit_of_the_defaults_has_a_direction() -> None:
    from engine.evaluate import gates

    assert {field.name for field in dataclasses.fields(Gates)} == {*gates._LOOSER, "references"}
    assert DEFAULTS.is_file()


# --- references -------------------------------------------------------------------------------------------------------


def test_references_are_what_they_are_said_to_be() -> None:
    original = W.model(1, forget=W.memory)
    check_reference("good", W.model(10), original, proven=False, level=0.9)
    with pytest.raises(UserError, match="it fits the forget samples as well as the original does"):
        check_reference("seen", W.model(11, forget=W.memory), original, proven=False, level=0.9)
    check_reference(
        "seen, but its record says otherwise", W.model(11, forget=W.memory), original, proven=True, level=0.9
    )
    elsewhere = SyntheticModels(memory=0.0)  # what it was trained on is none of this
    with pytest.raises(UserError, match="it was trained on other data"):
        check_reference("other", elsewhere.model(12), original, proven=True, level=0.9)
    with pytest.raises(UserError, match="its test accuracy is"):
        check_reference("weak", W.model(13, shift=-4.0), original, proven=True, level=0.9)


def test_a_reference_of_another_architecture_is_refused() -> None:
    task, original = Task.open("digits", "random:0.1@0"), tiny_vit(seed=1)
    check_references(task, [tiny_vit(seed=2)], {"the original": original})
    with pytest.raises(UserError, match=r"reference 1: it has [\d,]+ parameters, the original [\d,]+; .*architecture"):
        check_references(task, [tiny_vit(seed=2, depth=3)], {"the original": original})


def test_a_reference_by_its_record(tmp_path: Path) -> None:
    task, model = Task.open("digits", "random:0.1@0"), tiny_vit()
    short = {"max_steps": 1, "epochs": 1.0, "precision": "fp32"}

    def trained(name: str, left_out: Task | None) -> Path:
        train_job(task.source, model, tmp_path / name, task=left_out, config=short)
        return tmp_path / name

    good = trained("retrained", task)
    assert check_origin(good, task)
    assert not check_origin(save_checkpoint(model, tmp_path / "a checkpoint alone"), task)
    with pytest.raises(
        UserError, match=r"by its record.json it was trained on all samples, those to forget among them"
    ):
        check_origin(trained("all", None), task)
    with pytest.raises(UserError, match=r"it was trained on other samples than this request retains"):
        check_origin(trained("other", Task.open("digits", "random:0.1@1")), task)
    options = {"max_steps": 1, "precision": "fp32"}
    unlearn(model, task.forget, task.retain, method="finetune", config=options, output_dir=tmp_path / "unlearned")
    with pytest.raises(UserError, match=r"it was made by finetune, not by a retrain"):
        check_origin(tmp_path / "unlearned", task)
    (good / "history.jsonl").write_text("")
    with pytest.raises(UserError, match=r"its record is not valid \(history.jsonl"):
        check_origin(good, task)
