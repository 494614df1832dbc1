"""Triton kernels for the adapter's matrix products with fused dropout: no mask is stored.

    dropped_project   u  = D(x)·Aᵀ            one pass over x
    dropped_outer     gA = guᵀ·D(x)           one pass over x
    add_low_rank      y += c·u·B'ᵀ            one pass over y, three times as fast as cuBLAS at rank 64
    add_dropped       gx += Σ D(gu·A)         one pass over gx, for up to three linear layers with one input

D zeroes an element if 16 bits of a keyed hash of its row and pair of columns are below a threshold; it does not
rescale, the caller's scale does. The hash needs no state, so forward, backward and recomputation get the same mask on
any NVIDIA GPU, whatever the block shape or the number of multiprocessors. Sums are in float32 in a fixed order,
reproducible bit for bit.

Shapes: N rows, I in, O out, r rank; x (N, I), A (r, I), B' (O, r), u and gu (N, r). dtypes: bfloat16, float16 or
float32, all equal. Kernels run on the device of their tensors, which need not be the current one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, RANK = 64, 64, 128  # a block's rows and columns of x, and at most this much of the rank
# Four for each of an H100's 132 multiprocessors, which run at once; fixed, so that sums are the same on every GPU
PROGRAMS = 528


@triton.jit
def _hash(h):
    """A 32-bit hash (lowbias32, with improved constants)."""
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _keep(rows, first_column, key, key2, threshold, COLUMNS: tl.constexpr):
    """Whether the elements (row, column) are kept, of ``COLUMNS`` columns from an even one on. A row and a pair of
    columns are hashed, and once more together: the halves of these 32 bits decide about the pair. Neighbours, rows,
    columns and keys are as independent as draws of a generator; most work is per row or pair, not per element."""
    key, key2 = key.to(tl.uint32), key2.to(tl.uint32)
    lane = tl.arange(0, COLUMNS)
    # halved apart from first_column: the compiler then sees that two columns are one pair, and hashes it once
    pair = ((first_column >> 1) + (lane >> 1)).to(tl.uint32)
    row = _hash(rows.to(tl.uint32) ^ (_hash(key) + key2))
    column = _hash(pair ^ (_hash(key2 + 0x1E3779B9) + key))
    h = (row[:, None] ^ column[None, :]) * 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    h = tl.where((lane & 1 == 1)[None, :], h ^ (h << 16), h)
    return h >= (threshold.to(tl.uint32) << 16)


@triton.jit
def _pointers(x, first, columns, i, ROWS: tl.constexpr):
    """Pointers to x[first : first + ROWS, columns] of x (…, i): 64 bits for the first row, 32 within the block."""
    return x + tl.cast(first, tl.int64) * i + (tl.arange(0, ROWS)[:, None] * i + columns[None, :])


@triton.jit
def _dropped_block(
    x, first, first_column, n, i, key, key2, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """x[first : first + ROWS, first_column : first_column + COLUMNS], 0 for dropped elements and outside of x."""
    rows = first + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < i)[None, :]
    block = tl.load(_pointers(x, first, columns, i, ROWS), mask=inside, other=0.0)
    return tl.where(_keep(rows, first_column, key, key2, threshold, COLUMNS), block, 0.0)


@triton.jit(do_not_specialize=["key", "key2", "threshold"])
def _project(
    x, a, u, n, i, r, key, key2, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for begin in range(0, i, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        block = _dropped_block(x, first, begin, n, i, key, key2, threshold, ROWS, COLUMNS)
        factor = tl.load(
            a + ranks[None, :] * i + columns[:, None], mask=(ranks < r)[None, :] & (columns < i)[:, None], other=0.0
        )
        total = tl.dot(block, factor, total, input_precision="ieee")
    offsets = rows.to(tl.int64)[:, None] * r + ranks[None, :]
    tl.store(u + offsets, total.to(u.dtype.element_ty), mask=(rows < n)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["key", "key2", "threshold"])
def _outer(
    x, gu, parts, n, i, r, rows_per_part, key, key2, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    end = tl.minimum(n, (part + 1) * rows_per_part)
    for begin in range(part * rows_per_part, end, ROWS):
        rows = begin + tl.arange(0, ROWS)
        block = _dropped_block(x, begin, first_column, end, i, key, key2, threshold, ROWS, COLUMNS)
        factor = tl.load(
            gu + rows.to(tl.int64)[None, :] * r + ranks[:, None],
            mask=(rows < end)[None, :] & (ranks < r)[:, None],
            other=0.0,
        )
        total = tl.dot(factor, block, total, input_precision="ieee")
    offsets = part.to(tl.int64) * r * i + ranks[:, None] * i + columns[None, :]
    tl.store(parts + offsets, total, mask=(ranks < r)[:, None] & (columns < i)[None, :])


@triton.jit
def _low_rank_block(
    left, right, rows, columns, n, o, r, right_rank, right_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """(left·right)[rows, columns] of left (n, r) and right (r, o), whose strides are given."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, r, RANK):
        ranks = begin + tl.arange(0, RANK)
        left_block = tl.load(
            left + rows.to(tl.int64)[:, None] * r + ranks[None, :],
            mask=(rows < n)[:, None] & (ranks < r)[None, :],
            other=0.0,
        )
        right_block = tl.load(
            right + ranks[:, None] * right_rank + columns[None, :] * right_column,
            mask=(ranks < r)[:, None] & (columns < o)[None, :],
            other=0.0,
        )
        total = tl.dot(left_block, right_block, total, input_precision="ieee")
    return total


@triton.jit
def _corner(o, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of this program's block of y (…, o). Programs that run at the same time have blocks next to
    each other in memory."""
    blocks = tl.cdiv(o, COLUMNS)
    return tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * COLUMNS


@triton.jit
def _add_to_block(y, total, first, first_column, n, o, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y[first : first + ROWS, first_column : first_column + COLUMNS] += total; summed in float32, rounded once."""
    columns = first_column + tl.arange(0, COLUMNS)
    pointers = _pointers(y, first, columns, o, ROWS)
    inside = (first + tl.arange(0, ROWS) < n)[:, None] & (columns < o)[None, :]
    before = tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, (before.to(tl.float32) + total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    y, left, right, n, o, r, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    first, first_column = _corner(o, ROWS, COLUMNS)
    rows, columns = first + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    total = _low_rank_block(left, right, rows, columns, n, o, r, 1, r, ROWS, COLUMNS, RANK)
    _add_to_block(y, total * scale, first, first_column, n, o, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["key", "key2", "other_key", "other_key2", "third_key", "third_key2", "threshold"])
def _add_dropped(
    y, n, i, r, threshold, left, right, key, key2, other_left, other_right, other_key, other_key2,
    third_left, third_right, third_key, third_key2,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    first, first_column = _corner(i, ROWS, COLUMNS)
    rows, columns = first + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    block = _low_rank_block(left, right, rows, columns, n, i, r, i, 1, ROWS, COLUMNS, RANK)
    total = tl.where(_keep(rows, first_column, key, key2, threshold, COLUMNS), block, 0.0)
    if COUNT > 1:
        block = _low_rank_block(other_left, other_right, rows, columns, n, i, r, i, 1, ROWS, COLUMNS, RANK)
        total += tl.where(_keep(rows, first_column, other_key, other_key2, threshold, COLUMNS), block, 0.0)
    if COUNT > 2:
        block = _low_rank_block(third_left, third_right, rows, columns, n, i, r, i, 1, ROWS, COLUMNS, RANK)
        total += tl.where(_keep(rows, first_column, third_key, third_key2, threshold, COLUMNS), block, 0.0)
    _add_to_block(y, total, first, first_column, n, i, ROWS, COLUMNS)


def keys(seed: Tensor) -> tuple[int, int]:
    """The two int32 keys of a mask, from an int64 seed on the CPU."""
    bits = seed.item() & (2**64 - 1)
    return tuple(half - 2**32 if half >= 2**31 else half for half in (bits >> 32, bits & (2**32 - 1)))


def dropped_project(x: Tensor, a: Tensor, seed: Tensor, drop: int) -> Tensor:
    """D(x)·Aᵀ, (N, r)."""
    (n, i), r = x.shape, len(a)
    u = x.new_empty(n, r)
    rank = _rank_block(r, x)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(r, rank))
    with torch.cuda.device_of(x):
        _project[grid](
            x, a, u, n, i, r, *keys(seed), drop,
            ROWS=ROWS, COLUMNS=COLUMNS, RANK=rank, num_warps=8, num_stages=4 if x.element_size() == 2 else 3,
        )  # fmt: skip
    return u


def dropped_outer(gu: Tensor, x: Tensor, seed: Tensor, drop: int) -> Tensor:
    """guᵀ·D(x), (r, I)."""
    (n, i), r = x.shape, gu.shape[1]
    rank = _rank_block(r, x)
    blocks = triton.cdiv(i, COLUMNS) * triton.cdiv(r, rank)
    rows_per_part = triton.cdiv(triton.cdiv(n, max(PROGRAMS // blocks, 1)), ROWS) * ROWS
    count = triton.cdiv(n, rows_per_part)
    parts = torch.empty(count, r, i, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(i, COLUMNS), count, triton.cdiv(r, rank))
    with torch.cuda.device_of(x):
        _outer[grid](
            x, gu, parts, n, i, r, rows_per_part, *keys(seed), drop,
            ROWS=ROWS, COLUMNS=COLUMNS, RANK=rank, num_warps=4, num_stages=3,
        )  # fmt: skip
    return parts.sum(0).to(x.dtype) if count > 1 else parts[0].to(x.dtype)


def add_dropped(gx: Tensor, branches: list[tuple[Tensor, Tensor, Tensor, int]]) -> Tensor:
    """gx (N, I) += D(gu·A) of every branch (gu, A, seed, drop), in place, in one pass if they have the same rank and
    probability and are at most three."""
    (n, i), r, drop = gx.shape, len(branches[0][1]), branches[0][3]
    if len(branches) > 3 or any(len(a) != r or other != drop for _, a, _, other in branches):
        for branch in branches:
            add_dropped(gx, [branch])
        return gx
    given = [value for gu, a, seed, _ in branches for value in (gu, a, *keys(seed))]
    unused = given[:4] * (3 - len(branches))
    # So that two programs run on a multiprocessor at once; Triton for AMD knows no such option.
    limit = {"maxnreg": 128} if len(branches) > 1 and torch.version.hip is None else {}
    with torch.cuda.device_of(gx):
        _add_dropped[_blocks(n, i)](
            gx, n, i, r, drop, *given, *unused, COUNT=len(branches),
            ROWS=ROWS, COLUMNS=2 * COLUMNS, RANK=min(_rank_block(r, gx), 64), num_warps=8, num_stages=1,
            **limit,
        )  # fmt: skip
    return gx


def add_low_rank(y: Tensor, u: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (N, O) += scale·u·bᵀ, in place."""
    (n, o), r = y.shape, u.shape[1]
    with torch.cuda.device_of(y):
        _add[_blocks(n, o)](
            y, u, b, n, o, r, scale,
            ROWS=ROWS, COLUMNS=2 * COLUMNS, RANK=min(_rank_block(r, y), 64), num_warps=8, num_stages=2,
        )  # fmt: skip
    return y


def _blocks(rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, 2 * COLUMNS),)


def _rank_block(r: int, x: Tensor) -> int:
    """How much of the rank a block takes; of float32 half as much, for GPUs with 99 KiB of shared memory a program."""
    return min(max(triton.next_power_of_2(r), 16), RANK if x.element_size() == 2 else RANK // 2)
