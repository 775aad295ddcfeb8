"""y = x W^T + b + scale_s (x A_s^T) B_s^T, where rows [0, n) use adapter s = bidir and rows [n, T) use s = causal.

The base GEMM reads W once for all rows; each adapter's product is added in place to its block of y, so nothing is
copied or concatenated. W and b are frozen.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@cache
def _emulated(device_type: str, dtype: torch.dtype) -> bool:
    # A CPU with AVX2 alone has no bfloat16 or float16 products: PyTorch's loops are several times slower than float32.
    return (
        device_type == "cpu"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


def _computable(like: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    # The tensors in the dtype to multiply in: widening W once per pass is cheaper than emulated products of many rows.
    if _emulated(like.device.type, like.dtype) and like.shape[0] >= 16:
        return [None if t is None else t.float() for t in tensors]
    return list(tensors)


class _SegmentLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, n, a_bidir, b_bidir, scale_bidir, a_causal, b_causal, scale_causal):
        ctx.n, ctx.scales = n, (scale_bidir, scale_causal)
        x_, weight_, bias_, *ab = _computable(x, x, weight, bias, a_bidir, b_bidir, a_causal, b_causal)
        y = linear(x_, weight_, bias_)
        h_bidir, h_causal = x_[:n] @ ab[0].T, x_[n:] @ ab[2].T
        y[:n].addmm_(h_bidir, ab[1].T, alpha=scale_bidir)
        y[n:].addmm_(h_causal, ab[3].T, alpha=scale_causal)
        ctx.save_for_backward(x, weight, a_bidir, b_bidir, h_bidir, a_causal, b_causal, h_causal)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable  # h is saved as a constant, so a second derivative would be wrong in silence
    def backward(ctx, dy):
        n, dtype = ctx.n, dy.dtype
        dy, x, weight, a_bidir, b_bidir, h_bidir, a_causal, b_causal, h_causal = _computable(dy, dy, *ctx.saved_tensors)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        grads = []
        for rows, a, b, h, scale, first in (
            (slice(0, n), a_bidir, b_bidir, h_bidir, ctx.scales[0], 4),
            (slice(n, None), a_causal, b_causal, h_causal, ctx.scales[1], 7),
        ):
            dh = (dy[rows] @ b) * scale
            if dx is not None:
                dx[rows].addmm_(dh, a)
            da = (dh.T @ x[rows]).to(dtype) if ctx.needs_input_grad[first] else None
            db = ((dy[rows].T @ h) * scale).to(dtype) if ctx.needs_input_grad[first + 1] else None
            grads += [da, db, None]
        return None if dx is None else dx.to(dtype), None, None, None, *grads


def segment_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bidir: tuple[torch.Tensor, torch.Tensor, float],
    causal: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    """A linear layer with two LoRA adapters, each serving one block of rows.

    Where a CPU has no products of the dtype, they are computed in float32 and the result is rounded once.

    Args:
        x: [T, in_features].
        weight, bias: frozen, [out_features, in_features] and [out_features] or None.
        n: rows [0, n) use ``bidir``, rows [n, T) use ``causal``.
        bidir, causal: (A [r, in_features], B [out_features, r], scale), of x's dtype.

    Returns:
        [T, out_features]. Differentiable once in x and both A and B.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight, bias: expected a frozen base layer, got requires_grad=True")
    return _SegmentLora.apply(x, weight, bias, n, *bidir, *causal)
