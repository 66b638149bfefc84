"""How the regions' entropies move in the supervised warm start and in RL: entropies.csv, entropies.png.

    python results/entropies.py toy                  the warm start of seed 0 once more, watched
    python results/entropies.py smollm FILE.gguf     16 supervised steps of SmolLM2, as in README.md, watched
    python results/entropies.py figure               beside ResT's in toy-training.csv and real-training.csv
"""

import csv
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import rest
import study
from toy_tools import fast, policy, tasks
from toy_tools.chat import INSTRUCTIONS, TemplateChat
from toy_tools.show import smooth

NAMES = list(rest.PAPER_REGIONS)


def measure(model, tokenizer, instructions, rows, cfg):
    """{region: mean entropy in nats of rollouts for these rows; empty without a token of it}."""
    chat = TemplateChat(tokenizer, instructions, model)
    batch = rest.rollout(fast.SharedEngine(model), chat, rows, cfg, seed=10**6)
    batch.region, batch.covers = rest.token_regions(batch, chat)
    entropy = rest.region_entropy(batch)
    members = rest.PAPER_REGIONS.items()
    return {name: float(entropy[inside[0]]) if sum((batch.region == r).sum() for r in inside) else ""
            for name, inside in members}


def watch(run, every, look):
    """run() with look(model, step) at every so many steps of the demonstrations, and at the end."""
    supervised = policy.supervised

    def watched(model, sequences, steps, rate, micro_batch, what="warm start", progress=True):
        def seen(step):
            if what == "warm start" and step % every == 0:
                look(model, step)
            return sequences(step)
        losses = supervised(model, seen, steps, rate, micro_batch, what, progress)
        if what == "warm start":
            look(model, steps)
        return losses
    policy.supervised = watched
    run()


def toy_rows(count):
    dialogues = tasks.make_rows(count, "train")
    return [random.Random(i).choice(tasks.decompose(row)) for i, row in enumerate(dialogues)]


def toy():
    _, tokenizer = policy.read_start()  # the one that this warm start makes again
    rows, cfg = toy_rows(16), rest.Config()
    watch(lambda: policy.tiny_policy(seed=0), 20,
          lambda model, step: add("toy", step, measure(model, tokenizer, "", rows, cfg)))


def smollm(path):
    model, tokenizer = policy.load_model(path)
    rows, cfg = toy_rows(4), rest.Config(max_completion_tokens=112)
    demonstrated = [step for row in tasks.make_rows(200, "train") for step in tasks.decompose(row)]
    rng = random.Random(0)
    pairs = [(row, policy.noisy_demonstration(row, rng, 0.05)) for row in demonstrated]
    watch(lambda: policy.warm_start(model, tokenizer, pairs, 16, instructions=INSTRUCTIONS), 2,
          lambda model, step: add("smollm", step, measure(model, tokenizer, INSTRUCTIONS, rows, cfg)))


def add(policy_name, step, entropies):
    file = HERE / "entropies.csv"
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(["policy", "step", *NAMES])
        values = [round(x, 4) if x != "" else x for x in entropies.values()]
        writer.writerow([policy_name, step, *values])


def figure():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(HERE / "entropies.csv") as file:
        supervised = list(csv.DictReader(file))
    picture, axes = plt.subplots(2, 2, figsize=(9, 5.5), constrained_layout=True)
    for row, (name, title, plan) in enumerate((("toy", "1.2M policy", "toy"),
                                              ("smollm", "SmolLM2-135M", "real"))):
        points = [point for point in supervised if point["policy"] == name]
        curves = [one["curve"] for one in study.read(HERE / plan) if one["arm"] == "rest"]
        for region in NAMES:
            seen = [(int(point["step"]), float(point[region])) for point in points if point[region]]
            axes[row, 0].plot(*zip(*seen or [((), ())]), label=region)
            if f"H_{region}" in curves[0]:
                of_step = list(zip(*(smooth(curve[f"H_{region}"]) for curve in curves)))
                axes[row, 1].plot([statistics.mean(values) for values in of_step])
                band = [[end(values) for values in of_step] for end in (min, max)]
                axes[row, 1].fill_between(range(len(of_step)), *band, alpha=0.2, linewidth=0)
        axes[row, 0].set_title(f"{title}: supervised")
        axes[row, 1].set_title(f"{title}: ResT, {len(curves)} seeds")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.set_ylabel("entropy (nats)")
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    picture.savefig(HERE / "entropies.png", dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *rest_of_line = sys.argv[1:] or sys.exit(__doc__)
    {"toy": toy, "smollm": smollm, "figure": figure}[command](*rest_of_line)
