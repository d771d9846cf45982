"""attend_shared_prefix: the call in which what the sequences of a batch begin with alike is read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pa_compiler.runtime.arguments import block_tables, input_arrays, real_number, whole_number
from pa_compiler.runtime.dlpack import as_tensor
from pa_compiler.runtime.entry_points import EntryPoint
from pa_compiler.runtime.merging import Merging


class SharedPrefix(Merging):
    """The call of a Module that has prefixes beside sequences."""

    _attend_shared_prefix: EntryPoint | None
    _default_scale: float

    def attend_shared_prefix(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        prefix_table: Any,
        prefix_len: Any,
        block_table: Any,
        context_lens: Any,
        query_start_loc: Any = None,
        scale: Any = None,
        out: Any = None,
        *,
        prefix_start_loc: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        alibi_slopes: Any = None,
        sinks: Any = None,
        key_scale: Any = None,
        value_scale: Any = None,
        inputs: Mapping[str, Any] | None = None,
        check: str | None = None,
    ) -> Any:
        """Attend, as decode and attend do, where sequences begin with the same tokens: those are read once for all.

        The query tokens of all sequences that share a prefix are taken over its keys together, those of each sequence
        over its own keys, and the two are merged. Sequences are as without the prefix: context_lens counts its tokens,
        and positions, and with them windows, ALiBi and functions of scores, are those of the whole sequence. So a call
        of decode or attend becomes one of this by what it is given besides.

        Args:
            query: [num_tokens, num_heads, head_dim], dtype: the query tokens of one sequence after another.
            key_cache: As for decode.
            value_cache: As for decode.
            prefix_table: [num_prefixes, max_prefix_blocks], int32 or int64: the block ids of each prefix in order; of
                one prefix also [max_prefix_blocks]. Used are those from the first to the last of which one of its query
                tokens sees a key; other entries may hold anything.
            prefix_len: Tokens of the prefix, an int; or of each prefix, [num_prefixes], int32 or int64. Whole blocks: a
                multiple of block_size, or 0.
            block_table: As for attend, a table or a pair. A sequence's entries for its prefix have their places in its
                row, but may hold anything; the blocks after them are its own, or shared with others, or the prefix's.
            context_lens: [batch], int32 or int64: tokens of each sequence, those of its prefix and its query tokens
                among them. Its query tokens are its last, and all of them after the prefix.
            query_start_loc: As for attend; None where each sequence has one query token, as in decode.
            scale: As for decode.
            out: As for attend.
            prefix_start_loc: [num_prefixes + 1], int32 or int64, from 0 to batch: sequences prefix_start_loc[p] to
                prefix_start_loc[p + 1] - 1 share prefix p. None: all share the one that there is.
            lse: As for attend.
            return_lse: Whether to return lse as well.
            alibi_slopes: As for decode.
            sinks: As for decode, once for each query token.
            key_scale: As for decode.
            value_scale: As for decode.
            inputs: As for decode, where "batch" is that of context_lens.
            check: As for decode.

        Returns:
            out, or (out, lse), as attend, causal, gives them but for the order of sums: bits go by the sequence, its
            prefix and the token's position, and not by the batch or the threads.

        Raises:
            NotImplementedError: the library was compiled without shared_prefix=True.
            TypeError: as attend.
            ValueError: as attend; or prefix_len is longer than its row of prefix_table or has no whole blocks, a
                sequence has no room for its query tokens after its prefix, prefix_start_loc falls, does not begin at 0
                or end at the batch, or is None beside several prefixes, or query_start_loc is None where there are not
                as many query tokens as sequences.
            IndexError: as decode, of block_table or prefix_table.
            RuntimeError: as decode.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        if self._attend_shared_prefix is None:
            raise NotImplementedError(_LACKING)
        scale = self._default_scale if scale is None else real_number("scale", scale)
        if out is None:
            out = self._new_like(query, self.spec.result_dtype, (self.spec.num_heads, self.spec.result_dim))
        if return_lse and lse is None:
            lse = self._new_like(query, "float32", (self.spec.num_heads,))
        is_table = type(block_table) is not tuple and block_table is not None
        tables = (block_table, None, None) if is_table else block_tables(block_table)
        arrays: tuple[Any, ...] = (query, key_cache, value_cache, prefix_table, prefix_lengths(prefix_len))
        arrays += (
            prefix_start_loc,
            *tables,
            context_lens,
            query_start_loc,
            out,
            lse,
            alibi_slopes,
            sinks,
            key_scale,
            value_scale,
        )
        if inputs is not None or self.spec.inputs:
            arrays += input_arrays(self.spec, inputs)
        self._attend_shared_prefix.call(arrays, (scale, *self._manner(check, "attend_shared_prefix")))
        return out if lse is None else (out, lse)

    @property
    def has_attend_shared_prefix(self) -> bool:
        """Whether the library has attend_shared_prefix: where it was compiled with it."""
        return self._attend_shared_prefix is not None

    def _shared_prefix_plan(self, lens: Any, starts: Any, prefix_len: Any, prefix_start_loc: Any) -> str:
        """The text of its plan."""
        if self._attend_shared_prefix is None:
            raise NotImplementedError(_LACKING)
        prefixes = as_tensor("prefix_len", prefix_lengths(prefix_len))
        groups = None if prefix_start_loc is None else as_tensor("prefix_start_loc", prefix_start_loc)
        return str(self._functions["shared_prefix_plan"](lens, starts, prefixes, groups, self.num_threads))


_LACKING = "attend_shared_prefix: expected a module compiled with shared_prefix=True, got one without"


def prefix_lengths(given: Any) -> Any:
    """prefix_len as libraries take it: of one prefix, an int becomes an array.

    Raises:
        TypeError, ValueError: a number that is no int from 0 to 2**63 - 1.
    """
    if hasattr(given, "shape") and given.shape != ():
        return given
    if hasattr(given, "__dlpack__") and not hasattr(given, "shape"):
        return given
    return np.array([whole_number("prefix_len", given, 0, 2**63 - 1)])
