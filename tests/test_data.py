"""Loaders of training data: both families of layouts, SWiRL decomposition, and malformed rows that are named."""

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

FOLDER = Path(os.environ.get("REST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "rlla"
real_data = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no ToolRL data in {FOLDER}: set REST_DATA to its parent")
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
    history = second["messages"][1]["content"]  # the earlier gold turn in the completion format, worth the full reward
    assert rest.score_texts([history], first) == (1.0, 1.0, True) and "I need a train." in history
    for row in (first, second):
        demo = tasks.completion_text(row["gold"][0], row["demo"][0]["think"], row["demo"][0]["response"])
        assert rest.score_texts([demo], row)[2]


def test_decomposition_sees_exactly_the_history(tmp_path):
    """Random dialogues of K turns give K samples; sample k's messages are sample k-1's, its gold turn, its results."""
    rng = random.Random(0)
    for trial in range(30):
        turns = [[{"name": "add", "arguments": {"a": rng.randrange(9), "b": i}} for i in range(rng.randint(1, 3))]
                 for _ in range(rng.randint(1, 5))] + [[]] * rng.randint(0, 1)
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
    table = pyarrow.Table.from_pylist([{"prompt": chat, "reward_model": {"style": "rule", "ground_truth": TEXT}}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    sft = dict(zip(("instruction", "input", "output"), RLLA.values()))
    for file in (tmp_path / "a.parquet", write(tmp_path / "a.jsonl", RLLA, ""),
                 write(tmp_path / "a.json", json.dumps([RLLA])), write(tmp_path / "b.json", json.dumps([sft]))):
        assert load_rows(file) == [{"messages": chat, "tools": [], "gold": ROW["gold"], "category": "1 call",
                                    "state": None, "target": TEXT, "blocks": [["think", "tool_call"]]}]


def test_response_only_and_mixed_answers(tmp_path):
    """The format reward asks for the blocks that the gold answer has; tags in thoughts are none, call blocks one."""
    only, block = "<think>no <tool_call></think>\n<response>no</response>", TEXT[TEXT.index("<tool_call>"):]
    both = TEXT + "\n<response>wait</response>"
    texts = only, both, TEXT + block
    rows = load_rows(write(tmp_path / "a.jsonl", *({**RLLA, "ground_truth": text} for text in texts)))
    assert rows[0]["gold"] == [[]] and rows[0]["blocks"] == [["think", "response"]]
    assert rows[1]["gold"] == ROW["gold"] and rows[1]["blocks"] == [["think", "tool_call", "response"]]
    assert rows[2]["gold"] == [ROW["gold"][0] * 2] and rows[2]["blocks"] == [["think", "tool_call"]]
    assert rest.score_texts([both], rows[1])[2] and not rest.score_texts([TEXT], rows[1])[2]


def test_written_rows_come_back(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", example())) + load_rows(write(tmp_path / "b.jsonl", RLLA))
    rows += [{**ROW, "category": "é\u2028", "state": {"a": [1]}}]  # U+2028 ends a line of text, but not a JSON line
    before = copy.deepcopy(rows)
    write_jsonl(rows, tmp_path / "c.jsonl")
    assert load_rows(tmp_path / "c.jsonl") == rows == before


def test_folder_through_datasets(tmp_path, monkeypatch):
    """A folder goes through datasets.load_dataset, as a hub id does; nested columns stand there as JSON strings."""
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
    ({"messages": ROW["messages"]}, "not a JSON object with messages, gold"), ({**ROW, "messages": []}, "last message"),
    ({**ROW, "messages": [{"role": "assistant", "content": "x"}]}, "last message"),
    ({**ROW, "messages": 3}, "structure"), ({**ROW, "demo": [{}, {}]}, "2 turns"),
    ({**ROW, "messages": [{"role": "robot", "content": "x"}]}, "role system, user"), ({**ROW, "gold": []}, "of turns"),
    ({**ROW, "gold": [[{"name": "add"}]]}, "name and an object of arguments"), ({**ROW, "tools": [{}]}, "structure"),
    ({**ROW, "gold": [[{"name": "sub", "arguments": {}}]]}, "'sub', which is not among the tools (add)"),
    ({**ROW, "gold": ROW["gold"] * 2}, "give observations for the first 1"),
    ({**ROW, "gold": ROW["gold"] * 2, "observations": [["3", "4"]]}, "1 calls, 2 observations"),
    ({**ROW, "gold": [[], []], "observations": [[]]}, "must call something"),
    ({**ROW, "gold": ROW["gold"] * 2, "observations": [[3]]}, "content a text")])
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
    with pytest.raises(ValueError, match="Columns found: answer, question. Expected one of: messages, gold; prompt, "):
        load_rows(write(tmp_path / "b.jsonl", {"question": 1, "answer": 2}))
    for name, kind, reason in (("c.jsonl", ValueError, "no readable row"), ("c.csv", ValueError, "type '.csv'"),
                               ("c.json", ValueError, "one JSON list"), ("missing", FileNotFoundError, "no such")):
        file = tmp_path / "missing.json" if name == "missing" else write(tmp_path / name, "")
        with pytest.raises(kind, match=reason):
            load_rows(file)
    with pytest.raises(ValueError, match="on_error"):
        load_rows(tmp_path / "a.jsonl", on_error="ignore")


@real_data
@pytest.mark.parametrize("file, calls, responses", [
    ("test.parquet", [36, 23, 8, 3, 1], 9), ("test80.jsonl", [36, 23, 8, 3, 1], 9),
    ("rlla_sft.json", [187, 109, 33, 13, 4], 54), ("train399_placeholder_thoughts.jsonl", [186, 109, 33, 13, 4], 54)])
def test_real_rows_and_the_reward_of_their_gold_answers(file, calls, responses):
    """Every gold answer is exact and has the highest static reward: 4 with calls, 1 (for the format) without."""
    rows = load_rows(FOLDER / file)
    assert Counter(len(row["gold"][0]) for row in rows) == dict(enumerate([responses, *calls]))
    for row in rows:
        form, correct, exact = rest.score_texts([row["target"]], row)
        assert exact and rest.episode_reward(form, correct, 0.0, "static") == (4.0 if row["gold"][0] else 1.0)


@real_data
def test_thoughts_that_mention_tags_are_parsed_right():
    """17 supervised answers mention tags in the thought; what stands behind </think>, read by other means, agrees."""
    rows = [row for row in load_rows(FOLDER / "rlla_sft.json")
            if re.search("<(tool_call|response)>", row["target"].split("</think>")[0])]
    assert len(rows) == 17
    for row in rows:
        blocks = re.findall(r"<tool_call>(.*?)</tool_call>", row["target"].split("</think>", 1)[1], re.S)
        want = [json.loads(line) for block in blocks for line in block.strip().splitlines()]
        assert row["gold"][0] == [{"name": call["name"], "arguments": call["parameters"]} for call in want]
