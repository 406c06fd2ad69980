"""Evaluation: accuracy, membership inference and agreement with retrained models, one measure per file.

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
        """Measure a model on forget, retain and test set, as `lethe evaluate` does.

        Args:
            model: A model, or a checkpoint (folder, `timm:NAME`, `hf-hub:ID`).
            forget, retain, test: `engine.data.Samples`, or datasets of (image, label). The test set must hold neither
                training nor validation samples.
            original: The model before unlearning, which is measured too.
            references: Models retrained without the forget set; two or more define the noise floor.
            config: precision, device, workers, decode, on_bad_image, max_bad_share as in `engine.RunConfig`.

        Returns:
            The contents of metrics.json: accuracy [0, 1] by set, mia, attacks, and with an original or references
                original, reference, gap (percentage points), noise_floor, agreement.

        Raises:
            UserError: A set is empty, a label is beyond the model's head, or a reference is not a retrained model.

        Example:
            >>> engine.evaluate(result.model, forget, retain, test, original=model)["accuracy"]["test"]
        """
        evaluate_samples = sys.modules["engine"].evaluate_samples  # of a higher package, exported by the root
        metrics: dict[str, Any] = evaluate_samples(
            {"forget": forget, "retain": retain, "test": test}, model, original, references, config
        )
        return metrics


sys.modules[__name__].__class__ = _Evaluate
