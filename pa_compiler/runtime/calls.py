"""The calls of a library that take arrays of queries, keys and values: decode, attend and append_kv."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pa_compiler.runtime.arguments import block_tables, input_arrays, real_number
from pa_compiler.runtime.shared_prefix import SharedPrefix


class Calls(SharedPrefix):
    """The calls of a Module, which says what they have in common."""

    def _open(self) -> None:
        """Look the functions up. Not every library has attend, attend_shared_prefix and merge_states."""
        self._default_scale = 1.0 / math.sqrt(self.spec.head_dim)
        self._decode, self._append_kv = self._entry_point("decode"), self._entry_point("append_kv")
        self._attend, self._attend_shared_prefix = self._found("attend"), self._found("attend_shared_prefix")
        self._merge_states = self._found("merge_states")

    def decode(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        scale: Any = None,
        out: Any = None,
        *,
        lse: Any = None,
        return_lse: bool = False,
        alibi_slopes: Any = None,
        sinks: Any = None,
        key_scale: Any = None,
        value_scale: Any = None,
        inputs: Mapping[str, Any] | None = None,
        check: str | None = None,
    ) -> Any:
        """Attend from one query token of each sequence to its context in the paged cache.

        Arrays are NumPy arrays (bfloat16 as ml_dtypes.bfloat16), torch CPU tensors, or anything with DLPack. They are
        taken as they are, never copied: only the last axis must be contiguous, and data aligned to its elements. Where
        bfloat16 is read in pairs (an even head_dim, but not in a staged module of NHD or HND) the other strides of the
        caches must be even. What is written must be known to be writable: NumPy's, torch's, tvm-ffi's, or an array
        that says so by DLPack 1. Indices that are int64 for a CPU are read once, as they are checked.

        Args:
            query: [batch, num_heads, head_dim], dtype.
            key_cache: NHD [num_blocks, block_size, num_kv_heads, head_dim] or HND [num_blocks, num_kv_heads,
                block_size, head_dim], dtype. Slots past a sequence's length are never read into the result.
            value_cache: As key_cache, with value_dim in place of head_dim. None with shared_kv: the value of a token is
                the first value_dim elements of its key.
            block_table: [batch, max_blocks], int32 or int64: the block ids of each sequence's context in order. Entries
                past those that its length needs may hold anything, as may those before the spec's window. Or a pair
                (indptr, indices), [batch + 1] and [n]: those of sequence b are indices[indptr[b] : indptr[b + 1]].
            context_lens: [batch], int32 or int64: tokens of each sequence, from 0 to those that its blocks hold.
            scale: Factor on the scores, finite as a float32, a number or an array of no axes; by default
                1 / sqrt(head_dim). Products of queries with keys may be beyond float32 where the scores are not.
            out: [batch, num_heads, value_dim] or [batch, num_heads * value_dim], out_dtype, written and returned; by
                default a new array [batch, num_heads, value_dim] of query's kind.
            lse: [batch, num_heads], float32, written like out. Giving it implies return_lse.
            return_lse: Whether to return lse as well: the logarithm (natural) of the softmax's denominator, with sinks
                exp(sink) among its terms.
            alibi_slopes: [num_heads], float32, where the spec has alibi: slope * (key position - query position) is
                added to a head's scores. The query is at the last position of its sequence.
            sinks: [num_heads], float32, where the spec has sinks: one more score of each head, that has no value.
            key_scale: [1], [num_kv_heads] or [num_blocks, num_kv_heads, block_size], float32, where the spec has a
                kv_dtype: what each code of key_cache counts, as its kv_scale says. Those of slots without a token that
                is seen may be anything.
            value_scale: The same of value_cache.
            inputs: {name: array} of what the spec's functions read, with its dtypes and shapes for them, where
                "batch" is that of query. Elements lie side by side, in C's order.
            check: Who checks context_lens and block_table: "host", and for a CPU nothing else (CudaModule).

        Returns:
            out, or (out, lse). A sequence of length 0, and a head of which every score is -inf, gives out 0 and lse
            -inf, or with sinks the sink. Averages of float32 values up to 3.4e38 in magnitude, and of all other types',
            are finite unless out_dtype ends before.

        Raises:
            TypeError: an argument is not an array, has another dtype, or is a tensor of torch that is not dense; or
                value_cache is given with shared_kv, or is None without; or alibi_slopes or sinks are given where the
                spec has none, or are None where it has; or inputs has other names than the spec's.
            ValueError: rank, shape, strides, alignment, device, a length, scale, check, or out or lse with a byte of
                another array. An array that has no memory (freed, or of torch's tracing), is to be written and not
                known to be writable, is a negated view or to have a gradient.
            IndexError: a block id that is used is outside [0, num_blocks).
            RuntimeError: this CPU lacks features that the module is built for.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        scale = self._default_scale if scale is None else real_number("scale", scale)
        if out is None:
            out = self._new_like(query, self.spec.result_dtype, (self.spec.num_heads, self.spec.result_dim))
        if return_lse and lse is None:
            lse = self._new_like(query, "float32", (self.spec.num_heads,))
        is_table = type(block_table) is not tuple and block_table is not None
        tables = (block_table, None, None) if is_table else block_tables(block_table)
        arrays = (
            query,
            key_cache,
            value_cache,
            *tables,
            context_lens,
            out,
            lse,
            alibi_slopes,
            sinks,
            key_scale,
            value_scale,
        )
        if inputs is not None or self.spec.inputs:
            arrays += input_arrays(self.spec, inputs)
        self._decode.call(arrays, (scale, *self._manner(check, "decode")))
        return out if lse is None else (out, lse)

    def attend(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        query_start_loc: Any,
        scale: Any = None,
        out: Any = None,
        *,
        lse: Any = None,
        return_lse: bool = False,
        causal: bool = True,
        tree_mask: Any = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        key_scale: Any = None,
        value_scale: Any = None,
        inputs: Mapping[str, Any] | None = None,
        check: str | None = None,
    ) -> Any:
        """Attend from any number of query tokens of each sequence: prompts, chunks of them, guesses, and single tokens.

        The query tokens of a sequence are its last: of n, token i is at position context_len - n + i. Its own keys and
        values are in the cache already. What a query token gets depends on its sequence and its position, and not on
        the batch, the threads, or how a prompt was cut into chunks of two tokens or more. A single token gets what
        decode gives, bit for bit. Staged, and with an invariant spec, a token of a chunk gets the same.

        Args:
            query: [num_tokens, num_heads, head_dim], dtype: the query tokens of one sequence after another.
            key_cache: As for decode.
            value_cache: As for decode.
            block_table: As for decode. Of a sequence with several query tokens all entries are used from the first to
                the last with a token that one of these sees; where the spec's mask_mod leaves keys in several places,
                for each of these. Of a sequence without query tokens, none.
            context_lens: [batch], int32 or int64: tokens of each sequence, its query tokens among them.
            query_start_loc: [batch + 1], int32 or int64, from 0 to num_tokens: where the query tokens of each sequence
                begin, and those of the last one end.
            scale: As for decode.
            out: [num_tokens, num_heads, value_dim] or [num_tokens, num_heads * value_dim], else as for decode.
            lse: [num_tokens, num_heads], float32, else as for decode.
            return_lse: Whether to return lse as well.
            causal: Whether a query token sees nothing after its own position. Otherwise it sees all of its sequence, as
                far as the spec's window and mask_mod leave it.
            tree_mask: [sum of n * n], bool or uint8: for each sequence a matrix [n, n], row after row, of which of its
                query tokens (columns) each of them (rows) sees, be it itself. All see the context before them, and of
                both what the spec's window and mask_mod leave. Only with causal.
            alibi_slopes: As for decode.
            sinks: As for decode.
            key_scale: As for decode.
            value_scale: As for decode.
            inputs: As for decode, where "batch" is that of context_lens.
            check: As for decode.

        Returns:
            out, or (out, lse). A query token that sees no key, and a head of which every score is -inf, gives out 0 and
            lse -inf, or with sinks the sink.

        Raises:
            NotImplementedError: the library has no attend: one compiled with attend=False, or staged for a GPU.
            TypeError: as decode.
            ValueError: as decode; or query_start_loc falls, does not begin at 0 or end at num_tokens, or gives a
                sequence more query tokens than it has tokens; or tree_mask has another size, or causal is not set.
            IndexError, RuntimeError: as decode.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        if self._attend is None:
            raise NotImplementedError(self._lacks_attend())
        scale = self._default_scale if scale is None else real_number("scale", scale)
        if out is None:
            out = self._new_like(query, self.spec.result_dtype, (self.spec.num_heads, self.spec.result_dim))
        if return_lse and lse is None:
            lse = self._new_like(query, "float32", (self.spec.num_heads,))
        is_table = type(block_table) is not tuple and block_table is not None
        tables = (block_table, None, None) if is_table else block_tables(block_table)
        arrays: tuple[Any, ...] = (query, key_cache, value_cache, *tables, context_lens, query_start_loc, out, lse)
        arrays += (alibi_slopes, sinks, key_scale, value_scale, tree_mask)
        if inputs is not None or self.spec.inputs:
            arrays += input_arrays(self.spec, inputs)
        self._attend.call(arrays, (scale, int(bool(causal)), *self._manner(check, "attend")))
        return out if lse is None else (out, lse)

    most_query_tokens: int | None = None
    """Query tokens that a sequence may have in attend; None where any number."""

    @property
    def has_attend(self) -> bool:
        """Whether the library has attend: those that are compiled with it, but for the staged pipeline on a GPU."""
        return self._attend is not None

    def _lacks_attend(self) -> str:
        is_staged = self._on_gpu and self.pipeline == "staged"
        which = "of the staged pipeline for a GPU" if is_staged else "compiled with attend=False"
        return f"attend: expected a module compiled with attend=True, got one {which}"

    def append_kv(
        self,
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slot_mapping: Any,
        *,
        key_scale: Any = None,
        value_scale: Any = None,
        check: str | None = None,
    ) -> None:
        """Write the keys and values of new tokens into their slots of the paged cache, bit for bit or as codes.

        Arrays are of the same kinds as decode's, and as free in their strides. Tokens are written in their order: where
        two have the same slot the later stays, at any number of threads.

        Args:
            key: [num_tokens, num_kv_heads, head_dim], dtype.
            value: [num_tokens, num_kv_heads, value_dim], dtype. None with shared_kv, where a token's value is in its
                key.
            key_cache: In kv_layout, as for decode, written. It may share one buffer with value_cache, block beside
                block or row beside row; and, where keys and values are of one size, the same blocks, if no slot that is
                written of the one is one of the other.
            value_cache: In kv_layout, as for decode, written. None with shared_kv.
            slot_mapping: [num_tokens], int32 or int64: block id * block_size + the slot in the block, where the token
                goes. -1 skips the token.
            key_scale: As for decode, where the spec has a kv_dtype. Of "token_head" written: max |key| / 127 of each
                head of each token. Otherwise read: a code is the one nearest to key / key_scale.
            value_scale: The same for value.
            check: Who checks slot_mapping, as for decode.

        Raises:
            TypeError, ValueError: as decode: rank, shape, strides, alignment, device, check, kinds of arrays, or a
                cache with a byte of another array.
            IndexError: an entry of slot_mapping is neither -1 nor in [0, num_blocks * block_size).
            RuntimeError: this CPU lacks features that the module is built for.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        arrays = (key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
        self._append_kv.call(arrays, self._manner(check, "append_kv"))
