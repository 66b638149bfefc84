"""Benchmarks: gold answers against the official checkers, dialogues against the official inference
loop, API-Bank's two rules, interrupted runs, what does not fit, intervals."""

import ast
import copy
import importlib
import json
import os
import random
import re
import sys
from collections import Counter
from math import comb
from pathlib import Path
from types import ModuleType

import pytest

import rest
from toy_tools import benchmarks
from toy_tools.benchmarks import (
    GROUPS,
    MAX_STEPS,
    NO_FIT,
    api_bank_official,
    as_code,
    benchmark_rows,
    bfcl,
    call_code,
    evaluate_benchmarks,
    expand,
    json_schema,
    load_results,
    mean_interval,
    paired_difference,
    play,
    score,
    table,
    wilson,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = Path(os.environ.get("REST_DATA") or SHARED) / "apibank"
SIZES = {  # of the AST categories
    "simple_python": 400,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "simple_java": 100,
    "simple_javascript": 50,
}
UNSATISFIABLE = {
    "simple_java_36",
    "simple_java_64",
    "simple_java_65",
    "live_simple_106-63-0",
    "live_simple_112-68-0",
    "live_multiple_862-181-3",
    "live_multiple_964-207-0",
}
DIALOGUES = GROUPS["bfcl-multi-turn"]


@pytest.fixture(scope="session")
def official():
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval && pip install mpmath")
    pytest.importorskip("mpmath", reason="pip install mpmath")
    return bfcl()


def completion(calls, key="arguments"):
    lines = "\n".join(json.dumps({"name": call["name"], key: call["arguments"]}) for call in calls)
    block = f"<tool_call>\n{lines}\n</tool_call>" if calls else "<response>Done.</response>"
    return f"<think>t</think>\n{block}"


def call(name, /, **arguments):
    return {"name": name, "arguments": arguments}


def script(turns, together=False):
    """Turns (lists of calls) -> the texts of a policy that makes these calls, then ends the turn.

    One call a step, but no more than 20 steps a turn; if `together`, as many in a step as are read
    (all, but for two dialogues)."""
    texts = []
    for calls in turns:
        most = rest.MAX_CALLS if together else -(-len(calls) // MAX_STEPS)
        texts += [completion(calls[i:i + most]) for i in range(0, len(calls), most or 1)]
        texts.append(completion([]))
    return texts


def dialogue(row, texts):
    """Play a row with texts in order, the last one repeated for ever.

    Returns (outputs, scores, requests)."""
    game = play(row)
    requests = [next(game)]
    try:
        while True:
            text = texts[min(len(requests), len(texts)) - 1]
            requests.append(game.send(text))
    except StopIteration as end:
        return *end.value, requests


def back_ends_left():
    return [name for name in bfcl().instances if name.startswith("rest")]


# ------------------------------------------------------------------------------- BFCL, AST checker

@pytest.mark.parametrize("category", SIZES)
def test_gold_scores_and_others_do_not(official, category):
    """Gold scores 1 but for the seven entries no honest answer satisfies; empty, renamed, doubled,
    cut: 0."""
    rows = benchmark_rows(category)
    failed = {row["id"] for row in rows if score(row, completion(row["gold"][0]))["score"] != 1}
    assert len(rows) == SIZES[category]
    assert failed == {i for i in UNSATISFIABLE if i.rpartition("_")[0] == category}
    for row in rows:
        gold = row["gold"][0]
        renamed = []
        for one in gold:
            other = one["name"].replace(".", "_") if "." in one["name"] else one["name"] + "_"
            renamed.append({**one, "name": other})
        wrong = [[], renamed, gold + gold[:1]]
        for text in ("", completion(gold)[:-30], *map(completion, wrong)):
            assert score(row, text)["score"] == 0


def test_relevance_counts_calls_only(official):
    """Irrelevance counts where nothing can be read as a call, relevance where something can."""
    text = completion([call("f")])
    cases = (("irrelevance", 240, 0), ("live_irrelevance", 884, 0), ("live_relevance", 16, 1))
    for category, n, with_call in cases:
        rows = benchmark_rows(category)
        assert len(rows) == n
        assert {score(row, text)["score"] for row in rows} == {with_call}
        for other in ("", "<tool_call>{</tool_call>"):
            assert {score(row, other)["score"] for row in rows} == {1 - with_call}


KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def valid(value, schema):
    """A validator of its own for the schemas that the conversion makes."""
    kind = schema.get("type")
    if kind and not isinstance(value, KINDS[kind]):
        return False
    if kind and isinstance(value, bool) != (kind == "boolean"):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(valid(item, schema["items"]) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        complete = value.keys() <= known.keys() and value.keys() >= set(schema.get("required", ()))
        return complete and all(valid(item, known[name]) for name, item in value.items())
    return True


def test_gold_fits_the_converted_schemas(official):
    """An independent check of the conversion: gold is valid under JSON schema's rules, up to a few
    quirks of the data."""
    good = Counter()
    for category in (*SIZES, *DIALOGUES):
        for row in benchmark_rows(category):
            tools = [*row["tools"], *sum(row["scoring"].get("added", []), [])]
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
            for one in sum(row["gold"], []):
                good[valid(one["arguments"], schemas[one["name"]])] += 1
    assert good == {True: 7900, False: 27}


def test_schema_conversion():
    """Type names at every depth, and nothing else; a parameter called "type" or "items" is none."""
    theirs = {"type": "dict", "required": ["type"], "properties": {
        "type": {"type": "float", "default": 1.5},
        "p": {"type": "tuple", "items": {"type": "float"}},
        "q": {"type": "any"},
        "r": {"type": "ArrayList",
              "items": {"type": "dict", "properties": {"items": {"type": "long"}}}},
        "t": {"type": "", "enum": ["a"]},
    }}
    before = json.dumps(theirs)
    assert json_schema(theirs) == {"type": "object", "required": ["type"], "properties": {
        "type": {"type": "number", "default": 1.5},
        "p": {"type": "array", "items": {"type": "number"}},
        "q": {},
        "r": {"type": "array",
              "items": {"type": "object", "properties": {"items": {"type": "integer"}}}},
        "t": {"enum": ["a"]},
    }}
    assert json.dumps(theirs) == before


def test_java_and_javascript_parameters_are_code(official):
    """Every parameter of the two languages is a string with the official hint, and gold values are
    written as their parsers read them."""
    rows = [row for category in GROUPS["bfcl-code"] for row in benchmark_rows(category)]
    tools = [tool["function"] for row in rows for tool in row["tools"]]
    kinds = {p["type"] for tool in tools for p in tool["parameters"]["properties"].values()}
    assert kinds == {"string"}
    assert "Java 8 SDK syntax." in tools[0]["description"]
    assert "This is Java HashMap type" in str(tools[1])
    hash_map = as_code({"a": 1, "b": "c", "d": True}, {"type": "HashMap"}, "Java")
    puts = 'put("a", 1); put("b", "c"); put("d", true);'
    assert hash_map == f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    lists = {"Array": "new String[]{a}", "ArrayList": 'new ArrayList<String>(Arrays.asList("a"))'}
    for kind, code in lists.items():
        assert as_code(["a"], {"type": kind, "items": {"type": "String"}}, "Java") == code
    assert as_code(2.5, {"type": "float"}, "Java") == "2.5f"
    assert as_code(2.5, {"type": "float"}, "JavaScript") == "2.5"


def test_loading_the_checker_leaves_nothing_behind(official, monkeypatch):
    """The vendors' list is neither imported nor shadowed: a real one that is loaded already stays.
    A missing package is reported with the command to run."""
    name = "bfcl_eval.constants.model_config"
    assert name not in sys.modules
    assert "bfcl_eval.eval_checker.ast_eval.ast_checker" not in sys.modules
    real = ModuleType(name)  # an empty one: reading the list from it would fail
    monkeypatch.setitem(sys.modules, name, real)
    bfcl.cache_clear()
    assert bfcl() and sys.modules[name] is real
    command = "pip install --no-deps bfcl-eval && pip install mpmath"
    for part in ("bfcl_eval", "mpmath"):
        bfcl.cache_clear()
        monkeypatch.setitem(sys.modules, part, None)
        with pytest.raises(ImportError, match=command):
            benchmark_rows("multiple")
        monkeypatch.undo()


# --------------------------------------------------------------------------------- BFCL, multi-turn

@pytest.mark.parametrize("category", DIALOGUES)
def test_multi_turn_gold_scores_in_any_number_of_runs(official, category):
    """All gold dialogues pass, with one call a step or a turn's calls in one step, on fresh back
    ends each time that are gone afterwards; empty ones fail."""
    rows = benchmark_rows(category)
    assert len(rows) == 200 == len({row["id"] for row in rows})
    for together in (False, True):
        for row in rows:
            texts = script(row["gold"], together)
            outputs, scores, requests = dialogue(row, texts)
            assert scores == {"score": 1}
            assert len(requests) == len(texts) and sum(outputs, []) == texts
    assert {dialogue(row, [""])[1]["score"] for row in rows} == {0}
    assert not back_ends_left()


def names_of(tools):
    return [tool["function"]["name"] for tool in tools]


def test_functions_held_back_are_shown_in_their_turn(official):
    """miss_func: until its turn a function is not offered, though the back end has it; its turn
    asks with the official sentence and nothing else, and from there on it stays. Gold itself calls
    such a function early once."""
    needed = 0
    called_early = []
    for row in benchmark_rows("multi_turn_miss_func"):
        _, scores, requests = dialogue(row, script(row["gold"], together=True))
        assert scores == {"score": 1}
        turn_of = [sum(m["role"] == "user" for m in messages) - 1 for messages, _ in requests]
        shown = [i for i, turn in enumerate(row["scoring"]["turns"])
                 if turn == [{"role": "user", "content": official.more}]]
        added, = filter(None, row["scoring"]["added"])
        assert len(shown) == 1 and row["scoring"]["added"][shown[0]] is added
        assert row["gold"][shown[0] - 1] == [] and row["gold"][shown[0]]
        late = set(names_of(added))
        assert not late & set(names_of(row["tools"]))
        before = {one["name"] for one in sum(row["gold"][:shown[0]], [])}
        after = {one["name"] for one in row["gold"][shown[0]]}
        if late & before:
            called_early.append(row["id"])
        needed += bool(late & after)
        for turn, (_, tools) in zip(turn_of, requests):
            assert tools == row["tools"] + (added if turn >= shown[0] else [])
        assert len(set(names_of(tools))) == len(tools)
    assert needed == 198 and called_early == ["multi_turn_miss_func_49"]


def test_multi_turn_feeds_results_back_and_stops_after_20_steps(official):
    row = benchmark_rows("multi_turn_base")[0]
    ls = call("ls")
    move = call("mv", source="document", destination="gone")
    game, beside = play(row), play(row)
    next(beside)
    beside.send(completion([move]))
    messages, tools = next(game)  # of its own world, in which nothing has moved
    assert messages == row["messages"] and set(names_of(tools)) >= {"ls", "mv", "grep"}
    more, _ = game.send(completion([ls, call("nothing")]))
    assert [m["role"] for m in more] == ["user", "assistant", "tool", "tool"]
    assert len(messages) == 1
    assert "document" in more[2]["content"]
    assert more[3]["content"].endswith("name 'nothing' is not defined")
    game.close()
    beside.close()
    assert not back_ends_left()
    _, scores, requests = dialogue(row, [completion([ls])])
    assert scores == {"score": 0, "why": "more than 20 steps in turn 1"}
    assert len(requests) == 21


def test_long_contexts_are_long(official):
    """The back ends of long_context are filled up: the same gold calls on the same dialogues bring
    back over ten times the text."""
    def size(category):
        total = 0
        for row in benchmark_rows(category)[:50]:
            messages, _ = dialogue(row, script(row["gold"], together=True))[2][-1]
            total += sum(len(m["content"]) for m in messages if m["role"] == "tool")
        return total

    assert size("multi_turn_long_context") > 10 * size("multi_turn_base")


# ------------------------------------------------------------- BFCL, against the official inference

@pytest.fixture(scope="module")
def reference(official, tmp_path_factory):
    """play(row's id, texts) by the official parts: data, inference loop (function-calling mode)
    and evaluation of an entry. Returns (requests, verdict)."""
    with pytest.MonkeyPatch.context() as patch:
        before = set(sys.modules)
        overrides = ModuleType("overrides")
        overrides.final = lambda function: function
        memory = ModuleType("bfcl_eval.model_handler.utils")  # its import needs vendors' packages
        memory.add_memory_instruction_system_prompt = None  # which only memory categories call
        patch.setitem(sys.modules, "overrides", overrides)
        patch.setitem(sys.modules, memory.__name__, memory)
        pytest.importorskip("filelock")
        base = importlib.import_module("bfcl_eval.model_handler.base_handler")
        utils = importlib.import_module("bfcl_eval.utils")
        patch.setattr(utils, "LOCK_DIR", tmp_path_factory.mktemp("locks"))
        entries, truths = {}, {}
        for category in DIALOGUES:
            entries |= {e["id"]: e for e in utils.load_dataset_entry(category)}
            truths |= {e["id"]: e["ground_truth"] for e in utils.load_ground_truth_entry(category)}
        evaluate = official_function(
            "eval_checker/eval_runner.py",
            "_evaluate_single_multi_turn_entry",
            BaseHandler=None,
            multi_turn_checker=official.check,
            is_empty_execute_response=base.is_empty_execute_response,
        )
        count = iter(range(10**9))

        def run(key, texts):
            entry = copy.deepcopy(entries[key])
            name = f"rest_official{next(count)}"
            handler = scripted(base.BaseHandler, texts)(name, 0, name, True)
            outputs, _ = handler.inference(entry, False, True)
            category = key.rpartition("_")[0]
            verdict = evaluate(handler, key, outputs, truths[key], entry, name, category)
            for left in [left for left in official.instances if left.startswith(name)]:
                del official.instances[left]
            return handler.requests, verdict

        yield run
        for name in set(sys.modules) - before:
            if name.startswith("bfcl_eval"):
                del sys.modules[name]


def official_function(file, name, **namespace):
    """One function of a file of the package, without what that file imports."""
    tree = ast.parse((bfcl().data.parent / file).read_text())
    found, = (node for node in tree.body if getattr(node, "name", "") == name)
    exec(compile(ast.Module([found], []), file, "exec"), namespace)
    return namespace[name]


def scripted(base, texts):
    """An official handler whose model says texts in order, the last one for ever, in our format."""
    class Scripted(base):
        def _pre_query_processing_FC(self, data, entry):
            self.requests = []
            return {"messages": []}

        def _compile_tools(self, data, entry):
            return {**data, "tools": copy.deepcopy(entry["function"])}

        def add_first_turn_message_FC(self, data, messages):
            return {**data, "messages": data["messages"] + messages}

        _add_next_turn_user_message_FC = add_first_turn_message_FC

        def _query_FC(self, data):
            self.requests.append((data["messages"], data["tools"]))
            return texts[min(len(self.requests), len(texts)) - 1], 0.0

        def _parse_query_response_FC(self, text):
            return {"model_responses": text, "input_token": 0, "output_token": 0}

        def _add_assistant_message_FC(self, data, response):
            said = {"role": "assistant", "content": response["model_responses"]}
            return {**data, "messages": data["messages"] + [said]}

        def _add_execution_results_FC(self, data, results, response):
            told = [{"role": "tool", "content": result} for result in results]
            return {**data, "messages": data["messages"] + told}

        def decode_execute(self, text, has_tool_call_tag):
            calls = [c for c in rest.parse_calls(text) if isinstance(c, rest.Call)]
            return [f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})"
                    for c in calls]

    return Scripted


def variants(row, rng):
    """{kind: texts} of policies that do this dialogue rightly, wrongly and oddly."""
    gold = row["gold"]
    busy = [i for i, turn in enumerate(gold) if turn]
    at = rng.choice(busy)
    without = [turn if i != at else turn[:-1] for i, turn in enumerate(gold)]
    mute = [turn if i != at else [] for i, turn in enumerate(gold)]
    doubled = [turn if i != at else turn + turn[-1:] for i, turn in enumerate(gold)]
    early = list(gold)  # what a turn asks for is done one turn before
    early[at - 1] = early[at - 1] + early[at]
    instead = [turn if i != at else [] for i, turn in enumerate(early)]
    all_at_once = [sum(gold, [])] + [[] for _ in gold[1:]]
    value = rng.choice(["wrong", 7, None, True, ["x"], "cd('x') ls()", "é\ud800\n'\""])
    other = copy.deepcopy(gold)
    if other[at][0]["arguments"]:
        key = rng.choice(list(other[at][0]["arguments"]))
        other[at][0]["arguments"][key] = value
    tools = row["tools"] + sum(row["scoring"]["added"], [])
    harmless = call(rng.choice(names_of(tools)))
    return {
        "gold": script(gold, together=rng.random() < 0.5),
        "a call less": script(without),
        "a silent turn": script(mute),
        "a call twice": script(doubled),
        "early and in time": script(early),
        "early instead": script(instead),
        "all in the first turn": script(all_at_once),
        "another value": script(other),
        "an unknown function": script([[call("nothing", x=1)] + turn for turn in gold]),
        "a call too much": script([[harmless] + turn for turn in gold]),
        "endless in the first turn": [completion([harmless])],
        "endless in the last turn": script(gold)[:-1] + [completion([harmless])],
        "unreadable": ["<tool_call>\n{</tool_call>"] + script(gold),
    }


@pytest.mark.parametrize("category", DIALOGUES)
def test_dialogues_go_as_in_the_official_script(reference, category, capsys):
    """Thirteen kinds of policies, right and wrong: each request (messages with their results, and
    tools, functions held back included) and each verdict are those of the official script."""
    rng = random.Random(category)
    passed = Counter()
    for i, row in enumerate(benchmark_rows(category)):
        kinds = variants(row, rng)
        kind = list(kinds)[i % len(kinds)]
        theirs, verdict = reference(row["id"], kinds[kind])
        _, scores, ours = dialogue(row, kinds[kind])
        assert scores["score"] == int(verdict["valid"]), (row["id"], kind, scores, verdict)
        assert len(ours) == len(theirs)
        for (messages, tools), (their_messages, functions) in zip(ours, theirs):
            assert nameless(messages) == nameless(their_messages)
            assert [tool["function"] for tool in tools] == list(map(as_ours, functions))
        passed[kind, scores["score"]] += 1
        capsys.readouterr()  # the official script prints each step
    assert len({kind for kind, _ in passed}) == 13 <= min(passed["gold", 1], 15)
    assert not passed["gold", 0] and not passed["a silent turn", 1]
    assert passed["endless in the last turn", 1] and passed["an unknown function", 1]
    assert passed["another value", 0] and not passed["endless in the first turn", 1]
    assert not back_ends_left()


def as_ours(function):
    return {
        "name": function["name"],
        "description": function["description"],
        "parameters": json_schema(function["parameters"]),
    }


def nameless(messages):
    """Without the names of back ends, which the official script writes into texts that look like
    calls: `cd(` in a string becomes `NAME.cd(`."""
    return re.sub(r"rest_?\w*_instance", "NAME", json.dumps(messages))


# ----------------------------------------------------------------------- BFCL, what is never called

def test_hostile_calls_are_never_evaluated(official, tmp_path):
    """The official package evals calls: only names of its functions, identifier keys and literal
    values may get there, and no number that would compute for minutes."""
    mark = tmp_path / "mark"
    attack = f"open({str(mark)!r}, 'w')"
    huge = 10**4000
    hostile = [
        rest.Call("__import__", {"name": "os"}),
        rest.Call(f"{attack} or ls", {}),
        rest.Call("ls", {"lambda": 1}),
        rest.Call("ls", {f"a={attack}, b": 1}),
        rest.Call("power", {"base": 9, "exponent": 9**9}),
        rest.Call("power", {"base": huge, "exponent": 900}),
        rest.Call("power", {"base": -huge, "exponent": 900}),
        rest.Call("power", {"base": "9", "exponent": 2}),
        rest.Call("logarithm", {"value": 2, "base": 10, "precision": 10**9}),
        rest.Call("logarithm", {"value": 2, "base": 10, "precision": str(10**9)}),
        rest.Call("square_root", {"number": 2, "precision": 10**9}),
        rest.Call("round_number", {"number": huge, "decimal_places": -10**9}),
    ]
    names = {"ls", "echo", "power", "logarithm", "square_root", "round_number"}
    for one in hostile:
        code, problem = call_code(one, names)
        assert code == "this_call_failed()"
        assert problem.startswith("Error during execution: ")
    quotes = (f"'); {attack}; ('", f"\\'+{attack}+'")
    for text in (*quotes, attack, "ls() \n\x00 \ud800 {0}", "cd(cat('a'))"):
        code, problem = call_code(rest.Call("echo", {"content": text}), names)
        assert problem is None
        assert compile(code, "", "eval").co_names == ("echo",)
        assert eval(code, {"echo": lambda content: content}) == text
    rows = benchmark_rows("multi_turn_base")
    row = next(row for row in rows if "MathAPI" in row["state"]["involved_classes"])
    calls = [call(one.name, **one.arguments) for one in hostile]
    calls.append(call("echo", content=attack))
    outputs, scores, requests = dialogue(row, [completion(calls), ""])
    assert scores["score"] == 0
    assert len([m for m in requests[1][0] if m["role"] == "tool"]) == len(calls)
    assert not mark.exists()


def test_ordinary_arithmetic_is_evaluated(official):
    """The bounds leave alone what a dialogue can ask for, and what they let through is small."""
    names = set(benchmarks.LIMITS)
    for name, arguments in {
        "power": {"base": 1500, "exponent": 2},
        "logarithm": {"value": 2, "base": 10, "precision": 1000},
        "square_root": {"number": 2.5, "precision": 5},
        "round_number": {"number": 2.5},
    }.items():
        assert call_code(rest.Call(name, arguments), names)[1] is None
    most = benchmarks.LIMITS["power"]
    assert (int(most["base"]) ** most["exponent"]).bit_length() < 10**6


# ---------------------------------------------------------------------------------------- API-Bank

ANSWER = {"name": "F", "parameters": {"a": "1"}}
RIGHT = json.dumps(ANSWER)
OTHER = '{"name": "F", "parameters": {"a": "2"}}'
HERMES = RIGHT.replace("parameters", "arguments")
BLOCK = "<tool_call>\n%s\n</tool_call>"
THOUGHT = "<think>t</think>\n"


@pytest.mark.parametrize("text, official_score, strict", [
    (THOUGHT + BLOCK % RIGHT, 1, 1),
    (THOUGHT + BLOCK % HERMES, 0, 1),
    (BLOCK % RIGHT, 1, 0),  # no thought
    (RIGHT, 1, 0),  # no tags at all
    (THOUGHT + BLOCK % f"{OTHER}\n{RIGHT}", 1, 0),  # any of several calls
    (THOUGHT + BLOCK % f"nonsense\n{RIGHT}", 1, 0),
    (THOUGHT + BLOCK % '{"a": "1"}', 1, 0),  # parameters alone
    (THOUGHT + BLOCK % json.dumps(RIGHT), 1, 0),  # JSON in a JSON string
    (THOUGHT + BLOCK % f"5\n{RIGHT}", 0, 0),  # the official script gives up
    (THOUGHT + BLOCK % RIGHT + BLOCK % OTHER, 0, 0),  # reads the last
    (THOUGHT + BLOCK % RIGHT.replace("F", "G"), 0, 0),
    (THOUGHT + BLOCK % OTHER, 0, 0),
    ("", 0, 0),
    ("[" * 10**5, 0, 0),
    (None, 0, 0),  # did not fit
])
def test_api_bank_rules(text, official_score, strict):
    """The official rule with its leniencies, beside the strict one."""
    gold = [[call("F", a="1")]]
    row = {"category": "api_bank_1", "scoring": ANSWER, "gold": gold}
    scores = score(row, text)
    assert (scores["score"], scores["strict"]) == (official_score, strict)
    if text is not None:
        assert api_bank_official(text, ANSWER) == bool(official_score)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no API-Bank in {DATA}: set REST_DATA")
@pytest.mark.parametrize("category, n", [*zip(GROUPS["api-bank"], (399, 67, 131))])
def test_api_bank_gold(category, n):
    rows = benchmark_rows(category, DATA)
    assert len(rows) == n == len({row["id"] for row in rows})
    for row in rows:
        assert score(row, completion(row["gold"][0], "parameters")) == {"score": 1, "strict": 1}
        assert score(row, "") == score(row, completion([])) == {"score": 0, "strict": 0}


# ------------------------------------------------------------------------------------------ driver

def small_bank(folder, n):
    """API-Bank in small: n, n + 1 and n + 2 samples. The user's text is the answer's only value,
    LEVEL-NUMBER."""
    folder.mkdir()
    for level in (1, 2, 3):
        samples = []
        for i in range(n + level - 1):
            answer = {"name": "F", "parameters": {"a": f"{level}-{i}"}}
            stored = answer if level == 2 else [answer]
            samples.append({"system": "s", "user": f"{level}-{i}", "answer": stored})
        (folder / f"level-{level}-api_processed.json").write_text(json.dumps(samples))
    return str(folder)


class Policy:
    """Right where the value has no 3, else wrong; stops with KeyboardInterrupt before batch number
    `stop`; does not hold what `too_long` says."""

    def __init__(self, stop=None, too_long=lambda value: False):
        self.stop = stop
        self.too_long = too_long
        self.asked = []
        self.batches = []

    def __call__(self, requests):
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        values = [messages[-1]["content"] for messages, tools in requests]
        self.batches.append(len(values))
        self.asked += values
        return [None if self.too_long(value) else self.answer(value) for value in values]

    def answer(self, value):
        return completion([call("F", a=value.replace("3", "x"))], "parameters")


def run(policy, out, bank, **kwargs):
    defaults = {"header": {"model": "m"}, "batch_size": 4, "progress": False, "api_bank_dir": bank}
    return evaluate_benchmarks(["api-bank"], policy, out, **{**defaults, **kwargs})


def test_interrupted_run_continues(tmp_path):
    """Stopped after k batches, the last line cut anywhere: the next run asks for what is missing
    and ends alike."""
    bank = small_bank(tmp_path / "bank", 7)
    rng = random.Random(0)
    whole = Policy()
    written = []  # results on disk at each request: a killed run loses no more than a batch

    def watched(requests):
        written.append((tmp_path / "whole" / "benchmarks.jsonl").read_text().count("\n") - 1)
        return whole(requests)

    results = run(watched, tmp_path / "whole", bank)
    assert len(results) == 24 == len(set(whole.asked))
    assert whole.batches == [4] * 6 and written == list(range(0, 24, 4))
    for result in results:
        assert result["score"] == result["strict"] == ("x" not in result["output"])
    assert load_results(tmp_path / "whole" / "benchmarks.jsonl")[0] == {"model": "m"}
    for k in range(6):
        with pytest.raises(KeyboardInterrupt):
            run(Policy(stop=k), tmp_path / f"{k}", bank)
        file = tmp_path / f"{k}" / "benchmarks.jsonl"
        text = file.read_text()
        file.write_text(text[:-rng.randint(1, len(text.splitlines()[-1]))])  # maybe the header's
        second, third = Policy(), Policy()
        assert run(second, tmp_path / f"{k}", bank) == results
        assert run(third, tmp_path / f"{k}", bank) == results
        assert len(second.asked) == len(set(second.asked)) == 24 - max(0, 4 * k - 1)
        assert not third.asked


def test_limits_are_nested_subsets(tmp_path):
    """A larger limit continues the run of a smaller one."""
    bank, seen = small_bank(tmp_path / "bank", 30), set()
    nine = {category: 9 for category in GROUPS["api-bank"]}
    for limit, n in ((2, 6), (5, 15), (nine, 27), (None, 93)):
        policy = Policy()
        ids = {r["id"] for r in run(policy, tmp_path / "out", bank, limit=limit)}
        assert len(ids) == n and ids > seen
        assert len(policy.asked) == n - len(seen)
        seen = ids


def test_other_settings_or_data_are_refused(tmp_path):
    bank, out = small_bank(tmp_path / "bank", 3), tmp_path / "out"
    run(Policy(), out, bank)
    with pytest.raises(ValueError, match=r"another evaluation \(model, tokens differ\)"):
        run(Policy(), out, bank, header={"model": "other", "tokens": 5})
    file = tmp_path / "bank" / "level-1-api_processed.json"
    file.write_text(file.read_text().replace('"s"', '"changed"', 1))
    changed = r"other benchmark data \(1 samples differ, such as api_bank_1_0\)"
    with pytest.raises(ValueError, match=changed):
        run(Policy(), out, bank)
    with pytest.raises(FileNotFoundError, match="level-1-api_processed.json"):
        benchmark_rows("api_bank_1", tmp_path)
    with pytest.raises(ValueError, match="unknown benchmark 'bfkl'"):
        expand(["bfkl"])
    assert expand(["api_bank_2", "api-bank"]) == ["api_bank_2", "api_bank_1", "api_bank_3"]


def lines_changed(change):
    """A function of the lines of a good file of results -> its lines, the third one changed."""
    def changed(lines):
        result = json.loads(lines[2])
        change(result)
        return [*lines[:2], json.dumps(result), *lines[3:]]

    return changed


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[1:], "line 1 has no header"),
    (lambda lines: ['{"header": 1}', *lines[1:]], "line 1 has no header"),
    (lambda lines: [], "line 1 is not a JSON object"),
    (lambda lines: ["# results"], "line 1 is not a JSON object"),
    (lambda lines: [*lines[:2], "[1]", *lines[3:]], "line 3 is not a JSON object"),
    (lambda lines: [*lines[:2], lines[2][:-9], *lines[3:]], "line 3 is not a JSON object"),
    (lambda lines: [*lines[:2], "[" * 10**5, *lines[3:]], "line 3 is not a JSON object"),
    (lambda lines: [*lines, lines[2]], "line 14 is there twice"),
    (lines_changed(lambda r: r.pop("category")), "line 3 has no category"),
    (lines_changed(lambda r: r.update(id=5)), "line 3 has no id"),
    (lines_changed(lambda r: r.pop("data")), "line 3 has no data"),
    (lines_changed(lambda r: r.update(category="x")), "line 3 has an unknown category, 'x'"),
    (lines_changed(lambda r: r.update(score=2)), "line 3 has no score of 0 or 1"),
    (lines_changed(lambda r: r.update(score=0.5)), "line 3 has no score of 0 or 1"),
    (lines_changed(lambda r: r.update(score=True)), "line 3 has no score of 0 or 1"),
    (lines_changed(lambda r: r.pop("strict")), "line 3 has no strict of 0 or 1"),
    (lines_changed(lambda r: r.update(data="x")), "is another sample"),
    (lambda lines: lines[:1], "nothing to compare"),
])
def test_bad_files_to_compare_with_are_refused_before_the_first_request(tmp_path, change, message):
    """Whatever is wrong with the other run's file, it is said in a sentence that names the file,
    before the policy is asked and before there is anything on disk."""
    bank, file = small_bank(tmp_path / "bank", 3), tmp_path / "old" / "benchmarks.jsonl"
    old = run(Policy(), tmp_path / "old", bank)
    lines = file.read_text().splitlines()
    assert len(lines) == 13
    policy = Policy()
    file.write_text("".join(line + "\n" for line in change(lines)))
    with pytest.raises(ValueError, match=message) as refused:
        run(policy, tmp_path / "new", bank, compare=str(file))
    assert str(file) in str(refused.value)
    assert not policy.asked and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=message):
        table(old, file)


def test_files_to_compare_with_must_be_there_and_may_be_cut(tmp_path):
    bank, file = small_bank(tmp_path / "bank", 3), tmp_path / "old" / "benchmarks.jsonl"
    old = run(Policy(), tmp_path / "old", bank)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is no file"):
            run(Policy(), tmp_path / "new", bank, compare=path)
    whole = file.read_bytes()
    file.write_bytes(b"\xff\n" + whole)
    with pytest.raises(ValueError, match="not a file of benchmark results"):
        load_results(file)
    file.write_bytes(whole[:-20])
    assert load_results(file)[1] == old[:-1]
    assert "paired n" in table(run(Policy(), tmp_path / "new", bank, compare=file), file)


def test_bfcl_through_the_driver(official, tmp_path):
    """Single prompts and dialogues share batches; an oracle that looks gold up by what users have
    said and which tools are shown scores 100%: what is held back shows in the request."""
    names = ["simple_python", "multi_turn_miss_func"]
    gold = {}
    for row in (row for name in names for row in benchmark_rows(name)):
        said = ()
        tools = row["tools"]
        turns = row["scoring"].get("turns", [row["messages"]])
        added = row["scoring"].get("added", [[]])
        for turn, more, calls in zip(turns, added, row["gold"]):
            said += (turn[-1]["content"],)
            tools = tools + more
            gold[said, str(tools)] = completion(calls)

    def oracle(requests):
        texts = []
        for messages, tools in requests:
            said = tuple(m["content"] for m in messages if m["role"] == "user")
            done = messages[-1]["role"] == "tool"
            texts.append(completion([]) if done else gold[said, str(tools)])
        return texts

    results = evaluate_benchmarks(names, oracle, tmp_path, limit=40, batch_size=7, progress=False)
    assert [r["id"] for r in results if r["score"] == 0] == []
    lines = table(results).splitlines()
    assert lines[1].split() == ["simple_python", "40", "100.00", "91.2", "to", "100.0"]


def test_what_does_not_fit_has_failed_and_is_counted(official, tmp_path):
    """generate's None: the sample has failed in every category, though an empty output would pass
    irrelevance, and in whatever turn it comes; back ends are gone; the table counts such samples
    once, also those of the part before an interruption."""
    names = ["simple_python", "irrelevance", "multi_turn_base", "multi_turn_long_context"]
    gold = {row["id"]: row for name in names[2:] for row in benchmark_rows(name)}

    def generate(requests, most=4000):
        """Holds `most` characters of dialogue, and does nothing but ls and find, once a turn."""
        texts = []
        for messages, tools in requests:
            size = sum(len(m["content"]) for m in messages)
            look = completion([call("ls"), call("find")])
            done = messages[-1]["role"] == "tool"
            texts.append(None if size > most else completion([]) if done else look)
        return texts

    def evaluate(generate, limit, folder="out"):
        return evaluate_benchmarks(names, generate, tmp_path / folder, limit, progress=False)

    results = evaluate(lambda requests: [None] * len(requests), 4, "none")
    assert {(r["score"], r["why"]) for r in results[:8]} == {(0, NO_FIT)}
    assert {(r["score"], r["why"]) for r in results[8:]} == {(0, f"{NO_FIT} (turn 1)")}
    last = table(results).splitlines()[-1]
    each = ", ".join(f"{name} 4" for name in names)
    assert last == f"16 of 16 samples did not fit the model's context and count as failed: {each}"
    evaluate(generate, 20)
    results = evaluate(generate, 100)
    late = [r for r in results if r.get("why", "").startswith(NO_FIT)]
    assert {r["category"] for r in late} == {"multi_turn_long_context"}
    assert len({r["why"] for r in late}) > 2  # several turns
    for r in late:
        turn = int(re.search(r"\(turn (\d)\)$", r["why"])[1])
        assert turn == len(r["output"]) <= len(gold[r["id"]]["gold"]) and r["score"] == 0
    text = table(results)
    assert text.count("did not fit") == 1
    assert f"{len(late)} of 400 samples did not fit" in text
    assert "did not fit" not in table([r for r in results if r not in late])
    assert not back_ends_left()


# --------------------------------------------------------------------------- intervals and tables

def test_intervals_against_hand_computed_values():
    """Wilson: 8 and 0 of 10, known values. Paired: n = 10, 3 up, 1 down: p = 4/12, q = 2/12, centre
    1/6, variance (1/2 - 1/36)/12 = 0.039352, half width 1.96 * 0.198373 = 0.388804. Mean of 8/10
    and 0/20: shares 10/14 and 2/24, variance (0.0145773 + 0.0031829)/4, centre 0.398810, half
    width 0.130600."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-5)
    assert wilson(0, 10) == pytest.approx([1 - x for x in wilson(10, 10)][::-1])
    pairs = [(1, 0)] * 3 + [(0, 1)] + [(1, 1)] * 4 + [(0, 0)] * 2
    expected = (0.2, 1 / 6 - 0.388804, 1 / 6 + 0.388804)
    assert paired_difference([pairs]) == pytest.approx(expected, abs=1e-5)
    back = [(old, new) for new, old in pairs]
    expected = (-0.2, -1 / 6 - 0.388804, -1 / 6 + 0.388804)
    assert paired_difference([back]) == pytest.approx(expected, abs=1e-5)
    assert paired_difference([pairs, [(1, 1)] * 10])[0] == pytest.approx(0.1)
    expected = (0.398810 - 0.130600, 0.398810 + 0.130600)
    assert mean_interval([(8, 10), (0, 20)]) == pytest.approx(expected, abs=1e-5)


def test_intervals_cover():
    """Summed exactly over all outcomes, the 95% intervals hold the truth about 95% of the time;
    they are not points where nothing was ever seen to differ."""
    n, p, q, covered = 30, 0.2, 0.1, 0.0
    for up in range(n + 1):
        for down in range(n - up + 1):
            pairs = [(1, 0)] * up + [(0, 1)] * down + [(1, 1)] * (n - up - down)
            _, low, high = paired_difference([pairs])
            weight = comb(n, up) * comb(n - up, down)
            weight *= p**up * q**down * (1 - p - q) ** (n - up - down)
            covered += weight * (low <= p - q <= high)
    assert 0.94 < covered < 0.97
    rates = []
    for p in (i / 50 for i in range(1, 50)):
        inside = [k for k in range(41) if wilson(k, 40)[0] <= p <= wilson(k, 40)[1]]
        rates.append(sum(comb(40, k) * p**k * (1 - p) ** (40 - k) for k in inside))
    assert 0.94 < sum(rates) / len(rates) < 0.97
    _, low, high = paired_difference([[(1, 1)] * 50])
    assert low < 0 < high


def cells(text):
    return {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in text.splitlines()}


def test_table(tmp_path):
    bank = small_bank(tmp_path / "bank", 30)
    new = run(Policy(), tmp_path / "new", bank)
    old = run(lambda requests: [""] * len(requests), tmp_path / "old", bank, limit=10)
    lines = cells(table(new, tmp_path / "old" / "benchmarks.jsonl"))
    whole = "api-bank, overall"
    levels = [f"api_bank_{i}{rule}" for i in (1, 2, 3) for rule in ("", ", strict")]
    assert list(lines) == ["category", *levels, whole, whole + ", strict"]
    head = ["n", "%", "95%", "interval", "paired", "n", "difference", "95%", "interval"]
    assert lines["category"] == head
    right = sum(r["score"] for r in new)
    assert 40 < right < 93 and lines["api_bank_3"][1] == "0.00"
    assert lines[whole][:2] == ["93", f"{100 * right / 93:.2f}"]
    both = [r["score"] for r in new if r["id"] in {r["id"] for r in old}]
    assert lines[whole][5:7] == ["30", f"{100 * sum(both) / 30:+.1f}"]
    assert "difference" not in table(new)
    with pytest.raises(ValueError, match="api_bank_1_.* is another sample in the second run"):
        table(new, [{**old[0], "data": "x"}])
    five = made({category: (k, 4 * k or 1) for k, category in enumerate(GROUPS["bfcl"])})
    assert cells(table(five))["bfcl, mean of 5"][:2] == ["41", "20.00"]


def made(counts):
    """{category: (right, n)} -> results."""
    return [{"category": category, "id": f"{category}_{i}", "score": int(i < k), "data": ""}
            for category, (k, n) in counts.items() for i in range(n)]


def test_table_pairs_only_what_both_runs_have():
    """Of two splits of four that the other run has, each is paired; the overall is not, since a
    part of it has no pair."""
    new = made(dict(zip(DIALOGUES, [(3, 4), (0, 10), (7, 7), (1, 3)])))
    old = made(dict(zip(DIALOGUES[:2], [(1, 2), (2, 20)])))
    lines = cells(table(new, old))
    assert lines["multi_turn_base"][5:7] == ["2", "+50.0"]
    assert lines["multi_turn_miss_func"][5:7] == ["10", "-20.0"]
    for label in (*DIALOGUES[2:], "bfcl-multi-turn, overall"):
        assert len(lines[label]) == 5


def test_overall_is_the_leaderboards(official):
    """The average of the four splits is the leaderboard's own function's, here on unequal sizes
    (where it is not the share over all samples), and there is none without one of the splits.
    100, 60, 40 and 30 of 200 are 57.5 of 200: 28.75%."""
    file = "eval_checker/eval_runner_helper.py"
    overall = official_function(file, "calculate_unweighted_accuracy")
    whole = [(100, 200), (60, 200), (40, 200), (30, 200)]
    for counts in ([(3, 4), (0, 10), (7, 7), (1, 3)], whole):
        splits = dict(zip(DIALOGUES, counts))
        parts = [{"accuracy": k / n, "total_count": n, "display_accuracy": k / n}
                 for k, n in counts]
        theirs = overall(parts, display_na_if_category_missing=False)
        lines = cells(table(made(splits)))
        n, percent = str(theirs["total_count"]), f"{100 * theirs['accuracy']:.2f}"
        assert lines["bfcl-multi-turn, overall"][:2] == [n, percent]
        assert list(lines) == ["category", *DIALOGUES, "bfcl-multi-turn, overall"]
        splits.popitem()
        assert "bfcl-multi-turn, overall" not in table(made(splits))
    assert percent == "28.75"
