"""From open requests to the next version of a model: unlearn, judge, and accept or roll back.

One run processes the open requests as one batch, the nearest deadline first:

    forget   the batch
    retain   the training samples less the batch and less all that earlier versions forgot, so that no forgotten sample
             is ever trained on again
    original version 0, for a method that takes predictions of it (`Method.takes_original`): were it the version before,
             what each run costs the retained samples would add up (docs/lab/2026-11-30.md). A full retrain replaces it
    verdict  on all samples ever forgotten in the lineage, the batch included, against version 0, which was trained on
             all of them: the return of an earlier sample is detected. The samples that no verdict has proven, the batch
             included, are judged alone as well, and have to pass: among many others they could be hidden. If they are
             too few for a verdict the requests stay unproven, unless a certificate covers the batch

PASS: the version is accepted and its requests are done. FAIL: the version is kept as rejected, the version before it
stays the current one, and the requests stay open. INSUFFICIENT EVIDENCE: the version is accepted, and the requests are
unproven, never done, until a later verdict passes; `require_proof` treats it as a FAIL. The later verdict is that of
the next run, or one on the same version with more evidence: `engine.requests.verdicts.judge_again`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from engine.config import read_yaml, to_dict
from engine.core.result import Progress
from engine.data import Source
from engine.errors import RunStopped, UserError
from engine.evaluate.gates import FAIL, PASS, Gates
from engine.evaluate.representation import compare_weights
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.methods import get_method
from engine.requests.drift import measure_drift
from engine.requests.entries import Run
from engine.requests.lineage import open_lineage, open_ordered_data, refuse_changed, refuse_launcher
from engine.requests.pool_proof import PoolProof
from engine.requests.run_options import Options, Overrides
from engine.requests.store import Store, locked
from engine.requests.verdicts import Record, Verify, judge_version, part_of, reason_of, record_in
from engine.run.folder import is_finished

# Retained samples, and test samples, of a run's evaluation; as many as the run forgets, if those are more. The verdict,
# by which a run is accepted, has samples of its own.
_EVALUATED = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """Result of a run.

    Attributes:
        version, parent: Number of the new version, and of the one that was unlearned.
        status, reason, verdict: Of the verdict; if the run failed before one, FAIL, the reason and None.
        state, requests: State now and numbers of the requests of the run.
        samples, forgotten: Number of samples that the run forgot, and that the whole lineage has forgotten.
        drift: See `engine.requests.drift.measure_drift`.
    """

    version: int
    parent: int
    status: str
    state: Literal["done", "unproven", "open"]
    reason: str
    requests: list[int]
    samples: int
    forgotten: int
    drift: dict[str, Any]
    metrics: dict[str, Any]
    verdict: dict[str, Any] | None


def run_requests(
    folder: Path,
    *,
    limit: int | None = None,
    given: Overrides | None = None,
    verify: Verify | None = None,
    record: Record | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Finished | None:
    """Make the next version from the open requests, or resume a run that was killed; None if no request is open.

    Args:
        folder: Folder of the store.
        limit: Maximum number of requests in the run; None: all open ones.
        given: Options in place of the store's; None: none. A resumed run keeps its method and config.
        verify, record: By default `engine.jobs.verify.verify_job` and `record_verdict`.
        progress: As of `engine.unlearn`.
        notify: Receives lines that announce the next step.

    Raises:
        UserError: Another process runs this store, the data changed, or a reference is refused. The next call resumes.
        RunStopped: As of `engine.unlearn`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected 1 or more")
    refuse_launcher("run")
    given = given or Overrides()
    if given.gates is not None:
        Gates.read(given.gates)
    with open_lineage(folder) as store:
        source = open_ordered_data(store)
        run = store.unfinished()
        if run is None:
            run = _begin(store, source, limit, given)
            if run is None:
                return None
            doing = "unlearning"
        else:
            run = _resume(store, run, given)
            doing = f"continuing the run of {run.started}:"
        attempt = _Attempt.of(store, source, run)
        notify(
            f"{doing} {len(attempt.batch)} samples of requests {attempt.listed}, from version {run.parent:04d} to "
            f"{run.number:04d}"
        )
        return attempt.finish(verify, record, progress, notify)


def abandon_run(folder: Path) -> Run:
    """Abandon the unfinished run and return it. Its folder is kept for the record, and its requests stay open."""
    with locked(folder), Store.open(folder) as store:
        run = store.unfinished()
        if run is None:
            raise UserError(f"{folder}: there is no unfinished run to abandon")
        store.finish(run, "abandoned", reason="abandoned before a verdict")
    return run


# --- the steps of a run -----------------------------------------------------------------------------------------------


def _begin(store: Store, source: Source, limit: int | None, given: Overrides) -> Run | None:
    """Store a run of the open requests, at most `limit`; None if no request is open."""
    batch = [request.number for request in store.requests() if request.state == "open"][:limit]
    if not batch:
        return None
    refuse_changed(store, store.current().number)
    options = given.of_store(store)
    # Wrong use is reported before the run is stored: a stored run would block the next one.
    options.check()
    Task.of_ids(source, store.ids_of(batch), spec="the open requests", excluded=store.forgotten())
    return store.begin(batch, to_dict(options))


def _resume(store: Store, run: Run, given: Overrides) -> Run:
    """Return an unfinished run with the options of its verdict replaced by those given."""
    refuse_changed(store, run.parent)
    options = given.of_unfinished(run)
    return store.change_options(run, to_dict(options)) if options != Options(**run.options) else run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A run whose version is not stored yet.

    Attributes:
        store, source, run: The store, its data and the run.
        batch: Ids that the run forgets.
        earlier: Ids that earlier versions forgot.
    """

    store: Store
    source: Source
    run: Run
    batch: list[str]
    earlier: list[str]

    @classmethod
    def of(cls, store: Store, source: Source, run: Run) -> _Attempt:
        return cls(store=store, source=source, run=run, batch=store.ids_of(run.requests), earlier=store.forgotten())

    @property
    def listed(self) -> str:
        """Numbers of the requests, as text."""
        return ", ".join(map(str, self.run.requests))

    def finish(
        self, verify: Verify | None, record: Record | None, progress: Progress | None, notify: Callable[[str], None]
    ) -> Finished:
        """Unlearn, measure the drift, judge, and store the version; arguments as of `run_requests`."""
        store, run, batch, earlier = self.store, self.run, self.batch, self.earlier
        task = Task.of_ids(self.source, batch, spec=f"requests {self.listed}", excluded=earlier)
        options, forgotten = Options(**run.options), [*earlier, *batch]
        unproven = [*store.ids_of([r.number for r in store.requests() if r.state == "unproven"]), *batch]
        if options.pool:
            proof = PoolProof(store=store, options=options, parent=run.parent, place=store.place(run.number))
            if why := proof.warning(task, len(unproven)):
                notify(f"this run will be unproven, no certificate covers it: {why}")
        metrics = _unlearn(store, run, task, options, progress)
        place = store.place(run.number)
        drift = measure_drift(store, run, self.source.test, len(forgotten), options)
        whole = Task.of_ids(self.source, forgotten, spec=f"all requests up to version {run.number}")
        verdict = None
        status, reason = FAIL, why_unusable(store, run, metrics)
        if not reason:
            notify(f"judging version {run.number:04d} on the {len(whole.forget)} samples forgotten so far")
            part = part_of(self.source, forgotten, unproven, spec="the unproven requests")
            verdict = judge_version(store, verify, whole, part, place, options, (run.parent, task))
            # If the process is killed before `finish`, the verdict is repeated and recorded twice, which is harmless.
            record_in(store, run.number, verdict, record)
            status, reason = verdict.status, reason_of(verdict)
        accepted = status == PASS or (status != FAIL and not options.require_proof)
        store.finish(
            run,
            "accepted" if accepted else "rejected",
            verdict=status,
            reason=reason,
            drift=drift,
            batch_alone=verdict is not None and verdict.kind == "certificate",
        )
        return Finished(
            version=run.number,
            parent=run.parent,
            status=status,
            state="done" if status == PASS else "unproven" if accepted else "open",
            reason=reason,
            requests=run.requests,
            samples=len(batch),
            forgotten=len(whole.forget),
            drift=drift,
            metrics=metrics,
            verdict=verdict.to_dict() if verdict else None,
        )


def _unlearn(store: Store, run: Run, task: Task, options: Options, progress: Progress | None) -> dict[str, Any]:
    """Fill the run folder of a version, resumed from where an earlier call was killed, and return its metrics.json."""
    place = store.place(run.number)
    # A run ends by writing the evidence, the report last, and then by deleting its resume folder. A model without a
    # report comes from a rebase that was killed before it was stored: it is overwritten.
    ended = is_finished(place)
    if ended and (place / "report.html").is_file() and _made(place, task, options.method):
        shutil.rmtree(place / "resume", ignore_errors=True)  # of a process killed during the deletion
        metrics: dict[str, Any] = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    evaluated = {"evaluation_samples": max(_EVALUATED, len(task.forget))}
    base = store.base_of(run.parent)
    keeps = base != run.parent and get_method(options.method).takes_original
    try:
        outcome = run_job(
            task,
            str(store.place(run.parent).resolve()),
            place,
            method=options.method,
            config=evaluated | options.config,
            original=str(store.place(base).resolve()) if keeps else None,
            references=options.references,
            resume=(place / "config.yaml").is_file() and not ended,
            overwrite=ended,
            progress=progress,
        )
    except UserError:
        if not (place / "config.yaml").is_file():  # nothing has happened yet
            store.withdraw(run)
        raise
    except RunStopped as error:
        raise RunStopped(
            f"{error}; the requests stay open: lethe request run continues this run; to begin another with other "
            "options, drop this one first by lethe request run --abandon"
        ) from error
    return outcome.metrics


def _made(place: Path, task: Task, method: str) -> bool:
    """Return whether a finished run is that of this task: an older database may lie next to newer versions."""
    config = read_yaml(place / "config.yaml")
    samples = config.get("samples", {})
    forgotten = samples.get("forget", 0) + samples.get("forget_unreadable", 0)
    same = samples.get("retain_sha256") == task.retain.fingerprint() and forgotten == len(task.forget)
    return bool(same and config.get("method", method) == method)


def why_unusable(store: Store, run: Run, metrics: Mapping[str, Any]) -> str:
    """Return why a version fails before any verdict; empty if it does not.

    A verdict compares with version 0, from which earlier versions differ already. A run that changed nothing has to be
    detected here. For an exact method it is no fault: the deployed model need not have been trained on the samples.
    """
    if metrics["collapsed"]:
        return "COLLAPSED: accuracy on the watched samples fell by more than 10 points"
    if get_method(run.options["method"]).exact:
        return ""
    model, parent = (load_checkpoint(store.place(number)) for number in (run.number, run.parent))
    if compare_weights(model, parent)["changed"] == 0:
        return f"UNCHANGED: every weight outside the head is that of version {run.parent:04d}"
    return ""
