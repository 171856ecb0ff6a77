"""Token mixers of the FA models: they stand between the Q, K, V projections and the output projection of a layer.

    output = (1 - g) · factorized(φq(Q), φk(K), V) + g · window(Q, K, V) + convolution(V)

φq, φk     learned maps to `key_feature_size` features and learned temperatures per head, each absent by default
window     softmax attention over the ±`local_window` neighbours, absent at 0; g is a learned gate per head
convolution depthwise, `local_kernel_size` wide, zero-initialised, absent at 0

"Neighbour" means along the text, or on the patch grid for images; prefix tokens (CLS, registers) take part in the
factorized term only. Every term costs O(N). Layers named in `softmax_layers` use `SoftmaxMixer` instead.

Shape letters: B batch, H heads, N tokens, D head width, F key feature size, C = H · D.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fa_attention import unchecked_attention
from .fa_layout import PLAIN, Layout
from .fa_local import LocalConvolution, window_attention
from .fa_packed import PackedDocuments

Side = Literal["query", "key"]
"""The two sides of attention, in the order of the rows of `log_sharpness`."""

FEATURE_NOISE = 0.01
"""Standard deviation of the noise on fresh feature maps: copies of a feature start this far apart, not equal."""

INITIAL_GATE = 0.8
"""Share of the window in a fresh mix. Of pretrained MiniLM with a window of 64, untrained otherwise, the mean-pooled
embeddings keep a cosine of 0.92 with the softmax model's at 0.8, 0.88 at 0.5 and 0.91 at 1 (24 licence texts)."""


class FeatureMap(nn.Module):
    """Map queries and keys of each head from D to a larger number F of features: [B, H, N, D] -> [B, H, N, F].

    Feature j starts as a copy of feature j mod D plus noise of standard deviation `FEATURE_NOISE` per weight, with the
    copies weighted so that, without the noise, factorized attention of the mapped tensors equals that of the plain
    ones for any F: a query bias of -log(copies) under the softmax, a factor 1/sqrt(copies) in "scaling". The parameters
    hold the departure from these copies, so weight decay pulls towards the plain operator. Keys need no bias: the
    softmax over positions removes it.

    With `sign_pairs` the second D features start as the negative ones, the third as positive ones again, and so on: the
    start of Hedgehog's maps (Zhang et al. 2024, arXiv:2402.04347), whose features are exp(±Wx). It is not the plain
    operator then.
    """

    def __init__(self, num_heads: int, head_size: int, num_features: int, normalization: str, sign_pairs: bool = False):
        super().__init__()
        self.head_size, self.num_features, self.normalization = head_size, num_features, normalization
        self.sign_pairs = sign_pairs
        self.query_weight = nn.Parameter(torch.empty(num_heads, head_size, num_features))
        self.query_bias = nn.Parameter(torch.empty(num_heads, num_features))
        self.key_weight = nn.Parameter(torch.empty(num_heads, head_size, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query_weight, std=FEATURE_NOISE)
        nn.init.zeros_(self.query_bias)
        nn.init.normal_(self.key_weight, std=FEATURE_NOISE)

    def _copies(self) -> tuple[Tensor, Tensor]:
        """Return the copying matrix [D, F] and the number of copies that share each feature [F]."""
        feature = torch.arange(self.num_features, device=self.query_weight.device)
        source, turn = feature % self.head_size, feature // self.head_size
        kind = source + self.head_size * (turn % 2) if self.sign_pairs else source  # equal where features are copies
        copying = F.one_hot(source, self.head_size).T.to(self.query_weight.dtype)
        if self.sign_pairs:
            copying = copying * (1 - 2 * (turn % 2))
        counts = (kind[:, None] == kind).sum(dim=1).to(copying.dtype)
        return copying, counts

    def forward(self, projected: Tensor, side: Side) -> Tensor:
        """Map the queries or the keys, as `side` says.

        Models call the module and not its two methods: hooks, as those of sequence parallelism, see calls only.
        """
        return self.map_query(projected) if side == "query" else self.map_key(projected)

    def map_query(self, query: Tensor) -> Tensor:
        """Map queries: [B, H, N, D] -> [B, H, N, F]."""
        copying, counts = self._copies()
        if self.normalization == "scaling":
            return query @ (copying / counts.sqrt() + self.query_weight) + self.query_bias[:, None]
        return query @ (copying + self.query_weight) + (self.query_bias - counts.log())[:, None]

    def map_key(self, key: Tensor) -> Tensor:
        """Map keys: [B, H, N, D] -> [B, H, N, F]."""
        copying, counts = self._copies()
        if self.normalization == "scaling":
            copying = copying / counts.sqrt()
        return key @ (copying + self.key_weight)


class FactorizedMixer(nn.Module):
    """Mix tokens by factorized attention and its optional local terms: Q, K, V [B, H, N, D] -> [B, H, N, D].

    `spatial_rank` is 1 for text and 2 for images. The gate starts at g = `INITIAL_GATE`.
    """

    def __init__(self, config, spatial_rank: int):
        super().__init__()
        num_heads = config.num_attention_heads
        head_size = config.hidden_size // num_heads
        self.normalization, self.window = config.attention_normalization, config.local_window
        self.feature_map = (
            FeatureMap(
                num_heads, head_size, config.key_feature_size, self.normalization, config.key_features == "sign_pairs"
            )
            if config.key_feature_size
            else None
        )
        self.log_sharpness = nn.Parameter(torch.empty(2, num_heads)) if config.learned_temperatures else None
        self.local_convolution = (
            LocalConvolution(config.hidden_size, config.local_kernel_size, spatial_rank)
            if config.local_kernel_size
            else None
        )
        self.window_gate = nn.Parameter(torch.empty(num_heads)) if self.window else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.log_sharpness is not None:
            nn.init.zeros_(self.log_sharpness)
        if self.window_gate is not None:
            nn.init.constant_(self.window_gate, math.log(INITIAL_GATE / (1.0 - INITIAL_GATE)))

    @property
    def reach(self) -> int | None:
        """The number of positions that the local terms look away along one axis, 0 for a kernel of 1; None without any.

        Where tokens come in pieces, a term that looks away 0 positions takes part as any other does.
        """
        kernel_size = 0 if self.local_convolution is None else self.local_convolution.weight.shape[-1]
        has_any = self.window_gate is not None or self.local_convolution is not None
        return max(self.window, kernel_size // 2) if has_any else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout = PLAIN,
    ) -> Tensor:
        """Mix within each sample or packed document; of tokens that processes share, each mixes its own with all."""
        query_features, key_features = self.query_features(query), self.key_features(key)
        # Autocast may have split the dtypes.
        query_features, key_features = query_features.to(value.dtype), key_features.to(value.dtype)
        if layout.shard is not None:
            mixed = layout.shard.attend(query_features, key_features, value, layout.mask, self.normalization)
            return self.add_local_terms_across_shards(mixed, query, key, value, layout)
        mixed = unchecked_attention(
            query_features, key_features, value, layout.mask, layout.documents, normalization=self.normalization
        )
        return self.add_local_terms(mixed, query, key, value, layout)

    def query_features(self, query: Tensor) -> Tensor:
        """Return the logits of the softmax over features: [B, H, N, D] -> [B, H, N, F]."""
        return self._features(query, "query")

    def key_features(self, key: Tensor) -> Tensor:
        """Return the logits of the softmax over positions: [B, H, N, D] -> [B, H, N, F]."""
        return self._features(key, "key")

    def _features(self, projected: Tensor, side: Side) -> Tensor:
        """Map queries or keys to features, and divide these by their head's temperature, kept as -log."""
        features = projected if self.feature_map is None else self.feature_map(projected, side)
        if self.log_sharpness is None:
            return features
        sharpness = self.log_sharpness[get_args(Side).index(side)].exp()
        return features * sharpness.to(features.dtype)[:, None, None]

    def add_local_terms(self, mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        """Mix the window into the factorized term and add the convolution."""
        if self.reach is None:
            return mixed
        if layout.mask is not None:
            value = value.masked_fill(~layout.mask[:, None, :, None], 0.0)
        num_prefix = layout.num_prefix(query.shape[2])
        local = mixed[:, :, num_prefix:]
        if self.window_gate is not None:
            near = self.attend_to_window(query, key, value, layout)
            local = local.lerp(near.to(mixed.dtype), self.window_share().to(mixed.dtype)[:, None, None])
        if self.local_convolution is not None:
            grid_value = value[:, :, num_prefix:].unflatten(2, layout.grid or (query.shape[2],))
            near = convolve(self.local_convolution, grid_value, layout.documents).flatten(2, -2)
            local = local + near.to(mixed.dtype)
        return torch.cat((mixed[:, :, :num_prefix], local), dim=2) if num_prefix else local

    def window_share(self) -> Tensor:
        """Return g, the share of the window in each head's mix: [H]."""
        return self.window_gate.sigmoid()

    def attend_to_window(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        """Attend from each token of a text, each patch of an image, to those in its window.

        Q and K [B, H, N, D], V [B, H, N, E] -> [B, H, N, E], for images [B, H, patches, E]. V is zero at padding.
        """
        grid, num_prefix = layout.grid or (query.shape[2],), layout.num_prefix(query.shape[2])
        mask, documents, window = layout.mask, layout.documents, self.window
        segments = None if mask is None else mask[:, num_prefix:].unflatten(1, grid)
        if documents is not None:
            numbers, window = documents.document_ids[None] + 1, documents.clip(window)
            segments = numbers if mask is None else numbers * mask
        query, key, value = (tensor[:, :, num_prefix:].unflatten(2, grid) for tensor in (query, key, value))
        return window_attention(query, key, value, segments, window).flatten(2, -2)

    def add_local_terms_across_shards(
        self, mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Layout
    ) -> Tensor:
        """Add the local terms of tokens split over ranks; the neighbours beyond this rank's ends are fetched first."""
        shard = layout.shard
        if self.reach is None:
            return mixed
        assert shard is not None
        columns, num_prefix = shard.columns, shard.own_prefix
        near = torch.cat((key, value), dim=-1)[:, :, num_prefix:]
        near, before, after = shard.with_halo(near, 2, self.reach * columns)
        # A rank without tokens computes a row of nothing, so that its gradients take part in the sums of all ranks.
        after, missing = (after, 0) if near.shape[2] else (columns, columns)
        near_key, near_value = F.pad(near, (0, 0, 0, missing)).chunk(2, dim=-1)
        mixed_patches, query = (F.pad(t[:, :, num_prefix:], (0, 0, before, after)) for t in (mixed, query))
        mask = shard.mask
        if mask is not None:
            start = shard.start + num_prefix - before
            mask = F.pad(mask[:, start : shard.stop + after - missing], (0, missing))
        grid = None if layout.grid is None else (near_key.shape[2] // columns, columns)
        local = self.add_local_terms(mixed_patches, query, near_key, near_value, Layout(mask, grid))
        local = local[:, :, before : local.shape[2] - after]
        return torch.cat((mixed[:, :, :num_prefix], local), dim=2) if num_prefix else local


def convolve(convolution: LocalConvolution, value: Tensor, documents: PackedDocuments | None) -> Tensor:
    """Convolve [B, H, *grid, D], reading zeros beyond the ends of a text, a grid or a packed document."""
    if documents is None:
        return convolution(value)
    rows = documents.spaced(convolution.weight.shape[-1] // 2)
    return rows.take(convolution(rows.place(value)))


class SoftmaxMixer(nn.Module):
    """Ordinary softmax attention, for the layers named in `softmax_layers`: Q, K, V [B, H, N, D] -> [B, H, N, D].

    Runs torch's scaled dot-product attention, or written out (N×N memory) with attn_implementation="eager".
    """

    reach = None  # it has no local terms

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = config.attention_probs_dropout_prob

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout = PLAIN,
    ) -> Tensor:
        """See `FactorizedMixer`. Packed documents take turns, which reads their lengths and so cannot be compiled."""
        mask = layout.whole_mask
        if layout.shard is not None:
            layout.shard.check_gradients()
            key, value = layout.shard.gather(torch.cat((key, value), dim=-1), dim=2).chunk(2, dim=-1)
        if layout.documents is not None:
            lengths = layout.documents.lengths.tolist()
            masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
            parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), masks, strict=True)
            return torch.cat([self(*part, Layout(own)) for *part, own in parts], dim=2)
        dropout = self.dropout if self.training else 0.0
        if mask is not None:
            mask = mask | ~mask.any(dim=1, keepdim=True)  # a sample of padding alone attends to itself instead of NaN
            # 0 · NaN is NaN: what padding holds must not meet the weights of zero that it gets. Token-major, as
            # `masked_fill` doesn't keep strides, by which dropout draws.
            padding = ~mask[:, :, None, None]
            key, value = (part.transpose(1, 2).masked_fill(padding, 0.0).transpose(1, 2) for part in (key, value))
            mask = mask[:, None, None, :]
        if self.config._attn_implementation != "eager":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        return F.dropout(probabilities, dropout) @ value


def build_mixer(config, layer_index: int, spatial_rank: int) -> nn.Module:
    """Build the mixer of one layer, as `config.softmax_layers` says."""
    return SoftmaxMixer(config) if layer_index in config.softmax_layers else FactorizedMixer(config, spatial_rank)
