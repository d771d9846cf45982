"""What calls of the functions of TVM's paged KV cache take: ours beside TVM's own. python -m benchmarks.relax_cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5


def median(call: Callable[[], Any], seconds: float = 0.6) -> float:
    """Median microseconds of a call, of up to 200 calls in some seconds."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds and len(times) < 200:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6


def tvms(dtype: str) -> dict[str, Any]:
    """TVM's own functions for CPUs, built as its tests build them."""
    import tvm
    from tvm.relax.frontend.nn.llm import kv_cache
    from tvm.s_tir import dlight

    shape = (KV_HEADS, HEADS, HEAD_DIM)
    bodies = {
        "append": kv_cache._kv_cache_transpose_append(KV_HEADS, HEAD_DIM, dtype),
        "decode": kv_cache._attention_decode_cpu(*shape, dtype, False, {}),
        "ragged": kv_cache._attention_prefill_ragged_cpu(*shape, HEAD_DIM, dtype, {}),
        "merge": kv_cache._merge_state_inplace_cpu(dtype),
        "split": kv_cache.llama_rope_with_position_map(1e4, 1.0, HEAD_DIM, HEADS, KV_HEADS, dtype, {}),
    }
    target = tvm.target.Target.from_device(tvm.cpu())
    built = {}
    for name, body in bodies.items():
        with target:
            module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule({"main": body}))
        built[name] = tvm.tirx.build(module["main"], target=target).main
    return built


def ours(dtype: str) -> dict[str, Any]:
    """Ours, by the same names."""
    from pa_compiler import PagedAttentionSpec
    from pa_compiler.integrations.relax import kv_cache_functions

    spec = PagedAttentionSpec(HEADS, KV_HEADS, HEAD_DIM, PAGE, dtype, kv_layout="HND")
    made = kv_cache_functions(spec, sliding_window=False)
    return {
        "append": made.transpose_append,
        "decode": made.attention_decode,
        "ragged": made.attention_prefill_ragged,
        "merge": made.merge_state_inplace,
        "split": made.split_rotary,
    }


def decodes(dtype: str, batch: int, tokens: int, inline: int = 0) -> tuple[Any, ...]:
    """Arguments of a decode of sequences of so many tokens."""
    import tvm

    rng, pages = np.random.default_rng(0), -(-tokens // PAGE)
    zeros, last = np.zeros(batch, np.int32), np.full(batch, (tokens - 1) % PAGE + 1, np.int32)
    arrays = (
        rng.standard_normal((batch, HEADS, HEAD_DIM)).astype(dtype),
        rng.standard_normal((batch * pages, 2, KV_HEADS, PAGE, HEAD_DIM)).astype(dtype),
        (np.arange(batch + 1) * pages).astype(np.int32),
        rng.permutation(batch * pages).astype(np.int32),
        *(last, zeros, zeros),
        np.zeros((batch, HEADS, HEAD_DIM), dtype),
        np.zeros((batch, HEADS), np.float32),
    )
    return (*map(tvm.runtime.tensor, arrays), inline, 1.0, 1e4, SCALE)


def others(dtype: str, tokens: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of the other functions, for so many new tokens."""
    import tvm

    rng, tensor = np.random.default_rng(0), tvm.runtime.tensor
    q, out, other = (tensor(rng.standard_normal((tokens, HEADS, HEAD_DIM)).astype(dtype)) for _ in range(3))
    k, v = (tensor(rng.standard_normal((tokens, KV_HEADS, HEAD_DIM)).astype(dtype)) for _ in range(2))
    qkv = tensor(rng.standard_normal((tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)).astype(dtype))
    lse, other_lse = (tensor(np.zeros((tokens, HEADS), np.float32)) for _ in range(2))
    starts, positions = tensor(np.array([0, tokens], np.int32)), tensor(np.arange(tokens, dtype=np.int32))
    pages, offset = tensor(np.zeros((64, 2, KV_HEADS, PAGE, HEAD_DIM), dtype)), tensor(np.zeros(1, np.int32))
    return {
        "append": (pages, k, v, positions),
        "ragged": (q, starts, k, v, starts, positions, offset, out, lse, 1, 0, 1.0, 1e4, SCALE),
        "merge": (out, lse, other, other_lse),
        "split": (qkv, positions, q, k, v, 1),
    }


def main() -> None:
    """Print a line for each call: medians in microseconds."""
    for dtype in ("float32", "float16"):
        contenders = {"ours": ours(dtype), "tvm": tvms(dtype)}
        for batch, tokens, inline in ((1, 16, 0), (1, 1024, 0), (1, 4096, 0), (8, 1024, 0), (1, 1024, 1), (1, 4096, 1)):
            given = decodes(dtype, batch, tokens, inline)
            times = {name: round(median(lambda: each["decode"](*given)), 1) for name, each in contenders.items()}  # noqa: B023
            print(dtype, "decode", f"{batch} x {tokens}", "inline" if inline else "", times, flush=True)
        for tokens in (1, 8, 512):
            for what, given in others(dtype, tokens).items():
                times = {name: round(median(lambda: each[what](*given)), 1) for name, each in contenders.items()}  # noqa: B023
                print(dtype, what, tokens, times, flush=True)


if __name__ == "__main__":
    main()
