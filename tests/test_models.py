"""Architectures of transformers, tiny and random, as --model would bring them: what a rollout records and what
the update computes are the model's own forward, one unpadded row at a time; or the model is refused by name.

To add an architecture, add a line to RIGHT or REFUSED. REST_LONG=1 runs those that are not QUICK, too."""

import os

import pytest
import torch
import transformers
from conftest import byte_tokenizer

import rest
from toy_tools import fast

OMIT = object()  # for options that an architecture does not take
SHAPE = {
    "vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(name, seed=0, **options):
    """A random model of that architecture, in evaluation mode as from_pretrained leaves it."""
    torch.manual_seed(seed)
    options = {key: value for key, value in {**SHAPE, **options}.items() if value is not OMIT}
    config = getattr(transformers, name + "Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # whatever the architecture's own initialisation makes small is seen, too
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 16}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
       "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": OMIT}
SSM = {"state_size": 8, "expand": 2, "time_step_rank": 4}
SSM2 = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_n_heads": 4,
        "mamba_n_groups": 1}

RIGHT = {
    # dense
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Olmo2": {}, "Phi": {}, "GPTNeoX": {}, "StableLm": {}, "Glm4": {},
    "Gemma": {}, "Nemotron": {}, "SmolLM3": {"no_rope_layers": [1, 0]}, "Phi3": {}, "Ernie4_5": {},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTJ": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "rotary_dim": 4},
    # mixtures of experts
    "Mixtral": MOE, "Qwen3Moe": MOE, "Qwen2Moe": MOE, "Olmoe": MOE, "Phimoe": MOE, "GraniteMoe": MOE,
    # windows
    "Mistral": {"sliding_window": 16}, "Starcoder2": {"sliding_window": 16},
    "Cohere2": {"sliding_window": 16, "logit_scale": 0.5},
    "Gemma3Text": {"sliding_window": 16}, "GptOss": {**MOE, "sliding_window": 16},
    "Exaone4": {"sliding_window": 16, "sliding_window_pattern": 2},
    "Llama4Text": {**MOE, "attention_chunk_size": 16, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    # scaled or capped logits
    "Granite": {"logits_scaling": 8.0}, "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"sliding_window": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    # ALiBi
    "Bloom": {"n_head": 4, "n_layer": 2}, "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "Falcon": {"alibi": True, "head_dim": OMIT},
    # latent attention
    "DeepseekV3": MLA, "DeepseekV2": MLA,
    # state spaces, linear attention, convolutions, and hybrids of them
    "Mamba": SSM, "Mamba2": {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "FalconMamba": SSM,
    "Jamba": {**MOE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
              "use_mamba_kernels": False},
    "Lfm2": {"layer_types": ["conv", "full_attention"]}, "FalconH1": {**SSM2, "mamba_d_ssm": 64},
    "Bamba": {**SSM2, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {**MOE, **SSM2, "layer_types": ["mamba", "attention"]},
    "NemotronH": {**SSM, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
                  "layers_block_type": ["mamba", "attention"]},
    "Zamba2": {**SSM2, "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "Qwen3Next": {**MOE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                  "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "MiniMax": {**MOE, "layer_types": ["linear_attention", "full_attention"]},
    # composite
    "Gemma3": {"text_config": {**SHAPE, "sliding_window": 16}, "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8}},
}
