"""Bugs that kernels like these have had elsewhere, each with a test here or the reason why it can't occur.

| #  | bug, and where it happened                                      | here                                          |
|----|-----------------------------------------------------------------|-----------------------------------------------|
| 1  | int32 offsets overflow in large batches or with large strides:  | ``test_far_*``: rows, heads, cache slots and  |
|    | flash-attn #1500, #2611; fla #1080; Liger-Kernel #803           | cotangents beyond 2**31 elements              |
| 2  | zero-length sequence writes out of bounds, or fails at head dim | ``test_writes_all_of_its_outputs_and_nothing_ |
|    | 256: flash-attn #1155, #2562                                    | else``, ``test_skewed_shapes``                |
| 3  | max_seqlen 1; surplus tiles read past cu_seqlens:               | ``test_skewed_shapes``; no tile is surplus:   |
|    | flash-attn #1537, #2333                                         | ``test_schedule_*``                           |
| 4  | non-contiguous q, v, dout: flash-attn #355, #2777; fla #871     | ``test_any_strides``, ``test_expanded_*``     |
| 5  | fully masked row gives NaN: pytorch #103749, #131863            | every query sees itself; rows of a tile that  |
|    |                                                                 | see nothing yet: ``test_window_edges``        |
| 6  | NaN in dQ for tiny or skewed shapes: flash-attn #334, #443      | ``test_skewed_shapes``                        |
| 7  | races in the backward, visible once in thousands of runs;       | each sum has one owner:                       |
|    | nondeterministic dK of grouped heads: flash-attn #359, #2481,   | ``test_schedule_backward_kv``; 250 runs on a  |
|    | #2510                                                           | GPU: ``repeats`` of benchmarks/gpu_check.py   |
| 8  | one tile size is miscompiled on one architecture: vLLM #48590;  | ``test_tiles_agree``, with the compiler where |
|    | fla #988                                                        | there is a GPU                                |
| 9  | head dim 256 doesn't fit the shared memory of consumer parts:   | shows only where a kernel is compiled:        |
|    | flash-attn #190; vLLM #39018                                    | ``test_triton_compile.py``, for sm_89 too     |
| 10 | torch.compile around a user's Triton kernel: pytorch #136550    | ``test_compiled_*`` of ``test_ops.py``        |
| 11 | a mask flag silently ignored, "bidirectional" results that were | each mask with each layout of streams is a    |
|    | causal: a project that cites Bitune                             | case of ``testing/cases.py``                  |
| 12 | answer tokens leak into the bidirectional prefix:               | the same, and ``test_semantics.py``           |
|    | LLaMA-Factory #9135                                             |                                               |
| 13 | fused op reads the packed weights of a quantized base:          | no kernel takes a weight of the model; the    |
|    | NeMo Automodel #2584                                            | layers that do: ``test_adapters.py``          |
| 14 | fused loss corrupts LoRA weights after the first step:          | no kernel writes what it reads:               |
|    | ms-swift #9839                                                  | ``test_inputs_stay_as_they_were``; the loss   |
|    |                                                                 | in chunks over steps: ``test_loss.py``        |
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bitune_kernels import SegmentPlan, bitune_attention, bitune_prefill, mix_kv
from bitune_kernels.masks import visible_to_answer, visible_to_prompt
from bitune_kernels.testing import (
    Case,
    assert_backend_within_budget,
    default_device,
    leaves,
    runnable_backends,
)

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from bitune_kernels.backends import schedule
from bitune_kernels.backends.triton import attention_backward, attention_forward, tiles
from bitune_kernels.backends.triton.tiles import Tile

DEVICE = default_device()


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles on inputs of a few dozen rows; the smallest tile that a matrix unit takes."""
    monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: Tile(16, 32, 4, 1))


def gradients(inputs, outputs, d_outputs) -> dict[str, torch.Tensor]:
    """``d_outputs`` of out, k_mixed and v_mixed, None where nothing comes back."""
    given = leaves(inputs)
    used = [(o, d) for o, d in zip(outputs, d_outputs, strict=True) if d is not None and o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in used], given.values(), [d for _, d in used], allow_unused=True, retain_graph=True
    )
    return {
        f"d_{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(given.items(), grads, strict=True)
    }


def outputs_and_gradients(inputs, d_outputs) -> dict[str, torch.Tensor]:
    outputs = bitune_attention(**inputs, backend="triton")
    return dict(zip(("out", "k_mixed", "v_mixed"), outputs, strict=True)) | gradients(inputs, outputs, d_outputs)


def assert_equal(actual: dict, expected: dict, summed: tuple = ()) -> None:
    """Bit by bit. ``summed``: names of sums in an order that the compiler takes from the strides of their terms."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.isfinite(x).all(), name
        if name in summed:
            torch.testing.assert_close(x, expected[name])
        else:
            assert torch.equal(x, expected[name]), name


def random_like(x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x)


# 1: offsets beyond 2**31


@pytest.fixture
def uncommitted(monkeypatch):
    """Makes buffers of gigabytes cost only the pages that are touched."""
    copy = torch.UntypedStorage.copy_

    def copy_elsewhere(self, source, *args):
        # The interpreter copies the storage of every argument back: on a CPU onto itself, which would touch all of it.
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_elsewhere)


@pytest.fixture
def overflow_raises(monkeypatch):
    """Makes the interpreter check 32-bit integers: with ``sanitize_overflow`` alone it computes the checks in vain."""
    if tiles.interpreted():
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", replace(builder.options, debug=True, sanitize_overflow=True))


FAR = pytest.mark.usefixtures("uncommitted", "overflow_raises")


def far_apart(tensors, stride, dim=0) -> list[torch.Tensor]:
    """The same values as slices of one buffer, side by side; ``stride`` elements from row to row, or head to head."""
    last = max(x.shape[dim] for x in tensors) - 1
    buffer = torch.empty(last * stride + sum(x.numel() for x in tensors), dtype=tensors[0].dtype, device=DEVICE)
    assert buffer.numel() > 2**31
    views, offset = [], 0
    for x in tensors:
        strides = list(x.contiguous().stride())
        strides[dim] = stride
        views.append(buffer.as_strided(x.shape, strides, offset).copy_(x))
        offset += x.numel()
    return views


@FAR
@pytest.mark.parametrize(
    ("case", "stride"),
    [
        # A tile's own offsets fit 32 bits, where its first row stands doesn't.
        (Case(prompts=(43, 0), answers=(53, 1), prefix=(130, 7), heads=(1, 1)), 2**24 - 64),
        # The rows of one tile are too far apart.
        (Case(prompts=(0,), answers=(34,), heads=(1, 1)), 2**26),
    ],
    ids=["far tile", "far rows"],
)
def test_far_rows(case, stride):
    inputs = case.make(torch.float16, DEVICE)
    named = {name: x for name, x in leaves(inputs).items() if x.ndim == 3}
    d_out = random_like(inputs["q"])
    *views, d_far = far_apart([*named.values(), d_out], stride)
    far = inputs | dict(zip(named, views, strict=True))
    if case.prefix:
        far["prefix"] = (far.pop("prefix[0]"), far.pop("prefix[1]"))
    for x in (*leaves(inputs).values(), *leaves(far).values()):
        x.requires_grad_()
    assert_equal(outputs_and_gradients(far, (d_far, None, None)), outputs_and_gradients(inputs, (d_out, None, None)))


@FAR
def test_far_heads():
    # three query heads of one key/value head: the backward's tiles hold rows of all of them
    inputs = Case(prompts=(3,), answers=(2,), heads=(3, 1)).make(torch.float16, DEVICE)
    d_out = random_like(inputs["q"])
    q_far, d_far = far_apart([inputs["q"], d_out], 2**30, dim=1)
    far = inputs | {"q": q_far}
    for x in (*leaves(inputs).values(), q_far):
        x.requires_grad_()
    assert_equal(outputs_and_gradients(far, (d_far, None, None)), outputs_and_gradients(inputs, (d_out, None, None)))


@FAR
def test_far_cache_slots():
    inputs = Case(prompts=(5,), answers=(4,), heads=(1, 1)).make(torch.float16, DEVICE)
    caches = torch.empty(2**26 + 9, 2, 16, dtype=torch.float16, device=DEVICE).split(1, dim=1)
    slots = (2**26 + torch.tensor([8, 2, 1, 3, 7, 0, 6, 5, 4])).to(DEVICE)
    out = bitune_prefill(**inputs, k_cache=caches[0], v_cache=caches[1], cache_positions=slots, backend="triton")
    expected, *mixed = bitune_attention(**inputs, backend="triton")
    assert torch.equal(out, expected)
    for cache, prompt, rows in zip(caches, mixed, (inputs["k"], inputs["v"]), strict=True):
        assert torch.equal(cache[slots], torch.cat([prompt, rows[-4:]]))


@FAR
def test_far_mix():
    tensors = [random_like(torch.empty(34, 1, 16, dtype=torch.float16, device=DEVICE), seed) for seed in range(3)]
    results = []
    for causal, bidir, d_mixed in (tensors, far_apart(tensors, 2**26 + 2**22)):
        alpha = torch.tensor(0.3, device=DEVICE, requires_grad=True)
        given = [causal.requires_grad_(), bidir.requires_grad_(), alpha]
        mixed = mix_kv(*given, backend="triton")
        results.append(dict(enumerate([mixed, *torch.autograd.grad(mixed, given, d_mixed)])))
    assert_equal(*results)


@triton.jit
def product_kernel(out, x, y):
    tl.store(out, x * y)


@pytest.mark.skipif(not tiles.interpreted(), reason="needs Triton's interpreter: a GPU doesn't check this")
def test_interpreter_sees_overflow(overflow_raises):
    out = torch.zeros(1, dtype=torch.int64)
    product_kernel[(1,)](out, 2**15, 2**15)
    assert out == 2**30
    with pytest.raises(Exception, match="int32 overflow"):
        product_kernel[(1,)](out, 2**16, 2**15)


# 2, 3, 5, 6: lengths and masks

SKEWED = [
    Case(prompts=(0,), answers=(1,), prefix=(150,), heads=(2, 1)),
    Case(prompts=(150,), answers=(1,), heads=(1, 1)),
    Case(prompts=(1,), answers=(150,), heads=(1, 1)),
    Case(prompts=(70, 0, 1), answers=(0, 1, 1), prefix=(1, 0, 40), heads=(1, 1), window=30),
    Case(prompts=(1, 1), answers=(1, 1), heads=(4, 1), sinks=True),
    Case(prompts=(1, 0, 1), answers=(1, 1, 0), num_streams=1, shared_qkv=True, beta="scalar", heads=(2, 1)),
    Case(prompts=(0, 1, 0), answers=(1, 0, 0), prefix=(0, 2, 0), head_dim=256, heads=(1, 1)),
]


@pytest.mark.parametrize("case", SKEWED, ids=lambda case: case.id)
def test_skewed_shapes(case):
    assert_backend_within_budget("triton", case, torch.float32, DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        # Whole tiles of keys lie before the window of a tile's first rows, or of its last ones, or of all.
        Case(prompts=(37,), answers=(21,), prefix=(18,), heads=(1, 1), window=3),
        Case(prompts=(37,), answers=(21,), prefix=(18,), heads=(1, 1), window=17, stream_mask="anti_causal"),
        Case(prompts=(40,), answers=(5,), heads=(2, 1), window=1, num_streams=1, shared_qkv=True),
    ],
    ids=lambda case: case.id,
)
def test_window_edges(case, small_tiles):
    assert_backend_within_budget("triton", case, torch.float32, DEVICE)


@pytest.mark.parametrize("window", [None, 100])
def test_more_than_128k_tokens(window, monkeypatch):
    # one answer row at the end of a prompt of 140,000; the interpreter needs large tiles to be through in seconds
    if tiles.interpreted():
        monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: Tile(16, 4096, 4, 1))
    case = Case(prompts=(3, 140_000), answers=(2, 2), heads=(1, 1), num_streams=1, answer_only=True, window=window)
    assert_backend_within_budget("triton", case, torch.float32, DEVICE)


# 2: outputs that begin as NaN, with NaN around them


class Poison:
    """Within it, whatever the kernels allocate is NaN, and lies between margins of NaN."""

    MARGIN = 4096

    def __init__(self, monkeypatch):
        self.buffers, empty = [], torch.empty
        empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

        def poisoned(plain):
            if not plain.is_floating_point() or not plain.numel() or not plain.is_contiguous():
                return plain
            buffer = empty(plain.numel() + 2 * self.MARGIN, dtype=plain.dtype, device=plain.device).fill_(torch.nan)
            self.buffers.append(buffer)
            return empty(0, dtype=plain.dtype, device=plain.device).set_(
                buffer.untyped_storage(), self.MARGIN, plain.shape, plain.stride()
            )

        monkeypatch.setattr(torch, "empty", lambda *args, **options: poisoned(empty(*args, **options)))
        monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poisoned(empty_like(*args, **options)))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poisoned(new_empty(*args, **options)))

    def assert_written_exactly(self):
        assert self.buffers
        for buffer in self.buffers:
            assert not buffer[self.MARGIN : -self.MARGIN].isnan().any()
            assert buffer[: self.MARGIN].isnan().all() and buffer[-self.MARGIN :].isnan().all()


POISONED = [
    Case(prompts=(5, 0, 18), answers=(2, 17, 0), heads=(1, 1)),
    Case(prompts=(5, 18), answers=(2, 17), answer_only=True, strided=True, prefix=(3, 0), heads=(2, 1)),
    Case(prompts=(5, 0, 18), answers=(2, 0, 3), num_streams=1, window=4, prefix=(1, 0, 3), heads=(3, 1)),
    Case(prompts=(5, 0, 18), answers=(2, 17, 0), beta="head", sinks=True, head_dim_v=8, heads=(2, 1)),
    Case(prompts=(5, 0, 18), answers=(2, 17, 0), num_streams=1, shared_qkv=True, head_dim=20, heads=(2, 1)),
]


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.id)
def test_writes_all_of_its_outputs_and_nothing_else(case, small_tiles):
    inputs = case.make(torch.float32, DEVICE, requires_grad=True)
    given = leaves(inputs)
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch)
        outputs = bitune_attention(**inputs, backend="triton")
        forward = len(poison.buffers)
        used = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(used, given.values(), [torch.ones_like(o) for o in used], allow_unused=True)
    assert 0 < forward < len(poison.buffers)
    poison.assert_written_exactly()
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads) if x is not None)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_mix_writes_all_of_its_outputs_and_nothing_else(rows):
    causal, bidir = (random_like(torch.empty(rows, 2, 20, device=DEVICE), seed).requires_grad_() for seed in range(2))
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch)
        mixed = mix_kv(causal, bidir, 0.3, backend="triton")
        torch.autograd.grad(mixed.sum(), [causal, bidir])
    if rows:
        poison.assert_written_exactly()
    torch.testing.assert_close(mixed, 0.7 * causal + 0.3 * bidir)


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.id)
def test_prefill_writes_its_slots_and_nothing_else(case, small_tiles):
    inputs = case.make(torch.float32, DEVICE)
    plan, generator = inputs["plan"], torch.Generator().manual_seed(0)
    rows = plan.num_prompt + plan.num_answer
    slots = torch.randperm(rows + 9, generator=generator)[:rows].to(DEVICE)
    # [heads, slots, dim] with gaps behind each head: what stays NaN was neither read nor written
    buffers = [torch.full((case.heads[1], rows + 12, dim), torch.nan, device=DEVICE) for dim in case.dims]
    caches = [buffer.transpose(0, 1)[: rows + 9] for buffer in buffers]
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch)
        out = bitune_prefill(**inputs, k_cache=caches[0], v_cache=caches[1], cache_positions=slots, backend="triton")
    poison.assert_written_exactly()
    expected, *mixed = bitune_attention(**inputs, backend="triton")
    assert torch.equal(out, expected)
    for buffer, prompt, own in zip(buffers, mixed, (inputs["k"], inputs["v"]), strict=True):
        wanted = torch.full_like(buffer, torch.nan)
        wanted.transpose(0, 1)[slots] = torch.cat([prompt, own[plan.answer_start :]])
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=0, equal_nan=True)


# 4: strides


def spread(x):
    """The same values with every other element of the last dim, NaN between them."""
    buffer = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    buffer[..., 0] = x.detach()
    return buffer[..., 0]


def transposed(x):
    """The same values in the layout [heads, rows, dim]."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "case",
    [
        Case(prompts=(5,), answers=(4,), heads=(2, 2), alpha="head", beta="head", sinks=True, prefix=(2,)),
        Case(prompts=(5,), answers=(4,), heads=(2, 1), num_streams=1, shared_qkv=True),
    ],
    ids=lambda case: case.id,
)
def test_any_strides(case):
    # Of every tensor: per-head weights may be a column of a table of all layers.
    inputs = case.make(torch.float32, DEVICE, requires_grad=True)
    outputs = bitune_attention(**inputs, backend="triton")
    d_outputs = [random_like(o, seed) for seed, o in enumerate(outputs)]
    expected = dict(zip(("out", "k_mixed", "v_mixed"), outputs, strict=True)) | gradients(inputs, outputs, d_outputs)
    for change in (spread, transposed):

        def changed(x, change=change):
            fits = isinstance(x, torch.Tensor) and x.ndim > (change is transposed)
            return change(x).requires_grad_(x.requires_grad) if fits else x

        others = {name: changed(x) for name, x in inputs.items()}
        if case.prefix:
            others["prefix"] = tuple(map(changed, inputs["prefix"]))
        actual = outputs_and_gradients(others, [changed(d) for d in d_outputs])
        assert_equal(actual, expected, summed=("d_alpha_k", "d_alpha_v"))
        assert all(x.is_contiguous() for name, x in actual.items() if name.startswith("d_"))


def test_any_strides_of_cache_positions():
    inputs = Case(prompts=(5,), answers=(4,)).make(torch.float32, DEVICE)
    slots = torch.tensor([3, 9, 0, 5, 11, 1, 14, 2, 13], device=DEVICE)
    results = []
    for positions in (slots, torch.stack([slots, torch.zeros_like(slots)], dim=1)[:, 0]):
        caches = torch.zeros(2, 16, 2, 16, device=DEVICE)
        cache = {"k_cache": caches[0], "v_cache": caches[1], "cache_positions": positions}
        results.append({"out": bitune_prefill(**inputs, **cache, backend="triton"), "caches": caches})
    assert_equal(*results)


@pytest.mark.parametrize("per_head", [False, True])
def test_any_strides_of_mix(per_head):
    causal, bidir, d_mixed = (random_like(torch.empty(7, 3, 16, device=DEVICE), seed) for seed in range(3))
    alpha = torch.rand(3, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    alpha = alpha if per_head else torch.full((), 0.3, device=DEVICE).expand(3)  # stride 0
    results = []
    for change in (torch.Tensor.contiguous, transposed, spread):
        given = [change(causal).requires_grad_(), change(bidir).requires_grad_()]
        weight = (spread(alpha) if change is spread else alpha.detach()).requires_grad_()
        if change is torch.Tensor.contiguous:
            weight = weight.detach().contiguous().requires_grad_()
        mixed = mix_kv(*given, weight, backend="triton")
        grads = torch.autograd.grad(mixed, [*given, weight], change(d_mixed))
        results.append(dict(zip(("mixed", "d_causal", "d_bidir", "d_alpha"), (mixed, *grads), strict=True)))
    assert_equal(results[1], results[0], summed=("d_alpha",))
    assert_equal(results[2], results[0], summed=("d_alpha",))


def test_expanded_cotangents():
    # out.sum().backward() gives a cotangent whose strides are all 0
    inputs = Case(prompts=(5,), answers=(4,), heads=(2, 1)).make(torch.float32, DEVICE, requires_grad=True)
    outputs = bitune_attention(**inputs, backend="triton")
    ones = [torch.ones((), device=DEVICE).expand(o.shape) for o in outputs]
    contiguous = [d.contiguous() for d in ones]
    assert_equal(gradients(inputs, outputs, ones), gradients(inputs, outputs, contiguous))


@pytest.mark.parametrize("alone", range(3), ids=("out", "k_mixed", "v_mixed"))
def test_gradients_of_one_output_alone(alone):
    # what comes back for the others is nothing, not zeros
    inputs = Case(prompts=(5,), answers=(4,), heads=(1, 1)).make(torch.float32, DEVICE, requires_grad=True)
    outputs = bitune_attention(**inputs, backend="triton")
    zeros = [torch.zeros_like(o) for o in outputs]
    zeros[alone] = random_like(outputs[alone])
    nothing = [d if i == alone else None for i, d in enumerate(zeros)]
    assert_equal(gradients(inputs, outputs, nothing), gradients(inputs, outputs, zeros))


def test_a_plan_on_another_device():
    # made on the CPU for rows on a GPU, or on the first GPU for the layers on the second
    case = Case(prompts=(5,), answers=(4,), heads=(1, 1))
    inputs = case.make(torch.float32, DEVICE, requires_grad=True)
    d_outputs = (random_like(inputs["q"]), None, None)
    elsewhere = inputs | {"plan": case.plan("meta")}
    assert_equal(outputs_and_gradients(elsewhere, d_outputs), outputs_and_gradients(inputs, d_outputs))


# 8: tiles


@pytest.mark.parametrize(
    "tile",
    [Tile(16, 32, 4, 1), Tile(64, 32, 4, 2), Tile(32, 128, 4, 1), Tile(64, 128, 8, 1), Tile(128, 64, 8, 2)],
    ids=lambda tile: f"{tile.block_m}x{tile.block_n}",
)
def test_tiles_agree(tile, monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: tile)
    case = Case(prompts=(24,), answers=(19,), heads=(3, 1), prefix=(37,), window=35)
    assert_backend_within_budget("triton", case, torch.float32, DEVICE)


def test_tiles_are_arguments_too():
    # what a sweep over sizes uses: forward and backward need not have the same
    case = Case(prompts=(12,), answers=(18,), heads=(2, 1))
    args, options = case.call(torch.float32, DEVICE)
    results = []
    for sizes in ((Tile(16, 32, 4, 1),) * 3, (Tile(32, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1))):
        out, k_mixed, v_mixed, streams, lse = attention_forward.forward(*args, options, save=True, tile=sizes[0])
        d_outputs = [random_like(x, seed) for seed, x in enumerate((out, k_mixed, v_mixed))]
        tensors = (*args[:-1], None, None, None, None, out, streams, lse, args[-1])
        tile_of = {"tile_q": sizes[1], "tile_kv": sizes[2]}
        gradients = attention_backward.backward(*d_outputs, *tensors, **options.without_tensors(), **tile_of)
        results.append([out, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


BACKENDS = runnable_backends(Case(prompts=(9,), answers=(3,)), torch.float32, DEVICE)


# numbers


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_float16_values(softcap):
    # scores up to 1.6e5 before the scale, which float16 can't hold
    inputs = Case(prompts=(9,), answers=(7,), heads=(2, 1), softcap=softcap).make(torch.float16, DEVICE)
    for name in ("q", "k"):
        inputs[name] = (100 * inputs[name]).round()
    assert (inputs["q"].double().flatten(0, 1) @ inputs["k"].double()[:, 0].T).abs().max() > 65504
    given = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out, _, _ = bitune_attention(**inputs, backend="triton")
    assert all(torch.isfinite(x).all() for x in (out, *torch.autograd.grad(out.sum(), given)))
    expected, _, _ = bitune_attention(**inputs, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_of_zero(backend):
    # every visible key weighs the same; a mask of -inf must not be scaled
    case = Case(prompts=(9,), answers=(3,), heads=(2, 1), softmax_scale=0.0)
    assert_backend_within_budget(backend, case, torch.float32, DEVICE)


# 14: what is read stays


def test_inputs_stay_as_they_were():
    options = dict(prefix=(3,), window=20, alpha="head", beta="head", sinks=True, heads=(2, 1))
    inputs = Case(prompts=(5,), answers=(4,), **options).make(torch.float32, DEVICE, requires_grad=True)
    given = leaves(inputs)
    before = {name: x.detach().clone() for name, x in given.items()}
    outputs = bitune_attention(**inputs, backend="triton")
    kept = [o.detach().clone() for o in outputs]
    d_outputs = [random_like(o, seed) for seed, o in enumerate(outputs)]
    d_before = [d.clone() for d in d_outputs]
    first = torch.autograd.grad(outputs, given.values(), d_outputs, retain_graph=True)
    again = torch.autograd.grad(outputs, given.values(), d_outputs)
    for x, expected in (*zip(first, again), *zip(outputs, kept), *zip(d_outputs, d_before)):  # noqa: B905
        assert torch.equal(x, expected)
    assert_equal({name: x.detach() for name, x in given.items()}, before)


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 2, 0)], ids=["no rows", "no dims"])
def test_what_mixes_nothing_moves_no_weight(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **o: x.new_full(shape, float("nan"), **o))
    causal, bidir = torch.ones(2, *shape, device=DEVICE, requires_grad=True)
    alpha = torch.tensor([0.2, 0.7], device=DEVICE, requires_grad=True)
    mix_kv(causal, bidir, alpha, backend="triton").sum().backward()
    assert not alpha.grad.any()


# 3, 7: the schedule. Every row of every segment once, no tile without work, the longest first.

PLANS = [
    ((5, 0, 18, 1, 33), (2, 17, 0, 1, 0), (3, 0, 20, 1, 0)),
    ((0, 0, 1), (0, 3, 0), (0, 0, 0)),
    ((), (), ()),
]
VARIANTS = [
    dict(zip(("num_streams", "shared_qkv", "beta", "answer_only"), values, strict=True))
    for values in (
        (2, False, False, False),
        (2, False, True, False),
        (2, False, False, True),
        (1, False, False, False),
        (1, False, False, True),
        (1, True, False, False),
        (1, True, True, False),
        (1, True, True, True),
    )
]
MASKS_AND_WINDOWS = list(itertools.product(schedule.MASKS, (None, 1, 7)))


def test_tiles_go_to_the_gpu_without_waiting_for_it(monkeypatch):
    # Seen at copies that nothing makes here: only those from pinned memory, asked not to block, leave the host running.
    real, copies = torch.Tensor.to, []

    def to(x, *target, **options):
        if target[0] != torch.device("cuda"):
            return real(x, *target, **options)
        copies.append((x.dtype, getattr(x, "pinned", False), options))
        return x

    def pin_memory(x):
        x.pinned = True
        return x

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    plan, launch = SegmentPlan.from_lengths([5], [3], device="cpu"), schedule.Launch(2, None, "full", *[False] * 3)

    def cached(plan=plan):
        return schedule.cached(plan, torch.device("cuda"), schedule.backward_q_items, launch, 16)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        cached()
    assert copies == [(torch.int32, True, {"non_blocking": True})]
    # A graph would copy anew in each replay, from memory that is gone.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cached() is cached()
    with pytest.raises(RuntimeError, match="plan: expected a call with these options before its CUDA graph"):
        cached(SegmentPlan.from_lengths([5], [3], device="cpu"))
    assert len(copies) == 1


def plans(seed):
    """Given and random ragged batches."""
    generator = random.Random(seed)
    yield from PLANS
    for _ in range(3):
        batch = generator.randint(1, 6)
        yield tuple(tuple(generator.choice((0, 1, generator.randint(2, 40))) for _ in range(batch)) for _ in range(3))


def expected_keys(plan, stream_mask, window, shared_qkv, answer_only) -> dict[int, set]:
    """Row of a stream's outputs -> what it sees: rows of k, of the mixed prompt ("mixed") or of the prefix."""
    N, S, two = plan.num_prompt, plan.answer_start, plan.num_streams == 2 or shared_qkv
    before = 0 if answer_only else (2 if two else 1) * N
    mixed = "mixed" if plan.num_streams == 2 else "own"
    seen, p, r, past = {}, 0, 0, 0
    for n, a, m in zip(plan.prompt_lengths, plan.answer_lengths, plan.prefix_lengths, strict=True):
        prefix = [("prefix", past + j) for j in range(m)]
        streams = [] if answer_only else [(stream_mask, p, p), ("causal", N + p, S - N + p)][: 2 if two else 1]
        for mask, stream_row, own_row in streams:
            keys = prefix + [("own", own_row + j) for j in range(n)]
            for i, row in enumerate(visible_to_prompt(mask, n, m, window).tolist()):
                seen[stream_row + i] = set(itertools.compress(keys, row))
        keys = prefix + [(mixed, p + j) for j in range(n)] + [("own", S + r + j) for j in range(a)]
        for i, row in enumerate(visible_to_answer(a, m + n, window).tolist()):
            seen[before + r + i] = set(itertools.compress(keys, row))
        p, r, past = p + n, r + a, past + m
    return seen


def decoded(items, columns) -> list[dict[str, int]]:
    return [dict(zip(columns, row, strict=True)) for row in items.tolist()]


def in_window(i, j, window):
    return window is None or abs(i - j) < window


def masked(mask, i, j):
    return {
        schedule.FULL: True,
        schedule.CAUSAL: j <= i,
        schedule.ANTI_CAUSAL: j >= i,
        schedule.AFTER: j > i,
        schedule.NONE: False,
    }[mask]


def seen_of_run(kind, first_row, length, first_position, position, window, mask=schedule.FULL) -> set:
    """What a query at ``position`` sees of a run of keys."""
    places = range(first_position, first_position + length)
    return {
        (kind, first_row + x)
        for x, j in enumerate(places)
        if masked(mask, position, j) and in_window(position, j, window)
    }


def assert_longest_first(work: list[int], block: int) -> None:
    # The schedule's own estimate may be off by what the rows of one tile see more than its first or its last.
    assert all(now + block > later for now, later in itertools.combinations(work, 2))


def tile_rows(item, length, group, block) -> range:
    return range(item["block"] * block, min((item["block"] + 1) * block, length * group))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}{int(x)}" for k, x in v.items()))
def test_schedule_forward(variant):
    num_streams, shared_qkv, answer_only = variant["num_streams"], variant["shared_qkv"], variant["answer_only"]
    block, cache = 16, itertools.cycle([False, True])
    for (prompts, answers, past), (stream_mask, window) in itertools.product(plans(0), MASKS_AND_WINDOWS):
        plan = SegmentPlan.from_lengths(prompts, answers, num_streams=num_streams, prefix_lengths=past)
        expected = expected_keys(plan, stream_mask, window, shared_qkv, answer_only)
        group, to_cache = 1 << len(prompts) % 3, next(cache)
        launch = schedule.Launch(group, window, stream_mask, shared_qkv, variant["beta"], answer_only)
        items = schedule.forward_items(plan, launch, block, to_cache)
        rows, outs, writes, work = Counter(), Counter(), Counter(), []
        mixed = "mixed" if num_streams == 2 else "own"
        for item in decoded(items, schedule.FORWARD):
            packed, anyone = tile_rows(item, item["length"], group, block), set()
            for row in packed:
                token, position = row // group, item["position"] + row // group
                run = (item["own_row"], item["length"], item["position"], position, window)
                own = seen_of_run("own", *run, item["mask"])
                prefix = seen_of_run("prefix", item["prefix_row"], item["prefix_length"], 0, position, window)
                at = item["position"] - item["mixed_length"]
                before = seen_of_run(mixed, item["mixed_row"], item["mixed_length"], at, position, window)
                assert own | prefix | before == expected[item["stream_row"] + token]
                rows[item["stream_row"] + token, row % group] += 1
                outs[item["out_row"] + token, row % group] += 1
                anyone |= {("first", key) for key in own}
                if item["second_stream_row"] >= 0:
                    run = (item["second_row"], *run[1:])
                    own_second = seen_of_run("own", *run, item["second_mask"])
                    anyone |= {("second", key) for key in own_second}
                    goes_on = own if shared_qkv and stream_mask != "anti_causal" else set()
                    assert not goes_on & own_second
                    assert own_second | goes_on | prefix == expected[item["second_stream_row"] + token]
                    rows[item["second_stream_row"] + token, row % group] += 1
            written = [r for r in tile_rows(item, item["write_length"], group, block) if r % group == 0]
            writes.update(item["write_row"] + r // group for r in written)
            assert packed or written  # no tile is surplus
            work.append(len(anyone) + 2 * item["mixed_length"] + item["prefix_length"])
        assert set(rows.values()) <= {1} and {row for row, _ in rows} == set(expected)
        assert len(rows) == group * len(expected)
        in_two_parts = not answer_only and (shared_qkv or variant["beta"])
        if variant["beta"] or not in_two_parts:
            assert set(outs.values()) <= {1} and len(outs) == group * (max([row for row, _ in outs], default=-1) + 1)
        wanted = plan.num_prompt * (num_streams == 2 or to_cache) + plan.num_answer * to_cache
        assert writes == Counter(range(wanted))
        assert_longest_first(work, block)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}{int(x)}" for k, x in v.items()))
def test_schedule_backward_q(variant):
    num_streams, shared_qkv, answer_only = variant["num_streams"], variant["shared_qkv"], variant["answer_only"]
    block = 16
    for (prompts, answers, past), (stream_mask, window) in itertools.product(plans(1), MASKS_AND_WINDOWS):
        plan = SegmentPlan.from_lengths(prompts, answers, num_streams=num_streams, prefix_lengths=past)
        expected = expected_keys(plan, stream_mask, window, shared_qkv, answer_only)
        group = 1 << len(prompts) % 3
        launch = schedule.Launch(group, window, stream_mask, shared_qkv, variant["beta"], answer_only)
        items = schedule.backward_q_items(plan, launch, block)
        rows, q_rows, work = Counter(), Counter(), []
        mixed = "mixed" if num_streams == 2 else "own"
        for item in decoded(items, schedule.BACKWARD_Q):
            packed, anyone = tile_rows(item, item["length"], group, block), set()
            assert packed
            for row, part in itertools.product(packed, range(item["parts"])):
                token, position = row // group, item["position"] + row // group
                run = (item["own_row"], item["length"], item["position"], position, window)
                own = seen_of_run("own", *run, item[f"mask_{part}"])
                prefix = seen_of_run("prefix", item["prefix_row"], item["prefix_length"], 0, position, window)
                at = item["position"] - item["mixed_length"]
                before = seen_of_run(mixed, item["mixed_row"], item["mixed_length"], at, position, window)
                assert own | prefix | before == expected[item[f"stream_row_{part}"] + token]
                rows[item[f"stream_row_{part}"] + token, row % group] += 1
                q_rows[item["q_row"] + token, row % group] += part == 0
                anyone |= {(part, key) for key in own}
            work.append(len(anyone) + 2 * item["mixed_length"] + item["prefix_length"])
        assert set(rows.values()) <= {1} and len(rows) == group * len(expected)
        rows_q = plan.num_answer if answer_only else plan.num_rows
        assert q_rows == Counter(itertools.product(range(rows_q), range(group)))
        assert_longest_first(work, block)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}{int(x)}" for k, x in v.items()))
def test_schedule_backward_kv(variant):
    num_streams, shared_qkv, answer_only = variant["num_streams"], variant["shared_qkv"], variant["answer_only"]
    block, kinds = 16, {schedule.OWN: "own", schedule.MIXED: "mixed", schedule.PREFIX: "prefix"}
    for (prompts, answers, past), (stream_mask, window) in itertools.product(plans(2), MASKS_AND_WINDOWS):
        plan = SegmentPlan.from_lengths(prompts, answers, num_streams=num_streams, prefix_lengths=past)
        expected = expected_keys(plan, stream_mask, window, shared_qkv, answer_only)
        launch = schedule.Launch(2, window, stream_mask, shared_qkv, variant["beta"], answer_only)
        items = schedule.backward_kv_items(plan, launch, block)
        owners, pairs, work = Counter(), Counter(), []
        for item in decoded(items, schedule.BACKWARD_KV):
            keys, anyone = tile_rows(item, item["length"], 1, block), set()
            assert keys
            for key in keys:
                owner = (kinds[item["kind"]], item["k_row"] + key)
                owners[owner] += 1
                for part in range(item["parts"]):
                    i = item[f"position_{part}"]
                    for token in range(item[f"length_{part}"]):
                        j = item["position"] + key
                        if masked(item[f"mask_{part}"], i + token, j) and in_window(i + token, j, window):
                            pairs[item[f"stream_row_{part}"] + token, owner] += 1
                            anyone.add((part, token))
            work.append(len(anyone))
        # One owner of each key's sums: of the streams' rows and the answer's, of the mixed prompt, of the prefix.
        wanted = {"own": plan.num_rows, "mixed": plan.num_prompt * (num_streams == 2), "prefix": plan.num_prefix}
        assert owners == Counter((kind, row) for kind, rows in wanted.items() for row in range(rows))
        assert pairs == Counter((row, key) for row, keys in expected.items() for key in keys)
        assert_longest_first(work, block)
