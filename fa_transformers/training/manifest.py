"""The manifest of a folder: size and SHA-256 of every file, by which a damaged or partial folder is noticed."""

import json
from pathlib import Path

from ..files import sha256_of

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` over all files that `folder` holds now, those of its subfolders included."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_FILE]
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Describe what is wrong with the first file that is not as the manifest says; None where all files are.

    Files that the manifest does not name are not looked at. A folder without a manifest counts as damaged: it was not
    finished, or something else wrote it.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} can't be read: {error}"
    for name, (num_bytes, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.stat().st_size != num_bytes:
                return f"{name} has {path.stat().st_size:,} bytes instead of {num_bytes:,}"
            if sha256_of(path) != checksum:
                return f"{name} no longer has the checksum it was written with"
        except OSError as error:
            return f"{name} can't be read: {error}"
    return None
