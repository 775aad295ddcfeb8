"""The emulator finds what it says it finds, and its matrix products are products."""

import ctypes

import pytest
import torch

from tests import emulator

DTYPES = [torch.bfloat16, torch.float16]
SEEDS = range(6)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    objects = emulator.compile_objects([*emulator.own_sources(), emulator.HERE / "test_kernels.cpp"], folder)
    library = ctypes.CDLL(str(emulator.link(objects, folder / "kernels.so")))
    for name in ("run", "run_box", "run_mma", "run_wgmma"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def with_seed(library, seed):
    library.emulator_set(90, 3, seed)
    return library


def run(library, kernel, variant, k=0, a=None, words=None):
    return library.run(kernel.encode(), variant, k, pointer(a), pointer(words)).decode()


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def halves(x):
    return x.view(torch.int16)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies(library, seed):
    with_seed(library, seed)
    a = torch.randint(-32000, 32000, (64, 8), dtype=torch.int16)
    swapped = a.view(2, 4, 8, 8).flip(0)  # warp, matrix, row
    seen = words(64, 4)

    def matrices():
        return halves(seen).view(2, 8, 4, 4, 2).permute(0, 3, 1, 2, 4).reshape(2, 4, 8, 8)

    assert run(library, "copies", 0, a=a, words=seen) == ""
    assert torch.equal(matrices(), swapped)
    assert run(library, "copies", 1, a=a, words=seen) == ""
    assert torch.all(seen == -1)  # not there before cp_async_wait
    assert "no sync_warp between" in run(library, "copies", 2, a=a, words=seen)
    assert "race: " in run(library, "copies", 3, a=a, words=seen)
    assert "cp_async it has not waited for" in run(library, "copies", 4, a=a, words=seen)
    assert run(library, "copies", 5, a=a, words=seen) == ""
    swapped[:, :, 1::2] = 0
    assert torch.equal(matrices(), swapped)


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        (0, ""),
        (1, "deadlock: nothing can go on\n  warp 0: barrier_sync 3 (32 of 64 threads came)\n  warp 1: ended"),
        (2, "but others came to it for"),
        (3, "barrier 16, not 1 to 15"),
        (4, " while other lanes of its warp wait at s"),
        (5, "no mbarrier was initialised"),
        (6, "without mbarrier_init_done"),
        (7, "initialised twice"),
        (8, "mbarrier_wait, parity 0, mbarrier"),
        (9, "arrives at a full phase"),
        (10, ""),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_barriers(library, variant, text, seed):
    told = run(with_seed(library, seed), "barriers", variant)
    assert told == "" if text == "" else text in told
    assert variant != 8 or "lacks 1 of 2 arrivals and 0 bytes" in told


def test_registers(library):
    assert run(library, "registers", 0) == ""
    assert "changed their registers" in run(library, "registers", 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_same_stores(library, seed):
    with_seed(library, seed)
    assert run(library, "same_stores", 0) == ""
    assert "race: " in run(library, "same_stores", 1)
    assert "without fence_async" in run(library, "same_stores", 2)


def run_box(library, variant, a, x, y, z, seen, in_ring=False):
    rows, heads, dim = a.shape
    return library.run_box(variant, in_ring, pointer(a), rows, heads, dim, a.stride(0), x, y, z, pointer(seen)).decode()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("x", "y", "z"), [(0, 0, 0), (64, 3, 1), (-8, -5, 0), (3, 30, 1), (0, 0, 2), (0, 100, 0)])
def test_box(library, x, y, z, seed):
    with_seed(library, seed)
    a = torch.randint(-32000, 32000, (40, 2, 80), dtype=torch.int16)
    seen = words(32, 32)
    assert run_box(library, 0, a, x, y, z, seen) == ""
    padded = torch.zeros(300, 4, 300, dtype=torch.int16)
    padded[100:140, 1:3, 100:180] = a
    assert torch.equal(halves(seen), padded[100 + y : 132 + y, 1 + z, 100 + x : 164 + x])


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_boxes(library, seed):
    with_seed(library, seed)
    a = torch.randint(-32000, 32000, (40, 2, 80), dtype=torch.int16)
    seen = words(32, 32)
    assert "without fence_async" in run_box(library, 1, a, 0, 0, 0, seen)
    assert "race: " in run_box(library, 2, a, 0, 0, 0, seen)
    assert "0 of 1 arrivals and 16 bytes" in run_box(library, 3, a, 0, 0, 0, seen)
    assert "no multiple of 128" in run_box(library, 4, a, 0, 0, 0, seen)
    assert "no multiple of 16" in run_box(library, 0, a.view(-1)[4:-156].view(-1, 2, 80), 0, 0, 0, seen)
    assert "stride of" in run_box(library, 0, torch.zeros(4, 1, 84, dtype=torch.int16), 0, 0, 0, seen)


@pytest.mark.parametrize("seed", range(20))
def test_ring(library, seed):
    with_seed(library, seed)
    a = torch.randint(-32000, 32000, (44, 1, 64), dtype=torch.int16)
    seen = words(12, 4, 8, 4, 4)  # step, warp, row of matrix, pair, matrix
    assert run_box(library, 0, a, 0, 0, 0, seen, in_ring=True) == ""
    got = halves(seen).view(12, 4, 8, 4, 4, 2).permute(0, 4, 2, 1, 3, 5).reshape(12, 32, 32)
    assert torch.equal(got, torch.stack([a[i : i + 32, 0, :32] for i in range(12)]))
    assert run_box(library, 1, a, 0, 0, 0, seen, in_ring=True) != ""
    assert run_box(library, 2, a, 0, 0, 0, seen, in_ring=True) != ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [0, 1])
def test_mma(library, dtype, variant):
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.zeros(16, 16)
    told = library.run_mma(dtype == torch.bfloat16, variant, 0, pointer(a), pointer(b), pointer(out))
    assert told == b""
    b = b.T if variant == 0 else b
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def run_wgmma(library, a, b, out, rs, variant=0):
    bf16 = a.dtype == torch.bfloat16
    n = out.shape[1]
    return library.run_wgmma(bf16, rs, variant, 0, n, a.shape[1], pointer(a), pointer(b), pointer(out)).decode()


def operands(dtype, n, k=128, rs=False):
    a, b = torch.randn(64, k).to(dtype), torch.randn(n, k).to(dtype)
    return a, b.T.contiguous() if rs else b, torch.zeros(64, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("variant", [0, 9])
def test_wgmma(library, dtype, rs, n, variant):
    a, b, out = operands(dtype, n, rs=rs)
    assert run_wgmma(library, a, b, out, rs, variant) == ""
    expected = 1 + a.float() @ (b.float() if rs else b.float().T)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize(
    ("variant", "text"),
    [
        (1, "without fence_async"),
        (2, "shared memory of a running wgmma was changed"),
        (4, "a wgmma that was not committed"),
        (5, "wgmma it has not waited for"),
        (6, ""),
        (7, "without wgmma_fence"),
        (8, "registers of a running wgmma were written"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_wgmma(library, variant, text, rs, seed):
    a, b, out = operands(torch.bfloat16, 64, rs=rs)
    told = run_wgmma(with_seed(library, seed), a, b, out, rs, variant)
    assert told and text in told


def test_wgmma_whose_left_operand_is_written(library):
    a, b, out = operands(torch.bfloat16, 64, rs=True)
    assert "registers of a running wgmma were written, operand a" in run_wgmma(library, a, b, out, True, 10)


@pytest.mark.parametrize("rs", [False, True])
def test_wgmma_before_wait(library, rs):
    a, b, out = operands(torch.bfloat16, 64, rs=rs)
    assert run_wgmma(library, a, b, out, rs, 3) == ""
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(library, dtype):
    patterns = torch.arange(0, 1 << 32, 40503).to(torch.int64)
    special = torch.tensor([0.0, 65519.0, 65520.0, 1e30, 3.4e38, 2**-24, 2**-25, 3 * 2**-25, 2**-14, 1e-40, torch.inf])
    ties = (torch.arange(1 << 12) * (1 << 20) + (1 << 12)).to(torch.int32).view(torch.float32)
    x = torch.cat([((patterns + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.float32), special, ties])
    pairs, back = torch.zeros(len(x), dtype=torch.int32), torch.zeros(len(x))
    library.round_pairs(dtype == torch.bfloat16, len(x), pointer(x), pointer(pairs), pointer(back))
    low = pairs.view(dtype)[::2]
    assert torch.equal(low.nan_to_num(nan=7.0), x.to(dtype).nan_to_num(nan=7.0))
    assert torch.equal(pairs.view(dtype)[1::2].nan_to_num(nan=7.0), (-x).to(dtype).nan_to_num(nan=7.0))
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(back.nan_to_num(nan=7.0), low.float().nan_to_num(nan=7.0))
