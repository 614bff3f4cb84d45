"""Packaging. The only installed top-level name is `moe`; the folder kernels/ becomes `moe.kernels`.

kernels/ has no __init__.py, so find_packages passes it by, in a checkout through the link moe/kernels as well: it is
named here. package_dir makes the wheel right even where git made no links.

The native CPU kernels are compiled in place, into kernels/native/, by every kind of installation. They are optional: where
that fails the package is pure Python, and PyTorch does their work.
"""

import functools
import importlib.util
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
LINUX = 'platform_system == "Linux"'


@functools.cache
def native() -> bool:
    """Compile the kernels, once a process; whether that went well. What goes wrong is told in one line."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "kernels" / "native" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        build.build(say=lambda line: print(line, file=sys.stderr))
        return True
    except (build.BuildError, OSError) as error:
        (build.HERE / build.LIBRARY).unlink(missing_ok=True)  # an older one must not travel with these sources
        print(f"native kernels: not built, the slower PyTorch path will be used: {error}", file=sys.stderr)
        return False


class BuildPy(build_py):
    def run(self):
        native()
        super().run()


class Wheel(bdist_wheel):
    """With the library inside, a wheel is for one platform, and for any Python: nothing in it knows Python's ABI."""

    def run(self):
        built = native()
        self.distribution.has_ext_modules = lambda: built
        self.root_is_pure = not built
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
    name="finegrain-moe",
    version="0.1.0",
    description="DeepSeek-V3, whole and honest, at a scale one person can train",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["moe", "moe.*"]), "moe.kernels", "moe.kernels.native"],
    package_dir={"moe.kernels": "kernels"},
    package_data={"moe.kernels": ["*.json"], "moe.kernels.native": ["*.cpp", "*.h", "*.so", "*.dylib"]},
    # `import moe` and `moe.kernels` need torch, numpy and (for the Triton path) triton alone; a function that needs one
    # of the others imports it when it is called. constraints.txt pins what was tested.
    install_requires=[
        "torch>=2.11",
        f"triton>=3.6; {LINUX}",
        "numpy>=1.26",
        "omegaconf>=2.4",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "matplotlib>=3.8",
        "rich>=13",
        "datasets>=3",
        "wandb>=0.19",
        f"deepspeed>=0.19.8,<0.20; {LINUX}",
    ],
    extras_require={
        "test": ["pytest>=9", "transformers>=5.20", "ruff", "mypy>=2"],  # transformers: the parity oracle
        "bench": ["transformers>=5.20"],  # the peer to measure against
        "serve": [],  # nothing beyond the core so far; the names stand so that commands do not change later
        "eval": [],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
