"""The teacher of a converted model: the softmax checkpoint that its weights came from, as a model of this package."""

from transformers import PreTrainedModel

from ..models.configuration_fa import FactorizedFields
from .convert import Conversion, convert_checkpoint
from .source import CheckpointSource, read_source
from .stock_checkpoints import find_family, translate_fields

SHAPE_FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "encoder_ffn_dim",
    "decoder_layers", "num_queries",
)  # fmt: skip


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
