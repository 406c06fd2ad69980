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

    unreadable: samples of the request that are not in `forget`, since their images cannot be read.
    facts: what else config.yaml keeps of it.
    """

    source: Source
    request: ForgetRequest
    forget: Samples
    retain: Samples
    unreadable: int = 0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: str, forget: str) -> Task:
        world = ProcessGroup.current()
        if world.size > 1:  # an index is built by one rank, and then read by all
            world.on_main(lambda: open_source(data))
        source = open_source(data)
        request = read_forget_request(forget, source.train)
        return cls(source, request, *request.split(source.train))

    @classmethod
    def of_ids(cls, source: Source, ids: Sequence[str], *, spec: str, excluded: Sequence[str] = ()) -> Task:
        """Forgets `ids`; retains the training samples that are neither among them nor `excluded`.

        excluded: forgotten earlier, so that they must never be trained on again; those that the data does not hold are
        gone anyway. spec: what the request is called in messages and files.
        Raises UserError for ids that the data does not hold, for none at all, and where nothing is left to retain.
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
        """The same task with label `mapping[label]` in place of the data's; names: of the classes by new label."""
        return dataclasses.replace(
            self,
            source=relabelled_source(self.source, mapping, names),
            forget=relabelled(self.forget, mapping, names),
            retain=relabelled(self.retain, mapping, names),
        )

    def evaluator(self, config: Mapping[str, Any] | None = None) -> Evaluator:
        options = {key: value for key, value in (config or {}).items() if key in EVALUATION_OPTIONS}
        return Evaluator(self.forget, self.retain, self.source.test, **options)

    def without(self, ids: Collection[str]) -> Task:
        """The task as far as it can be measured: forget samples whose images cannot be read are left out."""
        forget = without(self.forget, ids)
        return dataclasses.replace(self, forget=forget, unreadable=self.unreadable + len(self.forget) - len(forget))

    def readable(self, model: nn.Module, config: Mapping[str, Any] | None = None) -> Task:
        """Decodes all forget images: by on_bad_image an error at the first bad one, or the task without them."""
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
        """What config.yaml keeps of the request: what it is called, not the ids themselves."""
        forget: dict[str, Any] = {"spec": self.request.spec, "duplicates": self.request.duplicates}
        kind = self.source.train.id_kind
        if kind is not None and kind.rows is not None:
            forget["rows"] = kind.rows  # ids are positions: they hold for this number of rows alone
        return {"data": self.source.spec, "forget": forget, **self.facts}

    def counted(self) -> dict[str, Any]:
        """What record.json keeps of it beside hashed ids: not the name of a file or class, which may be a person's."""
        spec = self.request.spec
        return {
            "kind": next((kind for kind in ("class", "random") if spec.startswith(f"{kind}:")), "ids"),
            "forget": len(self.forget) + self.unreadable,
            "retain": len(self.retain),
            "duplicates": self.request.duplicates,
            **({"unreadable": self.unreadable} if self.unreadable else {}),
        }
