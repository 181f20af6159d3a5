"""The Triton kernels of the decode step: products, attention, norms, embeddings. Optional.

A row is one token of one sequence in one stream. Every kernel computes in float32 and stores in the model's
dtype. `fast_step_dylora_moe` launches them; a table of addresses tells a product where its weights lie.

With `PDL`, programmatic dependent launch, a kernel starts while the one before it drains: it reads weights
first, and waits (`gdc_wait`) before it touches anything that another kernel writes.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # said again in a `try`, or the Hub's loader would ask everybody to install it
    raise


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation functions of transformers' `ACT2FN`, of a float32 tile."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))  # tanh(a) = 1 - 2 / (exp(2a) + 1)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _of_side(side, first, second, third):
    """Choose a pointer: a product has up to three sides, linear layers with the same input."""
    chosen = first
    if side == 1:
        chosen = second
    elif side == 2:
        chosen = third
    return chosen


@triton.jit
def _number_of_side(side, first, second, third):
    """Choose a number."""
    return tl.where(side == 0, first, tl.where(side == 1, second, third))


@triton.jit
def _weights(pointer, n, real, k, size, stride, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A tile `[len(n), len(k)]` of a weight `[size, K]`, or of one stored as `[K, stride]`."""
    inside = real[:, None] & (k < K)[None, :]
    if TRANSPOSED:
        place = pointer + k[None, :] * stride + n[:, None]
    else:
        place = pointer + n[:, None] * K + k[None, :]
    return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sums(a, b, squares, eps, K: tl.constexpr, PAIR: tl.constexpr, NORM: tl.constexpr):
    """Add up one row's products `[BN, BK]` with both weights, and divide by the root mean square: `[BN, 1]` each."""
    y = tl.sum(a, axis=1)[:, None]
    u = y
    if PAIR:
        u = tl.sum(b, axis=1)[:, None]
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        y *= scale
        u *= scale
    return y, u


@triton.jit
def _one_or_two_rows(
    x, norm, weight, weight_2, tile, tile_2, n, real, size, stride, eps, offset,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, PAIR: tl.constexpr,
    NORM: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Multiply one or two rows of x by rows n of a weight, and of a second one with `PAIR`: `[BN, ROWS]` each.

    With `NORM`, of the RMS norm of x: its weight goes into x, and its scale, known at the end, to the result.
    `tile` and `tile_2` are the first tiles of the weights; the next is asked for before the last is used.
    """
    a0 = tl.zeros((BN, BK), tl.float32)
    a1 = tl.zeros((BN, BK), tl.float32)
    b0 = tl.zeros((BN, BK), tl.float32)
    b1 = tl.zeros((BN, BK), tl.float32)
    squares_0 = tl.zeros((BK,), tl.float32)
    squares_1 = tl.zeros((BK,), tl.float32)
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        next_tile = tile
        next_2 = tile_2
        if start + BK < K:
            next_tile = _weights(weight, n, real, k + BK, size, stride, K, TRANSPOSED)
            if PAIR:
                next_2 = _weights(weight_2, n, real, k + BK, size, stride, K, TRANSPOSED)
        x0 = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if ROWS == 2:
            x1 = tl.load(x + K + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32) + offset
            squares_0 += x0 * x0
            x0 *= scale
            if ROWS == 2:
                squares_1 += x1 * x1
                x1 *= scale
        values = tile.to(tl.float32)
        a0 += values * x0[None, :]
        if ROWS == 2:
            a1 += values * x1[None, :]
        if PAIR:
            values = tile_2.to(tl.float32)
            b0 += values * x0[None, :]
            if ROWS == 2:
                b1 += values * x1[None, :]
        tile = next_tile
        tile_2 = next_2
    y, u = _sums(a0, b0, squares_0, eps, K, PAIR, NORM)
    if ROWS == 2:
        y1, u1 = _sums(a1, b1, squares_1, eps, K, PAIR, NORM)
        second = tl.arange(0, 2)[None, :] == 1
        y = tl.where(second, y1, y)
        u = tl.where(second, u1, u)
    return y, u


@triton.jit
def _many_rows(
    x, weight, weight_2, n, real, size, stride, row, rows,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, PAIR: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply rows `row` of x, already normalised, by matrix instructions: `[BN, ROWS]`, twice with `PAIR`."""
    y = tl.zeros((BN, ROWS), tl.float32)
    u = tl.zeros((BN, ROWS), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        inside = (row < rows)[None, :] & (k < K)[:, None]
        states = tl.load(x + row[None, :] * K + k[:, None], mask=inside, other=0.0)
        tile = _weights(weight, n, real, k, size, stride, K, TRANSPOSED)
        states = states.to(tile.dtype)
        y = tl.dot(tile, states, y, input_precision=PRECISION)
        if PAIR:
            tile = _weights(weight_2, n, real, k, size, stride, K, TRANSPOSED)
            u = tl.dot(tile, states, u, input_precision=PRECISION)
    return y, u


@triton.jit
def _lora_B(lora_B, stride, places, at, n, real, BLOCK: tl.constexpr):
    """A tile `[len(n), BLOCK]` of the B of the acting experts, which is stored as `[ranks, columns]`."""
    place = tl.load(places + at + tl.arange(0, BLOCK))
    inside = real[:, None] & (place >= 0)[None, :]
    return tl.load(lora_B + place[None, :].to(tl.int64) * stride + n[:, None], mask=inside, other=0.0)


@triton.jit
def _own_parts(
    z, own, row, inside, at, BLOCK: tl.constexpr, OWN: tl.constexpr, RANKS: tl.constexpr, ALL_RANKS: tl.constexpr
):  # fmt: skip
    """z of rows `row` at the acting experts' ranks `at` and on, `[BLOCK, len(row)]`: zero where not a row's own."""
    rank = at + tl.arange(0, BLOCK)
    if OWN * RANKS == ALL_RANKS:  # every row has them all
        place = row[None, :] * ALL_RANKS + rank[:, None]
        return tl.load(z + place, mask=inside[None, :], other=0.0)
    parts = tl.zeros((BLOCK, row.shape[0]), tl.float32)
    for index in tl.static_range(OWN):
        slot = tl.load(own + row * OWN + index, mask=inside, other=-1)
        place = (row * OWN + index)[None, :] * RANKS + (rank % RANKS)[:, None]
        is_own = slot[None, :] == (rank // RANKS)[:, None]
        parts += tl.load(z + place, mask=is_own, other=0.0)
    return parts


@triton.jit
def _expert_update(
    y, tile, lora_B, stride, places, own, acting, z, n, real, rows, row,
    ROWS: tl.constexpr, OWN: tl.constexpr, RANKS: tl.constexpr, ALL_RANKS: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add B z to columns n of a side, `[BN, ROWS]`; `tile` is the first of B."""
    if DOT:
        for at in tl.range(0, tl.load(acting) * RANKS, BLOCK, num_stages=STAGES):
            of_B = _lora_B(lora_B, stride, places, at, n, real, BLOCK)
            parts = _own_parts(z, own, row, row < rows, at, BLOCK, OWN, RANKS, ALL_RANKS)
            y = tl.dot(of_B, parts.to(of_B.dtype), y, input_precision=PRECISION)
    else:
        for at in tl.static_range(0, ALL_RANKS, BLOCK):
            for index in tl.static_range(ROWS):
                one = index + tl.arange(0, 1)
                parts = tl.trans(_own_parts(z, own, one, one < rows, at, BLOCK, OWN, RANKS, ALL_RANKS))
                part = tl.sum(tile.to(tl.float32) * parts, axis=1)[:, None]
                y += tl.where(tl.arange(0, ROWS)[None, :] == index, part, 0.0)
            if at + BLOCK < ALL_RANKS:
                tile = _lora_B(lora_B, stride, places, at + BLOCK, n, real, BLOCK)
    return y


@triton.jit
def ranks_kernel(
    x, norm, A_0, A_1, A_2, own, places, factors, factors_stride, z, rows, layout_0, layout_1, layout_2, eps, offset,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, OWN: tl.constexpr,
    RANKS: tl.constexpr, ALL_RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """z = factors * (A norm(x)), `[sides, rows, OWN * RANKS]`; zero where a side or an expert has no such rank.

    A program makes BN ranks of one of a row's own experts, for one side.

    Args:
        A_0, A_1, A_2: the stacks of every side, `[ranks, K]`.
        own: which slots a row's experts have, `[rows, OWN]`.
        places: where in the stacks the acting experts' ranks are, `[layouts, ALL_RANKS]`; -1 for none. A slot
            has RANKS of them.
        factors: weight times scale of a row's own experts, `[layouts, rows, OWN * RANKS]`, with
            `factors_stride` from layout to layout.
        layout_0, layout_1, layout_2: which layout each side has; -1 for no experts.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, row, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layout = _number_of_side(side, layout_0, layout_1, layout_2)
    # The experts are those of the pass: nothing that runs in it changes them.
    slot = tl.load(own + row * OWN + block * BN // RANKS)
    rank = block * BN + tl.arange(0, BN)
    place = layout * ALL_RANKS + slot * RANKS + rank % RANKS
    place = tl.load(places + place, mask=layout >= 0, other=-1)
    factor = layout * factors_stride + row * OWN * RANKS + rank
    factor = tl.load(factors + factor, mask=layout >= 0, other=0.0)
    acts = (place >= 0) & (factor != 0.0)
    lora_A = _of_side(side, A_0, A_1, A_2)
    tile = _weights(lora_A, place, acts, tl.arange(0, BK), 0, 0, K, False)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BN,), tl.float32)
    if tl.max(acts.to(tl.int32), axis=0) > 0:
        y, _ = _one_or_two_rows(
            x + row * K, norm, lora_A, lora_A, tile, tile, place, acts, 0, 0, eps, offset,
            K, BN, BK, 1, False, NORM, False,
        )  # fmt: skip
        sums = tl.where(acts, tl.sum(y, axis=1) * factor, 0.0)
    tl.store(z + (side * rows + row) * OWN * RANKS + rank, sums)


@triton.jit
def product_kernel(
    x, norm, residual, output, z, places, own, acting,
    W_0, W_1, W_2, bias_0, bias_1, bias_2, B_0, B_1, B_2, size_0, size_1, size_2,
    stride_0, stride_1, stride_2, layout_0, layout_1, layout_2,
    rows, columns, weight_stride, eps, offset, scale, softcap,
    SIDES: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
    PAIR: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ACTIVATION: tl.constexpr, OWN: tl.constexpr, RANKS: tl.constexpr, ALL_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, DOT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """output = residual + scale * activation(W norm(x) + bias + B z). A program makes BN columns of one side.

    Args:
        x: `[rows, K]`.
        output: `[rows, columns]`, sides one after the other; `residual` too. With PAIR there are two sides,
            and the output is activation(first) * second.
        z, places, own, layout_*: as of `ranks_kernel`; ALL_RANKS is 0 without experts.
        acting: how many slots have an expert that acts; they are the first.
        W_*, bias_*, B_*: every side's weight `[size, K]`, bias `[size]`, and B `[ranks, size]`, with `stride_*`
            from one of B's ranks to the next.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    side = 0
    before = 0  # columns of the sides before this one
    if SIDES > 1 and not PAIR:
        blocks_0 = tl.cdiv(size_0, BN)
        blocks_1 = tl.cdiv(size_1, BN)
        if block >= blocks_0 + blocks_1:
            side = 2
            before = size_0 + size_1
            block -= blocks_0 + blocks_1
        elif block >= blocks_0:
            side = 1
            before = size_0 + 0
            block -= blocks_0
    size = _number_of_side(side, size_0, size_1, size_2)
    n = block * BN + tl.arange(0, BN)
    real = n < size
    weight = _of_side(side, W_0, W_1, W_2)
    if not DOT:
        tile = _weights(weight, n, real, tl.arange(0, BK), size, weight_stride, K, TRANSPOSED)
        tile_2 = tile
        if PAIR:
            tile_2 = _weights(W_1, n, real, tl.arange(0, BK), size, weight_stride, K, TRANSPOSED)
    if ALL_RANKS:
        # The experts are those of the pass: nothing that runs in it changes them.
        layout = _number_of_side(side, layout_0, layout_1, layout_2)
        lora_B = _of_side(side, B_0, B_1, B_2)
        stride = _number_of_side(side, stride_0, stride_1, stride_2)
        places_2 = places + tl.maximum(layout_1, 0) * ALL_RANKS
        real_2 = real & (layout_1 >= 0)
        places += tl.maximum(layout, 0) * ALL_RANKS
        adapted = real & (layout >= 0)
        B = 0.0
        B_second = 0.0
        if not DOT:
            B = _lora_B(lora_B, stride, places, 0, n, adapted, RANK_BLOCK)
            if PAIR:
                B_second = _lora_B(B_1, stride_1, places_2, 0, n, real_2, RANK_BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if DOT:
        y, u = _many_rows(
            x, weight, W_1, n, real, size, weight_stride, row, rows,
            K, BN, BK, ROWS, PAIR, TRANSPOSED, PRECISION, STAGES,
        )  # fmt: skip
    else:
        y, u = _one_or_two_rows(
            x, norm, weight, W_1, tile, tile_2, n, real, size, weight_stride, eps, offset,
            K, BN, BK, ROWS, PAIR, NORM, TRANSPOSED,
        )  # fmt: skip
    if ALL_RANKS:
        of_side = z + side * rows * OWN * RANKS
        y = _expert_update(
            y, B, lora_B, stride, places, own, acting, of_side, n, adapted, rows, row,
            ROWS, OWN, RANKS, ALL_RANKS, RANK_BLOCK, DOT, PRECISION, STAGES,
        )  # fmt: skip
        if PAIR:
            of_side = z + rows * OWN * RANKS
            u = _expert_update(
                u, B_second, B_1, stride_1, places_2, own, acting, of_side, n, real_2, rows, row,
                ROWS, OWN, RANKS, ALL_RANKS, RANK_BLOCK, DOT, PRECISION, STAGES,
            )  # fmt: skip
    if BIAS:
        bias = _of_side(side, bias_0, bias_1, bias_2)
        y += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)[:, None]
        if PAIR:
            u += tl.load(bias_1 + n, mask=real, other=0.0).to(tl.float32)[:, None]
    y = _activate(y, ACTIVATION)
    if PAIR:
        y *= u
    y *= scale
    if SOFTCAP:
        y = softcap * _tanh(y / softcap)
    place = row[None, :].to(tl.int64) * columns + before + n[:, None]
    inside = real[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + place, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    x, weight, bias, residual, output, eps, offset, scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """output = residual + scale * norm(x): an RMS norm, or a layer norm (`CENTERED`), of one row a program."""
    _begin(PDL)
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    inside = k < SIZE
    states = tl.load(x + row * SIZE + k, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        states = tl.where(inside, states - tl.sum(states, axis=0) / SIZE, 0.0)
    states *= tl.rsqrt(tl.sum(states * states, axis=0) / SIZE + eps)
    states *= tl.load(weight + k, mask=inside, other=0.0).to(tl.float32) + offset
    if BIAS:
        states += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    states *= scale
    if RESIDUAL:
        states += tl.load(residual + row * SIZE + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * SIZE + k, states.to(output.dtype.element_ty), mask=inside)


@triton.jit
def embed_kernel(
    input_ids, embeddings, position_embeddings, length, offsets, output, scale, sequences,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Look up the embedding of every row's token, one a program.

    `input_ids`: `[sequences, TOKENS]`, the same for every stream.
    """
    if PDL:
        # In this order: kernels of the pass read what was written before it, such as the length, without waiting.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    token = tl.load(input_ids + row % (sequences * TOKENS))
    states = tl.load(embeddings + token * SIZE + k, mask=k < SIZE, other=0.0).to(tl.float32) * scale
    if POSITIONS:
        position = tl.load(length) + tl.load(offsets + row // TOKENS % sequences) + row % TOKENS
        states = states.to(output.dtype.element_ty).to(tl.float32)
        states += tl.load(position_embeddings + position * SIZE + k, mask=k < SIZE, other=0.0).to(tl.float32)
    tl.store(output + row * SIZE + k, states.to(output.dtype.element_ty), mask=k < SIZE)


@triton.jit
def _head_states(
    source, norm, frequencies, head, real, position, eps, offset, rope_scale, inverse,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROTARY: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Read some heads of queries or keys, normalise and rotate them: `[heads, BLOCK]` in float32.

    QK_NORM: "head" (the norm of a head), "all" (of all heads together, whose scale is `inverse`), or none.
    ROTARY: how many of a head's numbers are rotated, in halves: number d with number d + ROTARY / 2.
    """
    d = tl.arange(0, BLOCK)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    inside = real[:, None] & (d < SIZE)[None, :]
    states = tl.load(source + head[:, None] * SIZE + d[None, :], mask=inside, other=0.0).to(tl.float32)
    others = tl.load(source + head[:, None] * SIZE + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if QK_NORM == "head":
        scale = tl.rsqrt(tl.sum(states * states, axis=1) / SIZE + eps)[:, None]
        states *= scale * (tl.load(norm + d, mask=d < SIZE, other=0.0).to(tl.float32) + offset)[None, :]
        others *= scale * (tl.load(norm + partner, mask=d < SIZE, other=0.0).to(tl.float32) + offset)[None, :]
    elif QK_NORM == "all":
        place = norm + head[:, None] * SIZE
        states *= inverse * tl.load(place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        others *= inverse * tl.load(place + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        rotated = d < ROTARY
        angle = position.to(tl.float32) * tl.load(frequencies + d % half, mask=rotated, other=0.0)
        cosine = tl.where(rotated, tl.cos(angle) * rope_scale, 1.0)
        sine = tl.where(rotated, tl.sin(angle) * rope_scale, 0.0)
        sine = tl.where(d < half, -sine, sine)
        states = states * cosine[None, :] + others * sine[None, :]
    return states


@triton.jit
def _inverse_of_all(source, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """1 / the root mean square of `SIZE` numbers."""
    k = tl.arange(0, BLOCK)
    states = tl.load(source + k, mask=k < SIZE, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(states * states, axis=0) / SIZE + eps)


@triton.jit
def attention_kernel(
    qkv, keys, values, visible, length, offsets, frequencies, query_norm, key_norm, parts, sums, counters, output,
    heads, key_heads, capacity, sequences, scale, softcap, window, rope_scale, eps, offset,
    SHARED: tl.constexpr, SHARED_BLOCK: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, QK_NORM: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of every row over its sequence, and the new keys and values into the KV cache.

    A program has one row, one key head with all its query heads, and one of SPLITS parts of the cache, or the
    new tokens, which are read from `qkv`. The last program of a row and key head puts the parts together.

    Args:
        qkv: `[rows, (heads + 2 * key_heads) * SIZE]`; a sequence's TOKENS rows follow each other.
        keys, values: the KV cache, `[rows / TOKENS, key_heads, capacity, SIZE]`.
        visible: `[sequences, capacity]`, zero where a token of the cache is padding.
        length: how many tokens the cache has; `offsets`: what a sequence's positions are more than that.
        window: how many tokens, its own included, a token sees, with `WINDOW`.
        parts, sums: room for `[rows, heads, SPLITS + 1, SIZE]`, and for two numbers each.
        output: `[rows, heads * SIZE]`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, key_head, split = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads, tl.program_id(1)
    line = row // TOKENS
    token = row % TOKENS
    cached = tl.load(length).to(tl.int32)
    position = cached + tl.load(offsets + line % sequences).to(tl.int32) + token
    q, d = tl.arange(0, SHARED_BLOCK), tl.arange(0, SIZE_BLOCK)
    real = q < SHARED
    base = (line * key_heads + key_head).to(tl.int64) * capacity * SIZE
    seen = visible + (line % sequences) * capacity
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, cached + token + 1 - window)
    span = tl.cdiv(tl.cdiv(cached - begin, SPLITS), BLOCK) * BLOCK
    start = begin + split * span
    stop = tl.minimum(start + span, cached)  # none for the program of the new tokens
    # What the cache has was written in other steps, so the first keys and values need not wait.
    t = start + tl.arange(0, BLOCK)
    here = (t < stop) & (split < SPLITS)
    inside = here[:, None] & (d < SIZE)[None, :]
    key_tile = tl.load(keys + base + t[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    value_tile = tl.load(values + base + t[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    here &= tl.load(seen + t, mask=here, other=0) != 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    width = (heads + 2 * key_heads) * SIZE
    source = qkv + row * width
    inverse = 0.0
    if QK_NORM == "all":
        inverse = _inverse_of_all(source, eps, HEADS * SIZE, QUERY_BLOCK)
    queries = _head_states(
        source, query_norm, frequencies, key_head * SHARED + q, real, position, eps, offset, rope_scale, inverse,
        SIZE, SIZE_BLOCK, ROTARY, QK_NORM,
    )  # fmt: skip
    largest = tl.full([SHARED_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([SHARED_BLOCK], tl.float32)
    mixed = tl.zeros([SHARED_BLOCK, SIZE_BLOCK], tl.float32)
    if split == SPLITS:
        one = tl.arange(0, 1)
        for new in range(0, token + 1):
            other = row - token + new
            source = qkv + other * width
            if QK_NORM == "all":
                inverse = _inverse_of_all(source + heads * SIZE, eps, KEY_HEADS * SIZE, KEY_BLOCK)
            key = _head_states(
                source + heads * SIZE, key_norm, frequencies, key_head + one, one < 1, position - token + new,
                eps, offset, rope_scale, inverse, SIZE, SIZE_BLOCK, ROTARY, QK_NORM,
            )  # fmt: skip
            key = key.to(keys.dtype.element_ty)
            value = tl.load(source + (heads + key_heads + key_head) * SIZE + d, mask=d < SIZE, other=0.0)
            if new == token:
                place = base + (cached + token) * SIZE + d
                tl.store(keys + place[None, :], key, mask=(d < SIZE)[None, :])
                tl.store(values + place, value, mask=d < SIZE)
            score = tl.sum(queries * key.to(tl.float32), axis=1) * scale
            if SOFTCAP:
                score = softcap * _tanh(score / softcap)
            if WINDOW:
                score = tl.where(token - new < window, score, float("-inf"))
            most = tl.maximum(largest, score)
            fade = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - most))
            share = tl.where(score == float("-inf"), 0.0, tl.exp(score - most))
            total = total * fade + share
            mixed = mixed * fade[:, None] + share[:, None] * value.to(tl.float32)[None, :]
            largest = most
    else:
        narrow = queries.to(keys.dtype.element_ty)
        for first in range(start, stop, BLOCK):
            scores = tl.dot(narrow, tl.trans(key_tile), input_precision=PRECISION) * scale
            if SOFTCAP:
                scores = softcap * _tanh(scores / softcap)
            scores = tl.where(here[None, :], scores, float("-inf"))
            most = tl.maximum(largest, tl.max(scores, axis=1))
            fade = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - most))
            shares = tl.where(scores == float("-inf"), 0.0, tl.exp(scores - most[:, None]))
            total = total * fade + tl.sum(shares, axis=1)
            mixed = mixed * fade[:, None]
            mixed = tl.dot(shares.to(value_tile.dtype), value_tile, mixed, input_precision=PRECISION)
            largest = most
            t = first + BLOCK + tl.arange(0, BLOCK)
            here = t < stop
            inside = here[:, None] & (d < SIZE)[None, :]
            key_tile = tl.load(keys + base + t[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
            value_tile = tl.load(values + base + t[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
            here &= tl.load(seen + t, mask=here, other=0) != 0
    head = key_head * SHARED + q
    inside = real[:, None] & (d < SIZE)[None, :]
    slot = (row * heads + head) * (SPLITS + 1) + split
    tl.store(parts + slot[:, None] * SIZE + d[None, :], mixed, mask=inside)
    tl.store(sums + slot * 2, largest, mask=real)
    tl.store(sums + slot * 2 + 1, total, mask=real)
    tl.debug_barrier()
    done = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if done == SPLITS:
        tl.store(counters + tl.program_id(0), 0)
        largest = tl.full([SHARED_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([SHARED_BLOCK], tl.float32)
        mixed = tl.zeros([SHARED_BLOCK, SIZE_BLOCK], tl.float32)
        for other in tl.static_range(0, SPLITS + 1):
            slot = (row * heads + head) * (SPLITS + 1) + other
            part = tl.load(sums + slot * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
            most = tl.maximum(largest, part)
            fade = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - most))
            share = tl.where(part == float("-inf"), 0.0, tl.exp(part - most))
            weight = tl.load(sums + slot * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
            states = tl.load(
                parts + slot[:, None] * SIZE + d[None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            total = total * fade + share * weight
            mixed = mixed * fade[:, None] + share[:, None] * states
            largest = most
        mixed /= tl.where(real, total, 1.0)[:, None]
        place = output + (row * heads + head)[:, None] * SIZE + d[None, :]
        tl.store(place, mixed.to(output.dtype.element_ty), mask=inside)


__all__ = ["attention_kernel", "embed_kernel", "norm_kernel", "product_kernel", "ranks_kernel"]
