"""Instructions that a compiled kernel issues, counted from its machine code."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from bench import ahead_of_time

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+\s+)?([A-Z][^;]*);")
_BRANCH = re.compile(r"BRA.*0x([0-9a-f]+)")


def issued(compiled_kernel: Any, trips: Sequence[float]) -> float:
    """Return the instructions that a warp issues, if loops of depth k run trips[k] times.

    A loop is a branch backwards. One that is nested deeper than `trips` says runs once.
    """
    code = disassembled(compiled_kernel.asm["cubin"])
    loops = [(int(branch[1], 16), address) for address, branch in _branches(code)]
    loops = [(first, last) for first, last in loops if first < last]
    total = 0.0
    for address, _ in code:
        depth = sum(first <= address <= last for first, last in loops)
        count = 1.0
        for trip in trips[:depth]:
            count *= trip
        total += count
    return total


@functools.cache
def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """Return the address and the text of each instruction."""
    text = ahead_of_time.dumped(cubin, "-sass")
    return [(int(address, 16), code) for address, _, code in _INSTRUCTION.findall(text)]


def _branches(code: list[tuple[int, str]]) -> list[tuple[int, re.Match[str]]]:
    matches = ((address, _BRANCH.match(text)) for address, text in code)
    return [(address, match) for address, match in matches if match]
