"""Wrong input, over all options and files: one sentence each, and no folder left behind."""

import json
import os
import shlex
from dataclasses import fields

import pytest
import torch
from conftest import ROW, byte_tokenizer, qwen3

import rest
import train_small
from toy_tools import options, policy, runs

SMALL = {"--prompts": "2", "--group": "2", "--eval-rows": "5", "--eval-samples": "1", "--train-rows": "40",
         "--max-completion-tokens": "16", "--warm-start-steps": "2", "--steps": "1", "--device": "cpu"}
WITHOUT = {"--model": "--warm-start-steps", "--data": "--train-rows", "--eval-rows": "--eval-samples"}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n")


def completed(args, evaluation, out):
    """args, and what makes them a small run in the folder `out` but for what is wrong in them."""
    if not evaluation:
        left_out = {*args, *(WITHOUT.get(word) for word in args)}
        defaults = SMALL | {"--output-dir": out}
        words = [(name, value) for name, value in defaults.items() if name not in left_out]
    elif "--benchmarks" in args:
        words = [("--eval-only", "--device", "cpu", "--output-dir", out)]
    else:
        words = [("--eval-only", "--device", "cpu")]
    return [word for some in words for word in some] + args


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, data and runs, right ones and wrong ones; the embedded policy is cached in it."""
    place = tmp_path_factory.mktemp("place")
    old = os.environ.get("REST_CACHE")
    os.environ["REST_CACHE"] = str(place / "cache")
    tokenizer = byte_tokenizer()
    policy.tiny_policy(0, 2, progress=False)
    tokenizer.chat_template = TEMPLATE
    for name in ("model", "nan", "short", "broken", "no-template", "no-weights", "opens", "medium", "grown"):
        model = qwen3(layers=1)
        if name == "short":
            model.config.max_position_embeddings = 64
        if name == "medium":
            model.config.max_position_embeddings = 2000
        if name == "nan":
            model.lm_head.weight.data[3] = torch.nan
        model.save_pretrained(place / name)
        tokenizer.chat_template = None if name == "no-template" else TEMPLATE
        if name == "opens":
            tokenizer.chat_template += "<think>"
        if name == "grown":  # the model's embedding was not
            tokenizer.add_tokens(["1+2"])
        tokenizer.save_pretrained(place / name)
    (place / "broken" / "config.json").write_text("{")
    (place / "no-weights" / "model.safetensors").unlink()
    row = {key: ROW[key] for key in ("messages", "tools", "gold")}
    write_rows(place / "good.jsonl", [row] * 6)
    files = {
        "empty": [], "prose": ["hello"], "list": ["[1, 2]"], "columns": [{"a": 1}] * 3,
        "cut": [row] * 2 + ['{"messages": [{"role"'], "gold": [row] * 3 + [{**row, "gold": 5}],
        "role": [row] * 2 + [{**row, "messages": [{"role": "robot", "content": "?"}]}],
        "unknown": [{**row, "gold": [[{"name": "nope", "arguments": {}}]]}] * 4,
        "long": [row] * 2 + [{**row, "messages": [{"role": "user", "content": "x" * 3000}]}],
        "strange": [row] * 2 + [{**row, "tools": [{"function": {"name": "add"}}]}],
        "all": [row] * 2 + [{**row, "category": "all"}],
        "target": [{**row, "target": "<think>t</think>"}] * 2 + [{**row, "target": "<tool_call>"}],
        "wordy": [{**row, "target": "<think>t</think>"}] * 2 + [{**row, "target": "x" * 3000}]}
    for name, rows in files.items():
        write_rows(place / f"{name}.jsonl", rows)
    (place / "prose.json").write_text("{}")
    (place / "prose.parquet").write_text("no parquet")
    (place / "data.txt").write_text("?")
    (place / "prose.gguf").write_text("no gguf")
    (place / "file").write_text("")
    yield place
    os.environ.pop("REST_CACHE") if old is None else os.environ.update(REST_CACHE=old)


NUMBERS = {  # option -> what it cannot be
    "steps": "-1 x 1.5", "prompts": "0 -2 nan", "group": "1", "max-completion-tokens": "0", "max-turns": "0",
    "passes": "0", "micro-batch-tokens": "0", "temperature": "0 inf nan", "clip": "0 1 nan", "delta": "-1",
    "learning-rate": "0 nan inf 1.5 -1", "warmup-steps": "-1", "weight-decay": "-0.1 inf",
    "max-grad-norm": "0 nan", "min-entropy": "0 nan", "alpha-format": "-1 inf", "alpha-params": "nan",
    "alpha-thought": "inf", "weight-min": "-1 9 nan", "weight-max": "inf 0.1", "seed": "-1 4294967296 x",
    "warm-start-steps": "-2", "noise": "-0.1 1.5 nan inf", "train-rows": "0", "eval-rows": "-1",
    "eval-samples": "0", "eval-batch": "0", "save-steps": "-1", "keep-steps": "-1 2 x"}
def cases(text):
    """Lines "arguments  ->  words of the sentence"."""
    pairs = [line.split("  ->  ") for line in text.strip().splitlines() if not line.strip().startswith("#")]
    return [(shlex.split(args), words) for args, words in pairs]


TRAINING = [(["--" + name, value], name) for name, values in NUMBERS.items() for value in values.split()]
TRAINING += [(["--name", "a\nb"], "--name"), (["--name", "x" * 300], "too long")]
TRAINING += cases("""
    --max-turns 2 --tool-timeout -1  ->  tool_timeout
    --max-turns 2 --tool-timeout nan  ->  tool_timeout
    --method ppo  ->  method must be one of rest
    --reward-scaling none  ->  reward_scaling
    --raw-weight x  ->  raw_weight
    --aggregation mean  ->  aggregation
    --dtype int8  ->  dtype
    --method top-entropy --top-entropy-fraction 1.5  ->  top_entropy_fraction
    --device tpu  ->  device
    --device cuda:99  ->  device
    --device cpu:1  ->  device
    # words that are none, or come twice
    --nonsense  ->  --nonsense
    mine  ->  mine
    --step 5  ->  --step
    --steps  ->  --steps
    --model ''  ->  --model
    --name a --name b  ->  --name is given twice
    --passes=1 --passes=2  ->  twice
    --resume mine  ->  --resume
    --mask-names maybe  ->  --mask-names
    --data ' '  ->  --data is empty
    # names and folders
    --name ''  ->  --name
    --name .  ->  --name
    --name ..  ->  --name
    --name a/b  ->  --name
    --name ' '  ->  --name
    --output-dir file  ->  cannot write to
    --output-dir file/below  ->  cannot write to
    --output-dir /proc/none  ->  cannot write to
    --resume  ->  name it with --name
    # models
    --model no/such.gguf  ->  no such file
    --model ./nowhere  ->  nowhere
    --model prose.gguf  ->  prose.gguf
    --model file  ->  file
    --model broken  ->  broken
    --model no-weights  ->  no-weights
    --model no-template  ->  no chat template
    --model model  ->  would wreck a pretrained model
    --model nan --learning-rate 1e-4  ->  not finite
    --model short --learning-rate 1e-4  ->  of the toy tasks (training) does not fit
    # data
    --data nowhere.jsonl  ->  nowhere.jsonl
    --data no/such/set  ->  no/such/set
    --data empty.jsonl  ->  empty.jsonl
    --data prose.jsonl  ->  prose.jsonl
    --data list.jsonl  ->  list.jsonl
    --data columns.jsonl  ->  unknown layout
    --data cut.jsonl  ->  line 3
    --data gold.jsonl  ->  line 4
    --data role.jsonl  ->  line 3
    --data unknown.jsonl  ->  'nope'
    --data prose.json  ->  prose.json
    --data prose.parquet  ->  prose.parquet
    --data data.txt  ->  data.txt
    --data good.jsonl --prompts 500  ->  lower --prompts
    --train-rows 1 --prompts 50  ->  lower --prompts
    --data long.jsonl  ->  row 3 of long.jsonl (training) does not fit
    --data strange.jsonl  ->  strange.jsonl
    --eval-data nowhere.jsonl  ->  nowhere.jsonl
    --eval-data long.jsonl  ->  row 3 of long.jsonl (held-out) does not fit
    --eval-data cut.jsonl  ->  line 3
    --max-turns 2 --data good.jsonl  ->  --max-turns
    --max-turns 2 --eval-data good.jsonl  ->  --max-turns
    --model model --data good.jsonl --warm-start-steps 2 --learning-rate 1e-4  ->  neither "demo" nor "target"
    --model opens --data target.jsonl --warm-start-steps 2 --learning-rate 1e-4  ->  of row 3 of target.jsonl
    --model medium --data wordy.jsonl --warm-start-steps 2 --learning-rate 1e-4  ->  row 3 of wordy.jsonl
    --model opens --data good.jsonl --learning-rate 1e-4 --max-completion-tokens 1  ->  leaves none to sample
    --model grown --data good.jsonl --learning-rate 1e-4  ->  resize_token_embeddings
    --data all.jsonl  ->  category "all"
    # without effect
    --benchmarks bfcl  ->  --eval-only
    --limit 3  ->  --eval-only
    --compare file  ->  --eval-only
    --api-bank-dir .  ->  --eval-only
    --dtype bfloat16  ->  for a --model
    --gradient-checkpointing  ->  for a --model
    --lora-rank 4  ->  for a --model
    --warm-start-batch 4  ->  supervised steps
    --micro-batch 4  ->  supervised steps
    --warm-start-lr 1e-4  ->  supervised steps
    --model model --noise 0.1  ->  --noise would have no effect
    --data good.jsonl --train-rows 4  ->  --train-rows would have no effect
    --tool-timeout 1  ->  --tool-timeout would have no effect
    --cuda-graph  ->  --cuda-graph would have no effect
    --compile-decode --shared-prefix False  ->  --compile-decode would have no effect
    --method grpo --alpha-format 0.1  ->  --method grpo does not read it
    --top-entropy-fraction 0.1  ->  does not read it
    --method rest-official --raw-weight inverse  ->  does not read it
    --method dr-grpo --delta 1e-3  ->  --delta would have no effect
    --eval-rows 0 --eval-samples 3  ->  --eval-samples would have no effect
    --eval-rows 0 --eval-data good.jsonl  ->  --eval-data would have no effect
    --model model --data good.jsonl --eval-data good.jsonl --mask-names  ->  --mask-names would have no effect
""")
EVALUATION = cases("""
    --steps 3  ->  --steps would have no effect
    --method grpo  ->  --method would have no effect
    --resume --name a  ->  --resume would
    --learning-rate 0.1  ->  --learning-rate would
    --save-steps 3  ->  --save-steps would
    --train-rows 3  ->  --train-rows would
    --data good.jsonl --eval-data good.jsonl  ->  --data would have no effect
    --name none  ->  no run none in
    --name .. --output-dir .  ->  --name
    --name none --model model  ->  --name would have no effect
    --model model --warm-start-steps 3  ->  --warm-start-steps would
    --model nan  ->  not finite
    --model grown --eval-data good.jsonl  ->  resize_token_embeddings
    --eval-data cut.jsonl  ->  line 3
    --eval-data nowhere.jsonl  ->  nowhere.jsonl
    --data nowhere.jsonl  ->  nowhere.jsonl
    --model nowhere  ->  nowhere
    --eval-rows 0  ->  evaluates nothing
    --compare file  ->  --compare would have no effect
    --limit 2  ->  --limit would have no effect
    --api-bank-dir .  ->  --api-bank-dir would
    --benchmarks nope  ->  unknown benchmark
    --benchmarks  ->  --benchmarks
    --benchmarks bfcl --compare nope  ->  nope
    --benchmarks bfcl --compare prose.jsonl  ->  prose.jsonl
    --benchmarks bfcl --limit -1  ->  limit
    --benchmarks bfcl --api-bank-dir .  ->  --api-bank-dir would
    --benchmarks bfcl --temperature 2.0  ->  --temperature would
    --benchmarks bfcl --eval-rows 3  ->  --eval-rows would
    --benchmarks bfcl --model model --seed 3  ->  --seed would
    --benchmarks api_bank_1 --api-bank-dir nowhere --warm-start-steps 2  ->  API-Bank
    --output-dir out  ->  --output-dir would
    --benchmarks api_bank_1 --name a/b --model model  ->  --name
""")


@pytest.mark.parametrize("args, words", TRAINING + EVALUATION, ids=lambda value: str(value)[:60])
def test_wrong_input_gets_one_sentence_and_leaves_no_folder(place, tmp_path, monkeypatch, args, words):
    """Every kind that was tried; the sentence names the option, the file or the row, and nothing is made."""
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    monkeypatch.setattr(rest, "train_step", lambda *_, **__: pytest.fail("a step was taken"))
    before = set(place.iterdir())
    with pytest.raises(SystemExit) as stop:
        train_small.main(completed(args, (args, words) in EVALUATION, str(out)))
    message = str(stop.value.code)
    assert message.startswith("train_small.py: error: ") and "Traceback" not in message
    assert words.replace("-", "_") in message.replace("-", "_")  # rest.Config names its fields
    assert len(message) < 700 and message.count("\n") <= 6  # five malformed rows are shown
    assert not out.exists() and set(place.iterdir()) == before


@pytest.mark.parametrize("option", ["--warm-start-steps 2", "--warm-start-lr 1e-2", "--learning-rate 1e-5"])
def test_what_an_explanation_ignores_is_refused(option):
    run, cfg, given = options.read_options(f"--explain --model x {option}".split())
    with pytest.raises(ValueError, match=f"{option.split()[0]} would have no effect"):
        options.check(run, cfg, given, torch.device("cpu"))


def test_the_table_is_long():
    assert len(TRAINING) + len(EVALUATION) >= 80


def test_every_option_reads_and_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        options.read_options(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (*fields(options.Run), *fields(rest.Config)):
        assert options.flag(option.name) + " " in text and option.metadata["help"].split()[0] in text
    line = "--max_turns=3 --mask-names --cuda_graph False --keep-steps 1 5 --name a_b"
    run, cfg, given = options.read_options(line.split())
    assert (cfg.max_turns, run.mask_names, run.cuda_graph) == (3, True, False)
    assert (run.keep_steps, run.name) == ([1, 5], "a_b")
    assert given == {"max_turns", "mask_names", "cuda_graph", "keep_steps", "name"}
    assert options.read_options([]) == (options.Run(), rest.Config(), set())


def test_a_method_of_ones_own_may_read_every_knob(monkeypatch):
    monkeypatch.setitem(rest.WEIGHTS, "mine", rest.WEIGHTS["grpo"])
    line = "--method mine --alpha-format 0.1 --top-entropy-fraction 0.3 --min-entropy 0.1"
    run, cfg, given = options.read_options(line.split())
    options.check(run, cfg, given, torch.device("cpu"))


ACCEPTED = """
    --name mine --steps 200
    --steps 0 --name start
    --name mine --steps 200 --resume
    --method dr-grpo
    --max-turns 3 --tool-timeout 1
    --model x --steps 0 --warm-start-steps 16 --noise 0.05 --eval-rows 0 --max-completion-tokens 112
    --model x --method grpo --seed 1 --steps 16 --warmup-steps 3 --learning-rate 2e-5 --eval-rows 60
    --model x --eval-only --benchmarks bfcl api-bank --api-bank-dir y --limit 5 --eval-batch 9 --name z
    --eval-only --name mine --eval-data x.jsonl --eval-rows 5 --temperature 0.5
    --eval-only --warm-start-steps 2 --seed 3 --mask-names
    --shared-prefix False
    --cuda-graph False
    --compile-decode
    --method rest-static --weight-max 3 --raw-weight inverse
"""


@pytest.mark.parametrize("line", ACCEPTED.strip().splitlines())
def test_what_has_an_effect_is_accepted(line):
    run, cfg, given = options.read_options(line.split())
    options.check(run, cfg, given, torch.device("cpu"))
    assert len(given) == line.count("--")
    assert runs.plain_name(run.name or "x")
