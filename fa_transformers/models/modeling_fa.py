"""The base of all FA models, which adds loading and checks to `PreTrainedModel`, and the poolings and losses of heads.

Shape letters: B batch, N tokens, C hidden width, L labels.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, logging

from .fa_layout import Layout
from .fa_local import LocalConvolution
from .fa_mixer import FactorizedMixer, FeatureMap
from .fa_packed import PackedDocuments
from .fa_sequence_parallel import Shard, open_context, run_in_context, sequence_parallel

logger = logging.get_logger(__name__)

NOT_RECOVERED = (
    "This model was converted from softmax to factorized attention and not trained since (`recovery` in its config is "
    "'pending'): expect it to be worse than the checkpoint it comes from until it is distilled or fine-tuned."
)


if TYPE_CHECKING:
    _PreTrained = PreTrainedModel
else:
    _PreTrained = object


class FAWeights(_PreTrained):  # type: ignore[misc, valid-type]
    """Loading, saving and fresh weights of models with factorized layers: a mixin before a `PreTrainedModel` class.

    `attn_implementation` concerns layers that keep softmax attention alone: None, "sdpa" or "eager". "factorized" is
    what the others do anyway and changes nothing; the configuration refuses any other name and keeps its own.
    """

    # Regular expressions from names in stock checkpoints to ours, for checkpoints that use other names.
    CHECKPOINT_NAME_PATTERNS: ClassVar[dict[str, str]] = {}

    def __init__(self, config, *inputs, **kwargs):
        # Compared by name: remote code may hold two copies of one configuration class.
        if getattr(config, "model_type", None) != self.config_class.model_type:
            raise TypeError(
                f"`config` must be a {self.config_class.__name__}, got {type(config).__name__}; "
                f"{self.config_class.__name__}.from_pretrained reads stock checkpoints."
            )
        config.check_fields()
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        if cls.CHECKPOINT_NAME_PATTERNS and kwargs.get("key_mapping") is None:
            kwargs["key_mapping"] = dict(cls.CHECKPOINT_NAME_PATTERNS)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
        if pretrained_model_name_or_path is not None and config.recovery == "pending" and config.factorized_layers:
            logger.warning_once(NOT_RECOVERED)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        # Always our names on disk: by default names that were mapped while loading would be mapped back.
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def tie_weights(self, missing_keys=None, **kwargs):
        if missing_keys is not None:
            # transformers 5.3 counts the tied weights of custom code as loaded and then leaves them without data.
            missing_keys |= {name for name, parameter in self.named_parameters() if parameter.is_meta}
        return super().tie_weights(missing_keys=missing_keys, **kwargs)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        self.config._attn_implementation = attn_implementation

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (FactorizedMixer, FeatureMap, LocalConvolution)):
            # Only torch.nn.init functions are called there: while loading, transformers makes them skip loaded tensors.
            module.reset_parameters()


class FAPreTrainedModel(FAWeights, PreTrainedModel):
    """Base of the FA encoders."""

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _supports_context_parallel = False
    # Outputs that have a part for each token, with the dimension that counts the tokens.
    TOKEN_OUTPUTS: ClassVar[dict[str, int]] = {"last_hidden_state": 1, "hidden_states": 1}
    sequence_parallel = staticmethod(sequence_parallel)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # not `__call__`, which PEFT goes around
            cls.forward = run_in_context(cls.forward)

    def wants_hidden_states(self, output_attentions, output_hidden_states):
        """Return the caller's `output_hidden_states`, or else the configuration's; ValueError for attention maps."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "`output_attentions` is not available: factorized attention never forms the N×N attention matrix. "
                "Use `output_hidden_states`, or `fa_transformers.attention_rows(model, inputs, positions)`, which "
                "computes exact rows of the matrix."
            )
        return self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

    def as_requested(self, output, return_dict):
        """Return a model output, or its values as a tuple, as the caller or else the configuration wants."""
        context = open_context()
        if context is not None and context.model is self:
            output = context.hand_out(output, self.TOKEN_OUTPUTS)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def first_real_token(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the hidden state of each sample's first real token: [B, N, C], mask bool [B, N] -> [B, C]."""
    if mask is None:
        return hidden_states[:, 0]
    first = mask.int().argmax(dim=1)
    return hidden_states.gather(1, first[:, None, None].expand(-1, 1, hidden_states.shape[2])).squeeze(1)


def mean_over_real(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over real tokens: [B, N, C], mask bool [B, N] -> [B, C]; zeros for a sample without any.

    Sums are float32, or float64 for float64 inputs.
    """
    if mask is None:
        return hidden_states.mean(dim=1, dtype=torch.promote_types(hidden_states.dtype, torch.float32)).to(
            hidden_states.dtype
        )
    return (_sum_over_real(hidden_states, mask) / _count(mask)).to(hidden_states.dtype)


def pool_first(hidden_states: Tensor, layout: Layout) -> Tensor:
    """Return the first real token's hidden state of each document, CLS of each image: [B, N, C] -> [B, C].

    Of a packed batch that is [documents, C], zeros for one without real tokens; of tokens that processes share, it is
    the same on all of them.
    """
    shard, mask = layout.shard, layout.whole_mask if layout.grid is None else None
    if layout.documents is not None:
        return layout.documents.first_tokens(hidden_states, mask)
    if shard is None:
        return first_real_token(hidden_states, mask)
    batch, device = len(hidden_states), hidden_states.device
    first = torch.zeros(batch, dtype=torch.long, device=device) if mask is None else mask.int().argmax(dim=1)
    others = first[:, None] != torch.arange(shard.start, shard.stop, device=device)
    return shard.sum(hidden_states.masked_fill(others[:, :, None], 0.0).sum(dim=1))


def pool_mean(hidden_states: Tensor, layout: Layout) -> Tensor:
    """Return the mean over the real tokens of each document, over the real patches of each image: [B, N, C] -> [B, C].

    Of a packed batch that is [documents, C], zeros for one without real tokens; of tokens that processes share, it is
    the same on all of them.
    """
    shard, mask = layout.shard, layout.whole_mask
    if layout.documents is not None:
        return layout.documents.mean(hidden_states, mask)
    if shard is None:
        first = layout.num_prefix(hidden_states.shape[1])
        return mean_over_real(hidden_states[:, first:], None if mask is None else mask[:, first:])
    counted = hidden_states.new_ones(len(hidden_states), shard.num_tokens, dtype=torch.bool)
    counted[:, : shard.num_prefix] = False
    counted = counted if mask is None else counted & mask
    total = shard.sum(_sum_over_real(hidden_states, shard.own(counted)))
    return (total / _count(counted)).to(hidden_states.dtype)


def _sum_over_real(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Sum real tokens up, in float32 or float64: [B, N, C] -> [B, C]."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.masked_fill(~mask[:, :, None], 0.0).sum(dim=1, dtype=dtype)


def _count(mask: Tensor) -> Tensor:
    """Count each sample's real tokens, at least one: [B, N] -> [B, 1]."""
    return mask.sum(dim=1, keepdim=True).clamp(min=1)


def token_loss(logits: Tensor, labels: Tensor, shard: Shard | None) -> Tensor:
    """Return the mean cross-entropy over the tokens whose label isn't -100: logits [B, N, L], labels int [B, N].

    With `shard` the logits are of this process's tokens, the labels and the mean of all processes' tokens.
    """
    if shard is None:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    own = F.cross_entropy(logits.flatten(0, 1), shard.own(labels).flatten(), reduction="sum")
    return shard.sum(own / (labels != -100).sum())


def classification_loss(config, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a classifier over logits [B, L], as `config.problem_type` says.

    Without a problem type it is inferred from the labels and remembered, as in stock models: one label is regression,
    integer labels are single-label, floating-point labels multi-label classification.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    if config.problem_type != "single_label_classification" and labels.numel() != logits.numel():
        raise ValueError(
            f"`labels` must have one number per sample and label for {config.problem_type}, as logits "
            f"{tuple(logits.shape)} have; got {tuple(labels.shape)}."
        )
    if config.problem_type == "regression":
        return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
    if config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.view(-1))


def span_loss(logits: Tensor, positions: Tensor, documents: PackedDocuments | None) -> Tensor:
    """Return the mean over documents of the cross-entropy of one position among all of the document, of logits [B, N].

    `positions`: int [B], or [documents] of a packed batch, there counted from the document's start. Documents whose
    position lies outside are left out.
    """
    positions = positions.view(-1)
    if documents is None:
        inside = (positions >= 0) & (positions < logits.shape[1])
        return F.cross_entropy(logits, positions.where(inside, -100), ignore_index=-100)
    inside = (positions >= 0) & (positions < documents.lengths)
    chosen = logits[0].index_select(0, (documents.starts + positions).where(inside, 0))
    losses = (documents.logsumexp(logits[0]) - chosen).masked_fill(~inside, 0.0)
    return losses.sum() / inside.sum()


def count_choices(num_documents: int, num_choices: int | None, labels: Tensor | None) -> int:
    """Return the choices per example of a packed multiple-choice batch: `num_choices`, or what the labels tell.

    Raises ValueError if neither says it, or examples × choices is not the number of documents.
    """
    if num_choices is None and labels is not None:
        num_choices = num_documents // len(labels)
    num_examples = num_documents // (num_choices or 1) if labels is None else len(labels)
    if not num_choices or num_examples * num_choices != num_documents:
        raise ValueError(
            f"A packed batch needs examples × choices documents, got {num_documents} documents and `num_choices` "
            f"{num_choices}. Give `num_choices`, or one label per example."
        )
    return num_choices
