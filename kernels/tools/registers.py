"""Uniform registers that machine code reads though nothing has written them: the mark of a miscompiled product.

ptxas 12.8 leaves such reads in addresses of shared memory (``kernels/gpu/assembler.py``). Of 180 kernels that were
compiled with it and run on an H100, this finds all 5 that gave wrong sums, 5 of the 16 that ended with an illegal
address, and none of the 159 that were right. Of the 11 others some ran in a process whose device had already broken;
which ones was not recorded, so code without this mark may still be wrong.
"""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_WRITES = re.compile(r"^(U(?!P)|UP2UR|R2UR|S2UR|CS2UR|C?REDUX|VOTEU|LDCU)")


def unwritten_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register before any instruction above them has written it."""
    written: set[int] = set()
    found: list[str] = []
    for match in _INSTRUCTION.finditer(sass):
        name, operands = match[1], [part.strip() for part in match[2].split(",")]
        if not _REGISTER.search(match[2]):
            continue
        target = re.fullmatch(r"UR(\d+)", operands[0]) if _WRITES.match(name) else None
        reads = {int(r) for part in operands[1 if target else 0 :] for r in _REGISTER.findall(part)}
        if "GMMA" in name:  # the descriptor of the second operand follows that of the first
            reads = {r + 2 for r in reads}
        if reads - written:
            found.append(f"{name} {match[2].strip()}")
        if target:
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= set(range(int(target[1]), int(target[1]) + width))
    return found
