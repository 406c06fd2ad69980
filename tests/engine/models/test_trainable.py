"""What a run may change: all else stays the same bits, and low-rank updates end as plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import few, tiny_vit

from engine.data import Batch, Samples, open_source
from engine.errors import RunStopped, UserError
from engine.methods.finetune import Finetune
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.models.spec import ModelSpec
from engine.models.trainable import (
    LowRank,
    after_blocks,
    blocks_of,
    low_ranks,
    merge,
    merge_state,
    refuse_sharding,
    restrict,
)
from engine.plan.planning import plan
from engine.run.setup import RunOptions, set_up
from engine.run.unlearn import unlearn

OPTIONS = {"batch_size": 10, "precision": "fp32", "augment": "none", "weight_decay": 0.5}
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def run(train: Samples, **options: Any) -> Any:
    inside = {key: options.pop(key) for key in ("output_dir", "resume") if key in options}
    model = tiny_vit()
    forget, retain = few(train, 12), train.subset(range(20, 50))
    config = {**OPTIONS, "forget_epochs": 1.0, "retain_epochs": 2.0, **options}
    return unlearn(model, forget, retain, method="lethe", config=config, **inside)


def changed(model: torch.nn.Module) -> set[str]:
    before = tiny_vit().state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("spec", "prefixes"),
    [
        ("head", ("head.",)),
        ("last:1", ("blocks.1.", "norm.", "head.")),
        ("lora:3", tuple(f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in LINEAR)),
    ],
)
def test_a_run_changes_what_it_may_and_nothing_else(train: Samples, spec: str, prefixes: tuple[str, ...]) -> None:
    """All of it, and despite weight decay no other bit; the result is the plain model that it was."""
    result = run(train, trainable=spec)
    names = set(tiny_vit().state_dict())
    assert changed(result.model) == {name for name in names if name.startswith(prefixes)}
    plain = tiny_vit()
    assert list(result.model.state_dict()) == list(plain.state_dict())
    assert [name for name, p in result.model.named_parameters() if p.requires_grad] == [
        name for name, _ in plain.named_parameters()
    ]
    assert [type(module) for module in result.model.modules()] == [type(module) for module in plain.modules()]
    assert set(vars(result.model)) - set(vars(plain)) <= {"_compiled_call_impl"}


def test_lora_computes_with_and_merges_to_w_plus_b_a() -> None:
    model, plain = tiny_vit(), tiny_vit()
    restrict(model, "lora:3", seed=5)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(images), plain(images)), "B is zero at first"
    for group in low_ranks(model):
        assert len(group) == 4
        for each in group:
            torch.nn.init.normal_(each.B, std=0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.{layer}.parametrizations.weight.0.{which}" for i in (0, 1) for layer in LINEAR for which in "AB"
    }
    expected = plain.state_dict()
    for i in (0, 1):
        for layer in LINEAR:
            module = model.get_submodule(f"blocks.{i}.{layer}")
            update = module.parametrizations.weight[0]
            assert update.A.shape == (3, module.in_features)
            expected[f"blocks.{i}.{layer}.weight"] += update.B.detach() @ update.A.detach()
    merged = merge_state(model.state_dict())
    outputs = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        halved = model.blocks[0].attn.qkv.weight
    merge(model)
    assert torch.equal(halved, model.blocks[0].attn.qkv.weight), "autocast does not round what is merged"
    for found in (merged, model.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert torch.equal(model(images), outputs)


def test_a_is_drawn_by_the_seed_within_its_bound() -> None:
    def draws(seed: int) -> list[torch.Tensor]:
        model = tiny_vit()
        restrict(model, "lora:4", seed)
        return [each.A for group in low_ranks(model) for each in group]

    first, again, other = draws(1), draws(1), draws(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][:, :8], first[1][:, :8])
    for each in first:
        bound = each.shape[1] ** -0.5
        assert 0.8 * bound < each.abs().max() <= bound


def test_parts_and_what_the_caller_froze() -> None:
    model = tiny_vit()
    model.cls_token.requires_grad_(False)
    restrict(model, "lora:2", 0, parts=("mlp",))
    assert sum(isinstance(module, LowRank) for module in model.modules()) == 4
    merge(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["cls_token"]


@pytest.mark.parametrize("spec", ["last:1", "lora:2"])
def test_killed_and_resumed_gives_the_same_bits(train: Samples, tmp_path: Path, spec: str) -> None:
    class Stop(Exception):
        pass

    whole = run(train, trainable=spec)

    def until(phase: str, model: torch.nn.Module) -> None:
        raise Stop

    with pytest.raises(Stop):
        unlearn(
            tiny_vit(),
            few(train, 12),
            train.subset(range(20, 50)),
            method="lethe",
            config={**OPTIONS, "forget_epochs": 1.0, "retain_epochs": 2.0, "trainable": spec},
            output_dir=tmp_path / "run",
            after_phase=until,
        )
    resumed = run(train, trainable=spec, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert weights_sha256(load_checkpoint(tmp_path / "run")) == weights_sha256(whole.model)


@pytest.mark.slow
def test_the_guard_takes_low_rank_updates_back(train: Samples) -> None:
    """A forget stage that destroys a trained model, and no repair: what comes back is what went in."""
    samples, recipe = few(train, 300), {"epochs": 8.0, "lr": 3e-3, "batch_size": 20, "precision": "fp32"}
    trained = unlearn(tiny_vit(), few(train, 2), samples, method="retrain", config=recipe).model
    options = {**OPTIONS, "trainable": "lora:4", "lr": 0.3, "forget_epochs": 4.0, "collapse_drop": 5.0}
    result = unlearn(trained, few(train, 20), samples, method="gradient_ascent", config=options)
    assert [event["event"] for event in result.events] == ["collapse"]
    assert weights_sha256(result.model) == weights_sha256(trained)


def test_gradient_checkpointing_and_accumulation_change_nothing(train: Samples) -> None:
    plain = run(train, trainable="lora:2", max_steps=2)
    for options in ({"gradient_checkpointing": True}, {"accumulation_steps": 2, "batch_size": 5}):
        other = run(train, trainable="lora:2", max_steps=2, **options)
        for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_last_good_weights_of_a_run_that_stops_are_merged(
    train: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, torch.Tensor] = {}

    def loss(self: Finetune, model: torch.nn.Module, batch: Batch, phase: Any) -> dict[str, torch.Tensor]:
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:  # the weights of the checkpoint, which is made every two steps
            kept.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        terms = original(self, model, batch, phase)
        return terms if self.count < 3 else {name: value * torch.nan for name, value in terms.items()}

    original = Finetune.loss
    monkeypatch.setattr(Finetune, "loss", loss)
    config = {**OPTIONS, "trainable": "lora:2", "checkpoint_every": 2}
    with pytest.raises(RunStopped, match="last good weights"):
        unlearn(
            tiny_vit(),
            few(train, 5),
            train.subset(range(20, 60)),
            method="finetune",
            config=config,
            output_dir=tmp_path / "run",
        )
    saved = load_checkpoint(tmp_path / "run" / "last_good")
    assert changed(saved) == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in LINEAR}
    name = "blocks.0.mlp.fc1"
    update = (kept[f"{name}.parametrizations.weight.0.{which}"] for which in "BA")
    expected = tiny_vit().state_dict()[f"{name}.weight"] + torch.matmul(*update)
    assert torch.equal(saved.state_dict()[f"{name}.weight"], expected)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lora:0", "option trainable='lora:0': expected all, head, last:N or lora:R, with N or R at least 1"),
        ("last", "expected all, head, last:N or lora:R"),
        ("last:1.5", "expected all, head, last:N or lora:R"),
        ("last:3", "the model has 2 blocks, so N is 1 to 2"),
        ("lora:33", "the smallest dimension of the layers is 32, so R is 1 to 32"),
    ],
)
def test_what_cannot_be_trained_is_said(train: Samples, spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        set_up(tiny_vit(), few(train, 5), few(train, 20), RunOptions(method="finetune", config={"trainable": spec}))


def test_a_model_without_a_classifier_has_no_head() -> None:
    with pytest.raises(UserError, match="the model has no classifier"):
        restrict(tiny_vit(num_classes=0), "head", 0)


def test_swin_counts_its_blocks_over_all_stages() -> None:
    """Three blocks of (2, 2) reach into the first stage: what joins the stages is trained with them."""
    args = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    spec = ModelSpec(architecture="swin_tiny_patch4_window7_224", num_classes=4, model_args=args, pretrained_cfg={})
    for count, joined in ((2, False), (3, True)):
        model = spec.build(seed=0)
        assert len(blocks_of(model)) == 4
        restrict(model, f"last:{count}", 0)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("layers.1.downsample.reduction.weight" in trained) == joined
        assert ("layers.0.blocks.1.mlp.fc1.weight" in trained) == joined
        assert {"norm.weight", "head.fc.weight", "layers.1.blocks.0.mlp.fc1.weight"} <= trained
        assert not any(name.startswith(("patch_embed", "layers.0.blocks.0")) for name in trained)
    assert [type(module).__name__ for module in after_blocks(tiny_vit())] == [
        "LayerNorm",
        "Identity",
        "Dropout",
        "Linear",
    ]


def test_deepspeed_that_cannot_keep_the_promise_is_refused() -> None:
    model = tiny_vit()

    def zero(stage: int, half: bool) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": half}}

    refuse_sharding(model, zero(3, True))  # all is trained
    restrict(model, "last:1", 0)
    refuse_sharding(model, zero(2, False))
    with pytest.raises(UserError, match="they would end rounded"):
        refuse_sharding(model, zero(1, True))
    with pytest.raises(UserError, match="use stage 0, 1 or 2"):
        refuse_sharding(model, zero(3, False))


def test_a_plan_says_whose_memory_it_counts() -> None:
    def notes(**options: Any) -> list[str]:
        asked: dict[str, Any] = {"images": 100, "forget_share": 0.1, "num_classes": 5, "method": "finetune"}
        small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
        return plan("vit_tiny_patch16_224", model_args=small, options={"batch_size": 4, **options}, **asked).notes

    assert [
        note
        for note in notes(trainable="last:1")
        if note.startswith("trainable: memory is counted as if all weights were trained")
    ]
    assert not [note for note in notes() if note.startswith("trainable")]
