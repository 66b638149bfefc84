"""What people look at: one episode coloured by region with its weights, evaluation tables, the learning curve, methods over seeds."""

import csv
import json
import statistics
import sys
from pathlib import Path

import rest

COLOURS = {rest.TAG: "90", rest.SCAFFOLD: "37", rest.NAME: "1;33", rest.PARAMS: "1;36", rest.THOUGHT: "32", rest.TEXT: "35"}


def episode(chat, batch, i, weight, colour=True):
    """Episode i of a Rollout as text: sampled tokens coloured by region, forced ones plain, the weight behind each run of equal
    weight; then per region its tokens, mean entropy (nats) and weight. weight: float [N, T]."""
    ids, regions = batch.tokens[i].tolist(), batch.region[i].tolist()
    weights, length = weight[i].tolist(), int(batch.length[i])
    out, t = [], 0
    while t < length:
        end = t + 1
        while end < length and regions[end] == regions[t] and abs(weights[end] - weights[t]) < 1e-6:
            end += 1
        text = chat.decode(ids[t:end])
        if regions[t] < 0:
            out.append(text)
        elif colour:
            out.append(f"\033[{COLOURS[regions[t]]}m{text}\033[0m\033[2m·{weights[t]:.2f}\033[0m")
        else:
            out.append(f"[{rest.REGIONS[regions[t]]} {weights[t]:.2f}|{text}]")
        t = end
    lines = ["".join(out), ""]
    for name, members in rest.PAPER_REGIONS.items():
        inside = sum((batch.region[i] == r) for r in members).bool()
        if inside.any():
            label = f"\033[{COLOURS[members[-1]]}m{name:8}\033[0m" if colour else f"{name:8}"
            lines.append(f"  {label} {int(inside.sum()):4d} tokens   entropy {float(batch.entropy[i][inside].mean()):.3f} nats"
                         f"   weight {float(weight[i][inside].mean()):.2f}")
    return "\n".join(lines)


def evaluation(before, after=None):
    """Table of one or two rest.evaluate results: exact-call rate per category (format, mean tokens), before and after."""
    head = f"{'category':14}{'n':>6}{'exact':>9}" + (f"{'->':>4}{'after':>8}{'change':>9}" if after else "") + f"{'format':>9}{'tokens':>8}"
    lines = [head, "-" * len(head)]
    for key, row in before.items():
        last = (after or before)[key]
        change = f"{'->':>4}{last['exact']:8.3f}{last['exact'] - row['exact']:+9.3f}" if after else ""
        lines.append(f"{key:14}{row['n']:6d}{row['exact']:9.3f}{change}{last['format']:9.3f}{last['tokens']:8.1f}")
    return "\n".join(lines)


def curve(files, out):
    """Picture (PNG, SVG, …) of one or more metrics.csv: exact-call rate, region entropies and weights of the first, each the mean of the last 5 steps.

    Raises ImportError without matplotlib, the optional part it needs."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("the learning curve needs an optional package: pip install matplotlib") from error
    figure, (rate, entropy, weight) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for k, file in enumerate(files):
        with open(file) as lines:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
        steps = [row["step"] for row in rows]

        def smooth(key):
            return [statistics.mean(row[key] for row in rows[max(0, i - 4):i + 1]) for i in range(len(rows))]
        rate.plot(steps, smooth("exact"), label=Path(file).parent.name if len(files) > 1 else None)
        if k == 0:
            for name in rest.PAPER_REGIONS:
                entropy.plot(steps, smooth(f"H_{name}"), label=name)
                weight.plot(steps, smooth(f"w_{name}"), label=name)
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


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5% quantiles of Student's t, 1 to 10 degrees of freedom


def seeds(folders, out, baseline="grpo"):
    """Compares methods over seeds. folders: finished runs; those of one seed share their start. Writes their held-out results to the CSV `out`
    (a line per run, moment and category) and returns a Markdown table of exact-call rates: mean and standard deviation over seeds, and the
    difference to the baseline's runs, paired by seed, with its 95% interval (t)."""
    lines, found = [], {}
    for folder in map(Path, folders):
        cfg = json.loads((folder / "config.json").read_text())["config"]
        for when in ("before", "after"):
            for category, row in json.loads((folder / f"{when}.json").read_text()).items():
                lines.append({"method": cfg["method"], "seed": cfg["seed"], "when": when, "category": category, **row})
                if category == "all":
                    found.setdefault(cfg["method"], {}).setdefault(cfg["seed"], {})[when] = row["exact"]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in lines)

    def spread(values):
        return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    table = [f"| method | seeds | before | after | difference to {baseline}, paired (95%) |", "|---|---|---|---|---|"]
    for method, runs in found.items():
        cell, other = "–", found.get(baseline, {})
        differences = [run["after"] - other[seed]["after"] for seed, run in runs.items() if seed in other]
        if method != baseline and len(differences) > 1:
            mean, n = statistics.mean(differences), len(differences)
            half = T95[min(n - 1, len(T95)) - 1] * statistics.stdev(differences) / n ** 0.5
            cell = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
        table.append(f"| {method} | {len(runs)} | {spread([r['before'] for r in runs.values()])} | {spread([r['after'] for r in runs.values()])} | {cell} |")
    return "\n".join(table)


if __name__ == "__main__":  # python -m toy_tools.show OUT.png runs/a/metrics.csv [runs/b/metrics.csv …], or OUT.csv runs/a runs/b …
    if sys.argv[1].endswith(".csv"):
        print(seeds(sys.argv[2:], sys.argv[1]))
    else:
        curve(sys.argv[2:], sys.argv[1])
