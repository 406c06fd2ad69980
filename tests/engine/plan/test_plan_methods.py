"""Every method can be planned, and one that needs a single process for that alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from test_plan import COST, method_config
from toys import few, tiny_vit

import engine.run.unlearn
from engine.config import RunConfig, build
from engine.data import Batch, open_source
from engine.errors import UserError
from engine.methods import get_method, list_methods
from engine.methods.common.kronecker import KroneckerFisher
from engine.plan import plan as make_plan
from engine.plan.work import Sizes, planned, unlearning_work
from engine.run.setup import RunOptions, set_up


@pytest.mark.parametrize("method", list(list_methods()))
def test_every_method_can_be_planned(method: str) -> None:
    sizes = Sizes(forget=100, retain=900, test=50, ranks=1, batch=100)
    items = unlearning_work(COST, sizes, method, method_config(method), RunConfig())
    assert len({item.name for item in items}) == len(items)
    phases = planned(method, method_config(method), 100, 900, RunConfig()).phases()
    assert [item.name for item in items if item.name.endswith("phase")] == list(
        dict.fromkeys(f"{phase.name} phase" for phase in phases)
    )


# Fewer passes than the defaults, where these take long; options that the toy has too few samples for.
SHORT: dict[str, dict[str, Any]] = {
    "finetune": {"retain_epochs": 1.5},
    "influence": {"fisher_samples": 8, "solver_steps": 2},
    "razor": {"rounds": 1, "search_steps": 1},
    "gs_lora": {"retain_epochs": 1.5},
    "gs_lora_pp": {"retain_epochs": 1.5},
    "l1_sparse": {"retain_epochs": 1.5},
    "laf": {"forget_epochs": 1.5, "repair_epochs": 1},
    "lethe": {"forget_epochs": 1.5, "retain_epochs": 1},
    "neg_grad_plus": {"retain_epochs": 1.5},
    "scrub": {"forget_epochs": 1, "retain_epochs": 2},
    "scrub_r": {"forget_epochs": 1, "retain_epochs": 2, "alpha": 0.0},
    "lethe_plus": {"epochs": 1.5, "forget_passes": 3},
    "lotus": {"epochs": 2, "tolerance": 0.99},
    "ofmu": {"epochs": 0.6},
}
# Passes of the original and what they are called; those of others go through a model that is being changed.
TAUGHT = ("teacher outputs", "masks and teacher outputs", "prototypes", "bounds by held-out samples")
DATA = open_source("digits").train


@pytest.mark.parametrize(
    ("method", "pruning", "given"),
    [(name, "none", {}) for name in list_methods() if name not in ("retrain", "s3t")]
    + [(name, "seta", {}) for name in ("bad_teacher", "lethe_plus", "scrub", "sfron")]
    + [("lethe_plus", "none", {"small_share": 0.4, "small_steps": 2, "retain_batch": 9})],  # a small request
)
def test_steps_samples_and_teachers_are_those_of_a_run(method: str, pruning: str, given: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(get_method(method).Config)}
    options = {**SHORT.get(method, {"epochs": 1.5} if "epochs" in fields else {}), **given}
    run = {
        "batch_size": 8,
        "accumulation_steps": 2,
        "retain_share": 0.8,
        "retain_pruning": pruning,
        "collapse_drop": 100,
    }
    run |= {"accumulation_steps": 1} if method == "ofmu" else {}
    model, held_out = tiny_vit(), DATA.subset(range(90, 107))
    made = set_up(
        model,
        few(DATA, 13),
        DATA.subset(range(20, 70)),
        RunOptions(
            method=method,
            config={**options, **run, "precision": "fp32", "device": "cpu", "augment": "none"},
            validation=held_out,
        ),
    )
    asked = []
    made.teacher.register_forward_hook(lambda m, inputs, out: asked.append(len(inputs[0])))
    result = engine.run.unlearn._run(made, 0.0, None)
    sizes = Sizes(
        forget=13, retain=50, test=10, ranks=1, batch=8 * run["accumulation_steps"], image=(8, 8), held_out=17
    )
    config = method_config(method, **options)
    planned = unlearning_work(COST, sizes, method, config, build(RunConfig, {**run, "augment": "none"}))
    items = {item.name: item for item in planned}
    for name in {row["phase"] for row in result.history if "lr" in row}:
        steps = sum("lr" in row and row["phase"] == name for row in result.history)
        assert (items[f"{name} phase"].steps, items[f"{name} phase"].images) == (steps, result.samples_seen[name])
    assert sum(item.steps for item in planned) == sum("lr" in row for row in result.history)
    if method in ("lethe", "lethe_plus", "bad_teacher", "scrub", "scrub_r", "laf", "gs_lora", "gs_lora_pp"):
        told = sum(items[name].images for name in TAUGHT if name in items)
        told *= 2 if method == "lethe" else 1  # each image, and its masked copy
        assert sum(asked) == told + 17  # what is watched, before


def test_a_method_of_one_process_is_not_planned_for_several() -> None:
    with pytest.raises(UserError, match=r"method salun: .*; plan it for one GPU, without ZeRO"):
        make_plan("vit_tiny_patch16_224", images=10_000, forget_share=0.1, gpus=2, method="salun")


def test_memory_of_a_small_request_has_its_fisher_matrix() -> None:
    """The two eigenbases and the eigenvalues of each linear layer, as they are held."""
    model = tiny_vit()
    batch = Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    fisher = KroneckerFisher(copy.deepcopy(model), lambda: [batch])
    held = sum(
        tensor.numel() * tensor.element_size()
        for factors in fisher._factors.values()
        for tensor in (factors.inputs, factors.outputs, factors.values)
    )
    config, method = method_config("lethe_plus"), get_method("lethe_plus")
    assert method.held_bytes(config, model, 10, 990) == {"Fisher matrix": held}
    assert method.held_bytes(config, model, 100, 900) == {}
    totals = [
        make_plan(
            "vit_base_patch16_224",
            images=100_000,
            forget_share=0.001,
            method="lethe_plus",
            options={"small_share": share},
        ).memory.total()
        for share in (0.0, 0.0115)
    ]
    assert totals[1] - totals[0] > 1.5e9  # ViT-B: 12 blocks of 29.5 million numbers


@pytest.mark.parametrize(("images", "test_images"), [(1_281_167, 50_000), (10_000, 2_000)])
def test_test_images_follow_the_training_images(images: int, test_images: int) -> None:
    made = make_plan("vit_tiny_patch16_224", images=images, forget_share=0.1)
    assert made.setup["test_images"] == test_images
