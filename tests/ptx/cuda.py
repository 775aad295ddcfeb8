"""What nvcc makes of the CUDA kernels, run on the machine. Their host code is that of the emulated build."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache

from bitune_kernels.backends import cuda, schedule
from tests import emulator

from . import APPROXIMATE, FENCE_OF_WRITER, Kernel, entries, extent

INSTANCE = r"attend_sm(\d+)INS\w*?(Bf16|Fp16)ELi(\d+)EEELb([01])E"


def compile_ptx(folder, capability):
    target = folder / f"sm{capability}.ptx"
    arch = f"sm_{capability}{'a' * (capability == 90)}"
    source = emulator.CSRC / f"attention_sm{capability}.cu"
    subprocess.run(
        ["nvcc", "-std=c++17", "-I", emulator.CSRC, "-ptx", f"-arch={arch}", source, "-o", target], check=True
    )
    return target.read_text()


class Native:
    """The emulated extension, whose launches run PTX. ``launched``: capability, element, head dim, scaled first."""

    def __init__(self, machine, library, texts, flags=FENCE_OF_WRITER | APPROXIMATE):
        self.extension, self.flags = emulator.load(library), flags
        self.launched, self.ranges, self.lse = [], [], None
        self.kernel = cache(lambda instance: Kernel(machine, *self.places[instance]))
        symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
        instances = re.findall(rf"^(\w+) t \S*{INSTANCE}\S*$", symbols, re.MULTILINE)
        self.instances = {int(offset, 16): tuple(instance) for offset, *instance in instances}
        self.places = {re.search(INSTANCE, name).groups(): (text, name) for text in texts for name in entries(text)}
        types = ctypes.c_uint64, *[ctypes.c_int] * 3, ctypes.c_void_p, ctypes.c_int
        self.launcher = ctypes.CFUNCTYPE(ctypes.c_void_p, *types)(self.launch)
        self.settings = ctypes.CDLL(str(library))
        self.settings.emulator_hand_over(self.launcher)

    def choose(self, capability):
        self.settings.emulator_set(capability, 3, 1)

    def __getattr__(self, name):
        return getattr(self.extension, name)

    def allocate(self, *args, **options):
        """In the place of ``cuda.allocate``."""
        outputs = allocate(*args, **options)
        self.lse = outputs[-1]
        return outputs

    def forward(self, **call):
        kv, q = call["num_heads_kv"], call["num_heads_kv"] * call["group_size"]
        dim, dim_v = call["head_dim"], call["head_dim_v"]
        self.ranges = [extent(self.lse)]
        for name, heads, width in (
            *(("q", q, dim), ("out", q, dim_v), ("streams", q, dim_v)),
            *(("k", kv, dim), ("k_prefix", kv, dim), ("k_written", kv, dim)),
            *(("v", kv, dim_v), ("v_prefix", kv, dim_v), ("v_written", kv, dim_v)),
        ):
            start, row, head, rows = call[name] or (0, 0, 0, 0)
            if rows:
                self.ranges.append((start, start + 2 * ((rows - 1) * row + (heads - 1) * head + width)))
        weights = [(name, *(call[name] or (0, 0)), kv) for name in ("alpha_k", "alpha_v")]
        weights += [("beta", *(call["beta"] or (0, 0)), q), ("sinks", call["sinks"], 1, q)]
        self.ranges += [(start, start + 4 * (heads if each else 1)) for _, start, each, heads in weights if start]
        self.ranges.append((call["items"], call["items"] + 4 * call["num_items"] * len(schedule.FORWARD)))
        if call["slots"]:
            self.ranges.append((call["slots"], call["slots"] + 8 * call["k"][3]))
        return self.extension.forward(**call)

    def launch(self, offset, blocks, threads, shared, parameters, size):
        instance = self.instances[offset]
        self.launched.append(instance)
        try:
            kernel = self.kernel(instance)
            given = ctypes.string_at(parameters, size)
            if kernel.parameter_bytes < size and instance[0] == "90":  # before CUDA 13 the four maps may be nearer
                given = given[: kernel.parameter_bytes - 512] + given[-512:]
            kernel.run((blocks, 1, 1), threads, shared, given[: kernel.parameter_bytes], self.ranges, self.flags)
            self.error = b""
        except Exception as e:
            self.error = f"{type(e).__name__}: {e}".encode()
        return ctypes.cast(ctypes.c_char_p(self.error), ctypes.c_void_p).value


allocate = cuda.allocate
