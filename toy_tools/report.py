"""One self-contained page about one or several runs: curves, and episodes whose every token shows region, entropy, weight and objective.

    python -m toy_tools.report runs/rest-seed0                                   # writes runs/rest-seed0/report.html
    python -m toy_tools.report runs/rest-seed0 runs/rest-seed1 runs/grpo-seed0 -o page.html
"""

import argparse
import dataclasses
import inspect
import json
import math
import sys
from pathlib import Path

import rest

TEMPLATE = Path(__file__).with_name("report.html")
MAX_BYTES = 2_000_000
CURVES = ("exact", "format", "correct", "reward", "tokens")
PARTS = ("config.json", "metrics.jsonl", "before.json", "after.json", "time.json", "episodes.jsonl")
OF_ONE_RUN = {"name", "output_dir", "resume", "seed", "method"}  # settings that do not make another kind of run


# ------------------------------------------------------------------------------------------ recording, while a run trains

class Recorder:
    """Keeps a few episodes of a run: `record` appends one JSON line to folder/episodes.jsonl at every `every`-th step and the last.

    A resumed run goes on in the same file: what an earlier attempt wrote at or after its first recorded step is replaced."""

    def __init__(self, folder, every=10, prompts=2):
        for name, value in (("every", every), ("prompts", prompts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}: it says how much of a run is recorded for its report")
        self.file = Path(folder) / "episodes.jsonl"
        self.every = every
        self.prompts = prompts
        self.trimmed = False

    def record(self, step, batch, advantages, scores, cfg, chat):
        """Record step `step` if it is one of those to keep.

        batch: rest.Rollout with region and covers; advantages float [N]; scores: (format, correctness or None, exact) of each
        episode, list of N; chat: rest.Chat. Of the step's prompts those come first whose completions differ in reward: the others
        teach nothing. The weights are those of the whole batch, as every method computes them; w, H (nats) and logp are rounded."""
        if step % self.every and step != cfg.steps - 1:
            return
        if not self.trimmed:
            _trim(self.file, step)
            self.trimmed = True
        progress = step / cfg.steps
        weights = {}
        for name, method in rest.WEIGHTS.items():
            weights[name] = method(batch, dataclasses.replace(cfg, method=name), progress)  # (N, T)
        teaching = advantages.view(-1, batch.group).ne(0).any(1).tolist()
        chosen = sorted(range(len(batch.rows)), key=lambda p: not teaching[p])[:self.prompts]
        groups = []
        for p in chosen:
            members = range(p * batch.group, (p + 1) * batch.group)
            completions = [_completion(batch, i, advantages, scores, weights, cfg, progress, chat) for i in members]
            groups.append({**_task(batch, p, chat), "completions": completions})
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, "groups": groups}, separators=(",", ":")) + "\n")


def _read_lines(file):
    """The JSON lines of a file, without a last line that was cut by a kill; none if there is no such file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def _trim(file, step):
    """Drop what was recorded at `step` or later."""
    kept = [line for line in _read_lines(file) if line["step"] < step]
    file.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept), encoding="utf-8")


def _task(batch, p, chat):
    row = batch.rows[p]
    asked = [m["content"] for m in row["messages"] if m["role"] == "user" and isinstance(m.get("content"), str)]
    return {
        "category": row.get("category") or "",
        "asked": asked[-1] if asked else "",
        "prompt": chat.decode(batch.prompts[p]),
        "gold": [[[call["name"], json.dumps(call["arguments"], ensure_ascii=False)] for call in turn] for turn in row["gold"]]}


def _completion(batch, i, advantages, scores, weights, cfg, progress, chat):
    length = int(batch.length[i])
    region = batch.region[i, :length].tolist()
    row = batch.rows[i // batch.group]
    form, correct, exact = scores[i]
    return {
        "tokens": [chat.text(x) for x in batch.tokens[i, :length].tolist()],
        "region": region,
        "H": [round(h, 3) for h in batch.entropy[i, :length].tolist()],
        "logp": [round(x, 3) for x in batch.logp[i, :length].tolist()],
        "w": {name: compact(weight[i, :length].tolist(), region) for name, weight in weights.items()},
        "calls": compare(row["gold"], batch.texts[i]),
        "blocks": [[block.kind + ("" if block.closed else " (not closed)") for block in rest.split_blocks(text)] for text in batch.texts[i]],
        "format": form,
        "correct": correct,
        "exact": bool(exact),
        "truncated": bool(batch.truncated[i]),
        "reward": round(rest.episode_reward(form, correct, progress, cfg.reward_scaling), 4),
        "A": round(float(advantages[i]), 4)}


def compact(weight, region):
    """The weights of one completion, to 3 digits: {region: weight} where every region has one weight, else the list itself.

    >>> compact([2.0, 2.0, 0.0, 0.5], [4, 4, -1, 2])
    {4: 2.0, 2: 0.5}
    """
    weight = [float(f"{w:.3g}") for w in weight]
    found = {r: w for w, r in zip(weight, region) if r >= 0}
    one_each = all(found[r] == w for w, r in zip(weight, region) if r >= 0)
    return found if one_each else weight


def compare(gold, texts):
    """What a completion called beside what it should have called, turn by turn.

    gold: one list of {"name", "arguments"} per turn; texts: one str per turn. Returns a list of [turn, state, name, arguments]: state is
    right, wrong (other arguments), missing, surplus or unreadable (name then says why); arguments is a list of [key, called, wanted,
    equal] with JSON texts, None where there is no such argument. Calls of one name are paired so that most arguments are equal."""
    found = []
    for turn in range(max(len(gold), len(texts))):
        wanted = [rest.Call(call["name"], call["arguments"]) for call in gold[turn]] if turn < len(gold) else []
        called = rest.parse_calls(texts[turn]) if turn < len(texts) else []
        pairs = _pair(wanted, called)
        for i, want in enumerate(wanted):
            got = called[pairs[i]].arguments if i in pairs else {}
            arguments = _arguments(got, want.arguments)
            state = "missing" if i not in pairs else "right" if all(equal for *_, equal in arguments) else "wrong"
            found.append([turn, state, want.name, arguments])
        for j, call in enumerate(called):
            if isinstance(call, rest.CallError):
                found.append([turn, "unreadable", str(call), []])
            elif j not in pairs.values():
                found.append([turn, "surplus", call.name, _arguments(call.arguments, {})])
    return found


def _pair(wanted, called):
    """{index of a gold call: index of a call of the same name}, the pairs with most equal arguments first."""
    likeness = []
    for i, want in enumerate(wanted):
        for j, call in enumerate(called):
            if isinstance(call, rest.Call) and call.name == want.name:
                unequal = sum(not equal for *_, equal in _arguments(call.arguments, want.arguments))
                likeness.append((unequal, i, j))
    pairs = {}
    for _, i, j in sorted(likeness):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


def _arguments(called, wanted):
    rows = []
    for key in {**wanted, **called}:
        both = key in called and key in wanted
        texts = [json.dumps(side[key], ensure_ascii=False) if key in side else None for side in (called, wanted)]
        rows.append([key, *texts, both and rest.same_value(called[key], wanted[key])])
    return rows


# -------------------------------------------------------------------------------------------------- the page, of finished runs

def write(folders, out, max_bytes=MAX_BYTES):
    """Write the page of one or several runs to `out`, one HTML file that fetches nothing. What a run's folder lacks, the page says.

    If it would be larger than max_bytes, fewer of the recorded steps are shown, evenly spaced, and the page says so. Raises
    FileNotFoundError for a folder that is not there and ValueError for one that holds no run."""
    runs = [_load(Path(folder)) for folder in folders]
    for run, label in zip(runs, _labels(runs)):
        run["label"] = label
    data = {
        "regions": rest.REGIONS,
        "groups": {name: members[0] for name, members in rest.PAPER_REGIONS.items()},
        "methods": {name: _sentence(method) for name, method in rest.WEIGHTS.items()},
        "runs": runs}
    recorded = [run["episodes"] for run in runs]
    keep = max(map(len, recorded))
    page = _page(data)
    while len(page) > max_bytes and keep > 0:
        keep = min(keep - 1, int(keep * max_bytes / len(page)) + 1)
        for run, episodes in zip(runs, recorded):
            run["episodes"] = _spread(episodes, keep)
        page = _page(data)
    Path(out).write_text(page, encoding="utf-8")
    return Path(out)


def _load(folder):
    """What a run's folder holds, as the page wants it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder} (a report is made of the folders of runs, such as runs/rest-seed0)")
    if not any((folder / part).exists() for part in PARTS):
        raise ValueError(f"{folder} holds no run: none of {', '.join(PARTS)} is there")
    loaded = {part: json.loads((folder / part).read_text(encoding="utf-8")) for part in PARTS
              if part.endswith(".json") and (folder / part).exists()}
    config = loaded.get("config.json", {})
    metrics = _read_lines(folder / "metrics.jsonl")
    columns = {}
    for name in metrics[0] if metrics else ():
        if name == "step" or name in CURVES or name.startswith(("H_", "w_")):
            columns[name] = [row.get(name) for row in metrics]
    episodes = _read_lines(folder / "episodes.jsonl")
    settings = {**config.get("run", {}), **config.get("config", {})}
    return {
        "name": folder.resolve().name,
        "method": settings.get("method", ""),
        "settings": settings,
        "metrics": columns,
        "before": loaded.get("before.json"),
        "after": loaded.get("after.json"),
        "time": loaded.get("time.json"),
        "recorded": len(episodes),
        "episodes": episodes,
        "missing": [part for part in PARTS if not (folder / part).exists()]}


def _labels(runs):
    """One label per run: its method, and the settings in which the runs of that method differ beside the seed. Equal labels are
    averaged over."""
    labels = []
    for run in runs:
        same = [other["settings"] for other in runs if other["method"] == run["method"]]
        names = [name for name in run["settings"] if name not in OF_ONE_RUN and any(s.get(name) != run["settings"][name] for s in same)]
        labels.append(", ".join([run["method"] or run["name"], *(f"{name} {run['settings'][name]}" for name in names)]))
    return labels


def _sentence(method):
    """The first paragraph of a method's docstring."""
    doc = inspect.getdoc(method) if inspect.isfunction(method) else ""
    return " ".join((doc or "").split("\n\n")[0].split())


def _spread(items, count):
    """`count` of the items, evenly spaced from the first to the last."""
    if count >= len(items):
        return items
    return [items[round(k * (len(items) - 1) / max(count - 1, 1))] for k in range(count)]


def _page(data):
    """The template with the data in it. Only ASCII, and no character that could end the script element the data stand in."""
    text = json.dumps(_finite(data), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _finite(value):
    """The value with None for every number that JSON does not know (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy_tools.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/rest-seed0")
    parser.add_argument("-o", "--out", help="the page; default: report.html in the folder, if it is one run")
    options = parser.parse_args(argv)
    if len(options.runs) > 1 and not options.out:
        parser.error("several runs make one page: say where with -o page.html")
    try:
        print(write(options.runs, options.out or Path(options.runs[0]) / "report.html"))
    except (ValueError, OSError) as error:
        sys.exit(f"toy_tools.report: error: {error}")


if __name__ == "__main__":
    main()
