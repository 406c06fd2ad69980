"""Files that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.runtime.files import read_npz, write_json, write_npz


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """It ended as a crash, such as of a pool whose `outputs` was a file."""
    (tmp_path / "outputs").touch()
    with pytest.raises(UserError, match="outputs: cannot be written"):
        write_npz(tmp_path / "outputs" / "a.npz", {})
    with pytest.raises(UserError, match=r"outputs/a\.json: cannot be written"):
        write_json(tmp_path / "outputs" / "a.json", {})


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_npz(tmp_path / "new" / "a.npz", {"x": np.arange(3)})
    found = read_npz(tmp_path / "new" / "a.npz")
    assert found is not None
    assert found["x"].tolist() == [0, 1, 2]
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.npz"]
