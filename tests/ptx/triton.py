"""Triton's kernels, compiled for a GPU that need not be here and run on the machine, on CPU tensors.

python -m tests.ptx.triton machine.so 90
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from bitune_kernels.backends.triton import attention_backward, attention_forward, mixing, tiles
from bitune_kernels.ops import mix_kv
from bitune_kernels.testing import Case, assert_backend_within_budget, compiled

from . import ANY_REGISTERS, APPROXIMATE, PROXY_OF_COPIES, Kernel, Mistake, extent, load

JITTED = (
    attention_forward.forward_kernel,
    attention_backward.dq_kernel,
    attention_backward.dkv_kernel,
    mixing.mix_kernel,
    mixing.mix_backward_kernel,
)


FLAGS = ANY_REGISTERS | APPROXIMATE
if triton.__version__ >= "3.7":  # before, Triton put no fence between cp.async and wgmma
    FLAGS |= PROXY_OF_COPIES


class Launcher:
    def __init__(self, source, metadata):
        self.signature, self.metadata = source.signature.values(), metadata

    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *args):
        values, ranges = [], []

        def take(kinds, args):
            for kind, value in zip(kinds, args, strict=True):
                if isinstance(kind, tuple):
                    take(kind, value)
                elif kind.startswith("*"):
                    values.append(value.data_ptr())
                    ranges.append(extent(value))
                elif kind != "constexpr":
                    values.append(value)

        take(self.signature, args)
        kernel = driver.active.kernels[function]
        threads, shared = 32 * self.metadata.num_warps, self.metadata.shared
        kernel.run((x, y, z), threads, shared, kernel.pack([*values, 0, 0]), ranges, driver.active.flags)


class Driver(compiled.Driver):
    launcher_cls = Launcher

    def __init__(self, arch, library, flags, edit):
        super().__init__(arch)
        self.library, self.flags, self.edit = library, flags, edit
        self.kernels, self.loading = [], None

    def load_binary(self, name, cubin, shared, device):
        text = self.loading.asm["ptx"]
        self.kernels.append(Kernel(self.library, self.edit(name, text) if self.edit else text))
        return 1, len(self.kernels) - 1, 0, 0, 1024  # module, function, registers, spills, threads per block at most


@contextmanager
def running(
    arch: int,
    library,
    flags: int = FLAGS,
    edit: Callable[[str, str], str] | None = None,
):
    """Kernels launched in this block are compiled for this GPU and run here. ``edit(name, ptx)`` changes them first."""
    before, stand_in = driver._active, Driver(arch, library, flags, edit)
    init, of_device, unsupported = CompiledKernel._init_handles, tiles._of_device, tiles.unsupported
    make_cubin = CUDABackend.make_cubin

    def load_kernel(kernel):
        stand_in.loading = kernel
        return init(kernel)

    def of_table(kernel, head_dim, element_size, device):
        return tiles.entry(kernel, tiles.bucket(head_dim), element_size, arch, tiles.SHARED_MEMORY[arch])

    CompiledKernel._init_handles, tiles._of_device, tiles.unsupported = load_kernel, of_table, lambda *args: None
    CUDABackend.make_cubin = lambda *args: b"not needed"
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        for kernel in JITTED:
            kernel.device_caches.pop(arch, None)
        driver.set_active(before)
        CompiledKernel._init_handles, tiles._of_device, tiles.unsupported = init, of_device, unsupported
        CUDABackend.make_cubin = make_cubin


CASES = (
    Case(prompts=(300, 30), answers=(150, 5), heads=(2, 1), head_dim=64, window=100, softcap=3.0),
    Case(prompts=(150, 30), answers=(70, 5), heads=(2, 1), head_dim=128, num_streams=1, shared_qkv=True, beta="head"),
)

# What must be noticed, in each place at once: kernel, text, its replacement.
FAULTS = {
    "copies that nobody waits for": ("forward", r"(cp\.async\.wait_group\s+)\d", r"\g<1>7"),
    "warps that don't meet": ("dq", r"bar\.sync\s+0;", ""),
    "loads without their mask": ("dkv", r"@%p\d+ (ld\.global)", r"\1"),
    "stores without their mask": ("dkv", r"@%p\d+ (st\.global)", r"\1"),
}
FAULTS_90 = {
    "products that nobody waits for": ("forward", r"(wgmma\.wait_group\S*\s+)0", r"\g<1>1"),
    "stores that products may not see": ("forward", r"fence\.proxy\.async\S*;", ""),
}


def main(machine, arch):
    library, arch = load(machine), int(arch)
    torch.set_num_threads(1)
    for case in CASES:
        with running(arch, library):
            assert_backend_within_budget("triton", case, torch.bfloat16)
        print(f"right: {case.id}")
    causal, bidir = torch.randn(2, 70, 2, 80, dtype=torch.bfloat16)
    with running(arch, library):
        found = mix_kv(causal, bidir, torch.tensor([0.25, 0.75]), backend="triton")
    torch.testing.assert_close(found, mix_kv(causal, bidir, torch.tensor([0.25, 0.75]), backend="reference"))
    print("right: mix_kv")
    for what, (name, old, new) in (FAULTS | (FAULTS_90 if arch == 90 else {})).items():

        def edit(kernel, text, wanted=f"{name}_kernel", old=old, new=new):
            return re.sub(old, new, text) if kernel == wanted else text

        try:
            with running(arch, library, edit=edit):
                assert_backend_within_budget("triton", CASES[0], torch.bfloat16)
        except Mistake as e:
            print(f"noticed: {what}: {e}")
        else:
            print(f"not noticed: {what}")


if __name__ == "__main__":
    main(*sys.argv[1:])
