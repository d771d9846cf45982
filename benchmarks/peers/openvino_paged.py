"""OpenVINO's PagedAttention operator on the CPU, in a model of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension

from benchmarks.inputs import Call
from benchmarks.machine import cpu_flags
from benchmarks.peers import Unsupported

_BLOCK = 32  # tokens; the plugin knows no other size
_TYPES = {"bf16": (ov.Type.bf16, np.dtype("bfloat16")), "f32": (ov.Type.f32, np.dtype(np.float32))}
_DYNAMIC = ov.Dimension.dynamic()


def prepare(call: Call) -> Callable[[], np.ndarray]:
    """Keys and values in blocks of 32 tokens in random order, in float32 unless this CPU multiplies bfloat16.

    The operator appends the query tokens to each sequence before it attends: it is given those that are there already.
    """
    spec, out_shape = call.case.spec, call.out_shape
    kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    precision = "bf16" if spec.dtype == "bfloat16" and "avx512_bf16" in cpu_flags() else "f32"
    kind, dtype = _TYPES[precision]
    settings = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision, "NUM_STREAMS": 1}
    settings |= {"INFERENCE_NUM_THREADS": call.num_threads, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(_model(call, kind), "CPU", settings)
    shape = compiled.input("key_cache.0").partial_shape.to_string()
    if compiled.input("key_cache.0").element_type != kind or f"{kv_heads},{_BLOCK},{head_dim}]" not in shape:
        raise Unsupported(f"a key cache that is not {precision} [.., {kv_heads}, {_BLOCK}, {head_dim}] but {shape}")

    counts = -(-call.context_lens // _BLOCK)
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    blocks = np.random.default_rng(0).permutation(begins[-1]).astype(np.int32)
    rows = len(call.query)
    arrays = {"query": call.query.astype(dtype).reshape(rows, -1), "subsequence_begins": call.starts}
    arrays |= {"past_lens": call.context_lens - call.case.query_counts}
    arrays |= {"block_indices": blocks, "block_indices_begins": begins}
    for name, cache in (("key", call.key_cache), ("value", call.values)):
        tokens = call.contiguous(cache, dtype)  # [batch, num_kv_heads, longest, head_dim]
        arrays[name] = call.newest(cache).astype(dtype).reshape(rows, -1)
        paged = arrays[f"{name}_cache.0"] = call.empty((int(begins[-1]), kv_heads, _BLOCK, head_dim), dtype)
        for sequence, count in enumerate(counts):
            for block in range(count):
                piece = tokens[sequence, :, block * _BLOCK : (block + 1) * _BLOCK]
                paged[blocks[begins[sequence] + block], :, : piece.shape[1]] = piece

    request = compiled.create_infer_request()
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)

    def run() -> np.ndarray:
        assert tensors  # the request keeps their addresses alone: run() holds them
        request.infer()
        return request.get_output_tensor(0).data.view(dtype).reshape(out_shape)  # its NumPy has no bfloat16

    return run


def _tensor(array: np.ndarray) -> ov.Tensor:
    """An array as a tensor of the same memory; OpenVINO does not know NumPy's bfloat16."""
    if array.dtype == "bfloat16":
        return ov.Tensor(array.view(np.uint16), array.shape, ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)


def _model(call: Call, kind: ov.Type) -> ov.Model:
    """One PagedAttention with the 28 inputs of this version; what it does not use is an empty constant."""
    spec = call.case.spec

    def parameter(name: str, kind: ov.Type, *shape: object) -> ov.Node:
        node = ops.parameter(ov.PartialShape(list(shape)), kind, name)
        node.output(0).get_tensor().set_names({name})
        return node

    i32 = ov.Type.i32
    width = spec.num_kv_heads * spec.head_dim
    parameters = [
        parameter("query", kind, _DYNAMIC, spec.num_heads * spec.head_dim),
        parameter("key", kind, _DYNAMIC, width),
        parameter("value", kind, _DYNAMIC, width),
        parameter("key_cache.0", ov.Type.dynamic, *[_DYNAMIC] * 4),
        parameter("value_cache.0", ov.Type.dynamic, *[_DYNAMIC] * 4),
        parameter("past_lens", i32, _DYNAMIC),
        parameter("subsequence_begins", i32, _DYNAMIC),
        parameter("block_indices", i32, _DYNAMIC),
        parameter("block_indices_begins", i32, _DYNAMIC),
    ]

    def scalar(value: float, kind: type = np.int32) -> ov.Node:
        return ops.constant(np.array(value, kind))

    def none(kind: type = np.int32) -> ov.Node:
        return ops.constant(np.zeros(0, kind))

    constants = [
        scalar(1 / math.sqrt(spec.head_dim), np.float32),  # scale
        scalar(0),  # sliding_window
        none(np.float32),  # alibi_slopes
        scalar(int(call.context_lens.max())),  # max_context_len
        none(),  # score_aggregation_window
        *(none(), none(), none(np.float32)),  # rotation of cached keys
        *(none(np.float32), scalar(64), scalar(8)),  # sparse attention: threshold, block size, stride
        none(np.float32),  # sinks
        *(scalar(0), none(), none(), none()),  # eviction
        none(),  # token_type_ids
        *(none(np.uint8), none()),  # bias between query tokens
    ]
    inputs = [node.output(0) for node in (*parameters, *constants)]
    attention = _PagedAttentionExtension(inputs)
    for kind in "kv":
        attention.get_rt_info()[f"num_{kind}_heads"] = spec.num_kv_heads
        attention.get_rt_info()[f"{kind}_head_size"] = spec.head_dim
    return ov.Model([attention.output(0)], parameters)
