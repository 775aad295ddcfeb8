"""The formula. Every other backend is tested against this one, so it is written to be read, not to be fast.

For one sample with m cached prefix tokens, n prompt tokens and a answer tokens at positions 0 .. m+n+a-1:

    bidir stream    o_b = attend(q_b, [prefix; k_b], [prefix; v_b])    all of the prompt is visible ("full")
    causal stream   o_c = attend(q_c, [prefix; k_c], [prefix; v_c])    key j is visible to query i if j <= i
    mixed cache     k_m = (1 - alpha_k) k_c + alpha_k k_b,  v_m = (1 - alpha_v) v_c + alpha_v v_b
    answer          o_a = attend(q_a, [prefix; k_m; k_a], [prefix; v_m; v_a])    causal

with attend(q, k, v) = softmax(cap(scale q k^T) over the visible keys and the sink) v, computed in float32
(float64 for float64 input). k_m and v_m are rounded to the dtype of k and v before the answer attends to them,
as a key/value cache would hold them.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from ..autocast import in_own_dtypes
from ..masks import visible_to_answer, visible_to_prompt
from ..mixing import mix
from ..plan import SegmentPlan
from . import Options


def unsupported(**call) -> str | None:
    """Why this backend can't run a call, or None: it runs everything."""
    return None


@in_own_dtypes
def attention_weights(q, k, see, softmax_scale, softcap=None, sinks=None, upcast=True):
    """softmax(cap(scale q k^T)) over the visible keys, zero at the others. A query that sees nothing has zeros.

    q [Lq, Hq, D], k [Lk, Hkv, D], see bool [Lq, Lk], sinks [Hq] or None -> [Hq, Lq, Lk], float32 (float64 for float64
    input). Query head h uses key/value head h // (Hq / Hkv). A sink is one more score per head without a value, whose
    share the rows then lack.
    """
    dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat([scores, sink], dim=-1)
    highest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(1)
    weights = torch.exp(scores - highest.clamp_min(torch.finfo(dtype).min))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return weights[..., : k.shape[0]]


def attend(q, k, v, see, softmax_scale, softcap=None, sinks=None, upcast=True):
    """The values v [Lk, Hkv, Dv] in the proportions of ``attention_weights`` -> [Lq, Hq, Dv]."""
    weights = attention_weights(q, k, see, softmax_scale, softcap, sinks, upcast)
    v = v.to(weights.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


@in_own_dtypes
def attention(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, options: Options, upcast: bool = True):
    """``bitune_kernels.ops.bitune_attention`` sample by sample. ``upcast=False`` computes in the input's own dtype."""
    softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix = options
    N, prompts = plan.num_prompt, q.shape[0] == plan.num_rows  # False: q holds the answer rows alone
    two_streams = plan.num_streams == 2 or shared_qkv
    dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
    q_prompt, q_answer = q[: q.shape[0] - plan.num_answer], q[q.shape[0] - plan.num_answer :]

    # The prompt rows of each stream. With one set of rows both streams are the same (shared_qkv) or there is one.
    k_bidir, k_causal = k[:N], k[plan.answer_start - N : plan.answer_start]
    v_bidir, v_causal = v[:N], v[plan.answer_start - N : plan.answer_start]
    q_bidir, q_causal = q_prompt[:N], q_prompt[len(q_prompt) - N :]
    k_answer, v_answer = k[plan.answer_start :], v[plan.answer_start :]
    if plan.num_streams == 2:
        k_mixed, v_mixed = mix(k_causal, k_bidir, alpha_k, dtype), mix(v_causal, v_bidir, alpha_v, dtype)
    else:
        k_mixed, v_mixed = k_bidir, v_bidir

    def rows_of(sample: int, cumulative: list[int]) -> slice:
        return slice(cumulative[sample], cumulative[sample + 1])

    # not the plan's tensors: reading them would wait for a GPU, once per layer
    cu_prompt, cu_answer, cu_prefix = (
        [0, *accumulate(lengths)] for lengths in (plan.prompt_lengths, plan.answer_lengths, plan.past_lengths)
    )
    k_prefix, v_prefix = (k[:0], v[:0]) if prefix is None else prefix
    bidir, causal, answer = [], [], []
    for b in range(plan.batch_size):
        p, r, past = rows_of(b, cu_prompt), rows_of(b, cu_answer), rows_of(b, cu_prefix)
        m, n, a = past.stop - past.start, p.stop - p.start, r.stop - r.start
        scores = dict(softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, upcast=upcast)

        def keys(*parts, m=m, past=past):  # the sample's prefix, then these rows
            return torch.cat([k_prefix[past], *parts]) if m else torch.cat(parts)

        def values(*parts, m=m, past=past):
            return torch.cat([v_prefix[past], *parts]) if m else torch.cat(parts)

        if prompts:
            see = visible_to_prompt(stream_mask, n, m, window, q.device)
            bidir.append(attend(q_bidir[p], keys(k_bidir[p]), values(v_bidir[p]), see, **scores))
        if prompts and two_streams:
            see = visible_to_prompt("causal", n, m, window, q.device)
            causal.append(attend(q_causal[p], keys(k_causal[p]), values(v_causal[p]), see, **scores))
        see = visible_to_answer(a, m + n, window, q.device)
        k_seen, v_seen = keys(k_mixed[p], k_answer[r]), values(v_mixed[p], v_answer[r])
        answer.append(attend(q_answer[r], k_seen, v_seen, see, **scores))

    if beta is not None and prompts:
        bidir, causal = [mix(c, o, beta, dtype) for c, o in zip(causal, bidir, strict=True)], []
    return torch.cat([q.new_empty(0, q.shape[1], v.shape[2]), *bidir, *causal, *answer]), k_mixed, v_mixed
