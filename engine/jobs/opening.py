"""Opening the models of a command: one preprocessing, one order of labels, and a check before the work."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from engine.core.method import refuse_unfit
from engine.data.labels import match_names, relabelled, relabelled_source, same_names, shown
from engine.errors import UserError
from engine.jobs.preflight import AccuracyCheck, Expected, check_accuracy, measure_accuracy, recorded_accuracy
from engine.methods import get_method
from engine.models.checkpoint import load_checkpoint
from engine.models.huggingface import as_classifier
from engine.models.info import num_classes_of
from engine.models.labels import label_names, names_for, set_label_names
from engine.models.preprocessing import Changes, origins, origins_line, preprocessing_of

if TYPE_CHECKING:
    from engine.data import Samples, Source
    from engine.jobs.task import Task

# Accuracy from which on inputs cannot be clearly wrong.
_CERTAIN = 0.95
LabelOrder = Literal["auto", "data"]
_current: contextvars.ContextVar[Opening | None] = contextvars.ContextVar("opening", default=None)


def current() -> Opening:
    """Return the opening of the running command; if there is none, one that changes and prints nothing."""
    return _current.get() or Opening(checked=False)


def open_model(checkpoint: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a checkpoint, with the changes of the running command (`Opening.active`) if it has any.

    Args:
        checkpoint, options: As of `load_checkpoint`.
    """
    return current().model(checkpoint, **options)


def open_given(model: nn.Module | str | Path) -> nn.Module:
    """Return a model as a classifier, or load it if it is given as a checkpoint."""
    return open_model(model) if isinstance(model, (str, Path)) else as_classifier(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """Options that a command was given for its models.

    Attributes:
        changes: Values that replace those of the models' pretrained_cfg, in all of them.
        label_order: auto matches the data's class names with the checkpoint's; data keeps the data's numbers.
        expect: Accuracy [0, 1] on retained samples that the original is expected to have; None: the recorded one.
        accept: Continue whatever the accuracy of the original is.
        checked: Whether the accuracy of the original is measured.
        notify: Receives lines to print.
    """

    changes: Changes = dataclasses.field(default_factory=Changes)
    label_order: LabelOrder = "auto"
    expect: float | None = None
    accept: bool = False
    checked: bool = True
    notify: Callable[[str], None] = lambda line: None
    _ready: dict[str, nn.Module] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, kept: Mapping[str, Any] | None) -> Opening:
        """Create an opening from what `to_dict` returned; for None, one that changes nothing."""
        if not kept:
            return cls(checked=False)
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in kept["preprocessing"].items()
        }
        return cls(changes=Changes(**values), label_order=kept["label_order"], checked=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what changes models and labels, JSON-ready."""
        return {"preprocessing": dataclasses.asdict(self.changes), "label_order": self.label_order}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make `open_model` apply these changes inside the context."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._ready.clear()

    def model(self, checkpoint: str | os.PathLike[str], **options: Any) -> nn.Module:
        """Load a checkpoint and apply the changes.

        The first call for a checkpoint that `prepare` has loaded returns that model.
        """
        name = os.fspath(checkpoint)
        if name in self._ready:
            return self._ready.pop(name)
        model = load_checkpoint(checkpoint, **options)
        given = self.changes.values()
        if not given:
            return model
        recorded = {key for key, where in origins(model, Changes()).items() if where == "checkpoint"}
        before = preprocessing_of(model)
        self.changes.apply(model)
        if before != preprocessing_of(model) and recorded & given.keys():
            self.notify(
                f"{name}: the preprocessing of the checkpoint ({before.line()}) is replaced by that of the command"
            )
        return model

    def prepare(
        self,
        task: Task,
        checkpoint: str,
        others: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
        method: str | None = None,
    ) -> tuple[Task, AccuracyCheck | None]:
        """Run all checks before the work, and print preprocessing, classes and accuracy.

        Args:
            task: The task with the data's labels.
            checkpoint: The untouched model.
            others: Further models of the command by the option that gave them, such as `--reference PATH`.
            config: Options of the run, by name.
            method: Name of the unlearning method; None if the command runs none.

        Returns:
            (the task in the model's order of labels, the result of `check`).

        Raises:
            UserError: Class names do not match, models have different orders of labels, the head has no output for a
                label, the method needs what the model does not have, or the accuracy is not plausible: the model
                receives a wrong input.
        """
        original = self.model(checkpoint)
        if method is not None:
            refuse_unfit(get_method(method), original)
        self.print_preprocessing(original)
        mapping, names, line = self.match(task.source.train, original)
        self.notify(line)
        if mapping is not None:
            task = task.relabelled(mapping, names)
        for name, other in others.items():
            self.compare(name, self.model(other), original)
        check_head(task.source.train, original, checkpoint, task.source.spec)
        check = self.check(original, task.retain, checkpoint, task.source.spec, config or {})
        task = dataclasses.replace(task, facts={**task.facts, **self.facts(original)})
        self._ready[checkpoint] = original
        return task, check

    def check_samples(
        self, samples: Samples, model: nn.Module, checkpoint: str, data: str, config: Mapping[str, Any]
    ) -> Samples:
        """Return training samples in the model's order of labels, checked and printed as in `prepare`."""
        self.print_preprocessing(model)
        mapping, names, line = self.match(samples, model)
        self.notify(line)
        samples = samples if mapping is None else relabelled(samples, mapping, names)
        check_head(samples, model, checkpoint, data)
        self.check(model, samples, checkpoint, data, config)
        return samples

    def prepare_training(
        self, source: Source, task: Task | None, model: nn.Module
    ) -> tuple[Source, Task | None, dict[str, Any]]:
        """Put the data of a training in the order of labels of its model, and print preprocessing and classes.

        Args:
            source: The data.
            task: The forget request, if there is one.
            model: A model with fresh weights or a fresh head. It receives the changes, and class names if it has none.

        Returns:
            (the data in the order of labels of the model, the task likewise, what config.yaml keeps).
        """
        self.changes.apply(model)
        self.print_preprocessing(model)
        try:
            mapping, names, line = self.match(source.train, model)
        except UserError:  # an architecture is taken from a model of other classes
            mapping, names, line = None, source.train.class_names, ""
        if mapping is None and names:  # the names of a fresh model are those of the data: nothing was compared
            line = f"classes: {len(names)}, {shown(names)}; in the data's order"
        self.notify(line)
        if mapping is not None:
            source = relabelled_source(source, mapping, names)
            task = task.relabelled(mapping, names) if task else None
        set_label_names(model, names)
        return source, task, {"preprocessing": preprocessing_of(model).to_dict()}

    def check(
        self, model: nn.Module, samples: Samples, checkpoint: str, data: str, config: Mapping[str, Any]
    ) -> AccuracyCheck | None:
        """Measure and print the accuracy of an untouched model on some samples.

        Returns:
            The result; None if the check is off or there are no samples.

        Raises:
            UserError: The accuracy is not plausible, as in `prepare`, and `accept` is off.
        """
        if not self.checked:
            return None
        expected = recorded_accuracy(checkpoint, data)
        if self.expect is not None:
            expected = Expected(self.expect, "--expect-accuracy")
        check = measure_accuracy(model, samples, checkpoint, config)
        if check is not None:
            self.notify(check.line())
            if expected is None and check.correct.mean() < _CERTAIN:
                self._print_defaults(model)
            check_accuracy(check, model, checkpoint, expected, self.notify if self.accept else None)
        return check

    def _print_defaults(self, model: nn.Module) -> None:
        """Print which of mean and std are timm's default, so that the accuracy may be that of a model fed wrongly."""
        where = origins(model, self.changes)
        if unknown := [key for key in ("mean", "std") if where[key] == "default"]:
            self.notify(
                f"{' and '.join(unknown)}: timm's default, since the checkpoint gives none. If you measured another "
                "accuracy, give those of the training (--mean, --std); --expect-accuracy 0.9 makes it an error"
            )

    def print_preprocessing(self, model: nn.Module) -> None:
        self.notify(f"preprocessing: {preprocessing_of(model).line()} ({origins_line(model, self.changes)})")

    def in_order_of(self, source: Source, model: nn.Module) -> Source:
        """Return the data with labels in the model's order of classes."""
        mapping, names, _ = self.match(source.train, model)
        return source if mapping is None else relabelled_source(source, mapping, names)

    def match(self, samples: Samples, model: nn.Module) -> tuple[np.ndarray | None, list[str], str]:
        """Match the data's class names with those of the model.

        Returns:
            (new label of each of the data's labels, or None if nothing changes; class names by new label; line to
            print).

        Raises:
            UserError: The names do not match.
        """
        found, classes = samples.class_names, num_classes_of(model)
        count = len(found) or (int(samples.labels.max()) + 1 if len(samples) else 0)
        head = f"classes: {count}{f' of the {classes} of the model' if count != classes else ''}"
        listed = f", {shown(found)}" if found else ""
        if self.label_order == "data":
            return None, found, f"{head}{listed}; in the data's order, as asked for by --label-order data"
        wanted, where = names_for(model, found)
        if not wanted:
            caution = "" if count == classes else ": they stand for the first labels of the model"
            return None, found, f"{head}{listed}; in the data's order, the checkpoint gives no names{caution}"
        if not found:
            return None, found, f"{head}; the data gives no names: its numbers are taken for those of {where}"
        mapping = match_names(found, wanted, where)
        if (mapping == np.arange(len(found))).all() and len(found) == len(wanted):
            return None, found, f"{head}{listed}; the data's order is that of {where}"
        moved = f"{found[0]!r} is label {mapping[0]}, {found[-1]!r} is label {mapping[-1]}"
        return mapping, wanted, f"{head}, matched by name: labels in the order of {where}; {moved}"

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Return what config.yaml and record.json keep of the options; a repeated command gives the same."""
        return {
            "preprocessing": preprocessing_of(model).to_dict(),
            "label_order": self.label_order,
            **({"expect_accuracy": self.expect} if self.expect is not None else {}),
            **({"accept_accuracy": True} if self.accept else {}),
        }

    def compare(self, name: str, model: nn.Module, original: nn.Module) -> None:
        """Check a further model against the original.

        Raises:
            UserError: The models have different orders of classes, or, unless `accept`, different preprocessings: then
                the inputs of one are probably wrong, and a comparison has no meaning.
        """
        if self.label_order == "auto":
            mine, theirs = label_names(model), label_names(original)
            if mine and theirs and not same_names(mine, theirs):
                raise UserError(f"{name}: {_first_difference(mine, theirs)}; give models of one order of classes")
        used, first = preprocessing_of(model), preprocessing_of(original)
        if used == first:
            return
        text = f"{name} has its own preprocessing ({used.line()}), the original has another ({first.line()})"
        if self.accept:
            self.notify(f"warning: {text} (accepted)")
            return
        raise UserError(
            f"{text}: one of the two is probably wrong. Give the values of the training, such as --mean, --std and "
            "--crop-pct, which then apply to all models; if both are right: --accept-accuracy"
        )


def check_head(samples: Samples, model: nn.Module, checkpoint: str, data: str) -> None:
    """Check that the model has an output for each label.

    Raises:
        UserError: It has none for a label.
    """
    classes = num_classes_of(model)
    if len(samples) and samples.labels.max() >= classes:
        raise UserError(
            f"checkpoint {checkpoint}: its head has {classes} classes, but {data} has label "
            f"{samples.labels.max()}; give the data that it was trained on, or a checkpoint with class names "
            "(label_names in config.json) to match by"
        )


def _first_difference(mine: Sequence[str], theirs: Sequence[str]) -> str:
    if len(mine) != len(theirs):
        return f"it has {len(mine)} classes, the original {len(theirs)}"
    label = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if not same_names([a], [b]))
    return f"its label {label} is {mine[label]!r}, the original's {theirs[label]!r}"


def read_accuracy(text: str | None) -> float | None:
    """Parse `0.92`, `92` or `92%` as a share in (0, 1]; None is returned unchanged.

    Raises:
        UserError: The text is anything else.
    """
    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    share = value / 100 if text.strip().endswith("%") or value > 1 else value
    if not 0 < share <= 1:
        raise UserError(f"--expect-accuracy {text}: expected an accuracy, such as 0.92 or 92%")
    return share
