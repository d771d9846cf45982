"""PagedCache: the Cache that generate() hands to a model. Its layers have blocks of the kernels' layout.

A layer takes new keys and values in update(), as transformers asks, and leaves itself in the attention's arguments.
The attention, which alone knows the padding, has them written and attends. So update() returns what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pa_compiler.integrations.transformers.steps import Step, make_step
from pa_compiler.runtime.module import Module

BLOCK_SIZE = 32
"""Tokens of a block."""

HUGE_PAGE = 2 << 20
"""Bytes."""


class Codes(NamedTuple):
    """The fields of a spec of these names: what caches hold in place of the model's type."""

    kv_dtype: str | None = None
    kv_scale: str | None = None
    kv_rotation: str | None = None


PLAIN = Codes()
"""The model's type itself."""


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, in blocks: sequence b has those from b * blocks on.

    Args:
        cache: The PagedCache that it belongs to.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized: bool = False
        self.module: Any = None  # which the caches are of
        self.scales: dict[str, torch.Tensor] = {}  # of codes, by keyword of the module's calls
        self._cache, self._batch, self._blocks, self.columns = cache, 0, 0, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: memory is taken when the attention's module is known."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **options: Any) -> Any:
        """Take new keys and values [batch, num_kv_heads, columns, head_dim], which the attention is to append."""
        arguments = options.get("kwargs")
        if arguments is None:
            raise ValueError("cache: expected a model that hands its attention's arguments to update(), got none")
        arguments["paged_layer"] = self
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def append(self, module: Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Step:
        """Write the keys and values that update() took last, [batch, num_kv_heads, columns, dim], into the blocks."""
        batch, appended = key.shape[0], key.shape[2]
        self._make_room(module, batch, self.columns)
        step = self._cache.step(batch, self._blocks, self.columns, appended, mask)
        append(module, key, value, self.keys, self.values, step, self.scales)
        return step

    @property
    def codes(self) -> Codes:
        """What its caches hold in place of the model's type."""
        return self._cache.codes

    def _make_room(self, module: Module, batch: int, columns: int) -> None:
        """Have blocks for so many columns of each sequence; what is there is copied."""
        if self.is_initialized and batch != self._batch:
            raise ValueError(f"cache: expected the {self._batch} sequences that it has, got {batch}")
        needed = -(-columns // BLOCK_SIZE)
        if needed <= self._blocks:
            return
        blocks = max(needed, -(-self._cache.capacity // BLOCK_SIZE), 2 * self._blocks)
        before = self._arrays()
        self.keys, self.values = empty_caches(module, batch * blocks)
        self.scales = empty_scales(module, batch * blocks)
        for new, old in zip(self._arrays(module) if before else [], before, strict=True):
            _by_sequence(new, batch)[:, : self._blocks] = _by_sequence(old, batch)
        self.module, self._batch, self._blocks, self.is_initialized = module, batch, blocks, True

    def _choose(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sequences anew from those that there are."""
        if self.is_initialized:
            before, batch = self._arrays(), self._batch
            index = chosen(torch.arange(batch))
            self._batch = len(index)
            self.keys, self.values = empty_caches(self.module, self._batch * self._blocks)
            self.scales = empty_scales(self.module, self._batch * self._blocks)
            for new, old in zip(self._arrays(), before, strict=True):
                torch.index_select(_by_sequence(old, batch), 0, index, out=_by_sequence(new, self._batch))

    def _arrays(self, module: Module | None = None) -> list[torch.Tensor]:
        """What there is of each block: caches as bytes where they hold codes, and scales of tokens."""
        module = module or self.module
        if module is None or self.keys is None or self.values is None:
            return []
        caches = [self.keys, self.values]
        if not module.spec.has_scales:
            return caches
        return [
            *(cache.view(torch.uint8) for cache in caches),
            *(self.scales.values() if module.spec.token_scales else ()),
        ]

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask has, and the first of them."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget all tokens, and keep the memory."""
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a number from 0 down, as transformers has it."""
        if not -self.columns <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove: expected {-self.columns} to 0, got {tokens_to_remove}")
        self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences by index, for beam search."""
        self._choose(lambda each: each[beam_idx])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Sequences by index."""
        self._choose(lambda each: each[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self._choose(lambda each: each.repeat_interleave(repeats, dim=0))


class PagedCache(Cache):
    """The cache of generate() after enable(model); to be given to it only to keep it from one call to the next.

    Args:
        num_layers: Of the model.
        capacity: Columns (prompt and new tokens) that there is room for at first. It grows, by copying.
        codes: What it holds in place of the model's type.
    """

    def __init__(self, num_layers: int, capacity: int = 256, codes: Codes = PLAIN) -> None:
        super().__init__(layers=[PagedLayer(self) for _ in range(num_layers)])
        self.capacity, self.codes = capacity, codes
        self._sizes: tuple[int, ...] = ()
        self._steps: list[tuple[torch.Tensor | None, Step]] = []

    def step(self, batch: int, blocks: int, total: int, appended: int, mask: torch.Tensor | None) -> Step:
        """The Step of a forward pass, made once for each mask: layers of a kind have one."""
        if self._sizes != (batch, blocks, total, appended):
            self._sizes, self._steps = (batch, blocks, total, appended), []
        for known, step in self._steps:
            if known is mask:
                return step
        step = make_step(batch, blocks, BLOCK_SIZE, total, appended, appended, mask)
        self._steps.append((mask, step))
        return step


def layouts(dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """The kv_layout that caches are made in, and others in which modules that are there already are as welcome.

    bfloat16 is packed, where heads can be: on most CPUs decode reads it fastest, and prompts cost the same.
    """
    return ("packed", "NHD") if dtype == torch.bfloat16 and head_dim % 2 == 0 else ("NHD", "packed")


def empty_caches(module: Module, blocks: int) -> tuple[Any, Any]:
    """Key and value caches of so many blocks, on huge pages where they fill at least half of one.

    A page of 2 MB is cleared when it is first written: two in each layer would take longer than a short prompt.
    """
    shapes = [(blocks, *shape[1:]) for shape in (module.spec.key_cache_shape, module.spec.value_cache_shape)]
    dtype = torch.uint8 if module.spec.cache_dtype == "int4" else getattr(torch, module.spec.cache_dtype)
    if min(math.prod(shape) for shape in shapes) * dtype.itemsize >= HUGE_PAGE // 2:
        return module.empty_cache(blocks, like="torch")
    keys, values = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    return keys, values


def empty_scales(module: Module, blocks: int) -> dict[str, torch.Tensor]:
    """Scales of caches of so many blocks, by keyword; of float8 each is 1."""
    if not module.spec.has_scales:
        return {}
    key_scale, value_scale = module.empty_scales(blocks, like="torch")
    return {"key_scale": key_scale, "value_scale": value_scale}


def append(
    module: Module, key: torch.Tensor, value: torch.Tensor, keys: Any, values: Any, step: Step, scales: dict[str, Any]
) -> None:
    """append_kv of [batch, num_kv_heads, columns, dim]."""
    if key.shape[2] == 1:  # each of torch's calls takes some us, in each layer of each step
        key, value = key.squeeze(2), value.squeeze(2)
    else:
        key, value = key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1)
    module.append_kv(key, value, keys, values, step.slots, **scales)


def _by_sequence(cache: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, blocks, ...] of [batch * blocks, ...]."""
    return cache.view(batch, len(cache) // batch, *cache.shape[1:])
