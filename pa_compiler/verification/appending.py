"""append_kv in a drawn call of verify(): into caches of poison."""

from __future__ import annotations

from typing import Any

import numpy as np

from pa_compiler.layout import convert_cache
from pa_compiler.verification.draws import Draw, inside


def append_drawn(module: Any, call: Draw, key_cache: np.ndarray, value_cache: np.ndarray | None) -> list[str]:
    """Write the draw's tokens into caches of poison, in any order and with some that are skipped, by one append_kv.

    Returns what is wrong with scales that it makes.
    """
    rng, of_codes = call.rng, module.spec.has_scales
    skipped = np.full(rng.integers(0, 4), -1)
    slots = rng.permutation(np.concatenate([np.flatnonzero(call.is_used), skipped]))
    # Slot -1 names the last slot here, in a spare block or past a length: its poison is what must not be written.

    def tokens(drawn: np.ndarray, cache: np.ndarray) -> np.ndarray:
        if not of_codes:  # codes of slots without a token are as they were drawn
            cache.fill(call.poison)
        return inside(drawn.reshape(-1, *drawn.shape[2:])[slots], np.nan, rng)[0]

    new_keys, new_values = call.new or (call.keys, call.values)
    key = tokens(new_keys, key_cache)
    value = None if value_cache is None else tokens(new_values, value_cache)
    if not of_codes:
        module.append_kv(key, value, key_cache, value_cache, slots)
        return []
    return _append_codes(module, call, key, value, key_cache, value_cache, slots)


def _append_codes(
    module: Any,
    call: Draw,
    key: np.ndarray,
    value: np.ndarray | None,
    key_cache: np.ndarray,
    value_cache: np.ndarray | None,
    slots: np.ndarray,
) -> list[str]:
    """The same into caches of codes, whose slots that are written are cleared, and so are scales that are made."""
    is_used, spec = call.is_used, module.spec
    keys, values = convert_cache(key_cache, value_cache, spec.kv_layout, "NHD")
    for cache in (keys, values):
        cache.view(np.uint8)[is_used] = 0x55
    for cache, new in zip((key_cache, value_cache), convert_cache(keys, values, "NHD", spec.kv_layout), strict=True):
        assert cache is not None
        cache[...] = new
    given = {name: call.heads[name] for name in ("key_scale", "value_scale")}
    made = {name: np.full(scale.shape, np.float32(7)) if spec.token_scales else scale for name, scale in given.items()}
    module.append_kv(key, value, key_cache, value_cache, slots, **made)
    if not spec.token_scales:
        return []
    wrong = []
    for name, scale in made.items():
        of_slots = np.expand_dims(is_used, (1, *range(3, scale.ndim)))
        expected = np.where(of_slots, given[name], np.float32(7))
        if not np.array_equal(scale, expected, equal_nan=True):
            wrong.append(f"{name}: its scales are not as expected after append_kv")
    return wrong
