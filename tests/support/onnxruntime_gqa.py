"""onnxruntime's GroupQueryAttention on caches of codes, on its CPU, and how far from float64 it may be.

Its caches are [batch, kv heads, tokens, head_dim], int8 or, with two codes a byte, uint8. A code of int4 is q + 8.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnxruntime
from inputs import DTYPES, Inputs
from onnx import TensorProto, helper

import pa_compiler
from pa_compiler import PagedAttentionSpec
from pa_compiler.codes import elements
from pa_compiler.verification.codes import GARBAGE_SCALES, poison_codes
from pa_compiler.verification.inputs import GARBAGE_IDS
from pa_compiler.verification.tolerances import ROUNDING, SMALLEST, SUM_ERRORS, of_weights

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
KINDS |= {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32}

EXP_ERROR = 4 * ROUNDING
"""Relative error of its exp in float32, at most. test_exp_is_as_near_as_the_bound_has_it sees to it."""


@functools.cache
def session(inputs, outputs, operator="GroupQueryAttention", domain="com.microsoft", **attributes):
    """A model of one node. inputs and outputs are pairs of a name and a dtype; a name of "" is left out."""
    node = helper.make_node(operator, [name for name, _ in inputs], [name for name, _ in outputs], domain=domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    values = [
        [helper.make_tensor_value_info(name, KINDS[dtype], None) for name, dtype in each if name]
        for each in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], operator, *values), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: each sequence gets tokens, which are added to its cache and attend to all of it.

    Attributes:
        spec: What we compile: the sizes, kv_dtype, window and sinks are those of the node.
        query: [batch, tokens, num_heads, head_dim]; the last tokens of some sequences are padding.
        new: Keys and values, [batch, tokens, num_kv_heads, head_dim], dtype of query.
        past: Keys and values as codes, [batch, num_kv_heads, room, head_dim or bytes]; anything beyond the past.
        context_lens: [batch], tokens of each sequence with the new ones.
        counts: [batch], how many of the tokens are no padding.
        scales: Of keys and of values, float32: [1], or [1, num_kv_heads, 1, head_dim].
        causal: Whether a query token sees none that are after it.
        sinks: [num_heads], or None.
    """

    spec: PagedAttentionSpec
    query: np.ndarray
    new: tuple[np.ndarray, np.ndarray]
    past: tuple[np.ndarray, np.ndarray]
    context_lens: np.ndarray
    counts: np.ndarray
    scales: tuple[np.ndarray, np.ndarray]
    causal: bool = True
    sinks: np.ndarray | None = None

    def run(self, *, scores=False):
        """(out, as query, present_key, present_value), and with scores those before the softmax.

        They are [batch, num_heads, tokens, largest context]; what is written at keys that are not seen is its own.
        """
        dtype, cache = self.query.dtype.name, self.past[0].dtype.name
        kind = "PER_TENSOR" if self.scales[0].size == 1 else "PER_CHANNEL"
        attributes = {"num_heads": self.spec.num_heads, "kv_num_heads": self.spec.num_kv_heads}
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8 if cache == "int8" else 4}
        attributes |= {
            "local_window_size": self.spec.window or -1,
            "causal": int(self.causal),
            "qk_output": int(scores),
        }
        flat = [each.reshape(*each.shape[:2], -1) for each in (self.query, *self.new)]
        arrays = dict(zip(("query", "key", "value"), flat, strict=True))
        arrays |= dict(zip(("past_key", "past_value"), self.past, strict=True))
        arrays |= {"seqlens_k": self.context_lens - 1, "total_sequence_length": self.context_lens.max()}
        arrays |= dict.fromkeys(("cos_cache", "sin_cache", "position_ids", "attention_bias"))
        arrays |= {"head_sink": self.sinks, **dict(zip(("k_scale", "v_scale"), self.scales, strict=True))}
        if self.query.shape[1] > 1 and self.causal:
            arrays |= dict.fromkeys(("q_norm_weight", "k_norm_weight"))
            arrays["query_seqlens"] = self.counts
        given = {name: np.asarray(each) for name, each in arrays.items() if each is not None}
        inputs = tuple((name, given[name].dtype.name) if name in given else ("", "") for name in arrays)
        outputs = (("out", dtype), ("present_key", cache), ("present_value", cache), *[("scores", dtype)] * scores)
        out, *present = session(inputs, outputs, **attributes).run(None, given)
        return out.reshape(self.query.shape), *present

    def rows(self, array: np.ndarray) -> np.ndarray:
        """[tokens of all sequences, ...] of [batch, tokens, ...]: those that are no padding."""
        return np.concatenate([each[:count] for each, count in zip(array, self.counts, strict=True)])

    def inputs(self, present, seed=0) -> Inputs:
        """The same bytes in our caches, in blocks anywhere, with a scale for each token; poison where no token is."""
        spec, rng = self.spec, np.random.default_rng((3, seed))
        per_sequence = -(-self.context_lens // spec.block_size)
        num_blocks, longest = int(per_sequence.sum()) + 3, int(per_sequence.max())
        table = np.resize(GARBAGE_IDS, (len(per_sequence), longest + 1))
        free = rng.permutation(num_blocks).astype(np.int32).tolist()
        caches, scales = [], []
        for bytes_of in present:
            caches.append(np.empty((num_blocks, spec.block_size, *bytes_of.shape[1::2]), bytes_of.dtype))
            poison_codes(rng, caches[-1])
            scales.append(rng.choice(GARBAGE_SCALES, (num_blocks, *spec.scale_shape[1:])))
        for sequence, length in enumerate(self.context_lens.tolist()):
            blocks = table[sequence, : per_sequence[sequence]]
            blocks[:] = [free.pop() for _ in blocks]
            token = np.arange(length)
            block, slot = blocks[token // spec.block_size], token % spec.block_size
            for cache, of_tokens, bytes_of, scale in zip(caches, scales, present, self.scales, strict=True):
                cache[block, slot] = bytes_of[sequence, :, :length].swapaxes(0, 1)
                unit = scale.item() if scale.size == 1 else 1.0  # those of channels go into query and out
                of_tokens[block, :, slot] = [unit, -8 * unit] if spec.has_zeros else unit
        heads = dict(zip(("key_scale", "value_scale"), scales, strict=True))
        if self.sinks is not None:
            heads["sinks"] = self.sinks
        query = self.rows(self.query)
        if self.scales[0].size > 1:
            query = query.astype(np.float32) * self.of_channels(0)
        query = query.astype(DTYPES[spec.dtype])
        caches = pa_compiler.convert_cache(*caches, "NHD", spec.kv_layout)
        return Inputs(query, *caches, table, self.context_lens, DTYPES[spec.result_dtype], spec.head_dim, heads)

    def of_channels(self, which: int) -> np.ndarray:
        """[num_heads, head_dim] or [1]: what queries (0) are multiplied by before a call of ours, and out (1) after."""
        scale = self.scales[which]
        if scale.size == 1:
            return np.ones(1, np.float32)
        return np.repeat(scale[0, :, 0], self.spec.num_heads // self.spec.num_kv_heads, axis=0)

    def bound(self, present) -> np.ndarray:
        """How far out may be from float64 on the bytes of its caches, for each row of rows(query)."""
        keys, values = (_numbers(*each) for each in zip(present, self.scales, strict=True))
        bounds = []
        for sequence, count in enumerate(self.counts.tolist()):
            length = int(self.context_lens[sequence])
            for i in range(count):
                end = length - count + i + 1 if self.causal else length
                seen = slice(max(0, end - (self.spec.window or end)), end)
                pair = keys[sequence][:, seen], values[sequence][:, seen]
                bounds.append(self._bound_of_row(self.query[sequence, i], *pair))
        return np.stack(bounds)

    def _bound_of_row(self, query, keys, values) -> np.ndarray:
        """[num_heads, head_dim], of one query token and the numbers of what it sees, [num_kv_heads, tokens, head_dim].

        All is float32, float16 too but for out. An error e_j of a weight, relative to it, changes out by
        sum_j p_j e_j (v_j - out), to first order. e_j has four parts. That of the score. The difference to the largest
        score, which is taken to that of a block and then to that of all. exp of both. And a product with exp of such a
        difference whenever a later block has a larger score: at most as often as the running maximum grows, whatever
        the blocks.
        Then out is a sum of rounded elements over a sum of weights, by a rounded inverse.
        """
        spec = dataclasses.replace(self.spec, dtype="float32", out_dtype=None)
        grouped = query.astype(np.float64).reshape(spec.num_kv_heads, -1, spec.head_dim)
        factor, transposed = spec.head_dim**-0.5, keys.swapaxes(1, 2)
        scores, magnitudes = factor * (grouped @ transposed), factor * (np.abs(grouped) @ np.abs(transposed))
        by_group = (*scores.shape[:2], 1)
        sinks = np.full(by_group, -np.inf) if self.sinks is None else self.sinks.astype(np.float64).reshape(by_group)
        peak = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
        weights, of_sinks = np.exp(scores - peak), np.exp(sinks - peak)
        weights /= weights.sum(axis=-1, keepdims=True) + of_sinks
        growths = (np.diff(np.maximum.accumulate(scores, axis=-1), axis=-1) > 0).sum(axis=-1, keepdims=True)
        errors = score_bound(spec.head_dim, magnitudes) + ROUNDING * (peak - scores)
        errors += EXP_ERROR + growths * (EXP_ERROR + ROUNDING)
        of_weights_too, _ = of_weights(spec, weights, values, errors)
        out, added = np.abs(weights @ values), weights @ np.abs(values)
        of_sums = ROUNDING * ((SUM_ERRORS * np.sqrt(values.shape[1]) + 4) * (out + added))
        of_sums += of_sinks * (EXP_ERROR + ROUNDING * np.abs(np.where(of_sinks > 0, peak - sinks, 0))) * out
        bound = of_weights_too + of_sums.reshape(of_weights_too.shape)
        if self.query.dtype == np.float16:
            bound += SMALLEST["float16"] + 2.0**-11 * out.reshape(bound.shape)
        return bound


def score_bound(head_dim: int, magnitudes: np.ndarray) -> np.ndarray:
    """How far scores may be from float64, by sum(abs(query) * abs(key)) with the factor.

    A score is a sum of products with elements that are rounded once, times a rounded factor.
    """
    return (SUM_ERRORS * np.sqrt(head_dim) + 3) * ROUNDING * magnitudes


def _numbers(codes, scale):
    """What its codes count, in float64."""
    if codes.dtype == np.int8:
        return codes * scale.astype(np.float64)
    return (elements(codes).astype(np.float64) - 8) * scale
