"""Several reference models in one folder: each is trained once, by whichever process comes first."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import UserError
from engine.run.folder import FinishedRun, is_finished
from engine.runtime import lock

MOST = 32
_NAME = re.compile(r"reference_([1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """The training of one reference model.

    Attributes:
        folder: Its run folder.
        seed: Seed of its initial weights and of the order of samples.
        resume: Whether the folder holds a run that was begun.
    """

    folder: Path
    seed: int
    resume: bool = False


def reference_runs(out: Path, seed: int, count: int) -> list[ReferenceRun]:
    """Return the runs of `count` reference models, in `out/reference_1` and so on, with the seeds after `seed`.

    Raises:
        UserError: The count is not between 1 and 32, or the folder is that of a model.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--references {count}: expected 1 to {MOST}")
    if (out / "config.json").exists() or (out / "model.safetensors").exists():
        raise UserError(f"--out {out}: holds a model; name a folder for the references alone")
    return [ReferenceRun(out / f"reference_{number}", seed + number) for number in range(1, count + 1)]


def each_reference(given: Sequence[str]) -> list[str]:
    """Return reference checkpoints, each folder of `lethe train --references` replaced by the models in it.

    Raises:
        UserError: A model in such a folder is not finished, or one is given twice.
    """
    found: list[str] = []
    for one in given:
        folder = Path(one)
        members = [] if (folder / "config.json").is_file() or not folder.is_dir() else _members(folder)
        if folder.is_dir() and not any(folder.iterdir()):
            raise UserError(f"--reference {one}: is an empty folder; give a model, or a folder of reference_1, ...")
        for member in members:
            if not is_finished(member):
                raise UserError(
                    f"--reference {folder}: {member.name} is not finished; repeat `lethe train --references`, or give "
                    "the finished ones by name"
                )
        found += [str(member) for member in members] or [one]
    places = [os.path.realpath(each) for each in found]
    for each, place in zip(found, places, strict=True):
        if os.path.exists(place) and places.count(place) > 1:
            raise UserError(f"--reference {each}: is given twice; give each reference once")
    return found


def _members(folder: Path) -> list[Path]:
    """Return the folders of the references in a folder, in the order of their numbers."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def train_references(
    runs: Sequence[ReferenceRun],
    train: Callable[[ReferenceRun], None],
    notify: Callable[[str], None],
    what: str = "references",
) -> list[str]:
    """Train the reference models that are not finished and that no other process trains, one after the other.

    The same call in several processes shares the work between them: a model is trained by the process that locks its
    folder first. A run that was stopped is continued.

    Args:
        runs: The trainings.
        train: Does one of them.
        notify: Shows a line.
        what: What the models are called in it.

    Returns:
        For each run: trained, finished before, or in another process.

    Raises:
        UserError: Whatever else `train` raises.
    """
    statuses = []
    for run in runs:
        try:
            # Read only now: another process may have begun it since the first one.
            train(dataclasses.replace(run, resume=(run.folder / "config.yaml").is_file()))
            statuses.append("trained")
        except FinishedRun:
            statuses.append("finished before")
            notify(f"{run.folder}: finished before")
        except lock.InUse:
            statuses.append("in another process")
            notify(f"{run.folder}: in training in another process")
    finished = sum(is_finished(run.folder) for run in runs)
    rest = "" if finished == len(runs) else "; the others are in training in other processes"
    notify(f"{finished} of {len(runs)} {what} are finished{rest}")
    return statuses
