"""Triton kernels for factorized attention: one pass over K and V, one over Q, nothing of the size of N in between.

    context = softmax_positions(K)ᵀ · V,    output = softmax_features(Q) · context

Forward: `_context_fwd_kernel` streams over a chunk of positions and keeps, for each feature, the running maximum m, the
sum z of exp(K - m) and the sum of exp(K - m) · V; `_merge_kernel` joins the chunks; `_output_fwd_kernel` applies the
context to each query. Backward saves context, m and z besides the inputs. With P and R the two softmaxes, C the
context, G the gradient of the output and ∘ the elementwise product:
    dC = Pᵀ·G,  dP = G·Cᵀ,  dQ = P ∘ (dP - rowsum(P ∘ dP))           one pass over Q and G
    dV = R·dC,  dR = V·dCᵀ, dK = R ∘ (dR - s),  s_j = C_j · dC_j     one pass over K and V
No atomics: chunks are joined in a fixed order, so equal inputs give equal bits on one device.

Precision: sums are float32. Float32 inputs multiply in full float32 ("ieee", no TF32). For half-precision inputs the
operands that are not inputs (weights, context, its gradient) are split into a high and a low part of the input's dtype
and multiplied by tensor cores part by part: 16 bits of them count in bfloat16 and 22 in float16 instead of 8 and 11.

A program works on one chunk of one segment (a sample, or a document of a packed row) for one head. Wide heads split
the value features into blocks of BLOCK_V, a program each.
Shape letters: B batch, H heads, N query positions, M key positions, Dk key width, Dv value width, D documents.
"""

import re

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MIN_WIDTH, MAX_WIDTH = 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 64  # the blocks of wider heads need more shared memory than only data-center GPUs have
# Chunks are as long as leaves this many programs for each multiprocessor, which holds 2, 3 or 4 at once (by kernel) at
# head width 64: whole waves, and few partial contexts to write and read.
PROGRAMS_PER_PROCESSOR = 6

if triton is not None:

    @triton.jit
    def _first_slot(cu_ptr, segment, num_chunks, chunk):
        """Where a segment's chunks start in the partial results; documents of unknown length leave unused slots."""
        slot = segment * num_chunks
        if cu_ptr is not None:
            slot = (tl.load(cu_ptr + segment) // chunk + segment).to(tl.int32)
        return slot

    # With TRITON_INTERPRET=1 when this file is loaded, kernels are not of that class and run on CPU tensors.
    IS_INTERPRETED = tl.constexpr(not isinstance(_first_slot, triton.JITFunction))

    @triton.jit
    def _locate(slot, cu_ptr, num_segments, num_chunks, length, chunk):
        """Return segment, sample, first row and number of rows of the chunk in a slot.

        A packed document from row a to row b owns the slots a // chunk + its index and following: at least as many as
        it has chunks, in order, found by bisection without a table.
        """
        if cu_ptr is None:
            segment = slot // num_chunks
            sample = segment
            first = (slot % num_chunks) * chunk
            end = length
        else:
            low = slot * 0
            high = low + num_segments - 1
            while low < high:
                middle = (low + high + 1) // 2
                is_before = _first_slot(cu_ptr, middle, num_chunks, chunk) <= slot
                low = tl.where(is_before, middle, low)
                high = tl.where(is_before, high, middle - 1)
            segment = low
            sample = 0
            start = tl.load(cu_ptr + segment).to(tl.int32)
            first = start + (slot - _first_slot(cu_ptr, segment, num_chunks, chunk)) * chunk
            end = tl.load(cu_ptr + segment + 1).to(tl.int32)
        return segment, sample, first, tl.maximum(tl.minimum(end - first, chunk), 0)

    @triton.jit
    def _origin(pointer, sample, head, row, stride_b, stride_h, stride_n):
        sample, head, row = tl.cast(sample, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
        return pointer + sample * stride_b + head * stride_h + row * stride_n

    @triton.jit
    def _round(x, dtype: tl.constexpr):
        """float32 to the nearest number of `dtype`."""
        if (
            IS_INTERPRETED and dtype == tl.bfloat16
        ):  # the interpreter cuts bits off; add half a unit first, ties to even
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _load_rows(pointer, rows, columns, stride_n, num_rows, WIDTH: tl.constexpr):
        """A [rows, columns] tile, zero outside the tensor."""
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        return tl.load(pointer + rows.to(tl.int64)[:, None] * stride_n + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _store_rows(pointer, tile, rows, columns, stride_n, num_rows, WIDTH: tl.constexpr):
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
        tl.store(pointer + offsets, _round(tile, pointer.dtype.element_ty), mask=inside)

    @triton.jit
    def _load_mask(pointer, rows, stride_n, num_rows):
        """Which rows are real positions."""
        real = rows < num_rows
        if pointer is not None:
            real = real & (tl.load(pointer + rows.to(tl.int64) * stride_n, mask=real, other=0) != 0)
        return real

    @triton.jit
    def _load_context(pointer, features, columns, DK: tl.constexpr, DV: tl.constexpr):
        """A [features, columns] tile of one float32 context."""
        inside = (features < DK)[:, None] & (columns < DV)[None, :]
        return tl.load(pointer + features[:, None] * DV + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _normalise(tile, dtype: tl.constexpr):
        """Return tile / size and size. Only float16 needs it: sums over positions may leave its range."""
        if dtype == tl.float16:
            size = tl.max(tl.max(tl.abs(tile), axis=1), axis=0)
            size = tl.where(size > 0, size, 1.0)
            return tile / size, size
        else:
            return tile, 1.0

    @triton.jit
    def _split(x, dtype: tl.constexpr):
        high = _round(x, dtype)
        return high, _round(x - high.to(tl.float32), dtype)

    @triton.jit
    def _multiply(x, y, acc):
        """acc + x · y for operands of one dtype, float32 ones without rounding them to TF32."""
        if IS_INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer; products are exact in float32
            x, y = x.to(tl.float32), y.to(tl.float32)
        return tl.dot(x, y, acc, input_precision="ieee")

    @triton.jit
    def _dot_left(x, y, acc):
        """acc + x · y for float32 x and y in the inputs' dtype."""
        if y.dtype == tl.float32:
            acc = _multiply(x, y, acc)
        else:
            high, low = _split(x, y.dtype)
            acc = _multiply(high, y, _multiply(low, y, acc))
        return acc

    @triton.jit
    def _dot_left_transposed(x, y, acc):
        """acc + xᵀ · y for float32 x and y in the inputs' dtype."""
        if y.dtype == tl.float32:
            acc = _multiply(tl.trans(x), y, acc)
        else:
            high, low = _split(x, y.dtype)
            acc = _multiply(tl.trans(high), y, _multiply(tl.trans(low), y, acc))
        return acc

    @triton.jit
    def _dot_right_transposed(x, y):
        """x · yᵀ for x in the inputs' dtype and float32 y."""
        acc = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        if x.dtype == tl.float32:
            acc = _multiply(x, tl.trans(y), acc)
        else:
            high, low = _split(y, x.dtype)
            acc = _multiply(x, tl.trans(high), _multiply(x, tl.trans(low), acc))
        return acc

    @triton.jit
    def _dot(x, y, dtype: tl.constexpr):
        """x · y for float32 x and y."""
        acc = tl.zeros([x.shape[0], y.shape[1]], tl.float32)
        if dtype == tl.float32:
            acc = _multiply(x, y, acc)
        else:
            x_high, x_low = _split(x, dtype)
            y_high, y_low = _split(y, dtype)
            acc = _multiply(x_high, y_high, _multiply(x_high, y_low, _multiply(x_low, y_high, acc)))
        return acc

    @triton.jit
    def _softmax_features(q, features, DK: tl.constexpr):
        q = tl.where((features < DK)[None, :], q.to(tl.float32), float("-inf"))
        weights = tl.exp(q - tl.max(q, axis=1)[:, None])
        return weights * (1.0 / tl.sum(weights, axis=1))[:, None]

    @triton.jit
    def _context_fwd_kernel(
        k_ptr, v_ptr, mask_ptr, cu_ptr, context_ptr, max_ptr, sum_ptr,
        k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride_b, mask_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        IS_WHOLE: tl.constexpr,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """m, z and Σ exp(K - m)ᵀ · V of one chunk; the finished context where IS_WHOLE says that it is the only one."""
        NUM_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
        program = tl.program_id(0)
        slot, head, block = program // NUM_V // num_heads, program // NUM_V % num_heads, program % NUM_V
        segment, sample, first, num_rows = _locate(slot, cu_ptr, num_segments, num_chunks, length, chunk)
        k_ptr = _origin(k_ptr, sample, head, first, k_stride_b, k_stride_h, k_stride_n)
        v_ptr = _origin(v_ptr, sample, head, first, v_stride_b, v_stride_h, v_stride_n)
        if mask_ptr is not None:
            mask_ptr = _origin(mask_ptr, sample, 0, first, mask_stride_b, 0, mask_stride_n)
        features = tl.arange(0, BLOCK_K)
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        # The lowest finite number instead of -inf: a chunk without a real position then stays free of NaN.
        maximum = tl.full([BLOCK_K], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK_K], tl.float32)
        context = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        for offset in range(0, num_rows, BLOCK_N):
            rows = offset + tl.arange(0, BLOCK_N)
            # Features first: the sum over positions is then a matrix product without a transposition.
            inside = (features < DK)[:, None] & (rows < num_rows)[None, :]
            k = tl.load(k_ptr + rows.to(tl.int64)[None, :] * k_stride_n + features[:, None], mask=inside, other=0.0)
            v = _load_rows(v_ptr, rows, columns, v_stride_n, num_rows, DV)
            real = _load_mask(mask_ptr, rows, mask_stride_n, num_rows)
            k = tl.where(real[None, :], k.to(tl.float32), float("-inf"))
            if mask_ptr is not None:
                v = tl.where(real[:, None], v, 0.0)
            new_maximum = tl.maximum(maximum, tl.max(k, axis=1))
            decay = tl.exp(maximum - new_maximum)
            weights = tl.exp(k - new_maximum[:, None])
            total = total * decay + tl.sum(weights, axis=1)
            context = _dot_left(weights, v, context * decay[:, None])
            maximum = new_maximum
        if IS_WHOLE:
            context = context / tl.maximum(total, 1.1754943508222875e-38)[:, None]
        index = tl.cast(slot, tl.int64) * num_heads + head
        inside = (features < DK)[:, None] & (columns < DV)[None, :]
        tl.store(context_ptr + index * DK * DV + features[:, None] * DV + columns[None, :], context, mask=inside)
        if block == 0:
            tl.store(max_ptr + index * DK + features, maximum, mask=features < DK)
            tl.store(sum_ptr + index * DK + features, total, mask=features < DK)

    @triton.jit
    def _merge_kernel(
        part_ptr, part_max_ptr, part_sum_ptr, cu_ptr, context_ptr, max_ptr, sum_ptr,
        num_heads, num_chunks, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """Join the chunks of one segment for BLOCK_E entries of its context; without maxima, plainly add them."""
        NUM_BLOCKS: tl.constexpr = (DK * DV + BLOCK_E - 1) // BLOCK_E
        program = tl.program_id(0)
        segment, head = program // NUM_BLOCKS // num_heads, program // NUM_BLOCKS % num_heads
        entries = program % NUM_BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
        features = entries // DV
        first = _first_slot(cu_ptr, segment, num_chunks, chunk)
        count = num_chunks
        if cu_ptr is not None:
            num_rows = tl.load(cu_ptr + segment + 1) - tl.load(cu_ptr + segment)
            count = ((num_rows + chunk - 1) // chunk).to(tl.int32)
        maximum = tl.full([BLOCK_E], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK_E], tl.float32)
        context = tl.zeros([BLOCK_E], tl.float32)
        for offset in range(0, count, BLOCK_S):
            slots = offset + tl.arange(0, BLOCK_S)
            inside = (slots < count)[:, None] & (entries < DK * DV)[None, :]
            index = ((first + slots).to(tl.int64) * num_heads + head)[:, None]
            part = tl.load(part_ptr + index * (DK * DV) + entries[None, :], mask=inside, other=0.0)
            if part_max_ptr is None:
                context += tl.sum(part, axis=0)
            else:
                at = index * DK + features[None, :]
                part_max = tl.load(part_max_ptr + at, mask=inside, other=-3.4028234663852886e38)
                new_maximum = tl.maximum(maximum, tl.max(part_max, axis=0))
                decay = tl.exp(maximum - new_maximum)
                weights = tl.exp(part_max - new_maximum[None, :])
                part_sum = tl.load(part_sum_ptr + at, mask=inside, other=0.0)
                total = total * decay + tl.sum(weights * part_sum, axis=0)
                context = context * decay + tl.sum(weights * part, axis=0)
                maximum = new_maximum
        inside = entries < DK * DV
        index = tl.cast(segment, tl.int64) * num_heads + head
        if part_max_ptr is not None:
            context = context / tl.maximum(total, 1.1754943508222875e-38)
            is_first = inside & (entries % DV == 0)
            tl.store(max_ptr + index * DK + features, maximum, mask=is_first)
            tl.store(sum_ptr + index * DK + features, total, mask=is_first)
        tl.store(context_ptr + index * (DK * DV) + entries, context, mask=inside)

    @triton.jit
    def _output_fwd_kernel(
        q_ptr, cu_ptr, context_ptr, out_ptr,
        q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """softmax_features(Q) · context for one chunk of queries."""
        NUM_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
        program = tl.program_id(0)
        slot, head, block = program // NUM_V // num_heads, program // NUM_V % num_heads, program % NUM_V
        segment, sample, first, num_rows = _locate(slot, cu_ptr, num_segments, num_chunks, length, chunk)
        q_ptr = _origin(q_ptr, sample, head, first, q_stride_b, q_stride_h, q_stride_n)
        out_ptr = _origin(out_ptr, sample, head, first, out_stride_b, out_stride_h, out_stride_n)
        features = tl.arange(0, BLOCK_K)
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        context_ptr += (tl.cast(segment, tl.int64) * num_heads + head) * (DK * DV)
        context, size = _normalise(_load_context(context_ptr, features, columns, DK, DV), dtype)
        for offset in range(0, num_rows, BLOCK_N):
            rows = offset + tl.arange(0, BLOCK_N)
            p = _softmax_features(_load_rows(q_ptr, rows, features, q_stride_n, num_rows, DK), features, DK)
            _store_rows(out_ptr, _dot(p, context, dtype) * size, rows, columns, out_stride_n, num_rows, DV)

    @triton.jit
    def _query_bwd_kernel(
        q_ptr, g_ptr, cu_ptr, context_ptr, dq_ptr, dcontext_ptr,
        q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
        dq_stride_b, dq_stride_h, dq_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """dC of one chunk of queries for one block of value features, and in the first block's program dQ."""
        NUM_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
        program = tl.program_id(0)
        slot, head, block = program // NUM_V // num_heads, program // NUM_V % num_heads, program % NUM_V
        segment, sample, first, num_rows = _locate(slot, cu_ptr, num_segments, num_chunks, length, chunk)
        q_ptr = _origin(q_ptr, sample, head, first, q_stride_b, q_stride_h, q_stride_n)
        g_ptr = _origin(g_ptr, sample, head, first, g_stride_b, g_stride_h, g_stride_n)
        dq_ptr = _origin(dq_ptr, sample, head, first, dq_stride_b, dq_stride_h, dq_stride_n)
        features = tl.arange(0, BLOCK_K)
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        context_ptr += (tl.cast(segment, tl.int64) * num_heads + head) * (DK * DV)
        context, size = _normalise(_load_context(context_ptr, features, columns, DK, DV), dtype)
        dcontext = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        for offset in range(0, num_rows, BLOCK_N):
            rows = offset + tl.arange(0, BLOCK_N)
            p = _softmax_features(_load_rows(q_ptr, rows, features, q_stride_n, num_rows, DK), features, DK)
            g = _load_rows(g_ptr, rows, columns, g_stride_n, num_rows, DV)
            dcontext = _dot_left_transposed(p, g, dcontext)
            if block == 0:
                dp = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for other in tl.static_range(NUM_V):
                    if NUM_V > 1:
                        others = other * BLOCK_V + tl.arange(0, BLOCK_V)
                        context, size = _normalise(_load_context(context_ptr, features, others, DK, DV), dtype)
                        g = _load_rows(g_ptr, rows, others, g_stride_n, num_rows, DV)
                    dp += size * _dot_right_transposed(g, context)
                dq = p * (dp - tl.sum(p * dp, axis=1)[:, None])
                _store_rows(dq_ptr, dq, rows, features, dq_stride_n, num_rows, DK)
        inside = (features < DK)[:, None] & (columns < DV)[None, :]
        dcontext_ptr += (tl.cast(slot, tl.int64) * num_heads + head) * (DK * DV)
        tl.store(dcontext_ptr + features[:, None] * DV + columns[None, :], dcontext, mask=inside)

    @triton.jit
    def _key_bwd_kernel(
        k_ptr, v_ptr, mask_ptr, cu_ptr, context_ptr, max_ptr, sum_ptr, dcontext_ptr, dk_ptr, dv_ptr,
        k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride_b, mask_stride_n,
        dk_stride_b, dk_stride_h, dk_stride_n, dv_stride_b, dv_stride_h, dv_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """dV of one chunk of keys for one block of value features, and in the first block's program dK."""
        NUM_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
        program = tl.program_id(0)
        slot, head, block = program // NUM_V // num_heads, program // NUM_V % num_heads, program % NUM_V
        segment, sample, first, num_rows = _locate(slot, cu_ptr, num_segments, num_chunks, length, chunk)
        k_ptr = _origin(k_ptr, sample, head, first, k_stride_b, k_stride_h, k_stride_n)
        v_ptr = _origin(v_ptr, sample, head, first, v_stride_b, v_stride_h, v_stride_n)
        dk_ptr = _origin(dk_ptr, sample, head, first, dk_stride_b, dk_stride_h, dk_stride_n)
        dv_ptr = _origin(dv_ptr, sample, head, first, dv_stride_b, dv_stride_h, dv_stride_n)
        if mask_ptr is not None:
            mask_ptr = _origin(mask_ptr, sample, 0, first, mask_stride_b, 0, mask_stride_n)
        features = tl.arange(0, BLOCK_K)
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        dtype: tl.constexpr = k_ptr.dtype.element_ty
        index = tl.cast(segment, tl.int64) * num_heads + head
        context_ptr += index * (DK * DV)
        dcontext_ptr += index * (DK * DV)
        maximum = tl.load(max_ptr + index * DK + features, mask=features < DK, other=0.0)
        total = tl.load(sum_ptr + index * DK + features, mask=features < DK, other=1.0)
        inverse = 1.0 / tl.maximum(total, 1.1754943508222875e-38)
        dcontext = _load_context(dcontext_ptr, features, columns, DK, DV)
        scaled_dcontext, scaled_size = _normalise(dcontext * inverse[:, None], dtype)
        s = tl.zeros([BLOCK_K], tl.float32)
        for other in tl.static_range(NUM_V):
            others = other * BLOCK_V + tl.arange(0, BLOCK_V)
            context = _load_context(context_ptr, features, others, DK, DV)
            s += tl.sum(context * _load_context(dcontext_ptr, features, others, DK, DV), axis=1)
        unit_dcontext, size = _normalise(dcontext, dtype)
        for offset in range(0, num_rows, BLOCK_N):
            rows = offset + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, rows, features, k_stride_n, num_rows, DK)
            v = _load_rows(v_ptr, rows, columns, v_stride_n, num_rows, DV)
            real = _load_mask(mask_ptr, rows, mask_stride_n, num_rows)[:, None]
            w = tl.where(real, tl.exp(k.to(tl.float32) - maximum[None, :]), 0.0)
            dv = tl.where(real, _dot(w, scaled_dcontext, dtype) * scaled_size, 0.0)
            _store_rows(dv_ptr, dv, rows, columns, dv_stride_n, num_rows, DV)
            if block == 0:
                dr = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for other in tl.static_range(NUM_V):
                    if NUM_V > 1:
                        others = other * BLOCK_V + tl.arange(0, BLOCK_V)
                        dcontext = _load_context(dcontext_ptr, features, others, DK, DV)
                        unit_dcontext, size = _normalise(dcontext, dtype)
                        v = _load_rows(v_ptr, rows, others, v_stride_n, num_rows, DV)
                    dr += size * _dot_right_transposed(v, unit_dcontext)
                dk = tl.where(real, w * inverse[None, :] * (dr - s[None, :]), 0.0)
                _store_rows(dk_ptr, dk, rows, features, dk_stride_n, num_rows, DK)


_NAMESPACE = re.sub(r"\W", "_", __name__)  # two copies of this file in one process register two sets of operators


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalization: str = "softmax",
) -> str | None:
    """Return None if `triton_attention` can run on these tensors, else the reason why it cannot."""
    if triton is None:
        return "triton is not installed"
    if normalization != "softmax":
        return f'the kernels compute normalization="softmax" only, not {normalization!r}'
    if query.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {query.dtype}"
    for name, tensor in (("query", query), ("value", value)):
        width = tensor.shape[-1]
        if not MIN_WIDTH <= width <= MAX_WIDTH:
            return f"heads must be {MIN_WIDTH} to {MAX_WIDTH} wide, `{name}` has width {width}"
    if cu_seqlens is not None and mask is not None:
        return "the kernels take `mask` or `cu_seqlens`, not both"
    if IS_INTERPRETED.value:
        return None if query.device.type == "cpu" else "interpreted kernels (TRITON_INTERPRET) run on CPU tensors only"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, the tensors are on {query.device}"
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or later, {properties.name} has {capability}"
    if max(query.shape[-1], value.shape[-1]) > WIDE and capability not in ((8, 0), (9, 0), (10, 0)):
        return f"heads wider than {WIDE} need the shared memory of an A100, H100 or B200, not {properties.name}"
    return None


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute softmax_features(Q) · (softmax_positions(K)ᵀ · V) with the kernels of this file.

    What padded keys and values hold, NaN included, changes neither output nor gradients. Differentiable once.

    Args:
        query: [B, H, N, Dk], any strides; a last stride other than 1 costs a copy.
        key: [B, H, M, Dk].
        value: [B, H, M, Dv].
        mask: bool [B, M], True where a key position is real. A sample without any gives zeros, with zero gradients.
        cu_seqlens: int32 or int64 [D + 1], rising from 0 to N: document d is the positions from cu_seqlens[d] up to
            cu_seqlens[d + 1] of a packed row (B = 1, N = M) and attends to itself only. Its values are not checked,
            which would make the GPU wait.

    Returns:
        [B, H, N, Dv] in the dtype of `query`, a transposed view of [B, N, H, Dv] memory.

    Raises:
        RuntimeError: the kernels cannot run on these tensors; the message is that of `supports`.

    Source: arXiv:1812.01243, section 3.2.
    """
    reason = supports(query, key, value, mask, cu_seqlens)
    if reason is not None:
        raise RuntimeError(f"The Triton kernels of factorized attention cannot run: {reason}.")
    return _forward(query, key, value, mask, cu_seqlens)[0]


def _launch_options(query: Tensor, value: Tensor, is_backward: bool) -> dict[str, int]:
    """Block sizes, warps and stages of the kernels that work on rows.

    Chosen from what ptxas reports for sm_90: blocks that fit the shared memory and, in half precision, the registers.
    Float32 products without TF32 run outside tensor cores and keep whole operands in registers, hence the small blocks.
    """
    block_k, block_v = (triton.next_power_of_2(tensor.shape[-1]) for tensor in (query, value))
    is_half = query.element_size() == 2
    area = 16384 if not is_backward else 8192 if is_half else 4096
    block_v = min(block_v, 128, max(16, area // block_k))
    widest = max(block_k, block_v)
    block_n = 8192 // widest if is_half else 16 if is_backward else 2048 // widest
    return {
        "DK": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_N": max(16, min(64, block_n)),
        "num_warps": 4 if is_half and block_k * block_v <= 4096 else 8,
        "num_stages": 3 if is_half and widest <= 64 else 2,
    }


def _plan(rows: Tensor, cu_seqlens: Tensor | None, options: dict[str, int]) -> tuple[int, int, tuple[int, ...]]:
    """Cut the positions of `rows` [B, H, N, D] into chunks.

    Returns the number of slots for partial results, the number of programs, and the integers that kernels take:
    heads, segments, chunks per sample, positions, positions per chunk.
    """
    batch, heads, length, _ = rows.shape
    num_blocks = triton.cdiv(options["DV"], options["BLOCK_V"])
    processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if rows.is_cuda else 2
    chunks = max(1, PROGRAMS_PER_PROCESSOR * processors // max(1, batch * heads * num_blocks))
    chunk = options["BLOCK_N"] * max(1, triton.cdiv(length, chunks * options["BLOCK_N"]))
    num_chunks = max(1, triton.cdiv(length, chunk))
    segments, slots = batch, batch * num_chunks
    if cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
        slots = length // chunk + segments
    return slots, slots * heads * num_blocks, (heads, segments, num_chunks, length, chunk)


def _merge(parts, maxima, sums, cu_seqlens: Tensor | None, results, plan: tuple[int, ...], options: dict[str, int]):
    """Launch `_merge_kernel`; parts, maxima, sums hold a row per slot, results a row per segment."""
    heads, segments, num_chunks, _, chunk = plan
    slots_at_once = min(16, triton.next_power_of_2(triton.cdiv(parts.shape[0], max(1, segments))))
    entries = 4096 // slots_at_once
    grid = (segments * heads * triton.cdiv(options["DK"] * options["DV"], entries),)
    _merge_kernel[grid](
        parts, maxima, sums, cu_seqlens, *results, heads, num_chunks, chunk,
        DK=options["DK"], DV=options["DV"], BLOCK_S=slots_at_once, BLOCK_E=entries,
    )  # fmt: skip


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_rows(query: Tensor, length: int, width: int) -> Tensor:
    """[B, H, length, width] in token-major memory, which the layer's output projection reads without a copy."""
    batch, heads = query.shape[:2]
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_state(query: Tensor, num: int, key_width: int, value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Context, maximum and sum of `num` slots or segments."""
    sizes = (num, query.shape[1], key_width)
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in ((*sizes, value_width), sizes, sizes))  # type: ignore[return-value]


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0), mask.stride(1))


@torch.library.custom_op(
    f"{_NAMESPACE}::factorized_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens)"
    " -> (Tensor output, Tensor context, Tensor maximum, Tensor total)",
)
def _forward(query, key, value, mask, cu_seqlens):
    query, key, value = (_with_unit_stride(tensor) for tensor in (query, key, value))
    options = _launch_options(query, value, is_backward=False)
    widths = (options["DK"], options["DV"])
    output = _empty_rows(query, query.shape[2], options["DV"])
    mask, *mask_strides = _mask_arguments(mask)
    with torch.cuda.device_of(query):
        slots, programs, plan = _plan(key, cu_seqlens, options)
        state = parts = _empty_state(query, plan[1], *widths)
        is_whole = cu_seqlens is None and plan[2] == 1
        if not is_whole:
            parts = _empty_state(query, slots, *widths)
        _context_fwd_kernel[(programs,)](
            key, value, mask, cu_seqlens, *parts,
            *key.stride()[:3], *value.stride()[:3], *mask_strides, *plan, IS_WHOLE=is_whole, **options,
        )  # fmt: skip
        if not is_whole:
            _merge(*parts, cu_seqlens, state, plan, options)
        _, programs, plan = _plan(query, cu_seqlens, options)
        _output_fwd_kernel[(programs,)](
            query, cu_seqlens, state[0], output, *query.stride()[:3], *output.stride()[:3], *plan, **options
        )
    return output, *state


@_forward.register_fake
def _(query, key, value, mask, cu_seqlens):
    segments = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    output = _empty_rows(query, query.shape[2], value.shape[3])
    return output, *_empty_state(query, segments, query.shape[3], value.shape[3])


@torch.library.custom_op(
    f"{_NAMESPACE}::factorized_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor context, Tensor maximum, Tensor total) -> (Tensor, Tensor, Tensor)",
)
def _backward(gradient, query, key, value, mask, cu_seqlens, context, maximum, total):
    gradient, query, key, value = (_with_unit_stride(tensor) for tensor in (gradient, query, key, value))
    options = _launch_options(query, value, is_backward=True)
    d_query, d_key, d_value = (_empty_rows(query, *tensor.shape[2:]) for tensor in (query, key, value))
    mask, *mask_strides = _mask_arguments(mask)
    with torch.cuda.device_of(query):
        slots, programs, plan = _plan(query, cu_seqlens, options)
        d_context = query.new_empty((slots, *context.shape[1:]), dtype=torch.float32)
        _query_bwd_kernel[(programs,)](
            query, gradient, cu_seqlens, context, d_query, d_context,
            *query.stride()[:3], *gradient.stride()[:3], *d_query.stride()[:3], *plan, **options,
        )  # fmt: skip
        if cu_seqlens is not None or plan[2] > 1:
            parts, d_context = d_context, torch.empty_like(context)
            _merge(parts, None, None, cu_seqlens, (d_context, None, None), plan, options)
        _, programs, plan = _plan(key, cu_seqlens, options)
        _key_bwd_kernel[(programs,)](
            key, value, mask, cu_seqlens, context, maximum, total, d_context, d_key, d_value,
            *key.stride()[:3], *value.stride()[:3], *mask_strides, *d_key.stride()[:3], *d_value.stride()[:3],
            *plan, **options,
        )  # fmt: skip
    return d_query, d_key, d_value


@_backward.register_fake
def _(gradient, query, key, value, mask, cu_seqlens, context, maximum, total):
    return tuple(_empty_rows(query, *tensor.shape[2:]) for tensor in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, *_):
    if gradient is None:
        return None, None, None, None, None
    return *_backward(gradient, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
