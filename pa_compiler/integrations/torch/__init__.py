"""These kernels in torch: operators for torch.compile, and a CPU kernel for torch.nn.attention.varlen."""

from __future__ import annotations

from pa_compiler.integrations.torch.operators import Operators
from pa_compiler.integrations.torch.varlen import disable_varlen_attention, enable_varlen_attention

__all__ = ["Operators", "disable_varlen_attention", "enable_varlen_attention"]
