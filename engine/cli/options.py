"""Options that several commands share, and their checks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from engine.errors import UserError

# Rank of this process under a launcher; only rank 0 prints and writes.
RANK = int(os.environ.get("RANK", "0"))

Data = Annotated[
    str,
    typer.Option(
        help="Data source: digits, cifar10[:ROOT], cifar100[:ROOT], parquet:FOLDER "
        "(Hugging Face images: `train-*.parquet`, `test-*.parquet`), imagefolder:FOLDER (train/CLASS/FILE, "
        "val/CLASS/FILE) or webdataset:FOLDER|PATTERN (tar shards `train-*.tar`, `val-*.tar`; "
        "imagenet-train-{000000..001280}.tar).",
        show_default=False,
    ),
]
# Options of the data source, which `takes_data` adds to commands.
_OF_DATA: dict[str, Any] = {
    "image_column": Annotated[
        str | None,
        typer.Option(help="Parquet: the column of the images, such as img. As --data SPEC?image=.", show_default=False),
    ],
    "label_column": Annotated[
        str | None,
        typer.Option(
            help="Parquet: the column of the labels, such as fine_label. As --data SPEC?label=.", show_default=False
        ),
    ],
    "class_map": Annotated[
        Path | None,
        typer.Option(
            help="File of class names in the model's order: one name a line, or JSON or YAML. Without it, folders are "
            "in timm's order (1 2 ... 10, apple Banana). As --data SPEC?classes=.",
            show_default=False,
        ),
    ],
}
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
        help="Model: a folder with config.json and model.safetensors (timm / Hugging Face layout), a file of weights "
        "(.pth, .pt, .bin, .ckpt, .tar, .safetensors), timm:NAME or hf-hub:ID.",
        show_default=False,
    ),
]
MethodName = Annotated[str, typer.Option(help="Method; `lethe methods` lists them.")]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="timm architecture of a file of weights that does not name its own, such as vit_tiny_patch16_224.",
        show_default=False,
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="Argument of timm.create_model, such as img_size=32 or patch_size=4; repeat for more.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="raw or ema, of a file of weights with both; EMA weights if not given.", show_default=False
    ),
]


def _each_reference(given: list[str] | None) -> list[str] | None:
    from engine.jobs.references import each_reference

    return None if given is None else each_reference(given)


PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        help="Folder of a pool of reference models (`lethe pool train`), in place of --reference.",
        show_default=False,
    ),
]
Reference = Annotated[
    list[str] | None,
    typer.Option(
        help="A model retrained without the forget samples, to compare with, or a folder of them that `lethe train "
        "--references` made. Two or more give the noise floor; four make a verdict likely.",
        show_default=False,
        callback=_each_reference,
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
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")]
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
Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        help="PEM file of an Ed25519 private key: signs record.json, of `lethe certify` the certificate, of "
        "`lethe request` the record of the version. "
        "`lethe verify-record --public-key` checks a record, `lethe request ... --public-key` a certificate.",
        show_default=False,
    ),
]


@dataclasses.dataclass(frozen=True)
class WeightFileOptions:
    """Options of commands that open files of weights, which do not hold how the model is built."""

    arch: Architecture = None
    model_arg: ModelArgs = None
    weights: Weights = None

    def sources(self, checkpoints: Sequence[str | None]) -> list[str | None]:
        """Return checkpoints with these options in their strings, as `load_checkpoint` reads them."""
        return checkpoint_sources(checkpoints, self.arch, self.model_arg, self.weights)


@dataclasses.dataclass(frozen=True)
class RunFolderOptions:
    """Options of commands that train or unlearn in a run folder."""

    deepspeed: DeepSpeed = None
    sign: Sign = None
    on_bad_image: OnBadImage = None
    resume: Resume = False
    overwrite: Overwrite = False


@dataclasses.dataclass(frozen=True)
class VerdictOptions:
    """Options of `lethe unlearn` for a verdict in the same command."""

    verify: Annotated[
        bool,
        typer.Option("--verify", help="Judge the result, as lethe verify --record does: exit 0, 1 or 3."),
    ] = False
    pool: PoolFolder = None

    def check(self, checkpoint: str, references: Sequence[str]) -> None:
        """Check before the work that the verdict can be computed.

        Raises:
            UserError: The options contradict each other, the pool is not complete or of another recipe, or the command
                runs under a launcher.
        """
        from engine.pool.store import Pool
        from engine.runtime.process_group import launched

        if not self.verify:
            if self.pool is not None:
                raise UserError(f"unlearn: --pool {self.pool}: the pool is for the verdict; give --verify too")
            return
        if self.pool is not None and references:
            raise UserError("unlearn: give --pool or --reference, not both")
        if launched():
            raise UserError("unlearn: --verify is one process; leave it out, and run lethe verify --record afterwards")
        if self.pool is not None:
            pool = Pool.open(self.pool)
            pool.check_complete()
            pool.check_recipe(checkpoint)


_GROUPS = (WeightFileOptions, RunFolderOptions, VerdictOptions)


def _can_be_written(path: Path | None) -> Path | None:
    """Return the path; raise UserError before the work if the file cannot be written."""
    if path is not None:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if path.is_dir() or (there != path and not there.is_dir()):
            raise UserError(f"--json {path}: {there} is {'a folder' if path.is_dir() else 'no folder'}; name a file")
        if not os.access(there, os.W_OK):
            raise UserError(f"--json {path}: {there} cannot be written; name another file")
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the numbers to this file too.", show_default=False, callback=_can_be_written),
]


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a group of options, such as `WeightFileOptions`, by its options."""
    groups: dict[str, type[Any]] = {}
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind, hint = inspect.Parameter.KEYWORD_ONLY, hints[parameter.name]
        if hint not in _GROUPS:
            parameters.append(parameter.replace(kind=kind, annotation=hint))
            continue
        groups[parameter.name] = hint
        own = get_type_hints(hint, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, kind, default=field.default, annotation=own[field.name])
            for field in dataclasses.fields(hint)
        ]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    return _with_parameters(wrapped, parameters)


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Add --image-column, --label-column and --class-map to a command with --data, and append them to its spec."""
    hints = get_type_hints(command, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))
        if parameter.name == "data":
            parameters += [inspect.Parameter(k, kind, default=None, annotation=a) for k, a in _OF_DATA.items()]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        from engine.data.spec import with_options

        image, label, classes = (values.pop(key, None) for key in _OF_DATA)
        classes = None if classes is None else str(classes)
        values["data"] = with_options(values["data"], image=image, label=label, classes=classes)
        command(**values)

    return _with_parameters(wrapped, parameters)


def _with_parameters(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Return a command with the parameters that typer makes options of."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def check_free(out: Path) -> None:
    """Raise UserError if another run is at work in a folder, before models and data are opened."""
    from engine.runtime import lock

    if "RANK" not in os.environ:  # several ranks check together when the folder is opened
        lock.check(out)


def run_options(settings: list[str] | None, on_bad_image: str | None) -> dict[str, Any]:
    """Return the options of --set and --on-bad-image by name."""
    from engine.config import parse_assignments

    return {**parse_assignments(settings or []), **({"on_bad_image": on_bad_image} if on_bad_image else {})}


def checkpoint_sources(
    checkpoints: Sequence[str | None], arch: str | None, model_arg: list[str] | None, weights: str | None
) -> list[str | None]:
    """Return checkpoints with `--arch`, `--model-arg` and `--weights` in their strings, for `load_checkpoint`.

    These options are for files, and for folders without a config.json. If the architecture of every checkpoint is
    stored with it, the first one gets them, and `load_checkpoint` raises an error.
    """
    if not (arch or model_arg or weights):
        return list(checkpoints)
    from engine.config import parse_assignments
    from engine.models.checkpoint_source import CheckpointSource

    if weights not in (None, "raw", "ema"):
        raise UserError(f"--weights {weights}: expected raw or ema")
    given = parse_assignments(model_arg or [])
    sources = [None if each is None else CheckpointSource.parse(each) for each in checkpoints]
    takers = [i for i, source in enumerate(sources) if source is not None and not source.is_configured()] or [0]
    return [
        str(
            dataclasses.replace(
                source,
                architecture=source.architecture or arch,
                model_args={**given, **source.model_args},
                weights=source.weights or weights,  # type: ignore[arg-type]  # checked above
            )
        )
        if source is not None and i in takers
        else checkpoints[i]
        for i, source in enumerate(sources)
    ]


def join_ranks(options: dict[str, Any]) -> None:
    """Join the process group, if a launcher started several ranks, before any of them opens the data."""
    from engine.config import RunConfig, build
    from engine.runtime.process_group import init_process_group

    run = build(RunConfig, {key: options[key] for key in ("device", "timeout") if key in options})
    init_process_group(run.device, run.timeout)


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write ids, one a line.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.write_text("".join(f"{each}\n" for each in ids), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--ids {path}: cannot be written ({error.strerror})") from None


def write_json_file(path: Path | None, values: Any) -> None:
    """Write the numbers of a command to the file of --json, if one was given."""
    if path is None or RANK > 0:
        return
    from engine.runtime.files import write_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None
