"""Module: a compiled library, loaded. Neither loading nor decoding imports TVM."""

from __future__ import annotations

import copy
import math
import os
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tvm_ffi

from pa_compiler.interface import CPU_ENTRY_POINTS, Parameter, WorkItem, with_inputs
from pa_compiler.runtime import files, manifest, memory, results, threads, torch_tensors
from pa_compiler.runtime.arguments import NUMPY_DTYPES, input_arrays, real_number, whole_number
from pa_compiler.runtime.dlpack import as_tensor
from pa_compiler.runtime.entry_points import EntryPoint
from pa_compiler.runtime.loader import open_library
from pa_compiler.runtime.thread_settings import ThreadSettings

if TYPE_CHECKING:
    from pa_compiler.verification.verify import Verification


class Module(ThreadSettings):
    """Compiled paged decode attention for one spec.

    Made by pa_compiler.compile and pa_compiler.load; for a GPU it is a CudaModule. Calls from several threads at once
    are safe and independent. It can be pickled and copied, sources and settings with it.

    Attributes:
        manifest: What the library says of itself, spec, pipeline and target among it.
        spec: The PagedAttentionSpec that it was compiled for.
        pipeline: "fused" or "staged".
        target: The TVM target dict that it was compiled for.
        sources: The text of each stage, in order: tensorir, scheduled, host, llvm, asm; for a GPU tensorir, cuda, host,
            ptx, and sass where there was a disassembler (staged, scheduled too). Empty for a loaded module.
        num_threads: Threads that a call uses at most. Results are bitwise the same for every value.
        threading: Whose threads they are: "auto", "own" or "openmp".
        cpus: CPUs that the module's own threads run on.
    """

    _entry_points: Mapping[str, tuple[Parameter, ...]] = CPU_ENTRY_POINTS
    _on_gpu = False

    def __init__(
        self,
        library: bytes,
        about: manifest.Manifest,
        functions: tvm_ffi.Module,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self._library = library
        self.manifest = about
        self._functions = functions
        self.spec = self.manifest.spec
        self.pipeline = self.manifest.pipeline
        self.target = self.manifest.target
        self.sources: Mapping[str, str] = types.MappingProxyType(dict(sources or {}))
        self._set_up()
        self._default_scale = 1.0 / math.sqrt(self.spec.head_dim)
        self._out_dtype = self.spec.result_dtype
        self._decode, self._append_kv = self._entry_point("decode"), self._entry_point("append_kv")

    def __repr__(self) -> str:
        made_for = self.target.get("mcpu") or self.target.get("arch")
        return f"{type(self).__name__}({self.spec}, pipeline={self.pipeline!r}, target={made_for!r})"

    def _entry_point(self, name: str) -> EntryPoint:
        parameters = self._entry_points[name]
        if name == "decode":
            parameters = with_inputs(parameters, self.spec)
        return EntryPoint(self._functions[name], parameters, self.spec, self._on_gpu)

    def _set_up(self) -> None:
        """Settings of a new module, from the environment."""
        self._use(threads.from_environment())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies are made of the library, as load() would make them, with sources and settings."""
        return _again, (type(self), self._library, dict(self.sources), self._settings)

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
                past those that its length needs may hold anything, as may those before the spec's window.
            context_lens: [batch], int32 or int64: tokens of each sequence, 0 to max_blocks * block_size.
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
            out = self._new_like(query, self._out_dtype, (self.spec.num_heads, self.spec.result_dim))
        if return_lse and lse is None:
            lse = self._new_like(query, "float32", (self.spec.num_heads,))
        arrays = (query, key_cache, value_cache, block_table, context_lens, out, lse, alibi_slopes, sinks)
        if inputs is not None or self.spec.inputs:
            arrays += input_arrays(self.spec, inputs)
        self._decode.call(arrays, (scale, *self._manner(check, "decode")))
        return out if lse is None else (out, lse)

    def append_kv(
        self,
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slot_mapping: Any,
        *,
        check: str | None = None,
    ) -> None:
        """Write the keys and values of new tokens into their slots of the paged cache, bit for bit.

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
            check: Who checks slot_mapping, as for decode.

        Raises:
            TypeError, ValueError: as decode: rank, shape, strides, alignment, device, check, kinds of arrays, or a
                cache with a byte of another array.
            IndexError: an entry of slot_mapping is neither -1 nor in [0, num_blocks * block_size).
            RuntimeError: this CPU lacks features that the module is built for.
            Everything is checked before anything is written; contents of the arrays must not change meanwhile.
        """
        self._append_kv.call((key, value, key_cache, value_cache, slot_mapping), self._manner(check, "append_kv"))

    def _manner(self, check: str | None, of: str) -> tuple[int, ...]:
        """The numbers that tell the library how to go about a call of decode or append_kv; for a CPU, the threads."""
        if check not in (None, "host"):
            raise ValueError(f"check: expected 'host' for a CPU module, got {check!r}")
        return self._thread_numbers

    def empty_cache(self, num_blocks: int, *, like: str = "numpy") -> tuple[Any, Any]:
        """New key and value caches of num_blocks blocks in kv_layout, all 0. With shared_kv the second is None.

        Each begins at a multiple of 2 MB, on huge pages where the system has transparent ones, from which decode reads
        faster. Memory is taken when it is first written, and given back with the last view of the array.

        Args:
            num_blocks: From 1 on.
            like: "numpy" for NumPy arrays, "torch" for tensors of torch.

        Raises:
            TypeError, ValueError: num_blocks is not a whole number from 1 on, or like neither of these.
            MemoryError: the system does not give that much.
            ImportError: there is no torch.
        """
        num_blocks = whole_number("num_blocks", num_blocks, 1)
        if like not in ("numpy", "torch"):
            raise ValueError(f"like: expected 'numpy' or 'torch', got {like!r}")
        return self._caches(num_blocks, lambda shape: self._zeros(shape, like))

    def _zeros(self, shape: tuple[int, ...], like: str) -> Any:
        array = memory.huge_zeros(shape, NUMPY_DTYPES[self.spec.dtype])
        return torch_tensors.from_numpy(array) if like == "torch" else array

    def _caches(self, num_blocks: int, make: Callable[[tuple[int, ...]], Any]) -> tuple[Any, Any]:
        """Key and value caches of num_blocks blocks, each made of its shape; with shared_kv, the one that there is."""
        _, *key_block = self.spec.key_cache_shape
        _, *value_block = self.spec.value_cache_shape
        key_cache = make((num_blocks, *key_block))
        return key_cache, None if self.spec.shared_kv else make((num_blocks, *value_block))

    def plan(self, context_lens: Any) -> list[WorkItem]:
        """The work items that decode runs for these lengths, in the order in which they are dealt to threads.

        A pure function of the lengths, [batch], int32 or int64: no kernel runs. Blocks that a window hides are in none
        of them. Errors are decode's.
        """
        lines = self._functions["plan"](as_tensor("context_lens", context_lens)).splitlines()
        return [WorkItem(*map(int, line.split())) for line in lines]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the shared library to a file. It needs tvm-ffi (and GCC's run-time libraries) to run, not TVM.

        A file that is there is replaced by one rename and keeps its permissions; a symbolic link stays, and what it
        leads to is written; into a pipe or a character device, such as /dev/null, the bytes are written.

        Raises:
            OSError: path is a directory, a block device or a socket, or the file system refuses something.
        """
        files.write(path, self._library)

    def verify(
        self,
        seconds: float = 10,
        *,
        seed: int | None = None,
        draw: int | None = None,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        advance: Callable[[int], object] = lambda milliseconds: None,
    ) -> Verification:
        """Compare decode and append_kv with the float64 reference on random calls that the spec allows.

        Lengths of 0 and 1, at the ends of blocks and long ones; blocks anywhere, NaN in all that is not to be read;
        huge scores; arrays as views, at any number of threads.

        Args:
            seconds: Draws until so much time has passed; one draw at least.
            seed: Of the draws; a new one where it is None.
            draw: The one draw to make, as a failure names it beside its seed.
            score_mod: The function of the spec, where the module was loaded: the reference calls it.
            mask_mod: Likewise.
            advance: Called with the milliseconds that a draw took, for a progress bar.

        Returns:
            The draws, the worst errors, and what failed, each with the line that draws it again.

        Raises:
            TypeError, ValueError: a bad argument; or no function, or another, where the spec has one.
            RuntimeError: this CPU lacks features that the module is compiled for.
        """
        from pa_compiler.verification import verify
        from pa_compiler.verification.functions import with_functions

        module = copy.copy(self)
        module.spec = with_functions(self.spec, score_mod, mask_mod)
        return verify.verify(module, seconds, seed=seed, draw=draw, advance=advance)

    def _new_like(self, query: Any, dtype: str, extents: tuple[int, ...]) -> Any:
        return results.new_like(query, dtype, extents, self._functions)


def _again(kind: type[Module], library: bytes, sources: Mapping[str, str], settings: Mapping[str, Any]) -> Module:
    """The module that a pickle or a copy stands for."""
    about = manifest.read(library, "module.so")
    module = kind(library, about, open_library(library, "module.so"), sources)
    for name, value in settings.items():
        setattr(module, name, value)
    return module
