"""Packaging. The only installed top-level name is `moe`; the folder kernels/ becomes `moe.kernels`.

kernels/ has no __init__.py, so find_packages passes it by, in a checkout through the link moe/kernels as well: it is
named here. package_dir makes the wheel right even where git made no links.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")
LINUX = 'platform_system == "Linux"'

setup(
    name="finegrain-moe",
    version="0.1.0",
    description="DeepSeek-V3, whole and honest, at a scale one person can train",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["moe", "moe.*"]), "moe.kernels"],
    package_dir={"moe.kernels": "kernels"},
    package_data={"moe.kernels": ["*.json", "native/*"]},
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
