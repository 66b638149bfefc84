"""Reading and scoring any text: rules by hand, linear work, no side effects, what outputs earn.

`python tests/test_scanner.py` writes the table results/outputs.md again; REST_LONG=1 fuzzes a million
texts instead of 20,000.
"""

import json
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rest
from rest import Call, MalformedCall

TABLE = Path(__file__).resolve().parent.parent / "results" / "outputs.md"
TEXTS = 1_000_000 if os.environ.get("REST_LONG") else 20_000


def call_line(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def turn(*lines, thought="<think>t</think>"):
    return thought + "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def row(*turns):
    return {"gold": [[{"name": n, "arguments": a} for n, a in calls] for calls in turns]}


# ---------------------------------------------------------------------------------- what people try

ADD = call_line("add", a=1, b=2)
SAY = "<think>t</think><response>hello</response>"
CANCEL = call_line("cancel", id=7)
BOOK = call_line("book", day=3)
ONE = row([("add", {"a": 1, "b": 2})])
TWO = row([("add", {"a": 1, "b": 2}), ("neg", {"a": 1})])
NONE = row([])
LIVE = row([("cancel", {"id": 7})], [("book", {"day": 3})])
NAMES = {
    id(ONE): "add(a=1, b=2)", id(TWO): "add(a=1, b=2), neg(a=1)", id(NONE): "no call",
    id(LIVE): "turn 1: cancel(id=7), turn 2: book(day=3)"}

# (gold, kind of output, turns, format, correctness, exact, remark): scores worked out by hand.
# One gold call with two parameters: correctness = (names + parameter names + equal values) / 4.
CASES = [
    (ONE, "thought and call", [turn(ADD)], 1, 1, True, ""),
    (ONE, "`parameters` for `arguments`", [turn(ADD.replace("arguments", "parameters"))],
     1, 1, True, "ToolRL's form"),
    (ONE, "keys in another order", [turn('{"arguments": {"b": 2, "a": 1}, "name": "add"}')],
     1, 1, True, ""),
    (ONE, "call over several lines", [turn(json.dumps(json.loads(ADD), indent=2))], 1, 1, True, ""),
    (ONE, "1.0 for 1", [turn(ADD.replace("1", "1.0"))], 1, 1, True, "equal as JSON numbers"),
    (ONE, 'the string "1" for 1', [turn(ADD.replace("1", '"1"'))], 1, 3 / 4, False, ""),
    (ONE, "true for 1", [turn(ADD.replace("1", "true"))], 1, 3 / 4, False, ""),
    (ONE, "a wrong value", [turn(call_line("add", a=1, b=3))], 1, 3 / 4, False, ""),
    (ONE, "a missing parameter", [turn(call_line("add", a=1))], 1, (1 + 1 / 2 + 1) / 4, False, ""),
    (ONE, "a surplus parameter", [turn(call_line("add", a=1, b=2, c=3))],
     1, (1 + 2 / 3 + 2) / 4, False, ""),
    (ONE, "another tool", [turn(call_line("sub", a=1, b=2))], 1, 0, False, ""),
    (ONE, "the call twice", [turn(ADD, ADD)],
     1, (1 / 2 + 3) / 4, False, "a surplus call costs names only"),
    (ONE, "65 calls", [turn(*[ADD] * 65)], 1, 0, False, "more than 64 calls in a turn: unreadable"),
    (ONE, "an empty call block", [turn()], 1, 0, False, "left: the format asks for the block only"),
    (ONE, "no thought", [turn(ADD, thought="")], 0, 1, False, ""),
    (ONE, "an empty thought", [turn(ADD, thought="<think>\n</think>")], 0, 1, False, ""),
    (ONE, "a thought of one dot", [turn(ADD, thought="<think>.</think>")],
     1, 1, True, "left: a thought is not read"),
    (ONE, "two thoughts", ["<think>t</think>" + turn(ADD)], 0, 1, False, ""),
    (ONE, "an unclosed thought", [turn(ADD, thought="<think>t")],
     0, 0, False, "all of it is thought"),
    (ONE, "thought behind the call", [turn(ADD, thought="") + "<think>t</think>"], 0, 1, False, ""),
    (ONE, "the thought mentions tags", [turn(ADD, thought="<think><tool_call>?</response></think>")],
     1, 1, True, ""),
    (ONE, "the thought mentions its end", [turn(ADD, thought="<think>a </think> tag</think>")],
     0, 1, False,
     "it ends at the first `</think>`"),
    (ONE, "the call in the thought only", [f"<think>{turn(ADD, thought='')}</think>"],
     0, 0, False, ""),
    (ONE, "words before the thought", ["Sure! " + turn(ADD)], 0, 1, False, ""),
    (ONE, "words behind the call", [turn(ADD) + " Done."], 0, 1, False, ""),
    (ONE, "a response added", [turn(ADD) + "<response>hello</response>"], 0, 1, False, ""),
    (ONE, "a response instead", [SAY], 0, 0, False, ""),
    (ONE, "cut behind the call", [turn(ADD).removesuffix("</tool_call>")], 0, 1, False,
     "departure: the authors give the minimum"),
    (ONE, "cut in the arguments", [turn(ADD)[:60]], 0, 0, False, ""),
    (ONE, "nothing", [""], 0, 0, False, ""),
    (ONE, "no tags", [ADD], 0, 0, False, ""),
    (ONE, "tags in capitals", [turn(ADD).replace("tool_call", "TOOL_CALL")], 0, 0, False, ""),
    (ONE, "tags of another model", [f"<think>t</think><function_call>{ADD}</function_call>"],
     0, 0, False, ""),
    (ONE, "a fence in the block", [turn("```json", ADD, "```")],
     1, 0, False, "one unreadable line gives 0"),
    (ONE, "Python's call", [turn("add(a=1, b=2)")], 1, 0, False, ""),
    (ONE, "Python's quotes", [turn(ADD.replace('"', "'"))], 1, 0, False, ""),
    (ONE, "a list of calls", [turn(f"[{ADD}]")], 1, 0, False, ""),
    (ONE, "a comma behind the last member", [turn(ADD[:-1] + ",}")], 1, 0, False, ""),
    (ONE, "a comma behind the call", [turn(ADD + ",")], 1, 0, False, ""),
    (ONE, "a comment", [turn(ADD + "  // adds")], 1, 0, False, ""),
    (ONE, "NaN beside the gold values", [turn(ADD[:-2] + ', "c": NaN}}')], 1, 0, False, "not JSON"),
    (ONE, "a number beyond floats", [turn(ADD.replace("1", "1e999"))], 1, 0, False, "not finite"),
    (ONE, "a key twice at the top", [turn('{"name": "add", ' + ADD[1:])], 1, 0, False, ""),
    (ONE, "a key twice in the arguments", [turn(ADD.replace('"a": 1', '"a": 0, "a": 1'))],
     1, 0, False, ""),
    (ONE, "`arguments` and `parameters`", [turn(ADD[:-1] + ', "parameters": {}}')],
     1, 0, False, ""),
    (ONE, "arguments as a string", [turn(json.dumps({"name": "add", "arguments": '{"a": 1, "b": 2}'}))],
     1, 0, False,
     "the wire form of chat APIs"),
    (ONE, "the call inside `function`", [turn('{"function": ' + ADD + "}")], 1, 0, False, ""),
    (ONE, "an `id` beside the name", [turn('{"id": 1, ' + ADD[1:])],
     1, 1, True, "left: other members are free"),
    (TWO, "both, in the other order", [turn(call_line("neg", a=1), ADD)],
     1, 1, True, "order inside a turn is free"),
    (TWO, "a block for each", [turn(ADD) + turn(call_line("neg", a=1), thought="")],
     1, 1, True, "Hermes' and Qwen's form"),
    (TWO, "one of them", [turn(ADD)], 1, (1 / 2 + 3) / 6, False, ""),
    (TWO, "one of them broken", [turn(ADD, '{"name": "neg"')],
     1, 0, False, "one unreadable line gives 0"),
    (NONE, "thought and response", [SAY], 1, None, True, ""),
    (NONE, "any response", [SAY.replace("hello", "?")],
     1, None, True, "left: a response is not read"),
    (NONE, "an empty response", [SAY.replace("hello", " ")], 0, None, False, ""),
    (NONE, "call tags in the response", [SAY.replace("hello", turn(ADD, thought=""))],
     0, None, False, ""),
    (NONE, "the end of a call in it", [SAY.replace("hello", "</tool_call>")], 0, None, False, ""),
    (NONE, "a call added", [turn(ADD) + "<response>hello</response>"],
     0, None, False, "the authors give the format point"),
    (NONE, "a call instead", [turn(ADD)], 0, None, False, ""),
    (LIVE, "both turns right", [turn(CANCEL), turn(BOOK)], 1, 1, True, ""),
    (LIVE, "turns exchanged", [turn(BOOK), turn(CANCEL)], 1, 0, False, "calls count in their turn"),
    (LIVE, "both calls in turn 1", [turn(CANCEL, BOOK), SAY], 1 / 2, (1 / 3 + 2) / 5, False, ""),
    (LIVE, "the first turn only", [turn(CANCEL)], 1 / 2, (1 / 2 + 2) / 5, False, ""),
    (LIVE, "a turn too many", [turn(CANCEL), turn(BOOK), SAY], 2 / 3, 1, False, ""),
    (LIVE, "right, one call refused", [turn(CANCEL), turn(BOOK)],
     1, 1, False, "refused when executed"),
]


def scores(gold, kind, texts):
    return rest.score_texts(texts, gold, refused=int(kind.endswith("refused")))


def table():
    lines = [
        "# What an output earns", "",
        "Format and correctness in [0, 1], before the reward's scaling; exact is the metric.",
        "\"Left\" names what the rules do not close. Made by `python tests/test_scanner.py`;",
        "a test fails if this file is out of date.", "",
        "| gold | the model writes | format | correctness | exact | remark |",
        "|---|---|---|---|---|---|"]
    for gold, kind, texts, *_, remark in CASES:
        form, correct, exact = scores(gold, kind, texts)
        correct = "–" if correct is None else f"{correct:.3g}"
        cells = NAMES[id(gold)], kind, f"{form:.3g}", correct, "yes" if exact else "no", remark
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_what_an_output_earns(case):
    """Every kind of output people try against scores worked out by hand."""
    gold, kind, texts, form, correct, exact, _ = case
    got = scores(gold, kind, texts)
    assert got[0] == pytest.approx(form)
    assert got[1] == (None if correct is None else pytest.approx(correct))
    assert got[2] is exact


def test_the_table_is_up_to_date():
    """results/outputs.md is what the present code gives."""
    assert TABLE.read_text(encoding="utf-8") == table(), "run python tests/test_scanner.py"


# -------------------------------------------------------------------------------------------- rules

@pytest.mark.parametrize("arguments", [
    '{"x": 1, "x": 1}', '{"o": {"x": 1, "x": 2}}', '{"l": [[{"x": 1, "y": 2, "x": 1}]]}',
    r'{"x": 1, "\u0078": 1}', r'{"\ud800": 1, "\udfff": 1}'])
def test_a_key_twice_is_malformed_at_any_depth(arguments):
    """Which of two values counts must not be left to the parser. Keys are compared as decoded."""
    bad, good = rest.parse_calls(turn('{"name": "f", "arguments": %s}' % arguments, ADD))
    assert isinstance(bad, MalformedCall) and good.name == "add"


@pytest.mark.parametrize("member", [r'"\ud800": 1, "\udfff": 1', r'"\u006eame": "g"'])
def test_keys_of_the_call_itself_are_compared_as_read(member):
    call, = rest.parse_calls(turn('{"name": "f", %s, "arguments": {}}' % member))
    assert isinstance(call, MalformedCall)


def test_a_closing_tag_in_a_string_of_a_broken_call_ends_nothing():
    """What broke the call stands behind the string, and the block ends behind that."""
    text = '<tool_call>{"name": "</tool_call>", oops}</tool_call><response>x</response>'
    calls, response = rest.split_blocks(text)
    assert (calls.end, response.kind) == (text.index("<response>"), "response")
    assert rest.parse_calls(text)[1:] == []


@pytest.mark.parametrize("written, read", [
    (r"\ud800", "\ufffd"),
    (r"\udfff", "\ufffd"),
    (r"\uD83D\uDE00", "😀"),
    (r"\ud83d\ud83d\ude00", "\ufffd😀"),
    (r"\ude00\ud83d", "\ufffd\ufffd"),
    (r"\\ud800", r"\ud800"),
    (r"\\\ud800", "\\\ufffd"),
    (r"\\\\ud800\ud800x", "\\\\ud800\ufffdx"),
    (r"\\\ud83d\ude00", "\\😀"),
    (r"\ud7ff\ue000", "\ud7ff\ue000"),
    (r"\ud800\u0041", "\ufffdA"),
    (r"\"\ud800\"", '"\ufffd"'),
    (r"\ud800\n\udc00", "\ufffd\n\ufffd")])
def test_halves_of_surrogate_pairs(written, read):
    """JSON may escape half a pair, which UTF-8 and tokenizers refuse: it becomes U+FFFD in names, keys
    and values, at any depth; whole pairs stay."""
    line = '{"name": "%s", "arguments": {"%s": [{"%s": "%s"}]}}' % ((written,) * 4)
    assert rest.parse_calls(turn(line)) == [Call(read, {read: [{read: read}]})]
    assert len(rest.label_chars(turn(line))) == len(turn(line))


@pytest.mark.parametrize("written", [r"\ud8zz", r"\ud80", "\\ud8٣٣", r"\ud800\udzzz", r"\ud800\ud"])
def test_repair_makes_no_bad_escape_good(written):
    """Only escapes that JSON allows are repaired."""
    call, = rest.parse_calls(turn(call_line("f", x="?").replace("?", written)))
    assert isinstance(call, MalformedCall)


def test_bounds():
    """64 calls are read, over any number of blocks; the rest of the turn is one error. Calls that are
    too long or too deep are errors of their own."""
    many = turn(*[ADD] * rest.MAX_CALLS)
    assert rest.parse_calls(many) == [Call("add", {"a": 1, "b": 2})] * rest.MAX_CALLS
    one = turn(ADD, thought="")
    for text in (turn(*[ADD] * 100), many + 3 * one, 100 * one):
        *calls, surplus = rest.parse_calls(text)
        assert calls == rest.parse_calls(many) and isinstance(surplus, MalformedCall)
        assert all(block.closed for block in rest.split_blocks(text))
    room = rest.MAX_CHARS - len(call_line("f", x=""))
    assert rest.parse_calls(turn(call_line("f", x="a" * room))) == [Call("f", {"x": "a" * room})]
    assert isinstance(rest.parse_calls(turn(call_line("f", x="a" * (room + 1))))[0], MalformedCall)
    for depth in (rest.MAX_DEPTH - 2, rest.MAX_DEPTH - 1, rest.MAX_DEPTH, 500, 10_000):
        line = '{"name": "f", "arguments": {"x": %s1%s}}' % ("[" * depth, "]" * depth)
        call, after = rest.parse_calls(turn(line, ADD))
        assert isinstance(call, Call) == (depth <= rest.MAX_DEPTH - 2) and after.name == "add"


def test_one_scan_for_format_calls_and_labels(monkeypatch):
    """The same completion is scanned once, whoever asks; what a tool does to its arguments changes
    neither its score nor what is read again."""
    text = turn(call_line("f", x=[1], one_scan=True))
    gold = row([("f", {"x": [1], "one_scan": True})])
    scans = []
    scan = rest.read_call
    monkeypatch.setattr(rest, "read_call", lambda *args: scans.append(1) or scan(*args))
    rest.parse_calls(text)[0].arguments["x"].append(2)
    rest.label_chars(text)
    assert rest.score_texts([text], gold) == (1.0, 1.0, True)
    assert rest.parse_calls(text) == [Call("f", {"x": [1], "one_scan": True})]
    assert len(scans) == 1


def test_turns_are_compared_one_by_one():
    """A call in the wrong turn is another call; matching stays inside the turn. An episode of one turn
    scores as its calls do."""
    f1, f2 = call_line("f", x=1), call_line("f", x=2)
    gold = row([("f", {"x": 1})], [("f", {"x": 2})])
    assert rest.score_texts([turn(f1), turn(f2)], gold) == (1.0, 1.0, True)
    assert rest.score_texts([turn(f2), turn(f1)], gold) == (1.0, pytest.approx((1 + 1 + 1) / 5), False)
    rng = random.Random(3)
    kinds = [(name, {key: value}) for name in "fg" for key in "xy" for value in (0, 1)]
    for _ in range(200):
        calls = rng.choices(kinds, k=rng.randrange(1, 4))
        said = rng.choices(kinds, k=rng.randrange(4))
        flat = rest.correctness_score([Call(*c) for c in calls], [Call(*c) for c in said])
        assert rest.score_texts([turn(*(call_line(n, **a) for n, a in said))], row(calls))[1] == flat


# ----------------------------------------------------------------------------------------- any text

OTHER = '{"name": "g", "parameters": {"y": "a<b", "z": [1, {"k": null}]}}'
PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>",
    "<tool_call>\n", "\n</tool_call>", "<think>t</think>", ADD, ADD, ADD, OTHER, OTHER, "\n", "\n",
    '{"name": ', '"arguments": {', '"parameters": ', '"f"', '"name"', '"x": "', '"</tool_call>"',
    '"a": 1', "{", "}", "[", "]", '"', "\\", "\t", " ", "\u00a0", "x", "é", ":", ",", "-", "<", ">",
    "12", "1e5", "1e999", "NaN", "true", r"\u00e9", r"\ud83d", r"\ude00", "\0", "\x1b", "😀",
    "import os", "file:///etc/passwd", "!!python/object", "__import__"]
STARTS = [
    "", "", "<tool_call>", "<think>t</think><tool_call>", "<think>t</think><response>",
    '<think>t</think><tool_call>{"name": "f", "arguments": {']
ENDS = ["", "", "}}</tool_call>", "</tool_call>", "</response>"]
GOLDS = (ONE, TWO, NONE, LIVE)


def soup(rng):
    return rng.choice(STARTS) + "".join(rng.choices(PIECES, k=rng.randrange(24))) + rng.choice(ENDS)


def read(text, gold):
    """All that the project does with a completion's text."""
    scored = rest.score_texts([text, text], gold)
    return rest.split_blocks(text), rest.label_chars(text), rest.parse_calls(text), scored


def as_call(text):
    """The call that text is by the standard library alone; raises where it is none."""
    value = json.loads(text)
    arguments, = (value[key] for key in ("arguments", "parameters") if key in value)
    assert isinstance(value["name"], str) and isinstance(arguments, dict)
    return Call(value["name"], arguments)


events = []
watching = False


def watch(event, args):
    if watching and event != "builtins.id":  # copying asks for it
        events.append(event)


def test_any_text_is_read_without_side_effects():
    """Random soups of tags, JSON and noise: nothing raises; blocks are disjoint, labels total, scores
    in range; what is read as a call is that call for the standard library too. Meanwhile an audit
    hook sees no file, socket, process, import or code: no audited event at all."""
    global watching
    sys.addaudithook(watch)
    rng = random.Random(5)
    read(soup(rng), ONE)
    calls_seen = errors_seen = 0
    for n in range(TEXTS):
        text = soup(rng)
        gold = rng.choice(GOLDS)
        watching = True
        blocks, labels, calls, (form, correct, exact) = read(text, gold)
        watching = False
        assert not events, (text, events)
        assert len(labels) == len(text) and set(labels) <= set(range(6))
        assert all(a.end <= b.start for a, b in zip(blocks, blocks[1:]))
        assert all(b.start < b.inner[0] <= b.inner[1] <= b.end <= len(text) for b in blocks)
        assert 0 <= form <= 1 and (correct is None or 0 <= correct <= 1)
        assert not exact or (form, correct) in ((1, 1), (1, None))
        entries = [entry for block in blocks for entry in block.calls]
        assert list(map(repr, calls)) == [repr(call) for call, *_ in entries]
        for call, start, end, _ in entries:
            if isinstance(call, Call) and "\\ud" not in text[start:end]:
                assert as_call(text[start:end]) == call
            calls_seen += isinstance(call, Call)
            errors_seen += isinstance(call, MalformedCall)
        if n % 100 == 0:
            json.dumps(calls, default=vars, ensure_ascii=False).encode("utf-8")  # no halves of pairs
    assert min(calls_seen, errors_seen) > TEXTS / 20
    watching = True
    open(os.devnull).close()
    watching = False
    assert "open" in events  # the hook was awake
    events.clear()


# -------------------------------------------------------------------------------------- linear time

X = '<tool_call>{"name": "f", "arguments": {"x": '
HOSTILE = {  # (head, what is repeated behind it)
    "bad objects": ("<tool_call>\n", "{\n"),
    "bad lines": ("<tool_call>\n", "x\n"),
    "deep": ("<tool_call>", "["),
    "deep lines": ("<tool_call>\n", "[\n"),
    "nested objects": ("<tool_call>", '{"a":'),
    "nested object lines": ("<tool_call>\n", '{"a":\n'),
    "unterminated strings": ("<tool_call>\n", '{"a\n'),
    "open names": ("<tool_call>", '{"name": "'),
    "open name lines": ("<tool_call>\n", '{"name": "\n'),
    "open thoughts": ("", "<think>"),
    "open calls": ("", "<tool_call>"),
    "open responses": ("", "<response>"),
    "thoughts": ("", "<think></think>"),
    "bad blocks": ("", "<tool_call>x</tool_call>"),
    "good blocks": ("", f"<tool_call>{ADD}</tool_call>"),
    "good calls": ("<tool_call>\n", ADD + "\n"),
    "good calls on one line": ("<tool_call>", ADD),
    "one long string": (X + '"', "a"),
    "one long name": ('<tool_call>{"name": "', "n"),
    "a long number": (X, "9"),
    "a long fraction": (X + "0.", "9"),
    "one tail for many lines": ("<tool_call>\n" + '{"a":[0,\n' * 30, "[],"),
    "backslashes": ("<tool_call>", "\\"),
    "halves": ("<tool_call>", r"\ud800"),
    "halves in a string": (X + '"', r"\ud800"),
    "spaces": ("<tool_call>", " "),
    "line ends": ("<tool_call>", "\n"),
    "angles": ("", "<"),
    "closing tags": ("", "</tool_call>"),
    "cut closing tags": ("<tool_call>{", "</tool_call"),
    "keys again": (X + "{", '"k": 1, '),
    "trailing commas": ("<tool_call>\n", '{"a": 1,}\n'),
    "responses with tags": ("<think>t</think>", "<response><tool_call></response>"),
    "words": ("", "a ")}


class Steps:
    """Counts the characters that searches and decoding visit, at worst, and the calls of functions."""

    def __init__(self):
        self.count = 0

    def profile(self, frame, event, arg):
        self.count += event in ("call", "c_call")


class Text(str):
    """A completion that counts what is searched in it and copied from it."""

    def find(self, what, start=0):
        found = super().find(what, start)
        self.steps.count += (len(self) if found < 0 else found) - start
        return found

    def __getitem__(self, key):
        part = super().__getitem__(key)
        self.steps.count += len(part)
        return part


class Pattern:
    def __init__(self, pattern, steps):
        self.pattern, self.steps = pattern, steps

    def _count(self, match, text, pos):
        self.steps.count += (match.end() if match else len(text)) - pos
        return match

    def match(self, text, pos=0):
        return self._count(self.pattern.match(text, pos), text, pos)

    def search(self, text, pos=0):
        return self._count(self.pattern.search(text, pos), text, pos)

    def sub(self, new, text):
        self.steps.count += len(text)
        return self.pattern.sub(new, text)


class Decoder:
    def __init__(self, decoder, steps):
        self.decoder, self.steps = decoder, steps

    def raw_decode(self, text, pos):
        self.steps.count += len(text)  # an error may look to the end and counts the lines before it
        value, end = self.decoder.raw_decode(text, pos)
        self.steps.count += end - pos - len(text)
        return value, end


def steps_of(text, monkeypatch):
    with monkeypatch.context() as patch:
        steps = Steps()
        text = Text(text)
        text.steps = steps
        for name in ("SPACE", "OPENING_TAG"):
            patch.setattr(rest, name, Pattern(getattr(rest, name), steps))
        patch.setattr(rest, "JSON_DECODER", Decoder(rest.JSON_DECODER, steps))
        patch.setattr(rest, "MAX_CHARS", 1000)  # smaller bounds show at smaller texts
        patch.setattr(rest, "MAX_CALLS", 8)
        rest.split_blocks.cache_clear()
        sys.setprofile(steps.profile)
        try:
            read(text, ONE)
        finally:
            sys.setprofile(None)
            rest.split_blocks.cache_clear()
        return steps.count


@pytest.mark.parametrize("kind", HOSTILE)
def test_work_is_linear_in_the_text(kind, monkeypatch):
    """Steps, not seconds: characters visited and functions called, at n, 2n and 4n. A closing tag
    looked for anew on each bad line shows as a factor of n; so does a decoder started anew on a long
    rest, and the line count in each error of the JSON module."""
    head, unit = HOSTILE[kind]
    n = 2**15
    counts = [steps_of(head + unit * (size // len(unit)), monkeypatch) for size in (n, 2 * n, 4 * n)]
    assert all(b < 2.2 * a for a, b in zip(counts, counts[1:])), counts
    assert counts[-1] < 12 * 4 * n + 10 * 8 * 1000, counts
    assert rest.MAX_CALLS * rest.MAX_CHARS <= 2**20


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
