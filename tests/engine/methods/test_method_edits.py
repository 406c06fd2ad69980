"""The methods that edit weights at once: SSD, influence unlearning, RAZOR."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import make
from toys import few, tiny_vit

from engine.data import Batch, Loader, Samples, open_source
from engine.errors import UserError
from engine.methods import influence, list_methods, razor, ssd
from engine.methods.common import line_search
from engine.methods.common.gradients import mean_gradient, mean_importance
from engine.models import losses
from engine.models.checkpoint import weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.run.unlearn import unlearn

NAMES = ["influence", "razor", "ssd"]
QUICK: dict[str, dict[str, Any]] = {  # few samples and rounds
    "ssd": {},
    "influence": {"alpha": 0.5, "fisher_samples": 10, "solver_steps": 3},
    "razor": {"rounds": 2, "search_steps": 2, "max_drop": 100.0},
}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def small(seed: int = 3) -> torch.nn.Module:
    return tiny_vit(seed, embed_dim=8, depth=1, num_heads=2).double()


def everything(samples: Samples, model: torch.nn.Module) -> Batch:
    return next(Loader(samples, preprocessing_of(model), batch_size=len(samples)).ordered())


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def per_sample(model: torch.nn.Module, batch: Batch, labels: bool = True) -> torch.Tensor:
    """The gradient of each sample's cross-entropy, or squared length of its logits: [n, weights]."""
    rows = []
    for image, label in zip(batch.images, batch.labels, strict=True):
        logits = model(image[None].to(next(model.parameters()).dtype))
        value = F.cross_entropy(logits, label[None]) if labels else (logits * logits).sum()
        rows.append(flat(torch.autograd.grad(value, list(model.parameters()))))
    return torch.stack(rows)


def edited(name: str, train: Samples, model: torch.nn.Module, **options: Any) -> tuple[Any, torch.nn.Module]:
    """A method on 20 forget and 40 retained digits, and what it makes of the model."""
    method = make(name, train, model, **options)
    changed = copy.deepcopy(model)
    method.edit(changed, method.phases()[0])
    return method, changed


# Passes over a set of samples


def test_the_mean_gradient_is_that_of_the_mean_loss(train: Samples) -> None:
    model, samples = small(), few(train, 19)
    batch = everything(samples, model)
    expected = torch.autograd.grad(
        F.cross_entropy(model(batch.images.double()), batch.labels), list(model.parameters())
    )
    found = mean_gradient(model.train(), Loader(samples, preprocessing_of(model), batch_size=8), losses.cross_entropy)
    torch.testing.assert_close(flat(found), flat(expected), atol=1e-6, rtol=1e-5)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("size", "groups"), [(1, [1] * 10), (3, [3, 3, 2, 2]), (8, [8, 2])])
def test_importances_are_means_over_groups_of_samples(train: Samples, size: int, groups: list[int]) -> None:
    model, samples = small(), few(train, 10)
    loader = Loader(samples, preprocessing_of(model), batch_size=8, seed=5)
    order = torch.cat([batch.index for batch in loader.epoch(0)])
    rows = per_sample(model, everything(samples, model))[order]
    means = torch.stack([part.mean(0) for part in rows.split(groups)])
    for power in (1, 2):
        found = mean_importance(model, loader, losses.cross_entropy, size=size, power=power)
        torch.testing.assert_close(flat(found), (means.abs() ** power).mean(0), atol=1e-9, rtol=1e-4)


# SSD


@pytest.mark.parametrize("labels", [True, False])
def test_ssd_dampens_as_computed_by_hand_and_leaves_the_rest(train: Samples, labels: bool) -> None:
    """Weight by weight, from the gradient of every sample."""
    model = small()
    method, changed = edited("ssd", train, model, labels=labels, alpha=1.1, dampening=0.8, fisher_batch_size=1)
    rows = [per_sample(model, everything(s, model), labels) for s in (method.context.forget, method.context.retain)]
    power = 2 if labels else 1
    f, d = (rows[0].abs() ** power).mean(0), (torch.cat(rows).abs() ** power).mean(0)
    before, after = flat(model.parameters()), flat(changed.parameters())
    sure = (f / d - 1.1).abs() > 1e-3  # away from the threshold, where rounding decides
    chosen = (f > 1.1 * d) & sure
    assert 0.02 < chosen.double().mean() < 0.9
    torch.testing.assert_close(after[chosen], (before * 0.8 * d / f)[chosen], atol=1e-7, rtol=1e-4)
    assert torch.equal(after[~chosen & sure], before[~chosen & sure])


def test_dampening_never_makes_a_weight_larger() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    on_forget, on_all = torch.tensor([8.0, 3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    ssd.dampen([weight], [on_forget], [on_all], alpha=1.0, dampening=2.0)
    assert weight.tolist() == [0.5, 2.0, 2.0, 2.0]


def test_adaptive_alpha_is_the_authors_percentile() -> None:
    rng = np.random.default_rng(0)
    on_forget, on_all = (torch.from_numpy(rng.random((4, 2500))) for _ in range(2))
    on_all[0, :100] = 0  # weights that no sample moves do not count
    on_forget[0, :100] = 0
    alpha = ssd.adaptive_alpha([on_forget[:1], on_forget[1:]], [on_all[:1], on_all[1:]], share=0.1)
    dampened = int((on_forget > alpha * on_all).sum())
    assert dampened == math.floor(math.log(11) / 100 * 9900) == 237
    assert ssd.adaptive_alpha([torch.zeros(3)], [torch.zeros(3)], 0.1) == math.inf


def test_ssd_by_default_dampens_the_adaptive_share(train: Samples) -> None:
    model = small()
    _, changed = edited("ssd", train, model)
    moved = (flat(model.parameters()) != flat(changed.parameters())).sum()
    weights = sum(weight.numel() for weight in model.parameters())
    assert 0.75 < moved / (math.log(1 + 100 / 3) / 100 * weights) <= 1  # zero weights stay zero


def test_groups_larger_than_a_batch_are_refused(train: Samples) -> None:
    with pytest.raises(UserError, match="fisher_batch_size=9: groups are cut from batches of batch_size=8; raise"):
        make("ssd", train, fisher_batch_size=9)


# Influence unlearning


def test_the_fisher_product_and_its_inverse_are_those_of_the_explicit_matrix(train: Samples) -> None:
    """A model of some 1,300 weights, of which 90 are taken, against the matrix of 12 samples' gradients in float64."""
    model, samples = small(), few(train, 12)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("head"))
    rows = per_head_sample(model, everything(samples, model))
    matrix = rows.T @ rows / 12 + 0.02 * torch.eye(rows.shape[1], dtype=torch.float64)
    shapes = [weight.shape for weight in model.head.parameters()]

    def shaped(vector: torch.Tensor) -> list[torch.Tensor]:
        parts = vector.split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    loader = Loader(samples, preprocessing_of(model), batch_size=5)

    def product(u: Any) -> list[torch.Tensor]:
        return influence.fisher_product(model, loader, u, 0.02)

    torch.testing.assert_close(flat(product(shaped(v))), matrix @ v, atol=1e-6, rtol=1e-5)
    found = flat(influence.solve(product, shaped(v), 1e-8, 40))
    torch.testing.assert_close(found, torch.linalg.solve(matrix, v), atol=1e-4, rtol=1e-4)
    # Sherman and Morrison's recursion, WoodFisher's own way.
    inverse = torch.eye(len(v), dtype=torch.float64) / 0.02
    for row in rows:
        inverse -= torch.outer(inverse @ row, inverse @ row) / (12 + row @ inverse @ row)
    torch.testing.assert_close(found, inverse @ v, atol=1e-4, rtol=1e-4)


def per_head_sample(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    rows = []
    for image, label in zip(batch.images.double(), batch.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(flat(torch.autograd.grad(loss, list(model.head.parameters()))))
    return torch.stack(rows)


def test_the_solver_stops_at_its_tolerance() -> None:
    diagonal, calls = torch.linspace(1, 50, 50, dtype=torch.float64), []

    def product(u: Any) -> list[torch.Tensor]:
        calls.append(1)
        return [diagonal * u[0]]

    v = torch.ones(50, dtype=torch.float64)
    rough = influence.solve(product, [v], 0.1, 100)[0]
    assert 3 < len(calls) < 25
    assert 0.02 < (v - diagonal * rough).norm() / v.norm() <= 0.1
    calls.clear()
    influence.solve(product, [v], 1e-9, 4)
    assert len(calls) == 4


def test_influence_takes_the_step_of_its_equation(train: Samples) -> None:
    """All weights, against the explicit inverse; every retained sample is in the Fisher matrix."""
    model = small()
    options = {"alpha": 3.0, "damping": 0.5, "tolerance": 1e-6, "solver_steps": 40, "batch_size": 40}
    method, changed = edited("influence", train, model, **options)
    rows_f, rows_r = (per_sample(model, everything(s, model)) for s in (method.context.forget, method.context.retain))
    v = (rows_f.mean(0) - rows_r.mean(0)) * 20 / 60
    inner = 0.5 * len(rows_r) * torch.eye(len(rows_r), dtype=torch.float64) + rows_r @ rows_r.T
    expected = 3.0 * (v - rows_r.T @ torch.linalg.solve(inner, rows_r @ v)) / 0.5  # Woodbury
    moved = flat(changed.parameters()) - flat(model.parameters())
    torch.testing.assert_close(moved, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)


def test_influence_draws_its_retained_samples_by_the_seed(train: Samples) -> None:
    def step(**options: Any) -> str:
        return weights_sha256(edited("influence", train, small(), **QUICK["influence"], **options)[1])

    assert step(seed=1) == step(seed=1) != step(seed=2)


@pytest.mark.parametrize("option", ["compile", "gradient_checkpointing"])
def test_influence_refuses_what_has_no_directional_derivatives(train: Samples, option: str) -> None:
    with pytest.raises(UserError, match=f"option {option}=true: influence needs directional derivatives"):
        make("influence", train, alpha=1.0, **{option: True})


# RAZOR


def with_held_out(train: Samples, model: torch.nn.Module, **options: Any) -> Any:
    method = make("ssd", train, model)
    context = dataclasses.replace(method.context, held_out=train.subset(range(60, 100)))
    return razor.Razor(razor.RazorConfig(**options), context)


def brute_force_units(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """For each unit the entries it holds: a mask of every parameter that it touches, found entry by entry."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, block in enumerate(model.blocks):
        heads, width = block.attn.num_heads, block.attn.head_dim
        place = f"blocks.{number}.attn"
        for head in range(heads):
            row = torch.tensor([(i // width) % heads == head for i in range(3 * heads * width)])
            column = torch.tensor([i // width == head for i in range(heads * width)])
            found[f"{place}.head{head}"] = {
                f"{place}.qkv.weight": row[:, None].expand_as(block.attn.qkv.weight),
                f"{place}.qkv.bias": row,
                f"{place}.proj.weight": column[None].expand_as(block.attn.proj.weight),
            }
    layers = ["patch_embed.proj", "head", *(f"blocks.{n}.mlp.fc{i}" for n in range(len(model.blocks)) for i in (1, 2))]
    for name in layers:
        module = model.get_submodule(name)
        found[name] = {f"{name}.{kind}": torch.ones_like(p, dtype=torch.bool) for kind, p in module.named_parameters()}
    return found


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_razors_edit_set_equals_a_brute_force_one(train: Samples, alpha: float) -> None:
    model = tiny_vit(3)
    method = with_held_out(train, model, alpha=alpha)
    g_f, g_r = (
        dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
        for loss in (
            F.cross_entropy(model(batch.images), batch.labels)
            for batch in (everything(s, model) for s in (method.context.forget, method.context.retain))
        )
    )
    weights, expected = dict(model.named_parameters()), {}
    for name, masks in brute_force_units(model).items():
        theta, f, r = (torch.cat([t[key][mask] for key, mask in masks.items()]) for t in (weights, g_f, g_r))
        cosine = (f * r).sum() / (f.norm() * r.norm())
        expected[name] = float((f.norm() / (theta.norm() + 1e-8) * (1 - cosine) ** alpha).detach())
    found = razor.units(model)
    grads = list(method.gradients(model))
    scores = {n: razor.score(*(razor.part(t, unit) for t in (weights, *grads[:2])), alpha) for n, unit in found.items()}
    assert scores == pytest.approx(expected, rel=1e-3)
    ranked = sorted(expected, key=expected.__getitem__, reverse=True)
    tau = (expected[ranked[2]] + expected[ranked[3]]) / 2
    first = razor.grow(scores, set(), tau)
    assert first == set(ranked[:3])
    assert razor.grow(scores, first, tau) == set(ranked[:4])
    assert razor.grow(scores, set(), 1e9) == {ranked[0]}
    assert razor.grow(scores, set(ranked), tau) == set(ranked)
    values = np.array(list(expected.values()))
    assert razor.grow(scores, set(), None) == {n for n in ranked if expected[n] > values.mean() + values.std()}


def test_razors_step_moves_the_edit_set_alone_and_as_its_equation_says(train: Samples) -> None:
    model = tiny_vit(3)
    method = with_held_out(train, model, rho=0.5, lambda_f=2.0, lambda_m=0.3)
    masks = {n: m for n, m in brute_force_units(model).items() if n in ("blocks.1.attn.head0", "blocks.0.mlp.fc2")}
    weights = dict(model.named_parameters())
    forget, retain = (everything(s, model) for s in (method.on_forget, method.context.retain))
    losses = [
        F.cross_entropy(model(forget.images), forget.labels),
        F.cross_entropy(model(retain.images), retain.labels),
        F.cross_entropy(model(forget.images), method.wrong),
    ]
    assert (method.wrong != forget.labels).all()
    g = [dict(zip(weights, torch.autograd.grad(loss, list(model.parameters())), strict=True)) for loss in losses]
    steps = method.steps({n: razor.units(model)[n] for n in masks}, weights, *method.gradients(model))
    expected = {}
    for unit in masks.values():
        f, r, m, theta = (torch.cat([t[key][mask] for key, mask in unit.items()]) for t in (*g, weights))
        bracket = -2.0 * 0.5 * f + r + 0.3 * m
        step, start = -bracket * theta.norm() / bracket.norm(), 0
        for key, mask in unit.items():
            expected[key] = torch.zeros_like(weights[key])
            expected[key][mask] = step[start : start + int(mask.sum())].detach()
            start += int(mask.sum())
    # The order of entries inside a unit differs: compare them in place.
    assert set(steps) == set(expected)
    for key, found in steps.items():
        torch.testing.assert_close(found == 0, expected[key] == 0)
        torch.testing.assert_close(found, expected[key], atol=2e-5, rtol=1e-2)


@pytest.mark.parametrize(
    ("allowed_to", "enough_from", "expected"),
    [(1.0, 0.3, 0.3), (0.6, 0.8, 0.6), (0.2, 0.1, 0.1), (0.0, 0.5, 0.0), (1.0, 9.0, 1.0)],
)
def test_a_search_takes_the_smallest_enough_or_the_largest_allowed_step(
    train: Samples, monkeypatch: pytest.MonkeyPatch, allowed_to: float, enough_from: float, expected: float
) -> None:
    search = with_held_out(train, tiny_vit(), search_steps=8).search
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()  # its weight is the step taken

    class Answer:
        def __init__(self, accuracy: float) -> None:
            self.accuracy = accuracy

    def predictions(model: Any, samples: Samples, context: Any) -> Answer:
        eta = float(model.weight)
        held_out = samples is search.watched
        return Answer(float(eta <= allowed_to) if held_out else float(eta < enough_from))

    monkeypatch.setattr(line_search, "predictions_of", predictions)
    search.lowest = search.enough = 0.5
    assert search.along(model, {"weight": torch.ones(1, 1)}, 1.0) == float(model.weight)
    assert float(model.weight) == pytest.approx(expected, abs=2**-7)
    assert float(model.weight) <= allowed_to


def test_razor_edits_heads_and_layers_until_the_forget_samples_look_held_out(train: Samples) -> None:
    """Of a model that has all forget samples right and all held-out ones wrong, until the former are wrong too."""
    result = run("razor", train, config={**OPTIONS, "max_drop": 100.0, "max_change": 1.0, "rounds": 3})
    assert result.accuracy(split(train)[0]) == 0
    before, after = tiny_vit().state_dict(), result.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert not any("norm" in n or n in ("cls_token", "pos_embed") or n.endswith("attn.proj.bias") for n in changed)


def test_razor_leaves_a_model_alone_that_has_nothing_to_forget(train: Samples) -> None:
    wrong = split(train)[2]
    result = unlearn(
        tiny_vit(), few(wrong, 10), train, method="razor", config=OPTIONS | QUICK["razor"], validation=wrong
    )
    assert weights_sha256(result.model) == weights_sha256(tiny_vit())


def test_razor_does_not_hold_a_forgotten_class_against_a_step(train: Samples) -> None:
    method = make("ssd", train)
    zeros = np.flatnonzero(train.labels == 0)
    others = np.flatnonzero(train.labels != 0)
    context = dataclasses.replace(
        method.context,
        forget=train.subset(zeros[:10]),
        retain=train.subset(others[:30]),
        held_out=train.subset(np.concatenate([zeros[20:25], others[40:60]])),
    )
    made = razor.Razor(razor.RazorConfig(), context)
    assert len(made.search.watched) == 20
    assert (made.search.watched.labels != 0).all()
    only_zeros = dataclasses.replace(context, held_out=train.subset(zeros[20:25]))
    with pytest.raises(UserError, match="razor: no held-out sample is of a class that is retained"):
        razor.Razor(razor.RazorConfig(), only_zeros)


def test_razor_needs_held_out_samples(train: Samples) -> None:
    with pytest.raises(UserError, match="razor: needs samples that the model was not trained on, to search the size"):
        make("razor", train)


# All of them, through the loop

OPTIONS: dict[str, Any] = {"batch_size": 10, "precision": "fp32", "collapse_drop": 100.0}


def split(train: Samples) -> tuple[Samples, Samples, Samples]:
    """Forget samples, all of them right for the fresh model, retained ones of every class, held-out ones, all wrong."""
    part = few(train, 300)
    images = everything(part, tiny_vit())
    right = (tiny_vit()(images.images).argmax(1) == images.labels).numpy()
    return (
        part.subset(np.flatnonzero(right)[:15]),
        train.subset(range(300, 320)),
        part.subset(np.flatnonzero(~right)[:30]),
    )


def run(name: str, train: Samples, **options: Any) -> Any:
    options.setdefault("config", OPTIONS | QUICK.get(name, {}))
    forget, retain, held_out = split(train)
    return unlearn(tiny_vit(), forget, retain, method=name, validation=held_out, **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_takes_no_steps(train: Samples, name: str) -> None:
    result = run(name, train)
    assert result.samples_seen == {}
    assert result.seconds["edit_phase"] > 0
    assert weights_sha256(result.model) != weights_sha256(tiny_vit())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "most"), [("influence", "alpha", 4.0), ("iau", "lr", 0.256 / 32)])
def test_the_size_of_a_step_is_searched_unless_it_is_given(train: Samples, name: str, given: str, most: float) -> None:
    """All forget samples are answered right, no held-out one: the search goes on until the former are wrong too."""
    forget, retain, _ = split(train)
    quick = {key: value for key, value in QUICK.get(name, {}).items() if key != given}
    config = OPTIONS | quick | {"max_drop": 100.0, "search_steps": 3}
    searched = run(name, train, config=config)
    tried = [
        run(name, train, config=config | {given: most * part / 8}) for part in (1, 2, 3, 4, 5, 6, 7)
    ]  # what three halvings can come to
    enough = [result for result in tried if result.accuracy(forget) == 0]
    expected = (enough or tried[-1:])[0].model.state_dict()
    for key, value in searched.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    with pytest.raises(
        UserError, match=rf"{name}: needs samples .* to search the size of its step on \(or set {given}\)"
    ):
        unlearn(tiny_vit(), forget, retain, method=name, config=config)
    unlearn(tiny_vit(), forget, retain, method=name, config=config | {given: 1e-6})


@pytest.mark.parametrize("name", NAMES)
def test_a_repair_that_is_killed_goes_on_from_the_edit(
    train: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = OPTIONS | QUICK[name] | {"retain_epochs": 2.0}
    cls, calls, edits = list_methods()[name], [], []
    change = cls.change  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "change", lambda self, model: (edits.append(1), change(self, model)))
    whole = run(name, train, config=config)
    assert len(edits) == 1
    assert whole.samples_seen == {"retain": 40}
    loss = cls.loss

    def stop(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(cls, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(name, train, config=config, output_dir=tmp_path / "run")
    monkeypatch.setattr(cls, "loss", loss)
    monkeypatch.setattr(cls, "change", lambda self, model: pytest.fail("edited again"))
    resumed = run(name, train, config=config, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_keeps_to_the_weights_that_may_change(train: Samples, name: str) -> None:
    config = OPTIONS | QUICK[name] | {"trainable": "head"}
    changed = run(name, train, config=config).model.state_dict()
    differing = {key for key, value in tiny_vit().state_dict().items() if not torch.equal(value, changed[key])}
    assert differing
    assert all(key.startswith(("head.", "norm.", "fc_norm.")) for key in differing)
    with pytest.raises(UserError, match=f"option trainable='lora:2': {name} edits the weights of the model"):
        run(name, train, config=config | {"trainable": "lora:2"})


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ssd", {"alpha": 0.0}),
        ("ssd", {"dampening": -1.0}),
        ("ssd", {"fisher_batch_size": 0}),
        ("ssd", {"retain_epochs": -1.0}),
        ("influence", {"alpha": 0.0}),
        ("influence", {"max_drop": -1.0}),
        ("influence", {"search_steps": 0}),
        ("influence", {"damping": 0.0}),
        ("influence", {"fisher_samples": 0}),
        ("razor", {"rounds": 0}),
        ("razor", {"max_change": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"option {next(iter(option))}="):
        list_methods()[name].Config(**option)
