"""Verdicts on versions of the lineage: that of a run, and a later one with other evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.data import Source
from engine.evaluate.gates import PASS, Gates, Verdict, undecided
from engine.jobs.task import Task
from engine.methods import get_method
from engine.report.proof.page import write_proof
from engine.requests.lineage import open_lineage, open_ordered_data, refuse_changed, refuse_launcher, refuse_unfinished
from engine.requests.pool_proof import PoolProof, judge_unproven
from engine.requests.run_options import Options, Overrides
from engine.requests.store import Store
from engine.runtime.environment import environment

# Page of the newest verdict, in the folder of a version.
PAGE = "verdict.html"


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

    Runs of earlier versions whose requests are unproven are judged first, each by its own model, where a certificate
    covers them. Then PASS: all unproven requests are done. INSUFFICIENT EVIDENCE: they stay unproven. FAIL: the version
    is rejected, the version before it is the current one, and the requests of the rejected version are open again;
    those of earlier versions stay as they are.

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
        version, ids, unproven = store.current(), store.forgotten(), _unproven(store)
        if not unproven and not (given.pool and ids):
            return None
        refuse_changed(store, version.number)
        source = open_ordered_data(store)
        options, parent = _options_of(store, given, unproven)
        earlier = list[str]()
        if parent is None and options.pool and options.certificates:
            proven, earlier = _prove_by_run(store, source, given, record, notify)
            before, unproven = unproven, _unproven(store)
            if before and not unproven:
                return Judged(
                    version=max(proven),
                    status=PASS,
                    reason="",
                    requests=dict.fromkeys(before, "done"),
                    verdict=proven[max(proven)].to_dict(),
                )
            options, parent = _options_of(store, given, unproven)
        whole = Task.of_ids(source, ids, spec=f"all requests up to version {version.number}")
        part = _to_be_proven(source, ids, store.ids_of(unproven or version.requests), bool(unproven), options)
        notify(f"judging version {version.number:04d} on the {len(ids)} samples forgotten so far")
        place = store.place(version.number)
        of_run = None if parent is None else (parent, part or whole)
        verdict = judge_version(store, verify, whole, part, place, options, of_run, earlier)
        if version.kind == "unlearned":  # a full retrain was copied without its record
            record_in(store, version.number, verdict, record)
        states_before = {request.number: request.state for request in store.requests()}
        store.judge_again(version.number, verdict.status, reason_of(verdict), verdict.kind == "certificate")
        states = {
            r.number: r.state for r in store.requests() if r.number in unproven or r.state != states_before[r.number]
        }
    return Judged(
        version=version.number,
        status=verdict.status,
        reason=reason_of(verdict),
        requests=states,
        verdict=verdict.to_dict(),
    )


def _unproven(store: Store) -> list[int]:
    return [request.number for request in store.requests() if request.state == "unproven"]


def _options_of(store: Store, given: Overrides, unproven: Sequence[int]) -> tuple[Options, int | None]:
    """Return the options of a verdict, checked, and the version that was unlearned if a certificate may cover the run.

    It may if the unproven requests are those of the current version's run, which has a method and options of its own.
    """
    version, options, parent = store.current(), given.of_store(store), None
    if options.pool and version.kind == "unlearned" and unproven == sorted(version.requests):
        options, parent = given.of_unfinished(store.run_of(version)), version.parent
    options.check()
    return options, parent


def _prove_by_run(
    store: Store, source: Source, given: Overrides, record: Record | None, notify: Callable[[str], None]
) -> tuple[dict[int, Verdict], list[str]]:
    """Judge each run that has unproven requests by certificates and by the model of its own version.

    Returns:
        (verdict by version of those that passed, why requests of the others stay unproven).
    """
    proven, found = dict[int, Verdict](), list[str]()
    forgotten, unproven = store.forgotten(), {*_unproven(store)}
    for version in store.versions():
        if version.state != "accepted" or not unproven & {*version.requests}:
            continue
        ids, spec = store.ids_of(version.requests), f"requests of version {version.number}"
        options = given.of_unfinished(store.run_of(version))
        options.check()
        proof = PoolProof(store=store, options=options, parent=version.parent, place=store.place(version.number))
        batch = part_of(source, forgotten, ids, spec) or Task.of_ids(source, ids, spec=spec)
        verdict, reasons = proof.by_certificate(batch)
        if verdict is not None:
            record_in(store, version.number, verdict, record)
            reasons = [reason_of(verdict)]
            if verdict.status == PASS:
                store.prove(version.number)
                proven[version.number] = verdict
                notify(f"version {version.number:04d}: a certificate covers its run, its requests are done")
                continue
        found += [f"version {version.number:04d}, whose requests are unproven: {reason}" for reason in reasons]
    return proven, found


def _to_be_proven(
    source: Source, forgotten: Sequence[str], part: Sequence[str], unproven: bool, options: Options
) -> Task | None:
    """Return the task of samples that are judged alone too; None: only all that were forgotten together are judged.

    If no request is unproven, these are the current version's, where they are enough for a verdict.
    """
    if not unproven and len(part) < max(1, Gates.read(options.gates_file).minimum_samples):
        return None
    return part_of(source, forgotten, part, spec="the unproven requests" if unproven else "the last requests")


def part_of(source: Source, forgotten: Sequence[str], part: Sequence[str], spec: str) -> Task | None:
    """Return the task of a part of the forgotten samples, with the others excluded; None: it is all of them."""
    others = sorted({*forgotten} - {*part})
    return Task.of_ids(source, part, spec=spec, excluded=others) if others else None


def judge_version(
    store: Store,
    verify: Verify | None,
    whole: Task,
    unproven: Task | None,
    place: Path,
    options: Options,
    of_run: tuple[int, Task] | None = None,
    earlier: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on all forgotten samples and on those that no verdict has proven; a PASS needs both.

    Args:
        store: The store; the original is its version 0.
        verify: Function that judges; None: `engine.jobs.verify.verify_job`.
        whole: All samples that were forgotten.
        unproven: Those that no verdict has proven; too few for a verdict get no PASS, unless the method is exact. None:
            they are all.
        place: Folder of the version.
        options: Options of the run.
        of_run: Version that a run unlearned, and its samples, so that a certificate may cover it; None: all is judged
            by outputs.
        earlier: As of `PoolProof`.
    """
    from engine.jobs.verify import verify_job

    if options.pool and not options.references:
        parent, batch = of_run or (None, None)
        proof = PoolProof(store=store, options=options, parent=parent, place=place, earlier=earlier)
        return proof.judge(whole, unproven, batch)
    gates = options.gates_file

    def judged(task: Task) -> Verdict:
        call = verify or verify_job
        return call(task, place, store.place(0), options.references, gates=gates, config=options.config)

    if get_method(options.method).exact:  # the model was never trained on any of them
        unproven = None
    least, too_few = Gates.read(gates).minimum_samples, None
    if unproven is not None and len(unproven.forget) < least:
        reason = (
            f"the {len(unproven.forget)} samples that no verdict has proven, if not forgotten at all, would not be "
            f"noticed among {len(whole.forget)}: with {least} of them unproven lethe request judge decides; for fewer "
            "give --pool POOL --certificate CERTIFICATE in place of references"
        )
        question = "Are there enough samples that no verdict has proven?"
        too_few = undecided("unproven samples", question, f"{least} or more", reason)
    return judge_unproven(judged, whole, unproven, too_few)


def record_in(store: Store, number: int, verdict: Verdict, record: Record | None = None) -> None:
    """Record a verdict in the folder of a version, by default by `engine.jobs.verify.record_verdict`, with its page."""
    from engine.jobs.verify import record_verdict

    (record or record_verdict)(store.place(number), verdict)
    requests = store.requests_of(number)
    facts = {
        "version": number,
        "requests": requests,
        "samples": len(store.ids_of(requests)),
        "data": store.settings["data"],
        "versions": environment(),
    }
    write_proof(
        store.place(number) / PAGE,
        {"verdict": verdict.to_dict()},
        title=f"Proof of forgetting: version {number:04d}",
        facts=facts,
    )


def reason_of(verdict: Verdict) -> str:
    """Return the gates that decided against a PASS, each with its reason."""
    return "; ".join(f"{gate.name}: {gate.reason}" for gate in verdict.gates if gate.name in verdict.decided_by)
