"""The interface of an unlearning method, and the registry of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.registry import Registry
from engine.core.result import UnlearnResult
from engine.data import Batch, Loader, Preprocessing, Samples
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.models.info import ModelInfo, num_classes_of
from engine.models.vit import ViTInfo, attention_info, check_features
from engine.runtime.process_group import ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a method has access to. It includes neither test data nor a reference model.

    Attributes:
        run: Options of the run, resolved.
        original: The model before unlearning, or that before the first of several requests (`Method.takes_original`).
            Frozen, in eval mode.
        info: Geometry of the model.
        forget, retain: Forget set and retain set.
        preprocessing: How images are resized and normalised.
        device: Device of the run.
        autocast: Returns the context manager in which the model computes.
        loader: Makes a `Loader` of samples with an augmentation and the run's options.
        held_out: Held-out set: the run's validation samples, which the original was not trained on; None if there is
            none.
        world: Process group. Each rank has all samples and computes its share of every batch.
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
    world: ProcessGroup = dataclasses.field(default_factory=ProcessGroup)

    @property
    def num_classes(self) -> int:
        return num_classes_of(self.original)

    @property
    def patches(self) -> ViTInfo:
        """Geometry of the patches.

        Raises:
            UserError: The model's attention cannot be read.
        """
        return self.info if isinstance(self.info, ViTInfo) else attention_info(self.original)

    def samples_of(self, phase: Phase) -> Samples:
        """Return the samples that `Batch.index` refers to; for "all", the forget set followed by the retain set."""
        if phase.samples == "forget":
            return self.forget
        retain = self.retain
        if phase.retain_part < 1:
            order = np.random.default_rng([self.run.seed, len(retain)]).permutation(len(retain))
            retain = retain.subset(np.sort(order[: phase.retained(len(retain))]), f"{retain.name} (part)")
        return concatenate(self.forget, retain) if phase.samples == "all" else retain


class Method:
    """Base class of unlearning methods. A subclass defines `Config` and `phases`, and `loss` or `edit`.

    Attributes:
        name: Name for `engine.unlearn(method=...)`.
        summary: One line for `lethe methods`.
        Config: Frozen dataclass of the method's options.
        one_process: Why the method needs whole weights and gradients in one process; a DeepSpeed configuration is then
            refused with this text. Empty: the method runs under DeepSpeed.
        needs: What the method reads of a model: "logits" (any classifier), "features" (the input of the classifier
            head) or "attention" (patches and the attention to them); see `refuse_unfit`.
        exact: The method never reads forget images, so `lethe tune` has nothing to choose and refuses it.
        is_training: The method trains a model from the start, so a fall of the watched accuracy is not a collapse.
        needs_checkpoint: Name of the training whose checkpoints are the only ones that the method accepts. Empty: any.
        takes_original: `context.original` may be an earlier version of the model that is changed: the method takes
            nothing but predictions of it.
        after_collapse: Remedy that is printed for a collapsed result.
        step: Step of the phase that is being taken, from 0; set by the trainer.
        total_steps: Steps of the phase; set by the trainer.
        edited: Images that `edit` has passed through the model that it changes, for `UnlearnResult.samples_seen`.
        report: Called by `edit` with (step, steps, numbers) of each of its steps; set by the trainer.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[Any]]
    one_process: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    exact: ClassVar[bool] = False
    is_training: ClassVar[bool] = False
    needs_checkpoint: ClassVar[str] = ""
    takes_original: ClassVar[bool] = False
    after_collapse: ClassVar[str] = "Lower the rates (--set forget_lr=..., lr=...)"
    step: int = 0
    total_steps: int = 1
    edited: int = 0

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context
        self.report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, numbers: None

    def initial_model(self, model: nn.Module) -> nn.Module:
        """Return the model that the first phase starts from; by default the one to be unlearned."""
        return model

    def lr_scales(self, model: nn.Module) -> dict[int, float]:
        """Return factors on the learning rate by the `id` of a parameter; not available under DeepSpeed."""
        return {}

    def phases(self) -> list[Phase]:
        """Return the phases of the run, in order."""
        raise NotImplementedError

    def samples_of(self, phase: Phase) -> Samples:
        """Return the samples of a phase."""
        return self.context.samples_of(phase)

    def prepare(self, phase: Phase) -> None:
        """Compute what a phase needs of the original; runs once before the phase, and its time is counted."""

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        """Return what `prepare` computed, on the CPU; saved with the checkpoints for `load_cache_state`."""
        return {}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        """Load what `cache_state` returned, in place of calling `prepare`."""

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        """Return an upper bound on what phase `number` computes in addition to its steps, for `lethe plan`.

        Only `config`, `context.run`, `context.world.size` and the lengths of `context.forget` and `context.retain` are
        available.
        """
        return []

    @classmethod
    def regime(cls, config: Any, forget: int, retain: int) -> str:
        """Return which of its procedures the method takes for these numbers of samples; empty: it has one.

        A certificate covers sizes of one procedure alone.
        """
        return ""

    @classmethod
    def why_one_process(cls, config: Any, forget: int, retain: int) -> str:
        """Return why a request of these sizes needs one process, see `one_process`; empty: it does not."""
        return cls.one_process

    @classmethod
    def held_bytes(cls, config: Any, model: nn.Module, forget: int, retain: int) -> dict[str, int]:
        """Return bytes by name of what a run holds in addition to weights, gradients and optimizer state.

        Args:
            config: Options of the method.
            model: A model of the run's architecture; its weights may be on the meta device.
            forget, retain: Numbers of samples.
        """
        return {}

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        """Return whether a phase still runs the original, before or after `prepare`.

        The memory of the original is freed once no later phase needs it.
        """
        return not prepared

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """Return the terms of the loss by name, each a scalar mean over the batch; their sum is minimised."""
        raise NotImplementedError

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """Return the same for a batch of `phase.paired`; names differ from those of `loss`."""
        raise NotImplementedError

    def combine(self, model: nn.Module, main: list[Tensor], paired: list[Tensor], phase: Phase) -> list[Tensor]:
        """Return the gradient to step with, of those of `loss` and of `paired_loss`; called if `phase.combined`.

        Each list holds one tensor for each parameter that requires a gradient, in the model's order.
        """
        raise NotImplementedError

    def before_step(self, model: nn.Module, phase: Phase) -> None:
        """Change `.grad` of parameters before gradients are clipped; called on every rank.

        A method that changes gradients or weights here, in `after_step` or in `edit` sets `one_process`, or gives
        the reason by `why_one_process`.
        """

    def after_step(self, model: nn.Module, phase: Phase) -> None:
        """Change weights after an optimizer step."""

    def edit(self, model: nn.Module, phase: Phase) -> None:
        """Change weights once before the first step of a phase; timed, and measured by the collapse guard."""

    def should_stop(self, model: nn.Module, phase: Phase, epoch: int) -> str | None:
        """Return why the phase should end after this epoch, or None; called on every rank."""
        return None

    def on_finish(self, result: UnlearnResult) -> None:
        """Write further files into the run folder; called on every rank before the run counts as finished.

        It is called again if the run is killed after it and resumed.
        """

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that a checkpoint needs in addition to `cache_state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""

    def held_out(self, why: str) -> Samples:
        """Return the held-out set.

        Raises:
            UserError: There is none; `why` says what it is for.
        """
        if self.context.held_out is None:
            raise UserError(
                f"{self.name}: needs samples that the model was not trained on, {why}; give validation=..., a data "
                "source with a validation or test split, or a method without this need, such as lethe"
            )
        return self.context.held_out

    def learning_rate(self, given: float | None, per_width: float) -> float:
        """Return the given rate, or `per_width` / width.

        Adam moves a layer's output by about lr x width a step, so one number fits ViTs of every width (the scaling of
        hidden weights of Yang et al. 2022, arXiv 2203.03466).
        """
        return per_width / self.context.info.width if given is None else given


_REGISTRY: Registry[Method] = Registry("method")
register = _REGISTRY.register


def get_method(name: str) -> type[Method]:
    return _REGISTRY.find(name)


def list_methods() -> dict[str, type[Method]]:
    """Return all methods by name, in the order of registration."""
    return dict(_REGISTRY)


def refuse_unfit(method: type[Method], model: nn.Module) -> None:
    """Check that a model has what a method needs.

    Raises:
        UserError: It does not; the message lists the methods that the model can be used with.
    """
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
