"""The student of a distillation, made from a checkpoint as a model of this package."""

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..conversion.convert import convert_checkpoint
from ..conversion.image_processors import fit_image_processor
from ..conversion.source import CheckpointSource
from ..conversion.stock_checkpoints import find_auto_class, find_family
from ..conversion.student_fields import student_fields
from ..conversion.teacher import fresh_head
from ..data.tokenizing import check_tokenizer
from ..models.configuration_fa import FactorizedConfig, FactorizedFields
from .recipes import Task

# Heads that aren't distilled: multiple choice encodes several texts per example, masked image modelling reconstructs
# patches that only the teacher saw masked.
ENCODER_ALONE = ("AutoModelForMultipleChoice", "AutoModelForMaskedImageModeling")


def build_student(
    source: CheckpointSource,
    task: Task,
    config_fields: dict[str, Any],
    image_size: int | None = None,
    square: bool = False,
) -> tuple[PreTrainedModel, str, Any]:
    """Build the model to train, in float32; a stock checkpoint is converted on the way.

    Args:
        source: the checkpoint to start from, stock or converted.
        task: "text", "images" or "object-detection".
        config_fields: fields of the student's config that were given; the others are `student_fields` of a stock
            checkpoint, and a converted one's own.
        image_size: side in pixels of the square that has as many pixels as an image is resized to, aspect kept; None
            leaves it to the checkpoint's processor.
        square: resize images to that square instead.

    Returns:
        The model, the Auto class of its head, and its tokenizer or image processor.

    Raises:
        ValueError: a field differs from what the checkpoint was converted with, its type can't be converted, or it is
            no detector while the task is detection, or the other way round.
    """
    is_detector = not issubclass(find_family(source.config.model_type).config_class, FactorizedConfig)
    if is_detector != (task == "object-detection"):
        raise ValueError(f"--task {task}: {source.name} is of type {source.config.model_type!r}; give another task.")
    if not isinstance(source.config, FactorizedFields):
        config_fields = student_fields(source.config, task) | config_fields
    elif other := [name for name, value in config_fields.items() if getattr(source.config, name) != value]:
        raise ValueError(
            f"--{other[0]} {config_fields[other[0]]}: {source.name} was converted with "
            f"{getattr(source.config, other[0])!r}. Leave the flag out, or convert the stock checkpoint again."
        )
    options = as_options(config_fields)
    auto_class = find_auto_class(source.architecture or "Model") or "AutoModel"
    conversion = convert_checkpoint(source, auto_class=auto_class, **options)
    if fresh_head(conversion) or auto_class in ENCODER_ALONE:
        print(f"{source.name} has a head that is not distilled: its encoder alone is.")
        auto_class = "AutoModel"
        conversion = convert_checkpoint(source, auto_class=auto_class, **options)
    student = conversion.model.float()  # half precision would round an optimizer's small steps away
    if task == "text":
        tokenizer = conversion.processor
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source.model_folder)
        check_tokenizer(tokenizer, student.config, source.name)
        return student, auto_class, tokenizer
    processor = AutoImageProcessor.from_pretrained(source.model_folder)
    if image_size:
        processor = fit_image_processor(processor, student.config, image_size, square=square)
    return student, auto_class, processor


def as_options(config_fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a config as `convert_checkpoint` takes them: the kind of positions by `positions`."""
    kind = config_fields.get("position_embedding_type")
    rest = {name: value for name, value in config_fields.items() if name != "position_embedding_type"}
    return rest | ({"positions": kind} if kind in ("periodic", "none") else {})
