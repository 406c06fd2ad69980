"""bench.html holds every result, loads nothing and escapes what it shows; `bench all` goes on after a failing part."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness import plots
from bench.publish import page, run_all
from bench.publish.page import facts, plain_sheets, render, run_page
from bench.publish.pictures import PICTURES
from bench.publish.results import RESULTS, load
from engine.errors import UserError


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the repository's results, with three pictures: drawing takes long."""

    def first(draw: Callable[..., Iterator[Any]], count: int, *arguments: Any) -> Iterator[Any]:
        return itertools.islice(draw(*arguments), count)

    with pytest.MonkeyPatch.context() as patch:
        drawn = {"kernels": 2, "leaderboard-digits": 1}
        patch.setattr(
            page, "PICTURES", {kind: functools.partial(first, PICTURES[kind], n) for kind, n in drawn.items()}
        )
        yield run_page(tmp_path_factory.mktemp("page") / "new" / "bench.html").read_text(encoding="utf-8")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PICTURES", {})


def section(text: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">.*?</section>', text, re.DOTALL)
    return found


def test_every_committed_result_has_its_section_with_command_and_numbers(committed: str) -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert sorted(re.findall(r'<section id="([^"]+)">', committed)) == sorted(file.stem for file in files)
    assert len(re.findall(r'<li><a href="#[\w-]+">', committed)) == len(files)
    for file in files:
        content = json.loads(file.read_text())
        if isinstance(content, dict) and "command" in content:
            assert escape(content["command"]) in section(committed, file.stem)
    ablation = section(committed, "yardstick-ablation")
    assert '<th scope="row">random patches</th><td class="short">66.8 ± 1.4</td>' in ablation
    assert '<tr class="mark"><th scope="row">default' in ablation
    assert "<dt>commit</dt><dd>not recorded</dd>" in ablation
    assert "<code>python -m bench compile</code>" in section(committed, "kernels-compile")
    kernels = section(committed, "kernels-cpu")
    assert "1.16 before, 2.01 after" in kernels
    assert "fa875ae0f3c0, with changes" in kernels
    assert json.loads((RESULTS / "kernels-cpu.json").read_text())["finished"][:10] in kernels
    assert "at least 1.15 x as fast as fast-vit-rollout</th>" in kernels  # the targets too
    assert len(re.findall("<picture>", kernels)) == 2
    assert "rollout-scale-dropped" in section(committed, "mutation")
    assert "and 75 more" in section(committed, "mutation")


def test_the_page_loads_nothing_and_runs_nothing(committed: str) -> None:
    loaded = re.findall(r'(?:src|srcset|href|action|data)\s*=\s*["\']?([^"\'>\s]{0,30})|url\((.{0,20})', committed)
    assert len(loaded) >= 19
    assert {(one or two)[:5] for one, two in loaded} <= {"data:", *(one[:5] for one, _ in loaded if one[0] == "#")}
    assert "default-src 'none'; img-src data:" in committed
    assert not re.search(r"<(script|link|iframe|object|base)\b|@import|\bon\w+=|https?:", committed)


def test_light_and_dark_plots_say_in_words_what_they_show(committed: str) -> None:
    pairs = re.findall(r'dark\)" srcset="([^"]+)"><img src="([^"]+)" alt="([^"]+)">', committed)
    assert all(dark != light and light.startswith("data:image/png;base64,") for dark, light, _ in pairs)
    (alt,) = [alt for *_, alt in pairs if "ViT-B/16 224, batch 8, seconds" in alt]
    assert "ours 1.44 s; full matrix on hooked maps 1.45 s" in alt


def test_every_case_of_the_committed_kernels_and_data_is_drawn() -> None:
    kernels = load(RESULTS / "kernels-cpu.json")
    words = [words for _, words in PICTURES["kernels"](kernels, plots.DARK)]
    assert len(words) == 2 * len(kernels["cases"])
    for case, time, memory in zip(kernels["cases"], words[::2], words[1::2], strict=True):
        assert f"{case['case']}, seconds" in time
        assert f"{case['case']}, peak memory" in memory
    data = [words for _, words in PICTURES["data"](load(RESULTS / "data-cpu.json"), plots.LIGHT)]
    assert "evaluation batches" in data[1]
    assert "ours, draft 606" in data[1]


def test_what_files_say_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    report = {"command": evil, "finished": evil, "rows": [{evil: evil}], "settings": {evil: evil}}
    text = render({"odd": report})
    assert evil not in text
    assert text.count(escape(evil)) == 6


def test_a_file_without_a_readme_table_shows_all_that_is_plain(no_pictures: None) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "seconds": 0.123456, "deep": [1], "ok": True},
        {"name": "b", "n": 12345},
    ]
    report = {
        "command": "x", "environment": {}, "seconds": 1374.5, "settings": {"seed": 0, "model": {"depth": 2}},
        "rows": rows, "empty": [], "none": None,
    }  # fmt: skip
    (_, values), (title, records) = plain_sheets(report)
    assert values.rows == [["seconds", "1374"], ["none", "-"], ["seed", "0"]]
    assert (title, records.columns) == ("rows", ["name", "seconds", "ok", "n"])
    assert records.rows == [["a", "0.1235", "yes", "-"], ["b", "-", "-", "12,345"]]
    *_, last = next(iter(plain_sheets({"rows": [{"n": n} for n in range(100)]})))[1].rows
    assert last == ["and 40 more"]
    assert "<h3>Rows</h3>" in render({"odd": report})


def test_facts_of_a_gpu_and_of_nothing() -> None:
    assert set(facts({"commit": None}).values()) == {"not recorded"}
    report = {
        "environment": {
            "cuda_devices": ["NVIDIA X"],
            "cpu": "C",
            "threads": 2,
            "packages": {"torch": "2.8", "numpy": "2"},
        },
        "commit": {"hash": "0123456789abcdef", "modified": False},
        "load_average": {"before": [0.5, 1, 1], "after": [1.25, 1, 1]},
        "finished": "2026-01-02T03:04:05Z",
    }
    assert facts(report) == {
        "machine": "NVIDIA X, C, 2 threads, torch 2.8",
        "finished": "2026-01-02 03:04:05 UTC",
        "commit": "0123456789ab",
        "load average": "0.50 before, 1.25 after",
    }


def test_toy_sizes_are_called_so(no_pictures: None) -> None:
    assert "which is a smoke test" in render({"odd": {"settings": {"quick": True}}})
    assert "which is a smoke test" not in render({"odd": {"settings": {"quick": False}}})


def test_the_order_is_that_of_importance_and_others_come_last(tmp_path: Path, no_pictures: None) -> None:
    for name in ("a-new-one", "mutation", "data-cuda", "chaos"):
        (tmp_path / f"{name}.json").write_text('{"rows": [{"n": 1}]}')
    text = run_page(tmp_path / "bench.html", tmp_path).read_text()
    assert re.findall(r'<section id="([^"]+)">', text) == ["data-cuda", "chaos", "mutation", "a-new-one"]


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no result file"):
        run_page(tmp_path / "bench.html", tmp_path)
    (tmp_path / "kernels-cpu.json").write_text('{"cases": [{}], "environment": {}}')
    with pytest.raises(
        UserError, match=r"kernels-cpu\.json lacks a value that the documents need \(KeyError: 'work'\)"
    ):
        run_page(tmp_path / "bench.html", tmp_path)
    (tmp_path / "kernels-cpu.json").write_text("{")
    with pytest.raises(UserError, match=r"kernels-cpu\.json is no JSON"):
        run_page(tmp_path / "bench.html", tmp_path)
    assert not (tmp_path / "bench.html").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawn(kind: str, report: dict[str, Any]) -> list[str]:
    """What the pictures say; each is drawn."""
    found = []
    for figure, words in PICTURES[kind](report, plots.LIGHT):
        assert plots.png(figure).startswith(b"\x89PNG")
        found.append(words)
    return found


def test_pictures_of_training_steps() -> None:
    ours = {
        "contender": "ours", "status": "measured", "batch": 8, "median": 0.5, "prepare_a_step": 0.3,
        "parts": {"data": 0.1, "teacher": 0.0, "backward": 0.25, "all": 0.5},
    }  # fmt: skip
    plain = {"contender": "plain", "status": "measured", "batch": 8, "median": 2.0, "prepare_a_step": 0.0}
    rows = [ours, plain, {"contender": "broken", "status": "failed"}]
    assert drawn("train", {"cases": [{"case": "forget", "rows": rows}, {"case": "none", "rows": rows[2:]}]}) == [
        "forget, images a second: ours 10; plain 4",
        "forget, seconds a step by part: ours: data 100.0 ms, backward 250.0 ms, other 150.0 ms",
    ]


def test_pictures_of_retraining_and_of_curves() -> None:
    found = {"method": "lethe", "share": {"mean": 0.25, "half_range": 0.01}, "gap": {"mean": 5.0, "half_range": 0.5}}
    without = {"method": "other", "share": None, "gap": None}
    task = {"noise_floor": 0.8, "untouched": {"gap": {"average": 12.6}}, "summary": [found, without]}
    bare = {"noise_floor": None, "untouched": {"gap": None}, "summary": [found]}
    assert drawn("retrain-cost", {"tasks": {"digits": task, "bare": bare}}) == [
        "digits, average gap to retrained models: noise floor 0.80 points; untouched 12.60 points; lethe 5.00 points "
        "in 25.0% of the time",
        "bare, average gap to retrained models: lethe 5.00 points in 25.0% of the time",
    ]
    curve = {
        "name": "rollout", "quantity": "seconds", "variable": "tokens N", "labels": ["64 px", "128 px"],
        "sizes": [65, 257], "values": [[1.0, 1.1], [16.0, 17.0]], "exponent": 2.0, "expected": 2.15, "within": True,
    }  # fmt: skip
    flat = {**curve, "quantity": "bytes", "values": [[2**20], [2**20]], "exponent": 0.0}
    words = drawn("scaling", {"curves": [curve, flat]})
    assert words[0] == "rollout, seconds by tokens N from 64 px to 128 px: exponent 2.00, expected 2.15"
    assert len(words) == 2


@pytest.mark.parametrize("number", [1, 3, 23])
@pytest.mark.parametrize("apart", [0.0, pytest.param(1e-3, marks=pytest.mark.slow), 3.0])
def test_names_beside_a_comparison_stand_apart_in_the_order_of_their_points(number: int, apart: float) -> None:
    def entry(method: str, gap: float) -> dict[str, Any]:
        share = {"mean": 0.3, "half_range": 0.2}
        return {"method": method, "share": share, "gap": {"mean": gap, "half_range": 0.1}}

    names = ["lethe", "lethe_plus", *(f"$other_{n}$" for n in range(2, number))][:number]
    summary = [entry(name, 0.4 + apart * place) for place, name in enumerate(names)]
    task = {"noise_floor": 0.3, "untouched": {"gap": {"average": 50.0}}, "summary": summary}
    ((figure, _),) = PICTURES["leaderboard-yardstick"]({"tasks": {"yardstick, class cat": task}}, plots.LIGHT)
    figure.draw_without_rendering()
    labels = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(labels) == {*names, "noise floor", "untouched, no time"}
    boxes = {name: Text.get_window_extent(text) for name, text in labels.items()}  # without the leader
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    (left,) = {round(box.x0) for box in boxes.values()}
    assert left > figure.axes[0].get_window_extent().x1
    for box in boxes.values():
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
    order = sorted(boxes, key=lambda name: boxes[name].y0)
    assert order[0] == "noise floor"
    assert [name for name in order if name in names] == names
    assert [labels[name].get_fontweight() for name in names] == ["bold", "bold", *["normal"] * 21][:number]
    tops = [labels[name].xy for name in names]
    assert tops == [(30.0, pytest.approx(found["gap"]["mean"])) for found in summary], "a leader ends at its point"


def test_names_are_moved_no_more_than_they_must() -> None:
    assert plots._apart([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    assert plots._apart([0.5, 0.5, 0.5], 0.2) == pytest.approx([0.3, 0.5, 0.7])
    assert plots._apart([0.0, 0.0, 0.9, 1.2], 0.2) == pytest.approx([0.0, 0.2, 0.8, 1.0])


def test_the_fitted_line_goes_through_its_points() -> None:
    curve = {
        "name": "n", "quantity": "seconds", "variable": "v", "labels": ["2", "4", "8"], "sizes": [2, 4, 8],
        "values": [[12.0], [48.0], [192.0]], "exponent": 2.0, "expected": 1.0, "within": False,
    }  # fmt: skip
    ((figure, _),) = PICTURES["scaling"]({"curves": [curve]}, plots.DARK)
    axes = figure.axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3}
    assert lines["fitted: 2.00"] == pytest.approx([12, 48, 192])
    assert lines["expected: 1.00"] == pytest.approx([24, 48, 96])
    assert "LOOK" in figure.get_suptitle()


def test_colours_differ_in_brightness_from_their_neighbours_and_from_both_papers() -> None:
    def grey(colour: str) -> float:
        return sum(share * value for share, value in zip((0.299, 0.587, 0.114), to_rgb(colour), strict=True))

    shades = [grey(colour) for colour in plots.PALETTE]
    assert all(abs(one - other) > 0.12 for one, other in itertools.pairwise(shades))
    assert all(abs(shade - grey(style.paper)) > 0.2 for shade in shades for style in (plots.LIGHT, plots.DARK))


def test_bars_are_in_order_with_ours_standing_out_and_the_same_bytes_twice() -> None:
    def draw() -> tuple[Any, bytes]:
        figure, axes = plots.figure(plots.LIGHT, "a title " * 12, "x")
        plots.bars(axes, plots.LIGHT, ["ours", "$peer$"], [1.0, 3.0], ["one", "three"], own="ours")
        return axes, plots.png(figure)

    axes, content = draw()
    assert content == draw()[1]
    assert [patch.get_width() for patch in axes.patches] == [1.0, 3.0]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert axes.patches[0].get_hatch() != axes.patches[1].get_hatch()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ours", "$peer$"]
    assert axes.yaxis_inverted()
    assert axes.figure.get_suptitle().count("\n") == 1


# --- bench all --------------------------------------------------------------------------------------------------------


def test_all_goes_on_after_a_part_that_fails_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    started = []

    def start(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        _, _, _, name, _, file, *rest = command
        started.append((name, Path(file).name, rest))
        if name in ("kernels", "train"):
            Path(file).write_text('{"command": "k", "cases": [], "environment": {}}')
        return subprocess.CompletedProcess(command, 1 if name == "train" else 0)

    monkeypatch.setattr(run_all.subprocess, "run", start)
    monkeypatch.setattr(run_all, "resolve_device", lambda name: torch.device("cpu"))
    (tmp_path / "data-cpu.json").write_text('{"rows": [{"of": "an earlier run"}]}')
    result = CliRunner().invoke(app, ["all", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert started == [
        ("kernels", "kernels-cpu.json", ["--quick"]), ("train", "train-cpu.json", ["--quick"]),
        ("unlearn", "scaling-cpu.json", ["--quick"]), ("retrain-cost", "retrain-cost.json", ["--quick"]),
        ("data", "data-cpu.json", ["--quick"]),
    ]  # fmt: skip
    failed = result.output.split("FAILED: ")[1].replace("\n", " ")
    assert failed.startswith("train (exit code 1), unlearn (exit code 0, no result)")
    assert "data (exit code 0, no result)" in failed
    assert "kernels (" not in failed
    text = (tmp_path / "bench.html").read_text()
    assert re.findall(r'<section id="([^"]+)">', text) == ["train-cpu", "kernels-cpu"]
    assert run_all.run_all(tmp_path, False, parts=run_all.PARTS[:1]) == []
    assert started[-1] == ("kernels", "kernels-cpu.json", [])
    run_all.run_all(tmp_path, False, Path("photos"))
    assert started[-2:] == [("retrain-cost", "retrain-cost.json", []), ("data", "data-cpu.json", ["--real", "photos"])]


def test_all_names_a_page_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    failed = run_all.run_all(tmp_path / "new", True, parts=(("kernels", "kernels"),))
    assert [text.split(" (")[0] for text in failed] == ["kernels", "page"]


def test_the_commands_of_all_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {command for command, _ in run_all.PARTS} <= known
