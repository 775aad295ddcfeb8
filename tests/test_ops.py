"""The operators against the formula, for every backend, forward and backward; and what they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitune_kernels import SegmentPlan, backends, bitune_attention, bitune_prefill, custom_ops, mix_kv
from bitune_kernels.backends import Options, reference, resolve, sdpa
from bitune_kernels.backends.outputs import allocate
from bitune_kernels.testing import (
    CASES,
    DTYPES,
    Case,
    assert_backend_within_budget,
    assert_prefilled,
    assert_within_budget,
    default_device,
    leaves,
    oracle,
    run_case,
    runnable_backends,
)

SMALL = {"prompts": (4, 0, 3), "answers": (2, 3, 1), "head_dim": 4}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def gradients(inputs, outputs):
    """For a fixed random cotangent, by the name of the input."""
    generator = torch.Generator().manual_seed(1)
    given = leaves(inputs)
    used = [(o, torch.randn(o.shape, generator=generator, dtype=o.dtype)) for o in outputs if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], given.values(), [d for _, d in used], allow_unused=True)
    return {key: torch.zeros_like(x) if g is None else g for (key, x), g in zip(given.items(), grads, strict=True)}


# With a GPU the kernels aren't interpreted, and run on it alone.
ON_CPU = ["triton"] if backends.load("triton").unsupported(device="cpu") is None else []


class Own:
    """A backend with kernels of its own, each the formula; keeps what was called."""

    def __init__(self):
        self.calls, self.plans, self.check_saved = [], set(), True

    def unsupported(self, **call):
        return reference.unsupported(**call)

    def forward(self, q, k, v, alpha_k, alpha_v, plan, options, *, save, cache_positions=None, **caches):
        self.calls.append("forward save" if save else "forward")
        self.plans.add(plan)
        out, k_mixed, v_mixed = reference.attention(q, k, v, alpha_k, alpha_v, plan, options)
        if cache_positions is not None:
            self.calls[-1] += " cache"
            for name, mixed, own in (("k_cache", k_mixed, k), ("v_cache", v_mixed, v)):
                caches[name][cache_positions] = torch.cat([mixed, own[plan.answer_start :]])
            k_mixed = v_mixed = None
        streams, lse = self.saved(q, k, v, alpha_k, alpha_v, plan, options)
        return out, k_mixed, v_mixed, *((streams, lse) if save else (streams[:0].clone(), lse[:0].clone()))

    def saved(self, q, k, v, alpha_k, alpha_v, plan, options):
        """streams and, in place of lse, something else that backward can hold against what it is given."""
        apart, _, _ = reference.attention(q, k, v, alpha_k, alpha_v, plan, options._replace(beta=None))
        mixed = options.beta is not None and len(q) == len(k)
        return apart[: 2 * plan.num_prompt if mixed else 0].clone(), apart.sum(dim=2).float()

    def backward(self, d_out, d_k_mixed, d_v_mixed, *args, **options):
        self.calls.append("backward")
        (*tensors, out, streams, lse, plan) = args
        self.plans.add(plan)
        # as an operator does it: autograd is off here
        autograd_keys = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with autograd_keys, torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            *args, beta, sinks, k_prefix, v_prefix = leaves
            prefix = None if k_prefix is None else (k_prefix, v_prefix)
            options = Options(**options, beta=beta, sinks=sinks, prefix=prefix)
            outputs = reference.attention(*args, plan, options)
            saved = (outputs[0], *self.saved(*args, plan, options))
        if self.check_saved:
            for given, wanted in zip((out, streams, lse), saved, strict=True):
                assert torch.equal(given, wanted)
        given = [x for x in leaves if x is not None]
        pairs = zip(outputs, (d_out, d_k_mixed, d_v_mixed), strict=True)
        pairs = [(o, d) for o, d in pairs if o.requires_grad and d is not None]
        grads = torch.autograd.grad([o for o, _ in pairs], given, [d for _, d in pairs], allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads, given, strict=True)]

    def mix(self, causal, bidir, alpha):
        self.calls.append("mix")
        return torch.lerp(causal, bidir, alpha[..., None] if alpha.ndim else alpha)

    def mix_backward(self, d_mixed, causal, bidir, alpha):
        self.calls.append("mix_backward")
        weight = alpha[:, None] if alpha.ndim else alpha
        d_alpha = (d_mixed * (bidir - causal)).sum(dim=(0, 2))
        return d_mixed * (1 - weight), d_mixed * weight, d_alpha if alpha.ndim else d_alpha.sum()


@pytest.fixture
def own(monkeypatch):
    module, load = Own(), backends.load
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, "own"))
    monkeypatch.setattr(backends, "load", lambda name: module if name == "own" else load(name))
    return module


@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    [
        pytest.param(case, dtype, backend, id=f"{backend}-{name(dtype)}-{case.id}")
        for place, case in enumerate(CASES)
        for dtype in DTYPES
        for backend in runnable_backends(case, dtype, default_device())
        # interpreted, a case takes ten seconds: all in float16, every fourth in float32 too
        if backend not in ON_CPU or dtype == torch.float16 or place % 4 == 0
    ],
)
def test_backend_against_oracle(case, dtype, backend):
    assert_backend_within_budget(backend, case, dtype, default_device())


@pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs triton")
def test_a_kernel_that_writes_nothing_has_no_value_of_an_earlier_call(monkeypatch):
    def forward(q, k, v, alpha_k, alpha_v, plan, options, *, save):
        return allocate(q, k, v, plan, shared_qkv=options.shared_qkv, beta=False, save=save, to_cache=False)

    case = Case(prompts=(5,), answers=(4,))
    run_case(case, "triton", torch.float16, default_device(), backward=False)
    monkeypatch.setattr(backends.load("triton"), "forward", forward)
    found = run_case(case, "triton", torch.float16, default_device(), backward=False)
    assert all(bool(x.isnan().all()) for x in found.values())


@pytest.mark.parametrize("case", [c for c in CASES if c.softcap is None and not c.sinks], ids=lambda c: c.id)
def test_sdpa_over_a_few_queries_at_a_time(case, monkeypatch):
    monkeypatch.setattr(sdpa, "_ROWS", 5)
    assert_backend_within_budget("sdpa", case, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if c.softcap is None and not c.sinks], ids=lambda c: c.id)
def test_sdpa_calls_fused_kernels_of_cuda_as_they_can_run(case, monkeypatch):
    calls = []

    def recorded(q, k, v, attn_mask, **options):
        calls.append((attn_mask, q.shape[1] != k.shape[1], q.dtype))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(sdpa, "_on_cuda", lambda device: True)
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", recorded)
    for dtype in (torch.float32, torch.bfloat16):
        assert_backend_within_budget("sdpa", case, dtype)
    # a dense mask for an answer is what a window leaves, or a prompt behind a prefix; grouped heads stay with neither
    for mask, grouped, dtype in calls:
        dense = mask is not None and not isinstance(mask, CausalBias)
        assert not (grouped and (dense or dtype == torch.float32))
        assert not dense or case.window is not None or case.prefix or case.stream_mask == "anti_causal"
    assert calls or not any(case.prompts + case.answers)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"stream_mask": "anti_causal"}], ids=str)
def test_memory_of_sdpa_is_linear_in_the_prompt(options):
    largest = []
    for n in (2048, 4096):
        plan = SegmentPlan.from_lengths([n], [9])
        q, k, v = (torch.randn(plan.num_rows, 1, 8) for _ in range(3))
        with LargestTensor() as made:
            bitune_attention(q, k, v, 0.5, 0.5, plan, backend="sdpa", **options)
        largest.append(made.numel)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 4096**2 / 3.5, largest


def test_case_ids_are_unique():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 0.1 * (x == x.max()), "out.* is .* expected"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), r"out\[3, 0, 0\] is nan"),
        (lambda x: x[1:], "shape"),
    ],
)
def test_error_budget_refuses(change, message):
    case = CASES[0]
    good = run_case(case, "reference", torch.float32, backward=False)["out"]
    expected = oracle(case, torch.float32, backward=False)["out"]
    assert_within_budget("out", good, expected, good, torch.float32, case.id)
    with pytest.raises(AssertionError, match=message) as error:
        assert_within_budget("out", change(good), expected, good, torch.float32, case.id)
    assert case.id in str(error.value)


# The formula a second time, over all rows of the batch at once: written from the text of bitune_attention,
# without any code of the package.

PREFIX, BIDIR, CAUSAL, MIXED, ANSWER = range(5)


def table(case, *kinds):
    """int64 [rows, 3] of the rows of these kinds: kind, sample, position in the sample."""
    rows = []
    for kind in kinds:
        for sample, (n, a) in enumerate(zip(case.prompts, case.answers, strict=True)):
            m = case.prefix[sample] if case.prefix else 0
            places = {PREFIX: range(m), ANSWER: range(m + n, m + n + a)}.get(kind, range(m, m + n))
            rows += [(kind, sample, position) for position in places]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def sees(case, queries, keys):
    """bool [queries, keys]"""
    (kind_q, sample_q, i), (kind_k, sample_k, j) = queries.T[:, :, None], keys.T[:, None, :]
    in_stream = {"full": i == i, "causal": j <= i, "anti_causal": j >= i}[case.stream_mask]
    see = (
        (kind_k == PREFIX)
        | ((kind_q == BIDIR) & (kind_k == BIDIR) & in_stream)
        | ((kind_q == CAUSAL) & (kind_k == CAUSAL) & (j <= i))
        | ((kind_q == ANSWER) & (kind_k == MIXED))
        | ((kind_q == ANSWER) & (kind_k == ANSWER) & (j <= i))
    ) & (sample_q == sample_k)
    return see if case.window is None else see & (i - j < case.window) & (j - i < case.window)


def dense(case, q, k, v, alpha_k, alpha_v, plan, beta=None, sinks=None, prefix=None, **_):
    N, A, (heads_q, heads_kv) = sum(case.prompts), sum(case.answers), case.heads

    def mixed(x, alpha):
        if case.num_streams == 1:
            return x[:N]
        return (1 - alpha.reshape(-1, 1)) * x[N : 2 * N] + alpha.reshape(-1, 1) * x[:N]

    k_mixed, v_mixed = mixed(k, alpha_k), mixed(v, alpha_v)
    two = case.num_streams == 2 or case.shared_qkv
    streams = (BIDIR, CAUSAL) if two else (BIDIR,)
    if case.shared_qkv:
        q, k, v = (
            torch.cat([x[: len(x) - A - N], x[: len(x) - A], x[: len(x) - A], x[len(x) - A :]]) for x in (q, k, v)
        )
    k_prefix, v_prefix = prefix or (k[:0], v[:0])
    queries = table(case, *(() if case.answer_only else streams), ANSWER)
    keys = table(case, PREFIX, *streams, ANSWER, MIXED)
    k, v = (
        torch.cat(x).repeat_interleave(heads_q // heads_kv, dim=1)
        for x in ((k_prefix, k, k_mixed), (v_prefix, v, v_mixed))
    )
    scale = case.softmax_scale or case.head_dim**-0.5
    scores = torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)) * scale
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = scores.masked_fill(~sees(case, queries, keys), -torch.inf)
    if case.sinks:
        scores = torch.cat([scores, sinks.reshape(-1, 1, 1).expand(-1, len(q), 1)], dim=2)
    weights = scores.softmax(dim=2)[:, :, : len(k)]
    out = torch.matmul(weights, v.transpose(0, 1)).transpose(0, 1)
    if beta is not None and not case.answer_only:
        bidir, causal, answer = out.split([N, N, A])
        out = torch.cat([(1 - beta.reshape(-1, 1)) * causal + beta.reshape(-1, 1) * bidir, answer])
    return out, k_mixed, v_mixed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_is_the_formula(case):
    inputs = case.make(torch.float64, requires_grad=True)
    outputs, expected = bitune_attention(**inputs, backend="reference"), dense(case, **inputs)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    grads, expected = gradients(inputs, outputs), gradients(inputs, expected)
    for key in grads:
        torch.testing.assert_close(
            grads[key], expected[key], rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_alpha_may_be_a_number():
    inputs = Case(prompts=(5,), answers=(3,)).make(torch.bfloat16)
    as_tensors = inputs | {"alpha_k": torch.tensor(0.25), "alpha_v": torch.tensor(1.0)}
    numbers = bitune_attention(**inputs | {"alpha_k": 0.25, "alpha_v": 1})
    for actual, wanted in zip(numbers, bitune_attention(**as_tensors), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_window_beyond_every_integer_of_a_tensor(backend):
    inputs = Case(prompts=(5,), answers=(3,), heads=(1, 1)).make()
    out, _, _ = bitune_attention(**inputs | {"window": 2**70}, backend=backend)
    assert torch.equal(out, bitune_attention(**inputs | {"window": 8}, backend=backend)[0])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 4, "prefix": (3, 0)}, {"num_streams": 1, "shared_qkv": True}], ids=str
)
def test_no_value_is_read(options, backend):
    # each would make the host wait for a GPU, in every layer; fake tensors have none
    with FakeTensorMode():
        args, options = Case(prompts=(9, 5), answers=(3, 6), **options).call(torch.bfloat16)
        backends.load(backend).attention(*args, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("registered", [False, True], ids=["plain", "registered"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_autocast_changes_nothing(backend, registered, dtype):
    softcap = 2.0 if backend == "reference" else None
    case = Case(prompts=(5, 2), answers=(3, 4), softcap=softcap, window=4, beta="head")
    inputs = case.make(dtype, requires_grad=True)
    arguments = operator_arguments(case, backend, requires_grad=True, dtype=dtype)

    def call():
        return torch.ops.bitune.attention(*arguments) if registered else bitune_attention(**inputs, backend=backend)

    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call()
    given = [x for x in arguments[:7] if x is not None] if registered else list(leaves(inputs).values())
    for actual, wanted in zip(outputs[:3], expected[:3], strict=True):
        assert torch.equal(actual, wanted)
    grads = [torch.autograd.grad(o[0].float().square().sum(), given) for o in (outputs, expected)]
    for actual, wanted in zip(*grads, strict=True):
        assert torch.equal(actual, wanted)


# bitune_prefill and mix_kv


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "own", *ON_CPU])
@pytest.mark.parametrize(
    "case",
    [
        Case(prompts=(7, 0, 12), answers=(1, 4, 0), alpha="head"),
        Case(prompts=(7, 0, 12), answers=(1, 4, 0), answer_only=True, strided=True),
        Case(prompts=(7, 0, 12), answers=(1, 4, 0), num_streams=1, head_dim_v=8),
        Case(prompts=(3,), answers=(2,), prefix=(5,), window=4),
        Case(prompts=(0,), answers=(0,)),
    ],
    ids=lambda case: case.id,
)
def test_prefill_writes_the_named_slots_and_nothing_else(case, backend, transposed, own):
    call = case.make_prefill(torch.float16, transposed=transposed)
    out = bitune_prefill(**call, backend=backend)
    assert own.calls == (["forward cache"] if backend == "own" else [])
    expected, *mixed = bitune_attention(**case.make(torch.float16), backend=backend)
    assert torch.equal(out, expected)
    assert_prefilled(call, mixed)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, "auto") for dtype in (*DTYPES, torch.float64)]
    + [(dtype, backend) for dtype in (torch.float32, torch.float16) for backend in ON_CPU],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
@pytest.mark.parametrize("heads", [1, 3])
def test_mix_kv(dtype, backend, heads):
    generator = torch.Generator().manual_seed(2)
    causal, bidir = (torch.randn(37, heads, 4, generator=generator).to(dtype) for _ in range(2))
    alpha = torch.rand(heads, generator=generator) if heads > 1 else 0.3
    weight = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1)
    exact = (1 - weight) * causal.double() + weight * bidir.double()
    mixed = mix_kv(causal, bidir, alpha, backend=backend)
    assert mixed.dtype == dtype
    # rounded once, at the end: at most half a step away
    step = torch.finfo(dtype).eps * exact.abs() / 2 + (1e-6 if dtype != torch.float64 else 1e-8)
    assert ((mixed.double() - exact).abs() <= step).all()
    assert torch.equal(mix_kv(causal, bidir, 0.0, backend=backend), causal)
    assert torch.equal(mix_kv(causal, bidir, 1.0, backend=backend), bidir)


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3), torch.tensor([0.2, 0.9])], ids=["number", "scalar", "head"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["own", *ON_CPU])
def test_mix_kv_of_a_backend(alpha, compile, backend, own):
    causal, bidir = (x.requires_grad_() for x in torch.randn(2, 37, 2, 4))
    leaves = [causal, bidir]
    if isinstance(alpha, torch.Tensor):
        leaves.append(alpha.clone().requires_grad_())
        alpha = leaves[-1]
    d_mixed = torch.randn(37, 2, 4)
    function, _ = compiled_and_counter(mix_kv) if compile else (mix_kv, None)
    mixed, expected = function(causal, bidir, alpha, backend=backend), mix_kv(causal, bidir, alpha)
    torch.testing.assert_close(mixed, expected)
    grads = torch.autograd.grad(mixed, leaves, d_mixed)
    assert own.calls == (["mix", "mix_backward"] if backend == "own" else [])
    for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves, d_mixed), strict=True):
        assert actual.shape == wanted.shape
        torch.testing.assert_close(actual, wanted)
    assert torch.equal(mix_kv(causal, bidir, alpha, backend="reference"), expected)


@pytest.mark.parametrize("name", ["sdpa", "flex", "fastest"])
def test_mix_kv_is_refused_by_backends_without_one(name, own):
    rows = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match=rf"^backend: expected .* \(auto, reference, triton, own\), got '{name}'"):
        mix_kv(rows, rows, 0.5, backend=name)
    own.unsupported = lambda **call: f"no kernel for {call['device']}, {call['dtype']}"
    with pytest.raises(ValueError, match=r"^backend: 'own' can't run this call: no kernel for cpu, torch\.float32"):
        mix_kv(rows, rows, 0.5, backend="own")


# the registered operators and torch.compile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph(backend):
    # Nothing is allocated, copied or waited for inside: a captured launch computes anew what its inputs hold.
    case = Case(prompts=(65, 20), answers=(31, 1), heads=(4, 2), head_dim=64)
    if backend not in runnable_backends(case, torch.float16, "cuda"):
        pytest.skip(backends.load(backend).unsupported(device="cuda"))
    inputs = case.make(torch.float16, "cuda")
    slots = torch.arange(sum(case.prompts) + sum(case.answers), device="cuda").flip(0)
    k_cache, v_cache = (torch.zeros(len(slots), 2, 64, dtype=torch.float16, device="cuda") for _ in range(2))

    def call():
        return bitune_prefill(**inputs, k_cache=k_cache, v_cache=v_cache, cache_positions=slots, backend=backend)

    call()  # compiles, and brings the schedule to the GPU
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for name in ("q", "k", "v"):
        inputs[name].mul_(-0.5)
    graph.replay()
    caches = k_cache.clone(), v_cache.clone()
    assert torch.equal(out, call())
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


OPERATOR_CASES = [
    Case(prompts=(5, 0, 3), answers=(2, 4, 0)),
    Case(prompts=(5, 2), answers=(2, 4), alpha="head", window=3, prefix=(2, 3), strided=True),
    Case(prompts=(5, 2), answers=(2, 4), answer_only=True),
    Case(prompts=(5, 2), answers=(2, 4), num_streams=1, shared_qkv=True, beta="head", stream_mask="anti_causal"),
    Case(prompts=(5, 2), answers=(2, 4), num_streams=1, head_dim_v=8),
    Case(prompts=(5, 2), answers=(2, 4), sinks=True, softcap=2.0, beta="scalar"),
]


def few(cases: list, case) -> list[str]:
    """Triton for the last of these cases, the one with most options: its interpreter takes half a minute for each."""
    return ON_CPU if case is cases[-1] else []


def operator_arguments(case, backend, requires_grad, dtype=torch.float32):
    """Of bitune::attention: nine tensors (q .. v_prefix), then the rest."""
    (*tensors, plan), options = case.call(dtype, requires_grad=requires_grad)
    tensors += [options.beta, options.sinks, *(options.prefix or (None, None))]
    lengths = [plan.lengths, plan.num_prompt, plan.num_streams]
    return (*tensors, *lengths, *options.without_tensors().values(), requires_grad, backend)


def prefill_arguments(case, backend, dtype=torch.float32):
    """Of bitune::prefill."""
    arguments = operator_arguments(case, backend, requires_grad=False, dtype=dtype)
    slots = case.plan().num_prompt + case.plan().num_answer
    caches = [torch.zeros(slots + 2, case.heads[1], dim, dtype=dtype) for dim in case.dims]
    return (*arguments[:9], *caches, torch.arange(slots).flip(0), *arguments[9:])


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{backend}-{case.id}")
        for case in OPERATOR_CASES
        for backend in [*runnable_backends(case, torch.float32), "own"]
        if backend not in ON_CPU or few(OPERATOR_CASES, case)
    ],
)
def test_opcheck(case, backend, own):
    arguments = operator_arguments(case, backend, requires_grad=True)
    torch.library.opcheck(torch.ops.bitune.attention.default, arguments)
    outputs = [x.detach() for x in torch.ops.bitune.attention(*arguments)]
    own.check_saved = False  # opcheck gives numbers of its own
    arguments = operator_arguments(case, backend, requires_grad=False)
    cotangents = [torch.randn(o.shape) for o in outputs[:3]]
    arguments = (*cotangents, *arguments[:9], outputs[0], *outputs[3:], *arguments[9:])
    torch.library.opcheck(torch.ops.bitune.attention_backward.default, arguments)
    torch.library.opcheck(torch.ops.bitune.prefill.default, prefill_arguments(case, backend))


@pytest.mark.parametrize("alpha", [torch.tensor(0.3), torch.tensor([0.2, 0.9])], ids=["scalar", "head"])
def test_opcheck_mix(alpha, own):
    causal, bidir = (x.requires_grad_() for x in torch.randn(2, 5, 2, 4))
    torch.library.opcheck(torch.ops.bitune.mix_kv.default, (causal, bidir, alpha.requires_grad_(), "own"))
    tensors = [x.detach() for x in (torch.randn(5, 2, 4), causal, bidir, alpha)]
    torch.library.opcheck(torch.ops.bitune.mix_kv_backward.default, (*tensors, "own"))


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{backend}-{case.id}")
        for case in OPERATOR_CASES
        for backend in [*runnable_backends(case, torch.float32), "own"]
    ],
)
def test_registered_operator_is_the_plain_call(case, backend, own):
    # opcheck compares the operator with itself only
    inputs = case.make(requires_grad=True)
    plain = bitune_attention(**inputs, backend=backend)
    arguments = operator_arguments(case, backend, requires_grad=True)
    *registered, streams, lse = torch.ops.bitune.attention(*arguments)
    for actual, expected in zip(registered, plain, strict=True):
        assert torch.equal(actual, expected)
    in_streams = case.plan().num_prompt * (0 if case.answer_only else 2)
    rows = in_streams if case.num_streams == 2 or case.shared_qkv else in_streams // 2
    assert lse.shape == (rows + case.plan().num_answer, case.heads[0]) and lse.dtype == torch.float32
    assert streams.shape == (in_streams if case.beta else 0, case.heads[0], case.dims[1])
    tensors = [x for x in arguments[:9] if x is not None]
    grads = gradients(inputs, plain)
    assert len(tensors) == len(grads)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(o.shape, generator=generator) for o in plain]
    for (key, expected), actual in zip(grads.items(), torch.autograd.grad(registered, tensors, d_outputs), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda m, key=key: f"{key}: {m}")
        assert actual.is_contiguous()
    assert own.calls == (["forward save"] * 2 + ["backward"] * 2 if backend == "own" else [])


@pytest.mark.parametrize("backend", ["reference", "own", *ON_CPU])
def test_nothing_is_saved_without_gradients(backend, own):
    case = OPERATOR_CASES[-1]
    *_, streams, lse = torch.ops.bitune.attention(*operator_arguments(case, backend, requires_grad=False))
    assert streams.shape == (0, *case.heads[:1], case.head_dim) and lse.shape == (0, case.heads[0])


# Lengths per call; the batch size stays. The first call compiles for its lengths, the second for all lengths.
LENGTHS = [
    ((5, 7), (3, 4)),
    ((6, 9), (2, 8)),
    ((11, 3), (4, 4)),
    ((2, 20), (7, 1)),
    ((1, 1), (1, 1)),
    ((0, 3), (0, 4)),
]


VARIANTS = [
    {},
    {"answer_only": True},
    {"num_streams": 1},
    {"num_streams": 1, "shared_qkv": True, "beta": "head"},
    {"sinks": True, "softcap": 2.0, "window": 4, "alpha": "head", "prefix": (3, 5)},
]
COMPILED = pytest.mark.parametrize(
    ("options", "backend"),
    [
        pytest.param(options, backend, id=f"{backend}-{'-'.join(options) or 'plain'}")
        for options in VARIANTS
        for backend in ("auto", "own", *few(VARIANTS, options))
    ],
)


def compiled_and_counter(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@COMPILED
def test_compiled_once_for_all_lengths(options, backend, own):
    def attend(**inputs):  # the graph computes what the operator gets, and goes on with what it gives
        out, k_mixed, v_mixed = bitune_attention(**inputs | {"q": inputs["q"] * 2}, backend=backend)
        return out * 2, k_mixed, v_mixed + 1

    compiled, counter = compiled_and_counter(attend)
    for call, (prompts, answers) in enumerate(LENGTHS):
        inputs = Case(prompts=prompts, answers=answers, **options).make(requires_grad=True)
        expected = attend(**inputs)
        own.calls.clear()
        outputs = compiled(**inputs)
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        grads = gradients(inputs, outputs)
        assert own.calls == (["forward save", "backward"] if backend == "own" else [])
        expected = gradients(inputs, expected)
        for key in grads:
            torch.testing.assert_close(grads[key], expected[key], msg=lambda m, key=key: f"{key}: {m}")
        assert counter.frame_count == min(call + 1, 2)


@COMPILED
def test_prefill_compiled_once_for_all_lengths(options, backend, own):
    def prefill(k_cache, **inputs):
        v_cache = inputs["v"].new_zeros(k_cache.shape[1], 2, 16)  # one cache from inside, one view from outside
        out = bitune_prefill(**inputs, k_cache=k_cache.transpose(0, 1), v_cache=v_cache, backend=backend)
        return out * 2, v_cache + 1

    compiled, counter = compiled_and_counter(prefill)
    for call, (prompts, answers) in enumerate(LENGTHS):
        inputs = Case(prompts=prompts, answers=answers, **options).make()
        rows = sum(prompts) + sum(answers)
        inputs["cache_positions"] = torch.arange(rows).flip(0) + 1
        actual_cache, wanted_cache = torch.zeros(2, 2, rows + 3, 16)
        expected = prefill(wanted_cache, **inputs)
        own.calls.clear()
        for actual, wanted in zip(compiled(actual_cache, **inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        torch.testing.assert_close(actual_cache, wanted_cache)
        assert wanted_cache.any()
        assert own.calls == (["forward cache"] if backend == "own" else [])
        assert counter.frame_count == min(call + 1, 2)


def test_compiled_layers_share_one_plan(own):
    def layers(**inputs):
        for _ in range(3):
            inputs["q"], _, _ = bitune_attention(**inputs, backend="own")
        return inputs["q"]

    custom_ops._plan.cache_clear()
    inputs = Case(prompts=(5, 7), answers=(3, 4), prefix=(2, 0)).make(requires_grad=True)
    with torch.inference_mode():
        layers_compiled, _ = compiled_and_counter(layers)
        layers_compiled(**Case(prompts=(5, 7), answers=(3, 4), prefix=(2, 0)).make())
    layers_compiled(**inputs).sum().backward()
    assert own.calls == ["forward"] * 3 + ["forward save"] * 3 + ["backward"] * 3
    (plan,) = own.plans
    assert plan.lengths.tolist() == inputs["plan"].lengths.tolist()
    for key in ("cu_prompt", "cu_answer", "cu_prefix"):
        assert torch.equal(getattr(plan, key), getattr(inputs["plan"], key))
        assert not getattr(plan, key).is_inference()  # autograd could not save these


def test_compiled_call_refuses_like_the_plain_one():
    inputs = Case(prompts=(5,), answers=(3,), softcap=2.0).make()
    compiled = torch.compile(bitune_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"^backend: 'sdpa' can't run this call: .* softcap"):
        compiled(**inputs, backend="sdpa")


def test_compiled_call_takes_numbers_as_alpha():
    compiled, _ = compiled_and_counter(bitune_attention)
    inputs = Case(prompts=(5,), answers=(3,)).make()
    for alpha in (0.25, 0.75, 0.5):  # dynamo makes a symbol of the second one
        inputs |= {"alpha_k": alpha, "alpha_v": 1 - alpha}
        for actual, wanted in zip(compiled(**inputs), bitune_attention(**inputs), strict=True):
            torch.testing.assert_close(actual, wanted)


# the choice of a backend


def test_auto_takes_the_fastest_that_can():
    for device in (None, torch.device("cpu"), torch.device("cuda")):  # no kernel that has not run on a GPU
        assert resolve("auto", device=device, dtype=torch.float16, head_dim=64)[0] == "sdpa"
    chosen, reason = resolve("auto", softcap=2.0)
    assert chosen == "reference" and "softcap" in reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"head_dim": 512}, "head dims up to 256, got 512"),
        ({"head_dim": 64, "head_dim_v": 320}, "head dims up to 256, got 320"),
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, got torch.float64"),
        ({"device": torch.device("mps")}, "needs a CUDA device .* got mps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_triton_says_why_it_cannot_run(facts, reason, monkeypatch):
    monkeypatch.setattr("bitune_kernels.backends.triton.tiles.interpreted", lambda: False)
    with pytest.raises(ValueError, match=f"^backend: 'triton' can't run this call: .*{reason}"):
        resolve("triton", **facts)


# What is refused. Each row: the case, what is changed in its inputs, the error, how its message begins.

TWO = Case(prompts=(4, 3), answers=(2, 1))
ONE = Case(prompts=(4, 3), answers=(2, 1), num_streams=1)
PAST = Case(prompts=(4, 3), answers=(2, 1), prefix=(2, 3))
ROWS = 17  # of TWO

BAD = [
    (TWO, {"plan": (4, 3)}, TypeError, "plan: expected a SegmentPlan, got tuple"),
    (TWO, {"q": [1.0]}, TypeError, "q: expected a floating point tensor of 16, 32 or 64 bits, got list"),
    (TWO, {"k": torch.zeros(ROWS, 2, 16, dtype=torch.int32)}, TypeError, "k: .* got torch.int32"),
    (TWO, {"v": None}, TypeError, "v: .* got NoneType"),
    (
        TWO,
        {"q": torch.zeros(ROWS, 64)},
        ValueError,
        r"q: expected \[rows, heads, head_dim\], none but rows 0, got shape \[17, 64\]",
    ),
    (TWO, {"k": torch.zeros(1, ROWS, 2, 16)}, ValueError, r"k: expected \[rows"),
    (TWO, {"q": torch.zeros(ROWS, 0, 16)}, ValueError, r"q: expected .* got shape \[17, 0, 16\]"),
    (TWO, {"q": torch.zeros(ROWS, 4, 0)}, ValueError, r"q: expected .* got shape \[17, 4, 0\]"),
    (TWO, {"v": torch.zeros(ROWS, 2, 0)}, ValueError, r"v: expected .* got shape \[17, 2, 0\]"),
    (TWO, {"q": torch.zeros(ROWS, 4, 16).to(torch.float8_e5m2)}, TypeError, "q: .* got torch.float8_e5m2"),
    (TWO, {"k": torch.zeros(ROWS, 2, 16).to_sparse()}, TypeError, "k: expected a dense tensor, got torch.sparse_coo"),
    (TWO, {"sinks": torch.zeros(4).to(torch.float8_e5m2)}, TypeError, "sinks: .* got torch.float8_e5m2"),
    (
        TWO,
        {"k": torch.zeros(ROWS, 2, 16, dtype=torch.bfloat16)},
        ValueError,
        "k: expected torch.float32 on cpu as q",
    ),
    (
        TWO,
        {"v": torch.zeros(ROWS, 2, 16, device="meta")},
        ValueError,
        "v: expected .* got torch.float32 on meta",
    ),
    (TWO, {"q": torch.zeros(ROWS - 1, 4, 16)}, ValueError, "q: expected 17 rows .* got 16"),
    (TWO, {"k": torch.zeros(ROWS + 1, 2, 16)}, ValueError, "k: expected 17 rows .* got 18"),
    (TWO, {"v": torch.zeros(3, 2, 16)}, ValueError, "v: expected 17 rows .* got 3"),
    # one tensor of the answer's rows for all three: only q may have these alone
    (TWO, dict.fromkeys("qkv", torch.zeros(3, 2, 16)), ValueError, "k: expected 17 rows .* got 3"),
    (TWO, {"k": torch.zeros(ROWS, 2, 8)}, ValueError, "k, v: expected head_dim 16"),
    (TWO, {"v": torch.zeros(ROWS, 4, 16)}, ValueError, "k, v: expected .* the same heads"),
    (
        TWO,
        {"q": torch.zeros(ROWS, 3, 16)},
        ValueError,
        "q: expected a multiple of the 2 key/value heads, got 3",
    ),
    (
        TWO,
        {"k": torch.zeros(ROWS, 0, 16), "v": torch.zeros(ROWS, 0, 16)},
        ValueError,
        r"k: expected \[rows, .* none but rows 0, got shape \[17, 0, 16\]",
    ),
    (
        TWO,
        {"stream_mask": "bidir"},
        ValueError,
        "stream_mask: expected one of full, causal, anti_causal, got 'bidir'",
    ),
    (
        TWO,
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale: expected a finite float32 or None, got nan",
    ),
    (TWO, {"softmax_scale": "1"}, ValueError, "softmax_scale: .* got '1'"),
    (TWO, {"softmax_scale": 1e-60}, ValueError, "softmax_scale: .* got 1e-60"),  # 0 as float32, and 0 times -inf is NaN
    (TWO, {"softmax_scale": 10**400}, ValueError, "softmax_scale: .* got 1000"),
    (TWO, {"softcap": 1e39}, ValueError, r"softcap: .* got 1e\+39"),
    (TWO, {"alpha_k": 10**400}, ValueError, "alpha_k: .* got 1000"),
    (TWO, {"window": 0}, ValueError, "window: expected an int >= 1 or None, got 0"),
    (TWO, {"window": 4.0}, ValueError, "window: .* got 4.0"),
    (TWO, {"window": True}, ValueError, "window: .* got True"),
    (TWO, {"softcap": 0.0}, ValueError, "softcap: expected a finite float32 > 0 or None, got 0.0"),
    (TWO, {"softcap": float("inf")}, ValueError, "softcap: .* got inf"),
    (TWO, {"softcap": float("nan")}, ValueError, "softcap: .* got nan"),
    (TWO, {"softcap": "30"}, ValueError, "softcap: .* got '30'"),
    (TWO, {"sinks": 1.0}, TypeError, "sinks: expected a floating point tensor of 16, 32 or 64 bits, got float"),
    (TWO, {"sinks": torch.zeros(2)}, ValueError, r"sinks: expected \[4\] .* got \[2\]"),
    (TWO, {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks: expected .* on cpu, got .* on meta"),
    (TWO, {"shared_qkv": True}, ValueError, "shared_qkv: expected a plan with num_streams=1"),
    (ONE, {"shared_qkv": "no"}, TypeError, "shared_qkv: expected True or False, got 'no'"),
    (TWO, {"alpha_k": None}, TypeError, "alpha_k: expected a number or a tensor, got NoneType"),
    (TWO, {"alpha_v": True}, TypeError, "alpha_v: expected a number or a tensor, got bool"),
    (TWO, {"alpha_v": float("inf")}, ValueError, "alpha_v: expected a finite float32, got inf"),
    (TWO, {"alpha_k": torch.tensor(0.5, dtype=torch.bfloat16)}, TypeError, "alpha_k: expected float32"),
    (TWO, {"alpha_k": torch.zeros(4)}, ValueError, r"alpha_k: expected a scalar or shape \[2\] .* got \[4\]"),
    (TWO, {"alpha_v": torch.zeros((), device="meta")}, ValueError, "alpha_v: expected it on cpu, got meta"),
    (TWO, {"alpha_v": torch.tensor([0.5, float("nan")])}, ValueError, "alpha_v: expected finite values"),
    (TWO, {"beta": torch.zeros(2)}, ValueError, r"beta: expected a scalar or shape \[4\]"),
    (TWO, {"beta": "half"}, TypeError, "beta: expected a number or a tensor, got str"),
    (
        TWO,
        {"prefix": (torch.zeros(5, 2, 16),) * 2},
        ValueError,
        "prefix: expected it together with plan.prefix_lengths",
    ),
    (TWO, {"backend": "fastest"}, ValueError, "backend: expected one of auto, .* got 'fastest'"),
    (TWO, {"backend": "sdpa", "softcap": 1.0}, ValueError, "backend: 'sdpa' can't run this call"),
    (ONE, {"alpha_k": 0.5}, ValueError, "alpha_k, alpha_v: expected None for a plan with num_streams=1"),
    (ONE, {"alpha_v": 0.5}, ValueError, "alpha_k, alpha_v: expected None for a plan with num_streams=1"),
    (ONE, {"beta": 0.5}, ValueError, "beta: expected two streams to mix"),
    (PAST, {"prefix": torch.zeros(3, 2, 16)}, TypeError, r"prefix: expected two tensors \(k, v\), got Tensor"),
    (PAST, {"prefix": None}, ValueError, "prefix: expected it together with plan.prefix_lengths"),
    (
        PAST,
        {"prefix": (torch.zeros(4, 2, 16), torch.zeros(5, 2, 16))},
        ValueError,
        r"prefix\[0\]: expected .*\[5, 2, 16\]",
    ),
    (
        PAST,
        {"prefix": (torch.zeros(5, 2, 16), torch.zeros(5, 2, 8))},
        ValueError,
        r"prefix\[1\]: expected .*\[5, 2, 16\]",
    ),
    (
        PAST,
        {"prefix": (torch.zeros(5, 2, 16).double(), torch.zeros(5, 2, 16))},
        ValueError,
        r"prefix\[0\]: .*float64",
    ),
    (
        PAST,
        {"prefix": (torch.zeros(5, 2, 16), torch.zeros(5, 2, 16).to_sparse())},
        TypeError,
        r"prefix\[1\]: expected a dense tensor",
    ),
    (
        PAST,
        {"prefix": (torch.zeros(5, 2, 16), torch.zeros(5, 2, 16, device="meta"))},
        ValueError,
        r"prefix\[1\]: .*meta",
    ),
]


@pytest.fixture
def nothing_computes(monkeypatch):
    def computed(*args, **kwargs):
        pytest.fail("computed before the input was refused")

    for module in (reference, sdpa):
        monkeypatch.setattr(module, "attention", computed)


@pytest.mark.parametrize(
    ("case", "change", "error", "message"), BAD, ids=[f"{i}-{'-'.join(b[1])}" for i, b in enumerate(BAD)]
)
def test_bad_input_is_refused(case, change, error, message, nothing_computes):
    with pytest.raises(error, match=f"^{message}"):
        bitune_attention(**case.make() | change)


BAD_CACHE = [
    ({"plan": None}, TypeError, "plan: expected a SegmentPlan"),
    ({"k_cache": None}, TypeError, "k_cache: expected a floating point tensor of 16, 32 or 64 bits, got NoneType"),
    ({"cache_positions": [*range(10)]}, TypeError, "cache_positions: expected an int64 tensor, got list"),
    ({"cache_positions": torch.arange(10) + 3}, ValueError, "cache_positions: expected slots of 0 to 11, got 3 to 12"),
    ({"cache_positions": torch.arange(10) - 1}, ValueError, "cache_positions: expected slots of 0 to 11, got -1 to 8"),
    ({"cache_positions": torch.arange(10) // 2}, ValueError, "cache_positions: expected .* different, got 0 twice"),
    ({"windw": 3}, TypeError, "windw: expected one of softmax_scale, .*, got another keyword"),
    ({"cache_positions": torch.arange(9)}, ValueError, r"cache_positions: expected int64 \[10\]"),
    (
        {"cache_positions": torch.arange(10, dtype=torch.int32)},
        ValueError,
        r"cache_positions: .* got torch.int32",
    ),
    (
        {"k_cache": torch.zeros(12, 4, 16)},
        ValueError,
        r"k_cache: expected torch.float32 \[num_slots, 2, 16\], got",
    ),
    ({"v_cache": torch.zeros(12, 2, 16).half()}, ValueError, "v_cache: expected .* got torch.float16"),
    ({"v_cache": torch.zeros(2, 12, 16, 1)}, ValueError, "v_cache: expected"),
    ({"k_cache": torch.zeros(12, 2, 16, device="meta")}, ValueError, "k_cache: expected it on cpu, got meta"),
    ({"cache_positions": torch.arange(10).to("meta")}, ValueError, "cache_positions: expected it on cpu, got meta"),
    ({"k_cache": torch.zeros(12, 1, 16).expand(12, 2, 16)}, ValueError, r"k_cache: .* got strides \[16, 0, 1\]"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite float32 > 0 or None, got 0.0"),
    ({"backend": "fastest"}, ValueError, "backend: expected one of auto, .* got 'fastest'"),
    ({"backend": "sdpa", "softcap": 1.0}, ValueError, "backend: 'sdpa' can't run this call"),
    ({"v_cache": torch.zeros(12, 2, 16, requires_grad=True)}, ValueError, "v_cache: expected no gradients"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_CACHE, ids=[f"{i}-{'-'.join(b[0])}" for i, b in enumerate(BAD_CACHE)]
)
def test_bad_cache_is_refused(change, error, message, nothing_computes):
    call = TWO.make() | {f"{x}_cache": torch.zeros(12, 2, 16) for x in "kv"} | {"cache_positions": torch.arange(10)}
    with pytest.raises(error, match=f"^{message}"):
        bitune_prefill(**call | change)


def test_a_plans_own_slots_must_lie_in_the_cache(nothing_computes):
    plan = replace(TWO.plan(), token_index=torch.arange(10), padded_shape=(1, 10))
    call = TWO.make() | {"plan": plan, "cache_positions": plan.token_index}
    with pytest.raises(ValueError, match=r"^cache_positions: expected slots of 0 to 8, got 0 to 9"):
        bitune_prefill(**call, k_cache=torch.zeros(9, 2, 16), v_cache=torch.zeros(9, 2, 16))


def test_prefill_refuses_each_input_with_a_gradient(nothing_computes):
    case = Case(prompts=(4, 3), answers=(2, 1), prefix=(2, 3), beta="head", sinks=True)
    call = case.make() | {f"{x}_cache": torch.zeros(12, 2, 16) for x in "kv"} | {"cache_positions": torch.arange(10)}
    given = leaves(call)
    assert len(given) == 9
    for key, x in given.items():
        x.requires_grad_()
        with pytest.raises(ValueError, match=f"^{re.escape(key)}: expected no gradients"):
            bitune_prefill(**call)
        x.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"causal": torch.zeros(3, 2, 4).int()},
            TypeError,
            "causal: expected a floating point tensor of 16, 32 or 64 bits, got torch.int32",
        ),
        ({"causal": [0.0]}, TypeError, "causal: expected a floating point tensor of 16, 32 or 64 bits, got list"),
        ({"causal": torch.zeros(6, 4)}, ValueError, r"causal: expected \[rows, heads, head_dim\], got shape \[6, 4\]"),
        ({"bidir": None}, TypeError, "bidir: expected a floating point tensor of 16, 32 or 64 bits, got NoneType"),
        ({"bidir": torch.zeros(2, 2, 4)}, ValueError, r"bidir: expected torch.float32 \[3, 2, 4\] on cpu as causal"),
        ({"bidir": torch.zeros(3, 2, 4).half()}, ValueError, "bidir: .* got torch.float16"),
        ({"bidir": torch.zeros(3, 2, 4, device="meta")}, ValueError, "bidir: .* on meta"),
        ({"alpha": torch.zeros(3)}, ValueError, r"alpha: expected a scalar or shape \[2\]"),
        ({"alpha": "0.5"}, TypeError, "alpha: expected a number"),
        ({"backend": None}, ValueError, "backend: expected one that can mix .* got 'None'"),
    ],
)
def test_bad_mix_is_refused(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mix_kv(**{"causal": torch.zeros(3, 2, 4), "bidir": torch.zeros(3, 2, 4), "alpha": 0.5} | change)
