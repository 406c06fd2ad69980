"""Features and weights against cases whose answer is known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import timm
import torch
from toys import few, tiny_vit

from engine.data import Loader, Samples, open_source
from engine.errors import UserError
from engine.evaluate.representation import (
    cka_interval,
    compare_features,
    compare_weights,
    head_features,
    layer_features,
    linear_cka,
    nearest_neighbours,
    shared_neighbours,
    vote,
)
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import outputs


@pytest.fixture(scope="module")
def digits() -> Samples:
    return open_source("digits").train


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + 3.0


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019 from Gram matrices [n, n]: HSIC(K, L) = tr(K H L H)."""
    h = np.eye(len(x)) - 1 / len(x)
    k, m = x @ x.T, y @ y.T
    hsic = [np.trace(a @ h @ b @ h) for a, b in ((k, m), (k, k), (m, m))]
    return float(hsic[0] / np.sqrt(hsic[1] * hsic[2]))


def direct_unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, equation 5: Gram matrices without their diagonals."""
    n, one = len(x), np.ones(len(x))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    terms = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(terms / (n * (n - 3)))


def test_cka_is_the_direct_formula() -> None:
    x = features(40, 7)
    y = x[:, :5] ** 2 + features(40, 5, seed=1)
    assert linear_cka(x, y) == pytest.approx(direct_cka(x, y), rel=1e-9)
    debiased = direct_unbiased_hsic(x, y) / np.sqrt(direct_unbiased_hsic(x, x) * direct_unbiased_hsic(y, y))
    assert linear_cka(x, y, debiased=True) == pytest.approx(debiased, rel=1e-9)
    assert debiased < direct_cka(x, y) - 0.01  # the two can be told apart


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift(debiased: bool) -> None:
    x, y = features(50, 6), features(50, 6, seed=1)
    rotation = np.linalg.qr(features(6, 6, seed=2))[0]
    moved = (x @ rotation * 7 + 100).astype(np.float32)
    assert linear_cka(x, moved, debiased=debiased) == pytest.approx(1, abs=1e-6)
    assert linear_cka(moved, y, debiased=debiased) == pytest.approx(linear_cka(x, y, debiased=debiased), abs=1e-5)
    assert linear_cka(x * np.arange(1, 7), x, debiased=debiased) < 0.95  # but a stretch along one axis it does


def test_few_samples_make_unrelated_features_alike_unless_debiased() -> None:
    draws = [(features(30, 40, seed=2 * i), features(30, 40, seed=2 * i + 1)) for i in range(20)]
    assert np.mean([linear_cka(x, y) for x, y in draws]) > 0.5
    assert np.mean([linear_cka(x, y, debiased=True) for x, y in draws]) == pytest.approx(0, abs=0.03)


def test_cka_makes_no_matrix_of_samples_by_samples() -> None:
    x = features(200_000, 3)  # [n, n] would be 320 GB
    assert linear_cka(x, x[:, ::-1]) == pytest.approx(1)
    assert cka_interval(x, features(200_000, 3, seed=1)).high < 0.01


def test_features_that_are_the_same_for_all_samples_are_like_nothing() -> None:
    constant = np.full((30, 4), 0.1, dtype=np.float32)
    constant[::2] += 1e-8  # what rounding leaves
    for debiased in (False, True):
        assert linear_cka(constant, features(30, 4), debiased=debiased) == 0
    assert cka_interval(features(30, 4), constant) == (0, 0, 0)


def test_interval_of_cka_is_that_of_leaving_groups_out() -> None:
    x = features(60, 4)
    y = x + 1.5 * features(60, 4, seed=1)
    found = cka_interval(x, y, seed=3)
    groups = np.array_split(np.random.default_rng(3).permutation(60), 20)
    left = [linear_cka(np.delete(x, group, axis=0), np.delete(y, group, axis=0)) for group in groups]
    error = np.sqrt(19 / 20 * ((left - np.mean(left)) ** 2).sum())
    assert found.value == linear_cka(x, y)
    assert found.low == pytest.approx(found.value - 2.0930 * error, rel=1e-4)
    assert found.high == pytest.approx(found.value + 2.0930 * error, rel=1e-4)
    assert 0.05 < found.high - found.low < 0.5
    assert cka_interval(x, x).high <= 1


def test_cka_errors() -> None:
    with pytest.raises(UserError, match="of 5 and 6 samples"):
        linear_cka(features(5, 2), features(6, 2))
    with pytest.raises(UserError, match="at least 4"):
        cka_interval(features(3, 2), features(3, 2))


def test_neighbours_by_hand() -> None:
    bank = np.array([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    query = np.array([[5.0, 0.0], [0.0, 0.1]])
    # cosines of the first: 1, .995, 0, -1, .707; of the second: 0, .0995, 1, 0, .707
    assert nearest_neighbours(query, bank, k=3).tolist() == [[0, 1, 4], [2, 4, 1]]
    assert nearest_neighbours(query, bank, k=5).tolist()[1] == [2, 4, 1, 0, 3]  # a tie: the lowest row first
    assert nearest_neighbours(bank, bank, k=2, leave_one_out=True).tolist()[0] == [1, 4]
    assert nearest_neighbours(bank, bank, k=1).ravel().tolist() == [0, 1, 2, 3, 4]


def test_votes_by_hand() -> None:
    labels = np.array([2, 0, 1, 1, 0])
    assert vote(np.array([[2, 0, 3]]), labels).tolist() == [1]  # two of three
    assert vote(np.array([[0, 1, 2, 3, 4]]), labels).tolist() == [0]  # two and two: class 0 is nearer
    assert vote(np.array([[0, 2, 3, 1, 4]]), labels).tolist() == [1]
    assert vote(np.array([[0, 1, 2]]), labels).tolist() == [2]  # one each: the nearest
    assert shared_neighbours(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]])).tolist() == [1.0, 0.5]


def by_hand(model: torch.nn.Module, samples: Samples) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Normalised images, and the tokens behind each block."""
    preprocessing = preprocessing_of(model)
    images = torch.stack([samples.tensor(i, 1) for i in range(len(samples))])
    tokens = [model._pos_embed(model.patch_embed(preprocessing.normalise(images)))]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    return preprocessing.normalise(images), tokens


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layers_are_read_as_the_head_reads_them(pool: str, digits: Samples) -> None:
    model = tiny_vit(global_pool=pool, reg_tokens=2).train()
    samples = few(digits, 11)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    loader = Loader(samples, preprocessing_of(model), batch_size=4)
    found, labels = layer_features(model, loader)
    assert calls == [4, 4, 3]  # one pass
    handle.remove()
    assert not model.training
    assert labels.tolist() == samples.labels.tolist()
    assert list(found) == ["patch embedding", "block 1", "block 2", "features"]
    with torch.no_grad():
        images, tokens = by_hand(model, samples)
        read = [t[:, 0] if pool == "token" else t[:, 3:].mean(1) for t in tokens[1:]]
        expected = [model.patch_embed(images).mean(1), *read, outputs(model, images, "features")]
    for mine, theirs in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["features"], head_features(model, loader)[0])
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_of_swin_are_its_blocks_by_stage() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2), num_heads=(2, 3), num_classes=5
    )
    rng = np.random.default_rng(0)
    images = [torch.tensor(rng.normal(size=(3, 56, 56)), dtype=torch.float32) for _ in range(4)]
    samples = Samples("random", [str(i) for i in range(4)], np.arange(4), images.__getitem__)
    found, _ = layer_features(model, Loader(samples, preprocessing_of(model), batch_size=4))
    assert list(found) == ["patch embedding", "stage 1 block 1", "stage 2 block 1", "stage 2 block 2", "features"]
    assert [each.shape for each in found.values()] == [(4, 24), (4, 24), (4, 48), (4, 48), (4, 48)]
    stage = model.layers[0](model.patch_embed(torch.stack(images)))
    np.testing.assert_allclose(found["stage 1 block 1"], stage.mean((1, 2)).detach(), rtol=1e-4, atol=1e-5)
    weights = compare_weights(model, copy.deepcopy(model))
    assert weights["identical"]
    assert {"stage 2 block 2", "head", "other", "patch embedding", "all"} < set(weights["distance"])


def test_weights_tell_a_changed_head_from_a_changed_model() -> None:
    original = tiny_vit()
    untouched = compare_weights(copy.deepcopy(original), original)
    assert (untouched["identical"], untouched["untouched_backbone"], untouched["changed"]) == (True, True, 0)
    assert set(untouched["distance"].values()) - {None} == {0.0}
    assert untouched["distance"]["patch embedding"] == 0.0

    head = copy.deepcopy(original)
    with torch.no_grad():
        head.head.weight += 1.0
    found = compare_weights(head, original)
    assert (found["identical"], found["untouched_backbone"], found["changed"]) == (False, True, 0)
    assert found["distance"]["head"] > 0
    assert [found["distance"][part] for part in ("patch embedding", "block 1", "block 2", "other")] == [0, 0, 0, 0]

    inside = copy.deepcopy(original)
    with torch.no_grad():
        inside.blocks[1].mlp.fc1.weight *= 1.5
    found = compare_weights(inside, original)
    assert (found["identical"], found["untouched_backbone"]) == (False, False)
    block = original.blocks[1]
    whole = torch.cat([p.detach().flatten() for p in block.parameters()]).norm()
    moved = 0.5 * float(block.mlp.fc1.weight.detach().norm() / whole)
    assert found["distance"]["block 2"] == pytest.approx(moved, rel=1e-5)
    assert found["distance"]["block 1"] == found["distance"]["head"] == 0
    backbone = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in original.head.parameters())
    assert found["changed"] == pytest.approx(block.mlp.fc1.weight.numel() / backbone)

    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken.blocks[0].norm1.bias[0] = float("nan")
    assert not compare_weights(broken, copy.deepcopy(broken))["untouched_backbone"]
    with pytest.raises(UserError, match="other has other weights than the original"):
        compare_weights(tiny_vit(depth=1), original, "other")


def test_report_tells_who_has_whose_features(digits: Samples) -> None:
    original, retrained = tiny_vit(global_pool="avg"), tiny_vit(1, global_pool="avg")
    head = copy.deepcopy(original)
    with torch.no_grad():
        head.head.weight.normal_()
    models = {
        "original": original,
        "head": head,
        "another retrain": tiny_vit(3, global_pool="avg"),
        "retrained": retrained,
        "retrained 2": tiny_vit(2, global_pool="avg"),
    }
    sets = {"forget": few(digits, 30), "retain": digits.subset(range(30, 400)), "test": digits.subset(range(900, 960))}
    report = compare_features(models, sets, references=["retrained", "retrained 2"], max_samples=100, device="cpu")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["samples"] == {"forget": 30, "retain": 100, "test": 60}
    layers = report["layers"]
    assert layers == ["patch embedding", "block 1", "block 2", "features"]
    found = report["models"]
    assert [found[name]["untouched_backbone"] for name in models] == [True, True, False, False, False]
    assert [found[name]["identical"] for name in models] == [True, False, False, False, False]
    for name in sets:
        mine = found["head"]["sets"][name]
        assert mine["share_of_way"] == pytest.approx([0] * len(layers), abs=1e-6)
        assert [each["value"] for each in mine["to"]["original"]["cka"]] == pytest.approx([1] * len(layers))
        assert mine["to"]["original"]["neighbours"]["value"] == 1
        assert mine["knn_accuracy"] == found["original"]["sets"][name]["knn_accuracy"]
        assert mine["to"]["retrained"] == found["original"]["sets"][name]["to"]["retrained"]
        assert set(mine["to"]) == {"original", "retrained", "retrained 2"}
        assert mine["to"]["retrained"]["neighbours"]["value"] < 1
        assert found["original"]["sets"][name]["share_of_way"] is None
        assert set(found["retrained"]["sets"][name]["to"]) == {"original", "retrained 2"}
        assert found["another retrain"]["sets"][name]["share_of_way"][-1] == pytest.approx(0.5, abs=0.2)
    # the way's share from the numbers beside it
    mine = found["another retrain"]["sets"]["test"]
    to = {name: 1 - mine["to"][name]["cka_debiased"][-1] for name in mine["to"]}
    theirs = (to["retrained"] + to["retrained 2"]) / 2
    assert mine["share_of_way"][-1] == pytest.approx(to["original"] / (to["original"] + theirs))
    # the k-NN figures by hand: the retained samples' own votes leave each out
    retain = sets["retain"].subset(np.linspace(0, 369, 100).astype(np.int64))
    (bank, votes), (test, labels) = (
        head_features(original, Loader(samples, preprocessing_of(original), batch_size=50))
        for samples in (retain, sets["test"])
    )
    bank, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, test))
    inside, outside = np.argsort(-(bank @ bank.T), axis=1)[:, 1:6], np.argsort(-(test @ bank.T), axis=1)[:, :5]
    right = {"retain": vote(inside, votes) == votes, "test": vote(outside, votes) == labels}
    for name, each in right.items():
        assert found["original"]["sets"][name]["knn_accuracy"]["value"] == pytest.approx(each.mean(), abs=1e-9)


def test_report_without_references_and_of_a_copy(digits: Samples) -> None:
    sets = {"retain": few(digits, 20)}
    models = {"original": tiny_vit(), "model": tiny_vit(1)}
    found = compare_features(models, sets, device="cpu")["models"]["model"]["sets"]["retain"]
    assert found["share_of_way"] is None
    assert set(found["to"]) == {"original"}
    models = {"original": tiny_vit(), "model": tiny_vit(), "retrained": tiny_vit()}
    report = compare_features(models, sets, references=["retrained"], device="cpu")
    assert report["models"]["model"]["sets"]["retain"]["share_of_way"] == [None] * 4


def test_report_errors(digits: Samples) -> None:
    models, sets = {"original": tiny_vit()}, {"retain": few(digits, 20)}
    with pytest.raises(UserError, match="no model 'retrain'; did you mean 'retrained'"):
        compare_features({**models, "retrained": tiny_vit()}, sets, references=["retrain"])
    with pytest.raises(UserError, match="no set 'retain'"):
        compare_features(models, {"test": few(digits, 20)})
    with pytest.raises(UserError, match="the forget set has 3 samples, at least 4"):
        compare_features(models, {**sets, "forget": few(digits, 3)})
    with pytest.raises(UserError, match="the retain set has 5 samples, at least 6"):
        compare_features(models, {"retain": few(digits, 5)})
    with pytest.raises(UserError, match="smaller has other weights"):
        compare_features({**models, "smaller": tiny_vit(depth=1)}, sets)
