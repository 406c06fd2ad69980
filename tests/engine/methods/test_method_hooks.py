"""What the loop offers to methods: a second batch beside, gradients apart, edits, epochs that end a phase, state."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import make
from toys import few, tiny_vit

from engine.core import method as base
from engine.data import Batch, Loader, Samples, open_source
from engine.errors import UserError
from engine.methods import Method, Phase, register
from engine.models.checkpoint import weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import outputs
from engine.run.setup import RunOptions, set_up
from engine.run.unlearn import unlearn


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """None."""


class Probe(Method):
    """Cross-entropy on the retained samples, less half of that on the forget samples beside them."""

    name, summary, Config = "probe", "for tests", NoOptions
    one_process = "it keeps two gradients apart"
    phase: Phase

    def phases(self) -> list[Phase]:
        return [self.phase]

    def loss(self, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
        return {"retain_ce": F.cross_entropy(outputs(model, batch.images), batch.labels)}

    def paired_loss(self, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
        return {"forget_ascent": -0.5 * F.cross_entropy(outputs(model, batch.images), batch.labels)}

    def combine(
        self, model: torch.nn.Module, main: list[torch.Tensor], paired: list[torch.Tensor], phase: Phase
    ) -> list[torch.Tensor]:
        return [a + b for a, b in zip(main, paired, strict=True)]


@contextlib.contextmanager
def registered(**attributes: Any) -> Iterator[type[Probe]]:
    register(type("Probe", (Probe,), attributes))
    try:
        yield base._REGISTRY["probe"]  # type: ignore[misc]
    finally:
        del base._REGISTRY["probe"]


RETAIN = Phase(name="both", samples="retain", epochs=2, lr=1e-3, paired="forget", paired_share=0.5)
OPTIONS = {"batch_size": 10, "precision": "fp32", "augment": "none"}


def run(train: Samples, **options: Any) -> Any:
    forget, retain = few(train, 12), train.subset(range(20, 56))
    options.setdefault("validation", train.subset(range(60, 90)))
    config = {**OPTIONS, **options.pop("config", {})}
    return unlearn(tiny_vit(), forget, retain, method="probe", config=config, **options)


def test_steps_of_walks_through_epochs(train: Samples) -> None:
    loader = Loader(few(train, 12), preprocessing_of(tiny_vit()), batch_size=5, seed=3)
    walked = [batch.index.tolist() for batch in loader.steps_of(2, 8)]
    epochs = [batch.index.tolist() for epoch in range(3) for batch in loader.epoch(epoch)]
    assert walked == epochs[2:8]


def test_a_step_takes_both_batches_and_counts_all_samples(train: Samples) -> None:
    seen: dict[str, list[Any]] = {"main": [], "beside": []}

    def loss(self: Probe, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
        seen["main"].append(batch.labels.tolist())
        return Probe.loss(self, model, batch, phase)

    def paired_loss(self: Probe, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
        seen["beside"].append(batch.index.tolist())
        return Probe.paired_loss(self, model, batch, phase)

    with registered(phase=RETAIN, loss=loss, paired_loss=paired_loss):
        result = run(train)
    assert len(seen["main"]) == len(seen["beside"]) == 8
    assert [len(each) for each in seen["beside"]] == [5, 5, 2, 5, 5, 2, 5, 5]
    assert sorted(itertools.chain(*seen["beside"][:3])) == list(range(12))
    assert result.samples_seen == {"both": 72 + 34}
    assert {"retain_ce", "forget_ascent"} <= set(result.history[0])


def test_gradients_kept_apart_and_added_are_those_of_the_sum(train: Samples) -> None:
    """In float64 the two ways to the same step differ by rounding alone; accumulation included."""
    weights = []
    for combined in (False, True):
        with registered(phase=dataclasses.replace(RETAIN, combined=combined)):
            result = run(train, config={"accumulation_steps": 2, "batch_size": 4, "max_steps": 3})
        weights.append(torch.cat([p.detach().flatten() for p in result.model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in tiny_vit().parameters()])
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)
    assert (weights[0] - before).abs().max() > 1e-3


def test_combine_gets_the_gradient_of_each_loss(train: Samples) -> None:
    kept: list[Any] = []

    def combine(self: Probe, model: Any, main: list[torch.Tensor], paired: list[torch.Tensor], phase: Phase) -> Any:
        kept.append((main, paired))
        return [torch.zeros_like(each) for each in main]

    forget, retain = few(train, 12), train.subset(range(20, 56))
    phase = dataclasses.replace(RETAIN, combined=True, epochs=0.2, augment=False)
    with registered(phase=phase, combine=combine):
        made = set_up(tiny_vit(), forget, retain, RunOptions(method="probe", config=OPTIONS))
        batch, other = next(made.loader_of(0, phase).epoch(0)), next(made.paired_loader(0, phase).epoch(0))  # type: ignore[union-attr]
        unlearn(tiny_vit(), forget, retain, method="probe", config={**OPTIONS, "weight_decay": 0.0})
    model = tiny_vit().train()
    expected = [
        torch.autograd.grad(F.cross_entropy(model(b.images), b.labels) * share, list(model.parameters()))
        for b, share in ((batch, 1.0), (other, -0.5))
    ]
    for found, wanted in zip(kept[0], expected, strict=True):
        for (name, _), a, b in zip(model.named_parameters(), found, wanted, strict=True):
            if not name.endswith("qkv.bias"):  # its key part is set to zero
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_hooks_around_a_step_see_gradients_and_weights(train: Samples) -> None:
    """Gradients of one tensor set to zero, and its weights put back: it alone stays as it was."""

    def before_step(self: Probe, model: torch.nn.Module, phase: Phase) -> None:
        assert model.head.weight.grad.abs().max() > 0
        self.kept = model.norm.weight.detach().clone()

    def after_step(self: Probe, model: torch.nn.Module, phase: Phase) -> None:
        assert not torch.equal(self.kept, model.norm.weight)
        with torch.no_grad():
            model.norm.weight.copy_(self.kept)

    with registered(phase=RETAIN, before_step=before_step, after_step=after_step):
        changed = run(train).model.state_dict()
    same = [name for name, value in tiny_vit().state_dict().items() if torch.equal(value, changed[name])]
    assert same == ["norm.weight"]


def _double_head(self: Probe, model: torch.nn.Module, phase: Phase) -> None:
    with torch.no_grad():
        model.head.weight.mul_(2)


def test_an_edit_alone_takes_no_steps(train: Samples, tmp_path: Path) -> None:
    phase = Phase(name="edit", samples="forget", epochs=0, lr=0.0, schedule="constant", guarded=True)
    with registered(phase=phase, edit=_double_head):
        result = run(train, output_dir=tmp_path / "run")
    changed, before = result.model.state_dict(), tiny_vit().state_dict()
    assert torch.equal(changed.pop("head.weight"), 2 * before.pop("head.weight"))
    assert all(torch.equal(value, changed[name]) for name, value in before.items())
    assert result.samples_seen == {}
    assert result.seconds["edit_phase"] > 0


@pytest.mark.slow
def test_an_edit_that_destroys_the_model_is_taken_back(train: Samples) -> None:
    trained = unlearn(tiny_vit(), few(train, 2), train, method="retrain", config={"epochs": 12}).model
    phase = Phase(name="edit", samples="forget", epochs=0, lr=0.0, schedule="constant", guarded=True)

    def edit(self: Probe, model: torch.nn.Module, phase: Phase) -> None:
        with torch.no_grad():
            model.head.weight.neg_()

    with registered(phase=phase, edit=edit):
        result = unlearn(trained, few(train, 12), train, method="probe", config=OPTIONS)
    assert [event["event"] for event in result.events] == ["collapse"]
    assert weights_sha256(result.model) == weights_sha256(trained)


def test_an_epoch_that_ends_the_phase(train: Samples) -> None:
    def should_stop(self: Probe, model: torch.nn.Module, phase: Phase, epoch: int) -> str | None:
        return "enough" if epoch == 1 else None

    with registered(phase=dataclasses.replace(RETAIN, epochs=5), should_stop=should_stop):
        result = run(train)
    steps = [row for row in result.history if "retain_ce" in row]
    assert len(steps) == 8
    assert result.history[-1] == {"phase": "both", "step": 7, "ended": "enough"}
    assert not result.events


def test_state_of_a_method_survives_a_kill(train: Samples, tmp_path: Path) -> None:
    """A method that scales its loss by a number it counts up; stopped in its second epoch and resumed."""

    class Stop(Exception):
        pass

    def attributes(stop_at: int | None) -> dict[str, Any]:
        def loss(self: Any, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
            self.count = getattr(self, "count", 0) + 1
            if self.count == stop_at:
                raise Stop
            return {"ce": Probe.loss(self, model, batch, phase)["retain_ce"] * self.count}

        return {
            "phase": RETAIN,
            "loss": loss,
            "state": lambda self: {"count": self.count},
            "load_state": lambda self, state: self.__dict__.update(state),
        }

    with registered(**attributes(None)):
        whole = run(train)
    with registered(**attributes(6)), pytest.raises(Stop):
        run(train, output_dir=tmp_path / "run")
    with registered(**attributes(None)):
        resumed = run(train, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)


def test_deepspeed_is_refused_with_the_methods_reason(train: Samples) -> None:
    with (
        registered(phase=RETAIN),
        pytest.raises(UserError, match="probe: it keeps two gradients apart; run it on"),
    ):
        run(train, deepspeed={})


def test_held_out_samples_are_the_runs_validation(train: Samples) -> None:
    with pytest.raises(UserError, match="lethe: needs samples that the model was not trained on, to stop; give valid"):
        make("lethe", train).held_out("to stop")
    seen = []

    def should_stop(self: Probe, model: torch.nn.Module, phase: Phase, epoch: int) -> str | None:
        seen.append(self.held_out("to look").ids[0])
        return "seen"

    with registered(phase=RETAIN, should_stop=should_stop):
        run(train, validation=train.subset(range(60, 90)))
    assert seen == [train.ids[60]]


@pytest.mark.slow
def test_a_class_that_is_to_be_forgotten_is_not_watched(train: Samples) -> None:
    """A model that names every class but the forgotten one has lost nothing."""
    forget, retain = (train.subset(np.flatnonzero(where)) for where in (train.labels == 3, train.labels != 3))
    trained = unlearn(tiny_vit(), few(train, 2), train, method="retrain", config={"epochs": 12}).model

    def edit(self: Probe, model: torch.nn.Module, phase: Phase) -> None:
        with torch.no_grad():
            model.head.bias[3] = -1e4

    phase = Phase(name="edit", samples="forget", epochs=0, lr=0.0, schedule="constant", guarded=True)
    with registered(phase=phase, edit=edit):
        config = {**OPTIONS, "collapse_drop": 1.0}
        result = unlearn(trained, forget, retain, method="probe", config=config, validation=few(train, 200))
    assert result.accuracy(forget) == 0.0
    assert result.watched["after"] >= result.watched["before"] > 0.3
    assert not result.events
