"""BFCL v4 and API-Bank: prompts, official scoring, and a driver that can be interrupted.

    bfcl             simple_python, multiple, parallel, parallel_multiple, irrelevance
                     (1,240 prompts)
    bfcl-live        live_simple, live_multiple, live_parallel, live_parallel_multiple,
                     live_irrelevance, live_relevance
    bfcl-code        simple_java, simple_javascript (arguments are strings of code)
    bfcl-multi-turn  multi_turn_base, multi_turn_miss_func, multi_turn_miss_param,
                     multi_turn_long_context (200 dialogues each, against simulated back ends)
    api-bank         api_bank_1, api_bank_2, api_bank_3 (399, 67 and 131 samples in ToolRL's prompt
                     format, from a folder)

BFCL's data, back ends and checkers are those of the package bfcl-eval, an optional part:
pip install --no-deps bfcl-eval && pip install mpmath
(its full install pulls 3 GB that scoring does not use).

A sample counts by its calls, not by thought or format:
  * AST categories: every call must be readable, and the official checker, which ignores case,
    spaces and , . / - _ * ^ in strings, accepts them.
  * irrelevance counts where no call can be read (an empty or broken output passes, as in the
    official script), relevance where one can.
  * Multi-turn: calls run on the official back ends and results come back as tool messages; a turn
    ends with an output without a readable call. A dialogue ends with the 21st step of a turn, and
    has then failed if that was not its last turn. The official checker compares states and results
    after each turn.
      miss_func: some functions are not among the tools until a later turn, whose user message is
      the official "I have updated some more functions ...". The back ends know them all the time
      (gold itself calls one early, in multi_turn_miss_func_49).
      miss_param: a parameter comes a turn later. Neither category asks for silence before:
      early calls do harm only by the state that they leave, as in the official script.
      long_context: the back ends are filled with long files, listings and records.
    Two departures: a call of a function that no back end of the dialogue has, and arithmetic that
    would hang the machine, are failed calls that are never evaluated.
  * Tools go to the chat template, as in the official function-calling mode, with the official hints
    ("... in Python 3 syntax.", which functions shown later lack there too). Schemas are JSON
    schemas, without the descriptions of results; names keep their dots and are expected verbatim.
  * A prompt that does not fit the model's context fails its sample, in every category, at any
    turn; "why" says so, and `table` counts such samples in a line of its own.

API-Bank is scored twice. "score" is the official rule with its leniencies: only the text behind
the last <tool_call> is read, line by line; unreadable lines are ignored; any call equal to gold in
name and parameters counts, whatever stands around it; an object without "name" or without
"parameters" is taken as the parameters, with gold's name (so that {"name", "arguments"} never
counts: the prompts ask for "parameters"). "strict" asks for a closed thought and a closed call
block, in this order and nothing else, with exactly one call, equal to gold, in either spelling.

`table` prints every category and, where all its parts are there, behind each group:
  * bfcl, mean of 5: unweighted, ours (the leaderboard's non-live average has other parts, and its
    overall also has agentic categories, which are not run here);
  * bfcl-live, all AST samples: the leaderboard's "live";
  * bfcl-multi-turn, overall: the leaderboard's "multi-turn", the unweighted mean of its splits;
  * api-bank, overall: over all samples, as its official script has it.
The last two and the splits are what the paper reports. They can be laid beside its numbers where n
is 800 and 597, that is without a limit.
"""

import ast
import importlib
import importlib.util
import itertools
import json
import keyword
import math
import random
import sys
from collections import Counter, defaultdict, deque
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tqdm.auto import tqdm

import rest

GROUPS = {
    "bfcl": ["simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"],
    "bfcl-live": [
        "live_simple",
        "live_multiple",
        "live_parallel",
        "live_parallel_multiple",
        "live_irrelevance",
        "live_relevance",
    ],
    "bfcl-code": ["simple_java", "simple_javascript"],
    "bfcl-multi-turn": [
        "multi_turn_base",
        "multi_turn_miss_func",
        "multi_turn_miss_param",
        "multi_turn_long_context",
    ],
    "api-bank": ["api_bank_1", "api_bank_2", "api_bank_3"],
}
CATEGORIES = [category for group in GROUPS.values() for category in group]
LANGUAGES = {"simple_java": "Java", "simple_javascript": "JavaScript"}  # the others are Python
MAX_STEPS = 20  # in one turn of a dialogue, as in the official script
NO_FIT = "the prompt does not fit the model's context"


def expand(names):
    """Group and category names -> category names, in order, each once.

    Raises ValueError for an unknown one."""
    for name in names:
        if name not in GROUPS and name not in CATEGORIES:
            choices = ", ".join([*GROUPS, *CATEGORIES])
            raise ValueError(f"unknown benchmark {name!r}: choose from {choices}")
    return list(dict.fromkeys(c for name in names for c in GROUPS.get(name, [name])))


def benchmark_rows(name, api_bank_dir=""):
    """Rows (see rest.py) of one category, with "id", and with what scoring needs in "scoring".

    Gold is one admissible answer of several; live_relevance has none (gold []).
    Raises ImportError without bfcl-eval, FileNotFoundError without API-Bank's files."""
    if name.startswith("api_bank"):
        return _api_bank_rows(name, api_bank_dir)
    return _multi_turn_rows(name) if name.startswith("multi_turn") else _ast_rows(name)


# ---------------------------------------------------------------------- the official BFCL package

@lru_cache(maxsize=None)
def bfcl():
    """The official parts, in a namespace:

    data          folder (Path) of prompts and answers
    ast_checker   verdict on single-turn calls; Language: its enumeration of languages
    run           runs calls on the back ends; instances: the dict in which it caches these
    check         verdict on a dialogue
    more          the user message that comes with functions held back so far

    ast_checker imports the package's list of models, and with it the SDK of every vendor. Only one
    flag of that list is read, whether a model writes a_b for a.b; ours does not. So the checker is
    loaded as a private copy that sees a stub in the list's place, and sys.modules is as before
    afterwards. Raises ImportError with the command to run."""
    try:
        package = importlib.import_module("bfcl_eval")
        data = Path(package.__file__).parent / "data"
        importlib.import_module("mpmath")  # one back end imports it, in the middle of a run
        if not (data / "BFCL_v4_simple_python.json").exists():
            raise ImportError("the installed one has no v4 data")
        checker = _private_ast_checker()
        folder = "bfcl_eval.eval_checker.multi_turn_eval"
        utils = importlib.import_module(f"{folder}.multi_turn_utils")
        dialogues = importlib.import_module(f"{folder}.multi_turn_checker")
        prompts = importlib.import_module("bfcl_eval.constants.default_prompts")
    except ImportError as error:
        raise ImportError(
            "BFCL needs two optional packages: "
            f"pip install --no-deps bfcl-eval && pip install mpmath ({error})"
        ) from error
    return SimpleNamespace(
        data=data,
        ast_checker=checker.ast_checker,
        Language=checker.Language,
        run=utils.execute_multi_turn_func_call,
        instances=vars(utils),
        check=dialogues.multi_turn_checker,
        more=prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
    )


def _private_ast_checker():
    name = "bfcl_eval.constants.model_config"
    before = sys.modules.get(name)
    stub = ModuleType(name)
    stub.MODEL_CONFIG_MAPPING = defaultdict(lambda: SimpleNamespace(underscore_to_dot=False))
    spec = importlib.util.find_spec("bfcl_eval.eval_checker.ast_eval.ast_checker")
    checker = importlib.util.module_from_spec(spec)
    sys.modules[name] = stub
    try:
        spec.loader.exec_module(checker)
    finally:
        del sys.modules[name]
        if before:
            sys.modules[name] = before
    return checker


def _lines(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _entries(category):
    """The category's prompts, each with its ground truth (None where there is none)."""
    file = f"BFCL_v4_{category}.json"
    answer_path = bfcl().data / "possible_answer" / file
    answers = {}
    if answer_path.exists():
        answers = {answer["id"]: answer["ground_truth"] for answer in _lines(answer_path)}
    return [(entry, answers.get(entry["id"])) for entry in _lines(bfcl().data / file)]


# --------------------------------------------------------------------------------- BFCL's schemas

TYPES = {
    "object": "dict object HashMap Hashtable",
    "array": "array list tuple Array ArrayList Queue Stack Set",
    "number": "float number double",
    "integer": "integer byte short long Bigint",
    "boolean": "boolean bool Boolean",
    "string": "string String char",
}
JSON_TYPE = {theirs: ours for ours, names in TYPES.items() for theirs in names.split()}


def json_schema(schema):
    """BFCL's type names -> JSON schema's, at every depth; "any" and unknown ones become no type,
    which means any.

    >>> json_schema({"type": "tuple", "items": {"type": "float"}})
    {'type': 'array', 'items': {'type': 'number'}}
    """
    out = {k: v for k, v in schema.items() if k != "type"}
    if schema.get("type") in JSON_TYPE:
        out = {"type": JSON_TYPE[schema["type"]], **out}
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {name: json_schema(p) for name, p in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        out["items"] = json_schema(schema["items"])
    return out


def _hint(language):
    syntax = {"Java": "Java 8 SDK", "Python": "Python 3"}.get(language, language)
    return f" Note that the provided function is in {syntax} syntax."


def _tool(function, language="Python", hint=True):
    """A BFCL function description as a tool, with the official hint on the language."""
    parameters = json_schema(function["parameters"])
    if language != "Python":
        properties = function["parameters"]["properties"]
        parameters["properties"] = {
            name: _code_parameter(p, language) for name, p in properties.items()
        }
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function["description"] + (_hint(language) if hint else ""),
            "parameters": parameters,
        },
    }


def _code_parameter(p, language):
    """The official checker wants each Java or JavaScript value as a string of code; the official
    hints say so."""
    if p["type"] == "any":
        hint = f" This parameter can be of any type of {language} object in string representation."
    else:
        hint = f" This is {language} {p['type']} type parameter in string representation."
    if "items" in p:
        hint += (f" The list elements are of type {p['items']['type']};"
                 " they are not in string representation.")
    if "properties" in p:
        hint += (" The dictionary entries have the following schema;"
                 f" they are not in string representation. {json.dumps(p['properties'])}")
    kept = {key: p[key] for key in ("default", "enum") if key in p}
    return {"type": "string", "description": p.get("description", "") + hint, **kept}


# ------------------------------------------------------------------------ BFCL's single-turn rows

def _ast_rows(category):
    language = LANGUAGES.get(category, "Python")
    rows = []
    for entry, truth in _entries(category):
        gold = [[]] if category.endswith("irrelevance") else []
        if truth is not None:
            schemas = {f["name"]: f["parameters"] for f in entry["function"]}
            gold = [[_gold_call(answer, schemas, language) for answer in truth]]
        rows.append({
            "id": entry["id"],
            "category": category,
            "messages": entry["question"][0],
            "gold": gold,
            "tools": [_tool(f, language) for f in entry["function"]],
            "state": None,
            "scoring": {"function": entry["function"], "truth": truth},
        })
    return rows


def _gold_call(answer, schemas, language):
    """{function: {parameter: [admissible values]}} -> the shortest admissible call, with the first
    value of each parameter that it needs; "" among the values means that an optional parameter
    may be left out."""
    (name, parameters), = answer.items()
    schema = schemas[name]
    arguments = {}
    for key, options in parameters.items():
        if options and ("" not in options or key in schema["required"]):
            value = _first([v for v in options if v != ""] or options)
            if language != "Python":
                value = as_code(value, schema["properties"][key], language)
            arguments[key] = value
    return {"name": name, "arguments": arguments}


def _first(options):
    """The first value; inside a dict, or a list of dicts, every entry lists its own admissible
    values again."""
    value = options[0]
    if isinstance(value, dict):
        lists = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
        return {k: v[0] for k, v in lists.items() if "" not in v}
    if isinstance(value, list):
        return [_first([v]) if isinstance(v, dict) else v for v in value]
    return value


def as_code(value, schema, language):
    """A gold value in the syntax that the official Java or JavaScript parser reads; variables and
    strings stand bare.

    >>> as_code([1, 2], {"type": "ArrayList", "items": {"type": "long"}}, "Java")
    'new ArrayList<Long>(Arrays.asList(1L, 2L))'
    """
    kind = schema["type"]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        suffixes = {"long": "L", "Bigint": "n"}
        if language == "Java":
            suffixes["float"] = "f"
        return str(value) + suffixes.get(kind, "")
    if language == "JavaScript":
        return json.dumps(value)
    item = (schema.get("items") or {}).get("type", "any")
    quote = "" if kind == "Array" else '"'  # the official parser keeps quotes in an Array

    def element(v):
        return f"{quote}{v}{quote}" if isinstance(v, str) else as_code(v, {"type": item}, language)

    if isinstance(value, dict):
        puts = " ".join(f'put("{k}", {element(v)});' for k, v in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    boxed = "Object" if item == "any" else item.capitalize()
    items = ", ".join(map(element, value))
    if kind == "Array":
        return f"new {boxed}[]{{{items}}}"
    return f"new ArrayList<{boxed}>(Arrays.asList({items}))"


# ------------------------------------------------------------------------- BFCL's multi-turn rows

BACKENDS = {  # class -> file of its functions' descriptions
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}


def _multi_turn_rows(category):
    """Rows of dialogues. "messages" and "tools" are those of the first turn; "scoring" has, turn by
    turn, the user's messages, the tools that it adds and the official ground truth (code)."""
    folder = bfcl().data / "multi_turn_func_doc"
    docs = {name: _lines(folder / f"{file}.json") for name, file in BACKENDS.items()}
    rows = []
    for entry, truth in _entries(category):
        functions = {f["name"]: f for name in entry["involved_classes"] for f in docs[name]}
        held_back = entry.get("missed_function", {})  # {turn: names of functions it adds}
        turns = list(entry["question"])
        added = [[] for _ in turns]
        for turn, names in held_back.items():
            turns[int(turn)] = [{"role": "user", "content": bfcl().more}]
            added[int(turn)] = [_tool(functions[name], hint=False) for name in names]
        later = set().union(*held_back.values())
        rows.append({
            "id": entry["id"],
            "category": category,
            "messages": turns[0],
            "gold": [[_parse_code(code, functions) for code in turn] for turn in truth],
            "tools": [_tool(f) for name, f in functions.items() if name not in later],
            "state": {key: entry[key] for key in ("initial_config", "involved_classes")},
            "scoring": {"turns": turns, "added": added, "truth": truth},
        })
    return rows


def _parse_code(code, functions):
    """'ls(a=True)' -> {"name": "ls", "arguments": {"a": True}}; positional arguments get the names
    that the function's description has, in its order."""
    call = ast.parse(code, mode="eval").body
    names = functions[call.func.id]["parameters"]["properties"]
    values = [*zip(names, call.args), *((k.arg, k.value) for k in call.keywords)]
    arguments = {name: ast.literal_eval(value) for name, value in values}
    return {"name": call.func.id, "arguments": arguments}


# --------------------------------------------------------------------------------------- API-Bank

def _api_bank_rows(category, folder):
    path = Path(folder) / f"level-{category[-1]}-api_processed.json"
    if not folder or not path.exists():
        raise FileNotFoundError(
            f"API-Bank needs a folder with {path.name}, as ToolRL's repository has it; "
            f"there is none in {folder!r}"
        )
    rows = []
    for i, sample in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        answer = sample["answer"]
        answer = answer[0] if isinstance(answer, list) else answer
        rows.append({
            "id": f"{category}_{i}",
            "category": category,
            "messages": [{"role": role, "content": sample[role]} for role in ("system", "user")],
            "gold": [[{"name": answer["name"], "arguments": answer["parameters"]}]],
            "tools": [],
            "state": None,
            "scoring": answer,
        })
    return rows


def api_bank_official(text, answer):
    """The official rule for one output (see this file's top); answer: {"name", "parameters"}."""
    block = text.strip().rpartition("<tool_call>")[2].partition("</tool_call>")[0]
    for line in block.split("\n"):
        try:
            call = json.loads(line)
            call = json.loads(call) if isinstance(call, str) else call
        except (ValueError, RecursionError):
            continue
        if call is None or isinstance(call, (int, float)):
            return False  # the official script stumbles over it and leaves the sample at 0
        if isinstance(call, dict):
            named = "name" in call and "parameters" in call
            name = call["name"] if named else answer["name"]
            parameters = call["parameters"] if named else call
            if name == answer["name"] and parameters == answer["parameters"]:
                return True
    return False


# ---------------------------------------------------------------------------------------- scoring

def score(row, text):
    """An output of a single-turn row -> {"score": 0 or 1}, with "why" (the complaint) where there
    is one, and "strict" (0 or 1) for API-Bank. text: None where the prompt did not fit."""
    category = row["category"]
    is_api_bank = category.startswith("api_bank")
    if text is None:
        return {"score": 0, "why": NO_FIT, **({"strict": 0} if is_api_bank else {})}
    if is_api_bank:
        exact = rest.score_texts([text], row)[2]
        return {"score": int(api_bank_official(text, row["scoring"])), "strict": int(exact)}
    calls = rest.parse_calls(text)
    readable = [call for call in calls if isinstance(call, rest.Call)]
    if category.endswith("irrelevance"):
        return {"score": int(not readable)}
    if category.endswith("relevance"):
        return {"score": int(bool(readable))}
    if not calls:
        return {"score": 0, "why": "no call"}
    if len(readable) < len(calls):
        return {"score": 0, "why": "an unreadable call"}
    return _verdict(
        bfcl().ast_checker,
        row["scoring"]["function"],
        [{call.name: call.arguments} for call in calls],
        row["scoring"]["truth"],
        bfcl().Language[LANGUAGES.get(category, "Python").upper()],
        category,
        "rest",
    )


def _verdict(checker, *args):
    try:
        verdict = checker(*args)
    except Exception as error:  # they index into what the model wrote, whatever its type
        return {"score": 0, "why": f"checker failed: {error!r}"[:200]}
    return {"score": 1} if verdict["valid"] else {"score": 0, "why": verdict["error_type"]}


def play(row):
    """A sample as a generator: yields requests, each (messages, tools); is sent the completion of
    each, or None if its prompt does not fit the model's context; returns (outputs, scores).

    outputs: the text, or for a dialogue the texts turn by turn. scores: see `score`."""
    if row["category"].startswith("multi_turn"):
        return (yield from _play_turns(row))
    text = yield row["messages"], row["tools"]
    return text, score(row, text)


def _play_turns(row):
    scoring = row["scoring"]
    outputs = []  # per turn, the texts
    steps = []  # per turn, the lists of code that ran
    messages = []
    tools = row["tools"]
    with _BackEnds(row) as back_ends:
        for turn, (asked, added) in enumerate(zip(scoring["turns"], scoring["added"]), start=1):
            messages = messages + asked
            tools = tools + added
            outputs.append([])
            steps.append([])
            while len(steps[-1]) <= MAX_STEPS:
                text = yield messages, tools
                if text is None:
                    return outputs, {"score": 0, "why": f"{NO_FIT} (turn {turn})"}
                outputs[-1].append(text)
                calls = [call for call in rest.parse_calls(text) if isinstance(call, rest.Call)]
                messages = messages + [{"role": "assistant", "content": text}]
                if not calls:
                    break
                code, results = back_ends.run(calls)
                steps[-1].append(code)
                messages = messages + [{"role": "tool", "content": result} for result in results]
            else:
                if turn < len(scoring["turns"]):  # the official script checks the last turn even so
                    why = f"more than {MAX_STEPS} steps in turn {turn}"
                    return outputs, {"score": 0, "why": why}
        return outputs, back_ends.verdict(steps)


COUNT = itertools.count()


class _BackEnds:
    """The simulated world of one dialogue: fresh official back ends, which are gone afterwards."""

    def __init__(self, row):
        self.row = row
        self.name = f"rest{next(COUNT)}"  # the official module caches back ends under this name
        tools = itertools.chain(row["tools"], *row["scoring"]["added"])
        self.functions = {tool["function"]["name"] for tool in tools}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        instances = bfcl().instances
        for name in [name for name in instances if name.startswith(self.name + "_")]:
            del instances[name]

    def run(self, calls):
        """Calls -> (their code, their results as texts)."""
        code, problems = zip(*(call_code(call, self.functions) for call in calls))
        results, _ = bfcl().run(
            list(code),
            self.row["state"]["initial_config"],
            self.row["state"]["involved_classes"],
            self.name,
            self.row["id"],
            long_context="long_context" in self.row["category"],
        )
        return list(code), [problem or result for problem, result in zip(problems, results)]

    def verdict(self, steps):
        """steps: per turn, the lists of code that ran -> scores."""
        entry = {"id": self.row["id"], **self.row["state"]}
        truth = self.row["scoring"]["truth"]
        return _verdict(bfcl().check, steps, truth, entry, self.row["category"], self.name)


LIMITS = {  # arguments of the back ends whose size decides how long a call computes
    "power": {"base": 1e100, "exponent": 1000},
    "logarithm": {"precision": 1000},
    "square_root": {"precision": 1000},
    "round_number": {"decimal_places": 1000},
}


def call_code(call, names):
    """Call -> (code for the official back end to evaluate, None), or (code that fails, the error
    text for the model).

    The name is one of `names`, keys are identifiers, values are literals: evaluating the code can
    only call that function."""
    problem = _problem(call, names)
    if problem:
        return "this_call_failed()", f"Error during execution: {problem}"
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
    return f"{call.name}({arguments})", None


def _problem(call, names):
    if call.name not in names:
        return f"name {call.name[:60]!r} is not defined"
    if not all(key.isidentifier() and not keyword.iskeyword(key) for key in call.arguments):
        return "invalid syntax"
    for key, most in LIMITS.get(call.name, {}).items():
        value = call.arguments.get(key, 0)
        if not isinstance(value, (int, float)) or abs(value) > most:
            return f"{key} must be a number, not beyond {most:g}"
    return None


# ----------------------------------------------------------------------------------------- driver

def evaluate_benchmarks(names, generate, out_dir, limit=None, header=None, api_bank_dir="",
                        batch_size=32, progress=True, compare=None):
    """Run and score benchmarks; returns results, dicts {category, id, score, output, …}, which
    `table` turns into text.

    names     groups or categories
    generate  list of (messages, tools) -> list of greedy completions, with None for a request
              whose prompt does not fit the model's context; its sample has failed
    limit     at most so many prompts of each category, a number or {category: number}; a fixed
              random subset, and a smaller one is part of a larger one
    header    JSON-able dict of all that outputs depend on (model, token limit, …)
    compare   results, or their file, that `table` will compare with: refused before the first
              request if it cannot

    Each result goes to out_dir/benchmarks.jsonl as soon as it is there; an interrupted run
    continues behind the last. Raises ValueError if the file there has another header or other
    data, and what `benchmark_rows` and `load_results` raise."""
    rows = _choose(names, limit, api_bank_dir)
    data = {_key(row): _digest(row) for row in rows}
    if compare is not None:
        _counterparts(data, compare)
    path = Path(out_dir) / "benchmarks.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = _continue(path, json.loads(json.dumps(header or {})))
    changed = [key for key in data if key in results and results[key]["data"] != data[key]]
    if changed:
        raise ValueError(
            f"{path} was made with other benchmark data ({len(changed)} samples differ, such as "
            f"{changed[0][1]}): use another folder"
        )
    queue = [row for row in rows if _key(row) not in results]
    bar = tqdm(
        total=len(rows),
        initial=len(rows) - len(queue),
        unit="sample",
        desc="benchmarks",
        disable=not progress,
    )
    with open(path, "a", encoding="utf-8") as out, bar:
        for row, outputs, scores in _play_all(queue, generate, batch_size):
            key = _key(row)
            result = {"category": key[0], "id": key[1], **scores, "data": data[key]}
            results[key] = {**result, "output": outputs}
            out.write(json.dumps(results[key]) + "\n")
            out.flush()
            bar.update()
    return [results[key] for key in data]


def _key(row):
    return row["category"], row["id"]


def _digest(row):
    return sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]


def _choose(names, limit, api_bank_dir):
    rows = []
    for category in expand(names):
        every = benchmark_rows(category, api_bank_dir)
        order = random.Random(category).sample(range(len(every)), len(every))
        most = limit.get(category) if isinstance(limit, dict) else limit
        rows += [every[i] for i in sorted(order[:most or None])]
    return rows


def _play_all(rows, generate, batch_size):
    """Play rows, batch_size at a time, like with like. Yields (row, outputs, scores) of each."""
    def size(row):
        return len(str(row["messages"])) + len(str(row["tools"]))

    queue = deque(sorted(rows, key=size, reverse=True))
    pool = []  # [(row, its game, the request that waits for an answer)]
    while queue or pool:
        while queue and len(pool) < batch_size:
            row = queue.popleft()
            game = play(row)
            pool.append((row, game, next(game)))
        texts = generate([request for *_, request in pool])
        waiting = []
        for (row, game, _), text in zip(pool, texts, strict=True):
            try:
                waiting.append((row, game, game.send(text)))
            except StopIteration as end:
                yield row, *end.value
        pool = waiting


def load_results(path):
    """(header, results) of a benchmarks.jsonl, each line checked; a last line that was cut by an
    interruption is left out.

    Raises FileNotFoundError if there is no such file, ValueError if it is none of this kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; it should be a run's benchmarks.jsonl")
    try:
        text = path.read_bytes().decode()
        first, *lines = text[:text.rfind("\n") + 1].split("\n")[:-1] or [""]
        header = _loads(first).get("header")
        if not isinstance(header, dict):
            raise ValueError("line 1 has no header")
        results = []
        seen = set()
        for number, line in enumerate(lines, start=2):
            result = _loads(line, number)
            problem = _result_problem(result)
            if not problem and _key(result) in seen:
                problem = "is there twice"
            if problem:
                raise ValueError(f"line {number} {problem}")
            seen.add(_key(result))
            results.append(result)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of benchmark results: {error}") from error
    return header, results


def _loads(line, number=1):
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"line {number} is not a JSON object")
    return value


def _result_problem(result):
    """What a line of results lacks, or None."""
    for key in ("category", "id", "data"):
        if not isinstance(result.get(key), str):
            return f"has no {key}"
    if result["category"] not in CATEGORIES:
        return f"has an unknown category, {result['category'][:40]!r}"
    rules = ["score", "strict"] if result["category"] in GROUPS["api-bank"] else ["score"]
    for rule in rules:
        if type(result.get(rule)) is not int or result[rule] not in (0, 1):
            return f"has no {rule} of 0 or 1"
    return None


def _continue(path, header):
    """{(category, id): result} so far. The file is made ready to append to: begun, or cut behind
    its last full line."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    if not whole:
        path.write_text(json.dumps({"header": header}) + "\n", encoding="utf-8")
        return {}
    old, results = load_results(path)
    if old != header:
        differ = ", ".join(key for key in {**old, **header} if old.get(key) != header.get(key))
        raise ValueError(
            f"{path} belongs to another evaluation ({differ} differ): "
            "use another folder, or delete it"
        )
    with open(path, "r+b") as file:
        file.truncate(whole)
    return {_key(result): result for result in results}


# --------------------------------------------------------------------------- intervals and tables

Z = 1.959964  # of a 95% normal interval


def wilson(k, n):
    """95% Wilson interval of k successes in n trials, as two fractions."""
    centre = (k + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(counts):
    """95% interval of the unweighted mean of categories, counts [(k, n)]: normal, with Agresti and
    Coull's two added successes and failures for each, so that 0 of n is not taken for certain."""
    centre = variance = 0.0
    for k, n in counts:
        p = (k + 2) / (n + 4)
        centre += p
        variance += p * (1 - p) / (n + 4)
    half = Z * math.sqrt(variance)
    return max(0.0, (centre - half) / len(counts)), min(1.0, (centre + half) / len(counts))


def paired_difference(categories):
    """(difference, low, high) of the unweighted mean over categories, each a list of (new, old)
    0/1 scores of a sample.

    95% interval after Bonett and Price (2012): Wald's for discordant pairs, with one added to each
    of the two kinds, so that no discordant pair is not taken for no difference."""
    difference = centre = variance = 0.0
    for pairs in categories:
        n = len(pairs)
        up = sum(new > old for new, old in pairs)
        down = sum(new < old for new, old in pairs)
        p = (up + 1) / (n + 2)
        q = (down + 1) / (n + 2)
        difference += (up - down) / n
        centre += p - q
        variance += (p + q - (p - q) ** 2) / (n + 2)
    m = len(categories)
    half = Z * math.sqrt(variance)
    return difference / m, max(-1.0, (centre - half) / m), min(1.0, (centre + half) / m)


STRICT = [f"{category}, strict" for category in GROUPS["api-bank"]]
SUMMARIES = {  # group -> {label: parts}; the shares of the parts are averaged without weights
    "bfcl": {"bfcl, mean of 5": [[category] for category in GROUPS["bfcl"]]},
    "bfcl-live": {"bfcl-live, all AST samples": [GROUPS["bfcl-live"][:4]]},
    "bfcl-multi-turn": {
        "bfcl-multi-turn, overall": [[category] for category in GROUPS["bfcl-multi-turn"]],
    },
    "api-bank": {
        "api-bank, overall": [GROUPS["api-bank"]],
        "api-bank, overall, strict": [STRICT],
    },
}


def table(results, compare=None):
    """Text table: for each category, and behind each group its average (see this file's top), n,
    percent right and its 95% interval; below it the number of samples that did not fit.

    compare: the results of a second run, or their file. It adds the paired difference in points,
    this run minus that one, on the samples that both have. Raises ValueError if there are none, or
    if their data differ."""
    data = {_key(result): result["data"] for result in results}
    old = _counterparts(data, compare) if compare is not None else {}
    pairs = {}  # label -> [(score here, score there or None)]
    for result in results:
        other = old.get(_key(result))
        for rule, ending in (("score", ""), ("strict", ", strict")):
            if rule in result:
                label = result["category"] + ending
                pairs.setdefault(label, []).append((result[rule], other and other[rule]))
    cells = [["category", "n", "%", "95% interval"]]
    if old:
        cells[0] += ["paired n", "difference", "95% interval"]
    for label, parts in _table_lines():
        if all(name in pairs for part in parts for name in part):
            samples = [[pair for name in part for pair in pairs[name]] for part in parts]
            cells.append([label, *_shares(samples), *_differences(samples)])
    lines = [_aligned(cells)]
    too_long = Counter(r["category"] for r in results if r.get("why", "").startswith(NO_FIT))
    if too_long:
        each = ", ".join(f"{category} {n}" for category, n in too_long.items())
        lines.append(
            f"{sum(too_long.values())} of {len(results)} samples did not fit the model's context "
            f"and count as failed: {each}"
        )
    return "\n".join(lines)


def _counterparts(data, compare):
    """Of another run, the results on the samples of this one. data: {key: digest} of this one's."""
    if isinstance(compare, (str, Path)):
        where = str(compare)
        compare = load_results(compare)[1]
    else:
        where = "the second run"
    old = {_key(result): result for result in compare if _key(result) in data}
    if not old:
        raise ValueError(f"nothing to compare: {where} has none of these samples")
    for key, result in old.items():
        if result["data"] != data[key]:
            raise ValueError(
                f"cannot compare: {key[1]} is another sample in {where}, made with other data"
            )
    return old


def _table_lines():
    """All lines that a table can have: (label, parts)."""
    for group, categories in GROUPS.items():
        for category in categories:
            yield category, [[category]]
            if group == "api-bank":
                yield f"{category}, strict", [[f"{category}, strict"]]
        yield from SUMMARIES.get(group, {}).items()


def _shares(samples):
    """samples: per part [(new, old or None)] -> cells: n, percent, interval."""
    counts = [(sum(new for new, _ in part), len(part)) for part in samples]
    low, high = wilson(*counts[0]) if len(counts) == 1 else mean_interval(counts)
    mean = sum(k / n for k, n in counts) / len(counts)
    n = sum(n for _, n in counts)
    return str(n), f"{100 * mean:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"


def _differences(samples):
    """samples: per part [(new, old or None)] -> cells: paired n, difference, interval, or none
    where a part has no pair."""
    paired = [[pair for pair in part if pair[1] is not None] for part in samples]
    if not all(paired):
        return ()
    difference, low, high = (100 * x for x in paired_difference(paired))
    n = sum(len(part) for part in paired)
    return str(n), f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"


def _aligned(cells):
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join(lines)
