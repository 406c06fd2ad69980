"""A data source with a forget request resolved against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from engine.config import RunConfig, build
from engine.data import (
    ForgetRequest,
    Samples,
    Source,
    open_source,
    read_forget_request,
)
from engine.data.labels import relabelled, relabelled_source
from engine.data.readable import bad_images, without
from engine.errors import UserError
from engine.evaluate import Evaluator
from engine.models.preprocessing import preprocessing_of
from engine.runtime.process_group import ProcessGroup

# Options of a run that an evaluation has too.
EVALUATION_OPTIONS = ("precision", "device", "workers", "decode", "on_bad_image", "max_bad_share")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data source with a forget request resolved against it.

    Attributes:
        source: The data.
        request: The forget request.
        forget, retain: Forget set and retain set.
        unreadable: Number of samples of the request that are not in `forget`, since their images cannot be read.
        facts: Further entries of config.yaml.
    """

    source: Source
    request: ForgetRequest
    forget: Samples
    retain: Samples
    unreadable: int = 0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: str, forget: str) -> Task:
        """Open a data source, and resolve a forget request against it; both are given as specs."""
        world = ProcessGroup.current()
        if world.size > 1:  # one rank builds the index before all read it
            world.on_main(lambda: open_source(data))
        source = open_source(data)
        request = read_forget_request(forget, source.train)
        return cls(source, request, *request.split(source.train))

    @classmethod
    def of_ids(cls, source: Source, ids: Sequence[str], *, spec: str, excluded: Sequence[str] = ()) -> Task:
        """Return the task to forget some ids of a data source.

        The retain set is the training samples that are neither in `ids` nor in `excluded`.

        Args:
            source: The data.
            ids: Ids to forget; repeated ones count once.
            spec: Name of the request in messages and files.
            excluded: Ids that were forgotten earlier and must never be trained on again. Those that the data does not
                hold have no effect.

        Raises:
            UserError: An id is not in the data, `ids` is empty, or no sample is left to retain.
        """
        train = source.train
        wanted = sorted(set(ids))
        positions = train.positions(wanted, spec)
        if not wanted:
            raise UserError(f"{spec}: names no samples; nothing to forget")
        indices = np.unique(positions)  # an id may be named in two Unicode forms
        request = ForgetRequest(spec, indices, len(ids) - len(indices), {})
        forget, others = request.split(train)
        kept = np.setdiff1d(np.arange(len(others)), others.ids.positions(excluded))
        if not len(kept):
            raise UserError(f"{spec}: with it, nothing of {train.name} is left to retain; train a new model instead")
        return cls(source, request, forget, others.subset(kept))

    def relabelled(self, mapping: np.ndarray, names: Sequence[str]) -> Task:
        """Return the task with label `mapping[label]` in place of each of the data's labels.

        Args:
            mapping: New label by the data's label.
            names: Class names by new label.
        """
        return dataclasses.replace(
            self,
            source=relabelled_source(self.source, mapping, names),
            forget=relabelled(self.forget, mapping, names),
            retain=relabelled(self.retain, mapping, names),
        )

    def evaluator(self, config: Mapping[str, Any] | None = None, most: int | None = None) -> Evaluator:
        """Return the evaluator of the task's sets, with options by name; `most`: as of `Evaluator`."""
        options = {key: value for key, value in (config or {}).items() if key in EVALUATION_OPTIONS}
        return Evaluator(self.forget, self.retain, self.source.test, most=most, **options)

    def without(self, ids: Collection[str]) -> Task:
        """Return the task without forget samples whose images cannot be read; `unreadable` counts them."""
        forget = without(self.forget, ids)
        return dataclasses.replace(self, forget=forget, unreadable=self.unreadable + len(self.forget) - len(forget))

    def readable(self, model: nn.Module, config: Mapping[str, Any] | None = None) -> Task:
        """Decode all forget images, and return the task without those that cannot be read.

        Raises:
            BadImageError: An image cannot be read, and `on_bad_image` is raise.
            RunStopped: More images are bad than `max_bad_share` allows.
        """
        run = build(RunConfig, {key: value for key, value in (config or {}).items() if key in EVALUATION_OPTIONS})
        found = bad_images(
            self.forget,
            preprocessing_of(model),
            on_bad_image=run.on_bad_image,
            max_bad_share=run.max_bad_share,
            out_of=len(self.forget) + len(self.retain),
            workers=run.workers,
            decode=run.decode,
            world=ProcessGroup.current(),
        )
        return self.without(found)

    def notes(self) -> dict[str, Any]:
        """Return what config.yaml keeps of the request: its name, not the ids."""
        forget: dict[str, Any] = {"spec": self.request.spec, "duplicates": self.request.duplicates}
        kind = self.source.train.id_kind
        if kind is not None and kind.rows is not None:
            forget["rows"] = kind.rows  # ids are positions, valid for this number of rows alone
        return {"data": self.source.spec, "forget": forget, **self.facts}

    def counted(self) -> dict[str, Any]:
        """Return what record.json keeps of the task in addition to hashed ids.

        The name of a file or class is left out, since it may be a person's.
        """
        spec = self.request.spec
        return {
            "kind": next((kind for kind in ("class", "random") if spec.startswith(f"{kind}:")), "ids"),
            "forget": len(self.forget) + self.unreadable,
            "retain": len(self.retain),
            "duplicates": self.request.duplicates,
            **({"unreadable": self.unreadable} if self.unreadable else {}),
        }
