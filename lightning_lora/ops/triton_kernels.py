"""Triton kernels that read what is large once: all that is small meets it there.

Tiles are (tokens, columns), ranks are filled up with zeros to what tensor cores take. What is summed over tokens
or columns is split into parts, whose number depends on shapes alone and which are added in order: the same inputs give
the same bits. Sums are taken in float32. Imported only where there are Triton and a device for it.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl

FEW_RANKS = 32  # with more, a tile takes more registers and shared memory than every GPU has: kernels get smaller ones


@triton.jit
def keep_kernel(mask, seed, groups, dropped, BLOCK: tl.constexpr):
    """A mask, eight bytes of which come of 128 random bits: 1 where sixteen of these are no less than `dropped`."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, second = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), first, second, first * 0, first * 0)
    low = _two_bytes(a, dropped) | (_two_bytes(b, dropped) << 16)
    high = _two_bytes(c, dropped) | (_two_bytes(d, dropped) << 16)
    tl.store(mask + group, low | (high << 32), mask=group < groups)


@triton.jit
def _two_bytes(bits, dropped):
    first, second = (bits & 0xFFFF) >= dropped, (bits >> 16) >= dropped
    return first.to(tl.int64) | (second.to(tl.int64) << 8)


@triton.jit
def down_kernel(
    x, mask, A, parts,
    tokens, columns, x_stride, A_stride, span,
    R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One part (tokens, R) of what a mask keeps of x times Aᵀ: the part of `span` columns."""
    row, rank = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    part = tl.program_id(1)
    inside, of_rank = row[:, None] < tokens, rank[:, None] < R
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    for start in range(part * span, min((part + 1) * span, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = inside & (column[None, :] < columns)
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there, other=0.0)
        keep = tl.load(mask + row[:, None] * columns + column[None, :], mask=there, other=0)
        values = tl.where(keep != 0, values, 0.0).to(values.dtype)
        a = tl.load(
            A + rank[:, None] * A_stride + column[None, :], mask=of_rank & (column[None, :] < columns), other=0.0
        )
        total = tl.dot(values, tl.trans(a), total, input_precision="ieee")
    place = (part * tokens + row[:, None]) * R + rank[None, :]
    tl.store(parts + place, total, mask=inside & (rank[None, :] < R))


@triton.jit
def up_kernel(
    product, out, factor, h, B, bias,
    tokens, columns, product_stride, out_stride, h_stride, B_stride,
    KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A product times a factor of its columns, and with KEEP the product itself, and h Bᵀ, and a bias."""
    row, rank = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_column, of_rank, inside = column < columns, rank < R, row < tokens
    there = inside[:, None] & of_column[None, :]
    values = tl.load(product + row[:, None] * product_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    low = tl.load(h + row[:, None] * h_stride + rank[None, :], mask=inside[:, None] & of_rank[None, :], other=0.0)
    b = tl.load(B + column[:, None] * B_stride + rank[None, :], mask=of_column[:, None] & of_rank[None, :], other=0.0)
    by = tl.load(factor + column, mask=of_column, other=0.0).to(tl.float32)
    small = values * by[None, :] + tl.dot(low, tl.trans(b), input_precision="ieee")
    if HAS_BIAS:
        small += tl.load(bias + column, mask=of_column, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        small += values
    tl.store(out + row[:, None] * out_stride + column[None, :], small.to(out.dtype.element_ty), mask=there)


@triton.jit
def outputs_kernel(
    dy, y, factor, scaled, h, B, dh_parts, dB_parts, products, sums,
    tokens, columns, dy_stride, y_stride, h_stride, B_stride, span,
    HAS_Y: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SUMS: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All that is made of a gradient of outputs, of `span` tokens and some columns: parts of dy B and of dyᵀ h.

    And parts of the columns' sums of dy times y, and of dy; and dy times a factor of its columns, with KEEP and itself.
    """
    part, block = tl.program_id(0), tl.program_id(1)
    column, rank = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    of_column, of_rank = column < columns, rank < R
    of_B = of_rank[:, None] & of_column[None, :]
    b = tl.load(B + column[None, :] * B_stride + rank[:, None], mask=of_B, other=0.0)
    if HAS_FACTOR:
        by = tl.load(factor + column, mask=of_column, other=0.0).to(tl.float32)
        by = by + 1.0 if KEEP else by
    dB = tl.zeros((RANKS, COLUMNS), tl.float32)
    product, total = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(part * span, min((part + 1) * span, tokens), TOKENS):
        row = start + tl.arange(0, TOKENS).to(tl.int64)
        inside = row < tokens
        there, of_h = inside[:, None] & of_column[None, :], of_rank[:, None] & inside[None, :]
        values = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=there, other=0.0)
        low = tl.load(h + row[None, :] * h_stride + rank[:, None], mask=of_h, other=0.0)
        dB = tl.dot(low, values, dB, input_precision="ieee")
        dh = tl.dot(b, tl.trans(values), input_precision="ieee")
        tl.store(dh_parts + (block * tokens + row[None, :]) * R + rank[:, None], dh, mask=of_h)
        wide = values.to(tl.float32)
        if HAS_Y:
            of_y = tl.load(y + row[:, None] * y_stride + column[None, :], mask=there, other=0.0)
            product += tl.sum(wide * of_y.to(tl.float32), 0)
        if HAS_SUMS:
            total += tl.sum(wide, 0)
        if HAS_FACTOR:
            place = row[:, None] * columns + column[None, :]
            tl.store(scaled + place, (wide * by[None, :]).to(scaled.dtype.element_ty), mask=there)
    tl.store(dB_parts + (part * columns + column[None, :]).to(tl.int64) * R + rank[:, None], dB, mask=of_B)
    if HAS_Y:
        tl.store(products + part * columns + column, product, mask=of_column)
    if HAS_SUMS:
        tl.store(sums + part * columns + column, total, mask=of_column)


@triton.jit
def inputs_kernel(
    x, mask, dh, A, dx, dA_parts,
    tokens, columns, x_stride, dh_stride, A_stride, span,
    HAS_DX: tl.constexpr, HAS_DA: tl.constexpr,
    R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a mask keeps of dh A, and a part of dhᵀ times what it keeps of x: of `span` tokens and some columns."""
    part, block = tl.program_id(0), tl.program_id(1)
    column, rank = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    of_column, of_rank = column < columns, rank < R
    of_A = of_rank[:, None] & of_column[None, :]
    a = tl.load(A + rank[:, None] * A_stride + column[None, :], mask=of_A, other=0.0)
    dA = tl.zeros((RANKS, COLUMNS), tl.float32)
    for start in range(part * span, min((part + 1) * span, tokens), TOKENS):
        row = start + tl.arange(0, TOKENS).to(tl.int64)
        inside = row < tokens
        there = inside[:, None] & of_column[None, :]
        low = tl.load(dh + row[:, None] * dh_stride + rank[None, :], mask=inside[:, None] & of_rank[None, :], other=0.0)
        place = row[:, None] * columns + column[None, :]
        keep = tl.load(mask + place, mask=there, other=0) != 0
        if HAS_DA:
            values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there, other=0.0)
            dA = tl.dot(tl.trans(low), tl.where(keep, values, 0.0).to(values.dtype), dA, input_precision="ieee")
        if HAS_DX:
            product = tl.where(keep, tl.dot(low, a, input_precision="ieee"), 0.0)
            tl.store(dx + place, product.to(dx.dtype.element_ty), mask=there)
    if HAS_DA:
        place = (part * R + rank[:, None]).to(tl.int64) * columns + column[None, :]
        tl.store(dA_parts + place, dA, mask=of_A)


@triton.jit
def sum_kernel(parts, out, size, width, number, out_stride, scale, BLOCK: tl.constexpr):
    """Adds parts of `size` values in order, times a scale, into rows of `width` values that may lie apart."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(number):
        total += tl.load(parts + tl.cast(i, tl.int64) * size + index, mask=there, other=0.0)
    place = index // width * out_stride + index % width
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=there)


@triton.jit
def norms_kernel(
    W, A, rest, B, gram, squares, norms,
    rows, columns, W_stride, scale,
    HAS_REST: tl.constexpr, HAS_SQUARES: tl.constexpr,
    R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Norms of the rows of W + s B A, from A, what a cast of it has left, and A Aᵀ."""
    row, rank = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    inside, of_rank = row < rows, rank < R
    cross, square = tl.zeros((ROWS, RANKS), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        of_column = column < columns
        there, of_A = inside[:, None] & of_column[None, :], of_rank[:, None] & of_column[None, :]
        w = tl.load(W + row[:, None] * W_stride + column[None, :], mask=there, other=0.0)
        a = tl.load(A + rank[:, None] * columns + column[None, :], mask=of_A, other=0.0)
        cross = tl.dot(w, tl.trans(a), cross, input_precision="ieee")
        if HAS_REST:
            a = tl.load(rest + rank[:, None] * columns + column[None, :], mask=of_A, other=0.0)
            cross = tl.dot(w, tl.trans(a), cross, input_precision="ieee")
        if not HAS_SQUARES:
            square += tl.sum(w.to(tl.float32) * w.to(tl.float32), 1)
    of_B = inside[:, None] & of_rank[None, :]
    b = tl.load(B + row[:, None] * R + rank[None, :], mask=of_B, other=0.0)
    g = tl.load(gram + rank[:, None] * R + rank[None, :], mask=of_rank[:, None] & of_rank[None, :], other=0.0)
    update = 2 * scale * cross + scale * scale * tl.dot(b, g, input_precision="ieee")
    if HAS_SQUARES:
        square = tl.load(squares + row, mask=inside, other=0.0)
    tl.store(norms + row, tl.sqrt(tl.maximum(square + tl.sum(update * b, 1), 0.0)), mask=inside)


def parts_of(size: int, of: int) -> int:
    """How many parts of a size there are, the last of which may be smaller."""
    return -(-size // of)


def filled_up(r: int) -> int:
    """As many ranks as a tensor core takes."""
    return max(16, 1 << (r - 1).bit_length())


def check(device):
    """Raises whatever a kernel raises on a device: some releases of Triton can add on a new one, and not multiply."""
    x, A = (torch.ones(rows, 64, dtype=torch.float16, device=device) for rows in (32, 16))
    mask = torch.arange(x.numel(), device=device).view_as(x) % 3 != 0
    h = torch.empty(1, 32, 16, device=device)
    down_kernel[(1, 1)](x, mask, A, h, 32, 64, 64, 64, 64, R=16, RANKS=16, TOKENS=32, COLUMNS=64)
    if (wrong := h[0] != (wanted := mask.sum(1, keepdim=True).expand(32, 16))).any():
        raise RuntimeError(f"a kernel gives {h[0][wrong][0]:g} for {wanted[wrong][0]:g}")
