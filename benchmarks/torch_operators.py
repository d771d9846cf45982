"""python -m benchmarks.torch_operators: a module's calls beside its operators of torch, in turns, on one thread."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.integrations.torch import Operators

ROUNDS, CALLS = 41, 100


def main() -> None:
    """Print microseconds of each call, for five short sequences: what is left is the way to the kernels."""
    torch.set_num_threads(1)
    module = pa_compiler.compile(PagedAttentionSpec(9, 3, 64, 16, "bfloat16"))
    keys, values = (cache.normal_() for cache in module.empty_cache(8, like="torch"))
    indices = (torch.arange(5, dtype=torch.int32)[:, None], torch.full((5,), 8, dtype=torch.int32))
    query, key = torch.randn(5, 9, 64).bfloat16(), torch.randn(5, 3, 64).bfloat16()
    tokens, starts = torch.randn(12, 9, 64).bfloat16(), torch.tensor([0, 3, 4, 4, 8, 12], dtype=torch.int32)
    slots, out = torch.arange(5) * 16 + 7, torch.empty_like(query)
    cases: dict[str, Callable[[], Any]] = {}
    for name, calls in (("module", module), ("operators", Operators(module))):
        decode = functools.partial(calls.decode, query, keys, values, *indices)
        cases[f"decode, {name}"] = decode
        cases[f"decode with out, {name}"] = functools.partial(decode, None, out)
        cases[f"attend, {name}"] = functools.partial(calls.attend, tokens, keys, values, *indices, starts)
        cases[f"append_kv, {name}"] = functools.partial(calls.append_kv, key, key, keys, values, slots)
    for which in ("decode", "decode with out", "attend"):
        assert torch.equal(cases[f"{which}, module"](), cases[f"{which}, operators"]()), which
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, call in cases.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[case].append((time.perf_counter() - begin) / CALLS * 1e6)
    for case, found in sorted(times.items()):
        lower, median, upper = statistics.quantiles(found, n=4)
        print(f"{case:28}{median:8.2f} us, quartiles {lower:.2f} and {upper:.2f}")


if __name__ == "__main__":
    main()
