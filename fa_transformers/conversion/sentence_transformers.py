"""The modules of a sentence-transformers model, kept beside its converted encoder.

With them `SentenceTransformer(folder, trust_remote_code=True)` loads the folder and pools as the source did.
"""

import json
from pathlib import Path
from typing import Any

from ..hub.self_check import path_inside
from .json_file import read_json
from .source import MODULES_FILE, CheckpointSource, read_modules

SENTENCE_FILE = "sentence_bert_config.json"


def sentence_transformers_files(source: CheckpointSource, max_length: int | None) -> dict[str, bytes]:
    """Return the files of a sentence-transformers folder beside its encoder's, by name; {} for any other checkpoint.

    The encoder goes to the folder itself, and takes texts of `max_length` tokens if given.

    Raises:
        ValueError: a module or one of its files lies outside of the folder.
    """
    if source.folder is None or source.model_folder is None or not (modules := read_modules(source.folder)):
        return {}
    folder = source.folder
    files: dict[str, bytes] = {}
    for module in modules[1:]:
        files |= _files_of_module(folder, module["path"])
    modules[0]["path"] = ""
    files[MODULES_FILE] = _as_json(modules)
    general = folder / "config_sentence_transformers.json"
    if general.is_file():
        files[general.name] = path_inside(folder, general.name, f"{folder}: the file").read_bytes()
    path = source.model_folder / SENTENCE_FILE
    settings = read_json(path, dict) if path.is_file() else {}
    if max_length is not None:
        settings["max_seq_length"] = max_length
    return files | ({SENTENCE_FILE: _as_json(settings)} if settings else {})


def _files_of_module(folder: Path, name: str) -> dict[str, bytes]:
    """The files in a module's folder, by their names in the model's; none where the module lies in the model's own."""
    if (folder / name).resolve() == folder.resolve():
        return {}
    names = [path.relative_to(folder).as_posix() for path in (folder / name).rglob("*") if path.is_file()]
    where = f"{folder}: a file of the module {name!r}"
    return {name: path_inside(folder, name, where).read_bytes() for name in names}


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
