"""CudaModule: a compiled library for a GPU, loaded. It can be loaded, looked at and saved where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from pa_compiler.interface import CHECKS, CUDA_ENTRY_POINTS, GPU_QUERY_TOKENS
from pa_compiler.runtime import torch_tensors
from pa_compiler.runtime.arguments import whole_number
from pa_compiler.runtime.module import Module
from pa_compiler.verification import on_gpu as cuda_verify

if TYPE_CHECKING:
    import torch

    from pa_compiler.verification.verify import Verification


def _not_of_a_gpu(name: str) -> Any:
    """A property that modules for a CPU have: reading or setting it is an AttributeError."""

    def refuse(*_: object) -> NoReturn:
        raise AttributeError(f"{name}: a module for a GPU has none")

    return property(refuse, refuse)


class CudaModule(Module):
    """A Module for GPUs.

    Its calls take CUDA tensors, of torch or anything with DLPack, all on one device, and return when their kernels have
    been launched on the caller's stream (torch's current one). Beyond what Module says of them:

    - Keys, values and caches start at multiples of 16 bytes and have strides of such multiples, queries of 4 bytes.
      Scales of codes may lie anywhere.
    - out and lse are made for torch tensors; for others they have to be given.
    - block_table, context_lens and query_start_loc are int32, slot_mapping int64.
    - attend is for guesses: a sequence has up to 64 query tokens (most_query_tokens). The staged pipeline has none.
    - Results have the same bits in any batch and on any GPU that runs a library: a sequence is cut into ranges at
      fixed positions. A query token of attend gets the same ones beside any others of its sequence where the spec has
      no window and no mask_mod, and a single one those of decode where num_heads is more than 3 * num_kv_heads and the
      type has 16 bits.
    - Caches that have blocks in common are told apart by their slots with check "host", not with "device".
    - check says who looks at context_lens, block_table, query_start_loc, tree_mask and slot_mapping, whose contents are
      on the GPU:
      "device", the default: a kernel does, before the others. After a finding those write nothing; the error is raised
      by the next call on that device, which does nothing itself, or by check_status.
      "host": this process does, before anything is launched. It waits for the stream and for copies of them.
      "none": nobody does. An index that is out of range reads or writes anywhere.
      decode of the staged pipeline has no "device". Its default is "host", where it takes as many steps as the longest
      sequence has blocks; with "none", as many as block_table has.

    Nothing is copied to the host, nor waited for, with "device" and "none", and a CUDA graph can capture such calls. It
    holds the launches for any lengths: tensors may have other contents at each replay.

    Errors of the driver are RuntimeErrors, among them that there is none.
    """

    most_query_tokens = GPU_QUERY_TOKENS
    _entry_points = CUDA_ENTRY_POINTS
    _on_gpu = True

    def _set_up(self) -> None:
        """A GPU's threads are not a caller's to set."""

    @property
    def _settings(self) -> dict[str, Any]:
        return {}

    num_threads = _not_of_a_gpu("num_threads")
    threading = _not_of_a_gpu("threading")
    cpus = _not_of_a_gpu("cpus")
    openmp = _not_of_a_gpu("openmp")

    def check_status(self) -> None:
        """Raise what a kernel has found wrong with an earlier call, on any device, and forget it.

        Nothing is waited for: what is still to run is not seen yet, so synchronize the stream before.

        Raises:
            ValueError: a length.
            IndexError: a block id or a slot. Each as the call itself would have raised it with check="host".
        """
        self._functions["check_status"]()

    def empty_cache(
        self, num_blocks: int, device: Any = "cuda", *, like: str = "torch"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """New key and value caches of num_blocks blocks in kv_layout, all 0, as torch tensors on a device.

        With shared_kv the second is None.

        Raises:
            TypeError, ValueError: num_blocks is not a whole number from 1 on, or like not "torch".
            ImportError: there is no torch.
        """
        import torch

        num_blocks = _checked_new(num_blocks, like)
        dtype = getattr(torch, self.spec.cache_dtype)
        return self._caches(num_blocks, lambda shape: torch.zeros(shape, dtype=dtype, device=device))

    def empty_scales(
        self, num_blocks: int, device: Any = "cuda", *, like: str = "torch"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Module.empty_scales, as torch tensors on a device.

        Raises:
            TypeError, ValueError, ImportError: as empty_cache.
            NotImplementedError: the caches hold dtype, without scales.
        """
        import torch

        shape, number = self._new_scales(_checked_new(num_blocks, like))
        key_scale, value_scale = (torch.full(shape, number, dtype=torch.float32, device=device) for _ in range(2))
        return key_scale, value_scale

    def plan(
        self, context_lens: Any, query_start_loc: Any = None, prefix_len: Any = None, prefix_start_loc: Any = None
    ) -> NoReturn:
        """There is none to look at: the thread blocks of a GPU find their work themselves, by its number of SMs.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("plan: a GPU finds its work items itself, as a kernel starts")

    def verify(
        self,
        seconds: float = 10,
        *,
        seed: int | None = None,
        draw: int | None = None,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        advance: Callable[[int], object] = lambda milliseconds: None,
        device: Any = "cuda",
    ) -> Verification:
        """As Module.verify, on a device of torch's. Each call is made with every way to check indices.

        Raises:
            ImportError: there is no torch.
            RuntimeError: torch finds no GPU.
        """
        from pa_compiler.verification import verify
        from pa_compiler.verification.functions import with_functions

        on_gpu = cuda_verify.OnGpu(self, cuda_verify.TorchMemory(device))
        on_gpu.spec = with_functions(self.spec, score_mod, mask_mod)
        return verify.verify(on_gpu, seconds, seed=seed, draw=draw, advance=advance)

    def checks(self, of: str) -> tuple[str, ...]:
        """What "decode", "attend" or "append_kv" takes for check."""
        return ("host", "none") if (self.pipeline, of) == ("staged", "decode") else CHECKS

    def _manner(self, check: str | None, of: str) -> tuple[int, ...]:
        if of == "merge_states":  # which has no indices
            return ()
        choices = self.checks(of)
        if check is None:
            check = "device" if "device" in choices else "host"
        if check not in choices:
            raise ValueError(f"check: expected one of {', '.join(choices)}, got {check!r}")
        return (CHECKS.index(check),)

    def _new_like(self, given: Any, dtype: str, extents: tuple[int, ...], axis: int = 0) -> Any:
        if not torch_tensors.is_tensor(given):
            name = "lse" if len(extents) == 1 else "out"
            raise TypeError(
                f"{name}: expected an array to write to, since a GPU module makes them for torch tensors alone, "
                f"got None with {'outs' if axis else 'a query'} of type {type(given).__name__}"
            )
        return super()._new_like(given, dtype, extents, axis)


def _checked_new(num_blocks: object, like: object) -> int:
    """The arguments of empty_cache and empty_scales, checked."""
    checked = whole_number("num_blocks", num_blocks, 1)
    if like != "torch":
        raise ValueError(f"like: expected 'torch' for a GPU module, got {like!r}")
    return checked
