"""Trials of a search, stored by Optuna (Akiba et al. 2019, arXiv 1907.10902) in a SQLite file.

The options of a trial are a function of the seed, the number of finished trials and their scores: the sampler is seeded
anew for each trial. So a search that was killed and resumed gives the same trials as one that was not. The interrupted
trial is drawn and run again; its first attempt stays in the file as failed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.core.search_space import Choice, Range, Space
from engine.errors import UserError
from engine.runtime import lock

FILE, BEST = "study.db", "best.yaml"
_NAME = "lethe tune"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        number: Number of the trial, from 0; trial 0 uses the defaults.
        options: Options of the trial.
        score: Score on the choosing half in percentage points; None if the trial was pruned.
        choosing: That score with its parts, see `Score.to_dict`.
        reporting: Score on the reporting half, likewise.
        seconds: Time of "unlearn" and of "measure".
        reason: Why the trial was pruned; empty if it was not.
    """

    number: int
    options: dict[str, Any]
    score: float | None
    choosing: dict[str, Any] | None
    reporting: dict[str, Any] | None
    seconds: dict[str, float]
    reason: str = ""


class Study:
    """The study in a folder, or one in memory.

    Args:
        folder: Folder of the study, accepted by `check_folder`; None: in memory.
        settings: Model, data and options that the study is about. They must equal those of an existing study.
        space: Space of each option that is searched.
        first: Options of trial 0.
        seed: Seed of the search.
        overwrite: Start a new study.

    Raises:
        UserError: The existing study has other settings, or Optuna is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        space: dict[str, Space],
        first: dict[str, Any],
        seed: int,
        *,
        overwrite: bool = False,
    ) -> None:
        optuna = require_optuna()
        self._optuna, self._space, self._first, self._seed = optuna, space, first, seed
        storage = None if folder is None else _storage(folder, overwrite)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=storage, study_name=_NAME, direction="minimize", load_if_exists=True
            )
        finally:
            optuna.logging.set_verbosity(verbosity)
        _check_same(self._study.user_attrs.get("settings", settings), settings)
        self._study.set_user_attr("settings", settings)
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of a process that was killed

    @property
    def spent(self) -> float:
        """Time of the search in seconds, summed over all processes that worked at it."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    def spend(self, seconds: float) -> None:
        """Store the time of the search so far."""
        self._study.set_user_attr("seconds", seconds)

    def finished(self) -> list[Trial]:
        """Return the trials that were completed or pruned, in order."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        return [Trial(**trial.user_attrs["trial"]) for trial in trials]

    def ask(self) -> tuple[Any, int, dict[str, Any]]:
        """Draw a trial; return (Optuna's trial, its number among the finished trials, its options)."""
        number = len(self.finished())
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed * 100_003 + number, constant_liar=False)
        if number == 0:
            self._study.enqueue_trial(self._first, skip_if_exists=False)
        trial = self._study.ask()
        return trial, number, {name: _suggest(trial, name, space) for name, space in self._space.items()}

    def finish(self, pending: Any, trial: Trial | None) -> None:
        """Store the result of a trial.

        Args:
            pending: Optuna's trial, from `ask`.
            trial: The finished trial; None: it was interrupted and has to be run again.
        """
        states = self._optuna.trial.TrialState
        if trial is None:
            self._study.tell(pending, state=states.FAIL)
            return
        pending.set_user_attr("trial", dataclasses.asdict(trial))
        if trial.score is None:
            self._study.tell(pending, state=states.PRUNED)
        else:
            self._study.tell(pending, trial.score)


def require_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"tune needs the package optuna ({error}); pip install 'lethe-unlearning[tune]'") from None
    return optuna


def _suggest(trial: Any, name: str, space: Space) -> Any:
    if isinstance(space, Choice):
        return trial.suggest_categorical(name, list(space.values))
    assert isinstance(space, Range)
    return trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Check that a folder can hold the study.

    Args:
        folder: Output folder.
        resume: It must hold a study.
        overwrite: It may hold a study.

    Raises:
        UserError: The folder is not fit for a study, holds one without `resume` or `overwrite`, or has none to resume.
    """
    if resume and overwrite:
        raise UserError("give --resume or --overwrite, not both")
    if "?" in str(folder):  # SQLAlchemy would read what follows as options
        raise UserError(f"output folder {folder}: a name with '?' cannot hold the study; name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file; name a folder")
    file = folder / FILE
    if resume and not file.is_file():
        raise UserError(f"output folder {folder} holds no study to resume; leave --resume out")
    if file.exists() and not resume and not overwrite:
        raise UserError(
            f"output folder {folder} holds a study; continue it by --resume, replace it by --overwrite, or name "
            "another folder"
        )
    if not file.exists() and folder.is_dir() and any(path.name != lock.FILE for path in folder.iterdir()):
        raise UserError(f"output folder {folder} holds files that are not a study's; name another folder")


def _storage(folder: Path, overwrite: bool) -> str:
    """Return the address of the study's file; with `overwrite`, after removing an earlier study."""
    if overwrite:
        for name in (FILE, BEST):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(folder / FILE).absolute()}"


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in differing[:3])
        raise UserError(f"the study to resume has other settings ({listed}); use its own options, or another folder")
