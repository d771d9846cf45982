"""Layers of vLLM without a model: what attends in one, and steps of sequences that grow on shuffled pages."""

from __future__ import annotations

import types

import ml_dtypes
import numpy as np
import torch
from vllm import _custom_ops
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backends import cpu_attn

from pa_compiler.codes import quantised
from pa_compiler.integrations.vllm.layers import FLOAT8
from pa_compiler.verification.comparison import compare, oracle

PAGES, ROOM = 24, 8
"""Pages in all, and entries of each row of the block table."""

NAN = 0x7F
"""A NaN of both float8, as a byte."""


def make_layer(
    impl_class,
    monkeypatch,
    dtype,
    shape=(8, 2, 64),
    window=None,
    softcap=None,
    alibi=False,
    sinks=False,
    kv_cache_dtype="auto",
    scales=(1.0, 1.0),
):
    """An Attention as far as a backend looks at one. shape is (num_heads, num_kv_heads, head_size).

    scales are those of keys and of values: numbers, or a number for each kv head.
    """
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    num_heads, num_kv_heads, head_size = shape
    slopes = [2.0 ** -(head + 1) for head in range(num_heads)] if alibi else None
    of_heads = torch.linspace(-2, 3, num_heads, dtype=dtype) if sinks else None
    arguments = (num_heads, head_size, head_size**-0.5, num_kv_heads, slopes, window, kv_cache_dtype, softcap)
    key_scale, value_scale = map(torch.tensor, scales)
    return types.SimpleNamespace(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_torch_dtype=kv_cache_dtype_str_to_dtype(kv_cache_dtype, config.model_config),
        kv_sharing_target_layer_name=None,
        use_mm_prefix=False,
        impl=impl_class(*arguments, sinks=of_heads),
        isa="vec",
        _k_scale=key_scale,
        _v_scale=value_scale,
        _k_scale_float=key_scale.max().item(),
        _v_scale_float=value_scale.max().item(),
    )


def numpy_of(tensor):
    """A tensor's elements in NumPy, without a copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Sequences:
    """Sequences on pages of a layer. What is nowhere written is NaN, or 0 for vLLM's own kernel, which reads it.

    Args:
        layer: Of make_layer.
        block_size: Tokens of a page.
        poison: What pages hold at first; NaN as bytes where they hold float8.

    Attributes:
        pages: What the layer is given, and writes.
        kept: [2, pages, tokens, heads, elements], in NumPy: the keys and values that pages are to hold.
    """

    def __init__(self, layer, block_size, poison=float("nan")):
        self.layer, self.block_size, self.dtype = layer, block_size, layer.dtype
        heads, dim, self.kv_dtype = layer.num_kv_heads, layer.head_size, FLOAT8.get(layer.kv_cache_dtype)
        of_pages, nan = layer.kv_cache_torch_dtype, float("nan")
        if self.kv_dtype:
            poison = nan = NAN
        self.pages = torch.full((PAGES, heads, block_size, 2 * dim), poison, dtype=of_pages)
        self.kept = numpy_of(torch.full((2, PAGES, block_size, heads, dim), nan, dtype=of_pages))
        if self.kv_dtype:
            self.kept = self.kept.view(self.kv_dtype)
        order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(-1, ROOM).int()
        self.lens = [0] * len(self.tables)
        self.draw = torch.Generator().manual_seed(1)

    def step(self, counts, spare=3):
        """Append so many tokens to sequences, {sequence: tokens}, and attend from them.

        Some more tokens than there are come with the call, as when vLLM pads a step.

        Returns:
            What attended, [tokens, num_heads, head_size], and (spec) -> what is wrong with it.
        """
        layer, tokens = self.layer, sum(counts.values())
        query = self._noise(tokens + spare, layer.num_heads)
        key, value = (self._noise(tokens + spare, layer.num_kv_heads) for _ in range(2))
        slots = torch.cat([self._slots(each, count) for each, count in counts.items()])
        self.kept.reshape(2, -1, *self.kept.shape[3:])[:, slots.numpy()] = self._held(key[:tokens], value[:tokens])
        for each, count in counts.items():
            self.lens[each] += count
        rows = list(counts)
        table = torch.full((len(rows), ROOM + 1), 2**30, dtype=torch.int32)
        for row, each in enumerate(rows):
            used = -(-self.lens[each] // self.block_size)
            table[row, :used] = self.tables[each, :used]
        starts = torch.tensor([0, *np.cumsum(list(counts.values()))], dtype=torch.int32)
        lens = torch.tensor([self.lens[each] for each in rows], dtype=torch.int32)
        metadata = self._metadata(tokens, max(counts.values()), starts, lens, table, slots)
        out = torch.full_like(query, 7)
        layer.impl.do_kv_cache_update(layer, key, value, self.pages, slots)
        layer.impl.forward(layer, query, key, value, self.pages, metadata, out)
        assert (out[tokens:] == 7).all()
        given = numpy_of(query[:tokens]), *self.kept, table.numpy(), lens.numpy()
        return out[:tokens], lambda spec: self._wrong(spec, out[:tokens], given, starts.numpy())

    def _scales(self):
        """key_scale and value_scale, [1] or [heads]."""
        return [each.reshape(-1).numpy() for each in (self.layer._k_scale, self.layer._v_scale)]

    def _held(self, *new):
        """Keys and values [tokens, heads, elements] as pages are to hold them, stacked."""
        given = [numpy_of(each) for each in new]
        if self.kv_dtype:
            of_rows = [each[:, None] for each in self._scales()]
            given = [quantised(each, self.kv_dtype, of).codes for each, of in zip(given, of_rows, strict=True)]
        return np.stack(given)

    def _wrong(self, spec, out, given, starts):
        impl, of_heads = self.layer.impl, {}
        if impl.sinks is not None:
            of_heads["sinks"] = impl.sinks.float().numpy()
        if impl.alibi_slopes is not None:
            of_heads["alibi_slopes"] = impl.alibi_slopes.numpy()
        if self.kv_dtype:
            of_heads["key_scale"], of_heads["value_scale"] = self._scales()
        expected = oracle(spec, *given, impl.scale, "NHD", query_start_loc=starts, **of_heads)
        row_lens = np.repeat(given[-1], np.diff(starts))
        return compare("out", numpy_of(out), *expected["out"], row_lens)[1]

    def _noise(self, tokens, heads):
        return torch.randn(tokens, heads, self.layer.head_size, generator=self.draw).to(self.dtype)

    def _slots(self, sequence, count):
        at = torch.arange(self.lens[sequence], self.lens[sequence] + count)
        return self.tables[sequence, at // self.block_size].long() * self.block_size + at % self.block_size

    def _metadata(self, tokens, most, starts, lens, table, slots):
        layer, schedule = self.layer, None
        if getattr(layer.impl, "kernels", None) is None:
            shape = (layer.num_heads, layer.num_kv_heads, layer.head_size)
            options = {"isa": layer.isa, "enable_kv_split": True, "sliding_window_size": layer.impl.sliding_window}
            known = {"seq_lens": lens, "dtype": self.dtype, "query_start_loc": starts, "causal": True}
            sizes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), shape, strict=True))
            schedule = _custom_ops.cpu_attn_get_scheduler_metadata(len(lens), **sizes, **known, **options)
        return cpu_attn.CPUAttentionMetadata(tokens, most, starts, int(lens.max()), lens, table, slots, schedule)
