"""The scorecard: what is promised of reliability, and the figures of the last full run, in RELIABILITY.md.

A test belongs to an item by the mark scorecard(item), draws count(fast, full) cases and says with figure(what, number)
what it found. `make test` runs all of them with the fast counts; `make soak` with the full ones, and writes the table.
"""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path

from pa_compiler.words import counted

TABLE = Path(__file__).parents[2] / "RELIABILITY.md"

ITEMS = {
    1: "random specs and inputs against the float64 reference",
    2: "every num_heads 1-65, batch 0-49, eight block sizes, every length of 0 to 3 blocks",
    3: "exact data: equality, not closeness",
    4: "blocks moved around the cache: the same bits",
    5: "a sequence alone, and at every position of a batch across chunks: the same bits",
    6: "reruns at 1, 2, 4 and 8 threads: the same bits",
    7: "empty sequences at every position: out 0, lse -inf",
    8: "huge scores, subnormals; the floating-point state unchanged",
    9: "131k and 1M tokens",
    10: "NaN, Inf, 0xFF in all that must not be read: the same bits",
    11: "unreadable pages before and after every buffer; inputs unchanged",
    12: "a cache of more than 2^31 elements: the same bits at its bottom and its top",
    13: "kinds of bad input: a named exception with both values, out untouched",
    14: "block_table: surplus entries may hold anything, a used one out of range raises",
    15: "libraries under AddressSanitizer",
    16: "16 threads call at once: the same bits as one after another",
    17: "24 threads compile 24 specs at once",
    18: "fork after a parallel call",
    19: "8 processes of 16 threads ask for one spec: one build",
    20: "kill -9 during a build: the next run is right",
    21: "every file operation of a build failing: right, or a named error",
    22: "flipped, cut and zeroed cache entries: noticed and rebuilt",
    23: "each input of the cache key changed: each misses; no module for another CPU is loaded",
    24: "cache directory owned and 0700, no pickle, identifiers checked",
    25: "seeded bugs: each caught by the tests",
    26: "environments: right, or a named error",
    27: "float32 numbers as float8: the bytes of ml_dtypes",
}

_HEAD = """\
# Reliability

The figures of the last full run, written by it (`make soak`); `make test` runs the same tests with fewer cases.

| | promise | figures | run |
| --- | --- | --- | --- |
"""
_ROW = re.compile(r"^\| (\d+) \| .* \|$", re.MULTILINE)


def text(numbers: dict[str, float]) -> str:
    """What was measured, as text: counts with their thousands, others with three digits."""
    shown = (
        f"{number:,} {what}" if isinstance(number, int) else f"{what} {number:.3g}" for what, number in numbers.items()
    )
    return ", ".join(shown)


def record(figures: dict[int, dict[str, float]], failed: set[int]) -> None:
    """Write the rows of the items that ran; those of the others stay as they are."""
    rows = {int(row[1]): row[0] for row in _ROW.finditer(TABLE.read_text())} if TABLE.exists() else {}
    when = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {_machine()}"
    for item, numbers in figures.items():
        verdict = "**FAILED** " if item in failed else ""
        rows[item] = f"| {item} | {ITEMS[item]} | {verdict}{text(numbers)} | {when} |"
    TABLE.write_text(_HEAD + "".join(f"{rows[item]}\n" for item in sorted(rows)))


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    return f"{counted(info.count('processor'), 'CPU')}, {model[1] if model else platform.machine()}"
