"""The examples run as they stand, and each has its guide."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "unlearning.ipynb"


def run(script: str, out: Path, **environment: str) -> str:
    """Runs an example in a folder of its own; gives what it printed."""
    path = EXAMPLES / script
    launcher = ["bash"] if path.suffix == ".sh" else [sys.executable]
    done = subprocess.run(
        [*launcher, str(path), str(out)],
        cwd=out.parent,
        env={
            **os.environ,
            "LETHE": f"{sys.executable} -m engine",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "Agg",
            "COLUMNS": "200",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(text: str, when: str) -> dict[str, float]:
    found = {name: float(value) for name, value in re.findall(rf"(\w+) accuracy: .*?([\d.]+)% {when}", text)}
    assert set(found) == {"forget", "retain", "test"}, text
    return found


def test_every_example_is_listed_and_included_in_a_guide() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    guides = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "guides").glob("*.md"))
    scripts = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))
    assert len(scripts) >= 7
    for name in scripts:
        assert f"`{name}`" in listed, name
        assert f'--8<-- "examples/{name}' in guides, name


def test_notebook_holds_its_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert "average gap" in json.dumps(outputs)


@pytest.mark.slow
def test_add_method(tmp_path: Path) -> None:
    text = run("add_method.py", tmp_path)
    before, after = accuracies(text, "before"), accuracies(text, "after")
    assert after["forget"] < before["forget"]
    assert after["retain"] > 90


@pytest.mark.slow
@pytest.mark.minutes
def test_own_model(tmp_path: Path) -> None:
    text = run("own_model.py", tmp_path)
    assert accuracies(text, "after")["test"] > 80
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.minutes
def test_huggingface(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = run("huggingface.py", tmp_path)
    assert accuracies(text, "after")["test"] > 80
    assert "ViTForImageClassification in" in text
    assert (tmp_path / "unlearned" / "preprocessor_config.json").is_file()


@pytest.mark.slow
@pytest.mark.minutes
def test_choose_method(tmp_path: Path) -> None:
    lines = run("choose_method.py", tmp_path).splitlines()
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:6]] for line in lines[1:]}
    assert list(rows) == ["untouched", "finetune", "neg_grad_plus", "lethe", "lethe_plus", "retrained"]
    assert rows["retrained"][0] < rows["untouched"][0]
    assert all(row[2] > 80 for row in rows.values())


@pytest.mark.slow
@pytest.mark.minutes
def test_verify(tmp_path: Path) -> None:
    text = run("verify.py", tmp_path)
    assert "original: FAIL, decided by ['changed']" in text
    assert re.search(r"unlearned: (PASS|FAIL|INSUFFICIENT EVIDENCE), decided by", text)


@pytest.mark.slow
@pytest.mark.minutes
def test_deletion_queue(tmp_path: Path) -> None:
    out = tmp_path / "out"  # the script replaces its folder
    text = run("deletion_queue.sh", out)
    assert "requests: 0 open, 2 unproven, 0 done" in text
    assert (out / "queue" / "versions" / "0001" / "verdict.json").is_file()


@pytest.mark.slow
@pytest.mark.minutes
def test_several_gpus(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launcher = Path(sys.prefix) / "bin" / "deepspeed"
    out = tmp_path / "out"  # the script replaces its folder
    text = run("several_gpus.sh", out, **({"DEEPSPEED": str(launcher)} if launcher.exists() else {}))
    assert "checkpoint and report.html in" in text or "needs DeepSpeed" in text
    if "needs DeepSpeed" not in text:
        assert "ranks: 2" in (out / "unlearned" / "config.yaml").read_text(encoding="utf-8")


def test_several_gpus_says_what_is_missing(tmp_path: Path) -> None:
    assert "pip install 'lethe-unlearning[distributed]'" in run(
        "several_gpus.sh", tmp_path / "out", DEEPSPEED="no-such-launcher"
    )


@pytest.mark.slow
@pytest.mark.minutes
def test_notebook_runs(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"unlearned: average gap [\d.]+ points", done.stdout)
