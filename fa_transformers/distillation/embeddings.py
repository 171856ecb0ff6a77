"""Embeddings of texts and images, long texts read in windows, and how alike two models' embeddings are.

Shape letters: B batch, N tokens, C hidden width.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..conversion.folder import encoder_states
from ..evaluation import evaluating
from ..models.fa_mixer import FactorizedMixer, SoftmaxMixer
from ..models.modeling_fa import first_real_token, mean_over_real

Batch = Mapping[str, Tensor]


def encode_windows(encoder: nn.Module, inputs: Batch, window: int, **options: bool) -> ModelOutput:
    """Return the hidden states of texts [B, N, C], read in windows of `window` tokens that don't see each other.

    `hidden_states` has the states of all layers with `output_hidden_states=True`, else the last one alone.
    """
    batch, length = inputs["input_ids"].shape
    windows = {name: _cut(tensor, window) for name, tensor in inputs.items()}
    if "attention_mask" not in windows:
        windows["attention_mask"] = _cut(torch.ones_like(inputs["input_ids"]), window)
    encoded = encoder(**windows, **options)
    states = tuple(
        tensor.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]
        for tensor in encoded.hidden_states or (encoded.last_hidden_state,)
    )
    return ModelOutput(last_hidden_state=states[-1], hidden_states=states)


def encode_images(model: nn.Module, inputs: Batch, **options: bool) -> tuple[ModelOutput, Tensor | None]:
    """Return a detector's output and which places of its encoder are real, bool [B, N]; None where all are.

    The mask of pixels becomes one of places inside the network, so it is taken from the encoder's first layer.
    """
    masks: list[Tensor | None] = []
    first = next(module for module in model.modules() if isinstance(module, (FactorizedMixer, SoftmaxMixer)))
    handle = first.register_forward_pre_hook(lambda module, arguments: masks.append(arguments[3].mask))
    try:
        output = model(**inputs, **options)
    finally:
        handle.remove()
    return output, masks[0]


def _cut(tensor: Tensor, window: int) -> Tensor:
    """Cut rows into windows, the last one filled up with zeros: [B, N] -> [B · ceil(N / window), window]."""
    return F.pad(tensor, (0, -tensor.shape[1] % window)).unflatten(1, (-1, window)).flatten(0, 1)


def pool(hidden_states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return one vector per sample, the "mean" over real tokens or the first one ("cls"): [B, N, C] -> [B, C]."""
    mask = None if mask is None else mask.bool()
    return mean_over_real(hidden_states, mask) if pooling == "mean" else first_real_token(hidden_states, mask)


def embed_batches(
    model: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    pooling: str,
    window: int | None = None,
) -> Tensor:
    """Return the embeddings of all samples of `loader`, in its order, on every process the same: float32 [samples, C].

    With `window`, texts longer than so many tokens are read in windows, and pooled over all of them.
    """
    rows: list[Tensor] = []
    with evaluating(model):
        for batch in loader:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            encoder = getattr(accelerator.unwrap_model(model), "base_model", model)
            mask = inputs.get("attention_mask")
            if window is not None and "input_ids" in inputs and inputs["input_ids"].shape[1] > window:
                hidden_states = encode_windows(encoder, inputs, window).last_hidden_state
            elif "pixel_mask" in inputs:
                output, mask = encode_images(encoder, inputs)
                hidden_states = encoder_states(output)
            else:
                hidden_states = encoder(**inputs).last_hidden_state
            pooled = pool(hidden_states, mask, pooling).float().cpu()
            rows += accelerator.gather_for_metrics(list(pooled), use_gather_object=True)
    return torch.stack(rows)


def similarity(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Compare a student's and its teacher's embeddings of the same samples: [samples, C] twice.

    `cosine` is the mean cosine of student and teacher, `cosine_p5` its 5th percentile. `correlation` is Pearson's, over
    all pairs of samples, of the pair's cosine in the student's embeddings with its cosine in the teacher's.
    """
    cosines = F.cosine_similarity(student, teacher)
    above = torch.triu_indices(len(student), len(student), offset=1)
    pairs = [(F.normalize(rows) @ F.normalize(rows).T)[above[0], above[1]] for rows in (student, teacher)]
    return {
        "cosine": cosines.mean().item(),
        "cosine_p5": cosines.quantile(0.05).item(),
        "correlation": torch.corrcoef(torch.stack(pairs))[0, 1].item(),
        "num_samples": len(student),
    }
