"""The task generators: every gold call is valid, executable and copyable, splits are disjoint, masks
and histories are true."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toy_tools import tasks, tools
from toy_tools.schema import TYPES
from toy_tools.tasks import (CATEGORIES, completion_text, decompose, from_dataset, make_rows, to_dataset,
                             toolbox_for)
from toy_tools.tools import LANGUAGES, RATES, TOOLS, UNITS

N = 1500
ROWS = {(split, mask): make_rows(N, split, seed=11, mask_names=mask)
        for split in ("train", "test") for mask in (False, True)}
ALL = [row for rows in ROWS.values() for row in rows]
# words and numbers that both splits use; their pairs are held out
SHARED = {"source", "target", "language", "value", "amount", "days", "people"}


def request_of(row):
    return row["messages"][0]["content"]


def calls_of(row):
    return [call for turn in row["gold"] for call in turn]


def strings(value):
    """Every string in a nested value, dict keys included."""
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in [k, *strings(v)]]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


PAIRS = (
    (tasks.FIRST, tasks.LAST), (tasks.AREA, tasks.CITY), (tasks.COLOUR, tasks.THING),
    (tasks.KIND, tasks.HOUSE), (tasks.KIND, tasks.CROWD), (tasks.KIND, tasks.TRADE),
    (tasks.SAY, tasks.WHEN))
ENTITY = re.compile("|".join([
    r"[a-z]+@[a-z]+\.com",
    *(rf"\b(?:{'|'.join(a)}) (?:{'|'.join(b)})\b" for a, b in PAIRS),
    r"\b[A-H]?\d[\d +*/-]*(?<! )",
    *(rf"\b{word}\b" for word in sorted([*LANGUAGES, *UNITS], key=len, reverse=True))]))


def phrasing(text):
    """The user's text with all entities cut out: the template it came from. Works without knowing the
    generator's choice."""
    text = re.sub(rf"^({'|'.join(filter(None, tasks.GREETINGS))})", "", text)
    # "_ in _ please" is said of units and of currencies
    text = re.sub(rf"\b({'|'.join(RATES)})\b", "$", text)
    return re.sub(r"_[_ ()]*_|\(?_\)?", "_", ENTITY.sub("_", text))


SIMPLE = [row for split in ("train", "test")
          for row in make_rows(3000, split, seed=1, categories=["simple"])]
TEMPLATE_TOOL = {phrasing(request_of(row)): row["gold"][0][0]["name"] for row in SIMPLE}
# one phrasing belongs to one tool
assert len(TEMPLATE_TOOL) == sum(len(tool.train) + 1 for tool in TOOLS.values())


def test_rows_have_the_promised_shape():
    offered = {"simple": (1, 2), "multiple": (3, 4), "parallel": (2,), "irrelevance": (1, 2, 3),
               "multi_turn": (2, 3)}
    calls = {"simple": [[1]], "multiple": [[1]], "parallel": [[2], [3]], "irrelevance": [[0]],
             "multi_turn": [[1, 1, 0]]}
    for row in ALL:
        assert set(row) == {"messages", "tools", "gold", "category", "state", "demo"}
        assert [m["role"] for m in row["messages"]] == ["user"]
        assert len(row["gold"]) == len(row["demo"])
        assert [len(turn) for turn in row["gold"]] in calls[row["category"]]
        names = [tool["function"]["name"] for tool in row["tools"]]
        assert len(set(names)) == len(names) in offered[row["category"]]
        for turn, demo in zip(row["gold"], row["demo"]):
            assert 4 <= len(demo["think"].split()) <= 30
            assert not set("<{") & set(demo["think"])
            assert (demo["response"] is None) == bool(turn)  # a turn calls or answers
            assert len({json.dumps(call) for call in turn}) == len(turn)
    for rows in ROWS.values():
        assert [row["category"] for row in rows[:5]] == list(CATEGORIES)
    assert len({request_of(row) for row in ROWS["train", False]}) > 0.9 * N  # hardly two alike


def test_gold_fits_the_schemas():
    """An independent check: known tool, exactly the required arguments, types, enum."""
    for row in ALL:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        for call in calls_of(row):
            schema = schemas[call["name"]]
            assert set(call["arguments"]) == set(schema["required"]) == set(schema["properties"])
            for name, value in call["arguments"].items():
                kind = schema["properties"][name]
                assert isinstance(value, TYPES[kind["type"]]) and value in kind.get("enum", [value])


def test_arguments_stand_in_the_text_or_in_an_earlier_result():
    """What the policy has to write can be copied, character by character; in multi-turn rows the second
    call needs the first one's result."""
    needed = 0
    for row in ALL:
        for k, step in enumerate(decompose(row)):
            seen = " ".join(m["content"] for m in step["messages"] if m["role"] != "assistant")
            for call in step["gold"][0]:
                values = [str(v) for v in call["arguments"].values()]
                assert all(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", seen) for v in values), (seen, call)
                if k == 1:
                    needed += 1
                    unsaid = [v for v in values if v not in request_of(row)]
                    assert any(v in step["messages"][-1]["content"] for v in unsaid)
    assert needed == len([row for row in ALL if row["category"] == "multi_turn"]) > 0


def test_histories_are_the_gold_turns_with_the_real_results():
    for row in ALL:
        steps = decompose(row)
        box = toolbox_for(row)
        history = list(row["messages"])
        assert len(steps) == len(row["gold"])
        for step, turn, demo in zip(steps, row["gold"], row["demo"]):
            assert step["gold"] == [turn] and step["demo"] == [demo] and step["messages"] == history
            assert all(step[key] == row[key] for key in ("tools", "category", "state"))
            text = completion_text(turn, demo["think"], demo["response"])
            history.append({"role": "assistant", "content": text})
            for call in turn:
                result = box.functions[call["name"]](**call["arguments"])
                assert result is not None and result != ""
                text = result if isinstance(result, str) else json.dumps(result)
                history.append({"role": "tool", "content": text})
        assert [m["role"] for m in row["messages"]] == ["user"]  # decompose left its argument alone


def test_final_answers_use_the_last_result():
    def told(name, arguments, result):
        """What the answer has to say of the last call."""
        if name == "get_weather":
            return [str(value) for value in json.loads(result).values()]
        if name == "get_weekday":
            return [arguments["date"], result]
        key = {"add_reminder": "date", "send_message": "to", "cancel_booking": "code"}.get(name)
        return [arguments[key]] if key else [result]
    for row in ROWS["train", False] + ROWS["test", False]:
        if row["category"] == "multi_turn":
            call = row["gold"][1][0]
            answer = row["demo"][-1]["response"]
            result = decompose(row)[-1]["messages"][-1]["content"]
            parts = told(call["name"], call["arguments"], result)
            assert all(part in answer for part in parts), (answer, result)


def test_in_irrelevance_rows_no_offered_tool_fits():
    """The request's phrasing tells which tool it was written for; neither that one is offered nor one
    that could do its work."""
    seen = set()
    for row in ROWS["train", False] + ROWS["test", False]:
        if row["category"] == "irrelevance":
            wanted = TEMPLATE_TOOL[phrasing(request_of(row))]
            offered = {tool["function"]["name"] for tool in row["tools"]}
            assert wanted not in offered and not offered & set(TOOLS[wanted].stand_ins)
            seen.add(wanted)
    assert seen == set(TOOLS)


def test_splits_share_no_text_no_phrasing_no_entity():
    train = ROWS["train", False]
    test = ROWS["test", False]
    phrasings = [{phrasing(request_of(row)) for row in rows} for rows in (train, test)]
    assert min(map(len, phrasings)) >= 20 and not phrasings[0] & phrasings[1]
    texts = [{request_of(row) for row in make_rows(6000, split, seed=0)} for split in ("train", "test")]
    assert not texts[0] & texts[1]
    entities = []
    for rows in (train, test):
        found = {}
        for row in rows:
            for turn in row["gold"][:1]:  # later turns use results of tools
                for call in turn:
                    arguments = dict(call["arguments"])
                    if "source" in arguments:
                        amount = arguments.get("amount", arguments.get("value"))
                        arguments["amount of"] = (amount, arguments["source"])
                    if "expression" in arguments:
                        arguments["expression"] = tuple(re.findall(r"\d+", arguments["expression"]))
                    for name, value in arguments.items():
                        found.setdefault(name, set()).add(value)
        entities.append(found)
    assert set(entities[0]) == set(entities[1]) and len(entities[0]) > 12
    assert "amount of" in entities[0]
    for name in set(entities[0]) - SHARED:
        assert not entities[0][name] & entities[1][name], name
    both = [{word for value in found["name"] | found["city"] for word in value.split()} for found in entities]
    assert len(both[0] & both[1]) > 0.9 * len(both[0] | both[1])  # pairs are held out, their words are not
    cities = [{contact["city"] for row in rows for contact in row["state"].get("contacts", {}).values()}
              for rows in (train, test)]
    assert min(map(len, cities)) >= 10 and not cities[0] & cities[1]
    for tool in TOOLS.values():
        assert tool.test and len(tool.train) > 1 and tool.test not in tool.train


def test_the_same_in_every_process():
    """String hashes differ between the two processes; rows must not."""
    code = """
import hashlib, json
from toy_tools.tasks import *
rows = [make_rows(200, split, 3, mask_names=mask) for mask in (0, 1) for split in ('train', 'test')]
steps = [[decompose(row) for row in part] for part in rows]
print(hashlib.sha256(json.dumps(steps).encode()).hexdigest(), hash('a'))
"""

    def printed(seed):
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                              env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True)
        return done.stdout.split()
    (rows, word), (again, other) = printed("1"), printed("2")
    assert rows == again and word != other
    assert make_rows(50, seed=1) == make_rows(50, seed=1) != make_rows(50, seed=2)
    assert make_rows(50, seed=1)[:20] == make_rows(20, seed=1)


def test_masking_hides_every_real_name_and_keeps_the_rest():
    masked = 0
    for split in ("train", "test"):
        for plain, row in zip(ROWS[split, False], ROWS[split, True]):
            aliases = row["state"]["aliases"]
            masks = [*aliases, *(mask for _, params in aliases.values() for mask in params)]
            assert len(set(masks)) == len(masks)
            assert row["messages"] == plain["messages"] and row["category"] == plain["category"]
            for tool, real in zip(row["tools"], plain["tools"]):
                tool = tool["function"]
                real = real["function"]
                name, params = aliases[tool["name"]]
                assert name == real["name"] and tool["description"] == real["description"]
                shown = tool["parameters"]["properties"]
                properties = real["parameters"]["properties"]
                assert {params[mask]: part for mask, part in shown.items()} == properties
                hidden = {real["name"], *properties}
                assert not hidden & {tool["name"], *shown, *tool["parameters"]["required"]}
                for turn in row["demo"]:
                    masked += 1
                    text = turn["think"] + (turn["response"] or "")
                    assert not re.search(rf"\b{real['name']}\b", text), turn

            def unmasked(call):
                name, params = aliases[call["name"]]
                arguments = {params[mask]: value for mask, value in call["arguments"].items()}
                return {"name": name, "arguments": arguments}
            assert [list(map(unmasked, turn)) for turn in row["gold"]] == plain["gold"]
            results, expected = ([step["messages"][-1]["content"] for step in decompose(x)]
                                 for x in (row, plain))
            assert results == expected
    assert masked > N


def test_masking_leaves_its_argument_alone():
    row = make_rows(1, seed=4, categories=["multi_turn"])[0]
    before = json.dumps(row)
    assert json.dumps(tasks.masked(row, random.Random(0))) != before == json.dumps(row)
    assert not toolbox_for({**row, "state": None}).state  # rows without a state have an empty one


def test_completion_text():
    calls = [{"name": "f", "arguments": {"x": 1, "s": "é\n"}}, {"name": "g", "arguments": {}}]
    text = completion_text(calls, "a thought")
    assert text.startswith("<think>a thought</think>\n<tool_call>\n") and text.endswith("\n</tool_call>")
    assert [json.loads(line) for line in text.split("\n")[2:-1]] == calls
    assert completion_text([], "t", "r") == "<think>t</think>\n<response>r</response>"
    assert completion_text(calls[1:], "t", "") == (
        '<think>t</think>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n<response></response>')


def test_dataset_round_trip_is_exact():
    """Arrow alone would give each call the arguments of all others, as None, and turn 1 into 1.0."""
    rows = ROWS["train", False][:100] + ROWS["test", True][:100]
    rows += [step for row in ROWS["train", False][:20] for step in decompose(row)]
    arguments = {"a": 1, "b": 1.0, "c": None, "d": [True, {}], "e": ""}
    gold = [[{"name": "é", "arguments": arguments}]]
    rows.append({**rows[0], "state": None, "tools": [], "gold": gold})
    back = from_dataset(to_dataset(rows))
    assert json.dumps(back) == json.dumps(rows)


@pytest.mark.parametrize("arguments, word", [
    ({"split": "dev"}, "dev"),
    ({"categories": ["simple", "hard"]}, "hard"),
    ({"categories": []}, "categories")])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        make_rows(3, **arguments)


def test_a_new_tool_is_one_row_of_one_table(monkeypatch):
    """With an array, an object and an optional parameter: its tasks, schema and box follow from the
    row; an entry that was forgotten is named."""
    def pack(things, label=None):
        return {"packed": len(things), "label": label and label["text"]}
    label = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    row = dict(name="pack", description="packs things", function=pack, what="parcel",
               parameters={"things": {"type": "array", "items": {"type": "string"}}, "label": label},
               arguments=lambda draw: {"things": [draw.thing(), draw.thing()]},
               train=("pack {things}", "box {things}"), test="please pack {things}",
               optional=("label",))
    monkeypatch.setitem(TOOLS, "pack", tools.Tool(**row))
    rows = make_rows(200, "train", categories=["simple"])
    found = [row for row in rows if row["gold"][0][0]["name"] == "pack"]
    offered = [tool["function"] for row in found for tool in row["tools"]]
    offered = [function for function in offered if function["name"] == "pack"]
    assert found and all(function["parameters"]["required"] == ["things"] for function in offered)
    call = tools.ToolBox().functions["pack"]
    assert call(things=["a", "b"]) == {"packed": 2, "label": None}
    assert call(things=["a"], label={"text": "x"}) == {"packed": 1, "label": "x"}
    for bad in ({}, {"things": "a"}, {"things": [1]}, {"things": [], "label": {}},
                {"things": [], "label": "x"}):
        with pytest.raises(ValueError):
            call(**bad)
    del row["test"]
    with pytest.raises(TypeError, match="'test'"):
        tools.Tool(**row)
