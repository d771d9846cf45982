"""What an instruction of x86 assembly asks of a core: what it waits for, the pipes that it takes, and for how long.

Pipes and latencies are those of Zen 3 by AMD's Software Optimization Guide for Family 19h and uops.info.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from pa_compiler.prediction.trace import accesses

FMA, ADD, SHUFFLE, ANY, INTEGER = (0, 1), (2, 3), (1, 2), (0, 1, 2, 3), (0, 1, 3)
"""The pipes of vectors that take products, sums, moves between lanes, logic, and integer sums."""
ALU, ALU1, BRANCH = (4, 5, 6, 7), (5,), (8, 9)
PIPES = 10


class Operation(NamedTuple):
    """An instruction.

    Attributes:
        sources: Registers that it waits for; "flags" is one.
        results: Registers that it writes.
        pipes: The pipes that it takes, one of each.
        latency: Cycles from its sources to its results, without a load's.
        loads: Whether it reads memory.
        load_latency: Cycles of that, in the first-level cache; 0 of a prefetch.
        stores: Whether it writes memory.
        slot: The place on the stack that it reads or writes, or "".
        accesses: Whether its address is in a trace.
        wide: Whether an access may reach into another line.
        on_vectors: Whether it has vector registers.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    pipes: tuple[tuple[int, ...], ...]
    latency: int
    loads: bool
    load_latency: int
    stores: bool
    slot: str
    accesses: bool
    wide: bool
    on_vectors: bool


_OPERANDS = re.compile(r"(?:[^,(]|\([^)]*\))+")
_REGISTER = re.compile(r"%(\w+)")
_GENERAL = re.compile(r"[re]?([abcd])[xl]|[re]?(si|di|bp|sp)l?|r(\d+)[dwb]?")
_COMPARE = re.compile(r"cmp|test|bt|vu?comi|vtest|vptest")
_SETS_FLAGS = re.compile(r"(add|sub|cmp|test|and|or|xor|inc|dec|neg|imul|sh[lr]|sar|bt)[bwlq]?$|vu?comi")
_READS_FLAGS = re.compile(r"j(?!mp)|cmov|set|adc|sbb")
_FMA = re.compile(r"vfn?m(add|sub)")
_MOVE = re.compile(r"v?mov(ap|up|dq[au]|q|l)|vp?broadcast|vlddqu|v?movs[sd]|vmovd")
_UPDATES = re.compile(r"(add|sub|inc|dec|and|or|xor)[bwlq]?$")

_VECTORS: tuple[tuple[str, tuple[tuple[int, ...], ...], int], ...] = (
    (r"vfn?m(add|sub)", (FMA,), 4),
    (r"v(p?mul|pmadd)", (FMA,), 3),
    (r"vhadd", (SHUFFLE, SHUFFLE, ADD), 4),
    (r"v(add|sub|cvt|round)", (ADD,), 3),
    (r"v(max|min|cmp|u?comi|blendv)", (FMA,), 1),
    (r"v(div|sqrt)", (FMA,) * 5, 11),
    (r"vps(ll|rl|ra)", (SHUFFLE,), 1),
    (r"v(perm2|extract|insert|perm[qdp]|p?broadcast)", (SHUFFLE,), 3),
    (r"v(p?shuf|p?unpck|pack|permil|mov(s|lh|hl|d)|palign)", (SHUFFLE,), 1),
    (r"vp(add|sub|max|min|cmp)", (INTEGER,), 1),
    (r"v", (ANY,), 1),
)
"""Of instructions on vectors whose names begin so: the pipes that they take, and their latency."""


@functools.cache
def operation(instruction: str) -> Operation:
    """What an instruction asks for, from its text in the syntax of AT&T."""
    name, _, rest = instruction.partition("#")[0].strip().partition("\t")
    operands = [operand.strip() for operand in _OPERANDS.findall(rest)]
    last = operands[-1] if operands else ""
    memory = [each for each in operands if "(" in each or (each.startswith(".L") and not name.startswith("j"))]
    compares, fetches, on_vectors = _COMPARE.match(name) is not None, name.startswith("prefetch"), "mm" in rest
    touches = bool(memory) and not name.startswith(("lea", "nop"))
    stores = touches and memory[-1] == last and not compares and not fetches
    loads = touches and (not stores or _UPDATES.match(name) is not None)
    writes = not (stores or compares or fetches or name.startswith("j"))
    reads_last = not writes or _FMA.match(name) or not name.startswith(("mov", "lea", "v", "pop", "set"))
    sources = [register for operand in operands[:-1] for register in _registers(operand)]
    sources += _registers(last) if reads_last or "(" in last else []
    results = _registers(last) if writes else []
    pipes, latency = _work(name, on_vectors, touches)
    if name in ("vxorps", "vpxor", "xorl") and len(set(operands)) == 1:  # a zero, of no register
        sources, pipes, latency = [], (), 0
    elif not touches and "$" not in rest and re.match(r"v?mov([au]p|dq[au]|[ql]$)", name) and _same_kind(operands):
        pipes, latency = (), 0  # renamed
    return Operation(
        sources=tuple(dict.fromkeys([*sources, *(["flags"] if _READS_FLAGS.match(name) else [])])),
        results=(*results, *(["flags"] if _SETS_FLAGS.match(name) else [])),
        pipes=pipes,
        latency=latency,
        loads=loads,
        load_latency=0 if fetches or not loads else 7 if on_vectors else 4,
        stores=stores,
        slot=memory[0] if memory and "%rsp" in memory[0] else "",
        accesses=accesses(instruction) != "",
        wide=on_vectors and not re.match(r"vp?broadcast|v?\w+s[sd]$", name),
        on_vectors=any(register.startswith("v") for register in results),
    )


def _work(name: str, on_vectors: bool, touches: bool) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The pipes that an instruction takes beside those of loads and stores, and its latency."""
    if (
        name.startswith("prefetch")
        or name == "nop"
        or (touches and _MOVE.match(name))
        or (touches and name[:3] == "mov")
    ):
        return (), 0
    if on_vectors:
        named = f"v{name.removeprefix('v')}"  # SSE's names are AVX's without it
        return next((pipes, latency) for begins, pipes, latency in _VECTORS if re.match(begins, named))
    if name.startswith(("imul", "mul", "div", "idiv")):
        return (ALU1,), 3 if "mul" in name else 12
    return ((BRANCH,) if name.startswith(("j", "ret", "call")) else (ALU,)), 1


def _registers(operand: str) -> list[str]:
    return [known for name in _REGISTER.findall(operand) if (known := _register(name))]


def _register(name: str) -> str:
    """A register by one name, whichever part of it is meant; "" of what is none to wait for."""
    if name[1:3] == "mm":
        return f"v{name[3:]}"
    found = _GENERAL.fullmatch(name)
    return "" if found is None else next(part for part in found.groups() if part)


def _same_kind(operands: list[str]) -> bool:
    return len(operands) == 2 and ("mm" in operands[0]) == ("mm" in operands[1])
