"""What train_step and evaluate hand from one right piece to the next: rows, scores, progress, seeds,
learning rates, tools and instructions; and the numbers that they log."""

import copy
import math

import pytest
import torch
from conftest import CALL, ROW, ScriptedModel, adder, byte_tokenizer, qwen3, scripted, scripted_turns, step_of, by_text

import rest


def config(**kwargs):
    return rest.Config(**{"group": 2, "max_completion_tokens": 60, **kwargs})


# ------------------------------------------------------------------------------------------ the step

# (format, correctness, exact) of four completions of each of two rows; the second row's gold has no call
SCORES = {0: [(1.0, 1.0, True), (1.0, 0.5, False), (0.0, 0.5, False), (0.0, 0.0, False)],
          1: [(1.0, None, True), (0.0, None, False), (1.0, None, True), (1.0, None, True)]}


def step_with(monkeypatch, tokenizer, scores=SCORES, step=4, **options):
    """One train_step on two rows whose completions are scored as `scores` says.

    Returns (metrics, Rollout, weight, optimizer, cfg, what was handed to update)."""
    left, seen = copy.deepcopy(scores), {}

    def update(engine, optimizer, batch, advantages, weight, cfg, on_policy):
        seen.update(advantages=advantages, weight=weight, batch=batch)
        return {}
    monkeypatch.setattr(rest, "score_texts", lambda texts, row, refused: left[row["id"]].pop(0))
    monkeypatch.setattr(rest, "update", update)
    model = qwen3()
    cfg = config(**{"group": 4, "prompts": 2, "steps": 10, "warmup_steps": 2,
                    "max_completion_tokens": 24, **options})
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others}], lr=1.0)
    rows = [{**ROW, "id": 0}, {**ROW, "id": 1}]
    metrics, batch, weight = rest.train_step(
        rest.Engine(model), rest.Chat(tokenizer), optimizer, rows, cfg, step)
    return metrics, batch, weight, optimizer, cfg, seen


@pytest.mark.parametrize("method, scaling, delta", [("rest", "dynamic", 1e-4), ("rest", "static", 0.5),
                                                    ("dr-grpo", "dynamic", 1e-4)])
def test_a_step_hands_the_right_advantages_to_the_update(monkeypatch, tokenizer, method, scaling, delta):
    """Each completion is scored on its own row; progress, scaling, delta and the method's division
    reach the advantages; the learning rate of the step reaches every parameter group."""
    metrics, batch, weight, optimizer, cfg, seen = step_with(
        monkeypatch, tokenizer, method=method, reward_scaling=scaling, delta=delta)
    rewards, expected = [], []
    for row in (0, 1):
        r = [rest.episode_reward(f, c, 0.4, scaling) for f, c, _ in SCORES[row]]
        mean = sum(r) / 4
        std = (sum((x - mean) ** 2 for x in r) / 3) ** 0.5
        expected += [(x - mean) / (1.0 if method == "dr-grpo" else std + delta) for x in r]
        rewards += r
    assert torch.allclose(seen["advantages"], torch.tensor(expected), atol=1e-5)
    assert seen["batch"] is batch and seen["weight"] is weight
    assert metrics["reward"] == pytest.approx(sum(rewards) / 8, rel=1e-5)
    assert metrics["exact"] == 0.5 and metrics["format"] == 5 / 8
    assert metrics["correct"] == pytest.approx(0.5) and metrics["zero_groups"] == 0.0
    rate = rest.learning_rate(cfg, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [rate] * 2 and metrics["lr"] == rate


def test_zero_groups_are_those_without_any_signal(monkeypatch, tokenizer):
    """A group with one advantage of zero among others is none."""
    scores = {0: [(1.0, 1.0, True), (1.0, 0.5, False), (1.0, 0.0, False), (1.0, 0.5, False)],
              1: [(1.0, 1.0, True)] * 4}
    metrics, *_ = step_with(monkeypatch, tokenizer, scores)
    assert metrics["zero_groups"] == 0.5


def test_steps_and_seeds_sample_differently(monkeypatch, tokenizer):
    """The same (seed, step) gives the same tokens; (0, 1) and (1, 0) are not the same."""
    def tokens(seed, step):
        return step_with(monkeypatch, tokenizer, step=step, seed=seed)[1].tokens
    first = tokens(0, 1)
    assert torch.equal(first, tokens(0, 1))
    for other in (tokens(0, 2), tokens(1, 0), tokens(1, 1)):
        assert first.shape != other.shape or not torch.equal(first, other)


def test_learning_rate_by_hand():
    """Up over five steps, then down to a tenth at the last."""
    cfg = rest.Config(steps=105, warmup_steps=5, learning_rate=1.0)
    rates = [rest.learning_rate(cfg, step) for step in (0, 4, 5, 55, 105)]
    assert rates == pytest.approx([0.2, 1.0, 1.0, 0.55, 0.1])


def test_the_toolbox_reaches_the_rollout(monkeypatch, tokenizer):
    """From evaluate and from train_step, which asks the engine that it was given for log-probabilities."""
    seen, asked, rollout = [], [], rest.rollout

    class Watched(rest.Engine):
        def logps(self, *args):
            asked.append(args)
            return super().logps(*args)
    monkeypatch.setattr(rest, "rollout", lambda *a, **k: seen.append(k) or rollout(*a, **k))
    scores = iter([(1.0, 1.0, True), (0.0, 0.0, False)] * 2)
    monkeypatch.setattr(rest, "score_texts", lambda texts, row, refused: next(scores))
    model, cfg = qwen3(), config(prompts=1, max_completion_tokens=8)
    engine, chat = Watched(model), rest.Chat(tokenizer)
    rest.evaluate(engine, chat, [ROW], cfg, toolbox_for=adder, samples=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics, *_ = rest.train_step(engine, chat, optimizer, [ROW], cfg, 0, adder)
    assert metrics["grad_norm"] > 0 and len(asked) == 1
    assert len(seen) == 2 and all(k["toolbox_for"] is adder for k in seen)


def test_a_forward_that_is_random_is_refused_before_the_step(monkeypatch, tokenizer):
    """Dropout that is on while the policy is trained: the ratio of the first pass is not 1."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    model, cfg = qwen3(), config(prompts=1, max_completion_tokens=24)
    assert step_of(model, tokenizer, [ROW], cfg)[0]["grad_norm"] > 0
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.5, torch.is_grad_enabled()))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="disagree about the same policy"):
        step_of(model, tokenizer, [ROW], cfg)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_policy_that_is_not_finite_is_named(tokenizer):
    """It once trained on without a word: equal scores, no gradient, exit 0."""
    model = qwen3()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        step_of(model, tokenizer, [ROW], config(prompts=1, max_completion_tokens=8))


# ------------------------------------------------------------------------------------- what is logged

def test_logged_tokens_are_those_sampled(tokenizer):
    """A tool's answer is part of the episode and not of `tokens`."""
    model = scripted_turns(tokenizer, [[CALL, "x"]] * 2)
    cfg = config(prompts=1, max_turns=2, max_completion_tokens=300)
    metrics, batch, _ = step_of(model, tokenizer, [ROW], cfg, toolbox_for=adder)
    assert metrics["tokens"] == float(batch.sampled.sum(1).float().mean())
    assert metrics["tokens"] < float(batch.length.float().mean())


def test_the_logged_format_weight_counts_tags_and_json_scaffold(tokenizer):
    """It once was the mean over tags alone; with the authors' constants the scaffold weighs 0."""
    model = scripted(tokenizer, [CALL, CALL])
    cfg = config(method="rest-official", prompts=1, max_completion_tokens=130)
    metrics, batch, weight = step_of(model, tokenizer, [ROW], cfg)
    tags = weight[batch.region == rest.TAG]
    both = torch.cat([tags, weight[batch.region == rest.SCAFFOLD]]).mean()
    assert metrics["w_format"] == pytest.approx(float(both)) and both < 0.9 * tags.mean()


# ----------------------------------------------------------------------------------------- evaluation

def test_evaluate_counts_per_category(tokenizer):
    rows = [ROW, {**ROW, "category": "other", "gold": [[]]}, ROW]
    table = rest.evaluate(rest.Engine(scripted(tokenizer, [CALL, CALL, "x"])), rest.Chat(tokenizer), rows, config(max_completion_tokens=130), greedy=True)
    assert list(table) == ["other", "simple", "all"]
    assert table["simple"]["n"] == 2 and table["simple"]["exact"] == 0.5 and table["other"]["exact"] == 0.0 and table["all"]["exact"] == pytest.approx(1 / 3)
    assert table["other"]["correct"] is None and table["simple"]["correct"] == 0.5

def test_scores_belong_to_their_rows(tokenizer):
    """Two rows of different category and gold, two samples each."""
    rows = [ROW, {**ROW, "category": "other", "gold": [[]]}]
    table = rest.evaluate(rest.Engine(scripted(tokenizer, [CALL] * 4)), rest.Chat(tokenizer), rows,
                          config(max_completion_tokens=130), samples=2)
    found = {key: (value["n"], value["exact"]) for key, value in table.items()}
    assert found == {"simple": (2, 1.0), "other": (2, 0.0), "all": (4, 0.5)}


def test_evaluation_batches_draw_different_numbers(monkeypatch, tokenizer):
    """Equal rows in three batches, the last of one row: every row once, other samples in each."""
    seen, rollout, V = [], rest.rollout, len(tokenizer)
    end = torch.tensor([tokenizer.eos_token_id])
    model = ScriptedModel(lambda *_: torch.zeros(V).index_fill(0, end, -math.inf), V)

    def watch(*args, **kwargs):
        out = rollout(*args, **kwargs)
        seen.append(out.tokens)
        return out
    monkeypatch.setattr(rest, "rollout", watch)
    table = rest.evaluate(rest.Engine(model), rest.Chat(tokenizer), [ROW] * 5, config(max_completion_tokens=20), batch_rows=2)
    assert table["all"]["n"] == 5 and [len(tokens) for tokens in seen] == [2, 2, 1]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1][:1], seen[2])


# ------------------------------------------------------------------------------------ the whole loop

def test_the_loop_learns_a_bandit():
    """The whole loop on a task that 30 steps can solve: a random policy of 265 byte tokens must end its turn at once. The chance of the end
    token rises from about 1/265 by more than 50 times; with the sign of the advantage flipped it falls."""
    def chance(sign):
        tokenizer, model = byte_tokenizer(), qwen3(layers=1)
        cfg = rest.Config(method="grpo", steps=30, prompts=2, group=32, max_completion_tokens=2, learning_rate=3e-2, warmup_steps=1)
        engine, optimizer = rest.Engine(model), torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
        for step in range(cfg.steps):
            batch = rest.rollout(engine, rest.Chat(tokenizer), [ROW, ROW], cfg, seed=step)
            rewards = (batch.tokens[:, 0] % 2 == 0).float().view(2, -1)  # the end token's id is 2: an even id is worth one point
            advantages = sign * rest.group_advantages(rewards).flatten()
            weight = rest.normalise_weights(torch.ones_like(batch.entropy), batch.sampled)
            rest.update(engine, optimizer, batch, advantages, weight, cfg)
        with torch.no_grad():
            p = model(torch.tensor([batch.prompts[0]])).logits[0, -1].softmax(-1)
        return float(p[0::2].sum())
    assert chance(+1) > 0.95 and chance(-1) < 0.05
