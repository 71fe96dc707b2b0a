"""Packaging of digit_ds. Exact versions that are known to work together stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="digit_ds",
    version="0.1.0",
    description="DiGIT image generation at cluster scale: Megatron-core layers under DeepSpeed, from raw images to FID",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["digit_ds", "digit_ds.*"]),
    package_data={"digit_ds.demo": ["*.yaml"]},
    install_requires=[
        "deepspeed>=0.19.8",
        "faiss-cpu>=1.15",
        "matplotlib",
        "megatron-core>=0.16.1",
        "mosaicml-streaming>=0.13",
        "numpy",
        "pillow",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "scikit-learn",
        "tensorboard",
        "timm>=1.0.31",
        "torch>=2.11",
        "torch-fidelity>=0.4",
        "torchvision",
        "tqdm",
        "transformers>=4.57,<6",
    ],
    extras_require={
        "gpu": ["faiss-gpu>=1.15"],
        "dev": ["import-linter", "pre-commit", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={"console_scripts": ["digit-ds = digit_ds.cli:main"]},
)
