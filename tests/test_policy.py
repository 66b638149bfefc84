"""The warm start and its data, the cache of the embedded policy, and models that are loaded."""

import importlib.metadata
import inspect
import json
import random
import re
import sys

import pytest
import torch
from conftest import CALL, ROW, by_text, byte_tokenizer, opened_template, qwen3, roll
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPT2LMHeadModel, MixtralConfig

import rest
import train_small
from toy_tools import chat, fast, policy, schema, tasks, tools


# ----------------------------------------------------------------------------------- the warm start

def numbered(n, text=CALL):
    return [({**ROW, "messages": [{"role": "user", "content": str(i)}]}, text) for i in range(n)]


def sequences_of(monkeypatch, tokenizer, pairs, steps, batch, **options):
    """All (ids, mask) that warm_start hands to supervised, one list per step."""
    seen = []

    def supervised(model, sequences, steps, *args, **kwargs):
        seen.extend(sequences(step) for step in range(steps))
    monkeypatch.setattr(policy, "supervised", supervised)
    policy.warm_start(None, tokenizer, pairs, steps, batch=batch, **options)
    return seen


def test_the_warm_start_trains_the_completion_and_its_end(monkeypatch, tokenizer):
    """Nothing of the prompt, all of the completion, its end-of-turn token too; every row once
    before any is seen twice; the instructions stand in the prompt."""
    steps = sequences_of(monkeypatch, tokenizer, numbered(6), 6, 2, instructions="Think first.")
    assert [len(step) for step in steps] == [2] * 6
    for epoch in (steps[:3], steps[3:]):
        assert len({tuple(ids) for step in epoch for ids, _ in step}) == 6
    for ids, mask in (pair for step in steps for pair in step):
        assert tokenizer.decode([x for x, m in zip(ids, mask) if m]) == CALL + "<|im_end|>"
        first = mask.index(True)
        assert all(mask[first:]) and len(ids) == len(mask)
        prompt, _ = chat.TemplateChat(tokenizer, "Think first.").prompt(ROW)
        assert "Think first." in tokenizer.decode(ids[:first])
        assert first == len(prompt) - 3  # a digit where ROW has "1+2?"


def test_an_opened_thought_is_written_once_and_not_trained(monkeypatch, tokenizer):
    """Where the template opens the thought, the completion goes on behind it."""
    opened = opened_template(tokenizer)
    (ids, mask), = sequences_of(monkeypatch, opened, [(ROW, CALL)], 1, 1)[0]
    text = opened.decode(ids)
    assert text.count("<think>") == 1 and text.endswith(CALL + "<|im_end|>")
    trained = opened.decode([x for x, m in zip(ids, mask) if m])
    assert "<think>" + trained == CALL + "<|im_end|>"


def test_supervised_learns_the_next_token():
    """Forty steps on one completion: greedy decoding writes it and ends its turn. With targets or
    masks off by one it would not."""
    tokenizer, model = byte_tokenizer(), qwen3(layers=1)
    pairs = [(ROW, "<think>a</think>")] * 4
    losses = policy.warm_start(model, tokenizer, pairs, 40, 2, 1e-2, progress=False)
    cfg = rest.Config(group=2, max_completion_tokens=8)
    out = roll(model, tokenizer, [ROW], cfg, group=1, greedy=True)
    assert out.texts == [["<think>a</think>"]] and losses[-1] < losses[0]


def test_micro_batches_do_not_change_the_warm_start():
    """Sequences of very different lengths, six at once or one by one: the same losses."""
    tokenizer, pairs = byte_tokenizer(), []
    for i in range(6):
        row = {**ROW, "messages": [{"role": "user", "content": "x" * (1 + 9 * i)}]}
        pairs.append((row, "<think>" + "ab" * (1 + i * i) + "</think>"))
    a, b = (policy.warm_start(qwen3(), tokenizer, pairs, 3, 6, 1e-2, micro_batch=n, progress=False)
            for n in (6, 1))
    assert a == pytest.approx(b, rel=1e-3)


def test_demonstrations_are_imperfect_at_the_stated_rate():
    """With noise 0 every demonstration earns the exact call; with 0.22 four in ten."""
    rows = [step for row in tasks.make_rows(300, "train", seed=5) for step in tasks.decompose(row)]
    for noise, low, high in ((0.0, 1.0, 1.0), (0.22, 0.3, 0.5)):
        rng = random.Random(0)
        exact = [rest.score_texts([policy.noisy_demonstration(row, rng, noise)], row)[2]
                 for row in rows]
        assert low <= sum(exact) / len(rows) <= high
    # rows of one's own need not list tools
    bare = {"tools": [], "gold": [ROW["gold"][0]], "demo": [{"think": "t", "response": None}]}
    assert policy.noisy_demonstration(bare, random.Random(0), 1.0)
    assert rest.score_texts([tasks.completion_text(ROW["gold"][0], "t")], ROW)[2]


def test_the_supervised_learning_rate_rises_and_falls(monkeypatch):
    """20 steps: a fifth of them up, the second half down to a tenth; the mode is given back."""
    rates, step = [], torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    model = qwen3(layers=1)
    lesson = ([5, 6, 7], [False, True, True])
    policy.supervised(model, lambda step: [lesson], 20, 1.0, 2, progress=False)
    down = [0.1 + 0.9 * left / 10 for left in range(9, 0, -1)]
    expected = [0.25, 0.5, 0.75] + [1.0] * 8 + down
    assert rates == pytest.approx(expected) and not model.training


def test_lessons_in_copying_show_a_request_and_train_its_call(tokenizer):
    """The call can be written from what stands before it, and only the call is trained."""
    rng = random.Random(0)
    for _ in range(20):
        ids, mask = policy.copying(tokenizer, rng)
        first = mask.index(True)
        assert all(mask[first:]) and not any(mask[:first]) and ids[-1] == tokenizer.eos_token_id
        request = tokenizer.decode(ids[:first])
        call = json.loads(tokenizer.decode(ids[first:-1]))
        assert call["name"] in tools.TOOLS
        assert all(str(value) in request for value in call["arguments"].values())


def test_lessons_in_looking_up_say_what_is_there(tokenizer):
    """A trained phrase behind a tool's name says that it is offered where it is, and that it is
    missing where it is not; names and the list are not trained."""
    rng, seen = random.Random(0), set()
    for _ in range(10):
        ids, mask = policy.looking_up(tokenizer, rng)
        parts = []  # [trained, text] of runs of one mask
        for x, m in zip(ids, mask):
            if not parts or parts[-1][0] != m:
                parts.append([m, ""])
            parts[-1][1] += tokenizer.decode([x])
        assert len(parts) == 24 and not parts[0][0]
        listed = parts[0][1].rpartition("<|im_start|>assistant\n")[0]
        for (_, asked), (_, said) in zip(parts[::2], parts[1::2]):
            asked = asked.split("assistant\n")[-1]
            name, = [n for n in tools.TOOLS if re.search(rf"\b{n}\b", asked)]
            there = f"{name}(" in listed
            assert said.strip("\n") in (tasks.USE if there else tasks.NO_TOOL)
            seen.add(there)
    assert seen == {True, False}


# ---------------------------------------------------------------------- the embedded policy's cache

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no training: what is cached is the untrained policy."""
    monkeypatch.setenv("REST_CACHE", str(tmp_path))
    monkeypatch.setattr(policy, "supervised", lambda *args, **kwargs: [])
    return tmp_path


def made(cache, **options):
    """How many new entries a call of tiny_policy makes."""
    known = set(cache.iterdir())
    policy.tiny_policy(**{"seed": 7, "steps": 1, "progress": False, **options})
    return len(set(cache.iterdir()) - known)


def test_the_cache_key_covers_every_option(cache):
    """The same options are read back, any other one is made anew."""
    assert made(cache) == 1 and made(cache) == 0
    for change in ({"noise": 0.3}, {"steps": 2}, {"seed": 8}, {"mask_names": True}, {"batch": 16},
                   {"learning_rate": 1e-3}):
        assert made(cache, **change) == 1, change


@pytest.mark.parametrize("module", [rest, tools, schema, tasks, chat, policy], ids=lambda m: m.__name__)
def test_the_cache_key_covers_the_sources(cache, monkeypatch, module):
    """Who edits tools, their check, tasks, prompts (rest.Chat too) or the warm start gets a new
    policy, not the old one."""
    assert made(cache) == 1
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource",
                        lambda m: source(m) + ("# edited\n" if m is module else ""))
    assert made(cache) == 1 and made(cache) == 0


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_the_cache_key_covers_the_libraries(cache, monkeypatch, package):
    """Another version of one of them trains, or cuts words, differently."""
    assert made(cache) == 1
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: version(name) + (".1" if name == package else ""))
    assert made(cache) == 1 and made(cache) == 0


def test_what_is_cached_is_what_was_made(cache):
    """Weights, vocabulary and template come back as they were."""
    (a, first), (b, second) = (policy.tiny_policy(seed=7, steps=1, progress=False)
                               for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert first.get_vocab() == second.get_vocab() and first.chat_template == second.chat_template
    assert second.eos_token_id == first.eos_token_id == b.config.eos_token_id


def test_the_embedded_policys_demonstrations_are_training_tasks(cache, monkeypatch):
    """No request of the held-out split is among them, whatever its seed."""
    seen = {}
    monkeypatch.setattr(policy, "warm_start",
                        lambda model, tokenizer, pairs, *a, **k: seen.update(pairs=pairs))
    made(cache)
    held_out = {row["messages"][0]["content"] for row in tasks.make_rows(2000, "test", seed=1)}
    assert len(seen["pairs"]) >= 2000
    assert not held_out & {row["messages"][0]["content"] for row, _ in seen["pairs"]}


def test_noise_and_masking_reach_the_demonstrations(cache, monkeypatch):
    """Without noise every one of them is exact, with the default not; masked ones name no tool."""
    seen = {}
    monkeypatch.setattr(policy, "warm_start",
                        lambda model, tokenizer, pairs, *a, **k: seen.update(pairs=pairs))

    def exact():
        return [rest.score_texts([text], row)[2] for row, text in seen["pairs"]]

    def names():
        return {tool["function"]["name"] for row, _ in seen["pairs"] for tool in row["tools"]}
    assert made(cache, noise=0.0) and all(exact())
    assert made(cache) and not all(exact())
    assert names() == set(tools.TOOLS)
    assert made(cache, mask_names=True)
    assert names() and not names() & set(tools.TOOLS)


# ------------------------------------------------------------------------------------ loaded models

def test_a_model_is_loaded_in_the_type_asked_for(tmp_path):
    """float32 unless said otherwise."""
    qwen3().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert policy.load_model(tmp_path)[0].dtype == torch.float32
    assert policy.load_model(tmp_path, torch.bfloat16)[0].dtype == torch.bfloat16


def test_dropout_is_off_in_a_loaded_model(tmp_path):
    """It would make the importance ratio differ from 1."""
    shape = {"vocab_size": 265, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape))
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = policy.load_model(tmp_path)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_gradient_checkpointing_forwards_every_layer_again(tmp_path):
    """It once did nothing: transformers checkpoints a layer only in training mode, and
    from_pretrained leaves the model in the other."""
    tokenizer = byte_tokenizer()
    qwen3().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cfg, calls = rest.Config(group=2, prompts=1, max_completion_tokens=8), {}
    for on in (False, True):
        model, _ = policy.load_model(tmp_path, gradient_checkpointing=on)
        policy.warm_start(model, tokenizer, [(ROW, CALL)], 1, batch=1, progress=False)
        batch = roll(model, tokenizer, [ROW], cfg)
        seen = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        advantages = torch.tensor([1.0, -1.0])
        weight = torch.ones_like(batch.logp)
        metrics = rest.update(rest.Engine(model), optimizer, batch, advantages, weight, cfg)
        assert metrics["grad_norm"] > 0
        calls[on] = len(seen)
    assert calls == {False: 1, True: 2}


SHAPE = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
RANDOM = {
    "dropout in the layer": FalconConfig(**SHAPE, hidden_dropout=0.5, attention_dropout=0.5),
    "router noise": MixtralConfig(
        **SHAPE, num_local_experts=4, router_jitter_noise=0.5, attention_dropout=0.5),
    "dropout modules": GPT2Config(
        vocab_size=265, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5)}


def saved(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def batch_of(model):
    return roll(model, byte_tokenizer(), [ROW], rest.Config(group=2, prompts=1, max_completion_tokens=8))


@pytest.mark.parametrize("kind", RANDOM)
def test_gradient_checkpointing_makes_nothing_random(tmp_path, kind):
    """It needs layers in training mode, in which dropout and router noise would be drawn: the same
    log-probabilities and gradients as without it."""
    torch.manual_seed(0)
    saved(tmp_path, AutoModelForCausalLM.from_config(RANDOM[kind]))
    gradients = []
    for on in (False, True):
        model, _ = policy.load_model(tmp_path, gradient_checkpointing=on)
        assert any(module.training for module in model.modules()) == on
        engine = fast.engine(model)  # refuses what is random
        batch = batch_of(model)
        logp = engine.logps(batch, [0, 1], 1.0)
        assert torch.allclose(logp[batch.sampled], batch.logp[batch.sampled], atol=1e-4)
        engine.backward(logp[batch.sampled].sum())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[0].abs().max()))


# ----------------------------------------------------------------------------------------- adapters

def adapted(folder, rank=2, **options):
    """A loaded model with an adapter whose second matrices are no longer zero, so that it does something."""
    torch.manual_seed(1)
    model, tokenizer = policy.load_model(folder, lora_rank=rank, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model, tokenizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(9)[None]).logits


def test_only_the_adapter_is_trained_and_prompts_are_shared_through_it(tmp_path):
    """The shared engine's gradients of the adapter are the plain one's; a step moves it and nothing else."""
    pytest.importorskip("peft")
    saved(tmp_path, qwen3())
    model, tokenizer = adapted(tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B, seven layers, two blocks
    assert all("lora_" in name for name in trained)
    engine = fast.engine(model)
    assert type(engine) is fast.SharedEngine
    batch = batch_of(model)
    found = []
    for each in (engine, rest.Engine(model)):
        logp = each.logps(batch, [0, 1], 1.0)
        each.backward((logp * torch.tensor([[1.0], [-2.0]]))[batch.sampled].sum())
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
        model.zero_grad(set_to_none=True)
    assert found[0].norm() > 0 and torch.allclose(*found, atol=1e-4 * float(found[0].abs().max()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = policy.warm_start(model, tokenizer, numbered(4), 4, 4, 1e-2, progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained and losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_saved_alone_loaded_back_and_merged(tmp_path, dtype, monkeypatch):
    """Exactly: adapters are float32 whatever their base. The base is found from another folder, too."""
    pytest.importorskip("peft")
    saved(tmp_path / "base", qwen3())
    monkeypatch.chdir(tmp_path)
    model, tokenizer = adapted("base", dtype=dtype, gradient_checkpointing=True)
    model.save_pretrained(tmp_path / "run" / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "run" / "checkpoint")
    assert not (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path.parent)
    again, _ = policy.load_model(tmp_path / "run", dtype)
    assert torch.equal(logits(again), logits(model)) and not any(m.training for m in again.modules())
    a, b = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert a.keys() == b.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, b[name]) for name, p in a.items())
    base, _ = policy.load_model(tmp_path / "base", dtype)
    assert not torch.allclose(logits(base), logits(model), atol=0.1)
    policy.merge(tmp_path / "run", tmp_path / "merged")
    merged, _ = policy.load_model(tmp_path / "merged")
    whole, _ = policy.load_model(tmp_path / "run")
    assert type(merged) is type(base) and torch.allclose(logits(merged), logits(whole), atol=1e-4)


def test_a_run_with_an_adapter_can_be_resumed_and_used(tmp_path, capsys, monkeypatch):
    """--lora-rank through the script: warm start, steps, checkpoint, more steps, evaluation by --model."""
    pytest.importorskip("peft")
    saved(tmp_path / "base", qwen3())
    # else a random policy scores 0 throughout, and nothing moves
    monkeypatch.setattr(rest, "score_texts", by_text)
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    common = ["--model", str(tmp_path / "base"), "--lora-rank", "2", "--output-dir", str(tmp_path),
              "--name", "run", "--prompts", "2", "--group", "2", "--max-completion-tokens", "8",
              "--train-rows", "8", "--warm-start-steps", "1", "--eval-rows", "2", "--learning-rate", "1e-2"]
    train_small.main([*common, "--steps", "1"])
    adapter = tmp_path / "run" / "checkpoint" / "adapter_model.safetensors"
    assert not (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == weights
    once = adapter.read_bytes()
    train_small.main([*common, "--steps", "2", "--resume"])
    assert "steps 1 to 2" in capsys.readouterr().out and adapter.read_bytes() != once
    train_small.main(["--eval-only", "--model", str(tmp_path / "run"), "--eval-rows", "2",
                      "--max-completion-tokens", "8"])
    assert "exact" in capsys.readouterr().out


def test_the_base_of_an_adapter_stays_when_its_run_goes_on(tmp_path, monkeypatch):
    """A run's checkpoint is replaced by the next one: what an adapter was trained on is kept."""
    pytest.importorskip("peft")
    saved(tmp_path / "base", qwen3())
    monkeypatch.setattr(rest, "score_texts", by_text)
    common = ["--model", str(tmp_path / "base"), "--output-dir", str(tmp_path), "--name", "run",
              "--prompts", "2", "--group", "2", "--max-completion-tokens", "8", "--train-rows", "8",
              "--eval-rows", "0", "--learning-rate", "1e-2", "--save-steps", "1"]
    train_small.main([*common, "--steps", "1"])
    for path in ("run", "run/checkpoint"):
        model, _ = adapted(tmp_path / path)
        model.save_pretrained(tmp_path / f"of-{path.replace('/', '-')}")
    before = logits(model)
    train_small.main([*common, "--steps", "3", "--resume"])
    for path in ("of-run", "of-run-checkpoint"):
        again, _ = policy.load_model(tmp_path / path)
        assert torch.equal(logits(again), before)
    assert not torch.equal(logits(adapted(tmp_path / "run")[0]), before)  # the run has moved
    assert [path.name for path in sorted((tmp_path / "run" / "kept").iterdir())] == ["step1", "step3"]


def test_adapters_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    """No peft, another rank, a base that is gone, nothing to merge."""
    pytest.importorskip("peft")
    saved(tmp_path / "base", qwen3())
    with pytest.raises(ValueError, match="has no adapter to merge"):
        policy.merge(tmp_path / "base", tmp_path / "out")
    adapted(tmp_path / "base")[0].save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="has rank 2, not 4"):
        policy.load_model(tmp_path / "run", lora_rank=4)
    policy.load_model(tmp_path / "run", lora_rank=2)  # its own tokenizer is not needed: the base has one
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"run is an adapter of {tmp_path}/base: cannot load"):
        policy.load_model(tmp_path / "run")
    with pytest.raises(ValueError, match="from which it can be loaded again"):
        policy.load_model("x.gguf", lora_rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        policy.load_model(tmp_path / "elsewhere", lora_rank=2)
