"""The leaderboard: which requests and methods it runs, and whether seeds agree on the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toy_subject import toy_subject
from toys import tiny_vit
from typer.testing import CliRunner

from bench.__main__ import app
from bench.publish.results import RESULTS
from bench.quality import retrain_cost
from bench.quality.retrain_cost import DIGITS, Subject, run_retrain_cost
from bench.quality.retrain_summary import foresight, rank_stability
from engine.errors import UserError
from engine.models.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # runs of the engine, in processes of their own


def rows(gaps: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    return [
        {"method": method, "seed": seed, "gap": None if gap is None else {"average": gap}}
        for method, found in gaps.items()
        for seed, gap in enumerate(found)
    ]


def test_stability_is_kendalls_tau_between_seeds() -> None:
    """By hand: of three pairs of methods, seeds 0 and 1 agree on all, and seed 2 on two of them."""
    found = rank_stability(rows({"a": [1, 2, 2.5], "b": [2, 3, 2], "c": [3, 4, 9], "retrain": [9, 0, 5]}))
    assert found == pytest.approx({"mean": (1 + 1 / 3 + 1 / 3) / 3, "least": 1 / 3})


def test_stability_needs_seeds_and_methods_that_have_them() -> None:
    assert rank_stability(rows({"a": [1], "b": [2], "c": [3]})) is None
    assert rank_stability(rows({"a": [1, 2], "b": [2, 1]})) is None
    assert rank_stability(rows({"a": [1, 2], "b": [2, 3], "c": [3, None]})) is None  # its second seed is still to come
    assert rank_stability(rows({"a": [1, 2], "b": [2, 3], "c": [3, 4], "d": [0, None]})) == {"mean": 1.0, "least": 1.0}
    # The third seed has two methods: nothing is said of it.
    some = rank_stability(rows({"a": [1, 2, 9], "b": [2, 3, 1], "c": [3, 4, None], "d": [4, 1, None]}))
    assert some == {"mean": 0.0, "least": 0.0}


def test_foresight_is_kendalls_tau_between_score_and_gap() -> None:
    def entry(method: str, score: float | None, gap: float) -> dict[str, Any]:
        return {"method": method, "score": None if score is None else {"mean": score}, "gap": {"mean": gap}}

    found = [entry("a", 1.0, 5.0), entry("b", 2.0, 6.0), entry("c", 3.0, 5.5), entry("retrain", 9.0, 0.1)]
    assert foresight(found) == pytest.approx(1 / 3)  # two of three pairs
    assert foresight([*found[:2], entry("c", None, 5.5)]) is None


def test_chosen_methods_run_beside_the_retrain_and_the_best_comes_first(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = toy_subject(tmp_path)
    settings = ["max_steps=1", "batch_size=16", "precision=fp32"]
    methods = ("finetune", "gradient_ascent", "random_labels")
    report = run_retrain_cost([subject], 2, settings, None, None, None, projection=False, methods=methods)
    entry = report["tasks"]["toy"]
    assert {row["method"] for row in entry["rows"]} == {*methods, "retrain"}
    assert entry["stability"]["least"] <= entry["stability"]["mean"] <= 1
    assert -1 <= entry["foresight"] <= 1
    assert entry["untouched"]["score"] != entry["rows"][0]["score"] > 0
    shown = capsys.readouterr().out
    order = sorted(entry["summary"], key=lambda each: each["gap"]["mean"])
    places = [shown.rindex(f"\n {each['method']}") for each in order]
    assert places == sorted(places)
    assert "Kendall's tau" in shown
    run_retrain_cost([subject], 1, settings, None, None, None, projection=False, methods=("s3t",))
    assert "s3t: left out, it needs a checkpoint of `lethe train --sliced`" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown method 'finetun'; did you mean 'finetune'"):
        run_retrain_cost([subject], 2, settings, None, None, None, projection=False, methods=("finetun",))


def test_without_a_retrain_the_methods_run_alone(tmp_path: Any) -> None:
    names = [str(save_checkpoint(tiny_vit(seed=seed), tmp_path / str(seed))) for seed in range(2)]
    subject = Subject(
        name="toy", data="digits", forget="random:0.01@0", checkpoint=names[0], references=tuple(names[1:])
    )
    settings = ["max_steps=1", "batch_size=16", "precision=fp32"]
    chosen: Any = {"projection": False, "methods": ("gradient_ascent",), "retrain": False}
    (row,) = run_retrain_cost([subject], 1, settings, None, None, None, **chosen)["tasks"]["toy"]["rows"]
    assert row["method"] == "gradient_ascent"
    assert row["share"] is None
    assert row["gap"]["average"] > 0
    with pytest.raises(UserError, match="--no-retrain: digits has no retrained model to be compared with"):
        run_retrain_cost([subject, DIGITS], 1, settings, None, None, None, **chosen)


def test_the_command_asks_for_a_random_tenth_and_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(retrain_cost, "run_retrain_cost", lambda *a, **options: given.append((*a, options)))
    command = ["leaderboard", "--checkpoint", "c", "--data", "d", "--forget", "f", "--reference", "a"]
    assert CliRunner().invoke(app, [*command, "--class", "cat", "--method", "lethe", "--plot", "p.png"]).exit_code == 0
    subjects, seeds, _, _, _, plot, *_, options = given[0]
    assert [(each.name, each.forget, each.references) for each in subjects] == [
        ("digits", DIGITS.forget, ()),
        ("yardstick", "f", ("a",)),
        ("digits, class 3", "class:3", ()),
        ("yardstick, class cat", "class:cat", ()),  # references of another request are none
    ]
    assert (seeds, plot, options["methods"]) == (3, Path("p.png"), ["lethe"])
    assert options["retrain"]
    assert CliRunner().invoke(app, [*command, "--no-retrain"]).exit_code == 0
    assert not given[1][-1]["retrain"]
    assert [each.name for each in given[1][0]] == ["digits", "yardstick", "digits, class 3"]


def test_a_picture_is_drawn_from_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain_cost, "run_retrain_cost", None)  # nothing may be run
    results, out = RESULTS / "leaderboard-digits.json", tmp_path / "new" / "board.png"
    assert CliRunner().invoke(app, ["plot", str(results), str(out)]).exit_code == 0
    names = ["board-digits-class-3.png", "board-digits.png"]
    assert sorted(file.name for file in out.parent.iterdir()) == names
    for name, task in zip(names, ("digits, class 3,", "digits, average"), strict=True):
        with Image.open(out.parent / name) as picture:
            assert picture.info["Description"].startswith(task)
    for content, error in (("{}", "lacks a value that the documents need"), ("[", "is no JSON")):
        (tmp_path / "bad.json").write_text(content)
        answer = CliRunner().invoke(app, ["plot", str(tmp_path / "bad.json"), str(out)])
        assert isinstance(answer.exception, UserError)
        assert error in str(answer.exception)
