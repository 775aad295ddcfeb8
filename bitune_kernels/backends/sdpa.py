"""``torch.nn.functional.scaled_dot_product_attention`` per segment and sample: fast wherever PyTorch runs.

A mask tensor is built only where a flag of SDPA can't express the visibility, for a few queries at a time and the keys
that they may see: memory is linear in the length of a prompt, and so is the work behind a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..masks import visible_to_answer, visible_to_prompt
from ..mixing import mix
from ..plan import SegmentPlan


def unsupported(*, softcap=None, sinks=None, **call) -> str | None:
    """Why this backend can't run a call, or None."""
    if softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    if sinks is not None:
        return "scaled_dot_product_attention has no attention sinks"
    return None


_ROWS = 1024  # queries that share a mask tensor


def _attend(q, k, v, scale: float, see: Callable | str | None):
    # q [Lq, Hq, D], k and v [Lk, Hkv, D] -> [Lq, Hq, Dv]. see: None = everything, "causal", or (first, end) of queries
    # -> (first, end) of the keys that any of them sees and bool [queries, keys].
    if not q.shape[0]:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    if not callable(see):
        return _sdpa(q, k, v, scale, None, causal=see == "causal")
    out = []
    for first in range(0, q.shape[0], _ROWS):
        rows = first, min(first + _ROWS, q.shape[0])
        (low, high), mask = see(rows)
        out.append(_sdpa(q[slice(*rows)], k[low:high], v[low:high], scale, mask))
    return torch.cat(out) if len(out) > 1 else out[0]


def _sdpa(q, k, v, scale: float, mask: torch.Tensor | None, causal: bool = False):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.squeeze(0).transpose(0, 1)


def _prompt_visibility(mask: str, n: int, m: int, window: int | None, device):
    if window is not None and window >= m + n:
        window = None
    if window is None and (mask == "full" or n <= 1):
        return None
    if window is None and mask == "causal" and m == 0:
        return "causal"

    def see(rows):
        first, end = m + rows[0], m + rows[1]  # as keys
        low = first if mask == "anti_causal" and not m else 0
        high = end if mask == "causal" else m + n
        if window is not None:
            low, high = max(low, first - window + 1), min(high, end + window - 1)
        return (low, high), visible_to_prompt(mask, n, m, window, device, rows, (low, high))

    return see


def _answer_visibility(a: int, before: int, window: int | None, device):
    if window is not None and window >= before + a:
        window = None
    if window is None and a <= 1:
        return None
    if window is None and before == 0:
        return "causal"

    def see(rows):
        low = 0 if window is None else max(0, before + rows[0] - window + 1)
        high = before + rows[1]
        return (low, high), visible_to_answer(a, before, window, device, rows, (low, high))

    return see


def attention(
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    plan: SegmentPlan,
    *,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    stream_mask: str = "full",
    shared_qkv: bool = False,
    beta: torch.Tensor | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    """``bitune_kernels.ops.bitune_attention`` for calls without softcap and sinks."""
    N, A, S = plan.num_prompt, plan.num_answer, plan.answer_start
    if softmax_scale <= 0:  # PyTorch's causal kernels scale what they masked: -inf times this is no longer -inf
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
    q_answer, q_prompt = q[q.shape[0] - A :], q[: q.shape[0] - A]
    k_split, v_split = k.split([*[N] * plan.num_streams, A]), v.split([*[N] * plan.num_streams, A])
    if plan.num_streams == 2:
        k_mixed, v_mixed = mix(k_split[1], k_split[0], alpha_k), mix(v_split[1], v_split[0], alpha_v)
    else:
        k_mixed, v_mixed = k_split[0], v_split[0]

    def split(x, lengths):
        return x.split(lengths) if len(lengths) != 1 else (x,)

    prompt, answer = list(plan.prompt_lengths), list(plan.answer_lengths)
    past = [0] * plan.batch_size if prefix is None else list(plan.prefix_lengths)
    prefixes = None if prefix is None else (split(prefix[0], past), split(prefix[1], past))

    def seen(b, k, v):  # the sample's prefix, then these rows
        if not past[b]:
            return k, v
        return torch.cat([prefixes[0][b], k]), torch.cat([prefixes[1][b], v])

    def stream(mask, rows):  # the prompt's attention in one stream, sample by sample
        samples = zip(*(split(x[rows], prompt) for x in (q_prompt, k, v)), strict=True)
        return [
            _attend(qs, *seen(b, ks, vs), softmax_scale, _prompt_visibility(mask, prompt[b], past[b], window, q.device))
            for b, (qs, ks, vs) in enumerate(samples)
        ]

    out = []
    if q_prompt.shape[0] or (N == 0 and q.shape[0] == plan.num_rows):
        bidir = stream(stream_mask, slice(0, N))
        causal = stream("causal", slice(S - N, S)) if plan.num_streams == 2 or shared_qkv else []
        if beta is not None:
            bidir, causal = [mix(c, o, beta) for c, o in zip(causal, bidir, strict=True)], []
        out = [*bidir, *causal]
    rows = zip(*(split(x, answer) for x in (q_answer, k[S:], v[S:])), strict=True)
    mixed = tuple(zip(split(k_mixed, prompt), split(v_mixed, prompt), strict=True))
    for b, (qs, ks, vs) in enumerate(rows):
        before = past[b] + prompt[b]
        keys, values = seen(b, torch.cat([mixed[b][0], ks]), torch.cat([mixed[b][1], vs]))
        out.append(_attend(qs, keys, values, softmax_scale, _answer_visibility(answer[b], before, window, q.device)))
    out = [o for o in out if o.shape[0]]
    return (torch.cat(out) if out else q.new_zeros(0, q.shape[1], v.shape[2])), k_mixed, v_mixed
