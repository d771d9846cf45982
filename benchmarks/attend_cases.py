"""What attend is timed on, by name: each a shape, a dtype and who brings how many query tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.cases import beyond_cache
from pa_compiler import PagedAttentionSpec
from pa_compiler.verification.cases import Case

_BLOCK = 32  # tokens, of which vLLM's blocks are multiples; the others have blocks of their own, or none


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases that are measured in the same turns.

    Attributes:
        cases: By name.
        parts: Of a case, those of its group whose times, added up, its own is compared with.
        from_memory: Whether keys and values are to exceed the last-level cache.
    """

    cases: Mapping[str, Case]
    parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    from_memory: bool = False

    def sized(self, cache_bytes: int) -> dict[str, Case]:
        """The cases as they are measured on a machine with such a last-level cache."""
        if not self.from_memory:
            return dict(self.cases)
        return {name: beyond_cache(case, cache_bytes) for name, case in self.cases.items()}


def _call(spec: PagedAttentionSpec, *sequences: tuple[int, int]) -> Case:
    """A case of sequences, each given by its query tokens and its context."""
    counts, lengths = zip(*sequences, strict=True)
    return Case(spec, len(sequences), lengths, scale=None, query_lens=counts)


def _groups(shape: str, spec: PagedAttentionSpec) -> dict[str, Group]:
    chunk = (512, 2048)
    alone = {
        "prefill-2048": [(2048, 2048)],
        "prefill-8192": [(8192, 8192)],
        "chunk-512-of-8192": [(512, 8192)],
        "4x256-of-2048": [(256, 2048)] * 4,
        "8-decodes-and-512": [(1, 2048)] * 8 + [chunk],
    }
    groups = {f"{shape}-{name}": Group({f"{shape}-{name}": _call(spec, *each)}) for name, each in alone.items()}
    decodes, prompt, both = (f"{shape}-{name}" for name in ("31-decodes", "512-of-2048", "31-decodes-and-512"))
    together = {decodes: _call(spec, *[(1, 2048)] * 31), prompt: _call(spec, chunk)}
    together[both] = _call(spec, *[(1, 2048)] * 31, chunk)
    groups[f"{shape}-31-and-512"] = Group(together, {both: (decodes, prompt)})
    guesses = {f"{shape}-{count}-token{'s'[: count > 1]}": count for count in (1, 2, 4, 8)}
    few = {name: _call(spec, *[(count, 2048)] * 8) for name, count in guesses.items()}
    one, *more = few
    groups[f"{shape}-few-tokens"] = Group(few, dict.fromkeys(more, (one,)), from_memory=True)
    return groups


_SHAPES = {
    "32/8": (32, 8, 128),
    "16/1": (16, 1, 128),
    "32/32": (32, 32, 128),
    "9/3-d64": (9, 3, 64),
    "32/8-d64": (32, 8, 64),
}
"""Query heads, kv heads and head_dim."""

GROUPS = {
    name: group
    for shape, (num_heads, num_kv_heads, head_dim) in _SHAPES.items()
    for dtype, short in (("bfloat16", "bf16"), ("float32", "f32"))
    for name, group in _groups(
        f"{shape}-{short}", PagedAttentionSpec(num_heads, num_kv_heads, head_dim, _BLOCK, dtype)
    ).items()
}
"""All that can be measured."""

COMMON = ("32/8-bf16-*", "*-prefill-2048")
"""The patterns of what is measured unless something else is asked for."""

ATTEND_CASES = {name: case for group in GROUPS.values() for name, case in group.cases.items()}
