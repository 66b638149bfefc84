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
from conftest import CALL, ROW, byte_tokenizer, qwen3

import rest
import train_small
from toy_tools import policy, show, tasks

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--prompts", "2", "--group", "2", "--eval-rows", "5", "--eval-samples", "1", "--max-completion-tokens", "16", "--device", "cpu",
         "--train-rows", "40", "--warm-start-steps", "2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    old = os.environ.get("REST_CACHE")
    os.environ["REST_CACHE"] = str(folder)
    yield folder
    os.environ.pop("REST_CACHE") if old is None else os.environ.update(REST_CACHE=old)


def command(*args):
    return subprocess.run([sys.executable, "train_small.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_trains_logs_saves_and_shows(cache, tmp_path):
    done = command("--steps", "3", "--output-dir", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "rest-seed0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [r["step"] for r in rows] == [0, 1, 2] == [int(r["step"]) for r in table] and set(rows[0]) == set(table[0])
    assert json.loads((folder / "config.json").read_text())["config"]["method"] == "rest"
    assert set(json.loads((folder / "after.json").read_text())) == {*tasks.CATEGORIES, "all"}
    model, tokenizer = policy.load_model(folder / "checkpoint")
    assert tokenizer.chat_template == policy.CHAT_TEMPLATE and model.config.vocab_size == len(tokenizer)
    for word in ("category", "simple", "[thought", "nats", "Time of the RL steps: rollout"):
        assert word in done.stdout or word == "[thought", (word, done.stdout)
    assert "rest:" in done.stderr and "reward" in done.stderr and "Warning" not in done.stderr  # the progress bar, and nothing but it


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
def test_wrong_input_gets_one_sentence(cache, tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_small.main([*SMALL, "--output-dir", str(tmp_path), *args])
    message = str(stop.value.code) if not isinstance(stop.value.code, int) else capsys.readouterr().err
    assert words in message and "Traceback" not in message


def run(tmp_path, *args):
    train_small.main([*SMALL, "--output-dir", str(tmp_path), *args])


def weights(folder):
    return torch.cat([p.flatten() for p in policy.load_model(folder / "checkpoint")[0].parameters()])


def test_a_resumed_run_equals_the_uninterrupted_one(cache, tmp_path, monkeypatch):
    """Pitfall 13. Interrupted by Ctrl-C within the third of 5 steps, then resumed: the same metrics line by line and the same final weights, bit for bit.
    The progress-dependent parts (learning rate, curriculum, reward scaling, data order, sampling seeds) all have to continue."""
    run(tmp_path, "--name", "whole", "--steps", "5")
    step = rest.train_step

    def interrupted(*args, **kwargs):
        if args[5] == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)
    monkeypatch.setattr(rest, "train_step", interrupted)
    with pytest.raises(SystemExit, match="interrupted after 3 steps; saved"):
        run(tmp_path, "--name", "parts", "--steps", "5")
    monkeypatch.setattr(rest, "train_step", step)
    with pytest.raises(SystemExit, match="learning_rate"):
        run(tmp_path, "--name", "parts", "--steps", "5", "--resume", "--learning-rate", "0.1")
    run(tmp_path, "--name", "parts", "--steps", "5", "--resume")
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert (tmp_path / "whole/after.json").read_text() == (tmp_path / "parts/after.json").read_text()


def test_a_crash_between_checkpoints_loses_only_what_is_redone(cache, tmp_path, monkeypatch):
    run(tmp_path, "--name", "whole", "--steps", "5")
    step = rest.train_step

    def crash(*args, **kwargs):
        if args[5] == 3:
            raise RuntimeError("power cut")
        return step(*args, **kwargs)
    monkeypatch.setattr(rest, "train_step", crash)
    with pytest.raises(RuntimeError):
        run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2")
    assert len((tmp_path / "parts/metrics.jsonl").read_text().splitlines()) == 3  # nothing lost: step 2 is logged though not checkpointed
    monkeypatch.setattr(rest, "train_step", step)
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # and killed within a line
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    (tmp_path / "parts/checkpoint").rename(tmp_path / "parts/checkpoint.old")  # killed between the two moves of a save
    run(tmp_path, "--name", "parts", "--steps", "5", "--save-steps", "2", "--resume")
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_bug_within_a_step_shows_where_it_is(cache, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        raise ValueError("a bug")
    monkeypatch.setattr(rest, "train_step", wrong)
    with pytest.raises(RuntimeError, match="step 0 failed") as error:
        run(tmp_path, "--name", "bug", "--steps", "2")
    assert str(error.value.__cause__) == "a bug"
    with pytest.raises(SystemExit, match="no checkpoint to resume, so delete it"):
        run(tmp_path, "--name", "bug", "--steps", "2")


def test_finished_runs_are_not_written_over(cache, tmp_path):
    run(tmp_path, "--steps", "1")
    run(tmp_path, "--steps", "1")
    assert (tmp_path / "rest-seed0-2" / "metrics.csv").exists()
    run(tmp_path, "--steps", "1", "--name", "mine")
    with pytest.raises(SystemExit, match="exists"):
        run(tmp_path, "--steps", "1", "--name", "mine")


def test_a_model_from_a_folder_trains_on_data_from_a_file(tmp_path, monkeypatch):
    """--model DIR --data FILE.jsonl with a supervised warm start on the same rows; an architecture without the embedded policy's template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    qwen3().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {k: ROW[k] for k in ("messages", "tools", "gold")}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**row, "demo": [{"think": "t", "response": None}]}) + "\n" for _ in range(6)))
    more = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--steps", "2", "--name", "other", "--eval-data", str(tmp_path / "data.jsonl"),
            "--learning-rate", "1e-4"]
    with pytest.raises(SystemExit, match="would wreck a pretrained model"):
        run(tmp_path, *more[:-2])
    with monkeypatch.context() as patch:
        patch.setattr(rest, "train_step", lambda *_: 1 / 0)  # a crash in the first step does not lose the supervised steps
        with pytest.raises(RuntimeError, match="step 0 failed"):
            run(tmp_path, *more)
    run(tmp_path, *more, "--resume")
    assert json.loads((tmp_path / "other/after.json").read_text())["all"]["n"] == 5  # --eval-rows 5 of the 6 rows
    before = torch.cat([p.flatten() for p in policy.load_model(tmp_path / "model")[0].parameters()])
    assert not torch.equal(before, weights(tmp_path / "other"))


def test_running_out_of_memory_says_what_to_lower(cache, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("12 GiB asked for")
    monkeypatch.setattr(rest, "train_step", full)
    with pytest.raises(SystemExit, match="lower --micro-batch-tokens"):
        run(tmp_path, "--steps", "2")


def test_gradient_checkpointing_forwards_every_layer_again(tmp_path):
    """It once did nothing: transformers checkpoints a layer only in training mode, and from_pretrained leaves the model in the other."""
    tokenizer = byte_tokenizer()
    qwen3().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cfg, calls = rest.Config(group=2, prompts=1, max_completion_tokens=8), {}
    for on in (False, True):
        model, _ = policy.load_model(tmp_path, gradient_checkpointing=on)
        policy.warm_start(model, tokenizer, [(ROW, CALL)], 1, batch=1, progress=False)
        batch = rest.rollout(model, tokenizer, [ROW], cfg)
        seen = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
        rest.update(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, torch.tensor([1.0, -1.0]), torch.ones_like(batch.logp), cfg)
        calls[on] = len(seen)
    assert calls == {False: 1, True: 2}


def test_zero_steps_make_a_start_that_several_runs_share(cache, tmp_path):
    run(tmp_path, "--name", "start", "--steps", "0")
    assert not (tmp_path / "start/after.json").exists() and not (tmp_path / "start/metrics.csv").exists()
    for method in ("rest", "grpo"):
        run(tmp_path, "--name", method, "--method", method, "--steps", "1", "--model", str(tmp_path / "start"), "--warm-start-steps", "0")
        assert (tmp_path / method / "before.json").read_text() == (tmp_path / "start/before.json").read_text()


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


@pytest.mark.parametrize("method", rest.METHODS)
def test_every_method_takes_a_live_and_a_single_step(cache, tmp_path, method):
    for turns in ("1", "3"):
        run(tmp_path, "--steps", "1", "--method", method, "--name", f"{method}-{turns}", "--max-turns", turns, "--passes", "2")
        row = json.loads((tmp_path / f"{method}-{turns}" / "metrics.jsonl").read_text())
        assert row["skipped_updates"] == 0 and row["tokens"] > 0


def test_the_warm_start_cache_key_covers_what_it_depends_on(cache):
    before = set(cache.iterdir())
    a, _ = policy.tiny_policy(seed=7, steps=1, progress=False)
    first = set(cache.iterdir()) - before
    b, _ = policy.tiny_policy(seed=7, steps=1, progress=False)
    assert set(cache.iterdir()) - before == first and len(first) == 1
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    for change in ({"noise": 0.3}, {"steps": 2}, {"seed": 8}, {"mask_names": True}):
        known = set(cache.iterdir())
        policy.tiny_policy(**{"seed": 7, "steps": 1, "progress": False, **change})
        assert len(set(cache.iterdir()) - known) == 1, change


def test_the_loop_learns_a_bandit():
    """The whole loop on a task that 30 steps can solve: a random policy of 265 byte tokens must end its turn at once. The chance of the end
    token rises from about 1/265 by more than 50 times; with the sign of the advantage flipped it falls."""
    def chance(sign):
        tokenizer, model = byte_tokenizer(), qwen3(layers=1)
        cfg = rest.Config(method="grpo", steps=30, prompts=2, group=32, max_completion_tokens=2, learning_rate=3e-2, warmup_steps=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
        for step in range(cfg.steps):
            batch = rest.rollout(model, tokenizer, [ROW, ROW], cfg, seed=step)
            rewards = (batch.tokens[:, 0] % 2 == 0).float().view(2, -1)  # the end token's id is 2: an even id is worth one point
            advantages = sign * rest.group_advantages(rewards).flatten()
            weight = rest.normalise_weights(torch.ones_like(batch.entropy), batch.sampled)
            rest.update(model, optimizer, batch, advantages, weight, cfg)
        with torch.no_grad():
            p = model(torch.tensor([batch.prompts[0]])).logits[0, -1].softmax(-1)
        return float(p[0::2].sum())
    assert chance(+1) > 0.95 and chance(-1) < 0.05


def test_demonstrations_are_imperfect_at_the_stated_rate():
    """With noise 0 every demonstration earns the exact call; with 0.22 four in ten."""
    import random
    rows = [step for row in tasks.make_rows(300, "train", seed=5) for step in tasks.decompose(row)]
    for noise, low, high in ((0.0, 1.0, 1.0), (0.22, 0.3, 0.5)):
        rng = random.Random(0)
        exact = sum(rest.score_texts([policy.noisy_demonstration(row, rng, noise)], row)[2] for row in rows) / len(rows)
        assert low <= exact <= high
    bare = {"tools": [], "gold": [ROW["gold"][0]], "demo": [{"think": "t", "response": None}]}  # rows of one's own need not list tools
    assert policy.noisy_demonstration(bare, random.Random(0), 1.0)
    assert CALL  # the hand-written example of the other tests has the same form
    assert rest.score_texts([tasks.completion_text(ROW["gold"][0], "t")], ROW)[2]
