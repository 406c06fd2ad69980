"""What each method changes, and what it does not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.config import RunConfig
from engine.data import Batch, Samples, open_source
from engine.methods import Method, Phase, list_methods, register
from engine.models.attention_masking import scores_and_outputs, top_mask
from engine.models.checkpoint import weights_sha256
from engine.models.vit import outputs
from engine.run.unlearn import unlearn


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def test_the_registry_holds_what_is_promised_and_refuses_doubles() -> None:
    assert {"lethe", "retrain", "finetune", "gradient_ascent", "random_labels"} <= set(list_methods())
    with pytest.raises(ValueError, match="'lethe' is already Lethe"):
        register(list_methods()["lethe"])


def test_lethe_runs_the_published_stages_by_default(train: Samples) -> None:
    phases = make("lethe", train).phases()
    assert [(p.name, p.samples, p.epochs) for p in phases] == [("forget", "forget", 2.0), ("retain", "retain", 8.0)]
    assert phases[0].guarded
    assert not phases[0].augment  # so that the original runs once an image
    assert [p.name for p in make("lethe", train, forget_epochs=0).phases()] == ["retain"]


def test_learning_rates_scale_with_width(train: Samples) -> None:
    narrow, wide = make("lethe", train).phases(), make("lethe", train, tiny_vit(embed_dim=64)).phases()
    assert [a.lr / b.lr for a, b in zip(narrow, wide, strict=True)] == [2.0, 2.0]
    assert make("lethe", train, lr=1e-4, forget_lr=2e-4).phases()[0].lr == 2e-4


def test_lethe_loss_equals_the_papers_formula(train: Samples) -> None:
    """Written out from the equations: masked teacher as positive, unmasked teacher as the negative."""
    method = make("lethe", train, mask_share=0.2, temperature=0.3)
    phase = method.phases()[0]
    method.prepare(phase)
    student, batch = tiny_vit(seed=5), batch_of(method)
    original, info = method.context.original, method.context.info
    scores, negatives = scores_and_outputs(original, batch.images, info)
    masked = batch.images.clone()
    black = (0 - method.context.preprocessing.mean[0]) / method.context.preprocessing.std[0]
    for image, row in zip(masked, scores, strict=True):
        for patch in row.argsort(descending=True)[:3].tolist():
            down, across = divmod(patch, 4)
            image[:, 2 * down : 2 * down + 2, 2 * across : 2 * across + 2] = black
    with torch.no_grad():
        positives = original(masked)
        anchors = student(batch.images)
    pull = torch.exp(F.cosine_similarity(anchors, positives) / 0.3)
    push = torch.exp(F.cosine_similarity(anchors, negatives) / 0.3)
    expected = -torch.log(pull / (pull + push)).mean()
    torch.testing.assert_close(method.loss(student, batch, phase)["contrast"].detach(), expected)


def test_lethes_first_gradient_pulls_only(train: Samples) -> None:
    """At the first step Z = Z_n, where cosine has its maximum: without the pull nothing would move."""
    method = make("lethe", train)
    phase = method.phases()[0]
    method.prepare(phase)
    student, batch = copy.deepcopy(method.context.original).requires_grad_(True), batch_of(method)
    logits = outputs(student, batch.images)
    push = F.cosine_similarity(logits, method._cache["forget"][1][batch.index]).sum()  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(push, logits)
    assert gradient.abs().max() < 1e-5
    sum(method.loss(student, batch, phase).values()).backward()
    assert student.head.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("negatives", ["paired", "in_batch"])
@pytest.mark.parametrize("contrast", ["logits", "features"])
def test_cached_and_fresh_teachers_agree(train: Samples, negatives: str, contrast: str) -> None:
    options = {"negatives": negatives, "contrast": contrast}
    cached, fresh = make("lethe", train, **options), make("lethe", train, augment_forget=True, **options)
    cached.prepare(cached.phases()[0])
    fresh.prepare(fresh.phases()[0])
    student, batch = tiny_vit(seed=5), batch_of(cached)
    torch.testing.assert_close(
        cached.loss(student, batch, cached.phases()[0])["contrast"],
        fresh.loss(student, batch, fresh.phases()[0])["contrast"],
    )


def test_the_original_runs_once_an_image_and_its_masked_copy(train: Samples) -> None:
    calls = []
    method = make("lethe", train)
    method.context.original.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    config = {"max_steps": 5, "forget_epochs": 3.0}
    result = unlearn(tiny_vit(), few(train, 20), few(train, 40), method="lethe", config=config)
    assert result.samples_seen["forget"] > 0
    phase = method.phases()[0]
    method.prepare(phase)
    for epoch in range(3):
        for batch in method.context.loader(method.context.forget, "none").epoch(epoch):
            method.loss(tiny_vit(), batch, phase)
    assert sum(calls) == 2 * len(method.context.forget)


@pytest.mark.parametrize("source", ["rollout", "last", "mean", "lowest", "random"])
def test_each_mask_source_masks_its_patches(train: Samples, source: str) -> None:
    method = make("lethe", train, mask_source=source, mask_share=0.25)
    seen: list[torch.Tensor] = []  # images, then the patch tokens of the masked copy
    original = method.context.original
    original.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    batch = batch_of(method)
    method.teacher(batch)  # type: ignore[attr-defined]
    assert torch.equal(seen[0], batch.images)
    changed = (seen[1] != original.patch_embed(batch.images)).any(2)
    assert (changed.sum(1) <= 4).all()
    assert changed.any()
    if source != "random":
        scores, _ = scores_and_outputs(tiny_vit(), batch.images, method.context.info, source=source)  # type: ignore[arg-type]
        assert not (changed & ~top_mask(scores, 4, source)).any()


@pytest.mark.parametrize("contrast", ["logits", "features"])
@pytest.mark.parametrize("value", ["zero", "black", "mean"])
def test_masked_tokens_and_masked_images_give_the_same_teacher(train: Samples, value: str, contrast: str) -> None:
    by_tokens, by_images = (make("lethe", train, mask_value=value, contrast=contrast) for _ in range(2))
    by_images._by_tokens = False  # type: ignore[attr-defined]
    batch = batch_of(by_tokens)
    torch.testing.assert_close(by_tokens.teacher(batch), by_images.teacher(batch))  # type: ignore[attr-defined]


def test_mask_values(train: Samples) -> None:
    model = tiny_vit()
    model.pretrained_cfg.update(mean=(0.4,), std=(0.2,))

    def fill(value: str) -> float:
        method = make("lethe", train, model, mask_value=value)
        return float(method.fill(batch_of(method)))  # type: ignore[attr-defined]

    assert fill("zero") == 0.0
    assert fill("black") == pytest.approx((0 - 0.4) / 0.2)
    pixels = np.mean([np.asarray(train.image(i)) / 255 for i in range(20)])
    assert fill("mean") == pytest.approx((pixels - 0.4) / 0.2, abs=1e-5)


def test_finetune_reads_retained_samples_only(train: Samples) -> None:
    method = make("finetune", train)
    assert [(p.samples, p.epochs) for p in method.phases()] == [("retain", 10.0)]
    batch, model = batch_of(method, "retain"), tiny_vit()
    expected = F.cross_entropy(model(batch.images), batch.labels)
    torch.testing.assert_close(method.loss(model, batch, method.phases()[0])["retain_ce"], expected)


def test_gradient_ascent_raises_the_loss_on_forget_samples(train: Samples) -> None:
    model, forget = tiny_vit(), few(train, 20)
    result = unlearn(
        model,
        forget,
        train.subset(range(20, 60)),
        method="gradient_ascent",
        config={"lr": 1e-3, "forget_epochs": 3.0, "precision": "fp32", "collapse_drop": 100.0},
    )
    ascents = [row["forget_ascent"] for row in result.history if "forget_ascent" in row]
    assert ascents[-1] < ascents[0] < 0


def test_random_labels_are_wrong_for_every_forget_sample_and_right_for_the_rest(train: Samples) -> None:
    method: Any = make("random_labels", train)
    forget, retain = method.context.forget, method.context.retain
    assert (method.labels[:20].numpy() != forget.labels).all()
    assert (method.labels[20:].numpy() == retain.labels).all()
    assert len(set((method.labels[:20].numpy() - forget.labels) % 10)) > 3  # spread over the other classes


def test_retrain_starts_from_fresh_weights_and_never_sees_forget_samples(train: Samples) -> None:
    model = tiny_vit(seed=9)
    method = make("retrain", train, model)
    fresh = method.initial_model(model)
    for (name, old), new in zip(model.named_parameters(), fresh.parameters(), strict=True):
        constant = old.std() == 0 if old.numel() > 1 else True  # biases and norms start at the same constants
        assert constant or not torch.equal(old, new), name
    assert all(p.samples == "retain" for p in method.phases())


@pytest.mark.parametrize("name", ["lethe", "finetune", "gradient_ascent", "random_labels", "retrain"])
def test_every_method_leaves_the_callers_model_alone_and_changes_its_own(train: Samples, name: str) -> None:
    model = tiny_vit()
    before = weights_sha256(model)
    result = unlearn(model, few(train, 20), train.subset(range(20, 60)), method=name, config={"max_steps": 2})
    assert weights_sha256(model) == before != weights_sha256(result.model)
    assert all(p.requires_grad for p in result.model.parameters())


def test_unknown_methods_get_the_nearest_name(train: Samples) -> None:
    with pytest.raises(ValueError, match="unknown method 'leethe'; did you mean 'lethe'"):
        unlearn(tiny_vit(), few(train, 2), few(train, 4), method="leethe")


def test_a_method_of_the_users_own_runs_through_the_loop(train: Samples) -> None:
    from engine.core import method as base

    class Still(Method):
        name, summary, Config = "still", "changes nothing", RunConfig

        def phases(self) -> list[Phase]:
            return [Phase(name="retain", samples="retain", epochs=1, lr=1e-3)]

        def loss(self, model: torch.nn.Module, batch: Batch, phase: Phase) -> dict[str, torch.Tensor]:
            return {"zero": 0.0 * model(batch.images).sum()}

    import dataclasses

    Still.Config = dataclasses.make_dataclass("StillConfig", [], frozen=True)
    register(Still)
    try:
        model = tiny_vit()
        result = unlearn(model, few(train, 2), few(train, 30), method="still", config={"weight_decay": 0.0})
        assert weights_sha256(result.model) == weights_sha256(model)
    finally:
        del base._REGISTRY["still"]
