"""What people look at: tables, the episode view, the curve, methods over seeds."""

import csv
import json
import math
import statistics
from dataclasses import asdict, fields

import pytest
import torch
from conftest import ROW, roll, scripted

import rest
from rest import THOUGHT
from toy_tools import options, show


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
    short = show.episode(chat, out, 1, weight, colour=False).splitlines()
    assert short[0] == "[text 1.50|a][tag 1.50|<|im_end|>]"  # and nothing of the padding
    text = show.episode(chat, out, 0, weight, colour=False)
    assert text.splitlines()[0] == "[tag 1.50|<think>][thought 0.50|ab][tag 1.50|<|im_end|>]"
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["format", "2", "tokens", "entropy", "1.000", "nats", "weight", "1.50"],
        ["thought", "2", "tokens", "entropy", "2.000", "nats", "weight", "0.50"]]
    weight[0, 2] = 0.75  # tokens of one region that weigh differently are shown apart
    text = show.episode(chat, out, 0, weight, colour=False)
    assert "[thought 0.50|a][thought 0.75|b]" in text and text.split()[-1] == "0.62"


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


# ------------------------------------------------------------------------------- methods over seeds

def finished(folder, method, seed, after=0.5, **settings):
    """The folder of a finished run of train_small.py. settings: those that are not the defaults."""
    folder.mkdir()
    names = {option.name for option in fields(rest.Config)}
    knobs = {name: value for name, value in settings.items() if name in names}
    run = asdict(options.Run()) | {"name": folder.name}
    run |= {name: value for name, value in settings.items() if name in run}
    config = {"config": asdict(rest.Config(method=method, seed=seed, **knobs)), "run": run,
              "rows": settings.get("rows", f"rows of seed {seed}"),
              "lengths": settings.get("lengths", [[0, 100]])}
    (folder / "config.json").write_text(json.dumps(config))
    for when, exact in (("before", 0.25), ("after", after)):
        result = {"simple": {"n": 1, "exact": 1.0}, "all": {"n": 8, "exact": exact}}
        (folder / f"{when}.json").write_text(json.dumps(result))
    return folder


def test_methods_are_compared_over_seeds(tmp_path, capsys):
    """Differences of 0.1 and 0.2 to the baseline: mean 0.15, half an interval of
    12.706 * 0.0707 / sqrt(2) = 0.6353. A seed without baseline has no pair. What a run was called,
    how fast it was made to run, and what is part of a method may differ."""
    runs = [("grpo", 0, 0.5, {}), ("grpo", 1, 0.6, {"model": "start-1", "save_steps": 7}),
            ("rest", 0, 0.6, {"raw_weight": "inverse"}),
            ("rest", 1, 0.8, {"raw_weight": "inverse", "model": "start-1", "micro_batch_tokens": 9}),
            ("rest", 2, 1.0, {"raw_weight": "inverse"}),
            ("dr-grpo", 0, 0.4, {"delta": 0.1})]
    for method, seed, after, settings in runs:
        finished(tmp_path / f"{method}-{seed}", method, seed, after, **settings)
    folders = map(str, sorted(tmp_path.iterdir()))
    show.main([str(tmp_path / "out.csv"), *folders])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| dr-grpo | 1 | 0.250 | 0.400 | – |",
        "| grpo | 2 | 0.250 ± 0.000 | 0.550 ± 0.071 | – |",
        "| rest | 3 | 0.250 ± 0.000 | 0.800 ± 0.200 | +0.150 (-0.485 to +0.785) |"]
    rows = list(csv.DictReader(open(tmp_path / "out.csv")))
    assert len(rows) == 24 and rows[5] == {"method": "grpo", "seed": "0", "when": "before",
                                           "category": "all", "n": "8", "exact": "0.25"}


def refused(tmp_path, *folders):
    """The one sentence with which the command refuses these runs; no table is written."""
    with pytest.raises(SystemExit) as stop:
        show.main([str(tmp_path / "out.csv"), *map(str, folders)])
    sentence = str(stop.value.code)
    assert "\n" not in sentence and not (tmp_path / "out.csv").exists()
    return sentence


def test_two_runs_of_one_method_and_seed_are_refused(tmp_path):
    """The first of them once vanished from the table without a word."""
    folders = [finished(tmp_path / name, "rest", 3) for name in ("one", "other")]
    sentence = refused(tmp_path, *folders)
    assert all(str(folder) in sentence for folder in folders) and "method rest and seed 3" in sentence


@pytest.mark.parametrize("method, seed, settings", [
    ("rest", 1, {"steps": 200}), ("grpo", 0, {"learning_rate": 1e-3}), ("grpo", 1, {"eval_samples": 9}),
    ("grpo", 0, {"model": "another start"}), ("grpo", 0, {"rows": "others"}),
    ("grpo", 0, {"delta": 0.1}), ("rest", 1, {"alpha_thought": 0.1}), ("dr-grpo", 0, {"clip": 0.1}),
    ("grpo", 1, {"max_turns": 2}), ("rest", 1, {"lengths": [[0, 50], [50, 100]]}),
    ("grpo", 0, {"data": "x.jsonl"})], ids=str)
def test_runs_of_other_settings_are_refused(tmp_path, method, seed, settings):
    """Also where a third run between them has the settings of the first."""
    first = finished(tmp_path / "first", "rest", 0)
    second = finished(tmp_path / "second", "no-thought", 0)
    third = finished(tmp_path / "third", method, seed, **settings)
    sentence = refused(tmp_path, first, second, third)
    assert str(third) in sentence and next(iter(settings)) in sentence
    assert str(first) in sentence or str(second) in sentence


def test_runs_that_have_not_finished_are_left_out_and_named(tmp_path, capsys):
    """As in `runs/*` while some still train: the table is that of the others, whatever the settings of
    those left out. It once was a traceback, then a refusal, which stays where no run has finished."""
    first = finished(tmp_path / "first", "grpo", 0)
    second = finished(tmp_path / "second", "rest", 0, steps=7)
    third = finished(tmp_path / "third", "grpo", 1)
    table = show.seeds([first, third], tmp_path / "expected.csv")
    (second / "after.json").unlink()
    show.main([str(tmp_path / "out.csv"), *map(str, (first, second, third))])
    assert capsys.readouterr().out == (
        f"{table}\n\nLeft out, not finished or never evaluated (no after.json): {second}\n")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    (tmp_path / "out.csv").unlink()
    (first / "after.json").unlink()
    sentence = refused(tmp_path, first, second)
    assert "none of these runs has finished" in sentence and sentence.endswith(f": {first}, {second}")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    """A folder that is none of a run, and a damaged file: each once was a traceback. Neither is taken for
    a run that has not finished."""
    first, second = finished(tmp_path / "first", "rest", 0), finished(tmp_path / "second", "grpo", 0)
    (second / "after.json").write_text('{"all": {"n"')
    assert "second/after.json is damaged" in refused(tmp_path, first, second)
    (second / "after.json").write_text("[1]")
    assert "second/after.json is damaged" in refused(tmp_path, first, second)
    (second / "after.json").unlink()
    (second / "config.json").unlink()
    assert "second has no config.json" in refused(tmp_path, first, second)
    assert "nowhere has no config.json" in refused(tmp_path, first, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing to compare"):
        show.seeds([], tmp_path / "out.csv")


def test_a_curve_needs_only_what_it_draws(tmp_path):
    """A metric that only some rows have is none of that; one that is drawn and lacks is named."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    drawn = ["step", "exact", *(f"{kind}_{name}" for kind in "Hw" for name in rest.PAPER_REGIONS)]
    file = tmp_path / "metrics.csv"
    lines = [",".join([*drawn, "mine"])] + [",".join(["1"] * len(drawn) + [mine]) for mine in ("2", "")]
    file.write_text("\n".join(lines))
    show.curve([file], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
    file.write_text("\n".join(lines).replace("H_name", "other"))
    with pytest.raises(ValueError, match="metrics.csv has no number H_name"):
        show.curve([file], tmp_path / "curve.png")


def test_the_settings_that_may_differ_are_those_of_the_options():
    """What a resumed run may change, but for its length; and the knobs that one method reads and
    another does not."""
    assert show.FREE == options.FREE - {"steps"}
    assert show.OF_A_METHOD == set(options.READERS)


@pytest.mark.parametrize("freedom", [*range(1, 36), 50, 100, 1000, 10**6])
def test_quantiles_of_students_t(freedom):
    """95% of the distribution lies within them, by its density, summed up. The table once ended at
    ten degrees of freedom and gave those of ten to everything above."""
    t = show.t95(freedom)
    x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
    n = torch.tensor(float(freedom), dtype=torch.float64)
    log_density = torch.lgamma((n + 1) / 2) - torch.lgamma(n / 2) - 0.5 * torch.log(n * math.pi)
    density = torch.exp(log_density - (n + 1) / 2 * torch.log1p(x ** 2 / n))
    allowed = 1e-4 if freedom <= 30 else 3e-4
    assert float(torch.trapezoid(density, x)) == pytest.approx(0.95, abs=allowed)
