"""Our methods beside other libraries': what these are handed, what is judged, and what is not done twice."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import few, tiny_vit
from typer.testing import CliRunner

from bench.__main__ import app
from bench.publish.sheets import peers_table
from bench.quality import method_peers, peer_libraries
from bench.quality.method_peers import comparisons, contenders_of, run_method_peers, verdict
from bench.quality.peer_libraries import PEERS, Images, Peer
from bench.quality.retrain_cost import Subject
from engine.data import Loader, open_source
from engine.errors import UserError
from engine.models.checkpoint import save_checkpoint, weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.run.setup import Run, RunOptions, set_up

BY_METHOD = {peer.method: peer for peer in PEERS}
SETTINGS = ["max_steps=1", "batch_size=20", "precision=fp32", "workers=0"]


def run_of(method: str, forget: int = 10, retain: int = 40, **options: Any) -> Run:
    train = open_source("digits").train
    config = {"batch_size": 20, "precision": "fp32", "workers": 0, **options}
    options = RunOptions(method=method, config=config)
    return set_up(tiny_vit(), few(train, forget), train.subset(range(100, 100 + retain)), options)


# --- what a library is handed -----------------------------------------------------------------------------------------


def test_images_are_those_of_our_loaders() -> None:
    samples = few(open_source("digits").train, 12)
    preprocessing = preprocessing_of(tiny_vit())
    (batch,) = Loader(samples, preprocessing, batch_size=12, workers=0).ordered()
    plain, indexed = Images(samples, preprocessing), Images(samples, preprocessing, indexed=True)
    assert torch.equal(torch.stack([image for image, _ in plain]), batch.images)
    assert [int(label) for _, label in plain] == batch.labels.tolist()
    assert [index for _, index, _ in indexed] == list(range(12))
    torch.manual_seed(0)
    mirrored = torch.stack([image for image, _ in Images(samples, preprocessing, augment="flip")])
    flipped = [torch.equal(mine, theirs.flip(-1)) for mine, theirs in zip(mirrored, batch.images, strict=True)]
    kept = [torch.equal(mine, theirs) for mine, theirs in zip(mirrored, batch.images, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < 12
    with pytest.raises(UserError, match="augment='crop': expected none or flip"):
        Images(samples, preprocessing, augment="crop")


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fabric:
        def __init__(self, accelerator: str, devices: Any) -> None:
            assert (accelerator, devices) == ("cpu", 1)

        def setup_dataloaders(self, *loaders: Any) -> Any:
            return loaders

    _planted(monkeypatch, "lightning.fabric", Fabric=Fabric)


def _planted(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> types.ModuleType:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules or end == len(parts):
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    vars(sys.modules[name]).update(attributes)
    return sys.modules[name]


def test_ssd_is_asked_for_the_weights_that_ours_would_choose(fabric: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's part, written from its equations: one sample a group, so that no group is left to chance."""

    def importance(model: nn.Module, loader: Any) -> list[torch.Tensor]:
        total = [torch.zeros_like(weight) for weight in model.parameters()]
        for images, index, labels in loader:
            assert images.shape == (1, 1, 8, 8)
            assert index.shape == labels.shape == (1,)
            loss = nn.functional.cross_entropy(model(images), labels)
            for each, gradient in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                each += gradient**2 / len(loader)
        return total

    def ssd(**given: Any) -> None:
        assert (given["num_gpus"], given["wandb_logging_flag"]) == (1, False)
        print("noise")
        model = given["model"]
        model.eval()
        on_forget = importance(model, given["forget_train_dataloader"])
        on_all = importance(model, given["full_train_dataloader"])
        with torch.no_grad():
            for weight, f, d in zip(model.parameters(), on_forget, on_all, strict=True):
                chosen = f > given["selection_weighting"] * d
                weight[chosen] *= (given["dampening_constant"] * d / f).clamp_max(1)[chosen]

    peer = BY_METHOD["ssd"]
    _planted(monkeypatch, peer.module, ssd=ssd)
    original = tiny_vit()
    run = run_of("ssd", 5, 15, fisher_batch_size=1)
    values = peer.equal(run)
    assert (values["dampening_constant"], values["batch_size"]) == (1.0, 1)
    theirs = peer.unlearned(original, run, values, "fp32")
    ours = run.train_engine.module
    with run.computing():
        run.method.edit(ours, run.phases[0])
    changed = differing = 0
    for (name, mine), other, before in zip(
        ours.named_parameters(), theirs.parameters(), original.parameters(), strict=True
    ):
        if "qkv.bias" not in name:  # ours looks at no key bias, which softmax does not see
            differing += int((~torch.isclose(mine, other, rtol=1e-4, atol=1e-6)).sum())
            changed += int((mine != before).sum())
    assert changed > 500
    assert differing <= 5, "sums in another order may choose otherwise at the very threshold, not elsewhere"
    assert peer.equal(run_of("ssd", alpha=3.0))["selection_weighting"] == 3.0


def test_scrub_has_our_values_and_both_have_one_rate(fabric: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    peer = BY_METHOD["scrub"]
    _planted(monkeypatch, peer.module, scrub=lambda **options: given.update(options))
    run = run_of("scrub", **peer.ours)
    peer.unlearned(tiny_vit(), run, peer.equal(run), "fp32")
    assert (given["sgda_epochs"], given["msteps"], given["kd_T"]) == (8, 2, 4.0)
    assert (given["alpha"], given["gamma"], given["smoothing"], given["sgda_weight_decay"]) == (0.001, 0.99, 0, 0)
    assert {phase.lr for phase in run.phases} == {given["sgda_learning_rate"]}
    assert [len(given[f"{kind}_train_dataloader"].dataset) for kind in ("forget", "retain")] == [10, 40]
    assert given["retain_train_dataloader"].batch_size == 20
    defaults = run_of("scrub")
    peer.unlearned(tiny_vit(), defaults, peer.defaults, "fp32")
    assert (given["msteps"], given["retain_train_dataloader"].batch_size) == (3, 128)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trainers of torchunlearn were made with, set up with and fitted on."""
    made: list[dict[str, Any]] = []

    class Trainer:
        def __init__(self, rmodel: nn.Module, **options: Any) -> None:
            self.rmodel, self.seen = rmodel, {"trainer": options}
            made.append(self.seen)

        def generate_optimizer(self, text: str, parameters: Any) -> torch.optim.Optimizer:
            self.seen["optimizer"] = text
            return torch.optim.SGD(parameters, lr=0.0)

        def setup(self, **options: Any) -> None:
            self.seen["setup"] = options

        def fit(self, **options: Any) -> None:
            self.seen["fit"] = options

    class SalUn(Trainer):
        def compute_saliency_mask(self, loader: Any) -> None:
            self.seen["mask"] = loader

    class RobModel(nn.Module):
        def __init__(self, model: nn.Module, n_classes: int) -> None:
            super().__init__()
            self.model = model
            assert n_classes == 10

    class MergedLoaders(dict):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return max(len(loader) for loader in self.values())

    _planted(monkeypatch, "torchunlearn", RobModel=RobModel)
    _planted(monkeypatch, "torchunlearn.unlearn", SalUn=SalUn, BadTeacher=Trainer)
    _planted(monkeypatch, "torchunlearn.utils.data", MergedLoaders=MergedLoaders)
    return made


def test_salun_minimises_our_loss_by_our_steps(merged: list[dict[str, Any]]) -> None:
    peer, run = BY_METHOD["salun"], run_of("salun")
    peer.unlearned(tiny_vit(), run, peer.equal(run), "fp32")
    (seen,) = merged
    assert seen["trainer"] == {"retain_lambda": 0.8, "forget_lambda": 0.2, "saliency_threshold": 0.5}
    loaders = seen["fit"]["train_loaders"]
    assert {name: (loader.batch_size, len(loader.dataset)) for name, loader in loaders.items()} == {
        "Retain": (16, 40),
        "Forget": (4, 10),
    }
    assert len(loaders) == run.loader_of(0, run.phases[0]).steps()
    assert len(seen["mask"].dataset) == 10
    assert seen["fit"]["n_epochs"] == 5
    assert seen["optimizer"] == f"AdamW(lr={run.phases[0].lr!r}, weight_decay=0.05)"
    assert seen["setup"]["clip_grad_norm"] == 1.0
    assert seen["setup"]["scheduler_type"] == "Iter"
    assert seen["setup"]["scheduler"].total_steps == 5 * 3 + 1
    peer.unlearned(tiny_vit(), run, peer.defaults, "fp32")
    assert (merged[1]["trainer"], set(merged[1]["setup"])) == ({}, {"optimizer", "clip_grad_norm"})
    assert merged[1]["optimizer"].startswith("SGD(lr=0.01")


def test_the_bad_teacher_has_our_part_of_the_retained_samples(merged: list[dict[str, Any]]) -> None:
    peer, run = BY_METHOD["bad_teacher"], run_of("bad_teacher")
    for values in (peer.equal(run), peer.defaults):
        peer.unlearned(tiny_vit(), run, values, "fp32")
    equal, defaults = merged
    assert equal["trainer"]["temperature"] == 1.0
    assert equal["trainer"]["forget_lambda"] == pytest.approx(10 / (10 + 12))
    assert [len(seen["fit"]["train_loaders"]["Retain"].dataset) for seen in merged] == [12, 40]
    assert "mask" not in equal
    assert defaults["fit"]["n_epochs"] == 5


def test_a_library_gets_a_copy_and_draws_by_the_seed() -> None:
    drawn: list[torch.Tensor] = []

    def call(module: Any, model: nn.Module, run: Run, values: dict[str, Any]) -> None:
        drawn.append(torch.rand(3))
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()

    peer = Peer(
        method="x",
        library="y",
        install="z",
        module="math",
        defaults={},
        equal=lambda run: {},
        ours={},
        differs="",
        call=call,
    )
    original = tiny_vit()
    before, state = copy.deepcopy(original.state_dict()), torch.random.get_rng_state()
    model = peer.unlearned(original, run_of("finetune", seed=4), {}, "fp32")
    peer.unlearned(original, run_of("finetune", seed=4), {}, "fp32")
    peer.unlearned(original, run_of("finetune", seed=5), {}, "fp32")
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(weight.any() for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert not model.training


def test_a_library_computes_in_our_precision() -> None:
    images = torch.rand(4, 1, 8, 8)
    plain, half = (peer_libraries._InPrecision(tiny_vit(), precision)(images) for precision in ("fp32", "bf16"))
    assert plain.dtype == half.dtype == torch.float32
    assert torch.equal(plain, tiny_vit()(images))
    assert 0 < (plain - half).abs().max() < 0.1


# --- what is judged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "noise", "expected"),
    [(1.0, 1.5, "within noise"), (-1.5, 1.5, "within noise"), (-2, 1.5, "better"), (2, 1.5, "worse")],
)
def test_a_difference_beyond_the_noise_is_one(difference: float, noise: float, expected: str) -> None:
    assert verdict(difference, noise) == expected


def row(contender: str, setting: list[str], seed: int, gap: float, seconds: float) -> dict[str, Any]:
    return {
        "method": "salun", "contender": contender, "settings": setting, "seed": seed, "seconds": 1.0,
        "cpu_seconds": seconds,
        "gap": {"average": gap}, "accuracy": {"forget": 0.5, "retain": 0.9, "test": 0.6}, "mia": {"efficacy": 0.4},
        "agreement": 0.7,
    }  # fmt: skip


def test_noise_is_the_floor_and_the_spread_over_common_seeds() -> None:
    ours = [row("ours", ["equal", "defaults"], seed, gap, 2) for seed, gap in enumerate((3.0, 4.0, 9.0))]
    theirs = [row("torchunlearn", ["equal"], seed, gap, 2 + 4 * seed) for seed, gap in enumerate((5.0, 8.0))]
    (found,) = comparisons([*ours, *theirs], 0.5)
    assert (found["method"], found["setting"], found["seeds"]) == ("salun", "equal", 2)
    assert found["differs"] == BY_METHOD["salun"].differs
    assert found["ours"]["gap"] == {"mean": 3.5, "half_range": 0.5}
    assert found["theirs"]["gap"] == {"mean": 6.5, "half_range": 1.5}
    assert found["times"] == {"mean": 2.0, "half_range": 1.0}
    assert found["theirs"]["seconds"] == {"mean": 4.0, "half_range": 2.0}
    on_gpu = [{**each, "seconds": each["cpu_seconds"] ** 2, "cpu_seconds": None} for each in (*ours, *theirs)]
    assert comparisons(on_gpu, 0.5)[0]["times"] == {"mean": 5.0, "half_range": 4.0}
    assert (found["difference"], found["noise"], found["verdict"]) == (-3.0, 2.0, "better")
    (one,) = comparisons([*ours, theirs[0]], None)
    assert (one["noise"], one["verdict"]) == (0.0, "better")
    more = row("torchunlearn", ["defaults"], 0, 3.5, 1)
    assert [each["setting"] for each in comparisons([*ours, *theirs, more], 0.5)] == ["equal", "defaults"]
    sheet = peers_table({"tasks": {"digits": {"comparisons": [found], "untouched": {"gap": {"average": 4.0}}}}})
    assert list(sheet.rows[0]) == [
        "digits, salun, equal", "torchunlearn", "2", "3.50 ± 0.50", "6.50 ± 1.50", "better", "50.0 / 50.0",
        "60.0 / 60.0", "40.0 / 40.0", "70.0 / 70.0", "2.0 / 4.0", "2.00 ± 1.00",
    ]  # fmt: skip
    assert len(sheet.columns) == len(sheet.rows[0])


def test_ours_runs_once_where_both_settings_are_the_same_to_it() -> None:
    assert [each.settings for each in contenders_of(BY_METHOD["ssd"])] == [
        ("equal", "defaults"), ("equal",), ("defaults",)
    ]  # fmt: skip
    ours = [each for each in contenders_of(BY_METHOD["scrub"]) if each.name == "ours"]
    assert [(each.settings, bool(each.values)) for each in ours] == [(("equal",), True), (("defaults",), False)]


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("peers")
    names = [str(save_checkpoint(tiny_vit(seed=seed), folder / str(seed))) for seed in range(3)]
    return Subject(name="toy", data="digits", forget="random:0.01@0", checkpoint=names[0], references=tuple(names[1:]))


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that looks at the weights alone; the true one is that of `python -m bench leaderboard`."""

    def quality_of(subject: Subject, task: Any, options: Any, model: nn.Module) -> dict[str, Any]:
        sha256 = weights_sha256(model)
        share = int(sha256[:4], 16) / 16**4
        return {
            "accuracy": dict.fromkeys(("forget", "retain", "test"), share),
            "mia": {"efficacy": 1 - share, "auc": 0.5},
            "weights_sha256": sha256,
            "forget_classes": " ".join(sha256[:3]),
        }

    monkeypatch.setattr(method_peers, "quality_of", quality_of)


def _fake(called: list[tuple[int, Any]], **changed: Any) -> Peer:
    def call(module: Any, model: nn.Module, run: Run, values: dict[str, Any]) -> None:
        called.append((run.method.context.run.seed, values))
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)

    options: dict[str, Any] = {
        "method": "finetune", "library": "fake", "install": "install it", "module": "math", "defaults": {"epochs": 7},
        "equal": lambda run: {"lr": run.phases[0].lr}, "ours": {}, "differs": "all", "call": call,
    }  # fmt: skip
    return Peer(**{**options, **changed})


def test_a_run_and_one_that_goes_on(
    cheap: None, subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[tuple[int, Any]] = []
    gone = _fake([], library="gone", module="no_such_library", method="retrain")
    file = tmp_path / "peers.json"

    def run(settings: list[str] = SETTINGS, **options: Any) -> Any:
        return run_method_peers([subject], 2, settings, [], file, peers=[_fake(called), gone], **options)

    report = run()
    shown = capsys.readouterr().out
    assert "gone is left out: No module named 'no_such_library'; install it" in shown.replace("\n", " ")
    assert report["peers"]["gone"]["reason"].startswith("No module")
    assert report["peers"]["fake"] == {"version": None, "reason": None}
    entry = report["tasks"]["toy"]
    order = [(each["seed"], each["contender"], *each["settings"]) for each in entry["rows"]]
    ours, equal, defaults = ("ours", "equal", "defaults"), ("fake", "equal"), ("fake", "defaults")
    assert order == [(0, *ours), (0, *equal), (0, *defaults), (1, *equal), (1, *defaults), (1, *ours)]
    assert [seed for seed, _ in called] == [0, 0, 1, 1]
    assert [values for _, values in called[:2]] == [entry["rows"][1]["values"], {"epochs": 7}]
    assert entry["rows"][1]["values"]["lr"] > 0
    assert entry["rows"][1]["weights_sha256"] == entry["rows"][2]["weights_sha256"]
    assert all(each["seconds"] > 0 and each["cpu_seconds"] > 0 and each["gap"]["average"] > 0 for each in entry["rows"])
    assert [each["collapsed"] is None for each in entry["rows"][:2]] == [False, True]
    assert [each["setting"] for each in entry["comparisons"]] == ["equal", "defaults"]
    assert entry["noise_floor"] > 0
    assert "within noise" in shown or "better" in shown or "worse" in shown
    cut = copy.deepcopy(report)
    del cut["tasks"]["toy"]["rows"][2]
    file.write_text(json.dumps(cut))
    called.clear()
    again = run()
    assert called == [(0, {"epochs": 7})]
    assert len(again["tasks"]["toy"]["rows"]) == 6
    with pytest.raises(UserError, match="holds peers of another options"):
        run(["max_steps=2"])


def test_one_setting_may_be_measured_alone(cheap: None, subject: Subject, tmp_path: Path) -> None:
    peers = [_fake([]), _fake([], method="gradient_ascent", ours={"lr": 1e-6})]

    def settings_of(method: str, terms: list[str]) -> list[tuple[str, ...]]:
        report = run_method_peers([subject], 1, SETTINGS, [], tmp_path / "peers.json", peers=peers, terms=terms)
        rows = report["tasks"]["toy"]["rows"]
        return [(each["contender"], *each["settings"]) for each in rows if each["method"] == method]

    equal = [("ours", "equal"), ("fake", "equal")]
    assert settings_of("gradient_ascent", ["equal"]) == equal
    assert settings_of("finetune", ["equal"]) == [("ours", "equal", "defaults"), ("fake", "equal")]
    assert settings_of("gradient_ascent", []) == [*equal, ("ours", "defaults"), ("fake", "defaults")]


def test_without_references_two_are_trained_once(
    cheap: None, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    unlearn = method_peers.unlearn

    def recorded(*arguments: Any, **options: Any) -> Any:
        trained.append((options["method"], options["config"]["seed"]))
        return unlearn(*arguments, **options)

    monkeypatch.setattr(method_peers, "unlearn", recorded)
    alone = Subject(name="toy", data="digits", forget="random:0.01@0", checkpoint=subject.checkpoint)
    file = tmp_path / "peers.json"
    report = run_method_peers([alone], 1, SETTINGS, [], file, peers=[_fake([])])
    assert trained == [("retrain", 1000), ("retrain", 1001), ("finetune", 0)]
    assert [each["name"] for each in report["tasks"]["toy"]["references"]] == ["retrained, seed 0", "retrained, seed 1"]
    again = run_method_peers([alone], 1, SETTINGS, [], file, peers=[_fake([])])
    assert len(trained) == 3
    assert again["tasks"] == report["tasks"]
    both = [_fake([]), _fake([], method="gradient_ascent")]
    other = run_method_peers([alone], 1, SETTINGS, ["gradient_ascent"], file, peers=both)
    compared = [(each["method"], each["setting"]) for each in other["tasks"]["toy"]["comparisons"]]
    assert compared == [(name, each) for name in ("finetune", "gradient_ascent") for each in ("equal", "defaults")]


def test_with_no_library_there_is_nothing_to_run(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_method_peers([subject], 1, [], [], None, peers=[_fake([], module="no_such_library")])
    assert report["tasks"] == {}
    assert "fake is left out" in capsys.readouterr().out


def test_the_reason_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer.module, None)
        with pytest.raises(ImportError, match=r"; pip install --no-deps .*, then "):
            peer.load()


def test_what_is_wrong_is_said_before_anything_runs(subject: Subject) -> None:
    for arguments, message in (
        ((0, [], []), "--seeds 0: expected 1 or more"),
        ((1, ["seed=1"], []), "--set seed: every run has a seed of its own"),
        ((1, [], ["salunn"]), "--method 'salunn': no compared library has this method; did you mean 'salun'"),
    ):
        with pytest.raises(UserError, match=message):
            run_method_peers([subject], *arguments, None)
    with pytest.raises(UserError, match="--setting 'equals': expected equal or defaults"):
        run_method_peers([subject], 1, [], [], None, terms=["equals"])


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(method_peers, "run_method_peers", lambda *arguments, terms: given.append((*arguments, terms)))
    command = ["peers", "--no-digits", "--checkpoint", "c", "--data", "d", "--forget", "f", "--reference", "a"]
    assert (
        CliRunner().invoke(app, [*command, "--method", "ssd", "--setting", "equal"], catch_exceptions=False).exit_code
        == 0
    )
    assert CliRunner().invoke(app, ["peers", "--quick"], catch_exceptions=False).exit_code == 0
    subjects, *rest = given[0]
    assert [(each.checkpoint, each.references) for each in subjects] == [("c", ("a",))]
    assert rest == [3, [], ["ssd"], None, False, ["equal"]]
    assert ([each.name for each in given[1][0]], given[1][1], *given[1][-2:]) == (["digits"], 1, True, [])
