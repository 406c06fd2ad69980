"""Evaluation: accuracy, membership inference and agreement with retrained models, one file a question.

The package is a function too: `engine.evaluate(model, forget, retain, test)`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.evaluate.metrics import Evaluation, Evaluator, compare

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from engine.data import Samples

__all__ = ["Evaluation", "Evaluator", "compare"]


class _Evaluate(types.ModuleType):
    def __call__(
        self,
        model: nn.Module | str | Path,
        forget: Samples | Dataset[Any],
        retain: Samples | Dataset[Any],
        test: Samples | Dataset[Any],
        original: nn.Module | str | Path | None = None,
        references: Sequence[nn.Module | str | Path] = (),
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Measures a model on forget, retain and test samples, as `lethe evaluate` does.

        Args:
            model: a model, or a checkpoint (folder, `timm:NAME`, `hf-hub:ID`).
            forget, retain, test: `engine.data.Samples`, or datasets of (image, label). Test samples must be neither
                training nor validation samples.
            original: the model before unlearning, for numbers of its own.
            references: models retrained without the forget samples; two or more give the noise floor.
            config: precision, device, workers, decode, on_bad_image, max_bad_share as of `engine.RunConfig`.

        Returns:
            The contents of metrics.json: accuracy [0, 1] by set, mia, attacks, and with an original or references
            original, reference, gap (percentage points), noise_floor, agreement.

        Raises:
            UserError: an empty set, labels that the model's head does not have, or a reference that is none.

        Example:
            >>> engine.evaluate(result.model, forget, retain, test, original=model)["accuracy"]["test"]
        """
        evaluate_samples = sys.modules["engine"].evaluate_samples  # of a higher package: the root has it
        metrics: dict[str, Any] = evaluate_samples(
            {"forget": forget, "retain": retain, "test": test}, model, original, references, config
        )
        return metrics


sys.modules[__name__].__class__ = _Evaluate
