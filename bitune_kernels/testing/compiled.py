"""What the compiler makes of the Triton kernels, for GPUs that need not be here.

The package's own launch code runs on CPU tensors while a stand-in for Triton's driver names a GPU, keeps what was
compiled and launches nothing. Registers, spills and instructions are read from the binaries with the tools that come
with Triton.

    python -m bitune_kernels.testing.compiled --arch 90
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.runtime import driver

from ..backends.triton import attention_backward, attention_forward, tiles
from ..backends.triton.tiles import Tile
from .cases import Case
from .sass import overwritten

ARCHS = (80, 89, 90, 100)

# What is accepted of single kernels, by architecture, kernel and head dim. Everything else keeps all in registers and
# computes each product of a whole tile once.
#
# Bytes of stack per thread, the most of Triton 3.6, 3.7 and 3.9: accumulators and addresses leave so few registers
# that, from one option and one version to the next, a few numbers end there. Beside each: with 3.7.
STACK = {
    (80, "dq_two_parts", 64): 24,  # 0, as with 3.9
    (80, "dkv", 64): 8,  # likewise
    (89, "dq_two_parts", 64): 8,  # likewise
    (89, "dkv", 64): 8,  # likewise
    (90, "dkv", 64): 8,  # likewise
    (90, "forward_two_parts", 128): 8,  # 0; heads that aren't grouped
    (90, "dkv", 128): 16,  # 8; likewise
    (90, "dq", 256): 24,  # 16
    (90, "dq_two_parts", 256): 96,  # 0
    (90, "dkv", 256): 192,  # 80 with softcap, else up to 8
    (100, "dq", 64): 8,  # 0, as with 3.9
    (100, "forward_two_parts", 128): 80,  # 0
}
FLOAT32_STACK = {(89, "dq", 256): 296}
# Work: Hopper's instruction takes 64 rows from four warps, so with eight each score of a tile of 64 rows is computed
# twice. The registers have no room for 128 rows of two accumulators, or of two parts.
WORK = {(90, "forward_two_parts", 256): 3 / 2, (90, "dq_two_parts", 256): 5 / 3, (90, "dkv", 256): 3 / 2}

# Of a tile of query rows and one of keys.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}

# Options of a call that make other kernels; heads are grouped by four where nothing else is said.
VARIANTS = {
    "two": {},  # streams
    "one": {"num_streams": 1},
    "shared": {"num_streams": 1, "shared_qkv": True, "beta": "head"},  # the streams share q, k and v
    "beta": {"beta": "head", "heads": (4, 4)},
    "prefill": {},  # two streams, into a cache
    "softcap": {"softcap": 2.0, "window": 40, "heads": (8, 4)},
}
TWO_PARTS = {"forward": ("shared", "beta"), "dq": ("shared",), "dkv": ()}
LENGTHS = {"prompts": (16, 16), "answers": (16, 16)}


@dataclass(frozen=True)
class Binary:
    """One compiled kernel. Registers per thread; bytes of shared memory per block, of stack and local per thread."""

    kernel: str
    shared: int
    registers: int
    stack: int
    local: int
    spills: int  # loads and stores of local memory
    wgmma: int  # instructions of Hopper's matrix unit, HGMMA
    mma: int  # of other matrix units: HMMA, and Blackwell's UTC*MMA
    loops: tuple[int, ...]  # multiply-adds of HGMMA and HMMA per warp and turn, of each innermost loop that has any
    overwritten: tuple[str, ...]  # see ``sass.overwritten``


@dataclass(frozen=True)
class Row:
    """A kernel of the table as it was compiled for an architecture, or why it wasn't."""

    arch: int
    variant: str
    head_dim: int
    dtype: torch.dtype
    kernel: str
    tile: Tile
    binary: Binary | None
    error: str = ""

    def work(self) -> tuple[float, float]:
        """Multiply-adds that a loop issues over those that its tiles need, the most of any loop: over whole tiles of
        keys, and over the mixed prompt's half ones. 1.0, or more where warps repeat what others compute; 0.0 where
        the instructions don't show it (float32, Blackwell's UTC*MMA) or there is no such loop."""
        t, products = self.tile, PRODUCTS[self.kernel.removesuffix("_two_parts")]
        per_key = products * t.block_m * tiles.block_dim(self.head_dim) / t.num_warps
        whole, half = t.block_n * per_key, t.block_n_mixed(True) * per_key
        return (
            max((n / whole for n in self.binary.loops if n >= whole), default=0.0),
            max((n / half for n in self.binary.loops if n < whole), default=0.0),
        )

    def broken_rule(self) -> str | None:
        """What is wrong with this kernel, or None."""
        b = self.binary
        if b is None:
            return self.error
        if b.shared > tiles.SHARED_MEMORY[self.arch]:
            return f"{b.shared} bytes of shared memory, the part has {tiles.SHARED_MEMORY[self.arch]}"
        if b.overwritten:
            return f"overwrites registers of a running product: {b.overwritten[0]}"
        place = (self.arch, self.kernel, self.head_dim)
        accepted = (STACK if self.dtype.itemsize == 2 else FLOAT32_STACK).get(place, 0)
        if b.stack > accepted or b.local or (b.spills and not accepted):
            return "spills registers"
        if self.dtype.itemsize == 2 and not (b.wgmma if self.arch == 90 else b.mma or b.wgmma):
            return "no matrix instructions"
        if self.work()[0] > WORK.get(place, 1):
            return "computes products twice"
        return None

    def __str__(self) -> str:
        t, b, dtype = self.tile, self.binary, str(self.dtype).removeprefix("torch.")
        line = f"sm_{self.arch:<4}{self.variant:7}{self.head_dim:4} {dtype:9}{self.kernel:18}"
        line += f"{t.block_m:4} x {t.block_n:<4}warps {t.num_warps}  stages {t.num_stages}"
        if b is not None:
            line += f"{b.registers:5} registers{b.shared:7} B shared{b.stack:4} B stack{b.spills:4} spills"
            line += f"{b.wgmma:4} wgmma{b.mma:4} mma"
            line += "  work {:.2f}, mixed {:.2f}".format(*self.work())
        return f"{line}  {self.broken_rule() or ''}".rstrip()


class Driver:
    """In the place of Triton's CUDA driver. The current device is the number of the architecture."""

    def __init__(self, arch: int):
        # As device number: Triton keeps compiled kernels and limits per device.
        self.arch, self.utils, self.binaries = arch, self, []

    def launcher_cls(self, source, metadata):
        return lambda *args, **kwargs: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_device_properties(self, device) -> dict[str, int]:
        return {"max_shared_mem": tiles.SHARED_MEMORY[self.arch]}

    def load_binary(self, name, cubin: bytes, shared: int, device):
        self.binaries.append((name.removesuffix("_kernel"), cubin, shared))
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads per block at most

    def unload_module(self, module) -> None:
        pass


@contextmanager
def compiling_for(arch: int) -> Iterator[Driver]:
    """Kernels launched in this block are compiled for this GPU and kept in ``.binaries``: (name, cubin, shared)."""
    if tiles.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled")
    before, stand_in = driver._active, Driver(arch)
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        for kernel in (attention_forward.forward_kernel, attention_backward.dq_kernel, attention_backward.dkv_kernel):
            kernel.device_caches.pop(arch, None)  # the next block shall see these kernels again
        driver.set_active(before)


def inspect(name: str, cubin: bytes, shared: int) -> Binary:
    """What a binary uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command):
            command = (Path(nvidia).parent / "bin" / command[0], *command[1:], file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    counts = (
        len(re.findall(pattern, code)) for pattern in (r"\b(?:STL|LDL)\b", r"\bHGMMA\b", r"\b(?:HMMA|UTC\w*MMA)\b")
    )
    return Binary(name, shared, registers, stack, local, *counts, loops(code), tuple(overwritten(code)))


def loops(code: str) -> tuple[int, ...]:
    """``Binary.loops`` of what nvdisasm prints."""
    labels, branches, done = {}, [], [0]  # multiply-adds before each instruction
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(done) - 1
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if (branch := re.search(r"\bBRA\b.*?(\.L_\w+)", instruction[1])) and branch[1] in labels:  # backwards
                branches.append((labels[branch[1]], len(done)))
            done.append(done[-1] + _multiply_adds(instruction[1]))
    inner = [a for a in branches if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in branches)]
    return tuple(n for first, end in inner if (n := done[end] - done[first]))


def _multiply_adds(instruction: str) -> int:
    # Of one warp, of the four that HGMMA takes.
    if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    shape = re.search(r"\bHMMA\.168(8|16)\b", instruction)
    return 16 * 8 * int(shape[1]) if shape else 0


def call(
    case: Case, dtype: torch.dtype, tile: Tile, dq: Tile | None = None, dkv: Tile | None = None, prefill: bool = False
) -> None:
    """Launch the forward kernel and, given their tiles, those of the backward, on CPU tensors."""
    (*tensors, plan), options = case.call(dtype)
    run = partial(attention_forward.forward, *tensors, plan, options, tile=tile)
    if prefill:
        (_, k, v, _, _), rows = tensors, plan.num_prompt + plan.num_answer
        run(save=False, k_cache=k[:rows].clone(), v_cache=v[:rows].clone(), cache_positions=torch.arange(rows))
        return
    out, k_mixed, v_mixed, streams, lse = run(save=True)
    if dq is not None:
        given = map(torch.empty_like, (out, k_mixed, v_mixed))
        others = (options.beta, options.sinks, *(options.prefix or (None, None)), out, streams, lse, plan)
        tiles_of = {"tile_q": dq, "tile_kv": dkv}
        attention_backward.backward(*given, *tensors, *others, **options.without_tensors(), **tiles_of)


def compile_rows(
    arch: int,
    variant: str,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = True,
    chosen: dict[str, Tile] | None = None,
    **changes,
) -> list[Row]:
    """One row per kernel, with the tiles of the table unless others are ``chosen``. ``changes``: fields of the case."""
    binaries = ("forward", "dq", "dkv") if backward else ("forward",)
    kernels = [f"{b}_two_parts" if variant in TWO_PARTS[b] else b for b in binaries]
    used = {k: tiles.entry(k, tiles.bucket(head_dim), dtype.itemsize, arch, tiles.SHARED_MEMORY[arch]) for k in kernels}
    used |= chosen or {}
    case = Case(**LENGTHS | {"heads": (8, 2), "head_dim": head_dim} | VARIANTS[variant] | changes)
    error = "not compiled"
    with compiling_for(arch) as compiled:
        try:
            call(case, dtype, *used.values(), prefill=variant == "prefill")
        except Exception as e:  # the compiler's, or OutOfResources
            error = f"{type(e).__name__}: {e}".partition("\n")[0]
    found = {name: inspect(name, cubin, shared) for name, cubin, shared in compiled.binaries if name in binaries}
    return [
        Row(arch, variant, head_dim, dtype, k, used[k], found.get(b), error)
        for b, k in zip(binaries, kernels, strict=True)
    ]


def table_rows(arch: int, head_dims: Sequence[int] = tiles.HEAD_DIMS) -> Iterator[Row]:
    """Every entry of the table for two-byte elements, on two parts also with Gemma 2's head dim, softcap and window,
    and on Hopper every variant; for float32, where memory is tightest."""
    for head_dim in head_dims:
        yield from compile_rows(arch, "two", head_dim, torch.bfloat16)
        yield from compile_rows(arch, "shared", head_dim, torch.bfloat16)
        if head_dim == 256 and arch in (80, 90):
            yield from compile_rows(arch, "softcap", head_dim, torch.bfloat16)
        if arch == 90:
            yield from compile_rows(arch, "one", head_dim, torch.bfloat16, backward=False)  # its dkv is that of shared
            yield from compile_rows(arch, "prefill", head_dim, torch.bfloat16, backward=False)
            yield from compile_rows(arch, "beta", head_dim, torch.bfloat16)
        if arch == 89:
            yield from compile_rows(arch, "two", head_dim, torch.float32)
            yield from compile_rows(arch, "shared", head_dim, torch.float32)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = sorted(tiles.SHARED_MEMORY)
    p.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=known,
        default=ARCHS,
        help="default: 80 89 90 100",
    )
    p.add_argument(
        "--head-dims", type=int, nargs="+", choices=tiles.HEAD_DIMS, default=tiles.HEAD_DIMS, help="default: all"
    )
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    broken = 0
    for arch in args.arch:
        for row in table_rows(arch, args.head_dims):
            print(row, flush=True)
            broken += row.broken_rule() is not None
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
