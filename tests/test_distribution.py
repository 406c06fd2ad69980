"""What a distribution of this project installs: names, files, and its neighbours left whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(folder: str) -> set[str]:
    """Paths of the modules of a folder of the checkout that are in packages."""
    packages = {path.parent for path in (ROOT / folder).rglob("__init__.py")}
    return {path.relative_to(ROOT).as_posix() for package in packages for path in package.glob("*.py")}


def test_every_package_is_installed_and_nothing_else() -> None:
    pytest.importorskip("setuptools")
    code = (
        "from distutils.core import run_setup; found = run_setup('setup.py', stop_after='init')\n"
        "print(*found.packages); print(found.package_dir['lethe_kernels'], found.py_modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import setuptools\n{code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    packages, other = done.stdout.splitlines()
    expected = {str(Path(path).parent).replace("/", ".") for path in modules("engine") | modules("kernels")}
    assert set(packages.split()) == {name.replace("kernels", "lethe_kernels", 1) for name in expected}
    assert {"engine", "engine.models", "lethe_kernels", "lethe_kernels._triton"} <= set(packages.split())
    assert other == "kernels None"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, which is made from the sdist."""
    build = pytest.importorskip("setuptools.build_meta")
    assert build
    folder = tmp_path_factory.mktemp("dist")
    # From a copy: setuptools leaves build/ and *.egg-info beside what it builds.
    subprocess.run(["git", "init", "-q", folder / "source"], check=True)
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in files.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run([*command, "build_sdist", folder], cwd=folder / "source", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([*command, "build_wheel", folder], cwd=source, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.minutes
def test_the_wheel_has_the_engine_and_the_kernels_and_their_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {path.relative_to(ROOT).as_posix() for pattern in ("evaluate/*.yaml", "report/*.html", "report/*.css")
            for path in (ROOT / "engine").glob(pattern)}  # fmt: skip
    assert data
    expected = modules("engine") | data | {"engine/py.typed", "lethe_kernels/py.typed"}
    expected |= {f"lethe_{name}" for name in modules("kernels")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    (top,) = (name for name in names if name.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top).decode().split() == ["engine", "lethe_kernels"]


@pytest.mark.slow
@pytest.mark.minutes
def test_the_sdist_has_a_checkout(built: Path) -> None:
    (source,) = (built / "unpacked").iterdir()
    packed = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    copied = built / "source"
    committed = {
        path.relative_to(copied).as_posix()
        for path in copied.rglob("*")
        if path.is_file() and not {".git", "build"} & set(path.relative_to(copied).parts)
    }
    missing = {name for name in committed - packed if ".egg-info/" not in name}
    assert missing == {".ci/run", ".editorconfig", ".github/workflows/ci.yml", ".gitignore"}
    for name in (
        "docs/proof.md",
        "examples/verify.py",
        "bench/results/verdicts.json",
        "mkdocs.yml",
    ):  # tests read these
        assert name in packed
    assert not (source / "tests" / "typing").exists()  # a link, of which an archive would have a copy


CHECK = """
import importlib.metadata, sys
import kernels
import lethe_kernels
from kernels import LayerRepository
from lethe_kernels import info_nce, attention_rollout
import engine, engine.cli.app, engine.models.attention_masking
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.utils.import_utils import is_kernels_available
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
AutoModelForImageClassification.from_config(config)
from engine.runtime.environment import kernels_problem
assert kernels_problem() is None
for module in (kernels, lethe_kernels, engine):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert importlib.metadata.version("kernels") == kernels.__version__
print("three work, transformers", "has" if is_kernels_available() else "refuses", "kernels", kernels.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [("lethe", "kernels"), ("kernels", "lethe"), ("lethe", "kernels", "lethe")])
@pytest.mark.minutes
def test_hugging_faces_kernels_beside_ours_in_any_order(order: tuple[str, ...], built: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site / "heavy.pth").write_text("\n".join(here))  # torch and the like, from where the tests have them
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    for name in order:
        if name == "lethe":
            done = pip("--no-deps", "--force-reinstall", str(wheel))
            assert done.returncode == 0, done.stderr
        elif pip("--retries=1", "--timeout=15", "kernels").returncode:
            pytest.skip("no package index to install `kernels` from")
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("three work")
    missing = subprocess.run([python, "-c", "import bench"], capture_output=True, cwd=tmp_path, env=environment)
    assert missing.returncode == 1
