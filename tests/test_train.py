"""train_small.py as its users run it: as a command, resumed, interrupted, with another model, with wrong input; and the whole loop learning."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CALL, ROW, by_text, byte_tokenizer, qwen3, write_rows

import rest
import train_small
from toy_tools import policy, tasks

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--prompts", "4", "--group", "4", "--eval-rows", "5", "--eval-samples", "1",
         "--max-completion-tokens", "12", "--device", "cpu", "--train-rows", "40",
         "--warm-start-steps", "2", "--learning-rate", "1e-4"]


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
    train_small.main([*SMALL, "--output-dir", str(tmp_path), *args])


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
    return subprocess.run([sys.executable, "train_small.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_trains_logs_saves_and_shows(start, tmp_path):
    """As a reader runs it: a folder with everything in it, a table, an episode, and no warning."""
    done = command("--steps", "3", "--output-dir", str(tmp_path), *SMALL)
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


def test_help_names_every_knob():
    done = command("--help")
    assert done.returncode == 0
    for name in (*rest.Config.__dataclass_fields__, *train_small.Run.__dataclass_fields__):
        assert "--" + name.replace("_", "-") in done.stdout or "--" + name in done.stdout


@pytest.mark.parametrize("args, words", [
    (["--method", "ppo"], "method must be one of rest, "), (["--group", "1"], "at least 2"), (["--top-p", "0.9"], "top_k/top_p"),
    (["--resume", "--name", "none"], "nothing to resume"), (["--device", "tpu"], "device"), (["--model", "no/such.gguf"], "no such file"),
    (["--model", "./nowhere"], "nowhere"), (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--prompts", "500"], "lower --prompts"),
    (["--dtype", "int8"], "dtype"), (["--device", "cuda:99"], "device"), (["--benchmarks", "bfcl"], "--eval-only"), (["--eval-samples", "0"], "eval_samples"),
    (["--eval-only", "--benchmarks", "nope"], "unknown benchmark"), (["--eval-only", "--compare", "nope"], "no such file"),
    (["--dtype", "bfloat16"], "for a --model"), (["--eval-rows", "-1"], "eval_rows"), (["--learning-rate", "0"], "learning_rate"),
    (["--weight-min", "9"], "weight_max"), (["--max-turns", "2", "--data", "x.jsonl"], "--max-turns")])
def test_wrong_input_gets_one_sentence(start, tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_small.main([*SMALL, "--output-dir", str(tmp_path), *args])
    message = str(stop.value.code) if not isinstance(stop.value.code, int) else capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_a_resumed_run_equals_the_uninterrupted_one(start, tmp_path, monkeypatch):
    """Pitfall 13. Interrupted by Ctrl-C within the third of 5 steps, then resumed: the same metrics
    line by line and the same final weights, bit for bit. Learning rate, curriculum, reward scaling,
    data order, sampling seeds and the optimiser's state all have to continue, and every step moves
    the weights. Options that would make another run of it are refused; the start is not measured
    again; Ctrl-C means afterwards what it meant before."""
    monkeypatch.setattr(rest, "score_texts", by_text)
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
    for name, value in (("data", "x.jsonl"), ("eval-samples", "2"), ("learning-rate", "0.1"),
                        ("weight-decay", "0.2"), ("eval-rows", "6"), ("train-rows", "50")):
        with pytest.raises(SystemExit, match=name.replace("-", "_")):
            run(tmp_path, "--name", "parts", *options, "--resume", f"--{name}", value)
    measured, evaluate = [], rest.evaluate
    monkeypatch.setattr(rest, "evaluate", lambda *a, **k: measured.append(1) or evaluate(*a, **k))
    run(tmp_path, "--name", "parts", *options, "--resume")
    assert len(measured) == 1
    for name in ("metrics.jsonl", "metrics.csv", "before.json", "after.json"):
        assert (whole / name).read_text() == (parts / name).read_text()
    assert torch.equal(weights(whole), weights(parts))
    run(tmp_path, "--name", "undecayed", "--steps", "5")
    assert not torch.equal(weights(whole), weights(tmp_path / "undecayed"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    assert len(metrics(parts)) == 3  # nothing lost: step 2 is logged though not checkpointed
    monkeypatch.setattr(rest, "train_step", step)
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert metrics(whole) == metrics(parts)
    assert torch.equal(weights(whole), weights(parts))
    (parts / "checkpoint").rename(parts / "checkpoint.old")  # killed between the two moves of a save
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert torch.equal(weights(whole), weights(parts))


def test_leftovers_of_a_killed_save_do_no_harm(start, tmp_path):
    """Neither an unfinished nor an old checkpoint gets into the next one."""
    run(tmp_path, "--name", "a", "--steps", "1")
    folder = tmp_path / "a"
    assert learnt(folder, start)
    for name in ("checkpoint.part", "checkpoint.old"):
        (folder / name).mkdir()
        (folder / name / "junk").write_text("x")
    model, tokenizer = policy.load_model(folder / "checkpoint")
    train_small.save(folder, model, tokenizer, torch.optim.AdamW(model.parameters()), 1)
    assert not (folder / "checkpoint/junk").exists() and not (folder / "checkpoint.old").exists()


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
    assert str(error.value.__cause__) == "a bug"
    with pytest.raises(SystemExit, match="no checkpoint to resume, so delete it"):
        run(tmp_path, "--name", "bug", "--steps", "2")


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
    return write_rows(path, [{**row, "demo": [{"think": f"t{i}", "response": None}]} for i in range(n)])


def test_a_model_from_a_folder_trains_on_data_from_a_file(tmp_path, monkeypatch):
    """--model DIR --data FILE.jsonl with a supervised warm start on the same rows. A crash in the
    first step does not lose the supervised steps, and both kinds of step move the weights."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    model, data = chat_model(tmp_path / "model"), demonstrations(tmp_path / "data.jsonl", 6)
    more = ["--model", str(model), "--data", str(data), "--eval-data", str(data), "--steps", "2",
            "--name", "other"]
    with pytest.raises(SystemExit, match="would wreck a pretrained model"):
        run(tmp_path, *more, "--learning-rate", str(rest.Config.learning_rate))
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
    """The same instructions in the warm start, in training and in evaluation; and one's own
    demonstrations are imitated as they are, whatever --noise says of the toy ones."""
    model, data = chat_model(tmp_path / "model"), demonstrations(tmp_path / "data.jsonl", 12)
    seen, step, evaluate = {}, rest.train_step, rest.evaluate

    def warm_start(model, tokenizer, pairs, *args, **kwargs):
        seen.update(pairs=pairs, warm=kwargs["instructions"])
    monkeypatch.setattr(rest, "score_texts", by_text)
    monkeypatch.setattr(policy, "warm_start", warm_start)
    monkeypatch.setattr(rest, "train_step", lambda *a: seen.update(train=a[7]) or step(*a))
    monkeypatch.setattr(rest, "evaluate", lambda *a, **k: seen.update(eval=k["instructions"])
                        or evaluate(*a, **k))
    run(tmp_path, "--model", str(model), "--data", str(data), "--eval-data", str(data),
        "--steps", "1", "--name", "m", "--noise", "0.9")
    assert learnt(tmp_path / "m", model)
    assert seen["warm"] == seen["train"] == seen["eval"] == train_small.INSTRUCTIONS
    assert [text for _, text in seen["pairs"]] == [
        tasks.completion_text(ROW["gold"][0], f"t{i}") for i in range(12)]


def test_what_a_live_run_hands_on(start, tmp_path, monkeypatch):
    """Boxes in training and in evaluation, whole dialogues, and held-out rows that are neither
    trained on in this run nor belong to the training split."""
    trained, held_out, boxes = [], [], []
    step, evaluate = rest.train_step, rest.evaluate

    def watch_step(*args, **kwargs):
        trained.extend(args[3])
        boxes.append(args[6])
        return step(*args, **kwargs)

    def watch_eval(model, tokenizer, rows, cfg, **kwargs):
        held_out.extend(rows)
        boxes.append(kwargs["toolbox_for"])
        return evaluate(model, tokenizer, rows, cfg, **kwargs)
    monkeypatch.setattr(rest, "train_step", watch_step)
    monkeypatch.setattr(rest, "evaluate", watch_eval)
    run(tmp_path, "--steps", "3", "--max-turns", "3", "--name", "live", "--prompts", "5")
    assert learnt(tmp_path / "live", start)
    assert len(boxes) == 5 and all(box is tasks.toolbox_for for box in boxes)
    assert {len(row["gold"]) for row in held_out} == {1, 3} == {len(row["gold"]) for row in trained}

    def requests(rows):
        return {row["messages"][0]["content"] for row in rows}
    assert not requests(held_out) & requests(trained)
    assert not requests(held_out) & requests(tasks.make_rows(40, "train", seed=0))


def test_benchmarks_are_greedy_limited_and_tied_to_the_weights(tmp_path, monkeypatch):
    """One greedy completion a prompt, --limit of them; results of other weights are not mixed in."""
    model = tmp_path / "m"
    qwen3().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    answers = [{"system": "s", "user": "u", "answer": {"name": "F", "parameters": {"a": str(i)}}}
               for i in range(6)]
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "level-1-api_processed.json").write_text(json.dumps(answers))
    seen, rollout = [], rest.rollout
    monkeypatch.setattr(rest, "rollout", lambda *a, **k: seen.append(k) or rollout(*a, **k))
    args = ["--model", str(model), "--eval-only", "--benchmarks", "api_bank_1", "--limit", "4",
            "--api-bank-dir", str(tmp_path / "bank"), "--max-completion-tokens", "8",
            "--name", "bench"]
    run(tmp_path, *args)
    assert seen and all(k["greedy"] and k["group"] == 1 for k in seen)
    assert len((tmp_path / "bench/benchmarks.jsonl").read_text().splitlines()) == 1 + 4
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
@pytest.mark.parametrize("method", rest.METHODS)
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
