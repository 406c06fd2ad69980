"""Let `import kernels` work in a checkout, where the folder has the name of another distribution's package.

The package is installed, and imported by the engine, as `lethe_kernels`. With a checkout on sys.path its folder can be
imported as `kernels` too. Then

- `kernels` and `kernels.rollout` are the modules `lethe_kernels` and `lethe_kernels.rollout` themselves, so that no
  torch.library operation is registered twice;
- if Hugging Face's package `kernels` is installed, `kernels` is that package with the public names of this one added,
  because transformers imports from it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parent
_OURS = "lethe_kernels"


def share_name(name: str) -> None:
    """Replace the module `name`, which is being imported from this folder, in sys.modules."""
    ours = importlib.import_module(_OURS)
    spec = _namesake(name)
    theirs = None if spec is None else importlib.util.module_from_spec(spec)
    sys.modules[name] = theirs or ours
    # Submodules that are loaded need no finder; it would make `kernels.info_nce` the module, not the function.
    loaded = {
        module.removeprefix(f"{_OURS}."): sys.modules[module]
        for module in sys.modules
        if module.startswith(f"{_OURS}.")
    }
    for child, module in loaded.items():
        if theirs is None or PathFinder.find_spec(f"{name}.{child}", theirs.__path__) is None:
            sys.modules[f"{name}.{child}"] = module
    sys.meta_path.insert(0, _Alias(name, theirs))
    if theirs is None:
        return
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(theirs)
    for child, value in {**loaded, **{public: getattr(ours, public) for public in ours.__all__}}.items():
        if "." not in child and not hasattr(theirs, child):
            setattr(theirs, child, value)


def _namesake(name: str) -> ModuleSpec | None:
    """Find another regular package of this name on sys.path; the folder of another checkout does not count."""
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != _FOLDER.parent]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is None or spec.origin is None or spec.submodule_search_locations is None:
        return None
    return None if (Path(spec.origin).parents[1] / f"{_OURS}.py").exists() else spec


class _Alias(MetaPathFinder, Loader):
    """Import submodules of `name` from `lethe_kernels`, except those that the module `theirs` has."""

    def __init__(self, name: str, theirs: ModuleType | None) -> None:
        self.name, self.theirs = name, theirs

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, rest = fullname.partition(".")
        if parent != self.name or not rest:
            return None
        if self.theirs is not None and PathFinder.find_spec(fullname, path) and not self._is_ours(path):
            return None
        if importlib.util.find_spec(f"{_OURS}.{rest}") is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    @staticmethod
    def _is_ours(path: Sequence[str] | None) -> bool:
        return all(Path(entry).resolve().is_relative_to(_FOLDER) for entry in path or ())

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_OURS + spec.name.removeprefix(self.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec of a module that has run under its own name; the import system replaced it."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
