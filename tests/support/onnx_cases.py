"""The cases of ONNX's operator Attention, from its backend suite, and what decode is to be called with for each."""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx import helper
from onnx.backend.test.case import node

import pa_compiler
from pa_compiler import PagedAttentionSpec

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
BLOCK_SIZE = 4
KEYS = 18
"""Of the longest cache. Masks are given as arrays of so many, so that cases of one shape share a library."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A case: the attributes, inputs and outputs that it names."""

    attributes: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def heads(self, name: str) -> int:
        attribute = "q_num_heads" if name in ("Q", "Y") else "kv_num_heads"
        array = self.inputs[name] if name in self.inputs else self.outputs[name]
        return array.shape[1] if array.ndim == 4 else self.attributes[attribute]

    def by_head(self, name: str) -> np.ndarray:
        """An input, or Y, as [batch, heads, tokens, dim]: tensors of three axes have the heads side by side."""
        array = self.inputs[name] if name in self.inputs else self.outputs[name]
        if array.ndim == 4:
            return array
        return array.reshape(*array.shape[:2], self.heads(name), -1).swapaxes(1, 2)


def collect() -> tuple[dict[str, Case], dict[str, object]]:
    """Cases by name, and those that have the operator written as a graph of others, "_expanded", as the suite has them.

    collect_testcases("Attention") returns the same, after it has made those of all other operators, which takes 14 s.
    """
    import onnx.backend.test.case.node.attention  # noqa: F401  (which registers its cases)

    cases, expanded = {}, {}
    for each in node._NodeTestCases:
        name = each.name.removeprefix("test_attention_")
        nodes = each.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type == "Attention":
            ((inputs, outputs),) = each.data_sets
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in nodes[0].attribute}
            cases[name] = Case(
                attributes, named(INPUTS, nodes[0].input, inputs), named(OUTPUTS, nodes[0].output, outputs)
            )
        elif name != each.name:
            expanded[name] = each
    return cases, expanded


def named(formal, actual, arrays) -> dict[str, np.ndarray]:
    """Arrays by the operator's names for them: those that a node leaves out are "" or not there."""
    present = [name for name, given in zip(formal, actual, strict=False) if given]
    return dict(zip(present, arrays, strict=True))


def masked(b, h, q, k, *, mask):
    return mask[b, h, k]


def biased(score, b, h, q, k, *, bias):
    return score + bias[b, h, k]


def from_first(b, h, q, k, *, first):
    return k >= first[b]


def masked_from_first(b, h, q, k, *, mask, first):
    return mask[b, h, k] & (k >= first[b])


class Rows:
    """A case as sequences of a decode: each query token of each batch is one, with the keys that it may see.

    Attributes:
        spec: What computes the case.
        query: [rows, heads, dim]; rows are query tokens of the first batch, then of the second, and so on.
        batch: [rows], which batch's keys a row reads.
        context_lens: [rows], up to where it sees: causality, the right side of a window and padding.
        inputs: What the functions of the spec read.
        keys: [batch, kv heads, tokens, dim], the past ones first.
        values: As keys.
        past: Tokens among them that were there before.
        lengths: [batch], tokens that are no padding.
    """

    def __init__(self, case: Case) -> None:
        query = case.by_head("Q")
        self.query = rows(query)
        self.keys, self.values = (
            np.concatenate([case.inputs[past], case.by_head(name)], 2) if past in case.inputs else case.by_head(name)
            for name, past in (("K", "past_key"), ("V", "past_value"))
        )
        self.past = case.inputs["past_key"].shape[2] if "past_key" in case.inputs else 0
        batches, tokens, total = len(query), query.shape[2], self.keys.shape[2]
        self.batch = np.repeat(np.arange(batches), tokens)
        self.lengths = case.inputs.get("nonpad_kv_seqlen", np.full(batches, total))
        before = self.lengths - tokens if "nonpad_kv_seqlen" in case.inputs else np.full(batches, self.past)
        position = before[self.batch] + np.tile(np.arange(tokens), batches)
        self._seen(case, position)
        fields = self._functions(case, position)
        self.spec = PagedAttentionSpec(
            query.shape[1],
            self.keys.shape[1],
            query.shape[3],
            BLOCK_SIZE,
            self.query.dtype.name,
            kv_layout="HND" if case.inputs["Q"].ndim == 4 else "NHD",
            value_dim=self.values.shape[3],
            softcap=case.attributes.get("softcap") or None,
            **fields,
        )

    def _seen(self, case: Case, position: np.ndarray) -> None:
        ends = [self.lengths[self.batch]]
        if case.attributes.get("is_causal"):
            ends.append(position + 1)
        if case.attributes.get("right_window_size", -1) >= 0:
            ends.append(position + 1 + case.attributes["right_window_size"])
        self.context_lens = np.maximum(np.min(ends, axis=0), 0).astype(np.int32)

    def _functions(self, case: Case, position: np.ndarray) -> dict:
        """Fields of the spec, and the arrays that they read."""
        fields, self.inputs = {}, {}
        left = case.attributes.get("left_window_size", -1)
        if left >= 0 and (position + 1 == self.context_lens)[self.context_lens > 0].all():
            fields["window"] = left + 1
        elif left >= 0:  # the query is not at the last position that it sees
            self.inputs["first"] = (position - left).astype(np.int32)
        if "attn_mask" in case.inputs:
            given = case.inputs["attn_mask"]
            name, hidden = ("mask", False) if given.dtype == bool else ("bias", -np.inf)
            of_row = (*case.by_head("Q").shape[:3], given.shape[-1])
            self.inputs[name] = np.full((len(self.query), of_row[1], KEYS), hidden, given.dtype)
            self.inputs[name][..., : given.shape[-1]] = rows(np.broadcast_to(given, of_row))
        functions = {("mask",): masked, ("first",): from_first, ("first", "mask"): masked_from_first}
        fields["mask_mod"] = functions.get(tuple(sorted(self.inputs.keys() - {"bias"})))
        fields["score_mod"] = biased if "bias" in self.inputs else None
        fields["inputs"] = {name: (each.dtype.name, ("batch", *each.shape[1:])) for name, each in self.inputs.items()}
        return fields

    def caches(self, module: pa_compiler.Module, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Caches with NaN where no token is, and each batch's blocks. append_kv adds all tokens but the past ones."""
        per_batch = -(-self.keys.shape[2] // BLOCK_SIZE)
        num_blocks = len(self.keys) * per_batch + 2
        table = np.random.default_rng(0).permutation(num_blocks)[:-2].reshape(-1, per_batch).astype(np.int32)
        caches = []
        for each in (self.keys, values):
            cache = np.full((num_blocks, BLOCK_SIZE, *each.shape[1::2]), np.nan, each.dtype)
            slots = cache[table].reshape(len(each), -1, *each.shape[1::2])
            slots[:, : self.past] = each.swapaxes(1, 2)[:, : self.past]
            cache[table] = slots.reshape(*table.shape, *cache.shape[1:])
            caches.append(np.ascontiguousarray(cache.swapaxes(1, 2)) if self.spec.kv_layout == "HND" else cache)
        token = np.arange(self.past, self.keys.shape[2])
        mapping = table[:, token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
        mapping = np.where(token < self.lengths[:, None], mapping, -1).astype(np.int64)
        new = (rows(each[:, :, self.past :]) for each in (self.keys, values))
        module.append_kv(*new, *caches, mapping.ravel())
        return (*caches, table)

    def present(self, cache: np.ndarray, table: np.ndarray) -> np.ndarray:
        """[batch, kv heads, tokens, dim] of a cache."""
        blocks = cache[table] if self.spec.kv_layout == "NHD" else cache[table].swapaxes(2, 3)
        return blocks.reshape(len(table), -1, *blocks.shape[3:])[:, : self.keys.shape[2]].swapaxes(1, 2)


def rows(array: np.ndarray) -> np.ndarray:
    """[batch * tokens, heads, ...] of [batch, heads, tokens, ...]."""
    swapped = array.swapaxes(1, 2)
    return np.ascontiguousarray(swapped.reshape(-1, *swapped.shape[2:]))
