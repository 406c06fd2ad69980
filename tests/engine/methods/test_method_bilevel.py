"""three_stage, sfron and ofmu: what they make of a forget and a retain gradient, against the equations written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods_kit import batch_of, make
from toys import few, tiny_vit

from engine.data import Batch, Samples, open_source
from engine.errors import UserError
from engine.methods import Method, get_method
from engine.models.attention import attention_backend
from engine.models.checkpoint import weights_sha256
from engine.run.unlearn import unlearn

METHODS = ["three_stage", "sfron", "ofmu"]
OPTIONS = {"batch_size": 10, "precision": "fp32", "lr": 1e-3}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def run(train: Samples, method: str, **options: Any) -> Any:
    config = {**OPTIONS, **options.pop("config", {})}
    forget, retain = few(train, 12), train.subset(range(20, 60))
    return unlearn(
        tiny_vit(), forget, retain, method=method, config=config, validation=train.subset(range(60, 90)), **options
    )


def gradient(loss: torch.Tensor, model: torch.nn.Module, graph: bool = False) -> torch.Tensor:
    """Of a loss with respect to all weights, as one vector."""
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=graph)
    return torch.cat([each.flatten() for each in found])


def step_gradient(method: Method, model: torch.nn.Module, retain: Batch, forget: Batch) -> torch.Tensor:
    """What the loop would step with, of a method whose losses are added up; without the step."""
    phase = method.phases()[0]
    main, paired = phase.takes(method.step)
    terms = method.loss(model, retain, phase) if main else {}
    terms |= method.paired_loss(model, forget, phase) if paired else {}
    model.zero_grad()
    sum(terms.values()).backward()  # type: ignore[union-attr]
    method.before_step(model, phase)
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_takes_both_kinds_of_samples_on_one_process_and_is_watched(train: Samples, name: str) -> None:
    (phase,) = make(name, train).phases()
    assert (phase.samples, phase.paired, phase.guarded) == ("retain", "forget", True)
    assert phase.combined == (name == "three_stage")
    assert make(name, train, tiny_vit(embed_dim=64)).phases()[0].lr == phase.lr / 2
    with pytest.raises(UserError, match=f"method {name}: it .*; run it on one process"):
        run(train, name, deepspeed={})


# three_stage


def three_stage_direction(pairs: list[tuple[torch.Tensor, torch.Tensor]], ema: float = 0.9) -> torch.Tensor:
    """d after these (forget, retain) gradients, one a step; l found by bisection on the difference of the cosines."""
    averages: list[torch.Tensor] = []
    for g_f, g_r in pairs:
        f, r = g_f / g_f.norm(), g_r / g_r.norm()
        new = [f - (f @ r) * r, r - (r @ f) * f] if f @ r < 0 else [f, r]
        averages = [ema * m + (1 - ema) * x for m, x in zip(averages, new, strict=True)] if averages else new
    m_f, m_r = averages
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        d = share * m_f + (1 - share) * m_r
        if F.cosine_similarity(d, m_f, dim=0) > F.cosine_similarity(d, m_r, dim=0):
            high = share
        else:
            low = share
    return d


@pytest.mark.parametrize("conflict", [True, False])
def test_three_stage_direction_equals_the_equations(train: Samples, conflict: bool) -> None:
    method = make("three_stage", train)
    torch.manual_seed(0)
    pairs = [(3 * torch.randn(9).double(), torch.randn(9).double()) for _ in range(3)]
    pairs = [(f if (f @ r < 0) == conflict else -f, r) for f, r in pairs]
    model, phase = tiny_vit(), method.phases()[0]
    for count, (f, r) in enumerate(pairs, start=1):
        d = torch.cat(method.combine(model, [r[:4], r[4:]], [f[:4], f[4:]], phase))
        torch.testing.assert_close(d, three_stage_direction(pairs[:count]))


def test_three_stage_projects_conflict_away(train: Samples) -> None:
    """The first step of gradients in conflict hurts neither loss: d is no ascent of either."""
    f, r = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])
    d = torch.cat(make("three_stage", train).combine(tiny_vit(), [r], [f], None))  # type: ignore[arg-type]
    assert f @ r < 0 < d @ f
    assert d @ r > 0
    zero = torch.zeros(2)
    assert not torch.cat(make("three_stage", train).combine(tiny_vit(), [zero], [zero], None)).any()  # type: ignore[arg-type]


def test_three_stage_raises_weighted_entropy_and_learns_the_weights(train: Samples) -> None:
    method: Any = make("three_stage", train, weight_lr=2.0)
    torch.manual_seed(0)
    method.logits = torch.randn(20)
    before, batch, model = method.logits.clone(), batch_of(method), tiny_vit(seed=3)
    p = model(batch.images).softmax(1)
    entropy = torch.distributions.Categorical(p).entropy() / math.log(10)
    w = 1 / (1 + torch.exp(-before[batch.index]))
    loss = method.paired_loss(model, batch, method.phases()[0])["forget_entropy"]
    torch.testing.assert_close(loss, -(w * entropy).sum() / w.sum())
    # dL/da_i of the forget loss, by hand: weight goes to samples with less entropy than the weighted mean.
    mean = (w * entropy).sum() / w.sum()
    slope = -(w * (1 - w)) * (entropy - mean) / w.sum()
    expected = before.clone()
    expected[batch.index] += 2.0 * len(batch) * slope.detach()
    torch.testing.assert_close(method.logits, expected)
    rest = [i for i in range(20) if i not in batch.index.tolist()]
    assert torch.equal(method.logits[rest], before[rest])
    retain = batch_of(method, "retain")
    expected_ce = F.cross_entropy(model(retain.images), retain.labels)
    torch.testing.assert_close(method.loss(model, retain, method.phases()[0])["retain_ce"], expected_ce)


def test_three_stage_leaves_weights_alone_where_no_image_can_be_read(train: Samples) -> None:
    method: Any = make("three_stage", train)
    batch = batch_of(method)
    method.paired_loss(tiny_vit(), Batch(batch.images, batch.labels, batch.index, weight=0.0), method.phases()[0])
    assert not method.logits.any()
    with pytest.raises(UserError, match="three_stage: a model with one class has no entropy"):
        make("three_stage", train, tiny_vit(num_classes=1))


# sfron


def squared(model: torch.nn.Module, samples: Samples, method: Method) -> torch.Tensor:
    """Mean over batches of 8, the last one shorter, of squared batch gradients."""
    batches = list(method.context.loader(samples, "none").epoch(0))
    each = [gradient(F.cross_entropy(model(batch.images), batch.labels), model) ** 2 for batch in batches]
    return torch.stack(each).mean(0)


def test_sfron_step_equals_the_equations(train: Samples) -> None:
    """Step 0 forgets on salient weights, step 1 repairs on all, step 2 too, step 3 forgets again, with less."""
    method: Any = make("sfron", train, ascent=4.0, repair_steps=2, exponent=0.7, epochs=2.0, saliency_threshold=0.5)
    phase, model = method.phases()[0], tiny_vit()
    method.prepare(phase)
    method.total_steps = 10  # 40 retained samples in batches of 8, twice
    salient = squared(model, method.context.forget, method) >= 0.5 * squared(model, method.context.retain, method)
    assert 0.1 < salient.float().mean() < 0.9
    mask = torch.cat([method.mask[name].flatten() for name, _ in model.named_parameters()])
    assert (mask != salient).float().mean() < 3e-3  # key biases: their gradient is rounding alone
    model, retain, forget = tiny_vit(seed=5), batch_of(method, "retain"), batch_of(method)
    losses = F.cross_entropy(model(forget.images), forget.labels, reduction="none")
    c = 1 / losses.detach() ** 0.7
    raised = gradient((c / c.sum() * losses).sum(), model)
    repair = gradient(F.cross_entropy(model(retain.images), retain.labels), model)
    for step in range(4):
        method.step = step
        found = step_gradient(method, model, retain, forget)
        ascent = 4.0 * (1 + math.cos(math.pi * step / 10)) / 2
        expected = -ascent * mask * raised if step % 3 == 0 else repair
        torch.testing.assert_close(found, expected, msg=str(step))


def test_sfron_takes_only_the_batch_that_a_step_has_a_use_for(train: Samples) -> None:
    """Neither decoded nor counted: of 12 steps 4 forget on 10 of 12 samples, the last of them on the other 2."""
    seen: dict[str, list[int]] = {"loss": [], "paired_loss": []}
    cls: Any = get_method("sfron")
    with pytest.MonkeyPatch.context() as patched:
        for name, calls in seen.items():
            real = vars(cls)[name]

            def noting(self: Any, model: Any, batch: Batch, phase: Any, *, calls: Any = calls, real: Any = real) -> Any:
                calls.append((self.step, len(batch)))
                return real(self, model, batch, phase)

            patched.setattr(cls, name, noting)
        result = run(train, "sfron", config={"epochs": 3.0, "repair_steps": 2})
    assert seen["paired_loss"] == [(0, 10), (3, 2), (6, 10), (9, 2)]
    assert seen["loss"] == [(step, 10) for step in (1, 2, 4, 5, 7, 8, 10, 11)]
    assert result.samples_seen == {"forget": 24 + 80}


def test_sfron_ascent_ends_with_the_phase(train: Samples) -> None:
    """A_t of a step past the last would be zero, whatever decides the number of steps; 40 samples in batches of 10."""
    cls: Any = get_method("sfron")
    for options, steps in (({"epochs": 3.0}, 12), ({"max_steps": 7}, 7), ({"epochs": 2.0, "accumulation_steps": 2}, 4)):
        made: list[Any] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(cls, "prepare", lambda self, phase, made=made: made.append(self))
            patched.setattr(cls, "before_step", lambda *_: None)
            patched.setattr(cls, "cache_state", lambda *_: {})
            run(train, "sfron", config=options)
        assert (made[0].step, made[0].total_steps) == (steps - 1, steps)
        made[0].step += 1
        assert made[0]._ascent() == pytest.approx(0.0, abs=1e-12)


def test_sfron_forgets_samples_whose_loss_rounds_to_zero_too(train: Samples) -> None:
    """One such sample must not take the whole weight of the batch."""
    method: Any = make("sfron", train)
    model, batch = tiny_vit(seed=5), batch_of(method)
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.head.weight.mul_(1e5)
        labels = sharp(batch.images).argmax(1)
    labels[1:4] = (labels[1:4] + 1) % 10
    batch = Batch(batch.images, labels, batch.index)
    term = method.paired_loss(sharp, batch, method.phases()[0])["forget_ascent"]
    assert F.cross_entropy(sharp(batch.images), labels, reduction="none")[0] == 0
    assert gradient(term, sharp).abs().max() > 1e-3


# ofmu


def ofmu_objective(model: torch.nn.Module, retain: Batch, forget: Batch, similarity: float) -> torch.Tensor:
    with attention_backend(model, "eager"):
        l_f, l_r = (F.cross_entropy(model(batch.images), batch.labels) for batch in (forget, retain))
    g_f, g_r = gradient(l_f, model, graph=True), gradient(l_r, model, graph=True)
    return l_f - similarity * (g_f @ g_r) / (g_f.norm() * g_r.norm())


def test_ofmu_steps_equal_the_equations(train: Samples) -> None:
    """In float64: inner steps climb P, the outer one descends L_r + rho |grad P|^2, found by central differences."""
    method: Any = make("ofmu", train, ascent_steps=2, ascent=0.3, similarity=0.5, stationarity=0.2)
    model = tiny_vit(seed=5).double()
    retain, forget = batch_of(method, "retain"), batch_of(method)
    retain = Batch(retain.images.double(), retain.labels, retain.index)
    forget = Batch(forget.images.double(), forget.labels, forget.index)
    climb = gradient(ofmu_objective(model, retain, forget, 0.5), model)
    repair = gradient(F.cross_entropy(model(retain.images), retain.labels), model)

    def climb_at(shift: torch.Tensor) -> torch.Tensor:
        moved = copy.deepcopy(model)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()) + shift, moved.parameters()
        )
        return gradient(ofmu_objective(moved, retain, forget, 0.5), moved)

    small = 1e-5 / climb.norm()
    curved = (climb_at(small * climb) - climb_at(-small * climb)) / (2 * small)
    assert (0.2 * 2 * curved).norm() > 0.1 * repair.norm()
    for step in range(4):
        method.step = step
        found = step_gradient(method, model, retain, forget)
        expected = repair + 0.2 * 2 * curved if step == 2 else -0.3 * climb
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3, msg=str(step))


def test_ofmu_without_penalty_is_plain_descent_outside(train: Samples) -> None:
    method: Any = make("ofmu", train, stationarity=0.0)
    model, retain, forget = tiny_vit(seed=5), batch_of(method, "retain"), batch_of(method)
    method.step = 1
    repair = gradient(F.cross_entropy(model(retain.images), retain.labels), model)
    torch.testing.assert_close(step_gradient(method, model, retain, forget), repair)


def test_ofmu_runs_under_fused_attention_and_autocast(train: Samples) -> None:
    """Its own passes are explicit: the loop's attention stays what it is, and the result is that of eager."""
    fused, eager = (run(train, "ofmu", config={"max_steps": 2, "attention": a}) for a in ("sdpa", "eager"))
    assert fused.model.blocks[0].attn.fused_attn
    assert weights_sha256(fused.model) == weights_sha256(eager.model)
    half = run(train, "ofmu", config={"max_steps": 2, "precision": "bf16"})
    rows = [(a["retain_ce"], b["retain_ce"]) for a, b in zip(half.history, eager.history, strict=True) if "lr" in a]
    assert len(rows) == 2
    assert all(a == pytest.approx(b, rel=0.05) for a, b in rows)


@pytest.mark.parametrize("option", [{"compile": True}, {"attention": "xformers"}, {"gradient_checkpointing": True}])
def test_ofmu_refuses_what_cannot_be_differentiated_twice(train: Samples, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"option {next(iter(option))}=.*; use "):
        make("ofmu", train, **option)


# all of them


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(
    train: Samples, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch: averages, per-sample weights, mask and place in the cycle are all taken up."""

    class Stop(Exception):
        pass

    # The checkpoint lies within a cycle of inner and outer steps.
    options = {"ascent_steps": 2} if name == "ofmu" else {"accumulation_steps": 2, "batch_size": 5}
    config = {"max_steps": 6, "epochs": 2.0, **options}
    whole = run(train, name, config=config)
    cls = get_method(name)
    calls = 0

    def dying(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Method, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (12 if name == "three_stage" else 6):  # after the checkpoint, which is that of the first 4
                raise Stop
            return wrapped(self, *arguments)

        return wrapper

    with monkeypatch.context() as patched:
        patched.setattr(cls, "paired_loss", dying(cls.paired_loss))
        with pytest.raises(Stop):
            run(train, name, config=config, output_dir=tmp_path / "run")
    if name == "sfron":
        monkeypatch.setattr(cls, "prepare", lambda *_: pytest.fail("what was prepared is kept"))
    resumed = run(train, name, config=config, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert weights_sha256(whole.model) != weights_sha256(tiny_vit())
    assert resumed.samples_seen == whole.samples_seen


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("three_stage", {"ema": 1.0}, "ema"),
        ("three_stage", {"weight_lr": -1.0}, "weight_lr"),
        ("sfron", {"repair_steps": 0}, "repair_steps"),
        ("sfron", {"ascent": 0.0}, "ascent"),
        ("ofmu", {"ascent_steps": 0}, "ascent_steps"),
        ("ofmu", {"stationarity": -0.1}, "stationarity"),
    ],
)
def test_options_out_of_range_are_refused(train: Samples, name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"option {key}="):
        make(name, train, **options)
