"""The defaults of distillation by task and recipe, and the options that it reads; nothing but the standard library.

Every default that is a matter of tuning stands here, save the fields of students (`conversion.student_fields`), which
training reads as well. A later table wins over an earlier one, a given value over all.
"""

from pathlib import Path
from typing import Any, Literal

from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions

Task = Literal["text", "images", "object-detection"]
Recipe = Literal["quick", "full"]
STAGES = ("transfer", "end_to_end", "long")
"""Names of the stages, in order; each has its steps in the option NAME_steps and its checkpoints in a folder NAME."""

COMMON: dict[str, Any] = dict(
    per_device_train_batch_size=64, per_device_eval_batch_size=32, gradient_accumulation_steps=1, num_train_epochs=1.0,
    max_steps=-1, weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="linear", warmup_ratio=0.05, warmup_steps=0,
    seed=0, short_epochs=0, short_length=512, eval_steps=0, save_steps=500, save_total_limit=1,
    early_stopping_patience=0, load_best_model_at_end=False, group_by_length=True, num_threads=0,
    report_to="tensorboard", logging_steps=10, output_dir=Path("outputs/distilled"), license="unknown", language=None,
    mixed_precision="auto", max_eval_samples=200, transfer_learning_rate=1e-2, learning_rate=5e-5,
    mixer_learning_rate=5e-4, long_length=0, long_steps=0, freeze_embeddings=True,
)  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "text": dict(
        model_name_or_path="minilm", max_length=512, image_size=None, max_tokens_per_batch=2048,
    ),
    "images": dict(
        model_name_or_path="dinov2-small", max_length=None, image_size=224, max_tokens_per_batch=2048,
        # At the rates of text the loss rose from 0.18 to 0.32.
        learning_rate=1e-5, mixer_learning_rate=1e-4,
    ),
    # There is no packaged detector. Batches are limited by images, which keep their own sizes.
    "object-detection": dict(
        model_name_or_path=None, max_length=None, image_size=None, max_tokens_per_batch=0,
        per_device_train_batch_size=8, per_device_eval_batch_size=8, mixer_learning_rate=1e-3, learning_rate=1e-4,
    ),
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "quick": dict(transfer_steps=400, end_to_end_steps=530),
    "full": dict(transfer_steps=1000, end_to_end_steps=2500),
}
# Licences of the teachers that come as packages, by their short name.
PACKAGED_LICENSES = {"minilm": "apache-2.0", "dinov2-small": "apache-2.0"}
# Groups of options that distillation reads, as the command line shows them. The others have no use: text is cut into
# pieces without labels, each stage has steps of its own, and a teacher's softmax attention isn't shared by processes.
GROUPS: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (DataOptions, ("text", "label column", "images"), "data (none of these = prose of installed Python packages)"),
    (ModelOptions, ("checkpoint", "size", "layer", "positions"), "model"),
    (DistillationOptions, ("distillation",), "distillation (0 steps leave a stage out)"),
    (LoopOptions, ("batches", "dry run", "optimizer", "device", "checkpoints"), "training"),
    (CardOptions, ("card", "data card", "hub name"), "model card"),
)


def recipe_of(task: str = "text", recipe: str = "quick", teacher: str | None = None) -> dict[str, Any]:
    """Return the value of every option that was not given, by name.

    Args:
        task: what the model reads, "text" or "images", or what it finds there, "object-detection".
        recipe: how long to train, "quick" or "full".
        teacher: the checkpoint that was given to learn from; None where none was. It decides the licence.

    Raises:
        ValueError: the task or the recipe is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}.")
    if recipe not in RECIPES:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    values = COMMON | TASKS[task] | RECIPES[recipe]
    license = PACKAGED_LICENSES.get(teacher or values["model_name_or_path"])
    return values | ({"license": license} if license else {})
