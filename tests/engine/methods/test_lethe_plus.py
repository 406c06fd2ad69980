"""LetheViT+: its target by hand, what a step takes, and what it does to a model that has memorised its samples."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.data import Samples, open_source
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.methods.common.log_odds import log_odds, quantiles_in_order, quantiles_of, with_log_odds
from engine.methods.common.shifts import one_shift, shifts
from engine.models.checkpoint import save_checkpoint, weights_sha256
from engine.models.vit import outputs
from engine.run.collapse_guard import accuracy_before
from engine.run.unlearn import train as train_model
from engine.run.unlearn import unlearn


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def made(train: Samples, model: torch.nn.Module | None = None, **options: Any) -> Any:
    method: Any = make("lethe_plus", train, model, **options)
    method.context = dataclasses.replace(method.context, held_out=train.subset(range(60, 110)))
    return method


SMALL = {"small_share": 0.5}


def test_targets_of_a_request_of_one_sample_follow_its_own_odds(train: Samples) -> None:
    """Red before: a single sample had the median of held-out samples whatever its own log-odds."""
    method = made(train, **SMALL)
    context = method.context
    found = []
    for position in range(len(context.forget)):
        method.context = dataclasses.replace(context, forget=context.forget.subset([position]))
        method.prepare(method.phases()[0])
        found.append(method.targets[0])
    method.context = context
    method.prepare(method.phases()[0])
    torch.testing.assert_close(torch.stack(found), method.targets)
    assert len({round(float(row.max()), 5) for row in found}) > 10


@pytest.mark.parametrize("options", [{}, SMALL], ids=["large", "small"])
def test_targets_are_the_mean_of_views_at_held_out_odds(train: Samples, options: dict[str, float]) -> None:
    """From the equations: nothing is shared with the method but the shifts and the quantiles, tested above."""
    method = made(train, **options)
    assert method.small == bool(options)
    method.prepare(method.phases()[0])
    original, context = method.context.original, method.context

    def estimated(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        rows = list(context.loader(samples, "none").ordered())
        images, labels = torch.cat([b.images for b in rows]), torch.cat([b.labels for b in rows])
        with torch.no_grad():
            return torch.stack([original(view).softmax(1) for view in shifts(images)]).mean(0).log(), labels

    (mean, labels), (kept, of_kept) = estimated(context.forget), estimated(context.retain)
    held = list(context.loader(context.held_out, "none").ordered())
    with torch.no_grad():
        said, true = torch.cat([original(b.images) for b in held]), torch.cat([b.labels for b in held])
    own, after = log_odds(mean, labels), (log_odds(said, true), true)
    if options:
        wanted = quantiles_of((own, labels), (log_odds(kept, of_kept), of_kept), after)
    else:
        wanted = quantiles_in_order(own, labels, *after)
    expected = with_log_odds(mean, labels, wanted).softmax(1)
    torch.testing.assert_close(method.targets, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(method.targets.sum(1), torch.ones(20))


def test_parts_can_be_left_out(train: Samples) -> None:
    plain = made(train, views=False, calibrate=False)
    plain.prepare(plain.phases()[0])
    batch = batch_of(plain)
    with torch.no_grad():
        expected = plain.context.original(batch.images).softmax(1)
    torch.testing.assert_close(plain.targets[batch.index], expected, atol=1e-6, rtol=1e-4)


def test_a_class_of_which_nothing_is_retained_gets_nothing(train: Samples) -> None:
    method = made(train)
    retain = method.context.retain
    method.context = dataclasses.replace(method.context, retain=retain.subset(np.flatnonzero(retain.labels != 3)))
    method.prepare(method.phases()[0])
    assert (method.targets[:, 3] == 0).all()
    torch.testing.assert_close(method.targets.sum(1), torch.ones(20))
    terms = method.paired_loss(tiny_vit(seed=5), batch_of(method), method.phases()[0])
    assert torch.isfinite(terms["forget_kl"])


def test_the_losses_are_those_of_the_equation(train: Samples) -> None:
    method = made(train, forget_weight=3.0)
    phase = method.phases()[0]
    method.prepare(phase)
    student, forget, retain = tiny_vit(seed=5), batch_of(method), batch_of(method, "retain")
    q, f = method.targets[forget.index], outputs(student, forget.images).softmax(1)
    expected = 3.0 * (q * (q / f).log()).sum(1).mean()
    torch.testing.assert_close(method.paired_loss(student, forget, phase)["forget_kl"], expected)
    expected = F.cross_entropy(student(retain.images), retain.labels)
    torch.testing.assert_close(method.loss(student, retain, phase)["retain_ce"], expected)


def test_the_aim_follows_what_is_left_of_the_memory(train: Samples) -> None:
    """Four steps from the equations, the log-odds of probabilities in place of those of logits. What training does to
    held-out samples is not memory. Red before: it was counted as such."""
    method = made(train, correction=100.0)
    phase = method.phases()[0]
    method.prepare(phase)
    student, forget = tiny_vit(seed=5), batch_of(method)
    student.head.weight.data.mul_(40)  # sure of some
    row = torch.arange(len(forget))
    said = outputs(student, forget.images).detach().double().softmax(1)
    q = method.targets[forget.index].double()

    def odds(p: torch.Tensor, labels: torch.Tensor = forget.labels) -> torch.Tensor:
        own = p.gather(1, labels[:, None])[:, 0]
        return (own / (1 - own)).log().clamp(-5, 5)

    images, labels = method.context.loader(method.context.held_out, "none").rows(lambda b: (b.images, b.labels))
    now, before = (
        odds(outputs(model, images).detach().double().softmax(1), labels)
        for model in (student, method.context.original)
    )
    by_class = {int(y): float((now - before)[labels == y].mean()) for y in labels}
    counted = [by_class[int(y)] for y in method.context.forget.labels if int(y) in by_class]
    assert abs(np.mean(counted)) > 0.1
    assert 0 < (odds(said).abs() == 5).sum() < len(forget)
    s = 0.0
    method.total_steps = 20
    for step in range(4):
        method.step = step
        raised = q.clone()
        raised[row, forget.labels] *= math.exp(s)
        raised /= raised.sum(1, keepdim=True)
        expected = (raised * (raised / said).log()).sum(1).mean()
        torch.testing.assert_close(method.paired_loss(student, forget, phase)["forget_kl"].double(), expected)
        # A batch that keeps a rank in step counts nothing.
        method.paired_loss(student, dataclasses.replace(forget, weight=0.0), phase)
        method.after_step(student, phase)
        if step >= 2:  # a tenth of the steps is over
            s -= 100.0 / 20 * (float((odds(said) - odds(q)).mean()) - np.mean(counted))
        assert float(method.shift) == pytest.approx(s, rel=1e-5)
    assert abs(s) > 0.1
    other = made(train, correction=100.0)
    other.load_state(method.state())
    other.load_cache_state(phase, method.cache_state(phase))
    assert other.state() == method.state()
    still = made(train, correction=0.0)
    still.prepare(phase)
    still.paired_loss(student, forget, phase)
    still.after_step(student, phase)
    assert float(still.shift) == 0


def test_steps_hold_as_many_samples_as_the_passes_need(train: Samples) -> None:
    """20 forget and 40 retained samples: 1 pass of the former is half a pass of the latter."""
    phase = phase_of(train, epochs=4.0, forget_passes=2.0, small_share=0.49)
    assert (phase.epochs, phase.share, phase.paired_share) == (4.0, 1.0, 0.25)
    phase = phase_of(train, epochs=1.0, forget_passes=6.0)
    assert (phase.epochs, phase.share, phase.paired_share) == (3.0, 1.0, 1.0)
    assert phase_of(train, forget_passes=1.0, small_share=0.0).epochs == 2.25
    assert phase_of(train, small_share=0.5).epochs == 0, "a small request edits"


def phase_of(train: Samples, **options: Any) -> Any:
    (phase,) = make("lethe_plus", train, **options).phases()
    return phase


QUICK = {"precision": "fp32", "small_share": 0.5, "small_steps": 3, "retain_batch": 6, "fisher_samples": 10}


def parts(train: Samples, forget: int = 4) -> tuple[Samples, Samples, Samples]:
    return few(train, forget), train.subset(range(20, 60)), train.subset(range(60, 110))


def test_a_small_request_takes_so_many_images_and_records_its_steps(train: Samples) -> None:
    """Each step takes a gradient of each sample, of its shifted copy and of the retained ones, and tries lengths."""
    forget, retain, held_out = parts(train)
    seen: list[tuple[str, int, int]] = []
    result = unlearn(
        tiny_vit(),
        forget,
        retain,
        method="lethe_plus",
        validation=held_out,
        config=QUICK,
        progress=lambda phase, step, steps, numbers: seen.append((phase, step, steps)),
    )
    rows = [row for row in result.history if "length" in row]
    passes = sum(1 + row["trials"] for row in rows)
    assert passes >= 6
    assert result.samples_seen == {"forget": 2 * 10 + passes * (2 * 4 + 6)}
    assert seen == [("forget", 1, 3), ("forget", 2, 3), ("forget", 3, 3)]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["length"] > 0 for row in rows)
    without = unlearn(
        tiny_vit(), forget, retain, method="lethe_plus", validation=held_out, config={**QUICK, "retain_weight": 0.0}
    )
    passes = sum(1 + row["trials"] for row in without.history if "length" in row)
    assert without.samples_seen == {"forget": 2 * 10 + passes * 2 * 4}


def test_the_loss_of_a_small_request_is_that_of_the_equation(train: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both terms, of the weights before the first step; the gradient goes to the solver by name."""
    method = made(train, **QUICK, retain_weight=3.0)
    phase = method.phases()[0]
    method.prepare(phase)
    context, student = method.context, tiny_vit(seed=5)
    found: dict[str, Any] = {}

    def instead(model: Any, fisher: Any, gradients: Any, value: Any, *others: Any) -> None:
        found["chosen"] = [gradients(step) for step in (0, 0, 1)]
        found["values"] = [value(step) for step in (0, 1)]
        found["fisher"] = fisher

    rows = context.loader
    monkeypatch.setattr("engine.methods.lethe_plus.descend", instead)
    method.edit(student, phase)
    batches = list(rows(context.forget, "none").ordered())
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])

    def mean_kl(targets: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p, q = targets.double(), student(x).double().softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    expected = mean_kl(method.targets, images) + mean_kl(method.shifted_targets[:, 0], one_shift(images, 0))
    order = np.random.default_rng([context.run.seed, 40]).permutation(40)[10:16]
    kept = context.retain.subset(np.sort(order))
    (batch,) = rows(kept, "none").ordered()
    with torch.no_grad():
        answers = context.original(batch.images).softmax(1)
    expected = expected + 3.0 * mean_kl(answers, batch.images)
    (value, gradient), again, later = found["chosen"]
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert again[0] == value != later[0]
    assert found["values"] == pytest.approx([value, later[0]], rel=1e-6)
    weights = dict(student.named_parameters())
    for name, wanted in zip(
        found["fisher"].names, torch.autograd.grad(expected, [weights[n] for n in found["fisher"].names]), strict=True
    ):
        torch.testing.assert_close(gradient[name].double(), wanted.double(), atol=1e-6, rtol=1e-3)
    assert labels.tolist() == context.forget.labels.tolist()


def test_the_aim_of_a_small_request_follows_what_is_left_from_its_second_quarter_on(train: Samples) -> None:
    """By c / 40 of the mean difference, of which at most 10 counts for a sample."""
    forget, retain, held_out = parts(train)
    config = {**QUICK, "small_steps": 8, "correction": 8.0}
    result = unlearn(tiny_vit(), forget, retain, method="lethe_plus", validation=held_out, config=config)
    shifts = [row["shift"] for row in result.history if "shift" in row]
    assert shifts[:2] == [0, 0]
    assert 0 < abs(shifts[2]) <= 8 / 40 * 10
    assert len(set(shifts[1:])) == 7


def test_a_small_request_is_refused_where_it_cannot_run(train: Samples) -> None:
    forget, retain, held_out = parts(train)
    with pytest.raises(UserError, match=r"trainable='lora:2': lethe_plus edits .* for 4 samples; use trainable=all"):
        unlearn(
            tiny_vit(),
            forget,
            retain,
            method="lethe_plus",
            validation=held_out,
            config={**QUICK, "trainable": "lora:2"},
        )
    image = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    convolutions = timm.create_model("resnet10t", num_classes=10, in_chans=1, pretrained_cfg_overlay=image)
    with pytest.raises(UserError, match=r"and ResNet has 0% of its weights there; use small_share=0"):
        unlearn(convolutions, forget, retain, method="lethe_plus", validation=held_out, config=QUICK)
    with pytest.raises(UserError, match=r"whole weights for 4 samples of 44 \(small_share=0 trains instead\); run"):
        unlearn(
            tiny_vit(), forget, retain, method="lethe_plus", validation=held_out, config=QUICK, deepspeed={"train": 1}
        )


@pytest.mark.parametrize("options", [{"trainable": "head"}, {"gradient_checkpointing": True}, {"augment": "flip"}])
def test_a_small_request_runs_with_the_options_of_a_run(train: Samples, options: dict[str, Any]) -> None:
    forget, retain, held_out = parts(train)
    model = tiny_vit()
    result = unlearn(model, forget, retain, method="lethe_plus", validation=held_out, config={**QUICK, **options})
    before, after = model.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in changed
    if options.get("trainable") == "head":
        assert changed == {"head.weight", "head.bias"}
    assert not any("norm" in name for name in changed), "what is not a linear layer stays"


def test_shifted_copies_get_the_odds_of_shifted_held_out_images(train: Samples) -> None:
    """Red before: the step saw the images themselves alone, and predictions for copies fell below held-out ones."""
    method = made(train, **SMALL, correction=0.0)
    phase = method.phases()[0]
    method.prepare(phase)
    context = method.context

    def answers(samples: Samples, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = list(context.loader(samples, "none").ordered())
        images, labels = torch.cat([b.images for b in rows]), torch.cat([b.labels for b in rows])
        with torch.no_grad():
            return context.original(one_shift(images, view)), labels

    def pooled(parts: list[Samples]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = (torch.cat(each) for each in zip(*(answers(s, k) for k, s in enumerate(parts)), strict=True))
        return log_odds(logits, labels), labels

    held_out = context.held_out
    after = pooled([held_out.subset(range(view, len(held_out), 4)) for view in range(4)])
    before = pooled([context.retain] * 4)
    student, forget = tiny_vit(seed=5), batch_of(method)
    for step in (0, 3, 6):
        logits, labels = answers(context.forget, step % 4)
        wanted = with_log_odds(logits, labels, quantiles_of((log_odds(logits, labels), labels), before, after))
        q = wanted.softmax(1)[forget.index]
        f = student(one_shift(forget.images, step % 4)).softmax(1)
        method.step = step
        terms = method.paired_loss(student, forget, phase)
        torch.testing.assert_close(terms["shifted_kl"], (q * (q / f).log()).sum(1).mean())
    plain, f = method.targets[forget.index], student(forget.images).softmax(1)
    torch.testing.assert_close(terms["forget_kl"], (plain * (plain / f).log()).sum(1).mean())


@pytest.mark.parametrize("options", [{}, {**SMALL, "views": False}], ids=["large", "without views"])
def test_shifted_copies_are_trained_in_small_requests_by_views_alone(train: Samples, options: dict[str, Any]) -> None:
    method = made(train, **options)
    phase = method.phases()[0]
    method.prepare(phase)
    assert set(method.paired_loss(tiny_vit(seed=5), batch_of(method), phase)) == {"forget_kl"}


def wrong(start: int, count: int) -> Samples:
    """Samples with wrong labels, which nothing but memory can know."""
    shift = np.random.default_rng(start).integers(1, 10, count)
    part = open_source("digits").train.subset(range(start, start + count))
    return Samples("wrong", part.ids[:], (part.labels + shift) % 10, part.image, natural=False)


@pytest.fixture(scope="module")
def memorised(train: Samples) -> tuple[torch.nn.Module, Samples]:
    """A model, and what it was trained on: 20 samples with wrong labels, then 80 with right ones."""
    samples = concatenate(wrong(0, 20), train.subset(range(20, 100)))
    config = {"precision": "fp32", "batch_size": 20, "epochs": 100, "lr": 3e-3}
    result = unlearn(tiny_vit(), few(train, 2), samples, method="retrain", config=config)
    assert result.accuracy(samples.subset(range(20))) > 0.8
    return result.model, samples


@pytest.mark.slow
def test_what_was_memorised_comes_to_look_like_what_was_not(memorised: tuple[torch.nn.Module, Samples]) -> None:
    model, samples = memorised
    forget, retain = samples.subset(range(20)), samples.subset(range(20, 100))
    config = {"precision": "fp32", "batch_size": 20, "lr": 2e-3, "epochs": 4.0, "forget_passes": 40.0}
    result = unlearn(model, forget, retain, method="lethe_plus", validation=wrong(300, 100), config=config)
    assert result.accuracy(forget) < 0.3
    assert result.accuracy(retain) > 0.85


@pytest.mark.slow
def test_the_correction_takes_away_what_is_left(memorised: tuple[torch.nn.Module, Samples], train: Samples) -> None:
    model, samples = memorised
    held_out = train.subset(range(300, 400))
    method: Any = make("lethe_plus", samples, model, batch_size=20)
    method.context = dataclasses.replace(method.context, held_out=held_out)
    method.prepare(method.phases()[0])
    forget, retain = method.context.forget, method.context.retain
    (batch,) = method.context.loader(forget, "none").ordered()
    wanted = method.targets.gather(1, batch.labels[:, None])

    def left(correction: float) -> float:
        config = {"precision": "fp32", "batch_size": 20, "lr": 5e-4, "forget_passes": 20.0}
        config |= {"correction": correction}
        changed = unlearn(model, forget, retain, method="lethe_plus", validation=held_out, config=config).model
        with torch.no_grad():
            return float((changed(batch.images).softmax(1).gather(1, batch.labels[:, None]) - wanted).mean())

    without, corrected = left(0.0), left(12.0)
    assert without > 0.1
    assert abs(corrected) < 0.5 * without


@pytest.mark.parametrize(
    "options", [{"batch_size": 10}, {**QUICK, "batch_size": 5, "small_steps": 5}], ids=["large", "small"]
)
def test_it_needs_held_out_samples_and_resumes_to_the_same_bits(
    train: Samples, tmp_path: Path, options: dict[str, Any]
) -> None:
    forget, retain, held_out = few(train, 20), train.subset(range(20, 60)), train.subset(range(60, 110))
    config = {"precision": "fp32", "checkpoint_every": 2, **options}
    with pytest.raises(UserError, match="lethe_plus: needs samples that the model was not trained on"):
        unlearn(tiny_vit(), forget, retain, method="lethe_plus", config=config)
    whole = unlearn(tiny_vit(), forget, retain, method="lethe_plus", validation=held_out, config=config)

    def stop(phase: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        if step > 2:
            raise KeyboardInterrupt

    for given in ({"progress": stop}, {"resume": True}):
        try:
            resumed = unlearn(
                tiny_vit(),
                forget,
                retain,
                method="lethe_plus",
                validation=held_out,
                config=config,
                output_dir=tmp_path / "run",
                **given,  # type: ignore[arg-type]
            )
        except KeyboardInterrupt:
            assert "progress" in given
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)


def test_a_later_request_keeps_the_predictions_of_the_model_before_the_first(train: Samples, tmp_path: Path) -> None:
    """The first loss holds the divergence of the retained samples from the original."""
    forget, retain, held_out = parts(train)
    before = tiny_vit()
    kept = weights_sha256(before)

    def first_retain_loss(**options: Any) -> float:
        found = []
        for weight in (0.0, 10.0):
            config = {**QUICK, "small_steps": 1, "retain_weight": weight}
            result = unlearn(
                tiny_vit(seed=5), forget, retain, method="lethe_plus", validation=held_out, config=config, **options
            )
            found.append(next(row["loss"] for row in result.history if "length" in row))
        return found[1] - found[0]

    assert first_retain_loss() == pytest.approx(0, abs=1e-5), "the predictions of the model itself"
    expected = first_retain_loss(original=before)
    assert expected > 1e-2
    assert first_retain_loss(original=before, inplace=True) == expected
    assert first_retain_loss(original=save_checkpoint(before, tmp_path / "before")) == expected
    assert weights_sha256(before) == kept


@pytest.mark.parametrize(
    ("method", "before", "message"),
    [
        ("finetune", {}, "original: method finetune takes the model that it changes as the original; leave it out"),
        ("lethe_plus", {"num_classes": 7}, "original: it has 7 classes, the model 10; give the model that the earlier"),
        ("lethe_plus", {"img_size": 16}, "original: it takes images of another kind; give the model that the"),
    ],
)
def test_an_original_that_does_not_fit_is_refused(
    train: Samples, method: str, before: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        unlearn(tiny_vit(), few(train, 4), train.subset(range(20, 60)), method=method, original=tiny_vit(**before))


def test_an_original_that_shares_the_weights_is_the_model_itself(train: Samples) -> None:
    """Else it changed with the model that is edited in place, and held nothing back."""
    forget, retain, held_out = parts(train)

    def changed(model: torch.nn.Module, **options: Any) -> str:
        config = {**QUICK, "retain_weight": 100.0}
        given: Any = {"method": "lethe_plus", "validation": held_out, "config": config, **options}
        return weights_sha256(unlearn(model, forget, retain, **given).model)

    model = tiny_vit(seed=5)
    expected = changed(model)
    assert changed(model, original=copy.copy(model), inplace=True) == expected


def test_an_original_that_is_far_less_accurate_is_another_model(train: Samples) -> None:
    samples = train.subset(range(85))
    model = train_model(tiny_vit(), samples, config={"epochs": 15.0, "lr": 3e-3, "batch_size": 16, "precision": "fp32"})
    with pytest.raises(UserError, match=r"original: its accuracy on .* watched samples is .*%, that of the model"):
        unlearn(
            model.model,
            few(train, 4),
            train.subset(range(20, 85)),
            method="lethe_plus",
            validation=samples,
            config=QUICK,
            original=tiny_vit(),
        )
    labels = np.zeros(200, dtype=int)
    assert (accuracy_before(labels, 0.9, 0.8), accuracy_before(labels, 0.8, 0.82)) == (0.9, 0.82)
