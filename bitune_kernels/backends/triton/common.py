"""What the attention kernels share: tiles of rows, scores, and which keys a query sees.

``stride_x`` is x's (row, head, dim), in elements. What is None when a kernel is launched isn't compiled into it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan import SegmentPlan
from .. import schedule
from .tiles import block_dim

LOG2E = tl.constexpr(1.4426950408889634)

# A layer's weight is an element of the tensor of all layers' weights: only every fourth one is aligned to 16 bytes, and
# Triton would compile each kernel for both.
WEIGHTS = ["alpha_k", "alpha_v", "beta"]

CAUSAL = tl.constexpr(schedule.CAUSAL)
ANTI_CAUSAL = tl.constexpr(schedule.ANTI_CAUSAL)
AFTER = tl.constexpr(schedule.AFTER)
NONE = tl.constexpr(schedule.NONE)


@triton.constexpr_function
def at(columns, name):
    """Where a row of a schedule has the number of this name; ``columns`` is a constant of the kernel's own file.

    Triton compares each global constant of a kernel at each launch: one for all names costs 1 us, one for each 18.
    """
    return columns.index(name)


@triton.jit
def load_rows(ptr, rows, strides, valid, DIM: tl.constexpr, ALL: tl.constexpr = False):
    """[len(rows), block_dim(DIM)] of rows of a tensor, 0 where not ``valid`` and beyond DIM. ALL: every row is valid.

    strides: of rows first, of dims last. ``rows`` count from ``ptr``, near enough for offsets of 32 bits
    (``tiles.near``): what is far away, a sample or a tile in a long batch, must be in ``ptr``, which costs one register
    instead of two per element.
    """
    BLOCK_DIM: tl.constexpr = block_dim(DIM)
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + (rows[:, None] * strides[0] + dims[None, :] * strides[-1])
    if ALL and BLOCK_DIM == DIM:
        return tl.load(pointers)
    elif ALL:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    elif BLOCK_DIM == DIM:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, strides, values, valid, DIM: tl.constexpr):
    """The inverse of ``load_rows``, rounded to the tensor's dtype."""
    dims = tl.arange(0, block_dim(DIM))
    pointers = ptr + (rows[:, None] * strides[0] + dims[None, :] * strides[-1])
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


@triton.jit
def mix(causal, bidir, alpha):
    """(1 - alpha) causal + alpha bidir in float32, rounded to the dtype of causal as a cache would hold it."""
    mixed = (1.0 - alpha) * causal.to(tl.float32) + alpha * bidir.to(tl.float32)
    return mixed.to(causal.dtype)


@triton.jit
def load_keys(ptr, first, length, strides, mixing, DIM: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """BLOCK keys or values from the ``first`` one on, of a run of ``length`` that begins at ``ptr``.

    mixing: None, or of the mixed prompt, whose bidirectional rows are at ``ptr``: (elements to the causal ones, alpha).
    """
    near = tl.arange(0, BLOCK)
    there = first + near < length
    ptr += first.to(tl.int64) * strides[0]
    tile = load_rows(ptr, near, strides, there, DIM, ALL)
    if mixing is not None:
        to_causal, alpha = mixing
        causal = load_rows(ptr + to_causal, near, strides, there, DIM, ALL)
        tile = mix(causal, tile, alpha)
    return tile


@triton.jit
def tanh(x):
    """By exp2 where that is exact, by its series around 0. (libdevice.tanh doesn't run in the interpreter.)"""
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * -0.05396825397)))
    large = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    return tl.where(size < 0.15, series, tl.where(x < 0, -large, large))


@triton.jit
def visible(position, first, length, mask, window):
    """[low, high): which of ``length`` keys, at positions first, first + 1, .., a query at ``position`` sees."""
    own = position - first
    low = tl.where(mask == ANTI_CAUSAL, own, tl.where(mask == AFTER, own + 1, 0))
    high = tl.where(mask == CAUSAL, own + 1, length)
    if window is not None:
        low = tl.maximum(low, own - window + 1)
        high = tl.minimum(high, own + window)
    low = tl.minimum(tl.maximum(low, 0), length)
    high = tl.maximum(tl.minimum(high, length), low)
    return low, tl.where(mask == NONE, low, high)


@triton.jit
def split(low_first, low_last, high_first, high_last, BLOCK: tl.constexpr):
    """Of the tiles of BLOCK that hold something visible to a tile of rows, which need no mask.

    The arguments are the bounds of its first and its last row; bounds never decrease from row to row. Returns
    multiples of BLOCK: tiles [whole, rest) are visible to every row, [start, whole) and [rest, stop) to some.
    """
    start = low_first // BLOCK * BLOCK
    stop = tl.where(high_last > low_first, tl.cdiv(high_last, BLOCK) * BLOCK, start)
    whole = tl.minimum(tl.cdiv(low_last, BLOCK) * BLOCK, stop)
    rest = tl.maximum(high_first // BLOCK * BLOCK, whole)
    return start, whole, rest, stop


@triton.jit
def seen_by_rows(positions, keys_position, length, mask, window, BLOCK: tl.constexpr):
    """Of a run of keys: ``visible`` to each of a tile's rows, and its tiles of BLOCK by ``split``.

    positions: of each row, of the first and of the last one.
    """
    position, first, last = positions
    low_first, high_first = visible(first, keys_position, length, mask, window)
    low_last, high_last = visible(last, keys_position, length, mask, window)
    bounds = split(low_first, low_last, high_first, high_last, BLOCK)
    return visible(position, keys_position, length, mask, window), bounds


@triton.jit
def tokens_of(block, length, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Token of each packed row of a tile, and the tile's first and last token.

    Rows beyond the segment repeat its last token, so that they see what some row sees: their results aren't stored.
    """
    last = tl.maximum(length - 1, 0)
    first_token = block * BLOCK // GROUP
    last_token = tl.minimum((block * BLOCK + BLOCK - 1) // GROUP, last)
    token = (block * BLOCK + tl.arange(0, BLOCK)) // GROUP
    return tl.minimum(token, last), first_token, last_token


@triton.jit
def rows_of(item_block, length, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """For the memory of a tile's packed rows: tokens from its first one, heads of the group, and which rows exist.

    Call it again wherever rows are loaded or stored. The tile's number is read anew each time (volatile): otherwise
    the compiler keeps every row's offsets over the loops between, and has too few registers for those.
    """
    block = tl.load(item_block, volatile=True)
    token, first_token, _ = tokens_of(block, length, GROUP, BLOCK)
    row = block * BLOCK + tl.arange(0, BLOCK)
    return token - first_token, row % GROUP, row < length * GROUP


def launch_arguments(q, k, v, alpha_k, alpha_v, beta, prefix, plan: SegmentPlan, softmax_scale, window, softcap):
    """What all attention kernels are launched with, by name."""
    heads_kv, (k_prefix, v_prefix) = k.shape[1], prefix or (None, None)
    if q.shape[0] != k.shape[0]:
        beta = None  # the answer's rows alone
    return dict(
        q=q,
        k=k,
        v=v,
        alpha_k=alpha_k,
        alpha_v=alpha_v,
        beta=beta,
        k_prefix=k_prefix,
        v_prefix=v_prefix,
        stride_q=q.stride(),
        stride_k=k.stride(),
        stride_v=v.stride(),
        stride_kp=prefix and k_prefix.stride(),
        stride_vp=prefix and v_prefix.stride(),
        num_prompt=plan.num_prompt,
        scale=softmax_scale,
        softcap=softcap,
        window=window,
        HEADS_KV=heads_kv,
        GROUP=q.shape[1] // heads_kv,
        DIM=q.shape[2],
        DIM_V=v.shape[2],
        ALPHA_PER_HEAD=alpha_k is not None and alpha_k.ndim == 1,
        BETA_PER_HEAD=beta is not None and beta.ndim == 1,
    )
