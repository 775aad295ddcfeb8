"""What must not be in machine code, read from what nvdisasm and cuobjdump print of it."""

from __future__ import annotations

import re

# Their first operand is read.
_READERS = ("BAR", "BRX", "JMX", "NANOSLEEP", "WARPSYNC")
_MOST_GROUPS = 6


def overwritten(code: str) -> list[str]:
    """Instructions that write to registers that a Hopper product under way still reads or adds to, on some path.

    Such products end at a ``WARPGROUP.DEPBAR``, long after the instruction that starts them. ptxas before 13.3 may give
    the registers of their left operand to others in between, which is wrong in silence.
    """
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;", line):
            labels[f"0x{int(found[1], 16):x}"] = len(instructions)  # cuobjdump names no others
            operands = re.split(r",\s*(?![^\[]*\])", found[4])
            instructions.append((bool(found[2]), found[3], operands, _written(found[3], operands)))
    hits, seen, todo = set(), set(), [(0, ())]
    while todo:
        # under_way: registers of the committed groups, then of the open one: (left operands, sums), bit by bit
        at, under_way = todo.pop()
        while at < len(instructions) and (at, under_way) not in seen:
            seen.add((at, under_way))
            conditional, opcode, operands, written = instructions[at]
            is_product = opcode.startswith("HGMMA")
            for left, sums in under_way:
                if written & (left if is_product else left | sums):
                    hits.add(at)
            if is_product:
                left = re.fullmatch(r"R(\d+)(\.reuse)?", operands[1])
                *groups, (lefts, sums) = under_way or ((0, 0),)
                group = (lefts | (0b1111 << int(left[1]) if left else 0), sums | written)
                under_way = (*groups, group, (0, 0)) if "gsb0" in operands[-1] else (*groups, group)
                if len(under_way) > _MOST_GROUPS:  # a loop that never waits
                    under_way = (tuple(a | b for a, b in zip(*under_way[:2], strict=True)), *under_way[2:])
            elif opcode.startswith("WARPGROUP.DEPBAR") and under_way:
                pending = int(operands[-1], 0)
                under_way = under_way[max(0, len(under_way) - 1 - pending) :]
                under_way = under_way if any(map(any, under_way)) else ()
            if opcode.startswith(("BRA", "EXIT", "RET", "BPT.TRAP")):
                conditional |= any(re.fullmatch(r"!?U?P\d", x) for x in operands)
                if opcode.startswith("BRA"):
                    todo.append((labels[re.search(r"\.L_\w+|0x[0-9a-f]+", operands[-1])[0]], under_way))
                if not conditional:
                    break
            at += 1
    return [f"{instructions[at][1]} {', '.join(instructions[at][2])}" for at in sorted(hits)]


def _written(opcode: str, operands: list[str]) -> int:
    # The registers, bit by bit. Predicates may stand before the first of them.
    base, *suffixes = opcode.split(".")
    first = re.match(r"(?:U?PT,|U?P\d,)?R(\d+)(?:,|$)", ",".join(operands))
    if first is None or base in _READERS:
        return 0
    count = 1
    if base == "HGMMA":
        count = int(re.search(r"x(\d+)x", opcode)[1]) // 2
    elif base == "HMMA" or "128" in suffixes:
        count = 4
    elif base == "LDSM":
        count = int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
    elif "64" in suffixes or "WIDE" in suffixes or (base == "CS2R" and "32" not in suffixes):
        count = 2
    return (1 << count) - 1 << int(first[1])
