"""What people look at: tables, the episode view, the curve, methods over seeds."""

import csv
import json
import statistics

import pytest
import torch
from conftest import ROW, roll, scripted

import rest
from rest import THOUGHT
from toy_tools import show


def test_the_printed_change_has_its_sign():
    """After minus before; format and tokens are those of the end."""
    before = {"n": 1, "exact": 0.25, "format": 1.0, "tokens": 3.0}
    after = {"n": 1, "exact": 0.75, "format": 0.5, "tokens": 7.0}
    line = show.evaluation({"all": before}, {"all": after}).splitlines()[-1]
    assert line.split() == ["all", "1", "0.250", "->", "0.750", "+0.500", "0.500", "7.0"]
    line = show.evaluation({"all": before}).splitlines()[-1]
    assert line.split() == ["all", "1", "0.250", "1.000", "3.0"]


def test_every_category_of_the_table_is_compared_with_itself():
    """Two categories that move in opposite directions, each in its own line."""
    def result(*rates):
        return {name: {"n": 2, "exact": x, "format": 1.0, "tokens": 3.0}
                for name, x in zip(("simple", "other"), rates)}
    lines = show.evaluation(result(0.0, 1.0), result(0.5, 0.25)).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["simple", "other"]
    assert [line.split()[2:6] for line in lines] == [["0.000", "->", "0.500", "+0.500"],
                                                     ["1.000", "->", "0.250", "-0.750"]]


def test_the_episode_view_says_what_the_numbers_are(tokenizer):
    """Entropy and weight of a region are means over its own tokens of the episode shown."""
    out = roll(scripted(tokenizer, ["<think>ab", "a"]), tokenizer, [ROW],
               rest.Config(group=2, max_completion_tokens=9))
    chat = rest.Chat(tokenizer)
    out.region, _ = rest.token_regions(out, chat)
    out.entropy = torch.where(out.region == THOUGHT, 2.0, 1.0)
    weight = torch.where(out.region == THOUGHT, 0.5, 1.5)
    text = show.episode(chat, out, 0, weight, colour=False)
    assert text.splitlines()[0] == "[tag 1.50|<think>][thought 0.50|ab][tag 1.50|<|im_end|>]"
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["format", "2", "tokens", "entropy", "1.000", "nats", "weight", "1.50"],
        ["thought", "2", "tokens", "entropy", "2.000", "nats", "weight", "0.50"]]


def test_the_curve_shows_means_of_the_last_five_steps(tmp_path, monkeypatch):
    """Every line is the running mean over five steps, fewer at the start; entropies and weights
    are of the first run only, each under its own name."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib.axes import Axes
    names = [f"{kind}_{name}" for kind in "Hw" for name in rest.PAPER_REGIONS]
    files, exact = [], []
    for k in range(2):
        (tmp_path / f"run{k}").mkdir()
        files.append(tmp_path / f"run{k}" / "metrics.csv")
        exact.append([((3 + k) * i % 7) / 7 for i in range(8)])
        with open(files[-1], "w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["step", "exact", *names])
            for i in range(8):
                writer.writerow([i, exact[k][i], *(10 * j + i * i for j in range(len(names)))])
    drawn, plot = [], Axes.plot

    def watch(self, x, y, label=None):
        drawn.append((self, x, y, label))
        return plot(self, x, y, label=label)
    monkeypatch.setattr(Axes, "plot", watch)
    show.curve(files, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000

    def running(values):
        return [statistics.mean(values[max(0, i - 4):i + 1]) for i in range(len(values))]
    expected = [("run0", running(exact[0])), ("run1", running(exact[1]))]
    for j, name in enumerate(names):
        expected.append((name[2:], running([10 * j + i * i for i in range(8)])))
    assert all(list(x) == list(range(8)) for _, x, _, _ in drawn)
    found = sorted((axis.get_title(), label, y) for axis, _, y, label in drawn)
    titles = ["exact-call rate of training rollouts"] * 2
    titles += ["mean entropy by region (nats)"] * 5 + ["mean token weight by region"] * 5
    wanted = sorted((title, label, y) for title, (label, y) in zip(titles, expected))
    assert [f[:2] for f in found] == [w[:2] for w in wanted]
    for f, w in zip(found, wanted):
        assert f[2] == pytest.approx(w[2]), f[:2]


def test_methods_are_compared_over_seeds(tmp_path):
    """Differences of 0.1 and 0.2 to the baseline: mean 0.15, half an interval of 12.71 * 0.0707 / sqrt(2) = 0.6355. A seed without baseline has no pair."""
    for method, seed, after in (("grpo", 0, 0.5), ("grpo", 1, 0.6), ("rest", 0, 0.6), ("rest", 1, 0.8), ("rest", 2, 1.0), ("no-thought", 0, 0.4)):
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"config": {"method": method, "seed": seed}}))
        for when, exact in (("before", 0.25), ("after", after)):
            (folder / f"{when}.json").write_text(json.dumps({"simple": {"n": 1, "exact": 1.0}, "all": {"n": 8, "exact": exact}}))
    lines = show.seeds(sorted(tmp_path.iterdir()), tmp_path / "out.csv").splitlines()[2:]
    assert lines == ["| grpo | 2 | 0.250 ± 0.000 | 0.550 ± 0.071 | – |", "| no-thought | 1 | 0.250 | 0.400 | – |",
                     "| rest | 3 | 0.250 ± 0.000 | 0.800 ± 0.200 | +0.150 (-0.486 to +0.786) |"]
    rows = list(csv.DictReader(open(tmp_path / "out.csv")))
    assert len(rows) == 24 and rows[1] == {"method": "grpo", "seed": "0", "when": "before", "category": "all", "n": "8", "exact": "0.25"}
