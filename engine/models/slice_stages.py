"""The stages of a model that was trained in slices, stored next to its checkpoint for later deletions.

stages.safetensors holds

    base.NAME          the weights before the first stage, head included
    stage.K.I.A, .B    the low-rank updates of stage K, of layer I of its blocks
    stage.K.head.NAME  the head after stage K
    stage.1.plain.NAME all other weights after stage 1, if it trained them
    sequence.S.stage.* the same for sequence S, from the second on
    members            int64, sorted: a token of every sample that the stages may have been trained on

and, as its metadata, the recipe and the SHA-256 of the weights of base and stages. It is opened without unpickling.

The token of a sample is the first 64 bits of SHA-256 of (seed, id), and token mod slices is its slice: no other sample
affects it. Sequence S takes the slices in the order S, .., L, 1, .., S - 1.

The tokens and the ids together reveal which samples were trained on. So this file is for those who handle deletions,
and a model is served without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.data import Samples
from engine.errors import UserError
from engine.models.info import classifiers
from engine.models.spec import folder_of, spec_of
from engine.runtime.files import replacing

STAGES = "stages.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """Contents of stages.safetensors.

    Attributes:
        recipe: Options of the training, by name.
        served: `checkpoint.weights_sha256` of base and stages, merged.
        members: Tokens of the samples, int64, sorted.
        base: Weights before the first stage.
        kept: For each sequence, one dict for each stage, the first stage first, without dropped stages.
    """

    recipe: dict[str, Any]
    served: str
    members: np.ndarray
    base: dict[str, Tensor]
    kept: list[list[dict[str, Tensor]]]

    def write(self, folder: Path) -> None:
        """Write stages.safetensors into a folder."""
        tensors = {"members": torch.from_numpy(self.members), **{f"base.{k}": v for k, v in self.base.items()}}
        for sequence, stages in enumerate(self.kept, 1):
            for number, stage in enumerate(stages, 1):
                tensors |= {_prefix(sequence, number) + key: value for key, value in stage.items()}
        payload = {"recipe": self.recipe, "served": self.served, "stages": [len(stages) for stages in self.kept]}
        with replacing(folder / STAGES) as temporary:
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                temporary,
                metadata={"lethe": json.dumps(payload)},
            )

    @classmethod
    def read(cls, folder: Path) -> Stages:
        """Read stages.safetensors of a folder.

        Raises:
            UserError: The file is damaged or has another format.
        """
        try:
            with safetensors.safe_open(folder / STAGES, framework="pt") as file:
                payload = json.loads(file.metadata()["lethe"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is not a dict
            return cls(
                recipe=payload["recipe"],
                served=payload["served"],
                members=tensors["members"].numpy(),
                base=_below("base.", tensors),
                kept=[
                    [_below(_prefix(sequence, number), tensors) for number in range(1, count + 1)]
                    for sequence, count in enumerate(payload["stages"], 1)
                ],
            )
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / STAGES} is damaged ({type(error).__name__}: {str(error)[:80]}); take a whole copy of the "
                "folder"
            ) from None


def _prefix(sequence: int, number: int) -> str:
    return f"sequence.{sequence}.stage.{number}." if sequence > 1 else f"stage.{number}."


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def stages_of(model: nn.Module) -> Stages | None:
    """Return the stages in the folder of a model, from `load_checkpoint` or a run; None if there are none."""
    folder = folder_of(model)
    return Stages.read(folder) if folder is not None and (folder / STAGES).is_file() else None


def copy_stages(model: nn.Module, folder: Path) -> None:
    """Copy the stages of a model, if there are any, into the folder of a copy of it."""
    source = folder_of(model)
    if source is not None and (source / STAGES).is_file():
        with replacing(folder / STAGES) as temporary:
            shutil.copyfile(source / STAGES, temporary)


def tokens_of(samples: Samples, seed: int) -> np.ndarray:
    """Return the token of each sample, int64 [n]."""
    digests = (hashlib.sha256(f"{seed}\0{sample_id}".encode()).digest()[:8] for sample_id in samples.ids)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def slices_of(tokens: np.ndarray, slices: int) -> np.ndarray:
    """Return the slice of each token, int64 [n], from 1 to `slices`."""
    return (tokens.view(np.uint64) % np.uint64(slices)).astype(np.int64) + 1


def places_of(slices: np.ndarray, sequence: int, count: int) -> np.ndarray:
    """Return the place, int64 [n], from 1, at which a sequence takes each slice, of `count` slices in all."""
    return (slices - sequence) % count + 1


def untouched(stages: Stages, retain: Samples, forget: Samples) -> list[int]:
    """Return the number of stages of each sequence, from its first, that were trained on no forget sample.

    Args:
        stages: The stages.
        retain, forget: Retain set and forget set.

    Raises:
        UserError: The samples are not those of the training without those of earlier deletions.
    """
    seed, slices, members = stages.recipe["seed"], stages.recipe["slices"], stages.members
    retained, forgotten = tokens_of(retain, seed), tokens_of(forget, seed)
    for refused, what, remedy in (
        (
            np.isin(retained, forgotten),
            "to be forgotten too",
            "give data sets whose ids (attribute `ids`) distinguish their samples",
        ),
        (
            ~np.isin(retained, members),
            "not among those that the stages were trained on",
            "they were deleted before, or are new: name all earlier deletions in the request too, and add no data",
        ),
    ):
        if refused.any():
            shown = ", ".join(repr(retain.ids[i]) for i in np.flatnonzero(refused)[:3].tolist())
            raise UserError(f"s3t: {refused.sum()} samples to retain are {what}, the first: {shown}; {remedy}")
    missing = np.isin(members, np.concatenate([retained, forgotten]), invert=True)
    if missing.any():
        raise UserError(
            f"s3t: {missing.sum()} samples that the stages were trained on are neither retained nor to be forgotten, "
            "so ids or data are not those of the training; give the same data source"
        )
    touched = slices_of(forgotten[np.isin(forgotten, members)], slices)
    return [
        min(len(kept), int(places_of(touched, sequence, slices).min(initial=slices + 1)) - 1)
        for sequence, kept in enumerate(stages.kept, 1)
    ]


def with_fresh_head(given: nn.Module, num_classes: int, seed: int = 0) -> nn.Module:
    """Return a copy of a model with a new head of so many classes."""
    model = dataclasses.replace(spec_of(given), num_classes=num_classes).build(seed=seed)
    heads = {id(weight) for weight in classifier_weights(model).values()}
    fresh = {name for name, weight in model.named_parameters() if id(weight) in heads}
    model.load_state_dict({k: v for k, v in given.state_dict().items() if k not in fresh}, strict=False)
    return model.eval()


def classifier_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the head, or of DeiT's two heads, by name."""
    return {f"{i}.{name}": p for i, each in enumerate(classifiers(model)) for name, p in each.named_parameters()}
