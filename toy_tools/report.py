"""One self-contained page about one or several runs: curves, and episodes in which every token shows its
region, entropy, weight and objective.

    python -m toy_tools.report runs/rest-seed0                     # writes runs/rest-seed0/report.html
    python -m toy_tools.report runs/rest-seed* runs/grpo-seed* -o page.html
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
PARTS = ("config.json", "metrics.jsonl", "before.json", "after.json", "time.json", "episodes.jsonl")
COLUMNS = ("step", "exact", "format", "correct", "reward", "tokens", "H_", "w_")  # beginnings of names
# settings in which runs of one kind, which are averaged, may differ
SAME_KIND = ("method", "seed", "name", "output_dir", "resume", "device", "save_steps", "keep_steps")

# ---- recording, while a run trains ----

class Recorder:
    """Keeps a few episodes of a run in folder/episodes.jsonl: a line for every `every`-th step and the last.

    A resumed run goes on in the same file: what was recorded at its first recorded step or later is
    replaced. Raises ValueError if nothing would be recorded."""

    def __init__(self, folder, every=10, prompts=2):
        for name, value in (("every", every), ("prompts", prompts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}: it says how much a report shows")
        self.file = Path(folder) / "episodes.jsonl"
        self.every = every
        self.prompts = prompts
        self.trimmed = False

    def record(self, step, batch, weight, cfg, chat):
        """Record step `step`, if it is one of those to keep.

        batch, weight: as rest.train_step returns them; chat: rest.Chat. Prompts whose completions differ in
        reward come first: the others teach nothing. Beside `weight` stand those that every other method
        gives in the whole batch, if it can; H is in nats."""
        if step % self.every and step != cfg.steps - 1:
            return
        if not self.trimmed:
            _trim(self.file, step)
            self.trimmed = True
        progress = step / cfg.steps
        advantages = batch.advantages.view(-1, batch.group)                 # (P, G)
        weights = {}
        for name, method in rest.WEIGHTS.items():
            if name == cfg.method:
                weights[name] = weight  # not called twice a step: a method of one's own may have a memory
                continue
            try:
                weights[name] = method(batch, dataclasses.replace(cfg, method=name), progress)  # (N, T)
            except Exception as error:  # another's bug must not end this run
                rest.warn_once(f"the page lacks the weights of method {name}, which failed: {error!r}")
        teaches = advantages.ne(0).any(1).tolist()
        chosen = sorted(range(len(batch.rows)), key=lambda p: not teaches[p])[:self.prompts]
        groups = []
        for p in chosen:
            group = _task(batch, p, chat)
            group["completions"] = []
            for g, advantage in enumerate(advantages[p].tolist()):
                i = p * batch.group + g
                form, correct, exact = batch.scores[i]
                reward = rest.episode_reward(form, correct, progress, cfg.reward_scaling)
                group["completions"].append({
                    **_completion(batch, i, weights, chat),
                    "format": form,
                    "correct": correct,
                    "exact": bool(exact),
                    "reward": round(reward, 4),
                    "A": round(advantage, 4)})
            groups.append(group)
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(_line({"step": step, "groups": groups}))


def _line(value):
    return json.dumps(value, separators=(",", ":")) + "\n"


def _trim(file, step):
    """Drop what was recorded at `step` or later."""
    kept = [value for value in read_lines(file) if value["step"] < step]
    file.write_text("".join(map(_line, kept)), encoding="utf-8")


def _task(batch, p, chat):
    row = batch.rows[p]
    asked = [m.get("content") for m in row["messages"] if m["role"] == "user"]
    return {
        "category": row.get("category") or "",
        "asked": asked[-1] if asked and isinstance(asked[-1], str) else "",
        "prompt": chat.decode(batch.prompts[p]),
        "gold": [[[call["name"], _json(call["arguments"])] for call in turn] for turn in row["gold"]]}


def _completion(batch, i, weights, chat):
    length = int(batch.length[i])
    region = batch.region[i, :length].tolist()
    return {
        "tokens": [chat.text(token) for token in batch.tokens[i, :length].tolist()],
        "region": region,
        "H": [round(x, 3) for x in batch.entropy[i, :length].tolist()],
        "logp": [round(x, 3) for x in batch.logp[i, :length].tolist()],
        "w": {name: compact(weight[i, :length].tolist(), region) for name, weight in weights.items()},
        "calls": compare(batch.rows[i // batch.group]["gold"], batch.texts[i]),
        "blocks": [[_block(block) for block in rest.split_blocks(text)] for text in batch.texts[i]],
        "refused": batch.refused[i],
        "truncated": bool(batch.truncated[i])}


def _block(block):
    return block.kind if block.closed else block.kind + " (not closed)"


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def compact(weight, region):
    """The weights of one completion, to 3 digits: {region: weight} if each region has one, else the list.

    >>> compact([2.0, 2.0, 0.0, 0.5], [4, 4, -1, 2])
    {4: 2.0, 2: 0.5}
    """
    weight = [float(f"{w:.3g}") for w in weight]
    sampled = [(r, w) for r, w in zip(region, weight) if r >= 0]
    by_region = dict(sampled)
    return by_region if all(by_region[r] == w for r, w in sampled) else weight


# ---- calls beside gold ----

def compare(gold, texts):
    """What a completion called beside what it should have called: a list of [turn, state, name, arguments].

    gold: per turn a list of {"name", "arguments"}; texts: per turn a str. state: right, wrong (other
    arguments), missing, surplus, or unreadable (its name is then the reason). arguments: a list of [key,
    called, wanted, equal], JSON texts or None where there is no such argument. Calls of one name are paired
    so that most arguments are equal."""
    found = []
    for turn in range(max(len(gold), len(texts))):
        wanted = gold[turn] if turn < len(gold) else []
        called = rest.parse_calls(texts[turn]) if turn < len(texts) else []
        pairs = _pair(wanted, called)
        for i, want in enumerate(wanted):
            got = called[pairs[i]].arguments if i in pairs else {}
            arguments = _arguments(got, want["arguments"])
            state = "right" if all(equal for *_, equal in arguments) else "wrong"
            found.append([turn, state if i in pairs else "missing", want["name"], arguments])
        for j, call in enumerate(called):
            if isinstance(call, rest.CallError):
                found.append([turn, "unreadable", str(call), []])
            elif j not in pairs.values():
                found.append([turn, "surplus", call.name, _arguments(call.arguments, {})])
    return found


def _pair(wanted, called):
    """{index of a gold call: index of a call of its name}, pairs with the fewest differences first."""
    candidates = []
    for i, want in enumerate(wanted):
        for j, call in enumerate(called):
            if isinstance(call, rest.Call) and call.name == want["name"]:
                differences = sum(not equal for *_, equal in _arguments(call.arguments, want["arguments"]))
                candidates.append((differences, i, j))
    pairs = {}
    for _, i, j in sorted(candidates):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


def _arguments(called, wanted):
    rows = []
    for key in {**wanted, **called}:
        got = _json(called[key]) if key in called else None
        want = _json(wanted[key]) if key in wanted else None
        equal = key in called and key in wanted and rest.same_value(called[key], wanted[key])
        rows.append([key, got, want, equal])
    return rows


# ---- the page, of finished runs ----

def write(folders, out, max_bytes=MAX_BYTES):
    """Write the page of one or several runs to `out`, one HTML file that fetches nothing; returns its path.

    What a run's folder lacks, the page says. Where it would be larger than max_bytes, it shows fewer of the
    recorded steps, evenly spaced, and says so. Raises FileNotFoundError for a folder that is not there and
    ValueError for one that holds no run."""
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


def _parse(text, file):
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): take it away, and the page does without it") from None


def read_lines(file):
    """The JSON lines of a file, without a last one that a kill has cut; none if there is no such file."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [_parse(line, file) for line in text.splitlines(True) if line.endswith("\n")]


def _load(folder):
    """What a run's folder holds, as the page wants it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder} (name folders of runs, such as runs/rest-seed0)")
    missing = [part for part in PARTS if not (folder / part).exists()]
    if len(missing) == len(PARTS):
        raise ValueError(f"{folder} holds no run: none of {', '.join(PARTS)} is there")
    found = {}
    for part in PARTS:
        file = folder / part
        if part.endswith(".json") and file.exists():
            found[part] = _parse(file.read_text(encoding="utf-8"), file)
    config = found.get("config.json", {})
    settings = {**config.get("run", {}), **config.get("config", {})}
    metrics = read_lines(folder / "metrics.jsonl")
    names = [name for name in (metrics[0] if metrics else ()) if name.startswith(COLUMNS)]
    episodes = read_lines(folder / "episodes.jsonl")
    return {
        "name": folder.resolve().name,
        "method": settings.get("method", ""),
        "settings": settings,
        "metrics": {name: [row.get(name) for row in metrics] for name in names},
        "before": found.get("before.json"),
        "after": found.get("after.json"),
        "time": found.get("time.json"),
        "recorded": len(episodes),
        "episodes": episodes,
        "missing": missing}


def _labels(runs):
    """A label per run: its method, and the settings in which the runs of that method differ, not counting
    the seed. The page averages over runs of one label."""
    labels = []
    for run in runs:
        label = run["method"] or run["name"]
        others = [other["settings"] for other in runs if other["method"] == run["method"]]
        for name, value in run["settings"].items():
            if name not in SAME_KIND and any(other.get(name) != value for other in others):
                label += f", {name} {value}"
        labels.append(label)
    return labels


def _sentence(method):
    """The first paragraph of a method's docstring."""
    doc = inspect.getdoc(method) if inspect.isfunction(method) else None
    return " ".join((doc or "").split("\n\n")[0].split())


def _spread(items, count):
    """`count` of the items, evenly spaced from the first to the last."""
    if count >= len(items):
        return items
    return [items[round(k * (len(items) - 1) / max(count - 1, 1))] for k in range(count)]


def _page(data):
    """The template with the data in it: ASCII, and no character that could end their script element."""
    text = json.dumps(_finite(data), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _finite(value):
    """The value, with None for numbers that JSON does not know (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv=None):
    about = " ".join(__doc__.split("\n\n")[0].split())
    parser = argparse.ArgumentParser(prog="python -m toy_tools.report", description=about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/rest-seed0")
    parser.add_argument("-o", "--out", help="the page; default for one run: report.html in its folder")
    options = parser.parse_args(argv)
    if len(options.runs) > 1 and not options.out:
        parser.error("several runs make one page: say where with -o page.html")
    try:
        print(write(options.runs, options.out or Path(options.runs[0]) / "report.html"))
    except (ValueError, OSError) as error:
        sys.exit(f"toy_tools.report: error: {error}")


if __name__ == "__main__":
    main()
