"""The package has a name of its own, `lethe_kernels`; `kernels` is Hugging Face's, and ours in a checkout besides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAME = "import kernels, lethe_kernels\nassert kernels is lethe_kernels, kernels\n"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder to put on the path, with an installed package `kernels` of the shape that Hugging Face's has."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from kernels.layer import Device, LayerRepository\n__version__ = '0.10.0'\n")
    (package / "layer.py").write_text("from .mask import WHOSE\nclass Device: ...\nclass LayerRepository: ...\n")
    (package / "mask.py").write_text("WHOSE = 'theirs'\n")
    info = tmp_path / "site" / "kernels-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n")
    (info / "top_level.txt").write_text("kernels\n")
    return tmp_path / "site"


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """Output of `python -c` in a folder, which is the first entry of its sys.path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import engine.models.attention_masking\n" + SAME,
        SAME + "import kernels.rollout, lethe_kernels.rollout\nassert kernels.rollout is lethe_kernels.rollout\n"
        "from kernels.mask import mask_patches\nassert mask_patches is lethe_kernels.mask_patches\n"
        # Submodules that are not loaded with the package, and a package among them.
        "import kernels._triton.mask as one, lethe_kernels._triton.mask as other\nassert one is other\n",
        "import kernels.rollout_stream as one, lethe_kernels.rollout_stream as other, lethe_kernels\n"
        "assert one is other\n"
        "assert one.__spec__.name == one.__name__ == 'lethe_kernels.rollout_stream'\n",
    ],
)
def test_in_a_checkout_both_names_are_one_module(code: str) -> None:
    """Two modules would register the torch.library operations twice, which raises."""
    assert python(f"{code}print(lethe_kernels.__path__[0])") == str(ROOT / "kernels")


@pytest.mark.slow
def test_an_unknown_submodule_is_reported_by_the_name_that_was_asked_for() -> None:
    code = "try:\n    import kernels.nothing\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert python(code) == "kernels.nothing"


def test_code_comes_from_the_checkout_that_is_on_the_path(tmp_path: Path) -> None:
    """Not from the one that is installed: engine and lethe_kernels are of one tree."""
    for name in ("kernels", "engine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "lethe_kernels.py").write_bytes((ROOT / "lethe_kernels.py").read_bytes())
    code = "import engine, lethe_kernels; print(engine.__file__); print(lethe_kernels.__file__)"
    assert python(code, cwd=tmp_path).splitlines() == [
        str(tmp_path / "engine" / "__init__.py"), str(tmp_path / "kernels" / "__init__.py")
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import engine.models.attention_masking\n"])
def test_an_installed_namesake_is_what_kernels_is_in_a_checkout(first: str, theirs: Path) -> None:
    code = f"""{first}
import json
import kernels, kernels.layer, kernels.mask, kernels.rollout, lethe_kernels
from kernels import Device, LayerRepository, info_nce, resolve_backend
print(json.dumps({{
    "file": kernels.__file__, "version": kernels.__version__, "layer": kernels.layer.__file__,
    "mask": kernels.mask.WHOSE, "ours": info_nce is lethe_kernels.info_nce,
    "rollout": kernels.rollout is lethe_kernels.rollout, "path": lethe_kernels.mask.__file__,
}}))"""
    assert json.loads(python(code, theirs)) == {
        "file": str(theirs / "kernels" / "__init__.py"),
        "version": "0.10.0",
        "layer": str(theirs / "kernels" / "layer.py"),
        "mask": "theirs",  # of two submodules of one name, the installed package's, which imports it itself
        "ours": True,
        "rollout": True,
        "path": str(ROOT / "kernels" / "mask.py"),
    }


@pytest.mark.slow
def test_a_namesake_is_left_alone_where_there_is_no_checkout(theirs: Path, tmp_path: Path) -> None:
    code = (
        "import kernels, lethe_kernels; print(kernels.__file__, hasattr(kernels, 'info_nce'), lethe_kernels.info_nce)"
    )
    assert python(code, theirs, cwd=tmp_path).startswith(f"{theirs / 'kernels' / '__init__.py'} False <function")


@pytest.mark.parametrize("namesake", [False, True])
@pytest.mark.slow
def test_transformers_works_in_a_checkout(namesake: bool, theirs: Path) -> None:
    pytest.importorskip("transformers")
    code = """
import transformers
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.utils.import_utils import is_kernels_available
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
print(type(AutoModelForImageClassification.from_config(config)).__name__, is_kernels_available("0.1", "1.0"))
"""
    path = [theirs] if namesake else []
    assert python(code, *path).splitlines()[-1] == f"ViTForImageClassification {namesake}"


@pytest.mark.slow
def test_lethe_env_is_content_beside_the_namesake(theirs: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['lethe', 'env', '--json', {str(tmp_path / 'env.json')!r}]\n"
    code += "from engine.cli.app import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    python(code, theirs)
    assert json.loads((tmp_path / "env.json").read_text())["kernels"] == "ours"


@pytest.mark.slow
def test_pytest_as_a_script_finds_the_packages() -> None:
    """The script `pytest` does not put the current folder on the path, but the folder tests/, which has a `kernels`."""
    file = "tests/engine/models/test_attention_masking.py"
    code = (
        "import sys; sys.path.remove(''); import pytest\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', '{file}']))"
    )
    assert file in python(code)
