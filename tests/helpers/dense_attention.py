"""The N×N matrices of a model's layers, entry by entry from the definitions, in float64: what explanations must equal.

Each matrix is held against the layer itself first: times V, with the signed convolution added, it must be what the
layer's mixer gives.
"""

import copy
from collections.abc import Sequence

import torch
from tiny_models import EXACT, as_float64
from torch import Tensor


def dense_matrices(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return each layer's matrix [B, H, N, N]; the rows and columns of padding are zero."""
    model = copy.deepcopy(model).double()
    calls = {}  # by mixer: one of softmax attention calls itself for each packed document, and ends last
    (encoder,) = (module for module in model.modules() if type(module).__name__ == "FAEncoder")
    mixers = [layer.attention_and_norm[0].mixer for layer in encoder.layer]
    for mixer in mixers:
        mixer.register_forward_hook(lambda mixer, arguments, output: calls.update({mixer: (*arguments, output)}))
    with torch.no_grad():
        model(**as_float64(inputs))
        return [layer_matrix(mixer, *calls[mixer]) for mixer in mixers]


def layer_matrix(mixer, query: Tensor, key: Tensor, value: Tensor, layout, output: Tensor) -> Tensor:
    batch, heads, num_tokens, _ = query.shape
    exact = query.new_zeros(batch, heads, num_tokens, num_tokens)
    matrix, mixed = exact.clone(), torch.zeros_like(value)
    bounds = [0, num_tokens] if layout.documents is None else layout.documents.cu_seqlens.tolist()
    for sample in range(batch):
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            real = [i for i in range(start, stop) if layout.mask is None or layout.mask[sample, i]]
            if not real:
                continue
            index = torch.tensor(real)
            block = sample, slice(None), index[:, None], index
            queries, keys, values = (tensor[sample][:, index] for tensor in (query, key, value))
            offsets = token_offsets(index, layout, num_tokens)
            exact[block] = document_matrix(mixer, queries, keys, offsets)
            mixed[sample][:, index] = exact[block] @ values + convolution(mixer, values, offsets)
            matrix[block] = with_convolution(mixer, exact[block], offsets)
            torch.testing.assert_close(mixed[sample][:, index], output[sample][:, index], **EXACT)
    return matrix


def token_offsets(index: Tensor, layout, num_tokens: int) -> Tensor:
    """How far each token is from each other one along every axis: int [n, n, axes]; far away for prefix tokens."""
    if layout.grid is None:
        return (index[None, :] - index[:, None])[:, :, None]
    patches = index - layout.num_prefix(num_tokens)
    places = torch.stack([patches // layout.grid[1], patches % layout.grid[1]], dim=1)
    offsets = places[None, :] - places[:, None]
    is_prefix = patches < 0
    return offsets.masked_fill((is_prefix[:, None] | is_prefix[None, :])[:, :, None], 10**6)


def document_matrix(mixer, query: Tensor, key: Tensor, offsets: Tensor) -> Tensor:
    """The matrix of one document of n real tokens, without convolution: [H, n, D] each -> [H, n, n]."""
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    if not hasattr(mixer, "key_features"):
        return scores.softmax(dim=2)
    query_features, key_features = mixer.query_features(query[None])[0], mixer.key_features(key[None])[0]
    if mixer.normalization == "softmax":
        matrix = query_features.softmax(dim=2) @ key_features.softmax(dim=1).transpose(1, 2)
    else:
        matrix = query_features @ key_features.transpose(1, 2) / key.shape[1]
    if mixer.window_gate is not None:
        near = (offsets.abs() <= mixer.window).all(dim=2)
        has_window = near.any(dim=1)
        window = scores.masked_fill(~near, -torch.inf)[:, has_window].softmax(dim=2)
        gate = torch.sigmoid(mixer.window_gate)[:, None, None]
        matrix[:, has_window] = (1 - gate) * matrix[:, has_window] + gate * window
    return matrix


def kernel_at(mixer, offsets: Tensor) -> Tensor:
    """The convolution's weight of each channel between each pair of tokens: [C, n, n]."""
    kernel = mixer.local_convolution.weight[:, 0]
    reach = kernel.shape[-1] // 2
    inside = (offsets.abs() <= reach).all(dim=2)
    places = (offsets.clamp(-reach, reach) + reach).unbind(dim=2)
    return kernel[(slice(None), *places)] * inside


def convolution(mixer, value: Tensor, offsets: Tensor) -> Tensor | float:
    if getattr(mixer, "local_convolution", None) is None:
        return 0.0
    weights = kernel_at(mixer, offsets).unflatten(0, (value.shape[0], -1))  # [H, D, n, n]
    return torch.einsum("hdij,hjd->hid", weights, value)


def with_convolution(mixer, matrix: Tensor, offsets: Tensor) -> Tensor:
    """The rule: the mean absolute weight of a head's channels is added at each offset, and the row divided."""
    if getattr(mixer, "local_convolution", None) is None:
        return matrix
    added = kernel_at(mixer, offsets).abs().unflatten(0, (matrix.shape[0], -1)).mean(dim=1)
    return (matrix + added) / (1 + added.sum(dim=2, keepdim=True))


def dense_rollout(matrices: Sequence[Tensor], start: Tensor, residual: float = 0.5) -> Tensor:
    """The product of all layers' matrices, last to first, as N×N matrices; times the first weights [B, N] -> [B, N]."""
    identity = torch.eye(start.shape[1], dtype=torch.float64)
    product = identity.expand(len(start), -1, -1)
    for matrix in matrices:
        product = (residual * identity + (1 - residual) * matrix.mean(dim=1)) @ product
    return (start.double()[:, None] @ product)[:, 0]
