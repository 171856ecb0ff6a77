"""Real pretrained weights from installed packages, for the fixtures `minilm` and `dinov2`."""

import importlib.util
from pathlib import Path

import pytest


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} with pretrained weights is not installed")
    return Path(spec.submodule_search_locations[0], *parts)
