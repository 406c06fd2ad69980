"""unlearn() and train(): seeds, precision, history, guard, resume, run folders."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import few, tiny_vit

import engine
from engine.config import DEFAULT_METHOD
from engine.data import Samples, open_source
from engine.errors import RunStopped, UserError
from engine.methods.lethe import Lethe
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.run.trainer import Trainer
from engine.run.unlearn import train, unlearn

SHORT = {"forget_epochs": 1.0, "retain_epochs": 2.0, "batch_size": 16, "precision": "fp32"}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return open_source("digits").train


def run(samples: Samples, model: Any = None, **options: Any) -> engine.UnlearnResult:
    keywords = {
        key: options.pop(key)
        for key in ("output_dir", "resume", "overwrite", "inplace", "validation", "method", "progress", "finalize")
        if key in options
    }
    return unlearn(
        model or tiny_vit(),
        few(samples, 20),
        samples.subset(range(20, 84)),
        config={**SHORT, **options},
        **{"method": "lethe", **keywords},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(samples: Samples, precision: str) -> None:
    first, second, other = (run(samples, seed=seed, precision=precision) for seed in (1, 1, 2))
    assert weights_sha256(first.model) == weights_sha256(second.model) != weights_sha256(other.model)


def test_dropout_is_repeatable_and_the_global_generator_untouched(samples: Samples) -> None:
    model = tiny_vit(drop_path_rate=0.5)
    torch.manual_seed(3)
    first = run(samples, model)
    after = torch.rand(1)
    torch.manual_seed(4)
    second = run(samples, model)
    assert weights_sha256(first.model) == weights_sha256(second.model)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_worker_processes_change_nothing(samples: Samples) -> None:
    assert weights_sha256(run(samples, workers=2).model) == weights_sha256(run(samples, workers=0).model)


def test_history_counts_and_seconds(samples: Samples) -> None:
    seen = []
    result = run(samples, progress=lambda *call: seen.append(call))
    steps = [row for row in result.history if "grad_norm" in row]
    assert [row["phase"] for row in steps] == ["forget"] * 2 + ["retain"] * 8
    assert [row["step"] for row in steps] == [0, 1, *range(8)]
    assert result.samples_seen == {"forget": 20, "retain": 128}
    parts = sum(result.seconds[key] for key in ("prepare", "forget_phase", "retain_phase"))
    assert parts > 0
    assert result.seconds["unlearn"] >= result.seconds["retain_phase"]
    assert seen[-1][:3] == ("retain", 8, 8)
    assert 0 <= result.watched["after"] <= 1


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1.0, 4), (1.25, 5), (0.01, 1)])
def test_fractions_of_an_epoch(samples: Samples, epochs: float, steps: int) -> None:
    result = run(samples, forget_epochs=0, retain_epochs=epochs)
    assert len([row for row in result.history if "grad_norm" in row]) == steps


def test_max_steps_bounds_each_phase(samples: Samples) -> None:
    result = run(samples, max_steps=1)
    assert [row["phase"] for row in result.history if "grad_norm" in row] == ["forget", "retain"]


def test_gradients_are_clipped(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    result = run(samples, grad_clip=0.01)
    assert max(norms) <= 0.0101
    assert (
        max(row["grad_norm"] for row in result.history if "grad_norm" in row) > 0.0101
    )  # what is logged is the norm before


def test_inplace_changes_the_callers_model(samples: Samples) -> None:
    model = tiny_vit()
    before = weights_sha256(model)
    result = run(samples, model, inplace=True)
    assert result.model is model
    assert weights_sha256(model) != before


def test_inplace_retrain_ends_in_the_callers_model(samples: Samples) -> None:
    model = tiny_vit()
    result = unlearn(model, few(samples, 4), few(samples, 20), method="retrain", config={"max_steps": 1}, inplace=True)
    expected = unlearn(tiny_vit(), few(samples, 4), few(samples, 20), method="retrain", config={"max_steps": 1})
    assert result.model is model
    assert weights_sha256(model) == weights_sha256(expected.model)


def test_a_checkpoint_folder_and_the_model_in_it_give_the_same(
    samples: Samples, checkpoint: Path, model: torch.nn.Module
) -> None:
    assert weights_sha256(run(samples, str(checkpoint)).model) == weights_sha256(run(samples, model).model)


def test_a_bare_module_of_timm_works_in_memory(samples: Samples) -> None:
    from timm.models.vision_transformer import VisionTransformer

    bare = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    assert run(samples, bare, max_steps=1).output_dir is None


# The guard


def trained(samples: Samples) -> torch.nn.Module:
    return train(
        tiny_vit(), few(samples, 400), config={"epochs": 25, "lr": 5e-3, "batch_size": 40, "precision": "fp32"}
    ).model


@pytest.fixture(scope="module")
def good_model(samples: Samples) -> torch.nn.Module:
    return trained(samples)


def test_a_collapse_is_seen_taken_back_and_reported(
    samples: Samples, good_model: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    validation = samples.subset(range(400, 600))
    with caplog.at_level(logging.WARNING):
        result = run(
            samples,
            good_model,
            validation=validation,
            forget_lr=0.05,
            forget_epochs=8.0,
            retain_epochs=0,
            collapse_drop=20.0,
        )
    (event,) = [e for e in result.events if e.get("phase") == "forget"]
    assert event["event"] == "collapse"
    assert event["watched_accuracy"] < result.watched["before"] - 0.2
    assert "collapse in phase forget" in caplog.text
    # Back to the last good weights: the run ends no worse than the guard allows, and before its 16 steps.
    assert result.watched["after"] >= result.watched["before"] - 0.2
    assert len([row for row in result.history if "grad_norm" in row]) < 16


def test_a_collapse_that_the_guard_may_not_stop_is_still_reported(
    samples: Samples, good_model: torch.nn.Module
) -> None:
    result = run(samples, good_model, forget_lr=0.05, forget_epochs=8.0, retain_epochs=0, collapse_drop=100.0)
    assert result.collapsed
    assert result.events[-1]["at"] == "end"


@pytest.mark.parametrize("method", ["lethe", DEFAULT_METHOD])
def test_the_defaults_do_not_collapse(samples: Samples, good_model: torch.nn.Module, method: str) -> None:
    """Default rates and epochs, on what the model was trained on; watched on samples that it never saw."""
    forget, retain, validation = few(samples, 40), samples.subset(range(40, 400)), samples.subset(range(400, 800))
    config = {"precision": "fp32", "batch_size": 40}
    result = unlearn(good_model, forget, retain, method=method, validation=validation, config=config)
    assert not result.collapsed
    assert result.events == []


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_with_step_and_term(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.methods.lethe import Lethe

    honest, calls = Lethe.loss, []

    def poisoned(self: Any, model: Any, batch: Any, phase: Any) -> Any:
        calls.append(phase.name)
        terms = honest(self, model, batch, phase)
        return {k: v * float("nan") for k, v in terms.items()} if calls.count("retain") == 6 else terms

    good = run(samples, retain_epochs=1.0, output_dir=tmp_path / "good")
    monkeypatch.setattr(Lethe, "loss", poisoned)
    with pytest.raises(RunStopped, match=r"phase retain, step 5: retain_ce is not finite.*last_good"):
        run(samples, output_dir=tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last_good")  # opens: its weights are finite
    assert weights_sha256(last) != weights_sha256(tiny_vit())
    assert good.output_dir is not None
    assert not (tmp_path / "run" / "model.safetensors").exists()
    steps = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert all("NaN" not in json.dumps(row) for row in steps)


# Run folders


def test_the_run_folder_holds_config_history_and_a_checkpoint_that_timm_opens(samples: Samples, tmp_path: Path) -> None:
    import timm

    result = run(samples, output_dir=tmp_path / "run", seed=7)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.json",
        "config.yaml",
        "history.jsonl",
        "model.safetensors",
    ]
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "seed: 7" in config
    assert "forget_lr: null" in config
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    opened = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(opened(images), result.model(images))


def test_a_folder_that_holds_a_run_is_not_written_over(samples: Samples, tmp_path: Path) -> None:
    run(samples, output_dir=tmp_path / "run", max_steps=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=r"holds another run .*--resume.*--overwrite"):
        run(samples, output_dir=tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match="finished run"):
        run(samples, output_dir=tmp_path / "run", max_steps=1, resume=True)
    with pytest.raises(UserError, match="not both"):
        run(samples, output_dir=tmp_path / "run", max_steps=1, resume=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    run(samples, output_dir=tmp_path / "run", max_steps=2, overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_folder_with_other_files_is_left_alone(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that are not a run's"):
            run(samples, output_dir=tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(samples, output_dir=tmp_path / "file")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_wrong_use_writes_nothing(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to forget"):
        unlearn(tiny_vit(), few(samples, 0), few(samples, 20), output_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"has label .* but the model's head has 3 classes"):
        unlearn(tiny_vit(num_classes=3), few(samples, 20), few(samples, 20), output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="no samples"):
        unlearn(tiny_vit(), few(samples, 20), few(samples, 0), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _Killed(BaseException):
    pass


def cut_short(samples: Samples, folder: Path, model: Any = None, checkpoints: int = 1, **options: Any) -> Path:
    """A run that dies right after some of its checkpoints, with a row in its history that no checkpoint covers."""
    keep, kept = Trainer._keep, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        kept.append(1)
        if len(kept) == checkpoints:
            self._record([{"phase": "retain", "step": 99, "epoch": 9}])
            raise _Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_keep", killed)
        with pytest.raises(_Killed):
            run(samples, model, output_dir=folder, **options)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"checkpoint_every": 1}, marks=pytest.mark.slow),
        {"checkpoint_every": 3, "accumulation_steps": 2},
    ],
)
@pytest.mark.parametrize("checkpoints", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_a_killed_run_resumes_to_the_same_bits(
    samples: Samples, tmp_path: Path, checkpoints: int, options: dict[str, Any]
) -> None:
    model = tiny_vit(drop_path_rate=0.2)
    options = {"forget_epochs": 2.0, "batch_size": 8, "retain_epochs": 3.0, **options}
    whole = run(samples, model, output_dir=tmp_path / "whole", **options)
    cut = cut_short(samples, tmp_path / "cut", model, checkpoints, **options)
    with pytest.raises(UserError, match=r"another configuration \(seed: 0 before, 5 now\)"):
        run(samples, model, output_dir=cut, resume=True, **options, seed=5)
    resumed = run(samples, model, output_dir=cut, resume=True, **options)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert (cut / "history.jsonl").read_text() == (tmp_path / "whole" / "history.jsonl").read_text()
    assert resumed.samples_seen == whole.samples_seen
    assert resumed.watched == whole.watched
    assert not (cut / "resume").exists()


@pytest.mark.slow
def test_a_collapse_after_resuming_goes_back_as_far_as_it_would_have(samples: Samples, tmp_path: Path) -> None:
    """The last good weights lie before the checkpoint that the run is resumed from."""
    options = {"forget_epochs": 4.0, "batch_size": 4, "forget_lr": 0.05, "collapse_drop": 1.0, "checkpoint_every": 1}
    model = train(tiny_vit(), samples.subset(range(84)), config={"epochs": 20.0, "lr": 3e-3, "batch_size": 16}).model
    whole = run(samples, model, output_dir=tmp_path / "whole", **options)
    (collapse,) = (event for event in whole.events if "back_to_step" in event)
    checkpoints = collapse["step"]  # the one before the check that finds the collapse
    assert collapse["back_to_step"] < checkpoints
    cut = cut_short(samples, tmp_path / "cut", model, checkpoints, **options)
    resumed = run(samples, model, output_dir=cut, resume=True, **options)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)


def test_a_resumed_run_takes_over_what_was_prepared(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = cut_short(samples, tmp_path / "cut", checkpoint_every=1, batch_size=8)
    monkeypatch.setattr(Lethe, "teacher", lambda self, batch: pytest.fail("the original ran again"))
    run(samples, output_dir=cut, resume=True, checkpoint_every=1, batch_size=8)


def test_a_run_killed_while_it_is_finalized_does_that_again(samples: Samples, tmp_path: Path) -> None:
    def dies(result: engine.UnlearnResult) -> None:
        raise _Killed

    seen = []
    with pytest.raises(_Killed):
        run(samples, output_dir=tmp_path / "cut", finalize=dies)
    resumed = run(samples, output_dir=tmp_path / "cut", resume=True, finalize=lambda r: seen.append(r.output_dir))
    assert seen == [tmp_path / "cut"]
    assert weights_sha256(resumed.model) == weights_sha256(run(samples).model)
    assert [row["step"] for row in resumed.history if "lr" in row] == [0, 1, *range(8)]


def test_resuming_nothing_and_a_finished_run_are_errors(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no run to resume"):
        run(samples, output_dir=tmp_path / "run", resume=True)
    run(samples, output_dir=tmp_path / "done", max_steps=1)
    with pytest.raises(UserError, match="holds a finished run"):
        run(samples, output_dir=tmp_path / "done", max_steps=1, resume=True)


@pytest.mark.parametrize(
    ("name", "contents"),
    [("current.json", b"{"), ("current.json", b"[]"), ("state.pt", None), ("model.pt", None), ("model.pt", b"PK cut")],
)
def test_a_damaged_checkpoint_is_named(samples: Samples, tmp_path: Path, name: str, contents: bytes | None) -> None:
    folder = cut_short(samples, tmp_path / "run")
    (path,) = (folder / "resume").rglob(name)
    path.write_bytes(contents) if contents is not None else path.unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is (missing or )?damaged; start again"):
        run(samples, output_dir=folder, resume=True)


def test_devices_that_are_not_here(samples: Samples) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda': 0 CUDA devices were found"):
            run(samples, device="cuda")
    with pytest.raises(UserError, match="expected auto, cpu, cuda"):
        run(samples, device="gpu")


def test_swin_goes_through_the_whole_loop(tmp_path: Path, samples: Samples) -> None:
    from engine.models.spec import ModelSpec

    spec = ModelSpec(
        architecture="swin_tiny_patch4_window7_224",
        num_classes=10,
        pretrained_cfg={},
        model_args={"img_size": 56, "in_chans": 1, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]},
    )
    result = unlearn(
        spec.build(seed=0),
        few(samples, 8),
        few(samples, 16),
        method="lethe",
        config={"max_steps": 1, "batch_size": 8},
        output_dir=tmp_path / "run",
    )
    assert result.samples_seen == {"forget": 8, "retain": 8}


def test_training_learns_digits(samples: Samples, good_model: torch.nn.Module, tmp_path: Path) -> None:
    save_checkpoint(good_model, tmp_path / "c")
    result = train(load_checkpoint(tmp_path / "c"), few(samples, 100), config={"max_steps": 1})
    assert result.accuracy(few(samples, 50)) <= 1
    from engine.data import Loader
    from engine.models.predict import predict

    held_out = Loader(samples.subset(range(400, 700)), preprocessing_of(good_model), batch_size=100)
    assert predict(good_model, held_out).accuracy > 0.5  # chance is 0.1


@pytest.mark.parametrize("negatives", ["paired", pytest.param("in_batch", marks=pytest.mark.slow)])
def test_triton_and_eager_give_the_same_weights(
    samples: Samples, negatives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the forget stage, where the kernels run. AdamW divides the key bias' gradient, which is zero but for its
    rounding, by its own size, so a retain stage would grow any difference, one between two thread counts too."""
    options = {"forget_epochs": 1.0, "retain_epochs": 0.0, "negatives": negatives}
    eager = run(samples, kernels={"backend": "eager"}, **options).model.state_dict()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = run(samples, kernels={"backend": "triton"}, **options).model.state_dict()
    start = tiny_vit().state_dict()
    assert max((eager[key] - start[key]).abs().max() for key in eager) > 1e-4
    for key, weight in eager.items():
        torch.testing.assert_close(triton[key], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_run_ends_where_a_plain_one_does_and_gives_back_a_plain_model(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module, compiled = torch.nn.Module.compile, []
    # The inductor would spend half a minute on code for two blocks; what is captured is the same.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: (compiled.append(self), compile_module(self, backend="aot_eager"))
    )
    plain, other = (run(samples, compile=compile).model for compile in (False, True))
    assert compiled == [other]
    assert other._compiled_call_impl is None
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=0, atol=1e-5)


def test_compile_is_refused_beside_deepspeed(samples: Samples) -> None:
    pytest.importorskip("deepspeed", reason="the extra distributed is not installed")
    with pytest.raises(UserError, match="compile=true"):
        unlearn(
            tiny_vit(),
            few(samples, 20),
            samples,
            method="lethe",
            config={"compile": True, "device": "cpu"},
            deepspeed={},
        )
