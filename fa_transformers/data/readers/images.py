"""A user's own images: a folder, a loaded data set or rows in Python, checked, and brought to what a model wants."""

import logging
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .files import fill_splits, list_of
from .tables import DataError, listing

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
LARGEST_16_BIT = 65535


def load_image_folder(
    folder: str | Path,
    *,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Read images from one subfolder per class into a DatasetDict with "image" and "label" (ClassLabel).

    `folder` holds either the splits (train, and validation and test if there are any), each with the class folders, or
    the class folders themselves. Missing splits are drawn from train with `seed`, as in `load_text_files`. Classes are
    the sorted names of train's folders. Files are read in any format that Pillow opens; of an animation the first
    frame counts; files of other endings are left out and counted in a warning. Images are decoded again when they are
    accessed, so only paths are held in memory.

    Raises DataError for a broken, truncated or empty image, for one of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`
    (89,478,485 unless you set it; larger files may be decompression bombs), for a class without images, and for a
    class that train doesn't have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    split_folders = find_split_folders(folder)
    if "train" not in split_folders:
        split_folders = {"train": folder}
    files = {split: find_class_images(path) for split, path in split_folders.items()}
    names = sorted(files["train"])
    if len(names) < 2:
        raise DataError(
            f"{split_folders['train']}: found {len(names)} class folders ({listing(names) or 'none'}); a classifier "
            "needs two or more, one subfolder of images per class"
        )
    for split, by_class in files.items():
        unknown = sorted(set(by_class) - set(names))
        if unknown:
            raise DataError(
                f"{split_folders[split] / unknown[0]}: the class {unknown[0]!r} doesn't occur in train, whose classes "
                f"are {listing(names)}; rename the folder or add such images to train"
            )
        check_images([path for paths in by_class.values() for path in paths])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    dataset = {}
    for split, by_class in files.items():
        rows = [(str(path), name) for name in sorted(by_class) for path in by_class[name]]
        paths, labels = zip(*rows, strict=True)
        columns = {"image": list(paths), "label": [names.index(label) for label in labels]}
        dataset[split] = datasets.Dataset.from_dict(columns, features=features)
    return fill_splits(datasets.DatasetDict(dataset), validation_share, test_share, seed)


def encode_images(
    dataset: datasets.DatasetDict,
    image_column: str = "image",
    label_column: str = "label",
    seed: int = 0,
    check: bool = False,
) -> datasets.DatasetDict:
    """Reduce a loaded DatasetDict to the columns "image" and "label" (ClassLabel); missing splits are drawn from train.

    With `check` every image is decoded once, as `load_image_folder` does.

    Raises:
        DataError: a column is missing or has another type, a label is missing, a later split has a label that train
            lacks, or with `check` an image is missing, broken or of a mode that can't be converted.
    """
    if "train" not in dataset:
        raise DataError(f"the data set has no split 'train', only {sorted(dataset)}: name one of them 'train'")
    encoded = {}
    names: list[str] | None = None
    for split in [name for name in ("train", "validation", "test") if name in dataset]:
        part = _pick_columns(dataset[split], split, image_column, label_column)
        if not isinstance(part.features["label"], datasets.ClassLabel):
            values = [str(value) for value in part["label"]]
            names = names or sorted(set(values))
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise DataError(f"split {split!r} has the label {unknown[0]!r}, which train lacks")
            part = part.remove_columns("label").add_column("label", [names.index(value) for value in values])
            part = part.cast_column("label", datasets.ClassLabel(names=names))
        if check:
            _check_rows(part, split)
        encoded[split] = part
    return fill_splits(datasets.DatasetDict(encoded), 0.1, 0.1, seed)


def _pick_columns(part: datasets.Dataset, split: str, image_column: str, label_column: str) -> datasets.Dataset:
    """The two columns, as "image" and "label"."""
    for flag, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
        if column not in part.column_names:
            raise DataError(f"split {split!r} has no column {column!r}, only {part.column_names}: give {flag}")
    part = part.select_columns([image_column, label_column])
    part = part.rename_columns({image_column: "image", label_column: "label"})
    if not isinstance(part.features["image"], datasets.Image):
        raise DataError(f"split {split!r}: column {image_column!r} holds {part.features['image']}, not images")
    for number, label in enumerate(part["label"], start=1):
        if label is None:
            raise DataError(f"split {split!r}, row {number}: the label is missing")
    return part


def _check_rows(part: datasets.Dataset, split: str) -> None:
    for index in tqdm(range(len(part)), desc="checking images", unit="image"):
        where = f"split {split!r}, row {index + 1}"
        try:
            image = part[index]["image"]
            if image is None:
                raise DataError("the image is missing: remove the row or give it one")
            convert_image(image)
        except (OSError, SyntaxError, ValueError) as error:  # DataError is a ValueError
            raise DataError(f"{where}: {error}") from error


def collect_images(columns: Mapping[str, Sequence], image_column: str, label_column: str) -> datasets.Dataset:
    """Return rows that are given in Python as a dataset, for `encode_images`.

    Images may be Pillow's, arrays [height, width, channels] of bytes, paths of files, or the bytes of files.

    Raises:
        DataError: a column is missing, is no list, or is longer than the other; or an image is none of these.
    """
    for flag, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
        if column not in columns:
            raise DataError(f"rows have no column {column!r}, only {list(columns)}: give {flag}")
    images = columns[image_column]
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | np.ndarray):
        raise DataError(
            f"rows, column {image_column!r}: a column must be a list of images, got {type(images).__name__}"
        )
    labels = list_of(columns[label_column], f"rows, column {label_column!r}")
    if len(images) != len(labels):
        raise DataError(
            f"rows: column {image_column!r} has {len(images)} values and {label_column!r} has {len(labels)}: give one "
            "label for each image"
        )
    for number, image in enumerate(images, start=1):
        if not isinstance(image, Image.Image | np.ndarray | str | Path | bytes | None):
            raise DataError(
                f"rows, row {number}: an image must be Pillow's, an array, a path or a file's bytes, got "
                f"{type(image).__name__}"
            )
    try:
        return datasets.Dataset.from_dict(
            {image_column: list(images), label_column: [None if label is None else str(label) for label in labels]},
            features=datasets.Features({image_column: datasets.Image(), label_column: datasets.Value("string")}),
        )
    except (pyarrow.ArrowException, TypeError, ValueError, OSError) as error:
        raise DataError(f"rows, column {image_column!r}: an image can't be stored: {error}") from error


def convert_image(image: Image.Image, num_channels: int = 3) -> Image.Image:
    """Bring an image of any mode to 8 bits and the model's channels: 1 gives mode "L" (grey), 3 gives "RGB".

    Transparent pixels (RGBA, LA, palettes with a transparent colour) are laid over white, because what is stored under
    them is arbitrary. 16-bit grey is scaled so that 65535 becomes 255. Floating-point images (mode "F"), and 32-bit
    integers outside 0 to 65535, have no agreed white and are a DataError.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 (grey) or 3 (RGB), got {num_channels}")
    target = "L" if num_channels == 1 else "RGB"
    if image.mode == "F":
        raise DataError(
            "the image has floating-point pixels (mode F), whose range isn't known: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > LARGEST_16_BIT:
            raise DataError(
                f"the image has integer pixels from {values.min()} to {values.max()}, outside 0 to {LARGEST_16_BIT}: "
                "save it with 8 or 16 bits"
            )
        image = Image.fromarray(_to_8_bits(values))
    if image.mode in MODES_WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert(target)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers from 0 to 65535 scaled to 0 to 255, some rows at a time: numpy's indices take 8 bytes a pixel."""
    scaled = np.round(np.arange(LARGEST_16_BIT + 1) * (255 / LARGEST_16_BIT)).astype(np.uint8)
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):
        result[start : start + 64] = scaled[values[start : start + 64]]
    return result


def open_image(path: str | Path) -> Image.Image:
    """Decode one image file completely, turned as its EXIF orientation says.

    Raises DataError, naming the file, if it is empty, not an image, broken, truncated or larger than Pillow's limit.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes): remove it or copy it again")
    try:
        with Image.open(path) as image:
            _check_size(path, image.size)
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}. {_limit_advice()}") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{path}: no image that Pillow can read, or a broken one: remove it, copy it again or "
            "convert it to PNG or JPEG"
        ) from error
    except DataError:
        raise
    # Pillow's own limits, such as that on texts beside the pixels, are ValueErrors.
    except (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: the image is broken or truncated ({error}): remove it or copy it again") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width == 0 or height == 0:
        raise DataError(f"{path}: the image has no pixels ({width} x {height}): remove it")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"{path}: the image has {width} x {height} = {width * height:,} pixels. {_limit_advice()}")


def image_endings() -> set[str]:
    """Endings of the files that can be read, in lower case; pictures are written to more, such as .pdf."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _limit_advice() -> str:
    return (
        f"The limit against decompression bombs is PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS:,} pixels: "
        "scale the image down, or raise the limit if you trust the file"
    )


def find_split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits "train", "validation" and "test" in `folder`, of those that are there."""
    found = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    return {split: path for split, path in found.items() if path}


def find_class_images(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, sorted, from the class folders and whatever folders lie inside them.

    Raises DataError for a class without images.
    """
    endings = image_endings()
    found: dict[str, list[Path]] = {}
    left_out: list[Path] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in class_folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        found[class_folder.name] = [path for path in files if path.suffix.lower() in endings]
        left_out += [path for path in files if path.suffix.lower() not in endings]
        if not found[class_folder.name]:
            raise DataError(f"{class_folder}: the class folder has no images: add some or remove the folder")
    if left_out:
        logger.warning(
            "%s: %d files don't have the ending of an image and were left out, first %s",
            folder,
            len(left_out),
            left_out[0],
        )
    return found


def check_images(paths: Iterable[Path]) -> None:
    """Decode every image once, in a few threads: Pillow's decoders run outside Python's lock.

    Raises DataError, naming the file, as `open_image` and `convert_image` do.
    """
    paths = list(paths)

    def check(path: Path) -> None:
        image = open_image(path)
        try:
            convert_image(image)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in tqdm(pool.map(check, paths), total=len(paths), desc="checking images", unit="image"):
            pass
