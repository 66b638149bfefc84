"""Architectures of transformers, tiny and random, as --model would bring them: what a rollout records
and what the update computes are the model's own forward, one unpadded row at a time; or the model is
refused by name.

To add an architecture, add a line to SHARED, PLAIN or REFUSED: its name in transformers and what of
SHAPE is other. REST_LONG=1 tries all of them; else those of a kind that is in QUICK already are left
out."""

import os
import re

import pytest
import torch
import transformers

import rest
from toy_tools import fast, policy

OMIT = object()  # for an option that the architecture does not take
SHAPE = {
    "vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 16}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
       "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
       "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": OMIT}
SSM = {"state_size": 8, "expand": 2, "time_step_rank": 4}
SSM2 = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_n_heads": 4,
        "mamba_n_groups": 1}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}

SHARED = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Olmo2": {}, "Phi": {}, "Phi3": {}, "GPTNeoX": {}, "Glm4": {},
    "Gemma": {}, "Ernie4_5": {}, "GPT2": GPT, "GPTJ": {**GPT, "rotary_dim": 4},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Mixtral": MOE, "Qwen3Moe": MOE, "Qwen2Moe": MOE, "Olmoe": MOE, "Phimoe": MOE,
}
PLAIN = {
    "StableLm": {}, "Nemotron": {},
    # windows and chunks
    "Mistral": {"sliding_window": 16}, "Starcoder2": {"sliding_window": 16},
    "Gemma3Text": {"sliding_window": 16}, "GptOss": {**MOE, "sliding_window": 16},
    "Exaone4": {"sliding_window": 16, "sliding_window_pattern": 2},
    "Llama4Text": {**MOE, "attention_chunk_size": 16, "interleave_moe_layer_step": 1,
                   "intermediate_size_mlp": 48},
    # scaled and capped logits
    "Granite": {"logits_scaling": 8.0}, "Cohere": {"logit_scale": 0.25},
    "GraniteMoe": {**MOE, "logits_scaling": 8.0},
    "Gemma2": {"sliding_window": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "Cohere2": {"sliding_window": 16, "logit_scale": 0.5},
    # ALiBi
    "Bloom": {"n_head": 4, "n_layer": 2}, "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "Falcon": {"alibi": True, "head_dim": OMIT},
    # latent attention
    "DeepseekV3": MLA, "DeepseekV2": MLA,
    # state spaces, linear attention, convolutions, and hybrids of them
    "Mamba": SSM, "Mamba2": {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "FalconMamba": SSM,
    "Jamba": {**MOE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
              "use_mamba_kernels": False},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": {**SSM2, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    "Bamba": {**SSM2, "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "GraniteMoeHybrid": {**MOE, **SSM2, "layer_types": ["mamba", "attention"], "mamba_chunk_size": 16},
    "Qwen3Next": {**MOE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                  "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    # composite
    "Gemma3": {"text_config": {**SHAPE, "sliding_window": 16}, "vision_config": VISION},
}
ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
REFUSED = {  # name: (options, what the message says)
    "Llama": ({"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, r"rotary embedding \(dynamic\)"),
    "Phi3": ({"rope_parameters": {**ROPE, "rope_type": "longrope", "long_factor": [2.0] * 4,
                                  "short_factor": [1.0] * 4}}, r"rotary embedding \(longrope\)"),
    # their decoding with a cache differs from their forward, without any padding, too (transformers 5.24)
    "NemotronH": ({"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
                   "layers_block_type": ["mamba", "attention"]}, "not those of its own forward"),
    "Zamba2": ({**SSM2, "layers_block_type": ["mamba", "hybrid"]}, "not those of its own forward"),
    "MiniMax": ({**MOE, "layer_types": ["linear_attention", "full_attention"]},
                "not those of its own forward"),
    "RecurrentGemma": ({"lru_width": 32, "attention_window_size": 16,
                        "block_types": ["recurrent", "attention"]}, "does not decode row by row"),
    "Rwkv": ({"attention_hidden_size": 32}, "does not decode row by row"),
    "XLSTM": ({"num_heads": 2, "num_blocks": 2, "chunk_size": 8, "return_last_states": True},
              "not those of its own forward|does not decode row by row"),
}
QUICK = {"Llama", "Qwen3", "GPT2", "SmolLM3", "Qwen3Moe", "Mistral", "GptOss", "Granite", "Gemma2", "Cohere",
         "Bloom", "DeepseekV3", "Mamba", "Mamba2", "FalconMamba", "Lfm2", "Jamba", "Qwen3Next", "Gemma3",
         "Phi3", "Llama4Text", "MiniMax", "RecurrentGemma", "Mixtral", "OPT"}


def chosen(table):
    return [name for name in table if name in QUICK or os.environ.get("REST_LONG")]


def build(name, seed=0, **options):
    """A random model of that architecture, in evaluation mode as from_pretrained leaves it."""
    torch.manual_seed(seed)
    names = {"XLSTM": "xLSTM"}
    options = {key: value for key, value in {**SHAPE, **options}.items() if value is not OMIT}
    config = getattr(transformers, names.get(name, name) + "Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms, biases and steps begin as constants, which would hide a fault
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


class Ids(rest.Chat):
    """Prompts of given lengths, random ids; a fifth of all ids end a turn, so that rows end at
    different times."""

    def __init__(self, lengths=(57, 9, 23)):
        g = torch.Generator().manual_seed(1)
        self.end_ids = set(range(3, 265, 5))
        self.prompts = [torch.randint(3, 265, (n,), generator=g).tolist() for n in lengths]

    def prompt(self, row):
        return self.prompts[row], []

    def decode(self, ids):
        return " ".join(map(str, ids))


def own_logp(model, batch, i, temperature):
    """logp [T_i] of completion i by the model's own forward: one row, no padding, no mask, no cache."""
    n = int(batch.length[i])
    ids = torch.tensor([batch.prompts[i // batch.group] + batch.tokens[i, :n].tolist()])
    logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1:-1].float()
    return (logits / temperature).log_softmax(-1).gather(1, batch.tokens[i, :n, None])[:, 0]


def gradient(model):
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def check(engine):
    """Rollout, update and gradient against the model's own forward."""
    model = engine.model
    cfg = rest.Config(group=4, max_completion_tokens=24, temperature=0.7, micro_batch_tokens=200)
    batch = rest.rollout(engine, Ids(), [0, 1, 2], cfg, seed=5)
    assert len(set(batch.length.tolist())) > 3
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(batch.tokens.shape, generator=g)
    for i, n in enumerate(batch.length.tolist()):
        truth = own_logp(model, batch, i, 0.7)
        assert torch.allclose(batch.logp[i, :n], truth, atol=1e-4), i
        (truth * weight[i, :n]).sum().backward()
    expected = gradient(model)
    parts = engine.micro_batches(batch, [0, 1, 2], cfg.micro_batch_tokens)
    assert sorted(sum(parts, [])) == list(range(12)) and len(parts) > 1
    for rows in parts:
        logp = engine.logps(batch, rows, 0.7)
        mask, T = batch.sampled[rows, :logp.shape[1]], logp.shape[1]
        assert torch.allclose(logp[mask], batch.logp[rows, :T][mask], atol=1e-4)
        engine.backward((logp * weight[rows, :T])[mask].sum())
    found = gradient(model)
    assert found.shape == expected.shape and (found - expected).norm() < 1e-3 * expected.norm()
    advantages = torch.tensor([1.0, -1.0] * 6)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = rest.update(engine, still, batch, advantages, batch.sampled.float(), cfg, on_policy=True)
    assert metrics["kl"] < 1e-7 and metrics["clip_fraction"] == 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", chosen(SHARED))
def test_the_shared_engine_is_the_models_own_forward(name):
    engine = fast.engine(build(name, **SHARED[name]))
    assert type(engine) is fast.SharedEngine
    check(engine)


@pytest.mark.parametrize("name", chosen(SHARED | PLAIN))
def test_the_plain_engine_is_the_models_own_forward(name, caplog):
    model = build(name, **(SHARED | PLAIN)[name])
    engine = fast.engine(model, share=name in PLAIN)
    assert type(engine) is rest.Engine
    assert ("not shared" in caplog.text) == (name in PLAIN)
    check(engine)


@pytest.mark.parametrize("name", chosen(REFUSED))
def test_what_no_engine_runs_rightly_is_refused_by_name(name):
    """With or without sharing, in one sentence, before anything is trained."""
    options, message = REFUSED[name]
    for share in (True, False):
        with pytest.raises(ValueError, match=message) as error:
            fast.engine(build(name, **options), share=share)
        said = str(error.value)
        assert re.match(f"{name}ForCausalLM cannot be used: ", said, re.I) and "\n" not in said


# ------------------------------------------------------------------------- what the choice must see

def why_not(name, dtype=torch.float32, **options):
    return fast.why_not_shared(build(name, **{"initializer_range": 0.02, **options}).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_bfloat16_is_judged_at_its_own_precision(dtype, size):
    """bfloat16 weights share, too (else no GPU run with them would), whatever the size of the logits."""
    for name in ("Llama", "Qwen3", "GPT2"):
        options = {**SHARED[name], "initializer_range": size, "num_hidden_layers": 6}
        assert why_not(name, dtype, **options) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_behind_the_output_layer_is_seen_at_any_precision(dtype):
    """Freshly initialised logits are far below a cap of 30, where it changes nothing that one could
    measure."""
    full = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None}
    for name, options in (("Granite", {"logits_scaling": 8.0}), ("Granite", {"logits_scaling": 1.05}),
                          ("Cohere", {"logit_scale": 0.5}), ("Gemma2", {"final_logit_softcapping": 30.0})):
        options |= full if name == "Gemma2" else {}
        assert "scaled or capped" in why_not(name, dtype, **options), name
    assert why_not("Gemma2", dtype, final_logit_softcapping=None, **full) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_longer_than_any_probe_are_seen(dtype):
    """By the configuration, with or without layer_types, of the text part of composite models; and by
    what the attention is told, should the configuration not say it."""
    assert "sliding_window" in why_not("Mistral", dtype, sliding_window=300)
    text = {**SHAPE, "sliding_window": 300}
    assert "full attention" in why_not("Gemma3", dtype, text_config=text, vision_config=VISION)
    model = build("Llama")
    model.config.sliding_window = 300  # which an architecture may read in its mask alone
    assert "sliding_window" in fast.why_not_shared(model)
    model = build("Qwen3")
    assert fast.why_not_shared(model) == ""
    model.model.layers[1].self_attn.sliding_window = 300
    assert "sliding_window" in fast.why_not_shared(model)


def test_attention_that_is_more_than_a_layout_is_not_shared():
    """Soft caps and sinks come as arguments of the attention function."""
    full = {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None}
    assert "softcap" in why_not("Gemma2", attn_logit_softcapping=50.0, **full)
    assert "s_aux" in why_not("GptOss", **{**MOE, "layer_types": ["full_attention"] * 2})


def test_rows_leave_where_the_cache_can_drop_them():
    """A cache of keys and values does; convolutions and recurrent states stay, with their rows."""
    for name, leaves in (("Llama", True), ("Bloom", True), ("Lfm2", False), ("Mamba", False)):
        engine = rest.Engine(build(name, **(SHARED | PLAIN)[name]))
        with engine.sampling():
            engine.prefill([[3, 4, 5], [6]], 2, 4)
            kept = engine.drop([True, False, True, True])
        assert kept == ([1] if leaves else None), name


@pytest.mark.parametrize("name, option", [("Llama", "attention_dropout"), ("Mixtral", "router_jitter_noise")])
def test_a_random_forward_is_refused(name, option):
    """Whoever brings a model in training mode; in evaluation mode the same model is fine."""
    model = build(name, **{**SHARED[name], option: 0.1})
    assert type(fast.engine(model)) is fast.SharedEngine
    with pytest.raises(ValueError, match=r"random .* call model.eval\(\)"):
        fast.engine(model.train())


@pytest.mark.parametrize("name", ["Granite", "Gemma2", "Qwen3"])
def test_the_warm_starts_loss_is_the_models_own(name):
    """On Granite it once reported 0.14 where the model's loss is 4.45: the output layer is not the
    whole way."""
    model = build(name, **(SHARED | PLAIN)[name])
    g = torch.Generator().manual_seed(3)
    sequences = []
    for n in (9, 40, 17):
        ids = torch.randint(3, 265, (n,), generator=g).tolist()
        sequences.append((ids, [False] * (n // 2) + [True] * (n - n // 2)))
    total = count = 0
    for ids, mask in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        logp = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:])]
        total, count = total - float(logp.detach().sum()), count + len(logp)
    losses = policy.supervised(model, lambda step: sequences, 2, 1e-2, 2, progress=False)
    assert losses[0] == pytest.approx(total / count, rel=1e-4) and losses[1] < losses[0]
