"""Functions of scores as FlexAttention's users write them, for torch and for a compiler that has never seen them.

A function of SCORES takes the number of query heads and returns a score_mod. Tensors that it closes over are of
flex_masks.POSITIONS positions.
"""

from __future__ import annotations

import math

import torch
from flex_masks import POSITIONS, SEQUENCES


def uniform(*shape, low=-1.0, high=1.0):
    """A tensor, the same each time."""
    return torch.empty(shape, dtype=torch.float32).uniform_(
        low, high, generator=torch.Generator().manual_seed(len(shape))
    )


def causal_inf(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, -float("inf"))

    return score_mod


def window_inf(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where((q_idx >= kv_idx) & (q_idx - kv_idx <= 128), score, float("-inf"))

    return score_mod


def relative_bias(heads):
    bias = uniform(heads, POSITIONS)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx - kv_idx]

    return score_mod


def t5_buckets(heads):
    """T5's relative bias of a decoder: 32 buckets, half of them by the logarithm of the distance."""
    relative_attention_bias = uniform(32, heads, low=-2.0, high=2.0)

    def score_mod(score, b, h, q_idx, kv_idx):
        distance = torch.maximum(q_idx - kv_idx, torch.zeros_like(q_idx))
        ratio = torch.log(torch.maximum(distance, torch.ones_like(distance)).float() / 16) / math.log(128.3 / 16)
        large = torch.minimum(16 + (ratio * 16).to(torch.long), torch.full_like(distance, 31))
        bucket = torch.where(distance < 16, distance, large)
        return score + relative_attention_bias[bucket, h]

    return score_mod


def alibi(heads):
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return score_mod


def alibi_computed(heads):
    """As attention-gym has it: the slope of a head by its number."""

    def alibi_mod(score, b, h, q_idx, kv_idx):
        scale = torch.exp2(-((h + 1) * 8.0 / heads))
        bias = (kv_idx - q_idx) * scale
        return score + bias

    return alibi_mod


def tanh_soft_cap(heads):
    def tanh_softcap(score, b, h, q_idx, kv_idx):
        score = score / 2.0
        score = torch.tanh(score)
        return score * 2.0

    return tanh_softcap


def cap_and_alibi(heads):
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)

    def score_mod(score, b, h, q_idx, kv_idx):
        return 3.0 * torch.tanh(score / 3.0) - slopes[h] * torch.abs(q_idx - kv_idx)

    return score_mod


def cap_by_head(heads):
    caps = uniform(heads, low=0.5, high=4.0)

    def score_mod(score, b, h, q_idx, kv_idx):
        return caps[h] * (score / caps[h]).tanh()

    return score_mod


def distance_decay(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score - 0.01 * torch.abs(q_idx - kv_idx)

    return score_mod


def decay_by_head(heads):
    """RetNet's decay, which scales scores and can be so small that nothing is left of one."""
    log_decay = torch.log(1 - torch.exp2(-5 - torch.arange(heads, dtype=torch.float32) / 2))

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * torch.exp(log_decay[h] * (q_idx - kv_idx))

    return score_mod


def checkerboard_scores(heads):
    def checkerboard(score, b, h, q_idx, kv_idx):
        score = torch.where(torch.abs(kv_idx - q_idx) % 2 == 1, score * 0.5, score)
        score = torch.where(torch.abs(kv_idx - q_idx) % 2 == 0, score * 2.0, score)
        return torch.where(h % 2 == 1, score, -score)

    return checkerboard


def logarithmic_bias(heads):
    """KERPLE's logarithmic kernel."""
    weight, rate = uniform(heads, low=0.1, high=2.0), uniform(1, heads, low=0.1, high=1.0)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score - weight[h] * torch.log(1 + rate[0, h] * (q_idx - kv_idx))

    return score_mod


def by_log_of_position(heads):
    """Scores grow with the logarithm of the context, as in Qwen and SSMax."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * torch.where(q_idx > 63, torch.log((q_idx + 1).float()) / math.log(64), 1.0)

    return score_mod


def squared(heads):
    def squared(score, b, h, q_idx, kv_idx):
        return score**2

    return squared


def gated(heads):
    gate = uniform(heads, low=-4.0, high=4.0)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * torch.sigmoid(gate[h] + score)

    return score_mod


def temperature_by_sequence(heads):
    temperature = uniform(SEQUENCES, low=0.3, high=3.0)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score / temperature[b]

    return score_mod


def hash_bias(heads):
    table = uniform(64)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[(q_idx * 7 + kv_idx * 13 + h) % 64]

    return score_mod


def parity(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + ((kv_idx + h) % 2) * 1.5 - 0.25

    return score_mod


def clamped(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score.clamp(-0.5, 0.5)

    return score_mod


def smooth_window(heads):
    """The logarithm of a sigmoid of the distance, which falls like a window with a soft edge."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + torch.log(torch.sigmoid((100.0 - (q_idx - kv_idx)) / 10.0))

    return score_mod


def image_bias(heads):
    """Swin's relative bias of two axes, in bfloat16, over an image that is 32 tokens wide."""
    bias_x, bias_y = uniform(heads, 63).bfloat16(), uniform(63, heads).to(torch.float16)

    def score_mod(score, b, h, q_idx, kv_idx):
        x, y = q_idx % 32 - kv_idx % 32, q_idx // 32 - kv_idx // 32
        return score + bias_x[h, x + 31] + bias_y[y + 31, h]

    return score_mod


def document_penalty(heads):
    document_id = torch.arange(POSITIONS) // 90

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(document_id[q_idx] == document_id[kv_idx], score, score - 2.0)

    return score_mod


def stick_like(heads):
    """Recent tokens first, by a power of the distance."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * torch.rsqrt(1.0 + (q_idx - kv_idx)) - (q_idx - kv_idx).float().sqrt() / (h + 4)

    return score_mod


SCORES = {
    function.__name__: function
    for function in (
        *(causal_inf, window_inf, relative_bias, t5_buckets, alibi, alibi_computed, tanh_soft_cap, cap_and_alibi),
        *(cap_by_head, distance_decay, decay_by_head, checkerboard_scores, logarithmic_bias, by_log_of_position),
        *(squared, gated, temperature_by_sequence, hash_bias, parity, clamped, smooth_window, image_bias),
        *(document_penalty, stick_like),
    )
}
