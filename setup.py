"""Packaging of fa_transformers. The version stands in fa_transformers/version.py alone; pins stand in constraints.txt.

Each lower bound below is the version that `make test-oldest` installs (constraints-oldest.txt), except torch's: that is
the lower bound of the newest tested transformers.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    source = (ROOT / "fa_transformers" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('fa_transformers/version.py has no line __version__ = "..."')
    return match.group(1)


VISION = ["Pillow>=10.4"]
TRAIN = [
    *VISION,
    "accelerate>=1.12",
    "datasets>=4.5",
    "evaluate>=0.4.6",
    "jinja2>=3.1.6",
    "matplotlib>=3.9",
    "scikit-learn>=1.6",
    "tensorboard>=2.18",
]
# The licence documents of the default run; the pretrained weights beside them are in requirements-data.txt.
DEMO = [*TRAIN, "licensedcode-data==32.1.0"]
# Scores of detection and instance segmentation.
DENSE = ["faster-coco-eval>=1.8"]
LORA = ["peft>=0.18.1"]
ONNX = ["onnx>=1.18"]
EXCEL = ["python-calamine>=0.5.4"]
# Integrated gradients; before 0.9 captum wanted an older NumPy.
EXPLAIN = ["captum>=0.9"]
# Text of PDF files; pure Python, BSD-3-Clause.
PDF = ["pypdf>=6.0"]
# The app in the browser; its pages are Gradio's, Apache-2.0. It asks for Pillow below 13.
APP = [*DEMO, *PDF, *EXPLAIN, "gradio>=6.31"]
# No bound: torch's CUDA builds name the one version that fits them. There is no triton outside Linux.
TRITON = ["triton; platform_system == 'Linux'"]
TEST = [
    *DEMO,
    *DENSE,
    *LORA,
    *ONNX,
    *EXCEL,
    *EXPLAIN,
    *PDF,
    "pycocotools>=2.0.8",
    "pytest>=8.4",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "sentence-transformers>=6.2",
]
LINT = ["mypy", "ruff"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="fa_transformers",
    version=read_version(),
    description="BERT and ViT with factorized (linear-cost) attention for Hugging Face transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fa_transformers", "fa_transformers.*"]),
    entry_points={"console_scripts": ["fa-transformers=fa_transformers.commands:main"]},
    package_data={"fa_transformers": ["py.typed"], "": ["*.md", "*.json", "*.txt", "*.csv", "*.html", "*.css", "*.js"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.3,<6",
        "huggingface_hub>=1.3",
        "numpy>=2.0",
        "safetensors>=0.5",
        "tokenizers>=0.22.2",
    ],
    extras_require={
        "vision": VISION,
        "train": TRAIN,
        "demo": DEMO,
        "dense": DENSE,
        "lora": LORA,
        "onnx": ONNX,
        "excel": EXCEL,
        "explain": EXPLAIN,
        "pdf": PDF,
        "app": APP,
        "triton": TRITON,
        "test": TEST,
        "lint": LINT,
        "docs": DOCS,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
