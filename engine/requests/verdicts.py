"""Verdicts on versions of the lineage: that of a run, and a later one with other evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.evaluate.gates import FAIL, Gates, Verdict
from engine.jobs.task import Task
from engine.requests.lineage import open_lineage, open_ordered_data, refuse_launcher, refuse_unfinished
from engine.requests.pool_proof import PoolProof
from engine.requests.run_options import Options, Overrides
from engine.requests.store import Store


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
class Judged:
    """Result of a later verdict on a version; `requests`: state now of those that were unproven, or that changed."""

    version: int
    status: str
    reason: str
    requests: Mapping[int, str]
    verdict: dict[str, Any]


def judge_again(
    folder: Path,
    *,
    given: Overrides | None = None,
    verify: Verify | None = None,
    record: Record | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Judged | None:
    """Judge the current version with other evidence, such as retrained models; None if nothing is to be judged.

    PASS: all unproven requests are done. INSUFFICIENT EVIDENCE: they stay unproven. FAIL: the version is rejected, the
    version before it is the current one, and the requests of the rejected version are open again; those of earlier
    versions stay unproven.

    Args:
        folder: Folder of the store.
        given: Options of the verdict in place of the store's. With a pool among them all that was forgotten is judged,
            even if nothing is unproven.
        verify, record, notify: As of `engine.requests.runner.run_requests`.

    Raises:
        UserError: A run has not ended, another process runs this store, the data changed, or a reference is refused.
    """
    given = given or Overrides()
    refuse_launcher("judge")
    with open_lineage(folder) as store:
        refuse_unfinished(store)
        unproven = [request.number for request in store.requests() if request.state == "unproven"]
        version, ids = store.current(), store.forgotten()
        if not unproven and not (given.pool and ids):
            return None
        source = open_ordered_data(store)
        options, parent = given.of_store(store), None
        if options.pool and version.kind == "unlearned" and unproven == sorted(version.requests):
            # A certificate may cover that run, which had its own method and options.
            options, parent = given.of_unfinished(store.run_of(version)), version.parent
        options.check()
        whole = Task.of_ids(source, ids, spec=f"all requests up to version {version.number}")
        batch = store.ids_of(unproven or version.requests)
        earlier = sorted({*ids} - {*batch})
        part = Task.of_ids(source, batch, spec="the unproven requests", excluded=earlier) if earlier else None
        notify(f"judging version {version.number:04d} on the {len(ids)} samples forgotten so far")
        place = store.place(version.number)
        verdict = judge_version(store, verify, whole, part, place, options, parent)
        if version.kind == "unlearned":  # a full retrain was copied without its record
            record_in(place, verdict, record)
        before = {request.number: request.state for request in store.requests()}
        store.judge_again(version.number, verdict.status, reason_of(verdict), verdict.kind == "certificate")
        states = {r.number: r.state for r in store.requests() if r.number in unproven or r.state != before[r.number]}
    return Judged(
        version=version.number,
        status=verdict.status,
        reason=reason_of(verdict),
        requests=states,
        verdict=verdict.to_dict(),
    )


def judge_version(
    store: Store,
    verify: Verify | None,
    whole: Task,
    batch: Task | None,
    place: Path,
    options: Options,
    parent: int | None = None,
) -> Verdict:
    """Return the verdict on all forgotten samples, or that on the batch alone if it fails.

    Args:
        store: The store; the original is its version 0.
        verify: Function that judges; None: `engine.jobs.verify.verify_job`.
        whole: All samples that were forgotten, the batch included.
        batch: Samples of the batch, judged alone too if they are enough; None: the batch is all.
        place: Folder of the version.
        options: Options of the run.
        parent: Version that the run unlearned, so that a certificate may cover it; None: all is judged by outputs.
    """
    from engine.jobs.verify import verify_job

    if options.pool and not options.references:
        return PoolProof(store=store, options=options, parent=parent, place=place).judge(whole, batch)
    gates = Path(options.gates) if options.gates else None

    def judged(task: Task) -> Verdict:
        call = verify or verify_job
        return call(task, place, store.place(0), options.references, gates=gates, config=options.config)

    if batch is not None and len(batch.forget) >= Gates.read(gates).minimum_samples:
        alone = judged(batch)
        if alone.status == FAIL:
            return alone
    return judged(whole)


def record_in(place: Path, verdict: Verdict, record: Record | None = None) -> None:
    """Record a verdict in the folder of a version, by default by `engine.jobs.verify.record_verdict`."""
    from engine.jobs.verify import record_verdict

    (record or record_verdict)(place, verdict)


def reason_of(verdict: Verdict) -> str:
    """Return the gates that decided against a PASS, each with its reason."""
    return "; ".join(f"{gate.name}: {gate.reason}" for gate in verdict.gates if gate.name in verdict.decided_by)
