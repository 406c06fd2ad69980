"""What a method is to the loop, and the registry of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import RunConfig
from engine.core.registry import Registry
from engine.data import Batch, Loader, Preprocessing, Samples
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.models.info import ModelInfo, num_classes_of
from engine.models.vit import ViTInfo, attention_info, check_features, outputs
from engine.runtime.process_group import World

if TYPE_CHECKING:
    from engine.core.result import UnlearnResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of optimizer steps with one loss on one set of samples; before the first of them, `Method.edit`.

    epochs: passes over those samples; fractions are steps, rounded up; 0 leaves `edit` alone. lr: peak learning rate of
    AdamW. schedule: constant | one_cycle (warm-up over 15%, then a cosine to zero). augment: as the run's `augment`
    says, or not at all. guarded: may destroy the model, so the loop watches its accuracy.
    beside: samples of which every step takes a batch too, for `Method.loss_beside`; passes over them are not counted.
    beside_share: size of that batch relative to the run's. augment_beside: whether it is augmented; None: as `augment`.
    combined: the gradients of the two losses are not added up but given to `Method.combine`.
    retain_part: share (0, 1] of the retained samples that are among `samples`, drawn once by the run's seed.
    turns: 0: every step takes both batches. n: steps take turns, one that takes the batch beside alone, then n that
        take the other alone; the batch of the other kind is passed over.
    """

    name: str
    samples: Literal["forget", "retain", "all"]
    epochs: float
    lr: float
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    augment: bool = True
    guarded: bool = False
    beside: Literal["forget", "retain"] | None = None
    beside_share: float = 1.0
    augment_beside: bool | None = None
    combined: bool = False
    retain_part: float = 1.0
    turns: int = 0

    def retained(self, count: int) -> int:
        """How many of `count` retained samples are among `samples`."""
        return 0 if self.samples == "forget" else max(1, round(self.retain_part * count))

    def beside_size(self, batch_size: int, grown: float = 1.0) -> int:
        """Samples of a batch beside one of the run's batch size; grown: by how much it is larger than asked."""
        return max(1, round(self.beside_share * grown * batch_size))

    def takes(self, step: int) -> tuple[bool, bool]:
        """Whether a step takes a batch of `samples`, and one of those beside."""
        turn = step % (1 + self.turns) == 0
        return not (self.turns and turn), self.beside is not None and turn


def phase_of_both(epochs: float, lr: float, **more: Any) -> Phase:
    """A guarded phase of retained samples with forget samples beside them. more: further fields of `Phase`."""
    return Phase(name="forget", samples="retain", beside="forget", guarded=True, epochs=epochs, lr=lr, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What the steps of a phase take, for `Method.passes`. steps: how many. images, beside: of the phase's samples and
    of those beside. held_out: samples that the original never trained on. image: (height, width) of the model's input.
    """

    steps: int
    images: int
    beside: int
    held_out: int
    image: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of a phase that are not those of its steps. images: how many, each `forward` times through the model, and
    `backward` times back. rollouts: of the attention. kind: what a measured rate for them is called."""

    name: str
    images: float
    forward: float = 1.0
    backward: float = 0.0
    rollouts: float = 0.0
    kind: str = "forward"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may look at. Neither test data nor any retrained model is here.

    original: the model before unlearning, frozen, in eval mode. loader: makes a Loader as the run wants it.
    held_out: samples that the original never trained on, the run's validation samples; None where it has none.
    world: the ranks; each sees all samples and is dealt its share of every batch.
    """

    run: RunConfig
    original: nn.Module
    info: ModelInfo
    forget: Samples
    retain: Samples
    preprocessing: Preprocessing
    device: torch.device
    autocast: Callable[[], Any]
    loader: Callable[[Samples, str], Loader]
    held_out: Samples | None = None
    world: World = dataclasses.field(default_factory=World)

    @property
    def num_classes(self) -> int:
        return num_classes_of(self.original)

    @property
    def patches(self) -> ViTInfo:
        """`info` of a model whose attention can be read. Raises UserError for every other model."""
        return self.info if isinstance(self.info, ViTInfo) else attention_info(self.original)

    def samples_of(self, phase: Phase) -> Samples:
        """The samples of a phase, in which `Batch.index` counts; of "all", the forget samples come first."""
        if phase.samples == "forget":
            return self.forget
        retain = self.retain
        if phase.retain_part < 1:
            order = np.random.default_rng([self.run.seed, len(retain)]).permutation(len(retain))
            retain = retain.subset(np.sort(order[: phase.retained(len(retain))]), f"{retain.name} (part)")
        return concatenate(self.forget, retain) if phase.samples == "all" else retain


class Method:
    """Base of all methods. A subclass gives `Config` and `phases`, and `loss` or `edit`.

    one_process: why the method's mathematics needs whole weights and gradients in one process, which DeepSpeed does
    not leave it; the loop then refuses a DeepSpeed configuration with it. Empty for all others.
    needs_checkpoint: what made the only checkpoints that the method takes; empty: it takes any.
    needs: what the method reads of a model, of "logits" (any classifier), "features" (what the classifier reads) and
    "attention" (patches, and the attention to them); see `refuse_unfit`.
    is_training: trains a model from its start, so that a fall of the watched accuracy is no collapse.
    exact: never looks at the forget samples, so that there is nothing to choose by them, and `lethe tune` refuses it.
    after_collapse: what a user can do about a result that collapsed.
    step, total_steps: of the phase, set by the loop: the number of the step being taken, from 0, and of all its steps.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[Any]]
    one_process: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    exact: ClassVar[bool] = False
    is_training: ClassVar[bool] = False
    needs_checkpoint: ClassVar[str] = ""
    after_collapse: ClassVar[str] = "Lower the rates (--set forget_lr=..., lr=...)"
    step: int = 0
    total_steps: int = 1

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context

    def initial_model(self, model: nn.Module) -> nn.Module:
        """The model that the first phase starts from: the one to be unlearned, unless a method says otherwise."""
        return model

    def lr_scales(self, model: nn.Module) -> dict[int, float]:
        """Factors on the rate of a phase by the `id` of a parameter; empty: one rate for all. Plain torch alone."""
        return {}

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def samples_of(self, phase: Phase) -> Samples:
        """The samples of a phase, unless a method deals them out itself."""
        return self.context.samples_of(phase)

    def prepare(self, phase: Phase) -> None:
        """Passes of the original that a phase needs; runs once before it, and its time counts."""

    def prepared(self, phase: Phase) -> dict[str, Tensor]:
        """What `prepare` computed, on the CPU; kept beside the checkpoints, so that a resumed run can `restore` it."""
        return {}

    def restore(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        """Takes what `prepared` gave, in place of `prepare`."""

    def passes(self, phases: list[Phase], number: int, taken: Taken) -> list[Passes]:
        """What the phase of a number computes beside its steps, at most, for `lethe plan`.

        Only `config`, `context.run` and the lengths of `context.forget` and `context.retain` are there to look at.
        """
        return []

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        """Whether a phase still runs the original, before or after it is prepared; where none does, its memory is
        given back."""
        return not prepared

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """Named terms, each a scalar, a mean over the batch; the loop minimises their sum."""
        raise NotImplementedError

    def loss_beside(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The same for a batch of `phase.beside`; names differ from those of `loss`."""
        raise NotImplementedError

    def combine(self, model: nn.Module, main: list[Tensor], beside: list[Tensor], phase: Phase) -> list[Tensor]:
        """The gradient to step with, of those of `loss` and of `loss_beside`, where the phase is `combined`.

        Lists hold one tensor for each parameter of the model that requires a gradient, in its order.
        """
        raise NotImplementedError

    def before_step(self, model: nn.Module, phase: Phase) -> None:
        """May change `.grad` of parameters, before gradients are clipped. What touches gradients or weights here and in
        the next two needs `one_process`; every rank calls them."""

    def after_step(self, model: nn.Module, phase: Phase) -> None:
        """May change weights after each optimizer step."""

    def edit(self, model: nn.Module, phase: Phase) -> None:
        """May change weights before the first step of a phase, once; its time counts, and the guard looks at it."""

    def ended(self, model: nn.Module, phase: Phase, epoch: int) -> str | None:
        """Asked at the end of every epoch, on every rank: why the phase should end now; None to go on."""
        return None

    def finished(self, result: UnlearnResult) -> None:
        """Called once with the final model, on every rank, before the run counts as finished: may write further files
        into the run folder. Once more where the run was killed in what comes after it."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run needs beside what `prepare` computes; kept in checkpoints."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave."""

    def held_out(self, why: str) -> Samples:
        """Samples that the original never trained on. Raises UserError, saying what they are for, without any."""
        if self.context.held_out is None:
            raise UserError(
                f"{self.name}: needs samples that the model was not trained on, {why}; give validation=..., or a data "
                "source with a validation split"
            )
        return self.context.held_out

    def learning_rate(self, given: float | None, per_width: float) -> float:
        """The given rate, or `per_width` / width: Adam moves a layer's output by about lr x width a step, so one
        number serves ViTs of every width (the scaling of Yang et al. 2022, arXiv 2203.03466, for hidden weights)."""
        return per_width / self.context.info.width if given is None else given


def cross_entropy(model: nn.Module, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of a batch, to its own labels or to others [B]."""
    return F.cross_entropy(outputs(model, batch.images).float(), batch.labels if labels is None else labels)


_REGISTRY: Registry[Method] = Registry("method")
register = _REGISTRY.register


def get_method(name: str) -> type[Method]:
    return _REGISTRY.find(name)


def list_methods() -> dict[str, type[Method]]:
    """All methods by name, in the order of registration."""
    return dict(_REGISTRY)


def refuse_unfit(method: type[Method], model: nn.Module) -> None:
    """Raises UserError where a model does not give what a method needs, with the methods that it can be used with."""
    num_classes_of(model)
    lacking: dict[str, str] = {}
    for need, check in (("attention", attention_info), ("features", check_features)):
        try:
            if need in method.needs:
                check(model)
        except UserError as error:
            lacking[need] = str(error)
    if lacking:
        need, reason = next(iter(lacking.items()))
        others = [name for name, other in list_methods().items() if not other.needs & set(lacking)]
        raise UserError(
            f"method {method.name} needs the {need} of the model: {reason}; methods that do without: "
            f"{', '.join(others)}"
        )
