"""What stands behind results/README.md: the study's plans can be run, and its tables count rightly."""

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
        study.main(["toy", "--runs", str(tmp_path), "--table", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_tables_compare_with_grpo_and_with_rest_and_by_category():
    flat = {"exact": [0.5] * 9, "format": [1.0] * 9, "correct": [0.8] * 9}
    found = []
    for arm, better in (("grpo", 0.0), ("rest", 0.02), ("shuffled", 0.05)):
        for seed in (1, 2):
            one = run(arm, seed, after=0.5 + 0.1 * seed + better, **flat)
            lines = [{"when": "after", "category": "simple", "exact": 0.3 + 2 * better}]
            found.append(one | {"lines": lines})
    rows = [line.split(" | ") for line in study.tables(found).splitlines() if "| shuffled" in line]
    whole, means, differences = rows
    assert whole[1:5] == ["2", "0.700 ± 0.071", "+0.050 (+0.050 to +0.050)", "+0.030 (+0.030 to +0.030)"]
    assert means[1].startswith("0.400") and differences[1].startswith("+0.100 (+0.100")


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
