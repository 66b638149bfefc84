"""Rollouts: what is sampled, what is forced, what is recorded; with scripted and uniform fakes, and shared against plain decoding."""

import copy
import math
import os
import shutil
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import (CALL, ROW, ScriptedModel, adder, llama, opened_template, qwen3, scripted,
                      scripted_turns)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rest
from rest import TAG, TEXT, THOUGHT
from toy_tools import shared_prefix
from toy_tools.tasks import completion_text

ANSWER = "<think>done</think><response>3</response>"
LONG = {**ROW, "messages": [{"role": "user", "content": "please add the numbers 1 and 2 for me, would you?"}]}


def config(**kwargs):
    return rest.Config(**{"group": 2, "max_completion_tokens": 60, **kwargs})


def test_a_script_comes_back_verbatim_with_its_end_token(tokenizer):
    """Rows of different lengths: tokens are the script's, the end token is kept and marked as sampled, nothing behind it."""
    texts = [CALL, "a", "<think>", CALL + CALL]
    out = rest.rollout(scripted(tokenizer, texts), tokenizer, [ROW, ROW], config(max_completion_tokens=130))
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert out.tokens[i, :len(ids)].tolist() == ids and int(out.length[i]) == len(ids)
        assert out.sampled[i].tolist() == [True] * len(ids) + [False] * (out.tokens.shape[1] - len(ids))
        assert out.texts[i] == [text] and out.turns[i] == [(0, len(ids))]
    assert not out.truncated.any() and out.tokens.shape[1] == int(out.length.max())


def test_truncation_is_marked_and_scored_as_it_stands(tokenizer):
    out = rest.rollout(scripted(tokenizer, [CALL, "a"]), tokenizer, [ROW], config(max_completion_tokens=5))
    assert out.truncated.tolist() == [True, False]
    assert out.texts[0] == [tokenizer.decode(tokenizer(CALL)["input_ids"][:5])] and out.turns == [[(0, 5)], [(0, 2)]]


def test_uniform_logits_give_log_v_nats_and_uniform_tokens(tokenizer):
    """logp = -log V and entropy = log V exactly; 4000 draws over 265 tokens: chi-square within 6 standard deviations (a fair sampler
    fails once in 10^8 seeds, and the seed is fixed)."""
    V = len(tokenizer)
    fake = ScriptedModel(lambda row, t, last: torch.zeros(V).index_fill(0, torch.tensor([tokenizer.eos_token_id]), -torch.inf), V)
    out = rest.rollout(fake, tokenizer, [ROW] * 10, config(group=8, max_completion_tokens=50))
    assert torch.allclose(out.logp, torch.tensor(-math.log(V - 1))) and torch.allclose(out.entropy, torch.tensor(math.log(V - 1)))
    counts, expected = torch.bincount(out.tokens.flatten(), minlength=V).float(), out.tokens.numel() / (V - 1)
    assert counts[tokenizer.eos_token_id] == 0
    chi2 = ((counts - expected) ** 2 / expected).sum() - expected
    assert abs(chi2 - (V - 2)) < 6 * math.sqrt(2 * (V - 2))


def test_sampling_follows_the_distribution_at_the_temperature(tokenizer):
    """Three tokens with logits 0, 1, 2 at T = 0.5: frequencies within 5 standard errors of softmax(2 logits); logp and entropy are of that distribution."""
    V, n = len(tokenizer), 4000
    logits = torch.full((V,), -torch.inf)
    logits[10:13] = torch.tensor([0.0, 1.0, 2.0])
    out = rest.rollout(ScriptedModel(lambda *_: logits, V), tokenizer, [ROW] * 40, config(group=2, max_completion_tokens=50, temperature=0.5))
    p = torch.softmax(2 * torch.tensor([0.0, 1.0, 2.0]), 0)
    frequency = torch.stack([(out.tokens == k).float().mean() for k in (10, 11, 12)])
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    assert torch.allclose(out.logp, p.log()[out.tokens - 10], atol=1e-6)
    assert torch.allclose(out.entropy, -(p * p.log()).sum(), atol=1e-6)


def test_a_uniform_of_zero_picks_no_impossible_word():
    """The first word of positive probability, not the first word."""
    ids, logp, _ = rest.sample(torch.tensor([[-math.inf, 0.0, 0.0]]), torch.zeros(1), 1.0)
    assert ids.tolist() == [1] and logp.isfinite().all()


def test_live_episodes_execute_calls_and_feed_results_as_forced_tokens(tokenizer):
    """Pitfalls 2 and 3: the tool's tokens are in the episode and not in the mask; what was sampled stands there verbatim."""
    out = rest.rollout(scripted_turns(tokenizer, [[CALL, ANSWER]] * 2), tokenizer, [ROW], config(max_turns=3, max_completion_tokens=300), toolbox_for=adder)
    assert out.texts == [[CALL, ANSWER]] * 2 and not out.truncated.any()
    n, ids = int(out.length[0]), out.tokens[0].tolist()
    assert tokenizer.decode(ids[:n]) == CALL + "<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n" + ANSWER + "<|im_end|>"
    (a, b), (c, d) = out.turns[0]
    assert out.sampled[0].tolist() == [a <= t < b or c <= t < d for t in range(n)]
    assert tokenizer.decode(ids[b:c]) == "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    assert (out.logp[0, b:c] == 0).all() and (out.entropy[0, b:c] == 0).all() and (out.entropy[0, a:b] > 0).all()
    row = {**ROW, "gold": [ROW["gold"][0], []]}
    assert rest.score_texts(out.texts[0], row) == (1.0, 1.0, True)
    region, touched = rest.token_regions(tokenizer, out, {tokenizer.eos_token_id})
    assert (region[~out.sampled] == -1).all() and (region[out.sampled] >= 0).all() and (touched[~out.sampled] == 0).all()
    assert region[0, b - 1] == rest.TAG == region[0, d - 1]  # end of turn is format


def test_a_budget_that_ends_within_a_tools_answer_leaves_no_empty_turn(tokenizer):
    n = len(tokenizer(CALL, add_special_tokens=False)["input_ids"]) + 1
    out = rest.rollout(scripted_turns(tokenizer, [[CALL, ANSWER]] * 2), tokenizer, [ROW], config(max_turns=3, max_completion_tokens=n + 5), toolbox_for=adder)
    assert out.truncated.all() and out.texts == [[CALL]] * 2 and out.turns == [[(0, n)]] * 2 and int(out.sampled[0].sum()) == n


def schema(name):
    return {"type": "function", "function": {"name": name, "description": name, "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}


def turn(*calls, response=None):
    return completion_text([{"name": n, "arguments": {"a": a}} for n, a in calls], "t", response)


def test_every_live_episode_has_its_own_box_tools_answers_and_turns(tokenizer):
    """Two rows with other tools, two completions each, two calls a turn, a forced opening of the
    thought in both turns; all of different lengths. Each box is asked by its own episode, in the
    order of the calls, and its answers stand in that episode."""
    made = []

    class Box:
        def __init__(self, row):
            self.number, self.count = len(made), 0
            made.append(self)
            self.functions = {name: self.act for name in ("f", "g")}

        def act(self, a):
            self.count += 1
            return f"box {self.number} call {self.count} a {a}"
    rows = [{**ROW, "tools": [schema(name)], "gold": [[], []]} for name in ("f", "g")]
    first = [turn(("f", 1), ("f", 2)), turn(response="x"),
             turn(("g", 30), ("g", 4)), turn(("g", 500), ("g", 6))]
    texts = [[text, turn(response="y" * (1 + 5 * i))] for i, text in enumerate(first)]
    opened = opened_template(tokenizer)
    out = rest.rollout(scripted_turns(opened, texts), opened, rows,
                       config(max_turns=3, max_completion_tokens=420), toolbox_for=Box)
    assert [box.count for box in made] == [2, 0, 2, 2]
    assert out.texts[1] == [first[1]] and len(set(out.length.tolist())) == 4
    for i, arguments in ((0, (1, 2)), (2, (30, 4)), (3, (500, 6))):
        assert out.texts[i] == texts[i]
        (_, b), (c, _) = out.turns[i]
        answers = [f"box {i} call {k + 1} a {x}" for k, x in enumerate(arguments)]
        assert opened.decode(out.tokens[i, b:c]) == (
            "\n" + "".join(f"<|im_start|>tool\n{x}<|im_end|>\n" for x in answers)
            + "<|im_start|>assistant\n")
        # the opened thought belongs to the turn and is no decision
        assert not out.sampled[i, c] and out.sampled[i, c + 1]


def test_a_turn_that_is_cut_after_a_tools_answer_is_scored_as_it_stands(tokenizer):
    """The budget ends three tokens into the second turn: that turn has its columns, its text and
    its regions, and its last token, which is no end of turn, is a thought."""
    def play(budget):
        return rest.rollout(scripted_turns(tokenizer, [[CALL, ANSWER]] * 2), tokenizer, [ROW],
                            config(max_turns=3, max_completion_tokens=budget), toolbox_for=adder)
    first, second = play(300).turns[0]
    n = second[0] + 3
    out = play(n)
    assert out.texts[0] == [CALL, "<think>do"] and out.turns[0] == [first, (n - 3, n)]
    region, _ = rest.token_regions(tokenizer, out, {tokenizer.eos_token_id})
    assert region[0, n - 3:].tolist() == [TAG, THOUGHT, THOUGHT]


def test_the_last_token_of_a_cut_turn_is_no_end_of_turn(tokenizer):
    """Beside it a turn that has ended, whose last token is one."""
    out = rest.rollout(scripted(tokenizer, ["<think>abc", "a"]), tokenizer, [ROW],
                       config(max_completion_tokens=3))
    region, touched = rest.token_regions(tokenizer, out, {tokenizer.eos_token_id})
    assert region.tolist() == [[TAG, THOUGHT, THOUGHT], [TEXT, TAG, -1]]
    assert touched[0, 2] == 1 << THOUGHT and touched[1, 1] == 1 << TAG


def test_the_tool_limit_is_the_configured_one(tokenizer):
    """A tool that sleeps half a second, under a limit below and one above."""
    box = SimpleNamespace(functions={"add": lambda a, b: time.sleep(0.5)})
    for limit, word in ((0.05, "too long"), (30.0, "null")):
        out = rest.rollout(scripted_turns(tokenizer, [[CALL, "x"]] * 2), tokenizer, [ROW],
                           config(max_turns=2, max_completion_tokens=300, tool_timeout=limit),
                           toolbox_for=lambda row: box)
        assert word in tokenizer.decode(out.tokens[0])


def test_all_end_ids_end_a_turn(tokenizer):
    """The tokenizer's and those of the model's generation config, one or a list."""
    model = scripted(tokenizer, ["ab<|im_start|>", "ab"])
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for more in (start, [start]):
        model.generation_config = SimpleNamespace(eos_token_id=more)
        out = rest.rollout(model, tokenizer, [ROW], config(max_completion_tokens=20))
        assert out.length.tolist() == [3, 3] and out.texts == [["ab"], ["ab"]]


def test_max_turns_ends_an_episode_that_never_stops_calling(tokenizer):
    out = rest.rollout(scripted_turns(tokenizer, [[CALL, CALL]] * 2), tokenizer, [ROW], config(max_turns=2, max_completion_tokens=400), toolbox_for=adder)
    assert out.texts[0] == [CALL, CALL] and not out.truncated.any()


def test_without_a_toolbox_calls_are_not_executed(tokenizer):
    out = rest.rollout(scripted_turns(tokenizer, [[CALL, ANSWER]] * 2), tokenizer, [ROW], config(max_completion_tokens=300))
    assert out.texts[0] == [CALL]


def test_a_forced_thought_opening_is_no_decision_of_the_policy(tokenizer):
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    forced = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    fake = scripted(tokenizer, ["xx" + CALL[len("<think>"):]] * 2)  # its first two choices are overruled
    out = rest.rollout(fake, opened, [ROW], config(max_completion_tokens=90))
    assert out.tokens[0, :2].tolist() == forced and out.sampled[0, :3].tolist() == [False, False, True]
    assert out.texts[0][0].startswith("<think>\n") and rest.score_texts(out.texts[0], ROW)[2]


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
    """Ragged prompts, left padding, finished rows leaving: same tokens; logps, entropies and a fresh forward agree within 1e-4 (float32).
    (A single prompt and no GQA once failed: then a transposed query is a view.)"""
    model, rows = often_ending(MODELS[name](), tokenizer), [ROW, LONG, {**LONG, "tools": []}][:prompts]
    assert rest.can_share(model)
    cfg = config(group=4, max_completion_tokens=40, temperature=0.7)
    a = rest.rollout(model, tokenizer, rows, cfg, seed=3)
    b = rest.rollout(model, tokenizer, rows, config(group=4, max_completion_tokens=40, temperature=0.7, shared_prefix=False), seed=3)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampled, b.sampled) and a.texts == b.texts
    assert len(set(a.length.tolist())) > prompts
    assert torch.allclose(a.logp, b.logp, atol=1e-4) and torch.allclose(a.entropy, b.entropy, atol=1e-4)
    for shared in (True, False):
        logp = rest.completion_logps(model, a.prompts, a.tokens.view(prompts, 4, -1), 0.7, shared)
        assert torch.allclose(logp.flatten(0, 1)[a.sampled], a.logp[a.sampled], atol=1e-4)
    for i, n in enumerate(a.length.tolist()):  # entropies in float64
        log_p = torch.log_softmax(model(torch.tensor([a.prompts[i // 4] + a.tokens[i, :n].tolist()])).logits[0, -n - 1:-1].double() / 0.7, -1)
        assert torch.allclose(a.entropy[i, :n].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-4)
    wrong = rest.completion_logps(model, a.prompts, a.tokens.view(prompts, 4, -1), 1.0, True).flatten(0, 1)  # pitfall 5: T forgotten
    assert (wrong[a.sampled] - a.logp[a.sampled]).abs().max() > 0.01


class Graphed(rest.SharedDecoder):
    """Decodes as from a CUDA graph, but `record` runs the step instead of replaying it, and insists on fixed shapes and addresses."""
    captures = 0

    def __init__(self, *args):
        super().__init__(*args)
        self.graph, self.shrink = "graph" not in self.model._rest_refused, 0.5

    def record(self, work):
        Graphed.captures += 1
        result, where = work(), set()

        def run():
            with capture():
                result.copy_(work())
            where.add((self.position.data_ptr(), self.layout.column.data_ptr(), self.layout.own[0][0].data_ptr(), self.layout.prompt[0][0].data_ptr()))
            assert len(where) == 1 and int(self.layout.column) < self.layout.width
        return run, result


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh") or kwargs.get("device") == torch.device("meta"):
            raise AssertionError(f"a CUDA graph cannot hold this {name}")
        return func(*args, **kwargs)


@contextmanager
def capture():
    """Refuses what a CUDA graph cannot hold and a CPU would let pass: waiting for a value, tensors made from numbers or without a device."""
    with torch.device("meta"), Refuse():
        yield


def test_the_capture_check_refuses_what_a_graph_cannot_hold():
    x = torch.ones(3)
    with capture():
        x * 2 + torch.arange(3, device=x.device)
    for broken in (lambda: float(x.sum()), lambda: x[x > 0], lambda: torch.arange(3), lambda: x + torch.tensor([1, 2, 3]), lambda: torch.zeros(2)):
        with pytest.raises((AssertionError, RuntimeError), match="cannot hold|meta"), capture():
            broken()


@pytest.mark.parametrize("name", MODELS)
def test_the_static_step_that_a_graph_holds_decodes_the_same(tokenizer, name, monkeypatch):
    model, rows = often_ending(MODELS[name](), tokenizer), [ROW, LONG, {**LONG, "tools": []}]
    cfg = config(group=4, max_completion_tokens=40, temperature=0.7)
    a = rest.rollout(model, tokenizer, rows, cfg, seed=3)
    monkeypatch.setattr(rest, "SharedDecoder", Graphed)
    monkeypatch.setattr(Graphed, "captures", 0)
    b = rest.rollout(model, tokenizer, rows, cfg, seed=3)
    assert 1 < Graphed.captures <= 1 + math.log2(12)  # rows left, each time at least half of them, and those that stayed were captured anew
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampled, b.sampled)
    assert torch.allclose(a.logp, b.logp, atol=1e-4) and torch.allclose(a.entropy, b.entropy, atol=1e-4)


def test_a_long_budget_is_read_in_widths_that_double(tokenizer, monkeypatch):
    """Nobody leaves, 280 steps: prepared at steps 0, 128 and 256, for widths 128, 256 and 280, and the samples stay those of the eager step."""
    widths = []

    class Watched(Graphed):
        def prepare(self, ids, t):
            super().prepare(ids, t)
            widths.append((t, self.layout.width))
    model, cfg = qwen3(), config(max_completion_tokens=280)
    model.lm_head.weight.data = model.lm_head.weight.clone().index_fill(0, torch.tensor([tokenizer.eos_token_id]), 0.0)  # seldom ends
    a = rest.rollout(model, tokenizer, [ROW, LONG], cfg, seed=3)
    monkeypatch.setattr(rest, "SharedDecoder", Watched)
    b = rest.rollout(model, tokenizer, [ROW, LONG], cfg, seed=3)
    assert widths == [(0, 128), (128, 256), (256, 280)] and torch.equal(a.tokens, b.tokens)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_decoding_samples_the_same(tokenizer):
    model, cfg = qwen3(layers=1), {"group": 4, "max_completion_tokens": 24, "temperature": 0.7}
    a, b = (rest.rollout(model, tokenizer, [ROW, LONG], config(**cfg, compile_decode=c), seed=3) for c in (False, True))
    assert torch.equal(a.tokens, b.tokens) and torch.allclose(a.logp, b.logp, atol=1e-4)
    assert not model._rest_refused and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU there is nothing to capture")
@pytest.mark.parametrize("record", [rest.SharedDecoder.record, lambda work: (lambda: None, work())], ids=["refused", "empty graph"])
def test_a_step_that_cannot_be_captured_is_decoded_eagerly(tokenizer, monkeypatch, caplog, record):
    """Said once and remembered. A step that cannot be compiled is tried without; running out of memory is no reason to give up graphs."""
    model, cfg = qwen3(), config(max_completion_tokens=20)
    a = rest.rollout(model, tokenizer, [ROW, LONG], cfg, seed=3)
    monkeypatch.setattr(Graphed, "record", staticmethod(record))
    monkeypatch.setattr(rest, "SharedDecoder", Graphed)
    b = rest.rollout(model, tokenizer, [ROW, LONG], cfg, seed=3)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp) and caplog.text.count("without a CUDA graph") == 1

    def fails(*args):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(shared_prefix, "compiled_step", fails)
    model = qwen3()
    c = rest.rollout(model, tokenizer, [ROW, LONG], config(max_completion_tokens=20, compile_decode=True), seed=3)
    assert model._rest_refused == {"compiled", "graph"} and torch.equal(a.tokens, c.tokens)

    def full(self, work):
        raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(Graphed, "record", full)
    model = qwen3()
    with pytest.raises(torch.OutOfMemoryError):
        rest.rollout(model, tokenizer, [ROW, LONG], cfg, seed=3)
    assert not model._rest_refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 runs under autocast
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_and_eager_decoding_sample_the_same_on_a_gpu(tokenizer, monkeypatch, dtype, compiled):
    """Two widths of columns, so at least two captures."""
    model, cfg, record = qwen3().cuda().to(dtype), {"group": 4, "max_completion_tokens": 140}, rest.SharedDecoder.record
    captures = []
    monkeypatch.setattr(rest.SharedDecoder, "record", staticmethod(lambda work: captures.append(1) or record(work)))
    assert rest.can_share(model)
    a = rest.rollout(model, tokenizer, [ROW, LONG], config(**cfg, compile_decode=compiled), seed=3)
    assert len(captures) >= 2 and not model._rest_refused
    b = rest.rollout(model, tokenizer, [ROW, LONG], config(**cfg, cuda_graph=False), seed=3)
    same = (a.tokens[:, :40] == b.tokens[:, :40]).cumprod(1).bool() & a.sampled[:, :40]
    assert float(same.float().mean()) > 0.5  # a rounding may tip a sample, and all that follows it
    assert torch.allclose(a.logp[:, :40][same], b.logp[:, :40][same], atol=0.1)


def test_who_leaves_the_batch_does_not_change_what_others_sample(tokenizer):
    """Row i draws from its own stream: making rows 0 and 3 end at once leaves the other rows' tokens as they were."""
    V = len(tokenizer)

    def script(quick):
        def f(row, t, last):
            logits = torch.sin(torch.arange(V) * (1.0 + row) + t)
            logits[tokenizer.eos_token_id] = 50.0 if row in quick and t == 1 else -50.0
            return logits
        return ScriptedModel(f, V)
    cfg = config(group=2, max_completion_tokens=20)
    a, b = (rest.rollout(script(quick), tokenizer, [ROW] * 3, cfg, seed=5) for quick in ((), (0, 3)))
    assert b.length.tolist() == [2, 20, 20, 2, 20, 20]
    for i in (1, 2, 4, 5):
        assert torch.equal(a.tokens[i], b.tokens[i]) and torch.equal(a.logp[i], b.logp[i])
    other = rest.rollout(script(()), tokenizer, [ROW] * 3, cfg, seed=6)
    assert not torch.equal(a.tokens, other.tokens)


def test_greedy_takes_the_most_likely_token(tokenizer):
    model = qwen3()
    out = rest.rollout(model, tokenizer, [ROW], config(max_completion_tokens=12), group=1, greedy=True)
    ids = out.prompts[0]
    for t in range(int(out.length[0])):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert best == int(out.tokens[0, t])
        ids = ids + [best]


def test_two_forwards_are_close_also_where_words_are_ruled_out():
    close = shared_prefix.close
    a = torch.tensor([1.0, -math.inf, 3.0])
    assert close(a, a + 1e-5) and not close(a, a + 1e-2)
    for finite in (0.0, 2.0):
        assert not close(a, torch.tensor([1.0, finite, 3.0]))


@pytest.mark.parametrize("kind", ["sliding window", "keys wider than values"])
def test_models_that_cannot_share_take_the_plain_path(tokenizer, kind):
    shape = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "sliding window":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
                                                       qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2))
    assert not rest.can_share(model)
    out = rest.rollout(model, tokenizer, [ROW, LONG], config(max_completion_tokens=10))
    logp = rest.completion_logps(model, out.prompts, out.tokens.view(2, 2, -1), 1.0, shared=False)
    assert torch.allclose(logp.flatten(0, 1)[out.sampled].detach(), out.logp[out.sampled], atol=1e-4)


def test_a_long_sliding_window_is_not_shared():
    """One that is longer than what the probe of two forwards could see."""
    shape = {"vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert not rest.can_share(Qwen3ForCausalLM(Qwen3Config(**shape, **window)))


def test_the_probe_compares_decoding_steps_too_and_keeps_the_mode(monkeypatch):
    """A prefill that agrees is not enough; and a model in training mode is so afterwards."""
    model = qwen3().train()
    assert rest.can_share(model) and model.training
    attend = shared_prefix.DecodeLayout.attend

    def wrong(self, q, k, v, scale, layer):
        return attend(self, q, k, v, scale * (1 if self.step is None else 2), layer)
    monkeypatch.setattr(shared_prefix.DecodeLayout, "attend", wrong)
    assert not rest.can_share(qwen3())
