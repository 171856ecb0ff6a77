"""Sequence parallelism: one document or image over several processes, each of which holds a part of its tokens.

A factorized layer needs of the other processes only the maximum M of each key feature, the sum Z = Σ exp(K - M) and the
sum Σ exp(K - M)ᵀ V, whose sizes don't depend on the number of tokens; its backward pass only the gradient of the
context. Local terms fetch the neighbours that they reach, `softmax_layers` all keys and values.

Gradients: a quantity's gradient on one rank is that rank's share, and shares add up to the gradient. So every exchange
has its adjoint as backward, outputs that are whole on all S ranks pass on 1/S of what comes back, and the shares of a
parameter's gradient are added where the parameter is used, in the backward pass itself: DDP, FSDP or an optimiser sees
complete gradients, equal on all ranks of the group.

Shape letters: B batch, N tokens of all ranks, n tokens of this one, H heads, Dk key width, Dv value width, S ranks.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .fa_context import accumulator_dtype, merge_contexts, without_autocast


@contextmanager
def sequence_parallel(mesh_or_group: Any, gather_outputs: bool = False) -> Iterator[None]:
    """Split the inputs of FA models that are called in this context over the ranks of a process group.

    Every rank of the group calls the model with the same whole batch, and the model takes its own run of tokens (whole
    rows of patches of an image; CLS and registers belong to the first rank), of any number, none included. Pooled
    outputs and losses come back whole and equal on every rank; outputs per token come back as this rank's part. The
    result is that of one process within rounding.

    Every rank then calls `backward` on the same loss (or, for a loss of its own over its part of the tokens, on its
    share), inside or outside the context. All gradients are complete then, DDP and FSDP may average them over all
    ranks, and gradients accumulate as usual. Dropout is drawn by each rank on its own.

    A model that was loaded with `trust_remote_code` has a context of its own: `with model.sequence_parallel(group)`.

    Args:
        mesh_or_group: a process group, or a device mesh with one dimension or one named "sp".
        gather_outputs: outputs per token come back whole as well, on every rank.

    Raises:
        ValueError: a mesh has several dimensions and none is "sp", another context is open, or, from the model, the
            batch is packed or isn't the same on every rank, or gradient checkpointing is reentrant.
    """
    if _contexts:
        raise ValueError("`sequence_parallel` is already at work here; contexts cannot be nested.")
    group = mesh_or_group
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim > 1 and "sp" not in (mesh_or_group.mesh_dim_names or ()):
            raise ValueError(
                "`mesh_or_group` has several dimensions, none of which is named 'sp'; give init_device_mesh "
                f"mesh_dim_names such as ('dp', 'sp'), got {mesh_or_group.mesh_dim_names}."
            )
        group = mesh_or_group.get_group("sp" if mesh_or_group.ndim > 1 else 0)
    _contexts.append(SequenceContext(group, gather_outputs))
    try:
        yield
    finally:
        _contexts.clear()


class SequenceContext:
    """An open `sequence_parallel` and the model that runs in it."""

    def __init__(self, group: Any, gather_outputs: bool):
        self.group, self.gather_outputs = group, gather_outputs
        self.model: nn.Module | None = None
        self.shard: Shard | None = None

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Let the parameters that modules use while `model` runs add up their gradients over ranks.

        Hooks put stand-ins under the parameters' names when a module is first called: under FSDP the parameters are
        there only then.
        """
        replaced: list[tuple[nn.Module, str]] = []

        def replace(module: nn.Module, inputs: tuple) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and name not in vars(module):
                    vars(module)[name] = _AddGradients.apply(parameter, self.group)
                    replaced.append((module, name))

        modules = model.modules() if torch.is_grad_enabled() else ()
        hooks = [module.register_forward_pre_hook(replace) for module in modules]
        self.model = model
        try:
            yield
        finally:
            self.model = self.shard = None
            for hook in hooks:
                hook.remove()
            for module, name in replaced:
                del vars(module)[name]

    def hand_out(self, output: Any, token_outputs: dict[str, int]) -> Any:
        """Return a model's output as its caller gets it: whole and equal on every rank, or this rank's part.

        `token_outputs` names the tensors that have one part per rank, with the dimension that is split.
        """
        assert self.shard is not None
        for name, value in output.items():
            dim = token_outputs.get(name)
            if dim is not None and not self.gather_outputs:
                continue
            parts = value if isinstance(value, tuple) else (value,)
            whole = tuple(
                _ShareGradient.apply(part if dim is None else self.shard.gather(part, dim), self.shard.size)
                for part in parts
            )
            output[name] = whole if isinstance(value, tuple) else whole[0]
        return output


_contexts: list[SequenceContext] = []  # of the process: one at most


def open_context() -> SequenceContext | None:
    """Return the context of `sequence_parallel`, if one is open."""
    return _contexts[0] if _contexts else None


def run_in_context(forward: Callable) -> Callable:
    """Wrap a model's `forward`: the outermost one tells an open context that it runs."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        context = open_context()
        if context is None or context.model is not None:
            return forward(self, *args, **kwargs)
        with context.running(self):
            return forward(self, *args, **kwargs)

    return run


def split_tokens(
    tokens: Tensor, num_tokens: int, mask: Tensor | None, num_prefix: int = 0, columns: int = 1, packed: bool = False
) -> "Shard | None":
    """Split the tokens of the running model, and check that all ranks have the same `tokens`.

    Returns None where no `sequence_parallel` is open.
    """
    context = open_context()
    if context is None:
        return None
    if packed:
        raise ValueError(
            "`cu_seqlens` and `sequence_parallel` exclude each other: split packed batches over data-parallel ranks."
        )
    context.shard = Shard(context.group, num_tokens, mask, num_prefix, columns)
    context.shard.check_same(tokens)
    return context.shard


class Shard:
    """This rank's part of the tokens of a batch, positions `start` to `stop`, and the exchanges with other ranks.

    Args:
        mask: bool [B, N], True = real, or None: of all ranks' tokens.
        num_prefix: tokens at the start that are no patches, which belong to the first rank.
        columns: tokens that must stay together: patches of a row.
    """

    def __init__(self, group: Any, num_tokens: int, mask: Tensor | None = None, num_prefix: int = 0, columns: int = 1):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.num_tokens, self.mask, self.num_prefix, self.columns = num_tokens, mask, num_prefix, columns
        self.wants_gradients = torch.is_grad_enabled()
        rows = (num_tokens - num_prefix) // columns
        edges = [num_prefix + rows * rank // self.size * columns for rank in range(self.size + 1)]
        self.bounds = list(zip(edges[:-1], edges[1:], strict=True))  # of all ranks, the prefix left out
        first, self.stop = self.bounds[self.rank]
        self.start = 0 if self.rank == 0 else first
        self.own_prefix = num_prefix if self.rank == 0 else 0
        self.rows = slice((first - num_prefix) // columns, (self.stop - num_prefix) // columns)

    def own(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a tensor that every rank has whole: [B, N, ...] -> [B, n, ...]."""
        return self.enter(tensor)[:, self.start : self.stop]

    def enter(self, tensor: Tensor) -> Tensor:
        """Return `tensor` itself, whose gradient will be complete on every rank."""
        return _AddGradients.apply(tensor, self.group) if tensor.requires_grad else tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks."""
        return _Sum.apply(tensor, self.group)

    def from_first_rank(self, tensor: Tensor) -> Tensor:
        """Return the first rank's `tensor` on every rank, where chance made it differ."""
        return self.sum(
            tensor if self.rank == 0 else tensor.masked_fill(torch.ones_like(tensor, dtype=torch.bool), 0.0)
        )

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Join the parts of all ranks, one after the other along `dim`."""
        sizes = torch.zeros(self.size, dtype=torch.long, device=tensor.device)
        sizes[self.rank] = tensor.shape[dim]
        dist.all_reduce(sizes, group=self.group)
        return _Gather.apply(tensor, dim, sizes.tolist(), self.group)

    def check_same(self, tokens: Tensor) -> None:
        """Raise ValueError, on every rank alike, unless all have the same batch, as far as sizes and sums tell.

        Of the sums, one is weighted by the row and one by the column, so that another order is another batch.
        """
        table = tokens.detach().flatten(0, -2)
        rows, columns = (table.sum(dim, dtype=torch.float64).nan_to_num() for dim in (1, 0))
        sums = [rows.sum()] + [
            part @ torch.arange(1, len(part) + 1, dtype=part.dtype, device=part.device) for part in (rows, columns)
        ]
        sizes = torch.tensor([len(tokens), tokens.numel()], dtype=torch.float64, device=tokens.device)
        numbers = torch.cat((sizes, torch.stack(sums).nan_to_num()))
        extremes = torch.cat((numbers, -numbers))
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        # Sums of token ids are exact; those of floats are the same where devices and their libraries are.
        tolerance = 1e-9 if tokens.is_floating_point() else 0.0
        if not torch.allclose(extremes[: len(numbers)], -extremes[len(numbers) :], rtol=tolerance, atol=tolerance):
            raise ValueError(
                "All ranks of a `sequence_parallel` group must get the same whole batch, but they got different ones: "
                "shard the data over data-parallel ranks only."
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, normalization: str) -> Tensor:
        """Compute `factorized_attention` over the tokens of all ranks, for this rank's queries: [B, H, n, Dv].

        Args:
            query, key: [B, H, n, Dk].
            value: [B, H, n, Dv].
            mask: bool [B, n], True = real: of this rank's tokens.
        """
        self.check_gradients()
        return _Attention.apply(query, key, value, mask, normalization == "softmax", self.group)

    def check_gradients(self) -> None:
        """Raise ValueError in the part of a reentrant checkpoint that runs without gradients."""
        if self.wants_gradients and not torch.is_grad_enabled():
            raise ValueError(
                "`sequence_parallel` works with gradient checkpointing that isn't reentrant: call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )

    def with_halo(self, tensor: Tensor, dim: int, halo: int) -> tuple[Tensor, int, int]:
        """Extend this rank's text tokens or patches along `dim` by up to `halo` neighbours on each side.

        Beyond the ends of the document there are none, and an empty part gets none. Returns the tensor and how many
        neighbours stand before and after.
        """
        sends, receives = self.halo_plan(halo)
        tensor = _Halo.apply(tensor, dim, sends, receives, self)
        before = sum(length for rank, length in receives if rank < self.rank)
        return tensor, before, sum(length for _, length in receives) - before

    def halo_plan(self, halo: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
        """Return the sends, (rank, first and last position of this rank's part), and the receives, (rank, length)."""
        first, last = self.bounds[self.rank]
        sends, receives = [], []
        for rank, (start, stop) in enumerate(self.bounds):
            if rank == self.rank or start == stop or first == last:
                continue
            low, high = max(first, start - halo), min(last, stop + halo)
            if low < high:
                sends.append((rank, low - first, high - first))
            low, high = max(start, first - halo), min(stop, last + halo)
            if low < high:
                receives.append((rank, high - low))
        return sends, receives

    def exchange(self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]) -> None:
        """Send the outgoing tensors to their ranks, and receive from ranks into the incoming ones."""
        operations = []
        for function, transfers in ((dist.isend, outgoing), (dist.irecv, incoming)):
            for rank, tensor in transfers:
                operations.append(dist.P2POp(function, tensor, dist.get_global_rank(self.group, rank), self.group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


class _Attention(torch.autograd.Function):
    """See `Shard.attend`. With P and R the two softmaxes and G the gradient of the output:

    dC = Pᵀ G, summed over ranks        dQ = P ∘ (G Cᵀ - rowsum(P ∘ G Cᵀ))
    dV = R dC                           dK = R ∘ (V dCᵀ - s),  s_j = C_j · dC_j

    For "scaling", P = Q, R = K / (number of real positions) and the subtracted terms are absent.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_softmax: bool, group) -> Tensor:
        ctx.is_softmax, ctx.group = is_softmax, group
        dtype = accumulator_dtype(query)
        with without_autocast(query.device.type):
            v = _zero_padding(value.to(dtype), mask)
            maximum = None
            if is_softmax:
                # One position more, as the maximum of nothing is an error.
                hidden = F.pad(_hide_padding(key.to(dtype), mask), (0, 0, 0, 1), value=-torch.inf)
                maximum = hidden.amax(dim=2)
                weights = _key_weights(key, mask, maximum.clamp(min=torch.finfo(dtype).min))
                total = weights.sum(dim=2)
            else:
                weights = _zero_padding(key.to(dtype), mask)
                count = key.new_full((len(key),), key.shape[2]) if mask is None else mask.sum(dim=1)
                total = count.to(dtype)[:, None, None].expand(key.shape[0], key.shape[1], key.shape[3])
            maximum, total, sums = merge_contexts(maximum, total, weights.transpose(2, 3) @ v, group)
            total = total.clamp(min=torch.finfo(dtype).tiny)
            context = sums / total[..., None]
            ctx.save_for_backward(query, key, value, mask, maximum, total, context)
            return (_query_weights(query, is_softmax) @ context).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, mask, maximum, total, context = ctx.saved_tensors
        with without_autocast(query.device.type):
            gradient = gradient.to(context.dtype)
            weights = _query_weights(query, ctx.is_softmax)
            context_gradient = weights.transpose(2, 3) @ gradient
            dist.all_reduce(context_gradient, group=ctx.group)
            query_gradient = gradient @ context.transpose(2, 3)
            if ctx.is_softmax:
                query_gradient = query_gradient * weights
                query_gradient -= weights * query_gradient.sum(dim=-1, keepdim=True)
            scaled = context_gradient / total[..., None]
            key_gradient = _zero_padding(value.to(context.dtype), mask) @ scaled.transpose(2, 3)
            if ctx.is_softmax:
                weights = _key_weights(key, mask, maximum)
                key_gradient -= (context * scaled).sum(dim=-1)[:, :, None]
                key_gradient *= weights
            else:
                weights = _zero_padding(key.to(context.dtype), mask)
                key_gradient = _zero_padding(key_gradient, mask)
            value_gradient = weights @ scaled
        gradients = (query_gradient.to(query.dtype), key_gradient.to(key.dtype), value_gradient.to(value.dtype))
        return *gradients, None, None, None


def _zero_padding(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else tensor.masked_fill(~mask[:, None, :, None], 0.0)


def _hide_padding(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else tensor.masked_fill(~mask[:, None, :, None], -torch.inf)


def _key_weights(key: Tensor, mask: Tensor | None, maximum: Tensor) -> Tensor:
    """Return exp(K - M), zero at padding."""
    return (_hide_padding(key.to(maximum.dtype), mask) - maximum[:, :, None]).exp()


def _query_weights(query: Tensor, is_softmax: bool) -> Tensor:
    query = query.to(accumulator_dtype(query))
    return query.softmax(dim=-1) if is_softmax else query


class _AddGradients(torch.autograd.Function):
    """Identity whose backward adds up the ranks' shares of the gradient, in float32 or float64."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _sum_over_ranks(gradient, ctx.group), None


class _ShareGradient(torch.autograd.Function):
    """Identity of a tensor that all ranks have alike, whose backward passes on one rank's share of the gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor, size: int) -> Tensor:
        ctx.size = size
        return tensor.clone()  # a view as output would keep FSDP's hooks from what is written to it

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return gradient / ctx.size, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        return _sum_over_ranks(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _sum_over_ranks(gradient, ctx.group), None


def _sum_over_ranks(tensor: Tensor, group) -> Tensor:
    total = tensor.to(accumulator_dtype(tensor), memory_format=torch.contiguous_format, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(tensor.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, dim: int, sizes: list[int], group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        ctx.start, ctx.length = sum(sizes[: dist.get_rank(group)]), tensor.shape[dim]
        tensor = tensor.movedim(dim, 0)
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, max(sizes) - len(tensor))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        total = _sum_over_ranks(gradient, ctx.group)
        return total.narrow(ctx.dim, ctx.start, ctx.length), None, None, None


class _Halo(torch.autograd.Function):
    """See `Shard.with_halo`; backward hands the gradients of fetched tokens back to their ranks, which add them up."""

    @staticmethod
    def forward(ctx, tensor: Tensor, dim: int, sends, receives, shard: Shard) -> Tensor:
        ctx.dim, ctx.sends, ctx.receives, ctx.shard = dim, sends, receives, shard
        tensor = tensor.movedim(dim, 0)
        incoming = [(rank, tensor.new_empty(length, *tensor.shape[1:])) for rank, length in receives]
        shard.exchange([(rank, tensor[low:high].contiguous()) for rank, low, high in sends], incoming)
        before = [part for rank, part in incoming if rank < shard.rank]
        after = [part for rank, part in incoming if rank > shard.rank]
        return torch.cat((*before, tensor, *after)).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        shard: Shard = ctx.shard
        gradient = gradient.movedim(ctx.dim, 0)
        before = [length for rank, length in ctx.receives if rank < shard.rank]
        after = [length for rank, length in ctx.receives if rank > shard.rank]
        num_own = len(gradient) - sum(before) - sum(after)
        parts = gradient.split([*before, num_own, *after])
        own = parts[len(before)].clone()
        fetched = [*parts[: len(before)], *parts[len(before) + 1 :]]
        outgoing = [(rank, part.contiguous()) for (rank, _), part in zip(ctx.receives, fetched, strict=True)]
        incoming = [(rank, own.new_empty(high - low, *own.shape[1:])) for rank, low, high in ctx.sends]
        shard.exchange(outgoing, incoming)
        for (_, low, high), (_, part) in zip(ctx.sends, incoming, strict=True):
            own[low:high] += part
        return own.movedim(0, ctx.dim), None, None, None, None
