"""The packages of a distribution; all other metadata is in pyproject.toml.

The folder kernels/ is installed as `lethe_kernels`: the name `kernels` is Hugging Face's. bench/ and tests/ are for a
checkout and are not installed.
"""

from setuptools import find_packages, setup

KERNELS = "lethe_kernels"

setup(
    packages=[
        *find_packages(include=["engine", "engine.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
)
