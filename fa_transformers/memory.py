"""An estimate of the memory that a model takes at a length, from its configuration, before anything is allocated.

The terms are the tensors that PyTorch holds at the moment of the peak, counted per token, so a term that is off can be
found and corrected; `scripts/studies/measure_memory.py` sets them against the measured peak of a fresh process.
"""

import ctypes
import platform
from dataclasses import dataclass

import torch

from .models import ENCODERS
from .models.configuration_fa import FactorizedConfig
from .models.fa_layers import INFERENCE_PIECE

MAPPED_BYTES = 2**22
"""Allocations of at least this size are mapped apart, and so returned to the system when freed, once
`return_freed_memory` was called."""
M_MMAP_THRESHOLD = -3
"""Number of the threshold among the settings of glibc's `mallopt`, from malloc.h."""
MIXED_PRECISIONS = {None: None, "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WINDOW_KEPT = 10.0
"""Hidden widths per token that the window branch keeps for the backward pass: query tiles, keys and values with the
surroundings of a tile (3 each; of images 3 at a reach of 3, and up to 9 beyond 8), the result twice, and its difference
from the factorized output."""
WINDOW_HELD = 10.0
"""Hidden widths per token that the window branch holds at a time when nothing is kept."""


def format_bytes(size: float) -> str:
    """Return a size with its unit: "1.25 GiB", or below 0.1 GiB "3.4 MiB"."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory in bytes by purpose, without the program itself, which takes some 0.5 GiB on a CPU.

    On a CUDA device it is what tensors take, `torch.cuda.max_memory_allocated`. Gradients fill up while activations are
    freed, so the peak has the larger one of the two.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + max(self.gradients, self.activations)

    @property
    def growth(self) -> int:
        """The bytes that come to those of the weights: what a process that holds the model will take beyond."""
        return self.total - self.weights

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimizer": self.optimizer, "activations": self.activations}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return f"{format_bytes(self.total)} ({listed})"


@dataclass(frozen=True)
class _Sizes:
    """Bytes of an element: in the results of linear maps, in the residual stream, in the factors that dropout keeps."""

    mapped: int
    residual: int
    dropout: int
    is_mixed: bool


def estimate_memory(
    config: FactorizedConfig,
    num_tokens: int,
    *,
    batch_size: int = 1,
    training: bool = False,
    num_trained: int | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    mixed_precision: str | None = None,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """Estimate the peak memory of a forward pass without gradients or, with `training`, of an AdamW step but the first.

    On a CPU it is the memory of a process after `return_freed_memory`; without, holes in the heap add to it. It holds
    where activations dominate, for a base model or a head that gives one answer per sequence; masked language
    modelling adds its logits. With C the hidden width, I the intermediate size and L the number of layers, a training
    step keeps per token, in elements:

        per layer   C      input of the maps to Q, K, V (with mixed precision three copies, one for each map)
                    3 C    Q, K, V; with `key_feature_size` F also the mapped Q and K, 2 H F
                    C      mixed tokens; with `local_window` also the tensors that `WINDOW_KEPT` lists
                    2 C    inputs of the two norms
                    C      input of the first feed-forward map
                    2 I    before and after its activation (GELU or SiLU)
                    2 C    the factors of the two dropouts, where there is dropout (one byte each on CUDA)
                    2 C    inputs of the two layer scales, where an image model has them
        once        2 C    embeddings before their norm and the factors of their dropout; for images the pixels, twice
                    C      last hidden state
                    I      gradient of the last layer's activation, at the start of the backward pass

    and with gradient checkpointing L C for the inputs of the layers and the rest for a single layer. Without gradients
    one layer is there at a time: its input, the embeddings, and the larger one of Q, K, V with the mixed tokens, and of
    the feed-forward part: mixed tokens, results, and for one piece (see `apply_in_pieces`) C and 2 I.

    Args:
        config: of an FA model; its `softmax_layers` run fused attention, which keeps as much.
        num_tokens: length of a sequence in tokens; for images the number of patches.
        batch_size: sequences, padded to that length.
        num_trained: parameters with gradients and an optimiser state, where adapters or upper layers alone train; None:
            all of the base model. Activations are counted as if all did, which is an upper end.
        dtype: of the weights.
        mixed_precision: None, "no", "bf16" or "fp16", as in Accelerate: linear maps compute in that type.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: a number is below 1 or `mixed_precision` is unknown.
    """
    for name, value in (("num_tokens", num_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if mixed_precision not in MIXED_PRECISIONS:
        raise ValueError(f"`mixed_precision` must be one of {list(MIXED_PRECISIONS)}, got {mixed_precision!r}.")
    computed = MIXED_PRECISIONS[mixed_precision] or dtype
    has_dropout = training and config.hidden_dropout_prob > 0
    sizes = _Sizes(
        mapped=computed.itemsize,
        residual=dtype.itemsize,
        dropout=0 if not has_dropout else 1 if device_type == "cuda" else computed.itemsize,
        is_mixed=computed != dtype,
    )
    num_weights, num_mapped_weights = count_weights(config)
    per_token = _input_bytes(config, sizes)
    if training:
        layer = sum(_kept_by_layer(config, sizes).values())
        inputs = config.num_hidden_layers * config.hidden_size * sizes.residual
        layers = inputs + layer if gradient_checkpointing else config.num_hidden_layers * layer
        per_token += layers + _held_around_layers(config, sizes)
    else:
        per_token += _held_by_forward(config, sizes, num_tokens)
    # Autocast keeps its copies of the weights until the pass ends.
    copies = num_mapped_weights * computed.itemsize if sizes.is_mixed else 0
    trained = (num_weights if num_trained is None else num_trained) * dtype.itemsize if training else 0
    return MemoryEstimate(
        weights=num_weights * dtype.itemsize,
        gradients=trained,
        optimizer=2 * trained,
        activations=int(batch_size * num_tokens * per_token) + copies,
    )


def return_freed_memory() -> None:
    """Let tensors of 4 MiB and more go back to the system as soon as they are freed, where the C library is glibc.

    By itself glibc soon keeps freed tensors of up to 32 MiB, in whose places later ones of other sizes do not fit:
    with MiniLM at 4,096 tokens a training step then takes 1.22 GiB instead of 0.95.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def count_weights(config: FactorizedConfig) -> tuple[int, int]:
    """Count the parameters of the base model of `config`, and among them the weights of its encoder's linear maps."""
    with torch.device("meta"):
        model = ENCODERS[type(config)]["AutoModel"](config)
    mapped = sum(weight.numel() for weight in model.encoder.parameters() if weight.dim() == 2)
    return model.num_parameters(), mapped


def _kept_by_layer(config: FactorizedConfig, sizes: _Sizes) -> dict[str, float]:
    """Count the bytes per token that autograd keeps of one layer."""
    width, heads = config.hidden_size, config.num_attention_heads
    has_scales = getattr(config, "layerscale_value", None) is not None
    return {
        "input of query, key and value": (3 if sizes.is_mixed else 1) * width * sizes.mapped,
        "query, key and value": 3 * width * sizes.mapped,
        "mapped query and key": 2 * heads * _num_added_features(config) * sizes.mapped,
        "mixed tokens": width * sizes.mapped,
        "window": WINDOW_KEPT * width * sizes.mapped if config.local_window else 0,
        "inputs of the norms": 2 * width * sizes.residual,
        "input of the feed-forward part": width * sizes.mapped,
        "before and after the activation": 2 * config.intermediate_size * sizes.mapped,
        "dropout": 2 * width * sizes.dropout,
        "layer scales": 2 * width * sizes.mapped if has_scales else 0,
    }


def _num_added_features(config: FactorizedConfig) -> int:
    """Count the features per head that learned maps and temperatures make of Q and K; 0 without either."""
    features = config.key_feature_size or 0
    if config.learned_temperatures:
        features += features or config.hidden_size // config.num_attention_heads
    return features


def _held_around_layers(config: FactorizedConfig, sizes: _Sizes) -> float:
    """Count the bytes per token of a training step outside the layers."""
    embeddings = config.hidden_size * (sizes.residual + sizes.dropout)
    return embeddings + config.hidden_size * sizes.residual + config.intermediate_size * sizes.mapped


def _held_by_forward(config: FactorizedConfig, sizes: _Sizes, num_tokens: int) -> float:
    """Count the bytes per token at the peak of a forward pass without gradients."""
    width, intermediate = config.hidden_size, 2 * config.intermediate_size * sizes.mapped
    mixing: float = (
        4 * width * sizes.mapped + 2 * config.num_attention_heads * _num_added_features(config) * sizes.mapped
    )
    if config.local_window:
        mixing += WINDOW_HELD * width * sizes.mapped
    attended = width * (sizes.mapped + sizes.residual)
    chunk = config.chunk_size_feed_forward or INFERENCE_PIECE
    if chunk < num_tokens:
        results = width * sizes.residual
        piece = (width * sizes.residual + intermediate) * chunk / num_tokens
        feed_forward = width * sizes.mapped + results + max(piece, results)
    else:
        feed_forward = attended + intermediate
    return 2 * width * sizes.residual + max(mixing, feed_forward)


def _input_bytes(config: FactorizedConfig, sizes: _Sizes) -> float:
    """Count the bytes per token of an image's pixels and of their copy padded to whole patches; 0 for token ids."""
    if not hasattr(config, "patch_shape"):
        return 0
    height, width = config.patch_shape
    return 2 * config.num_channels * height * width * sizes.residual
