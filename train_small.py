"""Train a tool-calling policy with ResT: `python train_small.py`. Without arguments it needs no download: it
makes a 1M-parameter policy, warm-starts it on imperfect demonstrations, and reinforces it on executable toy
tools. README.md has examples."""

import argparse
import hashlib
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging as hf_logging

import rest
from rest import knob
from toy_tools import benchmarks, fast, policy, runs, show, tasks
from toy_tools.chat import TemplateChat
from toy_tools.data import load_rows

INSTRUCTIONS = (
    "First think inside <think> and </think>. Then either call tools, one JSON object per line inside "
    "<tool_call> and </tool_call>, or, where no tool fits or nothing is left to call, answer inside "
    "<response> and </response>.")


# ---------------------------------------------------------------------------------- options

def several(text):
    return field(default_factory=list, metadata={"help": text, "bound": None})


@dataclass
class Run:
    """What to run, and on what."""

    name: str = knob("", "Folder under --output-dir; empty: METHOD-seedS, numbered if taken.")
    output_dir: str = knob("runs", "Where runs are kept: metrics, options, policy.")
    model: str = knob("", "Hub id, folder or .gguf file of a chat model; empty: the embedded 1M policy.")
    data: str = knob("", "Training rows: .jsonl, ToolRL .parquet/.json, or a hub id; empty: toy tasks.")
    eval_data: str = knob("", "Held-out rows, in the same forms; empty: toy tasks.")
    device: str = knob("", "cuda, mps or cpu; empty: the first of these that is there.")
    dtype: str = knob("float32", "Weights in float32 (bf16 autocast on GPUs that have it) or bfloat16, "
                      "which rounds small updates away.")
    lora_rank: int = knob(0, "Train low-rank adapters of this rank instead of the weights; 0: none.", "at least 0")
    gradient_checkpointing: bool = knob(False, "Less activation memory, about a third more time.")
    shared_prefix: bool = knob(True, "Forward each prompt once per group, not once per completion.")
    cuda_graph: bool = knob(True, "On a GPU, capture the decoding step as a CUDA graph and replay it.")
    compile_decode: bool = knob(False, "torch.compile the decoding step: half a minute at first, for long runs.")
    warm_start_steps: int = knob(-1, "Supervised steps before RL; -1: as many as the embedded policy needs, "
                                 "none for a --model.", "-1 or more")
    warm_start_batch: int = knob(8, "Rows per supervised step of a --model.", "at least 1")
    micro_batch: int = knob(2, "Rows per forward in a --model's supervised steps.", "at least 1")
    warm_start_lr: float = knob(2e-4, "Learning rate of a --model's supervised steps.", "in (0, 1]")
    noise: float = knob(0.22, "Rate of each kind of mistake in the toy demonstrations.", "in [0, 1]")
    train_rows: int = knob(4000, "Toy tasks to train on.", "at least 1")
    eval_rows: int = knob(200, "Held-out toy tasks (at most so many rows of --eval-data) to evaluate on, "
                          "before and after.", "at least 0")
    eval_samples: int = knob(2, "Completions sampled per held-out task.", "at least 1")
    eval_batch: int = knob(64, "Prompts evaluated at once.", "at least 1")
    mask_names: bool = knob(False, "Random strings for tool and parameter names, so that descriptions must be read.")
    save_steps: int = knob(50, "Checkpoint every so many steps; 0: only at the start and the end.", "at least 0")
    keep_steps: list[int] = several("Steps whose checkpoints stay, as kept/stepN; 0: the start.")
    resume: bool = knob(False, "Continue the run --name, or begin it if there is none.")
    eval_only: bool = knob(False, "No training: evaluate the run --name, --model, or the embedded policy.")
    benchmarks: list[str] = several("bfcl, bfcl-code, bfcl-live, bfcl-multi-turn, api-bank, or categories.")
    api_bank_dir: str = knob("", "Folder with level-{1,2,3}-api_processed.json.")
    limit: int = knob(0, "At most so many prompts per benchmark category (a fixed subset); 0: all.", "at least 0")
    compare: str = knob("", "benchmarks.jsonl of another run, for paired differences.")


BOUNDS = rest.BOUNDS | {"-1 or more": lambda x: x >= -1, "in [0, 1]": lambda x: 0 <= x <= 1}

# What a resumed run may change: nothing here changes what is drawn, trained on or measured.
FREE = {"name", "output_dir", "device", "gradient_checkpointing", "shared_prefix", "cuda_graph", "compile_decode",
        "micro_batch", "eval_batch", "save_steps", "keep_steps", "resume", "micro_batch_tokens"}

# The methods that read a knob; the others read none of these, and a method of one's own may read all.
ENTROPY = {"rest", "rest-static", "no-thought", "shuffled", "token-entropy"}
CURRICULUM = {"rest", "no-thought", "shuffled"}
READERS = {
    "raw_weight": ENTROPY, "min_entropy": ENTROPY,
    "alpha_format": CURRICULUM, "alpha_params": CURRICULUM, "alpha_thought": CURRICULUM,
    "weight_min": CURRICULUM | {"rest-static"}, "weight_max": CURRICULUM | {"rest-static"},
    "top_entropy_fraction": {"top-entropy"}}
METHODS = set(rest.WEIGHTS)  # those of rest.py, before anybody adds one
EVALUATION = {"max_completion_tokens", "max_turns", "temperature", "tool_timeout", "seed"}  # of Config, without training


def flag(name):
    return "--" + name.replace("_", "-")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class Once(argparse.Action):
    """An option that is given twice would be ignored once."""

    def __call__(self, parser, namespace, value, option_string=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, value)


def read_options(argv=None):
    """(Run, rest.Config, names of the options given). --some-name and --some_name are the same, and a bool may be
    given as --flag, --flag True or --flag False. Raises ValueError with a sentence."""
    parser = Parser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for options in (Run, rest.Config):
        group = parser.add_argument_group(options.__doc__.splitlines()[0])
        for option in fields(options):
            kind = {"type": option.type}
            if option.type is bool:
                kind = {"type": boolean, "nargs": "?", "const": True}
            elif option.type in (list[str], list[int]):
                kind = {"type": option.type.__args__[0], "nargs": "+"}
            default = "" if option.default in ("", field().default) else f" [{option.default}]"
            text = (option.metadata["help"] + default).replace("%", "%%")
            group.add_argument(flag(option.name), action=Once, help=text, **kind)
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parser.parse_args([dashes(word) for word in argv]))
    run, cfg = (options(**{option.name: given[option.name] for option in fields(options) if option.name in given})
                for options in (Run, rest.Config))
    return run, cfg, set(given)


def dashes(word):
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def check(run, cfg, given, device):
    """Raises ValueError for what cannot be, and for every option given that would be ignored."""
    for option in fields(run):
        value, bound = getattr(run, option.name), option.metadata["bound"]
        if bound and not (math.isfinite(value) and BOUNDS[bound](value)):
            raise ValueError(f"{flag(option.name)} must be a number {bound}, not {value}")
    for name in given & {"name", "output_dir", "model", "data", "eval_data", "compare", "api_bank_dir"}:
        if not getattr(run, name).strip():
            raise ValueError(f"{flag(name)} is empty: give it a value, or leave it out")
    if "name" in given:
        runs.plain_name(run.name)
    if run.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, not {run.dtype!r}")
    if cfg.learning_rate > 1:
        raise ValueError(f"--learning-rate must lie in (0, 1], not {cfg.learning_rate}")
    if cfg.seed >= 2**32:
        raise ValueError(f"--seed must be below 2**32, not {cfg.seed}")
    if run.resume and not run.name:
        raise ValueError("--resume continues a run: name it with --name")
    late = [step for step in run.keep_steps if not 0 <= step <= cfg.steps]
    if late:
        raise ValueError(f"--keep-steps {late[0]} is not a step of a run of {cfg.steps}")
    if run.compare and not Path(run.compare).is_file():
        raise ValueError(f"no such file: {run.compare} (--compare takes the benchmarks.jsonl of another run)")
    for names, applies, why in misfits(run, cfg, given, device):
        ignored = sorted(given & set(names))
        if ignored and not applies:
            raise ValueError(f"{flag(ignored[0])} would have no effect: {why}")


def misfits(run, cfg, given, device):
    """[(options, whether they have an effect in this run, what they need)]"""
    training = not run.eval_only
    embedded = not run.model and not (run.eval_only and run.name)
    supervised = training and bool(run.model) and run.warm_start_steps > 0
    toys = not run.benchmarks and (training and not run.data or not run.eval_data and not (run.eval_only and run.data))
    of_config = {option.name for option in fields(cfg)}
    rules = [
        ({"benchmarks"}, not training, "it needs --eval-only"),
        ({"api_bank_dir", "limit", "compare"}, not training and run.benchmarks, "it needs --eval-only and --benchmarks"),
        ({"api_bank_dir"}, any(name.startswith("api") for name in run.benchmarks), "no --benchmarks of API-Bank are asked for"),
        ({"train_rows", "save_steps", "keep_steps", "resume", "gradient_checkpointing", "lora_rank"}
         | of_config - EVALUATION, training, "it is for training, and --eval-only trains nothing"),
        ({"data", "eval_data", "eval_rows", "eval_samples", "temperature", "max_turns", "tool_timeout"},
         not run.benchmarks, "--benchmarks have their own rows and are answered greedily, in their own turns"),
        ({"seed"}, not run.benchmarks or embedded, "--benchmarks are answered greedily"),
        ({"data"}, training or not run.eval_data, "--eval-only evaluates the rows of --eval-data"),
        ({"eval_data", "eval_samples", "eval_batch"}, run.eval_rows > 0 or run.benchmarks, "--eval-rows 0 evaluates nothing"),
        ({"name"}, training or not run.model or run.benchmarks,
         "--model is evaluated and only printed; --name RUN without --model evaluates that run's policy"),
        ({"output_dir"}, training or run.name or run.benchmarks, "nothing is read or written there"),
        ({"dtype", "gradient_checkpointing", "lora_rank"}, not embedded, "it is for a --model, the embedded policy is small and float32"),
        ({"warm_start_steps"}, training or embedded, "--eval-only trains nothing"),
        ({"warm_start_batch", "micro_batch", "warm_start_lr"}, supervised, "it is for the supervised steps of a --model: give --warm-start-steps"),
        ({"noise"}, embedded or supervised and not run.data, "there are no toy demonstrations to disturb"),
        ({"train_rows"}, not run.data, "--data has its own rows"),
        ({"mask_names"}, toys or embedded, "there are no toy tasks in this run"),
        ({"tool_timeout"}, cfg.max_turns > 1, "tools run only where --max-turns is above 1"),
        ({"cuda_graph", "compile_decode"}, run.shared_prefix, "it speeds up the shared prefix, which is switched off"),
        ({"cuda_graph"}, device.type == "cuda" or not run.cuda_graph, f"it is for a GPU, and the device is {device.type}"),
        ({"delta"}, cfg.method != "dr-grpo", "dr-grpo does not divide advantages"),
    ]
    if cfg.method in METHODS:
        rules += [({name}, cfg.method in readers, f"--method {cfg.method} does not read it") for name, readers in READERS.items()]
    return rules


# ---------------------------------------------------------------------------------- the stages of a run

@dataclass
class Learner:
    """The policy and what the algorithm speaks to."""

    model: torch.nn.Module
    tokenizer: object
    chat: rest.Chat
    engine: rest.Engine
    optimizer: torch.optim.Optimizer = None


def fail(message):
    sys.exit(f"train_small.py: error: {message}")


def warn(sentences):
    for sentence in sentences:
        print(f"train_small.py: {sentence}", file=sys.stderr)


def pick_device(name):
    """The device of that name, or the first of cuda, mps, cpu that works. Raises ValueError if a named one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = name.partition(":")
    known = there.get(kind) and (not index or kind == "cuda" and index.isdecimal())
    if name and not (known and int(index or 0) < max(1, torch.cuda.device_count())):
        raise ValueError(f"device {name!r} is not available here: use one of {', '.join(d for d, ok in there.items() if ok)}")
    device = torch.device(name or next(d for d, ok in there.items() if ok))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current device
    return device


def load_data(run, cfg):
    """(training rows, held-out rows); the first are empty under --eval-only."""
    if cfg.max_turns > 1 and (run.data or run.eval_data):
        raise ValueError("--max-turns above 1 needs tools that run: it works on the toy tasks; --data and --eval-data are taken step by step")
    held_out = run.eval_data or (run.eval_only and run.data)
    if not run.eval_rows:
        test = []
    elif held_out:
        test = load_rows(held_out, "test" if run.eval_data else "train")[:run.eval_rows]
    else:
        test = toy_rows(run.eval_rows, "test", run, cfg)
    if run.eval_only:
        return [], test
    rows = load_rows(run.data) if run.data else toy_rows(run.train_rows, "train", run, cfg)
    if len(rows) < cfg.prompts:
        raise ValueError(f"{len(rows)} training rows are fewer than the {cfg.prompts} prompts of a step: lower --prompts")
    bare = sum("target" not in row and "demo" not in row for row in rows)
    if supervised(run) and bare:
        raise ValueError(f"--warm-start-steps needs demonstrations, but {bare} rows of {run.data} have neither \"demo\" nor \"target\"")
    return rows, test


def toy_rows(count, split, run, cfg):
    """Toy tasks; a dialogue of K steps as K single-step rows (SWiRL), unless episodes are rolled out live."""
    rows = tasks.make_rows(count, split, seed=cfg.seed, mask_names=run.mask_names)
    return rows if cfg.max_turns > 1 else [step for row in rows for step in tasks.decompose(row)]


def supervised(run):
    """Whether a --model gets supervised steps here; the embedded policy brings its own warm start."""
    return bool(run.model) and run.warm_start_steps > 0 and not run.eval_only


def load_policy(run, cfg, device, path=""):
    """The policy in `path`, or --model, or the embedded one after its warm start."""
    path = path or run.model and whole(run.model)
    if path:
        lora = {"lora_rank": run.lora_rank} if run.lora_rank else {}
        model, tokenizer = policy.load_model(path, getattr(torch, run.dtype), run.gradient_checkpointing, **lora)
    else:
        steps = run.warm_start_steps if run.warm_start_steps >= 0 else policy.WARM_START_STEPS
        model, tokenizer = policy.tiny_policy(cfg.seed, steps, noise=run.noise, mask_names=run.mask_names, device=device)
    if not finite(model):
        raise ValueError(f"the weights of {path or 'the embedded policy'} are not finite: it cannot be used")
    # the embedded policy learns the format from its demonstrations, a real model is told
    instructions = "" if tokenizer.chat_template == policy.CHAT_TEMPLATE else INSTRUCTIONS
    if instructions and not run.eval_only and cfg.steps and cfg.learning_rate == rest.Config.learning_rate:
        raise ValueError(f"--learning-rate {cfg.learning_rate} is the default of the embedded policy and would wreck a pretrained model: set it, to about 1e-6")
    model.to(device)
    engine = fast.engine(model, run.shared_prefix, run.cuda_graph, run.compile_decode)
    return Learner(model, tokenizer, TemplateChat(tokenizer, instructions), engine)


def whole(path):
    """`path`, and for a run's folder that of its newest whole checkpoint."""
    if (Path(path) / runs.MANIFEST).is_file():
        runs.verify(Path(path))
    if not any((Path(path) / name / runs.MANIFEST).is_file() for name in (runs.NEWEST, runs.PREVIOUS)):
        return path
    found, _, problems = runs.find_checkpoint(path)
    if problems:
        warn([*problems, f"using {found} instead"])
    return found


def finite(model):
    return all(bool(p.detach().isfinite().all()) for p in model.parameters())


def check_prompts(what, rows, learner, cfg):
    """Raises ValueError naming the first row that is no prompt, or that leaves no room for its completion."""
    limit = getattr(learner.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for number, row in enumerate(rows, 1):
        try:
            length = len(learner.chat.prompt(row)[0])
        except Exception as error:  # whatever the chat template raises
            raise ValueError(f"{what} row {number} cannot be written as a prompt: {error!r}") from error
        if length + cfg.max_completion_tokens > limit:
            raise ValueError(f"{what} row {number}: its prompt of {length} tokens and --max-completion-tokens {cfg.max_completion_tokens} "
                             f"are more than the {limit} tokens of the model's context")


def train(run, cfg, device, interrupt):
    began = time.perf_counter()
    set_seed(cfg.seed)
    with runs.claim(run.output_dir, run.name, f"{cfg.method}-seed{cfg.seed}", run.resume) as folder:
        rows, test = load_data(run, cfg)
        if not folder.new:
            check_same_options(folder, run, cfg)
        learner, first = (None, 0) if folder.new else reopen(folder, run, cfg, device)
        if learner is None:
            learner = load_policy(run, cfg, device)
            check_prompts("training", rows, learner, cfg)
            check_prompts("held-out", test, learner, cfg)
            if supervised(run):
                demonstrate(learner, rows, run, cfg)
            begin(folder, learner, run, cfg)
        metrics = runs.Metrics(folder, first)
        warn(metrics.problems)
        size = sum(p.numel() for p in learner.model.parameters())
        print(f"{folder}: {cfg.method} on {device}, {size / 1e6:.2f}M parameters, {len(rows)} training rows, steps {first} to {cfg.steps}")
        before = evaluate_start(folder, learner, test, run, cfg)
        start = time.perf_counter() - began
        clock = runs.Clock(device)
        last = loop(folder, learner, rows, run, cfg, first, metrics, clock, interrupt)
        total = clock.total()
        if cfg.steps:
            evaluate_end(folder, learner, test, run, cfg, before, last is not None)
        if last:
            show_step(learner, *last)
            show_time(folder, clock, start, total, began)
        finish(folder, metrics)


def check_same_options(folder, run, cfg):
    """Raises ValueError if a resumed run is not the one that was begun; longer it may become."""
    old = runs.read_json(folder / "config.json")
    try:
        changed = [name for part, now in (("config", cfg), ("run", run)) for name, value in asdict(now).items()
                   if name not in FREE | {"steps"} and old[part].get(name, value) != value]
        steps = int(old["config"]["steps"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: it does not hold a run's options ({error!r})") from error
    if changed:
        raise ValueError(f"--resume with other settings than the run began with ({', '.join(map(flag, changed))}): give the same ones")
    if cfg.steps < steps:
        raise ValueError(f"--resume with --steps {cfg.steps}, but the run began with {steps}: it can only become longer")


def reopen(folder, run, cfg, device):
    """(Learner, finished steps) of the newest whole checkpoint; (None, 0) if the run died before its start was saved."""
    def read(path):
        learner = load_policy(run, cfg, device, path)
        learner.optimizer = make_optimizer(learner.model, cfg)
        state = torch.load(path / "trainer.pt", map_location=device, weights_only=True)
        learner.optimizer.load_state_dict(state["optimizer"])
        for p, moments in learner.optimizer.state.items():
            if moments["exp_avg"].shape != p.shape or moments["exp_avg_sq"].shape != p.shape:
                raise ValueError(f"{path / 'trainer.pt'} belongs to a model of other shapes")
        return learner, state["step"]
    try:
        (learner, first), problems = folder.load(read)
    except FileNotFoundError:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} has metrics but no checkpoint any more: choose another --name") from None
        return None, 0
    if problems:
        warn([*problems, f"going on from the checkpoint before, after {first} steps"])
    if first > cfg.steps:
        raise ValueError(f"{folder} has {first} finished steps, more than --steps {cfg.steps}")
    prolong(folder, cfg, first)
    return learner, first


def prolong(folder, cfg, first):
    """Writes down a new length, if --steps gives one, and says what that means."""
    options = runs.read_json(folder / "config.json")
    steps = options["config"]["steps"]
    if cfg.steps == steps:
        return
    if (folder / "after.json").exists():
        (folder / "after.json").rename(folder / f"after-{steps}.json")
    options["config"]["steps"] = cfg.steps
    options["lengths"].append([first, cfg.steps])
    runs.write_json(folder / "config.json", options)
    print(f"{folder}: prolonged from {steps} to {cfg.steps} steps; learning rate, curriculum and reward follow the new length from step {first} on")


def make_optimizer(model, cfg):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=trained[0].device.type != "mps")


def demonstrate(learner, rows, run, cfg):
    """Supervised steps of a --model on the rows' demonstrations."""
    rng = random.Random(cfg.seed)
    noise = 0.0 if run.data else run.noise  # one's own demonstrations are imitated as they are
    pairs = [(row, row.get("target") or policy.noisy_demonstration(row, rng, noise)) for row in rows]
    policy.warm_start(learner.model, learner.chat, pairs, run.warm_start_steps, run.warm_start_batch, run.warm_start_lr,
                      cfg.seed, micro_batch=run.micro_batch)


def begin(folder, learner, run, cfg):
    """The options, and the start as the checkpoint of step 0: from here on the run can be resumed."""
    learner.optimizer = make_optimizer(learner.model, cfg)
    runs.write_json(folder / "config.json", {"config": asdict(cfg), "run": asdict(run), "torch": torch.__version__,
                                             "lengths": [[0, cfg.steps]]})
    save(folder, learner, 0, run)
    folder.worth = supervised(run) or not cfg.steps  # else whatever is wrong with the first step shall leave no folder


def save(folder, learner, step, run):
    def write(path):
        learner.model.save_pretrained(path)
        learner.tokenizer.save_pretrained(path)
        torch.save({"optimizer": learner.optimizer.state_dict(), "step": step}, path / "trainer.pt")
    folder.save(write, step, keep=step in run.keep_steps)


def measure(learner, test, run, cfg, what):
    with tqdm(total=len(test), desc=what, unit="row", leave=False) as bar:
        return rest.evaluate(learner.engine, learner.chat, test, cfg, samples=run.eval_samples, seed=10**6,
                             batch_rows=run.eval_batch, toolbox_for=tasks.toolbox_for, on_batch=bar.update)


def evaluate_start(folder, learner, test, run, cfg):
    if not test:
        return None
    if not (folder / "before.json").exists():
        runs.write_json(folder / "before.json", measure(learner, test, run, cfg, "evaluating the start"))
    return runs.read_json(folder / "before.json")


def batch_rows(rows, cfg, step):
    """The rows of a step, a function of (seed, step) alone, so that a resumed run draws what the uninterrupted one would have drawn."""
    per_epoch = len(rows) // cfg.prompts
    order = random.Random(f"{cfg.seed}-{step // per_epoch}").sample(range(len(rows)), len(rows))
    start = step % per_epoch * cfg.prompts
    return [rows[i] for i in order[start:start + cfg.prompts]]


def loop(folder, learner, rows, run, cfg, first, metrics, clock, interrupt):
    """Steps first to cfg.steps, each of them logged, some of them saved. Returns (batch, weight) of the last, or None."""
    last = None
    saved = first
    with tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=cfg.method, unit="step") as bar, interrupt.deferred():
        for step in bar:
            clock()
            row, batch, weight = one_step(folder, learner, batch_rows(rows, cfg, step), cfg, step, clock)
            stop_if_not_finite(folder, learner, batch, step, saved)
            metrics.add(row)
            record(bar, row)
            last = batch, weight
            folder.worth = True
            done = step + 1
            due = run.save_steps and done % run.save_steps == 0 or done in run.keep_steps or done == cfg.steps
            if due or interrupt.requested:
                metrics.sync()
                save(folder, learner, done, run)
                saved = done
            if interrupt.requested:
                fail(f"interrupted after {done} steps ({interrupt.requested}); saved. Continue with the same options and --resume --name {folder.path.name}")
    return last


def one_step(folder, learner, rows, cfg, step, clock):
    kept = f"; what was saved is in {folder}" if folder.worth else ""
    try:
        return rest.train_step(learner.engine, learner.chat, learner.optimizer, rows, cfg, step, tasks.toolbox_for, clock)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory in step {step}: lower --micro-batch-tokens (update), or --prompts, --group or --max-completion-tokens (rollout){kept} ({error})")
    except Exception as error:  # not the user's input any more: show where
        raise RuntimeError(f"step {step} failed{kept}") from error


def stop_if_not_finite(folder, learner, batch, step, saved):
    """Ends the run where the policy is NaN or infinite, with a newest checkpoint from before that."""
    sampled = batch.sampled
    given = bool(batch.logp[sampled].isfinite().all()) and bool(batch.entropy[sampled].isfinite().all())
    if given and finite(learner.model):
        return
    if not given and step == 0:
        raise ValueError("the model's log-probabilities are not finite before the first step: try --dtype float32, or another --model")
    if not given and saved == step and not folder.fall_back():
        fail(f"step {step}: the policy's log-probabilities are not finite, and there is no checkpoint before that of step {saved} in {folder}")
    good = -runs.checkpoint_age(folder / runs.NEWEST)
    what = "weights became" if given else "log-probabilities are"
    fail(f"stopped in step {step}: the policy's {what} not finite. The last good checkpoint, after {good} steps, is {folder / runs.NEWEST}; "
         "begin another run from it by --model, with a lower --learning-rate")


def record(bar, row):
    """What is seen of a step while the run goes on."""
    entropies = " ".join(f"{short} {row['H_' + name]:.2f}" for short, name in
                         (("fmt", "format"), ("name", "name"), ("par", "params"), ("tht", "thought")))
    bar.set_postfix_str(f"reward {row['reward']:+.2f} exact {row['exact']:.2f} H {entropies}")


def evaluate_end(folder, learner, test, run, cfg, before, trained):
    if not test:
        return
    file = folder / "after.json"
    if trained or not file.exists():
        runs.write_json(file, measure(learner, test, run, cfg, "evaluating the end"))
    print(f"\nHeld-out rows, {run.eval_samples} samples each at temperature {cfg.temperature}:\n{show.evaluation(before, runs.read_json(file))}")


def show_step(learner, batch, weight):
    best = max(range(len(batch.texts)), key=lambda i: len(set(batch.region[i].tolist())))
    text = show.episode(learner.chat, batch, best, weight, sys.stdout.isatty())
    print(f"\nAn episode of the last step, by region, with token weights:\n{text}")


def show_time(folder, clock, start, total, began):
    split = clock.seconds | {"other": total - sum(clock.seconds.values())}
    whole_run = time.perf_counter() - began
    runs.write_json(folder / "time.json", {"start": start, **split, "steps": total, "run": whole_run})
    shares = ", ".join(f"{name} {100 * seconds / max(total, 1e-9):.1f}%" for name, seconds in split.items())
    print(f"\nTime of the RL steps: {shares} of {total:.0f} s; the whole run took {whole_run:.0f} s.")


def finish(folder, metrics):
    """What a finished run leaves to look at."""
    skipped = sum(row["skipped_updates"] for row in metrics.rows)
    if skipped:
        print(f"{skipped:.0f} updates were skipped because loss or gradient was not finite.")
    try:
        if metrics.rows:
            show.curve([folder / "metrics.csv"], folder / "curve.png")
    except ImportError as missing:
        print(f"No curve.png: {missing}")
    print(f"Policy, metrics.csv and config.json are in {folder}/ (load the policy with --model {folder}/checkpoint).")


# ---------------------------------------------------------------------------------- evaluation alone

def evaluate_only(run, cfg, device):
    """Benchmarks (greedy), or held-out rows (sampled), for --model, the run --name, or the embedded policy."""
    path = ""
    if run.name and not run.model:
        path = Path(run.output_dir) / run.name
        if not (path / "config.json").is_file():
            raise ValueError(f"no run {run.name} in {run.output_dir}: --eval-only --name RUN evaluates that run's policy (or give a --model)")
        path = whole(path)
    if run.benchmarks:
        run_benchmarks(path, run, cfg, device)
        return
    _, test = load_data(run, cfg)
    learner = load_policy(run, cfg, device, path)
    check_prompts("held-out", test, learner, cfg)
    print(show.evaluation(measure(learner, test, run, cfg, "evaluating")))


def run_benchmarks(path, run, cfg, device):
    benchmarks.expand(run.benchmarks)  # refuses unknown names before the model is loaded
    if run.compare:
        benchmarks.load_results(run.compare)
    of_model = Path(run.model).parent if Path(run.model).name == runs.NEWEST else Path(run.model)
    name = run.name or "eval-" + (of_model.name if run.model else f"embedded-seed{cfg.seed}")
    with runs.RunFolder(run.output_dir, name, marks=("config.json", "benchmarks.jsonl")) as folder:
        learner = load_policy(run, cfg, device, path)
        limit = getattr(learner.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

        def generate(requests):
            folder.worth = True
            rows = [{"messages": messages, "tools": offered} for messages, offered in requests]
            fits = [len(learner.chat.prompt(row)[0]) + cfg.max_completion_tokens <= limit for row in rows]
            batch = rest.rollout(learner.engine, learner.chat, [row for row, fit in zip(rows, fits) if fit], cfg, group=1, greedy=True)
            texts = iter(batch.texts)
            return [(next(texts) or [""])[0] if fit else None for fit in fits]
        header = {"weights": fingerprint(learner.model), "model": run.model or str(path) or f"embedded, seed {cfg.seed}", "dtype": run.dtype,
                  "max_completion_tokens": cfg.max_completion_tokens, "instructions": learner.chat.instructions}
        results = benchmarks.evaluate_benchmarks(run.benchmarks, generate, folder.path, run.limit or None, header, run.api_bank_dir, run.eval_batch)
        print(benchmarks.table(results, run.compare or None))
        print(f"Raw outputs and scores: {folder}/benchmarks.jsonl")


def fingerprint(model):
    """A few of each tensor's weights, hashed: tells policies apart that have one name."""
    some = (p.detach().flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(b"".join(some)).hexdigest()[:12]


def main(argv=None):
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with runs.Interrupt() as interrupt:
            run, cfg, given = read_options(argv)
            device = pick_device(run.device)
            check(run, cfg, given, device)
            if run.eval_only:
                evaluate_only(run, cfg, device)
            else:
                train(run, cfg, device, interrupt)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; what was saved before is kept, the rest is lost")


if __name__ == "__main__":
    main()
