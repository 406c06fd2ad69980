"""The folder kernels/ under the name that it is installed as, for a checkout that is on sys.path.

Wherever `engine` is imported from a checkout, this file makes `lethe_kernels` come from the same checkout. It is not
installed: an installation has the folder itself under this name.
"""

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "kernels"
_SPEC = importlib.util.spec_from_file_location(
    __name__, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _SPEC is not None
assert _SPEC.loader is not None
sys.modules[__name__] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules[__name__])
