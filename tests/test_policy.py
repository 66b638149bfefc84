"""The warm start and its data, the cache of the embedded policy, and models that are loaded."""

import inspect
import random
import sys

import pytest
import torch
from conftest import CALL, ROW, by_text, byte_tokenizer, opened_template, qwen3, roll
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPT2LMHeadModel, MixtralConfig

import rest
import train_small
from toy_tools import chat, fast, policy, tasks, tools


# ------------------------------------------------------------------------------------- the warm start

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
    """Nothing of the prompt, all of the completion, its end-of-turn token too; every row once before
    any is seen twice; the instructions stand in the prompt."""
    steps = sequences_of(monkeypatch, tokenizer, numbered(6), 6, 2, instructions="Think first.")
    assert [len(step) for step in steps] == [2] * 6
    for epoch in (steps[:3], steps[3:]):
        assert len({tuple(ids) for step in epoch for ids, _ in step}) == 6
    for ids, mask in (pair for step in steps for pair in step):
        assert tokenizer.decode([x for x, m in zip(ids, mask) if m]) == CALL + "<|im_end|>"
        first = mask.index(True)
        assert all(mask[first:]) and len(ids) == len(mask)
        prompt, _ = chat.TemplateChat(tokenizer, "Think first.").prompt(ROW)
        assert "Think first." in tokenizer.decode(ids[:first]) and first == len(prompt) - 3  # "1+2?"


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
        exact = sum(rest.score_texts([policy.noisy_demonstration(row, rng, noise)], row)[2] for row in rows) / len(rows)
        assert low <= exact <= high
    bare = {"tools": [], "gold": [ROW["gold"][0]], "demo": [{"think": "t", "response": None}]}  # rows of one's own need not list tools
    assert policy.noisy_demonstration(bare, random.Random(0), 1.0)
    assert CALL  # the hand-written example of the other tests has the same form
    assert rest.score_texts([tasks.completion_text(ROW["gold"][0], "t")], ROW)[2]


# ------------------------------------------------------------------------- the embedded policy's cache

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


@pytest.mark.parametrize("module", [tools, tasks, chat, policy], ids=lambda m: m.__name__)
def test_the_cache_key_covers_the_sources(cache, monkeypatch, module):
    """Who edits tools, tasks, prompts or the warm start gets a new policy, not the old one."""
    assert made(cache) == 1
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource",
                        lambda m: source(m) + ("# edited\n" if m is module else ""))
    assert made(cache) == 1 and made(cache) == 0


def test_what_is_cached_is_what_was_made(cache):
    """Weights, vocabulary and template come back as they were."""
    (a, first), (b, second) = (policy.tiny_policy(seed=7, steps=1, progress=False) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert first.get_vocab() == second.get_vocab() and first.chat_template == second.chat_template
    assert second.eos_token_id == first.eos_token_id == b.config.eos_token_id


def test_the_embedded_policys_demonstrations_are_training_tasks(cache, monkeypatch):
    """No request of the held-out split is among them, whatever its seed."""
    seen = {}
    monkeypatch.setattr(policy, "warm_start", lambda model, tok, pairs, *a, **k: seen.update(pairs=pairs))
    made(cache)
    held_out = {row["messages"][0]["content"] for row in tasks.make_rows(2000, "test", seed=1)}
    assert len(seen["pairs"]) >= 2000
    assert not held_out & {row["messages"][0]["content"] for row, _ in seen["pairs"]}


# --------------------------------------------------------------------------------------- loaded models

def test_dropout_is_off_in_a_loaded_model(tmp_path):
    """It would make the importance ratio differ from 1."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=265, n_positions=64, n_embd=32, n_layer=1, n_head=4))
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = policy.load_model(tmp_path)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_gradient_checkpointing_forwards_every_layer_again(tmp_path):
    """It once did nothing: transformers checkpoints a layer only in training mode, and from_pretrained leaves the model in the other."""
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
        rest.update(rest.Engine(model), torch.optim.SGD(model.parameters(), lr=0.1), batch, torch.tensor([1.0, -1.0]), torch.ones_like(batch.logp), cfg)
        calls[on] = len(seen)
    assert calls == {False: 1, True: 2}


SHAPE = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
RANDOM = {
    "dropout in the layer": FalconConfig(**SHAPE, hidden_dropout=0.5, attention_dropout=0.5),
    "router noise": MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5, attention_dropout=0.5),
    "dropout modules": GPT2Config(vocab_size=265, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5)}


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


# ------------------------------------------------------------------------------------------ adapters

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
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)  # A and B, seven layers, two blocks
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
    assert a.keys() == b.keys() and all(p.dtype == torch.float32 and torch.equal(p, b[n]) for n, p in a.items())
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
    monkeypatch.setattr(rest, "score_texts", by_text)  # else a random policy scores 0 throughout, and nothing moves
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    common = ["--model", str(tmp_path / "base"), "--lora-rank", "2", "--output-dir", str(tmp_path), "--name", "run",
              "--prompts", "2", "--group", "2", "--max-completion-tokens", "8", "--train-rows", "8",
              "--warm-start-steps", "1", "--eval-rows", "2", "--learning-rate", "1e-2"]
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
