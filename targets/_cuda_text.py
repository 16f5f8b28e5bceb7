"""Triton text of what row programs cannot say: quantizing along rows and in blocks, moving rows, losses.

Where a tensor only moves, kernels see it as 32-bit words. Scales and codes follow `quantize` bit for bit.
"""

from __future__ import annotations

HEAD = """import triton
import triton.language as tl
"""

SCALES = """

@triton.jit
def magnitude(v):
    size = tl.abs(v)
    return tl.where(size == size, size, float("inf"))


@triton.jit
def scale_of(top, POWER: tl.constexpr):
    s = tl.maximum(tl.div_rn(top, 448.0), 1.1754943508222875e-38)
    if POWER:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    s = tl.where(top == 0.0, 1.0, s)
    return tl.where(top == float("inf"), float("nan"), s)
"""

QUANTIZE_ROWS = f"""{HEAD}{SCALES}

@triton.jit
def quantize_rows(x, q, s, rows, cols, step, tiles, BLOCK: tl.constexpr, POWER: tl.constexpr):
    tile = tl.program_id(0)
    r = tile * 128 + tl.arange(0, 128)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * step + c[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(v), 0), POWER)
    code = (v * tl.div_rn(1.0, scale)[None, :]).to(tl.float8e4nv)
    kept = (c < cols)[:, None] & (r < rows)[None, :]
    tl.store(q + c.to(tl.int64)[:, None] * rows + r[None, :], tl.trans(code), mask=kept)
    tl.store(s + c.to(tl.int64) * tiles + tile, scale, mask=c < cols)
"""

QUANTIZE_BLOCK = f"""{HEAD}{SCALES}

@triton.jit
def quantize_block(w, q, s, rows, cols, POWER: tl.constexpr):
    down, across, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    r = down * 128 + tl.arange(0, 128)
    c = across * 128 + tl.arange(0, 128)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    at = (batch * rows + r)[:, None] * cols + c[None, :]
    v = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude(v), 1), 0), POWER)
    tl.store(q + at, (v * tl.div_rn(1.0, scale)).to(tl.float8e4nv), mask=inside)
    tl.store(s + (batch * tl.num_programs(1) + down) * tl.num_programs(0) + across, scale)
"""

BESIDE = 16
"""Neighbouring rows of a block that one thread of `quantize_block_both` holds, so that it stores them at once."""

QUANTIZE_BLOCK_BOTH = f"""{HEAD}{SCALES}

@triton.jit
def quantize_block_both(w, q, s, qt, st, rows, cols, POWER: tl.constexpr):
    down, across, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 128)
    r = down * 128 + lane % {128 // BESIDE} * {BESIDE} + lane // {128 // BESIDE}
    c = across * 128 + lane
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    at = (batch * rows + r)[:, None] * cols + c[None, :]
    v = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude(v), 1), 0), POWER)
    code = (v * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    tl.store(q + at, code, mask=inside)
    tl.store(s + (batch * tl.num_programs(1) + down) * tl.num_programs(0) + across, scale)
    turned = tl.permute(tl.reshape(code, [{BESIDE}, {128 // BESIDE}, 128]), (2, 1, 0))
    below = down * 128 + lane
    kept = (c < cols)[:, None] & (below < rows)[None, :]
    there = (batch * cols + c)[:, None] * rows + below[None, :]
    tl.store(qt + there, tl.reshape(turned, [128, 128]), mask=kept)
    tl.store(st + (batch * tl.num_programs(0) + across) * tl.num_programs(1) + down, scale)
"""

TRANSPOSE = f"""{HEAD}

@triton.jit
def transpose(x, y, rows, cols, step, stride, TILE: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    v = tl.load(x + (batch * rows + r)[:, None] * step + c[None, :], mask=inside, other=0)
    kept = (c < cols)[:, None] & (r < rows)[None, :]
    tl.store(y + (batch * cols + c)[:, None] * stride + r[None, :], tl.trans(v), mask=kept)
"""

PERMUTE = f"""{HEAD}

@triton.jit
def permute(x, source, y, rows, words, choices, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(source + row, mask=row < rows, other=-1)
    inside = (c < words)[None, :]
    from_ = x + (choice // choices).to(tl.int64)[:, None] * words + c[None, :]
    v = tl.load(from_, mask=inside & (choice >= 0)[:, None], other=0)
    tl.store(y + row.to(tl.int64)[:, None] * words + c[None, :], v, mask=inside & (row < rows)[:, None])
"""

UNPERMUTE = f"""{HEAD}

@triton.jit
def unpermute(y, slot, x, cols, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(slot + token * K + j)
        total += tl.load(y + row.to(tl.int64) * cols + c, mask=(c < cols) & (row >= 0), other=0.0).to(tl.float32)
    tl.store(x + token.to(tl.int64) * cols + c, total.to(x.dtype.element_ty), mask=c < cols)
"""

ZERO_TAIL = f"""{HEAD}

@triton.jit
def zero_tail(y, offsets, experts, rows, words, BLOCK: tl.constexpr):
    first = tl.load(offsets + experts) + tl.program_id(0)
    at = y + first.to(tl.int64) * words
    for _ in range(first, rows, tl.num_programs(0)):
        for start in range(0, words, BLOCK):
            c = start + tl.arange(0, BLOCK)
            tl.store(at + c, tl.zeros((BLOCK,), tl.int32), mask=c < words)
        at += tl.num_programs(0) * words
"""

CROSS_ENTROPY = f"""{HEAD}

@triton.jit
def cross_entropy(logits, labels, lse, part, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * vocab + c, mask=c < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        settled = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - settled) + tl.exp(z - settled)
        top = higher
    best = tl.max(top, 0)
    total = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - best)), 0)
    whole = best + tl.log(total)
    label = tl.load(labels + row)
    chosen = tl.load(logits + row * vocab + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(lse + row, whole)
    tl.store(part + row, tl.where(label >= 0, whole - chosen, 0.0))
"""

CROSS_ENTROPY_GRAD = f"""{HEAD}

@triton.jit
def cross_entropy_grad(logits, labels, lse, factor, out, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    whole = tl.load(lse + row)
    f = tl.where(label >= 0, tl.load(factor), 0.0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * vocab + c, mask=c < vocab, other=0.0).to(tl.float32)
    g = (tl.exp(z - whole) - tl.where(c == label, 1.0, 0.0)) * f
    g = tl.where(label >= 0, g, 0.0)
    tl.store(out + row * vocab + c, g.to(out.dtype.element_ty), mask=c < vocab)
"""

EMBEDDING_WGRAD = f"""{HEAD}

@triton.jit
def embedding_wgrad(tokens, order, dy, dw, count, cols, BLOCK: tl.constexpr, ADD: tl.constexpr):
    i = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + i)
    first = token != tl.load(tokens + i - 1, mask=i > 0, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    more = first
    j = i
    while more:
        row = tl.load(order + j)
        total += tl.load(dy + row * cols + c, mask=c < cols, other=0.0).to(tl.float32)
        j += 1
        more = tl.load(tokens + j, mask=j < count, other=-1) == token
    if first:
        at = dw + token * cols + c
        if ADD:
            total += tl.load(at, mask=c < cols, other=0.0)
        tl.store(at, total, mask=c < cols)
"""

SUM_SQUARES = f"""{HEAD}

@triton.jit
def sum_squares(x, part, blocks, rest, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    end = x + blocks.to(tl.int64) * BLOCK
    v = tl.load(end + lane, mask=(lane < rest) & (first == 0), other=0.0).to(tl.float32)
    total = v * v
    at = x + first.to(tl.int64) * BLOCK + lane
    for _ in range(first, blocks, tl.num_programs(0)):
        v = tl.load(at).to(tl.float32)
        total += v * v
        at += tl.num_programs(0) * BLOCK
    tl.store(part + first, tl.sum(total, 0))
"""

SORT_BY_EXPERT = f"""{HEAD}

@triton.jit
def count_choices(e, counts, count, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    names = tl.arange(0, EXPERTS)
    expert = tl.load(e + i, mask=i < count, other=-1)
    hit = (expert[:, None] == names[None, :]).to(tl.int32)
    tl.store(counts + chunk * EXPERTS + names, tl.sum(hit, 0))


@triton.jit
def add_up_choices(counts, sums, chunks, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    names = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    before = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        at = chunk[:, None] * EXPERTS + names[None, :]
        here = (chunk < chunks)[:, None]
        v = tl.load(counts + at, mask=here, other=0)
        tl.store(sums + at, before[None, :] + tl.cumsum(v, 0), mask=here)
        before += tl.sum(v, 0)


@triton.jit
def place_choices(e, sums, offsets, slot, source, count, experts, chunks, align, EXPERTS: tl.constexpr,
                  CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    names = tl.arange(0, EXPERTS)
    size = tl.load(sums + (chunks - 1) * EXPERTS + names)
    room = (size + align - 1) // align * align
    start = tl.cumsum(room, 0) - room
    before = tl.load(sums + (chunk - 1) * EXPERTS + names, mask=(names >= 0) & (chunk > 0), other=0)
    expert = tl.load(e + i, mask=i < count, other=-1)
    hit = (expert[:, None] == names[None, :]).to(tl.int32)
    row = tl.sum(hit * ((start + before)[None, :] + tl.cumsum(hit, 0) - 1), 1)
    here = (i < count) & (expert >= 0)
    tl.store(slot + i, tl.where(expert >= 0, row, -1), mask=i < count)
    tl.store(source + row, i, mask=here)
    if chunk == 0:
        tl.store(offsets + names, start, mask=names < experts)
        tl.store(offsets + experts, tl.sum(room, 0))
"""

CHOOSE_EXPERTS = f"""{HEAD}

@triton.jit
def choose_experts(s, bias, e, rows, groups, size, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
                   K: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g, j, lane = tl.arange(0, GROUPS), tl.arange(0, SIZE), tl.arange(0, GROUPS * SIZE)
    name = g[:, None] * size + j[None, :]
    there = (g < groups)[:, None] & (j < size)[None, :]
    at = r.to(tl.int64)[:, None, None] * (groups * size) + name[None, :, :]
    v = tl.load(s + at, mask=(r < rows)[:, None, None] & there[None, :, :], other=0.0)
    v += tl.load(bias + name, mask=there, other=0.0)[None, :, :]
    v = tl.where(v == v, v, float("inf"))
    v = tl.where(there[None, :, :], v, float("-inf"))
    if KEPT < GROUPS:
        score = tl.max(v, 2)
        if SIZE > 1:
            best = tl.argmax(v, 2)
            others = tl.where(j[None, None, :] == best[:, :, None], float("-inf"), v)
            score += tl.max(others, 2)
        keep = tl.zeros((ROWS, GROUPS), tl.int32)
        for _ in tl.static_range(KEPT):
            hit = g[None, :] == tl.argmax(score, 1)[:, None]
            keep = tl.where(hit, 1, keep)
            score = tl.where(hit, float("-inf"), score)
        v = tl.where((keep > 0)[:, :, None], v, float("-inf"))
    flat = tl.reshape(v, (ROWS, GROUPS * SIZE))
    for i in tl.static_range(K):
        top = tl.argmax(flat, 1)
        tl.store(e + r.to(tl.int64) * K + i, top // SIZE * size + top % SIZE, mask=r < rows)
        flat = tl.where(lane[None, :] == top[:, None], float("-inf"), flat)
"""
