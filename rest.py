"""ResT: reshaping token-level policy gradients for tool-use LLMs (arXiv 2509.21826), in one file.

    L = - 1/N  sum_i  1/T_i  sum_t  w_{i,t} min( rho_{i,t} A_i,  clip(rho_{i,t}, 1-eps, 1+eps) A_i )

    rho = exp(logp - logp_old),  A_i = (r_i - group mean) / (group std + delta),  w = token weight, mean 1 per completion

ResT is GRPO without the KL term and its reference model, and with one thing added: w. Every sampled token lies in a region (format, tool
name, parameters, thought, free text); a region's weight falls with its mean policy entropy; a curriculum moves weight from structure to
reasoning while training goes on. w = 1 is plain GRPO.

One sample's life, which is also the order of this file (P prompts, G completions each, N = P*G, T completion tokens, V words):

    row {messages, tools, gold}  -> prompt ids                 encode_prompt
    -> tokens, logp_old, entropy, sampled mask    [N, T]       rollout   (parse_calls and execute run inside, if live)
    -> region of every sampled token              [N, T]       tag_regions
    -> reward per completion                      [N]          episode_reward
    -> advantage                                  [P, G]       group_advantages
    -> region entropy [6] -> weight [6] -> token weight [N, T] token_weights
    -> logp with gradient                         [N, T]       completion_logps
    -> scalar loss -> optimizer step                           policy_loss, update

Where we depart from the paper (P) or from the authors' code (C), and why:
  * P and C disagree about w: P reads it off the entropy, C uses constants and a clock. `--method rest` is P; `--method rest-official
    --aggregation token` is C.
  * P does not publish the constants of its weights; ours are in Config. We divide raw weights by their token mean over the batch, so
    that those constants mean the same at any entropy level.
  * C finds regions by re-tokenising the decoded text and drops the last token of each span; we label the sampled ids themselves and
    whole spans. C weights only the first call of a block and gives the end-of-turn token weight 0, so that nothing trains stopping;
    we weight all calls and count end-of-turn as format.
  * C divides by each micro-batch's own weight sum, so its gradient depends on the micro-batch size; our denominators are those of the
    whole batch, fixed before the first micro-batch.
  * P scales the whole reward with progress, which normalised advantages cancel (tests/test_theory.py); C rescales the format and
    correctness parts against each other. We follow C, at a pace of our own (nu = 0.7 progress; C: step/150).
  * C lets a response-only answer keep its format point when it adds a call; our format reward asks for exactly the gold's blocks, and
    nothing but space outside them.
"""

import json
import logging
import math
import re
import threading
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from toy_tools.chat import encode_prompt, encode_results
from toy_tools.jsons import SPACE, check, same_value, scan_object
from toy_tools.shared_prefix import PackedLayout, PlainDecoder, SharedDecoder, autocast, can_share, drop_finished, left_pad, micro_batches, sharing

log = logging.getLogger("rest")

# ---------------------------------------------------------------------------------------------------------------- configuration

METHODS = ("rest", "rest-official", "rest-static", "no-thought", "grpo", "dr-grpo", "top-entropy")


@dataclass
class Config:
    """Everything the algorithm needs; train_small.py turns each field into a command line flag."""

    method: str = field(default="rest", metadata={"help": "How tokens are weighted: " + ", ".join(METHODS) + "."})
    reward_scaling: str = field(default="dynamic", metadata={"help": "dynamic (parts rescaled with progress) or static (ToolRL)."})
    raw_weight: str = field(default="one-minus-exp", metadata={"help": "one-minus-exp: 1/(1-exp(-H)); inverse: 1/H."})
    min_entropy: float = field(default=0.05, metadata={"help": "Region entropies are clamped below at this many nats."})
    alpha_format: float = field(default=0.5, metadata={"help": "Curriculum: how much weight format loses over the run."})
    alpha_params: float = field(default=0.5, metadata={"help": "Curriculum: how much weight parameters gain over the run."})
    alpha_thought: float = field(default=0.5, metadata={"help": "Curriculum: how much weight thoughts gain over the run."})
    weight_min: float = field(default=0.2, metadata={"help": "The format weight does not fall below this."})
    weight_max: float = field(default=5.0, metadata={"help": "Parameter and thought weights do not rise above this."})
    top_entropy_fraction: float = field(default=0.2, metadata={"help": "Fraction of tokens that top-entropy trains."})
    steps: int = field(default=100, metadata={"help": "Optimisation steps; progress is step/steps. 0: warm start only."})
    prompts: int = field(default=16, metadata={"help": "Prompts per step (P)."})
    group: int = field(default=8, metadata={"help": "Completions per prompt (G), at least 2."})
    max_completion_tokens: int = field(default=160, metadata={"help": "Token budget of an episode, tool results included."})
    max_turns: int = field(default=1, metadata={"help": "Assistant turns per episode; above 1 calls run and results are fed back."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; logp and entropy are those of this distribution."})
    top_k: int = field(default=0, metadata={"help": "Must stay 0: truncated sampling would make the importance ratio wrong."})
    top_p: float = field(default=1.0, metadata={"help": "Must stay 1.0, for the same reason."})
    clip: float = field(default=0.2, metadata={"help": "epsilon of the clipped ratio."})
    delta: float = field(default=1e-4, metadata={"help": "Added to the group's standard deviation."})
    aggregation: str = field(default="", metadata={"help": "sequence, token or constant; empty: the method's own (dr-grpo: constant)."})
    passes: int = field(default=1, metadata={"help": "Optimiser steps on each rollout batch."})
    micro_batch_tokens: int = field(default=4096, metadata={"help": "Tokens per forward; changes memory and speed, not the gradient."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW; for a real --model about 1e-6."})
    warmup_steps: int = field(default=5, metadata={"help": "Steps of linear warm-up; then linear decay to a tenth of the peak."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm is clipped to this."})
    shared_prefix: bool = field(default=True, metadata={"help": "Forward each prompt once per group, not once per completion."})
    cuda_graph: bool = field(default=True, metadata={"help": "On a GPU, capture the decoding step as a CUDA graph and replay it."})
    compile_decode: bool = field(default=False, metadata={"help": "torch.compile the decoding step: half a minute at first, for long runs."})
    tool_timeout: float = field(default=2.0, metadata={"help": "Seconds a tool may take before the model reads a time-out."})
    seed: int = field(default=0, metadata={"help": "Seed of data order and sampling."})

    def __post_init__(self):
        def need(ok, message):
            if not ok:
                raise ValueError(message)
        for name, known in (("method", METHODS), ("reward_scaling", ("dynamic", "static")), ("raw_weight", RAW_WEIGHTS),
                            ("aggregation", ("", "sequence", "token", "constant"))):
            need(getattr(self, name) in known, f"{name} must be one of {', '.join(filter(None, known))}, not {getattr(self, name)!r}")
        need(self.group >= 2, f"group is {self.group}, but advantages compare completions of one prompt: use at least 2")
        need(self.top_k == 0 and self.top_p == 1.0,
             "top_k/top_p truncate the sampling distribution, so the recorded logp would not be the one sampled from: leave them at 0 and 1.0")
        need(self.temperature > 0, f"temperature must be above 0, not {self.temperature} (greedy decoding is for evaluation only)")
        need(self.steps >= 0, f"steps must be 0 (warm start only) or more, not {self.steps}")
        for name in ("prompts", "max_completion_tokens", "max_turns", "passes", "micro_batch_tokens"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        need(self.min_entropy > 0, f"min_entropy must be above 0 nats, not {self.min_entropy}: raw weights divide by the entropy")
        need(0 < self.top_entropy_fraction <= 1, f"top_entropy_fraction must lie in (0, 1], not {self.top_entropy_fraction}")
        need(0 < self.clip < 1, f"clip must lie in (0, 1), not {self.clip}")
        for name in ("learning_rate", "max_grad_norm"):
            need(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        need(self.delta >= 0, f"delta must not be negative, but is {self.delta}")
        need(0 <= self.weight_min <= self.weight_max, f"weight_min, {self.weight_min}, must lie between 0 and weight_max, {self.weight_max}")
        self.aggregation = self.aggregation or ("constant" if self.method == "dr-grpo" else "sequence")


# ------------------------------------------------------------------------------------------------------------ parsing tool calls

class CallError(ValueError):
    """A tool call that cannot run; its text is what the model reads."""


class MalformedCall(CallError):
    """Not one JSON object with a "name" and an object of "arguments" (or "parameters")."""


class UnknownTool(CallError):
    """No tool of that name is offered."""


class InvalidArguments(CallError):
    """The arguments do not fit the tool's schema, or the tool refused them."""


@dataclass
class Call:
    name: str
    arguments: dict


@dataclass
class Block:
    """<kind>inner</kind> at text[start:end]; an unclosed block runs to the end of the text."""
    kind: str
    start: int
    end: int
    inner: tuple  # (start, end) of what stands between the tags
    closed: bool
    calls: list = field(default_factory=list)  # of a tool_call block: [(Call | MalformedCall, start, end, fields)]


OPENING_TAG = re.compile(r"<(think|tool_call|response)>")


def split_blocks(text):
    """The <think>, <tool_call> and <response> blocks of a completion, in order.

    One scanner serves parser, reward and regions, so they cannot disagree. A thought ends at the first </think> whatever else it mentions;
    a call block ends at the first </tool_call> that is not inside a JSON string.
    >>> [(b.kind, b.closed) for b in split_blocks("<think>use <tool_call>?</think><response>no")]
    [('think', True), ('response', False)]
    """
    blocks, pos = [], 0
    while match := OPENING_TAG.search(text, pos):
        kind, inner = match[1], match.end()
        if kind == "tool_call":
            calls, stop = _scan_calls(text, inner)
        else:
            calls, stop = [], text.find(f"</{kind}>", inner)
        closed = 0 <= stop < len(text)
        stop = stop if closed else len(text)
        pos = stop + len(f"</{kind}>") if closed else len(text)
        blocks.append(Block(kind, match.start(), pos, (inner, stop), closed, calls))
    return blocks


def _scan_calls(text, pos):
    """Calls of a block from `pos` on, and where its closing tag (or the text's end) stands."""
    calls = []
    while True:
        start = SPACE.match(text, pos).end()
        if start == len(text) or text.startswith("</tool_call>", start):
            return calls, start
        fields, pos, error = scan_object(text, start)
        if error:  # resume on the next line or at the closing tag
            pos = min(p for p in (text.find("\n", start), text.find("</tool_call>", pos), len(text)) if p >= 0)
        calls.append((MalformedCall(error) if error else _to_call(fields), start, pos, fields))


def _to_call(fields):
    name = fields.get("name", (None,))[0]
    arguments = [fields[key][0] for key in ("arguments", "parameters") if key in fields]
    if not isinstance(name, str) or not name:
        return MalformedCall('a call needs a "name" that is a string')
    if len(arguments) != 1 or not isinstance(arguments[0], dict):
        return MalformedCall('a call needs one object of "arguments" (or "parameters")')
    return Call(name, arguments[0])


def parse_calls(text):
    """All calls of a completion in order; an unreadable one is a MalformedCall in its place. Never raises.

    >>> parse_calls('<think>a</think><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    [Call(name='f', arguments={'x': 1})]
    """
    return [call for block in split_blocks(text) for call, *_ in block.calls]


def validate(call, tools):
    """Check a Call against the schemas ({"type": "function", "function": {name, parameters}}): known tool, required, type, enum, no extras.

    Raises UnknownTool or InvalidArguments, with a sentence for the model."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if call.name not in schemas:
        raise UnknownTool(f"unknown tool {call.name[:60]!r}; the tools are {', '.join(schemas)}")
    try:
        check(call.arguments, {"type": "object", **schemas[call.name]})
    except ValueError as error:
        raise InvalidArguments(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------- tool executor

def execute(calls, functions, tools, timeout=2.0, max_chars=1000):
    """Run the calls of a turn in order; one result text per call, and an error text where a call is malformed, unknown, invalid, slow or fails.

    calls: list[Call | CallError]; functions: {name: callable(**arguments)}, bound to the episode's state. Model text is only ever data: it is
    parsed as JSON, checked against the schema, and passed as arguments. Each call runs in a daemon thread, since signals work on the
    main thread only; a call over `timeout` seconds is abandoned (Python cannot kill it; a tool that loops inside one C call holds all).
    """
    return [_run(call, functions, tools, timeout, max_chars) for call in calls]


def _run(call, functions, tools, timeout, max_chars):
    result = ["error: the tool took too long"]

    def work():
        try:
            if isinstance(call, CallError):
                raise call
            validate(call, tools)
            value = functions[call.name](**call.arguments)
            result[0] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except Exception as error:  # whatever a tool or a schema raises, the model reads it and the training run goes on
            result[0] = f"error: {error}"
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    text = result[0]
    return text if len(text) <= max_chars else text[:max_chars] + " … (cut)"


# -------------------------------------------------------------------------------------------------------------------- rollout

@dataclass
class Rollout:
    """N = P*G episodes, the completions of prompt p in rows p*G … p*G+G-1; tensors [N, T] are aligned to completion tokens, right-padded."""
    rows: list              # the P rows
    prompts: list           # P lists of prompt ids
    group: int
    tokens: torch.Tensor    # int64 [N, T], exactly the ids that were sampled or forced
    sampled: torch.Tensor   # bool [N, T], True where the policy chose the token; tool results, headers and padding are False
    logp: torch.Tensor      # float32 [N, T], log-probability at the sampling temperature; 0 where not sampled
    entropy: torch.Tensor   # float32 [N, T], nats, of the distribution sampled from; 0 where not sampled
    length: torch.Tensor    # int64 [N], sampled and forced tokens
    truncated: torch.Tensor  # bool [N], ran out of max_completion_tokens
    turns: list             # per episode: [(start, end)] columns of each assistant turn
    texts: list             # per episode: the text of each assistant turn, without its end-of-turn token


def eos_ids(model, tokenizer):
    """All ids that end a turn: the tokenizer's and those of the model's generation config."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def sample(logits, uniforms, temperature, greedy=False):
    """One token per row from softmax(logits / temperature): ids int64 [S], their logp and the entropy in nats, float32 [S].

    logits [S, V]; uniforms float [S] in [0, 1), by which the cumulative distribution is inverted (not read if greedy)."""
    log_p = F.log_softmax(logits.float() / temperature, -1)  # (S, V)
    p = log_p.exp()                                          # (S, V)
    if greedy:
        ids = logits.argmax(-1)                              # (S,)
    else:
        cdf = p.cumsum(-1)                                   # (S, V)
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return ids, log_p.gather(1, ids[:, None])[:, 0], torch.special.entr(p).sum(-1)  # entr(p) = -p log p, and 0 at p = 0


@torch.no_grad()
def rollout(model, tokenizer, rows, cfg, seed=0, group=None, greedy=False, toolbox_for=None, instructions=""):
    """Sample `group` (default cfg.group) completions for each row; returns a Rollout.

    All episodes advance in lockstep, one token a step, sampled or forced: a tool's result is a queue of forced tokens that pass through the
    same loop, so nothing is ever re-tokenised and no cache is rebuilt. Finished episodes leave the batch. Each draws from its own stream of
    uniforms, so what it samples does not depend on which others are still there.
    With cfg.max_turns > 1, `toolbox_for(row)` gives each episode an object with `.functions`, and its calls are executed.
    """
    was_training, G, T = model.training, cfg.group if group is None else group, cfg.max_completion_tokens
    live = cfg.max_turns > 1 and toolbox_for is not None
    N, device = len(rows) * G, next(model.parameters()).device
    end_ids = sorted(eos_ids(model, tokenizer))
    ends = torch.tensor(end_ids, device=device)
    encoded = [encode_prompt(tokenizer, row["messages"], row["tools"], instructions) for row in rows]
    prompts, queues = [ids for ids, _ in encoded], {i: deque(encoded[i // G][1]) for i in range(N) if encoded[i // G][1]}
    boxes = [toolbox_for(row) for row in rows for _ in range(G)] if live else None
    spare = N  # the row of the tensors where slots of finished episodes write until they leave
    uniforms = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)).clamp_(max=1 - 1e-6)
    uniforms = torch.cat([uniforms, uniforms[:1]]).to(device)                                            # (N+1, T)
    tokens, sampled = (torch.zeros(N + 1, T, dtype=dtype, device=device) for dtype in (torch.long, torch.bool))
    logp, entropy = torch.zeros(N + 1, T, device=device), torch.zeros(N + 1, T, device=device)
    starts, length, truncated = [0] * N, [T] * N, [True] * N
    turns, texts = [[] for _ in range(N)], [[] for _ in range(N)]

    def finish_turn(i, end, text_end):
        turns[i].append((starts[i], end))
        texts[i].append(tokenizer.decode(tokens[i, starts[i]:text_end], clean_up_tokenization_spaces=False))
    shared = cfg.shared_prefix and can_share(model)
    model.eval()
    with sharing(model) if shared else nullcontext(), autocast(model):
        decoder = (SharedDecoder if shared else PlainDecoder)(model, prompts, G, T, cfg.cuda_graph, cfg.compile_decode)
        slots = list(range(N))  # the episode of each row of the decoder's batch
        at, logits = torch.arange(N, device=device), decoder.prefill()                                   # (S,) and (S, V)
        for t in range(T):
            chosen, logp_t, entropy_t = sample(logits, uniforms[at, t], cfg.temperature, greedy)         # (S,) each
            mask = torch.ones_like(chosen, dtype=torch.bool)  # sampled or forced: decided here, where tokens are made
            if forced := [s for s, i in enumerate(slots) if queues.get(i)] if queues else []:
                chosen[forced] = torch.tensor([queues[slots[s]].popleft() for s in forced], device=device)
                mask[forced] = False
            tokens[at, t], sampled[at, t] = chosen, mask
            logp[at, t], entropy[at, t] = torch.where(mask, logp_t, 0.0), torch.where(mask, entropy_t, 0.0)
            finished = False
            for s in (mask & torch.isin(chosen, ends)).nonzero()[:, 0].tolist():  # turns that end here
                if (i := slots[s]) == spare:
                    continue
                finish_turn(i, t + 1, t)
                calls = parse_calls(texts[i][-1]) if live and len(turns[i]) < cfg.max_turns else []
                if calls:
                    results = execute(calls, boxes[i].functions, rows[i // G]["tools"], cfg.tool_timeout)
                    suffix, opening = encode_results(tokenizer, results, end_ids)
                    queues[i], starts[i] = deque(suffix + opening), t + 1 + len(suffix)
                else:
                    length[i], truncated[i], slots[s], finished = t + 1, False, spare, True
            if t == T - 1 or slots.count(spare) == len(slots):
                break
            if finished:
                slots, kept = drop_finished(decoder, slots, spare)
                at, chosen = torch.tensor(slots, device=device), chosen[kept]
            logits = decoder.step(chosen, t)
    model.train(was_training)
    for i in range(N):
        if truncated[i] and starts[i] < T:  # the turn that was cut is scored as it stands
            finish_turn(i, T, T)
    tokens, sampled, logp, entropy = (x[:N, :max(length)].contiguous() for x in (tokens, sampled, logp, entropy))
    length, truncated = torch.tensor(length, device=device), torch.tensor(truncated, device=device)
    return Rollout(rows, prompts, G, tokens, sampled, logp, entropy, length, truncated, turns, texts)


# ---------------------------------------------------------------------------------------------------------------------- regions

TAG, SCAFFOLD, NAME, PARAMS, THOUGHT, TEXT = range(6)
REGIONS = ("tag", "scaffold", "name", "params", "thought", "text")  # the paper's "format" is tag and scaffold (JSON syntax) together


def label_chars(text):
    """The region of every character, a bytearray as long as the text; total on any input.

    >>> list(label_chars('<think>a</think>')[6:9])
    [0, 4, 0]
    """
    label = bytearray([SCAFFOLD if c.isspace() else TEXT for c in text])
    for block in split_blocks(text):
        a, b = block.inner
        label[block.start:a] = bytes([TAG]) * (a - block.start)
        label[b:block.end] = bytes([TAG]) * (block.end - b)
        label[a:b] = bytes([{"think": THOUGHT, "tool_call": SCAFFOLD, "response": TEXT}[block.kind]]) * (b - a)
        for _, _, stop, fields in block.calls:
            for key, (value, start, end) in fields.items():
                end = stop if end is None else end  # a member that broke off runs to the end of its line
                if key == "name":  # its quotes are format
                    start, end = start + (text[start:start + 1] == '"'), end - (isinstance(value, str))
                if key in ("name", "arguments", "parameters"):
                    label[start:end] = bytes([NAME if key == "name" else PARAMS]) * (end - start)
    return label


def tag_regions(pieces):
    """Regions of the tokens of one assistant turn, given each sampled id's own text: two lists as long as `pieces`.

    region: that of the token's first non-space character; touched: a bit mask of all regions its non-space characters lie in
    (a token such as `}}` straddles two)."""
    label, pos, region, touched = label_chars("".join(pieces)), 0, [], []
    for piece in pieces:
        first = pos + len(piece) - len(piece.lstrip()) if piece.strip() else pos
        # an empty piece (the inner bytes of one character) takes the region it stands in
        region.append(label[min(first, len(label) - 1)] if label else TEXT)
        bits = 1 << region[-1]
        for k, c in enumerate(piece):
            bits |= 0 if c.isspace() else 1 << label[pos + k]
        touched.append(bits)
        pos += len(piece)
    return region, touched


def token_regions(tokenizer, batch, ends):
    """int64 [N, T] regions and touched bit masks of a Rollout, from the sampled ids; the end-of-turn token is a tag. -1 and 0 where forced."""
    pieces = tokenizer.__dict__.setdefault("_rest_pieces", {})  # id -> text, decoded once
    region = torch.full(batch.tokens.shape, -1)
    touched = torch.zeros_like(region)
    for i, (ids, turns) in enumerate(zip(batch.tokens.tolist(), batch.turns)):
        for start, end in turns:
            for x in ids[start:end]:
                if x not in pieces:
                    pieces[x] = tokenizer.decode([x], clean_up_tokenization_spaces=False)
            closed = ids[end - 1] in ends
            r, b = tag_regions([pieces[x] for x in ids[start:end - closed]])
            region[i, start:end] = torch.tensor(r + [TAG] * closed)
            touched[i, start:end] = torch.tensor(b + [1 << TAG] * closed)
    region, touched = region.to(batch.tokens.device), touched.to(batch.tokens.device)
    return torch.where(batch.sampled, region, -1), torch.where(batch.sampled, touched, 0)


# ----------------------------------------------------------------------------------------------------------------------- reward

def _jaccard(a, b):
    a, b = Counter(list(a)), Counter(list(b))  # list: of a dict, its keys
    return (a & b).total() / (a | b).total() if a or b else 1.0


def correctness_score(gold, predicted):
    """ToolRL's rule in [0, 1]: names as a multiset, then per gold call the best unused call of the same name, by parameter names and values.

    gold: list[Call], not empty; predicted: list[Call | CallError]. One unreadable call gives 0."""
    if any(isinstance(call, CallError) for call in predicted):
        return 0.0
    score, unused = _jaccard([c.name for c in gold], [c.name for c in predicted]), list(predicted)
    for call in gold:
        best, match = 0.0, None
        for other in unused:
            if other.name == call.name:
                s = _jaccard(call.arguments, other.arguments) + sum(
                    k in other.arguments and same_value(v, other.arguments[k]) for k, v in call.arguments.items())
                best, match = (s, other) if s > best else (best, match)
        score += best
        unused = [other for other in unused if other is not match]
    return score / (1 + sum(1 + len(call.arguments) for call in gold))


def format_score(text, required):
    """1.0 if exactly the required blocks stand there, closed, in order, with nothing but space outside them; else 0.0. Consecutive call
    blocks count as one."""
    kinds, pos, outside = [], 0, ""
    for block in split_blocks(text):
        if not block.closed:
            return 0.0
        outside, pos = outside + text[pos:block.start], block.end
        if kinds[-1:] != ["tool_call"] or block.kind != "tool_call":
            kinds.append(block.kind)
    return float(kinds == list(required) and not (outside + text[pos:]).strip())


def score_texts(texts, row):
    """(format in [0, 1], correctness in [0, 1] or None where gold has no call, exact) of an episode.

    texts: the assistant turns. Format is the mean over turns, correctness compares all calls with all gold calls. A row may state the
    "blocks" of each gold turn; else it is a thought, then calls where gold has some or a response. Exact: format right and calls equal gold's."""
    gold = [Call(call["name"], call["arguments"]) for turn in row["gold"] for call in turn]
    required = row.get("blocks") or [("think", "tool_call" if turn else "response") for turn in row["gold"]]
    form = sum(map(format_score, texts, required)) / max(len(texts), len(required))  # missing and surplus turns count 0
    calls = [call for text in texts for call in parse_calls(text)]
    correct = correctness_score(gold, calls) if gold else None
    exact = form == 1.0 and len(calls) == len(gold) and (not gold or correct == 1.0)
    return form, correct, exact


def episode_reward(form, correct, progress, scaling="dynamic"):
    """Format and correctness scores -> reward (ToolRL's, arXiv 2504.13958, rescaled by the authors' code as training goes on).

    static: format in [0, 1], correctness in [-3, 3]. dynamic, with nu = 0.7 progress: format in [-2+2nu, 2-nu] (held outside (-1, 1)),
    correctness in [-(2+nu), 2+nu] (held within 3): early on format counts more, later correctness."""
    nu = 0.7 * progress
    if scaling == "static":
        f_min, f_max, c_max = 0.0, 1.0, 3.0
    else:
        f_min, f_max, c_max = min(-1.0, -2 + 2 * nu), max(1.0, 2 - nu), min(3.0, 2 + nu)
    return f_min + (f_max - f_min) * form + (0.0 if correct is None else c_max * (2 * correct - 1))


def group_advantages(rewards, scale_by_std=True, delta=1e-4):
    """rewards float [P, G] -> advantages [P, G], group mean 0; divided by the unbiased std + delta unless Dr. GRPO. Equal rewards: exactly 0."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + delta)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, advantages)


# ----------------------------------------------------------------------------------------- token weights: the heart of ResT

def region_entropy(entropy, region, mask):
    """Mean entropy (nats) of the sampled tokens of each region, over the whole rollout batch: float [6]. Tags and scaffold share the mean
    of the paper's format region. An empty region gets 0. entropy float, region int, mask bool, all [N, T]."""
    inside = F.one_hot(region.clamp(min=0), 6) * mask[..., None]  # (N, T, 6)
    form = inside[..., TAG] + inside[..., SCAFFOLD]
    inside[..., TAG], inside[..., SCAFFOLD] = form, form
    total = (inside * entropy.detach()[..., None]).sum((0, 1))
    return total / inside.sum((0, 1)).clamp(min=1)


RAW_WEIGHTS = {"one-minus-exp": lambda h: 1 / (1 - torch.exp(-h)),  # Theorem 2 with Lemma 2's bound on the score
               "inverse": lambda h: 1 / h}


def raw_weights(region_h, kind="one-minus-exp", min_entropy=0.05):
    """Region entropies [6] in nats -> weights [6] that fall with entropy: the practical proxy of Theorem 2."""
    return RAW_WEIGHTS[kind](region_h.clamp(min=min_entropy))


def curriculum(weight, progress, cfg):
    """Weights [6] at progress in [0, 1]: format down, parameters and thought up, name and free text constant."""
    w = weight.clone()
    for r in (TAG, SCAFFOLD):
        w[r] = (w[r] - cfg.alpha_format * progress).clamp(min=cfg.weight_min)
    w[PARAMS] = (w[PARAMS] + cfg.alpha_params * progress).clamp(max=cfg.weight_max)
    w[THOUGHT] = (w[THOUGHT] + cfg.alpha_thought * progress).clamp(max=cfg.weight_max)
    return w


def normalise_weights(weight, mask):
    """[N, T] weights -> mean 1 over each completion's masked tokens, 0 elsewhere: weights redistribute, they do not rescale.

    Divided by the maximum first, so that equal weights become exactly 1 (GRPO bit for bit); all-zero rows stay zero."""
    weight = torch.where(mask, weight, 0.0)
    weight = weight / weight.amax(1, keepdim=True).clamp(min=1e-30)
    mean = weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return weight / mean.clamp(min=1e-30)


def official_weights(touched, mask, step):
    """The authors' code: constants and a clock, no entropy. Where a token touches several regions the largest weight wins. [N, T].
    (Their clip of the weights to [0.001, 8] never acts.)"""
    weight = torch.tensor([1.0, 0.0, 1.2, min(1.2, 0.6 + 0.002 * step), min(1.0, 0.6 + 0.002 * step), 0.0])
    subsets = [max([float(weight[r]) for r in range(6) if bits >> r & 1], default=0.0) for bits in range(64)]  # per set of regions
    weight = torch.tensor(subsets, device=touched.device)[touched]
    return normalise_weights(weight, mask & (weight > 0))


def token_weights(region, touched, entropy, mask, cfg, step):
    """Weights float [N, T] of a rollout batch, mean 1 per completion, fixed over all passes; no gradient passes: entropy is the number
    recorded at rollout. (rest-official, as in the authors' code: mean 1 over the tokens of positive weight.)"""
    if cfg.method in ("grpo", "dr-grpo"):
        return normalise_weights(torch.ones_like(entropy), mask)
    if cfg.method == "rest-official":
        return official_weights(touched, mask, step)
    if cfg.method == "top-entropy":  # arXiv 2506.01939: the opposite belief, only the least certain tokens matter
        kept = entropy[mask].sort(descending=True).values[:max(1, round(cfg.top_entropy_fraction * int(mask.sum())))]
        return normalise_weights((entropy >= kept[-1]).float(), mask)
    raw = raw_weights(region_entropy(entropy, region, mask), cfg.raw_weight, cfg.min_entropy)  # (6,)
    raw = raw / raw[region[mask]].mean()
    weight = curriculum(raw, 0.0 if cfg.method == "rest-static" else step / cfg.steps, cfg)    # (6,)
    if cfg.method == "no-thought":
        weight[THOUGHT] = 0.0
    return normalise_weights(weight[region.clamp(min=0)], mask)                               # (N, T)


# -------------------------------------------------------------------------------------------------- log-probabilities and loss

def token_logps(x, targets, temperature, head=None, chunk_elements=2**26):
    """logp float32 [M] of targets [M] under softmax(logits / temperature).

    x: hidden states [M, H] with their output layer `head`, or logits [M, V]. Works in chunks whose float32 logits are recomputed in
    the backward pass, so that [M, V] floats never exist at once for a large vocabulary."""
    def one(x, targets):
        logits = (head(x) if head is not None else x).float() / temperature  # (m, V)
        return -F.cross_entropy(logits, targets, reduction="none")           # (m,)
    size = max(1, chunk_elements // (head.weight.shape[0] if head is not None else x.shape[-1]))
    if len(x) <= size:
        return one(x, targets)
    return torch.cat([checkpoint(one, a, b, use_reentrant=False) for a, b in zip(x.split(size), targets.split(size))])


def completion_logps(model, prompts, completions, temperature, shared):
    """logp float32 [P, G, T] of completion tokens [P, G, T] after their prompts (P id lists), with gradient.

    shared: one batch row per prompt, [prompt | G completions], each prompt forwarded once, with gradient; exact, see PackedLayout.
    Otherwise each completion is forwarded behind its own copy of the prompt. Padding behind a completion is never seen by what precedes it."""
    (P, G, T), device = completions.shape, completions.device
    ids, mask = left_pad(prompts, device)
    Lp, count = ids.shape[1], mask.sum(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (P, Lp)
    after = count[:, None] + torch.arange(T, device=device)  # (P, T) positions of completion tokens
    with autocast(model):
        if shared:
            with sharing(model):
                hidden = model.base_model(input_ids=torch.cat([ids, completions.flatten(1)], 1),  # (P, Lp+G*T)
                                          position_ids=torch.cat([positions, after.repeat(1, G)], 1),
                                          use_cache=False, layout=PackedLayout(mask, G, T)).last_hidden_state
            last = hidden[:, None, Lp - 1:Lp].expand(-1, G, -1, -1)  # (P, G, 1, H) the prompt's last state predicts token 0
            own = hidden[:, Lp:].unflatten(1, (G, T))[:, :, :-1]     # (P, G, T-1, H) state t-1 predicts token t
            x, head = torch.cat([last, own], 2).flatten(0, 2), model.get_output_embeddings()
        else:
            def repeat(a):
                return a.repeat_interleave(G, 0)
            full = torch.cat([repeat(mask), torch.ones(P * G, T, dtype=torch.bool, device=device)], 1)  # (P*G, Lp+T)
            logits = model(input_ids=torch.cat([repeat(ids), completions.flatten(0, 1)], 1), attention_mask=full.long(),
                           position_ids=torch.cat([repeat(positions), repeat(after)], 1), use_cache=False, logits_to_keep=T + 1).logits
            x, head = logits[:, -T - 1:-1].flatten(0, 1), None  # logits at t-1 predict token t
        return token_logps(x, completions.flatten(), temperature, head).view(P, G, T)


def loss_scale(mask, weight, aggregation, max_tokens):
    """Factor float [N] that turns a completion's weighted token sum into its share of the loss; from the whole batch, before micro-batching.

    sequence: 1/(N T_i); constant: 1/(N max_tokens), Dr. GRPO; token: 1/(all weights of the batch)."""
    N, tokens = len(mask), mask.sum(1)
    if aggregation == "sequence":
        return 1 / (N * tokens.clamp(min=1).float())
    if aggregation == "constant":
        return torch.full((N,), 1 / (N * max_tokens), device=mask.device)
    return (1 / (weight * mask).sum().clamp(min=1e-30)).expand(N)


def policy_loss(logp, logp_old, advantages, weight, mask, scale, clip):
    """The objective at the top of this file. logp, logp_old, weight float, mask bool [N, T]; advantages, scale float [N] -> scalar.

    Gradient reaches logp only. Sums, does not average: the means are in `scale`, so micro-batches simply add up."""
    logp_old, advantages, weight = logp_old.detach(), advantages.detach()[:, None], weight.detach()
    ratio = torch.exp(torch.where(mask, logp - logp_old, 0.0))  # (N, T)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(torch.where(mask, weight * gain, 0.0).sum(1) * scale).sum()


# --------------------------------------------------------------------------------------------------------------------- update

def update(model, optimizer, batch, advantages, weight, cfg):
    """cfg.passes optimiser steps on one rollout batch; returns a dict of metrics, means over the passes.

    advantages float [N], weight float [N, T]. Groups whose advantages are all zero have zero gradient and are not forwarded. A step
    whose loss or gradient is not finite is skipped and counted."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    scale = loss_scale(batch.sampled, weight, cfg.aggregation, cfg.max_completion_tokens)  # (N,)
    G, shared = batch.group, cfg.shared_prefix and can_share(model)
    used = advantages.view(-1, G).ne(0).any(1).nonzero()[:, 0].tolist()
    parts, total, skipped = micro_batches(batch, used, cfg.micro_batch_tokens, shared), Counter(), 0
    for _ in range(cfg.passes):
        optimizer.zero_grad(set_to_none=True)
        loss, clipped, kl, count = 0.0, 0.0, 0.0, 0
        for part in parts:
            rows = torch.tensor([p * G + g for p, members in part for g in members], device=batch.tokens.device)  # (n,)
            T = int(batch.length[rows].max())
            logp_old, mask = batch.logp[rows, :T], batch.sampled[rows, :T]                                        # (n, T)
            logp = completion_logps(model, [batch.prompts[p] for p, _ in part], batch.tokens[rows, :T].view(len(part), -1, T),
                                    cfg.temperature, shared).flatten(0, 1)                                        # (n, T)
            micro = policy_loss(logp, logp_old, advantages[rows], weight[rows, :T], mask, scale[rows], cfg.clip)
            with sharing(model) if shared else nullcontext():  # gradient checkpointing forwards again in here
                micro.backward()
            with torch.no_grad():
                log_ratio, sign = (logp - logp_old)[mask], advantages[rows].sign()[:, None].expand_as(mask)[mask]
                loss += micro.detach()
                clipped += (sign * (log_ratio.exp() - 1) > cfg.clip).sum()
                kl += (log_ratio.exp() - 1 - log_ratio).sum()  # the k3 estimate of KL(old || new)
                count += len(log_ratio)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            optimizer.step()
        else:
            skipped += 1
        total.update(loss=float(loss), grad_norm=float(norm), clip_fraction=float(clipped) / max(count, 1), kl=float(kl) / max(count, 1))
    optimizer.zero_grad(set_to_none=True)
    return {"skipped_updates": skipped, **{name: value / cfg.passes for name, value in total.items()}}


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup_steps, then linear decay to a tenth of cfg.learning_rate at cfg.steps."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return cfg.learning_rate * warm * (1 - 0.9 * max(0, step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps))


# ---------------------------------------------------------------------------------------------------- one step, and evaluation

def score_batch(batch):
    """(format, correctness, exact) of every episode, list of N."""
    return [score_texts(texts, batch.rows[i // batch.group]) for i, texts in enumerate(batch.texts)]


def train_step(model, tokenizer, optimizer, rows, cfg, step, toolbox_for=None, instructions="", clock=None):
    """One ResT step on cfg.prompts rows: roll out, score, weigh, update. Returns (metrics, Rollout, region [N, T], weight [N, T]).

    clock(name), if given, is called after each phase: rollout, reward, update."""
    clock = clock or (lambda name: None)
    batch = rollout(model, tokenizer, rows, cfg, seed=cfg.seed * 1_000_003 + step, toolbox_for=toolbox_for, instructions=instructions)
    clock("rollout")
    scores = score_batch(batch)
    rewards = torch.tensor([episode_reward(f, c, step / cfg.steps, cfg.reward_scaling) for f, c, _ in scores], device=batch.tokens.device)
    advantages = group_advantages(rewards.view(-1, batch.group), cfg.method != "dr-grpo", cfg.delta).flatten()  # (N,)
    region, touched = token_regions(tokenizer, batch, eos_ids(model, tokenizer))
    weight = token_weights(region, touched, batch.entropy, batch.sampled, cfg, step)
    clock("reward")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    metrics = update(model, optimizer, batch, advantages, weight, cfg)
    clock("update")
    entropy = region_entropy(batch.entropy, region, batch.sampled)
    N = len(scores)
    metrics.update(
        step=step, reward=float(rewards.mean()), exact=sum(e for *_, e in scores) / N, format=sum(f for f, *_ in scores) / N,
        correct=sum(c for _, c, _ in scores if c is not None) / max(1, sum(c is not None for _, c, _ in scores)),
        zero_groups=float(advantages.view(-1, batch.group).eq(0).all(1).float().mean()), truncated=float(batch.truncated.float().mean()),
        tokens=float(batch.sampled.sum() / N), lr=learning_rate(cfg, step))
    for name, r in (("format", TAG), ("name", NAME), ("params", PARAMS), ("thought", THOUGHT), ("text", TEXT)):
        inside = (region == r) | (region == SCAFFOLD) if r == TAG else region == r
        metrics[f"H_{name}"] = float(entropy[r])
        metrics[f"w_{name}"] = float(weight[inside].mean()) if bool(inside.any()) else 0.0
    return metrics, batch, region, weight


def evaluate(model, tokenizer, rows, cfg, greedy=False, samples=1, seed=0, batch_rows=64, toolbox_for=None, instructions="", on_batch=None):
    """Exact-call rate, format, correctness and mean sampled tokens over rows, per category and overall.

    Greedy, or `samples` completions per row at cfg.temperature. Returns {category: {n, exact, format, correct, tokens}}, key "all" last."""
    found = {}
    for start in range(0, len(rows), batch_rows):
        part = rows[start:start + batch_rows]
        batch = rollout(model, tokenizer, part, cfg, seed=seed + start, group=1 if greedy else samples, greedy=greedy,
                        toolbox_for=toolbox_for, instructions=instructions)
        for i, (form, correct, exact) in enumerate(score_batch(batch)):
            for key in (part[i // batch.group].get("category", "rows"), "all"):
                found.setdefault(key, []).append((exact, form, correct, int(batch.sampled[i].sum())))
        if on_batch:
            on_batch(len(part))
    table = {}
    for key in sorted(found, key=lambda k: (k == "all", k)):
        exact, form, correct, tokens = zip(*found[key])
        correct = [c for c in correct if c is not None]
        table[key] = {"n": len(exact), "exact": sum(exact) / len(exact), "format": sum(form) / len(form),
                      "correct": sum(correct) / len(correct) if correct else None, "tokens": sum(tokens) / len(tokens)}
    return table
