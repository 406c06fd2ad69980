"""Methods with teachers: scrub, scrub_r, bad_teacher, lotus, laf. Equations are written out here a second time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.core.heldout import matched_accuracy
from engine.data import Samples, open_source
from engine.errors import UserError
from engine.methods import Phase, laf, list_methods
from engine.methods.common.distillation import divergence
from engine.models.checkpoint import weights_sha256
from engine.models.predict import Predictions
from engine.models.vit import outputs
from engine.run.setup import Run, RunOptions, set_up
from engine.run.unlearn import unlearn

METHODS = ["scrub", "scrub_r", "bad_teacher", "lotus", "laf"]
OPTIONS: dict[str, Any] = {"batch_size": 8, "precision": "fp32", "augment": "none"}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


@pytest.fixture(scope="module")
def trained(train: Samples) -> torch.nn.Module:
    """A model that knows the first 60 digits, and few others."""
    config = {"epochs": 50.0, "lr": 4e-3, "batch_size": 20, "precision": "fp32"}
    return unlearn(tiny_vit(), few(train, 2), few(train, 60), method="retrain", config=config).model


def run(train: Samples, model: torch.nn.Module, method: str, **keywords: Any) -> Any:
    keywords.setdefault("validation", train.subset(range(60, 120)))
    config = {**OPTIONS, **keywords.pop("config", {})}
    return unlearn(model, few(train, 20), train.subset(range(20, 60)), method=method, config=config, **keywords)


def ready(train: Samples, model: torch.nn.Module, method: str, forget: Samples | None = None, **options: Any) -> Run:
    """A run whose first phase is prepared."""
    retain = train.subset(range(20, 60))
    if forget is not None:  # the rest of the first 60
        retain = train.subset([i for i in range(60) if train.ids[i] not in set(forget.ids)])
    made = set_up(
        model,
        few(train, 20) if forget is None else forget,
        retain,
        RunOptions(method=method, config={**OPTIONS, **options}, validation=train.subset(range(60, 120))),
    )
    made.method.prepare(made.phases[0])
    return made


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor, t: float) -> torch.Tensor:
    p, q = torch.softmax(p_logits.double() / t, 1), torch.softmax(q_logits.double() / t, 1)
    return t * t * (p * (p.log() - q.log())).sum(1)


def accuracy(model: torch.nn.Module, samples: Samples, made: Run) -> float:
    batches = made.method.context.loader(samples, "none").ordered()
    return float(np.mean(np.concatenate([(model(b.images).argmax(1) == b.labels).numpy() for b in batches])))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_divergence_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
    for t in (1.0, 4.0):
        torch.testing.assert_close(divergence(student, teacher, t).double(), kl(teacher, student, t), rtol=1e-5, atol=0)
    assert divergence(teacher, teacher).abs().max() < 1e-6
    assert torch.isfinite(divergence(1e4 * student, teacher)).all()


def test_matched_accuracy_weights_classes_as_the_forget_set_does() -> None:
    held_out = Predictions(np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 2, 2]], np.array([0, 0, 0, 1, 2, 2]))
    assert matched_accuracy(held_out, np.array([0, 0, 1])) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert matched_accuracy(held_out, np.array([2, 7])) == pytest.approx((1 + 4 / 6) / 2)


def test_a_phase_takes_a_part_of_the_retained_samples(train: Samples) -> None:
    phase = Phase(name="p", samples="all", epochs=1, lr=0.0, retain_part=0.3)
    context = make("scrub", train).context
    chosen = context.samples_of(phase)
    assert list(chosen.ids[:20]) == list(context.forget.ids)
    assert len(chosen) == 20 + 12
    assert set(chosen.ids[20:]) < set(context.retain.ids)
    assert list(chosen.ids) == list(make("bad_teacher", train).context.samples_of(phase).ids)
    assert list(chosen.ids) != list(make("scrub", train, seed=1).context.samples_of(phase).ids)
    only = Phase(name="p", samples="retain", epochs=1, lr=0.0, retain_part=0.3)
    assert list(context.samples_of(only).ids) == list(chosen.ids[20:])


def test_retained_parts_reach_the_loop(train: Samples) -> None:
    result = run(train, tiny_vit(), "bad_teacher", config={"epochs": 1.0, "retain_part": 0.25})
    assert result.samples_seen == {"forget": 20 + 10}


@pytest.mark.parametrize("name", METHODS)
def test_teacher_methods_run_and_leave_the_callers_model_alone(train: Samples, name: str) -> None:
    model = tiny_vit()
    before = weights_sha256(model)
    result = run(train, model, name, config={"max_steps": 2})
    assert weights_sha256(model) == before != weights_sha256(result.model)
    assert {key for key in result.seconds if key.endswith("_phase")} <= {"forget_phase", "retain_phase", "rewind_phase"}


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "options", "kill_at"),
    [
        # Killed in the second forget epoch.
        pytest.param("scrub", {"forget_epochs": 2, "retain_epochs": 2}, 3, marks=pytest.mark.slow),
        pytest.param(
            "scrub_r",
            {"forget_epochs": 1, "retain_epochs": 2, "lr": 3e-3, "forget_lr": 1e-3},
            3,
            marks=pytest.mark.slow,
        ),
        ("bad_teacher", {"epochs": 2.0}, 2),
        ("lotus", {"epochs": 3, "lr": 2e-3, "alpha": 5.0}, 3),
        ("laf", {"forget_epochs": 2.0, "vae_epochs": 2, "forget_lr": 1e-3}, 2),
    ],
)
def test_killed_and_resumed_gives_the_same_bits(
    train: Samples, trained: torch.nn.Module, tmp_path: Path, name: str, options: dict[str, Any], kill_at: int
) -> None:
    calls, options = itertools.count(1), {"batch_size": 20, **options}

    def kill(*_: Any) -> None:
        if next(calls) == kill_at:
            raise Killed

    whole = run(train, trained, name, config=options)
    with pytest.raises(Killed):
        run(train, trained, name, config=options, output_dir=tmp_path / "run", progress=kill)
    resumed = run(train, trained, name, config=options, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    steps = [{k: v for k, v in row.items() if k != "watched_accuracy"} for row in resumed.history]
    assert steps == [{k: v for k, v in row.items() if k != "watched_accuracy"} for row in whole.history]


@pytest.mark.parametrize("name", ["scrub", "bad_teacher", "laf"])
def test_what_teachers_said_is_restored_without_asking_again(train: Samples, name: str) -> None:
    first, second = make(name, train), make(name, train)
    phase, calls = first.phases()[0], []
    first.prepare(phase)
    second.context.original.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    second.load_cache_state(phase, first.cache_state(phase))
    batch, student = batch_of(first), tiny_vit(seed=5)
    torch.testing.assert_close(second.loss(student, batch, phase), first.loss(student, batch, phase), atol=0, rtol=0)
    assert not calls


@pytest.mark.parametrize("name", ["bad_teacher", "laf"])
def test_no_label_is_read(train: Samples, name: str) -> None:
    found = []
    for labels in (train.labels, np.zeros_like(train.labels)):
        samples = Samples("train", list(train.ids), labels, train._decode)
        result = run(samples, tiny_vit(), name, config={"max_steps": 2, "collapse_drop": 100.0})
        found.append(weights_sha256(result.model))
    assert found[0] == found[1]


# scrub


def test_scrub_alternates_and_ends_with_min_epochs(train: Samples) -> None:
    made = [(p.name, p.samples, p.epochs) for p in make("scrub", train, forget_epochs=2, retain_epochs=4).phases()]
    f, r = ("forget", "forget", 1), ("retain", "retain", 1)
    assert made == [f, r, f, r, r, r]
    assert [p.name for p in make("scrub", train).phases()].count("forget") == 2
    assert all(p.guarded == (p.name == "forget") for p in make("scrub", train).phases())


@pytest.mark.parametrize("augmented", [False, True])
def test_scrub_losses_are_those_of_the_paper(train: Samples, augmented: bool) -> None:
    method = make("scrub", train, alpha=0.4, gamma=0.7, temperature=3.0, augment_forget=augmented)
    forget, retain = method.phases()[:2]
    student, original = tiny_vit(seed=5), method.context.original
    for phase in (forget, retain):
        method.prepare(phase)
        batch = batch_of(method, phase.samples)
        with torch.no_grad():
            logits, taught = student(batch.images), original(batch.images)
            found = method.loss(student, batch, phase)
        distance = float(kl(taught, logits, 3.0).mean())
        if phase is forget:
            assert {k: float(v) for k, v in found.items()} == pytest.approx({"forget_ascent": -distance}, rel=1e-4)
        else:
            ce = float(-torch.log_softmax(logits.double(), 1)[range(8), batch.labels].mean())
            expected = {"retain_kl": 0.4 * distance, "retain_ce": 0.7 * ce}
            assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-4)


def test_scrub_runs_the_original_once_a_forget_image_and_lets_it_go(train: Samples) -> None:
    calls: list[int] = []
    method = make("scrub", train)
    forget, retain = method.phases()[:2]
    method.context.original.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    assert method.needs_original(forget, prepared=False)
    method.prepare(forget)
    assert not method.needs_original(forget, prepared=True)
    method.prepare(forget)
    method.loss(tiny_vit(), batch_of(method), forget)
    assert sum(calls) == 20
    method.prepare(retain)  # augmented: nothing to keep
    assert method.needs_original(retain, prepared=True)
    method.loss(tiny_vit(), batch_of(method, "retain"), retain)
    assert sum(calls) == 20 + 8
    alone = make("scrub", train, alpha=0.0)
    assert not alone.needs_original(retain, prepared=False)
    assert set(alone.loss(tiny_vit(), batch_of(alone, "retain"), retain)) == {"retain_ce"}


def test_scrub_moves_away_on_forget_samples_and_back_on_retained_ones(train: Samples, trained: torch.nn.Module) -> None:
    config = {"forget_epochs": 1, "retain_epochs": 1, "forget_lr": 1e-3, "lr": 2e-3, "alpha": 1.0, "gamma": 0.0}
    rows = run(train, trained, "scrub", config=config).history
    ascents = [-row["forget_ascent"] for row in rows if "forget_ascent" in row]
    back = [row["retain_kl"] for row in rows if "retain_kl" in row]
    assert ascents[0] < 1e-4 < 0.02 < ascents[-1]
    assert back[-1] < 0.7 * back[0]


def test_scrub_refuses_what_makes_no_sense(train: Samples) -> None:
    for options, text in (
        ({"forget_epochs": 3, "retain_epochs": 2}, "retain_epochs=2: expected forget_epochs or more"),
        ({"alpha": 0.0, "gamma": 0.0}, "gamma=0.0: expected above 0 where alpha is 0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ):
        with pytest.raises(UserError, match=text):
            make("scrub", train, **options)
    with pytest.raises(UserError, match="scrub_r: needs samples that the model was not trained on, to choose"):
        make("scrub_r", train)


def test_rewind_takes_the_epoch_nearest_to_held_out_error(train: Samples, trained: torch.nn.Module) -> None:
    after: list[torch.nn.Module] = []

    def keep(name: str, model: torch.nn.Module) -> None:
        if name == "retain":
            after.append(copy.deepcopy(model))

    config = {"forget_epochs": 2, "retain_epochs": 4, "lr": 2e-3, "forget_lr": 2e-3, "collapse_drop": 100.0}
    result = run(train, trained, "scrub_r", config=config, after_phase=keep)
    made = ready(train, trained, "scrub_r")
    forget, held_out = made.method.context.forget, train.subset(range(60, 120))
    of_class = {
        c: accuracy(after[-1], held_out.subset(np.flatnonzero(held_out.labels == c)), made)
        for c in np.unique(forget.labels)
    }
    target = np.mean([of_class[c] for c in forget.labels])
    distances = [abs(accuracy(model, forget, made) - target) for model in after]
    nearest = int(np.argmin(distances))
    assert nearest < 3  # not the last, which plain SCRUB ends with
    assert torch.equal(weights(result.model), weights(after[nearest]))
    assert not any(torch.equal(weights(result.model), weights(m)) for i, m in enumerate(after) if i != nearest)
    assert list_methods()["scrub_r"].one_process


# bad_teacher


@pytest.mark.parametrize("augmented", [False, True])
def test_bad_teacher_loss_is_that_of_the_paper(train: Samples, augmented: bool) -> None:
    made = ready(train, tiny_vit(seed=3), "bad_teacher", temperature=2.0, retain_part=0.5, augment_images=augmented)
    method, (phase,) = made.method, made.phases
    assert method.needs_original(phase, prepared=True) == augmented
    batch = next(iter(made.loader_of(0, phase).epoch(0)))
    forget = [i for i in range(8) if batch.index[i] < 20]
    retain = [i for i in range(8) if batch.index[i] >= 20]
    assert forget
    assert retain
    student, untrained, original = tiny_vit(seed=5), tiny_vit(seed=0), tiny_vit(seed=3)
    with torch.no_grad():
        logits = student(batch.images)
        found = {key: float(value) for key, value in method.loss(student, batch, phase).items()}
        bad, good = kl(untrained(batch.images), logits, 2.0), kl(original(batch.images), logits, 2.0)
    expected = {"forget_kl": float(bad[forget].sum()) / 8, "retain_kl": float(good[retain].sum()) / 8}
    assert found == pytest.approx(expected, rel=1e-4)


def test_bad_teachers_each_see_an_image_once(train: Samples) -> None:
    calls: list[int] = []
    method: Any = make("bad_teacher", train, retain_part=0.5)
    (phase,) = method.phases()
    assert phase.epochs * (0.1 + 0.9 * phase.retain_part) / 0.9 <= 10  # in passes over the retained samples
    assert method.needs_original(phase, prepared=False)
    for model in (method.context.original, method.untrained):
        model.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    method.prepare(phase)
    assert sum(calls) == 2 * 40
    assert method._untrained is None
    method.loss(tiny_vit(), batch_of(method), phase)
    assert sum(calls) == 2 * 40


def test_the_untrained_teacher_may_start_as_its_layers_do(train: Samples) -> None:
    methods: list[Any] = [make("bad_teacher", train, untrained="layers", seed=seed) for seed in (0, 0, 1)]
    made = methods[0].untrained
    torch.rand(3)  # the global generator is elsewhere for the second
    before = torch.get_rng_state()
    again, other = (method.untrained for method in methods[1:])
    assert torch.equal(torch.get_rng_state(), before)
    own = dict(tiny_vit(seed=0).named_parameters())
    layers = 0
    for module in made.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            # Uniform in +- 1 / sqrt(fan in), bias and all: what torch's reset_parameters draws.
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert 0 < module.bias.abs().max() <= bound
            assert module.weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            layers += 1
    assert layers == 2 + 4 * len(made.blocks)
    for name in ("cls_token", "pos_embed"):  # of no layer
        assert torch.equal(made.get_parameter(name), own[name])
    assert torch.equal(weights(made), weights(again))
    assert not torch.equal(weights(made), weights(other))


# lotus


@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_lotus_loss_is_that_of_the_paper(train: Samples, trained: torch.nn.Module, noise: str) -> None:
    """Noise is compared by its mean over many draws, against draws of another generator."""
    made = ready(train, trained, "lotus", alpha=3.0, retain_part=0.5, noise=noise)
    (phase,) = made.phases
    batch = next(iter(made.loader_of(0, phase).epoch(0)))
    times = 1 if noise == "none" else 400
    many = dataclasses.replace(
        batch, images=batch.images.repeat(times, 1, 1, 1), labels=batch.labels, index=batch.index.repeat(times)
    )
    student = tiny_vit(seed=5)
    torch.manual_seed(0)
    with torch.no_grad():
        found = {key: float(value) for key, value in made.method.loss(student, many, phase).items()}
        log_q = torch.log_softmax(student(batch.images).double(), 1).numpy()
        taught = trained(batch.images).double().numpy()
    forget, held_out = few(train, 20), train.subset(range(60, 120))
    expected = np.mean(
        [accuracy(trained, held_out.subset(np.flatnonzero(held_out.labels == c)), made) for c in forget.labels]
    )
    tau = math.exp(3.0 * (accuracy(trained, forget, made) - expected))
    assert tau > 1.5  # so that it counts
    draws = (
        np.zeros((1, *taught.shape)) if noise == "none" else np.random.default_rng(0).gumbel(size=(400, *taught.shape))
    )
    perturbed = taught + draws
    soft = np.exp(perturbed / tau) / np.exp(perturbed / tau).sum(2, keepdims=True)
    hard = np.eye(10)[perturbed.argmax(2)]
    of_forget = batch.index.numpy() < 20
    assert 0 < of_forget.sum() < 8
    terms = {
        "forget_soft_ce": -(soft.mean(0) * log_q)[of_forget].sum() / 8,
        "retain_hard_ce": -(hard.mean(0) * log_q)[~of_forget].sum() / 8,
    }
    assert found == pytest.approx(terms, rel=1e-4 if noise == "none" else 0.03)


def test_lotus_stops_where_forget_samples_look_unseen(train: Samples, trained: torch.nn.Module) -> None:
    made = ready(train, trained, "lotus", tolerance=0.05)
    method: Any = made.method
    (phase,) = made.phases
    expected = method._expected
    assert method._distance == pytest.approx(accuracy(trained, few(train, 20), made) - expected)
    assert method.should_stop(tiny_vit(seed=5), phase, 0) == (
        f"forget accuracy {100 * accuracy(tiny_vit(seed=5), few(train, 20), made):.1f}%, held-out accuracy "
        f"{100 * expected:.1f}%"
    )
    assert method._distance < -0.05
    assert method.should_stop(trained, phase, 1) is None
    assert method._distance > 0
    method._expected = 1.04  # within the tolerance
    assert method.should_stop(trained, phase, 2) is None
    method._expected = 1.06
    assert method.should_stop(trained, phase, 2) is not None


def test_lotus_expects_nothing_of_a_class_that_is_gone(train: Samples, trained: torch.nn.Module) -> None:
    of_class = np.flatnonzero(train.labels[:60] == 3)
    made: Any = ready(train, trained, "lotus", forget=train.subset(of_class))
    assert made.method._expected == 0.0
    half: Any = ready(train, trained, "lotus", forget=train.subset([*of_class, 0]))
    zeros = train.subset([i for i in range(60, 120) if train.labels[i] == train.labels[0]])
    assert half.method._expected == pytest.approx(accuracy(trained, zeros, made) / (len(of_class) + 1))


def test_lotus_needs_held_out_samples_and_no_original_once_prepared(train: Samples) -> None:
    with pytest.raises(UserError, match="lotus: needs samples that the model was not trained on, to find when"):
        make("lotus", train)
    made = ready(train, tiny_vit(), "lotus")
    assert not made.method.needs_original(made.phases[0], prepared=True)
    assert made.phases[0].retain_part == 0.3


# laf


def by_hand(weights: dict[str, torch.Tensor], which: str, features: torch.Tensor) -> torch.Tensor:
    """An autoencoder's answer, from its weights: the decoder on the mean of the posterior."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{which}.{name}.weight"].T + weights[f"{which}.{name}.bias"]

    hidden = linear("encoder.2", linear("encoder.0", features).clamp(min=0)).clamp(min=0)
    latent = linear("posterior", hidden)[:, :4]
    return linear("decoder.4", linear("decoder.2", linear("decoder.0", latent).clamp(min=0)).clamp(min=0))


def test_laf_losses_are_those_of_the_paper(train: Samples) -> None:
    made = ready(train, tiny_vit(), "laf", latent=4, alignment=0.5, temperature=2.0)
    method, phase = made.method, made.phases[0]
    fitted = method.cache_state(phase)
    student, original = tiny_vit(seed=5), method.context.original
    found: dict[str, float] = {}
    expected: dict[str, float] = {}
    for which, loss in (("forget", method.loss), ("retain", method.paired_loss)):
        batch = batch_of(method, which)
        with torch.no_grad():
            found |= {key: float(value) for key, value in loss(student, batch, phase).items()}
            now, before = (outputs(model, batch.images, "features") for model in (student, original))
            m = ((by_hand(fitted, which, now) - now) ** 2).mean(1)
        e = float(torch.exp(m / (m + 1)).mean())
        away = 1 - (now * before).sum(1) / now.norm(dim=1) / before.norm(dim=1)
        if which == "forget":
            aligned = -0.5 * math.log(float(torch.exp(away / 2.0).mean()))
            expected |= {"forget_extraction": -e, "forget_alignment": aligned}
        else:
            expected |= {"retain_extraction": e, "retain_alignment": 0.5 * float(away.mean())}
    assert found == pytest.approx(expected, rel=1e-4)


def test_laf_fits_an_autoencoder_to_the_originals_features_of_each_set(train: Samples) -> None:
    made: Any = ready(train, tiny_vit(), "laf", vae_samples=10, vae_epochs=3, latent=4)
    for which, samples in (
        ("forget", few(train, 20)),
        ("retain", train.subset(20 + np.linspace(0, 39, 10).astype(int))),
    ):
        batches = made.method.context.loader(samples, "none").ordered()
        with torch.no_grad():
            features = torch.cat([outputs(tiny_vit(), batch.images, "features") for batch in batches])
        again = laf.fitted(features, 4, 3, seed=0).state_dict()
        found = made.method._autoencoders[which]
        assert not any(p.requires_grad for p in found.parameters())
        torch.testing.assert_close(found.state_dict(), again, atol=1e-4, rtol=0)


def test_laf_autoencoders_learn_and_leave_the_global_generator_alone() -> None:
    features = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(3, 32)
    state = torch.random.get_rng_state()
    fitted, raw = laf.fitted(features, 4, 150, seed=0), laf.fitted(features, 4, 1, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    left, before = (float(((a(features) - features) ** 2).mean()) for a in (fitted, raw))
    assert left < 0.3 * before
    mean, log_variance = raw.posterior(raw.encoder(features)).chunk(2, 1)
    torch.manual_seed(7)
    answer = raw.decoder(mean + torch.exp(log_variance / 2) * torch.randn_like(mean))
    normal = torch.distributions.Normal
    prior = torch.distributions.kl_divergence(normal(mean, torch.exp(log_variance / 2)), normal(0.0, 1.0)).sum(1)
    expected = (((answer - features) ** 2).sum(1) + 0.025 * prior).mean()
    torch.manual_seed(7)
    torch.testing.assert_close(raw.objective(features), expected)


def test_laf_repairs_only_when_asked(train: Samples) -> None:
    assert [(p.name, p.paired) for p in make("laf", train).phases()] == [("forget", "retain")]
    method = make("laf", train, repair_epochs=2.0)
    forget, repair = method.phases()
    assert (repair.name, repair.samples, repair.epochs) == ("retain", "retain", 2.0)
    assert method.needs_original(forget, prepared=True)
    assert not method.needs_original(repair, prepared=False)
    method.prepare(repair)
    assert method.cache_state(repair) == {}
    batch, model = batch_of(method, "retain"), tiny_vit()
    expected = F.cross_entropy(model(batch.images), batch.labels)
    torch.testing.assert_close(method.loss(model, batch, repair), {"retain_ce": expected})
