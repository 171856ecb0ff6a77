"""`attn_implementation="factorized"`: runs the factorized operator inside stock transformers encoders.

Importing this module registers an attention function and its mask function under the name "factorized", so that
`AutoModel.from_pretrained(..., attn_implementation="factorized")`, a config's `attn_implementation` and
`model.set_attn_implementation("factorized")` accept it. A model that asks for more than the operator can express
(causal order, windows, position biases, masks that differ from query to query) gets an error. `supports(model)` says
beforehand whether a model is reached at all, `why_unsupported(model)` why it isn't.

The choice isn't part of a saved model: `save_pretrained` doesn't write it and a reload gives "sdpa". It's a way to try
and to fine-tune; publish a FABert or FAViT, whose config carries it.

Shape letters: B batch, H heads, N query positions, M key positions, D head width.
"""

import copy
import inspect
import logging
import math
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .models.fa_attention import factorized_attention

NAME = "factorized"
# A second name for `why_unsupported`: the function under it notes who calls, and doesn't warn as a first forward does.
PROBE_NAME = "factorized_probe"

# Model types that build their mask through transformers' mask registry but compute the attention themselves, in the
# oldest or in the newest version that we support: they would add our [B, M] mask to their scores, which is silently
# wrong wherever the shapes happen to broadcast. Those that add a position bias (t5, wav2vec2-bert) are refused in all.
# fmt: off
MASK_TRAP_MODEL_TYPES = frozenset({
    "autoformer", "big_bird", "blip_text_model", "bros", "canine", "clvp_encoder", "coarse_acoustics", "convbert",
    "dab-detr", "fine_acoustics", "flava_multimodal_model", "flava_text_model", "groupvit_text_model", "ibert",
    "imagegpt", "layoutlmv3", "led", "lilt", "longformer", "luke", "maskformer", "megatron-bert", "mpnet", "mt5",
    "mvp", "nystromformer", "omdet-turbo", "perceiver", "rembert", "roformer", "seamless_m4t", "seamless_m4t_v2",
    "semantic", "speecht5", "squeezebert", "superglue", "t5", "table-transformer", "tapas", "tvp", "vilt",
    "visual_bert", "vits", "wav2vec2-bert",
})
# fmt: on

# Keyword arguments by which a model asks for something other than one bidirectional softmax over all real keys.
_INEXPRESSIBLE_ARGUMENTS = {
    "sliding_window": "it limits every query to a window of its own (local attention)",
    "position_bias": "it adds a position bias to the query-key scores",
    "softcap": "it caps the query-key scores",
    "s_aux": "it adds attention sinks to the query-key scores",
    "sinks": "it adds attention sinks to the query-key scores",
    "head_mask": "it multiplies the attention probabilities",
    "score_mod": "it changes the query-key scores",
    "block_mask": "it gives queries different keys",
    "indices": "it selects different keys for every query",
    "block_indices": "it selects different keys for every query",
    "cu_seq_lens_q": "several documents are packed in one row, and queries must not see each other's document",
    "cu_seq_lens_k": "several documents are packed in one row, and queries must not see each other's document",
}
_MASK_TRAP = "its layers never call the factorized operator: they compute attention, or a position bias, themselves"
_REMEDY = 'choose attn_implementation="sdpa" or "eager" for this model'

# exp(-1000) is zero in every float dtype, so such a score removes its key as a mask does. Models that build their own
# masks use -1e4 or the dtype's minimum.
_MASKED_SCORE = -1e3

_logger = logging.getLogger(__name__)
_warned: set[str] = set()
_probe_callers: ContextVar[list[nn.Module] | None] = ContextVar("factorized_probe_callers", default=None)


class FactorizedAttentionError(ValueError):
    """A stock model asked `attn_implementation="factorized"` for something that the operator can't express."""


def factorized_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute softmax_D(Q) · (softmax_M(K)ᵀ · V) for each head: the attention function registered as "factorized".

    `scaling` and `dropout` are accepted because every model passes them, and are ignored on purpose: both softmaxes of
    the operator run without a temperature, and there are no attention probabilities to drop.

    N may differ from M: keys of reduced length (SegFormer) and non-causal cross-attention are computed as defined. A
    decoder's self-attention is causal and raises.

    Args:
        module: the attention layer that calls; `is_causal` is read from it where `kwargs` don't say.
        query: [B, H, N, D].
        key: [B, H / g, M, D] with g >= 1 (grouped heads are repeated).
        value: [B, H / g, M, D].
        attention_mask: None, bool [B, M] or [B, 1, 1, M] (True = real), or float [B, 1, 1, M], 0 at real positions and
            -1000 or less at padding. Other float values raise when run eagerly; under `torch.compile` and
            `torch.export` they can't be looked at, and those above -1000 count as real.
        scaling: ignored.
        dropout: ignored.
        kwargs: what the model adds. The ones that change the scores raise where they are set; the rest is ignored.

    Returns:
        (output [B, N, H, D], None). There are no attention weights; a sample without a real key gives zeros.

    Raises:
        FactorizedAttentionError: (a ValueError) causal attention, a sliding window, a position bias or another change
            of the scores, a mask that isn't one row of keys for each sample, or `output_attentions=True`.
    """
    who = type(module).__name__
    output = _attend(module, who, query, key, value, attention_mask, kwargs)
    _warn_once(getattr(getattr(module, "config", None), "model_type", None) or who)
    return output, None


def factorized_mask(
    *,
    attention_mask: Tensor | None = None,
    mask_function: Callable | None = None,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Keep the user's padding mask as bool [B, M]: the mask function registered as "factorized".

    It looks at no value of the mask, so compilation and export stay in one graph, and makes no N×M tensor.

    Args:
        attention_mask: bool [B, M], True = real, or None.
        mask_function: which query may see which key; transformers passes it and only its bidirectional one is accepted.
        config: of the model that asks.
        kwargs: sizes, offsets, dtype and device, which differ between transformers' versions and aren't needed.

    Raises:
        FactorizedAttentionError: (a ValueError) causal, sliding-window and per-query masks, and model types that
            compute their attention themselves and would misuse this mask.
    """
    model_type = getattr(config, "model_type", None) or "this model"
    if model_type in MASK_TRAP_MODEL_TYPES:
        raise _refusal(model_type, _MASK_TRAP)
    if mask_function is not None and mask_function is not bidirectional_mask_function:
        if mask_function is causal_mask_function:
            asked = "a causal mask"
        elif kwargs.get("local_size") is not None:
            asked = f"a sliding window of {kwargs['local_size']} (local attention)"
        else:
            asked = "a mask that differs from query to query (blocks, packed documents or a custom one)"
        raise _refusal(
            model_type, f"it asks for {asked}, and every query of the factorized operator sees all real keys"
        )
    return attention_mask


def _refusal(who: str, why: str, remedy: str = _REMEDY) -> FactorizedAttentionError:
    return FactorizedAttentionError(f'attn_implementation="{NAME}" can\'t run {who}: {why}; {remedy}.')


def _attend(
    module: nn.Module,
    who: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict,
) -> Tensor:
    _refuse_inexpressible(module, who, kwargs)
    mask = _key_mask(attention_mask, key, who)
    heads, key_heads = query.shape[1], key.shape[1]
    if key_heads != heads:
        if heads % key_heads != 0:
            raise _refusal(who, f"{heads} query heads can't share {key_heads} key heads evenly")
        key = key.repeat_interleave(heads // key_heads, dim=1)
        value = value.repeat_interleave(heads // key_heads, dim=1)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave query and key in float32 while value is already in autocast's dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
    return factorized_attention(query, key, value, mask).transpose(1, 2).contiguous()


def _refuse_inexpressible(module: nn.Module, who: str, kwargs: dict) -> None:
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if is_causal:
        raise _refusal(
            who, "it is causal, and every query of the factorized operator sees all real keys, later ones included"
        )
    if kwargs.get("output_attentions"):
        raise _refusal(
            who,
            "`output_attentions=True` asks for an N×N matrix, which the operator never makes",
            'leave it out or choose attn_implementation="eager"',
        )
    for argument, why in _INEXPRESSIBLE_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise _refusal(who, f"`{argument}` is set: {why}")


def _key_mask(attention_mask: Tensor | None, key: Tensor, who: str) -> Tensor | None:
    """Return `attention_mask` as bool [B, M]; an error where it isn't one row of keys for each sample."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise _refusal(who, f"the mask is a {type(attention_mask).__name__} and not a tensor")
    batch, keys = key.shape[0], key.shape[2]
    shape = tuple(attention_mask.shape)
    mask = attention_mask
    if mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
        mask = mask[:, 0, 0, :]
    elif mask.dim() != 2:
        raise _refusal(
            who,
            f"a mask of shape {shape} may differ over queries or heads, and every query of the factorized operator "
            "sees the same keys",
            f"pass a padding mask [batch, key positions] = {(batch, keys)} or {_REMEDY}",
        )
    if mask.shape[1] != keys or mask.shape[0] not in (1, batch):
        raise _refusal(
            who,
            f"the mask has shape {shape} where there are {batch} samples with {keys} key positions",
            f"pass a padding mask [batch, key positions] = {(batch, keys)}",
        )
    if mask.dtype != torch.bool:
        if not mask.is_floating_point() or attention_mask.dim() == 2:
            raise _refusal(
                who,
                f"a mask of shape {shape} must be bool (True = real), got {mask.dtype}",
                "pass `mask.bool()`, or a float mask [batch, 1, 1, key positions] with 0 at real positions and "
                "torch.finfo(dtype).min at padding",
            )
        real = mask == 0
        if not torch.compiler.is_compiling() and not bool((real | (mask <= _MASKED_SCORE)).all()):
            raise _refusal(
                who,
                f"the float mask holds values other than 0 (real) and {_MASKED_SCORE:g} or less (padding): a bias on "
                "the scores, which the factorized operator doesn't have",
            )
        mask = mask > _MASKED_SCORE
    return mask.expand(batch, keys)


@torch.compiler.assume_constant_result
def _warn_once(stock_class: str) -> bool:
    """Warn at the first call for each name; `assume_constant_result` makes it run while a graph is traced."""
    if stock_class in _warned:
        return False
    _warned.add(stock_class)
    _logger.warning(
        '"%s" runs with attn_implementation="%s". Weights trained with softmax attention don\'t fit it until they are '
        "converted (fine-tuned with it). The choice isn't saved with the model: a reload silently gives sdpa. FABert "
        "and FAViT keep it and are what to publish.",
        stock_class,
        NAME,
    )
    return True


def supports(model: PreTrainedModel) -> bool:
    """Return True if `attn_implementation="factorized"` reaches every attention layer of `model` and can run there.

    Takes and raises what `why_unsupported` does, which also tells the reason.
    """
    return why_unsupported(model) is None


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Return the reason why `attn_implementation="factorized"` can't run in every attention layer of `model`, or None.

    Runs a tiny dummy input through a copy that shares the weights and notes which attention layers call the attention
    function. The model, its attention implementation, its mode and the random state stay as they are.

    Attention layers are the modules whose class is named so. Pooling heads with one learned query (SigLIP's) keep their
    own attention: it is linear in the number of positions already.

    Args:
        model: a transformers model or one of its sub-models (`clip.vision_model`, `whisper.encoder`), on any device.

    Returns:
        A sentence, or None if every layer is reached and the operator can express what it computes.

    Raises:
        TypeError: `model` isn't a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}; pass the model itself, "
            "not a compiled or wrapped one."
        )
    who = type(model).__name__
    if str(model.config.model_type).startswith("fa_"):
        return f"{who} is factorized by itself and needs no attention implementation for it."
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type in MASK_TRAP_MODEL_TYPES:
            return str(_refusal(module.config.model_type, _MASK_TRAP))
    inputs = _dummy_inputs(model)
    if inputs is None:
        return (
            f"No dummy input is known for {who} (its main input is `{model.main_input_name}`), so the calls per layer "
            "couldn't be counted; try its encoder, or its text or vision tower, alone."
        )
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), torch.no_grad():
        return _reason_against(model, who, inputs)


def _reason_against(model: PreTrainedModel, who: str, inputs: dict[str, Tensor]) -> str | None:
    probe, called, entered, failure = _run_probe(model, PROBE_NAME, inputs)
    eager_failure = None
    if failure is not None and not isinstance(failure, FactorizedAttentionError):
        *_, eager_failure = _run_probe(model, "eager", inputs)
        if eager_failure is None:
            return f"{who} runs with eager attention but fails with factorized attention: {failure}"
        # A head may need more than the main input (choices, masked positions); its encoder doesn't.
        probe, called, entered, failure = _run_probe(model, PROBE_NAME, inputs, base_model_only=True)
    if isinstance(failure, FactorizedAttentionError):
        return str(failure)
    if failure is not None:
        return (
            f"No dummy input is known for {who} (its eager forward failed with: {eager_failure}), so the calls per "
            "layer couldn't be counted; try its encoder, or its text or vision tower, alone."
        )
    if not called:
        return (
            f"{who} never calls transformers' attention function: it has no softmax attention or computes it itself, "
            "and the choice would be ignored."
        )
    layers = _attention_layers(probe)
    unreached = [name for name in layers if not _is_reached(name, called, layers)]
    if unreached:
        state = "computes its attention itself" if unreached[0] in entered else "isn't reached by the dummy input"
        return (
            f"{len(unreached)} of the attention layers of {who} don't call transformers' attention function; the first "
            f"one, {unreached[0]}, {state}."
        )
    return None


def _run_probe(
    model: PreTrainedModel, implementation: str, inputs: dict[str, Tensor], base_model_only: bool = False
) -> tuple[PreTrainedModel, set[str], set[str], Exception | None]:
    """Run a weight-sharing copy; return it, the callers' names, the attention layers entered, and the failure."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    probe = copy.deepcopy(model, shared).eval()
    for module in probe.modules():
        # Every module's and not only every model's: a decoder may hold a changed copy of the config (ViTMAE).
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and not str(config.model_type).startswith("fa_"):
            config._attn_implementation = implementation
    names = {id(module): name for name, module in probe.named_modules()}
    entered: set[str] = set()
    for name, layer in _attention_layers(probe).items():
        layer.register_forward_pre_hook(lambda *_, name=name: entered.add(name))
    callers: list[nn.Module] = []
    failure = None
    token = _probe_callers.set(callers)
    try:
        (probe.base_model if base_model_only else probe)(**inputs)
    except Exception as error:  # whatever a stock model raises here is handed back and becomes part of the reason
        failure = error
    finally:
        _probe_callers.reset(token)
    return probe, {names.get(id(caller), "") for caller in callers}, entered, failure


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if re.search(r"Attention\d*$", type(module).__name__) and not type(module).__module__.startswith("torch.")
    }


def _is_reached(name: str, called: set[str], layers: dict[str, nn.Module]) -> bool:
    """Return True if this layer, one of its parts, or an attention layer around it called the registered function."""
    return any(
        caller == name or caller.startswith(f"{name}.") or (caller in layers and name.startswith(f"{caller}."))
        for caller in called
    )


def _probe_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Note the caller, then do what "factorized" does: the attention function while `why_unsupported` runs."""
    callers = _probe_callers.get()
    if callers is None:
        raise ValueError(f'"{PROBE_NAME}" serves fa_transformers.supports; choose attn_implementation="{NAME}".')
    callers.append(module)
    return _attend(module, type(module).__name__, query, key, value, attention_mask, kwargs), None


def _dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return a small input that `model.forward` accepts, by its main input's name; None where none is known."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    # Some towers inherit a main input's name that their forward doesn't take (Idefics3's is "input_ids").
    name = next((name for name in (model.main_input_name, *_DUMMY_SHAPES) if name in parameters), None)
    if name == "input_ids":
        return _dummy_text(model)
    shape = _DUMMY_SHAPES[name](config) if name in _DUMMY_SHAPES else None
    if name is None or shape is None:
        return None
    inputs = {}
    if "spatial_shapes" in parameters:
        rows, columns = 2, 3
        shape = (1, rows * columns, config.num_channels * config.patch_size**2)
        inputs["spatial_shapes"] = torch.tensor([[rows, columns]], device=model.device)
        mask_name = "pixel_attention_mask" if "pixel_attention_mask" in parameters else "attention_mask"
        inputs[mask_name] = torch.ones(shape[:2], dtype=torch.long, device=model.device)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs[name] = values.to(device=model.device, dtype=model.dtype)
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.ones(1, 3, dtype=torch.long, device=model.device)
    return inputs


def _dummy_text(model: PreTrainedModel) -> dict[str, Tensor]:
    # Batch and length differ, and the second text is padded: a mask that is misused can't broadcast by luck.
    batch, length = 2, 7
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", length)
    input_ids = (torch.arange(5, 5 + batch * length, device=model.device) % vocab_size).view(batch, length)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = input_ids[:, :3]
    return inputs


def _pair(size: int | tuple[int, int] | list[int] | dict[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else size
    return height, width


def _first_set(config: PretrainedConfig, *names: str, default: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _image_shape(config: PretrainedConfig) -> tuple[int, ...]:
    image = (_first_set(config, "num_channels", default=3), *_pair(_first_set(config, "image_size", default=64)))
    frames = getattr(config, "num_frames", None)
    return (1, *image) if frames is None else (1, frames, *image)


def _video_shape(config: PretrainedConfig) -> tuple[int, ...]:
    frames = _first_set(config, "frames_per_clip", "num_frames", default=16)
    channels = _first_set(config, "in_chans", "num_channels", default=3)
    return (1, frames, channels, *_pair(_first_set(config, "crop_size", "image_size", default=64)))


def _audio_shape(config: PretrainedConfig) -> tuple[int, ...]:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return 1, config.max_length, config.num_mel_bins
    strides = getattr(config, "conv_stride", None)
    # 20 frames cover the receptive field of the convolutions; without their sizes, one second at 16 kHz.
    return 1, math.prod(strides) * 20 if strides else 16_000


def _spectrogram_shape(config: PretrainedConfig) -> tuple[int, ...] | None:
    if hasattr(config, "input_feat_per_channel"):
        return 1, 64, config.input_feat_per_channel * config.input_channels
    if hasattr(config, "feature_projection_input_dim"):
        return 1, 32, config.feature_projection_input_dim
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return 1, config.num_mel_bins, 2 * config.max_source_positions
    return None


def _series_shape(config: PretrainedConfig) -> tuple[int, ...]:
    return 1, config.context_length, config.num_input_channels


_DUMMY_SHAPES: dict[str, Callable[[PretrainedConfig], tuple[int, ...] | None]] = {
    "pixel_values": _image_shape,
    "pixel_values_videos": _video_shape,
    "input_values": _audio_shape,
    "input_features": _spectrogram_shape,
    "past_values": _series_shape,
}

AttentionInterface.register(NAME, factorized_attention_forward)
AttentionMaskInterface.register(NAME, factorized_mask)
AttentionInterface.register(PROBE_NAME, _probe_attention_forward)
AttentionMaskInterface.register(PROBE_NAME, factorized_mask)
