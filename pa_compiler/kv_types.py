"""Caches of codes: each element is a code of 8 or 4 bits times a scale. Their types, and a spec's fields for them."""

from __future__ import annotations

from collections.abc import Mapping

SCALES = ("tensor", "head", "token_head")
"""What may have a scale of its own."""

KV_TYPES: Mapping[str, tuple[str, ...]] = {
    "int8": ("token_head",),
    "float8_e4m3fn": ("tensor", "head"),
    "float8_e5m2": ("tensor", "head"),
    "int4": ("token_head",),
}
"""The types of codes, with what may have a scale; the first where a spec does not say."""

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int4": 15.0}
"""The largest finite number of each type; of int8 the largest code that append_kv writes, of either sign."""

CODES_OF_BYTE = {"int4": 2}
"""How many codes a byte of a cache holds, by their type, where it is not 1."""

KV_ROTATIONS = ("hadamard", "none")
"""What keys and values are multiplied by before they become codes."""


KV_DOTS = ("int8",)
"""What queries, and weights of values, may become to be multiplied by codes."""

DOTS_DIMS = 32
"""What head_dim and value_dim are multiples of then: words of eight codes fill vectors of 4."""


class CachesOfCodes:
    """What a spec's fields kv_dtype, kv_scale, kv_rotation and kv_dots mean."""

    dtype: str
    kv_dtype: str | None
    kv_scale: str | None
    kv_rotation: str | None
    kv_dots: str | None
    kv_layout: str
    invariant: bool
    head_dim: int
    num_kv_heads: int
    block_size: int
    shared_kv: bool

    @property
    def result_dim(self) -> int:
        """Elements of one value and of one head of out."""
        raise NotImplementedError

    @property
    def cache_dtype(self) -> str:
        """Element type of the caches: kv_dtype, or else dtype."""
        return self.kv_dtype or self.dtype

    @property
    def scales_of(self) -> str | None:
        """What has a scale of its own: kv_scale, or else the first that kv_dtype has. None without a kv_dtype."""
        return (self.kv_scale or KV_TYPES[self.kv_dtype][0]) if self.kv_dtype else None

    @property
    def has_scales(self) -> bool:
        """Whether the caches hold codes, with scales beside them."""
        return self.kv_dtype is not None

    @property
    def token_scales(self) -> bool:
        """Whether each head of each token has a scale, which append_kv writes."""
        return self.scales_of == "token_head"

    @property
    def has_zeros(self) -> bool:
        """Whether a zero point lies beside each scale: number = scale * code + zero point."""
        return self.kv_dtype == "int4"

    @property
    def rotation(self) -> str | None:
        """kv_rotation, or else "hadamard" of int4; None of other types without a rotation."""
        if self.kv_dtype == "int4":
            return self.kv_rotation or "hadamard"
        return None if self.kv_rotation == "none" else self.kv_rotation

    @property
    def rotates(self) -> bool:
        """Whether keys and values are multiplied by a Hadamard matrix before they become codes."""
        return self.rotation == "hadamard"

    @property
    def byte_dots(self) -> bool:
        """Whether decode multiplies codes by integers of 8 bits, which queries and weights become."""
        return self.kv_dots == "int8"

    @property
    def codes_of_byte(self) -> int:
        """Elements that a byte of a cache holds, side by side in its last axis; 1 where an element has bytes."""
        return CODES_OF_BYTE.get(self.cache_dtype, 1)

    @property
    def wide_range(self) -> bool:
        """Whether elements reach as far as float32 does, so that products and sums of a few may leave its range."""
        return self.dtype != "float16" or self.kv_dtype is not None

    @property
    def packed_pair(self) -> int:
        """Elements that kv_layout "packed" keeps side by side: 2 of bfloat16, as dots take them, and int4; else 1."""
        return 2 if self.cache_dtype in ("bfloat16", "int4") else 1

    @property
    def scale_shape(self) -> tuple[str | int, ...]:
        """Shape of key_scale and of value_scale, with the run-time extent by name: the same in every layout."""
        if self.token_scales:
            shape = ("num_blocks", self.num_kv_heads, self.block_size)
            return (*shape, 2) if self.has_zeros else shape
        return (self.num_kv_heads,) if self.scales_of == "head" else (1,)


def checked_kv_type(spec: CachesOfCodes) -> dict[str, str | None]:
    """The fields kv_dtype, kv_scale, kv_rotation and kv_dots of a spec as they are kept: None where caches hold dtype.

    Raises:
        TypeError: one of them is no string.
        ValueError: one of them is not known, does not go with the other, or other fields do not go with them.
    """
    fields = {"kv_dtype": (spec.dtype, *KV_TYPES), "kv_scale": SCALES, "kv_rotation": KV_ROTATIONS}
    fields["kv_dots"] = KV_DOTS
    found: dict[str, str | None] = {}
    for name, choices in fields.items():
        value = getattr(spec, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: expected a string, got {value!r} of type {type(value).__name__}")
        if value is not None and value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        found[name] = None if value is None else choices[choices.index(value)]  # nor a str of another class
    if found["kv_dtype"] == spec.dtype:
        found["kv_dtype"] = None
    kv_dtype, kv_scale = found["kv_dtype"], found["kv_scale"]
    if kv_dtype is None:
        for name in ("kv_scale", "kv_rotation", "kv_dots"):
            if found[name] is not None:
                raise ValueError(f"{name}: expected None without a kv_dtype other than dtype, got {found[name]!r}")
        return found
    if kv_scale not in (None, *KV_TYPES[kv_dtype]):
        raise ValueError(
            f"kv_scale: expected {' or '.join(KV_TYPES[kv_dtype])} with kv_dtype {kv_dtype}, got {kv_scale!r}"
        )
    if spec.shared_kv:
        raise ValueError(f"shared_kv: expected False with kv_dtype {kv_dtype}, got True")
    _check_dims(spec, kv_dtype, found["kv_rotation"])
    if found["kv_dots"] is not None:
        _check_dots(spec, kv_dtype, found["kv_dots"])
    return found


def _check_dots(spec: CachesOfCodes, kv_dtype: str, kv_dots: str) -> None:
    """Whether decode can multiply codes by integers of 8 bits, with errors below those of the codes."""
    if kv_dtype != "int4":
        raise ValueError(f"kv_dots: expected None with kv_dtype {kv_dtype}, or kv_dtype int4, got {kv_dots!r}")
    if spec.kv_layout == "packed":
        raise ValueError(f"kv_layout: expected NHD or HND with kv_dots {kv_dots}, got {spec.kv_layout!r}")
    if spec.invariant:
        raise ValueError(f"invariant: expected False with kv_dots {kv_dots}, which attend does not have, got True")
    for name, dim in (("head_dim", spec.head_dim), ("value_dim", spec.result_dim)):
        if dim % DOTS_DIMS:
            raise ValueError(f"{name}: expected a multiple of {DOTS_DIMS} with kv_dots {kv_dots}, got {dim}")


def _check_dims(spec: CachesOfCodes, kv_dtype: str, kv_rotation: str | None) -> None:
    """Whether head_dim and value_dim are such that a rotation takes, and whole bytes hold."""
    codes = CODES_OF_BYTE.get(kv_dtype, 1)
    rotates = kv_rotation == "hadamard" or (kv_rotation is None and kv_dtype == "int4")
    if rotates and "token_head" not in KV_TYPES[kv_dtype]:
        raise ValueError(f"kv_rotation: expected None or none with kv_dtype {kv_dtype}, got {kv_rotation!r}")
    for name, dim in (("head_dim", spec.head_dim), ("value_dim", spec.result_dim)):
        if rotates and dim & (dim - 1):
            other = " unless kv_rotation is none, which is less accurate" if kv_rotation is None else ""
            raise ValueError(f"{name}: expected a power of two for kv_rotation hadamard{other}, got {dim}")
        if dim % codes:
            raise ValueError(f"{name}: expected a multiple of {codes} with kv_dtype {kv_dtype}, got {dim}")
