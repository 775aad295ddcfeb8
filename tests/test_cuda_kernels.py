"""The CUDA kernels on a CPU: their own source, run by tests/emulator, on the case table of every backend.

The emulator finishes copies and products as late as a GPU may, and in another order for each seed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bitune_kernels import backends, bitune_attention, bitune_prefill
from bitune_kernels.backends import schedule
from bitune_kernels.testing import CASES, Case, assert_backend_within_budget, assert_prefilled, run_case
from tests import emulator
from tests.test_ops import OPERATOR_CASES, operator_arguments, prefill_arguments

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")

CAPABILITIES = (80, 90)
HALF = (torch.bfloat16, torch.float16)
TWO, ONE = {"prompts": (400, 130), "answers": (300, 40)}, {"num_streams": 1, "shared_qkv": True}


def emulated_library(tmp_path_factory) -> Path:
    """The emulated extension, built by the first process of a run that asks."""
    pytest.importorskip("pybind11", reason="building the emulated extension needs pybind11")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers of a run share; without them it outlives the run
    folder = folder / "emulated"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = list(folder.glob("_C*.so"))
        return built[0] if built else emulator.build(folder)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return emulated_library(tmp_path_factory)


@pytest.fixture
def emulate(library, monkeypatch):
    """Makes the emulated extension that of the package; called with a capability, and a seed."""
    return use(library, monkeypatch)


def use(library, monkeypatch):
    native = emulator.load(library)
    monkeypatch.setitem(sys.modules, "bitune_kernels._C", native)
    settings = ctypes.CDLL(str(library))

    def choose(capability, multiprocessors=3, seed=1):
        settings.emulator_set(capability, multiprocessors, seed)

    return choose


def needs_interpreter():
    """Of a test that needs Triton's kernels on the CPU too."""
    pytest.importorskip("triton")
    if reason := backends.load("triton").unsupported(device="cpu"):
        pytest.skip(reason)


def check(case, dtype=torch.bfloat16, backward=False):
    assert_backend_within_budget("cuda", case, dtype, backward=backward)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_outputs(emulate, case, dtype, capability):
    emulate(capability)
    check(case, dtype)


# Several tiles of keys in each run, with every shape of kernel.
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(**TWO, heads=(2, 1), head_dim=dim, alpha="head") for dim in (64, 96, 128, 256)),
        *(Case(**TWO, heads=(2, 1), head_dim=dim, alpha="head", softcap=3.0, beta="head") for dim in (64, 128)),
        *(Case(**TWO, heads=(2, 1), head_dim=dim, window=150) for dim in (64, 256)),
        *(Case(**TWO, **ONE, heads=(2, 1), head_dim=dim) for dim in (64, 128, 256)),
        Case(**TWO, **ONE, heads=(2, 1), head_dim=64, stream_mask="anti_causal", window=200, beta="head"),
        Case(**TWO, heads=(2, 1), head_dim=128, prefix=(200, 7), sinks=True),
        Case(**TWO, heads=(7, 1), head_dim=64),
    ],
    ids=lambda case: case.id,
)
def test_long_runs(emulate, case, capability):
    emulate(capability, seed=2)
    check(case)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_same_bits_in_any_order(emulate, capability):
    case = Case(prompts=(300, 70), answers=(150, 9), heads=(2, 1), head_dim=64, beta="head")
    results = []
    for multiprocessors, seed in ((1, 1), (3, 2), (7, 3), (100, 4)):
        emulate(capability, multiprocessors, seed)
        results.append(run_case(case, "cuda", torch.bfloat16, backward=False))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case",
    [
        Case(prompts=(65, 7, 0), answers=(9, 33, 5), heads=(4, 2), alpha="head"),
        Case(prompts=(20, 5), answers=(6, 0), heads=(4, 1), **ONE, beta="head", window=7),
        Case(prompts=(20, 5), answers=(6, 3), heads=(2, 2), prefix=(9, 0), sinks=True, softcap=2.0),
    ],
    ids=lambda case: case.id,
)
def test_gradients_from_what_the_kernels_save(emulate, case, capability):
    needs_interpreter()
    emulate(capability)
    check(case, torch.float16, backward=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (2, 2)])
@pytest.mark.parametrize("options", [{}, {"num_streams": 1}, {"answer_only": True}], ids=str)
def test_prefill_writes_the_named_slots_and_nothing_else(emulate, options, heads, capability):
    emulate(capability)
    case = Case(prompts=(65, 0, 130), answers=(1, 20, 3), heads=heads, head_dim_v=24, **options)
    call = case.make_prefill(torch.bfloat16)
    out = bitune_prefill(**call, backend="cuda")
    expected, *mixed = bitune_attention(**case.make(torch.bfloat16), backend="reference")
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    assert_prefilled(call, mixed, rtol=2**-7)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case",
    [
        Case(prompts=(5, 0, 180), answers=(2, 17, 0), heads=(1, 1)),
        Case(prompts=(5, 18), answers=(2, 17), answer_only=True, strided=True, prefix=(3, 0), heads=(3, 1)),
        Case(prompts=(5, 0, 18), answers=(2, 0, 3), num_streams=1, window=4, prefix=(1, 0, 3), heads=(3, 1)),
        Case(prompts=(5, 0, 18), answers=(2, 17, 0), beta="head", sinks=True, head_dim_v=8, heads=(2, 1)),
        Case(prompts=(5, 0, 18), answers=(2, 17, 0), **ONE, head_dim=24, heads=(2, 1)),
    ],
    ids=lambda case: case.id,
)
def test_writes_all_of_its_outputs_and_nothing_else(emulate, case, capability):
    needs_interpreter()  # requires_grad: lse and the streams are written too
    from tests.test_kernel_bugs import Poison

    emulate(capability)
    inputs = case.make(torch.float16, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch)
        outputs = bitune_attention(**inputs, backend="cuda")
    poison.assert_written_exactly()
    assert all(torch.isfinite(x).all() for x in outputs)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_float16_values(emulate, softcap, capability):
    # scores up to 1.6e5 before the scale, which float16 can't hold
    emulate(capability)
    inputs = Case(prompts=(9,), answers=(7,), heads=(2, 1), softcap=softcap).make(torch.float16)
    for name in ("q", "k"):
        inputs[name] = (100 * inputs[name]).round()
    out, _, _ = bitune_attention(**inputs, backend="cuda")
    expected, _, _ = bitune_attention(**inputs, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)


def test_softcap_that_loses_the_scores_is_refused(emulate):
    # softcap * tanh(scores / softcap) with an absolute error of the tanh: all scores equal at 1e9
    emulate(80)
    inputs = Case(prompts=(9,), answers=(7,), softcap=1e9).make(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^backend: 'cuda' can't .* softcap above 1000, got 1e\+09"):
        bitune_attention(**inputs, backend="cuda")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("options", [{"softmax_scale": 0.0}, {"softmax_scale": 0.0, "softcap": 2.0}], ids=str)
def test_scale_of_zero(emulate, options, capability):
    # every visible key weighs the same; a mask of -inf must not be scaled
    emulate(capability)
    check(Case(prompts=(9,), answers=(3,), heads=(2, 1), **options))


# alpha may leave [0, 1], and at its ends one stream must not be seen at all
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5, -0.5, 1.7])
def test_any_alpha(emulate, alpha, capability):
    emulate(capability)
    inputs = Case(prompts=(70,), answers=(9,), heads=(2, 1)).make(torch.bfloat16)
    inputs |= {"alpha_k": alpha, "alpha_v": 1 - alpha}
    actual, expected = (bitune_attention(**inputs, backend=name) for name in ("cuda", "reference"))
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, atol=0.03, rtol=0.02)
    if alpha in (0, 1):
        unseen = inputs["k"][70:140] if alpha else inputs["k"][:70]
        unseen += 100
        again, *_ = bitune_attention(**inputs, backend="cuda")
        assert torch.equal(again[140:], actual[0][140:])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_sample_of_nan_stays_alone(emulate, capability):
    # Keys of the next sample stand in the same tile: they are masked, and their values must not meet a weight of 0.
    emulate(capability)
    case = Case(prompts=(20, 30), answers=(5, 6), heads=(2, 1), prefix=(3, 4))
    clean, dirty = (case.make(torch.bfloat16) for _ in range(2))
    plan = clean["plan"]
    sample = torch.zeros(plan.num_rows, dtype=torch.bool)
    for start, stop in ((20, 50), (70, 100), (105, 111)):
        sample[start:stop] = True
    for x in (dirty["k"], dirty["v"], dirty["q"]):
        x[sample] = torch.nan
    for x in dirty["prefix"]:
        x[3:] = torch.nan
    wanted, *_ = bitune_attention(**clean, backend="cuda")
    out, *_ = bitune_attention(**dirty, backend="cuda")
    assert torch.equal(out[~sample], wanted[~sample])
    assert bool(out[sample].isnan().all())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_offsets_beyond_32_bits(emulate, capability):
    # Rows 2^26 elements apart: all but the first few are more than 2^31 elements from the tensor's begin.
    emulate(capability)
    case = Case(prompts=(30,), answers=(10,), heads=(2, 1))
    inputs = case.make(torch.bfloat16)
    expected, *mixed = bitune_attention(**inputs, backend="reference")

    def far(x):
        memory = torch.empty(x.shape[0] * 2**26, dtype=x.dtype)  # touched where rows stand alone
        return memory.as_strided(x.shape, (2**26, x.shape[2], 1)).copy_(x)

    inputs |= {name: far(inputs[name]) for name in ("q", "k", "v")}
    caches = {name: far(torch.zeros_like(inputs["k"])) for name in ("k_cache", "v_cache")}
    slots = torch.arange(40) + 5
    out = bitune_prefill(**inputs, **caches, cache_positions=slots, backend="cuda")
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    for cache, prompt in zip(caches.values(), mixed, strict=True):
        torch.testing.assert_close(cache[5:35].contiguous(), prompt, atol=0, rtol=2**-7)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_once_for_all_lengths(emulate, capability):
    emulate(capability)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: bitune_attention(**x, backend="cuda")[0], backend=counter, fullgraph=True)
    for lengths in (((9, 5), (3, 6)), ((30, 2), (1, 7)), ((11, 70), (20, 4))):
        case = Case(*lengths, heads=(2, 1))
        inputs = case.make(torch.bfloat16)
        assert torch.equal(compiled(inputs), bitune_attention(**inputs, backend="cuda")[0])
    assert counter.frame_count <= 2  # with the lengths of the first call, and with any


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.id)
def test_opcheck(emulate, case):
    needs_interpreter()
    emulate(90)
    half = {"backend": "cuda", "dtype": torch.float16}
    torch.library.opcheck(torch.ops.bitune.attention.default, operator_arguments(case, requires_grad=True, **half))
    torch.library.opcheck(torch.ops.bitune.prefill.default, prefill_arguments(case, **half))


# logic without a kernel

LOGIC = """
#include "layout.h"
using namespace bitune;
extern "C" void visible_keys(int i, int length, int mask, int window, int* out) {
  Bounds b = visible(i, length, mask, window); out[0] = b.low; out[1] = b.high;
}
extern "C" void key_tiles(const Item* item, int part, int goes_on, int source, int group, int block_m, int block_n,
                          int window, int* out) {
  Run r = run(*item, part, goes_on, source, tokens(*item, group, block_m), window, block_n);
  int values[] = {r.row, r.length, r.position, r.mask, r.span.start, r.span.whole, r.span.rest, r.span.stop};
  for (int i = 0; i < 8; ++i) out[i] = values[i];
}
extern "C" int entry(int round, int worker, int workers, int entries) {
  return entry_of(round, worker, workers, entries);
}
extern "C" uint64_t descriptor(uint32_t address, uint32_t leading) { return wgmma_descriptor(address, leading); }
extern "C" uint64_t further(uint64_t descriptor, uint32_t bytes) { return advance(descriptor, bytes); }
extern "C" uint32_t chunk(int row, int chunk, int rows) { return chunk_offset(row, chunk, rows); }
"""


@pytest.fixture(scope="module")
def logic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logic")
    (folder / "logic.cpp").write_text(LOGIC)
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-I", str(emulator.CSRC), "logic.cpp", "-o", "logic.so"]
    subprocess.run(command, cwd=folder, check=True)
    functions = ctypes.CDLL(str(folder / "logic.so"))
    functions.descriptor.restype = functions.further.restype = ctypes.c_uint64
    functions.further.argtypes = (ctypes.c_uint64, ctypes.c_uint32)
    return functions


def sees(i, j, mask, window):
    i = torch.as_tensor(i)
    allowed = (j >= 0, j <= i, j >= i, j > i, j < 0)[mask] & (i == i)
    return allowed & ((i - j).abs() < window) if window else allowed


@pytest.mark.parametrize("mask", range(5))
@pytest.mark.parametrize("window", [0, 1, 4])
def test_visible(logic, mask, window):
    out = (ctypes.c_int * 2)()
    for length in (0, 1, 7):
        j = torch.arange(length)
        for i in range(-9, 18):
            logic.visible_keys(i, length, mask, window, out)
            low, high = out
            assert 0 <= low <= high <= length
            assert torch.equal((low <= j) & (j < high), sees(i, j, mask, window)), (i, length)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"stream_mask": "anti_causal"}, ONE, ONE | {"window": 9}, {"prefix": (9, 20, 0), "window": 13}],
    ids=str,
)
def test_tiles_cover_what_is_visible_and_mask_what_is_not(logic, options, group):
    case = Case(prompts=(37, 5, 0), answers=(20, 1, 33), **options)
    plan, window = case.plan(), case.window or 0
    block_m, block_n = 16, 8
    launch = schedule.Launch(group, case.window, case.stream_mask, case.shared_qkv, beta=False, answer_only=False)
    items = schedule.forward_items(plan, launch, block_m, to_cache=False).to(torch.int32)
    out = (ctypes.c_int * 8)()
    goes_on = case.shared_qkv and case.stream_mask != "anti_causal"
    for row in items:
        item = dict(zip(schedule.FORWARD, row.tolist(), strict=True))
        packed = torch.arange(item["block"] * block_m, (item["block"] + 1) * block_m)
        token = (packed // group)[packed < item["length"] * group]
        for part in range(2 if case.shared_qkv else 1):
            for source in range(3):
                address = ctypes.c_void_p(row.data_ptr())
                logic.key_tiles(address, part, goes_on, source, group, block_m, block_n, window, out)
                _, length, position, mask, start, whole, rest, stop = out
                assert start % block_n == 0 and (stop - start) % block_n == 0
                i, j = (item["position"] - position + token)[:, None], torch.arange(length)
                visible = sees(i, j, mask, window)
                covered = visible[:, start:stop].sum()
                assert covered == visible.sum(), "a tile is missing"
                assert bool(visible[:, whole:rest].all()), "a tile lacks its mask"
                assert rest - whole <= 0 or rest <= length, "a tile beyond the keys lacks its mask"


@pytest.mark.parametrize("workers, entries", [(1, 5), (3, 0), (3, 1), (3, 3), (4, 17), (132, 1000), (8, 8)])
def test_every_entry_once_and_the_longest_first(logic, workers, entries):
    mine = []
    for worker in range(workers):
        rounds = []
        while (entry := logic.entry(len(rounds), worker, workers, entries)) >= 0:
            rounds.append(entry)
        assert rounds == sorted(rounds)
        mine.append(rounds)
    assert sorted(chain.from_iterable(mine)) == list(range(entries))
    # Work that falls by 1 from entry to entry: nobody has more than the longest above anybody else.
    work = [sum(entries - e for e in rounds) for rounds in mine]
    assert max(work) - min(work) <= entries


# What make_gmma_desc of CuTe (CUTLASS 4.2) gives for bfloat16 tiles in its 128-byte swizzled layouts, start address 0,
# by rows and major mode; and where the 16-wide steps of a [128, 128] tile begin in its K-major layout, from row 64 on.
CUTE = {(128, "K"): 0x4000004000010000, (128, "MN"): 0x4000004004000000}
CUTE_STEPS = [8192, 8224, 8256, 8288, 24576, 24608, 24640, 24672]


def test_wgmma_descriptors_are_those_of_cute(logic):
    assert logic.descriptor(0, 16) == CUTE[128, "K"]
    assert logic.descriptor(0, 128 * 128) == CUTE[128, "MN"]
    assert logic.descriptor(0x25400, 16) == CUTE[128, "K"] | 0x2540
    start = logic.descriptor(0x400, 16)
    assert logic.further(start, 2048) == logic.descriptor(0xC00, 16)
    for step, offset in enumerate(CUTE_STEPS):
        assert logic.chunk(64, 8 * (step // 4), 128) + step % 4 * 32 == offset
    # the swizzle: chunks of a row are permuted within its 128 bytes, another way in each of 8 rows
    for row in range(16):
        places = [logic.chunk(row, chunk, 16) - row * 128 for chunk in range(8)]
        assert sorted(places) == list(range(0, 128, 16))
        assert places == [16 * (chunk ^ row % 8) for chunk in range(8)]
