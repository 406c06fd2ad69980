"""The folder of a run: config.yaml, history.jsonl, resume.pt while it runs, and what it ends with."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.config import read_yaml, write_yaml
from engine.errors import RunStopped, UserError
from engine.files import replacing

# What a run folder may hold; --overwrite removes these and nothing else.
_FILES = (
    "config.yaml",
    "history.jsonl",
    "resume.pt",
    "config.json",
    "model.safetensors",
    "metrics.json",
    "record.json",
    "report.html",
)


class RunFolder:
    """Opens a folder for one run.

    An empty or new folder is taken. A folder that holds a run is an error, unless `overwrite` (its files are
    removed when the new run starts) or `resume` (the same configuration goes on where the last epoch ended).
    """

    def __init__(
        self, folder: str | os.PathLike[str], config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = Path(folder)
        if resume and overwrite:
            raise UserError("give --resume or --overwrite, not both")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output folder {self.path} is a file; name a folder")
        held = [name for name in (*_FILES, "last_good") if (self.path / name).exists()]
        if resume:
            self._check_same(config, held)
        elif held and not overwrite:
            raise UserError(
                f"output folder {self.path} holds another run ({', '.join(held[:3])}, ...); "
                "go on with it by --resume, replace it by --overwrite, or name another folder"
            )
        elif any(self.path.glob("*")) and not held:
            raise UserError(f"output folder {self.path} holds files that are not a run's; name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in held:
                shutil.rmtree(self.path / name) if name == "last_good" else (self.path / name).unlink()
            write_yaml(self.path / "config.yaml", config)
            (self.path / "history.jsonl").touch()

    def _check_same(self, config: dict[str, Any], held: list[str]) -> None:
        if "config.yaml" not in held:
            raise UserError(f"output folder {self.path} holds no run to resume; leave --resume out")
        if "model.safetensors" in held:
            raise UserError(f"output folder {self.path} holds a finished run; there is nothing to resume")
        before = _flat(read_yaml(self.path / "config.yaml"))
        now = _flat(config)
        differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if differing:
            listed = "; ".join(f"{key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in differing[:5])
            raise UserError(
                f"output folder {self.path} holds a run of another configuration ({listed}); use its own, or "
                "another folder"
            )

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            with open(self.path / "history.jsonl", "a", encoding="utf-8") as handle:
                handle.write(text)
        except OSError as error:
            raise RunStopped(
                f"cannot write {self.path / 'history.jsonl'} ({error.strerror}); free space and --resume"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "history.jsonl").read_text(encoding="utf-8").splitlines()]

    def save_state(self, state: dict[str, Any]) -> None:
        """Keeps what is needed to go on; `state` holds tensors and plain values only."""
        size = (self.path / "history.jsonl").stat().st_size
        with replacing(self.path / "resume.pt") as temporary:
            torch.save({**state, "history_bytes": size}, temporary)

    def load_state(self) -> dict[str, Any] | None:
        """The last kept state, history cut back to it; None where there is none yet."""
        path = self.path / "resume.pt"
        if not path.is_file():
            (self.path / "history.jsonl").write_text("")
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{path} is damaged ({str(error).splitlines()[0][:80]}); start again with --overwrite"
            ) from None
        with open(self.path / "history.jsonl", "rb+") as handle:
            handle.truncate(state["history_bytes"])
        return state

    def clear_state(self) -> None:
        (self.path / "resume.pt").unlink(missing_ok=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
