"""`retain_share` and `retain_choice`: which retained samples a run works with, against brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import few, tiny_vit

from engine.config import RunConfig, read_yaml
from engine.data import Batch, Loader, Samples, open_source
from engine.errors import UserError
from engine.methods.finetune import Finetune
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import outputs
from engine.run.retain_subset import choose_retained
from engine.run.setup import RunOptions, set_up
from engine.run.unlearn import unlearn
from engine.runtime.process_group import ProcessGroup

RUN = {"batch_size": 16, "precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def context_of(model: torch.nn.Module, forget: Samples, retain: Samples, **options: Any) -> Any:
    return set_up(model, forget, retain, RunOptions(method="finetune", config={**RUN, **options})).method.context


def picked(model: torch.nn.Module, forget: Samples, retain: Samples, **options: Any) -> list[str]:
    return list(context_of(model, forget, retain, **options).retain.ids)


def answers(model: torch.nn.Module, samples: Samples, what: str) -> torch.Tensor:
    """One image after the other, without the engine's loader."""
    preprocessing = preprocessing_of(model)
    with torch.no_grad():
        rows = [
            outputs(model, preprocessing.normalise(samples.tensor(i, 1)[None]), what)[0] for i in range(len(samples))
        ]
    return torch.stack(rows).double()


def test_hard_takes_the_highest_losses_of_the_original(train: Samples) -> None:
    model, forget, retain = tiny_vit(), few(train, 20), train.subset(range(20, 90))
    logits = answers(model, retain, "logits")
    losses = [float(row.logsumexp(0) - row[label]) for row, label in zip(logits, retain.labels, strict=True)]
    worst = sorted(range(len(retain)), key=lambda i: -losses[i])[:21]
    found = picked(model, forget, retain, retain_share=0.3, retain_choice="hard")
    assert found == [retain.ids[i] for i in sorted(worst)]


def test_near_takes_those_closest_to_any_forget_sample(train: Samples) -> None:
    model, forget, retain = tiny_vit(), few(train, 20), train.subset(range(20, 90))
    a, b = answers(model, retain, "features"), answers(model, forget, "features")
    distance = [min(float(1 - x @ y / (x.norm() * y.norm())) for y in b) for x in a]
    closest = sorted(range(len(retain)), key=lambda i: distance[i])[:14]
    found = picked(model, forget, retain, retain_share=0.2, retain_choice="near")
    assert found == [retain.ids[i] for i in sorted(closest)]


def test_near_gives_the_same_in_blocks(train: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = tiny_vit(), few(train, 20), train.subset(range(20, 90))
    whole = picked(*arguments, retain_share=0.2, retain_choice="near")
    monkeypatch.setattr("engine.run.retain_subset._BLOCK", 48)
    assert picked(*arguments, retain_share=0.2, retain_choice="near") == whole


@pytest.mark.parametrize("share", [0.01, 0.1, 0.33, 0.9])
def test_random_takes_the_same_share_of_every_class(train: Samples, share: float) -> None:
    sizes = np.array([100, 50, 10, 3])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), sizes))
    retain = Samples("r", [str(i) for i in range(163)], labels, lambda i: torch.zeros(1, 8, 8))

    def choose(seed: int) -> Samples:
        run = RunConfig(retain_share=share, seed=seed)
        return choose_retained(run, tiny_vit(), few(train, 2), retain, None, None, ProcessGroup())  # type: ignore[arg-type]

    found = choose(0)
    counts = np.bincount(found.labels, minlength=4)
    assert counts.sum() == max(1, round(share * 163))
    if share >= 0.1:
        assert (abs(counts - share * sizes) <= 1).all()
        assert counts.min() >= 1
    assert list(choose(0).ids) == list(found.ids)
    assert list(choose(1).ids) != list(found.ids)
    assert sorted(map(int, found.ids)) == list(map(int, found.ids)), "in the order of the retained samples"


def test_a_run_sees_the_chosen_samples_alone_and_says_so(train: Samples, tmp_path: Path) -> None:
    seen: set[str] = set()
    forget, retain = few(train, 20), train.subset(range(20, 120))

    class Noting(Finetune):
        def loss(self, model: torch.nn.Module, batch: Batch, phase: Any) -> dict[str, torch.Tensor]:
            seen.update(self.context.retain.ids[i] for i in batch.index.tolist())
            return super().loss(model, batch, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.run.setup.get_method", lambda name: Noting)
        options = {**RUN, "retain_epochs": 2, "retain_share": 0.3, "retain_choice": "hard"}
        result = unlearn(tiny_vit(), forget, retain, method="finetune", config=options, output_dir=tmp_path / "run")
    chosen = context_of(tiny_vit(), forget, retain, retain_share=0.3, retain_choice="hard").retain
    assert seen == set(chosen.ids)
    assert result.samples_seen == {"retain": 60}
    config = read_yaml(tmp_path / "run" / "config.yaml")
    assert config["retain_share"] == 0.3
    assert config["samples"]["retain"] == 100
    assert config["samples"]["retain_used"] == 30
    assert config["samples"]["retain_used_sha256"] == chosen.fingerprint()


def test_all_of_them_is_the_default_and_reads_nothing(train: Samples) -> None:
    retain = train.subset(range(20, 60))
    context = context_of(tiny_vit(), few(train, 20), retain)
    assert context.retain is retain


def test_a_killed_run_goes_on_with_the_same_samples(train: Samples, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "method": "finetune",
        "config": {**RUN, "retain_epochs": 3, "retain_share": 0.4, "retain_choice": "near"},
    }
    forget, retain = few(train, 20), train.subset(range(20, 120))
    whole = unlearn(tiny_vit(), forget, retain, output_dir=tmp_path / "whole", **arguments)

    def kill(phase: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        if step > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny_vit(), forget, retain, output_dir=tmp_path / "cut", progress=kill, **arguments)
    resumed = unlearn(tiny_vit(), forget, retain, output_dir=tmp_path / "cut", resume=True, **arguments)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "history.jsonl").read_text().splitlines()]
    assert len(rows) == len(whole.history)


def test_its_time_counts(train: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def slow(*arguments: Any) -> Samples:
        time.sleep(0.3)
        return choose_retained(*arguments)

    monkeypatch.setattr("engine.run.setup.choose_retained", slow)
    options = {**RUN, "max_steps": 1, "retain_share": 0.5}
    result = unlearn(tiny_vit(), few(train, 4), train.subset(range(20, 60)), method="finetune", config=options)
    assert result.seconds["unlearn"] > 0.3


def test_images_left_out_as_bad_come_last(train: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad image has no score: 0 would be a high one beside negative cosines."""
    retain = train.subset(range(20, 60))
    good = Loader.rows

    def rows(self: Loader, of: Any) -> tuple[torch.Tensor, ...]:
        found = good(self, of)
        if self.samples is retain:
            found[0][:] = -0.5
            found[0][::2] = 0.0
            found[-1][::2] = -1
        return found

    monkeypatch.setattr(Loader, "rows", rows)
    found = picked(tiny_vit(), few(train, 20), retain, retain_share=0.5, retain_choice="near")
    assert found == list(retain.ids)[1::2]


def test_wrong_use(train: Samples) -> None:
    forget, retain = few(train, 20), train.subset(range(20, 60))
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(UserError, match="retain_share"):
            picked(tiny_vit(), forget, retain, retain_share=share)
    with pytest.raises(UserError, match="retain_choice"):
        picked(tiny_vit(), forget, retain, retain_choice="easy")
    with pytest.raises(UserError, match="nothing to forget"):
        picked(tiny_vit(), train.subset([]), retain, retain_share=0.5, retain_choice="near")
    with pytest.raises(UserError, match=r"leaves 4 of 40 retained samples to 5 ranks"):
        choose_retained(RunConfig(retain_share=0.1), tiny_vit(), forget, retain, None, None, ProcessGroup(0, 5))  # type: ignore[arg-type]
