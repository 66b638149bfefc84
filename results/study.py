"""The runs behind the tables of results/README.md. A finished run is not run again, a stopped one goes on.

    python results/study.py toy --workers 2      what is missing of a plan, each run with one thread
    python results/study.py long-structure       another plan, of results/prediction.md; so is `later`
    python results/study.py real                 SmolLM2-135M in bfloat16
    python results/study.py toy --collect        toy-seeds.csv and toy-training.csv, of its finished runs
    python results/study.py toy --table          the tables of these in Markdown, as in README.md
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from toy_tools.show import interval, read_run, smooth, spread

METHODS = (
    "grpo", "rest", "rest-official", "no-thought", "shuffled", "top-entropy", "low-prob", "token-entropy")
KEPT = ["--keep-steps", "0", "4", "8", "15", "25", "60", "100"]
TRAINING = ("exact", "format", "correct", "H_format", "H_name", "H_params", "H_thought")


# ---- plans: [(arm, seed, options)], in the order in which they are run ----

def toy(runs):
    """The default run by method; then its ablations."""
    plan = []
    for method in METHODS:
        for seed in range(8):
            kept = KEPT if method == "rest" and seed < 5 else []  # toy_tools.signal reads them
            plan.append((method, seed, ["--method", method, *kept]))
    for seed in range(5):
        for method in ("rest-static", "entropy-up", "dr-grpo"):
            plan.append((method, seed, ["--method", method]))
        plan.append(("rest-static-reward", seed, ["--method", "rest", "--reward-scaling", "static"]))
    return plan


SMALL = ["--prompts", "2", "--learning-rate", "2e-4", "--train-rows", "1000", "--eval-rows", "100"]


def long_structure(runs):
    """Two prompts a step from a start with broken format, made by `python train_small.py --steps 0
    --warm-start-steps 120 --output-dir RUNS/long-structure --name start`."""
    arms = ("grpo", "rest", "rest-by-entropy", "signal-first")
    return begun_from(runs / "long-structure" / "start", arms, ["--steps", "80", *SMALL])


def later(runs):
    """Two prompts a step, from step 25 of the default run."""
    start = runs / "toy" / "rest-0" / "kept" / "step25"
    return begun_from(start, ("grpo", "rest"), ["--steps", "60", *SMALL])


def begun_from(model, arms, options):
    return [(arm, seed, ["--method", arm, "--model", str(model), *options])
            for seed in range(8) for arm in arms]


def real(runs):
    """SmolLM2-135M from a start made by `python train_small.py --model SmolLM2-135M-Instruct.gguf --steps 0
    --warm-start-steps 16 --noise 0.05 --eval-rows 0 --max-completion-tokens 112 --output-dir RUNS/real
    --name start`."""
    options = ["--model", str(runs / "real" / "start"), "--steps", "20", "--warmup-steps", "3"]
    options += ["--learning-rate", "2e-5", "--prompts", "4", "--group", "8", "--max-completion-tokens", "112"]
    options += ["--eval-rows", "60", "--eval-samples", "1", "--eval-batch", "100", "--save-steps", "8"]
    return [(arm, seed, ["--method", arm, *options]) for seed in range(4) for arm in ("grpo", "rest")]


PLANS = {"toy": toy, "long-structure": long_structure, "later": later, "real": real}


# ---- running ----

def run(folder, name, options):
    """One run in a process of its own, unless it has finished."""
    if (folder / name / "after.json").exists():
        return
    resume = ["--resume"] if (folder / name).exists() else []
    script = "bfloat16.py" if folder.name == "real" else "curricula.py"
    command = [sys.executable, str(HERE / script), "--output-dir", str(folder)]
    command += ["--name", name, *resume, *options]
    folder.mkdir(parents=True, exist_ok=True)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, env=one_thread)
    finished = (folder / name / "after.json").exists()
    print(name, "finished" if finished else f"failed: see {folder / name}.log", flush=True)


# ---- tables ----

def collect(folder, plan, out):
    """Finished runs -> OUT-seeds.csv, a line per run, moment and category; OUT-training.csv, one per step.
    Raises ValueError without any."""
    seeds, training = [], []
    for arm, seed, _ in plan:
        path = folder / f"{arm}-{seed}"
        if (path / "after.json").exists():
            seeds += [{"arm": arm} | line for line in read_run(path)["lines"]]
            with open(path / "metrics.csv") as file:
                for step, line in enumerate(csv.DictReader(file)):
                    values = {name: round(float(line[name]), 4) for name in TRAINING}
                    training.append({"arm": arm, "seed": seed, "step": step} | values)
    if not seeds:
        raise ValueError(f"no finished run of this plan in {folder}: name the folder with --runs")
    for lines, name in ((seeds, "seeds"), (training, "training")):
        with open(f"{out}-{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
            writer.writeheader()
            writer.writerows(lines)


def read(out):
    """Those CSVs -> [{arm, seed, before, after: exact-call rates, lines, curve}]; curve: {metric: a value
    per step}. Raises OSError."""
    found = {}
    with open(f"{out}-seeds.csv") as file:
        for line in csv.DictReader(file):
            one = found.setdefault((line["arm"], line["seed"]), {"lines": [], "curve": {}})
            one |= {"arm": line["arm"], "seed": int(line["seed"])}
            one["lines"].append(line)
            if line["category"] == "all":
                one[line["when"]] = float(line["exact"])
    with open(f"{out}-training.csv") as file:
        for line in csv.DictReader(file):
            curve = found[line["arm"], line["seed"]]["curve"]
            for name in TRAINING:
                curve.setdefault(name, []).append(float(line[name]))
    return list(found.values())


def reached(values, level):
    """The first step whose mean of 5 reaches the level; the number of steps if none does. The CSVs are
    rounded, and a mean of 5 steps may be 0.95 exactly."""
    return next((t for t, value in enumerate(smooth(values)) if value > level - 1e-4), len(values))


def collapse(one):
    """A sentence on a run that ends below its start: when format and correctness fell to half their best."""
    if one["after"] >= one["before"]:
        return ""
    places = []
    for name in ("format", "correct"):
        values = smooth(one["curve"][name])
        best = max(values)
        peak = values.index(best)
        fallen = next((t for t, value in enumerate(values) if t > peak and value < best / 2), None)
        if fallen is not None:
            places.append(f"{name} {best:.2f} (step {peak}) → {values[-1]:.2f}, half at step {fallen}")
    return f"{one['arm']} seed {one['seed']}: {'; '.join(places) or 'slowly'}"


def paired(found, value, baseline="grpo"):
    """{arm: (a value per seed, their differences to the baseline's of the same seed)} of value(run)."""
    arms = {}
    for one in found:
        arms.setdefault(one["arm"], {})[one["seed"]] = value(one)
    base = arms.get(baseline, {})
    return {arm: (list(of_seed.values()), [x - base[seed] for seed, x in of_seed.items() if seed in base])
            for arm, of_seed in arms.items()}


def compare(found, value, baseline="grpo", digits=3):
    """{arm: (mean ± sd over seeds, paired difference to the baseline, 95% interval)} of value(run)."""
    table = {}
    for arm, (values, differences) in paired(found, value, baseline).items():
        difference = "–" if arm == baseline else interval(differences, digits).replace("-", "−")
        table[arm] = spread(values, digits), difference
    return table


def table(title, columns):
    """Markdown of {heading: {arm: cell}}."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in next(iter(columns.values())):
        lines.append(f"| {arm} | {' | '.join(str(cells[arm]) for cells in columns.values())} |")
    return "\n".join(lines)


def tables(found):
    """Markdown: at the end, in training, by category (differences); a sentence on each collapse."""
    def mean(name):
        return lambda one: statistics.mean(one["curve"][name])

    def at_end(name):
        def exact(one):
            lines = [line for line in one["lines"] if (line["when"], line["category"]) == ("after", name)]
            return float(lines[0]["exact"])
        return exact

    def part(value, k, baseline="grpo", digits=3):
        return {arm: cells[k] for arm, cells in compare(found, value, baseline, digits).items()}

    fallen = [text for one in found if (text := collapse(one))]
    counts = Counter(one["arm"] for one in found)
    below = {arm: sum(text.startswith(f"{arm} seed") for text in fallen) for arm in counts}
    end = at_end("all")
    first = {"seeds": counts, "exact calls at the end": part(end, 0), "− grpo": part(end, 1),
             "− rest": part(end, 1, "rest"), "below start": below}
    training = {}
    for title, value, digits in (
            ("mean exact", mean("exact"), 3), ("mean format", mean("format"), 3),
            ("steps to format 0.95", lambda one: reached(one["curve"]["format"], 0.95), 1)):
        columns = [part(value, k, digits=digits) for k in range(2)]
        training |= {title: columns[0], f"{title} − grpo": columns[1]}
    names = dict.fromkeys(line["category"] for line in found[0]["lines"])
    by_category = {name: part(at_end(name), 1) for name in names if name != "all"}
    texts = [table("at the end", first), table("in training", training), table("− grpo", by_category)]
    return "\n\n".join([*texts, "\n".join(fallen)])


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="a folder RUNS/PLAN holds the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the CSVs")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the CSVs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the CSVs")
    args = parser.parse_args(argv)
    folder = args.runs.resolve() / args.plan
    plan = PLANS[args.plan](folder.parent)
    out = args.out / args.plan
    try:
        if args.collect:
            collect(folder, plan, out)
        if args.table:
            print(tables(read(out)))
    except (OSError, ValueError) as error:
        sys.exit(f"study.py: error: {error}")
    if args.collect or args.table:
        return
    with ThreadPoolExecutor(args.workers) as pool:
        for arm, seed, options in plan:
            pool.submit(run, folder, f"{arm}-{seed}", ["--seed", str(seed), *options])


if __name__ == "__main__":
    main()
