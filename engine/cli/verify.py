"""`lethe verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import named_references, takes_models
from engine.cli.options import (
    Checkpoint,
    Data,
    Forget,
    OnBadImage,
    PoolFolder,
    Reference,
    Settings,
    Sign,
    WeightFileOptions,
    run_options,
    takes_data,
    takes_groups,
    write_json_file,
)
from engine.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.jobs.opening import Opening
    from engine.jobs.task import Task

# For scripts and queues; 2 is wrong use, as in every command.
EXIT = {
    "PASS": ExitCode.GOOD,
    "FAIL": ExitCode.FAILED,
    "INSUFFICIENT EVIDENCE": ExitCode.INSUFFICIENT_EVIDENCE,
}


@takes_groups
@takes_data
@takes_models()
def verify(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    original: Annotated[str, typer.Option(help="The model before unlearning.", show_default=False)],
    reference: Reference = None,
    pool: PoolFolder = None,
    *,
    files: WeightFileOptions,
    gates: Annotated[
        Path | None,
        typer.Option(help="YAML file of gates that are tighter than the defaults.", show_default=False),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write verdict.json into the checkpoint's run folder, and its record.")
    ] = False,
    sign: Sign = None,
    settings: Settings = None,
    on_bad_image: OnBadImage = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the verdict to this file too; with --html its evidence as well.", show_default=False
        ),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write a page of the verdict and its evidence to this file; takes longer.",
            show_default=False,
        ),
    ] = None,
    opening: Opening,
) -> None:
    """Judge a checkpoint: PASS (exit 0), FAIL (1) or INSUFFICIENT EVIDENCE (3), with the reason of each gate."""
    import dataclasses

    from engine.audit.run_record import RecordOptions
    from engine.cli.console import console
    from engine.cli.verdict_table import print_verdict
    from engine.evaluate.gates import Gates
    from engine.jobs.evidence import prove_job
    from engine.jobs.task import Task
    from engine.jobs.verify import check_recorded, record_verdict, verify_job
    from engine.models.checkpoint_source import CheckpointSource
    from engine.pool.references import judge_by_pool

    run_folder = CheckpointSource.parse(checkpoint).folder
    if record:
        check_recorded(run_folder)
        RecordOptions(key=sign).check()
    elif sign:
        raise UserError(f"--sign {sign}: --sign signs the record; give --record too")
    if pool is not None and reference:
        raise UserError("verify: give --pool or --reference, not both")
    _make_room({"--json": json_file, "--html": html_file})
    sources = files.sources([checkpoint, original, *(reference or [])])
    checkpoint, original, *references = [each for each in sources if each is not None]
    task = Task.open(data, forget)
    options: dict[str, Any] = {"gates": gates, "config": run_options(settings, on_bad_image)}
    others = {"--checkpoint": checkpoint, **named_references(references)}
    task, _ = opening.prepare(task, original, others, options["config"])
    if pool is not None:
        verdict = judge_by_pool(pool, task, checkpoint, original, **options)
        proof = {"verdict": verdict.to_dict(), "gates": dataclasses.asdict(Gates.read(gates))}
    elif html_file:
        verdict, proof = prove_job(task, checkpoint, original, references, **options)
    else:
        verdict, proof = verify_job(task, checkpoint, original, references, **options), {}
    print_verdict(verdict)
    evidence = {key: value for key, value in proof.items() if key != "verdict"}
    write_json_file(json_file, {**verdict.to_dict(), **({"evidence": evidence} if evidence and html_file else {})})
    if html_file:
        facts = {
            "checkpoint": checkpoint,
            "original": original,
            "references": references,
            **({"pool": str(pool)} if pool else {}),
            "data": data,
            "forget": forget,
        }
        _write_html(html_file, proof, facts)
        console.print(f"evidence in {html_file}")
    if record:
        record_verdict(run_folder, verdict, sign)
        console.print(f"verdict.json and record.json in {run_folder}")
    raise typer.Exit(EXIT[verdict.status])


def judge_run(
    folder: Path,
    task: Task,
    original: str,
    references: Sequence[str],
    pool: Path | None,
    *,
    config: Mapping[str, Any],
    sign: Path | None,
) -> None:
    """Print and record the verdict on a run that has just ended, and exit with its code.

    Args:
        folder: Its run folder.
        task: Its data and request.
        original: The model before unlearning.
        references, pool: Reference models, or a pool; without either the verdict is by held-out data alone.
        config: Options of the run.
        sign: Key that signs the record; None: no signature.
    """
    from engine.cli.console import console
    from engine.cli.verdict_table import print_verdict
    from engine.jobs.verify import record_verdict, verify_job
    from engine.pool.references import judge_by_pool

    console.print("judging the result", highlight=False)
    if pool is not None:
        verdict = judge_by_pool(pool, task, folder, original, config=config)
    else:
        verdict = verify_job(task, folder, original, references, config=config)
    print_verdict(verdict)
    record_verdict(folder, verdict, sign)
    console.print(f"verdict.json and record.json in {folder}")
    raise typer.Exit(EXIT[verdict.status])


def _make_room(files: dict[str, Path | None]) -> None:
    """Create the folders of output files, and raise UserError for a wrong name before the work."""
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; give the name of a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None


def _write_html(path: Path, proof: dict[str, Any], facts: dict[str, Any]) -> None:
    from engine.report.proof.page import write_proof
    from engine.runtime.environment import environment

    try:
        write_proof(path, proof, title="Proof of forgetting", facts={**facts, "versions": environment()})
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from None
