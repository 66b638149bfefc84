"""train_small.py as its users run it: as a command, resumed, interrupted, killed, prolonged, evaluated.

Wrong input is in test_options.py. `REST_LONG=1` kills the command 20 times instead of once."""

import csv
import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CALL, ROW, by_text, byte_tokenizer, qwen3, write_rows

import rest
import train_small
from toy_tools import policy, runs, show, tasks

ROOT = Path(__file__).resolve().parent.parent
KILLS = 20 if os.environ.get("REST_LONG") else 1
SMALL = {"--prompts": "4", "--group": "4", "--eval-rows": "5", "--eval-samples": "1", "--device": "cpu",
         "--max-completion-tokens": "12", "--train-rows": "40", "--warm-start-steps": "2",
         "--learning-rate": "1e-4"}
EVALUATION = ("--eval-rows", "--eval-samples", "--max-completion-tokens", "--device")


def small(*args):
    """The options SMALL that apply and that args do not give, and args."""
    own = set(args)
    if "--data" in args:
        own.add("--train-rows")
    if ("--eval-rows", "0") in zip(args, args[1:]):
        own.add("--eval-samples")
    names = [name for name in SMALL if name not in own]
    if "--eval-only" in args:
        names = [name for name in names if name in EVALUATION]
    if "--benchmarks" in args:
        names = ["--device"]
    return [word for name in names for word in (name, SMALL[name])] + list(args)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The embedded policy that every run with SMALL starts from. Two supervised steps teach nothing,
    so the cached policy is replaced by one that gets the format right about every second time:
    from a random one every completion earns the same, and a run that moves no weight tests little."""
    cache = tmp_path_factory.mktemp("cache")
    old = os.environ.get("REST_CACHE")
    os.environ["REST_CACHE"] = str(cache)
    model, tokenizer = policy.tiny_policy(0, 2, progress=False)
    empty = "<think>a</think><tool_call></tool_call>"
    pairs = [(row, empty) for row in tasks.make_rows(40, "train", seed=1)]
    policy.warm_start(model, tokenizer, pairs, 12, 4, 1e-3, progress=False)
    folder, = cache.iterdir()
    model.save_pretrained(folder)
    yield folder
    os.environ.pop("REST_CACHE") if old is None else os.environ.update(REST_CACHE=old)


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory):
    """(row, folder): one dialogue of two calls and an answer, and a small policy that has learnt it,
    but not quite: its episodes differ, most of their calls can run."""
    row, = tasks.make_rows(1, "train", seed=3, categories=["multi_turn"])
    steps = tasks.decompose(row)
    texts = [tasks.completion_text(step["gold"][0], **step["demo"][0]) for step in steps]
    tokenizer = policy.build_tokenizer(texts * 50 + [json.dumps(row["tools"])], vocab_size=460)
    model = qwen3(len(tokenizer), layers=1)
    policy.warm_start(model, tokenizer, list(zip(steps, texts)), 60, 3, 1e-2, progress=False)
    folder = tmp_path_factory.mktemp("dialogue")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return row, folder


def run(tmp_path, *args):
    if "--eval-only" not in args or "--benchmarks" in args or "--name" in args:
        args = ("--output-dir", str(tmp_path), *args)
    train_small.main(small(*args))


def weights(folder):
    return torch.cat([p.flatten() for p in policy.load_model(folder)[0].parameters()])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learnt(folder, start):
    """Whether every step of the run had a gradient and was taken, and the policy has moved."""
    rows = metrics(folder)
    taken = all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    return bool(rows) and taken and not torch.equal(weights(folder), weights(start))


def command(*args):
    words = [sys.executable, "train_small.py", *args]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_trains_logs_saves_and_shows(start, tmp_path):
    """As a reader runs it: a folder with everything in it, a table, an episode, and no warning."""
    done = command(*small("--steps", "3", "--output-dir", str(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "rest-seed0"
    rows, table = metrics(folder), list(csv.DictReader(open(folder / "metrics.csv")))
    assert [r["step"] for r in rows] == [0, 1, 2] == [int(r["step"]) for r in table]
    for row, line in zip(rows, table):
        assert {key: float(value) for key, value in line.items()} == row
    assert learnt(folder, start)
    assert json.loads((folder / "config.json").read_text())["config"]["method"] == "rest"
    assert set(json.loads((folder / "after.json").read_text())) == {*tasks.CATEGORIES, "all"}
    model, tokenizer = policy.load_model(folder / "checkpoint")
    assert tokenizer.chat_template == policy.CHAT_TEMPLATE and model.config.vocab_size == len(tokenizer)
    for word in ("category", "simple", "[thought", "nats", "Time of the RL steps: rollout"):
        assert word in done.stdout, (word, done.stdout)
    # the progress bar, and nothing but it
    assert "rest:" in done.stderr and "reward" in done.stderr and "Warning" not in done.stderr
    seconds = json.loads((folder / "time.json").read_text())
    parts = [seconds[name] for name in ("rollout", "reward", "update", "other")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(seconds["steps"])
    assert seconds["run"] > seconds["start"] + seconds["steps"]


def test_the_printed_table_is_before_and_after(start, tmp_path, capsys):
    """Every line is that of before.json beside that of after.json; and what stands there as "after"
    is what the saved policy scores when it is loaded and evaluated, as "before" is the start's."""
    more = ["--eval-rows", "10", "--eval-samples", "2"]
    run(tmp_path, "--name", "a", "--steps", "3", "--learning-rate", "3e-3", *more)
    assert learnt(tmp_path / "a", start)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    before, after = (json.loads((tmp_path / f"a/{when}.json").read_text())
                     for when in ("before", "after"))
    assert before != after
    assert before["all"]["n"] == after["all"]["n"] == 28  # 10 tasks, 14 steps, 2 samples
    for key, old in before.items():
        new = after[key]
        assert [key, str(old["n"]), f"{old['exact']:.3f}", "->", f"{new['exact']:.3f}",
                f"{new['exact'] - old['exact']:+.3f}", f"{new['format']:.3f}",
                f"{new['tokens']:.1f}"] in printed
    for folder, table in ((tmp_path / "a", after), (start, before)):
        run(tmp_path, "--eval-only", "--model", str(folder), *more)
        printed = [line.split() for line in capsys.readouterr().out.splitlines()]
        for key, row in table.items():
            assert [key, str(row["n"]), f"{row['exact']:.3f}", f"{row['format']:.3f}",
                    f"{row['tokens']:.1f}"] in printed


def test_a_resumed_run_equals_the_uninterrupted_one(start, tmp_path, monkeypatch):
    """Pitfall 13. Interrupted by Ctrl-C within the third of 5 steps, then resumed: the same metrics
    line by line and the same final weights, bit for bit. Learning rate, curriculum, reward scaling,
    data order, sampling seeds and the optimiser's state all have to continue, and every step moves
    the weights. Options that would make another run of it are refused; the start is not measured
    again; Ctrl-C means afterwards what it meant before."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    on_interrupt = signal.getsignal(signal.SIGINT)
    options = ["--steps", "5", "--weight-decay", "0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path, "--name", "whole", *options)
    assert learnt(whole, start)
    step = rest.train_step

    def interrupted(*args, **kwargs):
        if args[5] == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)
    monkeypatch.setattr(rest, "train_step", interrupted)
    with pytest.raises(SystemExit, match="interrupted after 3 steps; saved"):
        run(tmp_path, "--name", "parts", *options)
    monkeypatch.setattr(rest, "train_step", step)
    for name, value in (("eval-samples", "2"), ("learning-rate", "0.1"),
                        ("weight-decay", "0.2"), ("eval-rows", "6"), ("train-rows", "50")):
        changed = options if name != "weight-decay" else options[:2]
        with pytest.raises(SystemExit, match=f"other settings than the run began with .*--{name}"):
            run(tmp_path, "--name", "parts", *changed, "--resume", f"--{name}", value)
    with pytest.raises(SystemExit, match="other settings than the run began with .*--mask-names"):
        run(tmp_path, "--name", "parts", *options, "--resume", "--mask-names")
    measured, evaluate = [], rest.evaluate
    monkeypatch.setattr(rest, "evaluate", lambda *a, **k: measured.append(1) or evaluate(*a, **k))
    run(tmp_path, "--name", "parts", *options, "--resume")
    assert len(measured) == 1
    for name in ("metrics.jsonl", "metrics.csv", "before.json", "after.json"):
        assert (whole / name).read_text() == (parts / name).read_text()
    assert torch.equal(weights(whole), weights(parts))
    run(tmp_path, "--name", "undecayed", "--steps", "5")
    assert not torch.equal(weights(whole), weights(tmp_path / "undecayed"))
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_a_crash_between_checkpoints_loses_only_what_is_redone(start, tmp_path, monkeypatch):
    """Killed in step 3 with a checkpoint after step 1, and within a line of the log: resumed, the
    run is the uninterrupted one, in which every step moved the weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path, "--name", "whole", "--steps", "5")
    assert learnt(whole, start)
    step = rest.train_step

    def crash(*args, **kwargs):
        if args[5] == 3:
            raise RuntimeError("power cut")
        return step(*args, **kwargs)
    monkeypatch.setattr(rest, "train_step", crash)
    with pytest.raises(RuntimeError):
        run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2")
    assert torch.load(parts / "checkpoint/trainer.pt", weights_only=True)["step"] == 2
    assert len(metrics(parts)) == 3  # nothing lost: step 2 is logged though not checkpointed
    monkeypatch.setattr(rest, "train_step", step)
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert metrics(whole) == metrics(parts)
    assert torch.equal(weights(whole), weights(parts))
    (parts / "checkpoint").rename(parts / "checkpoint.part")  # killed between the moves of a save
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert torch.equal(weights(whole), weights(parts))


def test_a_second_interrupt_stops_at_once(start, tmp_path, monkeypatch):
    """The first lets the step finish, the second does not: the step is not in the log."""
    step = rest.train_step

    def interrupted(*args, **kwargs):
        if args[5] == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)
    monkeypatch.setattr(rest, "train_step", interrupted)
    with pytest.raises(SystemExit, match="what was saved before is kept"):
        run(tmp_path, "--name", "a", "--steps", "3", "--save-steps", "1")
    assert len(metrics(tmp_path / "a")) == 1 and learnt(tmp_path / "a", start)


def test_what_a_run_says_of_itself(start, tmp_path, monkeypatch, capsys):
    """With a clock that ticks once a reading: three steps of one tick a phase. Updates that were
    skipped in any step are counted. The episode shown is one that has the most regions. Without
    matplotlib there is no curve, and that is said."""
    ticks, shown, step, episode = itertools.count(), [], rest.train_step, show.episode

    def skipping(*args, **kwargs):
        logged, *rest_of_it = step(*args, **kwargs)
        return {**logged, "skipped_updates": int(args[5] < 2)}, *rest_of_it

    def watch(chat, batch, i, *args):
        shown.append([len(set(row)) for row in batch.region.tolist()])
        shown.append(i)
        return episode(chat, batch, i, *args)

    def no_curve(files, out):
        raise ImportError("not installed")
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    for module in (train_small, runs):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(rest, "train_step", skipping)
    monkeypatch.setattr(show, "episode", watch)
    monkeypatch.setattr(show, "curve", no_curve)
    run(tmp_path, "--name", "a", "--steps", "3", "--eval-rows", "0")
    seconds = json.loads((tmp_path / "a/time.json").read_text())
    # each step reads the clock at its start and after each of three phases, and the end once more
    assert [seconds[name] for name in ("rollout", "reward", "update", "steps")] == [3, 3, 3, 13]
    regions, i = shown
    assert regions[i] == max(regions) > min(regions)
    printed = capsys.readouterr().out
    assert "2 updates were skipped" in printed and "No curve.png: not installed" in printed


def test_a_missing_package_is_one_sentence(start, tmp_path, monkeypatch):
    """As wrong input is: what to install, and no traceback."""
    def missing(*args, **kwargs):
        raise ImportError("pip install gguf accelerate")
    monkeypatch.setattr(policy, "load_model", missing)
    with pytest.raises(SystemExit, match="error: pip install gguf accelerate"):
        run(tmp_path, "--model", "model.gguf", "--steps", "1", "--warm-start-steps", "0")


def test_rows_of_a_step():
    """A function of seed and step; nothing twice within an epoch, another order in the next."""
    rows, cfg = list(range(20)), rest.Config(prompts=6, seed=3)
    epoch = [train_small.batch_rows(rows, cfg, step) for step in range(3)]
    assert [len(batch) for batch in epoch] == [6] * 3
    assert len({row for batch in epoch for row in batch}) == 18
    assert [train_small.batch_rows(rows, cfg, step) for step in range(3)] == epoch
    assert [train_small.batch_rows(rows, cfg, step) for step in range(3, 6)] != epoch
    assert train_small.batch_rows(rows, rest.Config(prompts=6, seed=4), 0) != epoch[0]


def test_a_bug_within_a_step_shows_where_it_is(start, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        raise ValueError("a bug")
    monkeypatch.setattr(rest, "train_step", wrong)
    with pytest.raises(RuntimeError, match="step 0 failed") as error:
        run(tmp_path, "--name", "bug", "--steps", "2")
    assert str(error.value.__cause__) == "a bug" and not (tmp_path / "bug").exists()


def test_finished_runs_are_not_written_over(start, tmp_path):
    """Without a name the second run is numbered; with one it is refused."""
    for name in ("rest-seed0", "rest-seed0-2"):
        run(tmp_path, "--steps", "1")
        assert learnt(tmp_path / name, start)
    assert metrics(tmp_path / "rest-seed0") == metrics(tmp_path / "rest-seed0-2")
    run(tmp_path, "--steps", "1", "--name", "mine")
    with pytest.raises(SystemExit, match="exists"):
        run(tmp_path, "--steps", "1", "--name", "mine")


def chat_model(folder):
    """A random model and a tokenizer without the embedded policy's template: it has to be told what
    to do, as every real model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
                               "<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
    qwen3().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def demonstrations(path, n):
    row = {key: ROW[key] for key in ("messages", "tools", "gold")}
    return write_rows(path, [{**row, "demo": [{"think": f"t{i}", "response": None}]}
                             for i in range(n)])


def test_a_model_from_a_folder_trains_on_data_from_a_file(tmp_path, monkeypatch):
    """--model DIR --data FILE.jsonl with a supervised warm start on the same rows. A crash in the
    first step does not lose the supervised steps, and both kinds of step move the weights."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    model, data = chat_model(tmp_path / "model"), demonstrations(tmp_path / "data.jsonl", 6)
    more = ["--model", str(model), "--data", str(data), "--eval-data", str(data), "--steps", "2",
            "--name", "other"]
    default = ["--learning-rate", str(rest.Config.learning_rate)]
    with pytest.raises(SystemExit, match="would wreck a pretrained model"):
        run(tmp_path, *more, *default)
    of_start = ["0" if word == "2" else "start" if word == "other" else word for word in more]
    run(tmp_path, *of_start, *default)  # a start uses no rate
    with monkeypatch.context() as patch:
        patch.setattr(rest, "train_step", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="step 0 failed"):
            run(tmp_path, *more)
    warm = weights(tmp_path / "other")
    assert not torch.equal(warm, weights(model))
    run(tmp_path, *more, "--resume")
    assert json.loads((tmp_path / "other/after.json").read_text())["all"]["n"] == 5  # of the 6 rows
    assert learnt(tmp_path / "other", model) and not torch.equal(warm, weights(tmp_path / "other"))


def test_what_a_real_model_is_told(tmp_path, monkeypatch):
    """The same instructions in the warm start, in training and in evaluation; the options of the
    warm start reach it; and one's own demonstrations are imitated as they are, without the noise
    of the toy ones."""
    model, data = chat_model(tmp_path / "model"), demonstrations(tmp_path / "data.jsonl", 12)
    seen, step, evaluate = {}, rest.train_step, rest.evaluate

    def warm_start(model, tokenizer, pairs, *args, **kwargs):
        given = inspect.signature(real).bind(model, tokenizer, pairs, *args, **kwargs)
        seen.update(given.arguments)
    real = policy.warm_start
    monkeypatch.setattr(rest, "score_texts", by_text)
    monkeypatch.setattr(policy, "warm_start", warm_start)
    monkeypatch.setattr(rest, "train_step", lambda *a: seen.update(train=a[1].instructions) or step(*a))
    monkeypatch.setattr(rest, "evaluate", lambda *a, **k: seen.update(eval=a[1].instructions)
                        or evaluate(*a, **k))
    run(tmp_path, "--model", str(model), "--data", str(data), "--eval-data", str(data),
        "--steps", "1", "--name", "m", "--seed", "4", "--warm-start-batch", "5", "--micro-batch", "3",
        "--warm-start-lr", "0.01")
    assert learnt(tmp_path / "m", model)
    names = ("steps", "batch", "learning_rate", "seed", "micro_batch")
    assert [seen[name] for name in names] == [2, 5, 0.01, 4, 3]
    assert seen["instructions"] == seen["train"] == seen["eval"] == train_small.INSTRUCTIONS
    assert [text for _, text in seen["pairs"]] == [
        tasks.completion_text(ROW["gold"][0], f"t{i}") for i in range(12)]


@pytest.mark.parametrize("mode", [["--steps", "1"], ["--eval-only"]], ids=["train", "eval-only"])
def test_options_reach_the_embedded_policy_and_its_tasks(tmp_path, monkeypatch, mode):
    """Seed, warm start, noise and masked names, when training and when only evaluating."""
    asked, rows = [], []

    def make_rows(n, split, seed=0, **options):
        rows.append((n, split, seed, options["mask_names"]))
        return real(n, split, seed, **options)

    def tiny_policy(seed, steps, noise=0.22, mask_names=False, device="cpu"):
        asked.append((seed, steps, noise, mask_names))
        return qwen3(), byte_tokenizer()
    real = tasks.make_rows
    monkeypatch.setattr(tasks, "make_rows", make_rows)
    monkeypatch.setattr(policy, "tiny_policy", tiny_policy)
    run(tmp_path, *mode, "--seed", "5", "--warm-start-steps", "7", "--noise", "0.4", "--mask-names")
    assert asked == [(5, 7, 0.4, True)]
    wanted = {(40, "train", 5, True), (5, "test", 5, True)}
    assert set(rows) == {row for row in wanted if row[1] == "test" or "--steps" in mode}


def test_options_reach_a_loaded_model(tmp_path, monkeypatch):
    """--dtype and --gradient-checkpointing; and the rows of --eval-data are the held-out ones, of
    the test split where a data set has splits."""
    seen, load_model, evaluate = {"splits": []}, policy.load_model, rest.evaluate
    load_rows = train_small.load_rows

    def watch_rows(source, split="train"):
        seen["splits"].append((Path(source).name, split))
        return load_rows(source, split)

    def watch_load(path, *args):
        seen.update(load=(path, *args))
        return load_model(path, *args)

    def watch_eval(engine, chat, rows, *args, **kwargs):
        seen.update(rows=rows)
        return evaluate(engine, chat, rows, *args, **kwargs)
    monkeypatch.setattr(train_small, "load_rows", watch_rows)
    monkeypatch.setattr(policy, "load_model", watch_load)
    monkeypatch.setattr(rest, "evaluate", watch_eval)
    model, data = chat_model(tmp_path / "model"), demonstrations(tmp_path / "data.jsonl", 6)
    held_out = [{"messages": [{"role": "user", "content": "3+4?"}], "gold": ROW["gold"]}] * 3
    held_out = write_rows(tmp_path / "test.jsonl", held_out)
    run(tmp_path, "--model", str(model), "--data", str(data), "--eval-data", str(held_out),
        "--dtype", "bfloat16", "--gradient-checkpointing", "--steps", "1", "--name", "m",
        "--warm-start-steps", "0", "--group", "2", "--prompts", "1")
    assert seen["load"] == (str(model), torch.bfloat16, True)
    assert sorted(seen["splits"]) == [("data.jsonl", "train"), ("test.jsonl", "test")]
    assert [row["messages"][0]["content"] for row in seen["rows"]] == ["3+4?"] * 3


def test_demonstrations_that_the_reward_would_not_take_are_told(tmp_path, monkeypatch, capsys):
    """They are imitated all the same; what is exact is not mentioned, and an empty thought is none."""
    model, seen = chat_model(tmp_path / "model"), {}
    monkeypatch.setattr(policy, "warm_start", lambda *a, **k: seen.update(pairs=a[2]))
    row = {key: ROW[key] for key in ("messages", "tools", "gold")}
    other = {"name": "add", "arguments": {"a": 1, "b": 3}}
    rows = [{**row, "target": CALL}, {**row, "demo": [{}], "blocks": [["tool_call"]]}, {**row, "demo": [{}]},
            {**row, "target": tasks.completion_text([other], "sum")}]
    args = ["--model", str(model), "--steps", "0", "--eval-rows", "0", "--data"]
    run(tmp_path, *args, str(write_rows(tmp_path / "some.jsonl", rows)), "--name", "some")
    assert [rest.score_texts([text], row)[2] for row, text in seen["pairs"]] == [True, True, False, False]
    told = capsys.readouterr().err
    assert "2 of the 4 demonstrations in" in told
    assert "row 3 (format 0, correctness 1.00) is the first" in told
    run(tmp_path, *args, str(write_rows(tmp_path / "all.jsonl", rows[:2] * 2)), "--name", "all")
    assert "demonstrations" not in capsys.readouterr().err


def test_a_thought_that_the_template_opens_is_left_out_of_no_demonstration(tmp_path, monkeypatch):
    """A demonstrator's noise on toy tasks leaves some out: those rows are not demonstrated."""
    seen, folder = {}, chat_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
                               "<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>")
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(policy, "warm_start", lambda *a, **k: seen.update(pairs=a[2]))
    run(tmp_path, "--model", str(folder), "--steps", "0", "--eval-rows", "0", "--noise", "0.5", "--name", "x")
    assert len(seen["pairs"]) > 10 and all(text.startswith("<think>") for _, text in seen["pairs"])


def test_gold_that_the_tokenizer_cannot_write_is_told(tmp_path, capsys):
    """A tokenizer that normalises composes what gold has decomposed: no completion of it would be exact."""
    from tokenizers import normalizers
    folder, tokenizer = chat_model(tmp_path / "model"), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    row = {key: ROW[key] for key in ("messages", "gold")}
    rows = [{**row, "gold": [[{"name": "go", "arguments": {"to": to}}]]}
            for to in ("Z\u00fcrich", "Zu\u0308rich")]
    data = write_rows(tmp_path / "rows.jsonl", rows * 2)
    run(tmp_path, "--model", str(folder), "--data", str(data), "--steps", "0", "--warm-start-steps", "0",
        "--eval-rows", "0", "--name", "x")
    told = capsys.readouterr().err
    assert "cannot write the gold calls of 2 training rows" in told and "that of row 2 first" in told


def test_whole_completions_of_ones_own_are_imitated(tmp_path, monkeypatch):
    """Rows with a "target" need no "demo", and rows with neither are refused."""
    model, seen = chat_model(tmp_path / "model"), {}
    target = CALL + "<response>3</response>"
    row = {key: ROW[key] for key in ("messages", "tools", "gold")}
    full = write_rows(tmp_path / "full.jsonl", [{**row, "target": target}] * 4)
    bare = write_rows(tmp_path / "bare.jsonl", [row] * 4)
    monkeypatch.setattr(policy, "warm_start",
                        lambda model, tokenizer, pairs, *a, **k: seen.update(pairs=pairs))
    args = ["--model", str(model), "--steps", "0", "--eval-rows", "0", "--data"]
    run(tmp_path, *args, str(full), "--name", "full")
    assert [text for _, text in seen["pairs"]] == [target] * 4
    with pytest.raises(SystemExit, match="4 rows .* neither"):
        run(tmp_path, *args, str(bare), "--name", "bare")


def test_what_a_live_run_hands_on(start, tmp_path, monkeypatch):
    """Boxes in training and in evaluation, whole dialogues, no instructions to the embedded policy,
    which was shown the format; and held-out rows that are neither trained on in this run nor belong
    to the training split."""
    trained, held_out, boxes, told = [], [], [], []
    step, evaluate = rest.train_step, rest.evaluate

    def watch_step(*args, **kwargs):
        trained.extend(args[3])
        boxes.append(args[6])
        told.append(args[1].instructions)
        return step(*args, **kwargs)

    def watch_eval(engine, chat, rows, cfg, **kwargs):
        held_out.extend(rows)
        boxes.append(kwargs["toolbox_for"])
        told.append(chat.instructions)
        return evaluate(engine, chat, rows, cfg, **kwargs)
    monkeypatch.setattr(rest, "train_step", watch_step)
    monkeypatch.setattr(rest, "evaluate", watch_eval)
    run(tmp_path, "--steps", "3", "--max-turns", "3", "--name", "live", "--prompts", "5")
    assert learnt(tmp_path / "live", start)
    assert len(boxes) == 5 and all(box is tasks.toolbox_for for box in boxes)
    assert told == [""] * 5
    assert {len(row["gold"]) for row in held_out} == {1, 3} == {len(row["gold"]) for row in trained}

    def requests(rows):
        return {row["messages"][0]["content"] for row in rows}
    assert len(requests(trained)) == len(trained) == 15  # nothing twice within an epoch
    assert not requests(held_out) & requests(trained)
    assert not requests(held_out) & requests(tasks.make_rows(40, "train", seed=0))


def test_benchmarks_are_greedy_limited_and_tied_to_the_weights(tmp_path, monkeypatch, capsys):
    """One greedy completion a prompt, --limit of them, with the instructions; compared with another
    run where one is named; results of other weights are not mixed in."""
    model = chat_model(tmp_path / "m")
    answers = [{"system": "s", "user": "u", "answer": {"name": "F", "parameters": {"a": str(i)}}}
               for i in range(6)]
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "level-1-api_processed.json").write_text(json.dumps(answers))
    seen, rollout = [], rest.rollout
    monkeypatch.setattr(rest, "rollout", lambda engine, chat, *a, **k: (
        seen.append({**k, "instructions": chat.instructions}) or rollout(engine, chat, *a, **k)))
    args = ["--model", str(model), "--eval-only", "--benchmarks", "api_bank_1", "--limit", "4",
            "--api-bank-dir", str(tmp_path / "bank"), "--max-completion-tokens", "8",
            "--name", "bench"]
    run(tmp_path, *args)
    assert seen and all(k["greedy"] and k["group"] == 1 for k in seen)
    assert all(k["instructions"] == train_small.INSTRUCTIONS for k in seen)
    assert len((tmp_path / "bench/benchmarks.jsonl").read_text().splitlines()) == 1 + 4
    alone = capsys.readouterr().out
    assert "difference" not in alone
    run(tmp_path, *args, "--compare", str(tmp_path / "bench/benchmarks.jsonl"))
    assert "difference" in capsys.readouterr().out
    qwen3(seed=1).save_pretrained(model)  # another policy in the same place
    with pytest.raises(SystemExit, match=r"\(weights differ\)"):
        run(tmp_path, *args)


def test_running_out_of_memory_says_what_to_lower(start, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("12 GiB asked for")
    monkeypatch.setattr(rest, "train_step", full)
    with pytest.raises(SystemExit, match="lower --micro-batch-tokens"):
        run(tmp_path, "--steps", "2")


def test_zero_steps_make_a_start_that_several_runs_share(start, tmp_path):
    """--steps 0 leaves the warm start, and two methods begin from the same results, then move."""
    run(tmp_path, "--name", "start", "--steps", "0")
    assert not (tmp_path / "start/after.json").exists()
    assert not (tmp_path / "start/metrics.csv").exists()
    assert torch.equal(weights(tmp_path / "start"), weights(start))
    before = (tmp_path / "start/before.json").read_text()
    for method in ("rest", "grpo"):
        run(tmp_path, "--name", method, "--method", method, "--steps", "1",
            "--model", str(tmp_path / "start"), "--warm-start-steps", "0")
        assert (tmp_path / method / "before.json").read_text() == before
        assert learnt(tmp_path / method, start)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("method", rest.WEIGHTS)
def test_every_method_takes_a_live_and_a_single_step(dialogue, tmp_path, monkeypatch, method, turns):
    """Two passes on a dialogue that the policy knows nearly: tools run in every episode that calls
    them and only in the live run, their answers are read, and the policy moves."""
    row, folder = dialogue
    monkeypatch.setattr(tasks, "make_rows", lambda n, *args, **kwargs: [row] * n)
    made, seen, toolbox_for, step = [], {}, tasks.toolbox_for, rest.train_step

    def counted(row):
        box = toolbox_for(row)
        box.ran = []
        box.functions = {name: lambda f=f, **arguments: box.ran.append(1) or f(**arguments)
                         for name, f in box.functions.items()}
        made.append(box)
        return box

    def watch(*args):
        made.clear()  # those of the rows' own histories
        result = step(*args)
        seen.update(batch=result[1])
        return result
    monkeypatch.setattr(tasks, "toolbox_for", counted)
    monkeypatch.setattr(rest, "train_step", watch)
    run(tmp_path, "--steps", "1", "--method", method, "--name", "run", "--max-turns", str(turns),
        "--passes", "2", "--model", str(folder), "--learning-rate", "1e-3", "--eval-rows", "0",
        "--max-completion-tokens", "160", "--warm-start-steps", "0")
    assert learnt(tmp_path / "run", folder)
    batch, (logged,) = seen["batch"], metrics(tmp_path / "run")
    assert len(batch.texts) == 16 and logged["tokens"] == float(batch.sampled.sum(1).float().mean())
    assert sum(len(box.ran) for box in made) >= 4 if turns == 3 else not made
    if turns == 3:
        again = [i for i, box in enumerate(made) if box.ran and len(batch.turns[i]) > 1]
        assert again and all(not batch.sampled[i].all() for i in again)
        assert max(map(len, batch.turns)) == 3


def test_a_method_of_ones_own_is_called_by_its_name(start, tmp_path, monkeypatch):
    """Registered from outside, nothing in rest.py touched: --method finds it, its weights are those
    that are trained with, at the progress of each step, and config.json keeps its name."""
    asked, used, update = [], [], rest.update

    def tags_only(batch, cfg, progress):
        asked.append((cfg.method, progress))
        return rest.normalise_weights((batch.region == rest.TAG).float(), batch.sampled)

    def watch(engine, optimizer, batch, advantages, weight, *args, **kwargs):
        used.append((weight != 0) == (batch.region == rest.TAG))
        return update(engine, optimizer, batch, advantages, weight, *args, **kwargs)
    monkeypatch.setitem(rest.WEIGHTS, "mine", tags_only)
    monkeypatch.setattr(rest, "update", watch)
    run(tmp_path, "--method", "mine", "--steps", "2")
    assert list(dict.fromkeys(asked)) == [("mine", 0.0), ("mine", 0.5)] and all(same.all() for same in used)
    assert learnt(tmp_path / "mine-seed0", start)
    options = json.loads((tmp_path / "mine-seed0/config.json").read_text())
    assert options["config"]["method"] == "mine"


# ---------------------------------------------------------------------- nothing lost

def test_sigterm_does_what_ctrl_c_does(start, tmp_path, monkeypatch):
    """A cluster's signal in the first step: that step is finished and saved, and the same command goes on."""
    again = ["--name", "a", "--steps", "3", "--resume"]
    step = rest.train_step

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(rest, "train_step", interrupted)
        with pytest.raises(SystemExit, match="interrupted after 1 steps; saved"):
            run(tmp_path, *again)
    assert len(metrics(tmp_path / "a")) == 1 and (tmp_path / "a/metrics.csv").exists()
    run(tmp_path, *again)
    run(tmp_path, "--name", "whole", "--steps", "3")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("module, name", [
    (policy, "tiny_policy"), (runs, "write_manifest"), (rest, "evaluate"), (rest, "train_step")])
def test_one_and_the_same_command_is_queued_again(start, tmp_path, monkeypatch, module, name):
    """Killed while the policy is loaded, while the start is saved, in the first evaluation or step:
    --resume, which was there from the beginning, begins the run or goes on. A run killed before its first
    checkpoint could once neither be resumed nor begun again."""
    again = ["--name", "a", "--steps", "2", "--resume"]

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "__exit__", lambda self, *_: self.close())  # a kill tidies nothing up
        patch.setattr(module, name, killed)
        with pytest.raises(Killed):
            run(tmp_path, *again)
        assert (tmp_path / "a").exists()
    run(tmp_path, *again)
    assert learnt(tmp_path / "a", start) and len(metrics(tmp_path / "a")) == 2


def test_the_command_survives_kills(start, tmp_path):
    """Real SIGKILLs of the real command, between its start and its end; then it is as if there were none."""
    options = ("--steps", "6", "--save-steps", "1", "--name", "a", "--resume")
    words = [sys.executable, "train_small.py", *small(*options, "--output-dir", str(tmp_path))]
    for _ in range(KILLS):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "a").exists():
            time.sleep(0.05)
        time.sleep(random.uniform(0, 3))
        process.kill()
        process.wait()
    run(tmp_path, *options)
    run(tmp_path, "--steps", "6", "--name", "whole")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    assert (tmp_path / "a/after.json").read_text() == (tmp_path / "whole/after.json").read_text()


def test_a_second_process_is_refused(start, tmp_path):
    run(tmp_path, "--name", "a", "--steps", "1")
    with runs.RunFolder(tmp_path, "a"), pytest.raises(SystemExit, match="in use by another process"):
        run(tmp_path, "--name", "a", "--steps", "1", "--resume")


@pytest.mark.parametrize("name", ["evaluate", "train_step"])
def test_what_is_noticed_late_leaves_no_folder(start, tmp_path, monkeypatch, name):
    def wrong(*_, **__):
        raise ValueError("a row that cannot be")
    monkeypatch.setattr(rest, name, wrong)
    with pytest.raises((SystemExit, RuntimeError)):
        run(tmp_path / "new", "--steps", "1")
    assert not (tmp_path / "new").exists()


def test_a_finished_run_is_prolonged(start, tmp_path, capsys, monkeypatch):
    """Its steps stay, the schedules follow the new length, the old result is kept; resumed without
    more steps nothing is measured again."""
    run(tmp_path, "--name", "a", "--steps", "2")
    first = metrics(tmp_path / "a")
    result = (tmp_path / "a/after.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(rest, "evaluate", None)
        run(tmp_path, "--name", "a", "--steps", "2", "--resume")
    with pytest.raises(SystemExit, match="only become longer"):
        run(tmp_path, "--name", "a", "--steps", "1", "--resume")
    run(tmp_path, "--name", "a", "--steps", "5", "--resume")
    told = capsys.readouterr().out
    assert "prolonged from 2 to 5 steps" in told and "follow the new length from step 2 on" in told
    rows = metrics(tmp_path / "a")
    assert rows[:2] == first and [row["step"] for row in rows] == list(range(5))
    assert rows[3]["lr"] == rest.learning_rate(rest.Config(steps=5, learning_rate=1e-4), 3)
    assert (tmp_path / "a/after-2.json").read_text() == result != (tmp_path / "a/after.json").read_text()
    options = json.loads((tmp_path / "a/config.json").read_text())
    assert options["lengths"] == [[0, 2], [2, 5]] and options["config"]["steps"] == 5


def test_a_damaged_checkpoint_costs_only_its_steps(start, tmp_path, capsys):
    """A flipped bit in the optimiser's state was once loaded in silence."""
    for name in ("a", "whole"):
        run(tmp_path, "--name", name, "--steps", "4", "--save-steps", "2")
    (tmp_path / "a/after.json").unlink()
    file = tmp_path / "a/checkpoint/trainer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run(tmp_path, "--name", "a", "--steps", "4", "--save-steps", "2", "--resume")
    told = capsys.readouterr().err
    assert "trainer.pt is damaged" in told and "going on from the checkpoint before, after 2 steps" in told
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("what, good", [("update", 3), ("rollout", 2)])
def test_a_policy_that_is_not_finite_stops_the_run(start, tmp_path, monkeypatch, what, good):
    """Step 3 makes NaN, or finds it: one sentence, and `checkpoint` is one from before that. It once
    went on to its end and said nothing."""
    step = rest.train_step

    def nan(*args):
        if args[5] == 3 and what == "rollout":
            args[0].model.model.norm.weight.data.fill_(3e38)
        result = step(*args)
        if args[5] == 3:
            next(args[0].model.parameters()).data[0] = torch.nan
        return result
    monkeypatch.setattr(rest, "train_step", nan)
    with pytest.raises(SystemExit, match=f"no longer finite in step 3: .* after {good} steps") as stop:
        run(tmp_path, "--name", "a", "--steps", "6", "--save-steps", "1")
    assert "\n" not in str(stop.value.code)
    assert weights(tmp_path / "a").isfinite().all() and len(metrics(tmp_path / "a")) == 3
    runs.verify(tmp_path / "a/checkpoint")


def test_a_policy_that_diverged_in_the_last_step(start, tmp_path, monkeypatch):
    """Found by the evaluation of the end."""
    evaluate = rest.evaluate

    def nan(engine, *args, **kwargs):
        if (tmp_path / "a/before.json").exists():
            engine.model.model.norm.weight.data.fill_(3e38)
        return evaluate(engine, *args, **kwargs)
    monkeypatch.setattr(rest, "evaluate", nan)
    with pytest.raises(SystemExit, match="no longer finite in step 2: .* after 1 steps"):
        run(tmp_path, "--name", "a", "--steps", "2", "--save-steps", "1")


def test_a_model_whose_logits_overflow_is_refused(tmp_path):
    """Finite weights, and yet no distribution: every update was skipped in silence."""
    model = qwen3()
    model.model.norm.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "huge")
    byte_tokenizer().save_pretrained(tmp_path / "huge")
    with pytest.raises(SystemExit, match="logits are not finite"):
        run(tmp_path, "--model", str(tmp_path / "huge"), "--warm-start-steps", "0", "--name", "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_keeps_what_was_saved(start, tmp_path, monkeypatch):
    saved = torch.save

    def full(state, path):
        if state["step"] == 2:
            raise OSError(28, "No space left on device")
        saved(state, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="checkpoint after 2 steps could not be written to .*No space left"):
        run(tmp_path, "--name", "a", "--steps", "4", "--save-steps", "1")
    monkeypatch.setattr(torch, "save", saved)
    run(tmp_path, "--name", "a", "--steps", "4", "--save-steps", "1", "--resume")
    assert len(metrics(tmp_path / "a")) == 4


def test_rows_that_changed_are_another_run(tmp_path):
    """The same file name, and other rows in it."""
    model = chat_model(tmp_path / "model")
    data = demonstrations(tmp_path / "data.jsonl", 6)
    more = ["--model", str(model), "--data", str(data), "--warm-start-steps", "0", "--steps", "1",
            "--name", "a"]
    run(tmp_path, *more)
    demonstrations(tmp_path / "data.jsonl", 7)
    with pytest.raises(SystemExit, match="other rows than the run began with: .*data.jsonl"):
        run(tmp_path, *more, "--resume")


def test_kept_steps_stay(start, tmp_path):
    run(tmp_path, "--name", "a", "--steps", "5", "--keep-steps", "0", "2", "3")
    kept = tmp_path / "a/kept"
    assert sorted(path.name for path in kept.iterdir()) == ["step0", "step2", "step3"]
    assert torch.equal(weights(kept / "step0"), weights(start))
    assert not torch.equal(weights(kept / "step2"), weights(kept / "step3"))
    run(tmp_path, "--name", "a", "--steps", "5", "--keep-steps", "2", "5", "--resume")
    assert torch.equal(weights(kept / "step5"), weights(tmp_path / "a"))
    with pytest.raises(SystemExit, match="--keep-steps 4 comes too late"):
        run(tmp_path, "--name", "a", "--steps", "5", "--keep-steps", "4", "--resume")


# ---------------------------------------------------------------------- evaluation alone

def test_eval_only_evaluates_what_it_was_asked_to(start, tmp_path, capsys, monkeypatch):
    """--name RUN is that run's policy, also where its newest checkpoint is damaged; --eval-data and --data
    are the rows. It once scored a fresh warm start on the toy tasks."""
    run(tmp_path, "--name", "a", "--steps", "2", "--save-steps", "1")
    data = demonstrations(tmp_path / "data.jsonl", 3)
    seen = []

    def evaluate(engine, chat, rows, cfg, **_):
        seen.append((torch.cat([p.detach().flatten() for p in engine.model.parameters()]), rows))
        return {"all": {"n": 1, "exact": 0.0, "format": 0.0, "tokens": 0.0}}
    monkeypatch.setattr(rest, "evaluate", evaluate)
    run(tmp_path, "--eval-only", "--name", "a")
    run(tmp_path, "--eval-only", "--name", "a", "--eval-data", str(data))
    run(tmp_path, "--eval-only", "--name", "a", "--data", str(data), "--eval-rows", "2")
    assert all(torch.equal(policy_weights, weights(tmp_path / "a")) for policy_weights, _ in seen)
    assert [len(rows) for _, rows in seen[1:]] == [3, 2]
    assert all(row["messages"] == ROW["messages"] for _, rows in seen[1:] for row in rows)
    assert not any(row["messages"] == ROW["messages"] for row in seen[0][1])
    (tmp_path / "a/checkpoint/tokenizer.json").unlink()
    for args in (["--name", "a"], ["--model", str(tmp_path / "a")]):
        run(tmp_path, "--eval-only", *args)
        assert "tokenizer.json is missing" in capsys.readouterr().err
        assert torch.equal(seen[-1][0], weights(tmp_path / "a/checkpoint.previous"))
    with pytest.raises(SystemExit, match="tokenizer.json is missing"):
        run(tmp_path, "--eval-only", "--model", str(tmp_path / "a/checkpoint"))


def test_an_evaluation_has_a_seed_of_its_own(start, tmp_path, monkeypatch):
    """Several seeds of one policy on one file: other draws; while all runs are evaluated by the same."""
    seeds, evaluate = [], rest.evaluate
    monkeypatch.setattr(rest, "evaluate", lambda *a, **k: seeds.append(k["seed"]) or evaluate(*a, **k))
    data = write_rows(tmp_path / "rows.jsonl", [{key: ROW[key] for key in ("messages", "tools", "gold")}])
    for seed in "012":
        run(tmp_path, "--eval-only", "--model", str(start), "--eval-data", str(data), "--seed", seed)
    assert len(set(seeds)) == 3
    for seed in "01":
        run(tmp_path, "--model", str(start), "--steps", "0", "--warm-start-steps", "0", "--seed", seed,
            "--name", seed)
    assert seeds[3] == seeds[4] == seeds[0]


def test_a_resumed_run_is_evaluated_by_the_same_draws(start, tmp_path):
    """Which other numbers of rows at once would change."""
    run(tmp_path, "--steps", "1", "--name", "x")
    with pytest.raises(SystemExit, match="--eval-batch"):
        run(tmp_path, "--steps", "2", "--name", "x", "--resume", "--eval-batch", "3")


def test_a_fork_s_weighting_is_called_once_a_step_and_another_s_failure_ends_no_run(
        start, tmp_path, monkeypatch, caplog):
    """It may remember; and a metric that only some steps have costs no page."""
    calls, step = [], rest.train_step

    def remembers(batch, cfg, progress):
        calls.append(progress)
        return rest.uniform(batch, cfg, progress)

    def fails(batch, cfg, progress):
        raise KeyError("not for you")

    def now_and_then(*args):
        metrics, *rest_of_it = step(*args)
        return metrics | ({"mine": 1.0} if args[5] == 1 else {}), *rest_of_it
    monkeypatch.setitem(rest.WEIGHTS, "remembers", remembers)
    monkeypatch.setitem(rest.WEIGHTS, "fails", fails)
    monkeypatch.setattr(rest, "train_step", now_and_then)
    run(tmp_path, "--method", "remembers", "--steps", "2", "--name", "x")
    assert calls == [0.0, 0.5] and learnt(tmp_path / "x", start)
    assert len([record for record in caplog.records if "method fails" in record.message]) == 1
    assert (tmp_path / "x" / "report.html").exists()
    recorded = json.loads((tmp_path / "x" / "episodes.jsonl").read_text().splitlines()[0])
    shown = recorded["groups"][0]["completions"][0]["w"]
    assert shown["remembers"] == shown["grpo"] != shown["rest"] and "fails" not in shown
