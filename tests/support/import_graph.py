"""The import graph of the source tree, read from the code without running it.

`python tests/support/import_graph.py [ROOT]` prints packages, arrows, upward arrows and circles; `--arrows` lists every
arrow between packages. An import counts wherever it stands: at the top of a file, inside a function, under
TYPE_CHECKING.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from pathlib import Path

# Packages of engine/ from the highest to the lowest: each may import from those below it alone.
LAYERS = (
    "cli",
    "requests",
    "pool",
    "jobs",
    "report",
    "audit",
    "attack",
    "plan",
    "tuning",
    "evaluate",
    "run",
    "methods",
    "forget_sets",
    "core",
    "models",
    "data",
    "runtime",
)
# Modules at the top of engine/ that every package may import.
LEAVES = ("engine.errors", "engine.config", "engine._version")
# Modules at the top of engine/ that stand above all packages.
ENTRANCES = ("engine", "engine.__main__")
TREES = ("engine", "kernels", "bench")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the source trees by its dotted name."""
    found = {}
    for tree in TREES:
        for path in sorted((root / tree).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the source trees that a module imports; `lethe_kernels` counts as `kernels`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {target for alias in node.names if (target := _module(alias.name, known))}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {t for a in node.names if (t := _module(f"{base}.{a.name}", known) or _module(base, known))}
        elif isinstance(node, ast.Call) and _is_import_call(node):
            value = node.args[0]
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and _module(value.value, known):
                found.add(_module(value.value, known))
    return found - {name}


def _is_import_call(node: ast.Call) -> bool:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in ("import_module", "__import__") and bool(node.args)


def _module(name: str, known: dict[str, Path]) -> str:
    """The name of a module of the trees; empty for any other."""
    first, dot, rest = name.partition(".")
    name = f"kernels{dot}{rest}" if first == "lethe_kernels" else name
    return name if name in known else ""


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules(root)
    return {name: imports(name, path, known) for name, path in known.items()}


def package_of(module: str) -> str:
    """The folder of a module: `engine.cli.app` for engine/cli/app.py; a module at the top of a tree stands for
    itself."""
    parts = module.split(".")
    if parts[0] != "engine":
        return parts[0]
    return ".".join(parts[:2])


def layer(module: str) -> int | None:
    """Position of a module of engine/ in `LAYERS`, 0 the highest; None for a leaf, and outside engine/."""
    if module in ENTRANCES:
        return -1
    parts = module.split(".")
    if parts[0] != "engine" or module in LEAVES:
        return None
    return LAYERS.index(parts[1]) if parts[1] in LAYERS else -1


def upward(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of engine/ that point from a lower package to a higher one."""
    found = []
    for name, targets in edges.items():
        for target in targets:
            mine, theirs = layer(name), layer(target)
            rises = theirs is not None and (mine is None if name in LEAVES else mine is not None and theirs < mine)
            leaves = not name.startswith("bench") and target.startswith("bench")
            if (
                leaves
                or (name.startswith("engine") and rises)
                or (name.startswith("kernels") and not target.startswith("kernels"))
            ):
                found.append((name, target))
    return sorted(found)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []
    for start in sorted(edges):
        if start in index:
            continue
        work = [(start, iter(sorted(edges[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            node, targets = work[-1]
            following = next(targets, None)
            if following is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    component, stack[at:] = stack[at:], []
                    for each in component:
                        low[each] = len(edges)  # closed: no later path may join it
                    if len(component) > 1:
                        found.append(sorted(component))
            elif following not in index:
                index[following] = low[following] = len(index)
                stack.append(following)
                work.append((following, iter(sorted(edges.get(following, ())))))
            else:
                low[node] = min(low[node], index[following] if low[following] < len(edges) else low[node])
    return found


def packages(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between packages."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        found[package_of(name)] |= {package_of(target) for target in targets} - {package_of(name)}
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--arrows", action="store_true", help="list every arrow between packages")
    options = parser.parse_args()
    edges = graph(options.root)
    between = packages(edges)
    print(f"modules: {len(edges)}, imports: {sum(map(len, edges.values()))}")
    print(f"packages: {len(between)}, arrows: {sum(map(len, between.values()))}")
    rising = upward(edges)
    print(f"upward: {len(rising)}")
    for name, target in rising:
        print(f"  {name} -> {target}")
    for title, found in (("modules", circles(edges)), ("packages", circles(between))):
        print(f"circles of {title}: {len(found)}")
        for each in found:
            print(f"  {len(each)}: {', '.join(each)}")
    if options.arrows:
        for name, targets in sorted(between.items()):
            print(f"{name} -> {', '.join(sorted(targets))}")


if __name__ == "__main__":
    main()
