"""Train a tool-calling policy with ResT: `python train_small.py`. Without arguments it needs no download: it
makes a 1M-parameter policy, warm-starts it on imperfect demonstrations, and reinforces it on executable
toy tools. `--help` lists every option; README.md has examples.

`train` names the stages of a run, in order; each is a function below."""

import hashlib
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging as hf_logging

import rest
from toy_tools import benchmarks, explain, fast, policy, report, runs, show, tasks
from toy_tools.chat import INSTRUCTIONS, TemplateChat
from toy_tools.data import load_rows
from toy_tools.options import FREE, check, flag, read_options, supervised

# ------------------------------------------------------------------------------ the stages of a run

@dataclass
class Learner:
    """The policy and what the algorithm speaks to."""

    model: torch.nn.Module
    chat: rest.Chat
    engine: rest.Engine
    optimizer: torch.optim.Optimizer = None


def fail(message):
    sys.exit(f"train_small.py: error: {message}")


def warn(sentences):
    for sentence in sentences:
        print(f"train_small.py: {sentence}", file=sys.stderr)


def pick_device(name):
    """The device of that name, or the first that is there. Raises ValueError if a named one is not."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cuda", *there] if there else []
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    if name and name not in there:
        raise ValueError(f"device {name!r} is not available here: use one of {', '.join(there)}")
    device = torch.device(name or there[0])
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current device
    return device


def load_data(run, cfg):
    """(training rows, held-out rows); the first are empty under --eval-only."""
    if cfg.max_turns > 1 and (run.data or run.eval_data):
        raise ValueError("--max-turns above 1 needs tools that run: it works on the toy tasks, "
                         "and --data and --eval-data are taken step by step")
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
        raise ValueError(f"{len(rows)} training rows are fewer than the {cfg.prompts} prompts of a step: "
                         "lower --prompts")
    bare = sum("target" not in row and "demo" not in row for row in rows)
    if supervised(run) and bare:
        raise ValueError(f"--warm-start-steps needs demonstrations, but {bare} rows of {run.data} have "
                         'neither "demo" nor "target"')
    return rows, test


def toy_rows(count, split, run, cfg):
    """Toy tasks; a dialogue of K steps as K single-step rows (SWiRL), unless episodes are rolled out live."""
    rows = tasks.make_rows(count, split, seed=cfg.seed, mask_names=run.mask_names)
    return rows if cfg.max_turns > 1 else [step for row in rows for step in tasks.decompose(row)]


def load_policy(run, cfg, device, path=""):
    """The policy in `path`, or --model, or the embedded one after its warm start."""
    path = path or run.model and whole(run.model)
    if path:
        dtype = getattr(torch, run.dtype)
        lora = {"lora_rank": run.lora_rank} if run.lora_rank else {}
        model, tokenizer = policy.load_model(path, dtype, run.gradient_checkpointing, **lora)
    else:
        model, tokenizer = embedded_policy(run, cfg, device)
    if not finite(model):
        raise ValueError(f"the weights of {path or 'the embedded policy'} are not finite: it cannot be used")
    # the embedded policy learns the format from its demonstrations, a real model is told
    instructions = "" if tokenizer.chat_template == policy.CHAT_TEMPLATE else INSTRUCTIONS
    default = cfg.learning_rate == rest.Config.learning_rate
    if instructions and default and cfg.steps and not (run.eval_only or run.explain):
        raise ValueError(f"--learning-rate {cfg.learning_rate} is the default of the embedded policy and "
                         "would wreck a pretrained model: set it, to about 1e-6")
    model.to(device)
    engine = fast.engine(model, run.shared_prefix, run.cuda_graph, run.compile_decode)
    return Learner(model, TemplateChat(tokenizer, instructions, model), engine)


def embedded_policy(run, cfg, device):
    """(model, tokenizer): the start that comes with the repository where it is the one that is asked for."""
    options = {"noise": run.noise, "mask_names": run.mask_names}
    if run.warm_start_steps < 0 and policy.is_shipped(seed=cfg.seed, **options):
        folder = policy.START.relative_to(Path(__file__).parent)
        print(f"The warm-started policy comes with the repository ({folder}); "
              "--warm-start-steps N trains one.")
        return policy.read_start()
    steps = run.warm_start_steps if run.warm_start_steps >= 0 else policy.WARM_START_STEPS
    return policy.tiny_policy(cfg.seed, steps, **options, device=device)


def whole(path):
    """`path`, and for a run's folder that of its newest whole checkpoint."""
    if (Path(path) / runs.MANIFEST).is_file():
        runs.verify(Path(path))
    if any((Path(path) / name / runs.MANIFEST).is_file() for name in (runs.NEWEST, runs.PREVIOUS)):
        return newest(path)
    return path


def newest(folder):
    found, _, problems = runs.find_checkpoint(folder)
    if problems:
        warn([*problems, f"using {found} instead"])
    return found


def finite(model):
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def context_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_prompts(what, source, rows, learner, cfg):
    """Raises ValueError naming the first row that is no prompt, or that leaves no room for its completion.

    source: the file they are from. Toy tasks are alike, so that of those the longest are enough."""
    limit = context_length(learner.model)
    vocabulary = learner.model.get_input_embeddings().weight.shape[0]
    out_of_reach = []
    numbered = list(enumerate(rows, 1))
    if not source:
        numbered = sorted(numbered, key=lambda pair: len(repr(pair[1])))[-50:]
    for number, row in numbered:
        where = f"row {number} of {source or 'the toy tasks'} ({what})"
        try:
            prompt, opening = learner.chat.prompt(row)
        except Exception as error:  # whatever the chat template raises
            raise ValueError(f"{where} cannot be written as a prompt: {error!r}") from error
        length = len(prompt)
        if len(opening) >= cfg.max_completion_tokens:
            raise ValueError(
                f"the chat template writes the first {len(opening)} tokens of a completion itself: "
                f"--max-completion-tokens {cfg.max_completion_tokens} leaves none to sample")
        largest = max(prompt + opening, default=0)
        if largest >= vocabulary:
            raise ValueError(
                f"{where} has the token {learner.chat.decode([largest])!r} of id {largest}, but the model's "
                f"vocabulary ends at {vocabulary}: model.resize_token_embeddings(len(tokenizer)), then save "
                "the model")
        if length + cfg.max_completion_tokens > limit:
            raise ValueError(
                f"{where} does not fit: its prompt has {length} tokens, with --max-completion-tokens "
                f"{cfg.max_completion_tokens} that is more than the model's context of {limit}")
        out_of_reach += [number] * any(turn != spoken(turn, learner.chat) for turn in row["gold"])
    if out_of_reach:
        warn([f"the tokenizer cannot write the gold calls of {len(out_of_reach)} {what} rows as they stand, "
              f"that of row {out_of_reach[0]} first (another Unicode form, say): none of their completions "
              "can be exact"])


def spoken(turn, chat):
    """The gold calls of a turn as they are read from a completion's tokens."""
    text = chat.decode(chat.encode(tasks.completion_text(turn, "")))
    return [vars(call) for call in rest.parse_calls(text) if isinstance(call, rest.Call)]


def train(run, cfg, device, interrupt):
    began = time.perf_counter()
    set_seed(cfg.seed)
    with runs.claim(run.output_dir, run.name, f"{cfg.method}-seed{cfg.seed}", run.resume) as folder:
        rows, test = load_data(run, cfg)
        if not folder.new:
            check_same_run(folder, run, cfg, rows, test)
        learner, first = (None, 0) if folder.new else reopen(folder, run, cfg, device)
        if learner is None:
            learner = load_policy(run, cfg, device)
            check_prompts("training", run.data, rows, learner, cfg)
            check_prompts("held-out", run.eval_data, test, learner, cfg)
            if supervised(run):
                demonstrate(learner, rows, run, cfg)
            begin(folder, learner, rows, test, run, cfg)
        metrics = runs.Metrics(folder, first)
        warn(metrics.problems)
        size = sum(p.numel() for p in learner.model.parameters())
        print(f"{folder}: {cfg.method} on {device}, {size / 1e6:.2f}M parameters, {len(rows)} training rows, "
              f"steps {first} to {cfg.steps}")
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


def check_same_run(folder, run, cfg, rows, test):
    """Raises ValueError if a resumed run has other options or rows than it began with; it may be longer."""
    file = folder / "config.json"
    old = runs.read_json(file)
    try:
        begun = old["run"] | old["config"]
        steps = int(begun["steps"])
        old["lengths"].copy()
        same_rows = old["rows"] == digest(rows, test)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: it does not hold the options of a run ({error!r})") from error
    now = asdict(run) | asdict(cfg)
    changed = [flag(name) for name in now if name not in FREE and begun.get(name, now[name]) != now[name]]
    if changed:
        raise ValueError(f"--resume with other settings than the run began with ({', '.join(changed)}): "
                         "give the same ones")
    if not same_rows:
        sources = f"{run.data or 'the toy tasks'} or {run.eval_data or 'the held-out toy tasks'}"
        raise ValueError(f"--resume with other rows than the run began with: {sources} changed since")
    if cfg.steps < steps:
        raise ValueError(f"--resume with --steps {cfg.steps}, but the run has {steps}: "
                         "it can only become longer")


def reopen(folder, run, cfg, device):
    """(Learner, finished steps) of the newest whole checkpoint; (None, 0) if not even the start was saved."""
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
            raise ValueError(f"{folder} has metrics but no checkpoint: choose another --name") from None
        return None, 0
    if problems:
        warn([*problems, f"going on from the checkpoint before, after {first} steps"])
    keep_late(folder, run, first)
    prolong(folder, cfg, first)
    return learner, first


def keep_late(folder, run, first):
    """--keep-steps of a resumed run may name its present step, or what was kept already."""
    for step in run.keep_steps:
        if step == first:
            folder.keep(step)
        elif step < first and not runs.kept_at(folder, step).exists():
            raise ValueError(f"--keep-steps {step} comes too late: {folder} has finished {first} steps")


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
    print(f"{folder}: prolonged from {steps} to {cfg.steps} steps; learning rate, curriculum and reward "
          f"scaling follow the new length from step {first} on")


def make_optimizer(model, cfg):
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = trained[0].device.type != "mps"
    return torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=fused)


def demonstrate(learner, rows, run, cfg):
    """Supervised steps of a --model on the rows' demonstrations."""
    rng = random.Random(cfg.seed)
    noise = 0.0 if run.data else run.noise  # one's own demonstrations are imitated as they are
    pairs = [(row, row.get("target") or policy.noisy_demonstration(row, rng, noise)) for row in rows]
    if run.data:
        check_demonstrations(pairs, run.data, learner)
    else:  # a tag that the template itself writes cannot be left out
        _, opening = learner.chat.prompt(rows[0])
        tag = learner.chat.decode(opening).strip()
        pairs = [(row, text) for row, text in pairs if text.startswith(tag)]
    policy.warm_start(learner.model, learner.chat.tokenizer, pairs, run.warm_start_steps,
                      run.warm_start_batch, run.warm_start_lr, cfg.seed, run.micro_batch,
                      learner.chat.instructions)


def check_demonstrations(pairs, source, learner):
    """Says how many of a file's demonstrations the reward does not take for exact. Raises ValueError naming
    the first that cannot be imitated."""
    limit = context_length(learner.model)
    wrong = []
    for number, (row, text) in enumerate(pairs, 1):
        where = f"the demonstration of row {number} of {source}"
        try:
            given, learnt = learner.chat.target(row, text)
        except ValueError as error:
            raise ValueError(f"{where} cannot be imitated: {error}") from error
        if len(given) + len(learnt) > limit:
            raise ValueError(
                f"{where} does not fit: with its prompt it has {len(given) + len(learnt)} tokens, more than "
                f"the model's context of {limit}")
        form, correct, exact = rest.score_texts([text], row)
        if not exact:
            correct = "none" if correct is None else f"{correct:.2f}"
            wrong.append(f"row {number} (format {form:.0f}, correctness {correct})")
    if wrong:
        warn([f"{len(wrong)} of the {len(pairs)} demonstrations in {source} are not what the reward wants, "
              f"{wrong[0]} is the first; they are imitated as they are"])


def digest(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def begin(folder, learner, rows, test, run, cfg):
    """The options, and the start as the checkpoint of step 0: from here on the run can be resumed."""
    learner.optimizer = make_optimizer(learner.model, cfg)
    options = {"config": asdict(cfg), "run": asdict(run), "torch": torch.__version__}
    options["rows"] = digest(rows, test)
    options["instructions"] = learner.chat.instructions
    options["lengths"] = [[0, cfg.steps]]  # from which step on the run had how many
    runs.write_json(folder / "config.json", options)
    save(folder, learner, 0, run)
    # a run that fails in its first step leaves no folder, unless supervised steps would be lost
    folder.worth = supervised(run) or not cfg.steps


def save(folder, learner, step, run):
    def write(path):
        learner.model.save_pretrained(path)
        learner.chat.tokenizer.save_pretrained(path)
        torch.save({"optimizer": learner.optimizer.state_dict(), "step": step}, path / "trainer.pt")
    try:
        folder.save(write, step, keep=step in run.keep_steps)
    except Exception as error:  # a full disk has several names
        raise OSError(f"the checkpoint after {step} steps could not be written to {folder} ({error}); "
                      "what was saved before is kept") from error


def measure(learner, test, run, cfg, what):
    # all runs are evaluated by the same draws; an evaluation alone has a seed of its own
    seed = 10**6 * (1 + cfg.seed if run.eval_only else 1)
    with tqdm(total=len(test), desc=what, unit="row", leave=False) as bar:
        return rest.evaluate(learner.engine, learner.chat, test, cfg, samples=run.eval_samples, seed=seed,
                             batch_rows=run.eval_batch, toolbox_for=tasks.toolbox_for, on_batch=bar.update)


def evaluate_start(folder, learner, test, run, cfg):
    if not test:
        return None
    if not (folder / "before.json").exists():
        runs.write_json(folder / "before.json", measure(learner, test, run, cfg, "evaluating the start"))
    return runs.read_json(folder / "before.json")


def batch_rows(rows, cfg, step):
    """The rows of a step: a function of (seed, step), so that a resumed run draws what it would have."""
    per_epoch = len(rows) // cfg.prompts
    order = random.Random(f"{cfg.seed}-{step // per_epoch}").sample(range(len(rows)), len(rows))
    start = step % per_epoch * cfg.prompts
    return [rows[i] for i in order[start:start + cfg.prompts]]


def loop(folder, learner, rows, run, cfg, first, metrics, clock, interrupt):
    """Steps first to cfg.steps, each logged, some saved. Returns (batch, weight) of the last, or None."""
    last = None
    saved = first
    recorder = report.Recorder(folder.path)
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=cfg.method, unit="step")
    with bar, interrupt.deferred():
        for step in bar:
            clock()
            try:
                row, batch, weight = one_step(folder, learner, batch_rows(rows, cfg, step), cfg, step, clock)
            except FloatingPointError:  # in the rollout
                stop_not_finite(folder, step, saved == step)
            if not finite(learner.model):
                stop_not_finite(folder, step, False)
            metrics.add(row)
            progress_line(bar, row)
            recorder.record(step, batch, weight, cfg, learner.chat)
            if run.show_every and (step + 1) % run.show_every == 0:
                tqdm.write(f"\nstep {step}: {episode_of(learner, batch, weight)}\n")
            last = batch, weight
            folder.worth = True
            done = step + 1
            due = run.save_steps and done % run.save_steps == 0
            if due or done in run.keep_steps or done == cfg.steps or interrupt.requested:
                metrics.sync()
                save(folder, learner, done, run)
                saved = done
            if interrupt.requested:
                write_report(folder)
                fail(f"interrupted after {done} steps; saved. Continue with the same options and "
                     f"--resume --name {folder.path.name}")
    return last


def one_step(folder, learner, rows, cfg, step, clock):
    kept = f"; what was saved is in {folder}" if folder.worth else ""
    try:
        return rest.train_step(learner.engine, learner.chat, learner.optimizer, rows, cfg, step,
                               tasks.toolbox_for, clock)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory in step {step}: lower --micro-batch-tokens (update), or --prompts, --group or "
             f"--max-completion-tokens (rollout){kept} ({error})")
    except FloatingPointError:
        raise
    except Exception as error:  # not the user's input any more: show where
        raise RuntimeError(f"step {step} failed{kept}") from error


def stop_not_finite(folder, step, newest_too):
    """Ends a run whose policy is NaN or infinite. newest_too: it was saved like that, so that the checkpoint
    before takes its place."""
    if newest_too and not folder.fall_back():
        raise ValueError("the policy's logits are not finite from the start: "
                         "try --dtype float32, or another --model")
    good = runs.steps_of(folder / runs.NEWEST)
    fail(f"the policy is no longer finite in step {step}: its weights have diverged. The last good "
         f"checkpoint, after {good} steps, is {folder / runs.NEWEST}: begin a new run from it by --model, "
         "with a lower --learning-rate")


def progress_line(bar, row):
    """What is seen of a step while the run goes on."""
    short = {"format": "fmt", "name": "name", "params": "par", "thought": "tht"}
    entropies = " ".join(f"{label} {row['H_' + name]:.2f}" for name, label in short.items())
    bar.set_postfix_str(f"reward {row['reward']:+.2f} exact {row['exact']:.2f} H {entropies}")


def evaluate_end(folder, learner, test, run, cfg, before, trained):
    if not test:
        return
    file = folder / "after.json"
    if trained or not file.exists():
        try:
            runs.write_json(file, measure(learner, test, run, cfg, "evaluating the end"))
        except FloatingPointError:
            stop_not_finite(folder, cfg.steps, True)
    table = show.evaluation(before, runs.read_json(file))
    print(f"\nHeld-out rows, {run.eval_samples} samples each at temperature {cfg.temperature}:\n{table}")


def episode_of(learner, batch, weight):
    """An episode of the batch with most regions, coloured on a terminal."""
    i = max(range(len(batch.texts)), key=lambda i: len(set(batch.region[i].tolist())))
    return show.episode(learner.chat, batch, i, weight, sys.stdout.isatty())


def show_step(learner, batch, weight):
    print("\nAn episode of the last step, by region, with token weights:")
    print(episode_of(learner, batch, weight))


def show_time(folder, clock, start, total, began):
    split = clock.seconds | {"other": total - sum(clock.seconds.values())}
    whole_run = time.perf_counter() - began
    runs.write_json(folder / "time.json", {"start": start, **split, "steps": total, "run": whole_run})
    shares = ", ".join(f"{name} {100 * seconds / max(total, 1e-9):.1f}%" for name, seconds in split.items())
    print(f"\nTime of the RL steps: {shares} of {total:.0f} s; the whole run took {whole_run:.0f} s.")


def finish(folder, metrics):
    """What a finished run leaves to look at."""
    metrics.sync()
    skipped = sum(row["skipped_updates"] for row in metrics.rows)
    if skipped:
        print(f"{skipped:.0f} updates were skipped because loss or gradient was not finite.")
    try:
        if metrics.rows:
            show.curve([folder / "metrics.csv"], folder / "curve.png")
    except (ImportError, ValueError) as missing:
        print(f"No curve.png: {missing}")
    write_report(folder)
    print(f"Look at {folder}/report.html. Policy, metrics.csv and config.json are beside it "
          f"(load the policy with --model {folder}).")


def write_report(folder):
    """The page; what it lacks, it says. A run is worth more than its page."""
    try:
        report.write([folder.path], folder / "report.html")
    except (ValueError, OSError) as error:
        warn([f"no report.html: {error}"])


def explain_sample(run, cfg, device):
    """One sample through the whole pipeline, in the terminal."""
    rows, _ = load_data(replace(run, eval_rows=0), replace(cfg, prompts=1))
    learner = load_policy(run, cfg, device)
    row = rows[cfg.seed % len(rows)]
    check_prompts("training", run.data, [row], learner, cfg)
    paint = show.paint if sys.stdout.isatty() else None
    print(explain.explain(learner.engine, learner.chat, row, cfg, paint))


# --------------------------------------------------------------------------------- evaluation alone

def evaluate_only(run, cfg, device):
    """Benchmarks (greedy) or held-out rows (sampled), for the run --name, --model, or the embedded policy."""
    path = ""
    if run.name and not run.model:
        path = Path(run.output_dir) / runs.plain_name(run.name)
        if not (path / "config.json").is_file():
            raise ValueError(f"no run {run.name} in {run.output_dir}: --eval-only --name RUN evaluates that "
                             "run's policy; or give a --model")
        path = newest(path)
    if run.benchmarks:
        run_benchmarks(path, run, cfg, device)
        return
    _, test = load_data(run, cfg)
    learner = load_policy(run, cfg, device, path)
    check_prompts("held-out", run.eval_data or run.data, test, learner, cfg)
    print(show.evaluation(measure(learner, test, run, cfg, "evaluating")))


def run_benchmarks(path, run, cfg, device):
    benchmarks.expand(run.benchmarks)  # refuses unknown names before the model is loaded
    if run.compare:
        benchmarks.load_results(run.compare)  # refused before the hours, not after
    of_model = Path(run.model).parent if Path(run.model).name == runs.NEWEST else Path(run.model)
    name = run.name or "eval-" + (of_model.name if run.model else f"embedded-seed{cfg.seed}")
    with runs.RunFolder(run.output_dir, name, marks=("config.json", "benchmarks.jsonl")) as folder:
        learner = load_policy(run, cfg, device, path)
        longest = context_length(learner.model) - cfg.max_completion_tokens

        def generate(requests):
            folder.worth = True
            rows = [{"messages": messages, "tools": offered} for messages, offered in requests]
            fits = [len(learner.chat.prompt(row)[0]) <= longest for row in rows]
            texts = iter(())
            if any(fits):
                fitting = [row for row, fit in zip(rows, fits) if fit]
                batch = rest.rollout(learner.engine, learner.chat, fitting, cfg, group=1, greedy=True)
                texts = iter(batch.texts)
            return [(next(texts) or [""])[0] if fit else None for fit in fits]
        header = {"weights": fingerprint(learner.model), "dtype": run.dtype,
                  "model": run.model or str(path) or f"embedded, seed {cfg.seed}",
                  "max_completion_tokens": cfg.max_completion_tokens,
                  "instructions": learner.chat.instructions}
        results = benchmarks.evaluate_benchmarks(run.benchmarks, generate, folder.path, run.limit or None,
                                                 header, run.api_bank_dir, run.eval_batch,
                                                 compare=run.compare or None)
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
            if run.explain:
                explain_sample(run, cfg, device)
            elif run.eval_only:
                evaluate_only(run, cfg, device)
            else:
                train(run, cfg, device, interrupt)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; what was saved before is kept, the rest is lost")


if __name__ == "__main__":
    main()
