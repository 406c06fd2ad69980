"""GS-LoRA and GS-LoRA++: the terms of their equations, what they change, what they hold a forget sample to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.data import Samples, open_source
from engine.errors import UserError
from engine.methods import Method
from engine.models.checkpoint import weights_sha256
from engine.models.trainable import LowRank
from engine.run.unlearn import unlearn

MLPS = {f"blocks.{i}.mlp.{layer}.weight" for i in (0, 1) for layer in ("fc1", "fc2")}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def moved(method: Method) -> torch.nn.Module:
    """The method's own student, its updates away from where they start."""
    model = method.initial_model(tiny_vit(seed=5))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.B.data.normal_(std=0.05, generator=generator)
    return model


def with_held_out(method: Any, held_out: Samples, retain: Samples | None = None) -> Any:
    retain = method.context.retain if retain is None else retain
    method.context = dataclasses.replace(method.context, held_out=held_out, retain=retain)
    return method


def everything(method: Method, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(method.context.loader(samples, "none").ordered())
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def test_the_terms_are_those_of_the_equation(train: Samples) -> None:
    method: Any = make("gs_lora", train, bound=4.0, beta=0.5, alpha=0.01, warmup=0, rank=3)
    (phase,) = method.phases()
    assert (phase.samples, phase.paired, phase.paired_share, phase.epochs) == ("retain", "forget", 0.5, 5.0)
    model, retained, forgotten = moved(method), batch_of(method, "retain"), batch_of(method)
    weights = dict(model.named_parameters())
    lasso = 0.0
    for i in (0, 1):
        updates = [
            weights[f"blocks.{i}.mlp.{layer}.parametrizations.weight.0.{which}"]
            for layer in ("fc1", "fc2")
            for which in "AB"
        ]
        lasso += math.sqrt(sum(float((w.detach().double() ** 2).sum()) for w in updates))
    terms = {k: float(v.detach()) for k, v in method.loss(model, retained, phase).items()}
    assert terms == {
        "retain_ce": pytest.approx(F.cross_entropy(model(retained.images), retained.labels).item()),
        "group_lasso": pytest.approx(0.01 * lasso),
    }
    forget_ce = F.cross_entropy(model(forgotten.images), forgotten.labels).item()
    assert forget_ce < 4.0
    assert float(method.paired_loss(model, forgotten, phase)["forget_bounded"]) == pytest.approx(0.5 * (4 - forget_ce))
    method.bound = forget_ce - 0.1
    assert float(method.paired_loss(model, forgotten, phase)["forget_bounded"]) == 0


def test_prototype_terms_are_those_of_the_equation(train: Samples) -> None:
    method: Any = make(
        "gs_lora_pp", train, bound=4.0, forget_prototype=0.3, retain_prototype=0.7, prototype_bound=9.0, warmup=0
    )
    (phase,) = method.phases()
    method.prepare(phase)
    model, original = moved(method), method.context.original
    images, labels = (
        torch.cat(pair)
        for pair in zip(
            everything(method, method.context.forget), everything(method, method.context.retain), strict=True
        )
    )
    features = original.forward_head(original.forward_features(images), pre_logits=True)

    def distance(batch: Any) -> float:
        values = []
        mine = model.forward_head(model.forward_features(batch.images), pre_logits=True).softmax(1)
        for row, label in zip(mine, batch.labels, strict=True):
            prototype = features[labels == label].mean(0).softmax(0)
            values.append(float((prototype * (prototype.log() - row.log())).sum()))
        return float(np.mean(values))

    retained, forgotten = batch_of(method, "retain"), batch_of(method)
    terms = method.loss(model, retained, phase)
    assert set(terms) == {"retain_ce", "retain_prototype", "group_lasso"}
    torch.testing.assert_close(terms["retain_ce"], F.cross_entropy(model(retained.images), retained.labels))
    assert float(terms["retain_prototype"]) == pytest.approx(0.7 * distance(retained), rel=1e-4)
    paired = method.paired_loss(model, forgotten, phase)
    away = 9.0 - distance(forgotten)
    assert away > 0
    assert float(paired["forget_prototype"]) == pytest.approx(0.3 * away, rel=1e-4)
    ce = float(F.cross_entropy(model(forgotten.images), forgotten.labels))
    assert float(paired["forget_bounded"]) == pytest.approx(0.2 * (4.0 - ce), rel=1e-4)


def test_forget_samples_are_held_to_what_held_out_samples_have(train: Samples) -> None:
    """By hand: the mean of the class, 2 ln 10 (KL: 18) where no retained sample has it."""
    held_out = train.subset(range(60, 100))
    retain = train.subset([i for i in range(20, 60) if train.labels[i] not in (3, 4)])
    method: Any = with_held_out(make("gs_lora_pp", train), held_out, retain)
    (phase,) = method.phases()
    method.prepare(phase)
    images, labels = everything(method, held_out)
    original = method.context.original
    losses = F.cross_entropy(original(images), labels, reduction="none").detach()
    features = original.forward_head(original.forward_features(images), pre_logits=True).detach()
    prototypes = method.cache_state(phase)["prototypes"]
    distances = (prototypes[labels].softmax(1) * (prototypes[labels].log_softmax(1) - features.log_softmax(1))).sum(1)
    forget = method.context.forget.labels
    for found, values, unknown in ((method.bound, losses, 2 * math.log(10)), (method.prototype_bound, distances, 18.0)):
        expected = [unknown if label in (3, 4) else float(values[labels == label].mean()) for label in forget]
        assert found == pytest.approx(float(np.mean(expected)), rel=1e-4)
    of_one_class = train.subset(np.flatnonzero(train.labels != 3)[:30])
    alone: Any = with_held_out(make("gs_lora", train), held_out, of_one_class)
    alone.context = dataclasses.replace(alone.context, forget=train.subset(np.flatnonzero(train.labels == 3)[:9]))
    alone.prepare(phase)
    assert alone.bound == pytest.approx(2 * math.log(10))
    with pytest.raises(UserError, match="gs_lora: needs samples that the model was not trained on, which the forget"):
        make("gs_lora", train).prepare(phase)


def run(train: Samples, method: str, **options: Any) -> Any:
    inside = {key: options.pop(key) for key in ("output_dir", "resume", "progress") if key in options}
    config = {"batch_size": 10, "precision": "fp32", "augment": "none", "weight_decay": 0.5, **options}
    return unlearn(
        tiny_vit(),
        few(train, 12),
        train.subset(range(20, 40)),
        method=method,
        config=config,
        validation=train.subset(range(60, 90)),
        **inside,
    )


@pytest.mark.parametrize("name", ["gs_lora", "gs_lora_pp"])
def test_the_mlps_alone_are_changed_and_a_killed_run_goes_on_to_the_same_bits(
    train: Samples, tmp_path: Path, name: str
) -> None:
    """Killed in its second epoch of three; the group lasso begins with the second."""

    class Stop(Exception):
        pass

    def stop(phase: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        if step == 4:
            raise Stop

    options = {"retain_epochs": 3.0, "checkpoint_every": 1}
    whole = run(train, name, **options)
    before, after = tiny_vit().state_dict(), whole.model.state_dict()
    assert list(before) == list(after)
    assert {key for key in before if not torch.equal(before[key], after[key])} == MLPS
    rows = [row for row in whole.history if "retain_ce" in row]
    assert [row["epoch"] for row in rows if "group_lasso" in row] == [1, 1, 2, 2]
    with pytest.raises(Stop):
        run(train, name, **options, output_dir=tmp_path / "run", progress=stop)
    resumed = run(train, name, **options, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert [row for row in resumed.history if "retain_ce" in row] == rows


def test_what_they_do_not_go_with_is_refused(train: Samples) -> None:
    with pytest.raises(UserError, match="option trainable='head': gs_lora trains low-rank updates of its own"):
        make("gs_lora", train, trainable="head")
    with pytest.raises(UserError, match="option compile=true: gs_lora_pp reads features"):
        make("gs_lora_pp", train, compile=True)
    with pytest.raises(UserError, match=r"option beta=-1\.0: expected 0 or more"):
        make("gs_lora", train, beta=-1.0)
