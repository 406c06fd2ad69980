"""Choose a forget set by a strategy, as a list of ids for `--forget FILE` and a description."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from engine.config import RunConfig, build, require, to_dict
from engine.core.result import Progress
from engine.data import Samples, from_dataset
from engine.errors import UserError, nearest
from engine.forget_sets.base import Selection, get_strategy
from engine.forget_sets.pool import READING_KEYS, Pool, reading
from engine.runtime.files import replacing


@dataclasses.dataclass(frozen=True)
class ForgetSet:
    """A forget set that was chosen.

    Attributes:
        strategy, options, seed: How it was chosen.
        samples: The samples that it was chosen from.
        selection: The chosen samples, in rank order.
        description: See `describe`, by set: chosen, random (as many, drawn at random), all.
        seconds: Wall-clock time of select (with its passes over the images) and describe.
    """

    strategy: str
    options: dict[str, Any]
    seed: int
    samples: Samples
    selection: Selection
    description: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    @property
    def ids(self) -> list[str]:
        """The ids, first rank first."""
        return list(self.samples.ids.take(self.selection.indices))

    def write(self, path: Path) -> None:
        """Write a CSV with the columns id, score, rank (from 1), first rank first: a forget request with its
        provenance.

        Raises:
            UserError: The file does not end in .csv or cannot be written, or an id holds a line break.
        """
        require_csv(path)
        for sample_id in self.ids:
            if sample_id.splitlines() not in ([], [sample_id]):
                raise UserError(f"the id {sample_id!r} holds a line break, and a list has one id a line; rename it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
                writer = csv.writer(handle, lineterminator="\n")
                rows = self.samples.id_kind.rows if self.samples.id_kind else None
                tied = [] if rows is None else [rows]  # positions are valid for this number of rows alone
                writer.writerow(["id", "score", "rank", *(["rows"] if tied else [])])
                for rank, (sample_id, score) in enumerate(
                    zip(self.ids, self.selection.scores.tolist(), strict=True), 1
                ):
                    writer.writerow([sample_id, repr(score), rank, *tied])
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the description for JSON; the ids are in the CSV."""
        strategy, scores = get_strategy(self.strategy), self.selection.scores
        return {
            "strategy": self.strategy,
            "summary": strategy.summary,
            "options": self.options,
            "seed": self.seed,
            "count": len(scores),
            "share": len(scores) / len(self.samples),
            "samples_sha256": self.samples.fingerprint(),
            "score": {"meaning": strategy.score, "first": float(scores[0]), "last": float(scores[-1])},
            "facts": self.selection.facts,
            "description": self.description,
            "seconds": self.seconds,
        }


def choose_forget_set(
    samples: Samples | Dataset[Any],
    strategy: str,
    *,
    share: float | None = None,
    count: int | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ForgetSet:
    """Choose samples to forget from training samples; the result depends on the arguments alone.

    Args:
        samples: Training samples, never test samples; `engine.data.Samples` or a map-style dataset of (image, label).
        strategy: A name of `list_strategies()`.
        share, count: Size of the set, as a share in (0, 1) or as a number; one of the two.
        model: The checkpoint that is to be unlearned, moved to the run's device; some strategies need it, and the
            description uses it.
        seed: Seed of every draw.
        config: The strategy's options, and batch_size, device, workers, decode, on_bad_image, max_bad_share as for a
            run, and precision (fp32 unless given).
        progress: Called with (stage, step, steps, numbers).

    Raises:
        UserError: The strategy, class or option is unknown, no or all samples would be chosen, or the model is missing.
    """
    samples = from_dataset(samples, "train")
    cls = get_strategy(strategy)
    wanted = _count(len(samples), share, count)
    run, options = _split(config or {}, cls.Config)
    if cls.needs_model and model is None:
        raise UserError(f"strategy {strategy} needs a model; give the checkpoint that is to be unlearned")
    pool = Pool(samples, wanted, seed=seed, model=model, run=run, progress=progress)
    began = time.perf_counter()
    selection = cls(options).select(pool)
    selected = time.perf_counter()
    assert len(np.unique(selection.indices)) == len(selection.scores) == wanted
    random = np.random.default_rng([seed, 1]).permutation(len(samples))[:wanted]
    sets = {"chosen": selection.indices, "random": random, "all": np.arange(len(samples))}
    description = {name: describe(pool, indices) for name, indices in sets.items()}
    seconds = {"select": selected - began, "describe": time.perf_counter() - selected}
    return ForgetSet(strategy, to_dict(options), seed, samples, selection, description, seconds)


def require_csv(path: Path) -> None:
    """Check that a path ends in .csv.

    Raises:
        UserError: It does not.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"--out {path}: the list is a CSV file, and is read as one by its name; end it in .csv")


def describe(pool: Pool, indices: np.ndarray) -> dict[str, Any]:
    """Return a description of a set of samples.

    Args:
        pool: The samples, and the model if there is one.
        indices: Positions of the set.

    Returns:
        samples; classes (sizes); largest_class with its share; imbalance: total variation distance [0, 1] between the
            set's class shares and those of all samples, 0 if they are the same. With a model: its accuracy [0, 1] and
            mean loss in nats on the readable images, and the number of unreadable ones.
    """
    labels = pool.samples.labels
    sizes, everywhere = (np.bincount(each, minlength=labels.max() + 1) for each in (labels[indices], labels))
    names = pool.samples.class_names or [str(i) for i in range(len(sizes))]
    largest = int(sizes.argmax())
    numbers: dict[str, Any] = {
        "samples": len(indices),
        "classes": {names[i]: int(size) for i, size in enumerate(sizes) if size},
        "largest_class": {"name": names[largest], "share": float(sizes[largest] / len(indices))},
        "imbalance": float(np.abs(sizes / len(indices) - everywhere / len(labels)).sum() / 2),
    }
    if pool.has_model:
        measurements = pool.measurements
        read = indices[measurements.readable[indices]]
        known = len(read) > 0
        numbers["accuracy"] = float(measurements.correct[read].mean()) if known else None
        numbers["loss"] = float(measurements.losses[read].mean()) if known else None
        numbers["unreadable"] = len(indices) - len(read)
    return numbers


def _count(n: int, share: float | None, count: int | None) -> int:
    if (share is None) == (count is None):
        raise UserError(
            "forget set: give its size once, as a share of the training samples (0.1) or as a count "
            f"({'both' if count is not None else 'neither'} given)"
        )
    if share is not None:
        require(0 < share < 1, "share", share, "above 0 and below 1")
    wanted = round(share * n) if share is not None else int(count or 0)
    if wanted < 1:
        raise UserError(f"forget set: {wanted} of {n} samples is nothing to forget; ask for at least 1")
    if wanted >= n:
        raise UserError(f"forget set: {wanted} of {n} samples leaves nothing to retain; ask for fewer")
    return wanted


def _split(options: Mapping[str, Any], config: type[Any]) -> tuple[RunConfig, Any]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in options:
        if name not in READING_KEYS and name not in fields:
            raise UserError(f"unknown option {name!r}{nearest(name, {*READING_KEYS, *fields})}")
    mine = {
        # YAML reads a class that is named 3 as a number.
        key: str(value) if type(value) is int and str(fields[key].type).startswith("str") else value
        for key, value in options.items()
        if key in fields
    }
    return reading({key: value for key, value in options.items() if key in READING_KEYS}), build(config, mine)
