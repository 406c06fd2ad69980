"""The layers of the source tree: which package may import which, and the sizes of files and functions."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from import_graph import LAYERS, LEAVES, TREES, circles, graph, modules, packages, upward

ROOT = Path(__file__).resolve().parents[1]
FILES = modules(ROOT)
EDGES = graph(ROOT)
TOP = {"__init__.py", "__main__.py", "_version.py", "config.py", "errors.py"}
LINES, FUNCTION_LINES, ARGUMENTS = 500, 80, 8

# Functions above a limit, each with its reason.
KEYWORDS = "a public function: users give its options by name"
COMMAND = "the options of a command"
LONG = {
    "engine.run.unlearn.unlearn": KEYWORDS,
    "engine.run.unlearn.train": KEYWORDS,
    "engine.tuning.search.tune": KEYWORDS,
    "engine.plan.planning.plan": KEYWORDS,
    "engine.data.loading.Loader": KEYWORDS,
    "engine.evaluate.metrics.Evaluator": KEYWORDS,
    "engine.evaluate.relearning.relearning_curve": KEYWORDS,
    "engine.evaluate.representation.compare_features": KEYWORDS,
    "engine.jobs.unlearn.run_job": KEYWORDS,
    "engine.requests.intake.init_store": KEYWORDS,
    "bench.quality.ablation.run_ablation": COMMAND,
    "bench.quality.pool_queue.pool_queue": COMMAND,
    "bench.quality.retrain_cost.run_retrain_cost": COMMAND,
    "bench.training_cost.scale.run_memory": COMMAND,
    "engine.models.capture._call_of": "mirrors the signature of scaled_dot_product_attention",
}


def test_imports_point_down() -> None:
    assert upward(EDGES) == []


def test_there_is_no_circle() -> None:
    assert circles(EDGES) == []
    assert circles(packages(EDGES)) == []


def test_every_package_has_its_layer() -> None:
    found = {path.name for path in (ROOT / "engine").iterdir() if (path / "__init__.py").is_file()}
    assert found == set(LAYERS)


def test_no_file_is_added_at_the_top_of_engine() -> None:
    assert {path.name for path in (ROOT / "engine").glob("*.py")} == TOP


def _imported(path: Path) -> set[str]:
    """First names of all imports of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_only_the_command_line_imports_typer_and_rich() -> None:
    users = {name for name, path in FILES.items() if _imported(path) & {"typer", "rich"}}
    assert {name for name in users if not name.startswith(("engine.cli.", "bench."))} == set()
    assert any(name.startswith("engine.cli.") for name in users)


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "lethe_kernels", "kernels", *sys.stdlib_module_names}
    for name, path in FILES.items():
        if name.startswith("kernels"):
            assert _imported(path) <= allowed, name


def test_core_reads_and_writes_no_files() -> None:
    calls = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "mkdir", "unlink", "touch", "replacing"}
    for name, path in FILES.items():
        if not name.startswith("engine.core"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in calls, f"{path}:{node.lineno}"


def test_a_phase_is_loaded_without_the_methods() -> None:
    """`engine.core` below the methods: what a method of a user's needs loads none of ours."""
    seen, todo = set(), ["engine.core.method"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += EDGES[name]
    assert not [name for name in seen if name.startswith("engine.methods")]


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for tree in (*TREES, "tests")
        for path in sorted((ROOT / tree).rglob("*.py"))
        if (lines := path.read_text(encoding="utf-8").count("\n")) > LINES
    }
    assert long == {}


def _functions(name: str, tree: ast.AST, owner: str = "") -> list[tuple[str, int, int]]:
    """(name, lines, arguments) of every function of a module; an `__init__` goes by the name of its class."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            found += _functions(name, node, f"{owner}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            title = owner.rstrip(".") if node.name == "__init__" else f"{owner}{node.name}"
            found.append((f"{name}.{title}", (node.end_lineno or 0) - node.lineno + 1, count))
            found += _functions(name, node, f"{title}.")
        else:
            found += _functions(name, node, owner)
    return found


def test_functions_are_short_and_take_few_arguments() -> None:
    above = set()
    for name, path in FILES.items():
        if name.startswith(("engine.cli.", "kernels")) or name == "bench.__main__":
            continue  # options of commands; Triton kernels take strides and block sizes as arguments
        for function, lines, arguments in _functions(name, ast.parse(path.read_text(encoding="utf-8"))):
            if lines > FUNCTION_LINES or arguments > ARGUMENTS:
                above.add(function)
    assert above == set(LONG), "a function above the limits is taken apart, or stands in LONG with its reason"


# --- the test itself --------------------------------------------------------------------------------------------------


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    def write(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    write("engine/__init__.py", "")
    write("engine/data/__init__.py", "")
    write("engine/data/a.py", "def f():\n    from engine.cli import app\n")
    write("engine/cli/__init__.py", "")
    write("engine/cli/app.py", "import engine.data.a\n")
    write("kernels/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.data.a\n")
    edges = graph(tmp_path)
    assert ("engine.data.a", "engine.cli.app") in upward(edges)
    assert ("kernels", "engine.data.a") in upward(edges)
    assert circles(edges) == [["engine.cli.app", "engine.data.a"]]
    assert len(circles(packages(edges))) == 1


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_but_leaves(leaf: str) -> None:
    assert EDGES[leaf] <= set(LEAVES)
