"""The types of caches that hold codes: each element is a code of 8 bits times a scale. And the checks of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_compiler.spec import PagedAttentionSpec

SCALES = ("tensor", "head", "token_head")
"""What may have a scale of its own."""

KV_TYPES: Mapping[str, tuple[str, ...]] = {
    "int8": ("token_head",),
    "float8_e4m3fn": ("tensor", "head"),
    "float8_e5m2": ("tensor", "head"),
}
"""The types of codes, with what may have a scale; the first where a spec does not say."""

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The largest finite number of each type; of int8 the largest code that append_kv writes, of either sign."""


def checked_kv_type(spec: PagedAttentionSpec) -> dict[str, str | None]:
    """The fields kv_dtype and kv_scale of a spec as they are kept: None where the caches hold dtype.

    Raises:
        TypeError: one of them is no string.
        ValueError: one of them is not known, does not go with the other, or other fields do not go with them.
    """
    fields = {"kv_dtype": (spec.dtype, *KV_TYPES), "kv_scale": SCALES}
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
        if kv_scale is not None:
            raise ValueError(f"kv_scale: expected None without a kv_dtype other than dtype, got {kv_scale!r}")
        return found
    if kv_scale not in (None, *KV_TYPES[kv_dtype]):
        raise ValueError(
            f"kv_scale: expected {' or '.join(KV_TYPES[kv_dtype])} with kv_dtype {kv_dtype}, got {kv_scale!r}"
        )
    if spec.kv_layout == "packed":
        raise ValueError(f"kv_layout: expected NHD or HND with kv_dtype {kv_dtype}, got 'packed'")
    if spec.shared_kv:
        raise ValueError(f"shared_kv: expected False with kv_dtype {kv_dtype}, got True")
    return found
