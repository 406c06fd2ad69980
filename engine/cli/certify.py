"""`lethe certify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.opening import takes_models
from engine.cli.options import (
    Checkpoint,
    Data,
    Json,
    MethodName,
    OnBadImage,
    Settings,
    Sign,
    WeightFileOptions,
    run_options,
    takes_data,
    takes_groups,
    write_json_file,
)
from engine.cli.verify import EXIT
from engine.config import DEFAULT_METHOD
from engine.core.proof_sizes import SIMULATED_REQUESTS, SIMULATED_SAMPLES, simulated_requests
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.jobs.opening import Opening


@takes_groups
@takes_data
@takes_models()
def certify(
    checkpoint: Checkpoint,
    data: Data,
    pool: Annotated[Path, typer.Option(help="Folder of the pool (`lethe pool train`).", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the certificate.", show_default=False)],
    size: Annotated[int, typer.Option(help="Samples of a request; covered: from half to twice as many.")],
    method: MethodName = DEFAULT_METHOD,
    kind: Annotated[
        str,
        typer.Option(help="Requests: random; class (each of one class); near-duplicates (the neighbour is retained)."),
    ] = "random",
    requests: Annotated[
        int | None,
        typer.Option(
            help="Simulated requests.",
            show_default=f"for {SIMULATED_SAMPLES} samples, and at least {SIMULATED_REQUESTS}",
        ),
    ] = None,
    days: Annotated[float, typer.Option(help="Days until the certificate expires.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of the runs.")] = 0,
    settings: Settings = None,
    *,
    files: WeightFileOptions,
    sign: Sign = None,
    on_bad_image: OnBadImage = None,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Certify an unlearning procedure by simulated requests on the user's own model. Exit 0: granted; 1, 3: not.

    A single small request shows nothing by itself. Here many of its size are unlearned and judged together by the pool;
    `lethe request run` then ends done for a request that the certificate covers. Finished requests are kept: repeat the
    command after a stop.
    """
    import dataclasses

    from engine.audit.run_record import RecordOptions
    from engine.cli.console import console, progress_bars
    from engine.cli.verdict_table import print_verdict
    from engine.config import require, split_options
    from engine.core.method import refuse_unfit
    from engine.data import open_source
    from engine.evaluate.gates import PASS
    from engine.jobs.opening import open_model
    from engine.methods import get_method
    from engine.pool.answers import Answers
    from engine.pool.attempts import begin_attempt, competing, end_attempt
    from engine.pool.certificate import MOST_DAYS, bound, line_of, write_certificate
    from engine.pool.certificate import certify as grant
    from engine.pool.references import PoolReferences
    from engine.pool.simulation import KINDS, Procedure, refuse_too_many, simulate, takes_folder
    from engine.pool.store import Pool

    if kind not in KINDS:
        raise UserError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    options = run_options(settings, on_bad_image)
    if "seed" in options:
        raise UserError("certify: --set seed: every simulated request has a seed of its own; give the first by --seed")
    require(0 < days <= MOST_DAYS, "days", days, f"above 0, and at most {MOST_DAYS:g}")
    require(seed >= 0, "seed", seed, "0 or more")
    require(size >= 1, "size", size, "1 or more")
    require(
        requests is None or requests >= SIMULATED_REQUESTS,
        "requests",
        requests,
        f"at least {SIMULATED_REQUESTS}: the range of a further run is estimated from them",
    )
    split_options(options, get_method(method).Config)
    RecordOptions(key=sign).check()
    (given,) = files.sources([checkpoint])
    checkpoint = given or checkpoint
    original = open_model(checkpoint)
    refuse_unfit(get_method(method), original)
    source = opening.in_order_of(open_source(data), original)
    procedure = Procedure(
        method=method,
        config=options,
        kind=kind,
        size=size,
        count=requests if requests is not None else simulated_requests(size),
        seed=seed,
    )
    refuse_too_many(source.train, procedure.size, procedure.count)
    opened = Pool.open(pool)
    opened.check_recipe(checkpoint)
    references = PoolReferences(opened, source, original, Answers(options))
    console.print(
        f"{procedure.count} simulated requests of {size} samples ({kind}) of {source.spec}, each forgotten by {method}",
        soft_wrap=True,
    )
    binding = bound(references, method, options)
    facts = {**binding, "requests": dataclasses.asdict(procedure)}
    with takes_folder(out, facts), progress_bars() as progress:
        attempt = begin_attempt(opened, procedure, binding)
        found, evidence = simulate(references, procedure, out, progress)
    content, verdict = grant(references, procedure, found, evidence, days, competing(opened, attempt))
    end_attempt(opened, attempt, content["reason"] or "granted")
    path = write_certificate(out, content, opened, sign)
    print_verdict(verdict)
    console.print(line_of(content), soft_wrap=True)
    console.print(
        f"{'certificate' if content['granted'] else 'result, which covers no request,'} in {path}", soft_wrap=True
    )
    write_json_file(json_file, content)
    powerless = verdict.status == PASS and not content["granted"]
    raise typer.Exit(EXIT["INSUFFICIENT EVIDENCE" if powerless else verdict.status])
