"""Train a tool-calling policy with ResT: `python train_small.py`. Without arguments it needs no download: it makes a 1M-parameter policy, warm-starts
it on imperfect demonstrations, and reinforces it on executable toy tools. `--help` lists every knob; README.md has examples."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as hf_logging

import rest
from toy_tools import policy, show, tasks
from toy_tools.data import load_rows

INSTRUCTIONS = (
    "First think inside <think> and </think>. Then either call tools, one JSON object per line inside <tool_call> and </tool_call>, "
    "or, where no tool fits or nothing is left to call, answer inside <response> and </response>.")


@dataclass
class Run:
    """What to run; the algorithm's own knobs are in rest.Config."""

    name: str = field(default="", metadata={"help": "Folder under --output-dir; empty: METHOD-seedS, numbered if taken."})
    output_dir: str = field(default="runs", metadata={"help": "Where runs are kept: metrics, config, policy."})
    model: str = field(default="", metadata={"help": "Hub id, folder or .gguf file of a chat model; empty: the embedded 1M policy."})
    data: str = field(default="", metadata={"help": "Training rows: .jsonl, ToolRL .parquet/.json, or a hub id; empty: toy tasks."})
    eval_data: str = field(default="", metadata={"help": "Held-out rows, in the same forms; empty: toy tasks."})
    device: str = field(default="", metadata={"help": "cuda, mps or cpu; empty: the first of these that is there."})
    dtype: str = field(default="float32", metadata={"help": "Weights in float32 (with bf16 autocast on GPUs that have it) or bfloat16, which rounds small updates away."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less activation memory, about a third more time."})
    warm_start_steps: int = field(default=-1, metadata={"help": "Supervised steps before RL; -1: as many as the embedded policy needs, none for a --model."})
    warm_start_batch: int = field(default=8, metadata={"help": "Rows per supervised step of a --model."})
    micro_batch: int = field(default=2, metadata={"help": "Rows per forward in a --model's supervised steps."})
    warm_start_lr: float = field(default=2e-4, metadata={"help": "Learning rate of a --model's supervised steps."})
    noise: float = field(default=0.22, metadata={"help": "Rate of each kind of mistake in the toy demonstrations."})
    train_rows: int = field(default=4000, metadata={"help": "Toy tasks to train on."})
    eval_rows: int = field(default=200, metadata={"help": "Held-out toy tasks (at most so many rows of --eval-data) to evaluate on, before and after."})
    eval_samples: int = field(default=2, metadata={"help": "Completions sampled per held-out task."})
    eval_batch: int = field(default=64, metadata={"help": "Prompts evaluated at once."})
    mask_names: bool = field(default=False, metadata={"help": "Random strings for tool and parameter names, so that descriptions must be read."})
    save_steps: int = field(default=50, metadata={"help": "Checkpoint every so many steps; 0: only at the end."})
    resume: bool = field(default=False, metadata={"help": "Continue the run --name from its last checkpoint."})
    eval_only: bool = field(default=False, metadata={"help": "No training: evaluate --model (or a run's policy)."})
    benchmarks: list[str] = field(default_factory=list, metadata={"help": "bfcl, bfcl-code, bfcl-live, bfcl-multi-turn, api-bank, or categories."})
    api_bank_dir: str = field(default="", metadata={"help": "Folder with level-{1,2,3}-api_processed.json."})
    limit: int = field(default=0, metadata={"help": "At most so many prompts per benchmark category (a fixed subset); 0: all."})
    compare: str = field(default="", metadata={"help": "benchmarks.jsonl of another run, for paired differences."})

    def __post_init__(self):
        for name in ("warm_start_batch", "micro_batch", "train_rows", "eval_samples", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_rows", "limit", "save_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        if not self.model and (self.dtype != "float32" or self.gradient_checkpointing):
            raise ValueError("--dtype and --gradient-checkpointing are for a --model: the embedded policy is small and float32")
        if not self.eval_only and (self.benchmarks or self.compare or self.limit):
            raise ValueError("--benchmarks, --compare and --limit evaluate a policy: they need --eval-only")
        if self.compare and not Path(self.compare).is_file():
            raise ValueError(f"no such file: {self.compare} (--compare takes the benchmarks.jsonl of another run)")


def fail(message):
    sys.exit(f"train_small.py: error: {message}")


def pick_device(name):
    """The device of that name, or the first of cuda, mps, cpu that works. Raises ValueError if a named one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = name.partition(":")
    if name and (not there.get(kind) or kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available here: use one of {', '.join(d for d, ok in there.items() if ok)}")
    return torch.device(name or next(d for d, ok in there.items() if ok))


def open_run(run, cfg):
    """Path of the run's folder: a new one, or with --resume the old one. Never one that would be written over."""
    base = Path(run.output_dir)
    folder = base / (run.name or f"{cfg.method}-seed{cfg.seed}")
    last, old = folder / "checkpoint", folder / "checkpoint.old"
    if old.exists() and not last.exists():  # killed between the two moves of `save`
        old.rename(last)
    if run.resume:
        if not (last / "trainer.pt").exists():
            raise ValueError(f"nothing to resume in {folder}: no checkpoint there (name the run with --name)")
        return folder
    if folder.exists() and run.name:
        there = "continue it with --resume" if last.exists() else "it holds no checkpoint to resume, so delete it"
        raise ValueError(f"{folder} exists: {there}, or choose another --name")
    parent = next(path for path in (base, *base.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write to {parent}: choose another --output-dir")
    number = 2
    while folder.exists():
        folder, number = base / f"{cfg.method}-seed{cfg.seed}-{number}", number + 1
    return folder


def write_json(path, value):
    """Written beside and then moved, so that an interruption leaves no half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


class Log:
    """metrics.jsonl, appended line by line; metrics.csv is made from it at every checkpoint and at the end."""

    def __init__(self, folder, keep_steps):
        self.file, self.csv = folder / "metrics.jsonl", folder / "metrics.csv"
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        self.rows = [row for row in map(json.loads, lines) if row["step"] < keep_steps]  # a resumed run drops what it will redo
        self.file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row):
        self.rows.append(row)
        with open(self.file, "a") as out:
            out.write(json.dumps(row) + "\n")

    def write_csv(self):
        if self.rows:
            with open(self.csv, "w", newline="") as out:
                writer = csv.DictWriter(out, fieldnames=list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)


def save(folder, model, tokenizer, optimizer, step):
    """Checkpoint in folder/checkpoint, made beside it and then moved, so that an interruption leaves the old or the new one."""
    part, final, old = folder / "checkpoint.part", folder / "checkpoint", folder / "checkpoint.old"
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    torch.save({"optimizer": optimizer.state_dict(), "step": step}, part / "trainer.pt")
    if final.exists():
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def batch_rows(rows, cfg, step):
    """The rows of a step, a function of (seed, step) alone, so that a resumed run draws what the uninterrupted one would have drawn."""
    per_epoch = len(rows) // cfg.prompts
    order = random.Random(f"{cfg.seed}-{step // per_epoch}").sample(range(len(rows)), len(rows))
    start = step % per_epoch * cfg.prompts
    return [rows[i] for i in order[start:start + cfg.prompts]]


def load(run, cfg, device, checkpoint=None):
    """(model, tokenizer, instructions): a checkpoint, --model, or the embedded policy after its warm start."""
    if checkpoint or run.model:
        model, tokenizer = policy.load_model(checkpoint or run.model, getattr(torch, run.dtype), run.gradient_checkpointing)
    else:
        steps = run.warm_start_steps if run.warm_start_steps >= 0 else policy.WARM_START_STEPS
        model, tokenizer = policy.tiny_policy(cfg.seed, steps, noise=run.noise, mask_names=run.mask_names, device=device)
    # the embedded policy learns the format from its demonstrations, a real model is told
    return model.to(device), tokenizer, "" if tokenizer.chat_template == policy.CHAT_TEMPLATE else INSTRUCTIONS


def single_steps(rows, cfg):
    """SWiRL: a dialogue of K steps as K single-step rows, unless episodes are rolled out live."""
    if cfg.max_turns > 1:
        return rows
    return [step for row in rows for step in (tasks.decompose(row) if len(row["gold"]) > 1 else [row])]


def measure(model, tokenizer, test, run, cfg, instructions, what):
    with tqdm(total=len(test), desc=what, unit="row", leave=False) as bar:
        return rest.evaluate(model, tokenizer, test, cfg, samples=run.eval_samples, seed=10**6, batch_rows=run.eval_batch,
                             toolbox_for=tasks.toolbox_for, instructions=instructions, on_batch=bar.update)


def train(run, cfg, device):
    folder = open_run(run, cfg)
    if run.resume:
        old = json.loads((folder / "config.json").read_text())
        changed = [k for k, v in asdict(cfg).items() if old["config"].get(k) != v]
        changed += [k for k in ("model", "data", "eval_data", "mask_names", "train_rows", "eval_rows", "eval_samples", "dtype") if old["run"].get(k) != getattr(run, k)]
        if changed:
            raise ValueError(f"--resume with other settings than the run began with ({', '.join(changed)}): give the same ones")
    began = time.perf_counter()
    set_seed(cfg.seed)
    if cfg.max_turns > 1 and (run.data or run.eval_data):
        raise ValueError("--max-turns above 1 needs tools that run: it works on the toy tasks; --data and --eval-data are taken step by step")

    def toy(count, split):
        return single_steps(tasks.make_rows(count, split, seed=cfg.seed, mask_names=run.mask_names), cfg)
    rows = load_rows(run.data) if run.data else toy(run.train_rows, "train")
    test = load_rows(run.eval_data, "test")[:run.eval_rows] if run.eval_data else toy(run.eval_rows, "test")
    if len(rows) < cfg.prompts:
        raise ValueError(f"{len(rows)} training rows are fewer than the {cfg.prompts} prompts of a step: lower --prompts")
    model, tokenizer, instructions = load(run, cfg, device, folder / "checkpoint" if run.resume else None)
    if instructions and cfg.steps and cfg.learning_rate == rest.Config.learning_rate:
        raise ValueError(f"--learning-rate {cfg.learning_rate} is the default of the embedded policy and would wreck a pretrained model: set it, to about 1e-6")
    warm = run.model and not run.resume and run.warm_start_steps > 0
    if warm:
        rng = random.Random(cfg.seed)
        bare = sum("target" not in row and "demo" not in row for row in rows)
        if bare:
            raise ValueError(f"--warm-start-steps needs demonstrations, but {bare} rows of {run.data} have neither \"demo\" nor \"target\"")
        noise = 0.0 if run.data else run.noise  # one's own demonstrations are imitated as they are
        pairs = [(row, row.get("target") or policy.noisy_demonstration(row, rng, noise)) for row in rows]
        policy.warm_start(model, tokenizer, pairs, run.warm_start_steps, run.warm_start_batch, run.warm_start_lr, cfg.seed,
                          micro_batch=run.micro_batch, instructions=instructions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=device.type != "mps")
    first = 0
    if not run.resume:  # made only now, so that a wrong path or option leaves no folder behind
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"config": asdict(cfg), "run": asdict(run), "torch": torch.__version__})
        if warm:
            save(folder, model, tokenizer, optimizer, 0)
    else:
        state = torch.load(folder / "checkpoint" / "trainer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log, ready = Log(folder, first), time.perf_counter()
    size = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {cfg.method} on {device}, {size / 1e6:.2f}M parameters, {len(rows)} training rows, steps {first} to {cfg.steps}")

    before_file = folder / "before.json"
    if test and before_file.exists():
        before = json.loads(before_file.read_text())
    elif test:
        before = measure(model, tokenizer, test, run, cfg, instructions, "evaluating the start")
        write_json(before_file, before)
    split, mark = {"rollout": 0.0, "reward": 0.0, "update": 0.0}, time.perf_counter()
    started = mark

    def clock(name):
        nonlocal mark
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if name:
            split[name] += now - mark
        mark = now
    seen, stop = None, []

    def interrupt(*_):  # the first Ctrl-C lets the step finish, so that what is saved is a whole step; the second stops at once
        if stop:
            raise KeyboardInterrupt
        stop.append(True)
        tqdm.write("finishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)
    before_interrupt = signal.signal(signal.SIGINT, interrupt)
    try:
        with tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=cfg.method, unit="step") as bar:
            for step in bar:
                clock(None)
                metrics, *seen = rest.train_step(model, tokenizer, optimizer, batch_rows(rows, cfg, step), cfg, step,
                                                 tasks.toolbox_for, instructions, clock)
                log.add(metrics)
                bar.set_postfix_str(f"reward {metrics['reward']:+.2f} exact {metrics['exact']:.2f} H fmt {metrics['H_format']:.2f} name "
                                    f"{metrics['H_name']:.2f} par {metrics['H_params']:.2f} tht {metrics['H_thought']:.2f}")
                if stop or (run.save_steps and (step + 1) % run.save_steps == 0):
                    save(folder, model, tokenizer, optimizer, step + 1)
                    log.write_csv()
                if stop:
                    fail(f"interrupted after {step + 1} steps; saved. Continue with the same options and --resume --name {folder.name}")
    except torch.OutOfMemoryError as error:
        fail(f"out of memory in step {step}: lower --micro-batch-tokens (update), or --prompts, --group or --max-completion-tokens (rollout); metrics "
             f"and the last checkpoint, if any, are in {folder} ({error})")
    except Exception as error:  # not the user's input any more: show where
        raise RuntimeError(f"step {step} failed; metrics and the last checkpoint, if any, are in {folder}") from error
    finally:
        signal.signal(signal.SIGINT, before_interrupt)
    total = max(time.perf_counter() - started, 1e-9)
    if first < cfg.steps or not (folder / "checkpoint").exists():
        save(folder, model, tokenizer, optimizer, cfg.steps)
    log.write_csv()
    if test and cfg.steps > 0:
        after = measure(model, tokenizer, test, run, cfg, instructions, "evaluating the end")
        write_json(folder / "after.json", after)
        print(f"\nHeld-out rows, {run.eval_samples} samples each at temperature {cfg.temperature}:\n{show.evaluation(before, after)}")
    if seen:
        batch, region, weight = seen
        best = max(range(len(batch.texts)), key=lambda i: len(set(region[i].tolist())))
        print(f"\nAn episode of the last step, by region, with token weights:\n{show.episode(tokenizer, batch, best, region, weight, sys.stdout.isatty())}")
        other = total - sum(split.values())
        write_json(folder / "time.json", {"start": ready - began, **split, "other": other, "steps": total, "run": time.perf_counter() - began})
        print("\nTime of the RL steps: " + ", ".join(f"{name} {100 * s / total:.1f}%" for name, s in (*split.items(), ("other", other)))
              + f" of {total:.0f} s; the whole run took {time.perf_counter() - began:.0f} s.")
    skipped = sum(row["skipped_updates"] for row in log.rows)
    if skipped:
        print(f"{skipped:.0f} updates were skipped because loss or gradient was not finite.")
    try:
        if log.rows:
            show.curve([folder / "metrics.csv"], folder / "curve.png")
    except ImportError as missing:
        print(f"No curve.png: {missing}")
    print(f"Policy, metrics.csv and config.json are in {folder}/ (load the policy with --model {folder}/checkpoint).")


def evaluate_only(run, cfg, device):
    """Benchmarks (greedy), or without --benchmarks the held-out toy tasks (sampled), for --model or the embedded policy."""
    from toy_tools import benchmarks
    benchmarks.expand(run.benchmarks)  # refuses unknown names before the model is loaded
    model, tokenizer, instructions = load(run, cfg, device)
    if not run.benchmarks:
        test = single_steps(tasks.make_rows(run.eval_rows, "test", seed=cfg.seed, mask_names=run.mask_names), cfg)
        print(show.evaluation(measure(model, tokenizer, test, run, cfg, instructions, "evaluating")))
        return

    def generate(requests):
        rows = [{"messages": messages, "tools": offered} for messages, offered in requests]
        batch = rest.rollout(model, tokenizer, rows, cfg, group=1, greedy=True, instructions=instructions)
        return [texts[0] if texts else "" for texts in batch.texts]
    path = Path(run.model)
    name = run.name or "eval-" + ((path.parent if path.name == "checkpoint" else path).name if run.model else f"embedded-seed{cfg.seed}")
    folder = Path(run.output_dir) / name
    weights = hashlib.sha256(b"".join(p.detach().flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]
    header = {"weights": weights, "model": run.model or f"embedded, seed {cfg.seed}", "dtype": run.dtype, "max_completion_tokens": cfg.max_completion_tokens,
              "instructions": instructions}
    results = benchmarks.evaluate_benchmarks(run.benchmarks, generate, folder, run.limit or None, header, run.api_bank_dir, run.eval_batch)
    print(benchmarks.table(results, run.compare or None))
    print(f"Raw outputs and scores: {folder}/benchmarks.jsonl")


def main(argv=None):
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    parser = HfArgumentParser((Run, rest.Config), description=__doc__)
    try:
        run, cfg = parser.parse_args_into_dataclasses(argv)
        device = pick_device(run.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are made on the current device
        (evaluate_only if run.eval_only else train)(run, cfg, device)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; what was saved before is kept, the rest is lost")


if __name__ == "__main__":
    main()
