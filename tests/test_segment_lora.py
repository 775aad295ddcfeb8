"""Two LoRA adapters over row blocks of one linear layer, against the formula and autograd."""

from __future__ import annotations

import pytest
import torch

from bitune_kernels.lora import segment
from bitune_kernels.lora.segment import segment_lora_linear
from bitune_kernels.testing import assert_within_budget

SHAPES = {"mixed": (37, 11), "no bidir rows": (20, 0), "no causal rows": (20, 20), "few rows": (3, 1), "none": (0, 0)}
NAMES = ("x", "a_bidir", "b_bidir", "a_causal", "b_causal")


def formula(x, weight, bias, n, bidir, causal):
    blocks = ((x[:n], bidir), (x[n:], causal))
    return torch.cat([xs @ weight.T + bias + scale * (xs @ a.T) @ b.T for xs, (a, b, scale) in blocks])


def inputs(rows: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(rows, 2 * 24)[:, ::2]  # a stride of 2
    adapters = [normal(*shape) for shape in ((4, 24), (40, 4), (4, 24), (40, 4))]
    return [x, *adapters], normal(40, 24), normal(40), normal(rows, 40)


def results(function, tensors, weight, bias, n, cotangent):
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, a_bidir, b_bidir, a_causal, b_causal = leaves
    y = function(x, weight, bias, n, (a_bidir, b_bidir, 0.5), (a_causal, b_causal, 2.0))
    gradients = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return {"y": y.detach()} | {f"d_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, dtype, emulated, monkeypatch):
    monkeypatch.setattr(segment, "_emulated", lambda device, dtype: emulated and dtype.itemsize == 2)
    rows, n = SHAPES[shape]
    tensors, weight, bias, cotangent = inputs(rows, dtype)
    wide = [[t.double() for t in tensors], weight.double(), bias.double()]
    oracle = results(formula, *wide, n, cotangent.double())
    low = results(formula, tensors, weight, bias, n, cotangent)
    for name, found in results(segment_lora_linear, tensors, weight, bias, n, cotangent).items():
        assert found.dtype == dtype
        assert_within_budget(name, found, oracle[name], low[name], dtype, shape)


def test_the_adapters_are_not_exchanged():
    (x, a_bidir, b_bidir, a_causal, b_causal), weight, bias, _ = inputs(8, torch.float64)
    zero = (torch.zeros_like(a_causal), b_causal, 1.0)
    y = segment_lora_linear(x, weight, bias, 3, (a_bidir, b_bidir, 1.0), zero)
    plain = x @ weight.T + bias
    torch.testing.assert_close(y[3:], plain[3:])
    assert (y[:3] - plain[:3]).abs().min() > 0


def test_second_derivatives_are_refused():
    (x, *adapters), weight, bias, _ = inputs(5, torch.float64)
    leaf = x.detach().requires_grad_()
    y = segment_lora_linear(leaf, weight, bias, 2, (*adapters[:2], 1.0), (*adapters[2:], 1.0))
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_trained_base_is_refused():
    (x, *adapters), weight, bias, _ = inputs(4, torch.float32)
    with pytest.raises(ValueError, match="frozen base"):
        segment_lora_linear(x, weight.requires_grad_(), bias, 2, (*adapters[:2], 1.0), (*adapters[2:], 1.0))
