"""One side of `pytest --benchmark --against REV`: a process that measures the cases with the code of one tree.

    python bench/regression/against_worker.py TREE

`engine` and the kernels come from TREE; the cases and all else of `bench` from the folder of this file, so that both
sides run the same cases. It reads one JSON command a line from stdin and answers with one JSON line each; what
libraries print goes to stderr. Between commands it waits on its pipe, which costs nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Modules of engine/ that the cases import, and their names in older revisions.
EARLIER = {
    "engine.runtime.allocator": "engine.allocator",
    "engine.runtime.device": "engine.device",
    "engine.runtime.files": "engine.files",
    "engine.runtime.environment": "engine.environment",
    "engine.models.attention_masking": "engine.masking",
    "engine.models.predict": "engine.evaluate.predict",
}

HERE = Path(__file__).resolve().parents[1]


def main(tree: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side: Side | None = None
    for line in sys.stdin:
        try:
            if side is None:
                import_from(tree)
                side = Side()
            answer = side.run(json.loads(line))
        except Exception as error:
            message = str(error).splitlines()
            answer = {"error": f"{type(error).__name__}: {message[0] if message else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def import_from(tree: Path) -> None:
    """Import `engine` and `lethe_kernels` from a tree, and `bench` from the folder of this file.

    Raises ImportError if they come from elsewhere.
    """
    # An editable installation would supply the modules of its checkout that the tree does not have.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _module_of(finder).startswith("__editable__")]
    sys.path[0] = str(tree)  # in place of the folder of this file, whose modules would be found as top-level ones
    spec = importlib.util.spec_from_file_location("bench", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])
    if not (tree / "lethe_kernels.py").exists():  # a revision in which the kernels were imported as `kernels`
        kernels = importlib.import_module("kernels")
        for name in [name for name in sys.modules if name == "kernels" or name.startswith("kernels.")]:
            sys.modules[f"lethe_{name}"] = sys.modules[name]
        assert sys.modules["lethe_kernels"] is kernels
    for name, before in EARLIER.items():
        _alias(name, before)
    with contextlib.suppress(ModuleNotFoundError):
        preprocessing: Any = importlib.import_module("engine.models.preprocessing")
        if not hasattr(preprocessing, "preprocessing_of"):
            preprocessing.preprocessing_of = preprocessing.Preprocessing.of
    for name in ("engine", "lethe_kernels"):
        place = importlib.import_module(name).__file__
        if place is None or not Path(place).resolve().is_relative_to(tree.resolve()):
            raise ImportError(f"{name} was imported from {place}, expected a folder of {tree}")


def _module_of(finder: Any) -> str:
    return getattr(finder, "__module__", None) or type(finder).__module__


def _alias(name: str, before: str) -> None:
    """Import a module by its earlier name if a tree has it under that name alone."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
        return
    with contextlib.suppress(ModuleNotFoundError):
        earlier = importlib.import_module(before)
        package = name.rpartition(".")[0]
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(package)
        sys.modules.setdefault(package, types.ModuleType(package))
        sys.modules[name] = earlier


class Side:
    """The case that is being measured, with the code of this process's tree."""

    def __init__(self) -> None:
        import torch

        from bench.harness import measure
        from bench.regression import measuring
        from bench.regression.cases import CASES
        from engine.runtime.allocator import keeping_freed_memory
        from engine.runtime.device import resolve_device

        self.cases = {case.name: case for case in CASES}
        self.measure, self.stopwatch = measuring, measure.stopwatch
        self.device = resolve_device("auto")
        torch.set_num_threads(1)  # as in bench/regression/test_regression.py
        self._allocator = keeping_freed_memory(self.device)
        self._allocator.__enter__()
        self.work: Any = None

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "build": self.build, "count": self.count, "calibrate": self.calibrate, "sample": self.sample,
            "close": self.close, "names": lambda: {"names": list(self.cases)},
        }  # fmt: skip
        return commands[command.pop("do")](**command)

    def build(self, case: str) -> dict[str, Any]:
        """Build a case and check its result against the reference."""
        self.close()
        self.work = self.cases[case].build(self.device)
        self.measure.check(self.cases[case], self.work)
        return {}

    def count(self) -> dict[str, Any]:
        return {"counts": self.measure.counts(self.work.ours, self.device)}

    def calibrate(self) -> dict[str, Any]:
        """Return the seconds of the fastest of some calls."""
        return {"seconds": min(self.stopwatch(self.work.ours, self.device)[0] for _ in range(self.measure.WARM_UP))}

    def sample(self, calls: int) -> dict[str, Any]:
        """Return the seconds of one call: the mean of the given number of calls."""
        call = self.measure.repeated(self.work.ours, calls)
        return {"seconds": self.measure.seconds_of(call, self.device) / calls}

    def close(self) -> dict[str, Any]:
        if self.work is not None:
            self.work.close()
        self.work = None
        return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
