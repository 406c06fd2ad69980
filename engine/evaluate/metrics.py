"""metrics.json: an unlearned model, the original and the retrained references on the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from engine.data import Loader, Preprocessing, Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.agreement import SETS, agreement_report, mean_kl, top1_agreement
from engine.evaluate.gap import gap_report
from engine.evaluate.membership import DIRECTION, attack_report, loss_auc, non_member_calls
from engine.models.huggingface import as_classifier
from engine.models.info import num_classes_of
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.runtime.device import resolve_device, resolve_precision
from engine.runtime.process_group import ProcessGroup

GAPS = ("forget", "retain", "test", "mia")

# Most retain samples that are evaluated, at equal distances: enough for their accuracy to 0.2 points. For all samples
# of ImageNet the logits alone would take 5 GB a model.
MOST_RETAINED = 50_000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one model, and the predictions that they are computed from.

    Attributes:
        numbers: The numbers, as in metrics.json.
        predictions: Predictions by set (forget, retain, test).
        non_members: bool [n], forget samples that the membership attack of `mia.efficacy` calls non-members.
    """

    numbers: dict[str, Any]
    predictions: dict[str, Predictions]
    non_members: np.ndarray | None = None

    def gap_to(self, reference: Evaluation) -> dict[str, float]:
        """Return absolute differences to a reference in percentage points, and their mean (the field's average gap)."""
        mine, theirs = self._four(), reference._four()
        gap = {key: 100 * abs(mine[key] - theirs[key]) for key in GAPS}
        return {**gap, "average": float(np.mean(list(gap.values())))}

    def agreement_with(self, reference: Evaluation) -> dict[str, float]:
        """Return the agreement on the forget set: top1 [0, 1], kl = KL(reference || model) in nats."""
        mine, theirs = self.predictions["forget"], reference.predictions["forget"]
        return {"top1": top1_agreement(mine, theirs), "kl": mean_kl(theirs, mine)}

    def _four(self) -> dict[str, float]:
        return {**self.numbers["accuracy"], "mia": self.numbers["mia"]["efficacy"]}


class Evaluator:
    """Evaluates models on the same forget, retain and test set.

    Each model runs once over each set.

    Args:
        forget, retain, test: The sets. The test set must hold neither training nor validation samples.
        most: Retain samples, and test samples, that are evaluated, at equal distances; None: 50,000 retain samples, and
            all test samples.
        batch_size: Samples of a batch.
        precision, device, workers, decode, on_bad_image, max_bad_share: As in `engine.RunConfig`.

    Raises:
        UserError: A set is empty.
    """

    def __init__(
        self,
        forget: Samples,
        retain: Samples,
        test: Samples,
        *,
        most: int | None = None,
        batch_size: int = 250,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        device: str = "auto",
        workers: int | None = None,
        decode: str = "draft",
        on_bad_image: str = "raise",
        max_bad_share: float = 0.01,
    ) -> None:
        self.sets = {
            "forget": forget,
            "retain": evenly_spaced(retain, most or MOST_RETAINED),
            "test": evenly_spaced(test, most or len(test)),
        }
        for name, samples in self.sets.items():
            if not len(samples):
                raise UserError(f"evaluate: the {name} set has no samples")
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.loading: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "decode": decode,
            "on_bad_image": on_bad_image,
            "max_bad_share": max_bad_share,
        }
        self._loaders: dict[tuple[Preprocessing, str], Loader] = {}

    def predictions(self, model: nn.Module, name: str) -> Predictions:
        """Return the predictions of a model for one set (forget, retain, test), in the order of its samples."""
        return predict(model.to(self.device), self._loader(preprocessing_of(model), name), self.precision)

    def all_predictions(self, model: nn.Module) -> dict[str, Predictions]:
        """Return the predictions of a model for every set.

        Raises:
            UserError: A label is beyond the head, or an output is not finite.
        """
        model = as_classifier(model)
        for name, samples in self.sets.items():
            if samples.labels.max() >= num_classes_of(model):
                raise UserError(
                    f"evaluate: the {name} set has label {samples.labels.max()}, but the model's head has "
                    f"{num_classes_of(model)} classes"
                )
        predictions = {name: self.predictions(model, name) for name in self.sets}
        for name, p in predictions.items():
            if not np.isfinite(p.logits).all():
                bad = int(np.flatnonzero(~np.isfinite(p.logits).all(1))[0])
                raise UserError(
                    f"evaluate: the model's output for {name} sample {self.sets[name].ids[bad]!r} is not "
                    "finite; the checkpoint is broken"
                )
        return predictions

    def __call__(self, model: nn.Module) -> Evaluation:
        predictions = self.all_predictions(model)
        forget, retain, test = (predictions[name] for name in SETS)
        non_members = non_member_calls(forget, retain, test)
        numbers = {
            "evaluated": {name: len(p) for name, p in predictions.items()},
            "accuracy": {name: p.accuracy for name, p in predictions.items()},
            "mia": {
                "efficacy": float(non_members.mean()),
                "auc": loss_auc(forget, test),
                "direction": {name: DIRECTION[name] for name in ("efficacy", "auc")},
            },
        }
        return Evaluation(numbers, predictions, non_members)

    def _loader(self, preprocessing: Preprocessing, name: str) -> Loader:
        key = (preprocessing, name)
        if key not in self._loaders:  # decoded images are kept between models
            self._loaders[key] = Loader(
                self.sets[name], preprocessing, device=self.device, world=ProcessGroup.current(), **self.loading
            )
        return self._loaders[key]


def compare(
    model: Evaluation,
    references: Sequence[Evaluation],
    original: Evaluation | None = None,
    seconds: Mapping[str, float] | None = None,
    samples_seen: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the contents of metrics.json. With several references: means, and the spread (largest minus smallest).

    "attacks" (`membership.attacks`; also of the original and, means, of the references), "agreement"
    (`agreement.agreement_report`) and "gap_to_mean" (`gap.gap_report`) are included if the evaluations hold the
    predictions of all three sets.

    Args:
        model: Evaluation of the unlearned model.
        references: Evaluations of retrained models.
        original: Evaluation of the original.
        seconds: Wall-clock seconds by phase.
        samples_seen: Training samples by phase.
    """
    metrics: dict[str, Any] = dict(model.numbers)
    if original is not None:
        metrics["original"] = dict(original.numbers)
    if references:
        metrics.update(_against(model, references))
        if original is not None:
            metrics["original"].update(_against(original, references))
    if len(references) > 1:
        pairs = [a.gap_to(b) for i, a in enumerate(references) for b in references[i + 1 :]]
        agreements = [a.agreement_with(b) for i, a in enumerate(references) for b in references[i + 1 :]]
        metrics["noise_floor"] = {**_mean(pairs), "agreement": _mean(agreements)}
    if all(each.predictions.keys() >= set(SETS) for each in (model, *references, *([original] if original else []))):
        _add_details(metrics, model, references, original)
    metrics["seconds"] = dict(seconds or {})
    metrics["samples_seen"] = dict(samples_seen or {})
    return metrics


def _add_details(
    metrics: dict[str, Any], model: Evaluation, references: Sequence[Evaluation], original: Evaluation | None
) -> None:
    retrained = [reference.predictions for reference in references]
    before = original.predictions if original is not None else None
    attacked = attack_report(model.predictions, before, retrained)
    metrics["attacks"] = attacked.pop("model")
    for name, numbers in attacked.items():
        metrics[name]["attacks"] = numbers
    if references or original is not None:
        evaluations = [model, *([original] if original is not None else []), *references]
        calls = [e.non_members for e in evaluations if e.non_members is not None]
        metrics["agreement"] = agreement_report(
            model.predictions,
            before,
            retrained,
            non_members=calls if len(calls) == len(evaluations) else None,
        )
        if references and len(calls) == len(evaluations):
            measured = [(each.predictions, called) for each, called in zip(evaluations, calls, strict=True)]
            first = 1 if original is None else 2
            metrics["gap_to_mean"] = gap_report(measured[0], measured[first:], measured[1] if first == 2 else None)


def _against(model: Evaluation, references: Sequence[Evaluation]) -> dict[str, Any]:
    gaps = [model.gap_to(reference) for reference in references]
    accuracies = [reference.numbers["accuracy"] for reference in references]
    attacks = [{k: reference.numbers["mia"][k] for k in ("efficacy", "auc")} for reference in references]
    agreements = [model.agreement_with(reference) for reference in references]
    evenly_spaced = {
        "spread": {
            "accuracy": _spread(accuracies),
            "mia": _spread(attacks),
            "agreement": _spread(agreements),
            "gap": _spread(gaps),
        }
    }
    return {
        "reference": {
            "accuracy": _mean(accuracies),
            "mia": _mean(attacks),
            "agreement": _mean(agreements),
            "count": len(references),
            **(evenly_spaced if len(references) > 1 else {}),
        },
        "gap": _mean(gaps),
    }


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.ptp([row[key] for row in rows])) for key in rows[0]}
