"""The generated tasks of Long Range Arena: sizes, models and training of a small and of the official setting.

The official setting has the sizes, batches, steps, learning rates and models of the benchmark's configurations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..data.sets import listops, pathfinder
from ..files import written_by_rename
from ..models import FABertConfig, FABertForSequenceClassification
from ..options import OptionGroup, option

OFFICIAL: dict[str, dict[str, Any]] = {
    "listops": dict(
        max_steps=5000, per_device_train_batch_size=32, learning_rate=0.05 / 1000**0.5, warmup_steps=1000,
        lr_scheduler_type="inverse_sqrt", eval_steps=500, save_steps=500,
    ),
    "pathfinder32": dict(
        num_train_epochs=200.0, per_device_train_batch_size=512, per_device_eval_batch_size=512, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=160_000 // 512, weight_decay=0.0,
    ),
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "listops": OFFICIAL["listops"] | dict(
        max_steps=400, per_device_train_batch_size=16, learning_rate=2e-3, warmup_steps=80, eval_steps=200,
        save_steps=200,
    ),
    "pathfinder32": dict(
        max_steps=400, per_device_train_batch_size=16, learning_rate=1e-3, eval_steps=200, save_steps=200,
    ),
}  # fmt: skip
SETTINGS = {"small": SMALL, "official": OFFICIAL}
SIZES = {
    "small": {"train": 3000, "validation": 300, "test": 500},
    "listops": listops.OFFICIAL_SIZES,
    "pathfinder32": pathfinder.OFFICIAL_SIZES,
}
WIDTHS: dict[str, dict[str, Any]] = {
    "small": dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128),
    "listops": dict(num_hidden_layers=4, hidden_size=512, num_attention_heads=8, intermediate_size=1024),
    "pathfinder32": dict(
        num_hidden_layers=1, hidden_size=128, num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.2,
        classifier_pooling="mean",
    ),
}  # fmt: skip
# Of pictures, a window of 33 tokens reaches a pixel's eight neighbours.
LOCAL: dict[str, dict[str, Any]] = {
    "listops": dict(local_window=16, local_kernel_size=5),
    "pathfinder32": dict(local_window=33, local_kernel_size=5),
}
NUM_TOKENS = {"listops": len(listops.VOCABULARY), "pathfinder32": 1 + 256}
LONGEST = {"listops": 1 + listops.LONGEST, "pathfinder32": 1 + pathfinder.SIZE_PX**2}
NUM_LABELS = {"listops": listops.NUM_CLASSES, "pathfinder32": len(pathfinder.LABEL_NAMES)}


@dataclass(frozen=True)
class ArenaOptions(OptionGroup):
    """The task, the model that learns it, and how large both are."""

    task: Literal["listops", "pathfinder32"] = option("listops", "task to learn", group="arena", common=True)
    model: Literal["fa", "fa-local", "softmax"] = option("fa", "how tokens are mixed", group="arena", common=True)
    setting: Literal["small", "official"] = option(
        "small", "small: minutes on a CPU; official: for a GPU", group="arena", common=True
    )
    sizes: tuple[int, ...] | None = option(
        None, "examples to train on, to validate with and to test on; unset = the setting's", group="arena", common=True
    )
    difficulty: Literal["easy", "intermediate", "hard"] | None = option(
        None,
        "dashes of a snake of pathfinder32; unset = easy in the small setting, else hard",
        group="arena",
        common=True,
    )
    num_proc: int = option(
        1, "processes that draw pictures, 20 ms each; kept for the next run", group="arena", common=True
    )
    picture: Path | None = option(
        None, "only write a PNG with examples of pathfinder32 there", group="arena", common=True
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what no run can use."""
        if self.sizes is not None and (len(self.sizes) != 3 or min(self.sizes) < 1):
            raise ValueError(f"--sizes must be three numbers from 1 on, train, validation and test, got {self.sizes}.")

    @property
    def sizes_by_split(self) -> dict[str, int]:
        """Number of examples of each split."""
        sizes = SIZES[self._scale]
        return sizes if self.sizes is None else dict(zip(sizes, self.sizes, strict=True))

    @property
    def drawn_difficulty(self) -> str:
        """Difficulty of the pictures that are drawn."""
        return self.difficulty or ("easy" if self.setting == "small" else "hard")

    @property
    def widths(self) -> dict[str, Any]:
        """Config fields of the model's sizes."""
        return WIDTHS[self._scale]

    @property
    def _scale(self) -> str:
        return "small" if self.setting == "small" else self.task


def load_splits(options: ArenaOptions, seed: int) -> dict[str, tuple]:
    """Return token ids, from 1 on, and labels of each split."""
    sizes = options.sizes_by_split
    if options.task == "listops":
        return listops.load_listops(sizes, seed)
    splits = pathfinder.load_pathfinder(sizes, seed, difficulty=options.drawn_difficulty, num_proc=options.num_proc)
    return {split: (pixels.astype(np.int16) + 1, labels) for split, (pixels, labels) in splits.items()}


def build_model(options: ArenaOptions) -> FABertForSequenceClassification:
    """Build the classifier with new weights; its last token id is the one that documents begin with."""
    widths = options.widths
    mixing = {
        "fa": {},
        "fa-local": LOCAL[options.task],
        "softmax": {"softmax_layers": list(range(widths["num_hidden_layers"]))},
    }
    config = FABertConfig(
        vocab_size=NUM_TOKENS[options.task] + 1,
        max_position_embeddings=LONGEST[options.task],
        num_labels=NUM_LABELS[options.task],
        type_vocab_size=1,
        **{"classifier_pooling": "cls"} | widths,
        **mixing[options.model],
    )
    return FABertForSequenceClassification(config)


def draw_examples(path: Path, difficulty: str, seed: int) -> None:
    """Write a PNG of 4 rows of 8 pictures, enlarged: label 0 in the upper two rows, 1 in the lower ones."""
    rows: dict[int, list[np.ndarray]] = {0: [], 1: []}
    number = 0
    while min(len(part) for part in rows.values()) < 16:
        picture = pathfinder.draw_picture(np.random.default_rng([seed, number]), difficulty)
        rows[picture.label].append(np.pad(picture.pixels, 1, constant_values=90))
        number += 1
    tiles = np.stack(rows[0][:16] + rows[1][:16]).reshape(4, 8, 34, 34).swapaxes(1, 2).reshape(4 * 34, 8 * 34)
    with written_by_rename(path) as temporary:
        Image.fromarray(tiles).resize((8 * 34 * 4, 4 * 34 * 4), Image.Resampling.NEAREST).save(temporary, "PNG")
