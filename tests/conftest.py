"""Shared toys: a byte-level tokenizer, random tiny models, and a fake model that emits a script.

Nothing is downloaded. README.md in this folder lists the pitfalls that tests mention by number."""

import copy
import json
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import rest

TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "required": ["a", "b"],
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}
CALL = '<think>sum</think><tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
ROW = {"messages": [{"role": "user", "content": "1+2?"}], "tools": [TOOL],
       "gold": [[{"name": "add", "arguments": {"a": 1, "b": 2}}]], "category": "simple", "state": None}


def byte_tokenizer():
    """One token per byte, single tokens for the tags; 265 ids."""
    from toy_tools.policy import build_tokenizer
    return build_tokenizer([""], vocab_size=265)


def qwen3(vocab=265, layers=2, tie=True, seed=0, heads=4, kv=2):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=8, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.3)).eval()


def llama(vocab=265, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, initializer_range=0.3)).eval()


class ScriptedModel(torch.nn.Module):
    """A causal LM for rollout tests: at position t behind the prompt its logits are
    `script(row, t, last id) -> logits [V]`.

    No attention and no shared path. Rows are counted by their slot; the cache, whose rows may be
    dropped, keeps the script's row numbers."""

    def __init__(self, script, vocab):
        super().__init__()
        self.script, self.vocab = script, vocab
        self.weight = torch.nn.Parameter(torch.zeros(1))

    class Cache:
        def __init__(self, rows):
            self.rows, self.step = rows, -1

        def batch_select_indices(self, index):
            self.rows = [self.rows[i] for i in index.tolist()]

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=True, logits_to_keep=1):
        cache = past_key_values or self.Cache(list(range(len(input_ids))))
        cache.step += 1
        last = input_ids[:, -1].tolist()
        logits = torch.stack([self.script(r, cache.step, x) for r, x in zip(cache.rows, last)])
        return CausalLMOutputWithPast(logits=logits[:, None] + self.weight, past_key_values=cache)


def scripted(tokenizer, texts, sharp=30.0):
    """A ScriptedModel whose row r writes texts[r] and then ends its turn, whatever it is fed (each
    id with logit `sharp`)."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
           for text in texts]

    def script(row, t, last):
        logits = torch.zeros(len(tokenizer))
        logits[ids[row][min(t, len(ids[row]) - 1)]] = sharp
        return logits
    return ScriptedModel(script, len(tokenizer))


def scripted_turns(tokenizer, texts, sharp=30.0):
    """A ScriptedModel whose row r writes texts[r][k] in its k-th turn; the last one again if there
    are more turns. A turn begins where the model has been fed an assistant header."""
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for text in row] for row in texts]
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    state = {}

    def script(row, t, last):
        seen, turn, pos = state.get(row, ([], 0, 0)) if t else ([], 0, 0)
        seen = seen + [last]
        if t and seen[-len(header):] == header:
            turn, pos = turn + 1, 0
        wanted = ids[row][min(turn, len(ids[row]) - 1)]
        logits = torch.zeros(len(tokenizer))
        logits[wanted[min(pos, len(wanted) - 1)]] = sharp
        state[row] = (seen, turn, pos + 1)
        return logits
    return ScriptedModel(script, len(tokenizer))


def roll(model, tokenizer, rows, cfg, engine=None, **options):
    """rest.rollout of a model (by the plain engine) and a tokenizer (by the plain chat)."""
    return rest.rollout((engine or rest.Engine)(model), rest.Chat(tokenizer), rows, cfg, **options)


def step_of(model, tokenizer, rows, cfg, step=0, **options):
    """rest.train_step of a model and a tokenizer by plain SGD: (metrics, Rollout, weight)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return rest.train_step(rest.Engine(model), rest.Chat(tokenizer), optimizer, rows, cfg, step, **options)


def adder(row=None):
    """The live environment of ROW."""
    return SimpleNamespace(functions={"add": lambda a, b: a + b})


def opened_template(tokenizer):
    """The tokenizer with a template that ends the prompt with an open thought."""
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    return opened


def by_text(texts, row, refused=0):
    """A score that tells any two completions apart, so that even a random policy has a gradient:
    with the real one all of its completions score the same and no weight moves."""
    x = zlib.crc32("".join(texts).encode())
    return float(x % 2), (x // 2 % 5) / 4, False


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()
