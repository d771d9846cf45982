"""The decode kernel that TVM's own paged cache uses on CPUs; serial, whatever the number of threads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np

from benchmarks.inputs import Call
from benchmarks.peers import Unsupported


def prepare(call: Call) -> Callable[[], np.ndarray]:
    """Pages [num_pages, 2, num_kv_heads, page_size, head_dim] with the case's block size as page size."""
    import tvm
    from tvm.relax.frontend.nn.llm._decode_kernels import _attention_decode_cpu

    from pa_compiler import backends
    from pa_compiler.cpu import target

    spec = call.case.spec
    if spec.dtype != "float32":
        raise Unsupported("compared in float32 cases alone")
    kernel = _attention_decode_cpu(
        spec.num_kv_heads, spec.num_heads, spec.head_dim, spec.dtype, False, {}, page_size=spec.block_size
    )
    name = str(kernel.attrs["global_symbol"])
    this_cpu = tvm.target.Target(json.loads(target.resolve(backends.normalize("llvm")).config))
    function = tvm.compile(tvm.IRModule({name: kernel}), target=this_cpu)[name]

    pages = call.empty((call.case.num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim))
    pages[:, 0], pages[:, 1] = call.key_cache.swapaxes(1, 2), call.values.swapaxes(1, 2)
    counts = -(-call.context_lens // spec.block_size)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = call.block_table[np.arange(call.block_table.shape[1]) < counts[:, None]]
    last_page_len = call.context_lens - (counts - 1) * spec.block_size
    zeros = np.zeros(len(counts), np.int32)
    integers = (indptr, indices, last_page_len.astype(np.int32), zeros, zeros)
    out = tvm.runtime.empty(call.query.shape, spec.dtype)
    tensors = [tvm.runtime.tensor(call.query), tvm.runtime.from_dlpack(pages)]  # pages are aligned: taken as they are
    tensors += [tvm.runtime.tensor(array) for array in integers]
    tensors += [out, tvm.runtime.empty(call.query.shape[:2], "float32")]
    scalars = (0, 1.0, 1e4, 1 / math.sqrt(spec.head_dim))  # no rotary embedding

    def run() -> np.ndarray:
        function(*tensors, *scalars)
        return out.numpy()

    return run
