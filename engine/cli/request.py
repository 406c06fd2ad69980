"""`lethe request`: deletion requests and the lineage of models that they make."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import takes_models
from engine.cli.options import (
    Checkpoint,
    Data,
    Json,
    PoolFolder,
    Reference,
    Settings,
    Sign,
    WeightFileOptions,
    takes_data,
    takes_groups,
    write_ids,
    write_json_file,
)
from engine.cli.verify import EXIT
from engine.config import DEFAULT_METHOD
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.jobs.opening import Opening
    from engine.requests.verdicts import Record

request_app = typer.Typer(
    help="Deletion requests: kept with their deadlines, run as batches, each run a new version of the model that is "
    "accepted only if its verdict does not fail.",
    no_args_is_help=True,
)

StoreFolder = Annotated[
    Path,
    typer.Option(
        "--store",
        help="Folder of the store: requests.sqlite and versions/0000, 0001, ... It holds the ids of the requests in "
        "plain text: guard it as the training data.",
        show_default=False,
    ),
]
GatesFile = Annotated[
    Path | None,
    typer.Option("--gates", help="YAML file of verdict gates that are tighter than the defaults.", show_default=False),
]
Certificates = Annotated[
    list[Path] | None,
    typer.Option(
        "--certificate",
        help="A certificate of the procedure (`lethe certify`), for small requests; repeat for more.",
        show_default=False,
    ),
]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        help="PEM file of the Ed25519 public key of whoever must have signed each certificate.",
        show_default=False,
    ),
]
NoReference = Annotated[
    bool, typer.Option("--no-reference", help="Judge without the references that were given to init.")
]
MaxShare = Annotated[
    float | None,
    typer.Option(
        help="Share of the training samples that may be forgotten since the last full retrain before `status` warns.",
        show_default=False,
    ),
]


@request_app.command("init")
@takes_groups
@takes_data
@takes_models()
def init(
    store: StoreFolder,
    checkpoint: Checkpoint,
    data: Data,
    method: Annotated[
        str, typer.Option(help="Default method of the runs; `lethe methods` lists them.")
    ] = DEFAULT_METHOD,
    settings: Settings = None,
    gates: GatesFile = None,
    reference: Reference = None,
    *,
    files: WeightFileOptions,
    max_share: MaxShare = None,
    pool: PoolFolder = None,
    certificate: Certificates = None,
    public_key: PublicKey = None,
    opening: Opening,
) -> None:
    """Create a store. Version 0 is a copy of the checkpoint, so that the lineage stays complete if that is deleted."""
    from engine.cli.console import console
    from engine.config import parse_assignments
    from engine.requests.intake import MAX_SHARE, init_store

    sources = files.sources([checkpoint, *(reference or [])])
    checkpoint, *references = [each for each in sources if each is not None]
    init_store(
        store,
        checkpoint,
        data,
        method=method,
        config=parse_assignments(settings or []),
        references=references,
        gates=gates,
        max_share=MAX_SHARE if max_share is None else max_share,
        pool=pool,
        certificates=certificate or [],
        public_key=public_key,
    )
    console.print(f"store in {store}; version 0000 is a copy of {checkpoint}", soft_wrap=True)


@request_app.command("add")
def add(
    store: StoreFolder,
    ids: Annotated[
        Path | None,
        typer.Option(help="File of sample ids: text, CSV with an `id` column, JSON lines.", show_default=False),
    ] = None,
    sample: Annotated[
        list[str] | None, typer.Option("--id", help="A sample id; repeat for more.", show_default=False)
    ] = None,
    received: Annotated[
        str | None, typer.Option(help="When the request came, ISO 8601, UTC.", show_default="now")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="ISO 8601, UTC; of a date alone, the end of that day.", show_default=False)
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Deadline in days from receipt, instead of --deadline.", show_default="30")
    ] = None,
    source: Annotated[str, typer.Option(help="Sender of the request, or where it is filed.", show_default=False)] = "",
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out ids that another request names, instead of refusing.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Add a request. Ids are checked against the data now; an id that it does not hold adds nothing."""
    from engine.cli.console import console
    from engine.requests.intake import add_request
    from engine.requests.status import describe_request
    from engine.requests.times import RequestTimes, utc_now

    request, left_out = add_request(
        store,
        file=ids,
        ids=sample or [],
        times=RequestTimes(received=received, deadline=deadline, days=days),
        source=source,
        skip_known=skip_known,
    )
    notes = "".join(
        f"; {count} {what}"
        for what, count in (
            ("ids named more than once, merged", left_out["duplicates"]),
            ("ids of other requests, left out", left_out["skipped"]),
        )
        if count
    )
    if request is None:
        console.print(f"nothing was added{notes}", soft_wrap=True)
    else:
        console.print(
            f"request {request.number}: {request.count} samples, deadline {request.deadline}{notes}", soft_wrap=True
        )
    added = None if request is None else describe_request(request, utc_now())
    write_json_file(json_file, {"added": added, **left_out})


@request_app.command("list")
def list_requests(
    store: StoreFolder,
    everything: Annotated[bool, typer.Option("--all/--open", help="List requests that are done, too.")] = False,
    ids: Annotated[
        Path | None,
        typer.Option(help="Write the ids of the listed requests to this file, for --forget.", show_default=False),
    ] = None,
    json_file: Json = None,
) -> None:
    """List the open requests, the nearest deadline first, or all."""
    from engine.cli.console import console
    from engine.cli.request_tables import requests_table
    from engine.requests.status import describe_request
    from engine.requests.store import Store
    from engine.requests.times import utc_now

    with Store.open(store) as opened:
        chosen = [each for each in opened.requests() if everything or each.state == "open"]
        listed = opened.ids_of([each.number for each in chosen])
    rows = [describe_request(each, utc_now()) for each in chosen]
    if rows:
        console.print(requests_table(rows))
    else:
        console.print("no requests" if everything else "no open requests")
    if ids is not None:
        write_ids(ids, listed)
        console.print(f"{len(listed)} ids in {ids}", soft_wrap=True)
    write_json_file(json_file, {"requests": rows})


@request_app.command("status")
def show_status(store: StoreFolder, max_share: MaxShare = None, json_file: Json = None) -> None:
    """Show open requests with the days that are left, the versions, and the drift from the last full retrain.

    `lethe request list --all` has the requests that are done, with the time.
    """
    from engine.cli.console import console
    from engine.cli.request_tables import requests_table, versions_table
    from engine.requests.status import status

    found = status(store, max_share=max_share)
    counts = found["requests"]
    console.print(
        f"{found['data']}: {found['train']} training samples, {found['forgotten']} forgotten; current version "
        f"{found['current']['version']:04d} in {found['current']['folder']}",
        soft_wrap=True,
    )
    console.print(f"requests: {counts['open']} open, {counts['unproven']} unproven, {counts['done']} done")
    if found["pending"]:
        console.print(requests_table(found["pending"]))
    console.print(versions_table(found["versions"], found["current"]["version"]))
    console.print(
        "[dim]forgotten: share of the training samples, since the last full retrain (root or rebase). test: accuracy "
        "in percent. change: to that retrain, in points. KL: of the test answers, that retrain against this version, "
        "nats; 0 = the same answers.[/dim]",
        soft_wrap=True,
    )
    if found["unfinished"]:
        console.print(
            f"[yellow]the run of version {found['unfinished']['version']:04d}, begun {found['unfinished']['started']}, "
            "has not ended: lethe request run continues it[/]",
            soft_wrap=True,
        )
    _warn(found["warnings"])
    write_json_file(json_file, found)


@request_app.command("run")
def run(
    store: StoreFolder,
    limit: Annotated[
        int | None, typer.Option(help="Take at most so many requests, the nearest deadlines first.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Method in place of the store's default.", show_default=False)
    ] = None,
    settings: Settings = None,
    reference: Reference = None,
    no_reference: NoReference = False,
    gates: GatesFile = None,
    pool: PoolFolder = None,
    certificate: Certificates = None,
    public_key: PublicKey = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Treat INSUFFICIENT EVIDENCE as a FAIL.")
    ] = False,
    sign: Sign = None,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Drop the run that has not ended, and do nothing else.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Unlearn the open requests as one batch and judge the new version. Exit 0: done; 1: FAIL; 3: unproven.

    Samples that were forgotten earlier are never trained on again, and the verdict is on all of them. After a FAIL the
    version before stays the current one and the requests stay open; INSUFFICIENT EVIDENCE leaves them unproven until
    a later verdict passes. A run that was killed is resumed.
    """
    from engine.cli.console import console, print_metrics, progress_bars
    from engine.config import parse_assignments, to_dict
    from engine.requests.run_options import Overrides
    from engine.requests.runner import abandon_run, run_requests
    from engine.requests.status import status

    if abandon:
        abandoned = abandon_run(store)
        console.print(f"the run of version {abandoned.number:04d} was dropped; its requests stay open")
        return
    references = _references(reference, no_reference)
    with progress_bars() as progress:
        finished = run_requests(
            store,
            limit=limit,
            given=Overrides(
                method=method,
                config=parse_assignments(settings or []),
                references=references,
                gates=gates,
                require_proof=require_proof,
                pool=pool,
                certificates=certificate,
                public_key=public_key,
            ),
            record=_signed(sign),
            progress=progress,
            notify=lambda line: console.print(line, soft_wrap=True),
        )
    warnings = status(store)["warnings"]
    if finished is None:
        console.print("no open requests: nothing to do")
        write_json_file(json_file, {"run": None, "warnings": warnings})
        return
    print_metrics(finished.metrics, name=f"version {finished.version:04d}", judged=finished.verdict is not None)
    _print_status(finished.status, finished.reason)
    _print_proof(finished.verdict, store, finished.version)
    listed = ", ".join(map(str, finished.requests))
    what = {
        "done": f"version {finished.version:04d} is the current one; requests {listed} are done",
        "unproven": f"version {finished.version:04d} is the current one; requests {listed} are unproven, not done; "
        "lethe request judge --pool POOL --certificate CERTIFICATE judges it again, without another run; from 100 "
        "unproven samples on, so do --pool POOL or --reference RETRAINED",
        "open": f"version {finished.version:04d} is rejected; version {finished.parent:04d} stays the current one and "
        f"requests {listed} stay open: run again with another --method or --set",
    }[finished.state]
    console.print(what, soft_wrap=True)
    _warn(warnings)
    write_json_file(json_file, {"run": to_dict(finished), "warnings": warnings})
    raise typer.Exit(EXIT["FAIL" if finished.state == "open" else finished.status])


@request_app.command("judge")
def judge(
    store: StoreFolder,
    settings: Settings = None,
    reference: Reference = None,
    no_reference: NoReference = False,
    gates: GatesFile = None,
    pool: PoolFolder = None,
    certificate: Certificates = None,
    public_key: PublicKey = None,
    sign: Sign = None,
    json_file: Json = None,
) -> None:
    """Judge the current version again, with retrained models, a pool or a certificate. Exit 0: done; 1: FAIL; 3: not.

    PASS makes all unproven requests done, without another run (a certificate those of the runs that it covers). With
    --pool all that was forgotten is judged together, even if nothing is unproven. After a FAIL the version before is
    the current one and the requests of this one are open again.
    """
    from engine.cli.console import console
    from engine.config import parse_assignments, to_dict
    from engine.requests.run_options import Overrides
    from engine.requests.status import status
    from engine.requests.verdicts import judge_again

    found = judge_again(
        store,
        given=Overrides(
            config=parse_assignments(settings or []),
            references=_references(reference, no_reference),
            gates=gates,
            pool=pool,
            certificates=certificate,
            public_key=public_key,
        ),
        record=_signed(sign),
        notify=lambda line: console.print(line, soft_wrap=True),
    )
    warnings = status(store)["warnings"]
    write_json_file(json_file, {"judged": None if found is None else to_dict(found), "warnings": warnings})
    if found is None:
        console.print("no unproven requests: nothing to judge")
        return
    _print_status(found.status, found.reason)
    _print_proof(found.verdict, store, found.version)
    if found.status == "FAIL":
        console.print(f"version {found.version:04d} is rejected; the version before is the current one again")
    for state in ("done", "unproven", "open"):
        listed = ", ".join(str(number) for number, each in found.requests.items() if each == state)
        if listed:
            console.print(f"requests {listed} are {state}", soft_wrap=True)
    _warn(warnings)
    raise typer.Exit(EXIT[found.status])


@request_app.command("rebase")
@takes_groups
def rebase(
    store: StoreFolder,
    checkpoint: Checkpoint,
    *,
    files: WeightFileOptions,
) -> None:
    """Make a full retrain without the forgotten samples the current version, from which drift is counted anew."""
    from engine.cli.console import console
    from engine.requests.rebase import rebase as add_rebase

    (place,) = files.sources([checkpoint])
    number, proven = add_rebase(store, place or checkpoint)
    shown = (
        "by its run folder it was trained on exactly the samples that are left"
        if proven
        else "that none of the forgotten samples was in its training is taken as stated"
    )
    console.print(f"version {number:04d} is a copy of {checkpoint}; {shown}", soft_wrap=True)


def _references(given: list[str] | None, none: bool) -> list[str] | None:
    """Return the references in place of the store's; None: the store's."""
    if given and none:
        raise UserError("give --reference or --no-reference, not both")
    return [] if none else given


def _signed(key: Path | None) -> Record | None:
    """Return how a verdict is recorded if the record is to be signed; a key that cannot sign is an error."""
    from engine.audit.run_record import RecordOptions
    from engine.jobs.verify import record_verdict

    RecordOptions(key=key).check()
    return None if key is None else functools.partial(record_verdict, key=key)


def _print_status(status: str, reason: str) -> None:
    from rich.markup import escape

    from engine.cli.console import coloured, console

    console.print(f"{coloured(status)}{escape(f': {reason}') if reason else ''}", soft_wrap=True)


def _print_proof(verdict: dict[str, Any] | None, store: Path, version: int) -> None:
    from engine.cli.console import console
    from engine.evaluate.gates import Proof
    from engine.requests.store import place_of
    from engine.requests.verdicts import PAGE

    if verdict is None:
        return
    proof = verdict.get("proof")
    console.print(Proof(**proof).line() if proof else f"proof: {verdict['kind']}", soft_wrap=True, highlight=False)
    console.print(f"[dim]{verdict['worth']}[/dim]", soft_wrap=True, highlight=False)
    console.print(f"the verdict as a page: {place_of(store, version) / PAGE}", soft_wrap=True, highlight=False)


def _warn(warnings: list[str]) -> None:
    from rich.markup import escape

    from engine.cli.console import console

    for line in warnings:
        console.print(f"[bold red]warning:[/] {escape(line)}", soft_wrap=True)
