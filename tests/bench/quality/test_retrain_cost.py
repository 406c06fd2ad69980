"""Methods beside a retrain: every second is accounted for, no model is compared with itself, runs are gone on with."""

from __future__ import annotations

import copy
import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_subject import toy_subject
from toys import tiny_vit
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness.cases import TINY, VIT_B, VIT_S
from bench.harness.measure import EnergyMeter
from bench.quality import retrain_cost
from bench.quality.retrain_cost import DIGITS, RETRAIN_SEED, Subject, plot, run_retrain_cost
from bench.quality.retrain_summary import print_task, summarise
from bench.training_cost import recipes
from bench.training_cost.recipes import RECIPES, Timed, measure, project, sizes_of
from engine.cli.demo import RECIPE
from engine.errors import UserError
from engine.evaluate import compare
from engine.jobs.task import Task
from engine.methods import list_methods
from engine.plan.work import RECIPES as PLANNED

pytestmark = pytest.mark.slow  # runs of the engine, in processes of their own

QUICK = ["max_steps=1", "batch_size=16", "precision=fp32"]
PRICE = 3.0
METHODS = ("finetune", "lethe", "random_labels", "retrain")


@pytest.fixture(scope="module", autouse=True)
def registry() -> Iterator[None]:
    """A few methods: what is tested does not depend on which."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain_cost, "list_methods", lambda: {name: list_methods()[name] for name in METHODS})
        yield


def run(subject: Subject, file: Path | None = None, seeds: int = 2, settings: list[str] = QUICK) -> dict[str, Any]:
    return run_retrain_cost([subject], seeds, settings, PRICE, file, None, projection=False)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return toy_subject(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def calls() -> list[tuple[str, dict[str, Any], bool, float]]:
    """(method, config, whether there was a run folder, seconds) of every run that the module's report took."""
    return []


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "cost.json"


@pytest.fixture(scope="module")
def report(subject: Subject, file: Path, calls: list[Any]) -> dict[str, Any]:
    unlearn = retrain_cost.unlearn

    def recorded(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = unlearn(*arguments, **options)
        seconds = time.perf_counter() - began
        calls.append((options["method"], options["config"], options["output_dir"] is not None, seconds))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain_cost, "unlearn", recorded)
        return run(subject, file)


def rows_of(report: dict[str, Any], method: str | None = None) -> list[dict[str, Any]]:
    return [row for row in report["tasks"]["toy"]["rows"] if method in (None, row["method"])]


def test_every_method_runs_once_a_seed_seed_by_seed_and_in_turn(
    report: dict[str, Any], calls: list[tuple[str, dict[str, Any], bool, float]]
) -> None:
    methods = list(METHODS)
    ran = [(row["method"], row["seed"]) for row in rows_of(report)]
    assert ran == [(m, 0) for m in methods] + [(m, 1) for m in (*methods[1:], methods[0])]
    seeds = [seed + RETRAIN_SEED if method == "retrain" else seed for method, seed in ran]
    assert [(method, config["seed"]) for method, config, *_ in calls] == [
        (m, s) for (m, _), s in zip(ran, seeds, strict=True)
    ]
    assert all(folder for _, _, folder, _ in calls), "a user's run writes checkpoints"
    for row, (*_, seconds) in zip(rows_of(report), calls, strict=True):
        assert seconds <= row["seconds"]["unlearn"] < seconds + 0.5, "the whole call is timed"
    # The recipe is the retrain's alone, the user's settings are everybody's.
    assert {method for method, config, *_ in calls if "epochs" in config} == {"retrain"}
    assert all(config["max_steps"] == 1 for _, config, *_ in calls)


def test_the_seconds_of_a_run_add_up_and_are_set_beside_the_retrain_of_its_seed(report: dict[str, Any]) -> None:
    retrains = {row["seed"]: row["seconds"]["total"] for row in rows_of(report, "retrain")}
    assert report["tasks"]["toy"]["retrain_seconds"] == list(retrains.values())
    for row in rows_of(report):
        seconds = row["seconds"]
        assert min(seconds["steps"], seconds["around"], seconds["evaluate"]) > 0
        assert seconds["prepare"] + seconds["steps"] + seconds["around"] == pytest.approx(seconds["unlearn"])
        assert sum(seconds["phases"].values()) == pytest.approx(seconds["prepare"] + seconds["steps"])
        assert seconds["unlearn"] + seconds["evaluate"] == pytest.approx(seconds["total"])
        assert row["share"] == pytest.approx(seconds["total"] / retrains[row["seed"]])
        assert row["money"] == pytest.approx(PRICE * seconds["total"] / 3600)
    assert len(set(retrains.values())) == 2
    assert set(rows_of(report, "lethe")[0]["seconds"]["phases"]) == {"forget", "retain"}
    teacher = [row["seconds"]["prepare"] for row in rows_of(report, "lethe")]
    assert min(teacher) > 2 * min(row["seconds"]["prepare"] for row in rows_of(report, "finetune"))
    assert rows_of(report, "lethe")[0]["samples_seen"] == {"forget": 14, "retain": 16}


def test_the_time_of_the_evaluation_decodes_images_anew(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    evaluator = Task.evaluator

    def counted(task: Task, options: Any) -> Any:
        made.append(options)
        return evaluator(task, options)

    monkeypatch.setattr(Task, "evaluator", counted)
    monkeypatch.setattr(retrain_cost, "list_methods", lambda: {k: list_methods()[k] for k in ("finetune", "retrain")})
    run(subject, seeds=1)
    assert len(made) == 2 + 1 + 2, "one for each reference, the untouched model and each run"
    assert all(options["precision"] == "fp32" for options in made)


def test_quality_is_what_lethe_evaluate_says(subject: Subject) -> None:
    task, options = Task.open(subject.data, subject.forget), {"precision": "fp32"}
    models = [tiny_vit(seed=seed) for seed in range(3)]
    found = [retrain_cost.quality_of(subject, task, options, model) for model in models]
    references = [{"name": str(number), **row} for number, row in enumerate(found[1:])]
    row = {"method": "lethe", "seed": 0, "collapsed": False, "seconds": {"total": 1.0}, **found[0]}
    entry = retrain_cost._entry(subject, task, found[0], references, [row], price=None)
    evaluator = task.evaluator(options)
    truth = compare(evaluator(models[0]), [evaluator(model) for model in models[1:]])
    (made,) = entry["rows"]
    assert made["gap"] == pytest.approx(truth["gap"])
    assert made["accuracy"] == truth["accuracy"]
    assert made["mia"] == {key: truth["mia"][key] for key in ("efficacy", "auc")}
    assert made["agreement"] == pytest.approx(truth["reference"]["agreement"]["top1"])
    assert entry["noise_floor"] == pytest.approx(truth["noise_floor"]["average"])
    assert entry["noise_floor_agreement"] == pytest.approx(truth["noise_floor"]["agreement"]["top1"])
    assert made["gap_to_floor"] == pytest.approx(truth["gap"]["average"] / truth["noise_floor"]["average"])
    assert entry["untouched"]["gap"] == made["gap"]
    assert (made["share"], made["money"], entry["summary"][0]["money"]) == (None, None, None)


def test_no_retrained_model_is_compared_with_itself(report: dict[str, Any], subject: Subject) -> None:
    task = Task.open(subject.data, subject.forget)
    rows, untouched = report["tasks"]["toy"]["rows"], report["tasks"]["toy"]["untouched"]
    found = {key: untouched[key] for key in ("accuracy", "mia", "weights_sha256", "forget_classes")}
    own = retrain_cost._entry(subject, task, found, [], rows, price=None)
    assert [reference["name"] for reference in own["references"]] == ["retrained, seed 0", "retrained, seed 1"]
    first, second = (row for row in own["rows"] if row["method"] == "retrain")
    assert first["gap"]["average"] == pytest.approx(own["noise_floor"])
    assert first["gap"] == second["gap"]
    assert first["agreement"] == pytest.approx(own["noise_floor_agreement"])
    one = retrain_cost._entry(subject, task, found, [], [row for row in rows if row["seed"] == 0], price=None)
    assert (one["noise_floor"], one["noise_floor_agreement"]) == (None, None)
    (alone,) = (row for row in one["rows"] if row["method"] == "retrain")
    assert (alone["gap"], alone["gap_to_floor"], alone["agreement"]) == (None, None, None)
    assert all(row["gap"] for row in one["rows"] if row["method"] != "retrain")
    # The same reference twice is no noise floor.
    twice = retrain_cost._entry(subject, task, found, [own["references"][0]] * 2, rows, price=None)
    assert twice["noise_floor"] is None


def test_the_summary_is_mean_and_half_range_over_seeds(report: dict[str, Any]) -> None:
    summary = {found["method"]: found for found in report["tasks"]["toy"]["summary"]}
    assert list(summary) == list(METHODS)
    for method, found in summary.items():
        rows = rows_of(report, method)
        for key, values in {
            "gap": [row["gap"]["average"] for row in rows],
            "seconds": [row["seconds"]["total"] for row in rows],
            "efficacy": [row["mia"]["efficacy"] for row in rows],
        }.items():
            low, high = sorted(values)
            assert found[key] == {
                "mean": pytest.approx((low + high) / 2),
                "half_range": pytest.approx((high - low) / 2),
            }
        assert (found["seeds"], found["joules"]) == (2, None)
    rows = copy.deepcopy(rows_of(report, "lethe"))
    rows[0]["collapsed"], rows[1]["collapsed"], rows[0]["gap"] = True, False, None
    (found,) = summarise(rows)
    assert (found["collapsed"], found["gap"]["half_range"]) == (1, 0)


def test_a_run_that_was_broken_off_goes_on(
    report: dict[str, Any], file: Path, subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(file.read_text()) == report
    cut, copied = copy.deepcopy(report), tmp_path / "cost.json"
    entry = cut["tasks"]["toy"]
    entry["rows"] = [row for row in entry["rows"] if (row["method"], row["seed"]) != ("finetune", 1)]
    copied.write_text(json.dumps(cut))
    again = run(subject, copied)
    assert capsys.readouterr().out.count(", seed ") == 1, "one run was missing"
    assert [row for row in rows_of(again) if (row["method"], row["seed"]) != ("finetune", 1)] == rows_of(report)[:-1]
    assert rows_of(again)[-1]["weights_sha256"] == rows_of(report)[-1]["weights_sha256"]
    with pytest.raises(UserError, match="a comparison of another options; name another file"):
        run(subject, copied, settings=["max_steps=2"])
    cut["tasks"]["toy"]["untouched"]["weights_sha256"] = "other"
    copied.write_text(json.dumps(cut))
    with pytest.raises(UserError, match="another original"):
        run(subject, copied)


def test_results_are_written_after_every_run(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlearn, ran = retrain_cost.unlearn, []

    def broken(*arguments: Any, **options: Any) -> Any:
        ran.append(options["method"])
        if len(ran) == 3:
            raise KeyboardInterrupt
        return unlearn(*arguments, **options)

    monkeypatch.setattr(retrain_cost, "unlearn", broken)
    with pytest.raises(KeyboardInterrupt):
        run(subject, tmp_path / "cost.json", seeds=1)
    kept = json.loads((tmp_path / "cost.json").read_text())["tasks"]["toy"]["rows"]
    assert [row["method"] for row in kept] == ran[:2]


def test_digits_train_their_original_and_retrains_serve_as_references(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retrain_cost, "list_methods", lambda: {k: list_methods()[k] for k in ("finetune", "retrain")})
    train, trained = retrain_cost.train, []

    def recorded(model: Any, samples: Any, **options: Any) -> Any:
        trained.append((len(samples), options["config"]))
        return train(model, samples, **options)

    monkeypatch.setattr(retrain_cost, "train", recorded)
    report = run_retrain_cost([DIGITS], 1, ["workers=0"], None, None, None, quick=True, projection=False)
    limits = {"workers": 0, "max_steps": 3}
    assert trained == [(1438, {**RECIPE, **limits, "seed": 0})]
    entry = report["tasks"]["digits"]
    assert [reference["name"] for reference in entry["references"]] == ["retrained, seed 0"]
    assert entry["rows"][0]["gap"]["average"] > 0
    assert entry["rows"][0]["samples_seen"]["retain"] == 3 * 50
    assert entry["samples"] == {"forget": 144, "retain": 1294, "test": 288}
    assert "noise floor: none with one reference" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_runs(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="unknown option 'retain_epochs'"):
        run(subject, settings=[*QUICK, "retain_epochs=1"])  # finetune has it and would run first
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="--set seed: every run has a seed of its own"):
        run(subject, settings=["seed=1"])
    with pytest.raises(UserError, match="--seeds 0: expected 1 or more"):
        run(subject, seeds=0)
    with pytest.raises(UserError, match="--price -1: expected 0 or more"):
        run_retrain_cost([subject], 1, QUICK, -1.0, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x", "--forget", "y"], "--data is missing"),
        (["--reference", "x"], "--reference is of a model"),
        (["--checkpoint", "x", "--data", "y", "--forget", "z", "--name", "digits"], "--name digits: is taken"),
        (["--no-digits", "--no-projection"], "--no-digits leaves nothing"),
    ],
)
def test_the_command_names_what_is_missing(arguments: list[str], message: str) -> None:
    answer = CliRunner().invoke(app, ["retrain-cost", *arguments])
    assert isinstance(answer.exception, UserError)
    assert message in str(answer.exception)


def test_the_command_measures_the_model_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(retrain_cost, "run_retrain_cost", lambda *arguments: given.append(arguments))
    command = ["retrain-cost", "--checkpoint", "c", "--data", "d", "--forget", "f", "--reference", "a"]
    options = ["--reference", "b", "--retrain-epochs", "7", "--quick", "--price", "2", "--plot", "p.png"]
    assert CliRunner().invoke(app, [*command, *options, "--no-projection"], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["retrain-cost", "--no-digits"], catch_exceptions=False).exit_code == 0
    assert given.pop() == ([], 3, [], None, None, None, False, True)
    expected = Subject(
        name="yardstick", data="d", forget="f", checkpoint="c", references=("a", "b"), recipe={"epochs": 7.0}
    )
    assert given == [([DIGITS, expected], 2, [], 2.0, None, Path("p.png"), True, False)]


def test_a_plot_is_written_for_each_task(report: dict[str, Any], tmp_path: Path) -> None:
    plot(report, tmp_path / "plots" / "cost.png")
    assert (tmp_path / "plots" / "cost.png").read_bytes().startswith(b"\x89PNG")
    plot({"tasks": dict.fromkeys(("a", "b"), report["tasks"]["toy"])}, tmp_path / "cost.png")
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["cost-a.png", "cost-b.png"]
    assert (tmp_path / "cost-a.png").read_bytes() != (tmp_path / "cost-b.png").read_bytes(), "each has its title"


def test_the_table_shows_quality_and_time_in_one_row(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_task("toy", report["tasks"]["toy"])
    lines = capsys.readouterr().out.splitlines()
    (finetune,) = (line for line in lines if "finetune" in line)
    (found,) = (found for found in report["tasks"]["toy"]["summary"] if found["method"] == "finetune")
    for number in (
        f"{100 * found['forget']['mean']:.1f} ± {100 * found['forget']['half_range']:.1f}",
        f"{found['gap']['mean']:.2f} ± {found['gap']['half_range']:.2f}",
        f"{100 * found['images_share']['mean']:.1f} ± {100 * found['images_share']['half_range']:.1f}",
    ):
        assert number in finetune
    assert "joules" not in "".join(lines), "no column for what nothing counted"


def counter(folder: Path, name: str, joules: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name)
    (folder / "max_energy_range_uj").write_text("1000000000")
    (folder / "energy_uj").write_text(str(round(joules * 1e6)))


def test_energy_of_a_cpu_is_what_its_packages_count(tmp_path: Path) -> None:
    counter(tmp_path / "intel-rapl:0", "package-0\n", 10)
    counter(tmp_path / "intel-rapl:0:0", "core\n", 5)  # a part of the package
    counter(tmp_path / "intel-rapl:1", "package-1\n", 990)
    counter(tmp_path / "intel-rapl:2", "psys\n", 1)  # the whole platform
    meter = EnergyMeter(torch.device("cpu"), tmp_path)
    assert (meter.source, meter.reason) == ("RAPL, 2 packages", None)
    joules = meter.start()
    counter(tmp_path / "intel-rapl:0", "package-0\n", 30)
    counter(tmp_path / "intel-rapl:0:0", "core\n", 100)
    counter(tmp_path / "intel-rapl:1", "package-1\n", 4)  # turned over at 1,000
    assert joules() == pytest.approx(20 + 14)


def test_energy_that_nothing_counts_is_not_made_up(tmp_path: Path) -> None:
    meter = EnergyMeter(torch.device("cpu"), tmp_path)
    assert (meter.source, meter.reason) == (None, "not reported: this machine shows no RAPL counters")
    assert meter.start()() is None


def test_energy_of_a_card_is_nvmls_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, asked = iter([7_000, 7_500, 9_750]), []

    def handle_by_uuid(uuid: bytes, _handle: Any) -> int:
        asked.append(uuid)
        return 0

    def energy(_handle: Any, millijoules: Any) -> int:
        millijoules._obj.value = next(counts)
        return 0

    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByUUID=handle_by_uuid, nvmlDeviceGetTotalEnergyConsumption=energy
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="12-34"))
    meter = EnergyMeter(torch.device("cuda:1"))
    assert asked == [b"GPU-12-34"]
    assert meter.start()() == pytest.approx(2.25)
    library.nvmlInit_v2 = lambda: 9
    assert EnergyMeter(torch.device("cuda")).reason == "not reported: NVML's nvmlInit_v2 says 9"


def test_recipes_are_those_of_the_plan_with_their_sources() -> None:
    assert [(recipe.epochs, recipe.source) for recipe in RECIPES] == [PLANNED["deit"], PLANNED["plain-vit"]]
    assert {(recipe.epochs, recipe.batch, recipe.resolution) for recipe in RECIPES} == {
        (300, 1024, 224),
        (90, 1024, 224),
    }
    sizes = sizes_of(RECIPES[0])
    assert (sizes.forget, sizes.retain, sizes.ranks) == (128_117, 1_153_050, 1)
    assert {VIT_S.name, VIT_B.name} == set(RECIPES[0].published_for), "names as in the list of cases"


def test_hours_are_images_over_the_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"forget": 80.0, "retain": 100.0}
    measured = {
        "model": VIT_S.name,
        "words": "w",
        "phases": {phase: {"seconds": [1.0], "images_per_second": rate} for phase, rate in rates.items()},
        "teacher_images_per_second": 40.0,
        "forward_images_per_second": 300.0,
        "watts": 500.0,
    }
    monkeypatch.setattr(recipes, "measure", lambda *_: measured)
    (entry,) = project([VIT_S], torch.device("cpu"), "fp32", Timed(batch=1, steps=1, warmup=0), 2.0)
    hours = {found["recipe"] or found["work"]: found for found in entry["hours"]}
    forget, retain, evaluated = 128_117, 1_153_050, 128_117 + 50_000 + 50_000
    deit = (300 * retain / 100 + evaluated / 300) / 3600
    lethe = forget / 40 + 2 * forget / 80 + 8 * retain / 100 + 2 * evaluated / 300
    watched = 500 / 300 * (2 + 8)
    assert hours["DeiT, 300 epochs"]["device_hours"] == pytest.approx(deit)
    assert hours["plain ViT, 90 epochs"]["epochs"] == {"retain": 90.0}
    assert hours["lethe"]["device_hours"] == pytest.approx((lethe + watched) / 3600)
    assert hours["lethe"]["epochs"] == {"forget": 2.0, "retain": 8.0}
    assert hours["finetune"]["epochs"] == {"retain": 10.0}
    assert hours["finetune"]["share"]["DeiT, 300 epochs"] == pytest.approx(hours["finetune"]["device_hours"] / deit)
    assert hours["lethe"]["money"] == pytest.approx(2 * hours["lethe"]["device_hours"])
    assert hours["lethe"]["kwh"] == pytest.approx(0.5 * hours["lethe"]["device_hours"])


def test_a_models_steps_are_measured_and_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(TINY, torch.device("cpu"), "fp32", Timed(batch=4, steps=3, warmup=1))
    for phase in found["phases"].values():
        assert len(phase["seconds"]) == 3
        assert phase["images_per_second"] == pytest.approx(4 / sorted(phase["seconds"])[1])
    assert min(found["teacher_images_per_second"], found["forward_images_per_second"]) > 0
    assert "projected from 3 measured steps of each stage at batch 4, fp32, on one CPU, 1 threads" in found["words"]
    (entry,) = project([TINY], torch.device("cpu"), "fp32", Timed(batch=4, steps=1, warmup=0), None)
    assert {(each["money"], each["kwh"]) for each in entry["hours"]} == {(None, None)}
    recipes.print_projection([entry])
    out = capsys.readouterr().out
    assert "projected from 1 measured steps" in out
    assert "DeiT, 300 epochs * " in out, "published for another model"
