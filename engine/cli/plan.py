"""`lethe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.options import Json, MethodName, Settings, write_json_file
from engine.config import DEFAULT_METHOD


def plan(
    arch: Annotated[
        str, typer.Option(help="timm architecture, such as vit_large_patch16_224; or a checkpoint.", show_default=False)
    ],
    images: Annotated[int, typer.Option(help="Training images.", show_default=False)],
    forget_share: Annotated[float, typer.Option(help="Share of them to forget, between 0 and 1.")] = 0.1,
    test_images: Annotated[
        int | None,
        typer.Option(
            help="Test images of the evaluation.", show_default="a fifth of the training images, 50000 at most"
        ),
    ] = None,
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
    method: MethodName = DEFAULT_METHOD,
    batch_size: Annotated[int, typer.Option(help="Samples a micro-batch and GPU.")] = 64,
    accumulation: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks again in the backward pass.")
    ] = False,
    attention: Annotated[str, typer.Option(help="auto, sdpa, eager or xformers.")] = "auto",
    teacher: Annotated[str, typer.Option(help="The original: replicated on every rank, or sharded.")] = "replicated",
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the head.", show_default="1000; of a checkpoint, its own")
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument of timm.create_model; repeat for more.", show_default=False),
    ] = None,
    settings: Settings = None,
    retrain_recipe: Annotated[
        str | None,
        typer.Option(
            help="What retraining is compared with: deit (300 epochs), plain-vit (90) or a name of yours.",
            show_default="deit; of a model of `lethe train`, its own epochs",
        ),
    ] = None,
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
        float | None,
        typer.Option(help="GiB of a GPU (of a rank, on the CPU), to check whether it fits.", show_default=False),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of one GPU hour.", show_default=False)] = None,
    pool_models: Annotated[
        int | None,
        typer.Option(
            help="Models of a pool (`lethe pool train`): its cost, a certificate's and a request's proof, in addition.",
            show_default=False,
        ),
    ] = None,
    pool_share: Annotated[float, typer.Option(help="Share of the samples that each model of the pool lacks.")] = 0.25,
    json_file: Json = None,
) -> None:
    """Estimate what unlearning needs before it runs: memory, flops, bytes and time, compared with a retrain."""
    from engine.cli.plan_table import print_plan
    from engine.config import parse_assignments
    from engine.jobs.start import is_checkpoint
    from engine.models.checkpoint import load_checkpoint
    from engine.models.spec import spec_of
    from engine.plan import plan as make_plan
    from engine.pool.store import recipe_of
    from engine.run.zero import read_deepspeed

    options = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "attention": attention,
        "teacher": teacher,
        **parse_assignments(settings or []),
    }
    own = recipe_of(arch).get("epochs") if is_checkpoint(arch) else None
    if own is not None and retrain_recipe is None and retrain_epochs is None:
        retrain_recipe, retrain_epochs = f"that of {arch}", float(own)
    made = make_plan(
        spec_of(load_checkpoint(arch)) if is_checkpoint(arch) else arch,
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
        retrain_recipe=retrain_recipe or "deit",
        retrain_epochs=retrain_epochs,
        throughput=throughput,
        measure=measure,
        capacity=None if gpu_memory is None else round(gpu_memory * 2**30),
        price=price,
        pool_models=pool_models,
        pool_share=pool_share,
    )
    print_plan(made)
    write_json_file(json_file, made.to_dict())
