"""Two LoRA adapters over row blocks of one linear layer, against the formula and autograd."""

from __future__ import annotations

import pytest
import torch

from bitune_kernels.lora import segment
from bitune_kernels.lora.segment import (
    Adapter,
    adapted_row_norms,
    segment_lora_add,
    segment_lora_linear,
    segment_scale,
)
from bitune_kernels.testing import assert_within_budget

SHAPES = {"mixed": (37, 11), "no bidir rows": (20, 0), "no causal rows": (20, 20), "few rows": (3, 1), "none": (0, 0)}
NAMES = ("x", "a_bidir", "b_bidir", "bias_bidir", "a_causal", "b_causal", "bias_causal")


def formula(x, weight, bias, n, bidir, causal):
    y = []
    for rows, (a, b, scale, adapter_bias, p) in ((x[:n], bidir), (x[n:], causal)):
        # the same generator in the same order: the same elements are dropped
        dropped = rows * (torch.nn.functional.dropout(torch.ones(rows.shape), p) > 0) / (1 - p) if p else rows
        y.append(rows @ weight.T + bias + scale * (dropped @ a.T @ b.T + adapter_bias))
    return torch.cat(y)


def added(x, weight, bias, n, bidir, causal):
    return segment_lora_add(x @ weight.T + bias, x, n, bidir, causal)


def formula_twice(x, weight, bias, n, bidir, causal):
    return formula(torch.cat([x[:n], x]), weight, bias, n, bidir, causal)


def twice(x, weight, bias, n, bidir, causal):
    return segment_lora_linear(x, weight, bias, n, bidir, causal, twice=True)


FUNCTIONS = {segment_lora_linear: formula, added: formula, twice: formula_twice}


def inputs(rows: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(rows, 2 * 24)[:, ::2]  # a stride of 2
    adapters = [normal(*shape) for shape in ((4, 24), (40, 4), (40,), (4, 24), (40, 4), (40,))]
    return [x, *adapters], normal(40, 24), normal(40), normal(rows, 40)


def results(function, tensors, weight, bias, n, cotangent, p=0.0):
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, a_bidir, b_bidir, bias_bidir, a_causal, b_causal, bias_causal = leaves
    bidir = Adapter(a_bidir, b_bidir, 0.5, bias_bidir, p)
    torch.manual_seed(1)
    y = function(x, weight, bias, n, bidir, Adapter(a_causal, b_causal, 2.0, bias_causal, p / 2))
    gradients = torch.autograd.grad(y, leaves, cotangent.to(y.dtype), allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return {"y": y.detach()} | {f"d_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, dtype, emulated, p, function, monkeypatch):
    monkeypatch.setattr(segment, "_emulated", lambda x: emulated and x.dtype.itemsize == 2)
    rows, n = SHAPES[shape]
    tensors, weight, bias, cotangent = inputs(rows, dtype)
    if function is twice:
        cotangent = torch.cat([cotangent[:n].flip(1), cotangent])
    wide = [[t.double() for t in tensors], weight.double(), bias.double()]
    oracle = results(FUNCTIONS[function], *wide, n, cotangent.double(), p)
    low = results(FUNCTIONS[function], tensors, weight, bias, n, cotangent, p)
    for name, found in results(function, tensors, weight, bias, n, cotangent, p).items():
        assert found.dtype == dtype
        assert_within_budget(name, found, oracle[name], low[name], dtype, shape)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("emulated", [False, True])
def test_adapters_in_float32_beside_bfloat16_rows(emulated, autocast, monkeypatch):
    """As PEFT keeps them by default: products in bfloat16, gradients in the adapters' own dtype."""
    monkeypatch.setattr(segment, "_emulated", lambda x: emulated and x.dtype.itemsize == 2)
    tensors, weight, bias, cotangent = inputs(37, torch.float32)
    rounded = [[t.bfloat16() for t in tensors], weight.bfloat16(), bias.bfloat16()]
    oracle = results(formula, *[[t.double() for t in tensors], weight.double(), bias.double()], 11, cotangent.double())
    low = results(formula, *rounded, 11, cotangent)
    if autocast:  # x and the weight may be float32 too
        given = [tensors, weight, bias]
    else:
        given = [[rounded[0][0], *tensors[1:]], *rounded[1:]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(segment_lora_linear, *given, 11, cotangent)
    assert found["y"].dtype == torch.bfloat16 and found["d_a_bidir"].dtype == torch.float32
    for name, value in found.items():
        assert_within_budget(name, value, oracle[name], low[name], torch.bfloat16, "mixed dtypes")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 11, 37])
def test_factors_per_block(n, dtype):
    generator = torch.Generator().manual_seed(n)
    x, bidir, causal, bias, dy = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((37, 24), (24,), (24,), (24,), (37, 24))
    )

    def run(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(leaves[0], n, *leaves[1:], bias.to(tensors[0].dtype))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def formula(x, n, bidir, causal, bias):
        return torch.cat([x[:n] * bidir, x[n:] * causal]) + bias

    oracle, low = run(formula, x, bidir, causal), run(formula, *(t.to(dtype) for t in (x, bidir, causal)))
    found = run(segment_scale, x.to(dtype), bidir.float() if dtype == torch.bfloat16 else bidir, causal.to(dtype))
    for name, *values in zip(("y", "dx", "d_bidir", "d_causal"), found, oracle, low, strict=True):
        assert_within_budget(name, *values, dtype, f"n={n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_adapted_rows(dtype):
    (_, a, b, *_), weight, _, _ = inputs(1, dtype)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    low = (weight + 0.5 * b @ a).norm(dim=1)
    (found,) = adapted_row_norms(weight, [Adapter(a, b, 0.5)])
    assert_within_budget("norms", found, expected, low, dtype, "dora")


def test_the_adapters_are_not_exchanged():
    (x, a_bidir, b_bidir, _, a_causal, b_causal, _), weight, bias, _ = inputs(8, torch.float64)
    zero = Adapter(torch.zeros_like(a_causal), b_causal)
    y = segment_lora_linear(x, weight, bias, 3, Adapter(a_bidir, b_bidir), zero)
    plain = x @ weight.T + bias
    torch.testing.assert_close(y[3:], plain[3:])
    assert (y[:3] - plain[:3]).abs().min() > 0


def test_second_derivatives_are_refused():
    (x, *adapters), weight, bias, _ = inputs(5, torch.float64)
    leaf = x.detach().requires_grad_()
    y = segment_lora_linear(leaf, weight, bias, 2, Adapter(*adapters[:2]), Adapter(*adapters[3:5]))
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_operator_is_registered_right():
    (x, a, b, bias, *_), weight, base_bias, _ = inputs(9, torch.float32)
    h = x @ a.T
    arguments = (h[:4], b, 0.5, bias, h[4:], b, 2.0, None)
    torch.library.opcheck(torch.ops.bitune.segment_lora, (x, weight, base_bias, *arguments, False))
    torch.library.opcheck(torch.ops.bitune.segment_lora, (x @ weight.T, None, None, *arguments, False))
    torch.library.opcheck(torch.ops.bitune.segment_lora, (x[4:], weight, base_bias, *arguments, True))


def test_a_trained_base_is_refused():
    (x, *adapters), weight, bias, _ = inputs(4, torch.float32)
    with pytest.raises(ValueError, match="frozen base"):
        segment_lora_linear(x, weight.requires_grad_(), bias, 2, Adapter(*adapters[:2]), Adapter(*adapters[3:5]))
