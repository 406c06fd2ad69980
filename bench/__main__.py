"""Benchmark commands: `python -m bench --help` lists them, and each makes one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bench.kernel_speed.kernels import run_kernels
from bench.quality.ablation import run_ablation
from bench.quality.certificates import certificates
from bench.quality.pool_agreement import pool_agreement
from bench.quality.pool_queue import pool_queue
from bench.quality.ulira import ulira
from engine.cli.app import run_app
from engine.errors import UserError

app = typer.Typer(help="Benchmarks: each command makes one table.", no_args_is_help=True, add_completion=False)

Checkpoint = Annotated[str, typer.Option(help="The model before unlearning.", show_default=False)]
Data = Annotated[str, typer.Option(help="Data source, as for `lethe unlearn`.", show_default=False)]
Forget = Annotated[str, typer.Option(help="Forget request, as for `lethe unlearn`.", show_default=False)]
Reference = Annotated[list[str], typer.Option(help="A retrained model; twice or more.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for every run.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Results; a second call continues this file.")]
# A model of the user's, in addition to digits (`_subjects`).
OwnModel = Annotated[str | None, typer.Option(help="The original. Default: digits alone.", show_default=False)]
OwnData = Annotated[str | None, typer.Option(help="Data source, as for `lethe unlearn`.", show_default=False)]
OwnRequest = Annotated[str | None, typer.Option(help="Forget request, as for `lethe unlearn`.", show_default=False)]
Retrained = Annotated[
    list[str] | None, typer.Option(help="A retrained model to be judged; repeat for more.", show_default=False)
]
OwnName = Annotated[str, typer.Option(help="Name of the checkpoint in the results.")]
OwnEpochs = Annotated[float, typer.Option(help="Epochs of the checkpoint's retrain.")]
CostPlot = Annotated[
    Path | None,
    typer.Option(help="PNG: gap against share of the retrain's time, a file a task.", show_default=False),
]


@app.command()
def ablation(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    reference: Reference,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every variant.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once; each then has its share of the threads.")] = 1,
    method: Annotated[str, typer.Option(help="lethe or lethe_plus; any, with --accelerators.")] = "lethe",
    accelerators: Annotated[
        bool, typer.Option("--accelerators", help="Ways to train less, instead of the design choices.")
    ] = False,
    settings: Settings = None,
    json: Json = None,
) -> None:
    """Compare each design choice of LetheViT, or of LetheViT+, with its alternative: mean and spread over seeds."""
    run_ablation(method, checkpoint, data, forget, reference, seeds, jobs, settings or [], json, accelerators)


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, takes seconds: a smoke test.")] = False,
    only: Annotated[
        Literal["rollout", "info_nce", "mask"] | None, typer.Option(help="Only this part.", show_default=False)
    ] = None,
    slow_peers: Annotated[
        bool, typer.Option("--slow-peers", help="lightly's NTXentLoss too, ten times slower than the rest.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Results, with every round.")] = None,
) -> None:
    """Compare the kernels with those of other libraries: correctness first, then time and peak memory.

    Prints each target with PASS or MISSED; a missed target does not change the exit code. The extra `bench` of
    lethe-unlearning installs the other libraries, `bench-gpu` those that need CUDA.
    """
    run_kernels(json, device, quick, only, slow_peers)


@app.command()
def train(
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, takes seconds: a smoke test.")] = False,
    only: Annotated[str | None, typer.Option(help="Only cases with this in their name.", show_default=False)] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of every loop.", show_default="as PyTorch takes")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start no case after so many minutes.", show_default="no limit")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results, with every step; written case by case.")] = None,
) -> None:
    """Compare optimizer steps with plain loops and those of other libraries: images/s, memory, MFU.

    Prints each target with PASS or MISSED; a missed target does not change the exit code.
    """
    from bench.training_cost.train import run_train

    run_train(json, quick, device, only, threads, minutes)


@app.command("compile")
def compile_(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942.", show_default="all")] = None,
    only: Annotated[list[str] | None, typer.Option(help="rollout, info_nce or mask.", show_default="all")] = None,
    match: Annotated[str, typer.Option(help="Only cases with this in their name, such as 'N=197 H=12'.")] = "",
    json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that are not present: registers, spills, occupancy; exit 1 for a problem."""
    from bench.kernel_speed.compile import run_compile

    if run_compile(target or [], only or [], match, json):
        raise typer.Exit(1)


@app.command()
def data(
    images: Annotated[int, typer.Option(help="Samples of the synthetic training set.")] = 1_281_167,
    real: Annotated[
        Path | None,
        typer.Option(help="Folder CLASS/FILE of real JPEGs; without it decoding is not measured.", show_default=False),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Folder for 5 GB of shards, removed at the end.", show_default="temporary folder"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the comparison of decoders.")] = 9,
    quick: Annotated[
        bool, typer.Option("--quick", help="2,000 samples and three rounds, whatever other options are.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Results, with every round.")] = None,
) -> None:
    """Measure the data path on a synthetic set of ImageNet's size, and compare decoding with torchvision's ImageFolder.

    Prints each target with PASS or MISSED; a missed target does not change the exit code.
    """
    from bench.training_cost.data import run_data

    run_data(images, real, scratch, rounds, json, quick)


@app.command()
def chaos(
    runs: Annotated[int, typer.Option(help="Runs to kill.")] = 20,
    stages: Annotated[str, typer.Option(help="ZeRO stages of the runs on two ranks.")] = "2,3",
    seed: Annotated[int, typer.Option(help="Seed of which process is killed, and when.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Results, with every kill.")] = None,
) -> None:
    """Kill runs with SIGKILL and resume them: exit 1 unless identical to an undisturbed run.

    As root, also a full disk.
    """
    from bench.reliability.chaos import run_chaos

    if not run_chaos(runs, [int(stage) if stage.isdecimal() else -1 for stage in stages.split(",")], seed, json)[
        "passed"
    ]:
        raise typer.Exit(1)


@app.command("two-hosts")
def two_hosts(json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None) -> None:
    """Run one job on two network namespaces, and cut the link between them.

    Needs root. Exits with 1 unless the result equals that of one host.
    """
    from bench.reliability.two_hosts import run_two_hosts

    if not run_two_hosts(json)["passed"]:
        raise typer.Exit(1)


@app.command()
def equality(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    steps: Annotated[int, typer.Option(help="Optimizer steps a phase at most.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Batch size of one process; two ranks have half each.")] = 100,
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or bf16.", show_default="both")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Compare DeepSpeed and two ranks at ZeRO 0 to 3 with one process, on the CPU; exit 1 beyond 1e-5 in fp32."""
    from bench.training_cost.scale import run_equality

    if not run_equality(checkpoint, data, forget, steps, batch_size, precision or ["fp32", "bf16"], json):
        raise typer.Exit(1)


@app.command()
def memory(
    images: Annotated[Path, typer.Option(help="Folder CLASS/FILE of real images.", show_default=False)],
    arch: Annotated[str, typer.Option(help="timm architecture.")] = "vit_large_patch16_224",
    case: Annotated[
        list[str] | None, typer.Option(help="STAGE:PRECISION; zero0 is plain data parallel.", show_default="four")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size of a rank.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each phase.")] = 2,
    json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Compare the peak memory of real steps on two CPU ranks with the estimate of `lethe plan`; exit 1 beyond 20%."""
    from bench.training_cost.scale import run_memory

    cases = case or ["zero2:fp32", "zero3_offload:fp32", "zero0:fp32", "zero2:bf16"]
    if not run_memory(arch, images, cases, batch_size, steps, json):
        raise typer.Exit(1)


@app.command("retrain-cost")
def retrain_cost(
    checkpoint: OwnModel = None,
    data: OwnData = None,
    forget: OwnRequest = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="A retrained model; by default those of this run.", show_default=False)
    ] = None,
    name: OwnName = "yardstick",
    retrain_epochs: OwnEpochs = 30.0,
    digits: Annotated[bool, typer.Option(help="Digits too, with an original that is trained first.")] = True,
    projection: Annotated[bool, typer.Option(help="Project the hours for ImageNet from measured steps.")] = True,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every method and of the retrain.")] = 3,
    price: Annotated[
        float | None, typer.Option(help="Price of one device-hour, in any currency.", show_default=False)
    ] = None,
    plot: CostPlot = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three steps a phase, two seeds, seconds.")] = False,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results; a second call continues this file.")] = None,
) -> None:
    """Compare every method with a retrain of the same seed: end-to-end wall-clock time and quality in one row."""
    from bench.quality.retrain_cost import run_retrain_cost

    subjects = _subjects(checkpoint, data, forget, reference or [], name, retrain_epochs, digits)
    if not subjects and not projection:
        raise UserError("--no-digits leaves nothing to measure; give --checkpoint, --data and --forget")
    run_retrain_cost(subjects, min(seeds, 2) if quick else seeds, settings or [], price, json, plot, quick, projection)


@app.command()
def leaderboard(
    checkpoint: OwnModel = None,
    data: OwnData = None,
    forget: OwnRequest = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="A retrained model of that request; by default those of this run.", show_default=False),
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="A class of the data to forget as well.", show_default=False)
    ] = None,
    name: OwnName = "yardstick",
    retrain_epochs: OwnEpochs = 30.0,
    digits: Annotated[bool, typer.Option(help="Digits too, with an original that is trained first.")] = True,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods to compare with the retrain. Default: all.", show_default=False)
    ] = None,
    retrain: Annotated[bool, typer.Option(help="Retrain with each seed; without it references are needed.")] = True,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every method and of the retrain.")] = 3,
    plot: CostPlot = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three steps a phase, two seeds, a minute.")] = False,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results; a second call continues this file.")] = None,
) -> None:
    """Rank every method on a random tenth and on a class by average gap, with the stability of the ranks over seeds."""
    from bench.quality.retrain_cost import class_of, run_retrain_cost

    subjects = _subjects(checkpoint, data, forget, reference or [], name, retrain_epochs, digits)
    classes = [(subject, "3" if subject.checkpoint is None else class_name) for subject in subjects]
    subjects += [class_of(subject, chosen) for subject, chosen in classes if chosen]
    number = min(seeds, 2) if quick else seeds
    run_retrain_cost(
        subjects, number, settings or [], None, json, plot, quick, False, methods=method or (), retrain=retrain
    )


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="File that `leaderboard` or `retrain-cost` wrote.")],
    picture: Annotated[Path, typer.Argument(help="PNG; with several tasks one file each, named after the task.")],
) -> None:
    """Draw the picture of `--plot` of `leaderboard` or `retrain-cost` from a results file; nothing is run."""
    from bench.publish.results import fitted, load
    from bench.quality.retrain_cost import plot as draw

    fitted([results.name], lambda report: draw(report, picture), load(results))


@app.command()
def peers(
    checkpoint: OwnModel = None,
    data: OwnData = None,
    forget: OwnRequest = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="A retrained model of that request; by default two are trained.", show_default=False),
    ] = None,
    name: OwnName = "yardstick",
    retrain_epochs: OwnEpochs = 30.0,
    digits: Annotated[bool, typer.Option(help="Digits too, with models that are trained first.")] = True,
    method: Annotated[
        list[str] | None, typer.Option(help="ssd, scrub, salun or bad_teacher.", show_default="all")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(help="equal or defaults.", show_default="both")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every method.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps or one epoch, one seed.")] = False,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results; a second call continues this file.")] = None,
) -> None:
    """Compare four methods with those of supreme-unlearning and torchunlearn, on equal settings and at defaults."""
    from bench.quality.method_peers import run_method_peers

    subjects = _subjects(checkpoint, data, forget, reference or [], name, retrain_epochs, digits)
    run_method_peers(subjects, 1 if quick else seeds, settings or [], method or [], json, quick, terms=setting or [])


def _subjects(
    checkpoint: str | None,
    data: str | None,
    forget: str | None,
    references: list[str],
    name: str,
    retrain_epochs: float,
    digits: bool,
) -> list[Any]:
    """Return digits and, if given, the user's model."""
    from bench.quality.retrain_cost import DIGITS, Subject

    subjects = [DIGITS] if digits else []
    given = {"--checkpoint": checkpoint, "--data": data, "--forget": forget}
    if any(given.values()):
        for option, value in given.items():
            if not value:
                raise UserError(f"{option} is missing: a model needs --checkpoint, --data and --forget")
        if name == DIGITS.name and digits:
            raise UserError(f"--name {name}: is taken by the digits; name the model differently, or give --no-digits")
        subjects.append(
            Subject(
                name=name,
                data=data or "",
                forget=forget or "",
                checkpoint=checkpoint,
                references=tuple(references),
                recipe={"epochs": retrain_epochs},
            )
        )
    elif references:
        raise UserError("--reference is of a model: give --checkpoint, --data and --forget")
    return subjects


@app.command()
def models(
    only: Annotated[
        str | None, typer.Option(help="Only timm models with this in their name.", show_default=False)
    ] = None,
    part: Annotated[
        Literal["all", "count", "table"], typer.Option(help="count: shapes of all models; table: steps of some.")
    ] = "all",
    jobs: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
    json: Annotated[Path | None, typer.Option("--json", help="Results; a second call continues this file.")] = None,
) -> None:
    """Test which classifiers of timm can be opened and what runs on them.

    Shapes of all, a step of one of each module.
    """
    from bench.quality.models import run_models

    run_models(json, only, jobs, part)


@app.command()
def verdicts(
    checkpoint: OwnModel = None,
    data: OwnData = None,
    forget: OwnRequest = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="A retrained model; with fewer than two, more are trained.", show_default=False),
    ] = None,
    retrained: Retrained = None,
    name: OwnName = "yardstick",
    retrain_epochs: OwnEpochs = 30.0,
    digits: Annotated[bool, typer.Option(help="Digits too, with models that are trained first.")] = True,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to judge at its defaults; repeat for more.", show_default=False)
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(help="Tighter gates, as for `lethe verify`.", show_default=False)
    ] = None,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Test `lethe verify` on models whose verdict is known, and on the methods, at one setting."""
    from bench.quality.verdict_matrix import run_verdict_matrix

    subjects = _subjects(checkpoint, data, forget, reference or [], name, retrain_epochs, digits)
    run_verdict_matrix(subjects, retrained or [], method or [], settings or [], gates, json)


@app.command()
def calibration(
    checkpoint: OwnModel = None,
    data: OwnData = None,
    forget: OwnRequest = None,
    retrained: Retrained = None,
    name: OwnName = "yardstick",
    digits: Annotated[bool, typer.Option(help="Digits too, with models that are trained first.")] = True,
    models: Annotated[int, typer.Option(help="Retrained models of each request of the digits.")] = 8,
    seeds: Annotated[int, typer.Option(help="Requests of the digits.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where models and their outputs are kept.")] = Path("runs/calibration"),
    json: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Count how often retrained models and impostors PASS `lethe verify`, by the number of references."""
    from bench.quality.calibration import run_calibration

    subjects = _subjects(checkpoint, data, forget, [], name, 30.0, digits)
    run_calibration(subjects, retrained=retrained or [], models=models, seeds=seeds, folder=folder, json_file=json)


@app.command()
def unlearn(
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    only: Annotated[
        list[str] | None,
        typer.Option(help="forget, retain, dataset, resolution, model, info_nce or ranks.", show_default="all"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, takes seconds: a smoke test.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG, log-log: FILE-CURVE.png.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Results, with every round.")] = None,
) -> None:
    """Measure how the cost of unlearning grows with data, resolution, model, batch and ranks: exponents.

    Prints each curve with PASS or LOOK; a curve with LOOK does not change the exit code.
    """
    from bench.training_cost.unlearn import run_unlearn

    run_unlearn(json, device, quick, only or [], plot)


for each in (certificates, pool_agreement, pool_queue, ulira):
    app.command()(each)


@app.command()
def tables(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 and name what is out of date.")
    ] = False,
) -> None:
    """Render README.md and pages of docs/ from docs/templates/ and bench/results/; exit 1 if something is missing."""
    from bench.publish.tables import run_tables

    if not run_tables(check):
        raise typer.Exit(1)


@app.command()
def page(
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("bench.html"),
    results: Annotated[Path | None, typer.Option(help="Folder of result files.", show_default="bench/results")] = None,
) -> None:
    """Write every result file as a section of one HTML page that loads nothing: commands, machines, tables, plots."""
    from bench.publish.page import run_page
    from bench.publish.results import RESULTS

    run_page(out, results or RESULTS)


@app.command("all")
def all_(
    out: Annotated[Path, typer.Option(help="Folder for the result files and their page.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes: a smoke test.")] = False,
    real: Annotated[
        Path | None, typer.Option(help="Folder CLASS/FILE of real JPEGs, for `data`.", show_default=False)
    ] = None,
) -> None:
    """Run kernels, train, unlearn, retrain-cost and data, then page.

    Continue after a failure, then exit 1 and name it.
    """
    from bench.publish.run_all import run_all

    if run_all(out, quick, real):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
