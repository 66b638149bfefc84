"""What train_step and evaluate hand from one right piece to the next: rows, scores, progress,
seeds, learning rates, tools; and the numbers that they log."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (CALL, ROW, ScriptedModel, adder, by_text, byte_tokenizer, qwen3, roll, scripted,
                      scripted_turns, step_of)

import rest
from rest import NAME, PARAMS, SCAFFOLD, TAG, TEXT, THOUGHT
from toy_tools import chat


def config(**kwargs):
    return rest.Config(**{"group": 2, "max_completion_tokens": 60, **kwargs})


# ----------------------------------------------------------------------------------------- the step

# (format, correctness, exact) of four completions of two rows; the second row's gold has no call
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


@pytest.mark.parametrize("method, scaling, delta", [
    ("rest", "dynamic", 1e-4), ("rest", "static", 0.5), ("dr-grpo", "dynamic", 1e-4)])
def test_a_step_hands_the_right_advantages_to_the_update(monkeypatch, tokenizer, method, scaling,
                                                         delta):
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


def test_a_step_weighs_by_the_entropy_recorded_and_by_its_progress(monkeypatch, tokenizer):
    """The weights that reach the update are those of the batch at step 4 of 10: not of another
    moment, nor read off anything but the recorded entropy."""
    _, batch, weight, _, cfg, _ = step_with(monkeypatch, tokenizer)
    region, covers = rest.token_regions(batch, rest.Chat(tokenizer))
    assert torch.equal(batch.region, region) and torch.equal(batch.covers, covers)

    def weights(entropy, progress):
        other = dataclasses.replace(batch, entropy=entropy)
        return rest.WEIGHTS["rest"](other, cfg, progress)
    assert torch.equal(weight, weights(batch.entropy, 0.4))
    for entropy, progress in ((batch.entropy, 0.0), (batch.entropy, 1.0), (-batch.logp, 0.4)):
        assert not torch.allclose(weight, weights(entropy, progress), atol=1e-4)


def test_every_id_that_ends_a_turn_is_format(monkeypatch, tokenizer):
    """Also where it is the generation config's and not the tokenizer's."""
    monkeypatch.setattr(rest, "update", lambda *args, **kwargs: {})
    model = scripted(tokenizer, ["ab<|im_start|>", "ab"])
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.generation_config = SimpleNamespace(eos_token_id=end)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    talk = chat.TemplateChat(tokenizer, model=model)
    _, batch, _ = rest.train_step(rest.Engine(model), talk, optimizer, [ROW], config(prompts=1), 0)
    assert batch.region.tolist() == [[TEXT, TEXT, TAG]] * 2


def test_the_clock_is_told_each_phase_in_turn(monkeypatch, tokenizer):
    """After the work: at "rollout" nothing is scored, at "reward" nothing updated."""
    told = []
    monkeypatch.setattr(rest, "score_texts",
                        lambda *args: told.append("scored") or (1.0, 1.0, True))
    monkeypatch.setattr(rest, "update", lambda *args, **kwargs: told.append("updated") or {})
    model = scripted(tokenizer, ["a", "b"])
    step_of(model, tokenizer, [ROW], config(prompts=1), clock=told.append)
    assert told == ["rollout", "scored", "scored", "reward", "updated", "update"]


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


# ----------------------------------------------------------------------------------- what is logged

def test_logged_entropies_weights_and_truncation_are_those_of_the_batch(monkeypatch, tokenizer):
    """Means by region, summed up token by token; one of four completions runs out of its budget."""
    texts = [CALL, "<think>a</think>", "<think>" + "long " * 40, "a"]
    model = scripted(tokenizer, texts)
    cfg = config(group=4, prompts=1, max_completion_tokens=100)
    batch = roll(model, tokenizer, [ROW], cfg)
    columns = torch.arange(batch.entropy.numel()).view_as(batch.entropy)
    batch.entropy = torch.where(batch.sampled, 0.1 + columns / 1000, 0.0)
    monkeypatch.setattr(rest, "rollout", lambda *args, **kwargs: batch)
    monkeypatch.setattr(rest, "update", lambda *args, **kwargs: {})
    metrics, batch, weight = step_of(model, tokenizer, [ROW], cfg, step=5)
    members = {"format": (TAG, SCAFFOLD), "name": (NAME,), "params": (PARAMS,),
               "thought": (THOUGHT,), "text": (TEXT,)}
    for name, inside in members.items():
        rows, columns = batch.region.shape
        where = [(i, t) for i in range(rows) for t in range(columns) if batch.region[i, t] in inside]
        assert where
        for letter, values in (("H", batch.entropy), ("w", weight)):
            mean = sum(float(values[it]) for it in where) / len(where)
            assert metrics[f"{letter}_{name}"] == pytest.approx(mean, rel=1e-4), (letter, name)
    assert len({round(metrics[f"H_{name}"], 4) for name in members}) == 5
    assert metrics["truncated"] == 0.25 and metrics["step"] == 5


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
    tags = weight[batch.region == TAG]
    both = torch.cat([tags, weight[batch.region == SCAFFOLD]]).mean()
    assert metrics["w_format"] == pytest.approx(float(both)) and both < 0.9 * tags.mean()


# --------------------------------------------------------------------------------------- evaluation

def evaluated(model, tokenizer, rows, cfg, **options):
    """rest.evaluate of a model and a tokenizer."""
    return rest.evaluate(rest.Engine(model), rest.Chat(tokenizer), rows, cfg, **options)


def test_evaluate_counts_per_category(tokenizer):
    """Rates by hand; correctness is of rows whose gold answer has calls."""
    rows = [ROW, {**ROW, "category": "other", "gold": [[]]}, ROW]
    table = evaluated(scripted(tokenizer, [CALL, CALL, "x"]), tokenizer, rows,
                      config(max_completion_tokens=130), greedy=True)
    assert list(table) == ["other", "simple", "all"]
    assert table["simple"]["n"] == 2 and table["simple"]["exact"] == 0.5
    assert table["other"]["exact"] == 0.0 and table["all"]["exact"] == pytest.approx(1 / 3)
    assert table["other"]["correct"] is None and table["simple"]["correct"] == 0.5


def test_a_category_named_all_counts_once(tokenizer):
    table = evaluated(scripted(tokenizer, [CALL, "x"]), tokenizer, [{**ROW, "category": "all"}, ROW],
                      config(max_completion_tokens=130), greedy=True)
    assert {key: (value["n"], value["exact"]) for key, value in table.items()} == {
        "simple": (1, 0.0), "all": (2, 0.5)}


def test_scores_belong_to_their_rows(tokenizer):
    """Two rows of different category and gold, two samples each."""
    rows = [ROW, {**ROW, "category": "other", "gold": [[]]}]
    table = evaluated(scripted(tokenizer, [CALL] * 4), tokenizer, rows,
                      config(max_completion_tokens=130), samples=2)
    found = {key: (value["n"], value["exact"]) for key, value in table.items()}
    assert found == {"simple": (2, 1.0), "other": (2, 0.0), "all": (4, 0.5)}


def test_later_batches_of_an_evaluation_count_for_their_own_categories(tokenizer):
    """Five rows of five categories in batches of two; a row without one counts as "rows"."""
    rows = [{**ROW, "category": f"c{i}"} for i in range(4)]
    rows.append({key: value for key, value in ROW.items() if key != "category"})
    done = []
    table = evaluated(scripted(tokenizer, ["a"] * 2), tokenizer, rows, config(), batch_rows=2,
                      on_batch=done.append)
    counts = {key: value["n"] for key, value in table.items()}
    assert counts == {"c0": 1, "c1": 1, "c2": 1, "c3": 1, "rows": 1, "all": 5}
    assert done == [2, 2, 1]


def test_an_evaluation_runs_tools_and_counts_sampled_tokens(tokenizer):
    """A live dialogue: the second turn comes after a tool's answer, which costs no token."""
    answer = "<think>done</think><response>3</response>"
    row = {**ROW, "gold": [ROW["gold"][0], []]}
    table = evaluated(scripted_turns(tokenizer, [[CALL, answer]]), tokenizer, [row],
                      config(max_turns=2, max_completion_tokens=300), toolbox_for=adder)
    ids = tokenizer(CALL + answer, add_special_tokens=False)["input_ids"]
    assert table["all"]["exact"] == 1.0 and table["all"]["tokens"] == len(ids) + 2


def test_a_greedy_evaluation_takes_the_likeliest_tokens_once(monkeypatch, tokenizer):
    """A policy that is torn between two first tokens: greedy, every row gets the likelier one, and
    one completion however many samples were asked for."""
    first, second = tokenizer("ab", add_special_tokens=False)["input_ids"]
    logits = torch.full((2, len(tokenizer)), -30.0)
    logits[0, first], logits[0, second] = 0.1, 0.0
    logits[1, tokenizer.eos_token_id] = 30.0
    model = ScriptedModel(lambda row, t, last: logits[min(t, 1)], len(tokenizer))
    seen, score = [], rest.score_texts

    def watch(texts, *args):
        seen.extend(texts)
        return score(texts, *args)
    monkeypatch.setattr(rest, "score_texts", watch)
    table = evaluated(model, tokenizer, [ROW] * 8, config(), greedy=True, samples=3)
    assert table["all"]["n"] == 8 and seen == ["a"] * 8


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
    table = evaluated(model, tokenizer, [ROW] * 5, config(max_completion_tokens=20), batch_rows=2)
    assert table["all"]["n"] == 5 and [len(tokens) for tokens in seen] == [2, 2, 1]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1][:1], seen[2])


# ----------------------------------------------------------------------------------- the whole loop

def test_the_loop_learns_a_bandit():
    """Rollout, advantages, weights and update on a task that 30 steps can solve: a first token with
    an even id is worth one point. Its chance rises from about a half to above 0.95; with the sign
    of the advantage flipped it falls below 0.05."""
    def chance(sign):
        tokenizer, model = byte_tokenizer(), qwen3(layers=1)
        cfg = rest.Config(method="grpo", steps=30, prompts=2, group=32, max_completion_tokens=2,
                          learning_rate=3e-2, warmup_steps=1)
        engine = rest.Engine(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
        for step in range(cfg.steps):
            batch = rest.rollout(engine, rest.Chat(tokenizer), [ROW, ROW], cfg, seed=step)
            rewards = (batch.tokens[:, 0] % 2 == 0).float().view(2, -1)
            advantages = sign * rest.group_advantages(rewards).flatten()
            weight = rest.normalise_weights(torch.ones_like(batch.entropy), batch.sampled)
            rest.update(engine, optimizer, batch, advantages, weight, cfg)
        with torch.no_grad():
            p = model(torch.tensor([batch.prompts[0]])).logits[0, -1].softmax(-1)
        return float(p[0::2].sum())
    assert chance(+1) > 0.95 and chance(-1) < 0.05


def test_a_call_that_the_executor_refuses_is_not_exact(tokenizer):
    """Equal to gold, and the format right; one completion's tool takes it, the other's refuses it."""
    def refuse(a, b):
        raise rest.InvalidArguments("not today")
    boxes = iter([adder(), SimpleNamespace(functions={"add": refuse})])
    answer = "<think>done</think><response>3</response>"
    row = {**ROW, "gold": [ROW["gold"][0], []]}
    engine = rest.Engine(scripted_turns(tokenizer, [[CALL, answer]] * 2))
    batch = rest.rollout(engine, rest.Chat(tokenizer), [row], config(max_turns=2, max_completion_tokens=300),
                         toolbox_for=lambda row: next(boxes))
    assert batch.refused == [0, 1]
    assert rest.score_batch(batch) == [(1.0, 1.0, True), (1.0, 1.0, False)]
