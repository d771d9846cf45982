"""AMD zentorch's scaled dot product attention over contiguous keys and values.

Its users get it from torch.compile, which puts it in the place of torch's; here it is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.inputs import Call
from benchmarks.machine import cpu_flags
from benchmarks.peers import Unsupported
from benchmarks.peers.torch_sdpa import prepare_with


def prepare(call: Call) -> Callable[[], torch.Tensor]:
    """As torch's, of which it takes the arguments."""
    if "avx512f" not in cpu_flags():
        raise Unsupported("built for AVX-512, which this CPU lacks")
    import zentorch  # noqa: F401  (registers its operators)

    operator = torch.ops.zentorch.zentorch_sdpa

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        return operator(query, key, value, 0.0, causal, attn_mask=None if mask is None else mask[None, None])[0]

    return prepare_with(call, attend)
