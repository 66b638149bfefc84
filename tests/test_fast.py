"""The fast engine against the plain one: the same samples, log-probabilities and entropies, with
prompts shared, from a step of fixed shapes, compiled, and (on a GPU) from a CUDA graph; and which
models it is chosen for."""

import math
import os
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import ROW, llama, qwen3, roll
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rest
from toy_tools import fast

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
    """Decodes as from a CUDA graph, but `record` runs the step instead of replaying it, and insists on
    fixed shapes and addresses."""
    captures = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.graph = True

    def record(self, work):
        Graphed.captures += 1
        result, where = work(), set()

        def run():
            with capture():
                result.copy_(work())
            read = (self.position, self.layout.column, self.layout.own[0][0], self.layout.prompt[0][0])
            where.add(tuple(x.data_ptr() for x in read))
            assert len(where) == 1 and int(self.layout.column) < self.layout.width
        return run, result


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


@pytest.mark.parametrize("name", MODELS)
def test_the_static_step_that_a_graph_holds_decodes_the_same(tokenizer, name, monkeypatch):
    model = often_ending(MODELS[name](), tokenizer)
    cfg = config(group=4, max_completion_tokens=40, temperature=0.7)
    monkeypatch.setattr(Graphed, "captures", 0)
    a, b = (roll(model, tokenizer, MIXED, cfg, engine, seed=3) for engine in (fast.SharedEngine, Graphed))
    # rows left, each time at least half of them, and those that stayed were captured anew
    assert 1 < Graphed.captures <= 1 + math.log2(12)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampled, b.sampled)
    assert torch.allclose(a.logp, b.logp, atol=1e-4) and torch.allclose(a.entropy, b.entropy, atol=1e-4)


def test_a_long_budget_is_read_in_widths_that_double(tokenizer):
    """Nobody leaves, 280 steps: prepared at steps 0, 128 and 256, for widths 128, 256 and 280, and the
    samples stay those of the eager step."""
    widths = []

    class Watched(Graphed):
        def prepare(self, ids, t):
            super().prepare(ids, t)
            widths.append((t, self.layout.width))
    model, cfg = qwen3(), config(max_completion_tokens=280)
    end = torch.tensor([tokenizer.eos_token_id])
    model.lm_head.weight.data = model.lm_head.weight.clone().index_fill(0, end, 0.0)  # seldom ends
    a, b = (roll(model, tokenizer, [ROW, LONG], cfg, engine, seed=3)
            for engine in (fast.SharedEngine, Watched))
    assert widths == [(0, 128), (128, 256), (256, 280)] and torch.equal(a.tokens, b.tokens)


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
@pytest.mark.parametrize("record", [fast.SharedEngine.record, lambda work: (lambda: None, work())],
                         ids=["refused", "empty graph"])
def test_a_step_that_cannot_be_captured_is_decoded_eagerly(tokenizer, monkeypatch, caplog, record):
    """Said once and remembered by the engine; the samples are those of the eager step."""
    model, cfg = qwen3(), config(max_completion_tokens=20)
    a = roll(model, tokenizer, [ROW, LONG], cfg, fast.SharedEngine, seed=3)
    monkeypatch.setattr(Graphed, "record", staticmethod(record))
    engine = Graphed(model)
    for _ in range(2):
        b = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], cfg, seed=3)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 runs under autocast
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_and_eager_decoding_sample_the_same_on_a_gpu(tokenizer, monkeypatch, dtype, compiled):
    """Two widths of columns, so at least two captures."""
    model, record = qwen3().cuda().to(dtype), fast.SharedEngine.record
    cfg, captures = config(group=4, max_completion_tokens=140), []
    counted = staticmethod(lambda work: captures.append(1) or record(work))
    monkeypatch.setattr(fast.SharedEngine, "record", counted)
    engine = fast.engine(model, compiled=compiled)
    a = rest.rollout(engine, rest.Chat(tokenizer), [ROW, LONG], cfg, seed=3)
    assert len(captures) >= 2 and engine.graph and engine.compiled == compiled
    b = roll(model, tokenizer, [ROW, LONG], cfg, partial(fast.SharedEngine, graph=False), seed=3)
    same = (a.tokens[:, :40] == b.tokens[:, :40]).cumprod(1).bool() & a.sampled[:, :40]
    assert float(same.float().mean()) > 0.5  # a rounding may tip a sample, and all that follows it
    assert torch.allclose(a.logp[:, :40][same], b.logp[:, :40][same], atol=0.1)


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
