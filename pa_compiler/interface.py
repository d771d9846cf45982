"""What libraries and this package say to each other: names and numbers that both sides have, each of them here once.

Templates and kernels are given them; Module and CudaModule read and write by them. Imports nothing of either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pa_compiler.spec import PagedAttentionSpec


class WorkItem(NamedTuple):
    """What a thread computes at a time: all heads of sequences of a chunk, in the blocks [block_begin, block_end).

    Of a sequence's blocks those before its window are in no item; where sequences share one, it begins at the first
    block that one of them sees. num_tokens counts the KV tokens that it reads. A library's plan has a line for each
    item with its fields in this order, which are those of the same names in the C++ struct WorkItem.
    """

    batch_start: int
    num_seqs: int
    block_begin: int
    block_end: int
    num_tokens: int


class AttendItem(NamedTuple):
    """What a thread computes at a time where a sequence has several query tokens: some of them with some kv heads.

    The query tokens token_begin to token_begin + num_query - 1 of the call, the first of which is at position first_pos
    of its sequence, with the query heads of the kv heads kv_head_begin to kv_head_begin + num_kv_heads - 1, over the
    blocks [block_begin, block_end) as far as each of them sees. work counts FLOPs, or, where reading takes longer, what
    could be computed meanwhile.
    """

    seq: int
    token_begin: int
    num_query: int
    first_pos: int
    kv_head_begin: int
    num_kv_heads: int
    block_begin: int
    block_end: int
    work: int


class PrefixItem(NamedTuple):
    """What a thread computes at a time of a prefix that sequences share: some of their query tokens with some kv heads.

    The query tokens token_begin to token_begin + num_query - 1 of the call, be they of one sequence or several, over
    the blocks [block_begin, block_end) of row `prefix` of prefix_table; otherwise as AttendItem.
    """

    prefix: int
    token_begin: int
    num_query: int
    kv_head_begin: int
    num_kv_heads: int
    block_begin: int
    block_end: int
    work: int


THREADING = ("auto", "own", "openmp")
"""Whose threads can run a call of a library for a CPU, in the order of the library's numbers."""

CHECKS = ("host", "device", "none")
"""Who can check the indices of a call of a library for a GPU, in the order of the library's numbers."""

REPORT_CODES = ("nothing", "context_len", "block_id", "slot", "row", "queries", "tree")
"""What a kernel can report to be wrong with the indices of a call, in the order of the codes."""

REPORT_FIELDS = ("code", "index", "position", "value", "limit")
"""The int64 numbers of such a report. index is of a sequence or a token, position in its row of block_table; of a row,
and of a sequence's query tokens, position is where it begins and value where it ends."""

GPU_QUERY_TOKENS = 64
"""Query tokens of a sequence in attend on a GPU, at most: guesses, and no prompts, since each tile of rows reads all
keys."""


class Parameter(NamedTuple):
    """What an entry point of a library takes in one place.

    Attributes:
        name: In Python, in errors and, with a k before it, in the C++.
        dtype: Of an array, a dtype or the spec's property that has it; "" for a number. Indices of a call on a CPU may
            be of either type, and so may masks.
        written: Whether an array is written; of some, the spec's property that says so.
        optional: Whether None may stand for an array.
        of_values: Whether an array holds values: None with shared_kv, where they are in the keys.
        field: Field of the spec that says whether there is an array: None where the spec has it not. "" for all specs.
        of_input: Whether it is an array of the spec's inputs, which all have one type and no other.
        shown: What errors call it, where that is not its name.
        or_float32: Whether an array may be float32 as well.
    """

    name: str
    dtype: str = ""
    written: bool | str = False
    optional: bool = False
    of_values: bool = False
    field: str = ""
    of_input: bool = False
    shown: str = ""
    or_float32: bool = False

    @property
    def said(self) -> str:
        """What errors call it: a caller gives inputs as a mapping."""
        return f"inputs[{self.name.removeprefix(INPUT_PREFIX)!r}]" if self.of_input else self.shown or self.name

    def absent(self, spec: PagedAttentionSpec) -> str:
        """What the spec has, or has not, so that the array has to be None; "" where it has to be one."""
        if self.of_values and spec.shared_kv:
            return "shared_kv"
        return f"no {self.field}" if self.field and not getattr(spec, self.field) else ""

    def is_written(self, spec: PagedAttentionSpec) -> bool:
        """Whether an array is written, of a spec's library."""
        return bool(getattr(spec, self.written) if isinstance(self.written, str) else self.written)

    def dtypes(self, spec: PagedAttentionSpec, on_gpu: bool) -> tuple[str, ...]:
        """The dtypes that an array may have. A CPU's library takes indices of both types, a GPU's as kernels do."""
        if self.of_input:
            return (self.dtype,)
        dtype = getattr(spec, self.dtype, self.dtype)
        if dtype == "bool":
            return ("bool", "uint8")
        if self.or_float32 and dtype != "float32":
            return (dtype, "float32")
        return ("int32", "int64") if dtype in ("int32", "int64") and not on_gpu else (dtype,)


INPUT_PREFIX = "input_"
"""Before the name of an input, the name of a parameter: of an entry point, and of the kernels."""

_DECODE = (
    Parameter("query", "dtype"),
    Parameter("key_cache", "cache_dtype"),
    Parameter("value_cache", "cache_dtype", of_values=True),
    Parameter("block_table", "int32", optional=True),
    Parameter("block_indptr", "int32", optional=True, shown="block_table[0]"),
    Parameter("block_indices", "int32", optional=True, shown="block_table[1]"),
    Parameter("context_lens", "int32"),
    Parameter("out", "result_dtype", written=True),
    Parameter("lse", "float32", written=True, optional=True),
    Parameter("alibi_slopes", "float32", field="alibi"),
    Parameter("sinks", "float32", field="sinks"),
    Parameter("key_scale", "float32", field="kv_dtype"),
    Parameter("value_scale", "float32", field="kv_dtype"),
    Parameter("scale"),
)

_ATTEND = (
    *_DECODE[:7],
    Parameter("query_start_loc", "int32"),
    *_DECODE[7:-1],
    Parameter("tree_mask", "bool", optional=True),
    Parameter("scale"),
    Parameter("causal"),
)

_SHARED_PREFIX = (
    *_DECODE[:3],
    Parameter("prefix_table", "int32"),
    Parameter("prefix_len", "int32"),
    Parameter("prefix_start_loc", "int32", optional=True),
    *_DECODE[3:7],
    Parameter("query_start_loc", "int32", optional=True),
    *_DECODE[7:],
)

_APPEND_KV = (
    Parameter("key", "dtype"),
    Parameter("value", "dtype", of_values=True),
    Parameter("key_cache", "cache_dtype", written=True),
    Parameter("value_cache", "cache_dtype", written=True, of_values=True),
    Parameter("slot_mapping", "int64"),
    Parameter("key_scale", "float32", written="token_scales", field="kv_dtype"),
    Parameter("value_scale", "float32", written="token_scales", field="kv_dtype"),
)

_MERGE_STATES = (
    Parameter("outs", "result_dtype", or_float32=True),
    Parameter("lses", "float32"),
    Parameter("out", "result_dtype", written=True),
    Parameter("lse", "float32", written=True, optional=True),
)

_THREADS = (Parameter("num_threads"), Parameter("threading"), Parameter("cpus"))
_CHECK = (Parameter("check"),)
_AS_UINT16 = (Parameter("as_uint16"),)

CPU_ENTRY_POINTS: Mapping[str, tuple[Parameter, ...]] = {
    "decode": (*_DECODE, *_THREADS, *_AS_UINT16),
    "attend": (*_ATTEND, *_THREADS, *_AS_UINT16),
    "attend_shared_prefix": (*_SHARED_PREFIX, *_THREADS, *_AS_UINT16),
    "append_kv": (*_APPEND_KV, *_THREADS, *_AS_UINT16),
    "merge_states": (*_MERGE_STATES, *_THREADS, *_AS_UINT16),
    "plan": (Parameter("context_lens", "int32"),),
    "attend_plan": (
        Parameter("context_lens", "int32"),
        Parameter("query_start_loc", "int32"),
        Parameter("num_threads"),
    ),
    "shared_prefix_plan": (
        Parameter("context_lens", "int32"),
        Parameter("query_start_loc", "int32", optional=True),
        Parameter("prefix_len", "int32"),
        Parameter("prefix_start_loc", "int32", optional=True),
        Parameter("num_threads"),
    ),
    "cpu_set": (Parameter("cpus", "int32"),),
    "openmp": (),
    "view_as_bfloat16": (Parameter("tensor", "uint16"),),
}
"""The functions of a library for a CPU, with what each takes, in order. Not every library has attend,
attend_shared_prefix and merge_states.

Arrays come first. Where the last parameter is as_uint16, bit i of it says that parameter i is an array of bfloat16 that
is declared uint16, for libraries that have no bfloat16 in DLPack.
"""


def with_inputs(parameters: tuple[Parameter, ...], spec: PagedAttentionSpec) -> tuple[Parameter, ...]:
    """The parameters of decode, or attend, for a spec: behind the other arrays those of its inputs, in their order."""
    of_inputs = (Parameter(f"{INPUT_PREFIX}{each.name}", each.dtype, of_input=True) for each in spec.inputs)
    arrays = sum(bool(parameter.dtype) for parameter in parameters)
    return (*parameters[:arrays], *of_inputs, *parameters[arrays:])


CUDA_ENTRY_POINTS: Mapping[str, tuple[Parameter, ...]] = {
    "decode": (*_DECODE, *_CHECK, *_AS_UINT16),
    "attend": (*_ATTEND, *_CHECK, *_AS_UINT16),
    "append_kv": (*_APPEND_KV, *_CHECK, *_AS_UINT16),
    "merge_states": (*_MERGE_STATES, *_AS_UINT16),
    "check_status": (),
}
"""The same of a library for a GPU. Not every one has attend or merge_states."""
