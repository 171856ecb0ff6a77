"""The modules of a sentence-transformers model, kept beside its converted encoder.

With them `SentenceTransformer(folder, trust_remote_code=True)` loads the folder and pools as the source did.
"""

import json
from typing import Any

from .source import MODULES_FILE, CheckpointSource, read_modules

SENTENCE_FILE = "sentence_bert_config.json"


def sentence_transformers_files(source: CheckpointSource, max_length: int | None) -> dict[str, bytes]:
    """Return the files of a sentence-transformers folder beside its encoder's, by name; {} for any other checkpoint.

    The encoder goes to the folder itself, and takes texts of `max_length` tokens if given.
    """
    if source.folder is None or source.model_folder is None or not (modules := read_modules(source.folder)):
        return {}
    folder = source.folder
    files: dict[str, bytes] = {}
    for module in modules[1:]:
        paths = [path for path in (folder / module["path"]).rglob("*") if path.is_file()]
        files |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    modules[0]["path"] = ""
    files[MODULES_FILE] = _as_json(modules)
    general = folder / "config_sentence_transformers.json"
    if general.is_file():
        files[general.name] = general.read_bytes()
    path = source.model_folder / SENTENCE_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if max_length is not None:
        settings["max_seq_length"] = max_length
    return files | ({SENTENCE_FILE: _as_json(settings)} if settings else {})


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
