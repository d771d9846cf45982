"""pa_compiler: compiles paged attention for the exact shape of a model."""

from pa_compiler import reference
from pa_compiler.compiler import compile  # noqa: A004  (the public name)
from pa_compiler.cuda_module import CudaModule
from pa_compiler.interface import WorkItem
from pa_compiler.layout import convert_cache
from pa_compiler.module import Module
from pa_compiler.modules import load
from pa_compiler.spec import PagedAttentionSpec

__all__ = ["CudaModule", "Module", "PagedAttentionSpec", "WorkItem", "compile", "convert_cache", "load", "reference"]
