"""Models of transformers on these kernels: enable(model), and model.generate() runs on a paged cache of ours."""

from __future__ import annotations

from pa_compiler.integrations.transformers.cache import PagedCache
from pa_compiler.integrations.transformers.models import disable, enable

__all__ = ["PagedCache", "disable", "enable"]
