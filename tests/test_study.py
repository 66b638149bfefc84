"""What stands behind results/README.md: the study's plans can be run, and its tables count rightly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_gradients import labelled

import rest
from toy_tools.options import read_options

RESULTS = Path(__file__).parent.parent / "results"
sys.path.insert(0, str(RESULTS))
import curricula
import study


@pytest.mark.parametrize("name", study.PLANS)
def test_every_run_of_a_plan_has_options_that_exist(name, tmp_path):
    plan = study.PLANS[name](tmp_path)
    names = [f"{arm}-{seed}" for arm, seed, _ in plan]
    assert len(set(names)) == len(names) >= 8
    for arm, seed, options in plan:
        run, cfg, _ = read_options(["--seed", str(seed), *options])
        assert cfg.seed == seed and arm.startswith(cfg.method)
        assert not run.model or run.model.startswith(str(tmp_path))


def run(arm="rest", seed=0, before=0.3, after=0.7, **curve):
    return {"arm": arm, "seed": seed, "before": before, "after": after, "curve": curve}


def test_steps_to_a_level_are_those_of_the_mean_of_five():
    assert study.reached([0.0] * 5 + [1.0] * 10, 0.95) == 9
    assert study.reached([1.0], 0.95) == 0 and study.reached([0.5] * 7, 0.95) == 7
    assert study.reached([0.9375, 0.9688, 0.9531, 0.9219, 0.9687], 0.95) == 1  # 0.95315
    assert study.reached([0.9219, 0.9609, 0.9453, 0.9609, 0.9609], 0.95) == 4  # 0.94998, of 0.95


def test_a_collapse_is_a_run_below_its_start_and_says_what_broke():
    curve = {"format": [0.9] * 30, "correct": [0.8] * 15 + [0.0] * 15}
    assert study.collapse(run(after=0.3, **curve)) == ""
    text = study.collapse(run(after=0.1, seed=3, **curve))
    assert text == "rest seed 3: correct 0.80 (step 0) → 0.00, half at step 17"


def test_differences_are_paired_by_seed():
    found = [run(arm, seed, after=0.1 * seed + better)
             for arm, better in (("grpo", 0.0), ("rest", 0.02)) for seed in (1, 2, 3)]
    table = study.compare(found[:5], lambda one: one["after"])
    assert table["grpo"] == ("0.200 ± 0.100", "–")
    assert table["rest"][1] == "+0.020 (+0.020 to +0.020)"


def test_without_a_finished_run_no_table_is_overwritten(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        study.main(["toy", "--runs", str(tmp_path), "--collect", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="toy-seeds.csv"):
        study.main(["toy", "--table", "--out", str(tmp_path)])


def test_finished_runs_are_collected_and_read_again(tmp_path):
    """Two of the three have finished; the second has no call to get right in one category."""
    plan = [("grpo", 0, []), ("mine", 1, []), ("mine", 2, [])]
    for arm, seed, _ in plan[:2]:
        folder = tmp_path / f"{arm}-{seed}"
        folder.mkdir()
        config = {"config": {"method": "grpo", "seed": seed}, "run": {}}
        (folder / "config.json").write_text(json.dumps(config))
        for when, exact in (("before", 0.25), ("after", 0.5 + seed / 10)):
            result = {name: {"n": 4, "exact": exact, "correct": None} for name in ("irrelevance", "all")}
            (folder / f"{when}.json").write_text(json.dumps(result))
        metrics = [",".join(["step", *study.TRAINING])]
        metrics += [",".join(map(str, [step, *[step / 8 + seed] * len(study.TRAINING)])) for step in range(3)]
        (folder / "metrics.csv").write_text("\n".join(metrics))
    study.collect(tmp_path, plan, tmp_path / "some")
    one, other = study.read(tmp_path / "some")
    assert (one["arm"], one["seed"], one["before"], one["after"]) == ("grpo", 0, 0.25, 0.5)
    assert (other["arm"], other["seed"], other["after"]) == ("mine", 1, 0.6)
    assert other["curve"] == {name: [1.0, 1.125, 1.25] for name in study.TRAINING}
    assert [line["category"] for line in one["lines"]] == ["irrelevance", "all"] * 2


@pytest.mark.parametrize("name", study.PLANS)
def test_the_results_show_the_tables_of_the_csvs(name):
    """What stands in results/README.md is what `study.py PLAN --table` prints, by category apart."""
    at_end, training, *_ = study.tables(study.read(RESULTS / name)).split("\n\n")
    text = (RESULTS / "README.md").read_text()
    for line in (at_end + "\n" + training).splitlines():
        assert line in text


def test_the_tables_compare_with_grpo_and_with_rest_and_by_category():
    found = []
    for arm, better in (("grpo", 0.0), ("rest", 0.02), ("shuffled", 0.05)):
        for seed in (1, 2):
            exact = 0.5 + 0.1 * seed + better
            one = run(arm, seed, after=exact, exact=[exact] * 9, format=[better] * 4 + [0.96] * 5)
            lines = [{"when": "after", "category": "simple", "exact": 0.3 + 2 * better},
                     {"when": "before", "category": "all", "exact": 0.1},
                     {"when": "after", "category": "all", "exact": exact}]
            found.append(one | {"lines": lines})
    shown = study.tables(found).splitlines()
    at_end, training, by_category = [line.split(" | ") for line in shown if line.startswith("| shuffled")]
    differences = ["+0.050 (+0.050 to +0.050)", "+0.030 (+0.030 to +0.030)"]
    assert at_end[1:] == ["2", "0.700 ± 0.071", *differences, "0 |"]
    assert training[1:3] == ["0.700 ± 0.071", "+0.050 (+0.050 to +0.050)"]
    assert training[5:] == ["8.0 ± 0.0", "+0.0 (+0.0 to +0.0) |"]
    assert by_category[1] == "+0.100 (+0.100 to +0.100) |"


@pytest.mark.parametrize("entropy", [0.01, 0.05, 0.5])
def test_the_curricula_follow_the_entropy_of_format(entropy):
    region = torch.tensor([[rest.TAG, rest.SCAFFOLD, rest.NAME, rest.PARAMS, rest.THOUGHT]])
    batch = labelled(region, torch.tensor([[entropy, entropy, 0.3, 0.3, 0.3]]))
    cfg = rest.Config()
    weight = rest.WEIGHTS["rest-by-entropy"](batch, cfg, 0.9)  # whatever the clock says
    assert torch.allclose(weight, rest.rest_weights(batch, cfg, max(0.0, 1 - entropy / curricula.START)))
    first = rest.WEIGHTS["signal-first"](batch, cfg, 0.9)
    uniform = rest.uniform(batch, cfg, 0.0)
    assert torch.equal(first, uniform) == (entropy < curricula.LEARNED)


def test_the_figure_is_made_of_the_tables_that_are_there(tmp_path):
    pytest.importorskip("matplotlib")
    import figure
    figure.main(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    axis = figure.pyplot.figure().add_subplot()
    figure.outcome(axis)
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert "rest" in shown and "grpo" not in shown


def test_bfloat16_on_a_cpu_leaves_the_weights_alone():
    """In a process of its own: it changes rest for good."""
    script = """
import torch, bfloat16, rest
model = torch.nn.Linear(8, 8)
with rest.autocast(model):
    y = model(torch.ones(1, 8))
y.sum().backward()
assert y.dtype == torch.bfloat16 and model.weight.grad.dtype == model.weight.dtype == torch.float32
assert rest.autocasts(model) and not rest.autocasts(model.bfloat16())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=RESULTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
