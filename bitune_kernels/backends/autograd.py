"""A call of a backend, differentiable: its ``attention``, or its ``forward`` with its ``backward``."""

from __future__ import annotations

from types import ModuleType

import torch

from . import Options


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, plan, options, *inputs):  # q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix
        out, k_mixed, v_mixed, streams, lse = module.forward(*inputs[:5], plan, options, save=True)
        ctx.save_for_backward(*inputs, out, streams, lse)
        ctx.module, ctx.plan, ctx.options = module, plan, options.without_tensors()
        ctx.given = [x is not None for x in inputs]
        ctx.set_materialize_grads(False)
        # Views of k and v with one stream: the caller slices them, where autograd sees it.
        return (out, k_mixed, v_mixed) if plan.num_streams == 2 else (out, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_k_mixed, d_v_mixed):
        if d_out is None:
            d_out = torch.zeros_like(ctx.saved_tensors[9])
        grads = iter(ctx.module.backward(d_out, d_k_mixed, d_v_mixed, *ctx.saved_tensors, ctx.plan, **ctx.options))
        return None, None, None, *[next(grads) if given else None for given in ctx.given]


def attention(module: ModuleType, q, k, v, alpha_k, alpha_v, plan, options: Options, requires_grad: bool):
    """``bitune_kernels.ops.bitune_attention`` with this module; differentiable once where it has kernels of its own."""
    if hasattr(module, "attention"):
        return module.attention(q, k, v, alpha_k, alpha_v, plan, options)
    if not requires_grad:
        return module.forward(q, k, v, alpha_k, alpha_v, plan, options, save=False)[:3]
    inputs = (q, k, v, alpha_k, alpha_v, options.beta, options.sinks, *(options.prefix or (None, None)))
    out, k_mixed, v_mixed = _Attention.apply(module, plan, options, *inputs)
    if plan.num_streams == 1:
        k_mixed, v_mixed = k[: plan.num_prompt], v[: plan.num_prompt]
    return out, k_mixed, v_mixed
