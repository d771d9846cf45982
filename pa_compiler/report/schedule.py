"""When threads run the work items of a plan, as far as it can be known: each takes the next item when it is free."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pa_compiler.interface import AttendItem, WorkItem
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted


class Run(NamedTuple):
    """A work item that a thread runs.

    Attributes:
        thread: Its number.
        begin: When, in FLOPs of the thread's work before it.
        end: When it is done.
        sequence: The first of its sequences.
        sequences: How many they are.
        block_begin: The first block that is read of them.
        block_end: The one after the last.
        said: What it is, in a sentence.
    """

    thread: int
    begin: float
    end: float
    sequence: int
    sequences: int
    block_begin: int
    block_end: int
    said: str


class Merge(NamedTuple):
    """Partial results that become one, by the thread that has computed the last of them."""

    thread: int
    time: float
    said: str


def schedule(
    items: Sequence[WorkItem | AttendItem], threads: int, spec: PagedAttentionSpec
) -> tuple[list[Run], list[Merge]]:
    """Deal items in their order to threads, whichever is free first, for the time that their FLOPs take."""
    free = [(0.0, thread) for thread in range(threads)]
    runs: list[Run] = []
    last: dict[tuple[int, ...], tuple[float, int]] = {}
    ranges = Counter(_merged(item) for item in items)
    for number, item in enumerate(items):
        begin, thread = heapq.heappop(free)
        end = begin + _flops(item, spec)
        heapq.heappush(free, (end, thread))
        runs.append(_run(number, item, thread, begin, end, spec))
        key = _merged(item)
        last[key] = max(last.get(key, (0.0, 0)), (end, thread))
    merges = [
        Merge(thread, time, f"sequence {key[0]}: {counted(ranges[key], 'partial result')} merged by thread {thread}")
        for key, (time, thread) in last.items()
        if ranges[key] > 1
    ]
    return runs, merges


def _merged(item: WorkItem | AttendItem) -> tuple[int, ...]:
    """What items have alike whose results are of the same tokens and heads."""
    if isinstance(item, AttendItem):
        return item.seq, item.token_begin, item.kv_head_begin
    return (item.batch_start,)


def _flops(item: WorkItem | AttendItem, spec: PagedAttentionSpec) -> float:
    return float(item.work if isinstance(item, AttendItem) else item.num_tokens * spec.token_flops) or 1.0


def _run(
    number: int, item: WorkItem | AttendItem, thread: int, begin: float, end: float, spec: PagedAttentionSpec
) -> Run:
    first, beyond = item.block_begin * spec.block_size, item.block_end * spec.block_size
    read = f"blocks {item.block_begin} to {item.block_end - 1}, positions {first:,} to {beyond - 1:,}"
    if item.block_end <= item.block_begin:
        read = "no blocks"
    if isinstance(item, AttendItem):
        heads = f"{item.kv_head_begin} to {item.kv_head_begin + item.num_kv_heads - 1}"
        of = f"sequence {item.seq}, {counted(item.num_query, 'query token')} from position {item.first_pos:,} on"
        said = f"item {number} on thread {thread}: {of}, kv heads {heads}, {read}"
        return Run(thread, begin, end, item.seq, 1, item.block_begin, item.block_end, said)
    of = f"sequence {item.batch_start}"
    if item.num_seqs > 1:
        of = f"sequences {item.batch_start} to {item.batch_start + item.num_seqs - 1}"
    said = f"item {number} on thread {thread}: {of}, {read}, {counted(item.num_tokens, 'token')}"
    return Run(thread, begin, end, item.batch_start, item.num_seqs, item.block_begin, item.block_end, said)
