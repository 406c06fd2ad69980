"""What every refused data source has in common."""

from __future__ import annotations

import pytest

from engine.data import open_source
from engine.errors import UserError


def refused(spec: str, *parts: str) -> None:
    """Asserts that a data source is refused in one short line that holds all parts."""
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert all(part in str(error.value) for part in parts), str(error.value)
