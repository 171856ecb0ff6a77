"""Triton kernels for factorized attention: one pass over K and V, one over Q, nothing of the size of N in between.

    context = softmax_positions(K)ᵀ · V,    output = softmax_features(Q) · context

Forward: `context_fwd_kernel` streams over a chunk of positions and keeps, for each feature, the running maximum m, the
sum z of exp(K - m) and the sum of exp(K - m) · V; `merge_kernel` joins the chunks; `output_fwd_kernel` applies the
context to each query. Backward reads context, m and z besides the inputs. With P and R the two softmaxes, C the
context, G the gradient of the output and ∘ the elementwise product:
    dC = Pᵀ·G,  dP = G·Cᵀ,  dQ = P ∘ (dP - rowsum(P ∘ dP))           one pass over Q and G
    dV = R·dC,  dR = V·dCᵀ, dK = R ∘ (dR - s),  s_j = C_j · dC_j     one pass over K and V
No atomics: chunks are joined in a fixed order, so equal inputs give equal bits on one device.

Precision: sums are float32. Float32 inputs multiply in full float32 ("ieee", no TF32). For half-precision inputs the
operands that are not inputs (weights, context, its gradient) are split into a high and a low part of the input's dtype
and multiplied by tensor cores part by part: 16 bits of them count in bfloat16 and 22 in float16 instead of 8 and 11.

A program works on one chunk of one segment (a sample, or a document of a packed row) for one head. Wide heads split
the value features into blocks of BLOCK_V, a program each. `fa_attention_triton.py` launches the kernels.
Shape letters: B batch, H heads, N query positions, M key positions, Dk key width, Dv value width, D documents.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _first_slot(cu_ptr, segment, num_chunks, chunk):
        """Return the first slot of a segment's chunks in the partial results; packed documents leave unused slots."""
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
        """Round float32 to the nearest number of `dtype`."""
        if (
            IS_INTERPRETED and dtype == tl.bfloat16
        ):  # the interpreter cuts bits off; add half a unit first, ties to even
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _load_rows(pointer, rows, columns, stride_n, num_rows, WIDTH: tl.constexpr):
        """Load a [rows, columns] tile, zero outside the tensor."""
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        return tl.load(pointer + rows.to(tl.int64)[:, None] * stride_n + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _store_rows(pointer, tile, rows, columns, stride_n, num_rows, WIDTH: tl.constexpr):
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
        tl.store(pointer + offsets, _round(tile, pointer.dtype.element_ty), mask=inside)

    @triton.jit
    def _load_mask(pointer, rows, stride_n, num_rows):
        """Return a mask of the rows that are real positions."""
        real = rows < num_rows
        if pointer is not None:
            real = real & (tl.load(pointer + rows.to(tl.int64) * stride_n, mask=real, other=0) != 0)
        return real

    @triton.jit
    def _load_context(pointer, features, columns, DK: tl.constexpr, DV: tl.constexpr):
        """Load a [features, columns] tile of one float32 context."""
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
        """Return acc + x · y for operands of one dtype, float32 ones without rounding them to TF32."""
        if IS_INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer; products are exact in float32
            x, y = x.to(tl.float32), y.to(tl.float32)
        return tl.dot(x, y, acc, input_precision="ieee")

    @triton.jit
    def _dot_left(x, y, acc):
        """Return acc + x · y for float32 x and y in the inputs' dtype."""
        if y.dtype == tl.float32:
            acc = _multiply(x, y, acc)
        else:
            high, low = _split(x, y.dtype)
            acc = _multiply(high, y, _multiply(low, y, acc))
        return acc

    @triton.jit
    def _dot_left_transposed(x, y, acc):
        """Return acc + xᵀ · y for float32 x and y in the inputs' dtype."""
        if y.dtype == tl.float32:
            acc = _multiply(tl.trans(x), y, acc)
        else:
            high, low = _split(x, y.dtype)
            acc = _multiply(tl.trans(high), y, _multiply(tl.trans(low), y, acc))
        return acc

    @triton.jit
    def _dot_right_transposed(x, y):
        """Return x · yᵀ for x in the inputs' dtype and float32 y."""
        acc = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        if x.dtype == tl.float32:
            acc = _multiply(x, tl.trans(y), acc)
        else:
            high, low = _split(y, x.dtype)
            acc = _multiply(x, tl.trans(high), _multiply(x, tl.trans(low), acc))
        return acc

    @triton.jit
    def _dot(x, y, dtype: tl.constexpr):
        """Return x · y for float32 x and y."""
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
    def context_fwd_kernel(
        k_ptr, v_ptr, mask_ptr, cu_ptr, context_ptr, max_ptr, sum_ptr,
        k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride_b, mask_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        IS_WHOLE: tl.constexpr,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """Write m, z and Σ exp(K - m)ᵀ · V of one chunk; of the only chunk (IS_WHOLE) the finished context."""
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
    def merge_kernel(
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
    def output_fwd_kernel(
        q_ptr, cu_ptr, context_ptr, out_ptr,
        q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """Write softmax_features(Q) · context of one chunk of queries."""
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
    def query_bwd_kernel(
        q_ptr, g_ptr, cu_ptr, context_ptr, dq_ptr, dcontext_ptr,
        q_stride_b, q_stride_h, q_stride_n, g_stride_b, g_stride_h, g_stride_n,
        dq_stride_b, dq_stride_h, dq_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """Write dC of one chunk of queries for one block of value features, and in the first block's program dQ."""
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
    def key_bwd_kernel(
        k_ptr, v_ptr, mask_ptr, cu_ptr, context_ptr, max_ptr, sum_ptr, dcontext_ptr, dk_ptr, dv_ptr,
        k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, mask_stride_b, mask_stride_n,
        dk_stride_b, dk_stride_h, dk_stride_n, dv_stride_b, dv_stride_h, dv_stride_n,
        num_heads, num_segments, num_chunks, length, chunk,
        DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """Write dV of one chunk of keys for one block of value features, and in the first block's program dK."""
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
