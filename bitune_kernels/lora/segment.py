"""Linear layers with two adapters, where rows [0, n) use s = bidir and rows [n, T) use s = causal.

    LoRA   y = x W^T + b + scale_s (dropout(x) A_s^T B_s^T + bias_s)
    DoRA   y = (x W^T + scale_s x A_s^T B_s^T) * magnitude_s / |W + scale_s B_s A_s| + b     (norms of rows, constants)
    IA3    y = (x * l_s) W^T + b   or   (x W^T + b) * l_s

The base product reads W once for all rows; what belongs to an adapter is added or multiplied in its block of rows, so
nothing is concatenated. The products are PyTorch's: a rank-r one is bound by reading x and y, and no kernel of our own
has been measured to be faster. W and b are frozen. Adapters may be kept in float32: products are computed in x's dtype,
under autocast in its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..autocast import without_autocast


class Adapter(NamedTuple):
    """One LoRA adapter.

    Attributes:
        a: [r, in_features].
        b: [out_features, r].
        scale: factor of the product.
        bias: [out_features], scaled too, or None.
        dropout: probability that an element of x is zero for this adapter, in this call.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None
    dropout: float = 0.0


_NO_ADAPTER = Adapter(None, None)  # in the place of one that serves no row


def _emulated_dtypes() -> tuple[torch.dtype, ...]:
    # What an x86 CPU has no products of: PyTorch's loops are several times slower than products in float32.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.bfloat16, torch.float16
    has_float16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return (torch.float16,) if torch.backends.cpu.get_cpu_capability() == "AVX512" and not has_float16 else ()


_EMULATED = _emulated_dtypes()


def _emulated(x: torch.Tensor) -> bool:
    return x.dtype in _EMULATED and x.device.type == "cpu"


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    # Widening W once per pass is cheaper than emulated products of many rows.
    return torch.float32 if _emulated(x) and x.shape[0] >= 16 else x.dtype


def _cast(dtype: torch.dtype, x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _drop(x: torch.Tensor, mask: torch.Tensor | None, keep: float) -> torch.Tensor:
    # a dropout again, or its gradient, which are the same: x * mask / keep
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / keep)


# One operator for the product and what is added to it in place: selective checkpointing keeps its output, and a
# compiled graph, which would copy y for each block, doesn't look inside. Defined by its parts, since it is called for
# every linear layer and torch.library.custom_op takes tens of microseconds.
_library = torch.library.Library("bitune", "FRAGMENT")
_library.define(
    "segment_lora(Tensor start, Tensor? weight, Tensor? bias, Tensor h_bidir, Tensor b_bidir, float scale_bidir, "
    "Tensor? bias_bidir, Tensor h_causal, Tensor b_causal, float scale_causal, Tensor? bias_causal, bool twice) -> "
    "Tensor"
)


@torch.library.impl(_library, "segment_lora", "CompositeExplicitAutograd")
def _segment_lora(start, weight, bias, h_bidir, b_bidir, scale_bidir, bias_bidir, h_causal, b_causal, *rest):
    # start is x, or without a weight the finished product of another layer, which may need it unchanged
    scale_causal, bias_causal, twice = rest
    n = h_bidir.shape[0]
    if twice:
        y = start.new_empty(n + start.shape[0], weight.shape[0])
        once = y[n:]
        torch.mm(start, weight.T, out=once)
        if bias is not None:
            once.add_(bias)
        y[:n] = once[:n]
    else:
        y = start.clone() if weight is None else linear(start, weight, bias)
    for rows, h, b, scale, adapter_bias in (
        (y[:n], h_bidir, b_bidir, scale_bidir, bias_bidir),
        (y[n:], h_causal, b_causal, scale_causal, bias_causal),
    ):
        if h.shape[0]:
            rows.addmm_(h, b.T, alpha=scale)
            if adapter_bias is not None:
                rows.add_(adapter_bias, alpha=scale)
    return y


@torch.library.register_fake("bitune::segment_lora", lib=_library)
def _(start, weight, bias, h_bidir, *rest):
    rows = start.shape[0] + (h_bidir.shape[0] if rest[-1] else 0)
    return start.new_empty(rows, start.shape[1] if weight is None else weight.shape[0])


def _forward(operator, x, product, weight, bias, n, twice, bidir, causal):
    # The layer's output, and what its gradients need of each adapter: a, b, h, mask.
    dtype = _product_dtype(x)
    x_ = _cast(dtype, x)
    saved, operands = [], []
    for rows, (a, b, scale, adapter_bias, dropout) in ((x_[:n], bidir), (x_ if twice else x_[n:], causal)):
        if a is None:
            operands += (x_.new_empty(0, 1), x_.new_empty(0, 1), 1.0, None)
            saved += (None, None, None, None)
            continue
        mask = None
        if dropout:
            rows, mask = torch.native_dropout(rows, dropout, True)
        h = linear(rows, _cast(dtype, a))
        operands += (h, _cast(dtype, b), scale, _cast(dtype, adapter_bias))
        saved += (a, b, h, mask)
    start = x_ if product is None else _cast(dtype, product)
    y = operator(start, _cast(dtype, weight), _cast(dtype, bias), *operands, twice)
    # not y.to(...) where there is nothing to do: compiled by PyTorch 2.11, its gradients would be 0
    return _cast(x.dtype if product is None else product.dtype, y), saved


class _SegmentLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, product, weight, bias, n, twice, *adapters):
        # product: x W^T + b of a layer that multiplies by itself, or None
        bidir, causal = Adapter(*adapters[:5]), Adapter(*adapters[5:])
        y, saved = _forward(torch.ops.bitune.segment_lora, x, product, weight, bias, n, twice, bidir, causal)
        ctx.save_for_backward(x, weight, *saved)
        ctx.n, ctx.first = n, 0 if twice else n  # the first row of x that causal serves
        ctx.scales, ctx.keeps = (bidir.scale, causal.scale), (1 - bidir.dropout, 1 - causal.dropout)
        ctx.dtype = _product_dtype(x)
        return y

    @staticmethod
    @once_differentiable  # h is saved as a constant, so a second derivative would be wrong in silence
    def backward(ctx, dy_):
        n, first, dtype, needed = ctx.n, ctx.first, ctx.dtype, ctx.needs_input_grad
        x_, weight, *saved = ctx.saved_tensors
        with without_autocast(dy_):
            dy, x = _cast(dtype, dy_), _cast(dtype, x_)
            dx = None
            if needed[0]:
                both = dy
                if first < n:
                    both = dy[n:].clone()
                    both[:n] += dy[:n]
                dx = torch.zeros_like(x) if weight is None else both @ _cast(dtype, weight)
            grads = []
            for i, (rows, own) in enumerate(((slice(0, n), slice(0, n)), (slice(n, None), slice(first, None)))):
                a_, b_, h, mask = saved[4 * i : 4 * i + 4]
                if a_ is None:
                    grads += [None] * 5
                    continue
                need_a, need_b, _, need_bias, _ = needed[5 * i + 6 : 5 * i + 11]
                scale, keep = ctx.scales[i], ctx.keeps[i]
                a, b, d = _cast(dtype, a_), _cast(dtype, b_), dy[rows]
                da = db = dbias = None
                # beta=0: the product times scale in one launch, whatever the first tensor holds
                dh = torch.addmm(h, d, b, beta=0, alpha=scale)
                if need_a:
                    da = _cast(a_.dtype, dh.T @ _drop(x[own], mask, keep))
                if need_b:
                    db = _cast(b_.dtype, torch.addmm(b, d.T, h, beta=0, alpha=scale))
                if need_bias:
                    dbias = _cast(b_.dtype, d.sum(0) * scale)
                if dx is not None and mask is None:
                    dx[own].addmm_(dh, a)
                elif dx is not None:
                    dx[own] += _drop(dh @ a, mask, keep)
                grads += [da, db, None, dbias, None]
        dproduct = dy_ if needed[1] else None
        return _cast(x_.dtype, dx), dproduct, None, None, None, None, *grads


def _segment_lora_of(x, product, weight, bias, n, twice, bidir, causal):
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            x = x.to(torch.get_autocast_dtype(device))
            return _segment_lora_of(x, product, weight, bias, n, twice, bidir, causal)
    bidir = bidir or _NO_ADAPTER
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _SegmentLora.apply(x, product, weight, bias, n, twice, *bidir, *causal)
    # where nothing is differentiated, neither an autograd function nor an operator: each costs 10 us
    return _forward(_segment_lora, x, product, weight, bias, n, twice, bidir, causal)[0]


def segment_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bidir: Adapter | None,
    causal: Adapter,
    *,
    twice: bool = False,
) -> torch.Tensor:
    """A linear layer with two LoRA adapters, each serving one block of rows.

    Where a CPU has no products of the dtype, they are computed in float32 and the result is rounded once.

    Args:
        x: [T, in_features], floating.
        weight, bias: frozen, [out_features, in_features] and [out_features] or None.
        n: rows [0, n) use ``bidir``, rows [n, T) use ``causal``.
        bidir: None where n is 0.
        twice: rows [0, n) use both: what ``bidir`` makes of them stands in front of what ``causal`` makes of all rows,
            and the base product is computed once.

    Returns:
        [T, out_features] (``twice``: [n + T, out_features]) in x's dtype, under autocast in its dtype. Differentiable
        once in x and the adapters.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight, bias: expected a frozen base layer, got requires_grad=True")
    return _segment_lora_of(x, None, weight, bias, n, twice, bidir, causal)


def segment_lora_add(
    product: torch.Tensor, x: torch.Tensor, n: int, bidir: Adapter | None, causal: Adapter
) -> torch.Tensor:
    """``segment_lora_linear`` over a base product that another layer computed: one of quantized weights, for example.

    Args:
        product: [T, out_features], the layer's output for ``x``.
        x, n, bidir, causal: as there.

    Returns:
        [T, out_features] in the product's dtype. Differentiable once in product, x and the adapters.
    """
    return _segment_lora_of(x, product, None, None, n, False, bidir, causal)


class _SegmentScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, bidir, causal, bias):
        ctx.save_for_backward(x, bidir, causal)
        ctx.n = n
        y = torch.empty_like(x)
        if n:
            torch.mul(x[:n], bidir, out=y[:n])
        torch.mul(x[n:], causal, out=y[n:])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bidir, causal = ctx.saved_tensors
        dx = torch.empty_like(dy) if ctx.needs_input_grad[0] else None
        grads = []
        for rows, factor, needed in (
            (slice(0, ctx.n), bidir, ctx.needs_input_grad[2]),
            (slice(ctx.n, None), causal, ctx.needs_input_grad[3]),
        ):
            if factor is None:
                grads.append(None)
                continue
            if dx is not None:
                torch.mul(dy[rows], factor, out=dx[rows])
            wide = torch.promote_types(factor.dtype, torch.float32)
            grads.append((dy[rows] * x[rows]).sum(0, dtype=wide).to(factor.dtype) if needed else None)
        return dx, None, *grads, None


def segment_scale(
    x: torch.Tensor, n: int, bidir: torch.Tensor | None, causal: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Every row times the factors of its adapter, plus a bias.

    Args:
        x: [T, features].
        n: rows [0, n) use ``bidir``, rows [n, T) use ``causal``.
        bidir, causal: [features]; ``bidir`` None where n is 0.
        bias: frozen, [features] or None.

    Returns:
        [T, features] in x's dtype. Differentiable once in x and both factors.
    """
    return _SegmentScale.apply(x, n, bidir, causal, bias)


@torch.no_grad()
def adapted_row_norms(weight: torch.Tensor, adapters: Sequence[Adapter]) -> list[torch.Tensor]:
    """|W + scale B A| of every row for each adapter, without the sum: constants of DoRA.

    With P = W A^T and G = A A^T it is the root of |W_i|^2 + 2 scale B_i . P_i + scale^2 B_i G B_i^T.

    Args:
        weight: [out_features, in_features].
        adapters: their ``a``, ``b`` and ``scale``.

    Returns:
        Per adapter [out_features], in float32 or wider.
    """
    norms = []
    with without_autocast(weight):
        dtype = torch.float32 if _emulated(weight) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight = weight.to(dtype)
        base = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        for adapter in adapters:
            a, b = adapter.a.to(wide), adapter.b.to(wide)
            product = (weight @ adapter.a.to(dtype).T).to(wide)  # [out_features, r]
            cross = (product * b).sum(1)
            square = ((b @ (a @ a.T)) * b).sum(1)
            norms.append((base + 2 * adapter.scale * cross + adapter.scale**2 * square).clamp_min(0).sqrt())
    return norms
