"""Rollouts: what is sampled, what is forced, what is recorded; with scripted and uniform fakes."""

import copy
import math
import threading
import time
from types import SimpleNamespace

import torch
from conftest import CALL, ROW, ScriptedModel, adder, opened_template, qwen3, roll, scripted, scripted_turns

import rest
from rest import TAG, TEXT, THOUGHT
from toy_tools import chat
from toy_tools.tasks import completion_text

ANSWER = "<think>done</think><response>3</response>"


def config(**kwargs):
    return rest.Config(**{"group": 2, "max_completion_tokens": 60, **kwargs})


def test_a_script_comes_back_verbatim_with_its_end_token(tokenizer):
    """Rows of different lengths: tokens are the script's, the end token is kept and marked as
    sampled, nothing behind it."""
    texts = [CALL, "a", "<think>", CALL + CALL]
    out = roll(scripted(tokenizer, texts), tokenizer, [ROW, ROW], config(max_completion_tokens=130))
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert out.tokens[i, :len(ids)].tolist() == ids and int(out.length[i]) == len(ids)
        assert out.sampled[i].tolist() == [True] * len(ids) + [False] * (out.tokens.shape[1] - len(ids))
        assert out.texts[i] == [text] and out.turns[i] == [(0, len(ids))]
    assert not out.truncated.any() and out.tokens.shape[1] == int(out.length.max())


def test_a_finished_row_that_stays_in_the_batch_gets_nothing_more(tokenizer):
    """One of eight ends at once, too few to leave the batch; what its row goes on to say is not its own."""
    texts = ["a", *[CALL] * 7]
    model = scripted(tokenizer, texts)
    engine = rest.Engine(model)
    asked = []
    drop = engine.drop
    engine.drop = lambda done: asked.append(drop(done)) or asked[-1]
    out = rest.rollout(engine, rest.Chat(tokenizer), [ROW] * 4, config(max_completion_tokens=130))
    assert asked and not any(asked)
    assert out.texts == [[text] for text in texts]
    assert int(out.length[0]) == 2 and out.turns[0] == [(0, 2)]


def test_truncation_is_marked_and_scored_as_it_stands(tokenizer):
    out = roll(scripted(tokenizer, [CALL, "a"]), tokenizer, [ROW], config(max_completion_tokens=5))
    assert out.truncated.tolist() == [True, False]
    assert out.texts[0] == [tokenizer.decode(tokenizer(CALL)["input_ids"][:5])]
    assert out.turns == [[(0, 5)], [(0, 2)]]


def test_uniform_logits_give_log_v_nats_and_uniform_tokens(tokenizer):
    """Pitfall 12. logp = -log V and entropy = log V exactly; 4000 draws over 265 tokens: chi-square
    within 6 standard deviations (a fair sampler fails once in 10^8 seeds, and the seed is fixed)."""
    V = len(tokenizer)
    end = torch.tensor([tokenizer.eos_token_id])
    fake = ScriptedModel(lambda row, t, last: torch.zeros(V).index_fill(0, end, -torch.inf), V)
    out = roll(fake, tokenizer, [ROW] * 10, config(group=8, max_completion_tokens=50))
    nats = torch.tensor(math.log(V - 1))
    assert torch.allclose(out.logp, -nats) and torch.allclose(out.entropy, nats)
    counts = torch.bincount(out.tokens.flatten(), minlength=V).float()
    expected = out.tokens.numel() / (V - 1)
    assert counts[tokenizer.eos_token_id] == 0
    chi2 = ((counts - expected) ** 2 / expected).sum() - expected
    assert abs(chi2 - (V - 2)) < 6 * math.sqrt(2 * (V - 2))


def test_sampling_follows_the_distribution_at_the_temperature(tokenizer):
    """Three tokens with logits 0, 1, 2 at T = 0.5: frequencies within 5 standard errors of
    softmax(2 logits); logp and entropy are of that distribution."""
    V, n = len(tokenizer), 4000
    logits = torch.full((V,), -torch.inf)
    logits[10:13] = torch.tensor([0.0, 1.0, 2.0])
    cfg = config(group=2, max_completion_tokens=50, temperature=0.5)
    out = roll(ScriptedModel(lambda *_: logits, V), tokenizer, [ROW] * 40, cfg)
    p = torch.softmax(2 * torch.tensor([0.0, 1.0, 2.0]), 0)
    frequency = torch.stack([(out.tokens == k).float().mean() for k in (10, 11, 12)])
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    assert torch.allclose(out.logp, p.log()[out.tokens - 10], atol=1e-6)
    assert torch.allclose(out.entropy, -(p * p.log()).sum(), atol=1e-6)


def live(tokenizer, texts, **options):
    """Two live episodes on ROW, each of which writes `texts`, one a turn."""
    model = scripted_turns(tokenizer, [texts] * 2)
    return roll(model, tokenizer, [ROW], config(**options), toolbox_for=adder)


def test_a_uniform_of_zero_picks_no_impossible_word():
    """The first word of positive probability, not the first word."""
    ids, logp, _ = rest.sample(torch.tensor([[-math.inf, 0.0, 0.0]]), torch.zeros(1), 1.0)
    assert ids.tolist() == [1] and logp.isfinite().all()


def test_the_largest_uniform_picks_no_impossible_word():
    """The last word of positive probability, not the last word: in float32 the probabilities of a large
    vocabulary add up to a little less or more than 1."""
    for V in (1_000, 50_000, 100_000, 200_000):
        logits = torch.zeros(1, V)
        logits[0, -1] = -math.inf
        ids, logp, _ = rest.sample(logits, torch.tensor([1 - 2**-24]), 1.0)
        assert V - 20 < int(ids) < V - 1 and logp.isfinite().all()


def test_live_episodes_execute_calls_and_feed_results_as_forced_tokens(tokenizer):
    """Pitfalls 2 and 3: the tool's tokens are in the episode and not in the mask; what was sampled
    stands there verbatim."""
    out = live(tokenizer, [CALL, ANSWER], max_turns=3, max_completion_tokens=300)
    assert out.texts == [[CALL, ANSWER]] * 2 and not out.truncated.any()
    n, ids = int(out.length[0]), out.tokens[0].tolist()
    between = "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[:n]) == CALL + "<|im_end|>" + between + ANSWER + "<|im_end|>"
    (a, b), (c, d) = out.turns[0]
    assert out.sampled[0].tolist() == [a <= t < b or c <= t < d for t in range(n)]
    assert tokenizer.decode(ids[b:c]) == between
    assert (out.logp[0, b:c] == 0).all() and (out.entropy[0, b:c] == 0).all()
    assert (out.entropy[0, a:b] > 0).all()
    row = {**ROW, "gold": [ROW["gold"][0], []]}
    assert rest.score_texts(out.texts[0], row) == (1.0, 1.0, True)
    region, covers = rest.token_regions(out, rest.Chat(tokenizer))
    assert (region[~out.sampled] == -1).all() and (region[out.sampled] >= 0).all()
    assert not covers[~out.sampled].any() and covers[out.sampled].any(-1).all()
    assert region[0, b - 1] == rest.TAG == region[0, d - 1]  # end of turn is format


def test_a_budget_that_ends_within_a_tools_answer_leaves_no_empty_turn(tokenizer):
    n = len(tokenizer(CALL, add_special_tokens=False)["input_ids"]) + 1
    out = live(tokenizer, [CALL, ANSWER], max_turns=3, max_completion_tokens=n + 5)
    assert out.truncated.all() and int(out.sampled[0].sum()) == n
    assert out.texts == [[CALL]] * 2 and out.turns == [[(0, n)]] * 2


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
    out = roll(scripted_turns(opened, texts), opened, rows,
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
        return live(tokenizer, [CALL, ANSWER], max_turns=3, max_completion_tokens=budget)
    first, second = play(300).turns[0]
    n = second[0] + 3
    out = play(n)
    assert out.texts[0] == [CALL, "<think>do"] and out.turns[0] == [first, (n - 3, n)]
    region, _ = rest.token_regions(out, rest.Chat(tokenizer))
    assert region[0, n - 3:].tolist() == [TAG, THOUGHT, THOUGHT]


def test_the_last_token_of_a_cut_turn_is_no_end_of_turn(tokenizer):
    """Beside it a turn that has ended, whose last token is one."""
    out = roll(scripted(tokenizer, ["<think>abc", "a"]), tokenizer, [ROW],
                       config(max_completion_tokens=3))
    region, covers = rest.token_regions(out, rest.Chat(tokenizer))
    assert region.tolist() == [[TAG, THOUGHT, THOUGHT], [TEXT, TAG, -1]]
    assert covers[0, 2].nonzero().tolist() == [[THOUGHT]] and covers[1, 1].nonzero().tolist() == [[TAG]]


def test_the_tool_limit_is_the_configured_one(tokenizer):
    """A tool that sleeps half a second, under a limit below and one above."""
    box = SimpleNamespace(functions={"add": lambda a, b: time.sleep(0.5)})
    for limit, word in ((0.05, "too long"), (30.0, "null")):
        out = roll(scripted_turns(tokenizer, [[CALL, "x"]] * 2), tokenizer, [ROW],
                           config(max_turns=2, max_completion_tokens=300, tool_timeout=limit),
                           toolbox_for=lambda row: box)
        assert word in tokenizer.decode(out.tokens[0])


def test_tools_have_their_limit_off_the_main_thread_too(tokenizer):
    """Pitfall 11: a limit by signals works on the main thread only. The slow call is given up, the
    rollout of the other thread goes on."""
    box = SimpleNamespace(functions={"add": lambda a, b: time.sleep(0.5)})
    out = []

    def work():
        model = scripted_turns(tokenizer, [[CALL, "x"]] * 2)
        cfg = config(max_turns=2, max_completion_tokens=300, tool_timeout=0.05)
        out.append(roll(model, tokenizer, [ROW], cfg, toolbox_for=lambda row: box))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert out[0].texts == [[CALL, "x"]] * 2
    assert "too long" in tokenizer.decode(out[0].tokens[0])


def test_a_rollout_leaves_the_model_as_it_was(tokenizer):
    """In its mode, training or not, also where its parts differ in that; and without gradients."""
    model = qwen3()
    for training in (True, False):
        model.train(training)
        model.model.layers[0].train(not training)
        modes = [module.training for module in model.modules()]
        out = roll(model, tokenizer, [ROW], config(max_completion_tokens=4))
        assert [module.training for module in model.modules()] == modes
        assert not out.logp.requires_grad


def test_all_end_ids_end_a_turn(tokenizer):
    """The tokenizer's and those of the model's generation config, one or a list."""
    model = scripted(tokenizer, ["ab<|im_start|>", "ab"])
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for ids in (end, [tokenizer.eos_token_id, end]):
        model.generation_config = SimpleNamespace(eos_token_id=ids)
        talk = chat.TemplateChat(tokenizer, model=model)
        out = rest.rollout(rest.Engine(model), talk, [ROW], config())
        assert out.length.tolist() == [3, 3] and out.texts == [["ab"]] * 2
        assert not out.truncated.any()


def test_max_turns_ends_an_episode_that_never_stops_calling(tokenizer):
    out = live(tokenizer, [CALL, CALL], max_turns=2, max_completion_tokens=400)
    assert out.texts[0] == [CALL, CALL] and not out.truncated.any()


def test_without_a_toolbox_calls_are_not_executed(tokenizer):
    model = scripted_turns(tokenizer, [[CALL, ANSWER]] * 2)
    out = roll(model, tokenizer, [ROW], config(max_completion_tokens=300))
    assert out.texts[0] == [CALL]


def test_a_tool_that_the_row_does_not_offer_is_not_run(tokenizer):
    """The box has it, and the model guessed its name. A row that lists no tools offers all of the box."""
    ran = []
    functions = {"add": lambda a, b: "sum", "neg": lambda a: ran.append(a) or "run"}
    box = SimpleNamespace(functions=functions)
    text = completion_text([{"name": "neg", "arguments": {"a": 1}}], "t", None)
    for row, refused in ((ROW, 1), ({**ROW, "tools": []}, 0)):
        out = roll(scripted_turns(tokenizer, [[text, "x"]] * 2), tokenizer, [row],
                   config(max_turns=2, max_completion_tokens=300), toolbox_for=lambda row: box)
        assert out.refused == [refused] * 2 and bool(ran) != bool(refused)


def test_a_forced_thought_opening_is_no_decision_of_the_policy(tokenizer):
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    forced = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    fake = scripted(tokenizer, ["xx" + CALL[len("<think>"):]] * 2)  # its first two choices are overruled
    out = roll(fake, opened, [ROW], config(max_completion_tokens=90))
    assert out.tokens[0, :2].tolist() == forced and out.sampled[0, :3].tolist() == [False, False, True]
    assert out.texts[0][0].startswith("<think>\n") and rest.score_texts(out.texts[0], ROW)[2]
    region, covers = rest.token_regions(out, rest.Chat(opened))
    assert (region[:, :2] == -1).all() and not covers[:, :2].any() and covers[:, 2].any(-1).all()


def test_who_leaves_the_batch_does_not_change_what_others_sample(tokenizer):
    """Row i draws from its own stream: making rows 0 and 3 end at once leaves the other rows' tokens
    as they were."""
    V = len(tokenizer)

    def script(quick):
        def f(row, t, last):
            logits = torch.sin(torch.arange(V) * (1.0 + row) + t)
            logits[tokenizer.eos_token_id] = 50.0 if row in quick and t == 1 else -50.0
            return logits
        return ScriptedModel(f, V)
    cfg = config(group=2, max_completion_tokens=20)
    a, b = (roll(script(quick), tokenizer, [ROW] * 3, cfg, seed=5) for quick in ((), (0, 3)))
    assert b.length.tolist() == [2, 20, 20, 2, 20, 20]
    for i in (1, 2, 4, 5):
        assert torch.equal(a.tokens[i], b.tokens[i]) and torch.equal(a.logp[i], b.logp[i])
    other = roll(script(()), tokenizer, [ROW] * 3, cfg, seed=6)
    assert not torch.equal(a.tokens, other.tokens)


def test_greedy_takes_the_most_likely_token(tokenizer):
    model = qwen3()
    out = roll(model, tokenizer, [ROW], config(max_completion_tokens=12), group=1, greedy=True)
    ids = out.prompts[0]
    for t in range(int(out.length[0])):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert best == int(out.tokens[0, t])
        ids = ids + [best]




def test_every_row_has_its_own_opening(tokenizer):
    """A template that opens the thought only where tools are offered: the first row's is not the second's."""
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n{% if tools %}<think>{% endif %}{% endif %}")
    rows = [{**ROW, "tools": []}, ROW]
    out = roll(scripted(tokenizer, ["abc"] * 4), opened, rows, config(max_completion_tokens=5))
    assert out.sampled[:, 0].tolist() == [True, True, False, False]
    assert [texts[0] for texts in out.texts] == ["abc"] * 2 + ["<think>bc"] * 2


def test_an_end_token_that_is_forced_ends_no_turn(tokenizer):
    """Neither in a tool's answer nor in an opening of the next turn."""
    class Opened(rest.Chat):
        def reply(self, row, results, last):
            return super().reply(row, results, last)[0], [tokenizer.eos_token_id]
    engine = rest.Engine(scripted_turns(tokenizer, [[CALL, "b"]] * 2))
    cfg = config(max_turns=2, max_completion_tokens=200)
    out = rest.rollout(engine, Opened(tokenizer), [ROW], cfg, toolbox_for=adder)
    assert out.texts[0][0] == CALL and len(out.texts[0]) == 2
    start, end = out.turns[0][1]
    assert end - start > 1 and not out.sampled[0, start] and bool(out.sampled[0, start + 1:end].all())
