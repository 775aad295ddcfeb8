"""``torch.nn.functional.scaled_dot_product_attention`` per segment and run of samples: fast wherever PyTorch runs.

A mask tensor is built only where a flag of SDPA can't express the visibility, for a few queries at a time and the keys
that they may see: memory is linear in the length of a prompt, and so is the work behind a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..autocast import in_own_dtypes
from ..masks import visible_to_answer, visible_to_prompt
from ..mixing import mix, mix_prompts
from ..plan import SegmentPlan
from . import Options


def unsupported(*, softcap=None, sinks=None, **call) -> str | None:
    """Why this backend can't run a call, or None."""
    if softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    if sinks is not None:
        return "scaled_dot_product_attention has no attention sinks"
    return None


_ROWS = 1024  # queries that share a mask tensor
_PROMPT, _ANSWER, _PAST = 1, 2, 3  # places in a run of samples


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _attend(q, k, v, scale: float, see: Callable | torch.Tensor | str | None):
    # Samples of equal lengths: q [B, Lq, Hq, D], k and v [B, Lk, Hkv, D] -> [B, Lq, Hq, Dv]. see: None = everything,
    # "causal", a bias, or (first, end) of queries -> (first, end) of the keys that any of them sees and bool [queries,
    # keys].
    if not q.shape[1]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    group_size = q.shape[2] // k.shape[2]
    if group_size > 1 and _on_cuda(q.device) and (callable(see) or q.dtype == torch.float32):
        # PyTorch's fused kernels for these know no grouped heads, and what it falls back to stores all scores.
        k, v = (x.repeat_interleave(group_size, 2) for x in (k, v))
    if not callable(see):
        causal = isinstance(see, str)
        return _sdpa(q, k, v, scale, None if causal else see, causal)
    out = []
    for first, queries in zip(range(0, q.shape[1], _ROWS), q.split(_ROWS, 1), strict=True):
        (low, high), mask = see((first, first + queries.shape[1]))
        out.append(_sdpa(queries, k[:, low:high], v[:, low:high], scale, mask))
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def _sdpa(q, k, v, scale: float, mask: torch.Tensor | None, causal: bool = False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


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
    if window is None and _on_cuda(device):
        from torch.nn.attention.bias import causal_lower_right  # loads triton

        return causal_lower_right(a, before + a)  # no mask for its kernels; elsewhere it would become a whole one

    def see(rows):
        low = 0 if window is None else max(0, before + rows[0] - window + 1)
        high = before + rows[1]
        return (low, high), visible_to_answer(a, before, window, device, rows, (low, high))

    return see


@in_own_dtypes
def attention(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, o: Options):
    """``bitune_kernels.ops.bitune_attention`` for calls without softcap and sinks."""
    softmax_scale, prefix = o.softmax_scale, o.prefix
    if softmax_scale <= 0:  # PyTorch's causal kernels scale what they masked: -inf times this is no longer -inf
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
    (*q_prompts, q_answer), (*k_prompts, k_answer), (*v_prompts, v_answer) = (plan.segments(x) for x in (q, k, v))
    k_mixed, v_mixed = mix_prompts(k_prompts, alpha_k), mix_prompts(v_prompts, alpha_v)

    lengths = zip(plan.prompt_lengths, plan.answer_lengths, plan.past_lengths, strict=True)
    # Neighbours of equal lengths share one call: (samples, prompt, answer, past) of each run.
    runs = [(len(list(same)), *each) for each, same in groupby(lengths)]

    def split(x, part):  # rows of all samples -> [samples, length, ...] of each run
        pieces = x.split([run[0] * run[part] for run in runs]) if len(runs) != 1 else (x,)
        return [piece.unflatten(0, (run[0], run[part])) for piece, run in zip(pieces, runs, strict=True)]

    prefixes = None if prefix is None else tuple(split(x, _PAST) for x in prefix)

    def seen(r, k, v):  # the samples' prefixes, then these rows
        if not runs[r][_PAST]:
            return k, v
        return torch.cat([prefixes[0][r], k], 1), torch.cat([prefixes[1][r], v], 1)

    def stream(mask, i):  # the prompts' attention in one stream
        out = []
        rows = zip(*(split(x[i], _PROMPT) for x in (q_prompts, k_prompts, v_prompts)), strict=True)
        for r, (qs, ks, vs) in enumerate(rows):
            see = _prompt_visibility(mask, runs[r][_PROMPT], runs[r][_PAST], o.window, q.device)
            out.append(_attend(qs, *seen(r, ks, vs), softmax_scale, see).flatten(0, 1))
        return out

    out = []
    if q_prompts:
        bidir = stream(o.stream_mask, 0)
        causal = stream("causal", -1) if plan.num_streams == 2 or o.shared_qkv else []
        if o.beta is not None:
            bidir, causal = [mix(c, b, o.beta) for c, b in zip(causal, bidir, strict=True)], []
        out = [*bidir, *causal]
    rows = zip(*(split(x, _ANSWER) for x in (q_answer, k_answer, v_answer)), strict=True)
    mixed = tuple(zip(split(k_mixed, _PROMPT), split(v_mixed, _PROMPT), strict=True))
    for r, (qs, ks, vs) in enumerate(rows):
        _, prompt, answer, before = runs[r]
        keys, values = seen(r, torch.cat([mixed[r][0], ks], 1), torch.cat([mixed[r][1], vs], 1))
        see = _answer_visibility(answer, before + prompt, o.window, q.device)
        out.append(_attend(qs, keys, values, softmax_scale, see).flatten(0, 1))
    out = [x for x in out if x.shape[0]]
    return (torch.cat(out) if out else q.new_zeros(0, q.shape[1], v.shape[2])), k_mixed, v_mixed
