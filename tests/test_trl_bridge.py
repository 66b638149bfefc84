"""toy_tools/trl_bridge.py: on TRL's trainer the loss, its gradient, weights and rewards are rest.py's.

As a script (`accelerate launch tests/test_trl_bridge.py FILE`) it trains one step and writes what came
of it."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CALL, ROW, opened_template, qwen3, write_rows

trl = pytest.importorskip("trl", reason="pip install trl")
import rest
from toy_tools import data, policy, tasks, trl_bridge
from toy_tools.chat import TemplateChat

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func, with which completions are prescribed here
ROOT = Path(__file__).resolve().parent.parent
P = 3
G = 4
ROOM = 300
T_HOT = 0.7
LR = 0.5
SEED = 3
STEPS = 3
LOSSES = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
TEXTS = [
    CALL,
    CALL.replace("2}", "3}"),
    CALL.replace('": ', '":'),  # where `":{"` is one token of two regions
    CALL.replace("</think>", ""),
    CALL[:40],
    "<response>it is 3</response>",
    CALL + "\n<response>3</response>",
    "<think>hm</think><response>No tool.</response>"]
ROWS = [{**ROW, "messages": [{"role": "user", "content": text}]}
        for text in ("1+2?", "one and two", "add 1, 2")]
VOCAB = 430
BETWEEN = "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"


def make_tokenizer():
    """The embedded policy's, of these texts: tokens of several letters, some of which touch two regions."""
    return policy.build_tokenizer(3 * [json.dumps(ROWS), *TEXTS, BETWEEN], VOCAB)


def completion(chat, number, forced):
    """(ids, mask of what was sampled) of the completion `number`: ragged, some broken off, every third
    with a tool's answer in it."""
    end = [chat.tokenizer.eos_token_id]
    first = chat.encode(TEXTS[number % len(TEXTS)]) + end * (number % 5 != 3)
    if not forced or number % 3:
        return first, [1] * len(first)
    between, last = chat.encode(BETWEEN), chat.encode(TEXTS[-1]) + end
    return first + between + last, [1] * len(first) + [0] * len(between) + [1] * len(last)


def numbered(completion_ids, prompts, **_):
    """A reward that tells completions apart, by their ids alone."""
    return [zlib.crc32(repr((ids, prompt)).encode()) % 7 / 3 for ids, prompt in zip(completion_ids, prompts)]


def make_trainer(folder, method="rest", chat=None, rows=ROWS, forced=True, model=None, **options):
    """A ResTTrainer of a tiny model, whose completions are prescribed by their place in the global batch."""
    chat = chat or TemplateChat(make_tokenizer())

    def roll(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        pairs = [completion(chat, first + i, forced) for i in range(len(prompts))]
        ids, masks = map(list, zip(*pairs))
        out = {"prompt_ids": [chat.tokenizer(text)["input_ids"] for text in prompts],
               "completion_ids": ids, "logprobs": [[0.0] * len(x) for x in ids]}
        return out | {"env_mask": masks} if forced else out
    of_trainer = ("reward_funcs", "rollout_func", "peft_config")
    given = {key: options.pop(key) for key in of_trainer if key in options}
    usual = {
        "per_device_train_batch_size": P * G, "num_generations": G, "max_completion_length": ROOM,
        "temperature": T_HOT, "beta": 0.0, "loss_type": "grpo", "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
        "logging_steps": 1, "disable_tqdm": True, "max_steps": 10, "optim": "sgd", "learning_rate": LR,
        "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "shuffle_dataset": False, "seed": SEED}
    if method == "dr-grpo":
        usual["scale_rewards"] = "none"
    return trl_bridge.ResTTrainer(
        model or make_model(), chat, method,
        args=trl.GRPOConfig(output_dir=str(folder), **usual | options),
        train_dataset=trl_bridge.to_dataset(rows, chat),
        **{"reward_funcs": numbered, "rollout_func": roll} | given)


def samples(trainer):
    """The global batch as TRL hands it on: each row of the data G times."""
    return [row for row in trainer.train_dataset for _ in range(G)]


def make_model():
    return qwen3(VOCAB, layers=1)


@lru_cache
def rolled_out():
    """The Rollout of the same completions, with regions: entropies and log-probabilities by a forward
    of each sequence alone, turns by the place of the tool's answer."""
    model, chat = make_model(), TemplateChat(make_tokenizer())
    prompts = [chat.prompt(row)[0] for row in ROWS]
    pairs = [completion(chat, i, True) for i in range(P * G)]
    shape = P * G, max(len(ids) for ids, _ in pairs)
    tokens, sampled = torch.zeros(shape).long(), torch.zeros(shape).bool()
    logp, entropy = torch.zeros(shape), torch.zeros(shape)
    turns = []
    for i, (ids, mask) in enumerate(pairs):
        n, ids = len(ids), torch.tensor(ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompts[i // G] + ids.tolist()])).logits[0, -n - 1:-1]
        log_p = (logits.double() / T_HOT).log_softmax(-1)
        tokens[i, :n], sampled[i, :n] = ids, torch.tensor(mask).bool()
        logp[i, :n], entropy[i, :n] = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        first, last = mask.index(0) if 0 in mask else n, n - mask[::-1].index(0) if 0 in mask else n
        turns.append([(0, first), (last, n)] if last < n else [(0, first)])
    batch = rest.Rollout(ROWS, prompts, G, tokens, sampled, logp * sampled, entropy * sampled,
                         torch.tensor([len(ids) for ids, _ in pairs]), torch.zeros(P * G).bool(), turns, None)
    batch.region, batch.covers = rest.token_regions(batch, chat)
    texts = [text for text in trl_bridge.to_dataset(ROWS, chat)["prompt"] for _ in range(G)]
    rewards = torch.tensor(numbered([ids for ids, _ in pairs], texts)).view(P, G)
    batch.advantages = rest.group_advantages(rewards).flatten()
    return batch


def weights(method, step):
    return rest.WEIGHTS[method](rolled_out(), rest.Config(method=method, steps=10, seed=SEED), step / 10)


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradient."""

    def step(self, closure=None):
        self.grads = flat(p.grad for group in self.param_groups for p in group["params"])
        super().step()


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def close(a, b, tolerance=2e-5):
    return float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


def theirs(trainer, out):
    """(loss, gradient) of TRL's own loss on one micro-batch."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, out)
    loss.backward()
    return loss.item(), flat(p.grad for p in trainer.model.parameters())


def ours(model, batch, weight, aggregation):
    """(loss, gradient) of rest.update."""
    cfg = rest.Config(aggregation=aggregation, temperature=T_HOT, max_completion_tokens=ROOM,
                      max_grad_norm=1e9)
    optimizer = Recorder(model.parameters(), lr=0.0)
    metrics = rest.update(rest.Engine(model), optimizer, batch, batch.advantages, weight, cfg)
    return metrics["loss"], optimizer.grads


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("trl"))


@pytest.fixture
def at_step_4(trainer):
    trainer.state = SimpleNamespace(global_step=4, max_steps=10, num_input_tokens_seen=0)
    return trainer


@pytest.mark.parametrize("loss_type", LOSSES)
def test_weight_one_is_trl_itself(at_step_4, loss_type):
    """With method grpo the loss and the gradient are those of GRPOTrainer without us, bit for bit."""
    trainer = at_step_4
    trainer.loss_type, trainer.cfg = loss_type, rest.Config(method="grpo")
    plain = trl.GRPOTrainer._generate_and_score_completions(trainer, samples(trainer))
    out = trainer._generate_and_score_completions(samples(trainer))
    assert plain["advantages"].dim() == 1 and out["advantages"].shape == out["completion_ids"].shape
    assert out.keys() == plain.keys() and torch.equal(out["completion_ids"], plain["completion_ids"])
    (loss, gradient), (expected, reference) = theirs(trainer, out), theirs(trainer, plain)
    assert loss == expected and torch.equal(gradient, reference) and reference.norm() > 0


@pytest.mark.parametrize("method", rest.WEIGHTS)
def test_every_method_is_rests(at_step_4, method):
    """Weights, loss and gradient equal rest.update's on the same tensors, for the four loss types, with
    ragged completions, tool answers between turns, clipped ratios, T != 1 and the curriculum at 0.4."""
    trainer = at_step_4
    trainer.cfg = rest.Config(method=method)
    batch, weight = rolled_out(), weights(method, 4)
    noise = 0.3 * (2 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) - 1)
    earlier = replace(batch, logp=batch.logp + noise)
    expected = {how: ours(trainer.model, earlier, weight, how) for how in set(LOSSES.values())}
    for loss_type, aggregation in LOSSES.items():
        trainer.loss_type = loss_type
        out = trainer._generate_and_score_completions(samples(trainer))
        share = weight
        if aggregation == "token":  # TRL counts tokens
            share = weight * batch.sampled.sum() / weight.sum()
        assert torch.allclose(out["advantages"], batch.advantages[:, None] * share, atol=2e-4)
        out["old_per_token_logps"] = earlier.logp
        (loss, gradient), (same, reference) = theirs(trainer, out), expected[aggregation]
        assert close(gradient, reference, 1e-4) and loss == pytest.approx(same, rel=1e-4, abs=1e-6)


def test_metrics_are_ours(at_step_4):
    """Region entropies and weights under our names, with the values of rest.batch_metrics."""
    trainer = at_step_4
    trainer.loss_type, trainer.cfg = "grpo", rest.Config()
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer._generate_and_score_completions(samples(trainer))
    for name, value in rest.batch_metrics(rolled_out(), torch.zeros(P, G), weights("rest", 4)).items():
        if name[:2] in ("H_", "w_"):
            assert trainer._metrics["train"][name] == [pytest.approx(value, rel=1e-4)]
    trainer.model.eval()


def test_an_evaluation_before_training_is_at_progress_0(at_step_4):
    """TRL knows no number of steps then."""
    trainer = at_step_4
    trainer.state.global_step = trainer.state.max_steps = 0
    trainer.loss_type, trainer.cfg = "grpo", rest.Config()
    out = trainer._generate_and_score_completions(samples(trainer))
    assert torch.allclose(out["advantages"], rolled_out().advantages[:, None] * weights("rest", 0), atol=2e-4)


# ---------------------------------------------------------------------------------- data and reward

def test_rows_keep_their_shape(tmp_path):
    """JSONL rows whose arguments differ in kind come back from the data set as they were; prompts hold
    the tools as the chat template writes them, and TRL's own call of the tokenizer gives their ids."""
    other = {**ROW, "gold": [[{"name": "add", "arguments": {"a": -1, "b": 7}}] * 2], "category": "two"}
    quiet = {"messages": ROW["messages"], "gold": [[]]}
    rows = data.load_rows(write_rows(tmp_path / "rows.jsonl", [ROW, other, quiet]))
    chat = TemplateChat(make_tokenizer(), "Think first.")
    table = trl_bridge.to_dataset(rows, chat)
    assert list(map(json.loads, table["row"])) == rows
    for row, text in zip(rows, table["prompt"]):
        assert chat.tokenizer(text)["input_ids"] == chat.prompt(row)[0]
        assert ("add(a: integer, b: integer)" in text and "Think first." in text) == bool(row["tools"])


def score(chat, scaling, row, texts, step=0, ended=True):
    """(rewards, what is logged) of completions of one row by trl_bridge.reward."""
    record = trl_bridge.to_dataset([row], chat)[0]
    ids = [chat.encode(text) + [chat.tokenizer.eos_token_id] * ended for text in texts]
    logged = {}
    rewards = trl_bridge.reward(chat, scaling)(
        prompts=[record["prompt"]] * len(ids), completions=texts, completion_ids=ids,
        opening=[record["opening"]] * len(ids), row=[record["row"]] * len(ids),
        trainer_state=SimpleNamespace(global_step=step, max_steps=10), log_metric=logged.__setitem__)
    return rewards, logged


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
@pytest.mark.parametrize("ended", [True, False])
def test_the_reward_is_rests(scaling, ended):
    """Rule reward at the progress of TRL's own state, of completions that end and of those that were cut."""
    chat = TemplateChat(make_tokenizer())
    rewards, logged = score(chat, scaling, ROW, TEXTS, 6, ended)
    scores = [rest.score_texts([text], ROW) for text in TEXTS]
    assert rewards == [rest.episode_reward(*parts[:2], 0.6, scaling) for parts in scores]
    assert len(set(rewards)) > 3 and logged["exact"] == 2 / len(TEXTS)


def test_a_thought_that_the_template_opens_belongs_to_the_completion(tmp_path, monkeypatch):
    """The prompt ends with <think>: what follows is thought, in the reward and in the regions, in every
    turn."""
    chat = TemplateChat(opened_template(make_tokenizer()))
    texts = [text.removeprefix("<think>") for text in TEXTS]
    whole = [rest.score_texts([text], ROW) for text in TEXTS[:4]]
    rewards, _ = score(chat, "dynamic", ROW, texts[:4])
    assert rewards == [rest.episode_reward(*parts[:2], 0.0) for parts in whole]
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", texts)
    monkeypatch.setattr(sys.modules[__name__], "BETWEEN", BETWEEN + "<think>")
    seen = watch(monkeypatch)
    trainer = make_trainer(tmp_path, "watched", chat)
    trainer._generate_and_score_completions(samples(trainer))
    region = seen[0].region[0].tolist()  # of CALL, the tool's answer and the answer to that
    first, last = chat.encode("sum</think>"), chat.encode("hm</think>")
    start = len(completion(chat, 0, True)[0]) - len(chat.encode(texts[-1])) - 1
    assert region[:len(first)] == [rest.THOUGHT] * (len(first) - 1) + [rest.TAG]
    assert region[start:start + len(last)] == [rest.THOUGHT] * (len(last) - 1) + [rest.TAG]
    assert region[start - 1] == -1


def watch(monkeypatch):
    """The batches that a method named watched gets."""
    seen = []

    def watched(batch, cfg, progress):
        seen.append(batch)
        return rest.uniform(batch, cfg, progress)
    monkeypatch.setitem(rest.WEIGHTS, "watched", watched)
    return seen


def test_the_tokenizers_own_first_token_does_not_stand_twice():
    """Templates that write it and tokenizers that add it: the text leaves it to the tokenizer."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    chat = TemplateChat(tokenizer)
    text, = trl_bridge.to_dataset([ROW], chat)["prompt"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.bos_token_id in ids and ids == chat.prompt(ROW)[0]


@pytest.mark.parametrize("known", [True, False])
def test_trl_stops_where_the_chat_says_a_turn_ends(tmp_path, known):
    """Another id that ends turns, known to the model's generation_config or to the chat alone, ends
    completions."""
    model, tokenizer = make_model(), make_tokenizer()
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.generation_config.eos_token_id = [other] if known else None
    chat = TemplateChat(tokenizer, model=model)
    chat.end_ids.add(other)
    trainer = make_trainer(tmp_path, chat=chat, model=model)
    assert set(trainer.eos_token_ids) == {tokenizer.eos_token_id, other} == chat.end_ids
    assert set(trainer.generation_config.eos_token_id) == chat.end_ids


# ---------------------------------------------------------------------------------- what is refused

def test_what_cannot_be_right_is_refused_in_a_sentence(tmp_path):
    """Live dialogues, prompts that TRL would tokenise otherwise, unknown methods, Dr. GRPO by half."""
    chat = TemplateChat(make_tokenizer())
    with pytest.raises(ValueError, match="row 2 is live"):
        trl_bridge.to_dataset([ROW, {**ROW, "gold": ROW["gold"] + [[]]}], chat)
    chat.encode = lambda text: [7] * len(text)
    with pytest.raises(ValueError, match="row 1: its prompt is other tokens"):
        trl_bridge.to_dataset([ROW], chat)
    with pytest.raises(ValueError, match="method must be one of"):
        make_trainer(tmp_path, "best")
    with pytest.raises(ValueError, match="scale_rewards"):
        make_trainer(tmp_path, "dr-grpo", scale_rewards="group")


def test_another_version_of_trl_is_named(tmp_path, monkeypatch, caplog):
    """It is used, with a warning; the tested one without."""
    with caplog.at_level(logging.WARNING, "rest"):
        make_trainer(tmp_path)
        assert not caplog.records or not trl.__version__.startswith("1.16.")
        monkeypatch.setattr(trl, "__version__", "1.17.2")
        make_trainer(tmp_path)
    assert "trl 1.17.2 is untested: pip install" in caplog.text


@pytest.mark.parametrize("hook", ["_compute_loss", "_get_per_token_logps_and_entropies", "trl"])
def test_a_missing_hook_or_package_is_one_sentence(monkeypatch, hook):
    """A loss that knows advantages of shape (B,) alone, log-probabilities without entropies, no TRL at
    all."""
    def old(self, model, inputs):
        return inputs["advantages"].unsqueeze(1)
    if hook == "trl":
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        monkeypatch.setattr(trl.GRPOTrainer, hook, old)
    with pytest.raises(ImportError, match=r"ResT on TRL needs trl 1\.16: pip install 'trl==1\.16\.\*'"):
        load_again()


def load_again():
    """The module's code anew, without touching the one that is loaded."""
    spec = importlib.util.spec_from_file_location("another_bridge", trl_bridge.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ------------------------------------------------------------------------------------ real training

def one_step(folder, loss_type, method, world=1):
    """What one step of TRL's own loop makes of the global batch, in STEPS micro-batches: how far the weights
    moved, over the learning rate, and the metrics."""
    trainer = make_trainer(
        folder, method, loss_type=loss_type, max_steps=1,
        per_device_train_batch_size=P * G // world // STEPS, gradient_accumulation_steps=STEPS)
    start = flat(trainer.model.parameters())
    trainer.train()
    moved = (start - flat(trainer.model.parameters())) / LR
    logged = trainer.state.log_history[0].items()
    return moved, {name: value for name, value in logged if name[:2] in ("H_", "w_") or name == "reward"}


CASES = [("grpo", "rest"), ("dapo", "rest-official"), ("dr_grpo", "shuffled")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return [one_step(tmp_path_factory.mktemp("one"), *case) for case in CASES]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_step_of_trls_loop_is_a_step_of_ours(alone, number):
    """Through its shuffling, its micro-batches and its accumulation, plain gradient descent moves the
    weights as rest.update does."""
    loss_type, method = CASES[number]
    _, gradient = ours(make_model(), rolled_out(), weights(method, 0), LOSSES[loss_type])
    assert close(alone[number][0], gradient, 1e-3)


def launch(*arguments, **options):
    """A script in two processes on the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # --cpu would start one; the script itself asks for the CPU
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
             "--main_process_port", "0", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_two_processes_give_what_one_gives(alone, tmp_path):
    """`accelerate launch` with two processes on the CPU: on the same global batch, whose halves have
    other lengths, the same step and the same metrics. Region entropies of each process alone would give
    others."""
    done = launch(Path(__file__), tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    for (moved, metrics), (expected, reference) in zip(torch.load(tmp_path / "out.pt"), alone, strict=True):
        assert close(moved, expected, 1e-4)
        assert metrics == pytest.approx(reference, rel=1e-4) and len(metrics) == 11


def test_lora_moves_the_adapter_only(tmp_path):
    """Two real steps of the embedded policy, without its warm start, with a LoRA adapter, generation
    included: its own weights stay as they were, bit for bit, the adapter's do not."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    rows = [step for row in tasks.make_rows(8) for step in tasks.decompose(row)]
    tokenizer = policy.build_tokenizer([json.dumps(row) for row in rows], 512)
    model = policy.build_model(512)
    before = {name: p.clone() for name, p in model.named_parameters()}
    chat = TemplateChat(tokenizer, model=model)
    trainer = make_trainer(
        tmp_path, chat=chat, rows=rows, model=model, max_steps=2, max_completion_length=6,
        per_device_train_batch_size=G, rollout_func=None,
        reward_funcs=[trl_bridge.reward(chat), numbered],
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    adapter = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    base = {name.replace("base_model.model.", "").replace(".base_layer", ""): p
            for name, p in trainer.model.named_parameters() if "lora" not in name}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    assert adapter and all(p.ne(0).any() for p in adapter.values())
    first, second = trainer.state.log_history[:2]
    assert first["rewards/reward/mean"] < 0 and {"exact", "H_thought", "w_thought"} <= second.keys()


def test_the_script_of_the_results_runs_as_printed(tmp_path):
    """One step of it, with its own options but for their sizes, on a row of the README's kind."""
    pytest.importorskip("peft", reason="pip install peft")
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "results/trl.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(code + "\nprint(trainer.state.log_history[0]['rewards/reward/mean'])")
    write_rows(tmp_path / "rows.jsonl", [ROW])
    make_model().save_pretrained(tmp_path / "DIR")
    make_tokenizer().save_pretrained(tmp_path / "DIR")
    words = ("--model_name_or_path DIR --output_dir runs/trl --max_steps 1 --loss_type grpo "
             "--num_generations 2 --use_cpu --per_device_train_batch_size 2 --max_completion_length 5 "
             "--learning_rate 1e-6 --bf16 False --report_to none --save_strategy no --use_peft --lora_r 2 "
             "--lora_target_modules all-linear")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "mine.py", *words.split()], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 0  # no completion of five random tokens is right


if __name__ == "__main__":
    import tempfile
    from accelerate import PartialState
    results = [one_step(tempfile.mkdtemp(), *case, world=2) for case in CASES]
    if PartialState().is_main_process:
        torch.save(results, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # without the interpreter's end, at which gloo's threads now and then abort a process that is done
    os._exit(0)
