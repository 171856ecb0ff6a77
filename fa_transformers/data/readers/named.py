"""Data sets by name: of the Hub, saved to a folder, or a folder of a user's own files."""

from pathlib import Path

import datasets

from .formats import FILE_TYPES
from .tables import DataError


def is_saved(name: str) -> bool:
    """True for the folder of a DatasetDict that `save_to_disk` wrote."""
    return (Path(name) / "dataset_dict.json").is_file()


def load_named(name: str, config_name: str | None) -> datasets.DatasetDict:
    """Load a data set of the Hub, or the local folder of one.

    Raises:
        DataError: it has no splits.
    """
    if is_saved(name):
        return datasets.load_from_disk(name)
    loaded = datasets.load_dataset(name, config_name)
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"--dataset_name {name} has no splits; it needs at least 'train'.")
    return loaded


def find_tables(name: str, config_name: str | None) -> dict[str, list[Path]] | None:
    """Return the files of each split of a folder of tables, by the datasets library's rules for names and cards.

    None where `name` is no folder, a saved data set, or holds files that aren't tables.
    """
    if not Path(name).is_dir() or is_saved(name):
        return None
    try:
        found = datasets.load_dataset_builder(name, config_name).config.data_files
    except FileNotFoundError as error:
        # The datasets library reads no spreadsheets, but its rules for names hold for them too.
        if not any(path.suffix.lower() == ".xlsx" for path in Path(name).rglob("*")):
            raise DataError(
                f"--dataset_name {name}: the folder holds no files that can be read, such as train.csv, nor a saved "
                "data set; images go by --image_folder"
            ) from error
        patterns = datasets.data_files.get_data_patterns(name)
        found = datasets.data_files.DataFilesDict.from_patterns(patterns, name, allowed_extensions=[".xlsx"])
    files = {str(split): [Path(path) for path in paths] for split, paths in (found or {}).items()}
    endings = {path.suffix.lower() for paths in files.values() for path in paths}
    return files if endings and endings <= set(FILE_TYPES) else None
