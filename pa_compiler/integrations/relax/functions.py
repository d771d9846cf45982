"""The functions of a spec that TVM's paged KV cache takes, in the order in which it takes them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import tvm_ffi

import pa_compiler
from pa_compiler.integrations import versions
from pa_compiler.integrations.relax.attention import WINDOW_INPUTS, Attention, seen
from pa_compiler.integrations.relax.pages import Pages
from pa_compiler.integrations.relax.rotary import Rotary, split_rotary
from pa_compiler.integrations.relax.trees import TreeAttention
from pa_compiler.runtime.module import Module
from pa_compiler.spec import PagedAttentionSpec


@dataclasses.dataclass(frozen=True, eq=False)
class KVCacheFunctions:
    """Functions of tvm-ffi that vm.builtin.paged_attention_kv_cache_create takes, named as TVM names them.

    Attributes:
        spec: What they were made for.
        modules: What they call: over pages, with windows over pages (if there are such functions), over new tokens.
        others: Functions, each of which says what it takes where it is defined.
    """

    spec: PagedAttentionSpec
    modules: tuple[Module, ...]
    transpose_append: Any
    attention_prefill_ragged: Any
    attention_prefill: Any
    attention_decode: Any
    attention_prefill_sliding_window: Any
    attention_decode_sliding_window: Any
    attention_prefill_with_tree_mask_paged_kv: Any
    attention_prefill_with_tree_mask: Any
    merge_state_inplace: Any
    split_rotary: Any
    copy_single_page: Any
    debug_get_kv: Any
    compact_copy: Any

    def arguments(self) -> tuple[Any, ...]:
        """The last fifteen arguments of vm.builtin.paged_attention_kv_cache_create, from f_transpose_append_mha on."""
        kinds = [["tirx", function] if function is not None else [] for function in self._attention()]
        rest = (self.split_rotary, self.copy_single_page, self.debug_get_kv, self.compact_copy)
        return (self.transpose_append, None, *kinds, [], [self.merge_state_inplace], *rest)

    def expressions(self, prefix: str) -> tuple[Any, ...]:
        """The same arguments as expressions of Relax, for a call in a program that makes the cache.

        They name the functions, which are registered as prefix.name in this process: another one, which runs the
        program later, calls this too before it makes the cache.
        """
        from tvm import ir, relax

        names = {}
        for field, function in self._functions():
            if function is not None:
                names[function] = f"{prefix}.{field}"
                tvm_ffi.register_global_func(names[function], function, override=True)

        def expression(argument: Any) -> Any:
            if isinstance(argument, list):
                return relax.Tuple([expression(each) for each in argument])
            if argument is None:
                return relax.prim_value(0)
            return ir.StringImm(argument) if argument == "tirx" else relax.ExternFunc(names[argument])

        return tuple(expression(argument) for argument in self.arguments())

    def _functions(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self)[2:]:
            yield field.name, getattr(self, field.name)

    def _attention(self) -> list[Any]:
        return [function for name, function in self._functions() if name.startswith("attention_")]


def kv_cache_functions(
    spec: PagedAttentionSpec,
    *modules_to_use: Module,
    rope_theta: float = 10000.0,
    rope_scale: float = 1.0,
    rope_scaling: Mapping[str, Any] | None = None,
    sliding_window: bool = True,
) -> KVCacheFunctions:
    """Compile what TVM's paged KV cache needs for a model, and return its functions. Takes some seconds.

    Args:
        spec: kv_layout "HND", block_size the cache's page size. window is that of layers of the kind MHA_SLIDING.
        *modules_to_use: Modules, loaded ones perhaps or with another number of threads, to take for their specs: those
            of `modules` of what was returned before.
        rope_theta: Base of the frequencies of rotary embeddings, for split_rotary.
        rope_scale: Factor on positions, likewise.
        rope_scaling: TVM's dict of how frequencies are scaled. split_rotary is TVM's own, where there is a "rope_type".
        sliding_window: Whether there are the two functions of windows, which take a module more.

    Raises:
        RuntimeError: TVM is of a version whose cache is not known.
        ValueError: the spec has what TVM's cache has no place for.
        As pa_compiler.compile.
    """
    import tvm

    versions.check("tvm", tvm.__version__, versions.TVM, "its paged KV cache")
    _check(spec)
    given = {module.spec: module for module in modules_to_use}
    paged = dataclasses.replace(spec, window=None)
    windowed = dataclasses.replace(paged, mask_mod=seen, inputs=WINDOW_INPUTS)
    ragged = dataclasses.replace(paged, block_size=1, kv_layout="NHD")
    scaling = dict(rope_scaling or {})
    rotary = Rotary(scaling.get("rope_type", ""))
    attention = Attention(
        paged=_module(paged, given, merge_states=True),
        windowed=_module(windowed, given) if sliding_window else None,
        ragged=_module(ragged, given),
        rotary=rotary,
        window=spec.window,
    )
    split = _tvm_rotary(spec, rope_theta, rope_scale, scaling) if rotary.scaling else None
    return _functions(spec, attention, split or split_rotary(spec, rotary, rope_theta, rope_scale))


def _functions(spec: PagedAttentionSpec, attention: Attention, split: Any) -> KVCacheFunctions:
    pages, trees = Pages(attention), TreeAttention(attention)
    windows = (attention.prefill, attention.decode) if attention.windowed else (None, None)
    functions = (
        *(pages.transpose_append, attention.ragged_prefill, attention.prefill, attention.decode, *windows),
        *(trees.paged, trees.ragged, pages.merge_state_inplace, split),
        *(pages.copy_single_page, pages.debug_get_kv, pages.compact_copy),
    )
    modules = [module for module in (attention.paged, attention.windowed, attention.ragged) if module]
    return KVCacheFunctions(spec, tuple(modules), *(function and tvm_ffi.convert(function) for function in functions))


def _check(spec: PagedAttentionSpec) -> None:
    """Check that a spec is one that TVM's cache can have.

    Raises:
        TypeError: it is no spec.
        ValueError: a field says what the cache, or attention in parts that are merged, has no place for.
    """
    if not isinstance(spec, PagedAttentionSpec):
        raise TypeError(f"spec: expected a PagedAttentionSpec, got {type(spec).__name__}")
    expected = {
        "kv_layout": "HND",
        "shared_kv": False,
        "result_dim": spec.head_dim,
        "result_dtype": spec.dtype,
        "alibi": False,
        "sinks": False,
        "score_mod": None,
        "mask_mod": None,
    }
    shown = {"result_dim": "value_dim", "result_dtype": "out_dtype"}
    for field, value in expected.items():
        found = getattr(spec, field)
        if found != value:
            raise ValueError(f"{shown.get(field, field)}: expected {value!r} for TVM's paged KV cache, got {found!r}")


def _module(spec: PagedAttentionSpec, given: Mapping[PagedAttentionSpec, Module], **options: bool) -> Module:
    """A module that was given for the spec, or a new one, of which a line on stderr tells."""
    if spec in given:
        module = given[spec]
        if not module.has_attend or (options.get("merge_states") and not module.has_merge_states):
            raise ValueError(f"modules_to_use: expected attend and merge_states, got {module}")
        return module
    print(f"pa_compiler: compiling {spec}", file=sys.stderr, flush=True)
    return pa_compiler.compile(spec, **options)  # type: ignore[arg-type]


def _tvm_rotary(spec: PagedAttentionSpec, theta: float, scale: float, scaling: Mapping[str, Any]) -> Any:
    """TVM's own split_rotary, for frequencies that are scaled."""
    import tvm
    from tvm.relax.frontend.nn.llm.kv_cache import _prepare_yarn_rope_scaling
    from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

    heads = (spec.head_dim, spec.num_heads, spec.num_kv_heads)
    body = llama_rope_with_position_map(
        theta, scale, *heads, spec.dtype, _prepare_yarn_rope_scaling(dict(scaling), theta)
    )
    built = tvm.compile(tvm.IRModule({"main": body}), target={"kind": "llvm"})
    return built.mod["main"]
