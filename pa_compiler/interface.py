"""What libraries and this package say to each other: names and numbers that both sides have, each of them here once.

Templates and kernels are given them; Module and CudaModule read and write by them. Imports nothing of either side. And
where a library for a CPU cuts a sequence, since the bits of a result depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

from pa_compiler.spec import PagedAttentionSpec

SPLIT_TOKENS = 2048
"""Tokens of one kv head after which a sequence is split into block ranges; with more kv heads ranges are shorter. A
constant, so that a sequence is cut at the same places in every batch and at every thread count."""

MIN_SPLIT_TOKENS = 256
"""Below this a range would not be worth the merge of its result."""


class WorkItem(NamedTuple):
    """What a thread computes at a time: all heads of sequences of a chunk, in the blocks [block_begin, block_end).

    num_tokens counts the KV tokens that it reads. A library's plan has a line for each item with its fields in this
    order, which are those of the same names in the C++ struct WorkItem.
    """

    batch_start: int
    num_seqs: int
    block_begin: int
    block_end: int
    num_tokens: int


THREADING = ("auto", "own", "openmp")
"""Whose threads can run a call of a library for a CPU, in the order of the library's numbers."""

CHECKS = ("host", "device", "none")
"""Who can check the indices of a call of a library for a GPU, in the order of the library's numbers."""

REPORT_CODES = ("nothing", "context_len", "block_id", "slot")
"""What a kernel can report to be wrong with the indices of a call, in the order of the codes."""

REPORT_FIELDS = ("code", "index", "position", "value", "limit")
"""The int64 numbers of such a report. index is of a sequence or a token, position in its row of block_table."""


def split_blocks(spec: PagedAttentionSpec) -> int:
    """Blocks of one range of a long sequence in the fused pipeline, the same for every CPU."""
    return -(-max(MIN_SPLIT_TOKENS, SPLIT_TOKENS // spec.num_kv_heads) // spec.block_size)
