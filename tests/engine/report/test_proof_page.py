"""The page of a proof says what the dict says, whatever is missing; it escapes what others wrote, and loads nothing."""

from __future__ import annotations

import base64
import copy
import html
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from pages import HOSTILE, PARTS, Page, draw_nothing, gate, made, mean, page_of, plain, row_of, section_of, share

from engine.evaluate.gates import DOES_NOT_PROVE, FAIL, INSUFFICIENT, PASS
from engine.report.page import percent
from engine.report.proof.page import proof_view
from engine.report.proof.plots import MODEL, Series, band_plot, dot_plot


@pytest.fixture(scope="module")
def proof() -> dict[str, Any]:
    return made()


@pytest.fixture(scope="module")
def written(proof: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(proof, tmp_path_factory.mktemp("page"))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


def test_the_verdict_is_told_in_words_with_what_decided_it(written: tuple[str, Page]) -> None:
    source, page = written
    section = section_of(source, "Verdict")
    text = Page(section).text
    assert "FAIL" in text
    assert "This model does not behave like one that was never trained on the samples." in text
    assert "1,437 forget samples and 2,001 test samples, compared with 2 models retrained" in text
    assert "Of 4 questions: 1 passed, 1 failed, 2 undecided." in text
    decided = re.search(r"What decided</h3>(.*?)</ul>", section, re.DOTALL)
    assert decided
    assert Page(decided[1]).text.strip() == "Can it be told? as found."
    for line in DOES_NOT_PROVE:
        assert line in text
    rows = re.findall(r"<tr>.*?</tr>", section, re.DOTALL)[1:]
    assert [re.search(r'<span class="result (\w+)">.*?</svg> (\w+)<', row, re.DOTALL).groups() for row in rows] == [  # type: ignore[union-attr]
        ("fail", "Fail"),
        ("pass", "Pass"),
        ("undecided", "Undecided"),
        ("undecided", "Undecided"),
    ]
    assert all(row.count('class="icon"') == 1 for row in rows)  # the colour is never alone
    assert len({re.search(r"<path[^>]*>", row)[0] for row in rows}) == 3  # type: ignore[index]
    shown = [Page(row).text for row in rows]
    for row, words in zip(
        shown,
        (
            ("Can it be told?", "as found", "limit of membership"),
            ("Is test accuracy kept?", "as found", "limit of test accuracy"),
            ("Does it answer alike?", "as found", "limit of agreement"),
            ("Does it come back?", "the attack was not run", "limit of relearning"),
        ),
        strict=True,
    ):
        assert all(word in row for word in words), row
    assert "no retrained model was given" not in page.text


def test_a_bar_shows_the_interval_against_the_limit(written: tuple[str, Page]) -> None:
    source, _ = written
    bars = re.findall(r'<svg class="bar".*?</svg>', source, re.DOTALL)
    assert len(bars) == 3  # none where nothing was found
    assert 'aria-label="found 0.71, interval 0.66 to 0.76; at least 0.4 passes; at most 0.6 passes"' in bars[0]
    assert 'aria-label="found 0.5, interval -1.2 to 2.1; at least -3 passes"' in bars[1]
    assert 'aria-label="found 1.9, interval 1.5 to 2.4; at most 2 passes"' in bars[2]

    def ends(bar: str, kind: str) -> tuple[float, float]:
        found = re.search(rf'class="{kind}" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', bar)
        assert found
        return float(found[1]), float(found[1]) + float(found[2])

    assert "Bars: the dark line" in source
    inside, span = ends(bars[0], "within"), ends(bars[0], "span")
    assert 0 < inside[0] < inside[1] < span[0] < span[1] < 100  # outside: fail
    inside, span = ends(bars[1], "within"), ends(bars[1], "span")
    assert inside[0] < span[0] < span[1] < inside[1] == 100  # inside, no upper limit
    inside, span = ends(bars[2], "within"), ends(bars[2], "span")
    assert 0 == inside[0] < span[0] < inside[1] < span[1]  # over the limit: undecided
    # 0.66 to 0.76 of a bar that goes from 0.4 to 0.76, with 12% more on either side.
    assert ends(bars[0], "span")[0] == pytest.approx(100 * (0.26 + 0.0432) / (0.36 * 1.24), abs=0.02)
    dots = [ends(bar, "dot") for bar in bars]
    assert sum(dots[0]) / 2 == pytest.approx(100 * (0.31 + 0.0432) / (0.36 * 1.24), abs=0.02)


@pytest.mark.parametrize(
    ("status", "words"), [(PASS, "No sign was found"), (INSUFFICIENT, "It is not known"), ("<b>?", "no known status")]
)
def test_every_status_has_words_and_an_unknown_one_is_no_pass(status: str, words: str, tmp_path: Path) -> None:
    verdict = {**made()["verdict"], "status": status, "decided_by": [], "references": 0}
    for each in verdict["gates"]:
        del each["within"]  # not every gate has limits that a bar can be drawn against
    source, page = page_of({"verdict": verdict}, tmp_path)
    assert words in page.text
    assert status in page.text
    assert 'class="box pass"' not in source or status == PASS
    assert "What decided" not in page.text
    assert 'class="bar"' not in source
    assert "Bars: the dark line" not in page.text
    assert "Kind of proof: none, no retrained model was given" in page.text
    assert "retrained without" not in section_of(source, "Verdict")


@pytest.mark.parametrize(
    ("images", "words"), [(0, ""), (1, "1 image of the request"), (1234, "1,234 images of the request")]
)
def test_images_that_could_not_be_read_are_said(images: int, words: str, tmp_path: Path) -> None:
    verdict = made()["verdict"]
    samples = {**verdict["samples"], **({"forget_unreadable": images} if images else {})}
    text = page_of({"verdict": {**verdict, "samples": samples}}, tmp_path)[1].text
    assert (words + " could not be read and took no part in the verdict" in text) == bool(images)
    assert ("could not be read" in text) == bool(images)


def test_numbers_of_the_attacks_are_those_of_the_dict(proof: dict[str, Any], written: tuple[str, Page]) -> None:
    section = section_of(written[0], "Membership attacks")
    by_model = [proof["attacks"][model] for model in ("original", "model", "reference")]
    for number, (key, text) in enumerate((("auc", plain), ("balanced_accuracy", plain), ("tpr_at_fpr_0.01", share))):
        for attack, name in (("loss", "Loss"), ("calibrated_loss", "Calibrated loss")):
            assert row_of(section, name, number) == [text(each[attack][key]) for each in by_model]
    assert "TPR at 1% FPR" in section
    strongest = max(("loss", "calibrated_loss"), key=lambda name: abs(by_model[1][name]["auc"]["value"] - 0.5))
    values = [f"{each[strongest]['auc']['value']:.3f}" for each in by_model]
    sentence = re.search(
        r"strongest attack on this model is .*?: its AUC is (\S+) .*? against (\S+) .*? on the original and (\S+) ",
        section,
    )
    assert sentence
    assert list(sentence.groups()) == [values[1], values[0], values[2]]
    plots = Page(section).images
    assert len(plots) == 3
    assert f"Loss: original {by_model[0]['loss']['auc']['value']:.3f}" in plots[0]["alt"]
    assert f"this model {by_model[1]['loss']['auc']['value']:.3f}" in plots[0]["alt"]
    assert "Dotted line at 0.500" in plots[0]["alt"]
    assert "Dotted line at 1.0%" in plots[2]["alt"]


def test_the_strongest_attack_is_the_furthest_from_chance_on_either_side() -> None:
    auc = {"loss": 0.2, "entropy": 0.7, "confidence": None}
    attacks = {
        name: {"auc": {"value": value, "low": value, "high": value, "spread": 0.0123}} for name, value in auc.items()
    }
    (section,) = proof_view({"attacks": {"model": attacks}})["sections"]
    assert "this model is “Loss”: its AUC is 0.200 (0.200 to 0.200; spread 0.012). Chance" in section.found[0]


def test_numbers_of_the_agreement_are_those_of_the_dict(proof: dict[str, Any], written: tuple[str, Page]) -> None:
    section = section_of(written[0], "Agreement with retraining, sample by sample")
    by_model = [proof["agreement"][model] for model in ("original", "model", "noise_floor")]
    for number, part in enumerate(("forget", "retain", "test")):
        assert row_of(section, "Same class", number) == [share(each[part]["top1"]) for each in by_model]
        assert row_of(section, "KL from retrained", number) == [
            plain(each[part]["kl_from_reference"]) for each in by_model
        ]
        assert row_of(section, "Margin gap", number) == [plain(each[part]["margin_gap"]) for each in by_model]
    assert row_of(section, "Tug of war (ToW)") == [plain(each["tow"]) for each in by_model]
    assert row_of(section, "RF-JSD") == [
        plain(proof["agreement"]["rf_jsd"][m]) for m in ("original", "model", "reference")
    ]
    top1 = [each["forget"]["top1"]["value"] for each in by_model]
    for value, words in zip(
        top1, ("the original did for", "retrained model for", "two retrained models do for"), strict=True
    ):
        assert f"{words} {percent(value)} (" in section
    assert len(Page(section).images) == 3


def test_numbers_of_relearning_are_those_of_the_dict(proof: dict[str, Any], written: tuple[str, Page]) -> None:
    section = section_of(written[0], "Relearning attack")
    models = proof["relearning"]["models"]
    references = [models["retrained 1"], models["retrained 2"]]
    for number, attack in enumerate(("forget_share", "unrelated")):
        for name, place in (("Held-back accuracy, before", 0), ("Held-back accuracy, after", 2)):
            values = [models[m][attack]["accuracy"]["held_back"][place] for m in ("original", "model")]
            values.append(float(np.mean([r[attack]["accuracy"]["held_back"][place] for r in references])))
            assert [cell.split(" ")[0] for cell in row_of(section, name, number)] == [
                percent(value) for value in values
            ]
        for name, key in (("Advantage", "advantage"), ("Excess, after", "excess")):
            found = [models[m][attack][key] for m in ("original", "model", "retrained 1", "retrained 2")]
            found = [each[-1] if isinstance(each, list) else each for each in found]
            expected = [plain(each, 100, 1, "", "+") for each in (*found[:2], mean(found[2:]))]
            assert row_of(section, name, number) == expected
        assert row_of(section, "Steps to the original's accuracy", number) == ["0", "2", "never, never"]
    assert row_of(section, "Linear probe, excess")[1] == plain(models["model"]["probe"]["excess"], 100, 1, "", "+")
    advantage = plain(models["model"]["forget_share"]["advantage"], 100, 1, "", "+").split(" ", 1)
    said = f"this model's advantage over retrained ones is {advantage[0]} ({advantage[1]}) points, above 0"
    assert said in html.unescape(section)
    assert section.count("points, above 0: ") == 2  # both lie above 0
    plots = Page(section).images
    assert len(plots) == 8
    assert [plot["alt"].split(" (")[0] for plot in plots[:4]] == [plot["alt"].split(" (")[0] for plot in plots[4:]]
    assert all("Dotted line at 0.500" in plots[place]["alt"] for place in (3, 7))
    assert all("Dotted line at 0.0%" in plots[place]["alt"] for place in (2, 6))
    curve = models["model"]["forget_share"]["accuracy"]["held_back"]
    assert f"this model {percent(curve[0])} (" in plots[0]["alt"]
    assert f"{percent(curve[2])} (" in plots[0]["alt"]
    assert "retrained (range of 2)" in plots[0]["alt"]
    low, high = sorted(r["forget_share"]["accuracy"]["held_back"][0] for r in references)
    assert f"({percent(low)} to {percent(high)}) at 0" in plots[0]["alt"]  # the band is their range


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "points, above 0"),
        (-0.2, 0.0, "not above 0"),
        (-0.1, 0.2, "not distinguishable from 0"),
    ],
)
def test_relearning_is_read_by_its_interval(low: float, high: float, words: str) -> None:
    relearning = made()["relearning"]
    for attack in ("forget_share", "unrelated"):
        relearning["models"]["model"][attack]["advantage"] = {"value": (low + high) / 2, "low": low, "high": high}
    (section,) = proof_view({"relearning": relearning})["sections"]
    assert all(words in sentence for sentence in section.found)


def test_numbers_of_layers_and_attention_are_those_of_the_dict(
    proof: dict[str, Any], written: tuple[str, Page]
) -> None:
    section = section_of(written[0], "Features of the layers")
    models = proof["representation"]["models"]
    references = ["retrained 1", "retrained 2"]
    for number, part in enumerate(("forget", "retain", "test")):
        found = {name: each["sets"][part] for name, each in models.items()}
        near = [
            found["original"]["knn_accuracy"],
            found["model"]["knn_accuracy"],
            mean([found[r]["knn_accuracy"] for r in references]),
        ]
        assert row_of(section, "k-NN accuracy", number) == [share(each) for each in near]
        to = [found[name]["to"]["original"]["neighbours"] for name in ("model", *references)]
        assert row_of(section, "Shared neighbours with original", number)[1:] == [share(to[0]), share(mean(to[1:]))]
        to_retrained = mean([found["model"]["to"][r]["neighbours"] for r in references])
        assert row_of(section, "Shared neighbours with retrained", number)[1] == share(to_retrained)
    assert row_of(section, "Weights changed")[1] == percent(models["model"]["changed"])
    assert row_of(section, "Distance travelled")[1] == f"{models['model']['distance']['all']:.3f}"
    assert f"{percent(models['model']['changed'])} of the weights differ" in section
    assert "have gone 25.0% to 75.0% of the way" in section
    plots = Page(section).images
    assert len(plots) == 3 + 3
    first = models["model"]["sets"]["forget"]["to"]["original"]["cka"][0]["value"]
    assert f"this model and original {first:.3f} (" in plots[0]["alt"]
    assert " at in, " in plots[0]["alt"]
    assert " at out" in plots[0]["alt"]

    section = section_of(written[0], "Attention")
    part = proof["attention"]
    overlap = part["overlap"]["forget"]
    assert row_of(section, "Overlap, with original") == [
        "\N{EN DASH}",
        plain(overlap["model"]["original"]["iou"]),
        plain(mean([overlap[r]["original"]["iou"] for r in references])),
    ]
    assert row_of(section, "Rank correlation, with retrained")[0] == plain(
        mean([overlap["original"][r]["spearman"] for r in references])
    )
    readings = [part["reading"]["test"][name]["kl"] for name in ("unmasked", "masked", "random", "between_references")]
    assert row_of(section, "KL from retrained", 1) == [plain(each) for each in readings]
    assert (
        "On forget samples, the original's output for the masked image is nearer to a retrained model's than its "
        "output for the whole image (KL -0.200, interval -0.300 to -0.100), and neither clearly nearer to nor further "
        "from it than with as many"
    ) in Page(section).text
    plots = Page(section).images
    assert len(plots) == 4
    assert "Dotted line at 0.031" in plots[0]["alt"]


@pytest.mark.parametrize("missing", [*PARTS, *(tuple(p for p in PARTS if p != only) for only in PARTS), PARTS])
def test_any_part_may_be_missing(missing: Any, proof: dict[str, Any], tmp_path: Path) -> None:
    missing = (missing,) if isinstance(missing, str) else missing
    source, page = page_of({key: value for key, value in proof.items() if key not in missing}, tmp_path)
    titles = {
        "verdict": "Verdict",
        "attacks": "Membership attacks",
        "agreement": "Agreement with retraining, sample by sample",
        "relearning": "Relearning attack",
        "representation": "Features of the layers",
        "attention": "Attention",
    }
    for part, title in titles.items():
        assert (f"<h2>{title}</h2>" in source) == (part not in missing)
    assert not re.search(r"\b(None|nan|NaN|inf|undefined)\b", page.text)
    assert "checkpoint runs/a" in page.text
    assert "versions.lethe 0.1.0" in page.text


def test_models_and_numbers_may_be_missing(proof: dict[str, Any], tmp_path: Path) -> None:
    """No references, a number that could not be measured, and one that is not finite."""
    less = copy.deepcopy(proof)
    del less["attacks"]["reference"], less["agreement"]["noise_floor"], less["attacks"]["original"]["loss"]
    less["agreement"]["model"]["forget"]["top1"]["value"] = float("nan")
    unknown = {"value": None, "low": None, "high": None, "reason": "90 non-members are too few", "direction": "d"}
    less["attacks"]["model"]["loss"]["tpr_at_fpr_0.01"] = unknown
    for part in ("relearning", "representation"):
        for name in ("retrained 1", "retrained 2"):
            del less[part]["models"][name]
    less["relearning"]["models"]["model"]["forget_share"]["advantage"] = None
    less["attention"]["reading"] = None
    for name in ("retrained 1", "retrained 2"):
        for part in ("forget", "test"):
            del less["attention"]["overlap"][part][name]
    less["unmeasured"] = {"attention": "the forget set has no samples"}
    source, page = page_of(less, tmp_path)
    assert not re.search(r"\b(None|nan|NaN|inf|undefined)\b", page.text)
    section = section_of(source, "Membership attacks")
    assert row_of(section, "Loss", 2) == [
        "\N{EN DASH}",
        "\N{EN DASH} 90 non-members are too few",
        "\N{EN DASH}",
    ]
    assert row_of(section_of(source, "Agreement with retraining, sample by sample"), "Same class")[1] == "\N{EN DASH}"
    assert "Attention: The forget set has no samples." in page.text
    assert "attacks 1.25 s, agreement 3.50 s" in page.text.replace("membership ", "")
    untouched = {**less["representation"]["models"]["model"], "untouched_backbone": True}
    for attacked in less["attacks"].values():
        for numbers in attacked.values():
            numbers["tpr_at_fpr_0.01"] = unknown
    (agreed,) = proof_view({"agreement": {"rf_jsd": less["agreement"]["rf_jsd"]}})["sections"]
    assert "No retrained model was given" in agreed.intro
    assert [row.measure.name for group in agreed.tables[0].groups for row in group.rows] == ["RF-JSD"]
    (attacked,) = proof_view({"attacks": less["attacks"]})["sections"]
    group = attacked.tables[0].groups[-1]
    assert (group.heading.hint, group.rows) == (
        "not measured: 90 non-members are too few",
        [],
    )  # once, not in each cell
    (section_,) = proof_view({"representation": {**less["representation"], "models": {"model": untouched}}})["sections"]
    assert "Only the head of this model was changed" in section_.found[0]


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    proof = made()
    proof["verdict"]["gates"][0] = gate(HOSTILE, HOSTILE, FAIL, None, None, HOSTILE)
    proof["verdict"].update(decided_by=[HOSTILE], does_not_prove=[HOSTILE], status=HOSTILE)
    for model in ("original", "model", "reference"):
        proof["attacks"][model][HOSTILE] = {HOSTILE: {"value": 0.5, "low": 0.4, "high": 0.6, "direction": HOSTILE}}
        proof["attacks"][model]["loss"]["auc"] = {"value": None, "reason": HOSTILE, "direction": HOSTILE}
    proof["representation"]["layers"][1] = HOSTILE
    proof["relearning"]["attack"]["samples"][HOSTILE] = {"held_back": 5, "test": 5}
    proof["gates"] = {HOSTILE: HOSTILE}
    proof["unmeasured"] = {HOSTILE: HOSTILE}
    source, page = page_of(proof, tmp_path, title=HOSTILE, facts={HOSTILE: HOSTILE})
    assert "<script" not in source.lower()
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 12  # shown, as text
    assert str(7919 * 7919) not in page.text  # `{{` is no template


def test_nothing_is_loaded_and_every_plot_has_words(written: tuple[str, Page]) -> None:
    source, page = written
    for loaded in ("http://", "https://", 'src="//', "url(", "@import", "<link", "<script", "<iframe", "<object"):
        assert loaded not in source
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in source
    assert len(page.images) == 3 + 3 + 8 + 6 + 4
    for image in page.images:
        assert image["src"].startswith("data:image/svg+xml;base64,")
        content = base64.b64decode(image["src"].split(",")[1], validate=True)
        assert content.rstrip().endswith(b"</svg>")
        assert not re.search(rb'(href|src)="(?!#)', content)
        assert len(image["alt"]) > 40
        assert re.search(r"\d", image["alt"])
    assert len({image["alt"] for image in page.images}) == len(page.images)
    assert [value for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data")] == [
        image["src"] for image in page.images
    ]
    drawn = [name for tag, name, _ in page.attributes if tag == "svg"]
    assert drawn.count("aria-label") + drawn.count("aria-hidden") == page.tags.count("svg")
    assert len(source) < 1_500_000


def test_what_shows_on_hover_is_in_the_list_too(written: tuple[str, Page]) -> None:
    source, page = written
    listed = Page(section_of(source, "How to read these measures")).text
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("abbr", "title")]
    assert len(titles) > 30
    assert all(re.sub(r"\s+", " ", title) in listed for title in titles)
    for key in ("auc", "top1", "advantage", "cka", "iou"):
        assert f"Direction of {key}." in listed  # what the dict itself says of how to read it
    for name in ("Interval", "Retrained model, noise floor", "Forget, retain and test samples", "CKA"):
        assert f" {name} " in listed


def test_a_plot_of_nothing_is_left_out_and_gaps_are_no_zeros() -> None:
    gap = [None, {"value": None}, {"value": float("nan")}]
    assert dot_plot("T", "x", ["a", "b", "c"], [Series("s", MODEL, gap)]) == []
    assert band_plot("T", "x", "y", ["a", "b", "c"], [Series("s", MODEL, gap)]) == []
    assert dot_plot("T", "x", [], []) == []
    (picture,) = band_plot(
        "T", "x", "y", ["a", "b", "c"], [Series("s", MODEL, [*gap[:2], {"value": 0.5, "low": 0.25, "high": 0.75}])]
    )
    assert "s 0.500 (0.250 to 0.750) at c" in picture.alt
    columns = Series("s", MODEL, [{"value": 0.5}, None]).columns()
    np.testing.assert_array_equal(columns, [[0.5, np.nan], [0.5, np.nan], [0.5, np.nan]])


def test_shares_are_drawn_in_percent_with_their_intervals_and_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = MagicMock()
    monkeypatch.setattr("engine.report.proof.plots.new_figure", lambda *_, **__: (MagicMock(), axes))
    series = [Series("s", MODEL, [{"value": 0.5, "low": 0.25, "high": 0.75}, None])]
    dot_plot("T", "x", ["a", "b"], series, line=0.01, shares=True)
    np.testing.assert_array_equal(axes.plot.call_args[0][0], [50, np.nan])
    np.testing.assert_array_equal(axes.hlines.call_args[0][1:], [[25, np.nan], [75, np.nan]])
    assert axes.axvline.call_args[0] == (1.0,)
    band_plot("T", "x", "y", ["a", "b"], series, line=0.02, shares=True)
    np.testing.assert_array_equal(axes.plot.call_args[0][1], [50, np.nan])
    np.testing.assert_array_equal(axes.fill_between.call_args[0][1:], [[25, np.nan], [75, np.nan]])
    assert axes.axhline.call_args[0] == (2.0,)
    dot_plot("T", "x", ["a", "b"], series)
    np.testing.assert_array_equal(axes.plot.call_args[0][0], [0.5, np.nan])
