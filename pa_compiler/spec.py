"""PagedAttentionSpec: the exact shape of one model's attention. Every field is checked once, here."""

from __future__ import annotations

import dataclasses
from typing import Any

from pa_compiler import score_checks
from pa_compiler.kv_types import KV_TYPES, CachesOfCodes, checked_kv_type
from pa_compiler.score import Constant, Function

DTYPES = ("float32", "float16", "bfloat16")
"""The types of queries and out, and of caches that hold what they are given."""

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2} | dict.fromkeys(KV_TYPES, 1)
"""The element types, with their bytes; of two codes in a byte it is one."""

KV_LAYOUTS = ("NHD", "HND", "packed")

PACKED_TOKENS = 16

MAX_QUERY = 1 << 24
"""Elements of all heads of a query or of out, at most: kernels hold some copies of them in float32, 64 MB each."""

_INTEGER_RANGES = {
    "num_heads": (1, 65536),
    "num_kv_heads": (1, 65536),
    "head_dim": (1, 8192),
    "value_dim": (1, 8192),
    "block_size": (1, 65536),
    "head_tile": (1, 1024),
    "batch_chunk": (1, 1024),
    "window": (1, 1 << 30),
}

_SOFTCAPS = (1e-30, 1e30)
"""Soft caps that float32 holds, and their reciprocals."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PagedAttentionSpec(CachesOfCodes):
    """What is known about the attention at compile time. Two that mean the same are equal.

    All that it takes is compiled, by the targets and pipelines that say nothing else, within 20 seconds of a CPU.

    Attributes:
        num_heads: Query heads; a multiple of num_kv_heads, up to 65536, and with head_dim up to 2**24 elements.
        num_kv_heads: Heads of the key and value caches, up to 65536.
        head_dim: Elements of one head of query and of one key, up to 8192.
        block_size: Tokens in one block of the cache, up to 65536.
        dtype: Element type of query, key_cache and value_cache: "float32", "float16" or "bfloat16".
        out_dtype: Element type of out as it was given; None where it was not, and is dtype: see result_dtype.
        kv_layout: "NHD", caches [num_blocks, block_size, num_kv_heads, head_dim], or
            "HND", caches [num_blocks, num_kv_heads, block_size, head_dim], or
            "packed", as the kernels read them best: see key_cache_shape and value_cache_shape. It needs a block_size
            that is a multiple of 16 and, for bfloat16, an even head_dim.
        head_tile: Query heads of one kv head that a kernel takes at a time; a power of two up to 1024.
        batch_chunk: Sequences of one chunk, the unit that batch_start steps by; up to 1024.
        value_dim: Elements of one value and of one head of out, up to 8192, as it was given; None where it was not, and
            is head_dim: see result_dim.
        shared_kv: Whether the value of a token is the first value_dim elements of its key, as in multi-head latent
            attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). There is one cache then, and value_cache is None.
            Not with kv_layout "packed", which keeps keys and values in different orders.
        window: A query token sees the last `window` keys, its own position among them, up to 2**30; None: all of them.
        softcap: Scores become softcap * tanh(score / softcap) after the scale; from 1e-30 to 1e30, or None.
        alibi: Whether decode takes alibi_slopes, and adds alibi_slopes[head] * (key position - query position) to each
            score after the soft cap (ALiBi: O. Press et al., 2022, section 3).
        sinks: Whether decode takes sinks, for each head one more score of the softmax that has no value. lse is then
            the logarithm of a denominator with the sink in it.
        score_mod: A Python function score_mod(score, batch, head, query_pos, key_pos) of a score after the soft cap and
            before ALiBi, called once with stand-ins: kept as the Function that it computes. None leaves scores.
        mask_mod: A Python function mask_mod(batch, head, query_pos, key_pos): where it is False, the key is not seen.
        inputs: The arrays that these functions take by keyword, {name: (dtype, shape)}, given to decode at each call:
            "batch" in a shape is the call's. Kept as a tuple of Input.
        invariant: Whether a query token's out and lse are the same in every bit whether it is decoded, or attended to
            with others of its sequence, however many. Staged, they are without it. For CPUs.
        kv_dtype: Element type of both caches where it is another than dtype: "int8", "float8_e4m3fn", "float8_e5m2", or
            "int4", two elements in a byte, of which the even one is in its low half. Each element then counts as often
            as a scale says, see kv_scale. None: dtype. For pipeline "fused", not with shared_kv; on GPUs not int4.
        kv_scale: What has a scale of its own, float32: "tensor", each cache, or "head", each of its heads, of float8;
            "token_head", each head of each token, of int8 and int4, which has zero points besides. None: its first one.
        kv_rotation: "hadamard" multiplies keys and values by a Hadamard matrix before they become codes, which spreads
            what a few elements have: of int4, where it is the default, and int8, with a power of two for head_dim and
            value_dim. "none" does not. For CPUs.
        kv_dots: "int8" has decode multiply codes of int4 by integers of 8 bits, as queries and weights become; or None

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside what can be compiled.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    out_dtype: str | None = None
    kv_layout: str = "NHD"
    head_tile: int = 16
    batch_chunk: int = 16
    value_dim: int | None = dataclasses.field(default=None, kw_only=True)
    shared_kv: bool = dataclasses.field(default=False, kw_only=True)
    window: int | None = dataclasses.field(default=None, kw_only=True)
    softcap: float | None = dataclasses.field(default=None, kw_only=True)
    alibi: bool = dataclasses.field(default=False, kw_only=True)
    sinks: bool = dataclasses.field(default=False, kw_only=True)
    score_mod: Any = dataclasses.field(default=None, kw_only=True)
    mask_mod: Any = dataclasses.field(default=None, kw_only=True)
    inputs: Any = dataclasses.field(default=(), kw_only=True)
    invariant: bool = dataclasses.field(default=False, kw_only=True)
    kv_dtype: str | None = dataclasses.field(default=None, kw_only=True)
    kv_scale: str | None = dataclasses.field(default=None, kw_only=True)
    kv_rotation: str | None = dataclasses.field(default=None, kw_only=True)
    kv_dots: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_names()
        self._check_scores()
        self._check_shapes()
        for name, value in checked_kv_type(self).items():
            object.__setattr__(self, name, value)
        self._trace_functions()

    def _check_integers(self) -> None:
        for name, (low, high) in _INTEGER_RANGES.items():
            value = getattr(self, name)
            if name in ("value_dim", "window") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
            object.__setattr__(self, name, int(value))  # an IntEnum's text would be its own

    def _check_names(self) -> None:
        names = (("dtype", DTYPES), ("out_dtype", DTYPES), ("kv_layout", KV_LAYOUTS))
        for name, choices in names if self.out_dtype is not None else (names[0], names[2]):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a string, got {value!r} of type {type(value).__name__}")
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
            object.__setattr__(self, name, choices[choices.index(value)])  # nor a str of another class

    def _check_scores(self) -> None:
        for name in ("shared_kv", "alibi", "sinks", "invariant"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {value!r} of type {type(value).__name__}")
        if self.softcap is not None:
            if not isinstance(self.softcap, int | float) or isinstance(self.softcap, bool):
                raise TypeError(
                    f"softcap: expected a number, got {self.softcap!r} of type {type(self.softcap).__name__}"
                )
            low, high = _SOFTCAPS
            if not low <= self.softcap <= high:
                raise ValueError(f"softcap: expected {low:g} to {high:g}, got {self.softcap}")
            object.__setattr__(self, "softcap", float(self.softcap))

    def _trace_functions(self) -> None:
        object.__setattr__(self, "inputs", score_checks.checked_inputs(self.inputs))
        for field in score_checks.FIELDS:
            object.__setattr__(self, field, self._traced(field, getattr(self, field)))
        score_checks.check_functions(self.functions, self.inputs)

    def _traced(self, field: str, function: Any) -> Function | None:
        """A field's function, traced again where it is that of another spec; one without its source as it is."""
        if isinstance(function, Function):
            if function.source is None:
                return function
            function = function.source
        if function is None:
            return None
        from pa_compiler.tracing import trace  # most specs have no function

        return trace(field, function, self.inputs, num_heads=self.num_heads)

    def _check_shapes(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        for name, dim in (("head_dim", self.head_dim), ("value_dim", self.result_dim)):
            if self.num_heads * dim > MAX_QUERY:
                raise ValueError(
                    f"num_heads: expected 1 to {MAX_QUERY // dim} with {name} = {dim}, got {self.num_heads}"
                )
        if self.head_tile & (self.head_tile - 1):
            raise ValueError(f"head_tile: expected a power of two, got {self.head_tile}")
        if self.kv_layout == "packed":
            if self.block_size % PACKED_TOKENS:
                raise ValueError(
                    f"block_size: expected a multiple of {PACKED_TOKENS} for kv_layout packed, got {self.block_size}"
                )
            if self.head_dim % self.packed_pair:
                raise ValueError(f"head_dim: expected an even number for packed bfloat16, got {self.head_dim}")
        if self.shared_kv and self.kv_layout == "packed":
            raise ValueError("shared_kv: expected False for kv_layout packed, whose keys and values lie differently")
        if self.shared_kv and self.result_dim > self.head_dim:
            raise ValueError(
                f"value_dim: expected 1 to head_dim = {self.head_dim} with shared_kv, got {self.value_dim}"
            )

    @property
    def result_dtype(self) -> str:
        """Element type of out: out_dtype, or else dtype, whatever dataclasses.replace makes of that."""
        return self.out_dtype or self.dtype

    @property
    def result_dim(self) -> int:
        """Elements of one value and of one head of out: value_dim, or else head_dim, whatever replace makes of that."""
        return self.value_dim or self.head_dim

    @property
    def functions(self) -> tuple[Function, ...]:
        """score_mod and mask_mod, as far as there are."""
        return tuple(function for function in (self.score_mod, self.mask_mod) if isinstance(function, Function))

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The tensors that the functions close over, each once: those of score_mod, then those of mask_mod."""
        return tuple(dict.fromkeys(constant for function in self.functions for constant in function.constants))

    def stated(self) -> dict[str, Any]:
        """Every field by its name, result_dtype and result_dim as out_dtype and value_dim, functions as their texts.

        The same for specs that mean the same. Values are those of JSON, but for tuples, which it has as lists.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {name: fields[name] and fields[name].text for name in score_checks.FIELDS}
        fields["inputs"] = tuple(map(tuple, self.inputs))
        fields |= {"out_dtype": self.result_dtype, "value_dim": self.result_dim}
        return fields | {"kv_scale": self.scales_of, "kv_rotation": self.rotation}

    def __eq__(self, other: object) -> bool:
        return self.stated() == other.stated() if isinstance(other, PagedAttentionSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.stated().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"

    def shown(self) -> dict[str, Any]:
        """What a reader needs of stated(): without the fields that say that something is not used."""
        return {name: value for name, value in self.stated().items() if value not in (None, False, ())}

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_flops(self) -> int:
        """Multiplications and additions of both matmuls for a token of context; the softmax is not counted."""
        return 2 * self.num_heads * (self.head_dim + self.result_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes that the caches hold of a token: its keys, its values where they are no part of these, its scales."""
        elements = self.head_dim + (0 if self.shared_kv else self.result_dim)
        scales = 2 * (1 + self.has_zeros) * ITEMSIZES["float32"] if self.token_scales else 0
        return self.num_kv_heads * (self.cache_bytes(elements) + scales)

    def cache_bytes(self, elements: int) -> int:
        """The bytes of so many elements of a cache."""
        return elements * ITEMSIZES[self.cache_dtype] // self.codes_of_byte

    @property
    def key_cache_shape(self) -> tuple[str, int, int, int]:
        """Shape of key_cache in kv_layout, with the run-time extent by name.

        Packed, the keys of a block are transposed: with p = packed_pair, element [b, h, d // p, p * slot + d % p] of
        [num_blocks, num_kv_heads, head_dim / p, p * block_size] is element d of the key in that slot. Of int4 the last
        axis has half of that, in bytes of two elements, in this layout as in others.
        """
        if self.kv_layout == "packed":
            pair, of_byte = self.packed_pair, self.codes_of_byte
            return ("num_blocks", self.num_kv_heads, self.head_dim // pair, pair * self.block_size // of_byte)
        return self._natural_cache_shape(self.head_dim)

    @property
    def value_cache_shape(self) -> tuple[str, int, int, int]:
        """Shape of value_cache in kv_layout, with the run-time extent by name.

        Packed, with p = packed_pair, element [b, h, slot // p, p * d + slot % p] of
        [num_blocks, num_kv_heads, block_size / p, p * value_dim] is element d of the value in that slot. With
        shared_kv it is the shape of the view of key_cache that the values are.
        """
        if self.kv_layout == "packed":
            pair, of_byte = self.packed_pair, self.codes_of_byte
            return ("num_blocks", self.num_kv_heads, self.block_size // pair, pair * self.result_dim // of_byte)
        return self._natural_cache_shape(self.result_dim)

    def _natural_cache_shape(self, dim: int) -> tuple[str, int, int, int]:
        dim //= self.codes_of_byte
        if self.kv_layout == "NHD":
            return ("num_blocks", self.block_size, self.num_kv_heads, dim)
        return ("num_blocks", self.num_kv_heads, self.block_size, dim)
