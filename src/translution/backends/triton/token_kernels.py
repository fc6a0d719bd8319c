"""The kernels that sum over the pairs of a token: the mix, and the gradients of tokens.

A program takes one group of tokens and a part of the batch, and walks the classes that the group's
tokens have pairs in. The loop is flat: a step is one part of the channels of one class, so that the
loads of the next class begin while this one is still being multiplied (two nested loops would drain
the pipeline at every class). No atomics: one program makes each sum, in one order, so that equal
inputs give equal bits. See `tile_math` for the vocabulary and `tables.Groups` for the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import columns_of_heads, load, multiply, split_heads

__all__ = ["pair_sums", "rows_of_group", "token_sums"]


@triton.jit
def rows_of_group(members, size, batch, part_batch, parts, program, BLOCK_M: tl.constexpr):
    """The rows of a tile are (token of the group, sample of this part of the batch).

    Returns the group, and of each row its place in the group, its sample, its token, and whether it
    exists.
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
    """The attention weights [BLOCK_M, heads of the block] of an entry's pairs."""
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
    """y + weights · (part + bias[class]), a weight for each head."""
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

    WEIGHTED, the mix: out[part, b, token] = Σ over the token's pairs of a · (row W[class] + bias),
    the row being that of the pair's other token, a [batch, heads, tokens, n_keys].

    BY_PAIR, a gradient: out[b, token] += Σ of row W[class]ᵀ, the row being that of the pair, from
    `first_row` on. With BOTH the second axis of the programs is the side (query, key) instead,
    so that one launch fills the machine with both.

    An entry is one class for all tokens of a group; `links` names the pair (or other token) that
    each of them has there, -1 for none.
    """
    z = tl.program_id(1)
    splits = tl.num_programs(1)
    across = tl.program_id(0) % column_parts
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
    head1 = across * ((N1 + N2) // D)
    head2 = head1 + N1 // D
    if WEIGHTED:
        n1, in1 = columns_of_heads(head1, heads, width, N1, D, TIGHT)
        if N2 > 0:
            n2, in2 = columns_of_heads(head2, heads, width, N2, D, TIGHT)
        weight = a + ((b.to(tl.int64) * heads) * tokens + token) * n_keys
        by_head = (tokens * n_keys).to(tl.int64)
    else:
        n1 = across * (N1 + N2) + tl.arange(0, N1)
        in1 = n1 < columns
        if N2 > 0:
            n2 = across * (N1 + N2) + N1 + tl.arange(0, N2)
            in2 = n2 < columns
    begin = tl.load(spans + 2 * group)
    count = tl.load(spans + 2 * group + 1) - begin
    each = tl.cdiv(count, splits)
    begin += z * each
    count = tl.minimum(each, count - z * each)
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
        # the weights of an entry, and the links of the next, are read an entry ahead of their use
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
        there = k < channels
        cls = tl.load(classes + entry)
        link = tl.load(links + entry * size + member, mask=valid, other=-1)
        here = link >= 0
        if BY_PAIR:
            offset = (link * batch + (b - first_row)) * stride
        else:
            offset = (b * others + link) * stride
        r = load(
            rows + offset[:, None] + k[None, :], here[:, None], there[None, :], True, not EVEN_K
        )
        matrix = w + cls.to(tl.int64) * channels * columns
        if BY_PAIR:  # the transpose: the table is [classes, columns, channels] of this product
            p1 = matrix + k[:, None] + n1[None, :] * channels
        else:
            p1 = matrix + k[:, None] * columns + n1[None, :]
        m = load(p1, there[:, None], in1[None, :], not EVEN_K, not EVEN_N)
        part1 = multiply(r, m, part1, SUMS, PRECISION, UPCAST)
        if N2 > 0:
            if BY_PAIR:
                p2 = matrix + k[:, None] + n2[None, :] * channels
            else:
                p2 = matrix + k[:, None] * columns + n2[None, :]
            m = load(p2, there[:, None], in2[None, :], not EVEN_K, not EVEN_N)
            part2 = multiply(r, m, part2, SUMS, PRECISION, UPCAST)
        if WEIGHTED:
            if step % STEPS == STEPS - 1:  # this class is done
                y1 = _add_weighted(
                    y1, part1, bias, weights1, cls, n1, in1, columns, HAS_BIAS, SUMS, BLOCK_M, N1, D
                )
                part1 = tl.zeros((BLOCK_M, N1), SUMS)
                weights1 = _weights_of(weight, next_link, head1, heads, by_head, SUMS, N1, D)
                if N2 > 0:
                    y2 = _add_weighted(
                        y2, part2, bias, weights2, cls, n2, in2, columns, HAS_BIAS, SUMS, BLOCK_M,
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
    mask = valid[:, None] & in1[None, :]
    if BY_PAIR:
        y1 += tl.load(cell[:, None] + n1[None, :], mask=mask, other=0.0).to(SUMS)
    tl.store(cell[:, None] + n1[None, :], y1.to(out.dtype.element_ty), mask=mask)
    if N2 > 0:
        mask = valid[:, None] & in2[None, :]
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
    """out[b, token] += Σ of the rows of its pairs: the gradient of a side without a table.

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
