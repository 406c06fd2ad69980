"""A pool in a folder: its models, what each of them was trained on, and what of the data it covers.

    pool.json            key, number of models, share, recipe, and the states of the data that models were trained on
    samples-1.npy, ...   of each state of the data: keyed hash and label of every training sample, sorted by hash
    model_1, model_2 ... run folders of `lethe train`, each with its record
    outputs/             outputs of the models for test samples, computed once

Ids are in none of these files: a sample is found by the keyed hash of its id. The models were trained on the samples,
so a pool is to be guarded, and in the end deleted, as the training data is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from engine.audit.record import recorded
from engine.audit.run_record import origin
from engine.config import read_yaml
from engine.data import Samples, Source
from engine.data.samples import BadImageError, image_digest
from engine.errors import UserError
from engine.jobs.opening import current, open_model
from engine.jobs.task import Task
from engine.models.checkpoint import weights_sha256
from engine.models.checkpoint_source import CheckpointSource
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import spec_of
from engine.pool.membership import FEWEST_WITHOUT, check_key, digests_of, lacking, lacking_count
from engine.run.folder import is_finished
from engine.runtime import lock
from engine.runtime.files import replacing, write_json

FILE, FORMAT = "pool.json", 1
# Share of the samples that may be new or deleted since the last model was trained; then the pool is out of date.
MAX_CHANGED = 0.1
# Options that make a recipe: those that change what a model learns from its samples.
RECIPE = (
    "epochs", "lr", "batch_size", "accumulation_steps", "max_steps", "augment", "weight_decay", "grad_clip", "base",
    "layer_decay", "mixup", "cutmix", "label_smoothing",
)  # fmt: skip
_IMAGES = 16
# Longest wait for another process that creates the pool.
_PATIENCE_S = 120.0
_SAMPLE = np.dtype([("digest", "<u8"), ("label", "<i4")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The data at one time.

    Attributes:
        models: Numbers of the models that are trained on it.
        samples: Number of training samples.
        fingerprint: `Samples.fingerprint()` of them.
        trained_on: Fingerprint of the samples that each of the models is trained on.
        images: Digest of the pixels of a few samples, by the hash of their ids.
    """

    models: list[int]
    samples: int
    fingerprint: str
    trained_on: dict[str, str]
    images: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """What of the data a pool covers.

    Attributes:
        samples: Training samples now.
        new: Those that no model was trained on, since they came later.
        gone: Samples that models were trained on and that the data does not hold any more.
        short: Samples that fewer than two models lack, so that they cannot be judged.
    """

    samples: int
    new: int
    gone: int
    short: int

    @property
    def out_of_date(self) -> bool:
        return self.new + self.gone > MAX_CHANGED * self.samples


class Pool:
    """An open pool.

    Args:
        folder: Its folder.
        facts: Contents of pool.json.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.states = [State(**state) for state in facts["states"]]

    # --- making and opening -------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path, source: Source, *, models: int, share: float, training: Mapping[str, Any], key: str | None
    ) -> Pool:
        """Create a pool, or open the one that is there; models beyond those that it has join it.

        Args:
            folder: Folder of the pool.
            source: The data, with labels in the order of the models.
            models: Number of models.
            share: Share of the samples that each lacks.
            training: How the models are trained: `start` and `recipe`.
            key: Key of the draw; None: a random one.

        Raises:
            UserError: The number of models or the share is not possible, or the folder holds other files, or a pool of
                another share, recipe or data.
        """
        if key is not None:
            check_key(key)
        ends = time.monotonic() + _PATIENCE_S
        while True:  # jobs of an array begin at the same time
            try:
                with lock.held(folder, _in_use):
                    if (folder / FILE).is_file():
                        return cls.open(folder)._joined(source, models, share, training, key)
                    return cls._made_new(folder, source, models, share, training, key)
            except lock.InUse:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.2)

    @classmethod
    def _made_new(
        cls, folder: Path, source: Source, models: int, share: float, training: Mapping[str, Any], key: str | None
    ) -> Pool:
        if others := [each.name for each in folder.iterdir() if each.name != lock.FILE]:
            raise UserError(f"--out {folder}: holds other files ({others[0]}); name a folder for the pool alone")
        facts = {
            "format": FORMAT,
            "key": key or secrets.token_hex(16),
            "first": models,
            "models": models,
            "share": share,
            "lacking": lacking_count(models, share),
            "data": source.spec,
            **training,
            "states": [],
        }
        pool = cls(folder, facts)
        pool._add_state(source.train, range(1, models + 1))
        return pool

    @classmethod
    def open(cls, folder: Path) -> Pool:
        """Open the pool in a folder.

        Raises:
            UserError: There is none, or its file was changed.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"--pool {folder}: holds no pool; make one with lethe pool train --out {folder}")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("format") != FORMAT:
                raise UserError(f"{path}: format {facts.get('format')}, expected {FORMAT}; train the pool again")
            pool = cls(folder, facts)
            if facts["sha256"] != pool._checksum():
                raise UserError(f"{path}: was changed since it was written; restore it, or train the pool again")
            return pool
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not the file of a pool ({error}); restore it") from None

    def _joined(self, source: Source, models: int, share: float, training: Mapping[str, Any], key: str | None) -> Pool:
        """Return this pool, with further models if more are given."""
        asked = {"share": share, **training, **({} if key is None else {"key": key})}
        for name, value in asked.items():
            if self.facts[name] != value:
                shown = "" if name == "key" else f" ({difference(self.facts[name], value)})"
                raise UserError(
                    f"--out {self.folder}: holds a pool of another {name}{shown}; repeat its own options, or name "
                    "another folder"
                )
        if models < self.facts["models"]:
            raise UserError(f"--models {models}: the pool in {self.folder} has {self.facts['models']} already")
        current = source.train.fingerprint()
        unfinished = [n for n in self.states[-1].models if not is_finished(self.place(n))]
        if unfinished and current != self.states[-1].fingerprint:
            raise UserError(
                f"--data {source.spec}: its samples changed since the pool was begun, and model {unfinished[0]} is not "
                "finished; give the data as it was, or make a new pool"
            )
        if models > self.facts["models"]:
            added = range(self.facts["models"] + 1, models + 1)
            self.facts["models"] = models
            self._add_state(source.train, added)
        return self

    def _add_state(self, train: Samples, models: Sequence[int]) -> None:
        digests = digests_of(train.ids, self.facts["key"])
        lacked = self._drawn(digests)
        trained_on = {
            str(number): train.subset(np.flatnonzero(~lacked[:, number - 1])).fingerprint() for number in models
        }
        images = self._images(train, digests)
        table = np.empty(len(digests), dtype=_SAMPLE)
        table["digest"], table["label"] = digests, train.labels
        number = len(self.states) + 1
        with replacing(self.folder / f"samples-{number}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.sort(table, order="digest"))
        self.states.append(
            State(
                models=list(models),
                samples=len(train),
                fingerprint=train.fingerprint(),
                trained_on=trained_on,
                images=images,
            )
        )
        self.facts["states"] = [dataclasses.asdict(state) for state in self.states]
        write_json(self.folder / FILE, {**self.facts, "sha256": self._checksum()})

    def _images(self, train: Samples, digests: np.ndarray) -> dict[str, str]:
        """Return digests of the pixels of the readable samples with the lowest hashes."""
        found = {}
        for index in np.argsort(digests)[:_IMAGES]:
            with contextlib.suppress(BadImageError):
                found[str(digests[index])] = image_digest(train.subset([int(index)]))
        return found

    def _checksum(self) -> str:
        facts = {key: value for key, value in self.facts.items() if key != "sha256"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    # --- its models ---------------------------------------------------------------------------------------------------

    @property
    def models(self) -> int:
        return int(self.facts["models"])

    def place(self, number: int) -> Path:
        """Return the run folder of a model, 1 to `models`."""
        return self.folder / f"model_{number}"

    def seed(self, number: int) -> int:
        return int(self.facts["recipe"]["seed"]) + number

    def unfinished(self) -> list[int]:
        return [number for number in range(1, self.models + 1) if not is_finished(self.place(number))]

    def check_complete(self) -> None:
        """Raise UserError if a model is not finished."""
        if unfinished := self.unfinished():
            raise UserError(
                f"pool {self.folder}: {len(unfinished)} of {self.models} models are not finished; repeat lethe pool "
                "train"
            )

    def task(self, source: Source, number: int) -> Task:
        """Return the data with the samples that a model lacks as its forget set; it is trained on the retain set."""
        lacked = self.lacking(source.train.ids)[:, number - 1]
        ids = [source.train.ids[int(i)] for i in np.flatnonzero(lacked)]
        return Task.of_ids(source, ids, spec=f"the samples that model {number} of the pool lacks")

    def lacking(self, ids: Sequence[str]) -> np.ndarray:
        """Return which models the draw leaves without each sample, bool [n, models]."""
        return self._drawn(digests_of(ids, self.facts["key"]))

    def _drawn(self, digests: np.ndarray) -> np.ndarray:
        return lacking(digests, self.facts["lacking"], self.facts["first"], self.models)

    def unseen(self, ids: Sequence[str]) -> np.ndarray:
        """Return which models were not trained on each sample, bool [n, models]: by the draw, or as it came later."""
        digests = digests_of(ids, self.facts["key"])
        found = self._drawn(digests)
        for number, state in enumerate(self.states, 1):
            later = ~np.isin(digests, self._table(number)["digest"])
            for model in state.models:
                found[later, model - 1] = True
        return found

    @functools.cache  # noqa: B019  # a pool is opened once in a process
    def _table(self, number: int) -> np.ndarray:
        path = self.folder / f"samples-{number}.npy"
        try:
            found: np.ndarray = np.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); restore it, or train the pool again") from None
        if found.dtype != _SAMPLE or len(found) != self.states[number - 1].samples:
            raise UserError(f"{path}: is not the one that belongs to {FILE}; restore it, or train the pool again")
        return found

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of pool.json and of the weights of all models, which their records hold."""
        digest = hashlib.sha256(self._checksum().encode())
        for number in range(1, self.models + 1):
            digest.update(str(self._made(number)).encode())
        return digest.hexdigest()

    def _made(self, number: int) -> Any:
        """Return the recorded hash of the weights of a model, after its record and its files were checked."""
        folder = self.place(number)
        found = origin(folder)
        if found is None or found.source != "record.json":
            raise UserError(f"pool {self.folder}: model {number} has no record; train it again: lethe pool train")
        state = next(state for state in self.states if number in state.models)
        if not found.is_training or found.samples_sha256 != state.trained_on[str(number)]:
            raise UserError(
                f"pool {self.folder}: by its record model {number} was made by {found.method} from other samples than "
                "its share; remove its folder, and train it again: lethe pool train"
            )
        return (recorded(folder, "weights") or {}).get("after")

    # --- its data -----------------------------------------------------------------------------------------------------

    def in_order(self, source: Source) -> Source:
        """Return the data with labels in the order of the models."""
        if not source.train.class_names or not is_finished(self.place(1)):
            return source
        return current().in_order_of(source, open_model(self.place(1)))

    def check(self, source: Source) -> Coverage:
        """Check that the pool is complete and was trained on this data, and return what of it is covered.

        Raises:
            UserError: A model is not finished or not as its record should say, or samples have other images or labels.
        """
        self.check_complete()
        self.identity  # noqa: B018  # checks the record of each model
        train = source.train
        digests = digests_of(train.ids, self.facts["key"])
        last = self._table(len(self.states))
        _, ours, theirs = np.intersect1d(digests, last["digest"], return_indices=True)
        differing = np.flatnonzero(train.labels[ours] != last["label"][theirs])
        if len(differing):
            name = train.ids[int(ours[differing[0]])]
            raise UserError(
                f"pool {self.folder}: {len(differing)} samples have another label in {source.spec} than when the pool "
                f"was trained, such as {name!r}; give the data that it was trained on, or make a new pool"
            )
        expected = self.states[-1].images
        now = np.flatnonzero(np.isin(digests, np.array([int(each) for each in expected], dtype=np.uint64)))
        for digest, found in self._images(train.subset(now), digests[now]).items():
            if found != expected[digest]:
                name = train.ids[int(now[digests[now] == np.uint64(digest)][0])]
                raise UserError(
                    f"pool {self.folder}: {name!r} is another image in {source.spec} than when the "
                    "pool was trained; give the data that it was trained on, or make a new pool"
                )
        known = np.unique(np.concatenate([self._table(n)["digest"] for n in range(1, len(self.states) + 1)]))
        return Coverage(
            samples=len(train),
            new=int((~np.isin(digests, known)).sum()),
            gone=int((~np.isin(last["digest"], digests)).sum()),
            short=len(self.short(train.ids)),
        )

    def short(self, ids: Sequence[str]) -> np.ndarray:
        """Return the positions of samples that too few models lack to be judged."""
        return np.flatnonzero(self.unseen(ids).sum(1) < FEWEST_WITHOUT)

    def check_recipe(self, original: str) -> None:
        """Check that an original with a run folder was trained by the recipe of the pool.

        Raises:
            UserError: An option that changes what a model learns differs.
        """
        made = recipe_of(original)
        for number in range(1, self.models + 1):
            file = self.place(number) / "config.yaml"
            if not file.is_file():
                raise UserError(f"pool {self.folder}: {file} is missing; restore it, or remove its folder and train it")
            recipe = read_yaml(file)  # with `auto` resolved
            for name in RECIPE:
                if name in made and made[name] != recipe.get(name):
                    raise UserError(
                        f"pool {self.folder}: its models were trained with {name}={recipe.get(name)}, the original "
                        f"with {made[name]}; a pool has the recipe of the original"
                    )


def check_planned_recipe(original: str, planned: Mapping[str, Any]) -> None:
    """Check the options of a pool that is to be trained: `Pool.check_recipe` before the work.

    Args:
        original: Checkpoint of the original.
        planned: Options, resolved with defaults.

    Raises:
        UserError: The original has a run folder, and an option differs; the message has the original's.
    """
    made = recipe_of(original)
    # "auto" is resolved by the data, as it was for the original.
    names = [n for n in RECIPE if n in made and n != "base" and planned.get(n) not in ("auto", made[n])]
    if names:
        words = [f"--epochs {made[n]:g}" if n == "epochs" else f"--set {n}={json.dumps(made[n])}" for n in names]
        raise UserError(
            f"pool train: {names[0]} is {planned.get(names[0])}, but the original {original} was trained with "
            f"{made[names[0]]}; a pool has the recipe of the original: {' '.join(words)}"
        )


def recipe_of(original: str) -> dict[str, Any]:
    """Return config.yaml of an original that was trained by `lethe train`; empty for others."""
    file = CheckpointSource.parse(original).folder / "config.yaml"
    made = read_yaml(file) if file.is_file() else {}
    return made if made.get("method") == "retrain" else {}


def model_identity(model: nn.Module) -> str:
    """Return the SHA-256 of a model: weights, architecture, and the preprocessing of its images."""
    spec = spec_of(model)
    facts = [weights_sha256(model), spec.architecture, spec.model_args, preprocessing_of(model).to_dict()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def difference(before: Any, now: Any) -> str:
    """Return what differs between two values, of mappings the first key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        return f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
    return f"{before!r} before, {now!r} now"


def _in_use(folder: Path, owner: lock.Owner) -> str:
    return f"pool {folder}: another process ({owner}) is creating it; repeat the command in a moment"
