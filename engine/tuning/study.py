"""Trials of a search, kept by Optuna (Akiba et al. 2019, arXiv 1907.10902) in a SQLite file.

What a trial tries is a function of the seed, of how many trials are finished and of what they gave: the sampler is
seeded anew for each. So a search that was killed goes on as if it had not been, and the trial that was cut is drawn and
run again; in the file the cut one stays, as failed.
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
    """A finished trial. number: from 0 on, where 0 tries the defaults. options: what it tried.

    score: on the choosing half, percentage points; None where it was pruned, and `reason` says why. choosing,
    reporting: that score and that of the other half with their parts, as `Score.to_dict`. seconds: unlearn, measure.
    """

    number: int
    options: dict[str, Any]
    score: float | None
    choosing: dict[str, Any] | None
    reporting: dict[str, Any] | None
    seconds: dict[str, float]
    reason: str = ""


class Study:
    """Opens the study of a folder, or one in memory.

    settings: what the study is of; of one that is there already, it must be what it was. first: the options that trial
    0 tries. overwrite: begin a new one. The folder is one that `check_folder` let pass.
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
        """Seconds that the search has cost, over all processes that worked at it."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    def spend(self, seconds: float) -> None:
        """Keeps how many they are by now."""
        self._study.set_user_attr("seconds", seconds)

    def finished(self) -> list[Trial]:
        """Trials that were completed or pruned, in their order."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        return [Trial(**trial.user_attrs["trial"]) for trial in trials]

    def ask(self) -> tuple[Any, int, dict[str, Any]]:
        """(Optuna's trial, its number here, the options to try)."""
        number = len(self.finished())
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed * 100_003 + number, constant_liar=False)
        if number == 0:
            self._study.enqueue_trial(self._first, skip_if_exists=False)
        trial = self._study.ask()
        return trial, number, {name: _suggest(trial, name, space) for name, space in self._space.items()}

    def tell(self, asked: Any, trial: Trial | None) -> None:
        """Keeps what came of a trial; None: it was cut, and is to be run again."""
        states = self._optuna.trial.TrialState
        if trial is None:
            self._study.tell(asked, state=states.FAIL)
            return
        asked.set_user_attr("trial", dataclasses.asdict(trial))
        if trial.score is None:
            self._study.tell(asked, state=states.PRUNED)
        else:
            self._study.tell(asked, trial.score)


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
    """Raises UserError for a folder that is not fit for a study, or holds one when it should not, or none."""
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
            f"output folder {folder} holds a study; go on with it by --resume, replace it by --overwrite, or name "
            "another folder"
        )
    if not file.exists() and folder.is_dir() and any(path.name != lock.FILE for path in folder.iterdir()):
        raise UserError(f"output folder {folder} holds files that are not a study's; name another folder")


def _storage(folder: Path, overwrite: bool) -> str:
    """The address of the study's file."""
    if overwrite:
        for name in (FILE, BEST):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(folder / FILE).absolute()}"


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in differing[:3])
        raise UserError(f"the study to resume is of something else ({listed}); use its own options, or another folder")
