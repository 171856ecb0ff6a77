"""The files of the app as a Space of the Hub: its start, what it needs, the package's code and a model."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from ..hub.card import FACTS_FILE
from ..hub.publish import CARD_FILE, check_folder, read_card_facts
from ..hub.self_check import SELF_TEST_FILE, read_self_test

TEMPLATES = Path(__file__).parent
PACKAGE = Path(__file__).parents[1]
MODEL_FOLDER = "model"
GRADIO = "6.31.0"
"""Version of Gradio that a Space is made with where none is installed here."""
WHAT = {"text-classification": "passages of a document", "image-classification": "regions of an image"}


def space_files(folder: str | Path) -> dict[str, Path | bytes]:
    """Return the files of a Space that serves the app with one model, by their names in the Space.

    The model's own code stays in its folder, and the package's beside the start, as the package isn't on PyPI.

    Args:
        folder: a published classifier of documents or images.

    Raises:
        SelfTestError: the folder is not fit to be pushed, as in `check_folder`.
        FactError: its facts are incomplete, or its card was edited by hand.
        ValueError: the app can't use its model.
    """
    folder = Path(folder).resolve()
    check_folder(folder)
    facts = read_card_facts(folder)
    if facts.pipeline_tag not in WHAT:
        raise ValueError(f"{folder}: the app is for classifiers of texts and images, and this is {facts.pipeline_tag}")
    title = "".join(character for character in folder.name if character.isalnum() or character in " -_") or "app"
    values = {
        "title": f'"{title}: what its answers rest on"',
        "sdk_version": gradio_version(),
        "license": facts.license,
        "what": WHAT[facts.pipeline_tag],
    }
    files: dict[str, Path | bytes] = {
        "README.md": fill("space_card.txt", values),
        "app.py": fill("space_start.txt", {}),
        "requirements.txt": (TEMPLATES / "space_requirements.txt").read_bytes(),
    }
    files |= {f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": path for path in package_files()}
    names = [*read_self_test(folder)["files"], SELF_TEST_FILE, CARD_FILE, FACTS_FILE]
    return files | {f"{MODEL_FOLDER}/{name}": folder / name for name in names}


def fill(template: str, values: Mapping[str, str]) -> bytes:
    """Return a template with its values in their places."""
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values).encode()


def package_files() -> list[Path]:
    """Return the files that this package runs with."""
    found = (path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and path.suffix not in (".pyc", ".pyo"))
    return [path for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts[-2:])]


def gradio_version() -> str:
    """Return the version of Gradio that is installed, or else the one that the app was made with."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return GRADIO
