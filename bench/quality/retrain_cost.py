"""Compare unlearning with retraining: end-to-end wall-clock time and quality of the result, in one row.

Measured if both can be run: on digits, whose original is trained first, and on a checkpoint of the user's (the
yardstick). For every seed a retrain and each registered method run at their defaults, seed by seed and in an order that
turns, so that a slow period of the machine does not hit one method alone. `engine.unlearn` is timed as a whole, with a
run folder as for `lethe unlearn` (masks, teacher passes, watched accuracy, checkpoints; compilation if the options
have it). Then the evaluation of its result is timed, with images decoded again. Not counted, and the same for all:
the start of Python, opening the data, reading the original. Nothing is tuned.

For ImageNet hours are projected from measured steps: `bench.training_cost.recipes`.

The results file, as `python -m bench tables` reads it. Seconds are wall seconds, shares and accuracies are in [0, 1],
gaps in percentage points, money in the currency of --price; what was not measured is null.

    tasks: {NAME: {
        data, forget: as given. samples: {forget, retain, test}.
        untouched: QUALITY. references: [{name, QUALITY without gap, gap_to_floor and agreement}].
        noise_floor: the average gap between references, over their pairs; null for one. noise_floor_agreement.
        retrain_seconds: [total of each seed].
        rows: [ROW], a method and seed each, "retrain" among them.
        stability: Kendall's tau between the orders by average gap of each two seeds: {mean, least}, over the methods
            that have both; null if no two seeds have three methods.
        foresight: Kendall's tau between the orders of the methods by score and by gap, means over seeds; null with
            fewer than three methods.
        summary: [{method, seeds, seconds, unlearn_seconds, evaluate_seconds, share, images_share, gap, gap_to_floor,
            forget, retain, test, efficacy, auc, agreement, score, joules, money: each {mean, half_range} over seeds or
            null, collapsed: runs that did}]
    }}
    QUALITY: accuracy {forget, retain, test}, mia {efficacy, auc}, gap {forget, retain, test, mia, average} to the
        references, gap_to_floor (average gap / noise_floor), agreement (top-1, forget samples), weights_sha256,
        forget_classes (the predicted class of each forget sample, one string).
    ROW: QUALITY and method, seed, collapsed, samples_seen {phase: samples}, share (of the total seconds of the same
        seed's retrain), images_share (of its samples_seen), score (of `engine.evaluate.indistinguishable`, in
        percentage points: from the validation samples, no retrained model; its time is not counted), joules, money,
        load_average (1 minute, before the run),
        seconds {prepare (masks, teacher passes), steps, around (copy of the model, watched accuracy before and after,
        last files), unlearn (these three), evaluate, total (unlearn + evaluate), and of the same time: phases {name:
        its preparation and steps}, data (waiting for images)}.
    projection: [{model, precision, device, batch, steps, words, phases {forget, retain: {seconds: [each step],
        images_per_second}}, teacher_images_per_second, forward_images_per_second, watts,
        hours: [{work: "retrain" | a method, recipe, source, published_for_model (else an assumption), epochs {phase:
            epochs}, parts {what: hours}, device_hours, kwh, money, share {recipe: of its retrain, methods alone}}]}]
    energy: {source: the counter of joules, or null, reason: why there is none, or null}.
    price: of one device-hour, or null.
    subjects, options, quick, threads, device: a run continues a file only if these are equal.

A retrained model is never compared with itself: references with the weights of the row are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.harness import plots
from bench.harness.cases import TINY, VIT_B, VIT_S
from bench.harness.measure import EnergyMeter, turns
from bench.harness.report import Report, kept, load_average
from bench.publish import pictures
from bench.quality.retrain_summary import Row, foresight, mean_of, print_task, rank_stability, summarise, with_images
from bench.training_cost.recipes import Timed, print_projection, project
from engine.cli.console import console, progress_bars
from engine.cli.demo import MODEL_ARGS, RECIPE, RUN
from engine.config import parse_assignments, split_options
from engine.data import Loader
from engine.errors import UserError
from engine.evaluate import Evaluation
from engine.evaluate.indistinguishable import Views, indistinguishability
from engine.evaluate.metrics import GAPS
from engine.jobs.start import architecture
from engine.jobs.task import Task
from engine.methods import get_method, list_methods
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.models.predict import predict
from engine.models.preprocessing import preprocessing_of
from engine.run.unlearn import train, unlearn
from engine.runtime.device import resolve_device, resolve_precision

# Added to a retrain's seed, so that it shares neither initial weights nor sample order with an original of a low seed.
RETRAIN_SEED = 1000
QUICK_STEPS = 3
_LOOKED_AT_ONCE = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with a request. checkpoint: None trains the digits' original as `lethe demo` does.

    references: retrained models; if there are none, retrains of this run serve. options: of every run, before the
    user's. recipe: options of the retrain, in addition.
    """

    name: str
    data: str
    forget: str
    checkpoint: str | None = None
    references: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)


DIGITS = Subject(
    name="digits",
    data="digits",
    forget="random:0.1@0",
    options=RUN,
    recipe={key: value for key, value in RECIPE.items() if key not in RUN},
)


def class_of(subject: Subject, name: str) -> Subject:
    """Return the same model with the request to forget a class; its references are retrains of this run."""
    return dataclasses.replace(subject, name=f"{subject.name}, class {name}", forget=f"class:{name}", references=())


def setting_of(subjects: Sequence[Subject], seeds: int, settings: Sequence[str], quick: bool) -> dict[str, Any]:
    """Return the setting that has to be equal to continue a results file, the options as given among it."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    options = parse_assignments(settings)
    if "seed" in options:
        raise UserError("--set seed: every run has a seed of its own; give their number by --seeds")
    device = resolve_device(options.get("device", "auto"))
    return {
        "subjects": [dataclasses.asdict(subject) | {"references": list(subject.references)} for subject in subjects],
        "options": options,
        "quick": quick,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def run_retrain_cost(
    subjects: Sequence[Subject],
    seeds: int,
    settings: Sequence[str],
    price: float | None,
    json_file: Path | None,
    plot_file: Path | None,
    quick: bool = False,
    projection: bool = True,
    methods: Sequence[str] = (),
    retrain: bool = True,
) -> dict[str, Any]:
    """Print and return the results described at the top of this file; continue the file of an interrupted run.

    methods: methods to compare with the retrain; none: all of them. retrain: False runs the methods alone, on subjects
    that
        have references; shares of the retrain are null then.
    """
    setting = setting_of(subjects, seeds, settings, quick)
    options = setting["options"]
    if price is not None and price < 0:
        raise UserError(f"--price {price:g}: expected 0 or more for one hour of a device")
    chosen = {name: get_method(name) for name in (*methods, "retrain")} if methods else list_methods()
    if not retrain:
        del chosen["retrain"]
        for subject in subjects:
            if not subject.references:
                raise UserError(
                    f"--no-retrain: {subject.name} has no retrained model to be compared with; give --reference and "
                    "--no-digits"
                )
    for name in [name for name, method in chosen.items() if method.needs_checkpoint]:
        console.print(f"{name}: left out, it needs a checkpoint of {chosen.pop(name).needs_checkpoint}")
    for method in chosen.values():
        split_options(options, method.Config)  # a wrong option is an error now, not after an hour
    device = resolve_device(options.get("device", "auto"))
    report = Report()
    tasks: dict[str, Any] = dict(kept(json_file, setting, "a comparison").get("tasks", {}))
    meter = EnergyMeter(device)
    results: dict[str, Any] = {
        **setting,
        "price": price,
        "energy": {"source": meter.source, "reason": meter.reason},
        "tasks": tasks,
        "projection": [],
    }
    limits = {"max_steps": QUICK_STEPS} if quick else {}
    for subject in subjects:
        entries = _measured(subject, list(chosen), seeds, {**options, **limits}, meter, price, tasks.get(subject.name))
        for entry in entries:
            tasks[subject.name] = entry
            report.write(results, json_file)
        print_task(subject.name, tasks[subject.name])
    if projection:
        precision = resolve_precision(options.get("precision", "auto"), device)
        models, timed = ((TINY,), Timed(batch=4, steps=2, warmup=1)) if quick else ((VIT_S, VIT_B), _timed(device))
        results["projection"] = project(models, device, precision, timed, price)
        print_projection(results["projection"])
    console.print(f"[dim]energy: {meter.source or meter.reason}[/dim]", soft_wrap=True)
    written = report.write(results, json_file)
    if plot_file:
        plot(written, plot_file)
    return written


def _timed(device: torch.device) -> Timed:
    return Timed(batch=64, steps=20, warmup=5) if device.type == "cuda" else Timed(batch=8, steps=3, warmup=1)


def _measured(
    subject: Subject,
    methods: list[str],
    seeds: int,
    options: dict[str, Any],
    meter: EnergyMeter,
    price: float | None,
    before: Row | None,
) -> Iterator[Row]:
    """Yield the subject's entry after every run that was not done yet, and at last as a whole."""
    task = Task.open(subject.data, subject.forget)
    original = original_of(subject, task, options)
    references = [
        {"name": Path(name).name, **quality_of(subject, task, options, load_checkpoint(name))}
        for name in subject.references
    ]
    evaluation = _evaluation(subject, task, options, original)
    untouched, views = _quality(evaluation, original), _views(task, evaluation, original)
    untouched["score"] = _score(task, views, views)
    if before and before["untouched"]["weights_sha256"] != untouched["weights_sha256"]:
        raise UserError(
            f"--json: its rows of {subject.name} are of another original (training is repeatable to the bit on the "
            "CPU alone); name another file"
        )
    rows: list[Row] = list(before["rows"]) if before else []
    entry = functools.partial(_entry, subject, task, untouched, references, price=price)
    done = {(row["method"], row["seed"]) for row in rows}
    for method, seed in _order(methods, seeds):
        if (method, seed) not in done:
            console.print(f"{subject.name}, seed {seed}: {method}")
            rows.append(_run(subject, task, original, views, method, seed, options, meter))
            yield entry(rows)
    yield entry(rows)


def _order(methods: list[str], seeds: int) -> list[tuple[str, int]]:
    """Return the runs seed by seed, each round beginning with another method."""
    return [(method, number // len(methods)) for number, method in enumerate(turns(methods, seeds, math.inf))]


def original_of(subject: Subject, task: Task, options: Mapping[str, Any]) -> nn.Module:
    if subject.checkpoint is not None:
        return load_checkpoint(subject.checkpoint)
    console.print(f"{subject.name}: training the original on all samples")
    model = architecture("vit_tiny_patch16_224", MODEL_ARGS, task.source)
    config = {**subject.options, **subject.recipe, "seed": 0, **options}
    with progress_bars() as progress:
        return train(
            model, task.source.train, config=config, validation=task.source.validation, progress=progress
        ).model


def _run(
    subject: Subject,
    task: Task,
    original: nn.Module,
    before: Views,
    method: str,
    seed: int,
    options: Mapping[str, Any],
    meter: EnergyMeter,
) -> Row:
    """Do one run, timed, and evaluate its result."""
    recipe = {**subject.recipe, "seed": RETRAIN_SEED + seed} if method == "retrain" else {"seed": seed}
    load = load_average()[0]
    with tempfile.TemporaryDirectory() as folder:
        joules, began = meter.start(), time.perf_counter()
        with progress_bars() as progress:
            result = unlearn(
                original,
                task.forget,
                task.retain,
                method=method,
                config={**subject.options, **recipe, **options},
                validation=task.source.validation,
                output_dir=Path(folder) / "run",
                progress=progress,
            )
        ended = time.perf_counter()
        evaluation = _evaluation(subject, task, options, result.model)
        quality = _quality(evaluation, result.model)
        evaluated = time.perf_counter()
        used = joules()
    phases = {key.removesuffix("_phase"): value for key, value in result.seconds.items() if key.endswith("_phase")}
    prepare, inside = result.seconds["prepare"], sum(phases.values())
    return {
        "method": method,
        "seed": seed,
        **quality,
        "score": _score(task, _views(task, evaluation, result.model), before),
        "collapsed": result.collapsed,
        "samples_seen": result.samples_seen,
        "seconds": {
            "prepare": prepare,
            "steps": inside - prepare,
            "around": ended - began - inside,
            "unlearn": ended - began,
            "evaluate": evaluated - ended,
            "total": evaluated - began,
            "phases": phases,
            "data": result.seconds["data"],
        },
        "joules": used,
        "load_average": load,
    }


def quality_of(subject: Subject, task: Task, options: Mapping[str, Any], model: nn.Module) -> Row:
    """Return the accuracies of a model, its membership inference and its predictions, as QUALITY above has them."""
    return _quality(_evaluation(subject, task, options, model), model)


def _evaluation(subject: Subject, task: Task, options: Mapping[str, Any], model: nn.Module) -> Evaluation:
    """Evaluate with a new evaluator, so that every model's images are decoded again, as by a user's command."""
    return task.evaluator({**subject.options, **options})(model)


def _quality(evaluation: Evaluation, model: nn.Module) -> Row:
    classes = evaluation.predictions["forget"].logits.argmax(1)
    return {
        "accuracy": evaluation.numbers["accuracy"],
        "mia": {key: evaluation.numbers["mia"][key] for key in ("efficacy", "auc")},
        "weights_sha256": weights_sha256(model),
        "forget_classes": " ".join(map(str, classes)),
    }


def _views(task: Task, evaluation: Evaluation, model: nn.Module) -> Views:
    held_out = predict(model, Loader(task.source.validation, preprocessing_of(model), batch_size=_LOOKED_AT_ONCE))
    return Views(evaluation.predictions["forget"], evaluation.predictions["retain"], held_out)


def _score(task: Task, views: Views, before: Views) -> float:
    return indistinguishability(views, before, task.retain.labels).total


def _entry(
    subject: Subject, task: Task, untouched: Row, references: list[Row], rows: list[Row], *, price: float | None
) -> dict[str, Any]:
    """Summarise the rows, compared with the references that exist so far."""
    references = references or [
        {"name": f"retrained, seed {row['seed']}", **{key: row[key] for key in untouched if key != "score"}}
        for row in rows
        if row["method"] == "retrain"
    ]
    floor, floor_agreement = noise_floor(references)
    retrains = {row["seed"]: row["seconds"]["total"] for row in rows if row["method"] == "retrain"}
    finished = []
    for row in rows:
        retrain = retrains.get(row["seed"])
        finished.append(
            {
                **row,
                **compared(row, references, floor),
                "share": row["seconds"]["total"] / retrain if retrain else None,
                "money": None if price is None else price * row["seconds"]["total"] / 3600,
            }
        )
    finished = with_images(finished)
    summary = summarise(finished)
    return {
        "data": subject.data,
        "forget": subject.forget,
        "samples": {"forget": len(task.forget), "retain": len(task.retain), "test": len(task.source.test)},
        "untouched": {**untouched, **compared(untouched, references, floor)},
        "references": references,
        "noise_floor": floor,
        "noise_floor_agreement": floor_agreement,
        "retrain_seconds": list(retrains.values()),
        "rows": finished,
        "stability": rank_stability(finished),
        "foresight": foresight(summary),
        "summary": summary,
    }


def _distances(row: Row, references: Sequence[Row]) -> list[dict[str, float]]:
    """Return gaps in points and agreement with each reference whose weights are not the row's own."""
    mine, classes = Evaluation(row, {}), row["forget_classes"].split()
    return [
        {
            **mine.gap_to(Evaluation(other, {})),
            "agreement": mean_of([a == b for a, b in zip(classes, other["forget_classes"].split(), strict=True)]),
        }
        for other in references
        if other["weights_sha256"] != row["weights_sha256"]
    ]


def noise_floor(references: Sequence[Row]) -> tuple[float | None, float | None]:
    """Return average gap and agreement between references, over their pairs; None for one."""
    pairs = [pair for number, one in enumerate(references) for pair in _distances(one, references[number + 1 :])]
    return mean_of([pair["average"] for pair in pairs]), mean_of([pair["agreement"] for pair in pairs])


def compared(row: Row, references: Sequence[Row], floor: float | None) -> Row:
    """Return the distances of a row to the references: gap, gap_to_floor, agreement."""
    distances = _distances(row, references)
    if not distances:
        return {"gap": None, "gap_to_floor": None, "agreement": None}
    mean = {key: mean_of([each[key] for each in distances]) for key in (*GAPS, "average", "agreement")}
    agreement = mean.pop("agreement")
    return {"gap": mean, "gap_to_floor": mean["average"] / floor if floor else None, "agreement": agreement}


def plot(report: Row, file: Path) -> None:
    """Draw gap to retraining against the share of its time, a PNG a task.

    With several, each file has the task's name.
    """
    pictures.write(pictures.retrain_cost(report, plots.LIGHT), list(report["tasks"]), file)
