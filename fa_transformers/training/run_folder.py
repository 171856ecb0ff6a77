"""The files that a run leaves in its folder: what they are, their sizes, and how the model in it is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..hub.publish import CARD_FILE, FACTS_FILE
from ..hub.self_check import SELF_TEST_FILE
from ..redaction import redact
from ..tables import format_table, one_line
from .curve import CURVE_FILE
from .predictions import PREDICTIONS_FILE, UNLABELLED_FILE

PAGE_FILE = "report.html"
MODEL = "the model"
CHECKPOINTS = "checkpoint-*"
MEANINGS = {
    PAGE_FILE: "scores, curve, errors, time and memory on one page: open it in a browser",
    PREDICTIONS_FILE: "the answer to each scored example, the worst errors first",
    UNLABELLED_FILE: "the answer to each row without a label",
    CURVE_FILE: "loss, validation score and learning rate by step",
    "confusion_matrix.png": "true against predicted classes",
    "most_confused.txt": "the most frequent errors by pair of classes",
    "per_class.txt": "precision, recall and F1 of each class",
    "all_results.json": "all scores and figures for programs",
    "pictures": "what was found in some of the scored pictures",
    "profile": "the profiler's trace",
    "adapter": "the LoRA adapter alone, without the model that it changes",
    "base": "the model that the adapter changes",
    "recovery": "checkpoints of the attention transfer, to resume from; delete them when you won't",
    CHECKPOINTS: "to resume from; delete them when you won't",
}
"""Name in a run's folder -> what it is, in the order in which they are listed."""
LOADING = {
    "text-classification": ("classify", '"Type or read a document here."'),
    "image-classification": ("classify", '"photo.jpg"'),
    "object-detection": ("find", '"photo.jpg"'),
    "image-segmentation": ("find", '"photo.jpg"'),
    "stereo-depth-estimation": ("measure", '("left.png", "right.png")'),
}
"""Task of a pipeline -> the name that the pipeline has in the lines that load it, and what it is called with."""


@dataclass(frozen=True)
class Entry:
    """A file or a group of files in a run's folder, with its size in bytes and what it is."""

    name: str
    num_bytes: int
    meaning: str


def list_folder(folder: Path) -> list[Entry]:
    """Return what a run's folder holds: the model first, as one entry of all that `push` uploads."""
    model = _model_files(folder)
    sizes: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        name = CHECKPOINTS if path.name.startswith("checkpoint-") else path.name
        files = [part for part in ([path] if path.is_file() else path.rglob("*")) if part.is_file()]
        rest = sum(part.stat().st_size for part in files if part not in model)
        if rest or not all(part in model for part in files):
            sizes[name] = sizes.get(name, 0) + rest
    entries = [Entry(name, sizes[name], meaning) for name, meaning in MEANINGS.items() if name in sizes]
    others = [Entry(name, size, "curves for tensorboard" if _has_events(folder / name) else "")
              for name, size in sizes.items() if name not in MEANINGS]  # fmt: skip
    if not model:
        return entries + others
    total = sum(path.stat().st_size for path in model)
    meaning = f"{len(model)} files: weights, code, card; push uploads these alone"
    return [Entry(MODEL, total, meaning), *entries, *others]


def _model_files(folder: Path) -> set[Path]:
    """The files that `publish` wrote."""
    try:
        names = json.loads((folder / SELF_TEST_FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return set()
    paths = {folder / name for name in (*names, SELF_TEST_FILE, CARD_FILE, FACTS_FILE)}
    return {path for path in paths if path.is_file()}


def _has_events(folder: Path) -> bool:
    return any(folder.glob("**/events.out.tfevents.*")) if folder.is_dir() else False


def show_size(num_bytes: int) -> str:
    """Return a size with its unit, of which there are powers of 1,000, as file managers show it."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.1f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{max(0.1, num_bytes / 1e3):.1f} kB"


def loading_lines(task: str, folder: str) -> list[str]:
    """Return the three lines of Python that load a folder's model by the library's pipeline and use it."""
    task = "image-segmentation" if task == "instance-segmentation" else task
    name, example = LOADING[task]
    return [
        "from transformers import pipeline",
        f"{name} = pipeline({json.dumps(task)}, {json.dumps(folder, ensure_ascii=False)}, trust_remote_code=True)",
        f"print({name}({example}))",
    ]


def print_folder(task: str, folder: Path) -> None:
    """Print where the files of a run are, their sizes, and the lines that load its model: what a run ends with."""
    entries = list_folder(folder)
    rows = [{"file": entry.name, "size": show_size(entry.num_bytes), "what it is": entry.meaning} for entry in entries]
    total = show_size(sum(entry.num_bytes for entry in entries))
    print(f"\n{one_line(redact(str(folder)), 1000)} has {total}:\n")
    print(format_table(rows, ["file", "size", "what it is"]))
    print("\nLoad the model:\n")
    print("\n".join(redact(loading_lines(task, str(folder)))))
