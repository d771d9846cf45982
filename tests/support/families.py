"""Small models of transformers' families, with random weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SCALED = {"query_pre_attn_scalar": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,  # of the rotary part
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
FAMILIES = {  # by the name of the model's class and of its configuration's
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 20}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**WINDOWED, **SCALED, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**WINDOWED, **SCALED}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "mpt": ("MptForCausalLM", "MptConfig", {"hidden_size": 80, "num_attention_heads": 5, "max_seq_len": 512}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 96, "num_attention_heads": 6}),
}  # fmt: skip


def make_model(family):
    """A model with weights as large as make its softmaxes sharp."""
    import torch
    import transformers

    name, config, fields = FAMILIES[family]
    config = getattr(transformers, config)(**SHAPE | fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 1.0))
    return model
