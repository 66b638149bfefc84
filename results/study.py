"""The runs behind the tables of results/README.md. A finished run is not run again, a stopped one goes on.

    python results/study.py toy --workers 2      what is missing of a plan, each run with one thread
    python results/study.py long-structure       another plan, of results/prediction.md; so is `later`
    python results/study.py real                 SmolLM2-135M in bfloat16
    python results/study.py toy --table          its tables in Markdown; and PLAN-seeds.csv, PLAN-training.csv
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
            kept = KEPT if method == "rest" and seed < 3 else []  # toy_tools.signal reads them
            plan.append((method, seed, ["--method", method, *kept]))
    for seed in range(5):
        for method in ("rest-static", "entropy-up", "dr-grpo"):
            plan.append((method, seed, ["--method", method]))
        for method in ("grpo", "rest"):
            options = ["--method", method, "--reward-scaling", "static"]
            plan.append((f"{method}-static-reward", seed, options))
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
    options = ["--model", str(runs / "real" / "start"), "--steps", "24", "--warmup-steps", "3"]
    options += ["--learning-rate", "2e-5", "--prompts", "4", "--group", "8", "--max-completion-tokens", "112"]
    options += ["--eval-rows", "60", "--eval-samples", "1", "--eval-batch", "30", "--save-steps", "8"]
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

def read(folder, plan):
    """[{arm, seed, before, after, lines, curve}] of the finished runs; curve: {metric: a value per step}."""
    found = []
    for arm, seed, _ in plan:
        path = folder / f"{arm}-{seed}"
        if (path / "after.json").exists():
            with open(path / "metrics.csv") as file:
                rows = list(csv.DictReader(file))
            curve = {name: [float(row[name]) for row in rows] for name in TRAINING}
            found.append(read_run(path) | {"arm": arm, "seed": seed, "curve": curve})
    return found


def reached(values, level):
    """The first step whose mean of 5 reaches the level; the number of steps if none does."""
    return next((t for t, value in enumerate(smooth(values)) if value >= level), len(values))


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


def compare(found, value, baseline="grpo"):
    """{arm: (mean ± sd over seeds, paired difference to the baseline, 95% interval)} of value(run)."""
    return {arm: (spread(values), "–" if arm == baseline else interval(differences))
            for arm, (values, differences) in paired(found, value, baseline).items()}


def category(one, name):
    return next(line["exact"] for line in one["lines"] if (line["when"], line["category"]) == ("after", name))


def tables(found):
    """Markdown."""
    counts = Counter(one["arm"] for one in found)
    fallen = [text for one in found if (text := collapse(one))]
    end = compare(found, lambda one: one["after"])
    to_rest = compare(found, lambda one: one["after"], "rest")
    area = compare(found, lambda one: statistics.mean(one["curve"]["exact"]))
    early = compare(found, lambda one: reached(one["curve"]["format"], 0.95))
    head = ["arm", "seeds", "exact calls at the end", "− grpo", "− rest", "mean of training", "− grpo",
            "steps to format 0.95", "− grpo", "below start"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, count in counts.items():
        below = sum(text.startswith(f"{arm} seed") for text in fallen)
        cells = [arm, str(count), *end[arm], to_rest[arm][1], *area[arm], *early[arm], str(below)]
        lines.append(f"| {' | '.join(cells)} |")
    names = list(dict.fromkeys(line["category"] for line in found[0]["lines"]))
    by_name = [compare(found, lambda one, name=name: category(one, name)) for name in names]
    for part, title in enumerate(("mean ± sd", "− grpo")):
        lines += ["", f"| {title} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for arm in counts:
            lines.append(f"| {arm} | " + " | ".join(table[arm][part] for table in by_name) + " |")
    return "\n".join([*lines, "", *fallen])


def write(found, folder, plan):
    with open(folder / f"{plan}-seeds.csv", "w", newline="") as file:
        lines = [{"arm": one["arm"]} | line for one in found for line in one["lines"]]
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)
    with open(folder / f"{plan}-training.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", *TRAINING])
        for one in found:
            for step, values in enumerate(zip(*one["curve"].values())):
                values = [round(value, 4) for value in values]
                writer.writerow([one["arm"], one["seed"], step, *values])


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="a folder RUNS/PLAN holds the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the CSV files")
    args = parser.parse_args(argv)
    folder = args.runs.resolve() / args.plan
    plan = PLANS[args.plan](folder.parent)
    if args.table:
        found = read(folder, plan)
        if not found:
            sys.exit(f"study.py: error: no finished run of this plan in {folder}: name the folder with --runs")
        write(found, args.out, args.plan)
        print(tables(found))
        return
    with ThreadPoolExecutor(args.workers) as pool:
        for arm, seed, options in plan:
            pool.submit(run, folder, f"{arm}-{seed}", ["--seed", str(seed), *options])


if __name__ == "__main__":
    main()
