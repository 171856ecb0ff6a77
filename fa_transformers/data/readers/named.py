"""Data sets by name: of the Hub, saved to a folder, or a folder of a user's own files."""

import logging
import os
from pathlib import Path

import datasets

from .formats import FILE_TYPES
from .tables import DataError, listing

logger = logging.getLogger(__name__)


def is_saved(name: str) -> bool:
    """True for the folder of a DatasetDict that `save_to_disk` wrote."""
    return (Path(name) / "dataset_dict.json").is_file()


def load_named(name: str, config_name: str | None) -> datasets.DatasetDict:
    """Load a data set of the Hub, or the local folder of one.

    Raises:
        DataError: there is none of that name, or it has no splits.
    """
    if is_saved(name):
        return datasets.load_from_disk(name)
    try:
        loaded = datasets.load_dataset(name, config_name)
    except ConnectionError as error:
        raise DataError(
            f"--dataset_name {name} is no folder here, and the Hub can't be reached: correct the name of the folder, "
            f"or look after the network ({error})"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"--dataset_name {name} is no folder here and no data set of the Hub: {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"--dataset_name {name} has no splits; it needs at least 'train'.")
    return loaded


def find_tables(name: str, config_name: str | None) -> dict[str, list[Path]] | None:
    """Return the files of each split of a folder of tables, by the datasets library's rules for names and cards.

    Tables may be of several types. None where `name` is no folder, a saved data set, or holds other data, as images.

    Raises:
        DataError: the folder has nothing that can be read, or a split of files that are no tables beside tables.
    """
    if not Path(name).is_dir() or is_saved(name):
        return None
    by_name = _find_by_name(name)
    try:
        builder = datasets.load_dataset_builder(name, config_name)
    except FileNotFoundError as error:
        if not by_name:
            raise DataError(
                f"--dataset_name {name}: the folder holds no files that can be read, such as train.csv, nor a saved "
                "data set; images go by --image_folder"
            ) from error
    except ValueError as error:
        if not by_name or config_name is not None:
            raise DataError(f"--dataset_name {name}: {error}") from error
    else:
        named = {
            str(split): [Path(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()
        }
        found = {path for paths in named.values() for path in paths}
        if not found or not {path.suffix.lower() for path in found} <= set(FILE_TYPES):
            return None
        left_out = sorted({path for paths in by_name.values() for path in paths} - found)
        # The library reads files of one type, the commonest; a card or a configuration may choose.
        if config_name is not None or (Path(name) / "README.md").is_file():
            if left_out:
                logger.warning(
                    "--dataset_name %s: tables that are not read: %s",
                    name,
                    listing(os.path.relpath(path, name) for path in left_out),
                )
            return named
    if empty := [split for split, paths in by_name.items() if not paths]:
        raise DataError(
            f"--dataset_name {name}: the files of split {listing(empty)} are no tables ({listing(FILE_TYPES)}): "
            "convert them or move them away"
        )
    return by_name


def _find_by_name(name: str) -> dict[str, list[Path]]:
    """Return the tables of each split, of whatever types, that the names of a folder's files and folders tell."""
    try:
        patterns = datasets.data_files.get_data_patterns(name)
    except FileNotFoundError:
        return {}
    endings = [*FILE_TYPES, *map(str.upper, FILE_TYPES)]
    files = {}
    for split, several in patterns.items():
        try:
            found = datasets.data_files.DataFilesList.from_patterns(several, name, allowed_extensions=endings)
        except FileNotFoundError:
            found = []
        files[str(split)] = [Path(path) for path in found]
    return files if any(files.values()) else {}
