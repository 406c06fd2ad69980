"""`retain_pruning=seta`: what an epoch takes, against the steps written out; in the loop, killed, of two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import few, tiny_vit

from engine.config import RunConfig, SetaConfig
from engine.data import Batch, Samples, open_source
from engine.data.sampling import Epochs, Sampler
from engine.errors import UserError
from engine.methods import Phase
from engine.methods.finetune import Finetune
from engine.models.checkpoint import weights_sha256
from engine.run.seta import PrunedPhase, Seta, grouped, pruned_phases
from engine.run.setup import RunOptions, set_up
from engine.run.unlearn import unlearn
from engine.runtime.process_group import ProcessGroup

RUN = {"batch_size": 8, "precision": "fp32", "device": "cpu", "retain_pruning": "seta"}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def run(train: Samples, method: str = "finetune", **options: Any) -> Any:
    loop = {key: options.pop(key) for key in ("output_dir", "resume", "progress", "after_phase") if key in options}
    return unlearn(
        tiny_vit(),
        few(train, 20),
        train.subset(range(20, 70)),
        method=method,
        config={**RUN, **options},
        validation=train.subset(range(70, 90)),
        **loop,
    )


def test_groups_are_those_of_k_means() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(centre, 0.05, 40) for centre in (0.0, 3.0, 1.0, 7.0)])
    found = grouped(values, 4)
    expected = np.repeat([0, 2, 1, 3], 40)
    assert (found == expected).all()
    # A settled k-means: every value is nearest to the mean of its own group.
    skewed = rng.exponential(1.0, 500) ** 3
    groups = grouped(skewed, 5)
    centres = np.array([skewed[groups == g].mean() for g in range(5)])
    assert (np.diff(centres) > 0).all()
    assert (abs(skewed[:, None] - centres).argmin(1) == groups).all()
    assert np.bincount(grouped(np.ones(10), 5)).tolist() == [2] * 5


def test_what_an_epoch_takes() -> None:
    """100 samples, 90 drawn, 5 groups of which 3 are taken: 54 in a window, over 9 epochs; the last 2 anneal."""
    seta = Seta(SetaConfig(keep=0.9, groups=5, window=0.6, anneal=0.125), 100, 9, seed=3)
    assert [seta.size(epoch) for epoch in range(9)] == [90, *[54] * 6, 90, 90]
    losses = np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], 20)  # five clear groups
    first = seta.positions(0)
    assert len(set(first)) == 90
    seta.losses[:] = losses
    taken = [seta.positions(epoch) for epoch in range(9)]
    for epoch, positions in enumerate(taken):
        assert len(set(positions)) == len(positions) == seta.size(epoch)
        assert (np.sort(positions) == positions).all()
    # 90 of 100 are drawn, some 18 a group: 54 of them are about 3 groups.
    for epoch, easiest in ((1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 2)):
        groups = np.bincount(losses[taken[epoch]].astype(int), minlength=5)
        assert groups[:easiest].sum() <= (3 if easiest == 2 else 0)  # moved back where too few come after
        assert groups[easiest : easiest + 2].sum() >= 30, epoch
        assert groups[easiest + 3 :].sum() <= 8
    assert len(set(taken[7]) ^ set(taken[8])) > 0
    assert abs(np.bincount(losses[taken[7]].astype(int)) - 18).max() <= 3, "the last epochs draw at random alone"
    again = Seta(seta.config, 100, 9, seed=3)
    assert (again.positions(0) == first).all()
    assert (Seta(seta.config, 100, 9, seed=4).positions(0) != first).any()


def test_a_choice_stays_while_its_epoch_lasts() -> None:
    seta = Seta(SetaConfig(), 50, 8, seed=0)
    seta.losses[:] = np.arange(50)
    before = seta.positions(1).copy()
    seta.losses[:] = np.arange(50)[::-1]
    assert (seta.positions(1) == before).all()
    assert set(seta.positions(2)) != set(before)


def test_samples_not_seen_yet_count_with_the_mean() -> None:
    seta = Seta(SetaConfig(keep=1.0, groups=5, window=0.4, anneal=0.0), 50, 8, seed=0)
    seta.losses[:40] = np.repeat([0.0, 1.0, 2.0, 9.0], 10)  # the mean is 3
    assert set(seta.positions(1)) == set(range(20))
    known = np.where(np.isnan(seta.losses), 3.0, seta.losses)
    assert (known[seta.positions(3)] >= 2).all()


def test_epochs_of_different_sizes() -> None:
    epochs = Epochs((20, 9, 9, 20), 8)
    ends = [0, 3, 5, 7, 10, 13]  # and those beyond are like the last
    for step in range(13):
        epoch, first, end = epochs.place(step)
        assert (first, end) == (ends[epoch], ends[epoch + 1])
        assert first <= step < end
    assert [epochs.steps(e) for e in (0.5, 1, 1.5, 3.2, 5)] == [2, 3, 4, 8, 13]
    sampler = Sampler(20, 8)
    sizes = [len(s.index) for count in (20, 9, 9, 20, 20) for s in sampler.slices(np.arange(count))]
    assert [epochs.samples(steps) for steps in range(14)] == [sum(sizes[:steps]) for steps in range(14)]


def test_the_losses_are_those_of_the_batches_as_they_are_trained(train: Samples) -> None:
    """And every epoch takes what its choice says, once, in fewer steps, which all know of."""
    seen: list[tuple[list[int], list[float]]] = []
    told: set[tuple[int, int]] = set()

    class Noting(Finetune):
        def loss(self, model: torch.nn.Module, batch: Batch, phase: Any) -> dict[str, torch.Tensor]:
            losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
            told.add((self.step - len(seen), self.total_steps))
            seen.append((batch.index.tolist(), losses.tolist()))
            return {"ce": losses.mean()}

    made: list[Seta] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.run.setup.get_method", lambda name: Noting)
        patch.setattr("engine.run.seta.Seta", lambda *a: made.append(Seta(*a)) or made[-1])
        result = run(train, retain_epochs=4, **{"seta": {"keep": 0.8, "window": 0.4}})
    counts = [40, 16, 16, 40]
    assert told == {(0, 5 + 2 + 2 + 5)}
    assert result.samples_seen == {"retain": sum(counts)}
    rows = [row for row in result.history if "lr" in row]
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 2 + [2] * 2 + [3] * 5
    assert rows[-1]["lr"] < 0.05 * max(row["lr"] for row in rows), "the cycle ends with the run"
    steps = iter(seen)
    last: dict[int, float] = {}
    for count in counts:
        taken = []
        while len(taken) < count:
            index, losses = next(steps)
            taken += index
            last.update(zip(index, losses, strict=True))
        assert len(set(taken)) == count
    (seta,) = made
    for position in range(50):
        assert seta.losses[position] == pytest.approx(last[position], rel=1e-5) if position in last else True
        assert (position in last) == (not np.isnan(seta.losses[position]))


def test_forget_samples_among_them_are_always_taken(train: Samples) -> None:
    result = run(train, "bad_teacher", epochs=2, retain_part=0.5)
    assert result.samples_seen == {"forget": 2 * 20 + 22 + 22}  # 25 retained ones, 90%; the last of two epochs anneals


def test_as_much_beside_in_fewer_steps(train: Samples) -> None:
    plain = {"views": False, "calibrate": False}
    result = run(train, "lethe_plus", epochs=4, forget_passes=4, batch_size=5, **plain, seta={"window": 0.4})
    assert sum("lr" in row for row in result.history) == 9 + 4 + 4 + 9
    # Two beside five retained ones make four passes in 40 steps; in 26 steps it takes three, with an epoch's last two.
    paired = result.samples_seen["forget"] - (45 + 18 + 18 + 45)
    assert abs(paired - 4 * 20) <= 6


def test_epochs_are_counted_through_phases() -> None:
    """SCRUB's are of one epoch each, and slide all the same."""
    forget = Phase(name="forget", samples="forget", epochs=1, lr=1.0)
    retain = Phase(name="retain", samples="retain", epochs=1, lr=1.0)
    phases = [forget, retain, forget, retain, retain, retain]
    made = pruned_phases(RunConfig(retain_pruning="seta"), phases, 20, 50)
    assert {number: (each.first, each.counts) for number, each in made.items()} == {
        1: (0, (45,)),
        3: (1, (27,)),
        4: (2, (27,)),
        5: (3, (45,)),
    }
    assert len({id(each.seta) for each in made.values()}) == 1


def test_ranks_share_what_they_saw() -> None:
    seta = Seta(SetaConfig(), 10, 3, seed=0)
    phase = PrunedPhase(seta, 0, 2, 3)

    class Two(ProcessGroup):
        """The other rank saw the samples one further on, with losses one higher."""

        def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([rows, rows + 1])

    model = torch.nn.Linear(3, 4)
    model.num_classes = 4  # type: ignore[assignment]
    images = torch.randn(2, 3)
    batch = Batch(images, torch.tensor([1, 2]), torch.tensor([1, 4]))  # one to forget, and position 2 of the retained
    with phase.watching(model, batch):
        logits = model(images)
        model(2 * images)  # a second pass is another's
    with phase.watching(model, Batch(images, batch.labels, torch.tensor([8, 9]), weight=0.0)):
        model(images)  # keeps a rank in step
    phase.settle(Two(0, 2))
    losses = F.cross_entropy(logits, batch.labels, reduction="none").detach().double().numpy()
    assert seta.losses[2] == losses[1]
    assert seta.losses[3] == pytest.approx(losses[1] + 1)
    assert seta.losses[0] == pytest.approx(losses[0] + 1)  # position 2 of the phase's samples
    assert np.isnan(seta.losses[[1, 4, 5, 6, 7, 8, 9]]).all()


@pytest.mark.parametrize(("method", "options"), [("finetune", {"retain_epochs": 3}), ("scrub", {"retain_epochs": 3})])
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(
    train: Samples, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """Killed in the midst of an epoch that slides, after a checkpoint in it."""
    options |= {"checkpoint_every": 2, "seta": {"anneal": 0.0}}
    whole = run(train, method, **options)
    done = []

    def kill(phase: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        done.append(phase)
        if done.count("retain") == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(train, method, output_dir=tmp_path / "run", progress=kill, **options)
    resumed = run(train, method, output_dir=tmp_path / "run", resume=True, **options)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert resumed.samples_seen == whole.samples_seen


def test_wrong_use(train: Samples) -> None:
    with pytest.raises(UserError, match="retain_pruning='seta': gradient_ascent makes no passes over retained"):
        run(train, "gradient_ascent")
    with pytest.raises(UserError, match="compile=true"):
        run(train, compile=True)
    for options in ({"keep": 0.0}, {"groups": 0}, {"window": 1.5}, {"anneal": -0.1}):
        with pytest.raises(UserError, match=f"option seta.{next(iter(options))}="):
            SetaConfig(**options)  # type: ignore[arg-type]


def test_without_it_nothing_is_looked_at(train: Samples) -> None:
    options = RunOptions(method="finetune", config={"batch_size": 8})
    made = set_up(tiny_vit(), few(train, 4), train.subset(range(20, 40)), options)
    assert made.trainer.pruned == {}
