"""A checkpoint as one string names it, with what is to be said of it."""

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
    """A checkpoint as one string names it: `PLACE`, or `PLACE?arch=NAME&weights=ema&img_size=32`.

    place: file, folder, `timm:NAME` or `hf-hub:ID`. architecture, model_args: of a file that does not say how its model
    is built. weights: raw or ema, of a file that has both.
    """

    place: str
    architecture: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: Kind | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> CheckpointSource:
        """Raises UserError for weights that are neither raw nor ema."""
        name = os.fspath(text)
        place, asked, query = name.partition("?")
        if not asked or Path(name).exists():
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
        """Whether it is a model of timm or of the Hub, by name."""
        return self.place.startswith(("timm:", "hf-hub:"))

    @property
    def folder(self) -> Path:
        """Where a run would have left its files beside the weights."""
        path = Path(self.place)
        return path.parent if path.name == "model.safetensors" else path

    def is_configured(self) -> bool:
        """Whether a config.json in timm's or Hugging Face's layout says how the model is built."""
        path = Path(self.place)
        return self.is_named or (path.is_dir() and (path / "config.json").is_file())
