"""BFCL v4 and API-Bank: prompts, official scoring, and a driver that can be interrupted.

    bfcl             simple_python, multiple, parallel, parallel_multiple, irrelevance (1,240 prompts)
    bfcl-live        live_simple, live_multiple, live_parallel, live_parallel_multiple, live_irrelevance, live_relevance
    bfcl-code        simple_java, simple_javascript: arguments are strings in the language's own syntax
    bfcl-multi-turn  multi_turn_base (200 dialogues against the official simulated back ends)
    api-bank         api_bank_1, api_bank_2, api_bank_3 (399, 67, 131 samples in ToolRL's prompt format, from a folder)

BFCL's data and checkers are those of the package bfcl-eval, an optional part:
pip install --no-deps bfcl-eval && pip install mpmath (its full install pulls 3 GB that scoring does not use).
A sample counts by its calls, not by thought or format:
  * AST categories: every call must be readable, and the official checker, which ignores case, spaces and , . / - _ * ^
    in strings, accepts them.
  * irrelevance counts where no call can be read (an empty or broken output passes, as in the official script),
    relevance where one can.
  * multi_turn_base: calls run on the official back ends and results come back as tool messages; a turn ends with an
    output without a readable call, and a dialogue fails with more than 20 steps in a turn. The official checker
    compares states and results. Two departures: a call of a tool that is not offered, and arithmetic that would hang
    the machine, are failed calls that are never evaluated.
  * Prompts carry the official hints ("... in Python 3 syntax."); schemas are JSON schemas, without the descriptions of
    results; names keep their dots and are expected verbatim.
API-Bank is scored twice. "score" is the official rule with its leniencies: only the text behind the last <tool_call> is
read, line by line; unreadable lines are ignored; any call equal to gold in name and parameters counts, whatever stands
around it; an object without "name" or without "parameters" is taken as the parameters, with gold's name (so that
{"name", "arguments"} never counts: the prompts ask for "parameters"). "strict" asks for a closed thought and a closed
call block, in this order and nothing else, with exactly one call, equal to gold, in either spelling.

Averages: `table` prints every category and, where all its parts are there, the unweighted mean of the five bfcl
categories (ours; the leaderboard's overall also has agentic categories, which are not run here), the live AST average
over samples (the leaderboard's "live"), and API-Bank over samples (its official overall).
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
from collections import defaultdict, deque
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tqdm.auto import tqdm

import rest

GROUPS = {
    "bfcl": ["simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"],
    "bfcl-live": ["live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
                  "live_relevance"],
    "bfcl-code": ["simple_java", "simple_javascript"],
    "bfcl-multi-turn": ["multi_turn_base"],
    "api-bank": ["api_bank_1", "api_bank_2", "api_bank_3"],
}
LANGUAGES = {"simple_java": "Java", "simple_javascript": "JavaScript"}  # the others are Python
MAX_STEPS = 20  # in one turn of a dialogue, as in the official script


def expand(names):
    """Group and category names -> category names, in order, each once. Raises ValueError for an unknown one."""
    known = [c for group in GROUPS.values() for c in group]
    for name in names:
        if name not in GROUPS and name not in known:
            raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join([*GROUPS, *known])}")
    return list(dict.fromkeys(c for name in names for c in GROUPS.get(name, [name])))


def benchmark_rows(name, api_bank_dir=""):
    """Rows (see rest.py) of one category, with "id", and with what scoring needs in "scoring".

    Gold is one admissible answer of several; live_relevance has none (gold [])."""
    if name.startswith("api_bank"):
        return _api_bank_rows(name, api_bank_dir)
    return _multi_turn_rows(name) if name.startswith("multi_turn") else _ast_rows(name)


# -------------------------------------------------------------------------------------------- the official BFCL package

@lru_cache(maxsize=None)
def bfcl():
    """The official parts: ast_checker, Language, run (calls), check (dialogues), instances (run's cache), data (path).

    ast_checker imports the package's list of models, and with it the SDK of every vendor. Only one flag of that list is
    read, whether a model writes a_b for a.b; ours does not. So the checker is loaded as a private copy that sees a stub
    in the list's place, and sys.modules is as before afterwards. Raises ImportError with the command to run."""
    try:
        data = Path(importlib.import_module("bfcl_eval").__file__).parent / "data"
        importlib.import_module("mpmath")  # one back end imports it, in the middle of a run
        if not (data / "BFCL_v4_simple_python.json").exists():
            raise ImportError("the installed one has no v4 data")
        name = "bfcl_eval.constants.model_config"
        stub, before = ModuleType(name), sys.modules.get(name)
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
        turns = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_"
        utils, check = importlib.import_module(turns + "utils"), importlib.import_module(turns + "checker")
    except ImportError as error:
        raise ImportError("BFCL needs two optional packages: pip install --no-deps bfcl-eval && pip install mpmath "
                          f"({error})") from error
    return SimpleNamespace(ast_checker=checker.ast_checker, Language=checker.Language, check=check.multi_turn_checker,
                           run=utils.execute_multi_turn_func_call, instances=vars(utils), data=data)


def _lines(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _entries(category):
    """The category's prompts, each with its ground truth (None where there is none)."""
    file, answers = f"BFCL_v4_{category}.json", {}
    if (bfcl().data / "possible_answer" / file).exists():
        answers = {a["id"]: a["ground_truth"] for a in _lines(bfcl().data / "possible_answer" / file)}
    return [(entry, answers.get(entry["id"])) for entry in _lines(bfcl().data / file)]


# ------------------------------------------------------------------------------------------------------- BFCL's schemas

TYPES = {
    "object": "dict object HashMap Hashtable", "array": "array list tuple Array ArrayList Queue Stack Set",
    "number": "float number double", "integer": "integer byte short long Bigint",
    "boolean": "boolean bool Boolean", "string": "string String char",
}
JSON_TYPE = {theirs: ours for ours, names in TYPES.items() for theirs in names.split()}


def json_schema(schema):
    """BFCL's type names -> JSON schema's, at every depth; "any" and unknown ones become no type, which means any.

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


def _tool(function, language="Python"):
    """A BFCL function description as a tool, with the official hints on the language."""
    parameters = json_schema(function["parameters"])
    if language != "Python":
        parameters["properties"] = {name: _code_parameter(p, language)
                                    for name, p in function["parameters"]["properties"].items()}
    syntax = {"Java": "Java 8 SDK", "Python": "Python 3"}.get(language, language)
    description = f"{function['description']} Note that the provided function is in {syntax} syntax."
    return {"type": "function", "function": {"name": function["name"], "description": description,
                                             "parameters": parameters}}


def _code_parameter(p, language):
    """The official checker wants each Java or JavaScript value as a string of code; the official hints say so."""
    hint = (f" This parameter can be of any type of {language} object in string representation." if p["type"] == "any"
            else f" This is {language} {p['type']} type parameter in string representation.")
    if "items" in p:
        hint += f" The list elements are of type {p['items']['type']}; they are not in string representation."
    if "properties" in p:
        hint += " The dictionary entries have the following schema; they are not in string representation. "
        hint += json.dumps(p["properties"])
    return {"type": "string", "description": p.get("description", "") + hint,
            **{k: p[k] for k in ("default", "enum") if k in p}}


# --------------------------------------------------------------------------------------------------------- BFCL's rows

def _ast_rows(category):
    language, rows = LANGUAGES.get(category, "Python"), []
    for entry, truth in _entries(category):
        gold = [[]] if category.endswith("irrelevance") else []
        if truth is not None:
            schemas = {f["name"]: f["parameters"] for f in entry["function"]}
            gold = [[_gold_call(answer, schemas, language) for answer in truth]]
        rows.append({"id": entry["id"], "category": category, "messages": entry["question"][0], "gold": gold,
                     "tools": [_tool(f, language) for f in entry["function"]], "state": None,
                     "scoring": {"function": entry["function"], "truth": truth}})
    return rows


def _gold_call(answer, schemas, language):
    """{function: {parameter: [admissible values]}} -> the shortest admissible call, with the first value of each
    parameter that it needs; "" among the values means that an optional parameter may be left out."""
    (name, parameters), = answer.items()
    schema, arguments = schemas[name], {}
    for key, options in parameters.items():
        if options and ("" not in options or key in schema["required"]):
            value = _first([v for v in options if v != ""] or options)
            arguments[key] = value if language == "Python" else as_code(value, schema["properties"][key], language)
    return {"name": name, "arguments": arguments}


def _first(options):
    """The first value; inside a dict, or a list of dicts, every entry lists its own admissible values again."""
    value = options[0]
    if isinstance(value, dict):
        lists = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
        return {k: v[0] for k, v in lists.items() if "" not in v}
    return [_first([v]) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else value


def as_code(value, schema, language):
    """A gold value in the syntax that the official Java or JavaScript parser reads; variables and strings stand bare.

    >>> as_code([1, 2], {"type": "ArrayList", "items": {"type": "long"}}, "Java")
    'new ArrayList<Long>(Arrays.asList(1L, 2L))'
    """
    kind, item = schema["type"], (schema.get("items") or {}).get("type", "any")
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value) + {"long": "L", "Bigint": "n"}.get(kind, "f" if (kind, language) == ("float", "Java") else "")
    if language == "JavaScript":
        return json.dumps(value)
    quote = "" if kind == "Array" else '"'  # the official parser keeps the quotes of an array's elements

    def element(v):
        return f"{quote}{v}{quote}" if isinstance(v, str) else as_code(v, {"type": item}, language)
    if isinstance(value, dict):
        puts = " ".join(f'put("{k}", {element(v)});' for k, v in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    boxed, items = "Object" if item == "any" else item.capitalize(), ", ".join(map(element, value))
    return f"new {boxed}[]{{{items}}}" if kind == "Array" else f"new ArrayList<{boxed}>(Arrays.asList({items}))"


BACKENDS = {  # class -> file of its functions' descriptions
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}


def _multi_turn_rows(category):
    docs = {name: _lines(bfcl().data / "multi_turn_func_doc" / f"{file}.json") for name, file in BACKENDS.items()}
    rows = []
    for entry, truth in _entries(category):
        functions = [f for name in entry["involved_classes"] for f in docs[name]]
        order = {f["name"]: list(f["parameters"]["properties"]) for f in functions}
        rows.append({"id": entry["id"], "category": category, "messages": entry["question"][0],
                     "gold": [[_parse_code(code, order) for code in turn] for turn in truth],
                     "tools": [_tool(f) for f in functions],
                     "state": {k: entry[k] for k in ("initial_config", "involved_classes")},
                     "scoring": {"turns": entry["question"], "truth": truth}})
    return rows


def _parse_code(code, order):
    """'ls(a=True)' -> {"name": "ls", "arguments": {"a": True}}; positional arguments get the tool's names."""
    call = ast.parse(code, mode="eval").body
    values = [*zip(order[call.func.id], call.args), *((k.arg, k.value) for k in call.keywords)]
    return {"name": call.func.id, "arguments": {name: ast.literal_eval(value) for name, value in values}}


# ------------------------------------------------------------------------------------------------------------ API-Bank

def _api_bank_rows(category, folder):
    path = Path(folder) / f"level-{category[-1]}-api_processed.json"
    if not folder or not path.exists():
        raise FileNotFoundError(f"API-Bank needs a folder with {path.name}, as ToolRL's repository has it; "
                                f"there is none in {folder!r}")
    rows = []
    for i, sample in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        answer = sample["answer"][0] if isinstance(sample["answer"], list) else sample["answer"]
        rows.append({"id": f"{category}_{i}", "category": category, "tools": [], "state": None, "scoring": answer,
                     "messages": [{"role": role, "content": sample[role]} for role in ("system", "user")],
                     "gold": [[{"name": answer["name"], "arguments": answer["parameters"]}]]})
    return rows


def api_bank_official(text, answer):
    """The official rule for one output (see this file's top); answer: {"name", "parameters"}."""
    for line in text.strip().rpartition("<tool_call>")[2].partition("</tool_call>")[0].split("\n"):
        try:
            call = json.loads(line)
            call = json.loads(call) if isinstance(call, str) else call
        except (ValueError, RecursionError):
            continue
        if call is None or isinstance(call, (int, float)):
            return False  # the official script stumbles over it and leaves the sample at 0
        if isinstance(call, dict):
            named = "name" in call and "parameters" in call
            name, parameters = (call["name"], call["parameters"]) if named else (answer["name"], call)
            if name == answer["name"] and parameters == answer["parameters"]:
                return True
    return False


# ------------------------------------------------------------------------------------------------------------- scoring

def score(row, text):
    """An output of a single-turn row -> {"score": 0 or 1, "why": the complaint, "strict": 0 or 1 (API-Bank)}."""
    category, calls = row["category"], rest.parse_calls(text)
    if category.startswith("api_bank"):
        return {"score": int(api_bank_official(text, row["scoring"])), "strict": int(rest.score_texts([text], row)[2])}
    readable = [call for call in calls if isinstance(call, rest.Call)]
    if category.endswith("irrelevance"):
        return {"score": int(not readable)}
    if category.endswith("relevance"):
        return {"score": int(bool(readable))}
    if not calls or len(readable) < len(calls):
        return {"score": 0, "why": "an unreadable call" if calls else "no call"}
    language = bfcl().Language[LANGUAGES.get(category, "Python").upper()]
    return _verdict(bfcl().ast_checker, row["scoring"]["function"], [{call.name: call.arguments} for call in calls],
                    row["scoring"]["truth"], language, category, "rest")


def _verdict(checker, *args):
    try:
        verdict = checker(*args)
    except Exception as error:  # the checkers index into what the model wrote and stumble over types they don't expect
        return {"score": 0, "why": f"checker failed: {error!r}"[:200]}
    return {"score": 1} if verdict["valid"] else {"score": 0, "why": verdict["error_type"]}


def play(row):
    """A sample as a generator: yields (messages, tools), is sent the completion, returns (outputs, scores)."""
    if row["category"].startswith("multi_turn"):
        return (yield from _play_turns(row))
    text = yield row["messages"], row["tools"]
    return text, score(row, text)


HEAVY = {"power": "exponent", "logarithm": "precision", "square_root": "precision", "round_number": "decimal_places"}
COUNT = itertools.count()


def call_code(call, names):
    """Call -> (code for the official back end to evaluate, None), or (code that fails, the error text for the model).

    The name is an offered tool's, keys are identifiers, values are literals: evaluating it can only call the tool."""
    if call.name not in names:
        problem = f"name {call.name[:60]!r} is not defined"
    elif not all(key.isidentifier() and not keyword.iskeyword(key) for key in call.arguments):
        problem = "invalid syntax"
    elif isinstance(amount := call.arguments.get(HEAVY.get(call.name)), (int, float)) and abs(amount) > 1000:
        problem = f"{HEAVY[call.name]} is too large"
    else:
        return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})", None
    return "this_call_failed()", f"Error during execution: {problem}"


def _play_turns(row):
    official, names = bfcl(), {tool["function"]["name"] for tool in row["tools"]}
    run = f"rest{next(COUNT)}"  # the back ends are cached under this name: a fresh one for each dialogue
    entry = {"id": row["id"], **row["state"]}
    state = row["state"]["initial_config"], row["state"]["involved_classes"], run, row["id"]
    messages, outputs, steps = [], [], []  # outputs: per turn, the texts; steps: per turn, the lists of code that ran
    try:
        for turn in row["scoring"]["turns"]:
            messages, outputs, steps = [*messages, *turn], [*outputs, []], [*steps, []]
            while True:
                text = yield messages, row["tools"]
                outputs[-1].append(text)
                calls = [call for call in rest.parse_calls(text) if isinstance(call, rest.Call)]
                messages = [*messages, {"role": "assistant", "content": text}]
                if not calls:
                    break
                code, problems = zip(*(call_code(call, names) for call in calls))
                results, _ = official.run(list(code), *state)
                messages += [{"role": "tool", "content": bad or good} for bad, good in zip(problems, results)]
                steps[-1].append(list(code))
                if len(steps[-1]) > MAX_STEPS:
                    return outputs, {"score": 0, "why": f"more than {MAX_STEPS} steps in turn {len(steps)}"}
        return outputs, _verdict(official.check, steps, row["scoring"]["truth"], entry, row["category"], run)
    finally:
        for name in [name for name in official.instances if name.startswith(run + "_")]:
            del official.instances[name]


# -------------------------------------------------------------------------------------------------------------- driver

def evaluate_benchmarks(names, generate, out_dir, limit=None, header=None, api_bank_dir="", batch_size=32,
                        progress=True):
    """Run and score benchmarks; returns results, dicts {category, id, score, output, …}, which `table` turns into text.

    names: groups or categories. generate: list of (messages, tools) -> list of greedy completions.
    limit: at most so many prompts of each category, a number or {category: number}; a fixed random subset, and a
    smaller one is part of a larger one. header: JSON-able dict of all that outputs depend on (model, token limit, …).

    Each result goes to out_dir/benchmarks.jsonl as soon as it is there; an interrupted run continues behind the last.
    Raises ValueError if the file there has another header or other data."""
    rows = []
    for category in expand(names):
        more = benchmark_rows(category, api_bank_dir)
        most = limit.get(category) if isinstance(limit, dict) else limit
        rows += [more[i] for i in sorted(random.Random(category).sample(range(len(more)), len(more))[:most or None])]
    keys = [(row["category"], row["id"]) for row in rows]
    data = {key: sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12] for key, row in zip(keys, rows)}
    path = Path(out_dir) / "benchmarks.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = _continue(path, json.loads(json.dumps(header or {})))
    changed = [key for key in keys if key in results and results[key]["data"] != data[key]]
    if changed:
        raise ValueError(f"{path} was made with other benchmark data ({len(changed)} samples differ, such as "
                         f"{changed[0][1]}): use another folder")
    queue = [row for row, key in zip(rows, keys) if key not in results]
    queue = deque(sorted(queue, key=lambda row: -len(str(row["messages"]) + str(row["tools"]))))  # like with like
    pool = []  # [(row, its generator, the request it waits for)]
    with open(path, "a", encoding="utf-8") as out, tqdm(total=len(rows), initial=len(rows) - len(queue), unit="sample",
                                                       desc="benchmarks", disable=not progress) as bar:
        while queue or pool:
            while queue and len(pool) < batch_size:
                row = queue.popleft()
                game = play(row)
                pool.append((row, game, next(game)))
            waiting = []
            for (row, game, _), text in zip(pool, generate([request for *_, request in pool]), strict=True):
                try:
                    waiting.append((row, game, game.send(text)))
                except StopIteration as end:
                    key, (output, scores) = (row["category"], row["id"]), end.value
                    results[key] = {"category": key[0], "id": key[1], **scores, "data": data[key], "output": output}
                    out.write(json.dumps(results[key]) + "\n")
                    out.flush()
                    bar.update()
            pool = waiting
    return [results[key] for key in keys]


def load_results(path):
    """(header, results) of a benchmarks.jsonl; a last line that was cut by an interruption is left out."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        first, *results = map(json.loads, text[:text.rfind("\n") + 1].splitlines())
        return first["header"], results
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of benchmark results: {error!r}") from error


def _continue(path, header):
    """{(category, id): result} so far. The file is made ready to append to: begun, or cut behind its last full line."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    if not whole:
        path.write_text(json.dumps({"header": header}) + "\n", encoding="utf-8")
        return {}
    old, results = load_results(path)
    if old != header:
        differ = ", ".join(k for k in {**old, **header} if old.get(k) != header.get(k))
        raise ValueError(f"{path} belongs to another evaluation ({differ} differ): use another folder, or delete it")
    with open(path, "r+b") as file:
        file.truncate(whole)
    return {(r["category"], r["id"]): r for r in results}


# --------------------------------------------------------------------------------------------------- intervals, tables

Z = 1.959964  # of a 95% normal interval


def wilson(k, n):
    """95% Wilson interval of k successes in n trials, as two fractions."""
    centre = (k + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(counts):
    """95% interval of the unweighted mean of categories, counts [(k, n)]: normal, with Agresti and Coull's two added
    successes and failures for each, so that 0 of n is not taken for certain."""
    shares = [((k + 2) / (n + 4), n + 4) for k, n in counts]
    centre, half = sum(p for p, _ in shares), Z * math.sqrt(sum(p * (1 - p) / n for p, n in shares))
    return max(0.0, (centre - half) / len(counts)), min(1.0, (centre + half) / len(counts))


def paired_difference(categories):
    """(difference, low, high) of the unweighted mean over categories, each a list of (new, old) 0/1 scores of a sample.

    95% interval after Bonett and Price (2012): Wald's for discordant pairs, with one added to each of the two kinds, so
    that no discordant pair is not taken for no difference."""
    difference = centre = variance = 0.0
    for pairs in categories:
        n, up, down = len(pairs), sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        p, q = (up + 1) / (n + 2), (down + 1) / (n + 2)
        difference, centre = difference + (up - down) / n, centre + p - q
        variance += (p + q - (p - q) ** 2) / (n + 2)
    m, half = len(categories), Z * math.sqrt(variance)
    return difference / m, max(-1.0, (centre - half) / m), min(1.0, (centre + half) / m)


def table(results, compare=None):
    """Text table: for each category n, percent right and its 95% Wilson interval. `compare`, the results (or the file)
    of a second run, adds the paired difference, this run minus that one, on the samples that both have, in points."""
    compare = load_results(compare)[1] if isinstance(compare, (str, Path)) else compare
    other, have = {(r["category"], r["id"]): r for r in compare or []}, {}
    for r in results:
        old = other.get((r["category"], r["id"]))
        if old and old["data"] != r["data"]:
            raise ValueError(f"{r['id']} is another sample in the results to compare with: other benchmark data")
        for rule in ("score", "strict"):
            if rule in r:
                name = r["category"] + ", strict" * (rule == "strict")
                have.setdefault(name, []).append((r[rule], old and old[rule]))
    lines = [(name, [[name]]) for name in have]  # label, parts to average over, each of the samples of some categories
    live, bank = GROUPS["bfcl-live"][:4], GROUPS["api-bank"]
    lines += [("bfcl, mean of 5", [[name] for name in GROUPS["bfcl"]]), ("bfcl-live, all AST samples", [live]),
              ("api-bank, all samples", [bank]), ("api-bank, all samples, strict", [[f"{c}, strict" for c in bank]])]
    cells = [["category", "n", "%", "95% interval"] + ["paired n", "difference", "95% interval"] * bool(other)]
    for label, parts in lines:
        if all(name in have for part in parts for name in part):
            samples = [[pair for name in part for pair in have[name]] for part in parts]
            counts = [(sum(new for new, _ in part), len(part)) for part in samples]
            low, high = wilson(*counts[0]) if len(counts) == 1 else mean_interval(counts)
            mean = sum(k / n for k, n in counts) / len(counts)
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            cells.append([label, str(sum(n for _, n in counts)), f"{100 * mean:.1f}", interval])
            pairs = [[pair for pair in part if pair[1] is not None] for part in samples]
            if all(pairs):
                difference, low, high = (100 * x for x in paired_difference(pairs))
                cells[-1] += [str(sum(map(len, pairs))), f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
                     for row in cells)
