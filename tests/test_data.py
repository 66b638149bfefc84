"""Loaders of training data: both families of layouts, SWiRL decomposition, and malformed rows that are
named."""

import copy
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import CALL, ROW

import rest
from toy_tools import data, tasks
from toy_tools.data import load_rows, write_jsonl

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDER = Path(os.environ.get("REST_DATA") or SHARED) / "rlla"
real_data = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no ToolRL data in {FOLDER}: set REST_DATA to its parent")
TEXT = CALL.replace("arguments", "parameters")
RLLA = {"system": "Tools: add", "user": "1+2?", "ground_truth": TEXT}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def example():
    """The example row of the module's text, so that the documentation cannot be wrong."""
    return json.loads(re.search(r"^    \{.*?\}\n\n", data.__doc__, re.S | re.M)[0])


def test_documented_row_becomes_one_sample_per_turn(tmp_path):
    first, second = load_rows(write(tmp_path / "a.jsonl", example()))
    assert first["gold"] == [[{"name": "find_train", "arguments": {"start": "Bern", "end": "Chur"}}]]
    assert second["gold"] == [[]] and first["category"] == second["category"] == "trains"
    assert [m["role"] for m in first["messages"]] == ["user"]
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2]["content"] == "IC 3, 61 francs"
    # the earlier gold turn in the completion format, worth the full reward
    history = second["messages"][1]["content"]
    assert rest.score_texts([history], first) == (1.0, 1.0, True) and "I need a train." in history
    for row in (first, second):
        demo = tasks.completion_text(row["gold"][0], row["demo"][0]["think"], row["demo"][0]["response"])
        assert rest.score_texts([demo], row)[2]


def test_history_shows_demonstrations_whole(tmp_path):
    """What a demonstration says beside its calls stands in the history of the next step; without a
    demonstration no empty thought is made up."""
    row = {**ROW, "gold": [*ROW["gold"], []], "observations": [["3"]]}
    said = [{"think": "sum", "response": "One moment."}, {"think": "done", "response": "3"}]
    for demo, kinds in ((said, ["think", "tool_call", "response"]), (None, ["tool_call"])):
        step = load_rows(write(tmp_path / "a.jsonl", {**row, "demo": demo}))[1]
        text = step["messages"][1]["content"]
        assert [block.kind for block in rest.split_blocks(text)] == kinds
        assert ("One moment." in text) == ("sum" in text) == bool(demo)


def test_decomposition_sees_exactly_the_history(tmp_path):
    """Random dialogues of K turns give K samples; sample k's messages are sample k-1's, its gold turn,
    its results."""
    rng = random.Random(0)

    def some_calls():
        return [{"name": "add", "arguments": {"a": rng.randrange(9), "b": i}}
                for i in range(rng.randint(1, 3))]
    for trial in range(30):
        turns = [some_calls() for _ in range(rng.randint(1, 5))] + [[]] * rng.randint(0, 1)
        seen = [[f"{trial}-{k}-{i}" for i in range(len(turn))] for k, turn in enumerate(turns)][:-1]
        rows = load_rows(write(tmp_path / "a.jsonl", {**ROW, "gold": turns, "observations": seen}))
        assert [row["gold"] for row in rows] == [[turn] for turn in turns]
        messages = list(ROW["messages"])
        for k, row in enumerate(rows):
            assert row["messages"] == messages
            if k < len(seen):
                messages.append(rows[k + 1]["messages"][len(messages)])
                assert rest.parse_calls(messages[-1]["content"]) == [rest.Call(**call) for call in turns[k]]
                messages += [{"role": "tool", "content": text} for text in seen[k]]


def test_all_rlla_layouts_give_the_same_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    chat = [{"role": "system", "content": RLLA["system"]}, {"role": "user", "content": RLLA["user"]}]
    record = {"prompt": chat, "reward_model": {"style": "rule", "ground_truth": TEXT}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    sft = dict(zip(("instruction", "input", "output"), RLLA.values()))
    files = (tmp_path / "a.parquet",
             write(tmp_path / "a.jsonl", RLLA, ""),
             write(tmp_path / "a.json", json.dumps([RLLA])),
             write(tmp_path / "b.json", json.dumps([sft])))
    for file in files:
        assert load_rows(file) == [{"messages": chat, "tools": [], "gold": ROW["gold"], "category": "1 call",
                                    "state": None, "target": TEXT, "blocks": [["think", "tool_call"]]}]


def test_response_only_and_mixed_answers(tmp_path):
    """The format reward asks for the blocks that the gold answer has; tags in thoughts are none, call
    blocks one."""
    only = "<think>no <tool_call></think>\n<response>no</response>"
    block = TEXT[TEXT.index("<tool_call>"):]
    both = TEXT + "\n<response>wait</response>"
    texts = only, both, TEXT + block
    rows = load_rows(write(tmp_path / "a.jsonl", *({**RLLA, "ground_truth": text} for text in texts)))
    assert rows[0]["gold"] == [[]] and rows[0]["blocks"] == [["think", "response"]]
    assert rows[1]["gold"] == ROW["gold"] and rows[1]["blocks"] == [["think", "tool_call", "response"]]
    assert rows[2]["gold"] == [ROW["gold"][0] * 2] and rows[2]["blocks"] == [["think", "tool_call"]]
    assert rest.score_texts([both], rows[1])[2] and not rest.score_texts([TEXT], rows[1])[2]


def test_written_rows_come_back(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", example())) + load_rows(write(tmp_path / "b.jsonl", RLLA))
    # U+2028 ends a line of text, but not a JSON line
    rows += [{**ROW, "category": "é\u2028", "state": {"a": [1]}}]
    before = copy.deepcopy(rows)
    write_jsonl(rows, tmp_path / "c.jsonl")
    assert load_rows(tmp_path / "c.jsonl") == rows == before


def test_folder_through_datasets(tmp_path, monkeypatch):
    """A folder goes through datasets.load_dataset, as a hub id does; nested columns stand there as JSON
    strings."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**ROW, "demo": [{"think": str(i), "response": None}]} for i in range(3)]
    (tmp_path / "set").mkdir()
    tasks.to_dataset(rows).to_parquet(tmp_path / "set" / "train.parquet")
    assert load_rows(tmp_path / "set") == rows
    with pytest.raises(ValueError, match="loading it as a data set failed"):
        load_rows(tmp_path / "set", split="nonsense")


@pytest.mark.parametrize("bad, reason", [
    ("{", "not valid JSON"), ('{"a": NaN}', "not valid JSON"), ("[" * 10**5, "not valid JSON"),
    ({"messages": ROW["messages"]}, "not a JSON object with messages, gold"),
    ({**ROW, "messages": []}, "last message"),
    ({**ROW, "messages": [{"role": "assistant", "content": "x"}]}, "last message"),
    ({**ROW, "messages": 3}, "must be a list"),
    ({**ROW, "demo": [{}, {}]}, "2 turns"),
    ({**ROW, "messages": [{"role": "robot", "content": "x"}]}, "role system, user"),
    ({**ROW, "gold": []}, "of turns"),
    ({**ROW, "gold": [[{"name": "add"}]]}, "name and an object of arguments"),
    ({**ROW, "tools": [{}]}, "only the name is needed"),
    ({**ROW, "gold": [[{"name": "sub", "arguments": {}}]]}, "'sub', which is not among the tools (add)"),
    ({**ROW, "gold": ROW["gold"] * 2}, "give observations for the first 1"),
    ({**ROW, "gold": ROW["gold"] * 2, "observations": [["3", "4"]]}, "1 calls, 2 observations"),
    ({**ROW, "gold": [[], []], "observations": [[]]}, "must call something"),
    ({**ROW, "gold": ROW["gold"] * 2, "observations": [[3]]}, "must be texts"),
    ({**ROW, "gold": [3]}, "list of turns"), ({**ROW, "gold": [[3]]}, "must be an object"),
    ({**ROW, "state": float("inf")}, "not valid JSON"),
    ({**ROW, "demo": [{"think": 3}]}, "must be texts"),
    ({**ROW, "demo": [{"thought": "x"}]}, "'thought', which is not understood"),
    ({**ROW, "category": 3}, "category must be a text"),
    ({**ROW, "target": ["x"]}, "target must be a text"),
    ({**ROW, "gold": ROW["gold"] * 2, "observations": [["3"]], "target": "x"}, "use demo"),
    ({**ROW, "blocks": [["think", "response"]]}, "have no tool_call"),
    ({**ROW, "blocks": [["thnk"]]}, "a list of think"),
    ({**ROW, "gold": [[{"name": "add", "arguments": {"a": 1, "b": 2}, "parameters": {}}]]},
     "name and an object of arguments"),
    ({**ROW, "blocks": [["think", "tool_call"], []]}, "blocks has 2 turns"),
    ({**ROW, "gold": "[[}"}, "gold: a text here must be JSON"),
    ({**ROW, "blocks": [[]]}, "a list of think"), ({**ROW, "blocks": [3]}, "a list of think"),
    ({**ROW, "demo": 3}, "structure"), (3, "not a JSON object")])
def test_malformed_rows_are_named(tmp_path, capsys, bad, reason):
    file = write(tmp_path / "a.jsonl", ROW, "", bad, ROW)  # the empty line counts as a line, not as a row
    with pytest.raises(ValueError, match="1 of 3 rows are malformed:\n  line 3: .*" + re.escape(reason)):
        load_rows(file)
    assert len(load_rows(file, on_error="skip")) == 2
    shown = capsys.readouterr().out
    assert "line 3: " in shown and reason in shown and "skipped 1 malformed rows of 3" in shown


@pytest.mark.parametrize("text, reason", [
    ("plain", "neither"), ("<think>x</think><tool_call>{</tool_call>", "unreadable call"),
    ("<think>x</think><response>y", "does not close"), (None, "must be a text")])
def test_malformed_answers_are_named(tmp_path, text, reason):
    with pytest.raises(ValueError, match="line 2: .*" + reason):
        load_rows(write(tmp_path / "a.jsonl", RLLA, {**RLLA, "ground_truth": text}))


def test_files_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)8 of 9 rows .*line 2: .*line 6: .*and 3 more") as error:
        load_rows(write(tmp_path / "a.jsonl", ROW, *["{"] * 8))
    assert "line 7" not in str(error.value)
    expected = "Columns found: answer, question. Expected one of: messages, gold; prompt, "
    with pytest.raises(ValueError, match=expected):
        load_rows(write(tmp_path / "b.jsonl", {"question": 1, "answer": 2}))
    empty = {"c.jsonl": "no readable row", "c.csv": "type '.csv'", "c.json": "one JSON list"}
    for name, reason in empty.items():
        with pytest.raises(ValueError, match=reason):
            load_rows(write(tmp_path / name, ""))
    with pytest.raises(FileNotFoundError, match="no such"):
        load_rows(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="on_error"):
        load_rows(tmp_path / "a.jsonl", on_error="ignore")


@real_data
@pytest.mark.parametrize("file, calls, responses", [
    ("test.parquet", [36, 23, 8, 3, 1], 9),
    ("test80.jsonl", [36, 23, 8, 3, 1], 9),
    ("rlla_sft.json", [187, 109, 33, 13, 4], 54),
    ("train399_placeholder_thoughts.jsonl", [186, 109, 33, 13, 4], 54)])
def test_real_rows_and_the_reward_of_their_gold_answers(file, calls, responses):
    """Every gold answer is exact and has the highest static reward: 4 with calls, 1 (for the format)
    without."""
    rows = load_rows(FOLDER / file)
    assert Counter(len(row["gold"][0]) for row in rows) == dict(enumerate([responses, *calls]))
    for row in rows:
        form, correct, exact = rest.score_texts([row["target"]], row)
        assert exact and rest.episode_reward(form, correct, 0.0, "static") == (4.0 if row["gold"][0] else 1.0)


@real_data
def test_thoughts_that_mention_tags_are_parsed_right():
    """17 supervised answers mention tags in the thought; what stands behind </think>, read by other
    means, agrees."""
    rows = [row for row in load_rows(FOLDER / "rlla_sft.json")
            if re.search("<(tool_call|response)>", row["target"].split("</think>")[0])]
    assert len(rows) == 17
    for row in rows:
        blocks = re.findall(r"<tool_call>(.*?)</tool_call>", row["target"].split("</think>", 1)[1], re.S)
        want = [json.loads(line) for block in blocks for line in block.strip().splitlines()]
        assert row["gold"][0] == [{"name": call["name"], "arguments": call["parameters"]} for call in want]


# --------------------------------------------------------------------- OpenAI's dialogues and tools

def openai_call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def load(tmp_path, row, **kwargs):
    return load_rows(write(tmp_path / "a.jsonl", row), **kwargs)


def history(tmp_path, *messages):
    """The messages that the policy will see of a row with this dialogue."""
    row, = load(tmp_path, {"messages": list(messages), "gold": [[]]})
    return row["messages"]


USER, DONE = {"role": "user", "content": "1+2, 3+4?"}, {"role": "user", "content": "Thanks"}
ADD12, ADD34 = {"a": 1, "b": 2}, {"a": 3, "b": 4}


@pytest.mark.parametrize("content",
                         [None, "", [], "Let me see.",
                          [{"type": "text", "text": "Let me"}, {"type": "text", "text": "see."}]])
@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "two sums"}])
def test_calls_of_the_history_are_not_lost(tmp_path, content, thought):
    """tool_calls, their arguments as JSON text or object, become calls that the project's own parser
    reads; what is said or thought beside them stays. (They were thrown away, and a turn of calls alone
    was refused.)"""
    turn = {"role": "assistant", "content": content, "refusal": None, "annotations": [], **thought,
            "tool_calls": [openai_call("c1", "add", json.dumps(ADD12)), openai_call("c2", "add", ADD34)]}
    seen = history(tmp_path, USER, turn, {"role": "tool", "tool_call_id": "c1", "content": "3"},
                   {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "7"}]})
    assert [m["role"] for m in seen] == ["user", "assistant", "tool", "tool"]
    assert all(set(m) == {"role", "content"} for m in seen)
    assert [m["content"] for m in seen[2:]] == ["3", "7"]
    text = seen[1]["content"]
    assert rest.parse_calls(text) == [rest.Call("add", ADD12), rest.Call("add", ADD34)]
    kinds = ["think"] * bool(thought) + ["tool_call"] + ["response"] * bool(content)
    assert [block.kind for block in rest.split_blocks(text)] == kinds
    assert ("two sums" in text) == bool(thought)
    if content:
        assert "Let me" in text and "see." in text


def test_assistants_texts_stay(tmp_path):
    """Plain answers, and turns that are in the completion format already, are not rewritten; calls
    beside them follow."""
    for text in ("It is 3.", CALL, ""):
        assert history(tmp_path, USER, {"role": "assistant", "content": text}, DONE)[1]["content"] == text
    turn = {"role": "assistant", "content": "<think>sum</think>",
            "tool_calls": [openai_call("c", "add", ADD12)]}
    text = history(tmp_path, USER, turn, {"role": "tool", "content": "3"})[1]["content"]
    assert text == "\n".join(["<think>sum</think>", "<tool_call>", json.dumps(ROW["gold"][0][0]),
                              "</tool_call>"])
    text = history(tmp_path, USER, {"role": "assistant", "content": "3", "reasoning_content": "sum"},
                   DONE)[1]["content"]
    assert text == "<think>sum</think>\n<response>3</response>"
    old = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": ""}}
    seen = history(tmp_path, {"role": "developer", "content": "Be brief."}, USER, old,
                   {"role": "function", "name": "now", "content": "8:00"})
    assert [m["role"] for m in seen] == ["system", "user", "assistant", "tool"]
    assert rest.parse_calls(seen[2]["content"]) == [rest.Call("now", {})]


@pytest.mark.parametrize("answers, order", [
    ([{}, {}, {}], "012"),
    ([{"tool_call_id": "c3"}, {"tool_call_id": "c1"}, {"tool_call_id": "c2"}], "120"),
    ([{"name": "now"}, {"name": "add"}, {"name": "add"}], "120"),
    ([{}, {"tool_call_id": "c1"}, {"name": "now"}], "102"),
    ([{"name": "add", "tool_call_id": "c2"}, {"name": "add"}, {"tool_call_id": "c3"}], "102")])
def test_answers_follow_the_order_of_the_calls(tmp_path, answers, order):
    """Templates show a tool's answer without its id, so the order alone says what it answers."""
    turn = {"role": "assistant",
            "tool_calls": [openai_call("c1", "add", ADD12), openai_call("c2", "add", ADD34),
                           openai_call("c3", "now", {})]}
    tools = [{"role": "tool", "content": str(i), **answer} for i, answer in enumerate(answers)]
    assert [m["content"] for m in history(tmp_path, USER, turn, *tools)[2:]] == list(order)
    # the same ids in the next turn are those of its own calls
    seen = history(tmp_path, USER, turn, *tools, turn, *tools, DONE)
    assert [m["content"] for m in seen if m["role"] == "tool"] == list(order) * 2


def test_answers_to_calls_that_stand_in_a_text(tmp_path):
    """Where the calls are text already, names still order the answers; without names all stay as they are."""
    text = completion([("add", ADD12), ("now", {})])
    turn = {"role": "assistant", "content": text}
    named = [{"role": "tool", "content": "8:00", "name": "now"},
             {"role": "tool", "content": "3", "name": "add"}]
    assert [m["content"] for m in history(tmp_path, USER, turn, *named)[1:]] == [text, "3", "8:00"]
    answer = {"role": "tool", "content": "3 and 8:00"}
    assert history(tmp_path, USER, turn, answer)[2:] == [answer]
    with pytest.raises(ValueError, match="'c9', which is not open: the calls before it are add, now"):
        history(tmp_path, USER, turn, {"role": "tool", "content": "3", "tool_call_id": "c9"})


def completion(calls):
    calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return tasks.completion_text(calls, "t")


TURN = {"role": "assistant",
        "tool_calls": [openai_call("c1", "add", ADD12), openai_call("c2", "now", {})]}
FIRST = {"role": "tool", "content": "3", "tool_call_id": "c1"}
SECOND = {"role": "tool", "content": "8", "tool_call_id": "c2"}


@pytest.mark.parametrize("messages, reason", [
    ([USER, TURN, FIRST, {**SECOND, "tool_call_id": "c9"}],
     "message 4 (tool) answers 'c9', which is not open: the calls before it are c1, c2"),
    ([USER, TURN, FIRST, {**FIRST}], "answers 'c1', which is not open"),
    ([USER, TURN, FIRST], "call of 'now' has no answer"),
    ([USER, TURN, DONE], "call of 'add' has no answer"),
    ([USER, TURN, FIRST, SECOND, FIRST], "message 5"),
    ([USER, TURN, {**FIRST, "name": "now"}, SECOND], "which is not open"), ([USER, FIRST], "are none"),
    ([USER, {"role": "tool", "content": "3", "name": "add"}], "are none"), ([USER, TURN], "last message"),
    ([USER, TURN, FIRST, SECOND, DONE, FIRST],
     "message 6 (tool) answers 'c1', which is not open: the calls before it are none"),
    ([USER, {"role": "assistant", "tool_calls": [
        {"function": {"name": "now", "arguments": "{}", "output": "8"}}]}, SECOND], "'output'"),
    ([USER, {"role": "system", "content": "x"}], "last message"), ([3], "message 1 must be"),
    ([{"role": "user", "content": None}], "a text, or parts of type text"),
    ([{"role": "user"}], "a text, or parts"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "'image_url', which is not understood"),
    ([{"role": "user", "content": [{"type": "image"}]}], "parts of type text"),
    ([{"role": "user", "content": {"text": "x"}}], "a text, or"),
    ([{"role": "user", "content": ["x"]}], "a part of message 1 (user) must be an object"),
    ([{**USER, "name": "Ana"}], "'name', which is not understood"),
    ([{**USER, "images": ["x.png"]}], "'images'"),
    ([USER, {"role": "assistant", "content": "x", "audio": {"id": "a"}}, DONE],
     "message 2 (assistant) has 'audio'"),
    ([USER, {"role": "assistant", "content": "x", "weight": 0}, DONE], "'weight'"),
    ([USER, {"role": "assistant", "content": None}, DONE], "a text"),
    ([USER, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "x"}}]}, DONE],
     "'custom'"),
    ([USER, {"role": "assistant", "tool_calls": [openai_call("c", "add", "{")]}, DONE],
     "the arguments of call 1 of message 2 (assistant): a text here must be JSON"),
    ([USER, {"role": "assistant", "tool_calls": [openai_call("c", "add", "[1]")]}, DONE],
     "needs a name and an object"),
    ([USER, {"role": "assistant", "tool_calls": [openai_call("c", "add", '{"a": 1, "a": 2}')]}, DONE],
     "the key 'a' stands twice")])
def test_dialogues_that_are_not_understood_are_refused(tmp_path, messages, reason):
    with pytest.raises(ValueError, match="line 2: .*" + re.escape(reason)):
        load_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "messages": messages}))


@pytest.mark.parametrize("form", ["arguments", "parameters", "openai", "openai text", "text"])
def test_gold_calls_in_every_form(tmp_path, form):
    call = {"arguments": {"name": "add", "arguments": ADD12},
            "parameters": {"name": "add", "parameters": ADD12, "arguments": None},
            "openai": openai_call("c", "add", ADD12),
            "openai text": openai_call("c", "add", json.dumps(ADD12)),
            "text": {"name": "add", "arguments": json.dumps(ADD12)}}[form]
    row, = load(tmp_path, {**ROW, "gold": [[call]]})
    assert row["gold"] == ROW["gold"] and rest.score_texts([CALL], row)[2]


FUNCTION = ROW["tools"][0]["function"]


@pytest.mark.parametrize("tool", [
    {"type": "function", "function": {"name": "f"}}, {"function": {"name": "f"}}, {"name": "f"},
    {"type": "function", "name": "f"},
    {"name": "f", "description": None, "parameters": None, "strict": True},
    {"type": None, "function": {"name": "f"}, "strict": True}])
def test_every_optional_key_of_a_tool_may_be_missing(tmp_path, tool, tokenizer):
    """What is missing is filled in, so that templates which read it do not break; the rest is kept."""
    rows = load_rows(write(tmp_path / "a.jsonl",
                           {**ROW, "tools": [tool], "gold": [[{"name": "f", "arguments": {}}]]},
                           {**ROW, "tools": [FUNCTION]}, {**ROW, "tools": [{"function": FUNCTION}]}))
    filled = rows[0]["tools"][0]
    strict = [key for key in ("strict",) if tool.get(key)]
    assert filled["type"] == "function" and filled["function"]["name"] == "f"
    assert filled["function"]["description"] == ""
    assert filled["function"]["parameters"] == {"type": "object", "properties": {}}
    assert all(filled.get(key) or filled["function"].get(key) for key in strict)
    assert rows[1]["tools"] == rows[2]["tools"] == ROW["tools"]
    assert "f(): " in tokenizer.apply_chat_template(rows[0]["messages"], tools=rows[0]["tools"],
                                                    tokenize=False)
    with pytest.raises(ValueError, match="unexpected argument a"):  # a tool without parameters takes none
        load(tmp_path, {**ROW, "tools": [tool], "gold": [[{"name": "f", "arguments": {"a": 1}}]]})


@pytest.mark.parametrize("tools, reason", [
    ([{"name": 3}], "tool 1"), ([FUNCTION, {"type": "web_search"}], "tool 2"),
    ([{**FUNCTION, "type": "custom"}], "tool 1"), (["add"], "tool 1"),
    ({"add": FUNCTION}, "tools must be a list"),
    ([FUNCTION, ROW["tools"][0]], "tool 'add' is offered twice"),
    ([{"name": "add", "input_schema": {"type": "object"}}], "rename it to 'parameters'"),
    ([{"name": "add", "parameters": []}], "must be a JSON schema"),
    ([{"name": "add", "parameters": "{"}], "the parameters of tool 'add': a text here must be JSON")])
def test_tools_that_are_not_understood_are_refused(tmp_path, tools, reason):
    with pytest.raises(ValueError, match="line 2: .*" + re.escape(reason)):
        load_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "tools": tools}))


# ---------------------------------------------------------------------- rows that cannot be learned

@pytest.mark.parametrize("arguments, reason", [
    ({"a": 1}, "call 1 of gold turn 1 does not fit its tool 'add': missing argument b"),
    ({"a": 1, "b": "2"}, "b must be of type integer"),
    ({"a": 1, "b": 2, "c": 3}, "unexpected argument c"),
    ({"a": 1, "b": None}, "b must be of type integer")])
def test_gold_must_fit_its_tool(tmp_path, arguments, reason):
    """The executor would refuse such a call, so no policy can be both right and run; named by line
    before training."""
    with pytest.raises(ValueError, match="line 2: .*" + re.escape(reason)):
        load_rows(write(tmp_path / "a.jsonl", ROW,
                        {**ROW, "gold": [[{"name": "add", "arguments": arguments}]]}))
    row, = load(tmp_path, {**ROW, "gold": [[{"name": "add", "arguments": {"a": 1.0, "b": 2}}]]})
    assert rest.score_texts([CALL], row)[2]  # 1.0 is an integer, and equals 1


def test_gold_that_no_completion_can_hold(tmp_path):
    """Arguments nested deeper than the parser reads are unreachable: the reward would call the gold
    answer malformed."""
    deep = 1
    for _ in range(80):
        deep = [deep]
    tool = {"name": "f", "parameters": {"type": "object"}}
    with pytest.raises(ValueError, match="line 1: no completion can hold gold turn 1: .*nested"):
        load(tmp_path, {**ROW, "tools": [tool], "gold": [[{"name": "f", "arguments": {"x": deep}}]]})


@pytest.mark.parametrize("rest_of_row", [
    '"gold": [[]], "gold": [[]]',
    '"gold": [[{"name": "f", "arguments": {"gold": 1, "gold": 1}}]]',
    r'"gold": [[{"name": "f", "arguments": "{\"gold\": 1, \"gold\": 2}"}]]',
    r'"gold": "[[{\"gold\": 1, \"gold\": 2}]]"'])
def test_a_key_that_stands_twice_is_named(tmp_path, rest_of_row):
    """JSON readers keep the last one in silence, while a call with such a key is malformed to the reward."""
    text = '{"messages": [{"role": "user", "content": "x"}], ' + rest_of_row + "}"
    for file, unit in ((write(tmp_path / "a.jsonl", ROW, text), "line"),
                       (write(tmp_path / "a.json", f"[{json.dumps(ROW)}, {text}]"), "row")):
        with pytest.raises(ValueError, match=f"{unit} 2: .*the key 'gold' stands twice"):
            load_rows(file)


# ----------------------------------------------------------------------------- text of any language

def test_half_surrogates_become_one_character_that_tokenizers_take(tmp_path, tokenizer):
    """JSON allows half a surrogate pair anywhere; tokenizers and files refuse it, which ended runs."""
    half = r"\ud83d"
    schema = {"type": "object", "properties": {"kX": {"type": "string"}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [openai_call("cX", "fX", '{"kX": "vX"}')]}
    answer = {"role": "tool", "tool_call_id": "cX", "content": "tX"}
    text = json.dumps({
        "messages": [{"role": "user", "content": "uX"}, turn, answer],
        "tools": [{"name": "fX", "description": "dX", "parameters": schema}],
        "gold": [[{"name": "fX", "arguments": {"kX": "vX"}}]],
        "demo": [{"think": "hX"}], "category": "X", "state": {"sX": 1}}).replace("X", half)
    row, = load_rows(write(tmp_path / "a.jsonl", text))
    call = {"name": "f\ufffd", "arguments": {"k\ufffd": "v\ufffd"}}
    assert "\\ud" not in json.dumps(row) and row["gold"] == [[call]]
    assert rest.parse_calls(row["messages"][1]["content"]) == [rest.Call(**call)]
    prompt = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    write_jsonl([row], tmp_path / "b.jsonl")
    assert load_rows(tmp_path / "b.jsonl") == [row]
    write_jsonl([{**ROW, "category": "\ud83d"}], tmp_path / "c.jsonl")  # a row made in Python
    assert load_rows(tmp_path / "c.jsonl")[0]["category"] == "\ufffd"
    answer, = load_rows(write(tmp_path / "d.jsonl", json.dumps({**RLLA, "user": "X"}).replace("X", half)))
    assert answer["messages"][1]["content"] == "\ufffd"
    twice = json.dumps({**ROW, "state": {"X": 1, "Y": 2}}).replace("X", half).replace("Y", r"\ude00")
    with pytest.raises(ValueError, match="the key '\ufffd' stands twice"):  # two halves become one key
        load_rows(write(tmp_path / "e.jsonl", twice))
    with pytest.raises(ValueError) as error:
        load_rows(write(tmp_path / "f.jsonl", '{"q%s": 1}' % half, '{"%s": NaN' % half))
    str(error.value).encode("utf-8")
    whole, = load_rows(write(tmp_path / "g.jsonl", {**ROW, "category": "\U0001f600"}))
    assert whole["category"] == "\U0001f600"


def test_other_languages_look_the_same_everywhere(tmp_path):
    """Names, descriptions and values stand in prompts, demonstrations and files as they were written,
    never as \\u escapes."""
    names = "погода", "天気を調べる", "città", "Zürich–Genève", "ответ: 5°", "思考"
    tool, about, key, value, answer, thought = names
    schema = {"type": "object", "properties": {key: {"type": "string", "enum": [value]}}}
    turn = {"role": "assistant", "content": "",
            "tool_calls": [openai_call("c", tool, json.dumps({key: value}))]}
    row = {"messages": [{"role": "user", "content": value}, turn,
                        {"role": "tool", "tool_call_id": "c", "content": answer}],
           "tools": [{"name": tool, "description": about, "parameters": schema}],
           "gold": [[{"name": tool, "arguments": {key: value}}], []], "observations": [[answer]],
           "demo": [{"think": thought}, {"think": thought, "response": answer}]}
    loaded = load(tmp_path, row)
    assert loaded[0]["tools"][0]["function"]["description"] == about
    for text in (loaded[0]["messages"][1]["content"], loaded[1]["messages"][3]["content"],
                 tasks.completion_text(loaded[0]["gold"][0], thought)):
        assert f'{{"name": "{tool}", "arguments": {{"{key}": "{value}"}}}}' in text
    write_jsonl(loaded, tmp_path / "b.jsonl")
    written = (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    assert all(name in written for name in names) and "\\u" not in written
    assert load_rows(tmp_path / "b.jsonl") == loaded


# ---------------------------------------------------------------------------------- files and lines

def test_a_row_may_go_on_over_several_lines(tmp_path):
    """The documented row as it is pasted, pretty-printed rows, and rows on one line, in one file; lines
    are counted right."""
    pasted = re.search(r"^    \{.*?\}\n\n", data.__doc__, re.S | re.M)[0]
    pretty, line = json.dumps(ROW, indent=2), json.dumps(ROW)
    file = tmp_path / "a.jsonl"
    file.write_text(pasted + pretty + "\n" + line + "\r\n" + pretty.replace("\n", "\r\n") + "\n\n" + line)
    rows = load_rows(file)
    assert rows == load_rows(write(tmp_path / "b.jsonl", example(), *[ROW] * 4))
    file.write_text(pretty + "\n" + line + "\n{bad}\n" + pretty)
    line = len(pretty.splitlines()) + 2
    with pytest.raises(ValueError, match=f"1 of 4 rows are malformed:\n  line {line}: not valid JSON"):
        load_rows(file)


def test_a_row_that_breaks_off_does_not_swallow_the_next(tmp_path):
    """A line that was cut is named, with the reminder that a row is one line; the rows below it are read."""
    line = json.dumps(ROW)
    for cut, reason in ((line[:-1], "a row is one line"), (line[:-2], "Expecting value"),
                        (line[:40], "Invalid control|Unterminated|a row is one line"),
                        ("{", "a row is one line")):
        file = write(tmp_path / "a.jsonl", ROW, cut, ROW, ROW)
        with pytest.raises(ValueError,
                           match=f"1 of 4 rows are malformed:\n  line 2: not valid JSON: .*({reason})"):
            load_rows(file)
        with pytest.raises(ValueError, match=f"line 3: not valid JSON: .*({reason})"):
            load_rows(write(tmp_path / "b.jsonl", ROW, ROW, cut))
    broken = json.dumps(ROW, indent=1).replace('"gold": [', '"gold": [,')
    line = len(broken[:broken.index("[,")].splitlines())
    reason = rf"line 1: not valid JSON: Expecting value \(line {line}, column \d+\); a row is one line"
    with pytest.raises(ValueError, match=reason):
        load_rows(write(tmp_path / "c.jsonl", broken, ROW))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    """A byte order mark, as editors on Windows write it, is no part of the first row."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n\xff\n" + json.dumps(ROW).encode())
    with pytest.raises(ValueError,
                       match="1 of 3 rows are malformed:\n  line 2: not valid JSON: 'utf-8' codec"):
        load_rows(file)
    assert len(load_rows(file, on_error="skip")) == 2


def test_errors_name_the_file_and_the_row(tmp_path, monkeypatch):
    """.json and parquet have rows where .jsonl has lines; a file that is no parquet, or not there, is
    named."""
    with pytest.raises(ValueError,
                       match=r"a\.json: 1 of 2 rows are malformed:\n  row 2: not valid JSON: nan"):
        load_rows(write(tmp_path / "a.json",
                        f'[{json.dumps(ROW)}, {json.dumps({**ROW, "state": float("nan")})}]'))
    with pytest.raises(ValueError,
                       match=r"b\.json must hold one JSON list of rows.*Expecting value: line 2"):
        load_rows(write(tmp_path / "b.json", "[{},", "x]"))
    with pytest.raises(ValueError,
                       match=r"c\.jsonl: unknown layout.*no readable row \(line 2: not valid JSON"):
        load_rows(write(tmp_path / "c.jsonl", "", "nothing"))
    with pytest.raises(FileNotFoundError, match="no such file: .*rows.csv"):
        load_rows(tmp_path / "rows.csv")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="d.parquet cannot be read as parquet"):
        load_rows(write(tmp_path / "d.parquet", "no parquet"))


def test_missing_packages_are_named_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for source in (write(tmp_path / "a.parquet", ""), tmp_path):
        with pytest.raises(ImportError, match=f"{re.escape(str(source))} .*pip install datasets"):
            load_rows(source)


def test_unused_columns_are_printed(tmp_path, capsys):
    """A misspelt column (tool, observation) is not lost in silence; a file without such says nothing."""
    load(tmp_path, {**ROW, "tool": [], "id": 7})
    assert "a.jsonl: columns that are not used: id, tool\n" in capsys.readouterr().out
    load(tmp_path, example())
    load(tmp_path, RLLA)
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------- live dialogues

def test_a_live_row_ends_with_an_answer(tmp_path):
    """A live episode of a single gold call has two turns, the call and the answer to its result: with
    the gold turn alone a perfect episode would score 0.5."""
    row, = load(tmp_path, ROW, live=True)
    assert row["gold"] == [*ROW["gold"], []] and row["category"] == "simple"
    assert rest.score_texts([CALL, "<think>done</think><response>3</response>"], row)[::2] == (1.0, True)
    assert rest.score_texts([CALL], row)[0] == 0.5
    plain, = load(tmp_path, ROW)
    assert plain["gold"] == ROW["gold"]


def test_live_rows_keep_dialogues_whole(tmp_path):
    whole, = load(tmp_path, example(), live=True)
    assert all(whole[key] == example()[key] for key in ("gold", "messages")) and len(whole["demo"]) == 2
    turns = [ROW["gold"][0], ROW["gold"][0] * 2]
    row = {key: ROW[key] for key in ("messages", "tools")}
    blocks = [["tool_call"], ["think", "tool_call"]]
    live, = load(tmp_path, {**row, "gold": turns, "blocks": blocks}, live=True)  # no observations needed
    assert live["gold"] == [*turns, []] and live["blocks"] == [*blocks, ["think", "response"]]
    assert live["category"] == "multi_turn" and "demo" not in live
    write_jsonl([live, whole], tmp_path / "b.jsonl")
    assert load_rows(tmp_path / "b.jsonl", live=True) == [live, whole]
    for gold, category in (([[]], "response"), (ROW["gold"], "1 call"), ([ROW["gold"][0], []], "1 call")):
        assert load(tmp_path, {**row, "gold": gold}, live=True)[0]["category"] == category
    steps = load(tmp_path, {**row, "gold": turns, "blocks": blocks, "observations": [["3"]]})
    assert [step["blocks"] for step in steps] == [[kinds] for kinds in blocks]


def test_live_rows_that_cannot_be(tmp_path):
    reason = "a.jsonl: live episodes need tools that run, and so the columns messages, gold, not system"
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, RLLA, live=True)
    with pytest.raises(ValueError, match="line 1: gold turn 2 of 3 must call something"):
        load(tmp_path, {**ROW, "gold": [ROW["gold"][0], [], ROW["gold"][0]]}, live=True)


# ---------------------------------------------------------------------------------- Arrow's structs

WEATHER = {"name": "weather", "parameters": {"type": "object", "required": ["city"], "properties": {
    "city": {"type": "string", "enum": ["Bern", "Chur"]}, "day": {"type": ["string", "null"]}, "at": {
        "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}}}}}
TABLE = [{"messages": ROW["messages"], "tools": [FUNCTION], "gold": ROW["gold"], "observations": None},
         {"messages": [USER, {"role": "assistant", "content": None,
                              "tool_calls": [openai_call("c", "weather", {"city": "Bern"})]},
                       {"role": "tool", "tool_call_id": "c", "content": "rain"}],
          "tools": [WEATHER, FUNCTION],
          "gold": [[{"name": "weather", "arguments": {"city": "Chur", "at": {"x": 1.5}}},
                    ROW["gold"][0][0]], []],
          "observations": [["sun", "3"]]}]


def tables(folder, rows):
    """The rows as parquet from pyarrow, pandas and datasets, and as a folder for datasets.load_dataset."""
    import datasets
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "set" / "train.parquet")
    files = [folder / "a.parquet", folder / "set" / "train.parquet", folder / "set"]
    try:
        import pandas
    except ImportError:
        return files
    pandas.DataFrame(rows).to_parquet(folder / "b.parquet")
    return [folder / "b.parquet", *files]


def test_struct_columns_give_the_rows_that_went_in(tmp_path, monkeypatch):
    """Arrow gives every struct all members of the column: gold was {"a": 1, "b": 2, "city": None}, which
    no policy can reach, and tools had properties without schema."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    without = [{key: value for key, value in row.items() if value is not None} for row in TABLE]
    want = load_rows(write(tmp_path / "a.jsonl", *without))
    assert want[0]["gold"] == ROW["gold"] and len(want) == 3
    for file in tables(tmp_path, TABLE):
        assert load_rows(file) == want, file
        assert load_rows(file, live=True) == load_rows(tmp_path / "a.jsonl", live=True)


def arrow(folder, rows):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def test_nulls_that_may_be_meant_are_refused_with_the_way_out(tmp_path):
    """Where null is allowed nobody can tell it from Arrow's; where it is allowed and required it is meant."""
    def rows(schema, **other):
        properties = {"x": schema, "n": {"type": "integer"}}
        tool = {"name": "f", "parameters": {"type": "object", "properties": properties, **other}}
        return [{**ROW, "state": "{}", "tools": [tool], "gold": [[{"name": "f", "arguments": arguments}]]}
                for arguments in ({"n": 1}, {"n": 1, "x": None}, {"n": 1, "x": "a"})]
    maybe, free = {"type": ["string", "null"]}, {"description": "anything"}
    for schema in (maybe, free, {"anyOf": [{"type": "string"}]}):
        reason = r"2 of 3 .*\n  row 1: call 1 of gold turn 1: 'x' is null, .*: store nested columns as JSON"
        with pytest.raises(ValueError, match=reason):
            load_rows(arrow(tmp_path, rows(schema)))
    bare = [{key: row[key] for key in ("messages", "gold")} for row in rows(maybe)]
    with pytest.raises(ValueError,
                       match="row 1: .*'x' is null"):  # without schemas nobody can tell either
        load_rows(arrow(tmp_path, bare))
    meant = load_rows(arrow(tmp_path, rows(maybe, required=["x"])))
    assert [row["gold"][0][0]["arguments"]["x"] for row in meant] == [None, None, "a"]
    texts = [{**row, "gold": json.dumps(row["gold"])} for row in rows(maybe)]  # the way out
    loaded = load_rows(arrow(tmp_path, texts))
    assert [row["gold"] for row in loaded] == [row["gold"] for row in rows(maybe)]
    with pytest.raises(ValueError, match="row 2: state has nulls, .*JSON strings"):
        load_rows(arrow(tmp_path,
                        [{**ROW, "state": {"a": 1, "b": {"c": 2}}}, {**ROW, "state": {"a": 1}}]))


def test_open_objects_in_struct_columns(tmp_path):
    """A map of headers: its schema says whether null can be meant. Lists are gone through; their own
    nulls are kept."""
    def row(arguments, properties):
        tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
        return {**ROW, "tools": json.dumps([tool]),
                "gold": [[{"name": "f", "arguments": arguments}]]}
    typed = {"headers": {"type": "object", "additionalProperties": {"type": "string"}},
             "list": {"type": "array",
                      "items": {"type": "object",
                                "properties": {"p": {"type": "integer"}, "q": {"type": "integer"}}}},
             "plain": {"type": "array"}}
    wanted = [{"headers": {"X-a": "1"}, "list": [{"p": 1}, {"q": 2}], "plain": ["a", None]},
              {"headers": {"X-b": "2"}}]
    got = load_rows(arrow(tmp_path, [row(arguments, typed) for arguments in wanted]))
    assert [r["gold"][0][0]["arguments"] for r in got] == wanted
    with pytest.raises(ValueError, match="row 1: .*'X-b' is null"):
        free = {"headers": {"type": "object"}}
        load_rows(arrow(tmp_path, [row({"headers": w["headers"]}, free) for w in wanted]))


def test_values_that_are_not_json_are_refused(tmp_path):
    """Arrow reads dates as dates; they would end the run when the prompt is rendered. Columns that are
    not used may hold any."""
    import datetime
    day = datetime.date(2025, 3, 14)
    def row(value):
        return {**ROW, "tools": [{"name": "f", "parameters": {"type": "object"}}],
                "gold": [[{"name": "f", "arguments": {"x": value}}]]}
    with pytest.raises(ValueError,
                       match="row 1: a date is not JSON: store nested columns as JSON strings"):
        load_rows(arrow(tmp_path, [row(day)]))
    with pytest.raises(ValueError, match="row 1: not valid JSON: nan"):
        load_rows(arrow(tmp_path, [row(float("nan"))]))
    assert load_rows(arrow(tmp_path, [{**ROW, "when": day, "image": b"x"}])) == load(tmp_path, ROW)
