"""Benchmarks: gold answers against the official checkers, API-Bank's two rules, interrupted runs, intervals."""

import json
import os
import random
import sys
import time
from math import comb
from pathlib import Path
from types import ModuleType

import pytest

import rest
from toy_tools.benchmarks import (GROUPS, api_bank_official, as_code, benchmark_rows, bfcl, call_code,
                                  evaluate_benchmarks, expand, json_schema, load_results, mean_interval,
                                  paired_difference, play, score, table, wilson)

DATA = Path(os.environ.get("REST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "apibank"
SIZES = {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "live_simple": 258,
         "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24, "simple_java": 100,
         "simple_javascript": 50}  # of the AST categories
UNSATISFIABLE = {"simple_java_36", "simple_java_64", "simple_java_65", "live_simple_106-63-0", "live_simple_112-68-0",
                 "live_multiple_862-181-3", "live_multiple_964-207-0"}


@pytest.fixture(scope="session")
def official():
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval && pip install mpmath")
    pytest.importorskip("mpmath", reason="pip install mpmath")
    return bfcl()


def completion(calls, key="arguments"):
    lines = "\n".join(json.dumps({"name": call["name"], key: call["arguments"]}) for call in calls)
    return "<think>t</think>\n" + (f"<tool_call>\n{lines}\n</tool_call>" if calls else "<response>Done.</response>")


def dialogue(row, texts):
    """Play a row with texts in order, the last one repeated for ever. Returns (outputs, scores, number of requests)."""
    game, n = play(row), 0
    request = next(game)
    try:
        while True:
            assert request[0][-1]["role"] in ("user", "tool") and request[1] == row["tools"]
            n, text = n + 1, texts[min(n, len(texts) - 1)]
            request = game.send(text)
    except StopIteration as end:
        return *end.value, n


# ---------------------------------------------------------------------------------------------------- BFCL, AST checker

@pytest.mark.parametrize("category", SIZES)
def test_gold_scores_and_others_do_not(official, category):
    """Gold scores 1 but for the seven entries no honest answer satisfies; empty, renamed, doubled, cut: 0."""
    rows = benchmark_rows(category)
    failed = {row["id"] for row in rows if score(row, completion(row["gold"][0]))["score"] != 1}
    assert len(rows) == SIZES[category] and failed == {i for i in UNSATISFIABLE if i.rpartition("_")[0] == category}
    for row in rows:
        gold = row["gold"][0]
        renamed = [{**call, "name": call["name"].replace(".", "_") + "_" * ("." not in call["name"])} for call in gold]
        for text in ("", completion([]), completion(renamed), completion(gold + gold[:1]), completion(gold)[:-30]):
            assert score(row, text)["score"] == 0


def test_relevance_counts_calls_only(official):
    call = completion([{"name": "f", "arguments": {}}])
    for category, n, with_call in (("irrelevance", 240, 0), ("live_irrelevance", 884, 0), ("live_relevance", 16, 1)):
        rows = benchmark_rows(category)
        assert len(rows) == n and {score(row, call)["score"] for row in rows} == {with_call}
        assert {score(row, s)["score"] for row in rows for s in ("", "<tool_call>{</tool_call>")} == {1 - with_call}


def test_gold_fits_the_converted_schemas(official):
    """An independent check of the conversion: gold is valid under our own validator, up to 24 quirks in 4,444 calls."""
    calls = [(call, row["tools"]) for c in [*SIZES, "multi_turn_base"] for row in benchmark_rows(c)
             for turn in row["gold"] for call in turn]
    bad = 0
    for call, tools in calls:
        try:
            rest.validate(rest.Call(**call), tools)
        except rest.CallError:
            bad += 1
    assert len(calls) == 4444 and bad == 24


def test_schema_conversion():
    theirs = {"type": "dict", "required": ["type"], "properties": {
        "type": {"type": "float", "default": 1.5}, "p": {"type": "tuple", "items": {"type": "float"}},
        "q": {"type": "any"},
        "r": {"type": "ArrayList", "items": {"type": "dict", "properties": {"items": {"type": "long"}}}},
        "t": {"type": "", "enum": ["a"]}}}
    before = json.dumps(theirs)
    assert json_schema(theirs) == {"type": "object", "required": ["type"], "properties": {
        "type": {"type": "number", "default": 1.5}, "p": {"type": "array", "items": {"type": "number"}}, "q": {},
        "r": {"type": "array", "items": {"type": "object", "properties": {"items": {"type": "integer"}}}},
        "t": {"enum": ["a"]}}}
    assert json.dumps(theirs) == before


def test_java_and_javascript_parameters_are_code(official):
    tools = [tool["function"] for c in GROUPS["bfcl-code"] for row in benchmark_rows(c) for tool in row["tools"]]
    assert {p["type"] for tool in tools for p in tool["parameters"]["properties"].values()} == {"string"}
    assert "Java 8 SDK syntax." in tools[0]["description"] and "This is Java HashMap type" in str(tools[1])
    hash_map = as_code({"a": 1, "b": "c", "d": True}, {"type": "HashMap"}, "Java")
    assert hash_map == 'new HashMap<String, Object>() {{ put("a", 1); put("b", "c"); put("d", true); }}'
    for kind, code in (("Array", "new String[]{a}"), ("ArrayList", 'new ArrayList<String>(Arrays.asList("a"))')):
        assert as_code(["a"], {"type": kind, "items": {"type": "String"}}, "Java") == code
    assert [as_code(2.5, {"type": "float"}, language) for language in ("Java", "JavaScript")] == ["2.5f", "2.5"]


def test_loading_the_checker_leaves_nothing_behind(official, monkeypatch):
    """The vendors' list is neither imported nor shadowed: a real one that is loaded already stays. A missing package is
    reported with the command to run."""
    name = "bfcl_eval.constants.model_config"
    assert name not in sys.modules and "bfcl_eval.eval_checker.ast_eval.ast_checker" not in sys.modules
    real = ModuleType(name)  # an empty one: reading the list from it would fail
    monkeypatch.setitem(sys.modules, name, real)
    bfcl.cache_clear()
    assert bfcl() and sys.modules[name] is real
    for part in ("bfcl_eval", "mpmath"):
        bfcl.cache_clear()
        monkeypatch.setitem(sys.modules, part, None)
        with pytest.raises(ImportError, match="pip install --no-deps bfcl-eval && pip install mpmath"):
            benchmark_rows("multiple")
        monkeypatch.undo()


# ----------------------------------------------------------------------------------------------------- BFCL, multi-turn

def test_multi_turn_gold_scores_in_any_number_of_runs(official):
    """All 200 gold dialogues pass, with one call a step or a turn's calls in one step, on fresh back ends each time
    that are gone afterwards; empty ones fail."""
    rows = benchmark_rows("multi_turn_base")
    assert len(rows) == 200
    for one_by_one in (True, False):
        for row in rows:
            steps = [[[call] for call in turn] if one_by_one else [turn] * bool(turn) for turn in row["gold"]]
            texts = [completion(step) for turn in steps for step in [*turn, []]]
            outputs, scores, requests = dialogue(row, texts)
            assert scores == {"score": 1} and requests == len(texts) and sum(outputs, []) == texts
    assert not [name for name in bfcl().instances if name.startswith("rest")]
    assert {dialogue(row, [""])[1]["score"] for row in rows} == {0}


def test_multi_turn_feeds_results_back_and_stops_after_20_steps(official):
    row, ls = benchmark_rows("multi_turn_base")[0], {"name": "ls", "arguments": {}}
    game, beside = play(row), play(row)
    next(beside)
    beside.send(completion([{"name": "mv", "arguments": {"source": "document", "destination": "gone"}}]))
    messages, tools = next(game)  # of its own world, in which nothing has moved
    assert messages == row["messages"] and {tool["function"]["name"] for tool in tools} >= {"ls", "mv", "grep"}
    more, _ = game.send(completion([ls, {"name": "nothing", "arguments": {}}]))
    assert [m["role"] for m in more] == ["user", "assistant", "tool", "tool"] and len(messages) == 1
    assert "document" in more[2]["content"] and more[3]["content"].endswith("name 'nothing' is not defined")
    game.close()
    beside.close()
    assert not [name for name in bfcl().instances if name.startswith("rest")]
    _, scores, requests = dialogue(row, [completion([ls])])
    assert scores == {"score": 0, "why": "more than 20 steps in turn 1"} and requests == 21


def test_hostile_calls_are_never_evaluated(official, tmp_path):
    """The official package evals calls: only offered names, identifier keys and literal values may get there."""
    attack = f"open({str(tmp_path / 'mark')!r}, 'w')"
    hostile = [rest.Call("__import__", {"name": "os"}), rest.Call(f"{attack} or ls", {}),
               rest.Call("ls", {"lambda": 1}), rest.Call("ls", {f"a={attack}, b": 1}),
               rest.Call("power", {"base": 9, "exponent": 9**9}),
               rest.Call("logarithm", {"value": 2, "base": 10, "precision": 10**9})]
    for call in hostile:
        code, problem = call_code(call, {"ls", "echo", "power", "logarithm"})
        assert code == "this_call_failed()" and problem.startswith("Error during execution: ")
    for text in (f"'); {attack}; ('", f"\\'+{attack}+'", attack, "ls() \n\x00 \ud800 {0}", "cd(cat('a'))"):
        code, problem = call_code(rest.Call("echo", {"content": text}), {"echo"})
        assert problem is None and compile(code, "", "eval").co_names == ("echo",)
        assert eval(code, {"echo": lambda content: content}) == text
    row = next(row for row in benchmark_rows("multi_turn_base") if "MathAPI" in row["state"]["involved_classes"])
    calls = [{"name": c.name, "arguments": c.arguments} for c in [*hostile, rest.Call("echo", {"content": attack})]]
    started = time.perf_counter()
    assert dialogue(row, [completion(calls), ""])[1]["score"] == 0
    assert time.perf_counter() - started < 2 and not (tmp_path / "mark").exists()


# ------------------------------------------------------------------------------------------------------------- API-Bank

ANSWER = {"name": "F", "parameters": {"a": "1"}}
RIGHT, OTHER = json.dumps(ANSWER), '{"name": "F", "parameters": {"a": "2"}}'


@pytest.mark.parametrize("text, official_score, strict", [
    ("<think>t</think>\n<tool_call>\n%s\n</tool_call>" % RIGHT, 1, 1),
    ("<think>t</think><tool_call>%s</tool_call>" % RIGHT.replace("parameters", "arguments"), 0, 1),
    ("<tool_call>\n%s\n</tool_call>" % RIGHT, 1, 0),                                         # no thought
    (RIGHT, 1, 0),                                                                           # no tags at all
    ("<think>t</think>\n<tool_call>\n%s\n%s\n</tool_call>" % (OTHER, RIGHT), 1, 0),           # any of several calls
    ("<think>t</think>\n<tool_call>\nnonsense\n%s\n</tool_call>" % RIGHT, 1, 0),
    ('<think>t</think>\n<tool_call>\n{"a": "1"}\n</tool_call>', 1, 0),                       # parameters alone
    ("<think>t</think>\n<tool_call>\n%s\n</tool_call>" % json.dumps(RIGHT), 1, 0),            # JSON in a JSON string
    ("<think>t</think>\n<tool_call>\n5\n%s\n</tool_call>" % RIGHT, 0, 0),                 # the official script gives up
    ("<think>t</think><tool_call>%s</tool_call><tool_call>%s</tool_call>" % (RIGHT, OTHER), 0, 0),  # reads the last
    ("<think>t</think>\n<tool_call>\n%s\n</tool_call>" % RIGHT.replace("F", "G"), 0, 0),
    ("<think>t</think>\n<tool_call>\n%s\n</tool_call>" % OTHER, 0, 0), ("", 0, 0), ("[" * 10**5, 0, 0)])
def test_api_bank_rules(text, official_score, strict):
    row = {"category": "api_bank_1", "scoring": ANSWER, "gold": [[{"name": "F", "arguments": {"a": "1"}}]]}
    assert api_bank_official(text, ANSWER) == bool(official_score)
    assert score(row, text) == {"score": official_score, "strict": strict}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no API-Bank in {DATA}: set REST_DATA to its parent folder")
@pytest.mark.parametrize("category, n", [("api_bank_1", 399), ("api_bank_2", 67), ("api_bank_3", 131)])
def test_api_bank_gold(category, n):
    rows = benchmark_rows(category, DATA)
    assert len(rows) == n == len({row["id"] for row in rows})
    for row in rows:
        assert score(row, completion(row["gold"][0], "parameters")) == {"score": 1, "strict": 1}
        assert score(row, "") == score(row, completion([])) == {"score": 0, "strict": 0}


# --------------------------------------------------------------------------------------------------------------- driver

def small_bank(folder, n):
    """API-Bank in small: n, n + 1 and n + 2 samples. The user's text is the answer's only value, LEVEL-NUMBER."""
    folder.mkdir()
    for level in (1, 2, 3):
        answers = [{"name": "F", "parameters": {"a": f"{level}-{i}"}} for i in range(n + level - 1)]
        samples = [{"system": "s", "user": a["parameters"]["a"], "answer": a if level == 2 else [a]} for a in answers]
        (folder / f"level-{level}-api_processed.json").write_text(json.dumps(samples))
    return str(folder)


class Policy:
    """Right where the value has no 3, else wrong; stops with KeyboardInterrupt before batch number `stop`."""

    def __init__(self, stop=None):
        self.stop, self.asked, self.batches = stop, [], []

    def __call__(self, requests):
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        values = [messages[-1]["content"] for messages, tools in requests]
        self.batches.append(len(values))
        self.asked += values
        return [completion([{"name": "F", "arguments": {"a": a.replace("3", "x")}}], "parameters") for a in values]


def run(policy, out, bank, **kwargs):
    kwargs = {"header": {"model": "m"}, "batch_size": 4, "progress": False, "api_bank_dir": bank, **kwargs}
    return evaluate_benchmarks(["api-bank"], policy, out, **kwargs)


def test_interrupted_run_continues(tmp_path):
    """Stopped after k batches, the last line cut anywhere: the next run asks for what is missing and ends alike."""
    bank, rng, whole = small_bank(tmp_path / "bank", 7), random.Random(0), Policy()
    written = []  # results on disk at each request: a killed run loses no more than a batch

    def watched(requests):
        written.append((tmp_path / "whole" / "benchmarks.jsonl").read_text().count("\n") - 1)
        return whole(requests)
    results = run(watched, tmp_path / "whole", bank)
    assert len(results) == 24 == len(set(whole.asked)) and whole.batches == [4] * 6 and written == list(range(0, 24, 4))
    assert [r["score"] for r in results] == [r["strict"] for r in results] == ["x" not in r["output"] for r in results]
    assert load_results(tmp_path / "whole" / "benchmarks.jsonl")[0] == {"model": "m"}
    for k in range(6):
        with pytest.raises(KeyboardInterrupt):
            run(Policy(stop=k), tmp_path / f"{k}", bank)
        file = tmp_path / f"{k}" / "benchmarks.jsonl"
        text = file.read_text()
        file.write_text(text[:-rng.randint(1, len(text.splitlines()[-1]))])  # maybe the header's
        second, third = Policy(), Policy()
        assert run(second, tmp_path / f"{k}", bank) == results == run(third, tmp_path / f"{k}", bank)
        assert len(second.asked) == len(set(second.asked)) == 24 - max(0, 4 * k - 1) and not third.asked


def test_limits_are_nested_subsets(tmp_path):
    """A larger limit continues the run of a smaller one."""
    bank, seen = small_bank(tmp_path / "bank", 30), set()
    for limit, n in ((2, 6), (5, 15), ({"api_bank_1": 9, "api_bank_2": 9, "api_bank_3": 9}, 27), (None, 93)):
        policy = Policy()
        ids = {r["id"] for r in run(policy, tmp_path / "out", bank, limit=limit)}
        assert len(ids) == n and ids > seen and len(policy.asked) == n - len(seen)
        seen = ids


def test_other_settings_or_data_are_refused(tmp_path):
    bank, out = small_bank(tmp_path / "bank", 3), tmp_path / "out"
    run(Policy(), out, bank)
    with pytest.raises(ValueError, match=r"another evaluation \(model, tokens differ\)"):
        run(Policy(), out, bank, header={"model": "other", "tokens": 5})
    file = tmp_path / "bank" / "level-1-api_processed.json"
    file.write_text(file.read_text().replace('"s"', '"changed"', 1))
    with pytest.raises(ValueError, match=r"other benchmark data \(1 samples differ, such as api_bank_1_0\)"):
        run(Policy(), out, bank)
    (out / "benchmarks.jsonl").write_text((out / "benchmarks.jsonl").read_text().replace('"category"', "", 1))
    with pytest.raises(ValueError, match="not a file of benchmark results"):
        run(Policy(), out, bank)
    with pytest.raises(FileNotFoundError, match="level-1-api_processed.json"):
        benchmark_rows("api_bank_1", tmp_path)
    with pytest.raises(ValueError, match="unknown benchmark 'bfkl'"):
        expand(["bfkl"])
    assert expand(["api_bank_2", "api-bank"]) == ["api_bank_2", "api_bank_1", "api_bank_3"]


def test_bfcl_through_the_driver(official, tmp_path):
    """Single prompts and dialogues share batches; an oracle that looks gold up by tools and user text scores 100%."""
    gold = {}
    for row in (row for c in ("simple_python", "multi_turn_base") for row in benchmark_rows(c)):
        for turn, calls in zip(row["scoring"].get("turns", [row["messages"]]), row["gold"]):
            gold[str(row["tools"]), turn[-1]["content"]] = completion(calls)

    def oracle(requests):
        return [completion([]) if messages[-1]["role"] == "tool" else gold[str(tools), messages[-1]["content"]]
                for messages, tools in requests]
    results = evaluate_benchmarks(["simple_python", "multi_turn_base"], oracle, tmp_path, limit=20, batch_size=7,
                                  progress=False)
    assert [r["score"] for r in results] == [1] * 40
    assert table(results).splitlines()[1].split() == ["simple_python", "20", "100.0", "83.9", "to", "100.0"]


# ---------------------------------------------------------------------------------------------------- intervals, tables

def test_intervals_against_hand_computed_values():
    """Wilson: 8 and 0 of 10, known values. Paired: n = 10, 3 up, 1 down: p = 4/12, q = 2/12, centre 1/6, variance
    (1/2 - 1/36)/12 = 0.039352, half width 1.96 * 0.198373 = 0.388804. Mean of 8/10 and 0/20: shares 10/14 and 2/24,
    variance (0.0145773 + 0.0031829)/4, centre 0.398810, half width 0.130600."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-5) == [1 - x for x in wilson(10, 10)][::-1]
    pairs = [(1, 0)] * 3 + [(0, 1)] + [(1, 1)] * 4 + [(0, 0)] * 2
    assert paired_difference([pairs]) == pytest.approx((0.2, 1 / 6 - 0.388804, 1 / 6 + 0.388804), abs=1e-5)
    back = [(old, new) for new, old in pairs]
    assert paired_difference([back]) == pytest.approx((-0.2, -1 / 6 - 0.388804, -1 / 6 + 0.388804), abs=1e-5)
    assert paired_difference([pairs, [(1, 1)] * 10])[0] == pytest.approx(0.1)
    assert mean_interval([(8, 10), (0, 20)]) == pytest.approx((0.398810 - 0.130600, 0.398810 + 0.130600), abs=1e-5)


def test_intervals_cover():
    """Summed exactly over all outcomes, the 95% intervals hold the truth about 95% of the time; they are not points
    where nothing was ever seen to differ."""
    n, p, q, covered = 30, 0.2, 0.1, 0.0
    for up in range(n + 1):
        for down in range(n - up + 1):
            _, low, high = paired_difference([[(1, 0)] * up + [(0, 1)] * down + [(1, 1)] * (n - up - down)])
            weight = comb(n, up) * comb(n - up, down) * p**up * q**down * (1 - p - q) ** (n - up - down)
            covered += weight * (low <= p - q <= high)
    assert 0.94 < covered < 0.97
    rates = [sum(comb(40, k) * p**k * (1 - p) ** (40 - k) for k in range(41)
                 if wilson(k, 40)[0] <= p <= wilson(k, 40)[1]) for p in (i / 50 for i in range(1, 50))]
    assert 0.94 < sum(rates) / len(rates) < 0.97
    assert all(low < 0 < high for _, low, high in [paired_difference([[(1, 1)] * 50])])


def test_table(tmp_path):
    bank = small_bank(tmp_path / "bank", 30)
    new = run(Policy(), tmp_path / "new", bank)
    old = run(lambda requests: [""] * len(requests), tmp_path / "old", bank, limit=10)
    text = table(new, tmp_path / "old" / "benchmarks.jsonl")
    lines = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in text.splitlines()}
    whole = "api-bank, all samples"
    assert list(lines) == ["category"] + [f"api_bank_{i}{s}" for i in (1, 2, 3) for s in ("", ", strict")] + [
        whole, whole + ", strict"]
    assert lines["category"] == ["n", "%", "95%", "interval", "paired", "n", "difference", "95%", "interval"]
    right = sum(r["score"] for r in new)
    assert lines[whole][:2] == ["93", f"{100 * right / 93:.1f}"] and 40 < right < 93 and lines["api_bank_3"][1] == "0.0"
    both = [r["score"] for r in new if r["id"] in {r["id"] for r in old}]
    assert lines[whole][5:7] == ["30", f"{100 * sum(both) / 30:+.1f}"] and "difference" not in table(new)
    with pytest.raises(ValueError, match="other benchmark data"):
        table(new, [{**old[0], "data": "x"}])
    five = [{"category": c, "id": f"{c}{i}", "score": int(i < k), "data": ""}  # 0 of 1, 1 of 4, 2 of 8, …
            for k, c in enumerate(GROUPS["bfcl"]) for i in range(4 * k or 1)]
    assert table(five).splitlines()[-1].split()[:6] == ["bfcl,", "mean", "of", "5", "41", "20.0"]
