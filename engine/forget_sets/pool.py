"""Input of a strategy: the training samples, and the outputs of one model for them. It has no test data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import RunConfig, build
from engine.core.result import Progress
from engine.data import Batch, Loader, Samples
from engine.errors import UserError
from engine.models.huggingface import as_classifier
from engine.models.info import classifiers, num_classes_of
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import outputs
from engine.runtime.device import autocast, resolve_device, resolve_precision

# Options of a run that the choice of a forget set has too.
READING_KEYS = ("batch_size", "precision", "device", "workers", "decode", "on_bad_image", "max_bad_share")


def reading(options: Mapping[str, Any]) -> RunConfig:
    """Return how images are read, from options of `READING_KEYS`.

    precision is fp32 unless it is given: bf16 would change the order of samples, and a list should not depend on the
    machine that made it.
    """
    return build(RunConfig, {"precision": "fp32", **options})


@dataclasses.dataclass(frozen=True)
class PoolMeasurements:
    """Four numbers for each sample, all [n]: they fit in memory for a million samples, logits would not.

    Attributes:
        losses: float64, cross-entropy in nats.
        correct: bool, the prediction is correct.
        error_norms: float64, ||p - y||, the norm of the gradient at the logits.
        input_norms: float64, the norm of the input of the last layer.
        readable: bool; False for images that cannot be read, whose other numbers have no meaning.
    """

    losses: np.ndarray
    correct: np.ndarray
    error_norms: np.ndarray
    input_norms: np.ndarray
    readable: np.ndarray


class Pool:
    """Training samples to choose from, and a model if there is one.

    Args:
        samples: The training samples.
        count: Number of samples to choose.
        seed: Seed of every draw.
        model: The model to be unlearned.
        run: How images are read and the model computes, see `reading`.
        progress: Called with (stage, step, steps, numbers).

    Raises:
        UserError: A label is beyond the model's head.
    """

    def __init__(
        self,
        samples: Samples,
        count: int,
        *,
        seed: int = 0,
        model: nn.Module | None = None,
        run: RunConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.samples, self.count, self.seed, self.progress = samples, count, seed, progress
        model = None if model is None else as_classifier(model)
        self._model, self._run = model, run or reading({})
        self._measurements: PoolMeasurements | None = None
        self._features: Tensor | None = None
        if model is not None and samples.labels.max() >= num_classes_of(model):
            raise UserError(
                f"{samples.name}: label {samples.labels.max()}, but the model's head has {num_classes_of(model)} "
                "classes; use the checkpoint trained on these labels"
            )

    @property
    def has_model(self) -> bool:
        return self._model is not None

    @functools.cached_property
    def device(self) -> torch.device:
        return resolve_device(self._run.device)

    @functools.cached_property
    def precision(self) -> str:
        return resolve_precision(self._run.precision, self.device)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model, on the device, in eval mode.

        Raises:
            UserError: There is none.
        """
        if self._model is None:
            raise UserError("forget set: this strategy needs a model; give --checkpoint")
        return self._model.to(self.device).eval()

    @functools.cached_property
    def loader(self) -> Loader:
        return Loader(
            self.samples,
            preprocessing_of(self.model),
            seed=self.seed,
            device=self.device,
            **{key: getattr(self._run, key) for key in READING_KEYS if key not in ("precision", "device")},
        )

    @property
    def measurements(self) -> PoolMeasurements:
        """Numbers of the model for each sample; one pass, at the first use."""
        if self._measurements is None:
            self._read(keep_features=False)
        assert self._measurements is not None
        return self._measurements

    @property
    def features(self) -> Tensor:
        """Input of the last linear layer, float32 [n, width], on the CPU; one pass, at the first use."""
        if self._features is None:
            self._read(keep_features=True)
        assert self._features is not None
        return self._features

    @property
    def candidates(self) -> np.ndarray:
        """Positions of the samples with readable images, int64."""
        return np.flatnonzero(self.measurements.readable)

    def last_layer(self) -> nn.Linear:
        """Return a copy of the last layer, which maps `features` to logits.

        DeiT has two heads and averages them; their inputs are then concatenated in `features`, each halved.
        """
        heads = _heads(self.model)
        weight = torch.cat([head.weight for head in heads], 1).detach().float()
        layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.zero_()
            for head in heads:
                if head.bias is not None:
                    layer.bias.add_(head.bias.float() / len(heads))
        return layer

    @property
    def bias_weight(self) -> float:
        """Contribution of the last layer's biases to the squared norm of its input.

        1; 0 without a bias; 1/2 for two heads, whose biases get half the gradient each.
        """
        heads = _heads(self.model)
        return sum(head.bias is not None for head in heads) / len(heads) ** 2

    def report_progress(self, stage: str, step: int, steps: int, numbers: dict[str, float] | None = None) -> None:
        if self.progress is not None:
            self.progress(stage, step, steps, numbers or {})

    @torch.no_grad()
    def _read(self, keep_features: bool) -> None:
        model, loader, heads = self.model, self.loader, _heads(self.model)
        inputs: dict[int, Tensor] = {}
        done = 0

        def compute(batch: Batch) -> tuple[Tensor, ...]:
            nonlocal done
            with autocast(self.device, self.precision):
                logits = outputs(model, batch.images)
            features = torch.cat([inputs[i] for i in range(len(heads))], 1).float() / len(heads)
            done += 1
            self.report_progress("reading", done, loader.steps())
            rows = (*_measure(logits.double(), batch.labels), features.double().norm(dim=1), batch.labels)
            return (*rows, features) if keep_features else rows

        with contextlib.ExitStack() as hooks:
            for i, head in enumerate(heads):
                handle = head.register_forward_pre_hook(functools.partial(_keep, inputs, i))
                hooks.callback(handle.remove)
            rows = loader.rows(compute)
        losses, correct, errors, norms, labels = (each.numpy() for each in rows[:5])
        readable = labels >= 0
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not finite.all():
            bad = self.samples.ids[int(np.flatnonzero(~finite)[0])]
            raise UserError(f"forget set: the model's output for {bad!r} is not finite; the checkpoint is broken")
        if self._measurements is None:
            self._measurements = PoolMeasurements(losses, correct > 0, errors, norms, readable)
        if keep_features:
            self._features = rows[5]


def _measure(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, correctness (1 or 0) and ||p - y|| of logits [B, classes], in float64.

    With r = logsumexp of the other classes minus the true logit, loss = log(1 + e^r) and 1 - p_y = sigmoid(r). Neither
    is rounded to 0 for confident predictions, so memorised samples still have an order.
    """
    true = labels[:, None]
    others = logits.scatter(1, true, -torch.inf)
    r = others.logsumexp(1) - logits.gather(1, true)[:, 0]
    wrong = logits.softmax(1).scatter(1, true, 0.0)
    error = (r.sigmoid().square() + wrong.square().sum(1)).sqrt()
    return torch.logaddexp(torch.zeros_like(r), r), (logits.argmax(1) == labels).double(), error


def _heads(model: nn.Module) -> list[nn.Linear]:
    heads: list[nn.Linear] = []
    for head in classifiers(model):
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(model).__name__} ends in {type(head).__name__}, not in a linear layer, so its last-layer "
                "features cannot be read"
            )
        heads.append(head)
    return heads


def _keep(inputs: dict[int, Tensor], i: int, _module: nn.Module, given: tuple[Any, ...]) -> None:
    inputs[i] = given[0]
