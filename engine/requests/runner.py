"""From open requests to the next version of a model: unlearn, judge, and accept or roll back.

One run processes the open requests as one batch, the nearest deadline first:

    forget   the batch
    retain   the training samples less the batch and less all that earlier versions forgot, so that no forgotten sample
             is ever trained on again
    verdict  on all samples ever forgotten in the lineage, the batch included, against version 0, which was trained on
             all of them: the return of an earlier sample is detected. A batch that is large enough is also judged
             alone, and its FAIL counts: among many earlier samples it could be hidden

PASS: the version is accepted and its requests are done. FAIL: the version is kept as rejected, the version before it
stays the current one, and the requests stay open. INSUFFICIENT EVIDENCE: the version is accepted, and the requests are
unproven, never done, until a later verdict passes; `require_proof` treats it as a FAIL. The later verdict is that of
the next run, or one on the same version with more evidence: `judge_again`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.audit.run_record import origin
from engine.config import RunConfig, split_options, to_dict
from engine.core.result import Progress
from engine.data import Loader, Samples, Source
from engine.errors import RunStopped, UserError
from engine.evaluate.agreement import mean_kl
from engine.evaluate.representation import compare_weights
from engine.evaluate.verdict import FAIL, PASS, Gates, Verdict
from engine.jobs.opening import Opening, current
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.methods import get_method
from engine.models.checkpoint import save_checkpoint
from engine.models.checkpoint_source import CheckpointSource
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.requests.intake import absolute, load_fitting, open_data
from engine.requests.store import Run, Store, locked
from engine.runtime.device import resolve_device, resolve_precision
from engine.runtime.process_group import launched


class Verify(Protocol):
    """`engine.jobs.verify.verify_job`."""

    def __call__(
        self,
        task: Task,
        checkpoint: str | Path,
        original: str | Path,
        references: Sequence[str | Path],
        *,
        gates: Path | None,
        config: Mapping[str, Any] | None,
    ) -> Verdict: ...


Record = Callable[[Path, Verdict], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run, stored with it so that a resumed run has the options that it began with.

    Attributes:
        method, config: As of `engine.unlearn`.
        references, gates, require_proof: As of `run_requests`, for the verdict.
    """

    method: str
    config: dict[str, Any]
    references: list[str]
    gates: str | None
    require_proof: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """Result of a run.

    Attributes:
        version, parent: Number of the new version, and of the one that was unlearned.
        status, reason, verdict: Of the verdict; if the run failed before one, FAIL, the reason and None.
        state, requests: State now and numbers of the requests of the run.
        samples, forgotten: Number of samples that the run forgot, and that the whole lineage has forgotten.
        drift: See `drift_from`; also `forgotten`, samples since the base, and `share` [0, 1] of its samples.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Result of a later verdict on a version; `requests`: state now of those that were unproven, by number."""

    version: int
    status: str
    reason: str
    requests: Mapping[int, str]
    verdict: dict[str, Any]


def run_requests(
    folder: Path,
    *,
    limit: int | None = None,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    references: Sequence[str] | None = None,
    gates: Path | None = None,
    require_proof: bool = False,
    verify: Verify | None = None,
    record: Record | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finished | None:
    """Make the next version from the open requests, or resume a run that was killed; None if no request is open.

    Args:
        folder: Folder of the store.
        limit: Maximum number of requests in the run; None: all open ones.
        method, references, gates: In place of the store's; references [] are none.
        config: Options that take precedence over the store's. A resumed run keeps its method and config.
        require_proof: Treat INSUFFICIENT EVIDENCE as a FAIL.
        verify, record: By default `engine.jobs.verify.verify_job` and `record_verdict`.
        progress: As of `engine.unlearn`.
        say: Receives lines that announce the next step.

    Raises:
        UserError: Another process runs this store, the data changed, or a reference is refused. The next call resumes.
        RunStopped: As of `engine.unlearn`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected 1 or more")
    _alone("run")
    if gates is not None:
        Gates.read(gates)
    with locked(folder), Store.open(folder) as store, _opening(store).active():
        source = _open_data(store)
        run = store.unfinished()
        if run is None:
            run = _begin(store, source, limit, method, config, references, gates, require_proof)
            if run is None:
                return None
            doing = "unlearning"
        else:
            run = _go_on(store, run, method, config, references, gates, require_proof)
            doing = f"going on with the run of {run.started}:"
        batch = store.ids_of(run.requests)
        earlier = store.forgotten()
        listed = ", ".join(map(str, run.requests))
        say(f"{doing} {len(batch)} samples of requests {listed}, from version {run.parent:04d} to {run.number:04d}")
        task = Task.of_ids(source, batch, spec=f"requests {listed}", excluded=earlier)
        options = Options(**run.options)
        metrics = _unlearn(store, run, task, options, progress)
        place = store.place(run.number)
        drift = _drift(store, run, source.test, len(batch) + len(earlier), options)
        whole = Task.of_ids(source, [*earlier, *batch], spec=f"all requests up to version {run.number}")
        verdict = None
        status, reason = FAIL, _useless(store, run, metrics)
        if not reason:
            say(f"judging version {run.number:04d} on the {len(whole.forget)} samples forgotten so far")
            verdict = _judge(store, verify, whole, task if earlier else None, place, options)
            # If the process is killed before `finish`, the verdict is repeated and recorded twice, which is harmless.
            _record(record, place, verdict)
            status, reason = verdict.status, _reason(verdict)
        accepted = status == PASS or (status != FAIL and not options.require_proof)
        store.finish(run, "accepted" if accepted else "rejected", verdict=status, reason=reason, drift=drift)
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


def judge_again(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    references: Sequence[str] | None = None,
    gates: Path | None = None,
    verify: Verify | None = None,
    record: Record | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Judged | None:
    """Judge the current version with other evidence, such as retrained models; None if nothing is unproven.

    PASS: all unproven requests are done. INSUFFICIENT EVIDENCE: they stay unproven. FAIL: the version is rejected, the
    version before it is the current one, and the requests of the rejected version are open again; those of earlier
    versions stay unproven. Arguments and errors are those of `run_requests`; a UserError also if a run has not ended.
    """
    _alone("judge")
    with locked(folder), Store.open(folder) as store, _opening(store).active():
        _ended(store)
        unproven = [request.number for request in store.requests() if request.state == "unproven"]
        if not unproven:
            return None
        source, version, ids = _open_data(store), store.current(), store.forgotten()
        options = _options(store, None, config, references, gates)
        split_options(options.config, get_method(options.method).Config)
        whole = Task.of_ids(source, ids, spec=f"all requests up to version {version.number}")
        batch = store.ids_of(unproven)
        earlier = sorted({*ids} - {*batch})
        part = Task.of_ids(source, batch, spec="the unproven requests", excluded=earlier) if earlier else None
        say(f"judging version {version.number:04d} on the {len(ids)} samples forgotten so far")
        place = store.place(version.number)
        verdict = _judge(store, verify, whole, part, place, options)
        if version.kind == "unlearned":  # a full retrain was copied without its record
            _record(record, place, verdict)
        store.judge_again(version.number, verdict.status, _reason(verdict))
        states = {request.number: request.state for request in store.requests() if request.number in unproven}
    return Judged(
        version=version.number,
        status=verdict.status,
        reason=_reason(verdict),
        requests=states,
        verdict=verdict.to_dict(),
    )


def abandon_run(folder: Path) -> Run:
    """Abandon the unfinished run and return it. Its folder is kept for the record, and its requests stay open."""
    with locked(folder), Store.open(folder) as store:
        run = store.unfinished()
        if run is None:
            raise UserError(f"{folder}: there is no unfinished run to give up")
        store.finish(run, "abandoned", reason="given up before a verdict")
    return run


def rebase(folder: Path, checkpoint: str) -> tuple[int, bool]:
    """Make a full retrain the current version and the base of drift; return (number, whether its run folder proves it).

    Raises:
        UserError: By its run folder the model is no retrain, or was trained on samples that were forgotten.
    """
    _alone("rebase")
    with locked(folder), Store.open(folder) as store, _opening(store).active():
        _ended(store)
        source, forgotten = _open_data(store), store.forgotten()
        model, found = load_fitting(checkpoint, source), origin(CheckpointSource.parse(checkpoint).folder)
        if found is not None and found.method != "retrain":
            raise UserError(
                f"--checkpoint {checkpoint}: by its {found.said_by} it comes of {found.method}, not of a full retrain; "
                "retrain with lethe train --forget"
            )
        if found is not None and forgotten and found.samples_sha256 == source.train.fingerprint():
            raise UserError(
                f"--checkpoint {checkpoint}: by its {found.said_by} it was trained on all samples, the "
                f"{len(forgotten)} forgotten ones among them; retrain with lethe train --forget and the list that "
                "lethe request list --all --ids FILE writes"
            )
        retained = Task.of_ids(source, forgotten, spec="rebase").retain if forgotten else source.train
        # A model that was trained from another checkpoint is as clean as that one, which its record leaves open.
        proven = found is not None and not found.init and found.samples_sha256 == retained.fingerprint()
        number = store.next_number()
        save_checkpoint(model, store.place(number))
        store.add_rebase(number, f"full retrain, {'by its record' if proven else 'as stated'}: {checkpoint}")
    return number, proven


def drift_from(base: Predictions, model: Predictions) -> dict[str, float]:
    """Compare a version with the last full retrain, `base`, on the test samples.

    Returns:
        test_accuracy: of the version, [0, 1]. test_accuracy_change: version less base, in percentage points. test_kl:
        mean KL(base || version) in nats; 0 for equal probabilities.
    """
    return {
        "test_accuracy": model.accuracy,
        "test_accuracy_change": 100 * (model.accuracy - base.accuracy),
        "test_kl": mean_kl(base, model),
    }


# --- the steps of a run -----------------------------------------------------------------------------------------------


def _alone(command: str) -> None:
    """Raise UserError under a launcher: each of its ranks would change the lineage."""
    if launched():
        raise UserError(f"lethe request {command} is one process; start it without a launcher")


def _opening(store: Store) -> Opening:
    """Return the opening of the store's models, with the options that `init_store` was given."""
    return Opening.of(store.settings.get("opening"))


def _open_data(store: Store) -> Source:
    """Open the data of a store, with labels in the order of version 0's classes."""
    source = open_data(store)
    return current().in_order_of(source, load_checkpoint(store.place(0))) if source.train.class_names else source


def _ended(store: Store) -> None:
    """Raise UserError if there is a run that has not ended."""
    run = store.unfinished()
    if run is not None:
        raise UserError(
            f"{store.folder}: the run of version {run.number:04d} has not ended; go on with it by lethe request run, "
            "or give it up by lethe request run --abandon"
        )


def _options(
    store: Store,
    method: str | None,
    config: Mapping[str, Any] | None,
    references: Sequence[str] | None,
    gates: Path | None,
    require_proof: bool = False,
) -> Options:
    """Return the store's settings, replaced by what was given in their place."""
    settings = store.settings
    own_gates = str((store.folder / settings["gates"]).resolve()) if settings["gates"] else None
    return Options(
        method=method or settings["method"],
        config={**settings["config"], **(config or {})},
        references=settings["references"] if references is None else absolute(references),
        gates=str(gates.resolve()) if gates else own_gates,
        require_proof=require_proof,
    )


def _begin(
    store: Store,
    source: Source,
    limit: int | None,
    method: str | None,
    config: Mapping[str, Any] | None,
    references: Sequence[str] | None,
    gates: Path | None,
    require_proof: bool,
) -> Run | None:
    batch = [request.number for request in store.requests() if request.state == "open"][:limit]
    if not batch:
        return None
    options = _options(store, method, config, references, gates, require_proof)
    # Wrong use is reported before the run is stored: a stored run would block the next one.
    split_options(options.config, get_method(options.method).Config)
    Task.of_ids(source, store.ids_of(batch), spec="the open requests", excluded=store.forgotten())
    return store.begin(batch, to_dict(options))


def _go_on(
    store: Store,
    run: Run,
    method: str | None,
    config: Mapping[str, Any] | None,
    references: Sequence[str] | None,
    gates: Path | None,
    require_proof: bool,
) -> Run:
    options = Options(**run.options)
    if method not in (None, options.method) or {**options.config, **(config or {})} != options.config:
        raise UserError(
            f"the run of version {run.number:04d} has not ended and has another method or other options; leave "
            "--method and --set out to go on with it, or give it up by --abandon"
        )
    changed = dataclasses.replace(
        options,
        references=options.references if references is None else absolute(references),
        gates=str(gates.resolve()) if gates else options.gates,
        require_proof=options.require_proof or require_proof,
    )
    return store.change_options(run, to_dict(changed)) if changed != options else run


def _unlearn(store: Store, run: Run, task: Task, options: Options, progress: Progress | None) -> dict[str, Any]:
    """Fill the run folder of a version, resumed from where an earlier call was killed, and return its metrics.json."""
    place = store.place(run.number)
    # A run ends by writing the evidence, the report last, and then by deleting its resume folder. A model without a
    # report comes from a rebase that was killed before it was stored: it is overwritten.
    ended = (place / "model.safetensors").is_file() and not (place / "resume" / "current.json").exists()
    if ended and (place / "report.html").is_file():
        shutil.rmtree(place / "resume", ignore_errors=True)  # of a process killed during the deletion
        metrics: dict[str, Any] = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    try:
        outcome = run_job(
            task,
            str(store.place(run.parent).resolve()),
            place,
            method=options.method,
            config=options.config,
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
            f"{error}; the requests stay open: lethe request run goes on with this run; to begin another with other "
            "options, give this one up first by lethe request run --abandon"
        ) from error
    return outcome.metrics


def _useless(store: Store, run: Run, metrics: Mapping[str, Any]) -> str:
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


def _judge(
    store: Store, verify: Verify | None, whole: Task, batch: Task | None, place: Path, options: Options
) -> Verdict:
    """Return the verdict on all forgotten samples, or that on `batch` alone if it fails; None: the batch is all."""
    from engine.jobs.verify import verify_job

    gates = Path(options.gates) if options.gates else None

    def judged(task: Task) -> Verdict:
        call = verify or verify_job
        return call(task, place, store.place(0), options.references, gates=gates, config=options.config)

    if batch is not None and len(batch.forget) >= Gates.read(gates).minimum_samples:
        alone = judged(batch)
        if alone.status == FAIL:
            return alone
    return judged(whole)


def _record(record: Record | None, place: Path, verdict: Verdict) -> None:
    from engine.jobs.verify import record_verdict

    (record or record_verdict)(place, verdict)


def _drift(store: Store, run: Run, test: Samples, forgotten: int, options: Options) -> dict[str, Any]:
    """Return `forgotten`, samples since the base, `share` [0, 1] of the base's training samples, and `drift_from`."""
    base = next(version.base for version in store.versions() if version.number == run.parent)
    before = len(store.forgotten(base))
    since = forgotten - before
    setup, _ = split_options(options.config, get_method(options.method).Config)
    first, second = (_predictions(store.place(number), test, setup) for number in (base, run.number))
    share = since / (store.settings["train"] - before)
    return {"forgotten": since, "share": share, **drift_from(first, second)}


def _predictions(checkpoint: Path, samples: Samples, run: RunConfig) -> Predictions:
    device = resolve_device(run.device)
    model = load_checkpoint(checkpoint).to(device)
    loader = Loader(
        samples,
        preprocessing_of(model),
        batch_size=250,
        workers=run.workers,
        device=device,
        decode=run.decode,
        on_bad_image=run.on_bad_image,
        max_bad_share=run.max_bad_share,
    )
    return predict(model, loader, resolve_precision(run.precision, device))


def _reason(verdict: Verdict) -> str:
    """Return the gates that decided against a PASS, each with its reason."""
    return "; ".join(f"{gate.name}: {gate.reason}" for gate in verdict.gates if gate.name in verdict.decided_by)
