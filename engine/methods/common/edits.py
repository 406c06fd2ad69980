"""Base class of methods that edit weights in one step, with an optional repair on the retain set."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method
from engine.core.phase import Phase, edit_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.errors import UserError
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.losses import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Options of every edit.

    Attributes:
        retain_epochs: Passes over the retain set after the edit, to repair the model; 0: none, as published.
        lr: Peak learning rate of that repair; null: 0.192 / width.
    """

    retain_epochs: float = tunable(0.0, Range(0, 8, step=1))
    lr: float | None = tunable(None, rate(RETAIN_LR_PER_WIDTH))

    def __post_init__(self) -> None:
        require(self.retain_epochs >= 0, "retain_epochs", self.retain_epochs, "0 or more")
        positive_or_null(self, "lr")


class Edit(Method):
    """Base class of edits. A subclass defines `change` in place of `phases` and `loss`."""

    one_process = "it edits weights by hand, which needs each of them and its gradient whole"

    def __init__(self, config: EditConfig, context: Context) -> None:
        super().__init__(config, context)
        if context.run.trainable.startswith("lora"):
            raise UserError(
                f"option trainable={context.run.trainable!r}: {self.name} edits the weights of the model, and "
                "low-rank updates start at zero; use trainable=all, head or last:N"
            )

    def phases(self) -> list[Phase]:
        edit = edit_phase()
        lr = self.learning_rate(self.config.lr, RETAIN_LR_PER_WIDTH)
        retain = Phase(name="retain", samples="retain", epochs=self.config.retain_epochs, lr=lr)
        return [edit, retain] if retain.epochs > 0 else [edit]

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return False

    def edit(self, model: nn.Module, phase: Phase) -> None:
        if phase.name == "edit":
            self.change(model)

    def change(self, model: nn.Module) -> None:
        """Edit the weights that require a gradient; called once.

        Args:
            model: The model to edit, with the weights of the original.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}
