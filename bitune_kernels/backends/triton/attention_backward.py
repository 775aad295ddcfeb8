"""The backward kernels: one for dq, one for dk and dv, then the mix's own. Deterministic: every sum has one owner.

    p = exp(s - lse);  delta = <d_out, out>;  ds = p (d_out v^T - delta) * d cap;  dq = scale ds k
    dv = p^T d_out;  dk = scale ds^T q

Keys of the mixed prompt are mixed again from the streams, nothing of it is kept from the forward. What the answer's
attention sends to them goes through a float32 buffer to ``mix_backward``, which shares it out to both streams.

With beta, d_out of a stream is beta or (1 - beta) times the given one: a weight per row, never a tensor.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...plan import SegmentPlan
from .. import schedule
from . import tiles
from .common import (
    LOG2E,
    WEIGHTS,
    at,
    launch_arguments,
    load_keys,
    load_rows,
    mix,
    rows_of,
    seen_by_rows,
    split,
    store_rows,
    tanh,
    tokens_of,
)
from .mixing import mix_backward
from .tiles import Tile, block_dim

# The schedules' columns, and how many stand between those of one part and the next.
Q, Q_COLUMNS = tl.constexpr(schedule.BACKWARD_Q), tl.constexpr(len(schedule.BACKWARD_Q))
KV, KV_COLUMNS = tl.constexpr(schedule.BACKWARD_KV), tl.constexpr(len(schedule.BACKWARD_KV))
PER_Q_PART, PER_KV_PART = (
    tl.constexpr(columns.index("mask_1") - columns.index("mask_0"))
    for columns in (schedule.BACKWARD_Q, schedule.BACKWARD_KV)
)

CAUSAL, ANTI_CAUSAL = tl.constexpr(schedule.CAUSAL), tl.constexpr(schedule.ANTI_CAUSAL)
MIXED, PREFIX = tl.constexpr(schedule.MIXED), tl.constexpr(schedule.PREFIX)
BETA = tl.constexpr(schedule.BETA)


@triton.jit
def probabilities(s, lse, scale, softcap):
    """exp(cap(scale s) - lse), and d cap / d (scale s)."""
    if softcap is not None:
        t = tanh(s * (scale / softcap))
        return tl.exp2(t * (softcap * LOG2E) - lse), 1.0 - t * t
    else:
        return tl.exp2(s * (scale * LOG2E) - lse), 1.0


@triton.jit
def row_weights(beta, head_q, kind, there, BETA_PER_HEAD: tl.constexpr):
    """What d_out counts for a stream's rows: 1, beta or 1 - beta."""
    b = tl.load(beta + (head_q if BETA_PER_HEAD else head_q * 0), mask=there, other=0.0).to(tl.float32)
    return tl.where(kind == 0, 1.0, tl.where(kind == BETA, b, 1.0 - b))


@triton.jit
def dq_tiles(
    dq, q, do, lse, delta, weight, k, v, stride_k, stride_v, mix_k, mix_v, seen, bounds, length, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += ds k over tiles of keys, as ``attention_forward.attend_tiles``. weight: of d_out's rows, or None."""
    low, high = seen
    start, whole, rest, stop = bounds
    gap = rest - whole
    begin, end = (start, stop - gap) if MASKED else (whole, rest)
    for i in range(begin, end, BLOCK_N):
        first = i + tl.where(i >= whole, gap, 0) if MASKED else i
        kt = load_keys(k, first, length, stride_k, mix_k, DIM, BLOCK_N, not MASKED)
        vt = load_keys(v, first, length, stride_v, mix_v, DIM_V, BLOCK_N, not MASKED)
        s = tl.dot(q, tl.trans(kt), input_precision="ieee")
        p, d_cap = probabilities(s, lse[:, None], scale, softcap)
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            p = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), p, 0.0)
        dp = tl.dot(do, tl.trans(vt), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if softcap is not None:
            ds *= d_cap
        if weight is not None:
            ds *= weight[:, None]
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_of_run(
    dq, q, do, lse, delta, weight, k, v, stride_k, stride_v, mix_k, mix_v, row,
    positions, keys_position, length, mask, window, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A run of ``length`` keys from ``row`` on, as ``attention_forward.attend``."""
    k, v = k + row * stride_k[0], v + row * stride_v[0]
    seen, bounds = seen_by_rows(positions, keys_position, length, mask, window, BLOCK_N)
    for masked in tl.static_range(2):
        dq = dq_tiles(
            dq, q, do, lse, delta, weight, k, v, stride_k, stride_v, mix_k, mix_v, seen, bounds, length, scale, softcap,
            DIM, DIM_V, BLOCK_N, masked,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["num_prompt", "window"], do_not_specialize_on_alignment=WEIGHTS)
def dq_kernel(
    items, q, k, v, alpha_k, alpha_v, beta, k_prefix, v_prefix,
    out, streams, d_out, lse, delta, dq,
    stride_q, stride_k, stride_v, stride_kp, stride_vp, stride_do,
    num_prompt, scale, softcap, window,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, BETA_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N_MIXED: tl.constexpr,
    TWO_PARTS: tl.constexpr,  # a tile may stand in both streams
):  # fmt: skip
    """dq [rows, HEADS_KV * GROUP, DIM], and delta = <d_out, out> float32 [rows of streams, HEADS_KV * GROUP]."""
    head = (tl.program_id(0) % HEADS_KV).to(tl.int64)
    item = items + (tl.program_id(0) // HEADS_KV).to(tl.int64) * Q_COLUMNS
    length, block = tl.load(item + at(Q, "length")), tl.load(item + at(Q, "block"))
    first_token = block * BLOCK_M // GROUP
    heads, head_q = HEADS_KV * GROUP, head * GROUP

    k_head, v_head = k + head * stride_k[1], v + head * stride_v[1]
    mix_k, mix_v = None, None
    if alpha_k is not None:  # the answer attends to a mix of two streams: ``load_keys``
        k_to_causal, v_to_causal = num_prompt.to(tl.int64) * stride_k[0], num_prompt.to(tl.int64) * stride_v[0]
        mix_k = (k_to_causal, tl.load(alpha_k + (head if ALPHA_PER_HEAD else 0)).to(tl.float32))
        mix_v = (v_to_causal, tl.load(alpha_v + (head if ALPHA_PER_HEAD else 0)).to(tl.float32))

    near, of_group, stored = rows_of(item + at(Q, "block"), length, GROUP, BLOCK_M)
    q_first = (tl.load(item + at(Q, "q_row")) + first_token).to(tl.int64)
    q_head = q + q_first * stride_q[0] + head_q * stride_q[1]
    q_tile = load_rows(q_head + of_group[:, None] * stride_q[1], near, stride_q, stored, DIM)

    acc = tl.zeros([BLOCK_M, block_dim(DIM)], tl.float32)
    for part in range(tl.load(item + at(Q, "parts")) if TWO_PARTS else 1):
        column = item + part * PER_Q_PART
        mask, weight_kind = tl.load(column + at(Q, "mask_0")), tl.load(column + at(Q, "weight_0"))
        near_part, of_group_part, stored_part = rows_of(item + at(Q, "block"), length, GROUP, BLOCK_M)
        # Read in the loop, like the row numbers: what both parts need is not kept over the first one.
        own_row, own_position = tl.load(item + at(Q, "own_row")).to(tl.int64), tl.load(item + at(Q, "position"))
        mixed_row = tl.load(item + at(Q, "mixed_row")).to(tl.int64)
        mixed_length = tl.load(item + at(Q, "mixed_length"))
        token, _, last_token = tokens_of(tl.load(item + at(Q, "block"), volatile=True), length, GROUP, BLOCK_M)
        positions = (own_position + token, own_position + first_token, own_position + last_token)
        out_first = (tl.load(column + at(Q, "out_row_0")) + first_token).to(tl.int64)
        stream_first = (tl.load(column + at(Q, "stream_row_0")) + first_token).to(tl.int64)
        do_head = d_out + out_first * stride_do[0] + head_q * stride_do[1]
        do = load_rows(do_head + of_group_part[:, None] * stride_do[1], near_part, stride_do, stored_part, DIM_V)
        # In tensors that are contiguous, [rows, heads, ..]:
        out_first, stream_first = out_first * heads + head_q, stream_first * heads + head_q
        of_heads = near_part * heads + of_group_part
        o = load_rows(out + out_first * DIM_V, of_heads, (DIM_V, 1), stored_part, DIM_V)
        weight = None
        if beta is not None:  # the streams' own outputs, not their mix; the answer has none
            in_streams = tl.where(weight_kind != 0, stored_part, False)
            of_stream = load_rows(streams + stream_first * DIM_V, of_heads, (DIM_V, 1), in_streams, DIM_V)
            o = tl.where(weight_kind != 0, of_stream, o)
            weight = row_weights(beta, head_q + of_group_part, weight_kind, stored_part, BETA_PER_HEAD)
        row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + stream_first + of_heads, row_delta, mask=stored_part)
        row_lse = tl.load(lse + stream_first + of_heads, mask=stored_part, other=0.0)

        if k_prefix is not None:
            prefix_row = tl.load(item + at(Q, "prefix_row")).to(tl.int64)
            prefix_length = tl.load(item + at(Q, "prefix_length"))
            acc = dq_of_run(
                acc, q_tile, do, row_lse, row_delta, weight, k_prefix + head * stride_kp[1],
                v_prefix + head * stride_vp[1], stride_kp, stride_vp, None, None, prefix_row,
                positions, 0, prefix_length, 0, window, scale, softcap, DIM, DIM_V, BLOCK_N,
            )  # fmt: skip
        acc = dq_of_run(
            acc, q_tile, do, row_lse, row_delta, weight, k_head, v_head, stride_k, stride_v, mix_k, mix_v, mixed_row,
            positions, own_position - mixed_length, mixed_length, 0, window, scale, softcap, DIM, DIM_V, BLOCK_N_MIXED,
        )  # fmt: skip
        acc = dq_of_run(
            acc, q_tile, do, row_lse, row_delta, weight, k_head, v_head, stride_k, stride_v, None, None, own_row,
            positions, own_position, length, mask, window, scale, softcap, DIM, DIM_V, BLOCK_N,
        )  # fmt: skip
    near, of_group, stored = rows_of(item + at(Q, "block"), length, GROUP, BLOCK_M)
    of_heads = near * heads + of_group
    store_rows(dq + (q_first * heads + head_q) * DIM, of_heads, (DIM, 1), acc * scale, stored, DIM)


@triton.jit
def seen_by(position, q_position, q_length, mask, window):
    """[low, high): which of ``q_length`` queries, at positions q_position, .., see the key at ``position``."""
    own = position - q_position
    low = tl.where(mask == CAUSAL, own, 0)
    high = tl.where(mask == ANTI_CAUSAL, own + 1, q_length)
    if window is not None:
        low = tl.maximum(low, own - window + 1)
        high = tl.minimum(high, own + window)
    low = tl.minimum(tl.maximum(low, 0), q_length)
    return low, tl.maximum(tl.minimum(high, q_length), low)


@triton.jit
def dkv_tiles(
    dk, dv, k, v, q, do, lse, delta, beta, head_q, weight_kind, stride_q, stride_do, seen, bounds, rows, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BETA_PER_HEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk += ds^T q, dv += p^T do over tiles of packed query rows, as ``dq_tiles`` over those of keys."""
    low, high = seen
    start, whole, rest, stop = bounds
    gap = rest - whole
    begin, end = (start, stop - gap) if MASKED else (whole, rest)
    for i in range(begin, end, BLOCK_M):
        first = i + tl.where(i >= whole, gap, 0) if MASKED else i
        r = first + tl.arange(0, BLOCK_M)
        there = r < rows
        first_token = (first // GROUP).to(tl.int64)
        near, of_group = r // GROUP - first // GROUP, r % GROUP
        q_at = q + first_token * stride_q[0] + of_group[:, None] * stride_q[1]
        q_tile = load_rows(q_at, near, stride_q, there, DIM, not MASKED)
        do_at = do + first_token * stride_do[0] + of_group[:, None] * stride_do[1]
        do_tile = load_rows(do_at, near, stride_do, there, DIM_V, not MASKED)
        of_heads = first_token * HEADS + near * HEADS + of_group
        row_lse = tl.load(lse + of_heads, mask=there, other=0.0)
        row_delta = tl.load(delta + of_heads, mask=there, other=0.0)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        p, d_cap = probabilities(s, row_lse[None, :], scale, softcap)
        if MASKED:
            p = tl.where((r[None, :] >= low[:, None]) & (r[None, :] < high[:, None]), p, 0.0)
        if beta is not None:
            p *= row_weights(beta, head_q + of_group, weight_kind, there, BETA_PER_HEAD)[None, :]
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - row_delta[None, :])
        if softcap is not None:
            ds *= d_cap
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def keys_of(item, BLOCK: tl.constexpr):
    """For the memory of a tile of keys: its kind, its first row there, and which rows exist. As ``common.rows_of``."""
    kind = tl.load(item + at(KV, "kind"), volatile=True)
    first = tl.load(item + at(KV, "block"), volatile=True) * BLOCK
    row = (tl.load(item + at(KV, "k_row"), volatile=True) + first).to(tl.int64)
    return kind, row, first + tl.arange(0, BLOCK) < tl.load(item + at(KV, "length"), volatile=True)


@triton.jit(do_not_specialize=["num_prompt", "window"], do_not_specialize_on_alignment=WEIGHTS)
def dkv_kernel(
    items, q, k, v, alpha_k, alpha_v, beta, k_prefix, v_prefix,
    d_out, lse, delta, dk, dv, dk_mixed, dv_mixed, dk_prefix, dv_prefix,
    stride_q, stride_k, stride_v, stride_kp, stride_vp, stride_do,
    num_prompt, scale, softcap, window,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, BETA_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_N keys of one key/value head, all query heads of its group: dk, dv (contiguous) of its rows.

    dk_mixed, dv_mixed float32 [N, HEADS_KV, dim]: of the mixed prompt, before it is shared out to the streams.
    """
    head = (tl.program_id(0) % HEADS_KV).to(tl.int64)
    item = items + (tl.program_id(0) // HEADS_KV).to(tl.int64) * KV_COLUMNS
    near = tl.arange(0, BLOCK_N)
    kind, row, stored = keys_of(item, BLOCK_N)

    # The tile: rows of a stream or of the answer; the mix of both streams' rows; or of the prefix.
    k_head, v_head = k + head * stride_k[1], v + head * stride_v[1]
    in_rows = tl.where(kind == PREFIX, False, stored) if k_prefix is not None else stored
    k_tile = load_rows(k_head + row * stride_k[0], near, stride_k, in_rows, DIM)
    v_tile = load_rows(v_head + row * stride_v[0], near, stride_v, in_rows, DIM_V)
    if alpha_k is not None:
        a_k = tl.load(alpha_k + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)
        a_v = tl.load(alpha_v + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)
        in_mixed = tl.where(kind == MIXED, stored, False)
        causal_row = row + num_prompt
        causal = load_rows(k_head + causal_row * stride_k[0], near, stride_k, in_mixed, DIM)
        k_tile = tl.where(kind == MIXED, mix(causal, k_tile, a_k), k_tile)
        causal = load_rows(v_head + causal_row * stride_v[0], near, stride_v, in_mixed, DIM_V)
        v_tile = tl.where(kind == MIXED, mix(causal, v_tile, a_v), v_tile)
    if k_prefix is not None:
        in_prefix = tl.where(kind == PREFIX, stored, False)
        kp = k_prefix + head * stride_kp[1] + row * stride_kp[0]
        vp = v_prefix + head * stride_vp[1] + row * stride_vp[0]
        k_tile = tl.where(kind == PREFIX, load_rows(kp, near, stride_kp, in_prefix, DIM), k_tile)
        v_tile = tl.where(kind == PREFIX, load_rows(vp, near, stride_vp, in_prefix, DIM_V), v_tile)

    heads, head_q = HEADS_KV * GROUP, head * GROUP
    dk_acc = tl.zeros([BLOCK_N, block_dim(DIM)], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, block_dim(DIM_V)], tl.float32)
    for part in range(tl.load(item + at(KV, "parts"))):
        column = item + part * PER_KV_PART
        first = tl.load(item + at(KV, "block"), volatile=True) * BLOCK_N
        length = tl.load(item + at(KV, "length"), volatile=True)
        k_position = tl.load(item + at(KV, "position"), volatile=True)
        last = tl.minimum(first + BLOCK_N, length) - 1
        position = k_position + tl.minimum(first + near, last)
        q_length, q_position = tl.load(column + at(KV, "length_0")), tl.load(column + at(KV, "position_0"))
        mask, weight_kind = tl.load(column + at(KV, "mask_0")), tl.load(column + at(KV, "weight_0"))
        q_run = q + tl.load(column + at(KV, "q_row_0")).to(tl.int64) * stride_q[0] + head_q * stride_q[1]
        do_run = d_out + tl.load(column + at(KV, "out_row_0")).to(tl.int64) * stride_do[0] + head_q * stride_do[1]
        of_stream = tl.load(column + at(KV, "stream_row_0")).to(tl.int64) * heads + head_q
        low_first, high_first = seen_by(k_position + first, q_position, q_length, mask, window)
        low_last, high_last = seen_by(k_position + last, q_position, q_length, mask, window)
        bounds = split(low_first * GROUP, low_last * GROUP, high_first * GROUP, high_last * GROUP, BLOCK_M)
        low, high = seen_by(position, q_position, q_length, mask, window)
        for masked in tl.static_range(2):
            dk_acc, dv_acc = dkv_tiles(
                dk_acc, dv_acc, k_tile, v_tile, q_run, do_run, lse + of_stream, delta + of_stream, beta, head_q,
                weight_kind, stride_q, stride_do, (low * GROUP, high * GROUP), bounds, q_length * GROUP, scale, softcap,
                heads, GROUP, DIM, DIM_V, BLOCK_M, BETA_PER_HEAD, masked,
            )  # fmt: skip

    dk_acc *= scale
    kind, row, stored = keys_of(item, BLOCK_N)
    k_at, v_at = (row * HEADS_KV + head) * DIM, (row * HEADS_KV + head) * DIM_V
    in_rows = tl.where(kind == 0, stored, False)
    store_rows(dk + k_at, near, (HEADS_KV * DIM, 1), dk_acc, in_rows, DIM)
    store_rows(dv + v_at, near, (HEADS_KV * DIM_V, 1), dv_acc, in_rows, DIM_V)
    if alpha_k is not None:
        in_mixed = tl.where(kind == MIXED, stored, False)
        store_rows(dk_mixed + k_at, near, (HEADS_KV * DIM, 1), dk_acc, in_mixed, DIM)
        store_rows(dv_mixed + v_at, near, (HEADS_KV * DIM_V, 1), dv_acc, in_mixed, DIM_V)
    if k_prefix is not None:
        in_prefix = tl.where(kind == PREFIX, stored, False)
        store_rows(dk_prefix + k_at, near, (HEADS_KV * DIM, 1), dk_acc, in_prefix, DIM)
        store_rows(dv_prefix + v_at, near, (HEADS_KV * DIM_V, 1), dv_acc, in_prefix, DIM_V)


def backward(
    d_out: torch.Tensor,
    d_k_mixed: torch.Tensor | None,
    d_v_mixed: torch.Tensor | None,
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    beta,
    sinks,
    k_prefix,
    v_prefix,
    out: torch.Tensor,
    streams: torch.Tensor,
    lse: torch.Tensor,
    plan: SegmentPlan,
    *,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    stream_mask: str,
    shared_qkv: bool,
    tile_q: Tile | None = None,
    tile_kv: Tile | None = None,
) -> list[torch.Tensor]:
    """The gradient of each of q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix that isn't None, contiguous.

    out, streams, lse: from ``forward(save=True)``. d_k_mixed, d_v_mixed: None where nothing came back.
    """
    N = plan.num_prompt
    (rows_q, heads_q, _), heads_kv = q.shape, v.shape[1]
    group = heads_q // heads_kv
    q, k, v, d_out = tiles.near(q, group), tiles.near(k), tiles.near(v), tiles.near(d_out, group)
    alpha_k, alpha_v, beta = tiles.in_a_row(alpha_k, alpha_v, beta)
    if k_prefix is not None:
        k_prefix, v_prefix = tiles.near(k_prefix), tiles.near(v_prefix)
    answer_only, mixes, has_prefix = rows_q != k.shape[0], plan.num_streams == 2, k_prefix is not None
    has_beta = beta is not None and not answer_only

    def like(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(lse)
    d_prefix = [like(k_prefix), like(v_prefix)] if has_prefix else [None, None]
    d_mixed = [x.new_empty(N, *x.shape[1:], dtype=torch.float32) if mixes else None for x in (k, v)]
    launch = schedule.Launch(group, window, stream_mask, shared_qkv, has_beta, answer_only)
    two_parts = shared_qkv and not answer_only
    tile_q = tile_q or tiles.choose("dq_two_parts" if two_parts else "dq", q, v)
    tile_kv = tile_kv or tiles.choose("dkv", q, v)
    q_items = schedule.cached(plan, q.device, schedule.backward_q_items, launch, tile_q.block_m)
    kv_items = schedule.cached(plan, q.device, schedule.backward_kv_items, launch, tile_kv.block_n)
    prefix = (k_prefix, v_prefix) if has_prefix else None
    arguments = launch_arguments(q, k, v, alpha_k, alpha_v, beta, prefix, plan, softmax_scale, window, softcap)
    arguments |= dict(d_out=d_out, lse=lse, delta=delta, stride_do=d_out.stride())
    with torch.cuda.device_of(q):
        if len(q_items):
            dq_kernel[(len(q_items) * heads_kv,)](
                q_items,
                **arguments,
                out=out,
                streams=streams,
                dq=dq,
                **tile_q.arguments(),
                BLOCK_N_MIXED=tile_q.block_n_mixed(mixes),
                TWO_PARTS=two_parts,
            )
        if len(kv_items):
            dkv_kernel[(len(kv_items) * heads_kv,)](
                kv_items,
                **arguments,
                dk=dk,
                dv=dv,
                dk_mixed=d_mixed[0],
                dv_mixed=d_mixed[1],
                dk_prefix=d_prefix[0],
                dv_prefix=d_prefix[1],
                **tile_kv.arguments(),
            )
    grads = [dq, dk, dv]
    if mixes:
        for x, alpha, d_attended, d_given, d_rows in (
            (k, alpha_k, d_mixed[0], d_k_mixed, dk),
            (v, alpha_v, d_mixed[1], d_v_mixed, dv),
        ):
            rows = (x[N : 2 * N], x[:N], alpha, d_attended, d_rows[N : 2 * N], d_rows[:N])
            grads.append(mix_backward(d_given, *rows)[2])
    else:
        for d_given, d_rows in ((d_k_mixed, dk), (d_v_mixed, dv)):
            if d_given is not None:
                d_rows[:N] += d_given
    weighted = delta
    if has_beta:
        d_weight = delta[:N] - delta[N : 2 * N]
        weights = torch.stack([beta, 1 - beta]).reshape(2, 1, -1).to(delta.dtype)
        prompt = delta[: 2 * N].reshape(2, N, heads_q) * weights
        weighted = torch.cat([prompt.flatten(0, 1), delta[2 * N :]])
    if beta is not None:
        d_beta = torch.zeros_like(beta)
        if has_beta:
            d_beta = (d_weight.sum(0) if beta.ndim else d_weight.sum()).to(beta.dtype)
        grads.append(d_beta)
    if sinks is not None:  # a score without a value: its dp is 0
        grads.append(-(torch.exp2(sinks.float() * math.log2(math.e) - lse) * weighted).sum(0).to(sinks.dtype))
    return [*grads, *(d_prefix if has_prefix else [])]
