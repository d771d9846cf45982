"""onnxruntime's GroupQueryAttention over contiguous keys and values in float32: on CPUs it has no bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.inputs import Call

_FLOAT32 = np.dtype(np.float32)
_CACHES = ("key", "value")


def prepare(call: Call) -> Callable[[], np.ndarray]:
    """The past and the present are the same memory, so that nothing is copied.

    The operator appends one token to each sequence before it attends: it is given the last one, which is there already.
    """
    spec, batch = call.case.spec, call.case.batch
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = call.num_threads, 1
    model = _model(spec.num_heads, spec.num_kv_heads).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    last = call.context_lens - 1
    kept = {}  # a binding keeps addresses alone: run() holds the arrays
    for name, cache in zip(_CACHES, (call.key_cache, call.values), strict=True):
        kept[f"past_{name}"] = past = call.contiguous(cache, _FLOAT32)
        kept[name] = np.ascontiguousarray(past[np.arange(batch), :, last]).reshape(batch, 1, -1)
    kept["query"] = call.query.astype(np.float32).reshape(batch, 1, -1)
    kept["seqlens_k"], kept["total_sequence_length"] = last, np.array(last.max() + 1, np.int32)
    kept["out"] = np.empty((batch, 1, spec.num_heads * spec.head_dim), np.float32)

    def bind(to: Callable[..., None], name: str, array: np.ndarray) -> None:
        to(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    for name in ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"):
        bind(binding.bind_input, name, kept[name])
    bind(binding.bind_output, "out", kept["out"])
    for name in _CACHES:
        bind(binding.bind_output, f"present_{name}", kept[f"past_{name}"])

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return kept["out"].reshape(call.query.shape)

    return run


def _model(num_heads: int, num_kv_heads: int) -> onnx.ModelProto:
    """One GroupQueryAttention and nothing else."""
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    outputs = ["out", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft", num_heads=num_heads, kv_num_heads=num_kv_heads
    )
    ranks = {"query": 3, "key": 3, "value": 3, "past_key": 4, "past_value": 4, "seqlens_k": 1, "out": 3}
    ranks |= {"total_sequence_length": 0, "present_key": 4, "present_value": 4}

    def value(name: str) -> onnx.ValueInfoProto:
        kind = TensorProto.INT32 if name in ("seqlens_k", "total_sequence_length") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(ranks[name])])

    graph = helper.make_graph([node], "decode", [value(name) for name in inputs], [value(name) for name in outputs])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
