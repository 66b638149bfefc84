"""Policies: the embedded one (a 1M-parameter Qwen3 and its BPE tokenizer, made from scratch in seconds)
and any Hugging Face chat model; and the supervised warm start that gives reinforcement learning
something to reinforce."""

import hashlib
import importlib.metadata
import inspect
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)

import rest
from toy_tools import chat, fast, lora, runs, schema, tasks, tools

# ------------------------------------------------------------------------------ the embedded policy

WARM_START_STEPS = 480
START = Path(__file__).parent / "start"  # the warm-started policy of seed 0, which comes with the repository

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
# tools as signatures, name(param: type, ...): description, a third of the tokens that JSON schemas take
CHAT_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{% set f = tool.function %}{{ f.name }}("
    "{% for name, p in ((f.parameters or {}).properties or {}).items() %}{{ name }}"
    "{% if p.type %}: {{ p.type if p.type is string else p.type | join('|') }}{% endif %}"
    "{% if p.enum %} {{ p.enum | join('|') }}{% endif %}"
    "{% if not loop.last %}, {% endif %}{% endfor %}): {{ f.description }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(texts, vocab_size=1536):
    """Byte-level BPE over `texts` with single tokens for the tags, as a transformers tokenizer with a
    chat template.

    Tokens hold at most a word (tool names are words) or two digits, so that a value has the same tokens
    wherever it stands."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{4}-\d\d|-?\d{1,2}| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+|\s+"), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS), show_progress=False,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens(TAGS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SHAPE = {
    "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 5,
    "num_key_value_heads": 5, "head_dim": 32, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "initializer_range": 0.06}


def build_model(vocab_size, seed=0):
    """A randomly initialised Qwen3 of about 1M parameters."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **SHAPE, **ids))


def noisy_demonstration(row, rng, noise):
    """The row's next turn as an imperfect demonstrator would write it.

    Each with probability `noise`: a thought left open or left out, broken JSON, a response beside
    calls. Each with a third of that: a wrong tool, a wrong or missing argument, a missing call."""
    calls = [dict(call) for call in row["gold"][0]]
    demo = row["demo"][0]
    for call in calls:
        call["arguments"] = dict(call["arguments"])
        if row["tools"] and rng.random() < noise / 3:
            call["name"] = rng.choice([tool["function"]["name"] for tool in row["tools"]])
        if rng.random() < noise / 3 and call["arguments"]:
            key = rng.choice(list(call["arguments"]))
            value = call["arguments"].pop(key)
            if rng.random() < 0.5 and isinstance(value, str):
                call["arguments"][key] = value[:max(1, len(value) // 2)]
    if rng.random() < noise / 3:
        calls = calls[:-1] if len(calls) > 1 else calls
    response = demo["response"]
    if calls and rng.random() < noise:
        response = "Done."
    text = tasks.completion_text(calls, demo["think"], response)
    if rng.random() < noise:
        text = text.replace("</think>", "", 1)
    if rng.random() < noise:
        text = re.sub(r"<think>.*?</think>\n?", "", text, count=1, flags=re.S)
    if calls and rng.random() < noise:
        text = text.replace("}}", "}", 1)
    return text


def copying(tokenizer, rng):
    """(ids, mask) of a lesson: one request and its call, without tools, chat format or thought."""
    call, user = tasks.request(tasks.Draw(rng, "train"), rng.choice(list(tools.TOOLS)))
    texts = (user + "\n", json.dumps(call, ensure_ascii=False))
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return prompt + answer + [tokenizer.eos_token_id], [False] * len(prompt) + [True] * (len(answer) + 1)


def looking_up(tokenizer, rng, questions=12):
    """(ids, mask) of a lesson: a list of tools, then names of tools with what a thought would say of
    them, there or missing."""
    names = rng.sample(list(tools.TOOLS), rng.choice((1, 2, 3, 4)))
    schemas = [tools.TOOLS[name].schema() for name in names]
    row = {"messages": [{"role": "user", "content": ""}], "tools": schemas}
    ids, _ = rest.Chat(tokenizer).prompt(row)
    mask = [False] * len(ids)
    for _ in range(questions):
        there = rng.random() < 0.5
        name = rng.choice([n for n in tools.TOOLS if (n in names) == there])
        question = rng.choice(tasks.TOOL).format(tool=name)
        answer = rng.choice(tasks.USE if there else tasks.NO_TOOL) + "\n"
        for text, trained in ((question, False), (answer, True)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = ids + piece
            mask = mask + [trained] * len(piece)
    return ids, mask


def demonstrations(seed, count, noise, mask_names):
    """[(row, completion text)]: single steps of toy tasks as an imperfect demonstrator would answer them."""
    rng = random.Random(seed)
    dialogues = tasks.make_rows(count, "train", seed=seed + 1, mask_names=mask_names)
    rows = [rng.choice(tasks.decompose(row)) for row in dialogues]
    return [(row, noisy_demonstration(row, rng, noise)) for row in rows], rng


def recipe(seed=0, steps=WARM_START_STEPS, batch=32, learning_rate=3e-3, noise=0.22, mask_names=False):
    """All that decides what a warm start learns, but for the libraries: its options, and a digest of
    what tools, tasks, lessons and template make of them."""
    pairs, rng = demonstrations(seed, 200, noise, mask_names)
    tokenizer = build_tokenizer([], 300)
    lessons = [(copying(tokenizer, rng), looking_up(tokenizer, rng)) for _ in range(50)]
    shown = json.dumps([pairs, lessons, CHAT_TEMPLATE, SHAPE], sort_keys=True, default=str)
    return {"seed": seed, "steps": steps, "batch": batch, "learning_rate": learning_rate, "noise": noise,
            "mask_names": mask_names, "data": hashlib.sha256(shown.encode()).hexdigest()}


def versions():
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}


def digest(folder):
    """{file name: sha256} of a folder, but for start.json itself."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(Path(folder).iterdir()) if file.name != "start.json"}


def tiny_policy(seed=0, steps=WARM_START_STEPS, batch=32, learning_rate=3e-3, noise=0.22, mask_names=False,
                device="cpu", progress=True):
    """(model, tokenizer) of the embedded policy after its warm start, kept under $REST_CACHE (default
    ~/.cache/rest).

    A pretrained model can copy words and see whether something is listed; a random one learns this
    slowest, and soonest from short texts that hold nothing else. So half as many steps of lessons come
    first, then `steps` of imperfect demonstrations."""
    wanted = recipe(seed, steps, batch, learning_rate, noise, mask_names)
    modules = (rest, schema, tools, tasks, chat, inspect.getmodule(tiny_policy))
    sources = [inspect.getsource(module) for module in modules]
    key = json.dumps([wanted, versions(), sources], sort_keys=True)
    cache = Path(os.environ.get("REST_CACHE", "~/.cache/rest")).expanduser()
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of training: it may be refused
    pairs, rng = demonstrations(seed, max(2000, steps * batch), noise, mask_names)
    plain = build_tokenizer([], 300)  # bytes, for its chat template
    texts = [plain.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) + text
             for row, text in pairs[:4000]]
    tokenizer = build_tokenizer(texts)
    model = build_model(len(tokenizer), seed).to(device)

    def lessons(step):
        copies = [copying(tokenizer, rng) for _ in range(batch * 3 // 2)]
        return copies + [looking_up(tokenizer, rng) for _ in range(batch // 6 if step < 120 else 0)]
    supervised(model, lessons, steps // 2, learning_rate, 18, "learning to copy", progress)
    warm_start(model, tokenizer, pairs, steps, batch, learning_rate, seed, micro_batch=8, progress=progress)
    # written beside, then renamed: an interrupted run leaves no half cache
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    try:
        part.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return model, tokenizer


def write_start(folder, progress=True, **options):
    """Make a warm-started policy and write it as the repository's: bfloat16 weights, tokenizer, and
    start.json, which says by which recipe, libraries and command it was made and what each file's
    checksum is."""
    folder = Path(folder)
    model, tokenizer = tiny_policy(**options, progress=progress)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"command": "python -m toy_tools.policy toy_tools/start", "recipe": recipe(**options),
             "versions": versions(), "files": digest(folder)}
    (folder / "start.json").write_text(json.dumps(about, indent=1) + "\n")


def is_shipped(**options):
    """Whether the repository's start is what a warm start with these options of `recipe` would make."""
    file = START / "start.json"
    return file.exists() and json.loads(file.read_text())["recipe"] == recipe(**options)


def read_start(folder=START):
    """(model, tokenizer) of a folder of write_start, in float32. Raises ValueError if a file is not
    what it was."""
    about = json.loads((Path(folder) / "start.json").read_text())
    if digest(folder) != about["files"]:
        raise ValueError(f"{folder} is not what its start.json says: restore it from the repository, or make "
                         f"it anew with: {about['command']}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


# ----------------------------------------------------------------- supervised warm start, any model

def supervised(model, sequences, steps, learning_rate, micro_batch, what="warm start", progress=True):
    """Cross-entropy steps; sequences(step) -> [(ids, mask)], mask True at the tokens to learn. Short
    warm-up, second half decays. Returns the losses, nats per token of the model's own logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type != "mps")
    causal = fast.inside(model)
    head = fast.own_head(model)
    losses = []
    bar = tqdm(range(steps), desc=what, disable=not progress, mininterval=1)
    for step in bar:
        warm = (step + 1) / max(1, min(20, steps // 5))
        decay = 0.1 + 0.9 * (steps - step) / max(1, steps // 2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, warm, decay)
        chosen = sorted(sequences(step), key=lambda pair: len(pair[0]))
        total = sum(sum(mask) for _, mask in chosen)
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for start in range(0, len(chosen), micro_batch):
            part = chosen[start:start + micro_batch]
            width = len(part[-1][0])  # right-padded: what is behind is not seen
            ids = rest.to_device([i + [0] * (width - len(i)) for i, _ in part], device)  # (n, width)
            at = [row * width + t for row, (_, mask) in enumerate(part)
                  for t, learnt in enumerate(mask[1:]) if learnt]
            at = rest.to_device(at, device).long()  # (tokens,), of n * width: each predicts the next
            targets = ids.flatten()[at + 1]
            with rest.autocast(model):
                if head is None:
                    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at]
                    logp = rest.token_logps(logits, targets, 1.0)
                else:  # logits of the tokens to learn only
                    states = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
                    logp = fast.head_logps(states.flatten(0, 1)[at], targets, 1.0, head)
            micro = -logp.sum() / total
            micro.backward()
            parts.append(micro.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss = sum(torch.stack(parts).tolist())  # the one wait of a step
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return losses


def warm_start(model, tokenizer, pairs, steps, batch=8, learning_rate=2e-4, seed=0, micro_batch=16,
               instructions="", progress=True):
    """Supervised steps on pairs (row, completion text): cross entropy on the completion and its
    end-of-turn token. Returns the losses."""
    talk = chat.TemplateChat(tokenizer, instructions, model)
    rng = random.Random(seed)
    epochs = -(-steps * batch // len(pairs))
    order = [i for _ in range(epochs) for i in rng.sample(range(len(pairs)), len(pairs))]

    def sequence(i):
        given, learnt = talk.target(*pairs[i])
        return given + learnt, [False] * len(given) + [True] * len(learnt)

    def sequences(step):
        return [sequence(i) for i in order[step * batch:(step + 1) * batch]]
    return supervised(model, sequences, steps, learning_rate, micro_batch, progress=progress)


# -------------------------------------------------------------------------------------- real models

def load_model(path, dtype=torch.float32, gradient_checkpointing=False, lora_rank=0):
    """(model, tokenizer) from a hub id, a folder, or a .gguf file, in evaluation mode and without
    dropout: whatever is random would make the importance ratio differ from 1.

    A folder with an adapter gives its base with that adapter. lora_rank: adapters are added and alone
    trained; a run's checkpoint is kept for them, since the run may go on. Raises FileNotFoundError /
    ImportError / ValueError with what to do."""
    path = str(path)
    of_run = Path(path) / "checkpoint"
    if any((of_run / name).exists() for name in ("config.json", lora.CONFIG)):
        path = str(of_run)
    if path.endswith(".gguf") and lora_rank:
        raise ValueError("--lora-rank needs a model in a folder or on the hub, from which it can be loaded "
                         "again: load the .gguf file with policy.load_model and save it to a folder")
    adapter = lora.read_config(path)
    base = adapter.get("base_model_name_or_path") or path
    if lora_rank and not adapter:
        base = runs.lasting(path)
    try:
        model, tokenizer = read_model(base, dtype)
    except FileNotFoundError as error:
        text = f"{path} is an adapter of {base}: {error}" if adapter else str(error)
        raise FileNotFoundError(text) from error
    if adapter:
        model = lora.load(model, path, lora_rank)
        if (Path(path) / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(path)
    elif lora_rank:
        model = lora.add(model, lora_rank)
    if not tokenizer.chat_template:
        raise ValueError(f"{path} has no chat template; use an instruct model, or set "
                         "tokenizer.chat_template and save it to a folder")
    still(model)
    if gradient_checkpointing:
        checkpoint_layers(fast.inside(model))
    return model, tokenizer


def read_model(path, dtype):
    """(model, tokenizer) as they lie in a folder, on the hub, or in a .gguf file."""
    kwargs = {}
    quantization = {}
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            import accelerate  # noqa: F401
            import gguf  # noqa: F401
            from transformers import GgufConfig
        except ImportError as error:
            raise ImportError(f"reading {path} needs two optional packages: pip install gguf accelerate "
                              f"({error})") from error
        kwargs = {"gguf_file": file.name}
        quantization = {"quantization_config": GgufConfig(dequantize=True)}
        path = str(file.parent)
    elif Path(path).is_dir():
        path = str(Path(path).resolve())  # an adapter remembers it
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"cannot load a model from {path}: no folder with a config.json, and no such "
                                "model on the hub, or the hub cannot be reached") from error
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **kwargs, **quantization)
    return model, tokenizer


def still(model):
    """Evaluation mode, in which nothing is random; and no dropout anywhere, in modules and in the
    configurations that they read, for layers that must be in training mode."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            for name, value in vars(owner).items() if owner else ():
                if isinstance(value, float) and "drop" in name:
                    setattr(owner, name, 0.0)


def checkpoint_layers(model):
    """Gradient checkpointing. transformers checkpoints a module only in training mode, so that
    innermost ones that do are in it, they alone: what lies in them and around them (router noise, say)
    stays as it is."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if not layers:
        name = type(model).__name__
        raise ValueError(f"{name} has no gradient checkpointing: leave --gradient-checkpointing out")
    for layer in layers:
        inner = [module for module in layer.modules() if module is not layer]
        layer.training = not any(getattr(module, "gradient_checkpointing", False) for module in inner)


def merge(folder, to, dtype=torch.float32):
    """Write the model of a folder with an adapter to another folder, merged: a model like any other.

    python -c "from toy_tools import policy; policy.merge('runs/rest-seed0', 'merged')" """
    model, tokenizer = load_model(folder, dtype)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"{folder} has no adapter to merge")
    model.merge_and_unload().save_pretrained(to)
    tokenizer.save_pretrained(to)


if __name__ == "__main__":  # python -m toy_tools.policy FOLDER
    if len(sys.argv) != 2:
        sys.exit("usage: python -m toy_tools.policy FOLDER")
    write_start(sys.argv[1])
