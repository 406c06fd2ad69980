"""lethe plan: bytes against what torch really keeps, flops against the formula, steps against a real run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import TINY, few, tiny_vit

from engine import plan as plan_package
from engine.cli import app as cli
from engine.config import RunConfig
from engine.data import open_source
from engine.errors import UserError
from engine.models.attention import attention_backend
from engine.models.spec import ModelSpec
from engine.models.vit import describe
from engine.plan import Plan, planning, timing
from engine.plan import cost as cost_module
from engine.plan import plan as make_plan
from engine.plan.cost import Bytes, Cost, count_cost
from engine.plan.host import measure_host
from engine.plan.memory import Memory, Run, Zero
from engine.plan.timing import measure_rates
from engine.plan.work import (
    Sizes,
    communication,
    recipe,
    retraining_work,
    seconds_of,
    unlearning_work,
)
from engine.run.unlearn import unlearn

MIB = 2**20
SMALL = {**TINY, "embed_dim": 64, "depth": 4}  # deep enough that saved tensors outweigh temporaries
P, N = 1_000_000, 4
COST = Cost(
    parameters=P,
    largest_layer=100_000,
    outputs=10,
    features=32,
    activations=Bytes(1_000, 500),
    guided=Bytes(100, 50),
    forward_flops=100,
    backward_flops=200,
    rollout_flops=7,
)
PLAIN = {
    "precision": "fp32",
    "autocast": False,
    "checkpointing": False,
    "attention": "sdpa",
}


_COUNTED: dict[str, Cost] = {}


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of one architecture count it once: it takes most of their time."""

    def once(model: ModelSpec, **given: Any) -> Cost:
        key = repr((model, sorted(given.items())))
        if key not in _COUNTED:
            _COUNTED[key] = count_cost(model, **given)
        return _COUNTED[key]

    monkeypatch.setattr(planning, "count_cost", once)


def spec(**args: object) -> ModelSpec:
    return ModelSpec(
        architecture="vit_tiny_patch16_224", num_classes=10, model_args={**SMALL, **args}, pretrained_cfg={}
    )


def job(zero: Zero | None = None, **changed: Any) -> Run:
    given: dict[str, Any] = {
        "zero": zero or Zero(),
        "ranks": N,
        "batch_size": 8,
        "accumulation": 1,
        "bf16": True,
        "deepspeed": True,
        "device": "cuda",
        "teacher": "replicated",
        "augmented": False,
        "contrast": "logits",
        "forget": 30,
        "watched": True,
    }
    return Run(**{**given, **changed})


def sizes_of(memory: Memory) -> dict[str, int]:
    return {part.name: part.bytes for part in memory.parts}


def tiny_plan(**changed: Any) -> Plan:
    options = {"batch_size": 8, "precision": "bf16", **changed.pop("options", {})}
    given = {"images": 1000, "forget_share": 0.1, "test_images": 200, "num_classes": 10, "model_args": TINY}
    return make_plan("vit_tiny_patch16_224", options=options, **{"method": "lethe", **given, **changed})


# What one pass takes


def saved_bytes(batch: int, dtype: torch.dtype, attention: str) -> int:
    """Bytes that a real forward pass keeps for backward, weights left out."""
    model = tiny_vit(**SMALL).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, labels = torch.randn(batch, 1, 8, 8, dtype=dtype), torch.zeros(batch, dtype=torch.long)
    with attention_backend(model, attention), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model.train()(images).float(), labels)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_activations_are_what_a_real_pass_keeps(precision: str, dtype: torch.dtype, attention: str) -> None:
    counted = count_cost(spec(), **{**PLAIN, "precision": precision, "attention": attention})
    for batch in (1, 6, 32):
        kept = saved_bytes(batch, dtype, attention)
        assert kept <= counted.activations.at(batch) <= 1.2 * kept + counted.activations.fixed


@pytest.mark.slow
def test_bytes_are_a_line_that_goes_through_other_batches() -> None:
    counted = count_cost(spec(), **PLAIN)
    model = ModelSpec(architecture="vit_tiny_patch16_224", num_classes=10, model_args=SMALL, pretrained_cfg={})
    info = describe(model.build())
    for batch in (2, 9):
        activations, guided = cost_module._bytes(model, info, batch, "fp32", False, False, "sdpa")
        assert counted.activations.at(batch) == pytest.approx(activations, rel=0.01)
        assert counted.guided.at(batch) == pytest.approx(guided, rel=0.01)
    maps = 4 * 2 * 17 * 17 * 4  # blocks x heads x tokens^2 x float32, which fused attention does not keep
    explicit = count_cost(spec(), **{**PLAIN, "attention": "eager"})
    assert explicit.activations.per_image - counted.activations.per_image > 0.9 * maps


@pytest.mark.slow
def test_checkpointing_autocast_and_the_teacher_take_what_they_should() -> None:
    plain = count_cost(spec(), **PLAIN)
    checkpointed = count_cost(spec(), **{**PLAIN, "checkpointing": True})
    autocast = count_cost(spec(), **{**PLAIN, "precision": "bf16", "autocast": True})
    half = count_cost(spec(), **{**PLAIN, "precision": "bf16"})
    assert checkpointed.activations.at(32) < 0.4 * plain.activations.at(32)
    # Blocks are computed again but for what nothing waits for, their last linear layer.
    again = checkpointed.backward_flops - plain.backward_flops
    assert 0.5 * plain.forward_flops < again < plain.forward_flops
    # Half-precision copies of the weights of linear layers, which are nearly all.
    assert autocast.activations.fixed - half.activations.fixed == pytest.approx(2 * plain.parameters, rel=0.1)
    tokens, width, depth = 17, 64, 4
    assert plain.guided.per_image > 4 * depth * 3 * tokens * width  # q, k (and v, of the same storage) of all blocks
    assert plain.guided.at(8) < plain.activations.at(8)


def test_flops_are_those_of_the_formula() -> None:
    counted = count_cost(spec(), **PLAIN)
    n, d, depth, patch = 17, 64, 4, 2 * 2 * 1
    block = 2 * n * d * 3 * d + 2 * (2 * n * n * d) + 2 * n * d * d + 2 * (2 * n * d * 4 * d)
    assert counted.forward_flops == 2 * 16 * patch * d + depth * block + 2 * d * 10
    # Twice as much backward, but for the gradient of the image.
    assert counted.backward_flops == 2 * counted.forward_flops - 2 * 16 * patch * d
    assert counted.rollout_flops == depth * 2 * n * n * d
    assert counted.parameters == sum(p.numel() for p in tiny_vit(**SMALL).parameters())
    assert counted.largest_layer == max(d * 4 * d + 4 * d, 4 * d * d + d)


@pytest.mark.slow
def test_a_windowed_model_can_be_planned() -> None:
    small = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    swin = ModelSpec(architecture="swin_tiny_patch4_window7_224", num_classes=5, model_args=small, pretrained_cfg={})
    counted = count_cost(swin, **PLAIN)
    assert counted.forward_flops > 0
    assert counted.activations.per_image > counted.guided.per_image > 0


def test_a_model_without_checkpointing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(tiny_vit()), "set_grad_checkpointing")
    with pytest.raises(UserError, match="has no gradient checkpointing"):
        count_cost(spec(), **{**PLAIN, "checkpointing": True})


# What is computed, sent and waited for

SIZES = Sizes(forget=30, retain=170, test=40, ranks=2, batch=8)


def method_config(method: str = "lethe", **options: Any) -> Any:
    from engine.config import build
    from engine.methods import get_method

    return build(get_method(method).Config, options)


def test_steps_and_images_are_those_of_a_real_run() -> None:
    source = open_source("digits")
    forget, retain = few(source.train, 30), source.train.subset(range(30, 200))
    options = {"forget_epochs": 1.5, "retain_epochs": 2, "batch_size": 8, "device": "cpu", "augment": "none"}
    result = unlearn(tiny_vit(), forget, retain, method="lethe", config=options, validation=few(source.test, 20))
    steps = {row["phase"]: row["step"] + 1 for row in result.history if "step" in row and "event" not in row}
    planned = unlearning_work(COST, SIZES, "lethe", method_config(forget_epochs=1.5, retain_epochs=2), RunConfig())
    items = {item.name: item for item in planned}
    for phase in ("forget", "retain"):
        assert items[f"{phase} phase"].steps == steps[phase]
        assert abs(items[f"{phase} phase"].images - result.samples_seen[phase]) <= 8  # a part of an epoch ends a batch
    watches = 2 + sum("watched_accuracy" in row for row in result.history)
    assert items["watched accuracy"].images == 40 * watches  # the plan's test set is larger


def test_everything_that_is_waited_for_is_counted() -> None:
    items = {item.name: item for item in unlearning_work(COST, SIZES, "lethe", method_config(), RunConfig())}
    assert items["masks and teacher outputs"].flops == 30 * (2 * 100 + 7)
    assert items["forget phase"].flops == 2 * 30 * 300
    assert items["retain phase"].flops == 8 * 170 * 300
    assert items["evaluation of the original and the result"].flops == 2 * (30 + 170 + 40) * 100
    again = {i.name: i for i in unlearning_work(COST, SIZES, "lethe", method_config(augment_forget=True), RunConfig())}
    assert again["masks and teacher outputs"].images == 2 * 30  # in every epoch
    short = {i.name: i for i in unlearning_work(COST, SIZES, "lethe", method_config(), RunConfig(max_steps=3))}
    assert (short["retain phase"].steps, short["retain phase"].images) == (3, 24)
    training, evaluation = retraining_work(COST, SIZES, 300)
    assert (training.images, training.steps, training.flops) == (300 * 170, 300 * math.ceil(170 / 8), 300 * 170 * 300)
    assert evaluation.images == 240


@pytest.mark.parametrize(("method", "phases"), [("finetune", ["retain phase"]), ("random_labels", ["forget phase"])])
def test_other_methods_have_their_own_phases_and_no_teacher(method: str, phases: list[str]) -> None:
    items = {i.name: i for i in unlearning_work(COST, SIZES, method, method_config(method), RunConfig())}
    assert [name for name in items if name.endswith("phase")] == phases
    assert "masks and teacher outputs" not in items
    if method == "random_labels":
        assert items["forget phase"].images == 10 * 200  # forget and retained samples together


def test_seconds_come_of_one_rate_by_flops_or_of_a_rate_each() -> None:
    work = unlearning_work(COST, SIZES, "lethe", method_config(), RunConfig())
    stated = seconds_of(work, COST, 2, {"training": 5.0})
    assert stated["retain phase"] == 8 * 170 / (5.0 * 2)
    assert stated["evaluation of the original and the result"] == pytest.approx(480 / 3 / (5.0 * 2))
    measured = seconds_of(work, COST, 2, {"training": 5.0, "teacher": 4.0, "forget": 2.0})
    assert measured["masks and teacher outputs"] == 30 / (4.0 * 2)
    assert measured["forget phase"] == 60 / (2.0 * 2)
    assert measured["retain phase"] == stated["retain phase"]


@pytest.mark.parametrize(("stage", "once", "thrice"), [(0, 2, 2), (1, 3, 3), (2, 3, 7), (3, 3, 9)])
def test_bytes_sent_by_stage(stage: int, once: int, thrice: int) -> None:
    for accumulation, multiple in ((1, once), (3, thrice)):
        sent = communication(COST, N, Zero(stage=stage), 2, accumulation)
        assert sent["bytes_per_step"] == multiple * 2 * P * (N - 1) / N
    assert communication(COST, 1, Zero(stage=stage), 2, 1)["bytes_per_step"] == 0


def test_recipes() -> None:
    assert recipe("deit", None)["epochs"] == 300
    assert recipe("plain-vit", None)["epochs"] == 90
    assert recipe("deit", 100)["source"] == "epochs stated by the user"
    assert recipe("ours", 50)["epochs"] == 50
    with pytest.raises(UserError, match="its epochs are not known; give --retrain-epochs, or take one of deit"):
        recipe("ours", None)


def test_rates_are_measured_by_the_engine_itself() -> None:
    model = ModelSpec(architecture="vit_tiny_patch16_224", num_classes=10, model_args=TINY, pretrained_cfg={})
    measured = measure_rates(model, "lethe", {"precision": "fp32"}, 4, "cpu")
    assert set(measured.rates) == {"forget", "retain", "teacher", "forward", "training"}
    assert all(0 < rate < 1e7 for rate in measured.rates.values())
    assert measured.rates["training"] == measured.rates["retain"]
    assert "measured here on the CPU" in measured.words
    alone = measure_rates(model, "finetune", {"precision": "fp32", "retain_epochs": 0.5}, 2, "cpu")
    assert set(alone.rates) == {"retain", "forward", "training"}


def test_what_starts_a_run_is_not_in_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 seconds of start-up and warming up in each phase, 2 seconds a step, 1 second a teacher image."""

    asked: list[dict[str, Any]] = []

    def pretended(model: object, forget: Any, retain: object, *, config: dict[str, Any], **rest: object) -> Any:
        asked.append(config)
        seconds = 10.0 + 2.0 * config["max_steps"]
        return SimpleNamespace(
            seconds={"prepare": float(len(forget)), "forget_phase": seconds, "retain_phase": 2 * seconds}
        )

    monkeypatch.setattr(timing, "unlearn", pretended)
    rates = measure_rates(spec(), "lethe", {}, 4, "cpu").rates
    assert (rates["forget"], rates["retain"], rates["teacher"]) == (4 / 2, 4 / 4, 1.0)
    measure_rates(spec(), "lethe", {"forget_epochs": 0}, 4, "cpu")
    assert (asked[0]["forget_epochs"] > 0, asked[-1]["forget_epochs"]) == (True, 0)  # what is left out stays out


# All of it


def test_the_plan_of_a_gpu_run() -> None:
    made = tiny_plan(gpus=2, stage=1, throughput=10.0, price=3.0, capacity=2**30)
    numbers = json.loads(json.dumps(made.to_dict()))  # plain values
    assert numbers["setup"]["forget"] == 100
    assert numbers["memory"]["total"]["device"] == sum(
        part["bytes"] for part in numbers["memory"]["parts"] if part["place"] == "device"
    )
    unlearning, retraining = numbers["work"]["unlearn"]["total"], numbers["work"]["retrain"]["total"]
    assert unlearning["seconds"] == pytest.approx(sum(i["seconds"] for i in numbers["work"]["unlearn"]["items"]))
    assert unlearning["gpu_hours"] == pytest.approx(unlearning["seconds"] * 2 / 3600)
    assert unlearning["money"] == pytest.approx(3.0 * unlearning["gpu_hours"])
    assert numbers["share"]["seconds"] == pytest.approx(unlearning["seconds"] / retraining["seconds"])
    assert retraining["seconds"] == pytest.approx(300 * 900 / 20 + 1200 / 3 / 20, rel=0.01)
    assert numbers["fits"] is True
    assert numbers["advice"] == []
    assert numbers["estimates"] == {"missing": "DeepSpeed has estimators for ZeRO-2 and ZeRO-3 alone"}


def test_without_a_rate_there_is_no_time() -> None:
    made = tiny_plan()
    assert "seconds" not in made.work["unlearn"]["total"]
    assert set(made.share) == {"flops"}
    assert "--throughput" in made.rate["source"]
    assert made.fits is None


def test_what_would_fit_is_said() -> None:
    fitting = tiny_plan(gpus=2, options={"batch_size": 32, "precision": "fp32"})
    made = tiny_plan(
        gpus=2, options={"batch_size": 32, "precision": "fp32"}, capacity=fitting.memory.total("device") - 1
    )
    assert made.fits is False
    changes = {change["change"].split(" (")[0]: change for change in made.advice}
    assert changes["--gradient-checkpointing"]["fits"]
    assert changes["--batch-size 16"]["fits"]
    assert all(change["total"] < made.memory.total("device") for change in made.advice)
    smaller = tiny_plan(gpus=2, options={"batch_size": 16, "precision": "fp32"})
    assert changes["--batch-size 16"]["total"] == smaller.memory.total("device")


@pytest.mark.slow
def test_the_setup_reaches_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def answer(**given: Any) -> dict[str, Any]:
        asked.update(given)
        return {"baseline": 50 * MIB, "estimates": {"host": 7, "gpu": 5}}

    monkeypatch.setattr(planning, "measure_host", answer)
    made = tiny_plan(gpus=2, stage=3, offload=True, device="cpu", options={"precision": "fp32", "batch_size": 2})
    assert asked["zero"] == Zero(stage=3, offload_optimizer=True, offload_param=True, overlap_comm=True)
    assert (asked["gpus"], asked["baseline"], asked["deepspeed"]) == (2, True, True)
    assert asked["parameters"] == made.cost.parameters
    assert sizes_of(made.memory)["interpreter and libraries"] == 50 * MIB
    assert made.setup["attention"] == "eager"
    assert made.estimates["gpu"] == 5
    assert "this run has float32 ones" in made.estimates["assumes"]
    monkeypatch.setattr(
        planning, "measure_host", lambda **given: {"estimates": {"missing": "No module named 'deepspeed'"}}
    )
    absent = tiny_plan(gpus=2, deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}})
    assert "pip install 'lethe-unlearning[distributed]'" in absent.estimates["missing"]
    assert sizes_of(absent.memory)["reduce bucket"] == 2 * 1000
    moved = tiny_plan(gpus=2, stage=2, offload=True)
    assert (moved.setup["zero"]["offload_optimizer"], moved.setup["zero"]["offload_param"]) == (True, False)
    augmented = tiny_plan(options={"augment_forget": True, "attention": "xformers"})
    assert "teacher" in sizes_of(augmented.memory)
    assert "teacher outputs" not in sizes_of(augmented.memory)
    steps = {
        i["name"]: i["steps"] for i in tiny_plan(gpus=2, options={"accumulation_steps": 3}).work["unlearn"]["items"]
    }
    assert steps["retain phase"] == 8 * math.ceil(900 / (8 * 3 * 2))
    checkpointed = tiny_plan(options={"gradient_checkpointing": True})
    assert checkpointed.cost.activations.at(8) < tiny_plan().cost.activations.at(8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage": 4}, "--stage 4: expected a ZeRO stage, 0, 1, 2 or 3"),
        ({"stage": -1}, "--stage -1"),
        ({"stage": 1, "offload": True}, "--offload at stage 1.*use --stage 2"),
        ({"stage": 1, "deepspeed": {"zero_optimization": {"stage": 2}}}, "the DeepSpeed configuration has stage 2"),
        ({"forget_share": 0.0}, "forget_share=0.0: expected between 0 and 1"),
        ({"forget_share": 1.0}, "forget_share=1.0: expected between 0 and 1"),
        ({"forget_share": 0.0001}, "forgets and keeps at least one of 1000 images"),
        ({"images": 1}, "images=1"),
        ({"gpus": 0}, "gpus=0"),
        ({"gpus": 101}, "gpus=101: expected no more than the 100 images to forget"),
        ({"test_images": -1}, "test_images"),
        ({"device": "tpu"}, "device='tpu': expected cpu or cuda"),
        ({"throughput": 0.0}, "throughput"),
        ({"price": -1.0}, "price"),
        ({"capacity": 0}, "gpu_memory"),
        ({"throughput": 1.0, "measure": True}, "--measure and --throughput"),
        ({"options": {"teacher": "sharded"}, "stage": 3}, "needs ZeRO stage 3 and several ranks"),
        ({"options": {"teacher": "sharded"}, "gpus": 2, "stage": 2}, "needs ZeRO stage 3 and several ranks"),
        ({"options": {"device": "cpu"}}, "a plan takes --device"),
        ({"options": {"colour": 1}}, "unknown option 'colour'"),
        ({"method": "lehte"}, "did you mean 'lethe'"),
        ({"model_args": {"colour": 1}}, "refuses its model_args"),
        ({"retrain_recipe": "ours"}, "its epochs are not known"),
    ],
)
def test_contradictions_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_plan(**changed)


@pytest.mark.parametrize(("name", "message"), [("vit_tinny_patch16_224", "did you mean"), ("resnet18", "not a Vision")])
def test_unknown_architectures_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(name, images=100, forget_share=0.5, method="lethe", options={"batch_size": 2})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_measuring_where_there_is_no_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="0 CUDA devices were found"):
        tiny_plan(measure=True)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def lethe(*arguments: str) -> tuple[int, str, str]:
        model = [text for key, value in TINY.items() for text in ("--model-arg", f"{key}={value}")]
        monkeypatch.setattr(
            sys, "argv", ["lethe", "plan", "--method", "lethe", "--arch", "vit_tiny_patch16_224", *model, *arguments]
        )
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    code, out, err = lethe(
        *("--images", "2000", "--gpus", "2", "--batch-size", "4", "--accumulation", "2", "--precision", "fp32"),
        *("--deepspeed", str(tmp_path / "ds.json"), "--throughput", "20", "--price", "2", "--gpu-memory", "0.0001"),
        *("--set", "forget_epochs=3", "--retrain-epochs", "90", "--json", str(tmp_path / "plan.json")),
    )
    assert code == 0, err
    numbers = json.loads((tmp_path / "plan.json").read_text())
    setup = numbers["setup"]
    assert (setup["batch_size"], setup["accumulation_steps"], setup["precision"]) == (4, 2, "fp32")
    assert setup["zero"]["stage"] == 1
    assert {i["name"]: i["images"] for i in numbers["work"]["unlearn"]["items"]}["forget phase"] == 3 * 200
    for words in (
        "DOES NOT FIT",
        "--gradient-checkpointing",
        "optimizer state",
        "retain phase",
        "GPU-hours",
        "price",
        "epochs stated by the user",
        "not counted, time",
        "DeepSpeed's own estimator",
    ):
        assert words in out
    code, out, _ = lethe("--images", "2000", "--batch-size", "4", "--gpu-memory", "10")
    assert code == 0
    assert "FITS" in out
    assert "no time: give --throughput" in out
    code, _, err = lethe("--images", "2000", "--stage", "7")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.minutes
def test_a_process_answers_what_it_holds_and_what_deepspeed_estimates() -> None:
    pytest.importorskip("deepspeed")
    given: dict[str, Any] = {"parameters": P, "largest_layer": 1000, "gpus": 16, "deepspeed": True}
    found = measure_host(zero=Zero(stage=2), baseline=True, **given)
    assert 200 * MIB < found["baseline"] < 4000 * MIB
    assert found["estimates"] == {"gpu": 2 * P + 18 * P // 16, "host": 48 * P}  # 4 bytes x 8 GPUs of a node x 1.5
    third = measure_host(zero=Zero(stage=3, offload_optimizer=True, offload_param=True), baseline=False, **given)
    assert "baseline" not in third
    assert third["estimates"]["gpu"] == 4 * 1000


def test_the_package_gives_plan_alone() -> None:
    assert plan_package.plan is make_plan
    assert cost_module.count_cost is count_cost
