"""y = x W^T + b + scale_s (x A_s^T) B_s^T, where rows [0, n) use adapter s = bidir and rows [n, T) use s = causal.

The base GEMM reads W once for all rows; each adapter's product is added in place to its block of y, so nothing is
copied or concatenated. W and b are frozen.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear


class _SegmentLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, n, a_bidir, b_bidir, scale_bidir, a_causal, b_causal, scale_causal):
        y = linear(x, weight, bias)
        h_bidir, h_causal = x[:n] @ a_bidir.T, x[n:] @ a_causal.T
        y[:n].addmm_(h_bidir, b_bidir.T, alpha=scale_bidir)
        y[n:].addmm_(h_causal, b_causal.T, alpha=scale_causal)
        ctx.n, ctx.scales = n, (scale_bidir, scale_causal)
        ctx.save_for_backward(x, weight, a_bidir, b_bidir, h_bidir, a_causal, b_causal, h_causal)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a_bidir, b_bidir, h_bidir, a_causal, b_causal, h_causal = ctx.saved_tensors
        n = ctx.n
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        grads = []
        for rows, a, b, h, scale, first in (
            (slice(0, n), a_bidir, b_bidir, h_bidir, ctx.scales[0], 4),
            (slice(n, None), a_causal, b_causal, h_causal, ctx.scales[1], 7),
        ):
            dh = (dy[rows] @ b) * scale
            if dx is not None:
                dx[rows].addmm_(dh, a)
            da = dh.T @ x[rows] if ctx.needs_input_grad[first] else None
            db = (dy[rows].T @ h) * scale if ctx.needs_input_grad[first + 1] else None
            grads += [da, db, None]
        return dx, None, None, None, *grads


def segment_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bidir: tuple[torch.Tensor, torch.Tensor, float],
    causal: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    """A linear layer with two LoRA adapters, each serving one block of rows.

    Args:
        x: [T, in_features].
        weight, bias: frozen, [out_features, in_features] and [out_features] or None.
        n: rows [0, n) use ``bidir``, rows [n, T) use ``causal``.
        bidir, causal: (A [r, in_features], B [out_features, r], scale), of x's dtype.

    Returns:
        [T, out_features]. Differentiable in x and both A and B.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight, bias: expected a frozen base layer, got requires_grad=True")
    return _SegmentLora.apply(x, weight, bias, n, *bidir, *causal)
