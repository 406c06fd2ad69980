"""NegGrad+, l1-sparse, SalUn and IAU against their equations, written out here in plain torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.data import Loader, Samples, open_source
from engine.errors import UserError
from engine.methods.salun import largest
from engine.models.checkpoint import weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.run.trainer import Trainer
from engine.run.unlearn import train as train_model
from engine.run.unlearn import unlearn

OPTIONS = {"batch_size": 10, "precision": "fp32"}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


@pytest.fixture(scope="module")
def trained(train: Samples) -> torch.nn.Module:
    """Has learned the 60 samples that `run` unlearns from: its weights are no longer those of a fresh model."""
    options = {**OPTIONS, "epochs": 20.0, "lr": 3e-3}
    return train_model(tiny_vit(), train.subset(range(60)), config=options).model


def run(model: torch.nn.Module, train: Samples, method: str, folder: Path | None = None, **options: Any) -> Any:
    resume = options.pop("resume", False)
    config = {**OPTIONS, **options}
    forget, retain = few(train, 12), train.subset(range(20, 60))
    return unlearn(model, forget, retain, method=method, config=config, output_dir=folder, resume=resume)


def whole(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a set at once."""
    batch = next(Loader(samples, preprocessing_of(tiny_vit()), batch_size=len(samples)).ordered())
    return batch.images, batch.labels


class Killed(BaseException):
    """The run is gone."""


def resumed(
    model: torch.nn.Module,
    train: Samples,
    method: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    **options: Any,
) -> Any:
    """The same run, killed before step `at` and gone on with."""
    step = Trainer.step

    def dying(self: Trainer, phase: Any, batches: Any, seed: int, number: int, *rest: Any) -> Any:
        if number == at:
            raise Killed
        return step(self, phase, batches, seed, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying)
        with pytest.raises(Killed):
            run(model, train, method, folder, **options)
    return run(model, train, method, folder, resume=True, **options)


@pytest.mark.parametrize("name", ["neg_grad_plus", "l1_sparse", "salun", "iau"])
def test_they_change_their_own_model_and_leave_the_callers_alone(train: Samples, name: str) -> None:
    model = tiny_vit()
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    before = weights_sha256(model)
    result = run(model, train, name, max_steps=2, lr=1e-3)
    assert weights_sha256(model) == before != weights_sha256(result.model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in (*model.parameters(), *result.model.parameters()))


@pytest.mark.parametrize("name", ["neg_grad_plus", "l1_sparse", "salun"])
def test_defaults_cost_no_more_than_ten_retain_epochs(train: Samples, name: str) -> None:
    (phase,) = make(name, train).phases()
    assert phase.epochs * (1 + (phase.paired_share if phase.paired else 0)) <= 10


def test_neg_grad_plus_is_retain_loss_less_beta_forget_loss(train: Samples) -> None:
    model, forget = tiny_vit(seed=5), batch_of(make("neg_grad_plus", train))
    losses = [-model(x[None]).log_softmax(1)[0, y] for x, y in zip(forget.images, forget.labels, strict=True)]
    bound = sorted(loss.item() for loss in losses)[3] + 1e-6  # above four of the eight
    method = make("neg_grad_plus", train, beta=0.3, bound=bound)
    (phase,) = method.phases()
    assert (phase.samples, phase.paired, phase.paired_share, phase.guarded) == ("retain", "forget", 0.25, True)
    retain = batch_of(method, "retain")
    ascent = -0.3 * sum(torch.clamp(loss, max=bound) for loss in losses) / 8
    torch.testing.assert_close(method.paired_loss(model, forget, phase), {"forget_ascent": ascent})
    expected = F.cross_entropy(model(retain.images), retain.labels)
    torch.testing.assert_close(method.loss(model, retain, phase), {"retain_ce": expected})


def test_neg_grad_plus_leaves_a_forget_sample_alone_beyond_a_uniform_guess(train: Samples) -> None:
    model, labels = tiny_vit(), batch_of(make("neg_grad_plus", train)).labels
    with torch.no_grad():
        model.head.weight.mul_(0)
        model.head.bias.copy_(torch.eye(10)[labels[0]])  # every sample has that label, a little

    def gradient(**options: Any) -> torch.Tensor:
        method = make("neg_grad_plus", train, beta=1.0, **options)
        batch = batch_of(method)
        loss = method.paired_loss(model, batch, method.phases()[0])["forget_ascent"]
        return torch.autograd.grad(loss, model.head.bias)[0] * len(batch)

    guess = model.head.bias.softmax(0).detach()
    assert len(set(labels.tolist())) > 1
    pulls = [guess - torch.eye(10)[label] for label in labels]
    torch.testing.assert_close(
        gradient(), -sum(p for p, label in zip(pulls, labels, strict=True) if label == labels[0])
    )
    torch.testing.assert_close(gradient(bound=math.inf), -sum(pulls))


def test_neg_grad_plus_forgets_what_finetuning_does_not(train: Samples, trained: torch.nn.Module) -> None:
    options = {"retain_epochs": 4.0, "lr": 1e-3}
    kept, ascended = (run(trained, train, "neg_grad_plus", beta=beta, **options) for beta in (0.0, 0.9))
    forget, retain = few(train, 12), train.subset(range(20, 60))

    def loss(model: torch.nn.Module, samples: Samples) -> float:
        images, labels = whole(samples)
        return F.cross_entropy(model(images), labels).item()

    assert loss(ascended.model, forget) > loss(kept.model, forget) + 0.2
    assert loss(ascended.model, retain) < loss(trained, retain) + 0.1
    assert {"retain_ce", "forget_ascent"} <= set(ascended.history[0])


def test_l1_penalty_fades_over_the_epochs(train: Samples, trained: torch.nn.Module) -> None:
    """Four steps an epoch; at rate 0 (nearly) the norm stays, so that each epoch shows its factor."""
    norm = sum(p.detach().abs().sum().item() for p in trained.parameters())
    result = run(trained, train, "l1_sparse", retain_epochs=2.5, alpha=1e-3, lr=1e-12)
    found = [row["l1"] for row in result.history if "l1" in row]
    assert found == pytest.approx([1e-3 * norm * factor for factor in [1.0] * 4 + [0.6] * 4 + [0.2] * 2], rel=1e-5)


def test_l1_gradient_is_alpha_times_the_sign(train: Samples) -> None:
    method = make("l1_sparse", train, alpha=0.01, retain_epochs=4.0)
    (phase,) = method.phases()
    method.should_stop(torch.nn.Module(), phase, 0)
    model, batch = tiny_vit(seed=5), batch_of(method, "retain")
    terms = method.loss(model, batch, phase)
    torch.testing.assert_close(terms["retain_ce"], F.cross_entropy(model(batch.images), batch.labels))
    found = torch.autograd.grad(terms["l1"], list(model.parameters()))
    for weight, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, 0.01 * 0.75 * weight.sign())


def test_l1_leaves_frozen_weights_out(train: Samples) -> None:
    method = make("l1_sparse", train, alpha=1.0)
    (phase,) = method.phases()
    model, batch = tiny_vit(), batch_of(method, "retain")
    for weight in model.parameters():
        weight.requires_grad_(weight is model.head.weight)
    torch.testing.assert_close(method.loss(model, batch, phase)["l1"], model.head.weight.abs().sum())


def test_l1_makes_weights_small(train: Samples, trained: torch.nn.Module) -> None:
    options = {"retain_epochs": 5.0, "lr": 1e-3, "weight_decay": 0.0}
    plain, sparse = (run(trained, train, "l1_sparse", alpha=alpha, **options).model for alpha in (0.0, 1e-2))
    small = [sum((p.abs() < 1e-3).sum().item() for p in model.parameters()) for model in (plain, sparse)]
    assert small[1] > 3 * small[0]


def test_l1_sparse_killed_in_its_second_epoch_goes_on_with_its_factor(
    train: Samples, trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"retain_epochs": 3.0, "alpha": 1e-3, "checkpoint_every": 2}
    once = run(trained, train, "l1_sparse", **options)
    again = resumed(trained, train, "l1_sparse", 7, monkeypatch, tmp_path / "run", **options)
    assert weights_sha256(again.model) == weights_sha256(once.model)


def test_the_largest_are_counted_exactly_and_ties_go_to_the_first() -> None:
    values = torch.tensor([2.0, 0.0, 3.0, 2.0, 2.0, 1.0, 0.0])
    marked = [largest(values, share).nonzero().flatten().tolist() for share in (0.01, 0.2, 0.29, 0.5, 0.6, 0.9, 1.0)]
    assert marked == [[2], [2], [0, 2], [0, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]


def salient(model: torch.nn.Module, train: Samples, share: float) -> list[torch.Tensor]:
    """SalUn's mask by sorting: where |gradient on the forget set| is among the largest of all."""
    copied = copy.deepcopy(model).requires_grad_(True)
    images, labels = whole(few(train, 12))
    weights = list(copied.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(copied(images), labels), weights)
    order = sorted(torch.cat([g.flatten() for g in gradients]).abs().tolist(), reverse=True)
    threshold = order[int(share * len(order)) - 1]
    return [g.abs() >= threshold for g in gradients]


def test_salun_changes_the_salient_weights_and_no_others(train: Samples, trained: torch.nn.Module) -> None:
    """Bit for bit, under weight decay; and by the labels, gradients and steps of random labels."""
    masks = salient(trained, train, 0.3)
    after = run(trained, train, "salun", saliency_share=0.3, weight_decay=0.5, epochs=2.0).model
    moved = [a != b for a, b in zip(after.parameters(), trained.parameters(), strict=True)]
    total = sum(mask.numel() for mask in masks)
    # Gradients next to the threshold may fall on either side of it by rounding: batches of 10 here, of 12 there.
    assert sum((move & ~mask).sum().item() for move, mask in zip(moved, masks, strict=True)) <= 3
    assert sum(move.sum().item() for move in moved) == pytest.approx(0.3 * total, rel=1e-3)
    options = {"epochs": 2.0, "lr": 1e-3}
    free, labels = (
        run(trained, train, "salun", saliency_share=1.0, **options),
        run(trained, train, "random_labels", **options),
    )
    assert weights_sha256(free.model) == weights_sha256(labels.model)


def test_salun_restores_weights_that_decay_alone_would_move(train: Samples, trained: torch.nn.Module) -> None:
    method: Any = make("salun", train, trained, saliency_share=0.5)
    (phase,) = method.phases()
    method.prepare(phase)
    model = copy.deepcopy(trained).requires_grad_(True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    method.before_step(model, phase)
    for weight, mask in zip(model.parameters(), method.masks, strict=True):
        assert torch.equal(weight.grad, mask.float())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    method.after_step(model, phase)
    for weight, before, mask in zip(model.parameters(), trained.parameters(), method.masks, strict=True):
        assert torch.equal(weight, torch.where(mask, before + 1, before))
    assert sum(mask.sum().item() for mask in method.masks) == sum(mask.numel() for mask in method.masks) // 2
    assert method.needs_original(phase, prepared=True)
    with pytest.raises(UserError, match="salun: masks the model's own weights"):
        make("salun", train, trainable="lora:2")


def test_salun_killed_goes_on_under_the_mask_that_was_kept(
    train: Samples, trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    once = run(trained, train, "salun", epochs=2.0)
    killed = tmp_path / "run"
    again = resumed(trained, train, "salun", 7, monkeypatch, killed, epochs=2.0, checkpoint_every=3)
    assert weights_sha256(again.model) == weights_sha256(once.model)

    method: Any = make("salun", train, trained)
    other = copy.copy(method)
    method.prepare(method.phases()[0])
    kept = method.cache_state(method.phases()[0])
    assert kept["mask"].dtype == torch.bool  # a byte a weight
    other.masks = []
    other.load_cache_state(method.phases()[0], kept)
    assert all(torch.equal(a, b) for a, b in zip(method.masks, other.masks, strict=True))


def test_iau_takes_one_step_of_adam_on_both_whole_sets(train: Samples, trained: torch.nn.Module) -> None:
    model = copy.deepcopy(trained).requires_grad_(True)
    losses = [
        F.cross_entropy(model(images), labels)
        for images, labels in map(whole, (few(train, 12), train.subset(range(20, 60))))
    ]
    gradients = torch.autograd.grad(losses[1] - losses[0], list(model.parameters()))
    result = run(trained, train, "iau", lr=1e-3)
    for (name, before), after, g in zip(trained.named_parameters(), result.model.parameters(), gradients, strict=True):
        steps = (after - before).detach() / 1e-3
        if name.endswith("qkv.bias"):  # the gradient of key biases is rounding alone, and set to zero
            assert not steps.view(3, -1)[1].any()
        clear = g.abs() > 1e-5  # smaller ones may change their sign by rounding
        torch.testing.assert_close(steps[clear], -(g / (g.abs() + 1e-8))[clear], atol=1e-3, rtol=0)
        assert steps.abs().max() < 1.001
    assert result.samples_seen == {}
    assert result.seconds["forget_phase"] > 0


def test_iau_is_guarded_and_three_refuse_deepspeed(train: Samples, trained: torch.nn.Module) -> None:
    result = run(trained, train, "iau", lr=0.5)
    assert [event["event"] for event in result.events] == ["collapse"]
    assert weights_sha256(result.model) == weights_sha256(trained)
    for name in ("iau", "l1_sparse", "salun"):
        with pytest.raises(UserError, match=f"method {name}: .*; run it on one process"):
            unlearn(trained, few(train, 12), train.subset(range(20, 60)), method=name, deepspeed={})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("neg_grad_plus", {"beta": -0.1}),
        ("neg_grad_plus", {"bound": 0}),
        ("neg_grad_plus", {"forget_share": 0.0}),
        ("neg_grad_plus", {"lr": 0.0}),
        ("l1_sparse", {"alpha": -1.0}),
        ("l1_sparse", {"retain_epochs": 0}),
        ("salun", {"saliency_share": 0.0}),
        ("salun", {"saliency_share": 1.1}),
        ("salun", {"epochs": 0}),
        ("iau", {"lr": 0.0}),
    ],
)
def test_options_out_of_range_are_named(train: Samples, name: str, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"option {next(iter(options))}="):
        make(name, train, **options)
