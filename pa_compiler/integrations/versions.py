"""Versions of other libraries whose private parts are used here: for these it holds, and for no others."""

from __future__ import annotations

import re
from collections.abc import Collection

TORCH_VARLEN = frozenset({(2, 13)})
"""Of torch: torch.nn.attention.varlen calls torch_attn::_varlen_attn and _varlen_attn_out, with the arguments and
results that torch/varlen.py takes and gives. They are private, and defined with a body for CUDA alone."""

TRANSFORMERS = frozenset({(5, 24)})
"""Of transformers: what integrations/transformers/private.py and own_attention.py say of it, and Cache.update, which is
handed the attention's arguments."""

TVM = frozenset({(0, 27)})
"""Of TVM: the functions that vm.builtin.paged_attention_kv_cache_create takes, what they are called with, and in which
order, which src/runtime/vm/attn_backend.h and paged_kv_cache.cc say and no document does."""

VLLM = frozenset({(0, 32)})
"""Of vLLM: the backend for CPUs, of which integrations/vllm/backend.py makes subclasses: when vLLM makes what, the
attributes of Attention and of the backend's classes, the memory of a page, and what a step's metadata has."""


def check(name: str, version: str, known: Collection[tuple[int, int]], what: str) -> None:
    """Check that a library is of a version that is known.

    Args:
        name: Of the library.
        version: As it says itself, such as "2.13.0+cpu".
        known: (major, minor) of the versions that are.
        what: Of it is used, for the message.

    Raises:
        RuntimeError: it is of another one.
    """
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found not in known:
        expected = " or ".join(".".join(map(str, each)) for each in sorted(known))
        raise RuntimeError(f"{name}: expected version {expected}, of which {what} is known, got {version}")
