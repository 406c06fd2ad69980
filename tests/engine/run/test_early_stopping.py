"""`stop_when=held_out`: when a run ends, by accuracies counted by hand; what it says, skips, refuses and resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from methods_kit import make
from toys import few, tiny_vit

from engine.core.heldout import unseen_accuracy
from engine.data import Samples, open_source
from engine.errors import UserError
from engine.methods import Phase
from engine.models.checkpoint import weights_sha256
from engine.models.predict import Predictions
from engine.run import early_stopping as early_stopping
from engine.run.early_stopping import HeldOutStop, last_stage
from engine.run.unlearn import unlearn

RUN = {"batch_size": 10, "precision": "fp32", "device": "cpu", "stop_when": "held_out"}
FORGET = Phase(name="forget", samples="forget", epochs=1, lr=1.0)
RETAIN = Phase(name="retain", samples="retain", epochs=1, lr=1.0)


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def run(train: Samples, method: str = "finetune", validation: bool = True, **options: Any) -> Any:
    loop = {key: options.pop(key) for key in ("output_dir", "resume", "progress") if key in options}
    return unlearn(
        tiny_vit(),
        few(train, 20),
        train.subset(range(20, 60)),
        method=method,
        config={**RUN, **options},
        validation=train.subset(range(70, 100)) if validation else None,
        **loop,
    )


def answers(labels: list[int], right: list[bool]) -> Predictions:
    logits = np.zeros((len(labels), 4), dtype=np.float32)
    for row, (label, hit) in enumerate(zip(labels, right, strict=True)):
        logits[row, label if hit else (label + 1) % 4] = 1
    return Predictions(logits, np.array(labels))


def test_what_a_model_that_never_saw_them_knows() -> None:
    """Classes 0 and 1 are retained, 2 is not; of the four forget samples two are of 0, one of 1, one of 2."""
    held_out = answers([0, 0, 1, 2], [True, False, True, True])
    found = unseen_accuracy(held_out, np.array([0, 0, 1, 2]), np.array([0, 1, 3]))
    assert found == pytest.approx((0.5 + 0.5 + 1.0 + 0.0) / 4)
    assert unseen_accuracy(held_out, np.array([2, 2]), np.array([0, 1])) == 0.0


def stop_of(train: Samples, monkeypatch: pytest.MonkeyPatch, held_out: float, **options: Any) -> Any:
    """A stop whose passes give what `said` says of the forget and of the held-out samples; the original first."""
    method = make("finetune", train, **options)
    samples = {"forget": method.context.forget, "held_out": train.subset(range(70, 100))}
    object.__setattr__(method.context, "held_out", samples["held_out"])
    now = SimpleNamespace(forget=1.0, held_out=held_out)

    def predictions(model: Any, of: Samples, context: Any) -> Predictions:
        share = now.forget if of is samples["forget"] else now.held_out
        right = np.arange(len(of)) < round(share * len(of))
        logits = np.eye(10, dtype=np.float32)[np.where(right, of.labels, (of.labels + 1) % 10)]
        return Predictions(logits, of.labels)

    monkeypatch.setattr(early_stopping, "predictions_of", predictions)
    stop = HeldOutStop(method, [FORGET, RETAIN])
    stop.prepare()
    return stop, now


def test_a_stage_with_forget_samples_ends_where_they_are_known_no_better(
    train: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, now = stop_of(train, monkeypatch, held_out=0.6, stop_tolerance=0.05)
    target = stop.target
    assert 0.4 < target < 0.8
    above = np.ceil((target + 0.05) * 20 + 1e-9) / 20
    for phase in (FORGET, Phase(name="both", samples="retain", paired="forget", epochs=1, lr=1.0)):
        now.forget, now.held_out, stop.stopped = above, 0.0, None
        row = stop.evaluate(None, phase, 0, 2, 7)
        assert row == {"phase": phase.name, "epoch": 2, "step": 7, "forget_accuracy": above, "unseen_accuracy": target}
        assert stop.stopped is None
        now.forget = above - 0.05
        assert "ended" in stop.evaluate(None, phase, 0, 3, 9)
        assert stop.stopped["epoch"] == 3


def test_a_stage_of_retained_samples_alone_has_to_repair_first(train: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, now = stop_of(train, monkeypatch, held_out=0.6)
    assert stop.needed == pytest.approx(0.6)
    now.forget, now.held_out = 0.0, 0.5
    row = stop.evaluate(None, RETAIN, 1, 0, 3)
    assert (row["held_out_accuracy"], row["held_out_before"]) == (pytest.approx(0.5), pytest.approx(0.6))
    assert stop.stopped is None
    now.held_out = 0.6
    stop.evaluate(None, RETAIN, 1, 1, 7)
    assert stop.stopped["number"] == 1
    assert stop.stopped["ended"].startswith("forget accuracy 0.0%, held-out accuracy ")


def test_the_last_stage() -> None:
    edit = Phase(name="rewind", samples="forget", epochs=0, lr=0.0)
    assert last_stage([FORGET, RETAIN]) == {1}
    assert last_stage([FORGET, RETAIN, FORGET, RETAIN, RETAIN, edit]) == {3, 4}
    assert last_stage([RETAIN]) == {0}
    assert last_stage([edit]) == set()


def test_a_run_ends_and_says_why(train: Samples) -> None:
    """A model that never learned anything knows its forget samples no better from the first epoch on."""
    result = run(train, retain_epochs=5, stop_tolerance=0.9)
    assert sum("lr" in row for row in result.history) == 4
    assert result.stopped == {**result.history[-1], "number": 0}
    assert result.stopped["phase"] == "retain"
    assert (result.stopped["epoch"], result.stopped["step"]) == (0, 3)
    assert not result.events
    whole = run(train, retain_epochs=5, stop_when="never")
    assert whole.stopped is None
    assert sum("lr" in row for row in whole.history) == 20


def test_epochs_that_are_phases_of_their_own_are_left_out_and_edits_are_not(
    train: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.methods.scrub import ScrubRewind

    edited: list[str] = []
    edit = ScrubRewind.edit
    monkeypatch.setattr(
        ScrubRewind, "edit", lambda self, model, phase: edited.append(phase.name) or edit(self, model, phase)
    )
    result = run(train, "scrub_r", forget_epochs=2, retain_epochs=6, stop_tolerance=0.9)
    assert edited == ["forget", "retain", "forget", "retain", "rewind"], (
        "the stage is the min epochs after the last max"
    )
    assert result.stopped["number"] == 3


def test_a_run_that_is_killed_after_it_stopped_stays_stopped(train: Samples, tmp_path: Path) -> None:
    options: dict[str, Any] = {"forget_epochs": 1, "retain_epochs": 4, "stop_tolerance": 0.9}
    whole = run(train, "scrub", **options)
    assert whole.stopped["number"] == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.run.trainer.Trainer.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(train, "scrub", output_dir=tmp_path / "run", **options)
    resumed = run(train, "scrub", output_dir=tmp_path / "run", resume=True, **options)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert resumed.stopped == whole.stopped
    assert resumed.history == whole.history


def test_wrong_use(train: Samples) -> None:
    with pytest.raises(UserError, match=r"stop_when='held_out': needs samples that the model was not trained on; give"):
        run(train, validation=False)
    with pytest.raises(UserError, match="retrain does not use forget samples"):
        run(train, "retrain")
    with pytest.raises(UserError, match="ssd edits weights and has no epochs"):
        run(train, "ssd", retain_epochs=0)
    with pytest.raises(UserError, match="option stop_tolerance="):
        run(train, stop_tolerance=1.0)


def test_looking_changes_nothing_of_the_run(train: Samples) -> None:
    """A run that is looked at and never stops has the bits of one that is not."""
    looked, plain = (run(train, retain_epochs=2, stop_when=when) for when in ("held_out", "never"))
    assert looked.stopped is None
    assert any("unseen_accuracy" in row for row in looked.history)
    assert weights_sha256(looked.model) == weights_sha256(plain.model)
    assert torch.is_tensor(next(looked.model.parameters()))
