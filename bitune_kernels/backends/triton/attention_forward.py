"""The forward kernel: both prompt streams, the answer over the mixed prompt, and the mixed cache, in one launch.

A program computes one tile of packed query rows (``schedule.py``) for one key/value head:

    for each run of keys (prefix, mixed prompt, the segment's own) and each tile of keys in it:
        s = cap(scale q k^T), -inf where a query doesn't see the key
        m' = max(m, max_j s);  p = exp(s - m');  acc = acc exp(m - m') + p v;  l = l exp(m - m') + sum_j p
    out = acc / l, lse = m + log l      (all exponents in units of log2)

Prompt tiles then write the mixed keys and values of their own tokens: work that is spread over all tiles and waits for
no other program. Answer tiles mix the prompt tiles that they attend to while they hold them, for the same reason.

shared_qkv: the loop over j <= i ends at the diagonal, where acc / l is the causal stream's output; the same acc, m, l
then go on over j > i to the bidirectional one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...plan import SegmentPlan
from .. import schedule
from ..outputs import allocate
from . import tiles
from .common import (
    LOG2E,
    WEIGHTS,
    launch_arguments,
    load_keys,
    load_rows,
    mix,
    rows_of,
    split,
    store_rows,
    tanh,
    tokens_of,
    visible,
)
from .tiles import Tile

# Columns of schedule.FORWARD, in its order.
COLUMNS = tl.constexpr(len(schedule.FORWARD))
Q_ROW, LENGTH, POSITION, BLOCK, OWN_ROW, MASK, MIXED_ROW, MIXED_LENGTH = map(tl.constexpr, range(8))
PREFIX_ROW, PREFIX_LENGTH, OUT_ROW, STREAM_ROW, SECOND_ROW, SECOND_MASK = map(tl.constexpr, range(8, 14))
SECOND_STREAM_ROW, WRITE_ROW, WRITE_LENGTH, WRITE_MIXED = map(tl.constexpr, range(14, 18))

# Mixed rows at a time: few, since all of them and their sources pass through registers.
WRITE_ROWS = tl.constexpr(16)


@triton.jit
def attend_tiles(
    acc,
    m,
    l,
    q,
    k,
    v,
    stride_k_row,
    stride_k_dim,
    stride_v_row,
    stride_v_dim,
    k_to_causal,
    v_to_causal,
    alpha_k,
    alpha_v,
    low,
    high,
    length,
    start,
    stop,
    gap_start,
    gap_stop,
    scale,
    softcap,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    MIX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):
    """The online softmax over the keys [start, stop) of a run, without those of [gap_start, gap_stop)."""
    gap = gap_stop - gap_start
    for i in range(start, stop - gap, BLOCK_N):
        first = i
        if MASKED:
            first += tl.where(i >= gap_start, gap, 0)
        near = tl.arange(0, BLOCK_N)
        j = first + near
        there = j < length
        tile = first.to(tl.int64)
        kt = load_keys(
            k + tile * stride_k_row,
            near,
            stride_k_row,
            stride_k_dim,
            k_to_causal,
            alpha_k,
            there,
            DIM,
            BLOCK_DIM,
            not MASKED,
            MIX,
        )
        s = tl.dot(q, tl.trans(kt), input_precision="ieee")
        # m and the exponents count in log2. A plain positive scale is left to the exponents' multiply-add.
        if HAS_SOFTCAP:
            s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        elif not FOLD_SCALE:
            s = s * (scale * LOG2E)
        unit = scale * LOG2E if FOLD_SCALE else 1.0
        if MASKED:
            s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1) * unit)
        base = m_next
        if MASKED:  # a row that has seen no key yet
            base = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s * unit - base[:, None])
        rescale = tl.exp2(m - base)
        l = l * rescale + tl.sum(p, 1)
        vt = load_keys(
            v + tile * stride_v_row,
            near,
            stride_v_row,
            stride_v_dim,
            v_to_causal,
            alpha_v,
            there,
            DIM_V,
            BLOCK_DIM_V,
            not MASKED,
            MIX,
        )
        acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision="ieee")
        m = m_next
    return acc, m, l


@triton.jit
def attend(
    acc,
    m,
    l,
    q,
    k,
    v,
    stride_k_row,
    stride_k_dim,
    stride_v_row,
    stride_v_dim,
    k_to_causal,
    v_to_causal,
    alpha_k,
    alpha_v,
    position,
    first_position,
    last_position,
    keys_position,
    length,
    mask,
    window,
    scale,
    softcap,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):
    """One run of ``length`` keys: the wholly visible tiles without a mask, those at its ends with one."""
    low_first, high_first = visible(first_position, keys_position, length, mask, window, HAS_WINDOW)
    low_last, high_last = visible(last_position, keys_position, length, mask, window, HAS_WINDOW)
    start, whole, rest, stop = split(low_first, low_last, high_first, high_last, BLOCK_N)
    low, high = visible(position, keys_position, length, mask, window, HAS_WINDOW)
    acc, m, l = attend_tiles(
        acc, m, l, q, k, v, stride_k_row, stride_k_dim, stride_v_row, stride_v_dim, k_to_causal, v_to_causal, alpha_k,
        alpha_v, low, high, length, whole, rest, rest, rest, scale, softcap, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V,
        BLOCK_N, False, MIX, HAS_SOFTCAP, FOLD_SCALE,
    )  # fmt: skip
    acc, m, l = attend_tiles(
        acc, m, l, q, k, v, stride_k_row, stride_k_dim, stride_v_row, stride_v_dim, k_to_causal, v_to_causal, alpha_k,
        alpha_v, low, high, length, start, stop, whole, rest, scale, softcap, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V,
        BLOCK_N, True, MIX, HAS_SOFTCAP, FOLD_SCALE,
    )  # fmt: skip
    return acc, m, l


@triton.jit
def write_rows(
    x,
    written,
    source,
    target,
    there,
    mixed,
    to_causal,
    alpha,
    stride_row,
    stride_dim,
    stride_written_row,
    stride_written_dim,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MIX: tl.constexpr,
):
    """Rows ``source`` of x, or where ``mixed`` the mix of them and their causal ones, to the rows ``target``."""
    tile = load_rows(x, source, stride_row, stride_dim, there, DIM, BLOCK_DIM, False)
    if MIX:
        mixes = tl.where(mixed, there, False)
        causal = load_rows(x + to_causal, source, stride_row, stride_dim, mixes, DIM, BLOCK_DIM, False)
        tile = tl.where(mixed, mix(causal, tile, alpha), tile)
    store_rows(written, target, stride_written_row, stride_written_dim, tile, there, DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["num_prompt", "window"], do_not_specialize_on_alignment=WEIGHTS)
def forward_kernel(
    items,
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    beta,
    sinks,
    k_prefix,
    v_prefix,
    out,
    streams,
    lse,
    k_written,
    v_written,
    slots,
    stride_q_row,
    stride_q_head,
    stride_q_dim,
    stride_k_row,
    stride_k_head,
    stride_k_dim,
    stride_v_row,
    stride_v_head,
    stride_v_dim,
    stride_kp_row,
    stride_kp_head,
    stride_kp_dim,
    stride_vp_row,
    stride_vp_head,
    stride_vp_dim,
    stride_kw_row,
    stride_kw_head,
    stride_kw_dim,
    stride_vw_row,
    stride_vw_head,
    stride_vw_dim,
    num_prompt,
    scale,
    softcap,
    window,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N_MIXED: tl.constexpr,
    PARTS: tl.constexpr,  # 2: a prompt tile computes both streams
    GO_ON: tl.constexpr,  # the second part goes on with the first one's softmax
    MIX: tl.constexpr,  # the answer attends to a mix of two streams
    ALPHA_PER_HEAD: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BETA_PER_HEAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    SAVE: tl.constexpr,  # what the backward needs
    WRITE: tl.constexpr,  # mixed rows (without slots), or rows of a cache (with)
    HAS_SLOTS: tl.constexpr,
):
    """Shapes: q, out [rows, HEADS_KV * GROUP, DIM]; k, v [rows, HEADS_KV, DIM]; lse [rows, HEADS_KV * GROUP]."""
    head = (tl.program_id(0) % HEADS_KV).to(tl.int64)
    item = items + (tl.program_id(0) // HEADS_KV).to(tl.int64) * COLUMNS
    length, block = tl.load(item + LENGTH), tl.load(item + BLOCK)
    first_token = block * BLOCK_M // GROUP
    heads, head_q = HEADS_KV * GROUP, head * GROUP
    k_head, v_head = k + head * stride_k_head, v + head * stride_v_head
    k_to_causal = num_prompt.to(tl.int64) * stride_k_row
    v_to_causal = num_prompt.to(tl.int64) * stride_v_row
    a_k, a_v = 0.0, 0.0
    if MIX:
        a_k = tl.load(alpha_k + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)
        a_v = tl.load(alpha_v + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)

    second_stream_row = tl.load(item + SECOND_STREAM_ROW)

    for part in tl.static_range(PARTS):
        near, of_group, stored = rows_of(item + BLOCK, length, GROUP, BLOCK_M)
        token, _, last_token = tokens_of(tl.load(item + BLOCK, volatile=True), length, GROUP, BLOCK_M)
        own_position = tl.load(item + POSITION)
        position = own_position + token
        first_position, last_position = own_position + first_token, own_position + last_token
        here = stored
        own_row, mask = tl.load(item + OWN_ROW), tl.load(item + MASK)
        mixed_length, prefix_length = tl.load(item + MIXED_LENGTH), tl.load(item + PREFIX_LENGTH)
        q_row = tl.load(item + Q_ROW)
        if part == 1:
            here = tl.where(second_stream_row >= 0, stored, False)
            own_row, mask = tl.load(item + SECOND_ROW), tl.load(item + SECOND_MASK)
            mixed_length, prefix_length = 0, tl.where(second_stream_row >= 0, prefix_length, 0)
            q_row = own_row
        if part == 0 or not GO_ON:
            q_first = q + (q_row + first_token).to(tl.int64) * stride_q_row + head_q * stride_q_head
            q_tile = load_rows(
                q_first + of_group[:, None] * stride_q_head, near, stride_q_row, stride_q_dim, here, DIM, BLOCK_DIM,
                False,
            )  # fmt: skip
            acc = tl.zeros([BLOCK_M, BLOCK_DIM_V], tl.float32)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            if HAS_SINKS:  # one more score, without a value
                m = tl.load(sinks + head_q + of_group).to(tl.float32) * LOG2E
                l += 1.0
            if HAS_PREFIX:
                row = tl.load(item + PREFIX_ROW).to(tl.int64)
                acc, m, l = attend(
                    acc, m, l, q_tile, k_prefix + head * stride_kp_head + row * stride_kp_row,
                    v_prefix + head * stride_vp_head + row * stride_vp_row, stride_kp_row, stride_kp_dim,
                    stride_vp_row, stride_vp_dim, 0, 0, 0.0, 0.0, position, first_position, last_position, 0,
                    prefix_length, 0, window, scale, softcap, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False,
                    HAS_WINDOW, HAS_SOFTCAP, FOLD_SCALE,
                )  # fmt: skip
        if part == 0:
            row = tl.load(item + MIXED_ROW).to(tl.int64)
            acc, m, l = attend(
                acc, m, l, q_tile, k_head + row * stride_k_row, v_head + row * stride_v_row, stride_k_row,
                stride_k_dim, stride_v_row, stride_v_dim, k_to_causal, v_to_causal, a_k, a_v, position, first_position,
                last_position, own_position - mixed_length, mixed_length, 0, window, scale, softcap, DIM, DIM_V,
                BLOCK_DIM, BLOCK_DIM_V, BLOCK_N_MIXED, MIX, HAS_WINDOW, HAS_SOFTCAP, FOLD_SCALE,
            )  # fmt: skip
        row = own_row.to(tl.int64)
        acc, m, l = attend(
            acc, m, l, q_tile, k_head + row * stride_k_row, v_head + row * stride_v_row, stride_k_row, stride_k_dim,
            stride_v_row, stride_v_dim, 0, 0, 0.0, 0.0, position, first_position, last_position, own_position, length,
            mask, window, scale, softcap, DIM, DIM_V, BLOCK_DIM, BLOCK_DIM_V, BLOCK_N, False, HAS_WINDOW, HAS_SOFTCAP,
            FOLD_SCALE,
        )  # fmt: skip

        l = tl.where(l > 0, l, 1.0)  # a row that sees nothing: 0, with lse -inf
        o = acc / l[:, None]
        near, of_group, stored = rows_of(item + BLOCK, length, GROUP, BLOCK_M)
        here = tl.where(second_stream_row >= 0, stored, False) if part == 1 else stored
        stream_row = tl.load(item + STREAM_ROW) if part == 0 else second_stream_row
        first_row = (stream_row + first_token).to(tl.int64) * heads + head_q  # of contiguous tensors [rows, heads, ..]
        rows = near * heads + of_group
        if SAVE:
            tl.store(lse + first_row + rows, (m + tl.log2(l)), mask=here)
        if HAS_BETA:
            if SAVE:
                both = tl.where(second_stream_row >= 0, stored, False)
                store_rows(streams + first_row * DIM_V, rows, DIM_V, 1, o, both, DIM_V, BLOCK_DIM_V)
            if part == 0:
                first_o = o
            else:
                b = tl.load(beta + (head_q + of_group if BETA_PER_HEAD else of_group * 0)).to(tl.float32)[:, None]
                o = tl.where(second_stream_row >= 0, (1.0 - b) * first_o + b * o, first_o)
                first_row = (tl.load(item + OUT_ROW) + first_token).to(tl.int64) * heads + head_q
                store_rows(out + first_row * DIM_V, rows, DIM_V, 1, o, stored, DIM_V, BLOCK_DIM_V)
        else:
            store_rows(out + first_row * DIM_V, rows, DIM_V, 1, o, here, DIM_V, BLOCK_DIM_V)

    if WRITE:
        # Of the tile's tokens, those whose first packed row it has.
        length, write_row = tl.load(item + WRITE_LENGTH), tl.load(item + WRITE_ROW)
        start, stop = tl.cdiv(block * BLOCK_M, GROUP), tl.minimum(tl.cdiv((block + 1) * BLOCK_M, GROUP), length)
        mixed = tl.load(item + WRITE_MIXED) != 0
        from_row = tl.where(mixed, write_row, tl.load(item + OWN_ROW))
        for i in range(start, stop, WRITE_ROWS):
            written = i + tl.arange(0, WRITE_ROWS)
            there = written < stop
            target = (write_row + written).to(tl.int64)
            if HAS_SLOTS:
                target = tl.load(slots + target, mask=there, other=0)
            source = (from_row + written).to(tl.int64)
            write_rows(
                k_head, k_written + head * stride_kw_head, source, target, there, mixed, k_to_causal, a_k,
                stride_k_row, stride_k_dim, stride_kw_row, stride_kw_dim, DIM, BLOCK_DIM, MIX,
            )  # fmt: skip
            write_rows(
                v_head, v_written + head * stride_vw_head, source, target, there, mixed, v_to_causal, a_v,
                stride_v_row, stride_v_dim, stride_vw_row, stride_vw_dim, DIM_V, BLOCK_DIM_V, MIX,
            )  # fmt: skip


def forward(
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    plan: SegmentPlan,
    *,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    stream_mask: str,
    shared_qkv: bool,
    beta: torch.Tensor | None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    save: bool,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_positions: torch.Tensor | None = None,
    tile: Tile | None = None,
):
    """Allocates the outputs and launches the kernel: ``out, k_mixed, v_mixed, streams, lse``.

    With caches, the mixed and the answer's keys and values go to ``cache_positions`` there; k_mixed, v_mixed are None.
    """
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = tiles.near(q, group), tiles.near(k), tiles.near(v)
    vectors = tiles.in_a_row(alpha_k, alpha_v, beta, sinks, cache_positions)
    alpha_k, alpha_v, beta, sinks, cache_positions = vectors
    prefix = prefix and tuple(map(tiles.near, prefix))
    mixes, has_beta, to_cache = plan.num_streams == 2, beta is not None, cache_positions is not None
    answer_only = q.shape[0] != k.shape[0]
    two_parts = (shared_qkv or has_beta) and not answer_only

    outputs = allocate(q, k, v, plan, shared_qkv=shared_qkv, beta=has_beta, save=save, to_cache=to_cache)
    out, k_mixed, v_mixed, streams, lse = outputs
    k_written, v_written = (k_cache, v_cache) if to_cache else (k_mixed, v_mixed)
    tile = tile or tiles.choose("forward_two_parts" if two_parts else "forward", q, v)
    items = schedule.cached(
        plan,
        q.device,
        schedule.forward_items,
        group_size=group,
        block=tile.block_m,
        window=window,
        stream_mask=stream_mask,
        shared_qkv=shared_qkv,
        beta=has_beta,
        answer_only=answer_only,
        to_cache=to_cache,
    )
    if not len(items):
        return outputs
    arguments = launch_arguments(q, k, v, alpha_k, beta, prefix, plan, softmax_scale, window, softcap)
    strides, scalars, constants = arguments
    with torch.cuda.device_of(q):
        forward_kernel[(len(items) * heads_kv,)](
            items,
            q,
            k,
            v,
            alpha_k,
            alpha_v,
            beta,
            sinks,
            *(prefix or (None, None)),
            out,
            streams,
            lse,
            k_written,
            v_written,
            cache_positions,
            *strides,
            *k_written.stride(),
            *v_written.stride(),
            *scalars,
            **constants,
            **tile.arguments(),
            BLOCK_N_MIXED=tile.block_n_mixed(mixes),
            PARTS=2 if two_parts else 1,
            GO_ON=shared_qkv and stream_mask != "anti_causal",
            HAS_SINKS=sinks is not None,
            FOLD_SCALE=softcap is None and softmax_scale > 0,
            SAVE=save,
            WRITE=mixes or to_cache,
            HAS_SLOTS=to_cache,
        )
    return outputs
