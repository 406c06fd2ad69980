"""The `lethe` command; `engine.errors.EXIT_CODES` lists its exit codes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from engine._version import __version__
from engine.cli import exits
from engine.cli.attack import attack
from engine.cli.certify import certify
from engine.cli.forget_set import forget_set
from engine.cli.import_checkpoint import import_checkpoint
from engine.cli.opening import named_references, takes_models
from engine.cli.options import (
    RANK,
    Checkpoint,
    ConfigFile,
    Data,
    Forget,
    Json,
    MethodName,
    ModelArgs,
    OnBadImage,
    Out,
    Reference,
    RunFolderOptions,
    Settings,
    VerdictOptions,
    WeightFileOptions,
    Weights,
    check_free,
    join_ranks,
    run_options,
    takes_data,
    takes_groups,
    write_json_file,
)
from engine.cli.plan import plan
from engine.cli.pool import pool_app
from engine.cli.request import request_app
from engine.cli.train_start import Start, Training, set_own
from engine.cli.tune import tune
from engine.cli.verify import judge_run, verify
from engine.cli.verify_record import verify_record
from engine.config import DEFAULT_METHOD
from engine.errors import EXIT_CODES, BadResult, UserError

if TYPE_CHECKING:
    from engine.jobs.opening import Opening

app = typer.Typer(
    name="lethe",
    help="Makes a trained Vision Transformer forget chosen training samples, and compares the result with a "
    "retrain.\n\nStart with `lethe demo`. Then: `lethe unlearn --checkpoint DIR --data SPEC --forget FILE --out DIR`.",
    no_args_is_help=True,
    add_completion=True,
    epilog="**Exit codes.** " + " ".join(f"**{int(code)}**: {meaning}." for code, meaning in EXIT_CODES.items()),
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"lethe {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the whole traceback of an unexpected error, like LETHE_DEBUG=1.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Passed by launchers.")] = 0,
) -> None:
    """Set the options of every command, which are given before its name.

    LOCAL_RANK in the environment has the effect of --local_rank.
    """
    if debug:
        os.environ[exits.DEBUG] = "1"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and report.html; replaced.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of every model and draw.")] = 0,
    json_file: Json = None,
) -> None:
    """Run the main job on scikit-learn's digits: train, forget a tenth, retrain twice without it, compare."""
    from engine.cli.demo import run_demo

    metrics = run_demo(out, seed)
    write_json_file(json_file, metrics)


@app.command()
@takes_groups
@takes_data
@takes_models("preprocessing")
def train(
    data: Data,
    out: Out,
    arch: Annotated[
        str | None,
        typer.Option(
            help="timm architecture, such as vit_tiny_patch16_224, or a checkpoint folder: its architecture, "
            "from fresh weights. With --sliced --set base=given: the checkpoint (or timm:NAME, hf-hub:ID) whose "
            "weights are the base. With --init: that of a file that does not name its own.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="CHECKPOINT",
            help="Fine-tune from these weights: a folder, a file, timm:NAME or hf-hub:ID; the head is fresh where "
            "classes differ. The references of a model that was made so are made from the same base.",
            show_default=False,
        ),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Leave these samples out: the retrain reference. As for `lethe unlearn`.", show_default=False
        ),
    ] = None,
    references: Annotated[
        int | None,
        typer.Option(
            help="With --forget: train this many references, in OUT/reference_1 and so on, with the seeds after "
            "--seed. Finished ones are kept, stopped ones continued; the same command in several shells shares the "
            "work.",
            show_default=False,
        ),
    ] = None,
    sliced: Annotated[
        bool,
        typer.Option(
            "--sliced",
            help="Train in stages that `lethe unlearn --method s3t` can drop; `lethe methods s3t` lists the options. "
            "--epochs are those of each stage.",
        ),
    ] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training samples.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of samples.")] = 0,
    model_arg: ModelArgs = None,
    weights: Weights = None,
    settings: Settings = None,
    *,
    run: RunFolderOptions,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Train a model, from fresh weights or from --init; with --forget, the retrained reference for those samples."""
    check_free(out)
    from engine.cli.console import console
    from engine.data import open_source
    from engine.jobs.references import ReferenceRun, reference_runs, train_references
    from engine.jobs.task import Task
    from engine.run.folder import check_apart

    if references is not None:
        if forget is None:
            raise UserError("train: --references needs --forget, what the references are trained without")
        if sliced or run.overwrite:
            raise UserError("train: --references goes neither with --sliced nor with --overwrite (remove the folder)")
    runs = [ReferenceRun(out, seed, run.resume)] if references is None else reference_runs(out, seed, references)
    options = run_options(settings, run.on_bad_image)
    set_own("train", options, seed=seed, epochs=epochs)
    join_ranks(options)
    check_apart(out, [init] if init else [])
    start = Start(init, arch, model_arg, weights, sliced)
    start.check(options)
    request = None if forget is None else Task.open(data, forget)
    training = Training(
        start,
        open_source(data),
        options,
        opening,
        method="s3t" if sliced else "retrain",
        overwrite=run.overwrite,
        deepspeed=run.deepspeed,
        sign=run.sign,
    )
    numbers: dict[Path, dict[str, Any]] = {}

    def train_one(each: ReferenceRun) -> None:
        numbers[each.folder] = training.run(each, request)

    if references is None:
        train_one(runs[0])
        write_json_file(json_file, numbers[out])
    else:
        statuses = train_references(runs, train_one, lambda line: console.print(line, soft_wrap=True))
        rows = [
            {"folder": str(each.folder), "seed": each.seed, "status": status, **numbers.get(each.folder, {})}
            for each, status in zip(runs, statuses, strict=True)
        ]
        write_json_file(json_file, {"references": rows})


@app.command()
@takes_groups
@takes_data
@takes_models()
def unlearn(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    out: Out,
    method: MethodName = DEFAULT_METHOD,
    settings: Settings = None,
    config: ConfigFile = None,
    reference: Reference = None,
    *,
    files: WeightFileOptions,
    run: RunFolderOptions,
    verdict: VerdictOptions,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Make a trained model forget samples; write the new checkpoint, metrics.json, record.json and report.html.

    The original is never changed. Test samples are evaluated only after the model is final. With --verify the exit code
    is that of the verdict: PASS 0, FAIL 1, INSUFFICIENT EVIDENCE 3.
    """
    check_free(out)
    from engine.audit.run_record import RecordOptions
    from engine.cli.console import console, print_metrics, print_seconds, progress_bars
    from engine.config import read_yaml, split_options
    from engine.jobs.task import Task
    from engine.jobs.unlearn import run_job
    from engine.methods import get_method

    options = {**(read_yaml(config) if config else {}), **run_options(settings, run.on_bad_image)}
    split_options(options, get_method(method).Config)  # an unknown option is reported before the work
    join_ranks(options)
    sources = files.sources([checkpoint, *(reference or [])])
    source, references = sources[0] or checkpoint, [each for each in sources[1:] if each]
    verdict.check(source, references)
    task = Task.open(data, forget)
    if task.request.duplicates:
        console.print(f"{task.request.duplicates} ids were named more than once and merged")
    task, check = opening.prepare(task, source, named_references(references), options, method)
    console.print(f"forgetting {len(task.forget)} of {len(task.source.train)} samples of {data} by {method}")
    with progress_bars() as progress:
        outcome = run_job(
            task,
            source,
            out,
            method=method,
            config=options,
            references=references,
            resume=run.resume,
            overwrite=run.overwrite,
            progress=progress,
            deepspeed=run.deepspeed,
            record=RecordOptions(key=run.sign, request=check.entry() if check else {}),
        )
    print_metrics(outcome.metrics, judged=verdict.verify)
    print_seconds(outcome.metrics["seconds"])
    console.print(f"checkpoint and report.html in {out}")
    write_json_file(json_file, outcome.metrics)
    if outcome.result.collapsed:
        raise BadResult(
            "COLLAPSED: accuracy on the watched samples fell by more than 10 points; do not use this model. "
            + get_method(method).after_collapse
        )
    if verdict.verify:
        judge_run(out, task, source, references, verdict.pool, config=options, sign=run.sign)


@app.command()
@takes_groups
@takes_data
@takes_models()
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    original: Annotated[
        str | None, typer.Option(help="The model before unlearning, for its row.", show_default=False)
    ] = None,
    reference: Reference = None,
    *,
    files: WeightFileOptions,
    settings: Settings = None,
    on_bad_image: OnBadImage = None,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Measure forget, retain and test accuracy, membership inference, and the gap to retrained models."""
    from engine.cli.console import print_metrics
    from engine.jobs.evaluate import evaluate_models
    from engine.jobs.task import Task

    sources = files.sources([checkpoint, original, *(reference or [])])
    source, before = sources[0] or checkpoint, sources[1]
    references = [each for each in sources[2:] if each]
    options = run_options(settings, on_bad_image)
    others = {**({"--checkpoint": source} if before else {}), **named_references(references)}
    task, _ = opening.prepare(Task.open(data, forget), before or source, others, options)
    metrics = evaluate_models(task, source, before, references, options)
    print_metrics(metrics, name="checkpoint")
    write_json_file(json_file, metrics)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to list its options.", show_default=False)] = None,
    json_file: Json = None,
) -> None:
    """List the registered methods, or the options of one with their defaults."""
    import inspect

    from rich.table import Table

    from engine.cli.console import console
    from engine.config import RunConfig, build, to_dict
    from engine.methods import get_method, list_methods

    chosen = {name: get_method(name)} if name else list_methods()
    table = Table("method", "what it does", "options and defaults", header_style="bold")
    for key, cls in chosen.items():
        defaults = to_dict(build(cls.Config, {}))
        what = f"{cls.summary} [dim](one process)[/dim]" if cls.one_process else cls.summary
        table.add_row(key, what, ", ".join(f"{k}={'auto' if v is None else v}" for k, v in defaults.items()))
    console.print(table)
    if name:
        cls = chosen[name]
        console.print(inspect.getdoc(cls.Config) or "")
        if cls.one_process:
            console.print(f"\nRuns on one process: {cls.one_process}.")
        if cls.needs_checkpoint:
            console.print(f"\nNeeds a checkpoint of {cls.needs_checkpoint}.")
        console.print(f"\nOptions of every method:\n{inspect.getdoc(RunConfig)}")
    write_json_file(
        json_file,
        {
            key: {
                "summary": cls.summary,
                "options": to_dict(build(cls.Config, {})),
                "one_process": cls.one_process,
                "needs_checkpoint": cls.needs_checkpoint,
            }
            for key, cls in chosen.items()
        },
    )


@app.command()
def env(json_file: Json = None) -> None:
    """Print versions, devices and optional packages, and check the installation."""
    from engine.runtime.environment import environment, extras, kernel_backends, kernels_problem, rollout_launches

    console = Console()
    facts: dict[str, Any] = {**environment(), "extras": extras(), "kernels": kernels_problem() or "ours"}
    if facts["kernels"] == "ours":
        facts |= {"backends": kernel_backends(), "rollout": rollout_launches()}
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        console.print(
            f"{key:>13}  {value if value not in ([], '') else 'none'}", soft_wrap=True, markup=False, highlight=False
        )
    write_json_file(json_file, facts)
    if facts["kernels"] != "ours":
        raise UserError(facts["kernels"])


app.command()(attack)
app.command("forget-set")(forget_set)
app.command("import")(import_checkpoint)
app.command()(certify)
app.command()(plan)
app.command()(tune)
app.command()(verify)
app.command("verify-record")(verify_record)
app.add_typer(request_app, name="request")
app.add_typer(pool_app, name="pool")


def main() -> None:
    """Run the `lethe` command; the console script."""
    run_app(app)


def run_app(command: typer.Typer) -> None:
    """Run a command, and end the process with its exit code (`engine.errors.EXIT_CODES`)."""
    stderr = Console(stderr=True)
    handler = RichHandler(show_time=False, show_path=False, console=stderr)
    logging.basicConfig(level=logging.WARNING if RANK == 0 else logging.ERROR, format="%(message)s", handlers=[handler])
    if RANK == 0:  # how a file of weights was read, and what `auto` was resolved to
        for name in ("engine.models.checkpoint", "engine.run.setup"):
            logging.getLogger(name).setLevel(logging.INFO)
    exits.run(command, stderr)


if __name__ == "__main__":
    main()
