"""How far results on a cache are from those on the keys and values that it was made of: what a type of cache costs.

verify() asks whether a library computes what the codes in a cache say. Here the codes are what is in question: the
library's append_kv makes them and its decode reads them, and beside both is float64 on keys and values as they were.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from pa_compiler.kv_types import KV_ROTATIONS, KV_TYPES, LARGEST
from pa_compiler.reference_weights import Seen, Weighed, gathered, numbers_of, weigh
from pa_compiler.runtime.arguments import NUMPY_DTYPES
from pa_compiler.spec import PagedAttentionSpec

OUTLIERS, OUTLIER_SIZE = 4, 8.0
"""Elements of each head that are so many times as large as the others, in drawn data with outliers."""


class TokenError(NamedTuple):
    """What the codes of one token in one kv head do to the results.

    Attributes:
        token, kv_head: Which one.
        share: The part of the error of out that is the token's, to first order, as a fraction of out: root mean squares
            over queries and the heads that share the kv head.
        key, value: How far the codes are from the key, and from the value, as fractions of their lengths.
    """

    token: int
    kv_head: int
    share: float
    key: float
    value: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What measure() found.

    Attributes:
        spec: Of the module.
        num_tokens, num_queries: Of the data.
        out: [num_heads]: the root mean square of the error of out, as a fraction of that of out.
        out_of_all: The same over all heads together.
        lse: [num_heads]: the root mean square of the error of lse, which is a natural logarithm.
        keys, values: [num_kv_heads]: the same of keys and values, as fractions of theirs.
        worst: The tokens that do the most to out, the worst first.
    """

    spec: PagedAttentionSpec
    num_tokens: int
    num_queries: int
    out: np.ndarray
    out_of_all: float
    lse: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    worst: tuple[TokenError, ...]

    @property
    def lse_of_all(self) -> float:
        """As lse, over all heads together."""
        return float(np.sqrt((self.lse**2).mean()))


class Data(NamedTuple):
    """Queries [queries, num_heads, head_dim], keys [tokens, num_kv_heads, head_dim] and values, dtype of the spec."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def variants(spec: PagedAttentionSpec) -> list[PagedAttentionSpec]:
    """A spec with every type of cache that it may have, and with none of its own first."""
    none: dict[str, Any] = dict.fromkeys(("kv_dtype", "kv_scale", "kv_rotation", "kv_dots"))
    rows = [{"kv_dtype": kv_dtype, "kv_scale": scale} for kv_dtype, scales in KV_TYPES.items() for scale in scales]
    rows += [{"kv_dtype": "int8", "kv_rotation": "hadamard"}, {"kv_dtype": "int4", "kv_rotation": "none"}]
    rows += [{"kv_dtype": "int4", "kv_rotation": rotation, "kv_dots": "int8"} for rotation in KV_ROTATIONS]
    found = [dataclasses.replace(spec, **none)]
    for fields in rows:
        try:
            found.append(dataclasses.replace(spec, **(none | fields)))
        except ValueError:  # as of a head_dim that no rotation takes
            continue
    return found


def name_of(spec: PagedAttentionSpec) -> str:
    """What a type of cache is called in tables."""
    scale = "" if spec.scales_of is None else f", {spec.scales_of}"
    rotation = {"hadamard": ", rotated", "none": ", not rotated", None: ""}[spec.rotation]
    dots = f", dots of {spec.kv_dots}" if spec.kv_dots else ""
    return f"{spec.cache_dtype}{scale}{rotation}{dots}"


def drawn(
    spec: PagedAttentionSpec, num_tokens: int = 4096, num_queries: int = 8, *, outliers: bool = False, seed: int = 0
) -> Data:
    """Normal numbers of variance 1; with outliers, some elements of each head of keys and values are larger."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((num_queries, spec.num_heads, spec.head_dim))
    cached = []
    for dim in (spec.head_dim, spec.result_dim):
        numbers = rng.standard_normal((num_tokens, spec.num_kv_heads, dim))
        for head in range(spec.num_kv_heads if outliers else 0):
            numbers[:, head, rng.choice(dim, min(OUTLIERS, dim), replace=False)] *= OUTLIER_SIZE
        cached.append(numbers)
    return Data(*(each.astype(NUMPY_DTYPES[spec.dtype]) for each in (query, *cached)))


def measure(
    module: Any,
    data: Data,
    *,
    scale: float | None = None,
    key_scale: np.ndarray | None = None,
    value_scale: np.ndarray | None = None,
    num_worst: int = 5,
    **heads: np.ndarray,
) -> Accuracy:
    """Compare decode on a cache that append_kv made of some keys and values with float64 on these.

    Every query stands after all keys.

    Args:
        module: For a CPU, of any kv_dtype, or none; without score functions of its own.
        data: As drawn() makes it, or a user's own, of one sequence; dtypes are rounded to the spec's.
        scale: Factor of the scores; 1 / sqrt(head_dim) where it is None.
        key_scale: Of float8; where it is None, the largest magnitude of the keys becomes the type's largest number.
        value_scale: Likewise.
        num_worst: How many tokens are named.
        **heads: alibi_slopes and sinks, where the spec has them.

    Raises:
        ValueError: the data has other shapes than the spec, or numbers that are not real or not finite; or the spec is
            none that check_spec() lets through.
    """
    spec = module.spec
    data = _checked(spec, data)
    num_tokens, queries = len(data.keys), len(data.query)
    blocks = -(-num_tokens // spec.block_size)
    key_cache, value_cache = module.empty_cache(blocks)
    scales = _scales(module, data, key_scale, value_scale, blocks)
    slots = np.arange(num_tokens)
    module.append_kv(data.keys, data.values, key_cache, value_cache, slots, **scales)
    table = np.tile(np.arange(blocks, dtype=np.int32), (queries, 1))
    lens = np.full(queries, num_tokens, np.int32)
    out, lse = module.decode(data.query, key_cache, value_cache, table, lens, scale, return_lse=True, **scales, **heads)

    fields = {"window": spec.window, "softcap": spec.softcap, **heads}
    of_codes = fields | scales | {"kv_layout": spec.kv_layout, "kv_rotation": spec.rotation}
    keys_of, values_of = (_in_blocks(each, blocks, spec.block_size) for each in (data.keys, data.values))
    seen = Seen(num_tokens - 1, slots)
    errors, sizes, of_lse = [], [], []
    shares = np.zeros((spec.num_kv_heads, num_tokens))
    for number, query in enumerate(data.query):
        exact = weigh(query, keys_of, values_of, table[0], seen, scale, **fields)
        coded = weigh(query, key_cache, value_cache, table[0], seen, scale, **of_codes)
        errors.append(((out[number].astype(np.float64) - exact.out()) ** 2).mean(axis=-1))
        sizes.append((exact.out() ** 2).mean(axis=-1))
        of_lse.append(lse[number].astype(np.float64) - exact.lse)
        shares[:, exact.position] += _shares(exact, coded)
    wrong, size = np.mean(errors, axis=0), np.mean(sizes, axis=0)
    lengths = _numbers(spec, (key_cache, value_cache), scales, table[0], seen)
    keys, values = map(_lengths, lengths, (data.keys, data.values))
    of_out = size.reshape(spec.num_kv_heads, -1).sum(axis=-1, keepdims=True) * spec.result_dim * queries
    worst = _worst(np.sqrt(shares / of_out), keys, values, num_worst)
    return Accuracy(
        spec,
        num_tokens,
        queries,
        np.sqrt(wrong / size),
        float(np.sqrt(wrong.sum() / size.sum())),
        np.sqrt(np.mean(np.square(of_lse), axis=0)),
        np.sqrt((keys**2).mean(axis=-1)),
        np.sqrt((values**2).mean(axis=-1)),
        worst,
    )


def _worst(share: np.ndarray, keys: np.ndarray, values: np.ndarray, count: int) -> tuple[TokenError, ...]:
    """The tokens [num_kv_heads, tokens] with the largest shares, the largest first."""
    order = np.argsort(share, axis=None)[::-1][:count]
    places = [tuple(map(int, place)) for place in zip(*np.unravel_index(order, share.shape), strict=True)]
    return tuple(TokenError(t, h, float(share[h, t]), float(keys[h, t]), float(values[h, t])) for h, t in places)


def check_spec(spec: PagedAttentionSpec) -> None:
    """Refuse a spec that measure() does not take.

    Raises:
        ValueError: it has functions of its own, or one cache for keys and values.
    """
    for name in ("score_mod", "mask_mod"):
        if (function := getattr(spec, name)) is not None:
            raise ValueError(f"{name}: expected None for a comparison of caches, got {function.text}")
    if spec.shared_kv:
        raise ValueError("shared_kv: expected False for a comparison of caches, got True")


def _checked(spec: PagedAttentionSpec, data: Data) -> Data:
    check_spec(spec)
    shapes = {
        "query": (data.query, "queries", spec.num_heads, spec.head_dim),
        "keys": (data.keys, "tokens", spec.num_kv_heads, spec.head_dim),
        "values": (data.values, len(data.keys), spec.num_kv_heads, spec.result_dim),
    }
    for name, (array, *shape) in shapes.items():
        first = array.shape[0] if array.ndim and isinstance(shape[0], str) else shape[0]
        if array.ndim != 3 or list(array.shape) != [first, *shape[1:]] or not len(array):
            raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(array.shape)}")
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            raise ValueError(f"{name}: expected real numbers, got {array.dtype}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name}: expected finite numbers, got some that are not")
    return Data(*(each.astype(NUMPY_DTYPES[spec.dtype]) for each in data))


def _scales(
    module: Any, data: Data, key_scale: np.ndarray | None, value_scale: np.ndarray | None, blocks: int
) -> dict[str, np.ndarray]:
    """key_scale and value_scale by keyword: those that append_kv makes, those given, or what the data asks for."""
    spec = module.spec
    if not spec.has_scales:
        return {}
    made = dict(zip(("key_scale", "value_scale"), module.empty_scales(blocks), strict=True))
    if spec.token_scales:
        return made
    for name, given, numbers in (("key_scale", key_scale, data.keys), ("value_scale", value_scale, data.values)):
        largest = np.abs(numbers.astype(np.float32)).max(axis=(0, 2))
        of_all = largest if spec.scales_of == "head" else largest.max(keepdims=True)
        fitting = np.where(of_all > 0, of_all, 1) / np.float32(LARGEST[spec.kv_dtype])
        made[name] = (fitting if given is None else np.asarray(given)).astype(np.float32)
    return made


def _in_blocks(tokens: np.ndarray, blocks: int, block_size: int) -> np.ndarray:
    """Tokens in the blocks of a cache in NHD."""
    cache = np.zeros((blocks * block_size, *tokens.shape[1:]), tokens.dtype)
    cache[: len(tokens)] = tokens
    return cache.reshape(blocks, block_size, *tokens.shape[1:])


def _shares(exact: Weighed, coded: Weighed) -> np.ndarray:
    """[num_kv_heads, tokens]: the squared lengths of what tokens add to the errors of out, over the heads of a group.

    To first order a token adds weight * (error of its value + error of its score * (value - out)).
    """
    values, of_value = exact.values, coded.values - exact.values
    of_score, out = coded.scores - exact.scores, exact.weights @ exact.values

    def product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one * other).sum(axis=-1)[:, None]

    together = product(of_value, values) - out @ of_value.swapaxes(1, 2)
    apart = product(values, values) - 2 * out @ values.swapaxes(1, 2) + (out**2).sum(axis=-1)[..., None]
    lengths = product(of_value, of_value) + 2 * of_score * together + of_score**2 * apart
    return np.asarray((exact.weights**2 * lengths).sum(axis=1))


def _numbers(
    spec: PagedAttentionSpec,
    caches: tuple[np.ndarray, np.ndarray],
    scales: dict[str, np.ndarray],
    blocks: np.ndarray,
    seen: Seen,
) -> list[np.ndarray]:
    """What a cache says of keys and values: [num_kv_heads, tokens, dim], float64."""
    keys, values = gathered(*caches, blocks, seen.position, spec.kv_layout)
    return [
        numbers_of(codes, scales.get(name), blocks, seen.position, spec.block_size, spec.rotation)[0]
        for name, codes in (("key_scale", keys.swapaxes(1, 2)), ("value_scale", values))
    ]


def _lengths(found: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[num_kv_heads, tokens]: the length of the error of each vector, as a fraction of the vector's."""
    exact = given.astype(np.float64).swapaxes(0, 1)
    length = np.linalg.norm(exact, axis=-1)
    return np.linalg.norm(found - exact, axis=-1) / np.where(length > 0, length, 1)
