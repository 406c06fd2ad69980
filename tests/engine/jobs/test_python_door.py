"""What Python users meet: engine.evaluate, the result's repr, its files, and the bar."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import few, tiny_vit

import engine
from engine.audit.run_record import origin
from engine.core.result import UnlearnResult
from engine.data import open_source
from engine.errors import UserError
from engine.jobs.evaluate import evaluate_models
from engine.jobs.task import Task
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.run.unlearn import unlearn
from engine.runtime import progress

RUN = {"max_steps": 2, "batch_size": 16, "precision": "fp32"}


@pytest.fixture(scope="module")
def result() -> UnlearnResult:
    train = open_source("digits").train
    return unlearn(tiny_vit(), few(train, 8), train.subset(range(8, 60)), method="finetune", config=RUN)


def test_evaluate_gives_what_the_command_gives(tmp_path: Path) -> None:
    task = Task.open("digits", "random:0.05@0")
    model, original = tiny_vit(3), tiny_vit(0)
    paths = [str(save_checkpoint(each, tmp_path / name)) for each, name in ((model, "model"), (original, "original"))]
    model.train()
    found = engine.evaluate(
        model, task.forget, task.retain, task.source.test, original=original, config={"precision": "fp32"}
    )
    expected = evaluate_models(task, *paths, [], {"precision": "fp32"})
    for metrics in (found, expected):
        metrics.pop("seconds")
    assert found == expected
    assert model.training, "the caller's model is in the mode that it was in"
    assert next(model.parameters()).device == torch.device("cpu")


def test_evaluate_is_the_package_too() -> None:
    import engine.evaluate.metrics
    from engine import evaluate

    assert callable(evaluate)
    assert evaluate is sys.modules["engine.evaluate"]
    assert evaluate.metrics.Evaluator is evaluate.Evaluator
    assert "evaluate" in engine.__all__


def test_evaluate_checks_its_references() -> None:
    source = open_source("digits")
    sets = few(source.train, 20), source.train.subset(range(20, 200)), few(source.test, 50)
    with pytest.raises(UserError, match="reference 1: its weights are those of the original"):
        engine.evaluate(tiny_vit(1), *sets, original=tiny_vit(0), references=[tiny_vit(0)])
    with pytest.raises(UserError, match="reference 2: its weights are those of --reference reference 1"):
        engine.evaluate(tiny_vit(1), *sets, references=[tiny_vit(2), tiny_vit(2)])
    with pytest.raises(UserError, match="unknown option 'sede'"):
        engine.evaluate(tiny_vit(1), *sets, config={"sede": 1})


def test_the_repr_is_one_short_line(result: UnlearnResult) -> None:
    text = repr(result)
    assert len(text) < 200
    assert "\n" not in text
    for word in ("finetune", "forget 8 samples", "retain 52 samples", "% before", " s>"):
        assert word in text
    page = result._repr_html_()
    assert page.startswith("<table>")
    assert "finetune" in page
    collapsed = UnlearnResult(**{**vars(result), "collapsed": True, "output_dir": Path("<b>")})
    assert "COLLAPSED" in repr(collapsed)
    assert "COLLAPSED" in collapsed._repr_html_()
    assert "&lt;b&gt;" in collapsed._repr_html_()


def test_save_writes_a_checkpoint_that_names_its_origin(result: UnlearnResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "config.yaml",
        "history.jsonl",
        "model.safetensors",
    ]
    assert weights_sha256(load_checkpoint(folder)) == weights_sha256(result.model)
    found = origin(folder)
    assert found is not None
    assert (found.method, found.samples_sha256) == ("finetune", result.config["samples"]["retain_sha256"])
    with pytest.raises(UserError, match="holds another run"):
        result.save(folder)
    result.save(folder, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(UserError, match="not a run's"):
        result.save(tmp_path / "other", overwrite=True)


# --- the bar ----------------------------------------------------------------------------------------------------------


def run_with(**options: Any) -> None:
    train = open_source("digits").train
    unlearn(tiny_vit(), few(train, 8), train.subset(range(8, 60)), method="finetune", config=RUN, **options)


def test_a_bar_is_shown_in_a_terminal_unless_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with()
    assert "retain" not in capsys.readouterr().err, "a test is no terminal"
    run_with(progress=True)
    assert "retain" in capsys.readouterr().err
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_with()
    assert "2/2" in capsys.readouterr().err
    run_with(progress=False)
    assert "2/2" not in capsys.readouterr().err


def test_a_bar_is_shown_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    class ZMQInteractiveShell:
        pass

    def display(page: dict[str, str], **_: Any) -> Any:
        return types.SimpleNamespace(update=lambda page, raw: shown.append(page))

    notebook = types.ModuleType("IPython")
    notebook.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    part = types.ModuleType("IPython.display")
    part.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    assert progress.in_notebook()
    run_with()
    assert shown[-1]["text/plain"].endswith("2/2")
    assert "<progress value=2 max=2>" in shown[-1]["text/html"]
