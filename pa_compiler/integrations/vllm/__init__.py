"""vLLM on these kernels, for CPUs: the plug-in that vLLM finds by its entry point, vllm.general_plugins.

Nothing of it is called by users: where pa-compiler[vllm] is installed, vLLM loads it. VLLM_PLUGINS="" leaves it out.
"""

from __future__ import annotations

from pa_compiler.integrations import versions

__all__ = ["register"]

BACKEND = "pa_compiler.integrations.vllm.backend.PagedBackend"


def register() -> None:
    """Take the place of vLLM's attention backend for CPUs. On other platforms nothing is done.

    vLLM calls it once in each of its processes. Layers that the kernels do not cover stay with vLLM's own.

    Raises:
        RuntimeError: vLLM is of a version whose backend is not known.
    """
    import vllm
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return
    try:
        versions.check("vllm", vllm.__version__, versions.VLLM, "the attention backend for CPUs")
    except RuntimeError as error:
        raise RuntimeError(f'{error}; VLLM_PLUGINS="" leaves pa_compiler out') from None
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
