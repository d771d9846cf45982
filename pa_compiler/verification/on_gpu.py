"""A module for a GPU as verify() calls one: its NumPy arrays go to the GPU, and what is there afterwards comes back."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pa_compiler.interface import GPU_QUERY_TOKENS, INPUT_PREFIX
from pa_compiler.runtime.arguments import NUMPY_DTYPES

ROW_BYTES = 16
"""Rows on the GPU are as many bytes longer than the array's, so that none of its axes but the last is contiguous."""


_PAIR = ("block_table[0]", "block_table[1]")
"""The arrays of a block_table that is a pair."""


class Memory(Protocol):
    """A GPU's memory."""

    def put(self, array: np.ndarray, pad: int) -> Any:
        """A copy of an array, aligned to 256 bytes, with pad elements between its rows."""

    def get(self, tensor: Any) -> np.ndarray:
        """A copy of what is there now."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""


class TorchMemory:
    """The memory of one of torch's devices.

    Raises:
        ImportError: there is no torch.
        RuntimeError: torch finds no GPU.
    """

    def __init__(self, device: Any) -> None:
        try:
            import torch
        except ImportError as error:
            raise ImportError(f"torch, by which arrays are brought to a GPU, cannot be imported: {error}") from error
        self._torch, self._device = torch, torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device: expected a GPU that torch can use for {device}, and there is none")

    def put(self, array: np.ndarray, pad: int) -> Any:
        """As Memory.put."""
        whole = np.zeros((*array.shape[:-1], array.shape[-1] + pad), array.dtype)
        whole[..., : array.shape[-1]] = array
        as_integers = self._torch.from_numpy(whole.view(f"i{array.itemsize}"))  # NumPy's bfloat16 is not torch's
        return as_integers.to(self._device).view(getattr(self._torch, array.dtype.name))[..., : array.shape[-1]]

    def get(self, tensor: Any) -> np.ndarray:
        """As Memory.get."""
        dtype = NUMPY_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        integers = getattr(self._torch, f"int{8 * dtype.itemsize}")
        return tensor.contiguous().view(integers).cpu().numpy().view(dtype)

    def synchronize(self) -> None:
        """As Memory.synchronize."""
        self._torch.cuda.synchronize(self._device)


class OnGpu:
    """A CudaModule behind verify.Verifiable. A call is made with every way to check indices, for the same bits."""

    most_query_tokens: int | None = GPU_QUERY_TOKENS
    has_attend_shared_prefix = False

    def __init__(self, module: Any, memory: Memory) -> None:
        self.spec, self.num_threads = module.spec, 1
        self.has_attend, self.has_merge_states = module.has_attend, module.has_merge_states
        self._module, self._memory = module, memory

    def attend_shared_prefix(self, *arguments: Any, **options: Any) -> Any:
        """A module for a GPU has none."""
        return self._module.attend_shared_prefix(*arguments, **options)

    def decode(
        self,
        query: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray | None,
        block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
        context_lens: np.ndarray,
        scale: float | None = None,
        out: np.ndarray | None = None,
        **options: Any,
    ) -> Any:
        """As Module.decode, with NumPy arrays."""
        caches = {"key_cache": key_cache, "value_cache": value_cache}
        lens = {"context_lens": context_lens}
        return self._attention("decode", query, caches, block_table, lens, scale, out, options)

    def attend(
        self,
        query: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray | None,
        block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
        context_lens: np.ndarray,
        query_start_loc: np.ndarray,
        scale: float | None = None,
        out: np.ndarray | None = None,
        **options: Any,
    ) -> Any:
        """As Module.attend, with NumPy arrays."""
        caches = {"key_cache": key_cache, "value_cache": value_cache}
        lens = {"context_lens": context_lens, "query_start_loc": query_start_loc}
        return self._attention("attend", query, caches, block_table, lens, scale, out, options)

    def _attention(
        self,
        function: str,
        query: np.ndarray,
        caches: dict[str, np.ndarray | None],
        block_table: np.ndarray | tuple[np.ndarray, np.ndarray],
        lens: dict[str, np.ndarray],
        scale: float | None,
        out: np.ndarray | None,
        options: dict[str, Any],
    ) -> Any:
        """out, or (out, lse). options are the keywords of decode and attend: arrays, numbers and what is None."""
        lse, return_lse = options.pop("lse", None), options.pop("return_lse", False)
        pair = block_table if isinstance(block_table, tuple) else (block_table,)
        tables = dict(zip(_PAIR if len(pair) > 1 else ("block_table",), pair, strict=True))
        arrays = {"query": query, **caches, **tables, **lens}
        arrays |= {f"{INPUT_PREFIX}{name}": array for name, array in (options.pop("inputs", None) or {}).items()}
        arrays |= {name: each for name, each in options.items() if isinstance(each, np.ndarray)}
        shape = (*query.shape[:2], self.spec.result_dim)
        arrays["out"] = np.full(shape, np.nan, NUMPY_DTYPES[self.spec.result_dtype]) if out is None else out
        if return_lse and lse is None:
            lse = np.full(query.shape[:2], np.nan, np.float32)
        if lse is not None:
            arrays["lse"] = lse
        others = {name: each for name, each in options.items() if name not in arrays}
        self._call(function, arrays, scale=scale, **others)
        return arrays["out"] if lse is None else (arrays["out"], lse)

    def append_kv(
        self,
        key: np.ndarray,
        value: np.ndarray | None,
        key_cache: np.ndarray,
        value_cache: np.ndarray | None,
        slot_mapping: np.ndarray,
        **scales: np.ndarray,
    ) -> None:
        """As Module.append_kv, with NumPy arrays."""
        caches = {"key_cache": key_cache, "value_cache": value_cache}
        self._call("append_kv", {"key": key, "value": value, **caches, "slot_mapping": slot_mapping, **scales})

    def merge_states(self, outs: np.ndarray, lses: np.ndarray, *, return_lse: bool) -> Any:
        """As Module.merge_states, with NumPy arrays and with lse."""
        shape = (*outs.shape[1:3], self.spec.result_dim)
        out = np.full(shape, np.nan, NUMPY_DTYPES[self.spec.result_dtype])
        arrays = {"outs": outs, "lses": lses, "out": out, "lse": np.full(shape[:2], np.nan, np.float32)}
        tensors = {name: self._memory.put(array, 0) for name, array in arrays.items()}
        self._module.merge_states(**tensors)
        self._memory.synchronize()
        self._module.check_status()
        return tuple(self._memory.get(tensors[name]) for name in ("out", "lse"))

    def _call(self, function: str, given: dict[str, np.ndarray | None], **others: Any) -> None:
        """Leave in the arrays what is on the GPU afterwards."""
        arrays = {name: array for name, array in given.items() if array is not None}
        others |= dict.fromkeys(given.keys() - arrays.keys())
        first, *rest = (
            (check, self._results(function, arrays, check, others)) for check in self._module.checks(function)
        )
        for check, results in rest:
            for name, result in results.items():
                if result.tobytes() != first[1][name].tobytes():
                    raise ValueError(f"{name}: expected the same bits with check {check!r} as with {first[0]!r}")
        for name, array in arrays.items():
            array[...] = first[1][name]

    def _results(
        self, function: str, arrays: dict[str, np.ndarray], check: str, others: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        tensors = {
            name: self._memory.put(array, 0 if _is_contiguous(name, array) else ROW_BYTES // array.itemsize)
            for name, array in arrays.items()
        }
        inputs = {name: each for name, each in tensors.items() if name.startswith(INPUT_PREFIX)}
        arguments: dict[str, Any] = {name: each for name, each in tensors.items() if name not in inputs}
        if _PAIR[0] in arguments:
            arguments["block_table"] = tuple(arguments.pop(name) for name in _PAIR)
        if inputs:
            arguments["inputs"] = {name.removeprefix(INPUT_PREFIX): each for name, each in inputs.items()}
        getattr(self._module, function)(**arguments, **others, check=check)
        self._memory.synchronize()
        self._module.check_status()
        return {name: self._memory.get(tensor) for name, tensor in tensors.items()}


def _is_contiguous(name: str, array: np.ndarray) -> bool:
    """Whether there is to be nothing between rows: inputs of functions lie in C's order, and a vector has one row."""
    return array.ndim == 1 or name.startswith(INPUT_PREFIX)
