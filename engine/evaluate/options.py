"""Options that measurements of several models share: where and how they run, and on how many samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

MOST_SAMPLES = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of a measurement.

    Attributes:
        max_samples: Most samples of each set, at equal distances.
        device, precision: Of the forward passes, and of training if the measurement trains.
        seed: Seed of random draws and of intervals.
        loading: Further options of `engine.data.Loader` by name (workers, decode, on_bad_image, max_bad_share).
    """

    max_samples: int = MOST_SAMPLES
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    seed: int = 0
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the measurements that take them one by one."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "loading"}
        return {**own, **self.loading}
