"""The kernels that sum over the pairs of a token: the mix, and the gradients of tokens.

    y[i]  = Σ over the pairs (i, j) of a[i, j] · (x_j W[c] + b[c])   the mix (`token_sums`)
    dx[t] = Σ over the pairs of token t of g W[c]ᵀ                   its gradient (`token_sums`)
    dx[t] = Σ over the pairs of token t of g                         without a table (`pair_sums`)

where g is the gradient of a projected row, which `pair_kernels` has written.

A program takes a group of tokens and a part of the batch, and walks over the classes in which these
tokens have pairs. Three properties make this fast:

- *Groups.* A tile has BLOCK_M rows, which is more than a small batch has samples. So a program
  takes several tokens that are neighbours on the grid. They have nearly the same classes, and a
  matrix that has been loaded serves all of them (`tables.Groups`).
- *A flat loop.* A step of the loop is one block of the channels of one class. The loads of the next
  class then begin while the current one is still being multiplied. With two nested loops, the
  pipeline of loads would run empty at every class.
- *No atomics.* Each sum is computed by one program in one order, so equal inputs give equal bits.
  Where there are too few programs to fill the GPU, the classes of a group are divided over several,
  each of which writes a sum of its own; `launch` adds these up. An atomic addition would write as
  much, in an order that differs from run to run.

Shapes in comments: R rows (BLOCK_M), N columns (N1 or N2), k channels of a step (BLOCK_K). See
`tile_math` for the names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import columns_of_heads, load, multiply, split_heads

__all__ = ["pair_sums", "rows_of_group", "token_sums"]


@triton.jit
def rows_of_group(members, size, batch, part_batch, parts, program, BLOCK_M: tl.constexpr):
    """Divide the rows of a tile into (token of the group, sample of the part of the batch).

    Returns the group, and for each row: its index in the group, its sample, its token, and whether
    it exists.
    """
    group = program // parts
    m = tl.arange(0, BLOCK_M)
    member = m // part_batch
    b = (program % parts) * part_batch + m - member * part_batch
    valid = (member < size) & (b < batch)
    token = tl.load(members + group * size + member, mask=valid, other=-1)
    return group, member, b, token, valid & (token >= 0)


@triton.jit
def _weights_of(
    weight, link, head, heads, by_head, SUMS: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    """Load the attention weights of the pairs of an entry, [R, heads of the block]."""
    h = head + tl.arange(0, N // D)
    return tl.load(
        (weight + link)[:, None] + h[None, :] * by_head,
        mask=(link >= 0)[:, None] & (h[None, :] < heads), other=0.0,
    ).to(SUMS)  # fmt: skip


@triton.jit
def _add_weighted(
    y, part, bias, weights, cls, n, exists, columns,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """y + weights · (part + bias[class]), with one weight per row and head: [R, N]."""
    if HAS_BIAS:
        part += tl.load(bias + cls * columns + n, mask=exists, other=0.0).to(SUMS)[None, :]
    return y + tl.reshape(split_heads(part, BLOCK_M, N, D) * weights[:, :, None], (BLOCK_M, N))


@triton.jit(
    do_not_specialize=[
        "batch",
        "part_batch",
        "parts",
        "tokens",
        "others",
        "heads",
        "width",
        "first_row",
        "n_keys",
        "size",
    ],
    do_not_specialize_on_alignment=["spans", "spans_2"],
)
def token_sums(
    rows, w, bias, a, out, members, classes, links, spans,
    rows_2, w_2, out_2, members_2, classes_2, links_2, spans_2,
    batch, part_batch, parts, tokens, others, channels, columns, heads, width, first_row,
    n_keys, size, column_parts,
    BOTH: tl.constexpr, BY_PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, TIGHT: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, LONG: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (group of tokens · part of the batch · part of the columns, part of the entries).

    An *entry* is one class for all tokens of a group. `spans` says which entries a group has,
    `classes` their classes, and `links` the pair (or the other token) that each token of the group
    has in an entry, -1 for none.

    WEIGHTED computes the mix: out[part, b, token] = Σ over the token's pairs of
    a · (row W[class] + bias), where `rows` are the other tokens of the pairs
    [batch, others, channels] and a is [batch, heads, tokens, n_keys].

    BY_PAIR computes a gradient: out[b, token] += Σ over the token's pairs of row W[class]ᵀ, where
    `rows` has one row per pair and sample, beginning with `first_row`.

    With BOTH, one launch computes the gradients of queries and keys (the arguments with _2): the
    second axis of the programs is the side. Two launches would each leave part of the GPU idle
    while their last programs run.
    """
    z = tl.program_id(1)
    splits = tl.num_programs(1)
    column_part = tl.program_id(0) % column_parts
    if BOTH:
        if z == 1:
            rows = rows_2
            w = w_2
            out = out_2
            members = members_2
            classes = classes_2
            links = links_2
            spans = spans_2
        z = 0
        splits = 1
    group, member, b, token, valid = rows_of_group(
        members, size, batch, part_batch, parts, tl.program_id(0) // column_parts, BLOCK_M
    )
    head1 = column_part * ((N1 + N2) // D)
    head2 = head1 + N1 // D
    if WEIGHTED:
        n1, mask1 = columns_of_heads(head1, heads, width, N1, D, TIGHT)
        if N2 > 0:
            n2, mask2 = columns_of_heads(head2, heads, width, N2, D, TIGHT)
        weight = a + ((b.to(tl.int64) * heads) * tokens + token) * n_keys
        by_head = (tokens * n_keys).to(tl.int64)
    else:
        n1 = column_part * (N1 + N2) + tl.arange(0, N1)
        mask1 = n1 < columns
        if N2 > 0:
            n2 = column_part * (N1 + N2) + N1 + tl.arange(0, N2)
            mask2 = n2 < columns
    begin = tl.load(spans + 2 * group)
    count = tl.load(spans + 2 * group + 1) - begin
    per_part = tl.cdiv(count, splits)
    begin += z * per_part
    count = tl.minimum(per_part, count - z * per_part)
    if LONG:
        stride = (channels + 0).to(tl.int64)
    else:
        stride = channels
    y1 = tl.zeros((BLOCK_M, N1), SUMS)
    part1 = tl.zeros((BLOCK_M, N1), SUMS)
    if N2 > 0:
        y2 = tl.zeros((BLOCK_M, N2), SUMS)
        part2 = tl.zeros((BLOCK_M, N2), SUMS)
    if WEIGHTED:
        # Weights are loaded one entry before they are used, and the links that say where they are
        # one entry before that. Otherwise each entry would wait for two loads in turn.
        end = begin + count
        next_link = tl.load(
            links + begin * size + member, mask=valid & (begin + 0 * member < end), other=-1
        )
        weights1 = _weights_of(weight, next_link, head1, heads, by_head, SUMS, N1, D)
        if N2 > 0:
            weights2 = _weights_of(weight, next_link, head2, heads, by_head, SUMS, N2, D)
        next_link = tl.load(
            links + (begin + 1) * size + member,
            mask=valid & (begin + 1 + 0 * member < end),
            other=-1,
        )
    for step in range(0, count * STEPS):
        entry = begin + step // STEPS
        k = (step % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < channels
        cls = tl.load(classes + entry)
        link = tl.load(links + entry * size + member, mask=valid, other=-1)
        present = link >= 0
        if BY_PAIR:
            offset = (link * batch + (b - first_row)) * stride
        else:
            offset = (b * others + link) * stride
        # r [R, k]
        r = load(
            rows + offset[:, None] + k[None, :], present[:, None], k_mask[None, :], True, not EVEN_K
        )
        matrix = w + cls.to(tl.int64) * channels * columns
        # m [k, N]. BY_PAIR multiplies by the transpose: the table is [classes, columns, channels],
        # in terms of this product.
        if BY_PAIR:
            p1 = matrix + k[:, None] + n1[None, :] * channels
        else:
            p1 = matrix + k[:, None] * columns + n1[None, :]
        m = load(p1, k_mask[:, None], mask1[None, :], not EVEN_K, not EVEN_N)
        part1 = multiply(r, m, part1, SUMS, PRECISION, UPCAST)
        if N2 > 0:
            if BY_PAIR:
                p2 = matrix + k[:, None] + n2[None, :] * channels
            else:
                p2 = matrix + k[:, None] * columns + n2[None, :]
            m = load(p2, k_mask[:, None], mask2[None, :], not EVEN_K, not EVEN_N)
            part2 = multiply(r, m, part2, SUMS, PRECISION, UPCAST)
        if WEIGHTED:
            if step % STEPS == STEPS - 1:  # the last step of this class
                y1 = _add_weighted(
                    y1,
                    part1,
                    bias,
                    weights1,
                    cls,
                    n1,
                    mask1,
                    columns,
                    HAS_BIAS,
                    SUMS,
                    BLOCK_M,
                    N1,
                    D,
                )
                part1 = tl.zeros((BLOCK_M, N1), SUMS)
                weights1 = _weights_of(weight, next_link, head1, heads, by_head, SUMS, N1, D)
                if N2 > 0:
                    y2 = _add_weighted(
                        y2, part2, bias, weights2, cls, n2, mask2, columns, HAS_BIAS, SUMS, BLOCK_M,
                        N2, D,
                    )  # fmt: skip
                    part2 = tl.zeros((BLOCK_M, N2), SUMS)
                    weights2 = _weights_of(weight, next_link, head2, heads, by_head, SUMS, N2, D)
                next_link = tl.load(
                    links + (entry + 2) * size + member,
                    mask=valid & (entry + 2 + 0 * member < end),
                    other=-1,
                )
    if not WEIGHTED:
        y1 = part1
        if N2 > 0:
            y2 = part2
    cell = out + ((z * batch + b).to(tl.int64) * tokens + token) * columns
    mask = valid[:, None] & mask1[None, :]
    if BY_PAIR:
        y1 += tl.load(cell[:, None] + n1[None, :], mask=mask, other=0.0).to(SUMS)
    tl.store(cell[:, None] + n1[None, :], y1.to(out.dtype.element_ty), mask=mask)
    if N2 > 0:
        mask = valid[:, None] & mask2[None, :]
        if BY_PAIR:
            y2 += tl.load(cell[:, None] + n2[None, :], mask=mask, other=0.0).to(SUMS)
        tl.store(cell[:, None] + n2[None, :], y2.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "batch",
        "part_batch",
        "parts",
        "tokens",
        "first_row",
        "size",
        "column_parts",
    ],
    do_not_specialize_on_alignment=["spans"],
)
def pair_sums(
    rows, out, members, links, spans, batch, part_batch, parts, tokens, columns, first_row, size,
    column_parts,
    SUMS: tl.constexpr, LONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to out[b, token] the rows of its pairs: the gradient of a side without a table.

    Programs: group of tokens · part of the batch · part of the columns.
    """
    group, member, b, token, valid = rows_of_group(
        members, size, batch, part_batch, parts, tl.program_id(0) // column_parts, BLOCK_M
    )
    n = (tl.program_id(0) % column_parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < columns
    cell = out + (b.to(tl.int64) * tokens + token)[:, None] * columns + n[None, :]
    y = tl.load(cell, mask=valid[:, None] & exists[None, :], other=0.0).to(SUMS)
    for entry in range(tl.load(spans + 2 * group), tl.load(spans + 2 * group + 1)):
        link = tl.load(links + entry * size + member, mask=valid, other=-1)
        offset = link * batch + (b - first_row)
        if LONG:
            offset = offset.to(tl.int64)
        y += tl.load(
            rows + (offset * columns)[:, None] + n[None, :],
            mask=(link >= 0)[:, None] & exists[None, :], other=0.0,
        ).to(SUMS)  # fmt: skip
    tl.store(cell, y.to(out.dtype.element_ty), mask=valid[:, None] & exists[None, :])
