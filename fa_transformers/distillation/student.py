"""The student and the teacher of a distillation, both made from checkpoints as models of this package."""

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..conversion.convert import Conversion, convert_checkpoint
from ..conversion.source import CheckpointSource, read_source
from ..conversion.stock_checkpoints import find_auto_class, find_family, translate_fields
from ..data.tokenizing import check_tokenizer
from ..models.configuration_fa import FactorizedConfig, FactorizedFields
from .recipes import STUDENT_FIELDS, Task

# Heads that aren't distilled: multiple choice encodes several texts per example, masked image modelling reconstructs
# patches that only the teacher saw masked.
ENCODER_ALONE = ("AutoModelForMultipleChoice", "AutoModelForMaskedImageModeling")
SHAPE_FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "encoder_ffn_dim",
    "decoder_layers", "num_queries",
)  # fmt: skip


def build_student(
    source: CheckpointSource, task: Task, config_fields: dict[str, Any], image_size: int | None = None
) -> tuple[PreTrainedModel, str, Any]:
    """Build the model to train, in float32; a stock checkpoint is converted on the way.

    Args:
        source: the checkpoint to start from, stock or converted.
        task: "text", "images" or "object-detection".
        config_fields: fields of the student's config that were given; the others are `STUDENT_FIELDS` and maps of twice
            the head width for a stock checkpoint, and a converted one's own.
        image_size: side that images are resized to, in pixels; None leaves it to the checkpoint's processor.

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
        config_fields = STUDENT_FIELDS[task] | double_maps(source.config) | config_fields
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
    size = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False} if image_size else {}
    processor = AutoImageProcessor.from_pretrained(source.model_folder, **size)
    return student, auto_class, processor


def as_options(config_fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a config as `convert_checkpoint` takes them: the kind of positions by `positions`."""
    kind = config_fields.get("position_embedding_type")
    rest = {name: value for name, value in config_fields.items() if name != "position_embedding_type"}
    return rest | ({"positions": kind} if kind in ("periodic", "none") else {})


def double_maps(config: PretrainedConfig) -> dict[str, int]:
    """Return the field for learned maps of twice the head width.

    Raises:
        ValueError: a checkpoint of this type can't be converted.
    """
    find_family(config.model_type)
    return {"key_feature_size": 2 * config.hidden_size // config.num_attention_heads}


def load_teacher(model_or_path: str | CheckpointSource, auto_class: str, student: PreTrainedModel) -> PreTrainedModel:
    """Load the softmax model that `student` came from, in evaluation mode and frozen.

    Longformer and LSG teachers attend to everything here, not in the pattern that they were trained with.

    Raises:
        ValueError: it is a factorized model; it has another architecture, other widths or another number of layers than
            the student; or it lacks the student's head.
    """
    source = read_source(model_or_path)
    if isinstance(source.config, FactorizedFields):
        raise ValueError(
            f"The teacher {source.name!r} is a factorized model; give the softmax checkpoint that the student was "
            "converted from (--teacher_name_or_path)."
        )
    fields = translate_fields(source.config.to_dict(), source.config.model_type)
    config = find_family(source.config.model_type).config_class.from_dict(fields)
    for name in SHAPE_FIELDS:
        found, wanted = getattr(config, name, None), getattr(student.config, name, None)
        if found != wanted:
            raise ValueError(
                f"The teacher {source.name!r} has {name} {found}, the student {wanted}; the teacher must be the "
                "checkpoint that the student was converted from, or one of the same shape."
            )
    # It keeps its own positions: the student's table may be longer, or absent.
    layers = list(range(config.num_hidden_layers))
    conversion = convert_checkpoint(source, auto_class=auto_class, softmax_layers=layers)
    if fresh := fresh_head(conversion):
        raise ValueError(
            f"The teacher {source.name!r} has no {fresh[0]}, which the student's head needs: convert it again with "
            'auto_class="AutoModel", and distil the encoder.'
        )
    return conversion.model.float().eval().requires_grad_(False)


def fresh_head(conversion: Conversion) -> list[str]:
    """Return the names of the weights of a converted model's head that its checkpoint did not have."""
    model = conversion.model
    if model.base_model is model:
        return []
    new = [change.result for change in conversion.report if change.action == "new" and change.result]
    return [name for name in new if not name.startswith(f"{model.base_model_prefix}.")]
