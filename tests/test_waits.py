"""How often the host waits for the device, counted on a pretended GPU (fake_gpu.py): once a token, once a
pass, a few times a step, and not at all for a micro-batch. Where a model's own forward looks at its mask
(the plain engine, the warm start) it waits once more. No operation mixes devices, or it would raise."""

import fake_gpu
import pytest
import torch
from conftest import CALL, ROW, adder, by_text, qwen3
from test_fast import LONG, MIXED, assert_same, often_ending

import rest
from toy_tools import fast, policy


class Graphed(fast.SharedEngine):
    """With a step that is run again in place of a graph."""

    def record(self, work):
        result = work()
        return lambda: result.copy_(work()), result


ENGINES = {"plain": rest.Engine, "shared": lambda model: fast.SharedEngine(model, graph=False),
           "graph": Graphed}
OWN = {"plain": 1, "shared": 0, "graph": 0}  # waits of a model's own forward
engines = pytest.mark.parametrize("name", ENGINES)


def config(**options):
    return rest.Config(**{"prompts": 3, "group": 4, "max_completion_tokens": 12, **options})


def never_ending(model, tokenizer):
    end = tokenizer.eos_token_id
    model.lm_head.register_forward_hook(
        lambda module, inputs, out: torch.cat([out[..., :end], out[..., :1] - 50, out[..., end + 1:]], -1))
    return model


def on_cpu(rollout):
    """The Rollout with what the pretended tensors hold."""
    names = ("tokens", "sampled", "logp", "entropy")
    return rest.Rollout(**{**vars(rollout), **{name: getattr(rollout, name).inner for name in names}})


def waits(work):
    with fake_gpu.GPU() as gpu:
        work()
    return gpu.waits.total()


def test_the_pretended_gpu_counts_waits_and_refuses_mixtures():
    x = fake_gpu.GpuTensor(torch.arange(3.0))
    quiet = (lambda: x * 2 + 1, lambda: x.sum(), lambda: x[rest.to_device([0, 2], "cuda")],
             lambda: x[1:] + x[0], lambda: torch.zeros(2, device="cuda").fill_(3),
             lambda: rest.left_pad([[1], [2, 3]], "cuda"))
    for work in quiet:
        assert waits(work) == 0
    loud = (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.cpu(),
            lambda: x[x > 0], lambda: x[[0, 2]], lambda: torch.tensor([1, 2], device="cuda"),
            lambda: torch.ones(2).to("cuda"), lambda: x.nonzero())
    for work in loud:
        assert waits(work) == 1
    mixed = (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)]),
             lambda: torch.ones(3)[x.long()])
    for work in mixed:
        with pytest.raises(fake_gpu.DeviceMix, match=r"test_waits.py:\d+"):
            waits(work)


@engines
def test_one_wait_a_token(tokenizer, name):
    engine = ENGINES[name](fake_gpu.to_gpu(never_ending(qwen3(), tokenizer)))

    def count(tokens):
        cfg = config(max_completion_tokens=tokens)
        return waits(lambda: rest.rollout(engine, rest.Chat(tokenizer), MIXED, cfg))
    count(10)  # a first time, for what is prepared once
    count(30)
    assert count(30) - count(10) == 20 * (1 + OWN[name])
    assert count(10) <= 10 * (1 + OWN[name]) + (8 if name == "plain" else 2)


@engines
def test_rows_that_leave_and_tokens_that_are_forced_cost_no_wait(tokenizer, name):
    """Live episodes of up to three turns; the samples are those of the CPU."""
    class Calling(rest.Chat):
        def decode(self, ids):
            return CALL
    cfg = config(group=8, max_completion_tokens=120, max_turns=3)
    rollouts = []

    def roll(model):
        engine = ENGINES[name](model)
        engine.graph = name == "graph"
        rollouts.append(rest.rollout(engine, Calling(tokenizer), MIXED, cfg, toolbox_for=adder))
        return engine
    model = often_ending(qwen3(), tokenizer)
    roll(model)
    with fake_gpu.GPU() as gpu:
        engine = roll(fake_gpu.to_gpu(model))
    there, here = rollouts[0], on_cpu(rollouts[1])
    assert_same(there, here)
    steps = here.tokens.shape[1]
    assert len(set(here.length.tolist())) > 3 and max(map(len, here.turns)) > 1
    captures = getattr(engine, "captures", 0)
    assert gpu.waits.total() <= steps * (1 + OWN[name]) + (8 if name == "plain" else 2 + 2 * captures)


@engines
def test_a_step_waits_once_a_pass_and_once_for_all_metrics(tokenizer, name, monkeypatch):
    monkeypatch.setattr(rest, "score_batch", lambda batch: [by_text(texts, None) for texts in batch.texts])

    def phases(**options):
        """{phase: waits}, and how many micro-batches there were."""
        model = fake_gpu.to_gpu(often_ending(qwen3(), tokenizer))
        engine = ENGINES[name](model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        found = {}
        parts = []
        logps = engine.logps
        engine.logps = lambda *args: parts.append(1) or logps(*args)
        with fake_gpu.GPU() as gpu:
            def clock(phase):
                found[phase] = gpu.waits.total()
                gpu.waits.clear()
            cfg = config(**options)
            rest.train_step(engine, rest.Chat(tokenizer), optimizer, MIXED, cfg, 0, clock=clock)
            clock("metrics")
        return found, len(parts)
    one, few = phases()
    many, more = phases(micro_batch_tokens=64)
    passes, thrice = phases(passes=3)
    assert more > few and thrice == 3 * few
    assert one["reward"] == 2 and one["metrics"] == 1          # ids for regions, and ResT's token mean
    for found, own, parts in ((one, 2, few), (many, 2, more), (passes, 4, thrice)):
        # which groups teach, and each pass; a model's own forward looks at its mask once or twice
        assert 0 <= found["update"] - own <= 2 * OWN[name] * parts


@engines
def test_an_evaluation_waits_once_a_token_and_three_times_a_batch(tokenizer, name):
    engine = ENGINES[name](fake_gpu.to_gpu(never_ending(qwen3(), tokenizer)))

    def count(rows, tokens=5):
        cfg = config(max_completion_tokens=tokens)
        return waits(lambda: rest.evaluate(
            engine, rest.Chat(tokenizer), [LONG] * 4, cfg, greedy=True, batch_rows=rows))
    for shape in ((2,), (4,), (4, 9)):  # a first time, for what is prepared once
        count(*shape)
    assert count(4, 9) - count(4) == 4 * (1 + OWN[name])
    own = OWN[name] and 5 + count(4) - 2 * 5 - 3  # what a prefill of the model's own adds
    assert count(2) - count(4) == 5 + 3 + own and own <= 10


def test_a_warm_start_waits_once_a_step(tokenizer):
    model = fake_gpu.to_gpu(qwen3())

    def count(steps, micro_batch):
        pairs = [(ROW, CALL)] * 4
        return waits(lambda: policy.warm_start(
            model, tokenizer, pairs, steps, 4, 1e-3, micro_batch=micro_batch, progress=False))
    own = count(1, 2) - count(1, 4)  # one micro-batch more: what transformers' forward waits
    assert own <= 1 and count(3, 4) - count(1, 4) == 2 * (1 + own)
