"""figure.png, the README's: the best region weights beside ResT's, what weights are worth, and what came of
it over eight seeds. `python results/figure.py`, from signal-seeds.csv and toy-seeds.csv."""

import csv
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from study import paired

from toy_tools.picture import COLOURS
from toy_tools.show import half_width, interval
from toy_tools.signal import FACTORS

LEFT = -0.14  # of the differences shown; one below it is written


def rows(name):
    with open(HERE / name) as file:
        return list(csv.DictReader(file))


def signal(method, as_adamw=False):
    """The lines of a method, pooled over seeds, by step: of a gradient of the run's 16 prompts; or in AdamW's
    coordinates and for its average, beta1 = 0.9, of which there is none at step 0."""
    lines = [line for line in rows("signal-seeds.csv") if line["run"].startswith("pooled")]
    averaged = 16 * FACTORS["averaged"]
    size = {line["step"]: averaged if as_adamw and line["step"] != "0" else 16 for line in lines}
    lines = [line for line in lines if float(line["prompts"]) == size[line["step"]]]
    kind = ("adamw" if as_adamw else "plain", method)
    return [line for line in lines if (line["coordinates"], line["method"]) == kind]


def weights(axis):
    best, rest = signal("w* >= 0"), signal("curriculum")
    at = range(len(best))
    shown = {name: colour for name, colour in COLOURS.items() if name != "text"}  # too few tokens to see
    for k, (name, colour) in enumerate(shown.items()):
        column = f"w_{name}"
        here = [x + 0.12 * (k - 1.5) for x in at]
        low = [float(line[f"{column}_low"]) for line in best]
        high = [float(line[f"{column}_high"]) for line in best]
        axis.vlines(here, low, high, colour, linewidth=1)
        axis.plot(here, [float(line[column]) for line in best], "o", color=colour, label=name)
        axis.plot(here, [float(line[column]) for line in rest], "_", color=colour, markersize=11)
    axis.set_xticks(at, [line["step"] for line in best])
    axis.set_ylim(bottom=-0.1)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.0))
    axis.set_title("weight of a region:\nbest (dots) and ResT's (dashes)")
    axis.set_xlabel("step")


def gains(axis):
    shown = (("ResT's gradient", "C3", "C3", signal("rest")),
             ("as AdamW steps", "C3", "white", signal("rest", as_adamw=True)),
             ("shuffled", "0.6", "0.6", signal("shuffled")),
             ("as AdamW steps", "0.6", "white", signal("shuffled", as_adamw=True)))
    for k, (label, colour, inside, lines) in enumerate(shown):
        at = [x + 0.13 * (k - 1.5) for x in range(len(lines))]
        axis.vlines(at, *([float(line[f"gain_{end}"]) for line in lines] for end in ("low", "high")), colour)
        gains = [float(line["gain"]) for line in lines]
        axis.plot(at, gains, "o", color=colour, markerfacecolor=inside, label=label)
    axis.axhline(1.0, color="0.8", zorder=0)
    axis.set_xticks(range(len(lines)), [line["step"] for line in lines])
    axis.set_ylim(0, 2.5)
    axis.legend(frameon=False, fontsize=8, ncols=2, columnspacing=0.6, loc="upper right")
    axis.set_title("what weights are worth:\nefficiency over uniform weights")
    axis.set_xlabel("step")


def outcome(axis):
    found = [line for line in rows("toy-seeds.csv") if (line["when"], line["category"]) == ("after", "all")]
    arms = {arm: pairs for arm, (_, pairs) in paired(found, lambda line: float(line["exact"])).items()
            if arm != "grpo" and len(pairs) > 2}
    for y, pairs in enumerate(arms.values()):
        mean = statistics.mean(pairs)
        half = half_width(pairs)
        if mean < LEFT:
            axis.text(LEFT, y, f"← {interval(pairs)}".replace("-", "−"), va="center", fontsize=8)
            continue
        axis.plot(pairs, [y] * len(pairs), ".", color="0.7", markersize=5)
        axis.hlines(y, mean - half, mean + half, "C3")
        axis.plot(mean, y, "o", color="C3")
    axis.axvline(0.0, color="0.8", zorder=0)
    axis.set_yticks(range(len(arms)), arms, fontsize=8)
    axis.set_xlim(LEFT, -LEFT / 2)
    axis.invert_yaxis()
    axis.set_title("what came of it: exact calls\nat the end, less GRPO's")
    axis.set_xlabel("paired difference, seeds and 95%")


def main(out=HERE / "figure.png"):
    layout = {"figsize": (11, 3.8), "constrained_layout": True, "width_ratios": (3, 2.3, 3)}
    picture, axes = pyplot.subplots(1, 3, **layout)
    for draw, axis in zip((weights, gains, outcome), axes):
        draw(axis)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    picture.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
