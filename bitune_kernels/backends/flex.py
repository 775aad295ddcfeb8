"""torch's FlexAttention (a peer): one compiled call over all rows with a block mask of their segments."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from ..autocast import in_own_dtypes
from ..mixing import mix, mix_prompts
from ..plan import SegmentPlan
from . import Options


def unsupported(*, device=None, dtype=None, sinks=None, prefix=None, requires_grad=False, **call) -> str | None:
    """Why this backend can't run a call, or None."""
    kind = "cpu" if device is None else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"FlexAttention needs a CPU or CUDA device, got {kind}"
    if kind == "cpu" and requires_grad:
        return "FlexAttention has no backward on a CPU"
    if dtype == torch.float64:
        return "FlexAttention has no float64"
    if sinks is not None:
        return "attention sinks are not implemented for it"
    if prefix is not None:
        return "a cached prefix is not implemented for it"
    return None


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    # whole, or an error: what doesn't compile would hold every pair of rows in memory
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _softcap(softcap: float, device):
    # a tensor, since a graph with dynamic shapes takes no other float; filled, since a copy would wait for the GPU
    cap = torch.full((), softcap, device=device)
    return lambda score, b, h, i, j: cap * torch.tanh(score / cap)


@cache
def _compiled_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True)


def _labels(prompts: tuple[int, ...], answers: tuple[int, ...], segments: tuple[int, ...], device):
    # segment, sample and position of each row, for prompt rows (segments 0-2) and answer rows (segment 3): a vector
    # each, since labels[:, i] reads i, which no graph can
    index = torch.arange(len(prompts), device="cpu")
    parts = []
    for s in segments:
        lengths = torch.tensor(answers if s == 3 else prompts, device="cpu")
        starts = lengths.cumsum(0) - lengths
        sample = index.repeat_interleave(lengths)
        position = torch.arange(int(lengths.sum()), device="cpu") - starts[sample]
        if s == 3:
            position = position + torch.tensor(prompts, device="cpu")[sample]
        parts.append(torch.stack([torch.full_like(sample, s), sample, position]))
    return torch.cat(parts, dim=1).to(device).unbind()


@cache
def _see(stream_mask: str):
    # Segments of queries: 0 bidir, 1 causal, 3 answer; of keys: 0 bidir, 1 causal, 2 mixed, 3 answer.
    def visible(query, key, window):
        (qs, qb, i), (ks, kb, j) = query, key
        bidir = {"full": qs == 0, "causal": (qs == 0) & (j <= i), "anti_causal": (qs == 0) & (j >= i)}[stream_mask]
        see = (qb == kb) & (
            ((ks == 0) & bidir) | ((qs == 1) & (ks == 1) & (j <= i)) | ((qs == 3) & (ks >= 2) & (j <= i))
        )
        return see if window is None else see & ((i - j).abs() < window)

    return visible


@lru_cache(maxsize=4)  # one serves every layer of a model, and every batch of these lengths
def _block_mask(prompts, answers, query_segments, key_segments, stream_mask: str, window: int | None, device):
    from torch.nn.attention.flex_attention import create_block_mask

    # compiled it doesn't hold every pair of rows in memory; on a CPU that takes longer than it saves
    create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    visible = _see(stream_mask)
    with torch.inference_mode(False):  # a later call may train, and autograd saves no inference tensors
        queries, keys = (_labels(prompts, answers, segments, device) for segments in (query_segments, key_segments))
        if window is not None:
            window = torch.full((), window, device=device)  # as the softcap

        def see(b, h, i, j):
            return visible([x[i] for x in queries], [x[j] for x in keys], window)

        return create(see, None, None, len(queries[0]), len(keys[0]), device=device)


@in_own_dtypes
def attention(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, o: Options):
    """``bitune_kernels.ops.bitune_attention`` for calls without sinks and prefix."""
    N, S, A = plan.num_prompt, plan.answer_start, plan.num_answer
    prompts = q.shape[0] > A
    k_mixed, v_mixed = (mix_prompts(plan.segments(x)[:-1], alpha) for x, alpha in ((k, alpha_k), (v, alpha_v)))
    # With one stream k_mixed and v_mixed are the prompt's one set of keys, which stands once more for each stream.
    first = o.shared_qkv * N
    keys, values = (torch.cat([x[:first], x[:S], mixed, x[S:]]) for x, mixed in ((k, k_mixed), (v, v_mixed)))
    streams = [0, 1] if plan.num_streams == 2 or o.shared_qkv else [0]
    if o.shared_qkv and prompts:
        q = torch.cat([q[:N], q])
    if not q.shape[0]:
        return q.new_zeros(0, q.shape[1], v.shape[2]), k_mixed, v_mixed

    segments = (*streams, 3) if prompts else (3,), (*streams, 2, 3)
    block_mask = _block_mask(plan.prompt_lengths, plan.answer_lengths, *segments, o.stream_mask, o.window, q.device)
    out = _compiled()(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values)),
        score_mod=None if o.softcap is None else _softcap(o.softcap, q.device),
        block_mask=block_mask,
        scale=o.softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out.squeeze(0).transpose(0, 1)
    if o.beta is not None and prompts:
        out = torch.cat([mix(out[N : 2 * N], out[:N], o.beta), out[2 * N :]])
    return out, k_mixed, v_mixed
