"""The page says what the numbers say, escapes what others wrote, and loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, Page
from PIL import Image
from toys import few, tiny_vit

from engine.data import Loader, Samples, open_source
from engine.errors import RunStopped
from engine.evaluate import Evaluation, compare
from engine.models.attention_masking import count_masked, random_masks, scores_and_outputs, top_mask
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import describe
from engine.report import GalleryItem, ReportData, build_gallery, write_report
from engine.report.html import duration
from engine.report.plots import confidence_histograms, loss_curves, sample_pictures

COLLAPSE = {"event": "collapse", "phase": "forget", "step": 3, "watched_accuracy": 0.123, "back_to_step": 2}


@pytest.fixture(scope="module")
def forget() -> Samples:
    train = few(open_source("digits").train, 23)
    return Samples(
        "forget", [HOSTILE, *train.ids[1:]], train.labels, train.image, ["<b>nought</b>", *train.class_names[1:]]
    )


def evaluation(forget: float, retain: float, test: float, efficacy: float, auc: float, seed: int) -> Evaluation:
    rng = np.random.default_rng(seed)
    drawn = {
        part: Predictions(rng.normal(size=(count, 10)).astype(np.float32), rng.integers(0, 10, count))
        for part, count in (("forget", 40), ("test", 60))
    }
    numbers = {
        "accuracy": {"forget": forget, "retain": retain, "test": test},
        "mia": {"efficacy": efficacy, "auc": auc, "direction": {}},
    }
    return Evaluation(numbers, drawn)


def made(forget: Samples, references: int = 2, **changed: Any) -> ReportData:
    model = tiny_vit()
    models = {"original": model, "unlearned": tiny_vit(1), **({"retrained": tiny_vit(2)} if references else {})}
    evaluations = {
        "original": evaluation(0.911, 0.922, 0.733, 0.144, 0.6551, 0),
        "unlearned": evaluation(0.713, 0.904, 0.725, 0.311, 0.5432, 1),
    }
    for i in range(references):
        evaluations[f"retrained {i + 1}"] = evaluation(0.70 - 0.02 * i, 0.91, 0.72, 0.33, 0.51, 2 + i)
    retrained = list(evaluations.values())[2:]
    seconds = {"prepare": 0.5, "forget_phase": 3.25, "retain_phase": 9.0, "unlearn": 12.5, "evaluate": 4.0}
    seen = {"forget": 460, "retain": 12_345}
    steps = [
        {"phase": phase, "epoch": 0, "step": i, "contrast": 2.5 - i / 100, "grad_norm": 9.0, "lr": 1e-3}
        for phase, count in (("forget", 4), ("retain", 200))
        for i in range(count)
    ]
    data = ReportData(
        title="Unlearning report",
        method="lethe",
        summary="contrast, then repair",
        request={"spec": "random:0.1@0", "forget": 1437, "retain": 8563, "duplicates": 3, "data": "digits"},
        config={"method": "lethe", "mask_source": "rollout", "lr": None, "kernels": {"backend": "auto"}, "seed": 0},
        metrics=compare(evaluations["unlearned"], retrained, evaluations["original"], seconds, seen),
        history=[*steps, {"phase": "forget", "step": 1, "watched_accuracy": 0.9}],
        evaluations=evaluations,
        gallery=build_gallery(models, forget, preprocessing_of(model), count=4),
        retrain_seconds=250.0 if references else None,
        environment={"lethe": "0.1.0", "packages": {"torch": "2.8"}, "cuda_devices": []},
        hashes={"weights after": "ab" * 32},
    )
    return dataclasses.replace(data, **changed)


@pytest.fixture(scope="module")
def data(forget: Samples) -> ReportData:
    return made(forget)


@pytest.fixture(scope="module")
def brief(data: ReportData) -> ReportData:
    """Without pictures: quick to render."""
    return dataclasses.replace(data, history=[], gallery=[])


def page_of(data: ReportData, folder: Path) -> tuple[str, Page]:
    source = write_report(folder / "report.html", data).read_text(encoding="utf-8")
    return source, Page(source)


def row_of(source: str, name: str) -> list[str]:
    found = re.search(rf">{re.escape(name)}</abbr>.*?</tr>", source, re.DOTALL)
    assert found
    return re.findall(r"<td[^>]*>(.*?)</td>", found[0])


def test_the_numbers_are_those_of_the_metrics(data: ReportData, tmp_path: Path) -> None:
    source, page = page_of(data, tmp_path)
    for sentence in (
        "names 1,437 samples to forget out of 10,000 training samples (14.4%) of the data “digits”",
        "3 further mentions of ids",
        "Accuracy on the forgotten samples went from 91.1% to 71.3%. On unseen test images it is 72.5% (73.3% before)",
        "kept 90.4% (92.2% before)",
        f"2 models retrained without those samples is {data.metrics['gap']['average']:.2f} points",
        f"against {data.metrics['original']['gap']['average']:.2f} points for the untouched model",
        f"differ from each other by {data.metrics['noise_floor']['average']:.2f} points",
        "Unlearning took 12.5 s, 5.0% of the 4 min 10 s that a retraining took",
        "Evidence, not a proof",
    ):
        assert sentence in page.text
    assert row_of(source, "Forget accuracy") == ["91.1%", "71.3%", "70.0%", "68.0%"]
    assert row_of(source, "Retain accuracy") == ["92.2%", "90.4%", "91.0%", "91.0%"]
    assert row_of(source, "Test accuracy") == ["73.3%", "72.5%", "72.0%", "72.0%"]
    assert row_of(source, "MIA efficacy") == ["14.4%", "31.1%", "33.0%", "33.0%"]
    assert row_of(source, "Loss AUC") == ["0.655", "0.543", "0.510", "0.510"]
    before, after = data.metrics["original"], data.metrics
    assert row_of(source, "Average gap") == [f"{m['gap']['average']:.2f}" for m in (before, after)] + ["0.50", "0.50"]
    top1 = [m["reference"]["agreement"]["top1"] for m in (before, after)] + [
        after["noise_floor"]["agreement"]["top1"]
    ] * 2
    assert row_of(source, "Agreement, top-1") == [f"{100 * value:.1f}%" for value in top1]
    kl = [m["reference"]["agreement"]["kl"] for m in (before, after)]
    assert row_of(source, "Agreement, KL")[:2] == [f"{value:.3f}" for value in kl]
    assert "12,345" in page.text  # samples seen in the retain phase
    assert "ab" * 32 in page.text
    assert "packages.torch 2.8" in page.text
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("abbr", "title")]
    assert len(titles) == 8
    assert all(title in page.text for title in titles)  # a definition that shows on hover alone is lost on paper


def test_what_others_wrote_is_escaped(data: ReportData, tmp_path: Path) -> None:
    data = dataclasses.replace(
        data,
        title=HOSTILE,
        config={"mask_source": HOSTILE},
        hashes={HOSTILE: HOSTILE},
        request={"spec": HOSTILE, "data": HOSTILE, "forget": 1, "retain": 2, "duplicates": 0},
        environment={HOSTILE: HOSTILE},
    )
    source, page = page_of(data, tmp_path)
    assert "<script" not in source.lower()
    assert "script" not in page.tags
    assert page.tags.count("b") == 4  # those of the four cards, none from a class name
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) >= 7  # shown, as text
    assert str(7919 * 7919) not in page.text  # `{{` is no template
    assert "<b>nought</b>" in page.text


def test_nothing_is_loaded(data: ReportData, tmp_path: Path) -> None:
    source, page = page_of(data, tmp_path)
    for loaded in ("http://", "https://", 'src="//', "url(", "@import", "<link"):
        assert loaded not in source
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "data", "srcset")]
    assert len(sources) == 3 + 3 + 3 * 4  # histograms, curves, gallery
    assert all(value.startswith("data:image/") for value in sources)
    for uri in sources:
        content = base64.b64decode(uri.split(",")[1], validate=True)
        if not uri.startswith("data:image/svg"):
            Image.open(io.BytesIO(content)).verify()
        else:  # nor does a picture load anything
            assert not re.search(rb'(href|src)="(?!#)', content)
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert len({image["alt"] for image in page.images}) == len(sources)
    assert "default-src 'none'" in source
    assert len(source) < 2_000_000


def test_a_collapse_is_warned_of_when_there_was_one(data: ReportData, brief: ReportData, tmp_path: Path) -> None:
    source, page = page_of(data, tmp_path)
    assert "collapsed" not in page.text
    assert 'role="alert"' not in source
    _, page = page_of(dataclasses.replace(data, history=[*data.history, COLLAPSE], gallery=[]), tmp_path)
    assert "Warning: The model collapsed during the run" in page.text
    assert "In phase forget, at step 3, the accuracy on the watched samples had fallen to 12.3%" in page.text
    assert "weights of step 2" in page.text
    assert page.text.index("collapsed") < page.text.index("What was asked")
    end = {"event": "collapse", "at": "end", "points_lost": 31.25}
    _, page = page_of(dataclasses.replace(brief, history=[end]), tmp_path)
    assert "31.2 points lower" in page.text
    assert "No step was recorded" in page.text


def test_no_reference_is_said_and_leaves_no_holes(forget: Samples, brief: ReportData, tmp_path: Path) -> None:
    source, page = page_of(made(forget, references=0), tmp_path)
    assert "Note: No retrained reference was given" in page.text
    assert "No retraining was timed in this run" in page.text
    assert "Average gap" not in page.text
    assert len(row_of(source, "Forget accuracy")) == 2
    assert not re.search(r"\b(none|nan|inf|undefined)\b", page.text.replace("cuda_devices none", ""), re.IGNORECASE)
    assert "lr not set" in page.text
    _, page = page_of(brief, tmp_path)
    assert "No retrained reference" not in page.text


def test_a_single_reference_has_no_noise_floor(forget: Samples, tmp_path: Path) -> None:
    source, page = page_of(made(forget, references=1, gallery=[], history=[]), tmp_path)
    assert "1 model retrained without those samples" in page.text
    assert "the noise floor, by which two of them differ, is not known" in page.text
    assert row_of(source, "Average gap")[2] == "\N{EN DASH}"
    assert not re.search(r"\b(None|nan)\b", page.text)


def test_a_model_that_is_no_closer_than_before_is_warned_of(brief: ReportData, tmp_path: Path) -> None:
    models = brief.evaluations
    worse = compare(models["original"], [models["retrained 1"]], models["unlearned"])
    _, page = page_of(dataclasses.replace(brief, metrics=worse), tmp_path)
    assert "Warning: The unlearned model is no closer to retraining than before" in page.text
    assert "Unlearning closed" not in page.text
    _, page = page_of(brief, tmp_path)
    assert "no closer" not in page.text
    assert "Unlearning closed" in page.text


@pytest.mark.parametrize("source", ["rollout", "lowest", "random"])
def test_gallery_masks_are_those_of_the_run(forget: Samples, source: Any) -> None:
    model, other = tiny_vit(), tiny_vit(1)
    info, preprocessing = describe(model), preprocessing_of(model)
    gallery = build_gallery(
        {"original": model, "unlearned": other}, forget, preprocessing, count=5, share=0.2, source=source, seed=3
    )
    k = count_masked(info, 0.2)
    assert k == 3
    chosen = [forget.ids.index(item.id) for item in gallery]
    assert chosen == [0, 6, 11, 16, 22]  # spread over the set, both ends included
    loader = Loader(forget, preprocessing, batch_size=len(forget))
    images = next(iter(loader.ordered())).images
    scores, _ = scores_and_outputs(model, images, info)
    predictions = {"original": predict(model, loader), "unlearned": predict(other, loader)}
    for item, i in zip(gallery, chosen, strict=True):
        assert item.mask.shape == item.scores.shape == (4, 4)
        assert item.mask.sum() == k
        expected = top_mask(scores[i : i + 1], k, source)
        if source == "random":
            expected = random_masks([i], info, k, seed=3)
        np.testing.assert_array_equal(item.mask, expected.numpy().reshape(4, 4))
        np.testing.assert_allclose(item.scores, scores[i].reshape(4, 4), rtol=1e-4)
        original = np.asarray(forget.image(i))
        np.testing.assert_array_equal(item.image, np.repeat(original[..., None], 3, axis=2))
        for name, p in item.probabilities.items():
            assert p == pytest.approx(float(predictions[name].confidence[i]), rel=1e-4)
        assert item.label == forget.class_names[forget.labels[i]]
    assert len(build_gallery({"original": model}, few(forget, 1), preprocessing)) == 1


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)


def test_pictures_hide_the_masked_patches_and_no_others() -> None:
    mask = np.zeros((2, 3), dtype=bool)
    mask[1, 2] = True
    scores = np.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.9]])
    image = np.full((8, 12, 3), 200, dtype=np.uint8)
    item = GalleryItem(id="a", label="b", image=image, scores=scores, mask=mask, probabilities={})
    pictures = sample_pictures(item)
    masked, attention = pixels(pictures["masked"].src), pixels(pictures["attention"].src)
    assert masked.shape == (128, 192, 3)
    assert (masked[:64] == 200).all()
    assert (masked[64:, :128] == 200).all()
    assert (masked[70:120, 136:186] == 0).all()
    assert masked[66, 130].tolist() == [0xD5, 0x5E, 0x00]  # the rim shows a mask on black pictures
    assert attention[100, 160].sum() > attention[100, 10].sum() > attention[10, 10].sum()
    assert "1 of 6 patches hidden" in pictures["masked"].alt
    large = dataclasses.replace(item, image=np.random.default_rng(0).integers(0, 255, (300, 450, 3), dtype=np.uint8))
    assert pixels(sample_pictures(large)["image"].src).shape == (128, 192, 3)


def test_curves_and_histograms_show_their_data(forget: Samples) -> None:
    history = [
        {"phase": phase, "epoch": 0, "step": i, "a": 2.0 - i, "_b$": 1.0, "grad_norm": 77.0, "lr": 0.5}
        for phase in ("forget", "retain")
        for i in range(3)
    ]
    alts = [picture.alt for picture in loss_curves(history)]
    assert [alt.split(":")[0] for alt in alts] == ["Loss curve of phase forget", "Loss curve of phase retain"]
    assert "a from 2 to 0 over 3 steps" in alts[0]
    assert "grad_norm" not in alts[0]
    sure = Predictions(np.array([[50.0, 0.0]] * 4, dtype=np.float32), np.zeros(4, dtype=np.int64))
    wrong = Predictions(sure.logits, np.ones(4, dtype=np.int64))
    histogram = confidence_histograms({"original": Evaluation({}, {"forget": sure, "test": wrong})})[0]
    assert "100.0% on forget samples, 0.0% on test images" in histogram.alt


def test_a_write_that_fails_leaves_the_earlier_report(brief: ReportData, tmp_path: Path, monkeypatch: Any) -> None:
    earlier, _ = page_of(brief, tmp_path)

    def full(path: Path, text: str, **_: Any) -> int:
        path.write_bytes(text[:100].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunStopped, match=r"no space left to write .*report\.html"):
        write_report(tmp_path / "report.html", dataclasses.replace(brief, title="another"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.40 s"),
        (9.5, "9.50 s"),
        (119.0, "119.0 s"),
        (120, "2 min 00 s"),
        (3725, "62 min 05 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_phases_that_alternate_have_a_curve_each() -> None:
    names = ["forget", "retain", "retain", "forget", "forget"]
    steps = [0, 0, 1, 0, 1]
    history = [{"phase": name, "step": step, "ce": 1.0} for name, step in zip(names, steps, strict=True)]
    history += [{"phase": "forget", "step": 0, "ce": 1.0}]  # begins anew, with nothing between
    alts = [picture.alt for picture in loss_curves(history)]
    told = [(alt.split(":")[0].removeprefix("Loss curve of phase "), alt.rsplit("over ", 1)[1]) for alt in alts]
    assert told == [("forget", "1 steps"), ("retain", "2 steps"), ("forget (2)", "2 steps"), ("forget (3)", "1 steps")]
