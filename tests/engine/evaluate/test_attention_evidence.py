"""Overlap of attention maps, and the original's reading of masked images, against small cases."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import timm
import torch
from toys import few, tiny_vit

from engine.data import Loader, Samples, open_source
from engine.errors import UserError
from engine.evaluate.attention import attention_report, chance_iou, read_masked, spearman, top_iou
from engine.evaluate.options import MeasureOptions
from engine.models.attention_masking import random_masks, scores_and_outputs
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import describe


@pytest.fixture(scope="module")
def digits() -> Samples:
    return open_source("digits").train


def looking(seed: int = 0, **changed: object) -> torch.nn.Module:
    """A tiny ViT whose attention is far from uniform, so that masks differ from image to image, and who is sure."""
    model = tiny_vit(seed, **changed)
    with torch.no_grad():
        model.head.weight *= 50
        for block in model.blocks:
            block.attn.qkv.weight *= 10
    return model


def test_iou_by_hand() -> None:
    first = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]])
    second = np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.1, 0.2], [0.4, 0.1, 0.3, 0.2], [0.3, 0.7, 0.0, 0.0]])
    # none of two in common, both, one of three; in the last row a tie goes to the lower patch
    assert top_iou(first, second, 2).tolist() == pytest.approx([0, 1, 1 / 3, 1])


def test_chance_is_the_mean_over_all_pairs_of_choices() -> None:
    choices = [set(c) for c in itertools.combinations(range(6), 2)]
    expected = np.mean([len(a & b) / len(a | b) for a in choices for b in choices])
    assert chance_iou(6, 2) == pytest.approx(expected)
    assert chance_iou(5, 4) == pytest.approx(0.2 * 1 + 0.8 * 3 / 5)
    assert 0.02 < chance_iou(196, 10) < 0.04


def test_rank_correlation_by_hand() -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.4]] * 4)
    others = np.array([[1.0, 2.0, 3.0, 100.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    assert spearman(scores, others).tolist() == pytest.approx([1, -1, 0.8, 0])
    # ranks 1.5, 1.5, 3.5, 3.5 against 1, 2, 3, 4
    assert spearman(scores[:1], np.array([[0.0, 0.0, 1.0, 1.0]]))[0] == pytest.approx(4 / np.sqrt(4 * 5))


def test_readings_are_the_originals_answers_to_blackened_images(digits: Samples) -> None:
    model, samples = looking(), few(digits, 9)
    preprocessing = preprocessing_of(model)
    loader = Loader(samples, preprocessing, batch_size=4)
    found = read_masked(model.train(), loader, 3, seed=5)
    assert not model.training
    images = torch.stack([samples.tensor(i, 1) for i in range(9)])
    scores, logits = scores_and_outputs(model, preprocessing.normalise(images), describe(model))
    drawn = random_masks(range(9), describe(model), 3, 5)
    expected = [logits]
    for mask in (torch.zeros(9, 16, dtype=torch.bool).scatter(1, scores.topk(3).indices, True), drawn):
        black = images.clone()
        for image, patch in mask.nonzero().tolist():
            row, column = 2 * (patch // 4), 2 * (patch % 4)
            black[image, :, row : row + 2, column : column + 2] = 0
        with torch.no_grad():
            expected.append(model(preprocessing.normalise(black)))
    assert list(found) == ["unmasked", "masked", "random"]
    for mine, theirs in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(mine.logits, theirs, rtol=1e-4, atol=1e-5)
        assert mine.labels.tolist() == samples.labels.tolist()
    assert not np.allclose(found["masked"].logits, found["random"].logits, atol=1e-3)


def test_report_of_a_reference_that_is_the_original(digits: Samples) -> None:
    original = looking()
    copied, other = copy.deepcopy(original), looking(1)
    report = attention_report(
        original,
        {"other": other},
        {"copy": copied, "another": looking(2)},
        few(digits, 40),
        digits.subset(range(900, 1000)),
        share=0.2,
        options=MeasureOptions(max_samples=50, device="cpu"),
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["k"], report["patches"]) == (3, 16)
    assert report["samples"] == {"forget": 40, "test": 50}
    assert report["chance"]["iou"] == chance_iou(16, 3)
    for name in ("forget", "test"):
        overlap = report["overlap"][name]
        assert set(overlap["original"]) == {"copy", "another"}
        assert set(overlap["copy"]) == {"original", "another"}
        assert overlap["copy"]["original"]["iou"]["value"] == 1
        assert overlap["copy"]["original"]["spearman"]["value"] == pytest.approx(1)
        assert overlap["other"]["copy"] == overlap["other"]["original"]
        assert overlap["other"]["original"]["iou"]["value"] < 0.9
        assert overlap["other"]["original"]["spearman"]["value"] < 0.9
    only = attention_report(
        original,
        {},
        {"copy": copied},
        few(digits, 40),
        few(digits, 30),
        share=0.2,
        options=MeasureOptions(device="cpu"),
    )
    reading = only["reading"]["forget"]
    assert reading["unmasked"]["top1"]["value"] == 1
    assert reading["unmasked"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert reading["masked"]["kl"]["value"] > 0.01
    assert reading["masked_less_unmasked"]["kl"]["value"] == pytest.approx(reading["masked"]["kl"]["value"])
    assert reading["masked_less_unmasked"]["top1"]["value"] == pytest.approx(reading["masked"]["top1"]["value"] - 1)
    for key in ("top1", "kl"):
        assert reading["masked_less_random"][key]["value"] == pytest.approx(
            reading["masked"][key]["value"] - reading["random"][key]["value"]
        )
    assert reading["between_references"] is None
    assert 0 <= reading["masked"]["accuracy"]["value"] <= 1


def test_likeness_is_the_mean_over_references_and_kl_is_from_them(digits: Samples) -> None:
    original, references = looking(), {"one": looking(1, drop_rate=0.5).train(), "two": looking(2)}
    samples = few(digits, 20)
    report = attention_report(original, {}, references, samples, samples, options=MeasureOptions(device="cpu"))
    preprocessing = preprocessing_of(original)
    images = preprocessing.normalise(torch.stack([samples.tensor(i, 1) for i in range(20)]))
    with torch.no_grad():
        q = original(images).double().log_softmax(1)
        ps = [each(images).double().log_softmax(1) for each in references.values()]
    kl = np.mean([float((p.exp() * (p - q)).sum(1).mean()) for p in ps])
    top1 = np.mean([float((p.argmax(1) == q.argmax(1)).double().mean()) for p in ps])
    found = report["reading"]["forget"]
    assert found["unmasked"]["kl"]["value"] == pytest.approx(kl, rel=1e-4)
    assert found["unmasked"]["top1"]["value"] == pytest.approx(top1)
    accuracy = float((q.argmax(1).numpy() == samples.labels).mean())
    assert found["unmasked"]["accuracy"]["value"] == pytest.approx(accuracy)
    both = np.mean([float((a.exp() * (a - b)).sum(1).mean()) for a, b in (ps, ps[::-1])])
    assert found["between_references"]["kl"]["value"] == pytest.approx(both, rel=1e-4)


def test_report_without_references_has_maps_alone(digits: Samples) -> None:
    report = attention_report(
        looking(), {"model": looking(1)}, {}, few(digits, 5), few(digits, 5), options=MeasureOptions(device="cpu")
    )
    assert report["reading"] is None
    assert set(report["overlap"]["forget"]["model"]) == {"original"}


def test_windowed_models_are_read_by_their_rule() -> None:
    def swin(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2), num_heads=(2, 3), num_classes=5
        )

    rng = np.random.default_rng(0)
    images = [torch.tensor(rng.normal(size=(3, 56, 56)), dtype=torch.float32) for _ in range(6)]
    samples = Samples("random", [str(i) for i in range(6)], np.arange(6) % 5, images.__getitem__)
    report = attention_report(
        swin(0), {}, {"retrained": swin(1)}, samples, samples, options=MeasureOptions(device="cpu")
    )
    assert (report["patches"], report["k"]) == (49, 2)
    assert report["overlap"]["forget"]["retrained"]["original"]["iou"]["value"] < 1
    assert report["reading"]["test"]["masked"]["kl"]["value"] > 0


def test_errors(digits: Samples) -> None:
    model, samples = tiny_vit(), few(digits, 5)
    with pytest.raises(UserError, match="the test set has no samples"):
        attention_report(model, {}, {}, samples, few(digits, 0), options=MeasureOptions(device="cpu"))
    with pytest.raises(UserError, match="a name is given twice"):
        attention_report(model, {"a": model}, {"a": model}, samples, samples)
    with pytest.raises(UserError, match="a name is given twice"):
        attention_report(model, {"original": model}, {}, samples, samples)
    with pytest.raises(UserError, match=r"coarse has a grid of \(2, 2\) patches and 10 classes"):
        attention_report(model, {"coarse": tiny_vit(patch_size=4)}, {}, samples, samples)
    with pytest.raises(UserError, match="and 3 classes"):
        attention_report(model, {}, {"retrained": tiny_vit(num_classes=3)}, samples, samples)
    with pytest.raises(UserError, match="option share=0: expected between 0 and 1"):
        attention_report(model, {}, {}, samples, samples, share=0)
