"""`lethe import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.opening import takes_models
from engine.cli.options import Json, WeightFileOptions, takes_groups, write_json_file
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.jobs.opening import Opening


@takes_groups
@takes_models("preprocessing")
def import_checkpoint(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="File of weights (.pth, .pt, .bin, .ckpt, .tar, .safetensors, or the index of shards), or a folder "
            "that holds one.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.", show_default=False)],
    *,
    files: WeightFileOptions,
    label_names: Annotated[
        Path | None,
        typer.Option(
            help="Class names by label: one a line, or JSON (a list, {name: label} or {label: name}); by default those "
            "in the file.",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Write a file of weights as a checkpoint folder (config.json, model.safetensors), which every command opens.

    Example: lethe import model_best.pth.tar --arch vit_tiny_patch16_224 --model-arg img_size=32 --out model
    """
    from engine.cli.console import console
    from engine.models.architecture import read_label_names
    from engine.models.checkpoint import imported, load_checkpoint, save_checkpoint, weights_sha256
    from engine.models.spec import spec_of, with_label_names

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name a new folder")
    names = read_label_names(label_names) if label_names else []
    (source,) = files.sources([file])
    model = load_checkpoint(source or file)
    if names:
        with_label_names(model, names, f"--label-names {label_names}")
    opening.changes.apply(model)
    opening.print_preprocessing(model)
    save_checkpoint(model, out)
    spec, digest = spec_of(model), weights_sha256(model)
    if weights_sha256(load_checkpoint(out)) != digest:
        raise UserError(f"--out {out}: holds other weights than were written; check the disk")
    shown = f"{spec.label_names[0]} ... {spec.label_names[-1]}" if spec.label_names else "without names"
    console.print(
        f"{spec.architecture} with {spec.num_classes} classes ({shown}) in {out}; weights {digest[:12]}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    write_json_file(
        json_file,
        {
            "architecture": spec.architecture,
            "num_classes": spec.num_classes,
            "model_args": spec.model_args,
            "label_names": spec.label_names,
            "preprocessing": spec.pretrained_cfg,
            "weights_sha256": digest,
            "import": imported(model),
        },
    )
