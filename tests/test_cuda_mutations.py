"""Whether the tests would see a fault: CUDA kernels that were broken on purpose must fail, each in one small case.

A fault replaces one piece of the source in a copy of csrc/, of which the kernels of one head dim and type are built.
Numbers are off, or the emulator says what is wrong: a race, a missing fence, a hang.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from bitune_kernels import backends, bitune_attention, bitune_prefill
from bitune_kernels.testing import Case, assert_backend_within_budget, assert_prefilled, native
from tests import emulator
from tests.test_cuda_kernels import emulated_library, needs_interpreter, use
from tests.test_packaging import NVCC, needs_nvcc

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")

PLAIN = Case(prompts=(9, 40), answers=(18, 3), heads=(4, 2), head_dim=80, alpha="head")
LONG = Case(prompts=(300,), answers=(150,), heads=(1, 1), head_dim=96)
SHARED = Case(prompts=(150,), answers=(3,), heads=(1, 1), num_streams=1, shared_qkv=True)
BETA = Case(prompts=(9,), answers=(3,), heads=(2, 1), beta="head")
WINDOW = Case(prompts=(300,), answers=(5,), heads=(1, 1), window=70)
SINKS = Case(prompts=(9,), answers=(3,), heads=(2, 1), sinks=True)


def forward(case):
    assert_backend_within_budget("cuda", case, torch.bfloat16, backward=False)


def lse(case):
    needs_interpreter()
    *_, expected = saved(case, torch.float32, "triton")
    *_, actual = saved(case, torch.bfloat16, "cuda")
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


def saved(case, dtype, backend):
    (q, k, v, *others), options = case.call(torch.bfloat16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return backends.load(backend).forward(q, k, v, *others, options, save=True)


def cache(case):
    call = case.make_prefill(torch.bfloat16)
    bitune_prefill(**call, backend="cuda")
    _, *mixed = bitune_attention(**case.make(torch.bfloat16), backend="reference")
    assert_prefilled(call, mixed, rtol=2**-7)


def neighbour(case):
    inputs = case.make(torch.bfloat16)
    inputs["v"][case.prompts[0] : sum(case.prompts)] = torch.nan
    out, *_ = bitune_attention(**inputs, backend="cuda")
    assert not bool(out[: case.prompts[0]].isnan().any()), "values are off: nan"


SM90, SM80, TILE, SCHEDULE, LAYOUT = "attention_sm90.cu", "attention_sm80.cu", "tile.cuh", "schedule.h", "layout.h"
WAIT = "ptx::mbarrier_wait"
OFF = "values are off|not close"
EARLY = "race|nan|values are off|not there|changed|written|waited for"


def fault(name, file, old, new, case, error=OFF, check=forward, capability=None):
    """``old`` becomes ``new``, the only time that it stands in the file."""
    return pytest.param(file, old, new, case, error, check, capability or (80 if file == SM80 else 90), id=name)


FAULTS = [
    # who sees whom
    fault("causal: a later key is seen", SCHEDULE, "mask == causal ? i + 1", "mask == causal ? i + 2", PLAIN),
    fault("window: one earlier", SCHEDULE, "i - window + 1", "i - window", WINDOW),
    fault("the diagonal twice", SCHEDULE, "mask == after ? i + 1", "mask == after ? i", SHARED),
    fault("masked tiles without a mask", SM90, "first >= r.span.rest)", "false)", LONG),
    fault("one key too many", TILE, "i % 2 >= high", "i % 2 > high", PLAIN, capability=80),
    fault("a window that one row alone needs", TILE, "bounds[1].low <=", "bounds[0].low <=", WINDOW),
    fault("heads of a group", TILE, "q.head[r] = head * a.group_size + packed", "q.head[r] = packed", PLAIN),
    # softmax
    fault("no rescale", TILE, "x[i] *= factor[i / 2 % 2];", ";", LONG),
    fault("l is not rescaled", TILE, "l[r] = l[r] * rescale[r] + sum", "l[r] = l[r] + sum", LONG),
    fault("sinks count four times", TILE, "a.sinks && threadIdx.x % 4 == 0 ? 1", "a.sinks ? 1", SINKS),
    fault("lse is not in log2", TILE, "ptx::log2(l)", "ptx::log2(l) / kLog2e", LONG, check=lse),
    # the mix
    fault("alpha is exchanged", SM90, "causal_first == (i == 0)", "causal_first == (i == 1)", PLAIN),
    fault("alpha_k for values", SM90, "Mix mix_v(a, mixed, a.alpha_v", "Mix mix_v(a, mixed, a.alpha_k", PLAIN),
    fault("alpha of the first head", TILE, "x.data[head * x.stride]", "x.data[0]", PLAIN, capability=80),
    fault("the cache: alpha is exchanged", TILE, "(1 - alpha) * x.x + alpha * y.x", "alpha * x.x", PLAIN, check=cache),
    fault("the cache: a token is left out", SCHEDULE, "start = ceil_div(", "start = 1 + ceil_div(", PLAIN, check=cache),
    fault("beta is exchanged", TILE, "(1 - beta) * first.x + beta", "beta * first.x + (1 - beta)", BETA),
    # memory
    fault("the swizzle of another row", LAYOUT, "(row % 8)) * 16", "(row % 4)) * 16", PLAIN),
    fault("a k-step of 32 columns", SM90, "d % 4 * 32", "d % 4 * 64", PLAIN, EARLY),
    fault("the next tile of columns", SM90, "S::kBlockN * 128);", "S::kBlockN * 64);", PLAIN),
    fault("the next sample's values", SM90, "first + j < r.length ? ", "true ? ", PLAIN, check=neighbour),
    fault("rows half a chunk off", TILE, "from + column)", "from + column + 4)", PLAIN, "no multiple of 16", cache),
    # who waits for whom
    fault(
        "keys are not waited for",
        SM90,
        f"{WAIT}(memory.k_full(ring.stage()), ring.full());\n      await_turn();",
        "await_turn();",
        LONG,
        EARLY,
    ),
    fault("values are not waited for", SM90, f"{WAIT}(memory.v_full(before.stage()), before.full());", "", LONG, EARLY),
    fault(
        "values are released too early",
        SM90,
        "ptx::wgmma_wait<0>();\n      ptx::wgmma_hold(acc);\n      arrive(memory.v_empty(before.stage()));",
        "arrive(memory.v_empty(before.stage()));\n      ptx::wgmma_wait<0>();",
        LONG,
        EARLY,
    ),
    fault(
        "weights are packed into registers that a product reads",
        SM90,
        "ptx::wgmma_wait<0>();\n      ptx::wgmma_hold(acc);\n      arrive(memory.v_empty(before.stage()));",
        "pack_rows<typename S::Element>(s, p);\n      ptx::wgmma_wait<0>();\n      ptx::wgmma_hold(acc);\n"
        "      arrive(memory.v_empty(before.stage()));",
        LONG,
        "registers of a running wgmma",
    ),
    fault("the wrong parity", SM90, "full() ^ 1;", "full();", PLAIN, "deadlock|phases"),
    fault("nobody begins", SM90, "if (index == 1) pass_turn();", "", LONG, "deadlock"),
    fault("stores without a fence", SM90, "  ptx::fence_async();\n", "", PLAIN, "fence"),
    fault("copies are not waited for", SM90, "  ptx::cp_async_wait<0>();\n", "", PLAIN, EARLY),
    fault("keys are overwritten", SM80, "ptx::sync_block();  // these values", "// these values", LONG, "race"),
    fault("values are overwritten", SM80, "ptx::sync_block();  // these keys", "// these keys", LONG, "race"),
]  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What no fault changes: of the whole emulated extension."""
    return [x for x in emulated_library(tmp_path_factory).parent.glob("*.o") if not x.name.startswith("attention_sm")]


def keep_one_shape(csrc):
    """Of the kernels: bfloat16 with a head dim of 128."""
    kernels = csrc / "kernels.h"
    text, shapes = re.subn(r" *if \(dim <= (64|96|256)\).*\n", "", kernels.read_text())
    text, types = re.subn(
        r"a\.element == Element::bf16 \? of_type\(Bf16\{\}\) : of_type\(Fp16\{\}\)", "of_type(Bf16{})", text
    )
    assert (shapes, types) == (3, 1)
    kernels.write_text(text)


@pytest.mark.parametrize("file, old, new, case, error, check, capability", FAULTS)
def test_fault_is_found(file, old, new, case, error, check, capability, objects, tmp_path, monkeypatch):
    csrc = shutil.copytree(emulator.CSRC, tmp_path / "csrc")
    path = csrc / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
    keep_one_shape(csrc)
    built = emulator.compile_objects(csrc.glob("attention_sm*.cu"), tmp_path / "objects", csrc=csrc)
    use(emulator.link([*objects, *built], tmp_path / "_C.so"), monkeypatch)(capability)
    with pytest.raises((AssertionError, RuntimeError), match=error):
        check(case)


def test_roles_get_no_more_registers_than_a_block_has(tmp_path):
    """On a GPU the consumers would wait for them forever, and neither the compiler nor the emulator says a word."""
    csrc = shutil.copytree(emulator.CSRC, tmp_path / "csrc")
    keep_one_shape(csrc)
    path = csrc / SM90
    path.write_text(path.read_text().replace("kComputeRegisters = 216", "kComputeRegisters = 224"))
    with pytest.raises(RuntimeError, match="static assertion failed: more than a block has"):
        emulator.compile_objects([path], tmp_path / "objects", csrc=csrc)


@needs_nvcc
def test_a_softmax_after_its_product_is_found(tmp_path):
    """Only the machine code shows it: without the branch the compiler waits for the values before the softmax."""
    pytest.importorskip("triton", reason="cuobjdump comes with triton")
    csrc = shutil.copytree(emulator.CSRC, tmp_path / "csrc")
    keep_one_shape(csrc)
    path = csrc / SM90
    branch = r" +if \(first \+ S::kBlockN < r\.span\.stop\) \{(.|\n)*?\n      \}\n"
    text, branches = re.subn(branch, "", path.read_text())
    assert branches == 1
    path.write_text(text)
    target = tmp_path / "kernels.o"
    command = [NVCC, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-I", csrc, "-c", path, "-o", target]
    subprocess.run(command, check=True)
    rules = [kernel.broken_rule() for kernel in native.kernels(target, lambda *_: (128, 128, 0))]
    assert rules == ["0 of 66 exponentials beside a product", "64 of 130 exponentials beside a product"]


@needs_nvcc
def test_a_debug_build_keeps_its_products_running(tmp_path):
    """What the tools that look for races run is the kernel that users have: waits that end cost it no registers."""
    csrc = shutil.copytree(emulator.CSRC, tmp_path / "csrc")
    keep_one_shape(csrc)
    flags = "-std=c++17 -O3 -DBITUNE_DEBUG -gencode=arch=compute_90a,code=sm_90a -Xptxas=-v,--warn-on-spills".split()
    command = [NVCC, *flags, "-I", csrc, "-c", csrc / SM90, "-o", tmp_path / "kernels.o"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "registers" in said and "C75" not in said and "warning" not in said, said


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [PLAIN, LONG, SHARED, BETA, WINDOW, SINKS], ids=lambda case: case.id)
def test_no_fault_no_error(case, capability, tmp_path_factory, monkeypatch):
    use(emulated_library(tmp_path_factory), monkeypatch)(capability)
    forward(case)
    if case in (PLAIN, LONG):
        for check in (lse, cache) if case is LONG else (cache, neighbour):
            check(case)
