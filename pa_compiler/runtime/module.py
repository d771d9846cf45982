"""Module: a compiled library, loaded. Neither loading nor decoding imports TVM."""

from __future__ import annotations

import copy
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pa_compiler.interface import AttendItem, PrefixItem, WorkItem
from pa_compiler.key_ranges import decodes_by_attend
from pa_compiler.runtime import files, manifest, memory, threads, torch_tensors
from pa_compiler.runtime.arguments import NUMPY_DTYPES, whole_number
from pa_compiler.runtime.calls import Calls
from pa_compiler.runtime.dlpack import as_tensor
from pa_compiler.runtime.elsewhere import Functions
from pa_compiler.runtime.loader import open_library

if TYPE_CHECKING:
    from pa_compiler.verification.verify import Verification


class Module(Calls):
    """Compiled paged attention for one spec.

    Made by pa_compiler.compile and pa_compiler.load; for a GPU it is a CudaModule. Calls from several threads at once
    are safe and independent. It can be pickled and copied, sources and settings with it.

    Attributes:
        manifest: What the library says of itself, spec, pipeline and target among it.
        spec: The PagedAttentionSpec that it was compiled for.
        pipeline: "fused" or "staged".
        target: The TVM target dict that it was compiled for.
        checksum: The SHA-256 of the library, in hexadecimal.
        sources: The text of each stage, in order: tensorir, scheduled, host, llvm, asm; for a GPU tensorir, cuda, host,
            ptx, and sass where there was a disassembler (staged, scheduled too). Empty for a loaded module.
        num_threads: Threads that a call uses at most. Results are bitwise the same for every value.
        threading: Whose threads they are: "auto", "own" or "openmp".
        cpus: CPUs that the module's own threads run on.
    """

    def __init__(
        self,
        library: bytes,
        about: manifest.Manifest,
        functions: Functions,
        sources: Mapping[str, str] | None = None,
        links: str = "",
    ) -> None:
        self._library = library
        self.manifest = about
        self._functions = functions
        self.spec = self.manifest.spec
        self.pipeline = self.manifest.pipeline
        self.target = self.manifest.target
        self.sources: Mapping[str, str] = types.MappingProxyType(dict(sources or {}))
        self._links = links
        self._set_up()
        self._open()

    def __repr__(self) -> str:
        made_for = self.target.get("mcpu") or self.target.get("arch")
        return f"{type(self).__name__}({self.spec}, pipeline={self.pipeline!r}, target={made_for!r})"

    def _set_up(self) -> None:
        """Settings of a new module, from the environment."""
        self._use(threads.from_environment())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies are made of the library, as load() would make them, with sources and settings."""
        return _again, (type(self), self._library, dict(self.sources), self._settings, self._links)

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
        num_blocks = _checked_new(num_blocks, like)
        return self._caches(num_blocks, lambda shape: self._zeros(shape, like))

    def empty_scales(self, num_blocks: int, *, like: str = "numpy") -> tuple[Any, Any]:
        """New key_scale and value_scale, float32, for caches of num_blocks blocks.

        Where append_kv makes scales, of "token_head", [num_blocks, num_kv_heads, block_size] of 0. Otherwise 1 for each
        of [1], or of [num_kv_heads]: a code is then a number by itself.

        Args:
            num_blocks: From 1 on.
            like: As for empty_cache.

        Raises:
            TypeError, ValueError, MemoryError, ImportError: as empty_cache.
            NotImplementedError: the caches hold dtype, without scales.
        """
        shape, number = self._new_scales(_checked_new(num_blocks, like))
        scales = [np.full(shape, number, np.float32) for _ in range(2)]
        key_scale, value_scale = map(torch_tensors.from_numpy, scales) if like == "torch" else scales
        return key_scale, value_scale

    def _new_scales(self, num_blocks: int) -> tuple[tuple[int, ...], float]:
        """The shape of new scales of keys, or of values, and the number that all of them are."""
        if not self.spec.has_scales:
            raise NotImplementedError("empty_scales: expected a spec with a kv_dtype, got one without")
        shape = tuple(num_blocks if isinstance(extent, str) else extent for extent in self.spec.scale_shape)
        return shape, 0.0 if self.spec.token_scales else 1.0

    def _zeros(self, shape: tuple[int, ...], like: str) -> Any:
        array = memory.huge_zeros(shape, NUMPY_DTYPES[self.spec.cache_dtype])
        return torch_tensors.from_numpy(array) if like == "torch" else array

    def _caches(self, num_blocks: int, make: Callable[[tuple[int, ...]], Any]) -> tuple[Any, Any]:
        """Key and value caches of num_blocks blocks, each made of its shape; with shared_kv, the one that there is."""
        _, *key_block = self.spec.key_cache_shape
        _, *value_block = self.spec.value_cache_shape
        key_cache = make((num_blocks, *key_block))
        return key_cache, None if self.spec.shared_kv else make((num_blocks, *value_block))

    @overload
    def plan(self, context_lens: Any, query_start_loc: None = None) -> list[WorkItem]: ...

    @overload
    def plan(self, context_lens: Any, query_start_loc: Any) -> list[WorkItem | AttendItem]: ...

    @overload
    def plan(
        self, context_lens: Any, query_start_loc: Any = None, prefix_len: Any = ..., prefix_start_loc: Any = None
    ) -> list[WorkItem | AttendItem | PrefixItem]: ...

    def plan(
        self, context_lens: Any, query_start_loc: Any = None, prefix_len: Any = None, prefix_start_loc: Any = None
    ) -> Any:
        """The work items that decode runs for these lengths, in the order in which they are dealt to threads.

        With query_start_loc those that attend runs, causal and without a tree, at up to num_threads threads: WorkItems
        of sequences with one query token, and AttendItems of the others. With prefix_len those of attend_shared_prefix:
        PrefixItems, and then what the sequences have of their own. A pure function of these: no kernel runs. Blocks
        that a window hides are in none of them. Where the spec is invariant and decode runs what attend does, all are
        AttendItems.

        Args:
            context_lens: [batch], int32 or int64.
            query_start_loc: [batch + 1], int32 or int64.
            prefix_len: As for attend_shared_prefix, as is prefix_start_loc.
            prefix_start_loc: Only with prefix_len.

        Raises:
            NotImplementedError, TypeError, ValueError: as decode, attend and attend_shared_prefix.
        """
        lens = as_tensor("context_lens", context_lens)
        if query_start_loc is None and prefix_len is None and decodes_by_attend(self.spec, self.pipeline):
            query_start_loc = np.arange(math.prod(lens.shape) + 1)
        starts = None if query_start_loc is None else as_tensor("query_start_loc", query_start_loc)
        if prefix_len is not None:
            text = self._shared_prefix_plan(lens, starts, prefix_len, prefix_start_loc)
        elif prefix_start_loc is not None:
            raise TypeError("prefix_start_loc: expected None without prefix_len, got an array")
        elif starts is None:
            text = self._functions["plan"](lens)
        elif self._attend is None:
            raise NotImplementedError(self._lacks_attend())
        else:
            text = self._functions["attend_plan"](lens, starts, self.num_threads)
        rows = (tuple(map(int, line.split())) for line in text.splitlines())
        return [_ITEMS[len(row)](*row) for row in rows]

    @property
    def checksum(self) -> str:
        """The SHA-256 that the library carries, in hexadecimal: that of its contents."""
        return manifest.checksum(self._library)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the shared library to a file. It needs tvm-ffi (and GCC's run-time libraries) to run, not TVM.

        A file that is there is replaced by one rename and keeps its permissions; a symbolic link stays, and what it
        leads to is written; into a pipe or a character device, such as /dev/null, the bytes are written.

        Raises:
            OSError: path is a directory, a block device or a socket, or the file system refuses something.
        """
        files.write(path, self._library)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        context_lens: Sequence[int] | None = None,
        query_lens: Sequence[int] | None = None,
        flops: float | None = None,
        bandwidth: float | None = None,
        measure: bool = False,
    ) -> None:
        """Write a page that shows the module: one HTML file that needs no other.

        Its stages side by side, linked by what LLVM's debug locations say; what bounds its inner loops; the plan of a
        call; why it is compiled so; and its manifest. A module that was loaded has no texts of stages to show. It
        needs the packages of the extra `compiler`, and neither TVM nor a compiler, but for limits that are measured and
        predictions.

        Args:
            path: The file, written as by save.
            context_lens: Tokens of each sequence of the call whose plan is shown; by default those of four.
            query_lens: Query tokens of each, of a call of attend; None for one of decode.
            flops: GFLOP/s of float32 of one core, for the roofline and its bound: from 1e-6 to 1e12.
            bandwidth: GB/s that one core reads, likewise.
            measure: Whether to time that call on one thread, on random inputs in memory, and to predict it where the
                model knows the CPU; also to measure flops and bandwidth where they are not given.

        Raises:
            TypeError, ValueError: a bad argument, lengths or measuring for a module of a GPU, or measuring no tokens.
            NotImplementedError: query_lens for a module that has no attend.
            ImportError: a package of the extra `compiler` is missing.
            OSError: as save.
        """
        from pa_compiler.report import making

        made = making.made(self, context_lens, query_lens, flops, bandwidth, measure)
        files.write(path, made.encode())

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
        """Compare decode, attend and append_kv with the float64 reference on random calls that the spec allows.

        And attend_shared_prefix and merge_states, where the library has them.

        Lengths of 0 and 1, at the ends of blocks and long ones; blocks anywhere, NaN in all that is not to be read;
        huge scores; arrays as views, at any number of threads.

        Args:
            seconds: Draws until so much time has passed; one draw at least. One that has begun is finished, and
                one of long contexts takes up to a minute.
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


_ITEMS: Mapping[int, Callable[..., Any]] = {len(kind._fields): kind for kind in (WorkItem, AttendItem, PrefixItem)}
"""By how many numbers a line of a plan has."""


def _checked_new(num_blocks: int, like: str) -> int:
    """What new arrays of so many blocks are asked for with.

    Raises:
        TypeError, ValueError: num_blocks is not a whole number from 1 on, or like no kind of arrays.
    """
    num_blocks = whole_number("num_blocks", num_blocks, 1)
    if like not in ("numpy", "torch"):
        raise ValueError(f"like: expected 'numpy' or 'torch', got {like!r}")
    return num_blocks


def _again(
    kind: type[Module], library: bytes, sources: Mapping[str, str], settings: Mapping[str, Any], links: str
) -> Module:
    """The module that a pickle or a copy stands for."""
    about = manifest.read(library, "module.so")
    module = kind(library, about, open_library(library, "module.so"), sources, links)
    for name, value in settings.items():
        setattr(module, name, value)
    return module
