"""Drawn sets as COCO folders that are kept: written once, whole or not at all, and checked before they are used.

A folder has `train`, `validation` and `test`, each with JPEG pictures (quality 90, colours not subsampled: a seventh of
PNG's size with noise, and three times as fast to read) and `_annotations.coco.json`, where the masks are, exact, as
compressed run-length code.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from ...files import sha256_of
from ..readers.coco import load_coco_files
from ..readers.objects import DenseData, ObjectOptions
from ..readers.tables import DataError
from .scenes import SPLITS, Scene

logger = logging.getLogger(__name__)

ANNOTATIONS = "_annotations.coco.json"
CHECKSUMS = "sha256.json"
JPEG = {"quality": 90, "subsampling": 0}


@dataclass(frozen=True)
class SetSettings:
    """What a drawn set depends on: its name, the number of its recipe, side of a canvas, seed, canvases, objects."""

    name: str
    recipe: int
    size_px: int
    seed: int
    counts: tuple[int, int, int]
    num_objects: tuple[int, int] | None

    def __post_init__(self) -> None:
        for split, count in zip(SPLITS, self.counts, strict=True):
            if count < 1:
                raise ValueError(f"num_{split} must be at least 1, got {count}.")

    @property
    def folder(self) -> str:
        """Name of the folder that holds the set."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return f"{self.name}-{self.size_px}px-{digest[:12]}"


def load_drawn_set(
    settings: SetSettings,
    class_names: Sequence[str],
    draw: Callable[[str, int], Scene],
    cache_dir: str | Path | None = None,
) -> DenseData:
    """Return a set that is kept in `cache_dir`; it is drawn where it isn't there or is damaged.

    The cache may be shared by processes of several machines: each draws into a folder of its own, and the first to end
    gives its folder the set's name.

    Args:
        draw: (split, row) -> scene, the same for the same arguments.
    """
    root = Path(cache_dir) if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "fa_transformers" / "sets"
    folder = root / settings.folder
    if not is_whole(folder):
        root.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{settings.folder}.", suffix=".tmp", dir=root))
        try:
            for split, count in zip(SPLITS, settings.counts, strict=True):
                rows = tqdm(range(count), desc=f"drawing {settings.name}, {split}", unit="image")
                write_split(own / split, class_names, (draw(split, row) for row in rows))
            write_checksums(own)
            own.chmod(0o755)  # a folder of mkdtemp is for its maker alone
            _put_in_place(own, folder)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    files = {split: folder / split / ANNOTATIONS for split in SPLITS}
    return load_coco_files(files, options=ObjectOptions(masks=True, check_pictures=False))


def write_split(folder: Path, class_names: Sequence[str], scenes: Iterable[Scene]) -> None:
    """Write scenes as pictures and a COCO file; ids count from 1."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        name = f"{number:05}.jpg"
        scene.image.save(folder / name, "JPEG", **JPEG)
        images.append({"id": number, "file_name": name, "width": scene.image.width, "height": scene.image.height})
        for each in scene.objects:
            fields = {"id": len(annotations) + 1, "image_id": number, "category_id": each["label"] + 1, "iscrowd": 0}
            annotations.append(fields | {name: value for name, value in each.items() if name != "label"})
    categories = [{"id": index, "name": name} for index, name in enumerate(class_names, start=1)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder` into it."""
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """True where a folder holds the files that were written to it, and none besides."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(expected) and expected == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> Mapping[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _put_in_place(own: Path, folder: Path) -> None:
    """Give `own` the name `folder`, unless another process has put a whole set there."""
    for _ in range(10):
        try:
            own.replace(folder)
            return
        except OSError:  # there is a folder that isn't empty
            if is_whole(folder):
                return
            aside = Path(tempfile.mkdtemp(suffix=".tmp", dir=folder.parent))
            try:
                folder.replace(aside / "damaged")
                logger.warning("%s was damaged and is replaced", folder)
            except OSError:  # another process was faster
                pass
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"{folder} can't be written: another program writes there; set HF_HOME to another folder")
