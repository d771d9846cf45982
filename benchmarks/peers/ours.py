"""pa_compiler itself, called from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

import pa_compiler
from benchmarks.inputs import Call
from benchmarks.peers import Unsupported


def prepare_nhd(call: Call) -> Callable[[], np.ndarray]:
    """Caches [num_blocks, block_size, num_kv_heads, head_dim], as most engines have them."""
    return _prepare(call, pa_compiler.compile(call.case.spec), call.key_cache, call.value_cache)


def prepare_packed(call: Call) -> Callable[[], np.ndarray]:
    """The layout that the kernel wants, in memory from empty_cache."""
    if not call.huge_pages:
        raise Unsupported("empty_cache asks for huge pages: measured with them alone")
    try:
        module = pa_compiler.compile(dataclasses.replace(call.case.spec, kv_layout="packed"))
    except ValueError as error:
        raise Unsupported(str(error)) from error
    key_cache, value_cache = module.empty_cache(call.case.num_blocks)
    converted = pa_compiler.convert_cache(call.key_cache, call.value_cache, "NHD", "packed")
    for cache, tokens in zip((key_cache, value_cache), converted, strict=True):
        cache[...] = tokens
    return _prepare(call, module, key_cache, value_cache)


def _prepare(
    call: Call, module: pa_compiler.Module, key_cache: np.ndarray, value_cache: np.ndarray | None
) -> Callable[[], np.ndarray]:
    module.num_threads = call.num_threads
    out = np.empty(call.out_shape, call.query.dtype)

    arrays = (call.query, key_cache, value_cache, call.block_table, call.context_lens)
    starts = call.case.query_start_loc

    def run() -> np.ndarray:
        if starts is None:
            return module.decode(*arrays, out=out)
        return module.attend(*arrays, starts, out=out)

    return run
