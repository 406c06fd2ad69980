"""The folder of a run: config.yaml, history.jsonl, resume/ during the run, and the files of a finished run.

resume/TAG/ holds one checkpoint: state.pt (the position of the run) and the files of the train engine, of every rank.
The checkpoint is valid from the moment that resume/current.json names it. That file is replaced in one step, after
everything in the folder has reached the disk; older checkpoints are removed after that. So a process that is killed at
any moment leaves one complete checkpoint. Several hosts need one shared file system.

One process works in a run folder at a time: the main rank holds its lock (`engine.runtime.lock`) until the run is
finished, or has failed.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.config import read_yaml, write_yaml
from engine.core.result import UnlearnResult
from engine.errors import RunStopped, UserError
from engine.models.checkpoint import save_checkpoint
from engine.models.huggingface import as_classifier
from engine.models.spec import spec_of
from engine.runtime import lock
from engine.runtime.files import full_disk, replacing, sync, write_json
from engine.runtime.process_group import ProcessGroup

# What a run folder may hold; --overwrite removes these and nothing else.
_FILES = (
    "config.yaml",
    "history.jsonl",
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "stages.safetensors",
    "metrics.json",
    "record.json",
    "record.salt",
    "record.ids",
    "report.html",
    "verdict.json",
)
# Files that mark a run as complete; removed when a run is resumed, as they would be wrong until it finishes again.
_COMPLETION_FILES = ("record.json", "record.salt", "record.ids", "verdict.json")
_FOLDERS = ("resume", "last_good")
# Tracebacks of earlier runs, see `engine.cli.exits`; removed when a run starts.
CRASHES = "crash*.txt"

# Folders that were opened in the current `closing` block.
_opened: contextvars.ContextVar[list[RunFolder] | None] = contextvars.ContextVar("opened", default=None)


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Release, at the end of the block, the run folders that were opened in it.

    An exception that ends the block gets the attribute `run_folder`, so that its traceback can be kept there.
    """
    folders: list[RunFolder] = []
    token = _opened.set(folders)
    try:
        yield
    except Exception as error:
        if folders:
            error.run_folder = folders[-1].path  # type: ignore[attr-defined]
        raise
    finally:
        _opened.reset(token)
        for folder in folders:
            folder.close()


def check_free(folder: str | os.PathLike[str]) -> None:
    """Check that no other process works in a run folder, before the work that precedes `RunFolder`.

    Raises:
        UserError: Another process works in it, or it lies below a file.
    """
    if ProcessGroup.current().is_main:
        lock.check(Path(folder))


def check_apart(folder: str | os.PathLike[str], checkpoints: Iterable[str | os.PathLike[str]]) -> None:
    """Check that the folder of a run is not that of a checkpoint that the run reads, which would be replaced.

    Args:
        folder: Output folder.
        checkpoints: Checkpoint files, folders or specs that the run reads.

    Raises:
        UserError: A checkpoint is in the output folder.
    """
    for checkpoint in checkpoints:
        place = Path(os.fspath(checkpoint).partition("?")[0])
        home = place.parent if place.is_file() else place
        if home.is_dir() and Path(folder).is_dir() and os.path.samefile(home, folder):
            raise UserError(
                f"output folder {folder} is that of the checkpoint {checkpoint}, which is never changed; name another "
                "folder"
            )


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder came to its end: it has a model, and no checkpoint to resume from."""
    return (folder / "model.safetensors").is_file() and not (folder / "resume" / "current.json").exists()


class FinishedRun(UserError):
    """The run that was to be resumed is finished."""


class RunFolder:
    """The folder of one run, locked.

    Args:
        folder: A new or empty folder, or one that holds a run if `resume` or `overwrite`.
        config: Contents of config.yaml.
        resume: Continue the run in the folder from its last checkpoint; the configuration must be the same.
        overwrite: Replace the run in the folder; its files are removed when the new run starts.
        world: Process group; None: one process.

    Raises:
        UserError: The folder is in use, does not fit the options, holds other files, or is not shared by all ranks.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        world: ProcessGroup | None = None,
    ) -> None:
        self.path, self.world = Path(folder), world or ProcessGroup()
        if resume and overwrite:
            raise UserError("give --resume or --overwrite, not both")
        self._lock: lock.FolderLock | None = None
        self.world.on_main(lambda: self._take(config, resume, overwrite))
        if not self.path.is_dir():
            raise UserError(
                f"rank {self.world.rank} cannot access the output folder {self.path}; all hosts need one file system"
            )
        if (opened := _opened.get()) is not None:
            opened.append(self)

    def close(self) -> None:
        """Release the lock, so that other processes can use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Lock the folder, and open it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output folder {self.path} is a file; name a folder")
        if resume and not self.path.is_dir():
            self._check_same(config, [])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {self.path} cannot be made ({error.strerror}); name another") from None
        self._lock = lock.take(self.path)
        weakref.finalize(self, self._lock.release)  # at the end of the process at the latest
        try:
            self._open(config, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
        held = [name for name in (*_FILES, *_FOLDERS) if (self.path / name).exists()]
        if resume:
            self._check_same(config, held)
        elif held and not overwrite:
            raise UserError(
                f"output folder {self.path} holds another run ({', '.join(held[:3])}, ...); "
                "continue it by --resume, replace it by --overwrite, or name another folder"
            )
        elif not held and any(not _passed_over(path) for path in self.path.glob("*")):
            raise UserError(f"output folder {self.path} holds files that are not a run's; name another folder")
        for pattern in (".*.tmp", CRASHES):  # of processes that were killed or failed
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)
        if resume:
            for name in _COMPLETION_FILES:
                (self.path / name).unlink(missing_ok=True)
        else:
            for name in held:
                shutil.rmtree(self.path / name) if name in _FOLDERS else (self.path / name).unlink()
            with replacing(self.path / "config.yaml") as temporary:
                write_yaml(temporary, config)
        (self.path / "history.jsonl").touch()

    def _check_same(self, config: dict[str, Any], held: list[str]) -> None:
        if "config.yaml" not in held:
            raise UserError(f"output folder {self.path} holds no run to resume; leave --resume out")
        before = _flat(read_yaml(self.path / "config.yaml"))
        now = _flat(config)
        differing = [
            key
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and not _same_weights(key, before, now)
        ]
        if differing:
            listed = "; ".join(f"{key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in differing[:5])
            raise UserError(
                f"output folder {self.path} holds a run of another configuration ({listed}); use its own, or "
                "another folder"
            )
        if is_finished(self.path):
            shutil.rmtree(self.path / "resume", ignore_errors=True)  # of a process that was killed in `finished`
            raise FinishedRun(f"output folder {self.path} holds a finished run; there is nothing to resume")

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to history.jsonl; the main rank writes, the others do nothing.

        Raises:
            RunStopped: The file cannot be written.
        """
        if not self.world.is_main:
            return
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

    def save(self, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Save a checkpoint and remove the previous one; every rank calls it.

        Args:
            state: Tensors and plain values of the main rank.
            write: Writes further files into the folder of the checkpoint.

        Raises:
            RunStopped: No space is left on the device; the previous checkpoint is intact.
        """
        place = self.path / "resume" / f"{state['phase']}-{state['step']:08d}"
        intact = f"{self.path / 'resume'} holds the previous checkpoint, intact; free space and --resume"

        @full_disk(place, intact)
        def begin() -> None:
            shutil.rmtree(place, ignore_errors=True)  # of an earlier attempt that was not finished
            place.mkdir(parents=True)

        @full_disk(place, intact)
        def commit() -> None:
            torch.save({**state, "history_bytes": (self.path / "history.jsonl").stat().st_size}, place / "state.pt")
            files = sorted(path for path in place.iterdir() if path.is_file())
            for path in [*files, place, self.path / "history.jsonl"]:
                sync(path)
            write_json(
                self.path / "resume" / "current.json",
                {"tag": place.name, "files": {path.name: path.stat().st_size for path in files}},
            )
            for other in (self.path / "resume").iterdir():
                if other.is_dir() and other != place:
                    shutil.rmtree(other, ignore_errors=True)

        self.world.on_main(begin)
        with full_disk(place, intact):
            write(place)
        self.world.barrier()
        self.world.on_main(commit)

    def keep(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Save tensors, if there are any, in resume/ next to the checkpoints; every rank calls it."""
        if not tensors:
            return

        def write() -> None:
            (self.path / "resume").mkdir(exist_ok=True)
            with replacing(self.path / "resume" / f"{name}.pt") as temporary:
                torch.save(tensors, temporary)

        self.world.on_main(write)

    def kept(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return what `keep` saved, on the CPU; None if it saved nothing."""
        path = self.path / "resume" / f"{name}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def checkpoint(self) -> Path | None:
        """Return the folder of the valid checkpoint; None if there is none yet.

        Raises:
            UserError: A file of the checkpoint is missing or damaged.
        """
        current = self.path / "resume" / "current.json"
        if not current.is_file():
            return None
        again = "start again with --overwrite"
        try:
            listed = json.loads(current.read_text(encoding="utf-8"))
            place, files = current.parent / listed["tag"], listed["files"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{current} is damaged; {again}") from None
        for name, size in files.items():
            path = place / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path} is missing or damaged; {again}")
        return place

    def load_state(self) -> tuple[dict[str, Any], Path] | None:
        """Load the valid checkpoint, and truncate the history to its length; every rank calls it.

        Returns:
            (state, folder of the checkpoint); None if there is none yet.

        Raises:
            UserError: The checkpoint is damaged.
        """
        place = self.checkpoint()
        size = 0
        loaded = None
        if place is not None:
            try:
                state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise UserError(
                    f"{place / 'state.pt'} is damaged ({str(error).splitlines()[0][:80]}); start again with --overwrite"
                ) from None
            size, loaded = state["history_bytes"], (state, place)

        def cut() -> None:
            with open(self.path / "history.jsonl", "ab") as handle:
                handle.truncate(size)

        self.world.on_main(cut)
        return loaded

    def finished(self) -> None:
        """Remove resume/ and release the lock at the end of a run; every rank calls it."""
        self.world.barrier()
        if self.world.is_main:
            (self.path / "resume" / "current.json").unlink(missing_ok=True)  # first: half a checkpoint is not valid
            shutil.rmtree(self.path / "resume", ignore_errors=True)
        self.close()


def _passed_over(path: Path) -> bool:
    """Return whether a file may be in a new folder: a lock, a temporary file or a traceback."""
    return path.name == lock.FILE or path.name.endswith(".tmp") or path.match(CRASHES)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _same_weights(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two configurations name a model with the same weights: its path may have changed."""
    digest = f"{key}_sha256"
    return digest in now and before.get(digest) == now[digest]


def save_result(result: UnlearnResult, folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Write a result as a run folder; see `UnlearnResult.save`.

    Args:
        result: The result.
        folder: Run folder.
        overwrite: Replace a run in the folder.

    Returns:
        The folder.
    """
    model = as_classifier(result.model)
    spec_of(model)  # a model that cannot be saved is an error before anything is removed
    opened = RunFolder(folder, result.config, overwrite=overwrite)
    try:
        opened.append(result.history)
        save_checkpoint(model, opened.path)
    finally:
        opened.close()
    return opened.path
