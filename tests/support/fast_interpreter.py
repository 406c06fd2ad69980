"""A faster interpreter for the tests of the Triton kernels.

Triton's interpreter replaces the functions of `triton.language` again at every call of a device function, which is a
third of the time of these tests. Within one launch they are replaced once. What a kernel computes is the same.
"""

from __future__ import annotations

import inspect
from typing import Any


def install() -> None:
    """Patch the interpreter; do nothing for a release of Triton whose interpreter is organised in another way."""
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "GridExecutor", "tl")
    if not all(hasattr(interpreter, name) for name in names):
        return
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = (interpreter.tl, interpreter.tl.core)
    launches: list[set[frozenset[str]]] = []

    def replace_once(function: Any) -> Any:
        seen = frozenset(m.__name__ for m in function.__globals__.values() if inspect.ismodule(m) and m in modules)
        if launches and seen in launches[-1]:
            return interpreter._LangPatchScope()
        if launches:
            launches[-1].add(seen)
        return replace(function)

    def in_a_launch(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(set())
        try:
            launch(self, *arguments, **options)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, in_a_launch
