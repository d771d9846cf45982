"""The contenders: one file for each library, with a function that prepares a call of it.

prepare(call) -> run, where run() attends and returns [query tokens, num_heads, value_dim] as a NumPy array or a torch
tensor; a sequence has one query token unless the case has query_lens.
All that an engine does once per sequence or token, such as filling its cache, is done by prepare; what it does on every
step is done by run. A contender that cannot do a case raises Unsupported with the reason.
"""

from __future__ import annotations

from typing import NamedTuple


class Unsupported(Exception):  # noqa: N818  (not an error: an answer)
    """Why a contender does not run a case, or not on this CPU."""


class Peer(NamedTuple):
    """A contender.

    Attributes:
        title: Its name in tables; with the type of its keys and values where that is always the same.
        module: The file in benchmarks/peers/.
        prepare: The function in it.
        preload: A library to load first, by its name in the environment's lib/; "" for none.
        ours: Whether it is pa_compiler.
        any_values: Whether it has a kernel for values of another size than the keys, and as part of these.
        ragged: Whether it takes any number of query tokens of each sequence.
    """

    title: str
    module: str
    prepare: str = "prepare"
    preload: str = ""
    ours: bool = False
    any_values: bool = False
    ragged: bool = False


PEERS = {
    "ours": Peer("pa_compiler, NHD", "ours", "prepare_nhd", ours=True, any_values=True, ragged=True),
    "ours-packed": Peer("pa_compiler, packed", "ours", "prepare_packed", ours=True, any_values=True, ragged=True),
    "vllm": Peer("vLLM CPU 0.32", "vllm_cpu", preload="libiomp5.so", any_values=True, ragged=True),
    "sglang": Peer("SGLang CPU", "sglang_cpu", preload="libiomp5.so", any_values=True, ragged=True),
    "pace": Peer("AMD PACE 1.3", "pace_slab", preload="libiomp5.so", ragged=True),
    "torch": Peer("torch SDPA", "torch_sdpa", any_values=True, ragged=True),
    "zentorch": Peer("zentorch SDPA", "zentorch_sdpa", preload="libiomp5.so", ragged=True),
    "onnxruntime": Peer("onnxruntime GQA, f32", "onnxruntime_gqa"),
    "openvino": Peer("OpenVINO paged", "openvino_paged", ragged=True),
    "tvm": Peer("TVM relax, f32", "tvm_relax"),
}
