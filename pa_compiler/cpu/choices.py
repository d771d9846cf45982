"""What `pa-compiler tune` varies, and what a target may say is tuned: values of fields of machines.Machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TILES = tuple({"kv_tile": tokens, "second_level": 1 << 22} for tokens in (32, 64, 128, 256, 512))
REGISTERS = tuple({"load_costs": [1, cost]} for cost in (0.25, 0.5, 1.5, 3, 6))
LEVELS = ({"llvm_level": 2},)
STREAMS = tuple({"streams": places, "paired_streams": places} for places in (1, 2, 4, 8, 16))

CHOICES: Mapping[str, Mapping[str, tuple[dict[str, Any], ...]]] = {
    "decode": {
        "order": ({"sweep_intensity": 0.0}, {"sweep_intensity": 1000.0, "sweep_rows": 1024}),
        "lanes": ({"heads_in_lanes": 8}, {"heads_in_lanes": 1024}),
        "tile": TILES,
        "registers": REGISTERS,
        "streams": STREAMS,
        "optimizer": LEVELS,
    },
    "attend": {
        "tile": tuple({"attend_bytes": 1 << log2} for log2 in range(14, 21)),
        "registers": ({"attend_vectors": 1}, {"attend_vectors": 2}, *REGISTERS),
        "optimizer": LEVELS,
    },
}
"""What a target may say is tuned, by kernels: what is varied, in the order in which it is, and its choices.

They change the order of sums and nothing else of a result.
"""


def checked(tuned: Any) -> dict[str, dict[str, Any]]:
    """What a target says is tuned, in one order.

    Raises:
        TypeError, ValueError: it is none of CHOICES; with the name and both values.
    """
    if not isinstance(tuned, Mapping) or not all(isinstance(each, Mapping) for each in tuned.values()):
        raise TypeError(f"target: expected tuned to be a dict of dicts by kernels, got {tuned!r}")
    if unknown := set(tuned) - set(CHOICES):
        raise ValueError(f"target: expected tuned to have the kernels {sorted(CHOICES)}, got also {sorted(unknown)}")
    for kernel, fields in tuned.items():
        known = values_of(kernel)
        for name, value in fields.items():
            if name not in known:
                raise ValueError(f"target: expected tuned {kernel} to have some of {sorted(known)}, got {name!r}")
            if not any(value == each and type(value) is type(each) for each in known[name]):
                raise ValueError(f"target: expected tuned {kernel} {name} to be one of {known[name]}, got {value!r}")
    return {kernel: dict(sorted(tuned[kernel].items())) for kernel in CHOICES if tuned.get(kernel)}


def values_of(kernel: str) -> dict[str, list[Any]]:
    """By fields of Machine, the values that may be tuned in a kernel."""
    found: dict[str, list[Any]] = {}
    for choices in CHOICES[kernel].values():
        for fields in choices:
            for name, value in fields.items():
                found.setdefault(name, []).append(value)
    return found
