"""Training data from outside: `load_rows(path or hub id)` gives single-step rows for rest.py, from two families of
layouts that are told apart by their columns.

1. This project's own schema, one JSON object a line (or a hub data set with these columns, nested ones as JSON
   strings). Written here over several lines:

    {"messages": [{"role": "user", "content": "From Bern to Chur, please. What does it cost?"}],
     "tools": [{"type": "function", "function": {"name": "find_train", "description": "Finds a train.",
                "parameters": {"type": "object", "properties": {"start": {"type": "string"}, "end": {"type": "string"}},
                               "required": ["start", "end"]}}}],
     "gold": [[{"name": "find_train", "arguments": {"start": "Bern", "end": "Chur"}}], []],
     "observations": [["IC 3, 61 francs"]],
     "demo": [{"think": "I need a train."}, {"think": "I have the price.", "response": "It costs 61 francs."}],
     "category": "trains"}

   messages      what came before; the last is from the user or a tool. Earlier assistant turns are plain text in the
                 completion format.
   gold          the assistant turns still to come, each a list of calls {name, arguments} (or parameters); an empty
                 turn means: call nothing, answer.
   tools         optional, for where the system text lists the tools itself.
   observations  for several gold turns: the tools' results, for each turn but the last one string per call. Such a row
                 becomes one sample per turn (SWiRL): sample k sees the true history before turn k and is scored on it.
   demo          optional, per gold turn: a thought and, where nothing is called, the answer. A supervised warm start
                 imitates it, and earlier turns of a decomposed row have its thoughts.
   category, state  optional; the category names a line of the result tables.
   target, blocks   optional, for one gold turn: a whole completion to imitate, and the blocks that the format reward
                 asks for, as [["think", "tool_call"]], where they are not the usual ones. write_jsonl keeps them for
                 rows that came from layout 2.

2. ToolRL's rlla_4k: parquet with prompt and reward_model.ground_truth; json or jsonl with system, user, ground_truth,
   or (its supervised split) with instruction, input, output. The gold calls are parsed from the answer's text, which is
   kept as row["target"].

A malformed row stops the loading and is named by its line and the reason; on_error="skip" prints these and goes on
without them. Nothing is dropped silently.
"""

import json
from pathlib import Path

import rest
from toy_tools.jsons import JSON_DECODER
from toy_tools.tasks import completion_text

LAYOUTS = {  # the columns that a layout needs -> how one record becomes rows
    ("messages", "gold"): lambda r: _own_schema(r),
    ("prompt", "reward_model"): lambda r: [_from_text(r["prompt"], r["reward_model"]["ground_truth"])],
    ("system", "user", "ground_truth"): lambda r: [_from_text(_chat(r["system"], r["user"]), r["ground_truth"])],
    ("instruction", "input", "output"): lambda r: [_from_text(_chat(r["instruction"], r["input"]), r["output"])],
}
NESTED = ("messages", "tools", "gold", "state", "observations", "demo", "blocks")  # JSON strings in hub data sets


def load_rows(source, split="train", on_error="raise"):
    """Rows (see rest.py), each with one gold turn, of a .jsonl, .json or .parquet file, a folder, or a hub id (the
    latter two through datasets.load_dataset).

    Raises FileNotFoundError, ImportError, or ValueError naming the columns found and expected, or malformed rows."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, not {on_error!r}")
    unit, records = _read(str(source), split)
    columns = [set(record) for _, record in records if isinstance(record, dict)]
    counts = {needed: sum(have.issuperset(needed) for have in columns) for needed in LAYOUTS}
    layout = max(counts, key=counts.get)
    if not counts[layout]:
        found = ", ".join(sorted(set().union(*columns))) or "none, no readable row"
        expected = "; ".join(map(", ".join, LAYOUTS))
        raise ValueError(f"{source}: unknown layout. Columns found: {found}. Expected one of: {expected}")
    rows, problems = [], []
    for number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict) or not set(layout) <= set(record):
                raise ValueError("not a JSON object with " + ", ".join(layout))
            rows += LAYOUTS[layout](record)
        except ValueError as error:
            problems.append(f"{unit} {number}: {error}")
        except (TypeError, KeyError, AttributeError) as error:  # say, a number where a list should be
            problems.append(f"{unit} {number}: not in the layout's structure ({error!r})")
    if problems and on_error == "raise":
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "\n  ".join(problems[:5])
        raise ValueError(f"{source}: {len(problems)} of {len(records)} rows are malformed:\n  {shown}{more}")
    if problems:
        print(*problems, f"{source}: skipped {len(problems)} malformed rows of {len(records)}", sep="\n")
    if not rows:
        raise ValueError(f"{source}: no usable row")
    return rows


def write_jsonl(rows, path):
    """Rows in the schema above, one a line; load_rows reads them back as they were."""
    keys = ("messages", "tools", "gold", "category", "state", "observations", "demo", "target", "blocks")
    with open(path, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({k: row[k] for k in keys if row.get(k) is not None}, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading

def _read(source, split):
    """("line" or "row", [(number from 1, record or ValueError)])."""
    path = Path(source)
    if not path.exists() and path.suffix in (".jsonl", ".json", ".parquet"):
        raise FileNotFoundError(f"no such file: {source}")
    if not path.is_file():
        return "row", list(enumerate(_load_dataset(source, split), 1))
    if path.suffix == ".jsonl":
        with open(path, "rb") as lines:  # bytes, since lines of text also end at U+2028
            return "line", [(i, _json(line)) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".json":
        records = _json(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"{source} must hold one JSON list of rows; for one object a line name it .jsonl"
                             + (f" ({records})" if isinstance(records, ValueError) else ""))
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("reading parquet needs pyarrow, which comes with: pip install datasets") from error
        records = pyarrow.parquet.read_table(path).to_pylist()
    else:
        raise ValueError(f"{source}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet")
    return "row", list(enumerate(records, 1))


def _load_dataset(source, split):
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("reading a data set from a folder or the hub needs: pip install datasets") from error
    try:
        return load_dataset(source, split=split).to_list()
    except Exception as error:  # many kinds: no network, no such data set, no such split
        raise ValueError(f"{source} is no file, and loading it as a data set failed: {error}") from error


def _json(text):
    """Bytes -> the JSON value, or a ValueError with the reason."""
    try:
        return JSON_DECODER.decode(text.decode("utf-8").strip())
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, NaN, nested too deep
        return ValueError(f"not valid JSON: {error}")


# ---------------------------------------------------------------------------------------------------- ToolRL's layouts

def _chat(system, user):
    return [{"role": role, "content": text} for role, text in (("system", system), ("user", user)) if text]


def _from_text(messages, text):
    """Row whose gold calls are parsed from the answer `text`."""
    if not isinstance(text, str):
        raise ValueError("the gold answer must be a text")
    kinds = []
    for block in rest.split_blocks(text):
        if not block.closed:
            raise ValueError(f"the gold answer does not close its <{block.kind}>")
        if kinds[-1:] != ["tool_call"] or block.kind != "tool_call":
            kinds.append(block.kind)
    if not {"tool_call", "response"} & set(kinds):
        raise ValueError("the gold answer has neither a <tool_call> nor a <response> block")
    calls = rest.parse_calls(text)
    for call in calls:
        if isinstance(call, rest.CallError):
            raise ValueError(f"the gold answer has an unreadable call: {call}")
    turn = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return {"messages": _messages(messages), "tools": [], "gold": [turn], "category": _shape(turn), "state": None,
            "target": text, "blocks": [kinds]}


def _shape(turn):
    return f"{len(turn)} call{'s' * (len(turn) > 1)}" if turn else "response"


# ----------------------------------------------------------------------------------------------------- our own schema

def _own_schema(record):
    """A record -> its single-step rows."""
    record = {k: json.loads(v) if isinstance(v, str) and k in NESTED else v for k, v in record.items()}
    tools, turns = record.get("tools") or [], record["gold"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("gold must be a list of turns, each a list of calls; [[]] means: answer without a call")
    turns = [_calls(turn, [tool["function"]["name"] for tool in tools]) for turn in turns]
    demo, observations = record.get("demo") or [{}] * len(turns), record.get("observations") or []
    if len(demo) != len(turns):
        raise ValueError(f"demo has {len(demo)} turns, gold {len(turns)}")
    if len(observations) < len(turns) - 1:
        raise ValueError(f"{len(turns)} gold turns need the tools' results between them: give observations for the "
                         f"first {len(turns) - 1}")
    messages, rows = _messages(record["messages"]), []
    for k, (turn, shown) in enumerate(zip(turns, demo)):
        row = {"messages": messages, "tools": tools, "gold": [turn], "category": record.get("category") or _shape(turn),
               "state": record.get("state")}
        if record.get("demo"):
            response = shown.get("response") or (None if turn else "")
            row["demo"] = [{"think": shown.get("think") or "", "response": response}]
        if len(turns) == 1:
            row |= {key: record[key] for key in ("target", "blocks") if record.get(key)}
        rows.append(row)
        if k + 1 < len(turns):
            if not turn or len(observations[k]) != len(turn):
                raise ValueError(f"gold turn {k + 1} of {len(turns)} must call something, and have one observation per "
                                 f"call: {len(turn)} calls, {len(observations[k])} observations")
            done = {"role": "assistant", "content": completion_text(turn, shown.get("think") or "")}
            messages = _messages([*messages, done, *({"role": "tool", "content": text} for text in observations[k])])
    return rows


def _messages(messages):
    for m in messages:
        if m.get("role") not in ("system", "user", "assistant", "tool") or not isinstance(m.get("content"), str):
            raise ValueError("messages must be {role, content}: role system, user, assistant or tool; content a text")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the last message must be from the user or a tool")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _calls(turn, offered):
    calls = []
    for call in turn:
        arguments = call.get("parameters") if call.get("arguments") is None else call["arguments"]
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError("a gold call needs a name and an object of arguments")
        if offered and call["name"] not in offered:
            raise ValueError(f"gold calls {call['name']!r}, which is not among the tools ({', '.join(offered)})")
        calls.append({"name": call["name"], "arguments": arguments})
    return calls
