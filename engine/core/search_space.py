"""Search spaces of `lethe tune`. The range of an option is declared with its default, in the method's Config.

temperature: float = tunable(0.1, Range(0.02, 1.0, log=True))
"""

from __future__ import annotations

import dataclasses
from typing import Any

_KEY = "tune"


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included.

    Attributes:
        low, high: The bounds.
        log: Search on a logarithmic scale.
        step: Distance between the values that are tried, starting at low; not with log.
        per_width: low, high and `auto` are divided by the width of the model, as in `Method.learning_rate`.
        auto: Value that null stands for.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    per_width: bool = False
    auto: float | None = None

    def of(self, width: int) -> Range:
        """Return the range for a model of a width."""
        if not self.per_width:
            return self
        auto = None if self.auto is None else self.auto / width
        return dataclasses.replace(self, low=self.low / width, high=self.high / width, auto=auto, per_width=False)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        values: The values, in the order in which they are listed.
    """

    values: tuple[Any, ...]


Space = Range | Choice


def rate(per_width: float, times: float = 8.0) -> Range:
    """Return a range of learning rates from `times` below to `times` above `per_width` / width, the value of null."""
    return Range(per_width / times, per_width * times, log=True, per_width=True, auto=per_width)


def tunable(default: Any, space: Space) -> Any:
    """Return a field of a method's Config with a default and the space that `lethe tune` searches."""
    return dataclasses.field(default=default, metadata={_KEY: space})


def spaces(config: type[Any], width: int) -> dict[str, Space]:
    """Return the spaces of a Config's options by name, for a model of a width, in the order of the fields."""
    found = {field.name: field.metadata[_KEY] for field in dataclasses.fields(config) if _KEY in field.metadata}
    return {name: space.of(width) if isinstance(space, Range) else space for name, space in found.items()}


def defaults(config: type[Any], width: int) -> dict[str, Any]:
    """Return the defaults of the options that have a space, as points in it."""
    found = spaces(config, width)
    given = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: space.auto if given[name] is None and isinstance(space, Range) else given[name]
        for name, space in found.items()
    }
