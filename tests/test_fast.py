"""The fast engine against the plain one: the same samples, log-probabilities and entropies, with
prompts shared, from a step of fixed shapes, compiled, and (on a GPU) from a CUDA graph; and which
models it is chosen for."""

import copy
import math
import os
import random
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import CALL, ROW, adder, llama, qwen3, roll
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rest
from toy_tools import fast, lora, policy, tasks

LONG = {**ROW, "messages": [{"role": "user", "content": "please add the numbers 1 and 2 for me, would you?"}]}
MIXED = [ROW, LONG, {**LONG, "tools": []}]


def config(**kwargs):
    return rest.Config(**{"group": 2, "max_completion_tokens": 60, **kwargs})


MODELS = {"qwen3": qwen3, "untied, no GQA": lambda: qwen3(tie=False, kv=4), "llama": llama}


def often_ending(model, tokenizer):
    """The model with its end token likely in about one step of eight, so that rows end at different times."""
    eos = tokenizer.eos_token_id

    def hook(module, inputs, logits):
        end = logits.max(-1).values - 4 + 6 * (logits[..., 25:31:2] > logits[..., 26:32:2]).all(-1)
        return torch.cat([logits[..., :eos], end[..., None], logits[..., eos + 1:]], -1)
    model.lm_head.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("prompts", [3, 1])
@pytest.mark.parametrize("name", MODELS)
def test_shared_and_plain_decoding_sample_the_same(tokenizer, name, prompts):
    """Ragged prompts, left padding, finished rows leaving: same tokens; logps, entropies and a fresh
    forward agree within 1e-4 (float32). (A single prompt and no GQA once failed: then a transposed
    query is a view.)"""
    model, rows = often_ending(MODELS[name](), tokenizer), MIXED[:prompts]
    shared, plain = fast.engine(model), rest.Engine(model)
    assert isinstance(shared, fast.SharedEngine)
    cfg = config(group=4, max_completion_tokens=40, temperature=0.7)
    a, b = (rest.rollout(engine, rest.Chat(tokenizer), rows, cfg, seed=3) for engine in (shared, plain))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampled, b.sampled) and a.texts == b.texts
    assert len(set(a.length.tolist())) > prompts
    assert torch.allclose(a.logp, b.logp, atol=1e-4) and torch.allclose(a.entropy, b.entropy, atol=1e-4)
    every = list(range(4 * prompts))
    for engine in (shared, plain):
        assert torch.allclose(engine.logps(a, every, 0.7)[a.sampled], a.logp[a.sampled], atol=1e-4)
    for i, n in enumerate(a.length.tolist()):  # entropies in float64
        ids = torch.tensor([a.prompts[i // 4] + a.tokens[i, :n].tolist()])
        log_p = torch.log_softmax(model(ids).logits[0, -n - 1:-1].double() / 0.7, -1)
        assert torch.allclose(a.entropy[i, :n].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-4)
    wrong = shared.logps(a, every, 1.0)  # pitfall 5: T forgotten
    assert (wrong[a.sampled] - a.logp[a.sampled]).abs().max() > 0.01


class Graphed(fast.SharedEngine):
    """Decodes as from a CUDA graph, on a CPU: `record` records the step's operations, and what is replayed
    is these, on the very tensors that they were recorded with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.graph = True

    def record(self, work):
        with capture(), Recording() as recording:
            result = work()
        return recording.replay, result


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for there, x in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if there.data_ptr() != x.data_ptr():  # no view, and nothing that was changed in place
                    there.copy_(x)


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put_") else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        if by_mask or waits or kwargs.get("device") == torch.device("meta"):
            raise AssertionError(f"a CUDA graph cannot hold this {name}")
        return func(*args, **kwargs)


@contextmanager
def capture():
    """Refuses what a CUDA graph cannot hold and a CPU would let pass: waiting for a value, tensors made
    from numbers or without a device."""
    with torch.device("meta"), Refuse():
        yield


def test_the_capture_check_refuses_what_a_graph_cannot_hold():
    x = torch.ones(3)
    with capture():
        x * 2 + torch.arange(3, device=x.device)
    for broken in (lambda: float(x.sum()), lambda: x[x > 0], lambda: torch.arange(3),
                   lambda: x + torch.tensor([1, 2, 3]), lambda: torch.zeros(2)):
        with pytest.raises((AssertionError, RuntimeError), match="cannot hold|meta"), capture():
            broken()


def samples(engine, tokenizer, rows, cfg, **options):
    return rest.rollout(engine, rest.Chat(tokenizer), rows, cfg, **options)


def assert_same(a, b, atol=1e-4):
    """Two Rollouts of the same samples."""
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampled, b.sampled)
    assert torch.allclose(a.logp, b.logp, atol=atol) and torch.allclose(a.entropy, b.entropy, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_step_decodes_the_same_in_every_rollout(tokenizer, name):
    """Of other prompts, other lengths and weights that changed in place; when rows end, the next smaller
    shape is captured once: 5 x 8 rows, 5 x 4, 3 x 2."""
    model = often_ending(MODELS[name](), tokenizer)
    cfg = config(group=8, max_completion_tokens=50, temperature=0.7)
    graphed, eager = Graphed(model), fast.SharedEngine(model)
    for seed, rows in enumerate(([*MIXED, ROW, ROW], [LONG, *MIXED, LONG], [ROW] * 5)):
        a, b = (samples(engine, tokenizer, rows, cfg, seed=seed) for engine in (eager, graphed))
        assert_same(a, b)
        assert graphed.captures == 3 and len(set(a.length.tolist())) > 3
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.02)


def test_live_episodes_are_sampled_from_kept_steps(tokenizer):
    """Whose tokens are forced where a tool has answered."""
    class Calling(rest.Chat):
        def decode(self, ids):
            return CALL
    model = often_ending(qwen3(), tokenizer)
    cfg = config(group=8, max_completion_tokens=120, max_turns=3)
    graphed, eager = Graphed(model), fast.SharedEngine(model)
    for seed in range(2):
        a, b = (rest.rollout(engine, Calling(tokenizer), MIXED, cfg, seed=seed, toolbox_for=adder)
                for engine in (eager, graphed))
        assert_same(a, b)
        assert max(map(len, a.turns)) > 1
    assert graphed.captures == 2


def test_twenty_rollouts_of_the_default_run_capture_at_most_four_steps():
    """Its prompts, 16 of them, 8 completions each, 160 tokens; completions of about 20 tokens."""
    _, tokenizer = policy.read_start()
    rng = random.Random(0)
    rows = [step for row in tasks.make_rows(300, "train", seed=0) for step in tasks.decompose(row)]
    engine = Graphed(often_ending(qwen3(len(tokenizer), layers=1), tokenizer))
    for seed in range(20):
        cfg = rest.Config(seed=seed)
        batch = samples(engine, tokenizer, rng.sample(rows, cfg.prompts), cfg, seed=seed)
        assert batch.tokens.shape[0] == 128 and batch.length.max() > 40
    assert engine.captures <= 4


def logits_of(engine, steps=3):
    """Logits [steps, S, V] of decoding steps that are fed given ids."""
    prompts = probe(engine).prompts
    with engine.sampling():
        engine.prefill(prompts, 2, steps)
        return torch.stack([engine.step(probe(engine).tokens[:, t], t).float().clone() for t in range(steps)])


def probe(engine):
    return fast.probe_batch(engine.model)


class Bare(torch.nn.Module):
    """A linear layer that is no torch.nn.Linear, as experts are."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


def with_bare():
    model = qwen3()
    model.model.layers[1].mlp.down_proj = Bare(model.model.layers[1].mlp.down_proj)
    return model


def in_place(model):
    for p in model.parameters():
        p.mul_(1.3)


def moved(model):
    for p in model.parameters():
        p.data = p.data * 1.3


def hooked(model):
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)


def switched(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("change", [in_place, moved, hooked, switched])
def test_no_kept_step_runs_for_a_model_that_changed(monkeypatch, change, cast):
    """Weights that change in place are read, also where autocast casts them; what a graph cannot see (a
    tensor elsewhere, a hook, an attribute) makes a new one."""
    if cast:
        monkeypatch.setattr(rest, "autocasts", lambda model: True)
        monkeypatch.setattr(rest, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
    model = with_bare()
    weights = [id(p) for p in model.parameters()]
    graphed, eager = Graphed(model), fast.SharedEngine(model)
    before = logits_of(graphed)
    with torch.no_grad():
        change(model)
    now, expected = logits_of(graphed), logits_of(eager)
    far, near = (float((x - now).abs().max() / now.abs().max()) for x in (before, expected))
    assert near < (0.05 if cast else 1e-5) and far > 0.1, (near, far)
    assert graphed.captures == (1 if change is in_place else 2)
    assert [id(p) for p in model.parameters()] == weights and torch.is_autocast_cache_enabled()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_a_diverged_model_left_is_never_read(tokenizer):
    """Keys and values that are not finite, where the next rollout has padding and columns to come."""
    model, cfg = qwen3(), config(max_completion_tokens=20)
    engine, weights = Graphed(model), copy.deepcopy(model.state_dict())
    samples(engine, tokenizer, [LONG, LONG], cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        samples(engine, tokenizer, [LONG, LONG], cfg)
    model.load_state_dict(weights)
    a, b = (samples(e, tokenizer, [ROW, ROW], cfg) for e in (engine, fast.SharedEngine(model)))
    assert_same(a, b)
    assert engine.captures == 1


def test_an_adapter_that_is_switched_off_is_not_replayed():
    pytest.importorskip("peft")
    model = lora.add(qwen3(), 4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    graphed = Graphed(model)
    on = logits_of(graphed)
    with model.disable_adapter():
        off = logits_of(graphed)
        assert torch.allclose(off, logits_of(fast.SharedEngine(model)), atol=1e-4)
    assert (on - off).abs().max() > 0.1 and torch.equal(logits_of(graphed), on)


def test_what_is_kept_is_bounded(monkeypatch):
    """By number, the least recently used first, and by bytes."""
    engine = Graphed(qwen3())
    monkeypatch.setattr(fast, "MAX_SHAPES", 2)
    for steps in (3, 4, 3, 5, 3):
        logits_of(engine, steps)
    assert engine.captures == 3 and [shape[2] for shape in engine.kept] == [5, 3]
    monkeypatch.setattr(fast, "MAX_BYTES", 0)
    logits_of(engine, 6)
    assert [shape[2] for shape in engine.kept] == [6]


def test_a_long_budget_is_read_in_widths_that_double(tokenizer, monkeypatch):
    """Nobody leaves, 280 steps: prepared at steps 0, 128 and 256, for widths 128, 256 and 280, and the
    samples stay those of the eager step. In the next rollout all are there."""
    monkeypatch.setattr(fast, "WIDTH", 128)
    widths = []

    class Watched(Graphed):
        def prepare(self):
            widths.append((int(self.layout.column), self.layout.width))
            return super().prepare()
    model, cfg = qwen3(), config(max_completion_tokens=280)
    end = torch.tensor([tokenizer.eos_token_id])
    model.lm_head.weight.data = model.lm_head.weight.clone().index_fill(0, end, 0.0)  # seldom ends
    watched = Watched(model)
    a, b, c = (samples(engine, tokenizer, [ROW, LONG], cfg, seed=3)
               for engine in (fast.SharedEngine(model), watched, watched))
    assert widths == [(0, 128), (128, 256), (256, 280)]
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.tokens, c.tokens)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None,
                    reason="torch.compile needs a C++ compiler")
def test_compiled_decoding_samples_the_same(tokenizer):
    model, cfg = qwen3(layers=1), config(group=4, max_completion_tokens=24, temperature=0.7)
    engine = fast.engine(model, compiled=True)
    a = roll(model, tokenizer, [ROW, LONG], cfg, fast.SharedEngine, seed=3)
    b = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], cfg, seed=3)
    assert torch.equal(a.tokens, b.tokens) and torch.allclose(a.logp, b.logp, atol=1e-4)
    assert engine.compiled and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU there is nothing to capture")
@pytest.mark.parametrize("record", [fast.SharedEngine.record, lambda self, work: (lambda: None, work())],
                         ids=["refused", "empty graph"])
def test_a_step_that_cannot_be_captured_is_decoded_eagerly(tokenizer, monkeypatch, caplog, record):
    """Said once and remembered by the engine; the samples are those of the eager step."""
    model, cfg = qwen3(), config(max_completion_tokens=20)
    a = roll(model, tokenizer, [ROW, LONG], cfg, fast.SharedEngine, seed=3)
    monkeypatch.setattr(Graphed, "record", record)
    engine = Graphed(model)
    for _ in range(2):
        b = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], cfg, seed=3)
        assert_same(a, b, 1e-5)
    assert torch.equal(a.logp, b.logp) and type(engine.layout) is fast.DecodeLayout
    assert caplog.text.count("without a CUDA graph") == 1 and not engine.graph


def test_a_step_that_cannot_be_compiled_is_tried_without(tokenizer, monkeypatch):
    def fails(*args):
        raise RuntimeError("no compiler")
    model, cfg = qwen3(), config(max_completion_tokens=20)
    a = roll(model, tokenizer, [ROW, LONG], cfg, fast.SharedEngine, seed=3)
    monkeypatch.setattr(fast, "compiled_step", fails)
    engine = Graphed(model, compiled=True)
    b = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], cfg, seed=3)
    assert not engine.compiled and engine.graph and torch.equal(a.tokens, b.tokens)


def test_running_out_of_memory_is_no_reason_to_give_up_graphs(tokenizer, monkeypatch):
    def full(self, work):
        raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(Graphed, "record", full)
    engine = Graphed(qwen3())
    with pytest.raises(torch.OutOfMemoryError):
        rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], config(max_completion_tokens=20))
    assert engine.graph


# on a GPU; float32 weights run under autocast there
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@gpu
@dtypes
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_decodes_as_the_model_computes(tokenizer, monkeypatch, dtype, compiled):
    """Two widths of columns, so two captures, in the first of two rollouts. What was sampled has the
    log-probabilities of the update, as near as rounding lets it: a sample itself may tip."""
    monkeypatch.setattr(fast, "WIDTH", 128)
    model = qwen3().cuda().to(dtype)
    cfg = config(group=4, max_completion_tokens=140)
    engine = fast.engine(model, compiled=compiled)
    for seed in range(2):
        batch = samples(engine, tokenizer, [ROW, LONG], cfg, seed=seed)
        assert batch.length.max() > 128
        with torch.no_grad():
            logp = engine.logps(batch, list(range(8)), cfg.temperature)
        off = (logp - batch.logp)[batch.sampled].abs()
        assert off.mean() < 0.05 and off.max() < 0.5, (off.mean(), off.max())
        spread = batch.logp[batch.sampled].std()
        assert spread > 5 * off.mean(), spread
        assert engine.captures == 2 and engine.graph and engine.compiled == compiled


@gpu
@dtypes
@pytest.mark.parametrize("change", [in_place, moved, hooked, switched])
def test_no_kept_graph_runs_for_a_model_that_changed(dtype, change):
    model = with_bare().cuda().to(dtype)
    graphed, eager = fast.SharedEngine(model), fast.SharedEngine(model, graph=False)
    before = logits_of(graphed)
    with torch.no_grad():
        change(model)
    now, expected = logits_of(graphed), logits_of(eager)
    assert (now - expected).abs().max() < 0.05 * now.abs().max() < 0.5 * (now - before).abs().max()
    assert graphed.captures == (1 if change is in_place else 2)


@gpu
def test_training_between_rollouts_is_seen_by_kept_graphs(tokenizer):
    """float32 weights, AdamW: after each update the next rollout is on-policy, or `update` raises."""
    model = qwen3().cuda()
    engine = fast.engine(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    cfg = config(prompts=2, group=8, max_completion_tokens=40)
    for step in range(4):
        batch = samples(engine, tokenizer, [ROW, LONG], cfg, seed=step)
        advantages = torch.randn(16, device="cuda")
        rest.update(engine, optimizer, batch, advantages, batch.sampled.float(), cfg, on_policy=True)
    assert engine.captures == 1


@gpu
def test_after_a_capture_that_failed_the_allocator_and_the_stream_are_usable(tokenizer, caplog):
    model, cfg = qwen3().cuda().bfloat16(), config(max_completion_tokens=20)
    handle = model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.sum() * 0 + 1))
    stream, engine = torch.cuda.current_stream(), fast.SharedEngine(model)
    for _ in range(2):
        samples(engine, tokenizer, [ROW, LONG], cfg)
    assert caplog.text.count("without a CUDA graph") == 1 and not engine.graph and engine.captures == 0
    handle.remove()
    held = torch.cuda.memory_reserved()
    block = torch.rand(2**27, device="cuda")
    assert torch.cuda.current_stream() == stream and float(block.mean()) > 0.4
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
    again = fast.SharedEngine(model)
    samples(again, tokenizer, [ROW, LONG], cfg)
    assert again.graph and again.captures == 1


@gpu
def test_another_thread_may_allocate_while_a_step_is_captured():
    """By cudaMalloc, since no block is as small as one before."""
    def allocate(sizes):
        for mebibytes in sizes:
            torch.ones(mebibytes * 2**18, device="cuda").sum().item()
            time.sleep(0.003)
    for seed in range(5):
        engine = fast.SharedEngine(qwen3(seed=seed).cuda())
        sizes = range(12 + 40 * seed, 52 + 40 * seed, 2)
        thread = threading.Thread(target=allocate, args=(sizes,), daemon=True)
        thread.start()
        logits_of(engine)
        assert engine.graph and engine.captures == 1
        thread.join()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_needs_no_set_device():
    engine = fast.SharedEngine(qwen3().to("cuda:1"))
    assert logits_of(engine).device.index == 1 and engine.captures == 1


def test_two_forwards_are_close_also_where_words_are_ruled_out():
    close = fast.close
    a = torch.tensor([1.0, -math.inf, 3.0])
    assert close(a, a + 1e-5) and not close(a, a + 1e-2)
    for finite in (0.0, 2.0):
        assert not close(a, torch.tensor([1.0, finite, 3.0]))


@pytest.mark.parametrize("kind", ["sliding window", "keys wider than values"])
def test_models_that_cannot_share_take_the_plain_path(tokenizer, kind):
    shape = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}
    if kind == "sliding window":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, sliding_window=4,
                                             use_sliding_window=True, max_window_layers=0))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(
            **shape, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2))
    engine = fast.engine(model)
    assert type(engine) is rest.Engine
    out = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], config(max_completion_tokens=10))
    logp = engine.logps(out, [0, 1, 2, 3], 1.0)
    assert torch.allclose(logp[out.sampled].detach(), out.logp[out.sampled], atol=1e-4)


def test_a_long_sliding_window_is_not_shared():
    """One that is longer than what the probe of two forwards could see."""
    shape = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert type(fast.engine(Qwen3ForCausalLM(Qwen3Config(**shape, **window)))) is rest.Engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_compares_decoding_steps_too_and_keeps_the_mode(monkeypatch, dtype):
    """A prefill that agrees is not enough; and a model in training mode is so afterwards."""
    model = qwen3().to(dtype).train()
    assert isinstance(fast.engine(model), fast.SharedEngine) and all(m.training for m in model.modules())
    attend = fast.DecodeLayout.attend

    def wrong(self, q, k, v, scale, layer):
        return attend(self, q, k, v, scale * (1 if self.step is None else 2), layer)
    monkeypatch.setattr(fast.DecodeLayout, "attend", wrong)
    assert type(fast.engine(qwen3().to(dtype))) is rest.Engine
