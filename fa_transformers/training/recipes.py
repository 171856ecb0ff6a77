"""The defaults of fine-tuning by task and data, in nothing but the standard library, so that --help has them at once.

Every default that is a matter of tuning stands here. A later table wins over an earlier one, a given value over all.
"""

import math
from pathlib import Path
from typing import Any, Literal

Task = Literal["text-classification", "image-classification"]

COMMON: dict[str, Any] = dict(
    per_device_eval_batch_size=16, gradient_accumulation_steps=1, num_train_epochs=3.0, max_steps=-1, weight_decay=0.01,
    max_grad_norm=1.0, lr_scheduler_type="linear", warmup_ratio=0.1, warmup_steps=0, seed=0,
    short_epochs=0, short_length=128, eval_steps=0, save_steps=0, save_total_limit=2, early_stopping_patience=0,
    load_best_model_at_end=True, group_by_length=True, num_threads=0, report_to="tensorboard",
    logging_steps=10, output_dir=Path("outputs/finetuned"), license="unknown", language=None, mixed_precision=None,
    max_eval_samples=None,
)  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "text-classification": dict(
        model_name_or_path="minilm", learning_rate=2e-4, max_length=4096, image_size=None,
        max_tokens_per_batch=4096, per_device_train_batch_size=32,
    ),
    "image-classification": dict(
        learning_rate=1e-3, image_size=1024, max_tokens_per_batch=0, per_device_train_batch_size=8, max_length=None,
        model_name_or_path="none",
    ),
}  # fmt: skip
# An image size of None is the one that the checkpoint's processor states.
PRETRAINED_IMAGES: dict[str, Any] = dict(learning_rate=1e-4, image_size=None)
# What stands in the place of a stock text checkpoint's softmax attention unless fields of it are given: with it, and
# first epochs that are cut, texts are learnt far sooner (docs/results/recipes.md).
STOCK_TEXT_LAYERS: dict[str, Any] = dict(local_window=64, position_embedding_type="periodic")
DEMOS: dict[str, dict[str, Any]] = {
    "text-classification": dict(
        max_tokens_per_batch=2048, short_epochs=2, max_length=512, mixed_precision="auto", license="apache-2.0",
        language="en",
    ),
    "image-classification": dict(
        num_train_epochs=5.0, learning_rate=3e-3, classifier_pooling="mean", local_kernel_size=3, license="apache-2.0",
    ),
}  # fmt: skip
FULL_RECIPES: dict[str, dict[str, Any]] = {
    "text-classification": dict(
        num_train_epochs=5.0, short_epochs=4, short_length=512, learning_rate=1e-4, max_length=20480
    ),
    "image-classification": dict(num_train_epochs=8.0),
}  # fmt: skip


def recipe_of(task: str, *, is_demo: bool, model_name_or_path: str | None = None, full: bool = False) -> dict[str, Any]:
    """Return the value of every option that was not given, by name.

    `short_epochs` is missing for texts of one's own: it follows from the checkpoint (`count_short_epochs`).

    Args:
        task: "text-classification" or "image-classification".
        is_demo: the data is the built-in demo's, for which everything was tuned.
        model_name_or_path: what was given; None where nothing was.
        full: the demo's long recipe.

    Raises:
        ValueError: the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}.")
    recipe = COMMON | TASKS[task] | (DEMOS[task] if is_demo else {})
    if task == "image-classification" and model_name_or_path not in (None, "none"):
        recipe |= PRETRAINED_IMAGES | ({"image_size": recipe["image_size"]} if is_demo else {})  # digits need it
    if task == "text-classification" and not is_demo:
        del recipe["short_epochs"]
    return recipe | (FULL_RECIPES[task] if full else {})


def count_short_epochs(num_train_epochs: float, max_steps: int) -> int:
    """Return in how many first epochs of a stock checkpoint texts are cut, which go faster: all but the last, which is
    of whole texts, and none where steps are counted."""
    return math.ceil(num_train_epochs) - 1 if max_steps < 1 else 0
