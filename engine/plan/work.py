"""Work of a run: what it computes and sends, phase by phase, and the time at a given or measured rate.

Everything is in one unit: a training image, the forward and backward pass of one image. A rate is training images a
second and GPU; passes without gradients count by their flops.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from engine.config import RunConfig
from engine.core.phase import StepCounts
from engine.data.sampling import Epochs
from engine.errors import UserError
from engine.evaluate.metrics import MOST_RETAINED
from engine.methods import Method, Phase, get_method
from engine.plan.cost import Cost
from engine.plan.memory import Zero
from engine.run.collapse_guard import checks, watched_count
from engine.run.early_stopping import last_stage
from engine.run.seta import PrunedPhase, pruned_phases

# Epochs of recipes for ViTs on ImageNet, with their source.
RECIPES = {
    "deit": (300.0, "DeiT, Touvron et al. 2021, arXiv 2012.12877"),
    "plain-vit": (90.0, "Beyer et al. 2022, arXiv 2205.01580"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One item of a run.

    Attributes:
        name: Name of the item.
        images: Passes over one image each.
        steps: Optimizer steps, 0 for passes without gradients.
        flops: Total over all ranks.
        kind: Key of the rate that measures it (engine.plan.timing).
    """

    name: str
    images: float
    steps: int
    flops: float
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Samples of a job and ranks of a run.

    Attributes:
        forget, retain, test: Numbers of samples.
        ranks: Number of ranks.
        batch: Samples of an optimizer step, over all ranks.
        image: (height, width) of the model's input in pixels.
        held_out: Number of validation samples; None: the fifth of the test samples that a source without any holds out.
    """

    forget: int
    retain: int
    test: int
    ranks: int
    batch: int
    image: tuple[int, int] = (224, 224)
    held_out: int | None = None

    @property
    def validation(self) -> int:
        """Number of samples that the original was not trained on."""
        return round(self.test / 5) if self.held_out is None else self.held_out

    def evaluated(self, most: int | None = None) -> int:
        """Return the number of samples in an evaluation; `most`: `RunConfig.evaluation_samples`."""
        return self.forget + min(self.retain, most or MOST_RETAINED) + min(self.test, most or self.test)


def unlearning_work(cost: Cost, sizes: Sizes, method: str, config: Any, run: RunConfig) -> list[Work]:
    """Return all work of `lethe unlearn` with the model, in order.

    If `run.stop_when` or a rule of the method may end a phase earlier, it is the upper bound.

    Args:
        cost: Cost of a pass.
        sizes: Numbers of samples and ranks.
        method, config: The method and its options.
        run: Options of the run.
    """
    used = sizes.retain if run.retain_share == 1 else max(1, round(run.retain_share * sizes.retain))
    made = planned(method, config, sizes.forget, used, run, sizes.ranks)
    phases = made.phases()
    pruned = pruned_phases(run, phases, sizes.forget, used)
    stage = last_stage(phases) if run.stop_when != "never" else set()
    items = _choosing(cost, sizes, run)
    watches, evaluations = 2, sizes.validation if stage else 0  # before and after; for the original
    for number, phase in enumerate(phases):
        taken = _taken(phase, sizes, used, run, pruned.get(number))
        for each in made.passes(phases, number, taken):
            flops = each.forward * cost.forward_flops + each.backward * cost.backward_flops
            flops = each.images * (flops + each.rollouts * cost.rollout_flops)
            items.append(Work(name=each.name, images=each.images, steps=0, flops=flops, kind=each.kind))
        images = taken.images + taken.paired
        items.append(_training(f"{phase.name} phase", cost, images, taken.steps, phase.name, cost.updating))
        watches += checks(taken.steps) if phase.guarded else 0
        if number in stage:
            epochs = math.ceil(phase.epochs) - (number == max(stage))  # none after the last of all
            alone = phase.samples == "retain" and phase.paired is None
            evaluations += epochs * (sizes.forget + (sizes.validation if alone else 0))
    watched = watched_count(phases, sizes.forget, used)
    items.append(forward_work("looks of stop_when", cost, evaluations))
    items.append(forward_work("watched accuracy", cost, watches * min(watched, sizes.test or used)))
    evaluated = 2 * sizes.evaluated(run.evaluation_samples)
    items.append(forward_work("evaluation of the original and the result", cost, evaluated))
    return [item for item in _merged(items) if item.images or item.steps or item.name.endswith("phase")]


def _choosing(cost: Cost, sizes: Sizes, run: RunConfig) -> list[Work]:
    """Return the passes of `retain_choice`."""
    if run.retain_share == 1 or run.retain_choice == "random":
        return []
    return [
        forward_work("choice of retained samples", cost, sizes.retain + sizes.forget * (run.retain_choice == "near"))
    ]


def _taken(phase: Phase, sizes: Sizes, retain: int, run: RunConfig, pruned: PrunedPhase | None) -> StepCounts:
    """Return the images of the steps of a phase, by the rules of `engine.run.trainer`."""
    whole = phase.retained(retain) + (0 if phase.samples == "retain" else sizes.forget)
    processes = sizes.ranks * run.accumulation_steps
    epochs = Epochs(pruned.counts if pruned else (whole,), phase.size(sizes.batch // processes) * processes)
    steps = epochs.steps(phase.epochs)
    steps = min(steps, run.max_steps) if run.max_steps else steps
    paired = None
    if phase.paired is not None:
        size = phase.paired_size(sizes.batch // processes, pruned.grown if pruned else 1.0) * processes
        paired = Epochs(({"forget": sizes.forget, "retain": retain}[phase.paired],), size)
    if not phase.turns:
        main, other = epochs.samples(steps), paired.samples(steps) if paired else 0
    else:
        assert paired is not None
        turns = [phase.takes(step) for step in range(steps)]
        main, other = (
            sum(each.samples(step + 1) - each.samples(step) for step in range(steps) if turns[step][kind])
            for kind, each in enumerate((epochs, paired))
        )
    return StepCounts(steps=steps, images=main, paired=other, held_out=sizes.validation, image=sizes.image)


def _merged(items: list[Work]) -> list[Work]:
    """Return one item for each name, since the phases of some methods alternate."""
    merged: dict[str, Work] = {}
    for item in items:
        before = merged.get(item.name)
        if before is not None:
            item = dataclasses.replace(
                item,
                images=before.images + item.images,
                steps=before.steps + item.steps,
                flops=before.flops + item.flops,
            )
        merged[item.name] = item
    return list(merged.values())


def retraining_work(cost: Cost, sizes: Sizes, epochs: float) -> list[Work]:
    """Return the work of training the same architecture from fresh weights on the retain set, and one evaluation."""
    steps = math.ceil(epochs * math.ceil(sizes.retain / sizes.batch))
    return [
        _training("training", cost, epochs * sizes.retain, steps, "retain", cost.backward_flops),
        forward_work("evaluation of the result", cost, sizes.evaluated()),
    ]


def phases_of(method: str, config: Any) -> list[Phase]:
    """Return the method's phases for one forget sample and nine retain samples; rates as for a model of width 1."""
    return planned(method, config, 1, 9, RunConfig()).phases()


def planned(method: str, config: Any, forget: int, retain: int, run: RunConfig, ranks: int = 1) -> Method:
    """Return a method for so many samples, of which only phases and passes are available."""
    method_class = get_method(method)
    made = method_class.__new__(method_class)
    context: Any = types.SimpleNamespace(
        info=types.SimpleNamespace(width=1),
        forget=range(forget),
        retain=range(retain),
        run=run,
        world=types.SimpleNamespace(size=ranks),
    )
    Method.__init__(made, config, context)
    return made


def _training(name: str, cost: Cost, images: float, steps: int, kind: str, backward: int) -> Work:
    flops = images * (cost.forward_flops + backward)
    return Work(name=name, images=images, steps=steps, flops=flops, kind=kind)


def forward_work(name: str, cost: Cost, images: float) -> Work:
    return Work(name=name, images=images, steps=0, flops=images * cost.forward_flops, kind="forward")


def seconds_of(work: list[Work], cost: Cost, ranks: int, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each item by name.

    Args:
        work: The items.
        cost: Cost of a pass.
        ranks: Number of ranks.
        rates: Images a second and GPU by kind; `training` replaces missing ones, by flops.
    """
    per_image = cost.forward_flops + cost.backward_flops
    seconds = {}
    for item in work:
        if item.kind in rates:
            seconds[item.name] = item.images / (rates[item.kind] * ranks)
        else:
            seconds[item.name] = item.flops / per_image / (rates["training"] * ranks)
    return seconds


def communication(cost: Cost, ranks: int, zero: Zero, weight_bytes: int, accumulation: int) -> dict[str, Any]:
    """Return the bytes that a rank sends in one optimizer step, by ring collectives, and the formula."""
    P, N, w, A = cost.parameters, ranks, weight_bytes, accumulation
    ring = (N - 1) / N
    terms = {
        0: (2 * ring * w * P, "all-reduce of gradients: 2 (N-1)/N w P"),
        1: (
            (2 * ring * w + ring * w) * P,
            "all-reduce of gradients, all-gather of updated weights: 3 (N-1)/N w P",
        ),
        2: (
            (2 * A * ring * w + ring * w) * P,
            "all-reduce of gradients each micro-batch (DeepSpeed's default, multi-rank buckets), all-gather of updated "
            "weights: (2 A + 1) (N-1)/N w P",
        ),
        3: (
            3 * A * ring * w * P,
            "each micro-batch all-gathers weights for the forward and the backward pass and reduce-scatters gradients: "
            "3 A (N-1)/N w P",
        ),
    }
    sent, formula = terms[zero.stage]
    return {"bytes_per_step": round(sent), "formula": formula}


def recipe(name: str, epochs: float | None) -> dict[str, Any]:
    """Return name, epochs and source of a retrain recipe; given epochs take precedence.

    Raises:
        UserError: The recipe is unknown, and no epochs are given.
    """
    known, source = RECIPES.get(name, (None, "stated by the user"))
    if epochs is None and known is None:
        raise UserError(
            f"--retrain-recipe {name!r}: its epochs are not known; give --retrain-epochs, or take one of "
            f"{', '.join(RECIPES)}"
        )
    if epochs is not None and epochs != known:
        source = "epochs stated by the user"
    return {"name": name, "epochs": known if epochs is None else epochs, "source": source}
