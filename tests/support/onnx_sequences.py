"""The cases of ONNX's operator Attention as calls of attend: a batch's queries are the last tokens of a sequence."""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx_cases import KEYS, Case, Rows, rows


def visible(b, h, q, k, *, mask, first):
    return mask[b, h, q - first[b], k]


def up_to(right):
    """The mask of a window that ends `right` tokens after a query token."""
    return lambda b, h, q, k: k <= q + right


def visible_up_to(right):
    return lambda b, h, q, k, *, mask, first: mask[b, h, q - first[b], k] & (k <= q + right)


def biased(score, b, h, q, k, *, bias, first):
    return score + bias[b, h, q - first[b], k]


class Sequences(Rows):
    """A case as one call of attend.

    Attributes:
        counts: [batch], query tokens of each sequence.
        causal: Of the call.
        reason: Why attend cannot express the case, or "".
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        query = case.by_head("Q")
        tokens, right = query.shape[2], case.attributes.get("right_window_size", -1)
        self.counts = np.full(len(query), tokens)
        self.causal = bool(case.attributes.get("is_causal")) or right == 0
        left, first = case.attributes.get("left_window_size", -1), self.lengths - tokens
        before = first if "nonpad_kv_seqlen" in case.inputs else np.full(len(query), self.past)
        goes_by_position = self.causal or max(left, right) >= 0
        self.reason = ""
        if (first < 0).any():
            self.reason = "more query tokens than the sequence has tokens"
        elif goes_by_position and (before != first).any():
            self.reason = "its query tokens are not the last tokens of their sequence"
        self.row_lens = np.repeat(self.lengths, tokens).astype(np.int32)
        self.inputs, fields = self._functions_of(case, first, -1 if self.causal else right)
        given = {name: (each.dtype.name, ("batch", *each.shape[1:])) for name, each in self.inputs.items()}
        self.spec = dataclasses.replace(self.spec, window=left + 1 if left >= 0 else None, **fields, inputs=given)

    def _functions_of(self, case: Case, first: np.ndarray, right: int) -> tuple[dict, dict]:
        """What the functions of the spec read, and these."""
        if "attn_mask" not in case.inputs:
            return {}, {"score_mod": None, "mask_mod": UP_TO[right] if right >= 0 else None}
        given = case.inputs["attn_mask"]
        name, hidden = ("mask", False) if given.dtype == bool else ("bias", -np.inf)
        of_row = (*case.by_head("Q").shape[:3], given.shape[-1])
        array = np.full((*of_row[:3], KEYS), hidden, given.dtype)
        array[..., : given.shape[-1]] = np.broadcast_to(given, of_row)
        inputs = {name: array, "first": first.astype(np.int32)}
        if name == "bias":
            return inputs, {"score_mod": biased, "mask_mod": UP_TO[right] if right >= 0 else None}
        return inputs, {"score_mod": None, "mask_mod": VISIBLE_UP_TO[right] if right >= 0 else visible}

    def attend(self, case: Case, module) -> tuple[np.ndarray, np.ndarray]:
        """out and lse of all query tokens, those of the first batch first."""
        *caches, table = self.caches(module, self.values)
        return module.attend(
            rows(case.by_head("Q")), *caches, table, self.lengths.astype(np.int32), np.cumsum([0, *self.counts]),
            case.attributes.get("scale"), causal=self.causal, return_lse=True,
            **({"inputs": self.inputs} if self.inputs else {}),
        )  # fmt: skip


UP_TO = {right: up_to(right) for right in range(8)}
VISIBLE_UP_TO = {right: visible_up_to(right) for right in range(8)}
"""Made once, so that cases of one shape share a library."""
