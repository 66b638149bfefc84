"""What people look at: one episode coloured by region with its weights, evaluation tables, the learning
curve, methods over seeds.

    python -m toy_tools.show OUT.png runs/a/metrics.csv [runs/b/metrics.csv …]    the curve
    python -m toy_tools.show OUT.csv runs/a runs/b …                              methods over seeds
"""

import csv
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import rest

COLOURS = {rest.TAG: "90", rest.SCAFFOLD: "37", rest.NAME: "1;33", rest.PARAMS: "1;36",
           rest.THOUGHT: "32", rest.TEXT: "35"}


# ---- an episode ----

def paint(text, region):
    """The text in its region's colour, for a terminal."""
    return f"\033[{COLOURS[region]}m{text}\033[0m"


def episode(chat, batch, i, weight, colour=True):
    """Episode i of a Rollout as text: sampled tokens coloured by region, forced ones plain, the weight
    behind each run of equal weight; then per region its tokens, mean entropy (nats) and weight.

    weight: float [N, T]."""
    ids = batch.tokens[i].tolist()
    regions = batch.region[i].tolist()
    weights = weight[i].tolist()
    length = int(batch.length[i])
    out = []
    start = 0
    while start < length:
        end = start + 1
        while end < length and regions[end] == regions[start] and abs(weights[end] - weights[start]) < 1e-6:
            end += 1
        text = chat.decode(ids[start:end])
        if regions[start] < 0:
            out.append(text)
        elif colour:
            out.append(f"{paint(text, regions[start])}\033[2m·{weights[start]:.2f}\033[0m")
        else:
            out.append(f"[{rest.REGIONS[regions[start]]} {weights[start]:.2f}|{text}]")
        start = end
    return "\n".join(["".join(out), "", *region_lines(batch, i, weight, colour)])


def region_lines(batch, i, weight, colour):
    lines = []
    for name, members in rest.PAPER_REGIONS.items():
        inside = sum((batch.region[i] == r) for r in members).bool()
        if not inside.any():
            continue
        label = f"{name:8}"
        if colour:
            label = paint(label, members[-1])
        entropy = float(batch.entropy[i][inside].mean())
        mean = float(weight[i][inside].mean())
        count = int(inside.sum())
        lines.append(f"  {label} {count:4d} tokens   entropy {entropy:.3f} nats   weight {mean:.2f}")
    return lines


# ---- evaluations ----

def evaluation(before, after=None):
    """Table of one or two rest.evaluate results: exact-call rate per category, before and after; format
    and mean tokens of the last."""
    head = f"{'category':14}{'n':>6}{'exact':>9}"
    if after:
        head += f"{'->':>4}{'after':>8}{'change':>9}"
    head += f"{'format':>9}{'tokens':>8}"
    lines = [head, "-" * len(head)]
    for key, row in before.items():
        last = (after or before)[key]
        line = f"{key:14}{row['n']:6d}{row['exact']:9.3f}"
        if after:
            line += f"{'->':>4}{last['exact']:8.3f}{last['exact'] - row['exact']:+9.3f}"
        lines.append(line + f"{last['format']:9.3f}{last['tokens']:8.1f}")
    return "\n".join(lines)


# ---- the curve ----

def smooth(values, window=5):
    """Each value's mean with those before it, `window` in all."""
    return [statistics.mean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))]


def curve(files, out):
    """Picture (PNG, SVG, …) of one or more metrics.csv: exact-call rates, and region entropies and weights
    of the first; each point the mean of the last 5 steps.

    Raises ImportError without matplotlib, the optional part it needs, ValueError for a file without one of
    these columns."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("the learning curve needs an optional package: pip install matplotlib") from error
    figure, (rate, entropy, weight) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for k, file in enumerate(files):
        with open(file) as lines:
            rows = list(csv.DictReader(lines))

        def column(key):
            try:
                return [float(row[key]) for row in rows]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} has no number {key} in every row: no curve of it") from error

        def smoothed(key):
            return smooth(column(key))
        steps = column("step")
        rate.plot(steps, smoothed("exact"), label=Path(file).parent.name if len(files) > 1 else None)
        if k == 0:
            for name in rest.PAPER_REGIONS:
                entropy.plot(steps, smoothed(f"H_{name}"), label=name)
                weight.plot(steps, smoothed(f"w_{name}"), label=name)
    rate.set_title("exact-call rate of training rollouts")
    entropy.set_title("mean entropy by region (nats)")
    weight.set_title("mean token weight by region")
    for axis in (rate, entropy, weight):
        axis.set_xlabel("step (mean of 5)")
        axis.spines[["top", "right"]].set_visible(False)
    rate.set_ylim(0, 1)
    weight.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    if len(files) > 1:
        rate.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


# ---- methods over seeds ----

# Settings in which compared runs may differ: they change neither what is drawn nor what is measured,
FREE = {"name", "output_dir", "resume", "save_steps", "keep_steps", "device", "shared_prefix", "cuda_graph",
        "compile_decode", "gradient_checkpointing", "micro_batch", "micro_batch_tokens", "show_every"}
# runs of different methods, also what is part of a method,
OF_A_METHOD = {"raw_weight", "min_entropy", "alpha_format", "alpha_params", "alpha_thought", "weight_min",
               "weight_max", "top_entropy_fraction"}
OF_DR_GRPO = {"aggregation", "delta"}
# and runs of different seeds in what a seed draws: the start, the rows.
OF_A_SEED = {"model", "rows"}

# 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
       2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
       2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t95(freedom):
    """Half a 95% interval in standard errors. Behind the table it falls to 1.96, that of the normal
    distribution, as 2.4 / freedom does: right to 0.003."""
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.4 / freedom


def seeds(folders, out, baseline="grpo"):
    """Compares methods over seeds. folders: runs; those of one seed share their start.

    Writes their held-out results to the CSV `out` (a line per run, moment and category) and returns a
    Markdown table of exact-call rates: mean and standard deviation over seeds, and the difference to the
    baseline's runs, paired by seed, with its 95% interval (Student's t). Runs that have not finished are
    left out and named below it. Raises ValueError if none has finished, for a folder of no run, for two
    runs of one method and seed, and for runs whose other settings differ."""
    folders = [Path(folder) for folder in folders]
    unfinished = [folder for folder in folders if has_not_finished(folder)]
    runs = [read_run(folder) for folder in folders if folder not in unfinished]
    left_out = ", ".join(map(str, unfinished))
    if unfinished and not runs:
        raise ValueError(f"none of these runs has finished and been evaluated (no after.json): {left_out}")
    if not runs:
        raise ValueError("there is nothing to compare: name the folders of finished runs")
    for one, other in itertools.combinations(runs, 2):
        check_pair(one, other)
    lines = [line for run in runs for line in run["lines"]]
    with open(out, "w", newline="") as file:
        names = dict.fromkeys(name for line in lines for name in line)
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(lines)
    found = {}  # method -> seed -> run
    for run in runs:
        found.setdefault(run["method"], {})[run["seed"]] = run
    table = [f"| method | seeds | before | after | difference to {baseline}, paired (95%) |",
             "|---|---|---|---|---|"]
    for method, of_seed in found.items():
        before = spread([run["before"] for run in of_seed.values()])
        after = spread([run["after"] for run in of_seed.values()])
        other = found.get(baseline, {}) if method != baseline else {}
        pairs = [run["after"] - other[seed]["after"] for seed, run in of_seed.items() if seed in other]
        table.append(f"| {method} | {len(of_seed)} | {before} | {after} | {interval(pairs)} |")
    if unfinished:
        table += ["", f"Left out, not finished or never evaluated (no after.json): {left_out}"]
    return "\n".join(table)


def has_not_finished(folder):
    """Whether it is a run's folder without the evaluation at its end."""
    return (folder / "config.json").is_file() and not (folder / "after.json").is_file()


def read_run(folder):
    """A finished run: {folder, method, seed, settings, lines of the CSV, before and after: exact-call
    rates}."""
    options = read(folder, "config.json", "it is not the folder of a run")
    run = {"folder": folder, "method": options["config"]["method"], "seed": options["config"]["seed"]}
    run["settings"] = options.get("run", {}) | options["config"]
    run["settings"] |= {name: options[name] for name in ("rows", "lengths") if name in options}
    run["lines"] = []
    for when in ("before", "after"):
        result = read(folder, f"{when}.json", "it has not finished, or evaluated nothing")
        run[when] = result["all"]["exact"]
        for category, row in result.items():
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            run["lines"].append({"method": run["method"], "seed": run["seed"], "when": when,
                                 "category": category, **row})
    return run


def read(folder, name, otherwise):
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}: {otherwise}, leave it out of the table")
    try:
        value = json.loads((folder / name).read_text())
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged, it holds no JSON ({error})") from error


def check_pair(one, other):
    """Raises ValueError if the two runs cannot stand in one table."""
    both = f"{one['folder']} and {other['folder']}"
    method, seed = one["method"], one["seed"]
    if (method, seed) == (other["method"], other["seed"]):
        raise ValueError(f"{both} are both of method {method} and seed {seed}: leave one out of the table")
    may_differ = FREE | {"method", "seed"}
    if method != other["method"]:
        may_differ |= OF_A_METHOD
        if "dr-grpo" in (method, other["method"]):
            may_differ |= OF_DR_GRPO
    if seed != other["seed"]:
        may_differ |= OF_A_SEED
    a, b = one["settings"], other["settings"]
    names = sorted(name for name in a.keys() & b.keys() - may_differ if a[name] != b[name])
    if names:
        values = ", ".join(f"{name} {a[name]} and {b[name]}" for name in names)
        raise ValueError(f"{both} differ in more than method and seed ({values}): they cannot be compared")


def spread(values, digits=3):
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def half_width(differences):
    """Of the 95% interval of their mean, by Student's t; for two or more."""
    n = len(differences)
    return t95(n - 1) * statistics.stdev(differences) / math.sqrt(n)


def interval(differences, digits=3):
    """Mean of paired differences and its 95% interval; – of fewer than two."""
    if len(differences) < 2:
        return "–"
    mean = statistics.mean(differences)
    half = half_width(differences)
    low, high = mean - half, mean + half
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2:
        sys.exit(__doc__)
    out, *inputs = argv
    try:
        if out.endswith(".csv"):
            print(seeds(inputs, out))
        else:
            curve(inputs, out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"show.py: error: {error}")


if __name__ == "__main__":
    main()
