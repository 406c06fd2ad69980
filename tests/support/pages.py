"""A proof with made-up numbers, and what a page says: for the tests of the page and of what is behind it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from engine.evaluate.gates import DOES_NOT_PROVE, FAIL, INSUFFICIENT, PASS
from engine.report.proof.page import write_proof

HOSTILE = "<script>alert(1)</script>\"' onerror=alert(2) {{ 7919 * 7919 }} $x^2$"
PARTS = ("verdict", "attacks", "agreement", "relearning", "representation", "attention")


class Page(HTMLParser):
    """Visible text, tags, every (tag, attribute, value), and the cells of each table row by the row's heading."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


class Numbers:
    """Numbers that are all different, so that one in the wrong place is noticed."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, direction: str | None = None, low: float = 0.1, high: float = 0.9) -> dict[str, Any]:
        value = float(self.rng.uniform(low, high))
        found: dict[str, Any] = {"value": value, "low": value - 0.0371, "high": value + 0.0529}
        return {**found, "direction": direction} if direction else found


def made() -> dict[str, Any]:
    new = Numbers()
    models = ("original", "model", "retrained 1", "retrained 2")
    layers = ["patch embedding", "block 1", "block 2", "features"]
    keys = ("auc", "balanced_accuracy", "tpr_at_fpr_0.01")
    agreement = ("top1", "kl_from_reference", "kl_to_reference", "margin_gap")
    gates = [
        gate("membership", "Can it be told?", FAIL, (0.71, 0.66, 0.76), [0.4, 0.6]),
        gate("test accuracy", "Is test accuracy kept?", PASS, (0.5, -1.2, 2.1), [-3.0, None]),
        gate("agreement", "Does it answer alike?", INSUFFICIENT, (1.9, 1.5, 2.4), [None, 2.0]),
        gate("relearning", "Does it come back?", INSUFFICIENT, None, [None, 0.6], "the attack was not run"),
    ]
    return {
        "verdict": {
            "status": FAIL,
            "decided_by": ["membership"],
            "gates": gates,
            "references": 2,
            "samples": {"forget": 1437, "retain": 8000, "test": 2001},
            "does_not_prove": list(DOES_NOT_PROVE),
        },
        "gates": {"level": 0.9, "membership_auc": 0.1},
        "seconds": {"attacks": 1.25, "agreement": 3.5},
        "unmeasured": {},
        "attacks": {
            model: {attack: {key: new(f"direction of {key}") for key in keys} for attack in ("loss", "calibrated_loss")}
            for model in ("original", "model", "reference")
        },
        "agreement": {
            **{
                model: {
                    **{
                        part: {key: new(f"direction of {key}") for key in agreement}
                        for part in ("forget", "retain", "test")
                    },
                    "tow": new("direction of tow"),
                }
                for model in ("original", "model", "noise_floor")
            },
            "rf_jsd": {model: new("direction of rf_jsd") for model in ("original", "model", "reference")},
        },
        "relearning": {
            "attack": {
                "steps": [0, 1, 2],
                "share": 0.5,
                "samples": {
                    name: {"attacked": 70, "held_back": 80, "test": 90} for name in ("forget_share", "unrelated")
                },
                "batch_size": 50,
                "lr": 0.001,
            },
            "direction": {"advantage": "direction of advantage"},
            "models": {
                model: {
                    **{
                        attack: {
                            "accuracy": {
                                part: [new()["value"] for _ in range(3)] for part in ("attacked", "held_back", "test")
                            },
                            "loss": {},
                            "excess": [new(low=-0.1, high=0.1) for _ in range(3)],
                            "auc": [new() for _ in range(3)],
                            "steps_to_original": {"original": 0, "model": 2}.get(model),
                            "advantage": new(low=0.05, high=0.1),
                        }
                        for attack in ("forget_share", "unrelated")
                    },
                    "probe": {"accuracy": {"forget": 0.5, "test": 0.5}, "excess": new()},
                }
                for model in models
            },
        },
        "representation": {
            "layers": layers,
            "samples": {"forget": 10, "retain": 10, "test": 10},
            "k": 5,
            "direction": {"cka": "direction of cka"},
            "models": {
                model: {
                    "identical": False,
                    "untouched_backbone": False,
                    "changed": new()["value"],
                    "distance": {
                        "patch embedding": 0.1,
                        "block 1": new()["value"],
                        "head": None,
                        "all": new()["value"],
                    },
                    "sets": {
                        part: {
                            "knn_accuracy": new(),
                            "share_of_way": [0.25, None, 0.5, 0.75] if model == "model" else None,
                            "to": {
                                other: {"cka": [new() for _ in layers], "cka_debiased": [], "neighbours": new()}
                                for other in models
                                if other not in ("model", model)
                            },
                        }
                        for part in ("forget", "retain", "test")
                    },
                }
                for model in models
            },
        },
        "attention": {
            "share": 0.05,
            "k": 3,
            "patches": 64,
            "samples": {"forget": 10, "test": 10},
            "direction": {"iou": "direction of iou"},
            "chance": {"iou": 0.031},
            "overlap": {
                part: {
                    model: {
                        other: {"iou": new(), "spearman": new()} for other in models if other not in ("model", model)
                    }
                    for model in models
                }
                for part in ("forget", "test")
            },
            "reading": {
                part: {
                    **{
                        name: {"top1": new(), "kl": new(), "accuracy": new()}
                        for name in ("unmasked", "masked", "random", "between_references")
                    },
                    "masked_less_unmasked": {"kl": {"value": -0.2, "low": -0.3, "high": -0.1}},
                    "masked_less_random": {"kl": {"value": 0.1, "low": -0.1, "high": 0.3}},
                }
                for part in ("forget", "test")
            },
        },
    }


def gate(
    name: str,
    question: str,
    status: str,
    value: tuple[float, float, float] | None,
    within: list[float | None] | None,
    reason: str = "as found",
) -> dict[str, Any]:
    found = None if value is None else dict(zip(("value", "low", "high"), value, strict=True))
    limit = f"limit of {name}"
    return {
        "name": name,
        "question": question,
        "status": status,
        "value": found,
        "limit": limit,
        "reason": reason,
        "within": within,
    }


def page_of(proof: dict[str, Any], folder: Path, **options: Any) -> tuple[str, Page]:
    options = {"title": "Proof", "facts": {"checkpoint": "runs/a", "versions": {"lethe": "0.1.0"}}, **options}
    source = write_proof(folder / "proof.html", json.loads(json.dumps(proof)), **options).read_text(encoding="utf-8")
    return source, Page(source)


def section_of(source: str, title: str) -> str:
    found = re.search(rf"<section[^>]*>\s*<h2>{re.escape(title)}</h2>.*?</section>", source, re.DOTALL)
    assert found, title
    return found[0]


def row_of(section: str, name: str, number: int = 0) -> list[str]:
    """Cells of the number-th row of that name, the value and what stands below it with a space between."""
    section = html.unescape(section)
    rows = re.findall(rf">{re.escape(name)}(?:</abbr>)?(?:<small>[^<]*</small>)?</th>(.*?)</tr>", section, re.DOTALL)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[number])
    return [re.sub(r"<[^>]*>", " ", cell).strip() for cell in cells]


def plain(number: dict[str, Any], scale: float = 1, digits: int = 3, unit: str = "", sign: str = "") -> str:
    value, low, high = (f"{scale * number[key]:{sign}.{digits}f}{unit}" for key in ("value", "low", "high"))
    return f"{value} {low} to {high}"


def share(number: dict[str, Any]) -> str:
    return plain(number, 100, 1, "%")


def mean(numbers: list[dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([each[key] for each in numbers])) for key in ("value", "low", "high")}


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots become empty pictures: drawing is slow, and a page drawn once shows that it works."""
    monkeypatch.setattr("engine.report.proof.plots.new_figure", lambda *_, **__: (MagicMock(), MagicMock()))
    monkeypatch.setattr("engine.report.proof.plots.legend", lambda *_: None)
    monkeypatch.setattr("engine.report.proof.plots.svg", lambda figure: "data:image/svg+xml;base64,")
