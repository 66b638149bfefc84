"""Training data from outside: `load_rows(path or hub id)` gives rows for rest.py, from two families of
layouts that are told apart by their columns.

1. This project's own layout, one JSON object a line (or a table with these columns). An object may go
   on over several lines, as here:

    {"messages": [{"role": "user", "content": "From Bern to Chur, please. What does it cost?"}],
     "tools": [{"type": "function", "function": {
        "name": "find_train", "description": "Finds a train.",
        "parameters": {"type": "object", "required": ["start", "end"],
                       "properties": {"start": {"type": "string"}, "end": {"type": "string"}}}}}],
     "gold": [[{"name": "find_train", "arguments": {"start": "Bern", "end": "Chur"}}], []],
     "observations": [["IC 3, 61 francs"]],
     "demo": [{"think": "I need a train."},
              {"think": "I have the price.", "response": "It costs 61 francs."}],
     "category": "trains"}

   messages      what came before, in OpenAI's chat format; the last is from the user or a tool. Content
                 is a text, or parts of type text. An assistant's tool_calls and reasoning_content become
                 text in the completion format; a text that is in it already stays as it is. The tools'
                 answers are put into the order of the calls, by tool_call_id or name.
   gold          the assistant turns still to come, each a list of calls {name, arguments} (parameters
                 will do, and OpenAI's {function: {name, arguments}}; arguments may be JSON text). An
                 empty turn means: call nothing, answer.
   tools         optional, for where the system text lists the tools itself. Of a tool only the name is
                 needed; the function object may stand alone; without parameters it takes no arguments.
   observations  for several gold turns: the tools' results, for each turn but the last one string per
                 call. Such a row becomes one sample per turn (SWiRL): sample k sees the true history
                 before turn k and is scored on it.
   demo          optional, per gold turn: a thought and, where nothing is called, the answer. A
                 supervised warm start imitates it; earlier turns of a decomposed row have its thoughts.
   category, state  optional; the category names a line of the result tables.
   target        optional, for one gold turn: a whole completion to imitate.
   blocks        optional, per gold turn: the blocks that the format reward asks for, as
                 [["think", "tool_call"]], where they are not the usual ones. write_jsonl keeps target
                 and blocks of rows that came from layout 2.

   For live episodes, in which the policy's calls are run, load_rows(..., live=True) keeps a dialogue
   whole. gold lists its calls turn by turn; the tools answer by themselves, so observations are not
   needed; where the last gold turn calls something, the turn that answers is implied: [[call]] becomes
   [[call], []].

2. ToolRL's rlla_4k: parquet with prompt and reward_model.ground_truth; json or jsonl with system, user,
   ground_truth, or (its supervised split) with instruction, input, output. The gold calls are parsed
   from the answer's text, which is kept as row["target"].

Tables (parquet, data sets of the hub) hold nested columns as JSON strings or as structs. Arrow gives all
structs of a column the same members, null where a row had none. These nulls are taken out again where
the tool's schema shows that they cannot have been meant; where it does not, the row is refused.

A row that is malformed, or that no policy could learn (gold that does not fit its tool's schema, a tool
offered twice, a key that stands twice), stops the loading and is named by its line and the reason;
on_error="skip" prints these and goes on without them. Nothing is dropped silently: members that are not
understood are refused, columns that are not used are printed.
"""

import json
import math
from collections import Counter
from pathlib import Path

import rest
from toy_tools.schema import check, member, valid_text
from toy_tools.tasks import completion_text

OWN = ("messages", "gold")
LAYOUTS = {  # the columns that a layout needs -> how one record becomes its row
    OWN: None,
    ("prompt", "reward_model"): lambda r: _from_text(r["prompt"], r["reward_model"]["ground_truth"]),
    ("system", "user", "ground_truth"):
        lambda r: _from_text(_chat(r["system"], r["user"]), r["ground_truth"]),
    ("instruction", "input", "output"):
        lambda r: _from_text(_chat(r["instruction"], r["input"]), r["output"]),
}
# in tables these are JSON strings or structs
NESTED = ("messages", "tools", "gold", "state", "observations", "demo", "blocks")
KNOWN = (*NESTED, "category", "target")
WAY_OUT = "store nested columns as JSON strings (json.dumps)"


def load_rows(source, split="train", on_error="raise", live=False):
    """Rows (see rest.py) of a .jsonl, .json or .parquet file, a folder, or a hub id (the latter two
    through datasets.load_dataset): one gold turn each, or with `live` whole dialogues.

    Raises FileNotFoundError, ImportError, or ValueError: the file and what is wrong with it, or its
    malformed rows by line (.json and tables: by row, from 1)."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, not {on_error!r}")
    unit, records, arrow = _read(str(source), split)
    columns = [set(record) for _, record in records if isinstance(record, dict)]
    counts = {needed: sum(have.issuperset(needed) for have in columns) for needed in LAYOUTS}
    layout = max(counts, key=counts.get)
    if not counts[layout]:
        found = ", ".join(_names(columns)) or "none, no readable row"
        found += "".join(f" ({unit} {n}: {r})" for n, r in records[:1] if isinstance(r, ValueError))
        expected = "; ".join(map(", ".join, LAYOUTS))
        raise ValueError(f"{source}: unknown layout. Columns found: {found}. "
                         f"Expected one of: {expected}")
    if live and layout != OWN:
        raise ValueError(f"{source}: live episodes need tools that run, and so the columns "
                         f"{', '.join(OWN)}, not {', '.join(layout)}")
    known = KNOWN if layout == OWN else layout
    rows = []
    problems = []
    for number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if arrow:  # what is not used may be anything, say an image
                record = {key: value for key, value in record.items() if key in known}
            record = _plain(record)
            if not isinstance(record, dict) or not set(layout) <= set(record):
                raise ValueError("not a JSON object with " + ", ".join(layout))
            if layout == OWN:
                rows += _own_layout(record, arrow, live)
            else:
                rows.append(LAYOUTS[layout](record))
        except ValueError as error:
            problems.append(f"{unit} {number}: {error}")
        except RecursionError:
            problems.append(f"{unit} {number}: nested too deep")
        except (TypeError, KeyError, AttributeError) as error:  # say, a number where a list should be
            problems.append(f"{unit} {number}: not in the layout's structure ({error!r})")
    if problems and on_error == "raise":
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "\n  ".join(problems[:5])
        raise ValueError(f"{source}: {len(problems)} of {len(records)} rows are malformed:"
                         f"\n  {shown}{more}")
    if problems:
        print(*problems, sep="\n")
        print(f"{source}: skipped {len(problems)} malformed rows of {len(records)}")
    if not rows:
        raise ValueError(f"{source}: no usable row")
    unused = [name for name in _names(columns) if name not in known]
    if unused:
        print(f"{source}: columns that are not used: {', '.join(unused)}")
    return rows


def _names(columns):
    return sorted(map(valid_text, set().union(*columns)))


def write_jsonl(rows, path):
    """Rows in the first layout, one a line; load_rows reads them back as they were."""
    with open(path, "w", encoding="utf-8") as out:
        for row in rows:
            record = {key: row[key] for key in KNOWN if row.get(key) is not None}
            out.write(valid_text(json.dumps(record, ensure_ascii=False)) + "\n")


# ----------------------------------------------------------------------------------------- reading

def _read(source, split):
    """("line" or "row", [(number from 1, record or ValueError)], whether they come from Arrow)."""
    path = Path(source)
    known = (".jsonl", ".json", ".parquet")
    if not path.exists() and (path.suffix in known or path.is_absolute()):
        raise FileNotFoundError(f"no such file: {source}")
    if not path.is_file():
        return "row", list(enumerate(_load_dataset(source, split), 1)), True
    if path.suffix == ".jsonl":
        return "line", _lines(path.read_bytes()), False
    if path.suffix == ".json":
        records = None
        reason = ""
        try:
            records = _json(path.read_bytes())
        except ValueError as error:
            reason = f" (not valid JSON: {error})"
        if not isinstance(records, list):
            raise ValueError(f"{source} must hold one JSON list of rows; for one object a line name it "
                             f".jsonl{reason}")
        return "row", list(enumerate(records, 1)), False
    if path.suffix == ".parquet":
        return "row", list(enumerate(_parquet(path), 1)), True
    raise ValueError(f"{source}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet")


def _parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow, which comes with: pip install datasets") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _load_dataset(source, split):
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"reading {source} as a data set needs: pip install datasets") from error
    try:
        return load_dataset(source, split=split).to_list()
    except Exception as error:  # many kinds: no network, no such data set, no such split
        raise ValueError(f"{source} is no file, and loading it as a data set failed: {error}") from error


def _lines(data):
    """[(line, value or ValueError)] of JSON lines; a row over several lines is named by its first."""
    lines = data.split(b"\n")  # bytes, since lines of text also end at U+2028
    rows = []
    start = 0
    while start < len(lines):
        size = 1
        if lines[start].strip():
            size, value = _row(lines, start)
            rows.append((start + 1, value))
        start += size
    return rows


def _row(lines, start, longest=1000):
    """(how many lines it takes, its value or ValueError) of the row that begins at lines[start]."""
    hint = f"; a row is one line, or one object over at most {longest}"
    reason = "the object is not closed" + hint
    for size in range(1, min(longest, len(lines) - start) + 1):
        if size > 1 and not lines[start + size - 1].rstrip().endswith(b"}"):
            continue  # an object cannot end here
        try:
            return size, _json(b"\n".join(lines[start:start + size]))
        except json.JSONDecodeError as error:
            if error.pos == len(error.doc):
                continue  # it breaks off: the next line may go on with it
            reason = f"{error.msg} (line {start + error.lineno}, column {error.colno}){hint}"
        except ValueError as error:
            reason = error
        break
    return 1, ValueError(f"not valid JSON: {reason}")


class _Twice:
    """Stands for a JSON object in which a key stands twice, until its row is known."""

    def __init__(self, pairs):
        self.key = Counter(key for key, _ in pairs).most_common(1)[0][0]


def _members(pairs):
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Twice(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_members)  # NaN is refused later, for its row alone


def _json(text):
    """The value of JSON text or bytes, still to be made _plain. Raises ValueError with the reason."""
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        return DECODER.decode(text.strip())
    except RecursionError:
        raise ValueError("nested too deep") from None


def _plain(value):
    """The value, with text that tokenizers take.

    Raises ValueError for what is not JSON, and for a key that stands twice."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        pairs = [(valid_text(key), _plain(item)) for key, item in value.items()]
        value = _members(pairs)
    if isinstance(value, _Twice):
        raise ValueError(f"the key {valid_text(value.key)!r} stands twice in one object")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"not valid JSON: {value} is no number there")
    if not isinstance(value, (dict, float, int, type(None))):
        raise ValueError(f"a {type(value).__name__} is not JSON: {WAY_OUT}")
    return value


# -------------------------------------------------------------------------------- ToolRL's layouts

def _chat(system, user):
    pairs = (("system", system), ("user", user))
    return [{"role": role, "content": text} for role, text in pairs if text]


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
    return {"messages": _messages(messages, {}, False), "tools": [], "gold": [turn],
            "category": _shape(turn), "state": None, "target": text, "blocks": [kinds]}


def _shape(turn):
    return f"{len(turn)} call{'s' * (len(turn) > 1)}" if turn else "response"


# -------------------------------------------------------------------------------------- own layout

def _own_layout(record, arrow, live):
    """A record -> its single-step rows, or one row with all its turns if `live`."""
    structs = {key for key in NESTED if arrow and not isinstance(record.get(key), str)}
    record = {key: _parsed(value, key) if key in NESTED and isinstance(value, str) else value
              for key, value in record.items()}
    state = record.get("state")
    if "state" in structs and _without_null(state) != state:
        raise ValueError(f"state has nulls, and a struct column cannot tell which are meant: {WAY_OUT}")
    tools = _tools(record.get("tools") or [], "tools" in structs)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    messages = _messages(record["messages"], schemas, "messages" in structs)
    turns = _gold(record["gold"], schemas, "gold" in structs)
    demo = _demo(record.get("demo"), turns)
    blocks = _blocks(record.get("blocks"), turns)
    category = record.get("category")
    target = record.get("target")
    for key, text in (("category", category), ("target", target)):
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"{key} must be a text")
    if category == "all":
        raise ValueError('category "all" is the name of all categories together: give it another')
    if target and len(turns) > 1:
        raise ValueError(f"target is the completion of one gold turn, but gold has {len(turns)}: use demo")

    def row(messages, turns, blocks, demo, usual):
        made = {"messages": messages, "tools": tools, "gold": turns, "category": category or usual,
                "state": state, "target": target, "blocks": blocks, "demo": demo}
        return {key: value for key, value in made.items()
                if value or key not in ("target", "blocks", "demo")}
    if live:
        usual = "multi_turn" if sum(map(bool, turns)) > 1 else _shape(turns[0])
        if turns[-1]:  # an episode goes on until a turn calls nothing
            turns = [*turns, []]
            blocks = blocks and [*blocks, ["think", "response"]]
        return [row(messages, turns, blocks, demo, usual)]
    observations = _observations(record.get("observations") or [], turns)
    rows = []
    for k, turn in enumerate(turns):
        rows.append(row(messages, [turn], blocks[k:k + 1], demo[k:k + 1], _shape(turn)))
        if k + 1 < len(turns):
            shown = demo[k] if demo else {"think": "", "response": None}
            said = completion_text(turn, shown["think"], shown["response"])
            results = [{"role": "tool", "content": text} for text in observations[k]]
            messages = [*messages, {"role": "assistant", "content": said}, *results]
    return rows


def _parsed(text, what):
    """The value of JSON text where an object or a list could stand as well."""
    try:
        return _plain(_json(text))
    except ValueError as error:
        raise ValueError(f"{what}: a text here must be JSON, but: {error}") from None


def _only(what, value, known):
    """Refuse what would be dropped: members that are neither known nor empty."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object with {', '.join(known)}")
    for key, item in value.items():
        if key not in known and item not in (None, "", [], {}):
            raise ValueError(f"{what} has {key!r}, which is not understood: take it out, or write it "
                             f"into one of {', '.join(known)}")


def _demo(demo, turns):
    if not demo:
        return []
    if len(demo) != len(turns):
        raise ValueError(f"demo has {len(demo)} turns, gold {len(turns)}")
    shown = []
    for k, (said, turn) in enumerate(zip(demo, turns), 1):
        _only(f"demo turn {k}", said, ("think", "response"))
        think = said.get("think") or ""
        response = said.get("response") or ""
        if not isinstance(think, str) or not isinstance(response, str):
            raise ValueError(f"demo turn {k}: think and response must be texts")
        shown.append({"think": think, "response": response or (None if turn else "")})
    return shown


def _blocks(blocks, turns):
    """The required blocks per gold turn, [] for the usual ones."""
    if not blocks:
        return []
    if len(blocks) != len(turns):
        raise ValueError(f"blocks has {len(blocks)} turns, gold {len(turns)}")
    for k, (kinds, turn) in enumerate(zip(blocks, turns), 1):
        if not kinds or not isinstance(kinds, list) or not set(kinds) <= {"think", "tool_call", "response"}:
            raise ValueError(f"blocks of gold turn {k} must be a list of think, tool_call, response")
        if turn and "tool_call" not in kinds:
            raise ValueError(f"blocks of gold turn {k} have no tool_call, but the turn calls tools")
    return blocks


def _observations(observations, turns):
    """The results of all gold turns but the last, a list of texts for each."""
    if len(observations) < len(turns) - 1:
        raise ValueError(f"{len(turns)} gold turns need the tools' results between them: give "
                         f"observations for the first {len(turns) - 1}")
    for k, (turn, results) in enumerate(zip(turns[:-1], observations), 1):
        if not isinstance(results, list) or len(results) != len(turn):
            raise ValueError(f"gold turn {k} of {len(turns)} must have one observation per call: "
                             f"{len(turn)} calls, {len(results)} observations")
        if not all(isinstance(text, str) for text in results):
            raise ValueError(f"the observations of gold turn {k} must be texts: write others as JSON")
    return observations


# --------------------------------------------------------------------------------- calls and tools

def _tools(tools, struct):
    """Tools with all that templates read: type, and the function's name, description, parameters."""
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    out = []
    names = set()
    for n, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise ValueError(f"tool {n} must be an object")
        tool = _without_null(tool) if struct else tool
        kind = tool.get("type")
        function = tool.get("function")
        around = {key: item for key, item in tool.items() if key not in ("type", "function")}
        if not isinstance(function, dict):  # the function object alone
            function = around
            around = {}
        name = function.get("name")
        parameters = function.get("parameters")
        if kind not in (None, "function") or not isinstance(name, str) or not name:
            raise ValueError(f"tool {n} must be {{type: function, function: {{name, description, "
                             "parameters}}, of which only the name is needed")
        if name in names:
            raise ValueError(f"tool {name!r} is offered twice")
        names.add(name)
        if foreign := {"input_schema", "inputSchema"} & set(function):
            raise ValueError(f"tool {name!r} has {foreign.pop()!r}: rename it to 'parameters'")
        if isinstance(parameters, str):
            parameters = _parsed(parameters, f"the parameters of tool {name!r}")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise ValueError(f"the parameters of tool {name!r} must be a JSON schema, an object")
        described = {"description": function.get("description") or "", "parameters": parameters}
        out.append({"type": "function", "function": {**function, **described}, **around})
    return out


def _gold(turns, schemas, struct):
    """The gold turns, lists of {name, arguments}, such as a policy could write them and a tool run them."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, list) for turn in turns):
        raise ValueError("gold must be a list of turns, each a list of calls; [[]] means: answer "
                         "without a call")
    gold = []
    for k, turn in enumerate(turns, 1):
        if not turn and k < len(turns):
            raise ValueError(f"gold turn {k} of {len(turns)} must call something: an episode ends with "
                             "the first turn that answers")
        calls = []
        for n, call in enumerate(turn, 1):
            what = f"call {n} of gold turn {k}"
            _, call = _call(call, what, schemas, struct)
            name = call["name"]
            if schemas and name not in schemas:
                raise ValueError(f"gold calls {name!r}, which is not among the tools "
                                 f"({', '.join(schemas)})")
            try:
                check(call["arguments"], schemas.get(name, True))
            except ValueError as error:
                raise ValueError(f"{what} does not fit its tool {name!r}: {error}") from None
            calls.append(call)
        for call in rest.parse_calls(completion_text(calls, "")):
            if isinstance(call, rest.CallError):
                raise ValueError(f"no completion can hold gold turn {k}: {call}")
        gold.append(calls)
    return gold


def _call(call, what, schemas, struct):
    """(id or None, {name, arguments}) of a call in this project's form or OpenAI's."""
    _only(what, call, ("id", "type", "index", "function", "name", "arguments", "parameters"))
    inner = call.get("function") or call
    if inner is not call:
        _only(what, inner, ("name", "arguments", "parameters"))
    name = inner.get("name")
    given = [inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None]
    if not isinstance(name, str) or not name or len(given) != 1:
        raise ValueError(f"{what} needs a name and an object of arguments")
    arguments = given[0]
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"the arguments of {what}")  # "" where a tool takes none
    elif struct:
        arguments = _meant(arguments, schemas.get(name, True), what)
    if not isinstance(arguments, dict):
        raise ValueError(f"{what} needs a name and an object of arguments")
    return call.get("id"), {"name": name, "arguments": arguments}


def _without_null(value):
    """Without the null members that Arrow gives to all structs of a column."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _meant(value, schema, what):
    """Arguments from a struct column without the nulls that only Arrow put there, because the schema
    does not allow them. Raises ValueError where it allows null, but does not require the member."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_meant(item, schema.get("items"), what) for item in value]
    if not isinstance(value, dict):
        return value
    meant = {}
    for key, item in value.items():
        inner = member(schema, key)
        if item is not None:
            meant[key] = _meant(item, inner, what)
        elif _allowed(None, inner):
            if key not in (schema.get("required") or ()):
                raise ValueError(f"{what}: {key!r} is null, and a struct column cannot tell whether that "
                                 f"is meant: {WAY_OUT}")
            meant[key] = None
    return meant


def _allowed(value, schema):
    try:
        check(value, schema)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------- dialogues

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}
MEMBERS = {  # what a message of each role may hold
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "function_call", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id", "name"),
}


def _messages(messages, schemas, struct):
    """OpenAI's chat messages -> {role, content} with texts alone, as chat templates take them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list, and the last message from the user or a tool")
    out = []
    calls = []        # of the last assistant turn
    answers = []      # to them, as far as read
    complete = False  # whether each call needs one
    for n, message in enumerate(messages, 1):
        role = ROLES.get(message.get("role")) if isinstance(message, dict) else None
        if role is None:
            raise ValueError(f"message {n} must be {{role, content}}: role system, user, assistant or tool")
        what = f"message {n} ({role})"
        _only(what, message, MEMBERS[role])
        if role == "tool":
            text = _text(message.get("content"), what)
            answers.append((what, message.get("tool_call_id"), message.get("name"), text))
            continue
        out += _in_order(answers, calls, complete)
        calls = []
        answers = []
        complete = False
        if role == "assistant":
            text, calls, complete = _assistant(message, what, schemas, struct)
        else:
            text = _text(message.get("content"), what)
        out.append({"role": role, "content": text})
    if role in ("system", "assistant"):
        raise ValueError("the last message must be from the user or a tool")
    return out + _in_order(answers, calls, complete)


def _text(content, what):
    """The text of a message's content: a string, or parts of type text."""
    if isinstance(content, list) and content:
        for part in content:
            _only(f"a part of {what}", part, ("type", "text"))
        texts = [part.get("text") if part.get("type") == "text" else None for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise ValueError(f"{what} must have as content a text, or parts of type text")
    return content


def _assistant(message, what, schemas, struct):
    """(text in the completion format, its calls [(id or None, name)], whether each needs an answer)."""
    given = list(message.get("tool_calls") or [])
    if message.get("function_call"):  # the older form
        given.append(message["function_call"])
    thought = message.get("reasoning_content") or ""
    content = message.get("content")
    if not given and not thought:
        text = _text(content, what)
        calls = [call for call in rest.parse_calls(text) if isinstance(call, rest.Call)]
        return text, [(None, call.name) for call in calls], False
    said = _text(content or "", what)
    thought = _text(thought, what)
    calls = [_call(call, f"call {n} of {what}", schemas, struct) for n, call in enumerate(given, 1)]
    formatted = bool(rest.split_blocks(said))  # in the completion format already
    text = completion_text([call for _, call in calls], thought, None if formatted else said or None)
    text = f"{said}\n{text}" if formatted else text
    return text, [(id, call["name"]) for id, call in calls], True


def _in_order(answers, calls, complete):
    """Tool messages in the order of the calls [(id, name)] before them.

    answers: [(message, id, name, text)], id and name None where not given. complete: each call needs an
    answer. Raises ValueError for an answer to none of the calls, and for a call without answer."""
    if not complete and not any(id or name for _, id, name, _ in answers):
        return [{"role": "tool", "content": text} for *_, text in answers]
    texts = [None] * len(calls)
    for what, id, name, text in sorted(answers, key=lambda answer: (not answer[1], not answer[2])):
        fitting = [k for k, call in enumerate(calls) if texts[k] is None
                   and id in (None, "", call[0]) and name in (None, "", call[1])]
        if not fitting:
            raise ValueError(f"{what} answers {id or name or 'nothing'!r}, which is not open: the calls "
                             f"before it are {', '.join(str(i or n) for i, n in calls) or 'none'}")
        texts[fitting[0]] = text
    if complete and None in texts:
        name = calls[texts.index(None)][1]
        raise ValueError(f"the call of {name!r} has no answer: {len(calls)} calls are followed by "
                         f"{len(answers)} tool messages")
    return [{"role": "tool", "content": text} for text in texts if text is not None]
