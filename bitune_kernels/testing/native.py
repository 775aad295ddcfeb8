"""What the compiler made of the CUDA kernels: registers, shared memory and instructions, read from the built extension.

    python -m bitune_kernels.testing.native

The tools that read binaries come with Triton. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .. import env
from .sass import overwritten

# By the architecture of the code: instructions that a kernel must have. GMMA and the tensor copies are Hopper's own.
REQUIRED = {"sm_80": ("HMMA", "LDSM", "LDGSTS"), "sm_90a": ("HGMMA", "UTMALDG", "USETMAXREG")}
SPILLS = ("LDL", "STL")
# Hopper's main loop, from where a tile's scores are there to the wait for the product that runs beside its softmax.
BESIDE_A_PRODUCT = re.compile(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """registers (sm_90a: at the launch, roles share them out anew) and bytes of stack and local memory per thread, how
    often each instruction stands in the code, exponentials beside a running product and what overwrites its registers
    (sm_90a), keys per tile, bytes of dynamic shared memory per block."""

    arch: str
    element: str
    head_dim: int
    prescaled: bool
    registers: int
    stack: int
    local: int
    instructions: dict[str, int]
    overlapped: int
    overwritten: tuple[str, ...]
    block_n: int
    shared: int

    def broken_rule(self) -> str | None:
        """What is wrong with this kernel, or None."""
        if self.stack or self.local or any(self.instructions[name] for name in SPILLS):
            return "spills registers"
        if self.overwritten:
            return f"overwrites registers of a running product: {self.overwritten[0]}"
        missing = [name for name in REQUIRED[self.arch] if not self.instructions[name]]
        if missing:
            return f"no {', '.join(missing)}"
        # A thread has a quarter of the keys in each of two rows, and rescales both. A cap takes one more per key.
        softmax = (1 + self.prescaled) * self.block_n // 2 + 2
        if self.arch == "sm_90a" and self.overlapped < softmax:
            return f"{self.overlapped} of {softmax} exponentials beside a product"
        return None

    def __str__(self) -> str:
        line = f"{self.arch:<7}{self.element} {self.head_dim:4}  {'scaled first' if self.prescaled else 'plain':13}"
        line += f"{self.registers:4} registers{self.shared:7} B shared{self.stack:4} B stack{self.local:4} B local  "
        line += "  ".join(f"{name} {count}" for name, count in self.instructions.items())
        line += f"  beside a product: EX2 {self.overlapped}" if self.overlapped else ""
        return f"{line}  {self.broken_rule() or ''}".rstrip()


def kernels(library: Path, forward_tile) -> list[Kernel]:
    """Every attention kernel of a library. ``forward_tile``: the extension's own, which knows the shared memory."""
    names = r"attend_sm\d+INS\w*?(?P<element>Bf16|Fp16)ELi(?P<dim>\d+)EEELb(?P<prescaled>[01])E"
    usages = {}
    for arch, text in _by_arch(library, "-res-usage"):
        for name, usage in re.findall(r"Function (\S+?):\s*\n(.*)", text):
            usages[arch, name] = [int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")]
    found = []
    for arch, text in _by_arch(library, "-sass"):
        for code in re.split(r"\n\s*Function : ", text)[1:]:
            name = code.partition("\n")[0].strip()
            if not (match := re.search(names, name)):
                continue
            opcodes = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?\w+ )?\s*([A-Z0-9]+)", code)
            counts = {x: opcodes.count(x) for x in (*REQUIRED[arch], *SPILLS)}
            dim = int(match["dim"])
            _, block_n, shared = forward_tile(int(re.sub(r"\D", "", arch)), dim, dim)
            prescaled = match["prescaled"] == "1"
            overlapped = min((x[1].count("MUFU.EX2") for x in BESIDE_A_PRODUCT.finditer(code)), default=0)
            code = (counts, overlapped, tuple(overwritten(code)))
            kernel = Kernel(arch, match["element"], dim, prescaled, *usages[arch, name], *code, block_n, shared)
            found.append(kernel)
    return sorted(found, key=lambda k: (k.arch, k.element, k.head_dim, k.prescaled))


def _by_arch(library: Path, option: str):
    # What cuobjdump prints of the machine code of each architecture that REQUIRED has.
    triton = find_spec("triton")
    if triton is None:
        raise RuntimeError("reading binaries needs cuobjdump, which comes with triton; it is not installed")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    printed = subprocess.run([tool, option, library], capture_output=True, text=True, check=True).stdout
    for part in printed.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", part)[1]
        if arch in REQUIRED:
            yield arch, part


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(argv)
    try:
        native = import_module("bitune_kernels._C")
    except ImportError:
        print(f"There is no native extension to read: {env.native_extension()['reason']}", file=sys.stderr)
        return 1
    found = kernels(Path(native.__file__), native.forward_tile)
    for kernel in found:
        print(kernel)
    return int(not found or any(k.broken_rule() for k in found))


if __name__ == "__main__":
    sys.exit(main())
