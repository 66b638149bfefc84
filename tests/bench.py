"""Speed and memory of one ResT step against TRL's GRPOTrainer (optional part trl, transformers backend)
and plain `generate`:

    python tests/bench.py          # about 12 minutes on 2 cores
    python tests/bench.py --scaling --repeats 3 --no-memory --arms ours generate trl \\
        --out results/bench-scaling.csv
    python tests/bench.py --gpu    # on a GPU: GPU_PLANS, three model sizes in bfloat16

Writes results/bench.csv (with --gpu results/bench-gpu.csv) and prints a Markdown table.

Same work in all arms: same weights, dtype, prompt ids, batch, temperature and completion length (the
end token lies outside the model's vocabulary, so that every completion takes its full length), random
rewards that differ within every group, fused AdamW, and arms that take turns. Each arm is run once
before the clock starts. Shapes are PROMPTxCOMPLETIONxGROUPxPROMPTS in tokens, completions and prompts;
a trailing `r` makes completions end early, at the same ragged lengths in every arm (rollouts only).

  ours      rest.rollout, rest.WEIGHTS, rest.update, with each prompt shared by its group
  compiled  the same with the decoding step compiled by torch.compile (a minute before the clock starts)
  eager     the same without a CUDA graph (GPU only)
  plain     the same without sharing (--shared-prefix False): the model's own attention and cache
  generate  model.generate on the same prompts (rollout only)
  trl       GRPOTrainer, beta 0, the whole batch in one micro-batch (--trl-micro-batch for less)

Peak memory is that of two steps in a fresh process above what is held before them (model, imports,
trainer): resident memory on a CPU, torch.cuda.max_memory_allocated on a GPU.

The CSV also has `kl` of the first pass: how far the policy that sampled is from the policy that is
updated, by rounding alone.

Below the table: the rollout against the time it takes to read the weights and all keys and values once
per token at the read bandwidth measured in this run, and the update against this run's matmul rate (6
FLOPs per parameter and token, the output layer on completions only, attention left out).
"""

import argparse
import csv
import gc
import importlib.util
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor,
                          PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM,
                          TrainerCallback)

import rest
from toy_tools import fast
from toy_tools.policy import build_model, load_model

ARMS = ("ours", "compiled", "eager", "plain", "generate", "trl")
SHAPES = ["200x96x8x16", "700x80x8x8", "200x96x8x16r"]
GPU_PLANS = (  # of --gpu: size, shapes, arms, micro-batch tokens (ours), completions a micro-batch (TRL)
    ("1m", SHAPES, ARMS, 2**15, 0),
    ("135m", ["300x128x8x64"], ("ours", "compiled", "eager", "generate"), 2**15, 0),
    ("0.6b", ["300x128x8x16"], ("ours", "compiled", "trl"), 2**13, 32))
SCALING = [
    "200x96x2x8", "200x96x4x8", "200x96x8x8", "200x96x16x8",
    "100x96x8x8", "400x96x8x8", "800x96x8x8", "1600x96x8x8",
    "200x96x8x2", "200x96x8x4", "200x96x8x16", "200x96x8x32"]
FIELDS = ("size", "shape", "arm", "repeat", "rollout_s", "update_s", "step_s", "tokens", "kl", "peak_mib",
          "parameters", "device", "dtype", "threads")
LEARNING_RATE = 1e-5
MEAN_LENGTH = 0.4  # ragged completions end at a token with probability 1 / (MEAN_LENGTH * COMPLETION)


SIZES = {  # random weights in the shape of
    "1m": lambda: build_model(1024),  # the embedded policy
    "135m": lambda: LlamaForCausalLM(LlamaConfig(  # SmolLM2-135M
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)),
    "0.6b": lambda: Qwen3ForCausalLM(Qwen3Config(  # Qwen3-0.6B
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None))}


def parse_shape(text):
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(r?)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PROMPTxCOMPLETIONxGROUPxPROMPTS, such as 200x96x8x16 (trailing r: ragged)")
    return (*map(int, match.groups()[:4]), bool(match[5]))


class Setting:
    """What all arms of a shape share: model weights, a tokenizer that maps the word `w7` to id 7, prompts."""

    def __init__(self, shape, args):
        self.args = args
        self.prompt, self.length, self.group, self.prompts, self.ragged = parse_shape(shape)
        self.vocab = self.model().config.vocab_size
        draw = torch.Generator().manual_seed(1)
        # 0 pads, 1 ends ragged completions
        self.ids = torch.randint(2, self.vocab, (self.prompts, self.prompt), generator=draw)
        self.texts = [" ".join(f"w{i}" for i in row) for row in self.ids.tolist()]
        self.eos = 1 if self.ragged else self.vocab  # the id behind the last one cannot be sampled
        words = {{0: "<pad>", self.eos: "<eos>"}.get(i, f"w{i}"): i for i in range(self.vocab + 1)}
        words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
        self.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        self.tokens = self.prompts * self.group * self.length

    def model(self):
        dtype = getattr(torch, self.args.dtype)
        torch.manual_seed(0)
        if self.args.model:
            model, _ = load_model(self.args.model, dtype)
        else:
            model = SIZES[self.args.size]().to(dtype)
        model.generation_config = GenerationConfig(eos_token_id=getattr(self, "eos", None), pad_token_id=0)
        return model.to(self.args.device).eval()

    def check(self, prompts, completions):
        """All arms process the same prompt ids and as many completion tokens as the shape says."""
        if not (prompts == self.ids.tolist() and (self.ragged or sum(completions) == self.tokens)):
            raise RuntimeError("an arm processed other tokens than the shape says: "
                               f"{len(prompts)} prompts, {sum(completions)} tokens")


def clock(setting):
    if setting.args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class RaggedEnds(LogitsProcessor):
    """Ends `generate`'s row i at length[i], as our rollout of the same shape did, and nowhere else."""

    def __init__(self, setting, length):
        self.setting, self.length = setting, length

    def __call__(self, input_ids, scores):
        ends = self.length <= input_ids.shape[1] - self.setting.prompt + 1
        scores[:, self.setting.eos] = torch.where(ends, torch.inf, -torch.inf)
        return scores.masked_fill(ends[:, None] & scores.isfinite(), -torch.inf).nan_to_num(posinf=0.0)


def make_ours(setting, shared=True, graph=True, compiled=False):
    """step(repeat) -> {rollout_s, update_s, tokens} of rest.py."""
    model = setting.model()
    args = setting.args
    engine = fast.engine(model, shared, graph, compiled)
    chat = rest.Chat(setting.tokenizer)
    chat.end_ids = {setting.eos}
    asked = dict(vars(engine))  # of the graph and the compilation, given up where they fail
    torch.compiler.reset()  # it would not see the hook below on a model like one compiled before
    if setting.ragged:  # a constant chance of the end token, whatever the weights say
        chance = 1 / (MEAN_LENGTH * setting.length)
        odds = math.log(chance / (1 - chance))
        eos = torch.tensor(setting.eos, device=args.device)

        def end_sometimes(module, inputs, logits):
            # no tensor is made from a number here: a CUDA graph could not hold it
            others = logits.float().index_fill(-1, eos, -torch.inf)
            logits[..., setting.eos] = others.logsumexp(-1) + odds
            return logits
        model.get_output_embeddings().register_forward_hook(end_sometimes)
    budget = {"micro_batch_tokens": args.micro_batch_tokens} if args.micro_batch_tokens else {}
    cfg = rest.Config(prompts=setting.prompts, group=setting.group, max_completion_tokens=setting.length,
                      temperature=args.temperature, learning_rate=LEARNING_RATE, **budget)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows = [{"messages": [{"role": "user", "content": text}], "tools": []} for text in setting.texts]

    def step(repeat):
        start = clock(setting)
        batch = rest.rollout(engine, chat, rows, cfg, seed=repeat)
        middle = clock(setting)
        if any(getattr(engine, name, None) != asked.get(name) for name in ("graph", "compiled")):
            raise RuntimeError("the decoding step could not be captured or compiled (see the warning above): "
                               "leave this arm out by --arms")
        setting.check(batch.prompts, batch.length.tolist())
        setting.lengths = batch.length.to(setting.args.device)
        if setting.ragged:
            return {"rollout_s": middle - start, "tokens": int(batch.length.sum())}
        draw = torch.Generator().manual_seed(repeat)
        rewards = torch.rand(setting.prompts, setting.group, generator=draw).to(batch.tokens.device)
        advantages = rest.group_advantages(rewards).flatten()
        batch.region, batch.covers = rest.token_regions(batch, chat)
        weight = rest.WEIGHTS[cfg.method](batch, cfg, 0.0)
        metrics = rest.update(engine, optimizer, batch, advantages, weight, cfg)
        if metrics["skipped_updates"]:
            raise RuntimeError("the update was skipped: its loss or gradient was not finite")
        return {"rollout_s": middle - start, "update_s": clock(setting) - middle,
                "tokens": int(batch.length.sum()), "kl": metrics["kl"]}
    return step


def make_generate(setting):
    model = setting.model()
    ids = setting.ids.repeat_interleave(setting.group, 0).to(setting.args.device)

    def step(repeat):
        torch.manual_seed(repeat)
        script = [RaggedEnds(setting, setting.lengths)] if setting.ragged else None
        start = clock(setting)
        with torch.no_grad(), rest.autocast(model):
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
                temperature=setting.args.temperature, top_k=0, top_p=1.0, max_new_tokens=setting.length,
                logits_processor=script, disable_compile=True)
        end = clock(setting)
        ends = out[:, setting.prompt:].eq(setting.eos)
        length = (ends.cumsum(1) - ends.long()).eq(0).sum(1)  # up to and with the first end token
        setting.check(out[::setting.group, :setting.prompt].tolist(), length.tolist())
        if setting.ragged and not torch.equal(length, setting.lengths):
            raise RuntimeError("generate did not follow the ragged lengths")
        return {"rollout_s": end - start, "tokens": int(length.sum())}
    return step


def make_trl(setting):
    """GRPOTrainer.train() with one step a call. Timed by callbacks: from on_step_begin to the reward
    function (generation), and from there to on_step_end (loss, backward, clipping, optimizer); set-up,
    logging and saving are not counted."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    datasets.disable_progress_bars()
    args = setting.args
    N = setting.prompts * setting.group
    times = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times["begin"] = clock(setting)

        def on_step_end(self, *_, **__):
            times["end"] = clock(setting)

    def reward(prompts, completions, completion_ids, **kwargs):
        times["reward"] = clock(setting)
        order = [setting.texts.index(text) for text in prompts[::setting.group]]  # TRL shuffles the prompts
        seen = dict(zip(order, setting.tokenizer(prompts[::setting.group])["input_ids"]))
        setting.check([seen[p] for p in range(setting.prompts)], [len(ids) for ids in completion_ids])
        times["tokens"] = sum(map(len, completion_ids))
        return torch.rand(N).tolist()
    micro = min(args.trl_micro_batch or N, N)
    model = setting.model()
    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=N // micro,
        num_generations=setting.group, max_completion_length=setting.length, temperature=args.temperature,
        beta=0.0, loss_type="grpo",
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=isinstance(rest.autocast(model), torch.autocast), gradient_checkpointing=False,
        use_cpu=args.device == "cpu", dataloader_pin_memory=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, processing_class=setting.tokenizer, callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_dict({"prompt": setting.texts}), args=options)
    trainer.remove_callback(PrinterCallback)

    def step(repeat):
        torch.manual_seed(repeat)
        trainer.args.seed = repeat
        trainer.train()
        return {"rollout_s": times["reward"] - times["begin"], "update_s": times["end"] - times["reward"],
                "tokens": times["tokens"]}
    return step


MAKERS = {
    "ours": make_ours,
    "compiled": lambda setting: make_ours(setting, compiled=True),
    "eager": lambda setting: make_ours(setting, graph=False),
    "plain": lambda setting: make_ours(setting, shared=False),
    "generate": make_generate,
    "trl": make_trl}


def resident(peak):
    """(Peak) resident memory of this process in bytes. Linux: from /proc, since ru_maxrss starts from
    the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def probe(arm, shape, args):
    """Peak bytes of two steps above what was held before; runs in a process of its own."""
    on_gpu = args.device == "cuda"
    setting = Setting(shape, args)
    setting.lengths = torch.full((setting.prompts * setting.group,), setting.length, device=args.device)
    step = MAKERS[arm](setting)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else resident(False)
    for repeat in range(2):
        step(repeat)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident(True)
    return peak - before


def peak_memory(arm, shape, args):
    given = {name: getattr(args, name) for name in PROBED if getattr(args, name) is not None}
    same = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    words = [sys.executable, __file__, *same, "--probe", arm, "--shapes", shape]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"the memory probe of {arm} failed: {done.stderr[-500:]}", flush=True)
        return None
    return round(json.loads(done.stdout.splitlines()[-1]) / 2**20)


PROBED = ("size", "model", "device", "dtype", "threads", "temperature", "micro_batch_tokens",
          "trl_micro_batch")


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def fastest(work, args, repeats=10):
    """Seconds of the fastest of some runs of work()."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def limits(setting, found):
    """A sentence for each of our arms: its share of what memory (rollout) and matrix units (update)
    allow, both measured here."""
    args = setting.args
    model = setting.model()
    c = model.config
    on_gpu = args.device == "cuda"
    big = torch.ones(2**28 if on_gpu else 2**26, device=args.device)  # 1 GiB or 256 MiB of float32
    bandwidth = big.numel() * 4 / fastest(big.sum, args)
    half = isinstance(rest.autocast(model), torch.autocast)
    dtype = torch.bfloat16 if half else getattr(torch, args.dtype)
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    rate = 2 * n**3 / fastest(lambda: a @ b, args)
    head = model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters() if p.shape != head.shape)  # no embeddings
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    weights = (body + head.numel()) * dtype.itemsize  # bytes
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * dtype.itemsize  # keys and values
    lines = [f"This run measured {bandwidth / 1e9:.0f} GB/s of reading and {rate / 1e12:.2f} TFLOP/s of "
             f"{str(dtype)[6:]} matmul."]
    for shape, arm in dict.fromkeys((row["shape"], row["arm"]) for row in found):
        rows = [row for row in found if (row["shape"], row["arm"]) == (shape, arm)]
        if arm not in ("ours", "compiled", "eager") or "update_s" not in rows[0]:
            continue
        prompt, length, group, prompts, _ = parse_shape(shape)
        read = length * (weights + per_token * prompts * (prompt + group * length / 2))
        through_body = prompts * (prompt + group * length)
        through_head = prompts * group * length
        flops = 6 * (body * through_body + head.numel() * through_head)
        rollout, update = (statistics.median(row[key] for row in rows) for key in ("rollout_s", "update_s"))
        lines.append(f"{shape} {arm}: rollout at {read / bandwidth / rollout:.0%} of the bandwidth bound, "
                     f"update at {flops / update / rate:.0%} of the matmul rate.")
    return "\n".join(lines)


def table(found):
    """Markdown: medians, and ratios of paired repeats as median (min–max)."""
    titles = ("shape", "arm", "rollout tokens/s", "update s", "step s", "step, times faster than TRL",
              "rollout, times faster than generate", "peak MiB")
    lines = [titles, ("---",) * len(titles)]
    for shape in dict.fromkeys(row["shape"] for row in found):
        arms = {arm: [row for row in found if (row["shape"], row["arm"]) == (shape, arm)] for arm in ARMS}

        def median(rows, key):
            return f"{statistics.median(row[key] for row in rows):.2f}" if key in rows[0] else "–"

        def ratio(rows, other, key):
            if key not in rows[0] or not arms[other]:
                return "–"
            return spread([b[key] / a[key] for a, b in zip(rows, arms[other])])
        for arm, rows in arms.items():
            if not rows:
                continue
            rate = statistics.median(row["tokens"] / row["rollout_s"] for row in rows)
            lines.append((
                shape, arm, f"{rate:.0f}", median(rows, "update_s"), median(rows, "step_s"),
                ratio(rows, "trl", "step_s"), ratio(rows, "generate", "rollout_s"),
                f"{rows[0].get('peak_mib', '–')}"))
    lines = ["| " + " | ".join(cells) + " |" for cells in lines]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join(lines)


def run_plan(args, shapes, writer, file):
    """Runs args.arms on the shapes, writes a row per step, prints the table and the limits."""
    found = []
    for shape in shapes:
        setting = Setting(shape, args)
        names = [arm for arm in args.arms if not (setting.ragged and arm == "trl")]
        peak = {} if args.no_memory else {arm: peak_memory(arm, shape, args) for arm in names}
        steps = {arm: MAKERS[arm](setting) for arm in names}
        fixed = {"size": args.model or args.size, "shape": shape,
                 "parameters": setting.model().num_parameters(),
                 "device": args.device, "dtype": args.dtype, "threads": args.threads}
        for repeat in range(-1, args.repeats):  # -1 warms up
            for arm, step in steps.items():
                row = step(repeat + 1)
                if repeat < 0:
                    continue
                row |= fixed | {"arm": arm, "repeat": repeat}
                if peak.get(arm):
                    row["peak_mib"] = peak[arm]
                if "update_s" in row:
                    row["step_s"] = row["rollout_s"] + row["update_s"]
                found.append(row)
                writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
                print(f"{shape} {arm} {repeat}: rollout {row['rollout_s']:.2f} s, "
                      f"update {row.get('update_s', 0):.2f} s", flush=True)
        del steps
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the next shape's memory probes are other processes
    size = setting.model().num_parameters() / 1e6
    print(f"\n{size:.1f}M parameters, {args.device}, {args.dtype}, {args.threads} threads, "
          f"median of {args.repeats}:\n\n{table(found)}\n\n{limits(setting, found)}\n")


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--shapes", nargs="+", default=SHAPES,
           help="PROMPTxCOMPLETIONxGROUPxPROMPTS, trailing r: ragged lengths")
    option("--scaling", action="store_true",
           help="shapes that vary the group size, the prompt length and the batch")
    option("--gpu", action="store_true",
           help="the whole measurement on a GPU: embedded policy, SmolLM2-135M and Qwen3-0.6B shapes")
    option("--arms", nargs="+", default=["ours", "compiled", "plain", "generate", "trl"], choices=ARMS)
    option("--repeats", type=int, default=5)
    option("--size", default="1m", choices=SIZES,
           help="random weights in the shape of the embedded policy, SmolLM2-135M or Qwen3-0.6B")
    option("--model", help="a folder or hub id, in place of --size")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    option("--dtype", default="float32", choices=("float32", "bfloat16"),
           help="of the weights; float32 on a GPU runs under bf16 autocast in all arms")
    option("--threads", type=int, default=torch.get_num_threads())
    option("--temperature", type=float, default=1.0)
    option("--micro-batch-tokens", type=int, default=0,
           help="Config.micro_batch_tokens of our arms; 0: its default")
    option("--trl-micro-batch", type=int, default=0,
           help="completions per forward in TRL; 0: all of a step")
    option("--no-memory", action="store_true",
           help="skip the memory probes, which start one process per shape and arm")
    option("--out", type=Path, help="default results/bench.csv, with --gpu results/bench-gpu.csv")
    option("--probe", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.probe:
        print(json.dumps(probe(args.probe, args.shapes[0], args)))
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA GPU, and there is none here")
    shapes = SCALING if args.scaling else args.shapes
    plans = ((args.size, shapes, args.arms, args.micro_batch_tokens, args.trl_micro_batch),)
    if args.gpu:
        args.device = "cuda"
        args.dtype = "bfloat16"
        plans = GPU_PLANS
    missing = not importlib.util.find_spec("trl")
    if missing and any("trl" in arms for _, _, arms, *_ in plans):
        print("trl is not installed, so its arm is left out (pip install trl)")
    out = (args.out or Path("results/bench-gpu.csv" if args.gpu else "results/bench.csv")).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for args.size, shapes, arms, args.micro_batch_tokens, args.trl_micro_batch in plans:
            args.arms = [arm for arm in arms if not (missing and arm == "trl")]
            ragged = any(shape.endswith("r") for shape in shapes)
            if ragged and "generate" in args.arms and not {"ours", "plain"} & set(args.arms):
                parser.error("ragged shapes take their lengths from our rollout: add ours or plain to --arms")
            run_plan(args, shapes, writer, file)


if __name__ == "__main__":
    main(sys.argv[1:])
