"""``attention`` of a backend, differentiable, from its ``forward`` and ``backward``."""

from __future__ import annotations

import torch

from ..plan import SegmentPlan


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, plan, options, q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix):
        prefix = None if k_prefix is None else (k_prefix, v_prefix)
        given = options | {"beta": beta, "sinks": sinks, "prefix": prefix}
        out, k_mixed, v_mixed, streams, lse = forward(q, k, v, alpha_k, alpha_v, plan, **given, save=True)
        inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix)
        ctx.save_for_backward(*inputs, out, streams, lse)
        ctx.function, ctx.plan, ctx.options = backward, plan, options
        ctx.given = [x is not None for x in inputs]
        ctx.set_materialize_grads(False)
        # Views of k and v with one stream: the caller slices them, where autograd sees it.
        return (out, k_mixed, v_mixed) if plan.num_streams == 2 else (out, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_k_mixed, d_v_mixed):
        if d_out is None:
            d_out = torch.zeros_like(ctx.saved_tensors[9])
        grads = iter(ctx.function(d_out, d_k_mixed, d_v_mixed, *ctx.saved_tensors, ctx.plan, **ctx.options))
        return None, None, None, None, *[next(grads) if given else None for given in ctx.given]


def attention(
    forward,
    backward,
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    plan: SegmentPlan,
    *,
    beta=None,
    sinks=None,
    prefix=None,
    **options,
):
    """``bitune_kernels.ops.bitune_attention``, differentiable once, by the functions of a backend."""
    options = {"window": None, "softcap": None, "stream_mask": "full", "shared_qkv": False} | options
    inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, *(prefix or (None, None)))
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        given = options | {"beta": beta, "sinks": sinks, "prefix": prefix, "save": False}
        return forward(q, k, v, alpha_k, alpha_v, plan, **given)[:3]
    out, k_mixed, v_mixed = _Attention.apply(forward, backward, plan, options, *inputs)
    if plan.num_streams == 1:
        k_mixed, v_mixed = k[: plan.num_prompt], v[: plan.num_prompt]
    return out, k_mixed, v_mixed
