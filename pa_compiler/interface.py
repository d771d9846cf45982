"""What libraries and this package say to each other: names and numbers that both sides have, each of them here once.

Templates and kernels are given them; Module and CudaModule read and write by them. Imports nothing of either side.
"""

from __future__ import annotations

from typing import NamedTuple


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
