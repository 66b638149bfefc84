"""README: what it prints runs as printed (with fewer steps), and what it names is there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, qwen3

import rest
from toy_tools import data
from toy_tools.options import check, read_options

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands(word):
    """The shell lines that call `word`, without comments, split into arguments."""
    lines = "\n".join(blocks("bash")).splitlines() + re.findall(r"`(python train_small\.py[^`]*)`", TEXT)
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [part[part.index(word) + 1:] for part in parts if word in part]


@pytest.mark.parametrize("arguments", commands("train_small.py"), ids=" ".join)
def test_every_command_is_accepted(arguments):
    """Its options exist, fit together and have an effect, on a machine with a GPU where it asks for one."""
    run, cfg, given = read_options(arguments)
    check(run, cfg, given, torch.device(run.device or "cpu"))


def test_the_files_and_functions_that_are_named_exist():
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link
    table = TEXT[TEXT.index("| paper | function"):TEXT.index("| lemmas and theorems")]
    for name in re.findall(r"`(\w+)`", table):
        assert hasattr(rest, name), name


def test_the_metrics_that_are_explained_are_those_that_are_logged(tokenizer):
    """The table in README and the keys of train_step's metrics are the same set."""
    from conftest import ROW, step_of
    table = TEXT[TEXT.index("| metric | meaning |"):TEXT.index("## What newcomers ask")]
    cells = [line.split("|")[1] for line in table.splitlines() if "|" in line]
    named = set(re.findall(r"`(\w+)`", "".join(cells)))
    regions = {f"{letter}_{region}" for letter in "Hw" for region in rest.PAPER_REGIONS}
    cfg = rest.Config(group=2, prompts=1, max_completion_tokens=8)
    logged = set(step_of(qwen3(), tokenizer, [ROW], cfg)[0]) - {"step"}
    assert named | regions == logged


@pytest.fixture
def rows(tmp_path):
    """The README's own row, pasted as it is printed."""
    text, = blocks("json")
    (tmp_path / "rows.jsonl").write_text(text)
    return tmp_path / "rows.jsonl"


def test_the_row_works_as_pasted(rows):
    """Over several lines; a single step as it stands, live with the turn that answers."""
    row, = data.load_rows(rows)
    assert row["gold"] == [[{"name": "add", "arguments": {"a": 1, "b": 2}}]]
    live, = data.load_rows(rows, live=True)
    assert live["gold"] == row["gold"] + [[]]
    call = f'<think>t</think><tool_call>{json.dumps(row["gold"][0][0])}</tool_call>'
    assert rest.score_texts([call, "<think>t</think><response>3</response>"], live)[2]


def run(code, folder, *arguments):
    (folder / "mine.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "REST_CACHE": str(folder / "cache")}
    return subprocess.run([sys.executable, "mine.py", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)


def smaller(code, sizes):
    """The code with each option of {as printed: smaller}."""
    for printed, small in sizes.items():
        assert printed in code
        code = code.replace(printed, small)
    return code


def test_the_live_example_runs(rows):
    """With two steps of two short turns."""
    code, = [block for block in blocks("python") if "class Box" in block]
    code = smaller(code, {"steps=100": "steps=2",
                          "max_completion_tokens=512": "max_completion_tokens=24"})
    qwen3().save_pretrained(rows.parent / "DIR")
    byte_tokenizer().save_pretrained(rows.parent / "DIR")
    done = run(code + "\nprint(metrics['step'], len(batch.texts))", rows.parent)
    assert done.stdout.split() == ["1", "8"], done.stderr[-2000:]


def test_the_weighting_example_runs(tmp_path):
    """A method of five lines, called by name: names weigh twice what other tokens do."""
    code, = [block for block in blocks("python") if "rest.WEIGHTS[" in block]
    done = run(code, tmp_path, "--method", "mine", "--steps", "1", "--prompts", "2", "--group", "2",
               "--eval-rows", "0", "--train-rows", "20", "--warm-start-steps", "2",
               "--max-completion-tokens", "16")
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "runs/mine-seed0/config.json").read_text())
    assert config["config"]["method"] == "mine"


def test_the_example_on_trl_runs(rows):
    """One step of two short completions."""
    pytest.importorskip("trl", reason="pip install trl")
    code, = [block for block in blocks("python") if "ResTTrainer" in block]
    code = smaller(code, {"max_steps=100": "max_steps=1, max_completion_length=8, use_cpu=True, bf16=False, "
                                           "report_to='none'",
                          "num_generations=8": "num_generations=2",
                          "train_batch_size=8": "train_batch_size=2"})
    qwen3().save_pretrained(rows.parent / "DIR")
    byte_tokenizer().save_pretrained(rows.parent / "DIR")
    done = run(code, rows.parent)
    assert done.returncode == 0 and "H_format" in done.stdout, done.stderr[-2000:]


def test_it_is_short_enough_to_be_read():
    assert len(TEXT.split()) <= 1850
