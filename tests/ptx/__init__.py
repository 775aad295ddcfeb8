"""Runs PTX on a CPU: what the compilers make of the kernels, for GPUs that need not be here.

``Kernel`` reads PTX text into numbered registers and handlers of ``machine.cpp``, which says what is checked.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FLAGS = "-std=c++20 -O2 -ftree-vectorize -march=native -ffp-contract=off -shared -fPIC".split()

SIZES = {"pred": "p", "b8": 1, "u8": 1, "s8": 1, "f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2}
SIZES |= {f"{kind}{8 * size}": size for kind in "busf" for size in (2, 4, 8)}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIAL += ["%laneid", "%warpid"]
SHUFFLES = ("bfly", "idx", "up", "down")
IGNORED = {"prefetch", "setmaxnreg", "griddepcontrol", "pragma"}

# What else the machine can do.
PROXY_OF_COPIES = 1  # wgmma sees what cp.async wrote after a fence.proxy.async only
ANY_REGISTERS = 2  # registers of wgmma may be written after wgmma.fence: ptxas moves it
FENCE_OF_WRITER = 4  # fence.proxy.async counts before the barrier only
APPROXIMATE = 8  # approximate functions are as far off as they may be


class Mistake(RuntimeError):
    """What a kernel must not do, or what it left undone."""


def extent(x):
    """Addresses of a tensor's first element and behind its last one."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + last * x.element_size()


def build(folder):
    """Compiles the machine; returns its path."""
    target = Path(folder) / "machine.so"
    done = subprocess.run(["g++", *FLAGS, HERE / "machine.cpp", "-o", target], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("g++ failed:\n" + done.stderr)
    return target


def load(path):
    library = ctypes.CDLL(str(path))
    library.ptx_program.restype = ctypes.c_void_p
    library.ptx_run.restype = ctypes.c_char_p
    return library


def entries(text):
    """The kernels of a file: name -> text of its parameters and of its body."""
    text = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)  # columns stay, so that lines can be told
    found = {}
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.DOTALL):
        depth, end = 1, m.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found[m[1]] = (m[2], text[m.end() : end - 1], text.count("\n", 0, m.end()) + 1)
    return found


class Kernel:
    """One kernel of a PTX file, ready to run on the machine of ``library``."""

    def __init__(self, library, text, name=None):
        kernels = entries(text)
        if name is None:
            (name,) = kernels
        self.library, self.name, self.lines = library, name, text.splitlines()
        parameters, body, line = kernels[name]
        self.shared_symbols = set(re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", text))
        self._read_parameters(parameters)
        self.slots, self.bytes, self.constants, self.special = {}, 0, {}, {}
        self.code, self.operands, self.handlers, self.at, self.labels = [], [], {}, [], {}
        self.scopes = [{}]
        self._read(body, line)
        self._finish()

    def _read_parameters(self, text):
        self.parameters, self.parameter_bytes = [], 0
        for item in filter(None, map(str.strip, text.split(","))):
            words = re.match(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?",
                item,
            )
            size = SIZES[words[2]] * int(words[4] or 1)
            align = int(words[1] or SIZES[words[2]])
            start = -(-self.parameter_bytes // align) * align
            self.parameters.append((words[3], start, size, words[2]))
            self.parameter_bytes = start + size

    # registers

    def _allocate(self, size):
        at = self.bytes
        self.bytes += 64 if size == "p" else max(64, 32 * size)
        return at

    def _declare(self, text):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for name in map(str.strip, names.split(",")):
            if m := re.fullmatch(r"(.*)<(\d+)>", name):
                self.scopes[-1] |= {f"{m[1]}{i}": (self._allocate(SIZES[kind]), SIZES[kind]) for i in range(int(m[2]))}
            else:
                self.scopes[-1][name] = (self._allocate(SIZES[kind]), SIZES[kind])

    def _find(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _constant(self, value, size):
        key = (value if size == "p" else value & (1 << 8 * size) - 1, size)
        return self.constants.setdefault(key, ("constant", len(self.constants)))

    def _special(self, name):
        size = 8 if name == "param" else 4
        if name not in self.special:
            self.special[name] = self._allocate(size)
        return self.special[name], size

    def _operand(self, text, size):
        """Where an operand stands, which has this size, or any (None)."""
        if text == "_":  # a part that isn't wanted
            return self.scopes[0].setdefault(f"_ {size}", (self._allocate(size), size))
        if found := self._find(text):
            if size is not None and found[1] != size:
                raise ValueError(f"{text} has {found[1]} bytes, not {size}")
            return found
        if text in SPECIAL:
            if size not in (4, None):
                raise ValueError(f"{text} as {size} bytes")
            return self._special(text)
        if text in self.shared_symbols:
            if size == 8:
                raise ValueError("generic address of shared memory")
            return self._special("shared")
        if any(text == name for name, *_ in self.parameters):
            start = next(start for name, start, *_ in self.parameters if name == text)
            if start:
                raise ValueError("address of a parameter that isn't the first")
            return self._special("param")
        if size is None:
            raise ValueError(f"the size of {text} is not known")
        return self._constant(number(text, size), size), size

    def _address(self, text):
        """[register + offset]: the register and the offset."""
        base, _, offset = text.strip("[] \t").partition("+")
        base, offset = base.strip(), int(offset.strip() or "0", 0)
        for name, start, *_ in self.parameters:
            if base == name:
                return self._special("param")[0], start + offset
        return self._operand(base, None)[0], offset

    # statements

    def _read(self, body, line):
        at = 0
        for m in re.finditer(r"[^;]*;|[^;]+$", body):
            statement = m[0].rstrip(";")
            here = line + body.count("\n", 0, at)
            at = m.end()
            while True:
                blank = len(statement) - len(statement.lstrip())
                here += statement[:blank].count("\n")
                statement = statement[blank:]
                if statement.startswith("{"):
                    self.scopes.append({})
                    statement = statement[1:]
                elif statement.startswith("}"):
                    self.scopes.pop()
                    statement = statement[1:]
                elif label := re.match(r"([$\w]+):", statement):
                    self.labels[label[1]] = len(self.code)
                    statement = statement[label.end() :]
                elif directive := re.match(r"\.(loc|pragma|file)[^\n]*", statement):
                    statement = statement[directive.end() :]
                else:
                    break
            if not statement.strip():
                continue
            if statement.startswith(".reg"):
                self._declare(statement)
                continue
            try:
                self._instruction(" ".join(statement.split()))
            except Exception as e:
                raise ValueError(f"line {here}: {statement.strip()[:200]}: {e}") from e
            self.at.append(here)

    def _emit(self, handler, operands, written, guard, x=(), target=-1):
        if not self.library.ptx_handler(handler.encode()):
            raise ValueError(f"no handler {handler}")
        number = self.handlers.setdefault(handler, len(self.handlers))
        g, negated = guard
        self.code.append(
            [number, len(self.operands), len(operands), written, g, negated, target, *x, *[0] * (4 - len(x))]
        )
        self.operands += [o[0] if isinstance(o, tuple) and isinstance(o[0], tuple) else o for o in operands]

    def _instruction(self, text):
        guard = (-1, 0)
        if text.startswith("@"):
            name, text = text.split(None, 1)
            guard = (self._operand(name.lstrip("@!"), "p")[0], int("!" in name))
        opcode, _, rest = text.partition(" ")
        parts, operands = opcode.split("."), split(rest)
        flat = [y for x in operands for y in split(x.strip("{} "))] if "{" in rest else operands
        kind = parts[0]

        def emit(handler, operands, written, x=()):
            self._emit(
                handler,
                [o[0] if isinstance(o, tuple) and len(o) == 2 and not isinstance(o[0], str) else o for o in operands],
                written,
                guard,
                x,
            )

        def sized(names, *sizes):
            return [self._operand(n, s) for n, s in zip(names, sizes, strict=True)]

        if kind in IGNORED:
            return emit("nop", [], 0)
        if kind == "bra":
            self._emit("bra", [], 0, guard, (), operands[0])
        elif kind in ("ret", "exit"):
            emit("ret", [], 0)
        elif kind == "trap":
            emit("trap", [], 0)
        elif kind in ("ld", "st"):
            self._memory(parts, operands, emit)
        elif kind == "mov" and "{" in rest:
            size = SIZES[parts[-1]]
            if operands[0].startswith("{"):
                emit(f"mov.unpack{8 * size}", sized(flat, size // 2, size // 2, size), 2)
            else:
                emit(f"mov.pack{8 * size}", sized(flat, size, size // 2, size // 2), 1)
        elif kind == "mov":
            size = SIZES[parts[-1]]
            emit("mov.pred" if size == "p" else f"mov.{8 * size}", sized(operands, size, size), 1)
        elif kind == "cvta":
            emit("mov.64", sized(operands, 8, 8), 1)
        elif kind == "setp":
            if len(operands) != 3 or "|" in operands[0]:
                raise ValueError("setp of more than two numbers")
            parts = [p for p in parts if p != "ftz"]
            size = SIZES[parts[-1]]
            emit(".".join(parts), sized(operands, "p", size, size), 1)
        elif kind == "selp":
            size = SIZES[parts[-1]]
            emit(f"selp.{8 * size}", sized(operands, size, size, size, "p"), 1)
        elif kind == "cvt":
            to, source = SIZES[parts[-2]], SIZES[parts[-1]]
            name = ".".join(p for p in parts if p not in ("ftz", "sat"))
            if "sat" in parts or "relu" in parts:
                raise ValueError("not known")
            # 8-bit numbers stand in wider registers.
            sizes = [
                self._find(o)[1] if s == 1 else s
                for o, s in zip(operands, (to, *[source] * (len(operands) - 1)), strict=True)
            ]
            found = self._find(operands[1])
            if found and isinstance(sizes[1], int) and found[1] > sizes[1]:
                sizes[1], name = found[1], f"{name}<{8 * found[1]}"
            emit(name, sized(operands, *sizes), 1)
        elif kind == "shfl":
            d, _, p = operands[0].partition("|")
            names = [d, *([p] if p else []), *operands[1:]]
            emit(
                "shfl",
                sized(names, 4, *(["p"] if p else []), 4, 4, 4, 4),
                2 if p else 1,
                (SHUFFLES.index(parts[2]), int(bool(p))),
            )
        elif opcode.startswith(("bar.warp.sync",)):
            emit("bar.warp.sync", sized(operands, 4), 0)
        elif kind in ("bar", "barrier"):
            name = "bar.arrive" if "arrive" in parts else "bar.sync"
            emit(name, sized(operands, *[4] * len(operands)), 0)
        elif opcode.startswith("cp.async.c") and parts[2] in ("ca", "cg"):
            target, source = self._address(operands[0]), self._address(operands[1])
            size = number(operands[2], 4)
            others = sized(operands[3:], *[4] * len(operands[3:]))
            emit("cp.async", [(target[0], 0), (source[0], 0), *others], 0, (target[1], source[1], size))
        elif opcode.startswith("cp.async.commit_group") or opcode.startswith("wgmma.commit_group"):
            emit(".".join(parts[: 3 if kind == "cp" else 2]), [], 0)
        elif opcode.startswith("cp.async.wait_all"):
            raise ValueError("not known")
        elif opcode.startswith("cp.async.wait_group"):
            emit("cp.async.wait_group", [], 0, (int(operands[0]),))
        elif opcode.startswith("wgmma.wait_group"):
            emit("wgmma.wait_group", [], 0, (int(operands[0]),))
        elif opcode.startswith("wgmma.fence"):
            emit("wgmma.fence", [], 0)
        elif opcode.startswith("fence.proxy.async"):
            emit("fence.proxy.async", [], 0)
        elif opcode.startswith("fence.mbarrier_init"):
            emit("fence.mbarrier_init", [], 0)
        elif opcode.startswith("mbarrier.init"):
            a, offset = self._address(operands[0])
            emit("mbarrier.init", [(a, 0), *sized(operands[1:], 4)], 0, (offset,))
        elif opcode.startswith("mbarrier.arrive"):
            if operands[0] != "_":
                raise ValueError("state of mbarrier.arrive")
            a, offset = self._address(operands[1])
            emit("mbarrier.arrive", [(a, 0), *sized(operands[2:], *[4] * len(operands[2:]))], 0, (offset,))
        elif opcode.startswith("mbarrier.try_wait.parity"):
            a, offset = self._address(operands[1])
            emit("mbarrier.try_wait.parity", [*sized(operands[:1], "p"), (a, 0), *sized(operands[2:], 4)], 1, (offset,))
        elif opcode.startswith("cp.async.bulk.tensor.3d"):
            names = [n.strip("[]{} ") for n in re.sub(r"[\[\]{}]", " ", rest).split(",")]
            target, tensor, x, y, z, barrier = names
            emit("cp.async.bulk.tensor.3d", sized([target, tensor, barrier, x, y, z], 4, 8, 4, 4, 4, 4), 0)
        elif kind in ("ldmatrix", "stmatrix"):
            n = int(next(p for p in parts if re.fullmatch(r"x[124]", p))[1:])
            trans = int("trans" in parts)
            registers = operands[0 if kind == "ldmatrix" else 1].strip("{} ")
            a, offset = self._address(operands[1 if kind == "ldmatrix" else 0])
            registers = sized(split(registers), *[4] * n)
            both = [*registers, (a, 0)] if kind == "ldmatrix" else [(a, 0), *registers]
            emit(kind, both, n if kind == "ldmatrix" else 0, (offset, n, trans))
        elif opcode.startswith("mma.sync"):
            m = re.fullmatch(r"mma\.sync\.aligned\.(m16n8k16)\.row\.col\.f32\.(\w+)\.\2\.f32", opcode)
            emit(f"mma.{m[1]}.{m[2]}", sized(flat, *[4] * 14), 4)
        elif opcode.startswith("wgmma.mma_async"):
            self._wgmma(opcode, operands, emit, sized)
        else:
            self._arithmetic(parts, operands, emit, sized)

    def _wgmma(self, opcode, operands, emit, sized):
        m = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.\2", opcode)
        n, in_registers = int(m[1]), operands[1].startswith("{")
        d = sized(split(operands[0].strip("{} ")), *[4] * (n // 2))
        a = sized(split(operands[1].strip("{} ")), *[4] * 4) if in_registers else sized(operands[1:2], 8)
        b, p = self._operand(operands[2], 8), self._operand(operands[3], "p")
        scales = [int(x) for x in operands[4:]]
        turned = scales[2:]
        if scales[:2] != [1, 1] or len(turned) != 2 - in_registers:
            raise ValueError("scales")
        a_turned, b_turned = (0, *turned) if in_registers else turned
        mode = int(m[2] == "bf16") | in_registers << 1 | a_turned << 2 | b_turned << 3
        emit("wgmma", [*d, *a, b, p], n // 2, (n, mode))

    def _memory(self, parts, operands, emit):
        kind = parts[0]
        space = next(p for p in parts if p in ("global", "shared", "param", "shared::cta"))
        dtype = parts[-1]
        width = re.sub(r"[bf]", "u", dtype)
        count = next((int(p[1:]) for p in parts if re.fullmatch(r"v[248]", p)), 1)
        address, registers = (1, 0) if kind == "ld" else (0, 1)
        a, offset = self._address(operands[address])
        names = split(operands[registers].strip("{} "))
        size = SIZES[dtype]
        found = [self._operand(n, None if self._find(n) else size) for n in names]
        if len(found) != count or any(f[1] != found[0][1] for f in found) or found[0][1] == "p" or found[0][1] < size:
            raise ValueError("registers of a memory instruction")
        name = f"{kind}.{space.removesuffix('::cta')}.{width}>{8 * found[0][1]}"
        if kind == "ld":
            emit(name, [*found, (a, 0)], count, (offset, count))
        else:
            emit(name, [(a, 0), *found], 0, (offset, count))

    def _arithmetic(self, parts, operands, emit, sized):
        kind, dtype = parts[0], parts[-1]
        size = SIZES[dtype]
        sizes = [size] * len(operands)
        if kind in ("shl", "shr"):
            sizes[2] = 4
        elif kind == "bfe":
            sizes[2:] = [4, 4]
        elif kind == "bfi":
            sizes[3:] = [4, 4]
        elif "wide" in parts:
            sizes[0] = 2 * size
            sizes[3:] = [2 * size] * len(sizes[3:])
        elif kind in ("popc", "clz"):
            sizes[0] = 4
        if dtype in ("f32", "f16x2", "bf16x2"):
            kept = [p for p in parts if p != "rn"]
            name = ".".join(kept)
            if dtype != "f32" and kind == "fma":
                name = f"fma.rn.{dtype}"
        else:
            name = ".".join(parts)
        emit(name, sized(operands, *sizes), 1)

    def _finish(self):
        constants_at = self.bytes
        places, image = {}, bytearray()
        for (value, size), key in self.constants.items():
            places[key[1]] = constants_at + len(image)
            if size == "p":
                item = struct.pack("<I", 0xFFFFFFFF if value else 0)
            else:
                item = value.to_bytes(size, "little") * 32
            image += item + bytes(-len(item) % 64)
        image += bytes(64)

        def place(o):
            if isinstance(o, tuple):
                return places[o[1]] if o[0] == "constant" else place(o[0])
            return o

        self.operands = [place(o) for o in self.operands]
        for instruction in self.code:
            if isinstance(instruction[6], str):
                instruction[6] = self.labels[instruction[6]]
        for instruction, at in zip(self.code, meetings(self.code, self.handlers), strict=True):
            instruction[7] = instruction[7] if at is None else at
        code = np.array(self.code, np.int64).astype(np.int32)
        operands = np.array(self.operands or [0], np.int32)
        names = (ctypes.c_char_p * len(self.handlers))(*[n.encode() for n in self.handlers])
        special = np.array([self.special.get(n, -1) for n in (*SPECIAL, "param", "shared")], np.int32)
        self._keep = code, operands, names, special, bytes(image)
        self.program = self.library.ptx_program(
            names,
            ctypes.c_void_p(code.ctypes.data),
            len(code),
            ctypes.c_void_p(operands.ctypes.data),
            len(operands),
            constants_at + len(image),
            self._keep[4],
            constants_at,
            ctypes.c_void_p(special.ctypes.data),
        )

    def pack(self, arguments):
        """The bytes of the parameters."""
        out = bytearray(self.parameter_bytes)
        for (_, start, size, dtype), value in zip(self.parameters, arguments, strict=True):
            out[start : start + size] = (
                struct.pack("<f", value) if dtype == "f32" else int(value).to_bytes(size, "little", signed=value < 0)
            )
        return bytes(out)

    def run(self, grid, threads, shared, parameters, ranges, flags=0, seed=1):
        """Runs the kernel. parameters: bytes. ranges: (begin, end) of each tensor. Raises Mistake."""
        ranges = [r for r in ranges if r[0] < r[1]]
        memory = np.zeros(len(parameters) + 192, np.uint8)
        start = -memory.ctypes.data % 128
        memory[start : start + len(parameters)] = np.frombuffer(parameters, np.uint8)
        flat = np.array([x for r in ranges for x in r] or [0], np.uint64)
        error = self.library.ptx_run(
            ctypes.c_void_p(self.program),
            (ctypes.c_int32 * 3)(*grid),
            threads,
            shared,
            ctypes.c_void_p(memory.ctypes.data + start),
            len(parameters),
            ctypes.c_void_p(flat.ctypes.data),
            len(ranges),
            seed,
            flags,
        ).decode()
        if error:

            def line(m):
                n = self.at[min(int(m[1]), len(self.at) - 1)]
                return f"line {n} [{self.lines[n - 1].strip()[:160]}]"

            raise Mistake(f"{self.name}: " + re.sub(r"@(\d+)", line, error))


def meetings(code, handlers):
    """Of each conditional branch, the instruction that every way from it to the end comes to first; else None."""
    branch, end = handlers.get("bra"), len(code)
    ends = [handlers.get("ret"), handlers.get("trap")]
    follows = []
    for i, (kind, *_, guard, _, target) in enumerate(x[:7] for x in code):
        always = guard < 0
        if kind in ends and always:
            follows.append([end])
        elif kind == branch:
            follows.append([target] if always else [i + 1, target])
        else:
            follows.append([i + 1])
    leaders = sorted(
        {0, end}
        | {t for f in follows if len(f) > 1 or f[0] >= end for t in f}
        | {x[6] for x in code if x[6] >= 0}
        | {i + 1 for i, x in enumerate(code) if x[0] in (branch, *ends)}
    )
    number_of = {at: n for n, at in enumerate(leaders)}
    last = [stop - 1 for stop in leaders[1:]]
    after = [[number_of[t] for t in follows[i]] for i in last]
    exit_block = len(leaders) - 1
    sets = [(1 << len(leaders)) - 1] * exit_block + [1 << exit_block]
    changed = True
    while changed:
        changed = False
        for n in reversed(range(exit_block)):
            both = -1
            for t in after[n]:
                both &= sets[t]
            both |= 1 << n
            if both != sets[n]:
                sets[n], changed = both, True
    sizes = [s.bit_count() for s in sets]
    found = [None] * end
    for n, i in enumerate(last):
        if len(after[n]) > 1:
            others = sets[n] & ~(1 << n)
            # Those behind a block form a chain: the nearest has all the others behind it.
            found[i] = leaders[max(bits(others), key=sizes.__getitem__)]
    return found


def bits(mask):
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


def number(text, size):
    """The bits of a literal."""
    text = text.strip()
    if size == "p":
        return int(text, 0) != 0
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def split(text):
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
