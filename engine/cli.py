"""The `lethe` command. Exit 0: good; 1: a run that stopped or a verdict that fails; 2: wrong use."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from engine.errors import RunStopped, UserError

# Of this process, where a launcher started several: the first one speaks for all.
RANK = int(os.environ.get("RANK", "0"))

app = typer.Typer(
    name="lethe",
    help="Makes a trained Vision Transformer forget chosen training samples, and sets the result beside a retrain.\n\n"
    "Start with `lethe demo`. Then: `lethe unlearn --checkpoint DIR --data SPEC --forget FILE --out DIR`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Data = Annotated[
    str,
    typer.Option(
        help="Data source: digits, cifar10[:ROOT], cifar100[:ROOT], parquet:FOLDER "
        "(Hugging Face images: train-*.parquet, test-*.parquet), imagefolder:FOLDER (train/CLASS/FILE, "
        "val/CLASS/FILE) or webdataset:FOLDER|PATTERN (tar shards train-*.tar, val-*.tar; "
        "imagenet-train-{000000..001280}.tar).",
        show_default=False,
    ),
]
Forget = Annotated[
    str,
    typer.Option(
        help="What to forget: a file of sample ids (text, CSV with an `id` column, JSON lines), class:NAME "
        "or random:FRACTION@SEED.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Option(
        help="Model: a folder with config.json and model.safetensors (timm / Hugging Face layout), timm:NAME "
        "or hf-hub:ID.",
        show_default=False,
    ),
]
Reference = Annotated[
    list[str] | None,
    typer.Option(
        help="A model retrained without the forget samples, to compare with. Give it twice or more for "
        "the noise floor.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the run or the method, such as seed=1, batch_size=64, precision=bf16, lr=1e-4; repeat "
        "for more. `lethe methods NAME` lists them.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file of the same options; --set goes before it.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Run folder to write.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, after its last whole epoch.")]
DeepSpeed = Annotated[
    Path | None,
    typer.Option(
        "--deepspeed",
        help="DeepSpeed configuration, such as configs/zero2.json; needed under a launcher (deepspeed --num_gpus N "
        "--module engine unlearn ...).",
        show_default=False,
    ),
]
OnBadImage = Annotated[
    str | None,
    typer.Option(
        help="What to do with an image that does not decode: raise (the default) or skip.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.", show_default=False)]


@app.callback()
def common(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Passed by launchers.")] = 0,
) -> None:
    """LOCAL_RANK says the same."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and report.html; replaced.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of every model and draw.")] = 0,
    json_file: Json = None,
) -> None:
    """The main job on scikit-learn's digits: train, forget a tenth, retrain twice without it, compare."""
    from engine.demo import run_demo

    metrics = run_demo(out, seed)
    _write_json(json_file, metrics)


@app.command()
def train(
    data: Data,
    arch: Annotated[
        str,
        typer.Option(
            help="timm architecture, such as vit_tiny_patch16_224, or a checkpoint folder: its architecture, "
            "from fresh weights.",
            show_default=False,
        ),
    ],
    out: Out,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Leave these samples out: the retrain reference. As for `lethe unlearn`.", show_default=False
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training samples.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of samples.")] = 0,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Argument of timm.create_model, such as img_size=32 or patch_size=4; repeat for more.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    deepspeed: DeepSpeed = None,
    on_bad_image: OnBadImage = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Trains a model from fresh weights; with --forget, the retrained reference for those samples."""
    from engine.config import parse_assignments
    from engine.console import console, print_seconds, progress_bars
    from engine.data import open_source
    from engine.job import Task, architecture
    from engine.loop import train as run_train

    options = {**_options(settings, on_bad_image), "epochs": epochs, "seed": seed}
    _join(options)
    source = open_source(data)
    samples, notes = source.train, {"data": data, "arch": arch}
    if forget is not None:
        task = Task.open(data, forget)
        samples, notes = task.retain, {**notes, **task.notes()}
    model = architecture(arch, parse_assignments(model_arg or []), source)
    with progress_bars() as progress:
        result = run_train(
            model,
            samples,
            config=options,
            validation=source.validation,
            output_dir=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            deepspeed=deepspeed,
            notes=notes,
        )
    accuracy = {"train": result.accuracy(samples), "test": result.accuracy(source.test)}
    console.print(
        f"accuracy: {', '.join(f'{name} {100 * value:.1f}%' for name, value in accuracy.items())}; checkpoint in {out}"
    )
    print_seconds(result.seconds)
    _write_json(json_file, {"accuracy": accuracy, "seconds": result.seconds, "samples_seen": result.samples_seen})


@app.command()
def unlearn(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    out: Out,
    method: Annotated[str, typer.Option(help="One of `lethe methods`.")] = "lethe",
    settings: Settings = None,
    config: ConfigFile = None,
    reference: Reference = None,
    deepspeed: DeepSpeed = None,
    on_bad_image: OnBadImage = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Makes a trained model forget samples; writes the new checkpoint, metrics.json, record.json and report.html.

    The original is never changed. Test samples are looked at only after the model is final.
    """
    from engine.config import read_yaml
    from engine.console import console, print_metrics, print_seconds, progress_bars
    from engine.job import Task, run_job

    options = {**(read_yaml(config) if config else {}), **_options(settings, on_bad_image)}
    _join(options)
    task = Task.open(data, forget)
    if task.request.duplicates:
        console.print(f"{task.request.duplicates} ids were named more than once and merged")
    console.print(f"forgetting {len(task.forget)} of {len(task.source.train)} samples of {data} by {method}")
    with progress_bars() as progress:
        outcome = run_job(
            task,
            checkpoint,
            out,
            method=method,
            config=options,
            references=reference or [],
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            deepspeed=deepspeed,
        )
    print_metrics(outcome.metrics)
    print_seconds(outcome.metrics["seconds"])
    console.print(f"checkpoint and report.html in {out}")
    _write_json(json_file, outcome.metrics)
    if outcome.result.collapsed:
        raise RunStopped(
            "COLLAPSED: accuracy on the watched samples fell by more than 10 points; do not use this model. "
            "Lower the rates (--set forget_lr=..., lr=...)"
        )


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    original: Annotated[
        str | None, typer.Option(help="The model before unlearning, for its row.", show_default=False)
    ] = None,
    reference: Reference = None,
    settings: Settings = None,
    json_file: Json = None,
) -> None:
    """Forget, retain and test accuracy, membership inference, and the gap to retrained models."""
    from engine.config import parse_assignments
    from engine.console import print_metrics
    from engine.job import Task, evaluate_job

    metrics = evaluate_job(
        Task.open(data, forget), checkpoint, original, reference or [], parse_assignments(settings or [])
    )
    print_metrics(metrics, name="checkpoint")
    _write_json(json_file, metrics)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to list its options.", show_default=False)] = None,
    json_file: Json = None,
) -> None:
    """The registered methods, or the options of one with their defaults."""
    import inspect

    from rich.table import Table

    from engine.config import RunConfig, build, to_dict
    from engine.console import console
    from engine.methods import get_method, list_methods

    chosen = {name: get_method(name)} if name else list_methods()
    table = Table("method", "what it does", "options and defaults", header_style="bold")
    for key, cls in chosen.items():
        defaults = to_dict(build(cls.Config, {}))
        table.add_row(key, cls.summary, ", ".join(f"{k}={'auto' if v is None else v}" for k, v in defaults.items()))
    console.print(table)
    if name:
        console.print(inspect.getdoc(chosen[name].Config) or "")
        console.print(f"\nOptions of every method:\n{inspect.getdoc(RunConfig)}")
    _write_json(
        json_file,
        {key: {"summary": cls.summary, "options": to_dict(build(cls.Config, {}))} for key, cls in chosen.items()},
    )


@app.command()
def env(json_file: Json = None) -> None:
    """Versions, devices, optional packages, and whether the installation is sound."""
    from engine.environment import environment, extras, kernel_backends, kernels_problem, rollout_launches

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
    _write_json(json_file, facts)
    if facts["kernels"] != "ours":
        raise UserError(facts["kernels"])


@app.command()
def plan(
    arch: Annotated[str, typer.Option(help="timm architecture, such as vit_large_patch16_224.", show_default=False)],
    images: Annotated[int, typer.Option(help="Training images.", show_default=False)],
    forget_share: Annotated[float, typer.Option(help="Share of them to forget, between 0 and 1.")] = 0.1,
    test_images: Annotated[int, typer.Option(help="Test images that the evaluation passes over.")] = 50_000,
    gpus: Annotated[int, typer.Option(help="GPUs, or ranks on the CPU.")] = 1,
    stage: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.", show_default="0")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Optimizer states in host memory; weights too at stage 3.")
    ] = False,
    deepspeed: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed JSON: stage, offload and bucket sizes are read from it.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu: then all that a rank holds is counted.")] = "cuda",
    method: Annotated[str, typer.Option(help="One of `lethe methods`.")] = "lethe",
    batch_size: Annotated[int, typer.Option(help="Samples a micro-batch and GPU.")] = 64,
    accumulation: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks again in the backward pass.")
    ] = False,
    attention: Annotated[str, typer.Option(help="auto, sdpa, eager or xformers.")] = "auto",
    teacher: Annotated[str, typer.Option(help="The original: replicated on every rank, or sharded.")] = "replicated",
    num_classes: Annotated[int, typer.Option(help="Classes of the head.")] = 1000,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument of timm.create_model; repeat for more.", show_default=False),
    ] = None,
    settings: Settings = None,
    retrain_recipe: Annotated[
        str,
        typer.Option(help="What retraining is compared with: deit (300 epochs), plain-vit (90) or a name of yours."),
    ] = "deit",
    retrain_epochs: Annotated[
        float | None, typer.Option(help="Epochs of the retrain, in place of the recipe's.", show_default=False)
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option(help="Training images (forward and backward) a second and GPU, for times.", show_default=False),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few real steps here instead, on random images.")
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU (of a rank, on the CPU): does it fit?", show_default=False)
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of an hour of a GPU.", show_default=False)] = None,
    json_file: Json = None,
) -> None:
    """What unlearning needs, before anybody asks for the GPUs: memory, flops, bytes and time, beside a retrain."""
    from engine.config import parse_assignments
    from engine.distributed.zero import read_deepspeed
    from engine.plan import plan as make_plan
    from engine.plan.table import print_plan

    options = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "attention": attention,
        "teacher": teacher,
        **parse_assignments(settings or []),
    }
    made = make_plan(
        arch,
        images=images,
        forget_share=forget_share,
        test_images=test_images,
        gpus=gpus,
        stage=stage,
        offload=offload,
        deepspeed=read_deepspeed(deepspeed) if deepspeed else None,
        device=device,  # type: ignore[arg-type]  # checked there
        method=method,
        options=options,
        num_classes=num_classes,
        model_args=parse_assignments(model_arg or []),
        retrain_recipe=retrain_recipe,
        retrain_epochs=retrain_epochs,
        throughput=throughput,
        measure=measure,
        capacity=None if gpu_memory is None else round(gpu_memory * 2**30),
        price=price,
    )
    print_plan(made)
    _write_json(json_file, made.to_dict())


def _options(settings: list[str] | None, on_bad_image: str | None) -> dict[str, Any]:
    from engine.config import parse_assignments

    return {**parse_assignments(settings or []), **({"on_bad_image": on_bad_image} if on_bad_image else {})}


def _join(options: dict[str, Any]) -> None:
    """Meets the other ranks, where a launcher started several, before any of them opens the data."""
    from engine.config import RunConfig, build
    from engine.distributed.world import join

    run = build(RunConfig, {key: options[key] for key in ("device", "timeout") if key in options})
    join(run.device, run.timeout)


def _write_json(path: Path | None, values: Any) -> None:
    if path is None or RANK > 0:
        return
    from engine.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


def main() -> None:
    """The console script."""
    run_app(app)


def run_app(command: typer.Typer) -> None:
    """Runs a command; what a user did wrong becomes one line and exit code 2, a stopped run exit code 1."""
    stderr = Console(stderr=True)
    handler = RichHandler(show_time=False, show_path=False, console=stderr)
    logging.basicConfig(level=logging.WARNING if RANK == 0 else logging.ERROR, format="%(message)s", handlers=[handler])
    try:
        command()
    except (UserError, RunStopped) as error:
        wrong = isinstance(error, UserError)
        if not error.shared:
            rank = f" (rank {RANK})" if RANK > 0 else ""
            label = f"[bold red]{'error' if wrong else 'stopped'}{rank}:[/]"
            stderr.print(f"{label} {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2 if wrong else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
