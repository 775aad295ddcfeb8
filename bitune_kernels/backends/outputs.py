"""What a launch of the forward writes: the same tensors for every backend with kernels of its own."""

from __future__ import annotations

import torch

from ..plan import SegmentPlan


def rows_of(rows_q: int, rows_k: int, num_prompt: int, shared_qkv: bool, beta: bool) -> tuple[int, int, int]:
    """Of out, and of streams and lse where they are saved (``backends``)."""
    if rows_q != rows_k:  # answer rows alone
        return rows_q, 0, rows_q
    in_streams = rows_q + num_prompt * int(shared_qkv)
    if not beta:
        return in_streams, 0, in_streams
    return in_streams - num_prompt, 2 * num_prompt, in_streams


def allocate(q, k, v, plan: SegmentPlan, *, shared_qkv: bool, beta: bool, save: bool, to_cache: bool):
    """``out, k_mixed, v_mixed, streams, lse`` as ``backends`` describes them; k_mixed, v_mixed None for a cache."""
    N, heads, dim_v = plan.num_prompt, q.shape[1], v.shape[2]
    rows_out, *saved = rows_of(q.shape[0], k.shape[0], N, shared_qkv, beta)
    rows_streams, rows_lse = saved if save else (0, 0)
    out = q.new_empty(rows_out, heads, dim_v)
    streams = q.new_empty(rows_streams, heads, dim_v)
    lse = q.new_empty(rows_lse, heads, dtype=torch.float32)
    k_mixed = v_mixed = None
    if not to_cache:
        k_mixed, v_mixed = (x[:N] if plan.num_streams == 1 else x.new_empty(N, *x.shape[1:]) for x in (k, v))
    return out, k_mixed, v_mixed, streams, lse
