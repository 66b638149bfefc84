"""Training data from outside: `load_rows(path or hub id)` gives single-step rows for rest.py. Two families of layouts, told apart by their columns.

1. Rows in this project's own schema, one JSON object a line (or a hub data set with these columns, nested ones as JSON strings):

    {"messages": [{"role": "system", "content": "You book trains."}, {"role": "user", "content": "Bern to Chur, then tell me the price."}],
     "tools": [{"type": "function", "function": {"name": "find_train", "description": "Finds a train.", "parameters": {"type": "object",
               "properties": {"start": {"type": "string"}, "end": {"type": "string"}}, "required": ["start", "end"]}}}],
     "gold": [[{"name": "find_train", "arguments": {"start": "Bern", "end": "Chur"}}], []],
     "observations": [["IC 3, 61 francs"]],
     "demo": [{"think": "I need a train.", "response": ""}, {"think": "I have the price.", "response": "It costs 61 francs."}],
     "category": "trains"}

   messages      what came before; the last one is from the user or a tool. Earlier assistant turns are plain text in the completion format.
   gold          the assistant turns still to come, each a list of calls ("arguments" or "parameters"); [] means: call nothing, answer.
   tools         optional, for where the system text lists the tools itself.
   observations  for several gold turns: the tools' results, one list of strings per turn but the last. Such a row becomes one sample per
                 turn (SWiRL): sample k sees the true history before turn k and is scored on turn k alone.
   category, state  optional; the category names a line of the tables.
   demo          optional, per gold turn: a thought and, where the turn calls nothing, the answer. It is what a supervised warm start imitates,
                 and what earlier turns look like in the history of a decomposed row.
   target, blocks  optional, single-turn rows only: a whole completion to imitate; the blocks that the format reward asks for, as
                 [["think", "tool_call"]], where they are not the usual ones. `write_jsonl` keeps them for rows that came from layout 2.

2. ToolRL's rlla_4k: parquet with prompt and reward_model.ground_truth, or json/jsonl with system, user, ground_truth, or with instruction,
   input, output (its supervised split). The gold calls are parsed from the answer's text, which is kept as row["target"].

A malformed row stops the loading with its line and the reason; on_error="skip" prints these and goes on without it. Nothing is dropped silently.
"""

import json
from pathlib import Path

import rest

LAYOUTS = {  # columns that a layout needs -> how one record becomes rows
    ("messages", "gold"): lambda r: _own_schema(r),
    ("prompt", "reward_model"): lambda r: [_from_text(r["prompt"], r["reward_model"]["ground_truth"])],
    ("system", "user", "ground_truth"): lambda r: [_from_text(_two_messages(r["system"], r["user"]), r["ground_truth"])],
    ("instruction", "input", "output"): lambda r: [_from_text(_two_messages(r["instruction"], r["input"]), r["output"])],
}
OPTIONAL = ("tools", "category", "state", "observations", "demo", "target", "blocks")


def load_rows(source, split="train", on_error="raise"):
    """Rows (see rest.py) of a .jsonl, .json or .parquet file, of a folder, or of a hub id; the latter two through datasets.load_dataset.

    Each row has one gold turn. Raises FileNotFoundError, or ValueError naming the columns found and expected, or the malformed rows."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, not {on_error!r}")
    unit, records = _read(str(source), split)
    columns = [set(record) for _, record in records if isinstance(record, dict)]
    counts = {needed: sum(set(needed) <= have for have in columns) for needed in LAYOUTS}
    layout = max(counts, key=counts.get)
    if not counts[layout]:
        found = ", ".join(sorted(set().union(*columns))) or "no readable row"
        raise ValueError(f"{source}: unknown layout. Columns found: {found}. Expected one of: " + "; ".join(", ".join(k) for k in LAYOUTS))
    rows, problems = [], []
    for number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict) or not set(layout) <= set(record):
                raise ValueError("not a JSON object with " + ", ".join(layout))
            rows += LAYOUTS[layout](record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{unit} {number}: " + (f"{error}" if isinstance(error, ValueError) else f"wrong structure ({error!r})"))
    if problems and on_error == "raise":
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source}: {len(problems)} of {len(records)} rows are malformed:\n  " + "\n  ".join(problems[:5]) + more)
    if problems:
        print(*problems, f"{source}: skipped {len(problems)} malformed rows of {len(records)}", sep="\n")
    if not rows:
        raise ValueError(f"{source}: no usable row")
    return rows


def write_jsonl(rows, path):
    """Rows in the schema above, one a line; load_rows reads them back as they were."""
    with open(path, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({k: row[k] for k in ("messages", "gold", *OPTIONAL) if row.get(k) is not None}, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------------------------- reading

def _read(source, split):
    """("line" | "row", [(number from 1, record or ValueError)])."""
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, "rb") as lines:  # bytes: text iteration would also split at U+2028
            return "line", [(i, _json(line)) for i, line in enumerate(lines, 1) if line.strip()]
    if path.is_file() and path.suffix == ".json":
        records = _json(path.read_bytes())
        if isinstance(records, ValueError):
            raise ValueError(f"{source}: {records}") from records
        if not isinstance(records, list):
            raise ValueError(f"{source} must hold one JSON list of rows; for one object a line name it .jsonl")
    elif path.is_file() and path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("reading parquet needs pyarrow, which comes with: pip install datasets") from error
        records = pyarrow.parquet.read_table(path).to_pylist()
    elif path.is_file() or path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.exists():
            raise FileNotFoundError(f"no such file: {source}")
        raise ValueError(f"{source}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet")
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("reading a data set from a folder or the hub needs: pip install datasets") from error
        try:
            records = load_dataset(source, split=split).to_list()
        except Exception as error:  # many kinds: no network, no such data set, no such split
            raise ValueError(f"{source} is not a file, and could not be loaded as a data set: {error}") from error
    return "row", list(enumerate(records, 1))


def _json(text):
    try:
        return rest.JSON_DECODER.decode(text.decode("utf-8").strip())
    except RecursionError:
        return ValueError("nested too deep")
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, NaN
        return ValueError(f"not valid JSON: {error}")


# --------------------------------------------------------------------------------------------------------------- ToolRL's layouts

def _two_messages(system, user):
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
    gold = [[{"name": call.name, "arguments": call.arguments} for call in calls]]
    return {"messages": _messages(messages), "tools": [], "gold": gold, "category": _shape(gold[0]), "state": None, "target": text, "blocks": [kinds]}


def _shape(turn):
    return "response" if not turn else f"{len(turn)} call{'s' * (len(turn) > 1)}"


# ----------------------------------------------------------------------------------------------------------------- our own schema

def _own_schema(record):
    """A record -> its single-step rows."""
    nested = ("messages", "tools", "gold", "state", "observations", "demo", "blocks")
    record = {k: json.loads(v) if isinstance(v, str) and k in nested else v for k, v in record.items()}
    tools, turns = record.get("tools") or [], record["gold"]
    offered = [tool["function"]["name"] for tool in tools]
    if not isinstance(turns, list) or not turns:
        raise ValueError("gold must be a list of turns, each a list of calls; [[]] means: answer without a call")
    turns = [_calls(turn, offered) for turn in turns]
    demo = record.get("demo") or [{}] * len(turns)
    if len(demo) != len(turns):
        raise ValueError(f"demo has {len(demo)} turns, gold {len(turns)}")
    observations = record.get("observations") or []
    if len(turns) > 1 and len(observations) < len(turns) - 1:
        raise ValueError(f"{len(turns)} gold turns need the tools' results in between: give observations for the first {len(turns) - 1}")
    messages, rows = _messages(record["messages"]), []
    for k, turn in enumerate(turns):
        row = {"messages": messages, "tools": tools, "gold": [turn], "category": record.get("category") or _shape(turn), "state": record.get("state")}
        if any(demo[k].values()):
            row["demo"] = [{"think": demo[k].get("think") or "", "response": demo[k].get("response") or ""}]
        if len(turns) == 1:
            row |= {key: record[key] for key in ("target", "blocks") if record.get(key)}
        rows.append(row)
        if k + 1 < len(turns):
            if not turn or len(observations[k]) != len(turn) or not all(isinstance(text, str) for text in observations[k]):
                raise ValueError(f"gold turn {k + 1} has {len(turn)} calls: it needs at least one, and as many result strings in observations")
            done = {"role": "assistant", "content": _completion(turn, demo[k].get("think"))}
            messages = [*messages, done, *({"role": "tool", "content": text} for text in observations[k])]
    return rows


def _completion(calls, think):
    """A turn with calls in the completion format; a turn that has no thought on record gets none."""
    lines = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    return (f"<think>{think}</think>\n" if think else "") + f"<tool_call>\n{lines}\n</tool_call>"


def _messages(messages):
    for m in messages:
        if m.get("role") not in ("system", "user", "assistant", "tool") or not isinstance(m.get("content"), str):
            raise ValueError("messages must be {role, content}: role one of system, user, assistant, tool; content a text")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the last message must be from the user or a tool")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _calls(turn, offered):
    calls = []
    for call in turn:
        arguments = call["arguments"] if "arguments" in call else call.get("parameters")
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError("a gold call needs a name and an object of arguments")
        if offered and call["name"] not in offered:
            raise ValueError(f"gold calls {call['name']!r}, which is not among the tools ({', '.join(offered)})")
        calls.append({"name": call["name"], "arguments": arguments})
    return calls
