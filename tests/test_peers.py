"""The optional peers: what of them can be held to the oracle without a GPU."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import varlen

from bitune_kernels import SegmentPlan
from bitune_kernels.backends import Options, flash, flex, resolve
from bitune_kernels.masks import visible_to_answer
from bitune_kernels.ops import bitune_attention
from bitune_kernels.testing.cases import CASES
from bitune_kernels.testing.error_budget import assert_within_budget, low_precision, oracle


def varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap):
    """What flash_attn_varlen_func documents, written out: causal is aligned to the end of the keys."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    for i in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        a, n = queries.stop - queries.start, keys.stop - keys.start
        place = torch.arange(n - a, n)[:, None]
        see = visible_to_answer(int(a), int(n - a)) if causal else torch.ones(a, n, dtype=torch.bool)
        left, right = window_size
        if left >= 0:
            distance = place - torch.arange(n)
            see = see & (distance <= left) & (-distance <= right)
        group_size = q.shape[1] // k.shape[1]
        scores = torch.einsum("ihd,jhd->hij", q[queries], k[keys].repeat_interleave(group_size, 1)) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~see, float("-inf")).softmax(-1)
        out[queries] = torch.einsum("hij,jhd->ihd", weights, v[keys].repeat_interleave(group_size, 1))
    return out


def calls(backend, **facts) -> list:
    chosen = []
    for case in CASES:
        inputs = case.make(torch.float32)
        options = {name: inputs.get(name) for name in ("window", "softcap", "sinks", "prefix")}
        options["head_dim"], options["head_dim_v"] = case.dims
        options["stream_mask"] = inputs.get("stream_mask", "full")
        if backend.unsupported(**facts | options) is None:
            chosen.append(case)
    return chosen


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **grouped):
    """The same of PyTorch's: a window that ends at 0 is causal. Its first version isn't told of grouped heads."""
    assert grouped == ({"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {})
    for x in (q, k, v):
        assert x.stride(2) == 1 and not any(place % 16 for place in (x.data_ptr(), *(4 * s for s in x.stride()[:2])))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = dict(softmax_scale=scale, causal=window_size[1] == 0, window_size=window_size, softcap=0.0)
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, **options)


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_attention
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "PACKAGE", True)


@pytest.fixture
def pytorch(monkeypatch):
    monkeypatch.setattr(flash, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "PACKAGE", False)


@pytest.mark.parametrize("kernels", ["package", "pytorch"])
def test_flash_calls_its_kernels_as_they_are_documented(kernels, request):
    request.getfixturevalue(kernels)
    cases = calls(flash, dtype=torch.float16, device="cuda")
    assert len(cases) > 20 and any(case.softcap for case in cases) == (kernels == "package")
    for case in cases:
        args, options = case.call()
        found = flash.attention(*args, options)
        expected, low = oracle(case, torch.float32, backward=False), low_precision(case, torch.float32, backward=False)
        for name, x in zip(("out", "k_mixed", "v_mixed"), found, strict=True):
            assert_within_budget(name, x, expected[name], low[name], torch.float32, f"flash {case.id}")


@pytest.mark.parametrize("cut", [lambda x: x[..., 1:], lambda x: x[..., :-1], lambda x: x.mT.contiguous().mT[..., 1:]])
def test_flash_gives_pytorchs_kernels_what_they_can_load(cut, pytorch):
    plan = SegmentPlan.from_lengths([3, 2], [2, 1])
    wide = [torch.randn(plan.num_rows, heads, 17) for heads in (4, 2, 2)]
    q, k, v = (cut(x) for x in wide)
    found = flash.attention(q, k, v, torch.tensor(0.3), torch.tensor(0.6), plan, Options(softmax_scale=0.2))[0]
    expected = bitune_attention(q, k, v, 0.3, 0.6, plan, softmax_scale=0.2, backend="reference")[0]
    torch.testing.assert_close(found, expected)


def test_flash_says_why_it_cannot_run(pytorch):
    for facts, reason in (
        ({"device": "cpu"}, "CUDA device"),
        ({"device": "cuda", "dtype": torch.float32}, "float16 or bfloat16"),
        ({"device": "cuda", "stream_mask": "anti_causal"}, "anti-causal"),
        ({"device": "cuda", "sinks": torch.zeros(1)}, "sinks"),
        ({"device": "cuda", "head_dim": 264, "head_dim_v": 264}, "up to 256, got 264"),
        ({"device": "cuda", "head_dim": 60, "head_dim_v": 60}, "multiples of 8, got 60; install flash-attn"),
        ({"device": "cuda", "softcap": 30.0}, "no softcap; install flash-attn"),
    ):
        with pytest.raises(ValueError, match=reason):
            resolve("flash", **facts)


def test_the_default_device_makes_no_difference_to_flex():
    arguments = (5, 0, 2), (1, 3, 0), (0, 1, 3), torch.device("cpu")
    expected = flex._labels(*arguments)
    with torch.device("meta"):
        found = flex._labels(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_flex_compiles_and_agrees():
    # compiling takes a quarter of a minute per kind of graph, so one ragged case with a window stands for all
    case = next(c for c in calls(flex, dtype=torch.float32, device="cpu") if "w" in c.id and len(c.prompts) > 1)
    expected, low = oracle(case, torch.float32, backward=False), low_precision(case, torch.float32, backward=False)
    flex._block_mask.cache_clear()
    with torch.no_grad():
        found = bitune_attention(**case.make(torch.float32), backend="flex")
        bitune_attention(**case.make(torch.float32), backend="flex")
    # a pass makes a plan of its own, and its lengths decide
    assert flex._block_mask.cache_info()[:2] == (1, 1)
    for name, x in zip(("out", "k_mixed", "v_mixed"), found, strict=True):
        assert_within_budget(name, x, expected[name], low[name], torch.float32, f"flex {case.id}")
    with pytest.raises(ValueError, match="no backward on a CPU"):
        bitune_attention(**case.make(torch.float32, requires_grad=True), backend="flex")
