"""Check before the work: accuracy of the untouched model on a few hundred retained samples.

A model that is used with another mean and std, another order of labels or other weights than in its training still
runs, and can still be unlearned, but the result is worthless. It is therefore an error if the accuracy is near chance,
far below the known accuracy of the model, or clearly lower than with another usual mean and std, with exchanged labels
or with the checkpoint's other weights. The tests are in `engine.core.plausibility`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import read_yaml
from engine.core.plausibility import (
    MARGIN,
    chance_of,
    is_clearly_better,
    is_far_below,
    is_near_chance,
    permutation,
)
from engine.data import Loader, Samples
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint
from engine.models.checkpoint_source import CheckpointSource
from engine.models.info import num_classes_of
from engine.models.preprocessing import STATISTICS, preprocessing_of
from engine.models.spec import spec_of
from engine.models.unwrap import Kind
from engine.models.vit import outputs
from engine.runtime.device import autocast, resolve_device, resolve_precision
from engine.runtime.process_group import ProcessGroup

SAMPLES = 400
_BATCH = 50
_LOADING = ("workers", "decode", "on_bad_image", "max_bad_share")
_OTHER_WEIGHTS: dict[str, Kind] = {"raw": "ema", "ema": "raw"}


@dataclasses.dataclass(frozen=True)
class Expected:
    """An accuracy that a model is known to have.

    Attributes:
        accuracy: In [0, 1].
        source: Source of the accuracy, for messages.
    """

    accuracy: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """Result of the check.

    Attributes:
        predicted, labels: int64 [n].
        class_names: Class names by label.
        others: Correct answers, bool [n], by the options that would have to be given, such as `--mean imagenet --std
            imagenet`.
        exchanged: (answered label by the data's label, correct answers, bool [n], with labels exchanged in this way);
            None if no exchange was found.
        seconds: Wall-clock time of the check.
    """

    predicted: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    others: dict[str, np.ndarray]
    exchanged: tuple[dict[int, int], np.ndarray] | None
    seconds: float

    @property
    def correct(self) -> np.ndarray:
        return self.predicted == self.labels

    def line(self) -> str:
        return (
            f"accuracy of the untouched model: {_percent(self.correct)} of {len(self.labels)} retained samples (chance "
            f"{100 * chance_of(self.labels):.1f}%; {self.seconds:.1f} s)"
        )

    def entry(self) -> dict[str, Any]:
        """Return the result for the request in record.json."""
        return {
            "untouched_model": {
                "samples": len(self.labels),
                "accuracy": float(self.correct.mean()),
                "chance": chance_of(self.labels),
                "others": {name: float(correct.mean()) for name, correct in self.others.items()},
            }
        }


def measure_accuracy(
    model: nn.Module, samples: Samples, checkpoint: str, config: Mapping[str, Any]
) -> AccuracyCheck | None:
    """Measure the accuracy of a model on up to 400 samples, and of other ways to feed it.

    The main rank measures, and all ranks return its result. The other ways are only tried below 95%: above it, none can
    be 5 points better.

    Args:
        model: The untouched model.
        samples: Retained samples.
        checkpoint: Checkpoint of the model, which may hold other weights.
        config: Options of the run, by name.

    Returns:
        The result; None if no sample can be read.
    """
    world = ProcessGroup.current()
    found: list[AccuracyCheck | None] = [None]

    def on_main() -> None:
        found[0] = _measure(model, samples, checkpoint, config)

    world.on_main(on_main)
    return world.broadcast(found[0])


def _measure(model: nn.Module, samples: Samples, checkpoint: str, config: Mapping[str, Any]) -> AccuracyCheck | None:
    began = time.perf_counter()
    chosen = stratified(samples, SAMPLES)
    device = resolve_device(config.get("device", "auto"))
    predictor = _Predictor(model, chosen, device, config)
    home = next(model.parameters()).device
    try:
        predicted, labels = predictor.of(model.to(device))
        others: dict[str, np.ndarray] = {}
        if len(labels) and (predicted == labels).mean() < 1 - MARGIN:
            others = {name: each == labels for name, each in predictor.with_statistics(model).items()}
            other = _other_weights(model, checkpoint)
            if other is not None:
                name, weights = other
                others[name] = predictor.of(weights.to(device))[0] == labels
    finally:
        model.to(home)
    if not len(labels):
        return None
    exchanged = permutation(predicted, labels, num_classes_of(model))
    return AccuracyCheck(
        predicted=predicted,
        labels=labels,
        class_names=samples.class_names,
        others=others,
        exchanged=(exchanged.moved, exchanged.correct) if exchanged else None,
        seconds=time.perf_counter() - began,
    )


def stratified(samples: Samples, count: int) -> Samples:
    """Return at most `count` samples at equal distances in the order of labels: classes keep their shares."""
    if len(samples) <= count:
        return samples
    shuffled = np.random.default_rng(0).permutation(len(samples))  # a class's own order may be one of difficulty
    by_label = shuffled[np.argsort(samples.labels[shuffled], kind="stable")]
    places = np.linspace(0, len(samples) - 1, count).astype(np.int64)
    return samples.subset(np.sort(by_label[places]))


class _Predictor:
    """Predictions for a few samples, which are decoded once."""

    def __init__(self, model: nn.Module, samples: Samples, device: torch.device, config: Mapping[str, Any]) -> None:
        self.preprocessing, self.samples = preprocessing_of(model), samples
        loading = {key: config[key] for key in _LOADING if key in config}
        self.loader = Loader(
            samples, self.preprocessing, batch_size=_BATCH, device=device, world=ProcessGroup(), **loading
        )
        self.device, self.precision = device, resolve_precision(config.get("precision", "auto"), device)

    @torch.no_grad()
    def of(
        self, model: nn.Module, change: Callable[[Tensor], Tensor] = lambda images: images
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return predictions and labels, each int64 [n], of the samples that can be read.

        Args:
            model: The model.
            change: Applied to the normalised images.
        """
        was_training, model = model.training, model.eval()
        half = next(model.parameters()).dtype.itemsize < 4
        rows = []
        for batch in self.loader.ordered():
            if batch.weight:
                with autocast(self.device, "fp32" if half else self.precision):
                    logits = outputs(model, change(batch.images)).float()
                rows.append((logits.cpu(), batch.labels.cpu()))
        model.train(was_training)
        if not rows:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        logits, labels = (torch.cat(each) for each in zip(*rows, strict=True))
        if not torch.isfinite(logits).all():
            raise UserError(
                "the untouched model gives outputs that are not finite; the checkpoint is broken, or needs --set "
                "precision=fp32"
            )
        return logits.argmax(1).numpy(), labels.numpy()

    def with_statistics(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return predictions with each other usual mean and std; none for images that are already normalised."""
        channels = len(self.preprocessing.mean)
        if self.samples.tensor(self._readable(), channels).dtype != torch.uint8:
            return {}
        own = _affine(self.preprocessing.mean, self.preprocessing.std, channels, self.device)
        found = {}
        for name, (mean, std) in STATISTICS.items():
            other = _affine(mean, std, channels, self.device)
            if all(torch.allclose(a, b, atol=1e-3) for a, b in zip(own, other, strict=True)):
                continue
            scale, shift = own[1] / other[1], (own[0] - other[0]) / other[1]
            change = functools.partial(_moved, scale=scale, shift=shift)
            found[f"--mean {name} --std {name}"] = self.of(model, change)[0]
        return found

    def _readable(self) -> int:
        bad = self.loader.bad_ids
        return next(i for i, sample_id in enumerate(self.samples.ids) if sample_id not in bad)


def _moved(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return images * scale + shift


def _affine(mean: Any, std: Any, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = (np.asarray(each, dtype=np.float32) for each in (mean, std))
    tensors = [torch.from_numpy(v if len(v) == channels else np.full(channels, v.mean(), np.float32)) for v in values]
    return tensors[0].view(1, -1, 1, 1).to(device), tensors[1].view(1, -1, 1, 1).to(device)


def _other_weights(model: nn.Module, checkpoint: str) -> tuple[str, nn.Module] | None:
    """Load the checkpoint's other weights, raw or EMA.

    Returns:
        (the option that would have to be given, the model); None if the checkpoint does not hold both.
    """
    try:
        taken = spec_of(model).extra.get("lethe_import", {}).get("weights", "")
        kind = _OTHER_WEIGHTS[taken]
        other = load_checkpoint(checkpoint, weights=kind)
    except (UserError, AttributeError, KeyError, TypeError):
        return None
    model_cfg = getattr(model, "pretrained_cfg", None)
    if preprocessing_of(other).size != preprocessing_of(model).size:
        return None
    other.pretrained_cfg = model_cfg  # type: ignore[assignment]
    return f"--weights {kind}", other


def recorded_accuracy(checkpoint: str, data: str) -> Expected | None:
    """Return the retain accuracy in the metrics.json next to a checkpoint, if it was measured on the same data.

    Args:
        checkpoint: The checkpoint.
        data: Spec of the data source.

    Returns:
        The accuracy and its source; None if there is none.
    """
    try:
        folder = CheckpointSource.parse(checkpoint).folder
        if read_yaml(folder / "config.yaml").get("data") != data:
            return None
        accuracy = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["accuracy"]["retain"]
        return Expected(float(accuracy), f"{folder / 'metrics.json'}")
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return None


def check_accuracy(
    check: AccuracyCheck,
    model: nn.Module,
    checkpoint: str,
    expected: Expected | None,
    accept: Callable[[str], None] | None = None,
) -> None:
    """Check that the accuracy of the untouched model is plausible.

    Args:
        check: The measured accuracy.
        model: The model, whose preprocessing is named in the message.
        checkpoint: Its checkpoint, for messages.
        expected: Accuracy that the model is known to have; None if unknown.
        accept: Receives the message as a warning, in place of the error.

    Raises:
        UserError: It is not plausible, and `accept` is None.
    """
    problem = _problem(check, expected)
    if problem is None:
        return
    text = f"checkpoint {checkpoint}: accuracy of the untouched model on {len(check.labels)} retained samples is "
    text += f"{_percent(check.correct)}, {problem}"
    if accept is not None:
        accept(f"warning: {text} (accepted)")
        return
    used = preprocessing_of(model)
    raise UserError(
        f"{text}. Likely reasons: the order of labels (--class-map, --label-order), mean and std (--mean, --std; now "
        f"{used.line()}), the input size (--input-size) or the weights (raw or EMA, --weights). If the accuracy "
        "is right: --accept-accuracy"
    )


def _problem(check: AccuracyCheck, expected: Expected | None) -> str | None:
    """Return why an accuracy is not plausible, with what was observed; None if it is."""
    observed = _observed(check)
    if is_near_chance(int(check.correct.sum()), check.labels):
        constant = chance_of(check.labels)
        why = f"near chance ({100 * constant:.1f}%)" if constant < 1 else "though all of them are of one class"
    elif expected is not None and is_far_below(check.correct, expected.accuracy):
        why = f"far below the {100 * expected.accuracy:.1f}% of {expected.source}"
    elif observed:
        return "; ".join(observed)
    else:
        return None
    return "; ".join([why, *observed])


def _observed(check: AccuracyCheck) -> list[str]:
    """Return what would be clearly better, the best first."""
    lines = []
    better = {
        name: correct
        for name, correct in check.others.items()
        if is_clearly_better(correct, check.correct) and not is_near_chance(int(correct.sum()), check.labels)
    }
    if better:
        name = max(better, key=lambda each: better[each].sum())
        lines.append(f"{name} would give {_percent(better[name])}")
    if check.exchanged:
        moved, correct = check.exchanged
        shown = [f"{_name(check, a)} is predicted as {_name(check, b)}" for a, b in list(moved.items())[:3]]
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        lines.append(
            f"labels are probably permuted: {', '.join(shown)}{more}; with these labels exchanged it would be "
            f"{_percent(correct)}"
        )
    return lines


def _name(check: AccuracyCheck, label: int) -> str:
    return repr(check.class_names[label]) if label < len(check.class_names) else f"label {label}"


def _percent(correct: np.ndarray) -> str:
    return f"{100 * correct.mean():.1f}%"
