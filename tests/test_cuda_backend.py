"""What the CUDA backend hands to its kernels, and what it refuses: with a stand-in for the native module.

The kernels themselves run in tests/emulator.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from bitune_kernels import bitune_attention, bitune_prefill
from bitune_kernels.backends import Options, cuda, load, reference, resolve, schedule
from bitune_kernels.testing import Case
from tests.test_packaging import NVCC, ROOT, needs_nvcc

DTYPE = torch.float16
PLAIN = Case(prompts=(5, 0), answers=(3, 2), heads=(4, 2))
CASES = [
    PLAIN,
    Case(prompts=(5,), answers=(3,), head_dim=32, head_dim_v=16, alpha="head", strided=True),
    Case(prompts=(5,), answers=(3,), prefix=(4,), sinks=True, strided=True, window=3, softcap=2.0),
    Case(prompts=(5,), answers=(3,), prefix=(0,), softmax_scale=-0.5),
    Case(prompts=(5,), answers=(3,), heads=(2, 1), beta="head", stream_mask="anti_causal"),
    Case(prompts=(5,), answers=(3,), beta="scalar", answer_only=True),
    Case(prompts=(5,), answers=(3,), num_streams=1),
    Case(prompts=(5,), answers=(3,), num_streams=1, shared_qkv=True),
    Case(prompts=(5,), answers=(3,), num_streams=1, shared_qkv=True, stream_mask="anti_causal", beta="scalar"),
]


class Native(ModuleType):
    """``bitune_kernels._C`` for the CPU: keeps what a launch was given, and the memory that it would read."""

    DEVICE_TYPE, ITEM_COLUMNS = "cpu", schedule.FORWARD

    def __init__(self):
        super().__init__("bitune_kernels._C")
        self.call = self.seen = None
        self.launches, self.num_slots, self.result, self.of_device, self.error = 0, 0, (0, ""), 90, ""

    def capability(self, device):
        if self.of_device is None:
            raise RuntimeError("no such device")
        return self.of_device

    def forward_tile(self, capability, head_dim, head_dim_v):
        return (64, 32, 1024) if capability >= 80 else (0, 0, 0)

    def device_info(self):
        return {"error": self.error}

    def forward(self, **call):
        kv, q = call["num_heads_kv"], call["num_heads_kv"] * call["group_size"]
        dtype, dim, dim_v = torch.bfloat16 if call["bf16"] else torch.float16, call["head_dim"], call["head_dim_v"]
        self.seen = seen = {}
        for name, heads, width in (("q", q, dim), ("k", kv, dim), ("v", kv, dim_v)):
            seen[name] = read_rows(call[name], heads, width, dtype)
        for name, width in (("k_prefix", dim), ("v_prefix", dim_v)):
            seen[name] = call[name] and read_rows(call[name], kv, width, dtype)
        for name, heads in (("alpha_k", kv), ("alpha_v", kv), ("beta", q)):
            address, stride = call[name] or (0, 0)
            weights = read(address, 1 + stride * (heads - 1), torch.float32)
            seen[name] = None if weights is None else weights.expand(heads)
        seen["sinks"] = read(call["sinks"], q, torch.float32)
        seen["slots"] = read(call["slots"], self.num_slots, torch.int64)
        seen["items"] = read(call["items"], call["num_items"] * len(schedule.FORWARD), torch.int32)
        self.call, self.launches = call, self.launches + 1
        return self.result


def read(address: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
    if address:
        return torch.frombuffer(bytearray(ctypes.string_at(address, count * dtype.itemsize)), dtype=dtype)


def read_rows(given, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    address, stride_row, stride_head, rows = given
    assert address % 16 == stride_row % 8 == stride_head % 8 == 0 and stride_row > 0 and stride_head > 0
    if not rows:
        return torch.empty(0, heads, width, dtype=dtype)
    reach = (rows - 1) * stride_row + (heads - 1) * stride_head + width
    return read(address, reach, dtype).as_strided((rows, heads, width), (stride_row, stride_head, 1))


def rows_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[0]


@pytest.fixture
def native(monkeypatch):
    module = Native()
    monkeypatch.setitem(sys.modules, "bitune_kernels._C", module)
    return module


def complete(case: Case, dtype=DTYPE, **changes) -> dict:
    """The arguments of the case's call, by name."""
    options = {"sinks": None, "beta": None, "prefix": None} | case.make(dtype) | changes
    return options | {"softmax_scale": case.softmax_scale or case.head_dim**-0.5}


def positional(call: dict) -> list:
    """The same as a backend gets it."""
    options = Options(**{name: call[name] for name in Options._fields})
    return [*(call[name] for name in ("q", "k", "v", "alpha_k", "alpha_v", "plan")), options]


def launch(call: dict, save: bool = False):
    return cuda.forward(*positional(call), save=save)


def assert_seen(native, call: dict) -> None:
    k_prefix, v_prefix = call["prefix"] if call["prefix"] and len(call["prefix"][0]) else (None, None)
    beta = call["beta"] if len(call["q"]) == len(call["k"]) else None  # it mixes the prompt's outputs
    for name, x in (call | {"beta": beta, "k_prefix": k_prefix, "v_prefix": v_prefix}).items():
        if name in native.seen:
            seen = native.seen[name]
            assert (x is None) == (seen is None), name
            assert x is None or torch.equal(seen, x if x.ndim == 3 else x.float().expand_as(seen)), name


@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_launch_is_given_the_call(native, case, save):
    call = complete(case)
    out, k_mixed, v_mixed, streams, lse = launch(call, save)
    assert_seen(native, call)
    given, N, prompt = native.call, sum(case.prompts), not case.answer_only
    assert given["num_items"] == native.seen["items"].numel() / len(schedule.FORWARD) > 0
    expected = {
        "bf16": False,
        "num_prompt": N,
        "softmax_scale": call["softmax_scale"],
        "softcap": case.softcap or 0,
        "window": case.window or 0,
        "two_parts": prompt and (case.shared_qkv or case.beta is not None),
        "goes_on": case.shared_qkv and case.stream_mask == "full",
        "device": 0,
        "stream": 0,
        "slots": 0,
        "out": rows_of(out),
        "lse": lse.data_ptr(),
        "streams": rows_of(streams) if len(streams) else None,
        "k_written": rows_of(k_mixed) if case.num_streams == 2 else None,
        "v_written": rows_of(v_mixed) if case.num_streams == 2 else None,
    }
    assert {name: given[name] for name in expected} == expected
    (*args, options) = positional(call)
    wanted = reference.attention(*args, options)
    apart, _, _ = reference.attention(*args, options._replace(beta=None))
    assert [x.shape for x in (out, k_mixed, v_mixed)] == [x.shape for x in wanted]
    assert lse.shape == (len(apart) if save else 0, case.heads[0]) and lse.dtype == torch.float32
    assert len(streams) == (2 * N if save and prompt and case.beta else 0)


def test_weights_become_float32(native):
    call = complete(PLAIN, torch.bfloat16, sinks=torch.ones(4, dtype=torch.float64))
    call |= {"alpha_k": torch.tensor(0.3, dtype=torch.float64), "alpha_v": torch.rand(4)[::2]}
    launch(call)
    assert native.call["bf16"] is True
    assert_seen(native, call)


def test_the_tiles_are_where_the_rows_are(native):
    launch(complete(PLAIN, plan=PLAIN.plan("meta")))
    assert native.seen["items"] is not None


def narrow(x):
    return torch.cat([x, x], dim=2)[..., : x.shape[2]]


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (narrow, False),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), False),
        (lambda x: torch.cat([x, x[..., :4]], dim=2)[..., : x.shape[2]], True),
        (lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), True),
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
        (lambda x: x[:1, :1].expand_as(x), True),
    ],
    ids=["slice", "heads first", "odd strides", "odd address", "dims apart", "expanded"],
)
def test_rows_that_kernels_cannot_address_are_copied(native, change, copied):
    call = complete(Case(prompts=(5,), answers=(3,), prefix=(4,)))
    call |= {name: change(call[name]) for name in "qkv"}
    call["prefix"] = tuple(map(change, call["prefix"]))
    launch(call)
    assert_seen(native, call)
    given = dict(zip(("k_prefix", "v_prefix"), call["prefix"], strict=True), **{name: call[name] for name in "qkv"})
    for name, x in given.items():
        assert (native.call[name] != rows_of(x)) == copied, name


def prefill(case=PLAIN, change=lambda cache: cache) -> dict:
    inputs, rows = case.make(DTYPE), sum(case.prompts) + sum(case.answers)
    caches = {name: torch.zeros(2 * rows, case.heads[1], case.head_dim, dtype=DTYPE) for name in ("k_cache", "v_cache")}
    caches["v_cache"] = change(caches["v_cache"])
    return inputs | caches | {"cache_positions": torch.arange(2 * rows).flip(0)[::2]}


def test_prefill_writes_into_the_caches(native):
    call = prefill(change=narrow)
    native.num_slots = len(call["cache_positions"])
    out = bitune_prefill(**call, backend="cuda")
    assert native.call["out"] == rows_of(out) and native.call["lse"] == 0
    assert native.call["k_written"] == rows_of(call["k_cache"]) and native.call["v_written"] == rows_of(call["v_cache"])
    assert torch.equal(native.seen["slots"], call["cache_positions"])


@pytest.mark.parametrize("change", [lambda x: torch.cat([x, x[..., :4]], 2)[..., :16], lambda x: x.mT.contiguous().mT])
def test_a_cache_is_not_copied(native, change):
    with pytest.raises(ValueError, match=r"^v_cache: expected contiguous rows at .* 16 bytes, got strides \["):
        bitune_prefill(**prefill(change=change), backend="cuda")
    assert native.launches == 0


def test_torch_too_works_on_the_device_of_the_rows(native, monkeypatch):
    call, guarded = complete(PLAIN), []

    @contextmanager
    def device_of(x):
        assert x is call["q"]
        guarded.append(native.launches)
        yield
        guarded.append(native.launches)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch(call)
    assert guarded == [0, 1]


def test_nothing_to_compute_launches_nothing(native):
    out, _, _ = bitune_attention(**Case(prompts=(), answers=()).make(DTYPE), backend="cuda")
    assert len(out) == 0 and native.launches == 0


def test_a_launch_that_fails_raises(native):
    native.result = (98, "launching: invalid device function")
    with pytest.raises(RuntimeError, match=r"^launching: invalid device function \(error 98\)$"):
        bitune_attention(**PLAIN.make(DTYPE), backend="cuda")


def test_the_gradient_is_tritons(native, monkeypatch):
    triton, given = load("triton"), []

    def backward(*tensors, **options):
        given.extend(tensors)
        return [torch.full_like(x, 7) for x in tensors[3:12] if x is not None]

    monkeypatch.setattr(triton, "unsupported", lambda **call: None)
    monkeypatch.setattr(triton, "backward", backward)
    inputs = PLAIN.make(DTYPE, requires_grad=True)
    out, _, _ = bitune_attention(**inputs, backend="cuda")
    out.sum().backward()
    assert all((inputs[name].grad == 7).all() for name in ("q", "k", "v", "alpha_k", "alpha_v"))
    assert given[12].data_ptr() == out.data_ptr() and given[14].shape == out.shape[:2] and given[15] is inputs["plan"]


@pytest.mark.parametrize(
    ("change", "facts", "reason"),
    [
        ({}, {"device": torch.device("cuda", 0)}, "needs a cpu device, got cuda"),
        ({}, {"dtype": torch.float32}, "bfloat16 and float16, got torch.float32"),
        ({}, {"head_dim": 20}, "multiples of 8 up to 256, got 20"),
        ({}, {"head_dim": 64, "head_dim_v": 264}, "multiples of 8 up to 256, got 264"),
        ({"of_device": 75}, {}, "no kernel for compute capability 7.5"),
        ({"of_device": None}, {}, "no such device"),
        ({"of_device": None, "error": "no NVIDIA driver"}, {}, "no NVIDIA driver"),
        ({"ITEM_COLUMNS": schedule.FORWARD[1:]}, {}, "built from other sources"),
        ({}, {"dtype": torch.bfloat16, "requires_grad": True}, "its backward is Triton's: it says why"),
    ],
)
def test_it_says_why_it_cannot_run(native, monkeypatch, change, facts, reason):
    monkeypatch.setattr(load("triton"), "unsupported", lambda **call: "it says why")
    plain = {"device": torch.device("cpu"), "dtype": DTYPE, "head_dim": 64}
    assert resolve("cuda", **plain)[0] == "cuda"
    for name, value in change.items():
        setattr(native, name, value)
    with pytest.raises(ValueError, match=f"^backend: 'cuda' can't run this call: .*{reason}"):
        resolve("cuda", **plain | facts)


def test_without_the_extension_it_says_what_env_says(monkeypatch):
    record = ModuleType("_build_info")
    record.BUILT, record.REASON = False, "switched off by BITUNE_BUILD_CUDA=0"
    monkeypatch.setitem(sys.modules, "bitune_kernels._build_info", record)
    monkeypatch.setitem(sys.modules, "bitune_kernels._C", None)
    with pytest.raises(ValueError, match="the native extension can't be used: switched off by BITUNE_BUILD_CUDA=0"):
        resolve("cuda")


def test_it_is_not_the_choice_of_auto(native):
    # it has not run on a GPU
    assert resolve("auto", device=torch.device("cpu"), dtype=DTYPE, head_dim=64)[0] == "sdpa"


# The host's side of a launch, with a CUDA runtime of two devices that notes what it and the driver are asked.
RUNTIME = """
#include <cstdint>
#include <string>
int current;
std::string asked;
template <typename T>
void note(const T* values, int count) {
  for (int i = 0; i < count; ++i) asked += std::to_string(values[i]) + (i + 1 < count ? " " : ", ");
}
int encode(void*, int type, unsigned rank, void*, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
           const uint32_t* steps, int interleave, int swizzle, int, int fill) {
  asked = "";
  note(&type, 1), note(sizes, rank), note(strides, rank - 1), note(box, rank), note(steps, rank);
  int modes[] = {interleave, swizzle, fill};
  note(modes, 3);
  return sizes[1] == 0;
}
extern "C" {
int driver = 0;
int cudaGetDevice(int* device) { *device = current; return 0; }
int cudaSetDevice(int device) { asked += std::to_string(current = device); return 0; }
const char* notes() { return asked.c_str(); }
int cudaGetDriverEntryPoint(const char* symbol, void** found, unsigned long long, int* result) {
  if (!driver || symbol != std::string("cuTensorMapEncodeTiled")) return 999;
  *found = reinterpret_cast<void*>(encode);
  return *result = 0;
}
int cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned, unsigned long long, int* result) {
  return cudaGetDriverEntryPoint(symbol, found, 0, result);
}
int cudaDeviceGetAttribute() { return 0; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString() { return ""; }
const char* cudaGetErrorName() { return ""; }
char __cudaInitModule() { return 0; }
void** __cudaRegisterFatBinary() { return nullptr; }
void __cudaRegisterFatBinaryEnd() {}
void __cudaUnregisterFatBinary() {}
}
"""
LAUNCH = """
#include <launch.cu>
using namespace bitune;
extern std::string asked;
extern "C" void work_on(int device) { DeviceGuard guard(device); asked += '!'; }
extern "C" int map(bool bf16, int64_t rows, int heads, int dim, int64_t stride_row, int64_t stride_head, int box) {
  TensorMap map;
  Rows x{nullptr, stride_row, stride_head, rows};
  return map_rows(x, bf16 ? Element::bf16 : Element::fp16, heads, dim, box, &map).code;
}
"""


@pytest.fixture(scope="module")
def launch_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "runtime.cpp").write_text(RUNTIME)
    (folder / "test.cu").write_text(LAUNCH)
    # -Bsymbolic: not the runtime that a PyTorch for CUDA has loaded
    flags = "-std=c++17 -cudart none -shared -Xcompiler -fPIC -Xlinker -Bsymbolic -o launch.so".split()
    subprocess.run([NVCC, *flags, "-I", ROOT / "csrc", "runtime.cpp", "test.cu"], cwd=folder, check=True)
    return folder / "launch.so"


@pytest.fixture
def host(launch_library, tmp_path):
    """The library, loaded anew: it keeps what it has found of the driver."""
    library = ctypes.CDLL(str(shutil.copy(launch_library, tmp_path)))
    library.notes.restype = ctypes.c_char_p
    number, long = ctypes.c_int, ctypes.c_int64
    library.map.argtypes = ctypes.c_bool, long, number, number, long, long, number
    return library


@needs_nvcc
def test_a_new_thread_has_its_device_before_the_driver_is_asked(host):
    host.work_on(0)
    host.work_on(1)
    assert host.notes() == b"0!1!0"  # 0 too, though it is the current one
    assert host.map(True, 1000, 4, 128, 768, 128, 64) == -1  # the driver lacks the function


# What make_tma_copy of CuTe (CUTLASS 4.2) hands to cuTensorMapEncodeTiled for such rows, with its 128-byte swizzled
# K-major layouts: type, sizes, strides in bytes, box, steps, and interleave, swizzle, fill.
@needs_nvcc
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ((True, 1000, 4, 128, 768, 128, 128), "9, 128 1000 4, 1536 256, 64 128 1, 1 1 1, 0 3 0, "),
        ((False, 77, 2, 200, 512, 200, 64), "6, 200 77 2, 1024 400, 64 64 1, 1 1 1, 0 3 0, "),
        ((True, 1000, 4, 64, 64, 64000, 128), "9, 64 1000 4, 128 128000, 64 128 1, 1 1 1, 0 3 0, "),
        ((True, 9, 2, 64, 2**38, 64, 128), f"9, 64 9 2, {2**39} 128, 64 128 1, 1 1 1, 0 3 0, "),
    ],
    ids=str,
)
def test_tensor_maps_are_those_of_cute(host, rows, wanted):
    ctypes.c_int.in_dll(host, "driver").value = 1
    assert host.map(*rows) == 0
    assert host.notes().decode() == wanted
    assert host.map(True, 0, *rows[2:]) == 1  # what the driver refuses
