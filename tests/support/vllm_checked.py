"""These kernels in vLLM's engine, each call beside float64 on keys and values that torch has rounded to float8.

Whole models cannot be compared so: where two computations differ in the last bit of float32, some element of a later
layer is rounded to the next number of float8, and from there on they drift apart. So what is compared is each layer of
each step, on the queries that it gets and on the keys and values that were appended to its slots until then.
"""

from __future__ import annotations

import re

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from pa_compiler.integrations.vllm.backend import PagedBackend, PagedImpl
from pa_compiler.verification.tolerances import TOLERANCES

EXPECTED = {}
"""Of layers that are made from now on: {"dtype": the float8 of their pages, as torch calls it, "scales": for each layer
of the model one of keys and one of values, numbers or a number for each kv head, 1 where there are none, "skipped":
layers whose pages are of the model's type}."""

FOUND = {"calls": 0, "worst": 0.0}
"""Calls of forward that were compared, and their largest error as a fraction of its bound."""


class CheckedBackend(PagedBackend):
    @staticmethod
    def get_impl_cls():
        return CheckedImpl


class CheckedImpl(PagedImpl):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.expected, self.kept = dict(EXPECTED), None

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.kept is None:
            blocks, heads, tokens, _ = kv_cache.shape
            self.kept = torch.full((2, blocks, tokens, heads, key.shape[-1]), float("nan"))
        number = int(re.search(r"\d+", layer.layer_name)[0])
        new = torch.stack([key, value])[:, : len(slot_mapping)].float()
        if number not in self.expected.get("skipped", ()):
            scales = self.expected["scales"][number] if "scales" in self.expected else (1.0, 1.0)
            new = torch.stack([rounded(*each, self.expected["dtype"]) for each in zip(new, scales, strict=True)])
        written = slot_mapping >= 0
        self.kept.flatten(1, 2)[:, slot_mapping[written]] = new[:, written]

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **scales):
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **scales)
        if attn_metadata is not None:
            starts, block_size = attn_metadata.query_start_loc.tolist(), self.kept.shape[2]
            for row, length in enumerate(attn_metadata.seq_lens.tolist()):
                blocks = attn_metadata.block_table[row, : -(-length // block_size)].long()
                keys, values = self.kept[:, blocks].flatten(1, 2)[:, :length]
                of_row = slice(starts[row], starts[row + 1])
                self.compare(output[of_row], query[of_row], keys, values)
            FOUND["calls"] += 1
        return output

    def compare(self, out, query, keys, values):
        """Of one sequence: out and query [tokens, num_heads, dim], keys and values [length, num_kv_heads, dim]."""
        exact, magnitude = attention(query.double(), keys.double(), values.double(), self.scale)
        tolerance = TOLERANCES[str(query.dtype).removeprefix("torch.")]
        bound = tolerance.of_out * exact.abs() + tolerance.of_magnitude * magnitude
        error = (out.double() - exact).abs()
        worst = torch.where(error == 0, 0.0, error / bound).max().item()  # values of 0 alone have to be met exactly
        FOUND["worst"] = max(FOUND["worst"], worst if worst == worst else float("inf"))


def attention(query, keys, values, scale):
    """Causal, of the last tokens of a sequence: out [tokens, num_heads, dim], and that of the values' magnitudes."""
    tokens, heads, dim = query.shape
    length, kv_heads, _ = keys.shape
    scores = torch.einsum("nkgd,lkd->nkgl", query.view(tokens, kv_heads, heads // kv_heads, dim), keys) * scale
    position = torch.arange(length - tokens, length).view(-1, 1, 1, 1)
    weights = scores.masked_fill(torch.arange(length) > position, float("-inf")).softmax(-1)
    return (torch.einsum("nkgl,lkd->nkgd", weights, each).reshape(query.shape) for each in (values, values.abs()))


def rounded(numbers, scale, dtype):
    """The multiples of a scale nearest to numbers [tokens, heads, elements] that a float8 has."""
    dtype, scale = getattr(torch, dtype), torch.tensor(scale).view(-1, 1)
    largest = torch.finfo(dtype).max
    return (numbers / scale).clamp(-largest, largest).to(dtype).float() * scale


def take_its_place():
    """Of vLLM's own backend, in this process, which finds its backend once."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CheckedBackend.__name__}")
