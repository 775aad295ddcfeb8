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
from .. import Options, schedule
from ..outputs import allocate
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
    store_rows,
    tanh,
    tokens_of,
)
from .tiles import Tile, block_dim

FORWARD, COLUMNS = tl.constexpr(schedule.FORWARD), tl.constexpr(len(schedule.FORWARD))

# Mixed rows at a time: few, since all of them and their sources pass through registers.
WRITE_ROWS = tl.constexpr(16)


@triton.jit
def attend_tiles(
    acc, m, l, q, k, v, stride_k, stride_v, mix_k, mix_v, seen, bounds, length, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, FOLD_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles of keys that every row sees, or, MASKED, over those before and behind them."""
    low, high = seen
    start, whole, rest, stop = bounds
    gap = rest - whole
    begin, end = (start, stop - gap) if MASKED else (whole, rest)
    for i in range(begin, end, BLOCK_N):
        first = i + tl.where(i >= whole, gap, 0) if MASKED else i
        kt = load_keys(k, first, length, stride_k, mix_k, DIM, BLOCK_N, not MASKED)
        s = tl.dot(q, tl.trans(kt), input_precision="ieee")
        # m and the exponents count in log2. A plain positive scale is left to the exponents' multiply-add.
        if softcap is not None:
            s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        elif not FOLD_SCALE:
            s = s * (scale * LOG2E)
        unit = scale * LOG2E if FOLD_SCALE else 1.0
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1) * unit)
        base = m_next
        if MASKED:  # a row that has seen no key yet
            base = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s * unit - base[:, None])
        rescale = tl.exp2(m - base)
        l = l * rescale + tl.sum(p, 1)
        vt = load_keys(v, first, length, stride_v, mix_v, DIM_V, BLOCK_N, not MASKED)
        acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision="ieee")
        m = m_next
    return acc, m, l


@triton.jit
def attend(
    acc, m, l, q, k, v, stride_k, stride_v, mix_k, mix_v, row,
    positions, keys_position, length, mask, window, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """A run of ``length`` keys from ``row`` on: the wholly visible tiles without a mask, those at its ends with one."""
    k, v = k + row * stride_k[0], v + row * stride_v[0]
    seen, bounds = seen_by_rows(positions, keys_position, length, mask, window, BLOCK_N)
    for masked in tl.static_range(2):
        acc, m, l = attend_tiles(
            acc, m, l, q, k, v, stride_k, stride_v, mix_k, mix_v, seen, bounds, length, scale, softcap,
            DIM, DIM_V, BLOCK_N, FOLD_SCALE, masked,
        )  # fmt: skip
    return acc, m, l


@triton.jit
def write_rows(x, written, stride_x, stride_written, source, target, there, mixed, mixing, DIM: tl.constexpr):
    """Rows ``source`` of x, or where ``mixed`` the mix of them and their causal ones, to the rows ``target``."""
    tile = load_rows(x, source, stride_x, there, DIM)
    if mixing is not None:
        to_causal, alpha = mixing
        causal = load_rows(x + to_causal, source, stride_x, tl.where(mixed, there, False), DIM)
        tile = tl.where(mixed, mix(causal, tile, alpha), tile)
    store_rows(written, target, stride_written, tile, there, DIM)


@triton.jit(do_not_specialize=["num_prompt", "window"], do_not_specialize_on_alignment=WEIGHTS)
def forward_kernel(
    items, q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix,
    out, streams, lse, k_written, v_written, slots,
    stride_q, stride_k, stride_v, stride_kp, stride_vp, stride_kw, stride_vw,
    num_prompt, scale, softcap, window,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    ALPHA_PER_HEAD: tl.constexpr, BETA_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N_MIXED: tl.constexpr,
    PARTS: tl.constexpr,  # 2: a prompt tile computes both streams
    GO_ON: tl.constexpr,  # the second part goes on with the first one's softmax
    FOLD_SCALE: tl.constexpr,
    SAVE: tl.constexpr,  # what the backward needs
    WRITE: tl.constexpr,  # mixed rows (without slots), or rows of a cache (with)
):  # fmt: skip
    """Shapes: q, out [rows, HEADS_KV * GROUP, DIM]; k, v [rows, HEADS_KV, DIM]; lse [rows, HEADS_KV * GROUP]."""
    head = (tl.program_id(0) % HEADS_KV).to(tl.int64)
    item = items + (tl.program_id(0) // HEADS_KV).to(tl.int64) * COLUMNS
    length, block = tl.load(item + at(FORWARD, "length")), tl.load(item + at(FORWARD, "block"))
    first_token = block * BLOCK_M // GROUP
    heads, head_q = HEADS_KV * GROUP, head * GROUP
    k_head, v_head = k + head * stride_k[1], v + head * stride_v[1]
    mix_k, mix_v = None, None
    if alpha_k is not None:  # the answer attends to a mix of two streams: ``load_keys``
        k_to_causal, v_to_causal = num_prompt.to(tl.int64) * stride_k[0], num_prompt.to(tl.int64) * stride_v[0]
        mix_k = (k_to_causal, tl.load(alpha_k + (head if ALPHA_PER_HEAD else 0)).to(tl.float32))
        mix_v = (v_to_causal, tl.load(alpha_v + (head if ALPHA_PER_HEAD else 0)).to(tl.float32))

    second_stream_row = tl.load(item + at(FORWARD, "second_stream_row"))

    for part in tl.static_range(PARTS):
        near, of_group, stored = rows_of(item + at(FORWARD, "block"), length, GROUP, BLOCK_M)
        token, _, last_token = tokens_of(tl.load(item + at(FORWARD, "block"), volatile=True), length, GROUP, BLOCK_M)
        own_position = tl.load(item + at(FORWARD, "position"))
        positions = (own_position + token, own_position + first_token, own_position + last_token)
        here = stored
        own_row, mask = tl.load(item + at(FORWARD, "own_row")), tl.load(item + at(FORWARD, "mask"))
        mixed_length = tl.load(item + at(FORWARD, "mixed_length"))
        prefix_length = tl.load(item + at(FORWARD, "prefix_length"))
        q_row = tl.load(item + at(FORWARD, "q_row"))
        if part == 1:
            here = tl.where(second_stream_row >= 0, stored, False)
            own_row, mask = tl.load(item + at(FORWARD, "second_row")), tl.load(item + at(FORWARD, "second_mask"))
            mixed_length, prefix_length = 0, tl.where(second_stream_row >= 0, prefix_length, 0)
            q_row = own_row
        if part == 0 or not GO_ON:
            q_first = q + (q_row + first_token).to(tl.int64) * stride_q[0] + head_q * stride_q[1]
            q_tile = load_rows(q_first + of_group[:, None] * stride_q[1], near, stride_q, here, DIM)
            acc = tl.zeros([BLOCK_M, block_dim(DIM_V)], tl.float32)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            if sinks is not None:  # one more score, without a value
                m = tl.load(sinks + head_q + of_group).to(tl.float32) * LOG2E
                l += 1.0
            if k_prefix is not None:
                prefix_row = tl.load(item + at(FORWARD, "prefix_row")).to(tl.int64)
                acc, m, l = attend(
                    acc, m, l, q_tile, k_prefix + head * stride_kp[1], v_prefix + head * stride_vp[1],
                    stride_kp, stride_vp, None, None, prefix_row,
                    positions, 0, prefix_length, 0, window, scale, softcap,
                    DIM, DIM_V, BLOCK_N, FOLD_SCALE,
                )  # fmt: skip
        if part == 0:
            mixed_row = tl.load(item + at(FORWARD, "mixed_row")).to(tl.int64)
            acc, m, l = attend(
                acc, m, l, q_tile, k_head, v_head, stride_k, stride_v, mix_k, mix_v, mixed_row,
                positions, own_position - mixed_length, mixed_length, 0, window, scale, softcap,
                DIM, DIM_V, BLOCK_N_MIXED, FOLD_SCALE,
            )  # fmt: skip
        acc, m, l = attend(
            acc, m, l, q_tile, k_head, v_head, stride_k, stride_v, None, None, own_row.to(tl.int64),
            positions, own_position, length, mask, window, scale, softcap,
            DIM, DIM_V, BLOCK_N, FOLD_SCALE,
        )  # fmt: skip

        l = tl.where(l > 0, l, 1.0)  # a row that sees nothing: 0, with lse -inf
        o = acc / l[:, None]
        near, of_group, stored = rows_of(item + at(FORWARD, "block"), length, GROUP, BLOCK_M)
        here = tl.where(second_stream_row >= 0, stored, False) if part == 1 else stored
        stream_row = tl.load(item + at(FORWARD, "stream_row")) if part == 0 else second_stream_row
        first_row = (stream_row + first_token).to(tl.int64) * heads + head_q  # of contiguous tensors [rows, heads, ..]
        rows = near * heads + of_group
        if SAVE:
            tl.store(lse + first_row + rows, (m + tl.log2(l)), mask=here)
        if beta is not None:
            if SAVE:
                both = tl.where(second_stream_row >= 0, stored, False)
                store_rows(streams + first_row * DIM_V, rows, (DIM_V, 1), o, both, DIM_V)
            if part == 0:
                first_o = o
            else:
                b = tl.load(beta + (head_q + of_group if BETA_PER_HEAD else of_group * 0)).to(tl.float32)[:, None]
                o = tl.where(second_stream_row >= 0, (1.0 - b) * first_o + b * o, first_o)
                first_row = (tl.load(item + at(FORWARD, "out_row")) + first_token).to(tl.int64) * heads + head_q
                store_rows(out + first_row * DIM_V, rows, (DIM_V, 1), o, stored, DIM_V)
        else:
            store_rows(out + first_row * DIM_V, rows, (DIM_V, 1), o, here, DIM_V)

    if WRITE:
        # Of the tile's tokens, those whose first packed row it has.
        length, write_row = tl.load(item + at(FORWARD, "write_length")), tl.load(item + at(FORWARD, "write_row"))
        start, stop = tl.cdiv(block * BLOCK_M, GROUP), tl.minimum(tl.cdiv((block + 1) * BLOCK_M, GROUP), length)
        mixed = tl.load(item + at(FORWARD, "write_mixed")) != 0
        from_row = tl.where(mixed, write_row, tl.load(item + at(FORWARD, "own_row")))
        for i in range(start, stop, WRITE_ROWS):
            written = i + tl.arange(0, WRITE_ROWS)
            there = written < stop
            target = (write_row + written).to(tl.int64)
            if slots is not None:
                target = tl.load(slots + target, mask=there, other=0)
            source = (from_row + written).to(tl.int64)
            k_to = k_written + head * stride_kw[1]
            write_rows(k_head, k_to, stride_k, stride_kw, source, target, there, mixed, mix_k, DIM)
            v_to = v_written + head * stride_vw[1]
            write_rows(v_head, v_to, stride_v, stride_vw, source, target, there, mixed, mix_v, DIM_V)


def forward(
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    plan: SegmentPlan,
    options: Options,
    *,
    save: bool,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_positions: torch.Tensor | None = None,
    tile: Tile | None = None,
):
    """Allocates the outputs and launches the kernel: ``out, k_mixed, v_mixed, streams, lse``.

    With caches, the mixed and the answer's keys and values go to ``cache_positions`` there; k_mixed, v_mixed are None.
    """
    softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix = options
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
    launch = schedule.Launch(group, window, stream_mask, shared_qkv, has_beta, answer_only)
    items = schedule.cached(plan, q.device, schedule.forward_items, launch, tile.block_m, to_cache)
    if not len(items):
        return outputs
    arguments = launch_arguments(q, k, v, alpha_k, alpha_v, beta, prefix, plan, softmax_scale, window, softcap)
    with torch.cuda.device_of(q):
        forward_kernel[(len(items) * heads_kv,)](
            items,
            **arguments,
            sinks=sinks,
            out=out,
            streams=streams,
            lse=lse,
            k_written=k_written,
            v_written=v_written,
            slots=cache_positions,
            stride_kw=k_written.stride(),
            stride_vw=v_written.stride(),
            **tile.arguments(),
            BLOCK_N_MIXED=tile.block_n_mixed(mixes),
            PARTS=2 if two_parts else 1,
            GO_ON=shared_qkv and stream_mask != "anti_causal",
            FOLD_SCALE=softcap is None and softmax_scale > 0,
            SAVE=save,
            WRITE=mixes or to_cache,
        )
    return outputs
