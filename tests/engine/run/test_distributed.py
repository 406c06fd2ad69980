"""Two ranks through DeepSpeed against one process in plain torch: the same mathematics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import CASES, EQUAL, LETHE, STAGES, data, run
from toys import tiny_vit

from engine.config import RunConfig
from engine.data import open_source
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.run.folder import RunFolder
from engine.run.setup import _check_ranks, _resolve_zero
from engine.run.unlearn import train
from engine.run.zero import read_deepspeed, resolve_deepspeed
from engine.runtime.process_group import ProcessGroup

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of all cases, each of two ranks; one launch runs them, since starting takes as long as the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    pytest.importorskip("deepspeed", reason="the extra `distributed` is not installed")
    samples = open_source("digits").train.subset(range(85))
    config = {"epochs": 15.0, "lr": 3e-3, "batch_size": 16, "precision": "fp32"}
    save_checkpoint(train(tiny_vit(), samples, config=config).model, folder / "trained")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    script = ["--rdzv_endpoint", "localhost:0", str(ROOT / "tests" / "support" / "ranks.py"), str(folder), *CASES]
    done = subprocess.run(
        [sys.executable, *launcher, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def alone(folder: Path, name: str, options: dict[str, Any]) -> Path:
    """Return the run folder of a case on one process, which is run at the first call."""
    done = folder / f"alone_{name}"
    if not done.exists():
        run(done, None, 16, **{k: v for k, v in options.items() if k != "teacher"})
    return done


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def distance(first: Path, second: Path) -> float:
    """The largest relative difference of a weight tensor, by its norm.

    Two units in the last place of 1.0 a weight are rounding and are left out: AdamW divides a gradient by its size, so
    the rounding of a tensor that is almost zero (a bias of norm 0.03) is as large as that of any other. With torch 2.14
    that alone is 1.3e-5 of such a bias.
    """
    a, b = (safetensors.torch.load_file(path / "model.safetensors") for path in (first, second))
    rounding = 2 * torch.finfo(torch.float32).eps
    found = ((a[key] - b[key]).norm() - rounding * a[key].numel() ** 0.5 for key in a)
    return max(float(d.clamp_min(0) / a[key].norm().clamp_min(1e-12)) for key, d in zip(a, found, strict=True))


def check_histories(one: Path, other: Path, least: int = 9) -> None:
    """The same rows, but for rounding."""
    rows = list(zip(history(one), history(other), strict=True))
    assert len(rows) >= least
    for expected, found in rows:
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value)


def check_equal(folder: Path, name: str) -> None:
    options = EQUAL[name][1]
    one = alone(folder, "lethe" if options is LETHE else name, options)
    assert distance(one, folder / name) < 1e-5
    check_histories(one, folder / name, least=9)
    line = json.loads((folder / f"{name}.json").read_text())
    assert len(set(line["weights"])) == 1, "every rank gets the same model"
    assert not (folder / name / "resume").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_do_the_mathematics_of_one_process(folder: Path, name: str) -> None:
    check_equal(folder, name)


@pytest.mark.slow
def test_every_sample_is_seen_once_an_epoch(folder: Path) -> None:
    assert json.loads((folder / "zero2.json").read_text())["samples_seen"] == {"forget": 34, "retain": 130}


@pytest.mark.slow
def test_the_run_that_collapsed_did_go_back(folder: Path) -> None:
    assert [row for row in history(folder / "collapsed") if "back_to_step" in row]


@pytest.mark.slow
def test_micro_batches_are_one_step(folder: Path) -> None:
    one = alone(folder, "lethe", LETHE)
    assert distance(one, folder / "accumulated") < 1e-5
    check_histories(one, folder / "accumulated")


@pytest.mark.slow
def test_bf16_is_near_and_its_checkpoint_float32(folder: Path) -> None:
    assert 1e-5 < distance(alone(folder, "lethe", LETHE), folder / "bf16") < 0.1
    assert {p.dtype for p in load_checkpoint(folder / "bf16").parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3_offload"])
def test_two_ranks_that_are_killed_resume_to_the_same_bits(folder: Path, stage: str) -> None:
    resumed, whole = folder / f"resumed_{stage}", folder / stage
    assert weights_sha256(load_checkpoint(resumed)) == weights_sha256(load_checkpoint(whole))
    assert history(resumed) == history(whole)


RUN = RunConfig(batch_size=8, accumulation_steps=2, precision="bf16", grad_clip=1.0)


def test_auto_is_filled_in_from_the_run() -> None:
    config = resolve_deepspeed(read_deepspeed(STAGES["zero3"]), RUN, ranks=4)
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 64
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is True
    assert config["torch_autocast"]["enabled"] is False
    assert resolve_deepspeed({}, RUN, 1)["torch_autocast"]["enabled"] is True  # stage 0: as on one process
    assert resolve_deepspeed({}, RunConfig(precision="fp32"), 1)["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, the run's batch_size is 8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, the run's accumulation_steps is 2"),
        ({"train_batch_size": 8}, "train_batch_size is 8, the run's batch_size x accumulation_steps x 4 ranks is 64"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, the run's grad_clip is 1.0"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", the run\'s is "AdamW"'),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.params.lr is 0.001, the run's is that of each phase"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "optimizer.params.weight_decay is 0.1, the run's is 0.05"),
        ({"scheduler": {"type": "WarmupLR"}}, "every phase of a method has its own schedule"),
        ({"fp16": {"enabled": True}}, "the engine has no loss scaling"),
        ({"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}}, "bf16.enabled is false"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is nvme"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_deepspeed(config, RUN, ranks=4)
    assert said in str(error.value)


def test_all_contradictions_are_listed_at_once_and_what_agrees_passes() -> None:
    with pytest.raises(UserError, match=r"batch_size is 8; gradient_clipping is 9, .*by --set"):
        resolve_deepspeed({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 9}, RUN, ranks=1)
    agreeing = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
    assert "optimizer" not in resolve_deepspeed(agreeing, RUN, ranks=4)


def test_more_ranks_than_samples() -> None:
    forget, retain = data()
    zero = resolve_deepspeed({}, RUN, ranks=18)
    _check_ranks(RUN, ProcessGroup(0, 17), zero, forget, retain)
    with pytest.raises(UserError, match=r"18 ranks for the 17 samples of digits train: .* start at most 17"):
        _check_ranks(RUN, ProcessGroup(0, 18), zero, forget, retain)


def test_ranks_that_nobody_configured() -> None:
    with pytest.raises(UserError, match=r"2 ranks were started without a DeepSpeed configuration"):
        _resolve_zero(None, RUN, ProcessGroup(0, 2))
    assert _resolve_zero(None, RUN, ProcessGroup()) is None


def test_resuming_with_another_number_of_ranks_or_stage_is_refused(tmp_path: Path) -> None:
    before = {"method": "lethe", "ranks": 2, "deepspeed": {"zero_optimization": {"stage": 2}}}
    RunFolder(tmp_path, before)
    RunFolder(tmp_path, before, resume=True)
    with pytest.raises(UserError, match=r"another configuration \(ranks: 2 before, 4 now\)"):
        RunFolder(tmp_path, {**before, "ranks": 4}, resume=True)
    with pytest.raises(UserError, match=r"deepspeed.zero_optimization.stage: 2 before, 3 now"):
        RunFolder(tmp_path, {**before, "deepspeed": {"zero_optimization": {"stage": 3}}}, resume=True)


def test_the_negatives_of_a_step_cannot_be_shown_in_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"negatives='in_batch' .* accumulation_steps=2 splits a step"):
        run(tmp_path / "run", None, 8, **LETHE, negatives="in_batch", accumulation_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; take one of configs/"):
        read_deepspeed(tmp_path / "zero9.json")
    (tmp_path / "ds.json").write_text("{,")
    with pytest.raises(UserError, match="is not JSON"):
        read_deepspeed(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_deepspeed(tmp_path / "ds.json")


def test_deepspeed_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'lethe-unlearning\[distributed\]'"):
        run(tmp_path / "run", "zero2", 8, **LETHE)
    assert not (tmp_path / "run").exists()


def test_ranks_without_a_configuration_and_half_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"RANK, MASTER_ADDR, MASTER_PORT is not set; start with deepspeed or torchrun"):
        run(tmp_path / "run", "zero2", 8, **LETHE)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"teacher='sharded' .* needs --deepspeed stage 3"):
        run(tmp_path / "run", None, 8, **LETHE, teacher="sharded")
    assert not (tmp_path / "run").exists()
