"""Triton kernels: the whole of ``bitune_attention`` in one launch, its backward in three, and the mix alone.

``schedule.py`` says which tile each program computes, ``attention_forward.py`` and ``attention_backward.py`` are the
kernels, ``tiles.py`` the sizes. This file is what the operators call; it imports triton only when it does.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ...plan import SegmentPlan


def unsupported(*, device=None, dtype=None, head_dim=None, head_dim_v=None, **call) -> str | None:
    """Why this backend can't run a call, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from . import tiles

    return tiles.unsupported(device, dtype, max(head_dim or 0, head_dim_v or 0))


def forward(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, **options):
    """``out, k_mixed, v_mixed, streams, lse``: see ``attention_forward.forward``."""
    from .attention_forward import forward

    return forward(q, k, v, alpha_k, alpha_v, plan, **options)


def backward(*tensors, **options) -> list[torch.Tensor]:
    """The gradients: see ``attention_backward.backward``."""
    from .attention_backward import backward

    return backward(*tensors, **options)


def prefill(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, **options) -> torch.Tensor:
    """``out``; the mixed prompt and the answer go straight into k_cache and v_cache at cache_positions."""
    return forward(q, k, v, alpha_k, alpha_v, plan, **options, save=False)[0]


def mix(causal: torch.Tensor, bidir: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """``(1 - alpha) causal + alpha bidir``: [rows, heads, dim], alpha [] or [heads]."""
    from .mixing import mix

    return mix(causal, bidir, alpha)


def mix_backward(d_mixed, causal, bidir, alpha) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``d_causal, d_bidir, d_alpha``."""
    from .mixing import mix_backward

    return mix_backward(d_mixed, causal, bidir, alpha)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, options, q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix):
        prefix = None if k_prefix is None else (k_prefix, v_prefix)
        given = options | {"beta": beta, "sinks": sinks, "prefix": prefix}
        out, k_mixed, v_mixed, streams, lse = forward(q, k, v, alpha_k, alpha_v, plan, **given, save=True)
        inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix)
        ctx.save_for_backward(*inputs, out, streams, lse)
        ctx.plan, ctx.options, ctx.given = plan, options, [x is not None for x in inputs]
        ctx.set_materialize_grads(False)
        # Views of k and v with one stream: the caller slices them, where autograd sees it.
        return (out, k_mixed, v_mixed) if plan.num_streams == 2 else (out, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_k_mixed, d_v_mixed):
        if d_out is None:
            d_out = torch.zeros_like(ctx.saved_tensors[9])
        grads = iter(backward(d_out, d_k_mixed, d_v_mixed, *ctx.saved_tensors, ctx.plan, **ctx.options))
        return None, None, *[next(grads) if given else None for given in ctx.given]


def attention(q, k, v, alpha_k, alpha_v, plan: SegmentPlan, *, beta=None, sinks=None, prefix=None, **options):
    """``bitune_kernels.ops.bitune_attention``, differentiable once."""
    options = {"window": None, "softcap": None, "stream_mask": "full", "shared_qkv": False} | options
    inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, *(prefix or (None, None)))
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        given = options | {"beta": beta, "sinks": sinks, "prefix": prefix, "save": False}
        return forward(q, k, v, alpha_k, alpha_v, plan, **given)[:3]
    out, k_mixed, v_mixed = _Attention.apply(plan, options, *inputs)
    if plan.num_streams == 1:
        k_mixed, v_mixed = k[: plan.num_prompt], v[: plan.num_prompt]
    return out, k_mixed, v_mixed
