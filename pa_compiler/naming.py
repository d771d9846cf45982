"""The names of specs, targets and kernels, by one grammar: in explain, and in a bundle's symbols, manifest and calls.

    spec     DTYPE[_kv_CODES][_out_DTYPE]_LAYOUT_hHEADSxKV_HEADS_dHEAD_DIM[vVALUE_DIM]_bBLOCK_SIZE[_FIELD...]
    codes    KV_DTYPE_KV_SCALE[_rotated]
    kernel   pa_SPEC__STRATEGY_rROW_TILE_tKV_TILE__TARGET__FUNCTION

such as pa_f32_nhd_h16x1_d128_b16__heads_in_lanes_r16_t128__x86_64_v3__fused_decode. Fields of a spec that are not used
have no part in its name. Two specs that differ have different names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling

_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int8": "i8",
    "int4": "i4",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}
_DEFAULT_HEAD_TILE = _DEFAULT_BATCH_CHUNK = 16


def spec_name(spec: PagedAttentionSpec) -> str:
    """The name of a spec: letters, digits and _."""
    return "_".join(_parts(spec))


def _parts(spec: PagedAttentionSpec) -> Iterator[str]:
    yield _SHORT[spec.dtype]
    if spec.has_scales:
        yield f"kv_{_SHORT[spec.cache_dtype]}_{spec.scales_of}" + ("_rotated" if spec.rotates else "")
    if spec.kv_dots:
        yield f"dots_{_SHORT[spec.kv_dots]}"
    if spec.result_dtype != spec.dtype:
        yield f"out_{_SHORT[spec.result_dtype]}"
    yield spec.kv_layout.lower()
    yield f"h{spec.num_heads}x{spec.num_kv_heads}"
    yield f"d{spec.head_dim}" + (f"v{spec.result_dim}" if spec.result_dim != spec.head_dim else "")
    yield f"b{spec.block_size}"
    for field in ("shared_kv", "alibi", "sinks", "invariant"):
        if getattr(spec, field):
            yield field.removesuffix("_kv")
    if spec.window is not None:
        yield f"w{spec.window}"
    if spec.softcap is not None:
        yield f"cap{_identifier(f'{spec.softcap:g}'.replace('-', 'm').replace('+', ''))}"
    if spec.head_tile != _DEFAULT_HEAD_TILE:
        yield f"ht{spec.head_tile}"
    if spec.batch_chunk != _DEFAULT_BATCH_CHUNK:
        yield f"bc{spec.batch_chunk}"
    if spec.functions:
        stated = {name: spec.stated()[name] for name in ("score_mod", "mask_mod", "inputs")}
        yield f"fn{hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:8]}"


def target_name(config: Mapping[str, Any], stated: Mapping[str, Any]) -> str:
    """The name of a target, as PA_ISA takes it: its CPU, and the features that its user has set beside that.

    Args:
        config: The target, resolved.
        stated: As it was given.
    """
    return str(config["mcpu"]) + "".join(stated.get("mattr", []))


def variant_name(spec: str, tiles: Tiling, target: str) -> str:
    """The name of what a bundle has for a spec, named, with these tiles on a target."""
    return f"pa_{spec}__{tiles.strategy}_r{tiles.row_tile}_t{tiles.kv_tile}__{_identifier(target)}"


def kernel_name(spec: str, tiles: Tiling, target: str, function: str) -> str:
    """The symbol of a kernel."""
    return f"{variant_name(spec, tiles, target)}__{function}"


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)
