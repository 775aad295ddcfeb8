"""FlashAttention's varlen kernels (a peer): one launch per prompt stream, one mix, one launch for the answer.

They come from the package flash-attn, or where that is not installed from the copy in PyTorch.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from torch.nn.attention.varlen import varlen_attn

from ..autocast import in_own_dtypes
from ..mixing import mix, mix_prompts
from ..plan import SegmentPlan
from . import Options

PACKAGE = find_spec("flash_attn") is not None
# The first version of PyTorch's function takes grouped heads without being told, as the kernels below it do.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def unsupported(
    *,
    device=None,
    dtype=None,
    head_dim=None,
    head_dim_v=None,
    softcap=None,
    sinks=None,
    stream_mask="full",
    prefix=None,
    **call,
) -> str | None:
    """Why this backend can't run a call, or None."""
    if device is not None and torch.device(device).type != "cuda":
        return f"flash-attn needs a CUDA device, got {torch.device(device).type}"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16, got {dtype}"
    if head_dim_v not in (None, head_dim):
        return f"flash-attn needs values as wide as keys, got {head_dim_v} and {head_dim}"
    if head_dim is not None and head_dim > 256:
        return f"flash-attn needs head dims up to 256, got {head_dim}"
    if not PACKAGE:
        if head_dim is not None and head_dim % 8:
            return f"PyTorch's flash-attn needs head dims that are multiples of 8, got {head_dim}; install flash-attn"
        if softcap is not None:
            return "PyTorch's flash-attn has no softcap; install flash-attn"
    if stream_mask == "anti_causal":
        return "flash-attn has no anti-causal mask"
    if sinks is not None:
        return "flash-attn has no attention sinks"
    if prefix is not None:
        return "a cached prefix is not implemented for it"
    return None


def _joined(first, first_lengths, second, second_lengths):
    # Per sample the rows of `first`, then those of `second`: [sum of both, heads, dim].
    if len(first_lengths) == 1:
        return torch.cat([first, second])
    pairs = zip(first.split(list(first_lengths)), second.split(list(second_lengths)), strict=True)
    return torch.cat([rows for pair in pairs for rows in pair])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    # The kernels load 16 bytes at a time, and don't check where.
    places = x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:2])
    return x if x.stride(2) == 1 and not any(place % 16 for place in places) else x.contiguous()


def varlen(q, k, v, cu_q, cu_k, max_q: int, max_k: int, *, softmax_scale=None, window_size=(-1, -1)):
    """PyTorch's ``varlen_attn``, with grouped heads."""
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=window_size, **_GROUPED)


@in_own_dtypes
def attention(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, o: Options):
    """``bitune_kernels.ops.bitune_attention`` for calls without sinks, prefix and the anti-causal mask."""
    softmax_scale, window = o.softmax_scale, o.window

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        q, k, v = (_aligned(x) for x in (q, k, v))
        left = -1 if window is None else window - 1
        window_size = left, 0 if causal else left
        if not PACKAGE:
            return varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=softmax_scale, window_size=window_size)
        from flash_attn import flash_attn_varlen_func

        named = dict(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=o.softcap or 0.0)
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **named)

    if softmax_scale <= 0:  # its kernels scale what they masked: -inf times this is no longer -inf
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale else (q * 0, 1.0)
    (*q_prompts, q_answer), (*k_prompts, k_answer), (*v_prompts, v_answer) = (plan.segments(x) for x in (q, k, v))
    k_mixed, v_mixed = mix_prompts(k_prompts, alpha_k), mix_prompts(v_prompts, alpha_v)

    out = []
    if q_prompts and plan.num_prompt:
        lengths = (plan.cu_prompt, plan.cu_prompt, plan.max_prompt, plan.max_prompt)
        out.append(attend(q_prompts[0], k_prompts[0], v_prompts[0], *lengths, o.stream_mask == "causal"))
        if plan.num_streams == 2 or o.shared_qkv:
            out.append(attend(q_prompts[-1], k_prompts[-1], v_prompts[-1], *lengths, True))
        if o.beta is not None:
            out = [mix(out[1], out[0], o.beta)]
    if plan.num_answer:
        keys = _joined(k_mixed, plan.prompt_lengths, k_answer, plan.answer_lengths)
        values = _joined(v_mixed, plan.prompt_lengths, v_answer, plan.answer_lengths)
        longest = max(n + a for n, a in zip(plan.prompt_lengths, plan.answer_lengths, strict=True))
        cu_keys = plan.cu_prompt + plan.cu_answer
        # causal is aligned to the end of the keys, which is where the answer's own stand
        out.append(attend(q_answer, keys, values, plan.cu_answer, cu_keys, plan.max_answer, longest, True))
    return (torch.cat(out) if out else q.new_zeros(0, q.shape[1], v.shape[2])), k_mixed, v_mixed
