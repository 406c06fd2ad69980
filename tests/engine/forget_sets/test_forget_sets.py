"""Forget sets: each strategy against a planted truth, and what all of them promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import Lethe
from toys import TINY, few, tiny_vit

from engine.data import Samples, open_source, read_forget_request
from engine.errors import UserError
from engine.forget_sets import Pool, choose_forget_set, duplicates, get_strategy, list_strategies, register
from engine.forget_sets.base import highest
from engine.forget_sets.choose import describe
from engine.forget_sets.influence import read_scores
from engine.forget_sets.pool import _measure
from engine.models.checkpoint import save_checkpoint
from engine.models.spec import ModelSpec
from engine.models.vit import outputs


def relabelled(samples: Samples, labels: np.ndarray) -> Samples:
    return Samples(samples.name, samples.ids, labels, samples.image, samples.class_names, natural=False)


def chosen(samples: Samples, strategy: str, model: Any = None, **options: Any) -> np.ndarray:
    sizes = {key: options.pop(key) for key in ("share", "count", "seed") if key in options}
    return choose_forget_set(samples, strategy, model=model, config=options, **sizes).selection.indices


# What the model says of a sample


def test_features_and_the_last_layer_give_the_logits(digits: Samples, fitted: torch.nn.Module) -> None:
    pool = Pool(digits, 1, model=fitted)
    logits = pool.last_layer()(pool.features)
    batch = next(pool.loader.ordered())
    with torch.no_grad():
        torch.testing.assert_close(logits[: len(batch)], outputs(fitted, batch.images), rtol=1e-4, atol=1e-4)
    losses = F.cross_entropy(logits.double(), torch.from_numpy(digits.labels), reduction="none")
    np.testing.assert_allclose(pool.measurements.losses, losses.detach(), rtol=1e-3, atol=1e-5)
    assert pool.precision == "fp32"  # not auto: a list should not depend on the machine
    assert pool.measurements.correct.mean() > 0.8  # the fixture knows most of them
    assert (pool.measurements.correct == (logits.argmax(1).numpy() == digits.labels)).all()


def test_losses_and_errors_keep_their_order_where_a_model_is_sure() -> None:
    logits = torch.tensor([[60.0, 0, 0], [80.0, 0, 0], [1.0, 2, 3], [-500.0, 0, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0])
    losses, correct, errors = _measure(logits, labels)
    assert losses[0] > losses[1] > 0
    assert errors[0] > errors[1] > 0
    assert losses[0] == pytest.approx(2 * np.exp(-60), rel=1e-9, abs=0)
    assert errors[0] == pytest.approx(np.sqrt(6) * np.exp(-60), rel=1e-9, abs=0)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses[2:], expected[2:])
    error = logits.softmax(1) - F.one_hot(labels, 3)
    torch.testing.assert_close(errors[2:], error.norm(dim=1)[2:])
    assert correct.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_influence_is_the_length_of_the_last_layers_gradient(digits: Samples, architecture: str) -> None:
    model = ModelSpec(architecture=architecture, num_classes=10, model_args=TINY, pretrained_cfg={}).build(seed=1)
    model.eval()
    samples = few(digits, 6)
    found = choose_forget_set(samples, "influence", count=5, model=model).selection
    heads = model.get_classifier()  # type: ignore[operator]
    parameters = [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
    lengths = []
    batch = next(Pool(samples, 1, model=model).loader.ordered())
    for i in range(6):
        loss = F.cross_entropy(outputs(model, batch.images[i : i + 1]), batch.labels[i : i + 1])
        lengths.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).norm().item())
    order = np.argsort(lengths)[::-1][:5]
    assert found.indices.tolist() == order.tolist()
    np.testing.assert_allclose(found.scores, np.array(lengths)[order], rtol=1e-4)
    el2n = choose_forget_set(samples, "influence", count=5, model=model, config={"measure": "el2n"}).selection
    with torch.no_grad():
        errors = (outputs(model, batch.images).softmax(1) - F.one_hot(batch.labels, 10)).norm(dim=1).numpy()
    np.testing.assert_allclose(el2n.scores, np.sort(errors)[::-1][:5], rtol=1e-4)


# Planted truths


def test_a_mislabelled_sample_comes_first(digits: Samples, fitted: torch.nn.Module) -> None:
    pool = Pool(digits, 1, model=fitted)
    logits = pool.last_layer()(pool.features).detach().numpy()
    planted = int(pool.measurements.losses.argmin())
    labels = digits.labels.copy()
    labels[planted] = logits[planted].argmin()
    wrong = relabelled(digits, labels)
    assert chosen(wrong, "highest-loss", fitted, count=5)[0] == planted
    assert chosen(wrong, "influence", fitted, count=5, measure="el2n")[0] == planted
    assert planted in chosen(wrong, "influence", fitted, count=5)
    assert planted not in chosen(wrong, "lowest-loss", fitted, count=190)
    assert chosen(digits, "lowest-loss", fitted, count=5)[0] == planted


def test_loss_strategies_take_both_ends_in_order(digits: Samples, fitted: torch.nn.Module) -> None:
    losses = Pool(digits, 1, model=fitted).measurements.losses
    order = np.argsort(losses)
    low = choose_forget_set(digits, "lowest-loss", count=20, model=fitted).selection
    assert low.indices.tolist() == order[:20].tolist()
    np.testing.assert_allclose(low.scores, losses[order[:20]], rtol=1e-6)
    assert chosen(digits, "highest-loss", fitted, count=20).tolist() == order[::-1][:20].tolist()


def test_equal_scores_go_to_the_first() -> None:
    scores = np.array([1.0, 3.0, 3.0, 0.0, 3.0])
    assert highest(scores, np.arange(5), 4).indices.tolist() == [1, 2, 4, 0]
    assert highest(scores, np.array([0, 3, 4]), 2).indices.tolist() == [4, 0]
    with pytest.raises(UserError, match="4 samples were requested, and 3 can be chosen"):
        highest(scores, np.array([0, 3, 4]), 4)


def test_planted_duplicates_are_found_and_a_copy_is_kept(digits: Samples) -> None:
    groups = [{3, 200}, {7, 201, 202}]
    copied = digits.subset([*range(200), 3, 7, 7])
    copied = Samples("copies", [f"s{i}" for i in range(203)], copied.labels, copied.image, natural=False)
    result = choose_forget_set(copied, "near-duplicates", count=3, model=tiny_vit())
    found = set(result.selection.indices.tolist())
    assert [len(found & group) for group in groups] == [1, 2]
    np.testing.assert_allclose(result.selection.scores, 1, atol=1e-6)
    assert result.selection.facts == {"with_partner_retained": 3}


def test_every_near_duplicate_leaves_its_partner(digits: Samples) -> None:
    result = choose_forget_set(digits, "near-duplicates", count=80, model=tiny_vit())
    found = result.selection
    features = F.normalize(Pool(digits, 1, model=tiny_vit()).features, dim=1)
    similarity = (features @ features.T).fill_diagonal_(-1).numpy()
    retained = np.setdiff1d(np.arange(200), found.indices)
    assert found.facts["with_partner_retained"] == 80
    np.testing.assert_allclose(found.scores, similarity[np.ix_(found.indices, retained)].max(1), atol=1e-5)
    # The closest pair of all is the first, and the scores fall.
    assert found.scores[0] == pytest.approx(similarity.max(), abs=1e-6)
    assert (np.diff(found.scores) <= 1e-6).all()


def test_of_three_copies_two_are_picked_and_one_is_kept() -> None:
    # The nearest of the third is the first, which is chosen: it goes by its next, which is kept.
    neighbours = np.array([[1, 2], [0, 2], [0, 1], [0, 1]])
    similarity = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.4]])
    chosen, columns = duplicates.pick_with_partners(similarity, neighbours, 4)
    assert chosen.tolist() == [0, 2, 3]
    assert columns.tolist() == [0, 1, 1]


def test_neighbours_in_blocks_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    features = F.normalize(torch.randn(57, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    monkeypatch.setattr(duplicates, "BLOCK", 57 * 5 + 3)  # 5 rows at a time
    largest = 0
    topk = torch.Tensor.topk

    def watched(block: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, block.numel())
        return topk(block, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    cosines, positions = duplicates.nearest_neighbours(features, 4)
    assert largest == 57 * 5
    everything = (features @ features.T).fill_diagonal_(-2).double().numpy()
    order = np.argsort(-everything, axis=1, kind="stable")[:, :4]
    assert (positions == order).all()
    np.testing.assert_allclose(cosines, np.take_along_axis(everything, order, 1), atol=1e-6)


# What all strategies promise


def options_for(name: str, samples: Samples, folder: Path) -> dict[str, Any]:
    if name == "memorised":
        path = folder / "scores.csv"
        path.write_text("id,score\n" + "".join(f"{i},{n % 7}\n" for n, i in enumerate(samples.ids)))
        return {"scores": str(path)}
    if name == "adversarial":
        return {"iterations": 2, "unlearn_steps": 2}
    return {}


@pytest.mark.parametrize("name", list_strategies())
def test_each_strategy_selects_exactly_the_count_the_same_each_time(
    name: str, digits: Samples, fitted: torch.nn.Module, tmp_path: Path
) -> None:
    options = options_for(name, digits, tmp_path)
    for count in (1, 17, 199):
        samples = relabelled(digits, np.zeros_like(digits.labels)) if name == "class" else digits
        first = chosen(samples, name, fitted, count=count, seed=3, **options)
        assert first.dtype == np.int64
        assert len(set(first.tolist())) == len(first) == count
        assert first.min() >= 0
        assert first.max() < 200
        assert (chosen(samples, name, fitted, count=count, seed=3, **options) == first).all()


@pytest.mark.parametrize("name", ["random", "class"])
def test_the_seed_decides(name: str, digits: Samples, fitted: torch.nn.Module) -> None:
    one, two = (set(chosen(digits, name, fitted, count=10, seed=seed).tolist()) for seed in (0, 1))
    assert one != two


def test_random_is_the_set_of_the_shorthand(digits: Samples) -> None:
    found = chosen(digits, "random", share=0.1, seed=5)
    assert sorted(found.tolist()) == read_forget_request("random:0.1@5", digits).indices.tolist()


def test_class_takes_one_class_by_name_or_the_largest(digits: Samples) -> None:
    assert (digits.labels[chosen(digits, "class", count=9, name=3)] == 3).all()  # --set name=3 reads a number
    assert (digits.labels[chosen(digits, "class", count=9, name="4")] == 4).all()
    largest = int(np.bincount(digits.labels).argmax())
    assert (digits.labels[chosen(digits, "class", count=9)] == largest).all()


def test_scores_of_a_file_decide_and_samples_without_one_are_left(digits: Samples, tmp_path: Path) -> None:
    ids = [digits.ids[i] for i in (9, 4, 60, 5)]
    (tmp_path / "s.csv").write_text(
        "id,extra,score\n" + "".join(f"{i},x,{s}\n" for i, s in zip(ids, [1, 9, "nan", 5], strict=True))
    )
    np.savez(tmp_path / "s.npz", ids=np.array(ids), scores=np.array([1, 9, np.nan, 5], dtype=np.float32))
    for name in ("s.csv", "s.npz"):
        result = choose_forget_set(digits, "memorised", count=2, config={"scores": str(tmp_path / name)})
        assert result.selection.indices.tolist() == [4, 5]
        assert result.selection.scores.tolist() == [9, 5]
        assert result.selection.facts == {"without_score": 197}
    with pytest.raises(UserError, match="4 samples were requested, and 3 can be chosen"):
        chosen(digits, "memorised", count=4, scores=str(tmp_path / "s.csv"))


def test_scores_that_cannot_be_read(digits: Samples, tmp_path: Path) -> None:
    def refused(text: str, message: str) -> None:
        (tmp_path / "s.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path / "s.csv", digits)

    known = digits.ids[0]
    refused("id,loss\n0,1\n", "no column `score`")
    refused("name,score\n0,1\n", "no column `id`")
    refused(f"id,score\n{known},high\n", "a score is not a number")
    refused(f"id,score\n{known}\n", "a score is not a number")
    refused("id,score\nghost,1\n", "1 of 1 ids are not in .*'ghost'")
    refused(f"id,score\n{known},1\n{known},2\n", "occurs twice")
    np.savez(tmp_path / "a.npz", ids=np.array(["0"]))
    np.savez(tmp_path / "b.npz", ids=np.array([known]), scores=np.zeros((1, 2)))
    np.savez(tmp_path / "c.npz", ids=np.array([known], dtype=object), scores=np.zeros(1))
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 cut short")
    messages = {"a": "scores", "b": r"shape \(1, 2\)", "c": "cannot be read", "d": "cannot be read"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path / f"{name}.npz", digits)
    with pytest.raises(UserError, match="No such file"):
        read_scores(tmp_path / "none.csv", digits)


def test_description_by_hand() -> None:
    samples = Samples("s", list("abcdefgh"), np.array([0, 0, 0, 0, 1, 1, 2, 2]), lambda i: None, ["x", "y", "z"])
    of = describe(Pool(samples, 4), np.array([4, 5, 6, 0]))
    assert of["samples"] == 4
    assert of["classes"] == {"x": 1, "y": 2, "z": 1}
    assert of["largest_class"] == {"name": "y", "share": 0.5}
    assert of["imbalance"] == pytest.approx((0.25 + 0.25 + 0) / 2)
    assert "accuracy" not in of
    assert describe(Pool(samples, 4), np.arange(8))["imbalance"] == 0


def test_description_is_of_the_model(digits: Samples, fitted: torch.nn.Module) -> None:
    result = choose_forget_set(digits, "highest-loss", count=20, model=fitted)
    measurements = Pool(digits, 1, model=fitted).measurements
    of = result.description["chosen"]
    assert of["loss"] == pytest.approx(measurements.losses[result.selection.indices].mean(), rel=1e-6)
    assert of["accuracy"] == measurements.correct[result.selection.indices].mean()
    assert result.description["all"]["loss"] == pytest.approx(measurements.losses.mean(), rel=1e-6)
    assert result.description["random"]["samples"] == 20
    assert of["loss"] > result.description["random"]["loss"]


def test_images_that_do_not_decode_are_left_out(parquet_folder: Callable[..., Path]) -> None:
    folder = parquet_folder(train=40, spoil={5: b"not an image"})
    samples = open_source(f"parquet:{folder}").train
    options = {"on_bad_image": "skip", "max_bad_share": 0.1}
    for name in ("lowest-loss", "near-duplicates", "adversarial"):
        extra = {"iterations": 1, "unlearn_steps": 2, "layers": "all"} if name == "adversarial" else {}
        assert 5 not in chosen(samples, name, tiny_vit(), count=38, **options, **extra)
    result = choose_forget_set(samples, "random", count=39, model=tiny_vit(), config=options)
    assert result.description["all"]["unreadable"] == 1
    with pytest.raises(UserError, match="does not decode"):
        chosen(samples, "lowest-loss", tiny_vit(), count=3)


# The list, and wrong use


def test_the_list_is_a_forget_request(tmp_path: Path) -> None:
    ids = ["a,b.png", 'say "x".png', "æ/ü.png", " edge ", "plain", "f"]
    samples = Samples("odd", ids, np.zeros(6, dtype=int), lambda i: None)
    path = tmp_path / "s.csv"
    path.write_text("id,score\n" + "".join(f'"{i.replace(chr(34), chr(34) * 2)}",{n / 3}\n' for n, i in enumerate(ids)))
    result = choose_forget_set(samples, "memorised", count=5, config={"scores": str(path)})
    out = tmp_path / "deep" / "set.csv"
    result.write(out)
    assert out.read_text().splitlines()[0] == "id,score,rank"
    request = read_forget_request(str(out), samples)
    assert request.indices.tolist() == [1, 2, 3, 4, 5]
    assert request.duplicates == 0
    assert request.provenance["f"] == {"score": repr(5 / 3), "rank": "1"}
    assert request.provenance['say "x".png'] == {"score": repr(1 / 3), "rank": "5"}
    assert result.ids == ids[:0:-1]
    # It can be read back as scores too.
    assert choose_forget_set(samples, "memorised", count=2, config={"scores": str(out)}).ids == ["f", "plain"]


def test_lists_that_could_not_be_read_back_are_refused(tmp_path: Path) -> None:
    samples = Samples("odd", ["a", "b\u2028c"], np.zeros(2, dtype=int), lambda i: None)
    for seed in range(8):
        result = choose_forget_set(samples, "random", count=1, seed=seed)
        if result.ids == ["a"]:
            result.write(tmp_path / "set.csv")
            with pytest.raises(UserError, match=r"end it in \.csv"):
                result.write(tmp_path / "set.txt")
        else:
            with pytest.raises(UserError, match="holds a line break"):
                result.write(tmp_path / "other.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["set.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "lowest-los"}, "unknown strategy 'lowest-los'; did you mean 'lowest-loss'"),
        ({}, "neither given"),
        ({"share": 0.1, "count": 5}, "both given"),
        ({"count": 0}, "nothing to forget"),
        ({"count": -1}, "nothing to forget"),
        ({"share": 0.001}, "nothing to forget"),
        ({"count": 200}, "leaves nothing to retain"),
        ({"share": 0.999}, "leaves nothing to retain"),
        ({"share": 1.5}, "option share=1.5: expected above 0 and below 1"),
        ({"strategy": "influence", "count": 5}, "strategy influence needs a model"),
        ({"strategy": "class", "count": 5, "config": {"name": "cat"}}, "option name='cat': no such class"),
        ({"strategy": "class", "count": 150}, "150 samples were requested, and class '.' has"),
        ({"count": 5, "config": {"measure": "el2n"}}, "unknown option 'measure'"),
        ({"count": 5, "config": {"batch_size": 0}}, "option batch_size=0"),
        ({"strategy": "memorised", "count": 5}, "give --set scores=FILE"),
    ],
)
def test_wrong_use(digits: Samples, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_forget_set(digits, **{"strategy": "random", **arguments})


def test_models_that_do_not_fit(digits: Samples) -> None:
    with pytest.raises(UserError, match="head has 2 classes"):
        choose_forget_set(digits, "lowest-loss", count=5, model=tiny_vit(num_classes=2))
    broken = tiny_vit()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="is not finite; the checkpoint is broken"):
        choose_forget_set(digits, "lowest-loss", count=5, model=broken)


def test_neighbours_are_checked() -> None:
    with pytest.raises(UserError, match="neighbours"):
        duplicates.NearDuplicatesConfig(neighbours=0)


def test_the_registry_refuses_a_second_strategy_of_a_name() -> None:
    with pytest.raises(ValueError, match="strategy 'random' is already Random"):
        register(get_strategy("random"))


# The command


def test_the_command_writes_and_describes_without_a_look_at_test_images(
    lethe: Lethe, parquet_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    folder = parquet_folder(train=40)
    test = next(folder.glob("test-*"))
    table = pq.read_table(test)
    broken = [{"bytes": b"broken", "path": "x.png"}] * len(table)
    pq.write_table(table.set_column(0, "image", [broken]), test)
    checkpoint = save_checkpoint(tiny_vit(), tmp_path / "original")
    common = ["--data", f"parquet:{folder}", "--checkpoint", checkpoint, "--share", "0.1"]
    code, out, err = lethe(
        "forget-set", "--strategy", "near-duplicates", *common, "--out", tmp_path / "s.csv",
        "--json", tmp_path / "s.json", "--accept-accuracy",
    )  # fmt: skip
    assert code == 0, err
    assert "near-duplicates" in out
    assert "a random set" in out
    assert "with partner retained: 4" in out
    assert "time: select" in out
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["count"] == 4
    assert found["share"] == 0.1
    assert found["options"] == {"neighbours": 10}
    assert found["description"]["chosen"]["samples"] == found["description"]["random"]["samples"] == 4
    samples = open_source(f"parquet:{folder}").train
    assert found["samples_sha256"] == samples.fingerprint()
    assert len(read_forget_request(str(tmp_path / "s.csv"), samples).indices) == 4


def test_the_command_tells_what_is_wrong(lethe: Lethe, tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--count", "5", "--out", tmp_path / "s.csv"]
    for strategy, message in (("rnadom", "did you mean 'random'"), ("influence", "needs a model")):
        code, _, err = lethe("forget-set", "--strategy", strategy, *arguments)
        assert code == 2
        assert message in err
    assert not (tmp_path / "s.csv").exists()
    # Before the data is opened, which may be hours before the list is written.
    code, _, err = lethe("forget-set", "--strategy", "random", "--data", "no", *arguments[2:-1], tmp_path / "s.txt")
    assert code == 2
    assert "end it in .csv" in err
    assert not list(tmp_path.iterdir())
    assert lethe("forget-set", "--strategy", "random", *arguments)[0] == 0
    help_text = lethe("forget-set", "--help")[1]
    assert all(name in help_text for name in list_strategies())
