"""The parts of rest.py from text to reward: configuration, parsing, executor, regions, rule reward,
chat templates."""

import copy
import json
import random
import sys
import threading
import time

import pytest
from conftest import CALL, ROW

import rest
from rest import NAME, PARAMS, SCAFFOLD, TAG, TEXT, THOUGHT, Call, MalformedCall


# ------------------------------------------------------------------------------------ configuration

@pytest.mark.parametrize("bad, word", [
    ({"method": "ppo"}, "method must be one of rest, "),
    ({"group": 1}, "at least 2"),
    ({"top_entropy_fraction": 1.5}, "in .0, 1."),
    ({"temperature": 0.0}, "temperature"),
    ({"aggregation": "mean"}, "aggregation"),
    ({"raw_weight": "linear"}, "raw_weight"),
    ({"reward_scaling": "none"}, "reward_scaling"),
    ({"steps": -1}, "steps"),
    ({"clip": 1.5}, "clip"),
    ({"min_entropy": 0.0}, "min_entropy")])
def test_bad_configuration_is_refused_in_words(bad, word):
    with pytest.raises(ValueError, match=word):
        rest.Config(**bad)


def test_dr_grpo_changes_the_aggregation_only_when_none_was_asked_for():
    assert rest.Config().aggregation == "sequence"
    assert rest.Config(method="dr-grpo").aggregation == "constant"
    assert rest.Config(method="dr-grpo", aggregation="token").aggregation == "token"


# ------------------------------------------------------------------------------------------ parsing

def call_text(*calls, key="arguments"):
    lines = [json.dumps({"name": call.name, key: call.arguments}) for call in calls]
    return "\n".join(["<tool_call>", *lines, "</tool_call>"])


def random_value(rng, depth=3):
    kinds = ["int", "float", "str", "bool", "null"] + (["list", "dict"] if depth else [])
    kind = rng.choice(kinds)
    if kind == "list":
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == "dict":
        return {random_string(rng): random_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    values = {"int": rng.randrange(-99, 10**6), "float": rng.random() * 100, "str": random_string(rng),
              "bool": rng.random() < .5, "null": None}
    return values[kind]


def random_string(rng):
    parts = ["a", "ü", "漢", "\n", '"', "\\", "}", "{", "]", " ", "</tool_call>", "<think>", "</think>",
             "<response>", "😀", ":", ","]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(1, 6)))


def random_call(rng):
    return Call(random_string(rng), {random_string(rng): random_value(rng) for _ in range(rng.randrange(4))})


def random_calls(rng, n=3):
    return [random_call(rng) for _ in range(rng.randrange(1, n + 1))]


def test_both_forms_round_trip_whatever_the_strings_hold():
    """300 random calls whose names and values hold quotes, braces, tags, newlines and emoji; both keys;
    one block or one a call."""
    rng = random.Random(0)
    for i in range(300):
        calls = random_calls(rng)
        key = rng.choice(["arguments", "parameters"])
        together = call_text(*calls, key=key)
        apart = "\n".join(call_text(call, key=key) for call in calls)
        blocks = together if i % 2 else apart
        text = f"<think>so <tool_call> {i}</think>\n{blocks}"
        assert rest.parse_calls(text) == calls
        assert rest.format_score(text, ("think", "tool_call")) == 1.0


@pytest.mark.parametrize("line", [
    '{"name": "f"}',
    '{"arguments": {}}',
    '{"name": 1, "arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"name": "f", "arguments": []}',
    '{"name": "f", "arguments": {}, "parameters": {}}',
    '{"name": "f", "name": "g", "arguments": {}}',
    '{"name": "f", "arguments": {"x": NaN}}',
    '{"name": "f", "arguments": {"x": 1e999}}',
    '{"name": "f", "arguments": {"x": -Infinity}}',
    '{"name": "f", "arguments": {"x": 1}',
    '{"name": "f", "arguments": {"x": 1},}',
    "f(x=1)",
    "[1]",
    '"f"',
    "{",
    "}",
    '{"name": "f" "arguments": {}}',
    "{'name': 'f', 'arguments': {}}",
    '{"name": "f", "arguments": {"x": %s}}' % ("[" * 10_000),
    '{"name": "f", "arguments": {"x": %s}}' % ("[" * 100 + "]" * 100),
    '{"name": "f", "arguments": {"x": %s}}' % ("9" * 5000)])
def test_bad_lines_are_typed_errors_beside_good_calls(line):
    """A broken line costs itself only; nothing raises, and it is quick."""
    start = time.perf_counter()
    calls = rest.parse_calls(f'<tool_call>\n{line}\n{{"name": "g", "arguments": {{}}}}\n</tool_call>')
    assert isinstance(calls[0], MalformedCall) and calls[-1] == Call("g", {})
    assert time.perf_counter() - start < 0.5


def test_thoughts_and_responses_hide_calls():
    inner = call_text(Call("f", {}))
    assert rest.parse_calls(f"<think>{inner}</think><response>{inner}</response>") == []
    assert rest.parse_calls(f"<think>never closed {inner}") == []
    tag_inside = Call("f", {"x": "</tool_call>"})
    assert rest.parse_calls(call_text(tag_inside)) == [tag_inside]


def test_any_text_is_parsed_and_labelled():
    """Random soups of tags, JSON and noise: no exception, blocks are ordered and disjoint, one label
    per character."""
    rng = random.Random(1)
    pieces = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>",
              '{"name": "f", "arguments": {"x": 1}}', '{"name": ', '"arguments": {', "}", '"', "\\",
              "\n", " ", "x", "é", ":", ",", "[", "12", "<", ">"]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(20)))
        blocks = rest.split_blocks(text)
        labels = rest.label_chars(text)
        assert len(labels) == len(text) and set(labels) <= set(range(6))
        assert all(a.end <= b.start for a, b in zip(blocks, blocks[1:]))
        assert all(block.start < block.end <= len(text) for block in blocks)
        rest.parse_calls(text)
        cuts = [0, *sorted(rng.choices(range(len(text) + 1), k=4)), len(text)]
        regions = rest.tag_regions([text[a:b] for a, b in zip(cuts, cuts[1:])])
        assert len(regions) == 5
        assert all(found and len(set(found)) == len(found) for found in regions)


# --------------------------------------------------------------------------------- schema, executor

def run(name, function, arguments, **kwargs):
    texts, _, _ = rest.execute([Call(name, arguments)], {name: function}, **kwargs)
    return texts[0]


def test_executor_turns_everything_into_text():
    def boom(**kwargs):
        raise ZeroDivisionError("no")
    assert run("f", lambda a: {"sum": a + 1}, {"a": 1}) == '{"sum": 2}'
    assert run("f", lambda a: "text", {"a": 1}) == "text"
    assert run("f", lambda a: a, {}).startswith("error: ")                # wrong arity
    assert run("f", boom, {}) == "error: no"
    assert run("f", lambda: {1, 2}, {}).startswith("error: ")            # a result JSON cannot hold
    assert len(run("f", lambda: "x" * 10**6, {})) < 1100
    assert rest.execute([MalformedCall("bad line")], {}) == (["error: bad line"], 1, 0)
    (text,), refused, failed = rest.execute([Call("__import__", {"name": "os"})], {"add": boom})
    assert "unknown tool '__import__'; the tools are add" in text and (refused, failed) == (1, 0)


def test_who_is_to_blame_for_a_call_is_counted(caplog):
    """The model's fault (unknown, unfitting arguments) is refused; a tool's own failure is counted, and
    a bug is told to the user, once; a ValueError is a sentence for the model."""
    def missing(a):
        raise KeyError("no such key")

    def unhappy(a):
        raise ValueError("no booking of that code")

    async def later(a):
        return a + 1
    functions = {"missing": missing, "unhappy": unhappy, "odd": lambda a: {1, 2}, "later": later,
                 "leaving": lambda: sys.exit("bye")}
    calls = [Call("missing", {"a": 1}), Call("missing", {"a": 2}), Call("unhappy", {"a": 1}),
             Call("odd", {"a": 1}), Call("later", {"a": 1}), Call("later", {}), Call("none", {}),
             Call("leaving", {})]
    texts, refused, failed = rest.execute(calls, functions)
    assert texts[2] == "error: no booking of that code" and texts[4] == "2" and texts[7] == "error: bye"
    assert (refused, failed) == (2, 5)
    told = [record.message for record in caplog.records]
    assert len([m for m in told if "missing" in m]) == 1
    assert len([m for m in told if "odd" in m]) == len([m for m in told if "leaving" in m]) == 1
    assert not any("unhappy" in m for m in told)


def test_half_a_surrogate_pair_from_a_tool_reaches_the_model_as_a_replacement_character():
    assert run("f", lambda: "a\ud800b", {}) == "a\ufffdb"


def test_a_slow_tool_is_abandoned():
    """A tool that sleeps 5 s under a limit of 0.1 s costs the episode 0.1 s, off the main thread as on it."""
    start = time.perf_counter()
    assert "too long" in run("f", lambda: time.sleep(5), {}, timeout=0.1)
    assert time.perf_counter() - start < 2


def test_a_slow_tool_is_no_bug_that_the_user_is_told_of(caplog):
    rest.warn_once.cache_clear()
    assert "too long" in run("f", lambda: time.sleep(0.3), {}, timeout=0.01)
    assert not caplog.records


def test_a_turn_has_four_times_the_limit_of_a_call():
    """Twenty calls that all hang cost a turn 0.4 s, not 2 s, and each is told."""
    start = time.perf_counter()
    calls = [Call("f", {})] * 20
    results, refused, failed = rest.execute(calls, {"f": lambda: time.sleep(3)}, timeout=0.1)
    assert time.perf_counter() - start < 1.5
    assert all("too long" in text for text in results) and (refused, failed) == (0, 20)


def test_every_call_of_a_turn_has_the_whole_limit_to_itself():
    """A call that hangs uses up its own limit: the one behind it still has time to work. What the
    first returns later appears nowhere."""
    late, done = threading.Event(), threading.Event()

    def work(hang):
        if hang:
            late.wait()
            done.set()
        else:
            time.sleep(0.3)
        return "worked"
    calls = [Call("f", {"hang": hang}) for hang in (False, True, False)]
    results, _, _ = rest.execute(calls, {"f": work}, timeout=1.0)
    late.set()
    assert done.wait(10)
    time.sleep(0.05)
    assert results[0] == results[2] == "worked" and "too long" in results[1]


def test_hostile_calls_through_the_real_tools_cost_milliseconds(tmp_path, monkeypatch):
    from toy_tools import tools
    monkeypatch.chdir(tmp_path)
    box = tools.ToolBox()
    hostile = ["9**9**9", "9^9^9", "__import__('os').system('touch x')",
               "(" * 10_000 + "1" + ")" * 10_000, "1" * 10**6, "nan", "1/0", "", "1+" * 5000 + "1"]
    calls = [Call(name, dict.fromkeys(tool.parameters, text))
             for name, tool in tools.TOOLS.items() for text in hostile]
    start = time.perf_counter()
    results, _, _ = rest.execute(calls, box.functions)
    assert (time.perf_counter() - start) / len(calls) < 0.02
    assert all(isinstance(r, str) and len(r) < 1100 for r in results)
    assert not list(tmp_path.iterdir())
    assert all(r.startswith("error") for c, r in zip(calls, results) if c.name == "calculator")


# ------------------------------------------------------------------------------------------ regions

def spans(text):
    """The text cut into runs of one region: [(region, text)]."""
    out = []
    for label, c in zip(rest.label_chars(text), text):
        if out and out[-1][0] == label:
            out[-1] = (label, out[-1][1] + c)
        else:
            out.append((label, c))
    return out


def test_regions_of_a_full_completion():
    text = ('<think>hm</think>\n<tool_call>\n{"name": "add", "arguments": {"a": [1]}}\n</tool_call>'
            "<response>ok</response>")
    assert spans(text) == [
        (TAG, "<think>"),
        (THOUGHT, "hm"),
        (TAG, "</think>"),
        (SCAFFOLD, "\n"),
        (TAG, "<tool_call>"),
        (SCAFFOLD, '\n{"name": "'),
        (NAME, "add"),
        (SCAFFOLD, '", "arguments": '),
        (PARAMS, '{"a": [1]}'),
        (SCAFFOLD, "}\n"),
        (TAG, "</tool_call><response>"),
        (TEXT, "ok"),
        (TAG, "</response>")]


def test_regions_do_not_depend_on_the_order_of_keys_and_reach_every_call():
    line = '{"parameters": {"name": "x"}, "name": "f"}'
    labels = [(r, s) for r, s in spans(f"<tool_call>{line}\n{line}</tool_call>") if r in (NAME, PARAMS)]
    assert labels == [(PARAMS, '{"name": "x"}'), (NAME, "f")] * 2


def test_regions_of_broken_text():
    assert spans("<think>no end")[-1] == (THOUGHT, "no end")
    assert spans('<tool_call>{"name": "f", "arguments": {"a": 1')[-1] == (PARAMS, '{"a": 1')
    assert spans('<tool_call>{"name": "fo')[-1] == (NAME, "fo")
    assert spans("stray <tool_call>x</tool_call>")[0] == (TEXT, "stray")
    assert (THOUGHT, "see <tool_call>{}</tool_call>") in spans("<think>see <tool_call>{}</tool_call></think>")
    tag_inside = '{"a": "</tool_call>"}'
    text = '<tool_call>{"name": "f", "arguments": %s}</tool_call>' % tag_inside
    assert (PARAMS, tag_inside) in spans(text)


def test_a_token_takes_the_region_of_its_first_visible_character():
    pieces = ["<tool_call>", '{"name": "', "f", '", "arguments":', " {", '"a": 1', "}}", "\n", "</tool_call>"]
    regions = rest.tag_regions(pieces)
    assert [own for own, *_ in regions] == [
        TAG, SCAFFOLD, NAME, SCAFFOLD, PARAMS, PARAMS, PARAMS, SCAFFOLD, TAG]
    assert regions[6] == [PARAMS, SCAFFOLD]  # `}}` closes the parameters and the call


def test_spaces_touch_nothing():
    """The space before a value and the newline behind it add no region to their token."""
    regions = rest.tag_regions(['<tool_call>{"name": "f", "arguments":', ' {"a": 1}',
                                "}\n</tool_call>"])
    assert regions[1:] == [[PARAMS], [SCAFFOLD, TAG]]


def test_a_name_that_is_no_string_has_no_quotes():
    """Quotes around a name are format; a number has none to take off."""
    text = '<tool_call>{"name": 12, "arguments": {}}'
    assert "".join(c for c, r in zip(text, rest.label_chars(text)) if r == NAME) == "12"


def test_retokenising_would_shift_labels_where_sampled_ids_do_not(tokenizer):
    """Pitfall 3. A policy may sample a non-canonical tokenisation; labels follow the ids it sampled,
    one each."""
    from toy_tools.policy import build_tokenizer
    merged = build_tokenizer([CALL] * 50, vocab_size=320)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(CALL, add_special_tokens=False)["input_ids"])
    byte_ids = merged.convert_tokens_to_ids(tokens)
    canonical = merged(CALL, add_special_tokens=False)["input_ids"]
    assert merged.decode(byte_ids) == CALL == merged.decode(canonical)
    assert len(byte_ids) > len(canonical)
    for ids in (byte_ids, canonical):
        pieces = [merged.decode([x]) for x in ids]
        region = [own for own, *_ in rest.tag_regions(pieces)]
        assert len(region) == len(ids)
        assert "".join(p for p, r in zip(pieces, region) if r == NAME) == "add"
    # the broken variant: labels of other tokens, in other places
    again = merged(merged.decode(byte_ids), add_special_tokens=False)["input_ids"]
    assert len(rest.tag_regions([merged.decode([x]) for x in again])) != len(byte_ids)


# ------------------------------------------------------------------------------------------- reward

def test_same_value():
    assert rest.same_value(1, 1.0) and rest.same_value({"a": [1, None]}, {"a": [1.0, None]})
    for a, b in ((1, True), ("1", 1), ([1], [1, 2]), ({}, []), ({"a": [True]}, {"a": [1]})):
        assert not rest.same_value(a, b), (a, b)


A = Call("f", {"x": 1, "y": 2})
B = Call("g", {})
OTHER = Call("f", {"x": 5})


@pytest.mark.parametrize("gold, predicted, score", [
    ([A], [A], 1),
    ([A, B], [B, A], 1),
    ([B], [B], 1),
    ([A], [], 0),
    ([A], [B], 0),
    ([A], [MalformedCall("x")], 0),
    ([A], [A, MalformedCall("x")], 0),
    # names 1, parameter names 1, one of two values, of 1 + (1 + 2)
    ([A], [Call("f", {"x": 1, "y": 3})], (1 + 1 + 1) / 4),
    ([A], [Call("f", {"x": 1})], (1 + 1 / 2 + 1) / 4),
    # a surplus call halves the Jaccard of names
    ([A], [A, B], (1 / 2 + 3) / 4),
    # one prediction serves one gold call only
    ([A, A], [A], (1 / 2 + 3) / 7),
    # best match, not first match
    ([A, OTHER], [OTHER, A], 1),
    # greedy in gold's order, and 0 consumes nothing
    ([Call("f", {"x": 1}), A], [A, Call("f", {"z": 0})], (1 + 1 / 2 + 1 + 0) / 6)])
def test_correctness_score_by_hand(gold, predicted, score):
    assert rest.correctness_score(gold, predicted) == pytest.approx(score)


def test_equal_calls_are_used_one_by_one():
    """Equal predictions that are different objects: each serves one gold call."""
    twice = [Call("f", {"x": 1}), Call("f", {"x": 1})]
    assert rest.correctness_score([Call("f", {"x": 1})] * 2, twice) == 1.0


def test_correctness_is_one_only_for_the_same_multiset():
    rng = random.Random(2)
    for _ in range(300):
        calls = random_calls(rng)
        shuffled = rng.sample(calls, len(calls))
        assert rest.correctness_score(calls, shuffled) == pytest.approx(1.0)
        assert rest.correctness_score(calls, shuffled[1:]) < 1
        assert rest.correctness_score(calls, shuffled + [Call("surplus", {})]) < 1


CALLS = ("think", "tool_call")
ANSWERS = ("think", "response")
BOTH = ("think", "tool_call", "response")


@pytest.mark.parametrize("text, required, score", [
    (CALL, CALLS, 1),
    (CALL + "\n", CALLS, 1),
    (CALL + call_text(B), CALLS, 1),
    (CALL, ANSWERS, 0),
    (CALL + "<response>x</response>", CALLS, 0),
    (CALL + "<response>x</response>", BOTH, 1),
    ("<response>x</response>" + CALL, BOTH, 0),
    (CALL + " stray", CALLS, 0),
    (CALL.replace("</think>", ""), CALLS, 0),
    (CALL[:-1], CALLS, 0),
    ("<think>a</think>" + CALL, CALLS, 0),
    ("", CALLS, 0),
    ("<think>a</think><response>b</response>", ANSWERS, 1),
    ("<think></think><response>b</response>", ANSWERS, 0)])
def test_format_score(text, required, score):
    assert rest.format_score(text, required) == score


def test_reward_ranges_and_schedule():
    """Static: [-3, 4]. Dynamic: format's share shrinks and correctness' grows with progress, within the
    authors' bounds."""
    reward = rest.episode_reward
    assert [reward(f, c, 0.3, "static") for f, c in ((0, 0), (1, 1), (1, None), (0, 0.5))] == [-3, 4, 1, 0]
    assert reward(1, 1, 0.0) == 2 + 2
    assert reward(0, 0, 0.0) == -2 - 2
    assert reward(1, 1, 1.0) == pytest.approx(1.3 + 2.7)
    assert reward(0, 0, 1.0) == pytest.approx(-1 - 2.7)
    share = []
    for progress in (0, 0.25, 0.5, 0.75, 1):
        of_format = reward(1, 0.5, progress) - reward(0, 0.5, progress)
        of_correctness = reward(0, 1, progress) - reward(0, 0, progress)
        share.append(of_format / of_correctness)
    assert share == sorted(share, reverse=True) and share[0] > 1.5 * share[-1]


def test_episode_scores():
    answer = "<think>a</think><response>no tool fits</response>"
    assert rest.score_texts([CALL], ROW) == (1.0, 1.0, True)
    assert rest.score_texts([CALL.replace("1,", "7,")], ROW)[2] is False
    assert rest.score_texts([CALL + "x"], ROW) == (0.0, 1.0, False)
    none = {**ROW, "gold": [[]]}
    assert rest.score_texts([answer], none) == (1.0, None, True)
    # a call where none was asked for earns no format point
    assert rest.score_texts([CALL], none) == (0.0, None, False)
    two = {**ROW, "gold": [ROW["gold"][0], []]}
    assert rest.score_texts([CALL, answer], two) == (1.0, 1.0, True)
    assert rest.score_texts([CALL], two) == (0.5, 1.0, False)
    assert rest.score_texts([CALL, answer, answer], two) == (pytest.approx(2 / 3), 1.0, False)
    both = {**ROW, "blocks": [list(BOTH)]}
    assert rest.score_texts([CALL + "<response>x</response>"], both)[2] is True


# --------------------------------------------------------------------------------------- plain chat

def test_a_thought_opened_by_the_template_is_forced_not_prompt(tokenizer):
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    chat = rest.Chat(opened)
    prompt, forced = chat.prompt(ROW)
    assert opened.decode(forced) == "<think>\n" and opened.decode(prompt).endswith("assistant\n")
    suffix, forced = chat.reply(ROW, ["3"], opened.eos_token_id)
    assert opened.decode(suffix) == "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    assert opened.decode(forced) == "<think>\n"


def test_only_the_token_that_was_sampled_is_left_out_of_what_follows(tokenizer):
    chat = rest.Chat(tokenizer)
    end = tokenizer.eos_token_id
    assert chat.reply(ROW, ["3"], end)[0] == chat.reply(ROW, ["3"], end + 1)[0][1:]
    assert chat.reply(ROW, ["3"], end + 1)[0][0] == end


def test_a_tools_answer_may_hold_any_text(tokenizer):
    """Once an answer that held the mark of the assistant's turn lost what stood before it."""
    chat = rest.Chat(tokenizer)
    text = tokenizer.decode(chat.reply(ROW, ["a \u2016turn\u2016 b"], tokenizer.eos_token_id)[0])
    assert "tool\na \u2016turn\u2016 b<|im_end|>" in text
