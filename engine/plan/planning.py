"""plan(): the resources of an unlearning run, before it is started."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from engine.config import DEFAULT_METHOD, RunConfig, require, split_options
from engine.core.method import refuse_unfit
from engine.errors import UserError
from engine.methods import get_method
from engine.models.spec import ModelSpec
from engine.plan.cost import Cost, count_cost, count_parameters, on_meta
from engine.plan.host import measure_host
from engine.plan.memory import Memory, Run, Zero, count_memory
from engine.plan.proof import proof_work
from engine.plan.timing import Measured, measure_rates
from engine.plan.work import Sizes, Work, communication, phases_of, recipe, retraining_work, seconds_of, unlearning_work

GIB = 2**30
# Classes of an architecture, and test images at most, if no number is given: those of ImageNet.
_CLASSES, _TEST_IMAGES = 1000, 50_000

NOT_COUNTED = (
    "time: starting processes, reading the checkpoint and the data index, decoding where it is slower than the model, "
    "communication where it is not hidden, checkpoints to resume from",
    "memory: the CUDA context and libraries, what the GPU's allocator rounds up, decoding workers, decoded images that "
    "are kept, logits of the evaluation",
)
RESTRICTED = (
    "trainable: memory is counted as if all weights were trained, an upper bound except for the merged weights of "
    "lora:R, which a step holds once more"
)
MOST = "stop_when: the step at which it stops the run; steps, images and times are the most there can be"
NO_TIME = (
    "no time: give --throughput IMAGES_PER_SECOND_PER_GPU (training images, forward and backward), or --measure on the "
    "machine that will run it"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of `plan`; bytes, flops and seconds are plain numbers.

    Attributes:
        setup: The arguments, resolved.
        cost: Cost of one image.
        memory: Memory of one rank, by part.
        estimates: DeepSpeed's own estimate of the model's states, with its assumptions, or why there is none.
        communication: Bytes that a rank sends in a step, and the formula.
        work: Unlearn and retrain, item by item, with images, steps, flops, and seconds and money if a rate is given.
        share: Unlearning relative to retraining.
        shares: The same of each item of `work`.
        rate: The rates, and their source.
        capacity: Bytes of a GPU (of a rank, on the CPU), or None.
        fits: Whether the peak is within the capacity; None without a capacity.
        advice: Changes for a run that does not fit, with the total of each.
        notes: What is not counted.
    """

    setup: dict[str, Any]
    cost: Cost
    memory: Memory
    estimates: dict[str, Any]
    communication: dict[str, Any]
    work: dict[str, Any]
    share: dict[str, float]
    shares: dict[str, dict[str, float]]
    rate: dict[str, Any]
    capacity: int | None
    fits: bool | None
    advice: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `--json`."""
        memory = {
            "moment": self.memory.moment,
            "total": {"device": self.memory.total("device"), "host": self.memory.host_peak},
            "parts": [dataclasses.asdict(part) for part in self.memory.parts],
            "moments": self.memory.moments,
        }
        return {**dataclasses.asdict(self), "memory": memory}


def plan(
    architecture: str | ModelSpec,
    *,
    images: int,
    forget_share: float,
    test_images: int | None = None,
    gpus: int = 1,
    stage: int | None = None,
    offload: bool = False,
    deepspeed: Mapping[str, Any] | None = None,
    device: Literal["cpu", "cuda"] = "cuda",
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    retrain_recipe: str = "deit",
    retrain_epochs: float | None = None,
    throughput: float | None = None,
    measure: bool = False,
    capacity: int | None = None,
    price: float | None = None,
    pool_models: int | None = None,
    pool_share: float = 0.25,
) -> Plan:
    """Estimate memory, flops, bytes and time of unlearning, compared with a retrain.

    Needs neither data nor weights nor a GPU; takes a few seconds for ViT-L.

    Args:
        architecture, num_classes, model_args: The model, as in timm (num_classes: None: 1,000); or the spec of a
            checkpoint alone (`engine.models.spec.spec_of`).
        images: Training images.
        forget_share: Share of them that is forgotten.
        test_images: Test images; None: a fifth of the training images, 50,000 at most.
        gpus: Number of ranks.
        stage, offload: Of ZeRO; offload moves optimizer states to host memory, and weights too at stage 3.
        deepspeed: A DeepSpeed configuration, in place of stage and offload, with the sizes of its buckets.
        device: cpu adds the memory of a rank on the CPU besides tensors.
        method: Name of the method.
        options: Options of `RunConfig` and of the method by name, as in `engine.unlearn`.
        retrain_recipe, retrain_epochs: The retrain to compare with.
        throughput: Training images a second and GPU.
        measure: Time real steps on this machine instead.
        capacity: Bytes of a GPU (of a rank, on the CPU).
        price: Price of an hour of a GPU, in any currency.
        pool_models, pool_share: Models of a pool and the share of the samples that each lacks: its cost, that of a
            certificate, and that of a request's proof are added.

    Raises:
        UserError: The architecture is unknown, or numbers contradict each other.
    """
    zero = _zero(stage, offload, deepspeed)
    run, method_config = split_options(options or {}, get_method(method).Config)
    forget = round(images * forget_share)
    test_images = min(_TEST_IMAGES, round(images / 5)) if test_images is None else test_images
    require(device in ("cpu", "cuda"), "device", device, "cpu or cuda")
    _check_sizes(images, forget_share, forget, test_images, gpus)
    _check_rates(throughput, measure, price, capacity)
    why_one_process = get_method(method).why_one_process(method_config, forget, images - forget)
    _check_run(method, why_one_process, run, gpus, zero.stage)
    spec = _spec(architecture, num_classes, model_args)
    empty = on_meta(spec)
    refuse_unfit(get_method(method), empty)
    precision = "fp32" if run.precision == "auto" and device == "cpu" else run.precision.replace("auto", "bf16")
    attention = {"cuda": "sdpa", "cpu": "eager"}[device] if run.attention == "auto" else run.attention
    has_teacher = method == "lethe" and method_config.forget_epochs > 0
    job = Run(
        zero=zero,
        ranks=gpus,
        batch_size=run.batch_size,
        accumulation=run.accumulation_steps,
        bf16=precision == "bf16",
        deepspeed=gpus > 1 or zero.stage > 0,
        device=device,
        teacher=run.teacher if has_teacher else "none",
        augmented=has_teacher and method_config.augment_forget,
        contrast=method_config.contrast if has_teacher else "logits",
        forget=forget,
        watched=any(phase.guarded for phase in phases_of(method, method_config)),
        also=get_method(method).held_bytes(method_config, empty, forget, images - forget),
    )
    cost, host_results = _count(spec, job, attention, run.gradient_checkpointing, run.trainable)
    memory = count_memory(cost, job, host_results.get("baseline"))
    sizes = Sizes(
        forget=forget,
        retain=images - forget,
        test=test_images,
        ranks=gpus,
        batch=run.batch_size * run.accumulation_steps * gpus,
        image=cost.image,
    )
    chosen = recipe(retrain_recipe, retrain_epochs)
    work = {
        "unlearn": unlearning_work(cost, sizes, method, method_config, run),
        "retrain": retraining_work(cost, sizes, chosen["epochs"]),
    }
    if pool_models is not None:
        require(pool_models >= 1, "pool_models", pool_models, "at least 1")
        require(0 < pool_share < 1, "pool_share", pool_share, "between 0 and 1, both left out")
        work |= proof_work(cost, sizes, work["unlearn"], work["retrain"], pool_models, pool_share)
    measured = measure_rates(spec, method, options or {}, run.batch_size, device) if measure else None
    rate = _rate(throughput, measured)
    tables = {name: _table(items, cost, gpus, rate["rates"], price) for name, items in work.items()}
    fits = None if capacity is None else memory.total("device") <= capacity
    return Plan(
        setup={
            "architecture": spec.architecture,
            "method": method,
            "images": images,
            "forget": forget,
            "test_images": test_images,
            "gpus": gpus,
            "device": device,
            "precision": precision,
            "attention": attention,
            "gradient_checkpointing": run.gradient_checkpointing,
            "batch_size": run.batch_size,
            "accumulation_steps": run.accumulation_steps,
            "teacher": job.teacher,
            "zero": dataclasses.asdict(zero),
            "retrain": chosen,
            "price": price,
        },
        cost=cost,
        memory=memory,
        estimates=_estimates(zero, precision, host_results),
        communication=communication(
            cost, gpus, zero, 2 if job.bf16 and not job.by_autocast else 4, run.accumulation_steps
        ),
        work=tables,
        share=_share(tables, "unlearn"),
        shares={name: _share(tables, name) for name in tables if name != "retrain"},
        rate={key: value for key, value in rate.items() if key != "rates"} | {"images_per_second": rate["rates"]},
        capacity=capacity,
        fits=fits,
        advice=_advice(cost, job, spec, attention, run, memory, capacity, host_results.get("baseline"))
        if fits is False
        else [],
        notes=[
            *NOT_COUNTED,
            *([RESTRICTED] if run.trainable != "all" else []),
            *([MOST] if run.stop_when != "never" else []),
        ],
    )


def _spec(architecture: str | ModelSpec, num_classes: int | None, model_args: Mapping[str, Any] | None) -> ModelSpec:
    """Return the model of a plan; arguments as of `plan`."""
    if isinstance(architecture, str):
        classes = _CLASSES if num_classes is None else num_classes
        return ModelSpec(
            architecture=architecture, num_classes=classes, model_args=dict(model_args or {}), pretrained_cfg={}
        )
    if model_args or num_classes not in (None, architecture.num_classes):
        raise UserError(
            f"num_classes and model_args: the checkpoint, a {architecture.architecture} with "
            f"{architecture.num_classes} classes, defines the model; leave them out"
        )
    return architecture


def _zero(stage: int | None, offload: bool, deepspeed: Mapping[str, Any] | None) -> Zero:
    zero = Zero.read(deepspeed) if deepspeed else Zero(stage=stage or 0, overlap_comm=stage == 3)
    if deepspeed and stage is not None and stage != zero.stage:
        raise UserError(f"--stage {stage}: the DeepSpeed configuration has stage {zero.stage}; leave one out")
    if zero.stage not in (0, 1, 2, 3) or isinstance(zero.stage, bool):
        raise UserError(f"--stage {zero.stage}: expected a ZeRO stage, 0, 1, 2 or 3")
    if offload:
        zero = dataclasses.replace(zero, offload_optimizer=True, offload_param=zero.stage == 3)
    if (zero.offload_optimizer or zero.offload_param) and zero.stage < 2:
        raise UserError(
            f"--offload at stage {zero.stage}: optimizer states are moved to the host at stages 2 and 3; use --stage 2"
        )
    return zero


def _check_sizes(images: int, share: float, forget: int, test_images: int, gpus: int) -> None:
    require(images >= 2, "images", images, "at least 2 training images")
    require(0 < share < 1, "forget_share", share, "between 0 and 1, both left out")
    require(
        0 < forget < images, "forget_share", share, f"a share that forgets and keeps at least one of {images} images"
    )
    require(test_images >= 0, "test_images", test_images, "0 or more")
    require(gpus >= 1, "gpus", gpus, "at least 1")
    require(gpus <= forget, "gpus", gpus, f"no more than the {forget} images to forget, so that every rank has one")


def _check_rates(throughput: float | None, measure: bool, price: float | None, capacity: int | None) -> None:
    require(throughput is None or throughput > 0, "throughput", throughput, "above 0 images a second")
    require(price is None or price >= 0, "price", price, "0 or more")
    require(capacity is None or capacity > 0, "gpu_memory", capacity, "above 0")
    if measure and throughput is not None:
        raise UserError("--measure and --throughput both set the speed; leave one out")


def _check_run(method: str, why_one_process: str, run: RunConfig, gpus: int, stage: int) -> None:
    if why_one_process and (gpus > 1 or stage > 0):
        raise UserError(f"method {method}: {why_one_process}; plan it for one GPU, without ZeRO")
    if run.device != "auto":
        raise UserError(f"option device={run.device!r}: a plan takes --device cuda or cpu")
    if run.teacher == "sharded" and (gpus == 1 or stage != 3):
        raise UserError("option teacher='sharded': needs ZeRO stage 3 and several ranks; use teacher=replicated")


def _count(
    spec: ModelSpec, job: Run, attention: str, checkpointing: bool, trainable: str
) -> tuple[Cost, dict[str, Any]]:
    """Return the cost of a pass, and the results of a process with DeepSpeed that runs at the same time."""
    baseline = job.device == "cpu"
    if job.zero.stage < 2 and not baseline:
        return _pass(spec, job, attention, checkpointing, trainable), {}
    parameters, largest = count_parameters(spec)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        host_results = pool.submit(
            measure_host,
            parameters=parameters,
            largest_layer=largest,
            gpus=job.ranks,
            zero=job.zero,
            deepspeed=job.deepspeed,
            baseline=baseline,
        )
        return _pass(spec, job, attention, checkpointing, trainable), host_results.result()


def _pass(spec: ModelSpec, job: Run, attention: str, checkpointing: bool, trainable: str = "all") -> Cost:
    return count_cost(
        spec,
        precision="bf16" if job.bf16 else "fp32",
        autocast=job.by_autocast,
        checkpointing=checkpointing,
        trainable=trainable,
        # Fused attention saves the same tensors in every implementation.
        attention="eager" if attention == "eager" else "sdpa",
    )


def _estimates(zero: Zero, precision: str, host_results: Mapping[str, Any]) -> dict[str, Any]:
    if zero.stage < 2:
        return {"missing": "DeepSpeed has estimators for ZeRO-2 and ZeRO-3 alone"}
    found = dict(host_results["estimates"])
    if "missing" in found:
        return {
            "missing": f"deepspeed is not installed ({found['missing']}); pip install 'lethe-unlearning[distributed]'"
        }
    return {
        **found,
        "assumes": "weights, gradients and optimizer states alone; half-precision weights"
        + (" (this run has float32 ones)" if precision == "fp32" else "")
        + ", 18 bytes a parameter shared out, the whole model built on every rank of a node, host memory x 1.5; no "
        "activations, buckets or teacher",
    }


def _share(tables: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return an item relative to the retrain, by flops and, if there is a rate, by seconds."""
    mine, whole = tables[name]["total"], tables["retrain"]["total"]
    return {key: mine[key] / whole[key] for key in ("flops", "seconds") if whole.get(key)}


def _rate(throughput: float | None, measured: Measured | None) -> dict[str, Any]:
    if measured is not None:
        return {"rates": measured.rates, "source": measured.words}
    if throughput is not None:
        words = f"stated: {throughput:g} training images a second and GPU; other passes by their flops"
        return {"rates": {"training": throughput}, "source": words}
    return {"rates": {}, "source": NO_TIME}


def _table(items: list[Work], cost: Cost, gpus: int, rates: Mapping[str, float], price: float | None) -> dict[str, Any]:
    """Return the items and their total, with GPU-hours and money if there is a rate."""
    seconds = seconds_of(items, cost, gpus, rates) if rates else {}
    rows = [{**dataclasses.asdict(item), **({"seconds": seconds[item.name]} if seconds else {})} for item in items]
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in ("images", "steps", "flops")}
    if seconds:
        total["seconds"] = sum(seconds.values())
        total["gpu_hours"] = total["seconds"] * gpus / 3600
        if price is not None:
            total["money"] = total["gpu_hours"] * price
    return {"items": rows, "total": total}


def _advice(
    cost: Cost,
    job: Run,
    spec: ModelSpec,
    attention: str,
    run: RunConfig,
    memory: Memory,
    capacity: int | None,
    baseline: int | None,
) -> list[dict[str, Any]]:
    """Return single changes that need less memory, each with its total; all of them together as the last."""
    assert capacity is not None
    checkpointed = cost if run.gradient_checkpointing else _pass(spec, job, attention, True)
    changes: list[tuple[str, Run, Cost]] = []
    if not run.gradient_checkpointing:
        changes.append(("--gradient-checkpointing", job, checkpointed))
    for stage in range(job.zero.stage + 1, 4):
        if job.ranks > 1:
            changes.append((f"--stage {stage}", _with(job, stage=stage), cost))
    if job.zero.stage >= 2 and not job.zero.offload_optimizer and job.device == "cuda":
        changes.append(("--offload", _with(job, offload_optimizer=True, offload_param=job.zero.stage == 3), cost))
    batch = job.batch_size
    while batch > 1:
        batch //= 2
        smaller = dataclasses.replace(job, batch_size=batch)
        if count_memory(cost, smaller, baseline).total("device") <= capacity or batch == 1:
            changes.append((f"--batch-size {batch} (and --accumulation to keep the step)", smaller, cost))
            break
    least = dataclasses.replace(_with(job, stage=3, offload_optimizer=True, offload_param=True), batch_size=1)
    if job.ranks > 1:
        changes.append(("--stage 3 --offload --gradient-checkpointing --batch-size 1", least, checkpointed))
    advice = []
    for words, changed, its_cost in changes:
        total = count_memory(its_cost, changed, baseline).total("device")
        if total < memory.total("device"):
            advice.append({"change": words, "total": total, "fits": total <= capacity})
    return advice


def _with(job: Run, **changed: Any) -> Run:
    return dataclasses.replace(job, zero=dataclasses.replace(job.zero, **changed))
