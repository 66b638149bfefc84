"""The options of train_small.py: what each is, what it may be, and in which runs it has an effect.

No option is ever ignored in silence: what would have no effect is refused, and so is what is given twice."""

import argparse
import math
import sys
from dataclasses import MISSING, dataclass, field, fields

import rest
from rest import knob

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
    lora_rank: int = knob(0, "Train low-rank adapters of this rank; 0: the weights themselves.", "at least 0")
    gradient_checkpointing: bool = knob(False, "Less activation memory, about a third more time.")
    shared_prefix: bool = knob(True, "Forward each prompt once per group, not once per completion.")
    cuda_graph: bool = knob(True, "On a GPU, capture the decoding step as a CUDA graph and replay it.")
    compile_decode: bool = knob(False, "torch.compile the decoding step: slow at first, for long runs.")
    warm_start_steps: int = knob(-1, "Supervised steps before RL; -1: as many as the embedded policy needs, "
                                 "none for a --model.", "at least -1")
    warm_start_batch: int = knob(8, "Rows per supervised step of a --model.", "at least 1")
    micro_batch: int = knob(2, "Rows per forward in a --model's supervised steps.", "at least 1")
    warm_start_lr: float = knob(2e-4, "Learning rate of a --model's supervised steps.", "in (0, 1]")
    noise: float = knob(0.22, "Rate of each kind of mistake in the toy demonstrations.", "in [0, 1]")
    train_rows: int = knob(4000, "Toy tasks to train on.", "at least 1")
    eval_rows: int = knob(200, "Held-out toy tasks (at most so many rows of --eval-data) to evaluate on, "
                          "before and after.", "at least 0")
    eval_samples: int = knob(2, "Completions sampled per held-out task.", "at least 1")
    eval_batch: int = knob(64, "Prompts evaluated at once.", "at least 1")
    mask_names: bool = knob(False, "Random strings for tool and parameter names: descriptions must be read.")
    save_steps: int = knob(50, "Checkpoint every so many steps; 0: only start and end.", "at least 0")
    keep_steps: list[int] = several("Steps whose checkpoints stay, as kept/stepN; 0: the start.")
    resume: bool = knob(False, "Continue the run --name, or begin it if there is none.")
    show_every: int = knob(0, "Print an episode, coloured, every so many steps; 0: only at the end.",
                           "at least 0")
    explain: bool = knob(False, "No training: one sample through the whole pipeline, in the terminal.")
    eval_only: bool = knob(False, "No training: evaluate the run --name, --model, or the embedded policy.")
    benchmarks: list[str] = several("bfcl, bfcl-code, bfcl-live, bfcl-multi-turn, api-bank, or categories.")
    api_bank_dir: str = knob("", "Folder with level-{1,2,3}-api_processed.json.")
    limit: int = knob(0, "At most so many prompts per benchmark category; 0: all.", "at least 0")
    compare: str = knob("", "benchmarks.jsonl of another run, for paired differences.")


BOUNDS = rest.BOUNDS | {"at least -1": lambda x: x >= -1, "in [0, 1]": lambda x: 0 <= x <= 1}

# What a resumed run may change: none of these changes what is drawn or measured; more steps prolong it.
FREE = {"name", "output_dir", "resume", "save_steps", "keep_steps", "steps", "device", "shared_prefix",
        "cuda_graph", "compile_decode", "gradient_checkpointing", "micro_batch", "micro_batch_tokens",
        "show_every"}

# Knobs that not every method reads, with those that do. A method of one's own may read any.
ENTROPY = {"rest", "rest-static", "no-thought", "shuffled", "token-entropy"}
CURRICULUM = {"rest", "no-thought", "shuffled"}
READERS = {
    "raw_weight": ENTROPY, "min_entropy": ENTROPY,
    "alpha_format": CURRICULUM, "alpha_params": CURRICULUM, "alpha_thought": CURRICULUM,
    "weight_min": CURRICULUM | {"rest-static"}, "weight_max": CURRICULUM | {"rest-static"},
    "top_entropy_fraction": {"top-entropy"}}
METHODS = set(rest.WEIGHTS)  # those of rest.py, before anybody adds one
ROLLOUT = {"max_completion_tokens", "max_turns", "temperature", "tool_timeout", "seed"}  # in evaluation too


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
    """(Run, rest.Config, names of the options given). --some-name is --some_name as well; a bool is given as
    --flag, --flag True or --flag False. Raises ValueError with a sentence."""
    parser = Parser(description=__doc__, usage="%(prog)s [options]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for options in (Run, rest.Config):
        group = parser.add_argument_group(options.__doc__.splitlines()[0])
        for option in fields(options):
            kind = {"type": option.type, "metavar": option.type.__name__.upper()}
            if option.type is bool:
                kind = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
            elif option.type in (list[str], list[int]):
                kind = {"type": option.type.__args__[0], "nargs": "+", "metavar": "X"}
            default = "" if option.default in ("", MISSING) else f" [{option.default}]"
            text = (option.metadata["help"] + default).replace("%", "%%")
            group.add_argument(flag(option.name), action=Once, help=text, **kind)
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parser.parse_args([dashes(word) for word in argv]))

    def made(options):
        names = {option.name for option in fields(options)}
        return options(**{name: value for name, value in given.items() if name in names})
    return made(Run), made(rest.Config), set(given)


def dashes(word):
    """--some_name=a_value -> --some-name=a_value"""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def check(run, cfg, given, device):
    """Raises ValueError for what cannot be, and for every option given that would be ignored."""
    for option in fields(run):
        value = getattr(run, option.name)
        bound = option.metadata["bound"]
        if bound and not (math.isfinite(value) and BOUNDS[bound](value)):
            raise ValueError(f"{flag(option.name)} must be a number {bound}, not {value}")
    for name in given & {"name", "output_dir", "model", "data", "eval_data", "compare", "api_bank_dir"}:
        if not getattr(run, name).strip():
            raise ValueError(f"{flag(name)} is empty: give it a value, or leave it out")
    if run.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, not {run.dtype!r}")
    if cfg.learning_rate > 1:
        raise ValueError(f"--learning-rate must lie in (0, 1], not {cfg.learning_rate}")
    if cfg.seed >= 2**32:
        raise ValueError(f"--seed must be below 2**32, not {cfg.seed}")
    if run.eval_only and not run.benchmarks and not run.eval_rows:
        raise ValueError("--eval-only with --eval-rows 0 evaluates nothing")
    if run.resume and not run.name:
        raise ValueError("--resume continues a run: name it with --name")
    late = [step for step in run.keep_steps if not 0 <= step <= cfg.steps]
    if late:
        raise ValueError(f"--keep-steps {late[0]} is no step of a run of {cfg.steps} steps")
    for names, applies, why in misfits(run, cfg, device):
        ignored = sorted(given & set(names))
        if ignored and not applies:
            raise ValueError(f"{flag(ignored[0])} would have no effect: {why}")


def misfits(run, cfg, device):
    """[(options, whether they have an effect in this run, else why not)]"""
    training = not run.eval_only
    embedded = not run.model and not (run.eval_only and run.name)
    own_test = run.eval_data or run.eval_only and run.data
    toys = training and not run.data or not own_test and not run.benchmarks
    knobs = {option.name for option in fields(cfg)}
    explained = {"method", "reward_scaling", "aggregation", "clip", "delta", "group", "steps"}
    explained |= set(READERS) | ROLLOUT - {"max_turns", "tool_timeout"}
    unexplained = knobs - explained | {
        "name", "output_dir", "eval_data", "eval_rows", "eval_samples", "eval_batch", "save_steps",
        "keep_steps", "resume", "show_every", "gradient_checkpointing", "eval_only"}
    of_training = {"train_rows", "save_steps", "keep_steps", "resume", "show_every",
                   "gradient_checkpointing", "lora_rank"}
    rules = [
        ({"benchmarks"}, run.eval_only, "it needs --eval-only"),
        ({"api_bank_dir", "limit", "compare"}, run.benchmarks, "it needs --eval-only --benchmarks"),
        ({"api_bank_dir"}, any(name.startswith("api") for name in run.benchmarks),
         "no --benchmarks of API-Bank are asked for"),
        (unexplained, not run.explain, "--explain trains and evaluates nothing"),
        (of_training, training, "--eval-only trains nothing"),
        (knobs - ROLLOUT, training, "--eval-only trains nothing"),
        ({"warm_start_steps"}, training or embedded, "--eval-only trains nothing"),
        ({"warm_start_steps"}, embedded or not run.explain, "--explain trains nothing"),
        ({"data", "eval_data", "eval_rows", "eval_samples", "temperature", "max_turns", "tool_timeout"},
         not run.benchmarks, "--benchmarks have rows and turns of their own and are answered greedily"),
        ({"seed"}, embedded or not run.benchmarks, "--benchmarks are answered greedily"),
        ({"data"}, training or not run.eval_data, "--eval-only evaluates the rows of --eval-data"),
        ({"eval_data", "eval_samples", "eval_batch"}, run.eval_rows or run.benchmarks,
         "--eval-rows 0 evaluates nothing"),
        ({"name"}, training or run.benchmarks or not run.model,
         "the --model is evaluated and nothing is written (without --model the run --name is evaluated)"),
        ({"output_dir"}, training or run.benchmarks or run.name, "nothing is read or written there"),
        ({"dtype", "gradient_checkpointing", "lora_rank"}, not embedded,
         "it is for a --model: the embedded policy is small and float32"),
        ({"warm_start_batch", "micro_batch", "warm_start_lr"}, supervised(run),
         "it is for the supervised steps of a --model, which --warm-start-steps asks for"),
        ({"noise"}, embedded or supervised(run) and not run.data, "no toy demonstrations are learned here"),
        ({"train_rows"}, not run.data, "--data has rows of its own"),
        ({"mask_names"}, toys or embedded, "there are no toy tasks in this run"),
        ({"tool_timeout"}, cfg.max_turns > 1, "tools run only where --max-turns is above 1"),
        ({"cuda_graph", "compile_decode"}, run.shared_prefix, "it needs --shared-prefix"),
        ({"cuda_graph"}, device.type == "cuda" or not run.cuda_graph,
         f"it is for a GPU, and the device is {device.type}"),
        ({"delta"}, cfg.method != "dr-grpo", "dr-grpo does not divide by the standard deviation"),
    ]
    if cfg.method in METHODS:
        for name, readers in READERS.items():
            rules.append(({name}, cfg.method in readers, f"--method {cfg.method} does not read it"))
    return rules


def supervised(run):
    """Whether a --model gets supervised steps here; the embedded policy brings its own warm start."""
    return bool(run.model) and run.warm_start_steps > 0 and not run.eval_only
