"""Evidence behind a verdict: attacks, agreement, relearning, features, attention, for `engine.report.proof.page`.

A verdict needs few numbers. Readers who doubt it, or have to explain it, need more. The evidence decides nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import RunStopped, UserError
from engine.evaluate.agreement import agreement_report
from engine.evaluate.attention import attention_report
from engine.evaluate.gates import Verdict
from engine.evaluate.membership import attack_report
from engine.evaluate.options import MeasureOptions
from engine.evaluate.relearning import steps_of
from engine.evaluate.relearning_report import RelearningAttack, RelearningSets, relearning_report
from engine.evaluate.representation import compare_features
from engine.evaluate.verdict import Evidence
from engine.jobs.task import Task
from engine.jobs.verify import Verifier, prepare


def prove_job(
    task: Task,
    checkpoint: str | Path,
    original: str | Path,
    references: Sequence[str | Path] = (),
    *,
    gates: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Verdict, dict[str, Any]]:
    """Judge a checkpoint as `engine.jobs.verify.verify_job` does, and gather the proof.

    Arguments and errors are those of `verify_job`.

    Returns:
        (verdict, proof as of `gather_proof`).
    """
    model, verifier = prepare(task, checkpoint, original, references, gates=gates, config=config)
    evidence = verifier.evidence(model)
    verdict = verifier.judge(evidence)
    return verdict, gather_proof(verifier, evidence, model, verdict)


def gather_proof(verifier: Verifier, evidence: Evidence, model: nn.Module, verdict: Verdict) -> dict[str, Any]:
    """Measure the evidence behind a verdict, in the form that `engine.report.proof.page` shows.

    All models are held in memory at once.

    Args:
        verifier: The verifier that the verdict came from.
        evidence: The evidence that the verdict came from.
        model: The model that was judged; it is not changed.
        verdict: The verdict.

    Returns:
        JSON-ready dict: verdict, gates, a value for each part, and `seconds`, the wall-clock time of each part. A part
        that cannot be measured (too few samples, a model whose attention cannot be read) is missing; `unmeasured` holds
        the reason by the name of the part.
    """
    references = {f"retrained {number}": each for number, each in enumerate(verifier.load_references(), 1)}
    models = {"original": verifier.before, "model": model, **references}
    task, evaluator, gates = verifier.task, verifier.evaluator, verifier.gates
    forget, test = task.forget, evaluator.sets["test"]
    options = MeasureOptions(
        device=str(evaluator.device),
        precision=evaluator.precision,
        seed=verifier.seed,
        loading=verifier.loading,
    )
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attacks": lambda: attack_report(
            evidence.model.predictions,
            evidence.original.predictions,
            [each.predictions for each in evidence.references],
        ),
        "agreement": lambda: agreement_report(
            evidence.model.predictions,
            evidence.original.predictions,
            [each.predictions for each in evidence.references],
        ),
        "relearning": lambda: relearning_report(
            models,
            RelearningSets(forget=forget, test=test, retain=task.retain, unrelated=task.source.validation),
            references=list(references),
            attack=RelearningAttack(
                share=gates.relearning_share,
                steps=steps_of(round(gates.relearning_share * len(forget)), gates.relearning_epochs),
            ),
            options=options,
        ),
        "representation": lambda: compare_features(
            models, evaluator.sets, references=list(references), **options.keywords()
        ),
        "attention": lambda: attention_report(
            verifier.before, {"model": model}, references, forget, test, options=options
        ),
    }
    proof: dict[str, Any] = {
        "verdict": verdict.to_dict(),
        "gates": dataclasses.asdict(gates),
        "seconds": {},
        "unmeasured": {},
    }
    for name, gather in parts.items():
        began = time.perf_counter()
        try:
            proof[name] = gather()
        except (UserError, RunStopped) as error:
            proof["unmeasured"][name] = str(error)
        proof["seconds"][name] = time.perf_counter() - began
    return proof
