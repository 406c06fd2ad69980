"""The proof of a run without retrained models of its own: by a pool, or by a certificate of the procedure.

A small batch shows nothing by itself: it passes if a certificate covers it and the run is like those that the
certificate was made from. Otherwise the pool judges all samples that no verdict has proven, once they are enough, and
all that the lineage forgot. Fewer would be hidden among those: they get no PASS.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from engine.core.proof_sizes import retained_samples
from engine.data.samples import evenly_spaced
from engine.evaluate.gates import FAIL, PASS, Gate, Gates, Verdict, decide, undecided
from engine.evaluate.intervals import Interval
from engine.evaluate.verdict import Evidence, ModelOutputs, accuracy_gates
from engine.jobs.opening import open_model
from engine.jobs.task import Task
from engine.jobs.verify import changed_share
from engine.pool.answers import Answers
from engine.pool.certificate import Certificate, attempts_of, covered_run, open_certificate, score_on_test
from engine.pool.references import PoolReferences, emptied_classes, judge_task, with_cost
from engine.pool.simulation import figures_of, kind_of
from engine.pool.store import Pool
from engine.requests.run_options import Options
from engine.requests.store import Store

_WHAT = {
    "weights": "log10 of the relative change of the weights",
    "score": "mean log-odds less those of the pool, relative to test samples",
}


def judge_unproven(
    judged: Callable[[Task], Verdict], whole: Task, unproven: Task | None, too_few: Gate | None
) -> Verdict:
    """Return the verdict on all samples that were forgotten and on those that no verdict has proven.

    A FAIL of either counts, and a PASS needs both: among many samples those few that were not forgotten would not be
    noticed.

    Args:
        judged: Judges a task.
        whole: All samples that were forgotten.
        unproven: Those that no verdict has proven; None: they are all.
        too_few: The undecided gate of too few unproven samples; None: they are enough.
    """
    if too_few is not None:
        found = judged(whole)
        return dataclasses.replace(found, gates=[*found.gates, too_few])
    if unproven is None:
        return judged(whole)
    alone = judged(unproven)
    if alone.status == FAIL:
        return alone
    found = judged(whole)
    return found if found.status == FAIL or alone.status == PASS else alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolProof:
    """Judges a version of a store by a pool.

    Attributes:
        store, options: The store, and the options of the run.
        parent: Version that was unlearned; None: the version is not that of a run.
        place: Folder of the version.
        earlier: Why no certificate proves the runs of earlier versions whose requests are unproven.
    """

    store: Store
    options: Options
    parent: int | None
    place: Path
    earlier: Sequence[str] = ()

    def judge(self, whole: Task, unproven: Task | None, batch: Task | None) -> Verdict:
        """Return the verdict.

        Args:
            whole: All samples that were forgotten.
            unproven: Those that no verdict has proven; None: they are all.
            batch: Samples of the run; None: the version is not that of a run.

        Raises:
            UserError: The pool or a certificate is not valid.
        """
        began, gates, part, reasons = time.perf_counter(), self.gates, unproven or whole, list(self.earlier)
        references, certificates, model = *self._opened(whole), open_model(self.place)
        pool = references.pool
        if batch is not None and len(batch.forget) < gates.minimum_samples:
            by_certificate, reasons = self._covered(certificates, references, batch, model, began)
            if by_certificate is not None:
                return by_certificate

        def judged(task: Task) -> Verdict:
            against = references
            if task is whole and unproven is not None and self._base:  # version 0 was trained on all of them
                original = open_model(self.store.place(0))
                against = PoolReferences(pool, whole.source, original, references.answers)
            return judge_task(against, task, model, gates)

        few = len(part.forget) < gates.minimum_samples
        found = judge_unproven(judged, whole, unproven, self._uncovered(batch or part, reasons) if few else None)
        return with_cost(found, references, "pool", pool.folder, began)

    def by_certificate(self, batch: Task) -> tuple[Verdict | None, list[str]]:
        """Return the verdict on the run by a certificate that covers it, or None and why each does not."""
        began = time.perf_counter()
        references, certificates = self._opened(batch)
        return self._covered(certificates, references, batch, open_model(self.place), began)

    def _covered(
        self,
        certificates: Sequence[Certificate],
        references: PoolReferences,
        batch: Task,
        model: nn.Module,
        began: float,
    ) -> tuple[Verdict | None, list[str]]:
        chosen, reasons = self._covering(certificates, references, batch)
        if chosen is None:
            return None, reasons
        found = self._by_certificate(chosen, references, batch, model)
        return with_cost(found, references, "certificate", chosen.path, began), []

    @property
    def gates(self) -> Gates:
        return Gates.read(self.options.gates_file)

    def _opened(self, task: Task) -> tuple[PoolReferences, list[Certificate]]:
        """Return the references of the pool for the model at the root of the lineage, and the certificates."""
        pool = Pool.open(Path(self.options.pool or ""))
        key = Path(self.options.public_key) if self.options.public_key else None
        certificates = [open_certificate(Path(each), pool, key) for each in self.options.certificates]
        original = open_model(self.store.place(self._base))
        return PoolReferences(pool, task.source, original, Answers(self.options.config)), certificates

    def _covering(
        self, certificates: Sequence[Certificate], references: PoolReferences, part: Task
    ) -> tuple[Certificate | None, list[str]]:
        """Return the first certificate that covers the run, or why each does not."""
        emptied = emptied_classes(part)
        if emptied is not None:
            return None, [emptied.reason]
        forgotten = {*self.store.forgotten(), *part.forget.ids}  # of a run that is over, its own are among them
        drift = (len(forgotten) - len(self.store.forgotten(self._base))) / self.store.settings["train"]
        run = covered_run(references, self.options.method, self.options.config, part.forget.labels, drift)
        now, reasons = datetime.datetime.now(datetime.timezone.utc), []
        for each in certificates:
            reason = each.gap(run, now)
            if not reason:
                return each, []
            reasons.append(f"{each.path}: {reason}")
        return None, reasons

    @property
    def _base(self) -> int:
        """Version of the full retrain that the run descends from; without a run, version 0."""
        return self.store.base_of(self.parent or 0)

    def warning(self, batch: Task, unproven: int) -> str:
        """Return why no certificate covers a run that has not begun; empty if one does, or none is needed.

        Args:
            batch: Samples of the run.
            unproven: Number of samples that no verdict will have proven before that on the run, its own included.
        """
        if unproven >= self.gates.minimum_samples:
            return ""
        references, certificates = self._opened(batch)
        chosen, reasons = self._covering(certificates, references, batch)
        return "" if chosen else self._uncovered(batch, reasons).reason

    def _uncovered(self, part: Task, reasons: Sequence[str]) -> Gate:
        words = ["lethe", "certify", "--checkpoint", str(self.store.place(self._base).resolve())]
        words += ["--data", part.source.spec, "--pool", str(self.options.pool), "--method", self.options.method]
        for key, value in self.options.config.items():
            if key != "seed":  # every simulated request has its own
                words += ["--set", f"{key}={json.dumps(value) if isinstance(value, dict) else value}"]
        words += ["--kind", kind_of(part.forget.labels), "--size", str(len(part.forget)), "--out", "CERTIFICATE"]
        judge_again = f"lethe request judge --store {self.store.folder} --pool {self.options.pool}"
        remedy = f"To get one: {shlex.join(words)}, then {judge_again} --certificate CERTIFICATE"
        if self.earlier:
            remedy = f"From {self.gates.minimum_samples} unproven samples on {judge_again} decides without one"
        return undecided(
            "certificate",
            "Does a certificate cover the run?",
            "one that is valid",
            f"{'; '.join(reasons) or 'no certificate was given'}. {remedy}",
        )

    def _by_certificate(
        self, certificate: Certificate, references: PoolReferences, part: Task, model: nn.Module
    ) -> Verdict:
        assert self.parent is not None
        answers, before = references.answers, open_model(self.store.place(self.parent))
        original, gates = references.original, self.gates
        retain = answers.readable(evenly_spaced(part.retain, retained_samples(references.retrain)), original)
        forget = answers(model, part.forget)
        evidence = Evidence(
            model=ModelOutputs(
                {"forget": forget, "test": answers(model, references.test), "retain": answers(model, retain)}, {}
            ),
            original=ModelOutputs({"test": references.original_controls(), "retain": answers(original, retain)}, {}),
            references=[],
            repeated=forget,
            changed=changed_share(model, before),
        )
        figures = figures_of(model, before, original, forget, references.forget(part.forget, moved=False))
        controls = [ModelOutputs({"test": each["plain"]}, {}) for each in references.controls()]
        figures["score"] -= score_on_test(evidence.model, controls)
        low, high = certificate.sizes
        counted = attempts_of(certificate.content)
        found = [
            Gate(
                "certificate",
                "Does a certificate cover the run?",
                PASS,
                None,
                "one that is valid",
                f"{certificate.path}: {low} to {high} samples, until {certificate.content['expires'][:10]}{counted}",
            )
        ]
        for name, (value, allowed) in certificate.like(figures, len(part.forget)).items():
            found.append(
                decide(
                    f"like: {name}",
                    "Is the run like those of the certificate?",
                    Interval(value, value, value),
                    low=allowed.low,
                    high=allowed.high,
                    limit=f"{_WHAT[name]} from {allowed.low:.3f} to {allowed.high:.3f}",
                    shown=f"{value:.3f}",
                )
            )
        found += accuracy_gates(evidence, gates)
        return Verdict(found, 0, {"forget": len(part.forget), "test": len(references.test), "retain": len(retain)})
