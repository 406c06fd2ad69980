"""Parse the string that names a checkpoint and its options."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import yaml

from engine.errors import UserError
from engine.models.unwrap import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint and its options: `PLACE`, or `PLACE?arch=NAME&weights=ema&img_size=32`.

    Attributes:
        place: File, folder, `timm:NAME` or `hf-hub:ID`.
        architecture: timm's name, for a file that does not define its model.
        model_args: Arguments of `timm.create_model`, for such a file.
        weights: raw or ema, for a file that has both.
    """

    place: str
    architecture: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Kind | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> CheckpointSource:
        """Parse the string.

        Raises:
            UserError: `weights` is neither raw nor ema.
        """
        name = os.fspath(text)
        place, mark, query = name.partition("?")
        if not mark or Path(name).exists():
            return cls(place=name)
        given = dict(parse_qsl(query, keep_blank_values=True))
        weights = given.pop("weights", None)
        if weights not in (None, "raw", "ema"):
            raise UserError(f"--weights {weights}: expected raw or ema")
        return cls(
            place=place,
            architecture=given.pop("arch", None),
            model_args={key: yaml.safe_load(value) for key, value in given.items()},
            weights=weights,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        given = {"arch": self.architecture, "weights": self.weights, **self.model_args}
        query = "&".join(f"{key}={quote(str(value), safe='[],.')}" for key, value in given.items() if value is not None)
        return f"{self.place}?{query}" if query else self.place

    @property
    def is_named(self) -> bool:
        """Whether the source is a model of timm or of the Hub, by name."""
        return self.place.startswith(("timm:", "hf-hub:"))

    @property
    def folder(self) -> Path:
        """Folder in which a run writes its files next to the weights."""
        path = Path(self.place)
        return path.parent if path.name == "model.safetensors" else path

    def is_configured(self) -> bool:
        """Return whether a config.json in timm's or Hugging Face's layout defines the model."""
        path = Path(self.place)
        return self.is_named or (path.is_dir() and (path / "config.json").is_file())


def absolute_checkpoint(checkpoint: str) -> str:
    """Return a checkpoint with its absolute path; names of timm and of the hub are returned unchanged."""
    source = CheckpointSource.parse(checkpoint)
    if not Path(source.place).exists():
        return checkpoint
    return str(dataclasses.replace(source, place=str(Path(source.place).resolve())))
