"""The curves of `python -m bench unlearn`: quantities, sizes, and expected exponents."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.cases import TINY, YARDSTICK, Model, ScalingCase, StepCase
from bench.harness.launched import Launched, require_good, unlearn_arguments
from bench.harness.measure import middle, peak_bytes, race, turns
from bench.kernel_speed.kernels import SHARE, TEMPERATURE, _pairs
from bench.training_cost.steps import EngineStep, digits
from engine.data import Samples, open_source, read_forget_request
from engine.data.sampling import Sampler, epoch_order
from engine.errors import UserError
from engine.models.attention import capture_queries_keys
from engine.models.attention_masking import count_masked, mask_and_outputs
from engine.models.checkpoint import save_checkpoint
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import attention_info
from engine.models.xformers_attention import resolve_attention
from engine.plan.cost import Cost, count_cost
from engine.run.unlearn import unlearn
from engine.run.zero import require_deepspeed
from lethe_kernels import attention_rollout, info_nce, resolve_backend
from lethe_kernels.rollout import attention_rollout_reference

TOLERANCE = 0.25
FLAT = 0.15  # tolerance of what must not grow at all
SECONDS = 60.0  # time limit of one set of sizes; at least three rounds are measured
FORGET_PART = 10  # one sample in so many is forgotten where requests are matched
STEPS = 20  # of a run whose cost must not grow with the data
RANK_STEPS = 8  # of each phase, where ranks are compared
WIDTH = 256  # of the features that InfoNCE contrasts

# Reports of the calls, of each size the rounds.
Reports = list[list[Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """exponent: of all sizes. largest: of the two largest sizes alone.

    uncertainty: the furthest that a single round's exponent, or the exponent without one of the sizes, lies from it.
    """

    exponent: float
    uncertainty: float
    largest: float


def fit(sizes: Sequence[float], values: Sequence[Sequence[float]]) -> Fit:
    """Exponent of values ~ size^exponent, by least squares through the logarithms of the medians.

    values: the rounds of each size, all above 0. sizes: two or more, ascending. Raises ValueError for others.
    """
    if len(sizes) < 2 or len(sizes) != len(values) or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            f"fit: {len(values)} values at sizes {list(sizes)}, expected one each of two or more, ascending"
        )
    if not all(value > 0 for rounds in values for value in rounds):
        raise ValueError("fit: a value is not above 0, so it has no logarithm")
    typical = [middle(rounds) for rounds in values]
    exponent = _slope(sizes, typical)
    others = [_slope(sizes, each) for each in zip(*values, strict=True)]
    if len(sizes) > 2:
        without = [[i for i in range(len(sizes)) if i != left_out] for left_out in range(len(sizes))]
        others += [_slope([sizes[i] for i in kept], [typical[i] for i in kept]) for kept in without]
    uncertainty = max(abs(other - exponent) for other in others)
    return Fit(exponent, uncertainty, _slope(sizes[-2:], typical[-2:]))


def _slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A cost at some sizes. values: the rounds of each size. expected: its exponent; why: the reason for that exponent.

    note: further information about the values.
    """

    name: str
    quantity: str
    variable: str
    sizes: Sequence[float]
    values: Sequence[Sequence[float]]
    expected: float
    why: str
    labels: Sequence[str] = ()
    tolerance: float = TOLERANCE
    note: str = ""

    def judged(self, section: str) -> dict[str, Any]:
        """Return the curve with its fit and verdict, as in the JSON."""
        found = fit(self.sizes, self.values)
        off, growth = found.exponent - self.expected, found.largest - self.expected
        return {
            "section": section,
            **dataclasses.asdict(self),
            "labels": list(self.labels or (f"{each:,}" for each in self.sizes)),
            "exponent": found.exponent,
            "uncertainty": found.uncertainty,
            "exponent_of_largest_two": found.largest,
            # Fixed costs flatten the curve at small sizes; an exponent that is too large shows at large ones.
            "within": abs(off) <= self.tolerance and growth <= self.tolerance,
        }


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and at which sizes the curves are measured."""

    device: torch.device
    quick: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sizes(self, case: ScalingCase) -> list[Any]:
        return list(case.quick if self.quick else case.sizes)

    def rounds(self, case: ScalingCase) -> int:
        return 1 if self.quick else case.rounds

    def batch(self, case: ScalingCase) -> int:
        return case.cuda_batch if self.cuda else case.batch

    def seconds(self, case: ScalingCase, calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
        """Return the seconds of every call in every round, after a call that does not count."""
        for call in calls:
            call()
        named = {str(number): call for number, call in enumerate(calls)}
        times = race(named, device=self.device, rounds=self.rounds(case), seconds=SECONDS)
        return [times[name] for name in named]

    def reports(self, case: ScalingCase, calls: Sequence[Callable[[], Mapping[str, float]]]) -> Reports:
        named = {str(number): call for number, call in enumerate(calls)}
        reports: dict[str, list[Mapping[str, float]]] = {name: [] for name in named}
        for name in turns(list(named), self.rounds(case), SECONDS):
            reports[name].append(named[name]())
        return list(reports.values())

    def peaks(self, calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
        """Return the tracked bytes of every call, once, because they do not vary."""
        return [[peak_bytes(call, self.device)] for call in calls]


def _part(reports: Reports, key: str) -> list[list[float]]:
    return [[values[key] for values in rounds] for rounds in reports]


class SkippedError(Exception):
    """A section that cannot run here; the message has the reason."""


# --- runs of the engine -----------------------------------------------------------------------------------------------


def _forget(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    sizes, retain = setting.sizes(case), synthetic(100)
    options = {"forget_epochs": 2, "retain_epochs": 1}
    reports = _runs(setting, case, [(synthetic(count), retain) for count in sizes], options)
    linear = functools.partial(Curve, quantity="seconds", variable="forget samples", sizes=sizes, expected=1)
    yield linear(
        name="teacher passes and masks",
        values=_part(reports, "prepare"),
        why="two passes of the original for each forget sample",
    )
    yield linear(name="forget phase", values=_part(reports, "forget_phase"), why="two epochs of steps")


def _retain(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    sizes, forget = setting.sizes(case), synthetic(10)
    options = {"forget_epochs": 0, "retain_epochs": 1}
    reports = _runs(setting, case, [(forget, synthetic(count)) for count in sizes], options)
    yield Curve(
        name="retain phase",
        quantity="seconds",
        variable="retain samples",
        sizes=sizes,
        values=_part(reports, "retain_phase"),
        expected=1,
        why="one epoch of steps",
    )


def _dataset(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    """Yield what must be linear, or not grow at all, if a run reads few of very many samples."""
    sizes = setting.sizes(case)
    sets = [synthetic(count) for count in sizes]
    linear = functools.partial(Curve, quantity="seconds", variable="samples", sizes=sizes, expected=1)
    with tempfile.TemporaryDirectory() as folder:
        matches = []
        for samples in sets:
            file = Path(folder, f"{len(samples)}.txt")
            file.write_text("".join(f"{sample_id}\n" for sample_id in samples.ids[::FORGET_PART]))
            matches.append(functools.partial(_match, file, samples))
        yield linear(
            name="forget request matched, data split",
            values=setting.seconds(case, matches),
            why=f"each id is hashed once, one in {FORGET_PART} looked up; the table outgrows the caches on the way",
            tolerance=2 * TOLERANCE,
        )
    yield linear(
        name="fingerprint of the ids",
        values=setting.seconds(case, [samples.fingerprint for samples in sets]),
        why="SHA-256 over each id and label",
    )
    yield linear(
        name="an epoch dealt out",
        values=setting.seconds(case, [functools.partial(_deal, count, setting.batch(case)) for count in sizes]),
        why="a permutation, the augmentation's draws, the slices of all steps",
    )
    options = {"forget_epochs": 0, "retain_epochs": 1, "max_steps": STEPS}
    reports = _runs(setting, case, [(synthetic(10), samples) for samples in sets], options)
    yield linear(
        name="set-up of a run",
        values=_part(reports, "set_up"),
        why="ids and labels are checked and hashed once",
    )
    yield Curve(
        name=f"retain phase of {STEPS} steps",
        quantity="seconds",
        variable="samples",
        sizes=sizes,
        values=_part(reports, "retain_phase"),
        expected=0,
        why="the same steps, and one permutation",
        tolerance=FLAT,
    )


def synthetic(count: int) -> Samples:
    """Return samples with ids of ImageNet's kind; their images are scikit-learn's digits, repeated."""
    images, labels = _digits(), np.arange(count) % 10
    ids = [f"n{label:08d}_{number}" for number, label in enumerate(labels.tolist())]
    return Samples(f"{count:,} samples", ids, labels, functools.partial(_cycled, images))


def _cycled(images: list[Tensor], index: int) -> Tensor:
    return images[index % len(images)]


@functools.cache
def _digits() -> list[Tensor]:
    """Return uint8 [3, H, W] at the input size of `TINY`: resized once, so that no curve includes decoding."""
    train, preprocessing = open_source("digits").train, preprocessing_of(TINY.spec().build(seed=0))
    return [preprocessing.resize(train.tensor(index, 3)) for index in range(len(train))]


def _match(file: Path, samples: Samples) -> tuple[Samples, Samples]:
    return read_forget_request(str(file), samples).split(samples)


def _deal(count: int, batch: int) -> None:
    order, _ = epoch_order(0, 0, count, 5)
    for _ in Sampler(count, batch).slices(order):
        pass


def _runs(
    setting: Setting, case: ScalingCase, sets: Sequence[tuple[Samples, Samples]], options: Mapping[str, Any]
) -> Reports:
    """Return the seconds by part of `engine.unlearn` on each (forget, retain).

    The part set_up is all except prepare and phases.
    """
    model, watched = TINY.spec().build(seed=0), synthetic(20)  # few are watched: the same work for every size
    config = {"device": str(setting.device), "precision": "fp32", "batch_size": setting.batch(case), "workers": 0}
    config |= {"collapse_drop": 100, **options}  # a collapse would end the phase early

    def run(forget: Samples, retain: Samples) -> Mapping[str, float]:
        seconds = unlearn(model, forget, retain, method="lethe", config=config, validation=watched).seconds
        phases = sum(value for key, value in seconds.items() if key == "prepare" or key.endswith("_phase"))
        return {**seconds, "set_up": seconds["unlearn"] - phases}

    calls = [functools.partial(run, forget, retain) for forget, retain in sets]
    calls[0]()  # a process's first run also loads what it needs
    return setting.reports(case, calls)


# --- models and kernels -----------------------------------------------------------------------------------------------


def _resolution(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    models, batch = setting.sizes(case), setting.batch(case)
    built = [model.spec().build(seed=0).to(setting.device) for model in models]
    infos, costs = [attention_info(model) for model in built], [_cost(setting, model) for model in models]
    tokens = [info.num_patches + info.num_prefix_tokens for info in infos]
    labels = [f"{info.input_size[0]} px" for info in infos]
    curve = functools.partial(Curve, variable="tokens N", sizes=tokens, labels=labels)
    timed, tracked = functools.partial(curve, quantity="seconds"), functools.partial(curve, quantity="bytes")

    seconds, peaks = _steps(setting, case, models)
    yield timed(
        name="retain step",
        values=seconds,
        expected=_exponent(tokens, [cost.forward_flops + cost.backward_flops for cost in costs]),
        why="counted flops: linear layers N, attention N^2",
    )
    yield tracked(
        name="retain step, peak",
        values=peaks,
        expected=_exponent(tokens, [cost.activations.at(batch) for cost in costs]),
        why="counted activations, of explicit attention N^2" if not setting.cuda else "counted activations",
    )
    guided, rows, matrices = [], [], []
    for model_case, model, info in zip(models, built, infos, strict=True):
        images = _images(model_case, model, batch).to(setting.device)
        guided.append(functools.partial(mask_and_outputs, model, images, info, count_masked(info, SHARE)))
        with torch.no_grad(), capture_queries_keys(model) as (queries, keys):
            # On the CPU the eager path takes as many small maps at a time as fit its chunk: of one image, always one.
            model(images if setting.cuda else images[:1])
        rows.append(functools.partial(attention_rollout, queries, keys, num_prefix_tokens=info.num_prefix_tokens))
        matrices.append(functools.partial(attention_rollout_reference, queries, keys))
    yield timed(
        name="forward pass with masks",
        values=setting.seconds(case, guided),
        expected=_exponent(tokens, [cost.forward_flops + cost.rollout_flops for cost in costs]),
        why="counted flops of the pass and of the rollout's class row",
    )
    yield timed(
        name="rollout, class row",
        values=setting.seconds(case, rows),
        expected=2,
        why="2 L H N^2 d flops",
    )
    fused = resolve_backend("attention_rollout", "auto", setting.device) == "triton"
    yield tracked(
        name="rollout, class row, peak",
        values=setting.peaks(rows),
        expected=1 if fused else 2,
        why="the Triton kernel keeps rows of N" if fused else "the eager path keeps one layer's maps, H N^2",
    )
    yield timed(
        name="rollout, full matrix",
        values=setting.seconds(case, matrices),
        expected=_exponent(tokens, [_flops(call) for call in matrices]),
        why="counted flops: N^2 for the maps, N^3 for their product",
    )
    yield tracked(
        name="rollout, full matrix, peak",
        values=setting.peaks(matrices),
        expected=2,
        why="every layer's matrix, L N^2",
    )


def _model(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    models = setting.sizes(case)
    costs = [_cost(setting, model) for model in models]
    seconds, _ = _steps(setting, case, models)
    yield Curve(
        name="retain step",
        quantity="seconds",
        variable="flops a step",
        sizes=[setting.batch(case) * (cost.forward_flops + cost.backward_flops) for cost in costs],
        labels=[model.name for model in models],
        values=seconds,
        expected=1,
        why="counted flops; small models compute fewer a second",
    )


def _info_nce(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    sizes = setting.sizes(case)
    calls = [functools.partial(_contrast, *_pairs(batch, WIDTH, setting.device, torch.float32)) for batch in sizes]
    curve = functools.partial(Curve, variable="batch B", sizes=sizes)
    yield curve(
        name="InfoNCE, forward and backward",
        quantity="seconds",
        values=setting.seconds(case, calls),
        expected=2,
        why="B^2 similarities",
    )
    yield curve(
        name="InfoNCE, forward and backward, peak",
        quantity="bytes",
        values=setting.peaks(calls),
        expected=1,
        why=f"features of {WIDTH}, and a chunk of similarities at a time",
    )


def _contrast(anchors: Tensor, positives: Tensor) -> tuple[Tensor, ...]:
    inputs = anchors.detach().requires_grad_(), positives.detach().requires_grad_()
    return torch.autograd.grad(info_nce(*inputs, temperature=TEMPERATURE), inputs)


def _precision(setting: Setting) -> Any:
    return "bf16" if setting.cuda else "fp32"


def _cost(setting: Setting, model: Model) -> Cost:
    precision = _precision(setting)
    attention = resolve_attention("auto", setting.device, precision)
    return count_cost(model.spec(), precision=precision, autocast=True, checkpointing=False, attention=attention)


def _exponent(sizes: Sequence[float], counts: Sequence[float]) -> float:
    return fit(sizes, [[count] for count in counts]).exponent


def _flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _steps(setting: Setting, case: ScalingCase, models: Sequence[Model]) -> tuple[list[list[float]], list[list[float]]]:
    """Return (seconds, tracked bytes) of retain steps of each model."""
    batch = setting.batch(case)
    cases = [StepCase(model=model, phase="retain", precision=_precision(setting), batch=batch) for model in models]
    steps = [EngineStep(each, setting.device, images=batch) for each in cases]
    try:
        return setting.seconds(case, steps), setting.peaks(steps)
    finally:
        for step in steps:
            step.close()


def _images(model_case: Model, model: nn.Module, count: int) -> Tensor:
    """Return normalised digits [count, C, H, W] of the model's input size."""
    samples = digits(StepCase(model=model_case, phase="retain", precision="fp32", batch=count), count)
    preprocessing, channels = preprocessing_of(model), attention_info(model).in_chans
    pixels = [preprocessing.resize(samples.tensor(index, channels)) for index in range(count)]
    return preprocessing.normalise(torch.stack(pixels))


# --- ranks ------------------------------------------------------------------------------------------------------------


def _ranks(setting: Setting, case: ScalingCase) -> Iterator[Curve]:
    if setting.quick:
        raise SkippedError("--quick starts no processes")
    try:
        require_deepspeed()
    except UserError as error:
        raise SkippedError(str(error)) from None
    sizes = setting.sizes(case)
    with tempfile.TemporaryDirectory(prefix="lethe-ranks-") as name:
        original = save_checkpoint(YARDSTICK.spec().build(seed=0), Path(name, "original"))
        launch = functools.partial(_launch, Path(name), original)
        launch(ranks=1, batch=1, steps=1)  # the first run on a machine compiles DeepSpeed's extensions
        calls = [functools.partial(launch, ranks, case.batch // ranks, RANK_STEPS) for ranks in sizes]
        reports = setting.reports(case, calls)
    curve = functools.partial(
        Curve, quantity="seconds", variable="ranks", sizes=sizes, expected=-1, why="each rank has its share of a batch"
    )
    for label, key in (("both phases", "phases"), ("run without evaluation", "unlearn")):
        values = _part(reports, key)
        efficiency = middle(values[0]) * sizes[0] / (middle(values[-1]) * sizes[-1])
        note = f"{efficiency:.0%} of ideal on {sizes[-1]} ranks, a thread each"
        yield curve(name=f"{label}, ZeRO-1 on the CPU", values=values, note=note)


def _launch(folder: Path, original: Path, ranks: int, batch: int, steps: int) -> Mapping[str, float]:
    """Return the seconds by part of a run under torchrun. batch: of a rank. steps: of each phase."""
    out = Path(tempfile.mkdtemp(dir=folder))
    options: dict[str, Any] = {"max_steps": steps, "checkpoint_every": None}
    arguments = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments += unlearn_arguments(original, out / "run", batch, 1, **options)
    require_good(Launched(arguments, out / "log"))
    seconds = json.loads((out / "run" / "metrics.json").read_text(encoding="utf-8"))["seconds"]
    return {**seconds, "phases": seconds["forget_phase"] + seconds["retain_phase"]}


SECTIONS: dict[str, Callable[[Setting, ScalingCase], Iterator[Curve]]] = {
    "forget": _forget,
    "retain": _retain,
    "dataset": _dataset,
    "resolution": _resolution,
    "model": _model,
    "info_nce": _info_nce,
    "ranks": _ranks,
}
