"""ResT: reshaping token-level policy gradients for tool-use LLMs (arXiv 2509.21826), in one file.

    L = - 1/N  sum_i  1/T_i  sum_t  w_it min( rho_it A_i,  clip(rho_it, 1-eps, 1+eps) A_i )

    rho_it = exp(logp_it - logp_old_it)                 importance ratio
    A_i    = (r_i - group mean) / (group std + delta)   advantage of completion i in its group
    w_it                                                token weight, mean 1 over those weighted
    T_i                                                 sampled tokens of completion i

GRPO without KL, times w (w = 1 is GRPO). Every sampled token lies in a region, whose weight falls
with the mean policy entropy there; a curriculum moves weight from format to reasoning.
One completion and its regions (the paper's "format" is tag and scaffold together; the sixth, text,
is what a <response> holds and what stands outside all blocks):

    <think>Oslo, so get_weather.</think>                    tag  thought  tag
    <tool_call>                                             tag
    {"name": "get_weather", "arguments": {"city": "Oslo"}}  scaffold name scaffold params scaffold
    </tool_call><|im_end|>                                  tag  tag, the turn's end: trained too

One sample's life, the order of this file but for Chat and Engine (P prompts, G completions each,
N = P*G, T tokens, V ids). gold: per turn, its calls as {"name", "arguments"}; [[]]: none is right.

    row {messages, tools, gold} -> prompt ids          Chat.prompt
    -> tokens, sampled mask, logp_old, entropy [N, T]  rollout
    -> region of every sampled token [N, T]            token_regions
    -> region entropy [6] -> token weight [N, T]       WEIGHTS[method]
    -> reward [N] -> advantage [P, G]                  score_texts, episode_reward, group_advantages
    -> logp with gradient [N, T]                       Engine.logps
    -> scalar loss -> optimiser step                   policy_loss, update

Behind that: reading and running calls, `Chat` and `Engine`; toy_tools/ has a hardened Chat and a
fast Engine. "Departure" says where paper, authors' code and this file differ.
"""

import asyncio
import copy
import inspect
import json
import logging
import math
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---- configuration ----

BOUNDS = {
    "above 0": lambda x: x > 0, "in (0, 1)": lambda x: 0 < x < 1, "in (0, 1]": lambda x: 0 < x <= 1,
    "at least 0": lambda x: x >= 0, "at least 1": lambda x: x >= 1, "at least 2": lambda x: x >= 2}

def knob(default, text, bound=None):
    """A field with its help text and its bound, a key of BOUNDS."""
    return field(default=default, metadata={"help": text, "bound": bound})

@dataclass
class Config:
    """The algorithm's constants. Raises ValueError with a sentence for what cannot be."""
    method: str = knob("rest", "Weighting of tokens: a name in rest.WEIGHTS.")
    reward_scaling: str = knob("dynamic", "dynamic: parts move with progress; static: ToolRL's.")
    raw_weight: str = knob("one-minus-exp", "one-minus-exp: 1/(1-exp(-H)); inverse: 1/H.")
    min_entropy: float = knob(0.05, "Lower bound of entropies (nats).", "above 0")
    alpha_format: float = knob(0.5, "Weight that format loses over the run.", "at least 0")
    alpha_params: float = knob(0.5, "Weight that parameters gain.", "at least 0")
    alpha_thought: float = knob(0.5, "Weight that thoughts gain.", "at least 0")
    weight_min: float = knob(0.2, "Lower bound of format's weight.", "at least 0")
    weight_max: float = knob(5.0, "Upper bound of params' and thought's.", "at least 0")
    top_entropy_fraction: float = knob(0.2, "Share of tokens that top-entropy trains.", "in (0, 1]")
    steps: int = knob(100, "Steps; progress is step/steps. 0: no training.", "at least 0")
    prompts: int = knob(16, "Prompts per step (P).", "at least 1")
    group: int = knob(8, "Completions per prompt (G).", "at least 2")
    max_completion_tokens: int = knob(160, "Tokens of an episode, with tool results.", "at least 1")
    max_turns: int = knob(1, "Turns of an episode; calls run between two.", "at least 1")
    temperature: float = knob(1.0, "Of sampling, logp and entropy.", "above 0")
    clip: float = knob(0.2, "epsilon of the clipped ratio.", "in (0, 1)")
    delta: float = knob(1e-4, "Added to the group's standard deviation.", "at least 0")
    aggregation: str = knob("", "sequence, token or constant; empty: as --method needs.")
    passes: int = knob(1, "Optimiser steps on each rollout batch.", "at least 1")
    micro_batch_tokens: int = knob(4096, "Tokens per forward; on a GPU try 32768.", "at least 1")
    learning_rate: float = knob(5e-4, "Peak of AdamW's; about 1e-6 for a real --model.", "above 0")
    warmup_steps: int = knob(5, "Linear warm-up, then decay to a tenth.", "at least 0")
    weight_decay: float = knob(0.0, "AdamW weight decay.", "at least 0")
    max_grad_norm: float = knob(1.0, "Bound of the gradient norm.", "above 0")
    tool_timeout: float = knob(2.0, "Seconds a tool may take.", "above 0")
    seed: int = knob(0, "Seed of data order and sampling.", "at least 0")

    def __post_init__(self):
        if not self.aggregation:
            self.aggregation = "constant" if self.method == "dr-grpo" else "sequence"
        names = {
            "method": WEIGHTS, "aggregation": ("sequence", "token", "constant"),
            "reward_scaling": ("dynamic", "static"), "raw_weight": ("one-minus-exp", "inverse")}
        for option in fields(self):
            name, bound, value = option.name, option.metadata["bound"], getattr(self, option.name)
            if name in names and value not in names[name]:
                raise ValueError(f"{name} must be one of {', '.join(names[name])}, not {value!r}")
            if bound and not (math.isfinite(value) and BOUNDS[bound](value)):
                raise ValueError(f"{name} must be a number {bound}, not {value}")
        if self.weight_max < self.weight_min:
            raise ValueError(f"weight_max {self.weight_max} is below weight_min {self.weight_min}")

# ---- rollout ----

@dataclass
class Rollout:
    """N = P*G completions, those of prompt p in rows p*G … p*G+G-1; right-padded to T columns."""
    rows: list  # the P rows
    prompts: list  # P lists of prompt ids
    group: int  # G
    tokens: torch.Tensor  # int64 [N, T], sampled, or forced by template and tools; 0: padding
    sampled: torch.Tensor  # bool [N, T], chosen by the policy: neither forced nor padding
    logp: torch.Tensor  # float32 [N, T], logp_old, at cfg.temperature; 0 where not sampled
    entropy: torch.Tensor  # float32 [N, T], nats; 0 where not sampled
    length: torch.Tensor  # int64 [N], sampled and forced tokens; on the CPU, sizes only
    truncated: torch.Tensor  # bool [N], ran out of max_completion_tokens
    turns: list  # per episode: [(start, end)] columns of each assistant turn
    texts: list  # per episode: each turn's text, without its end-of-turn token
    refused: list = None  # per episode: calls that the executor refused
    tool_errors: int = 0  # calls whose tool failed
    region: torch.Tensor = None  # int64 [N, T], -1 where not sampled; see token_regions
    covers: torch.Tensor = None  # bool [N, T, 6]; the same
    scores: list = None  # N (format, correctness or None, exact); see score_texts
    advantages: torch.Tensor = None  # float [N]

class Episode:
    """A completion, of one or more turns, while it is sampled; between turns its tools answer."""

    def __init__(self, row, functions, opening):
        self.row = row
        self.functions = functions  # {name: callable} of its own box; empty: no call runs
        self.forced = list(opening)  # ids that come next, whatever the policy would choose
        self.ids = []
        self.sampled = []  # for each id, whether the policy chose it
        self.start = 0  # where this turn begins
        self.turns = []
        self.texts = []
        self.refused = 0
        self.tool_errors = 0
        self.ended = False

    def append(self, choice, chat, cfg):
        """Append the forced id, or the policy's choice, which may end the turn -> the id."""
        if self.ended:  # it stays in the batch until Engine.drop finds that it pays
            return choice
        forced = bool(self.forced)
        token = self.forced.pop(0) if forced else choice
        self.ids.append(token)
        self.sampled.append(not forced)
        if token in chat.end_ids and not forced:
            self.end_turn(chat, cfg, closed=True)
            self.ended = not self.forced  # no tool has answered
        return token

    def end_turn(self, chat, cfg, closed):
        """End the turn, by an end token if `closed`, and run its calls: results are forced."""
        text = chat.decode(self.ids[self.start:len(self.ids) - closed])
        self.turns.append((self.start, len(self.ids)))
        self.texts.append(text)
        more = closed and self.functions and len(self.turns) < cfg.max_turns
        calls = parse_calls(text) if more else []
        if calls:
            results, refused, errors = execute(calls, self.functions, cfg.tool_timeout)
            self.refused += refused
            self.tool_errors += errors
            reply, opening = chat.reply(self.row, results, self.ids[-1])
            self.start = len(self.ids) + len(reply)
            self.forced = reply + opening

@torch.no_grad()
def rollout(engine, chat, rows, cfg, seed=0, group=None, greedy=False, toolbox_for=None):
    """Sample `group` (default cfg.group) completions of each row -> Rollout, without regions. Each
    has its own uniforms: what it samples does not depend on others. If cfg.max_turns > 1, its calls
    run the `.functions` of its own box, toolbox_for(row). Raises ValueError if one is missing,
    FloatingPointError if logits are not finite."""
    G = group or cfg.group
    N = len(rows) * G
    T = cfg.max_completion_tokens
    device = engine.device
    uniforms = torch.rand(N, T, generator=torch.Generator().manual_seed(seed))
    uniforms = uniforms.clamp_(max=1 - 1e-6).to(device)
    logp, entropy = torch.zeros(2, N, T, device=device)
    prompts = []
    episodes = []
    for row in rows:
        prompt, opening = chat.prompt(row)
        prompts.append(prompt)
        for _ in range(G):
            live = toolbox_for is not None and cfg.max_turns > 1
            functions = offered(row, toolbox_for(row)) if live else {}
            episodes.append(Episode(row, functions, opening))

    with engine.sampling():
        active = episodes  # the S episodes in the engine's batch
        at = torch.arange(N, device=device)  # (S,) which of the N they are
        logits = engine.prefill(prompts, G, T)  # (S, V)
        for t in range(T):
            choice, logp[at, t], entropy[at, t] = sample(
                logits, uniforms[at, t], cfg.temperature, greedy)
            chosen = choice.tolist()  # the one wait for the device per token
            ids = [e.append(token, chat, cfg) for e, token in zip(active, chosen)]
            ended = [e.ended for e in active]
            if t == T - 1 or all(ended):
                break
            if ids != chosen:
                choice = to_device(ids, device)  # (S,)
            if (kept := engine.drop(ended)) is not None:
                active = [active[s] for s in kept]
                kept = to_device(kept, device)
                at = at[kept]
                choice = choice[kept]
            logits = engine.step(choice, t)

    for e in episodes:
        if not e.ended and e.start < len(e.ids):  # the turn that was cut is scored as it stands
            e.end_turn(chat, cfg, closed=False)
    T = max(len(e.ids) for e in episodes)

    def padded(lists):  # -> [N, T]
        return to_device([x + [0] * (T - len(x)) for x in lists], device)

    tokens = padded([e.ids for e in episodes])
    sampled = padded([e.sampled for e in episodes]).bool()
    logp = torch.where(sampled, logp[:, :T], 0.0)
    entropy = torch.where(sampled, entropy[:, :T], 0.0)
    if not bool(logp.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite: its weights have diverged")
    length = torch.tensor([len(e.ids) for e in episodes])
    truncated = to_device([not e.ended for e in episodes], device)
    return Rollout(
        rows, prompts, G, tokens, sampled, logp, entropy, length, truncated,
        turns=[e.turns for e in episodes], texts=[e.texts for e in episodes],
        refused=[e.refused for e in episodes], tool_errors=sum(e.tool_errors for e in episodes))

def sample(logits, uniforms, temperature, greedy=False):
    """One token per row of softmax(logits [S, V] / temperature), where its cumulative distribution
    reaches uniforms [S] in [0, 1); the likeliest if greedy -> ids int64 [S], logp, entropy (nats)
    float32 [S]."""
    log_p = F.log_softmax(logits.float() / temperature, -1)  # (S, V)
    p = log_p.exp()  # (S, V)
    if greedy:
        ids = logits.argmax(-1)  # (S,)
    else:
        cdf = p.cumsum(-1)  # (S, V)
        aim = uniforms[:, None] * cdf[:, -1:]  # (S, 1)
        ids = torch.searchsorted(cdf, aim, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    logp = log_p.gather(1, ids[:, None])[:, 0]  # (S,)
    return ids, logp, torch.special.entr(p).sum(-1)  # entr(p) = -p log p, and 0 at p = 0

# ---- regions ----

REGIONS = ("tag", "scaffold", "name", "params", "thought", "text")
TAG, SCAFFOLD, NAME, PARAMS, THOUGHT, TEXT = range(6)
PAPER_REGIONS = {  # rest_official alone tells tag and scaffold apart
    "format": (TAG, SCAFFOLD), "name": (NAME,), "params": (PARAMS,), "thought": (THOUGHT,),
    "text": (TEXT,)}

def tag_regions(pieces):
    """For each token of a turn, given as text, the regions of its visible characters in order: the
    first is its own. A blank token takes the region it stands in.
    >>> tag_regions(['<think>', 'hm', '</think>'])
    [[0], [4], [0]]
    """
    label = label_chars("".join(pieces)) or [TEXT]
    regions = []
    pos = 0
    for piece in pieces:
        visible = [label[k] for k, c in enumerate(piece, pos) if not c.isspace()]
        regions.append(list(dict.fromkeys(visible)) or [label[min(pos, len(label) - 1)]])
        pos += len(piece)
    return regions

def token_regions(batch, chat):
    """region int64 [N, T], -1 where not sampled; covers bool [N, T, 6], all that a token touches.
    Departure: of the sampled ids; the authors tokenise the decoded text again, which shifts labels
    where tokens are not canonical, and drop each span's last token."""
    region = torch.full(batch.tokens.shape, -1)
    covers = torch.zeros(*batch.tokens.shape, len(REGIONS), dtype=torch.bool)
    for i, (ids, turns) in enumerate(zip(batch.tokens.tolist(), batch.turns)):
        for start, end in turns:
            closed = ids[end - 1] in chat.end_ids
            regions = tag_regions([chat.text(token) for token in ids[start:end - closed]])
            regions += [[TAG]] * closed
            region[i, start:end] = torch.tensor([found[0] for found in regions])
            touched = [[r in found for r in range(6)] for found in regions]
            covers[i, start:end] = torch.tensor(touched)
    device = batch.sampled.device
    region = region.to(device, non_blocking=True)
    covers = covers.to(device, non_blocking=True)
    return torch.where(batch.sampled, region, -1), covers & batch.sampled[..., None]

# ---- token weights: the heart of ResT ----

def region_entropy(batch):
    """H_avg float [6]: mean entropy (nats) of a region's sampled tokens, 0 without any; one for tag
    and scaffold, the paper's format."""
    inside = batch.region[..., None] == torch.arange(6, device=batch.region.device)  # (N, T, 6)
    inside[..., :NAME] = inside[..., :NAME].any(-1, keepdim=True)  # tag or scaffold
    total = (inside * batch.entropy.detach()[..., None]).sum((0, 1))  # (6,)
    return total / inside.sum((0, 1)).clamp(min=1)

def raw_weights(entropy, kind="one-minus-exp", min_entropy=0.05):
    """Entropies (nats) -> weights that fall with them: Theorem 2's proxy, by Lemma 2's bound."""
    h = entropy.clamp(min=min_entropy)
    return 1 / h if kind == "inverse" else 1 / (1 - torch.exp(-h))

def curriculum(weight, progress, cfg):
    """Weights [6] at progress in [0, 1]: format down, parameters and thought up. Departure: the
    paper's constants are unpublished; ours are in Config."""
    w = weight.clone()
    for r in PAPER_REGIONS["format"]:
        w[r] = (w[r] - cfg.alpha_format * progress).clamp(min=cfg.weight_min)
    w[PARAMS] = (w[PARAMS] + cfg.alpha_params * progress).clamp(max=cfg.weight_max)
    w[THOUGHT] = (w[THOUGHT] + cfg.alpha_thought * progress).clamp(max=cfg.weight_max)
    return w

def normalise_weights(weight, mask):
    """Weights [N, T] -> mean 1 over each row's masked tokens, 0 elsewhere and in rows of zeros.
    First divided by the maximum: equal weights become exactly 1, GRPO bit for bit."""
    weight = torch.where(mask, weight, 0.0)
    weight = weight / weight.amax(1, keepdim=True).clamp(min=1e-30)
    mean = weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return weight / mean.clamp(min=1e-30)

def region_weights(batch, cfg, progress):
    """ResT's weight of each region [6]: raw weights of the region entropies, then the curriculum.
    Departure: divided by their token mean first, so that constants mean the same at any entropy."""
    raw = raw_weights(region_entropy(batch), cfg.raw_weight, cfg.min_entropy)  # (6,)
    raw = raw / raw[batch.region[batch.sampled]].mean()
    return curriculum(raw, progress, cfg)

def rest_weights(batch, cfg, progress):
    """ResT: by region entropy and curriculum."""
    weight = region_weights(batch, cfg, progress)
    return normalise_weights(weight[batch.region], batch.sampled)  # -1 is masked

def no_thought(batch, cfg, progress):
    """The paper's ablation: thoughts get no gradient."""
    weight = region_weights(batch, cfg, progress)
    weight[THOUGHT] = 0.0
    return normalise_weights(weight[batch.region], batch.sampled)  # -1 is masked

def rest_official(batch, cfg, progress):
    """The authors' code: constants and a clock, no entropy; a token's largest region counts.
    Departure: theirs gives end-of-turn tokens 0, so that nothing trains stopping, weights only the
    first call of a block, and has a clip to [0.001, 8] that never acts."""
    ramp = 0.6 + 0.002 * round(progress * cfg.steps)
    constants = [1.0, 0.0, 1.2, min(1.2, ramp), min(1.0, ramp), 0.0]  # in the order of REGIONS
    weight = to_device(constants, batch.covers.device) * batch.covers  # (N, T, 6)
    weight = weight.amax(-1)  # (N, T)
    return normalise_weights(weight, batch.sampled & (weight > 0))

def uniform(batch, cfg, progress):
    """GRPO."""
    return normalise_weights(torch.ones_like(batch.entropy), batch.sampled)

def top_entropy(batch, cfg, progress):
    """Opposite to ResT, arXiv 2506.01939: only the least certain tokens matter."""
    entropy = batch.entropy[batch.sampled].sort(descending=True).values
    count = max(1, round(cfg.top_entropy_fraction * len(entropy)))
    return normalise_weights((batch.entropy >= entropy[count - 1]).float(), batch.sampled)

def entropy_up(batch, cfg, progress):
    """Opposite to ResT, mildly, arXiv 2510.14545: by the standardised entropy."""
    entropy = batch.entropy[batch.sampled]
    z = (batch.entropy - entropy.mean()) / entropy.std().clamp(min=1e-6)
    return normalise_weights((1 + 0.2 * z).clamp(min=0), batch.sampled)

def low_prob(batch, cfg, progress):
    """arXiv 2505.12929, alpha = 0.2: surer tokens count more, by their own probability."""
    return normalise_weights(0.2 * batch.logp.exp() + 0.8, batch.sampled)

def token_entropy(batch, cfg, progress):
    """Do regions matter? The raw weight of the token's own entropy instead of its region's."""
    weight = raw_weights(batch.entropy, cfg.raw_weight, cfg.min_entropy)
    return normalise_weights(weight, batch.sampled)

def shuffled(batch, cfg, progress):
    """Control: ResT's weights, permuted among the tokens of each completion."""
    step = round(progress * cfg.steps)
    seed = -1 - (cfg.seed * 1_000_003 + step)  # not the numbers that the tokens were sampled with
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(batch.sampled.shape, generator=generator).to(batch.sampled.device)
    source = torch.where(batch.sampled, key, 2.0).argsort(1)  # sampled columns, at random
    target = (~batch.sampled).int().argsort(dim=1, stable=True)  # sampled columns, in order
    weight = rest_weights(batch, cfg, progress)
    return torch.zeros_like(weight).scatter(1, target, weight.gather(1, source))

# name -> f(Rollout with regions, cfg, progress in [0, 1]): float [N, T], 0 where not sampled
WEIGHTS = {
    "rest": rest_weights,
    "rest-static": lambda batch, cfg, progress: rest_weights(batch, cfg, 0.0),  # curriculum at 0
    "rest-official": rest_official,
    "no-thought": no_thought,
    "grpo": uniform,
    "dr-grpo": uniform,
    "top-entropy": top_entropy,
    "entropy-up": entropy_up,
    "low-prob": low_prob,
    "token-entropy": token_entropy,
    "shuffled": shuffled}

# ---- reward and advantage ----

def _jaccard(a, b):
    a, b = Counter(a), Counter(b)
    return (a & b).total() / (a | b).total() if a or b else 1.0

def _agreement(call, other):
    # 0 for another name; else the overlap of parameter names in [0, 1], and 1 for each equal value
    if call.name != other.name:
        return 0.0
    a, b = call.arguments, other.arguments
    return _jaccard(a.keys(), b.keys()) + sum(same_value(a[key], b[key]) for key in a if key in b)

def correctness_score(gold, predicted):
    """ToolRL's rule (arXiv 2504.13958) in [0, 1]: the multisets of names, then each gold call with
    the best unused call of its name. gold: Calls, not empty; predicted: Calls; 0 with an error."""
    if any(isinstance(call, CallError) for call in predicted):
        return 0.0
    score = _jaccard([c.name for c in gold], [c.name for c in predicted])
    unused = list(predicted)
    for call in gold:
        scores = [_agreement(call, other) for other in unused]
        best = max(scores, default=0.0)
        score += best
        if best > 0:  # what has nothing in common stays for the next
            del unused[scores.index(best)]
    return score / (1 + sum(1 + len(call.arguments) for call in gold))

def format_score(text, required):
    """1.0 if just the required blocks stand there, closed, in order, only space between them, none
    but calls empty, no call tag in a response; else 0.0. Adjacent call blocks are one."""
    kinds = []
    pos = 0
    for block in split_blocks(text):
        inner = text[slice(*block.inner)]
        empty = block.kind != "tool_call" and not inner.strip()
        hidden = block.kind == "response" and re.search("</?tool_call>", inner)
        if not block.closed or empty or hidden or text[pos:block.start].strip():
            return 0.0
        if not (kinds and kinds[-1] == block.kind == "tool_call"):
            kinds.append(block.kind)
        pos = block.end
    return float(kinds == list(required) and not text[pos:].strip())

def score_texts(texts, row, refused=0):
    """(format, correctness, exact) of an episode: format in [0, 1], correctness in [0, 1] or None
    without gold calls, exact if all is right and no call was refused. Format is the mean over
    turns: row["blocks"][turn], or a thought, then calls if gold has some, else a response."""
    gold = []
    for i, turn in enumerate(row["gold"]):  # (turn, name): the same call in another turn is another
        gold += [Call((i, call["name"]), call["arguments"]) for call in turn]
    calls = []
    for i, text in enumerate(texts):
        calls += [call if isinstance(call, CallError) else Call((i, call.name), call.arguments)
                  for call in _calls(text)]
    required = row.get("blocks")
    if not required:
        required = [("think", "tool_call" if turn else "response") for turn in row["gold"]]
    turns = max(len(texts), len(required))  # missing and surplus turns count 0
    form = sum(map(format_score, texts, required)) / turns
    correct = correctness_score(gold, calls) if gold else None
    same = len(calls) == len(gold) and correct in (1.0, None)
    return form, correct, form == 1.0 and same and not refused

def episode_reward(form, correct, progress, scaling="dynamic"):
    """Scores -> ToolRL's reward, format from low to high, correctness from -most to most.
    Departure: the paper scales the whole reward with progress, which advantages cancel; like the
    authors' code (nu = step/150) we scale part against part."""
    low, high, most = 0.0, 1.0, 3.0
    if scaling == "dynamic":
        nu = 0.7 * progress
        low, high, most = min(-1.0, -2 + 2 * nu), 2 - nu, 2 + nu
    return low + (high - low) * form + (0.0 if correct is None else most * (2 * correct - 1))

def group_advantages(rewards, scale_by_std=True, delta=1e-4):
    """rewards float [P, G] -> advantages [P, G], group mean 0, divided by the unbiased std + delta
    unless Dr. GRPO (arXiv 2503.20783). Equal rewards: exactly 0."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + delta)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, advantages)

# ---- loss and update ----

def loss_scale(mask, weight, aggregation, max_tokens):
    """Factor float [N] of a completion's weighted token sum in the loss. sequence: 1/(N T_i);
    constant: 1/(N max_tokens), Dr. GRPO; token: 1/(all weights of the batch). Departure: the
    authors divide by each micro-batch's own weights, so that its size changes their gradient."""
    N = len(mask)
    if aggregation == "sequence":
        return 1 / (N * mask.sum(1).clamp(min=1).float())
    if aggregation == "constant":
        return torch.full((N,), 1 / (N * max_tokens), device=mask.device)
    return (1 / (weight * mask).sum().clamp(min=1e-30)).expand(N)

def policy_loss(logp, logp_old, advantages, weight, mask, scale, clip):
    """The objective at the top. logp, logp_old, weight float, mask bool [N, T]; advantages, scale
    float [N] -> a scalar sum: micro-batches add up. Only logp has a gradient."""
    logp_old = logp_old.detach()
    advantages = advantages.detach()[:, None]  # (N, 1)
    ratio = torch.exp(torch.where(mask, logp - logp_old, 0.0))  # (N, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)  # (N, T)
    gain = torch.minimum(ratio * advantages, clipped * advantages)  # (N, T)
    return -(torch.where(mask, weight.detach() * gain, 0.0).sum(1) * scale).sum()

def update(engine, optimizer, batch, advantages, weight, cfg, on_policy=False):
    """cfg.passes optimiser steps; advantages [N], weight [N, T] -> metrics, means of passes. Groups
    whose advantages are all 0 are not forwarded; a step whose loss or gradient is not finite is
    skipped and counted. on_policy: raises RuntimeError if the first ratios are not 1."""
    device = batch.tokens.device
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    scale = loss_scale(batch.sampled, weight, cfg.aggregation, cfg.max_completion_tokens)  # (N,)
    teaches = advantages.view(-1, batch.group).ne(0).any(1)  # (P,)
    groups = [p for p, teaching in enumerate(teaches.tolist()) if teaching]
    micro_batches = engine.micro_batches(batch, groups, cfg.micro_batch_tokens)
    total = Counter()
    skipped = 0
    for number in range(cfg.passes):
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, device=device)  # loss, clipped tokens, KL, tokens
        for part in micro_batches:
            logp = engine.logps(batch, part, cfg.temperature)  # (n, T), T of the longest
            rows = to_device(part, device)  # (n,)
            T = logp.shape[1]
            logp_old = batch.logp[rows, :T]  # (n, T)
            mask = batch.sampled[rows, :T]  # (n, T)
            advantage = advantages[rows]  # (n,)
            w = weight[rows, :T]  # (n, T)
            loss = policy_loss(logp, logp_old, advantage, w, mask, scale[rows], cfg.clip)
            engine.backward(loss)
            with torch.no_grad():
                log_ratio = torch.where(mask, logp - logp_old, 0.0)
                change = log_ratio.exp() - 1
                clipped = advantage.sign()[:, None] * change > cfg.clip
                kl = change - log_ratio  # the k3 estimate of KL(old || new)
                sums += torch.stack([loss.detach(), clipped.sum(), kl.sum(), mask.sum()])
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).to(device)
        sums = torch.cat([sums, norm[None]])
        loss, clipped, kl, count, norm = sums.tolist()  # the one wait for the device per pass
        kl /= max(count, 1)
        if on_policy and number == 0 and kl > engine.tolerance:
            raise RuntimeError(
                f"update and rollout disagree about the same policy (KL {kl:.1e}): its forward is "
                "random (dropout, router noise) or depends on padding, so ratios would be wrong")
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimizer.step()
        total.update(loss=loss, grad_norm=norm, clip_fraction=clipped / max(count, 1), kl=kl)
        skipped += not finite
    optimizer.zero_grad(set_to_none=True)
    return {"skipped_updates": skipped} | {name: x / cfg.passes for name, x in total.items()}

def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup_steps, then linear decay to a tenth at cfg.steps."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    decay = max(0, step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * warm * (1 - 0.9 * decay)

# ---- one step, and evaluation ----

def train_step(engine, chat, optimizer, rows, cfg, step, toolbox_for=None, clock=None):
    """One ResT step on cfg.prompts rows -> metrics, Rollout, weight [N, T]. clock(name) is called
    after each phase: rollout, reward (regions and weights too), update."""
    clock = clock or (lambda name: None)
    progress = step / cfg.steps
    seed = cfg.seed * 1_000_003 + step
    batch = rollout(engine, chat, rows, cfg, seed, toolbox_for=toolbox_for)
    clock("rollout")
    batch.region, batch.covers = token_regions(batch, chat)
    weight = WEIGHTS[cfg.method](batch, cfg, progress)  # (N, T)
    batch.scores = score_batch(batch)
    rewards = [episode_reward(*score[:2], progress, cfg.reward_scaling) for score in batch.scores]
    rewards = to_device(rewards, batch.tokens.device).view(-1, batch.group)  # (P, G)
    batch.advantages = group_advantages(rewards, cfg.method != "dr-grpo", cfg.delta).flatten()
    clock("reward")
    lr = learning_rate(cfg, step)
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    metrics = update(engine, optimizer, batch, batch.advantages, weight, cfg, on_policy=True)
    clock("update")
    metrics |= {"step": step, "lr": lr, "tool_errors": batch.tool_errors}
    metrics |= mean_scores(batch.scores) | batch_metrics(batch, rewards, weight)
    metrics["correct"] = metrics["correct"] or 0.0  # None: the batch has no gold call
    return metrics, batch, weight

def batch_metrics(batch, rewards, weight):
    """Means over the batch, fetched from the device at once; H_ (nats) and w_ by paper region."""
    silent = batch.advantages.view(rewards.shape).eq(0).all(1)
    values = {
        "reward": rewards.mean(),
        "zero_groups": silent.float().mean(),
        "truncated": batch.truncated.float().mean(),
        "tokens": batch.sampled.sum() / len(batch.sampled)}
    entropy = region_entropy(batch)
    for name, members in PAPER_REGIONS.items():
        inside = sum(batch.region == r for r in members)
        values["H_" + name] = entropy[members[0]]
        count = inside.sum().clamp(min=1)
        values["w_" + name] = (weight * inside).sum() / count
    numbers = torch.stack([x.float() for x in values.values()])
    return dict(zip(values, numbers.tolist()))

def score_batch(batch):
    """(format, correctness or None, exact) of every episode, list of N."""
    return [score_texts(texts, batch.rows[i // batch.group], refused)
            for i, (texts, refused) in enumerate(zip(batch.texts, batch.refused))]

def mean_scores(scores):
    """Shares over episodes; correctness over those whose gold has calls, None if none has."""
    forms, corrects, exacts = zip(*scores)
    corrects = [c for c in corrects if c is not None]
    return {
        "exact": sum(exacts) / len(exacts),
        "format": sum(forms) / len(forms),
        "correct": sum(corrects) / len(corrects) if corrects else None}

def evaluate(engine, chat, rows, cfg, greedy=False, samples=1, seed=0, batch_rows=64,
             toolbox_for=None, on_batch=None):
    """{category: {n, exact, format, correct, tokens}}, means over the rows' episodes, "all" last:
    greedy, or `samples` completions per row at cfg.temperature."""
    seen = {}  # category -> [(scores of an episode, its sampled tokens)]
    for start in range(0, len(rows), batch_rows):
        part = rows[start:start + batch_rows]
        group = 1 if greedy else samples
        batch = rollout(
            engine, chat, part, cfg, seed + start, group, greedy, toolbox_for=toolbox_for)
        for i, one in enumerate(zip(score_batch(batch), batch.sampled.sum(1).tolist())):
            for key in {part[i // batch.group].get("category", "rows"), "all"}:
                seen.setdefault(key, []).append(one)
        if on_batch:
            on_batch(len(part))
    table = {}
    for key in sorted(seen, key=lambda key: (key == "all", key)):
        scores, tokens = zip(*seen[key])
        table[key] = {"n": len(scores), **mean_scores(scores), "tokens": sum(tokens) / len(tokens)}
    return table

# ---- appendix: reading calls from text ----

# bounds: reading takes linear time on any text, and what it returns is not deep
MAX_CALLS = 64  # of a turn; those behind them are one error
MAX_CHARS = 2**14  # of a call
MAX_DEPTH = 64  # of a value in a call
SPACE = re.compile(r"[ \t\r\n]*")
OPENING_TAG = re.compile(r"<(think|tool_call|response)>")

class CallError(ValueError):
    """A call that cannot run; its text is what the model reads."""

class MalformedCall(CallError):
    """Not one JSON object with a "name" and an object of "arguments" (or "parameters")."""

class InvalidArguments(CallError):
    """The arguments do not fit the tool's schema, or the tool refused them."""

@dataclass
class Call:
    name: str
    arguments: dict

class Reading(NamedTuple):
    """One call, as read at text[start:end]."""
    call: Call | MalformedCall
    start: int
    end: int
    members: dict  # {key: (value, start, end)}; end is None where a member broke off

@dataclass
class Block:
    """<kind>inner</kind> at text[start:end]; unclosed, it runs to the end of the text."""
    kind: str
    start: int
    end: int
    inner: tuple  # (start, end) of what stands between the tags
    closed: bool
    calls: list  # of Reading

def parse_calls(text):
    """All calls of a turn in order, a MalformedCall for an unreadable one; never raises. They are
    copies: a tool may change what it is given.
    >>> parse_calls('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    [Call(name='f', arguments={'x': 1})]
    """
    return copy.deepcopy(_calls(text))

def _calls(text):
    return [reading.call for block in split_blocks(text) for reading in block.calls]

@lru_cache(maxsize=4096)
def split_blocks(text):
    """A turn's blocks in order, read only: one scan for parser, reward and regions. A thought
    ends at the first </think>, calls at the first </tool_call> outside a JSON string.
    >>> [(b.kind, b.closed) for b in split_blocks("<think>use <tool_call>?</think><response>no")]
    [('think', True), ('response', False)]
    """
    blocks = []
    pos = 0
    room = MAX_CALLS
    while match := OPENING_TAG.search(text, pos):
        kind = match[1]
        inner = match.end()
        calls = []
        if kind == "tool_call" and room >= 0:  # below: the surplus was reported
            calls, stop = _scan_calls(text, inner, room)
            room -= len(calls)
        else:
            stop = _find(text, f"</{kind}>", inner)
        closed = stop < len(text)
        pos = stop + len(f"</{kind}>") if closed else stop
        blocks.append(Block(kind, match.start(), pos, (inner, stop), closed, calls))
    return blocks

def label_chars(text):
    """The region of every character, a bytearray as long as the text; total on any input."""
    label = bytearray(SCAFFOLD if c.isspace() else TEXT for c in text)

    def fill(start, end, region):
        label[start:end] = bytes([region]) * (end - start)

    inside = {"think": THOUGHT, "tool_call": SCAFFOLD, "response": TEXT}
    for block in split_blocks(text):
        fill(block.start, block.end, TAG)
        fill(*block.inner, inside[block.kind])
        for reading in block.calls:
            for key, (value, start, end) in reading.members.items():
                end = reading.end if end is None else end
                if key == "name":  # its quotes are scaffold
                    start += text[start:start + 1] == '"'
                    fill(start, end - isinstance(value, str), NAME)
                elif key in ("arguments", "parameters"):
                    fill(start, end, PARAMS)
    return label

def _find(text, what, pos):
    found = text.find(what, pos)
    return len(text) if found < 0 else found

def _scan_calls(text, pos, room):
    # up to `room` Readings from pos on, and where the closing tag (or the text's end) stands
    calls = []
    while True:
        start = _skip(text, pos)
        if start == len(text) or text.startswith("</tool_call>", start):
            return calls, start
        if len(calls) == room:
            stop = _find(text, "</tool_call>", start)
            surplus = MalformedCall(f"more than {MAX_CALLS} calls in a turn")
            return [*calls, Reading(surplus, start, stop, {})], stop
        calls.append(read_call(text, start))
        pos = calls[-1].end

def read_call(text, start):
    """The Reading of one JSON object; of anything else, up to its line's end or the closing tag."""
    # pos and end count in source, start + pos in text; \0 is not JSON: whatever is open ends there
    source = text[start:start + MAX_CHARS] + "\0"
    members = {}
    pos = 0
    try:
        if source[0] != "{":
            raise ValueError("a call starts with '{'")
        pos = _skip(source, 1)
        while source[pos] != "}":
            if members:
                if source[pos] != ",":
                    raise ValueError("expected ',' or '}'")
                pos = _skip(source, pos + 1)
            key, pos = JSON_DECODER.raw_decode(source, pos)
            key = _checked(key)
            pos = _skip(source, pos)
            if not isinstance(key, str) or key in members or source[pos] != ":":
                raise ValueError(f"bad or repeated key {str(key)[:40]!r}")
            pos = _skip(source, pos + 1)
            members[key] = (None, start + pos, None)  # should the value break off
            value, end = JSON_DECODER.raw_decode(source, pos)
            members[key] = (_checked(value), start + pos, start + end)
            pos = _skip(source, end)
        return Reading(_to_call(members), start, start + pos + 1, members)
    except (ValueError, RecursionError) as reason:
        call = MalformedCall(f"not valid JSON: {str(reason)[:100]}")
        # a brace that lacks is missed on the next line, where a good call may stand: from start on
        stop = min(_find(text, "\n", start), _find(text, "</tool_call>", start + pos))
        return Reading(call, start, stop, members)

def _to_call(members):
    name = members.get("name", ("",))[0]
    arguments = [members[key][0] for key in ("arguments", "parameters") if key in members]
    if isinstance(name, str) and name and len(arguments) == 1 and isinstance(arguments[0], dict):
        return Call(name, arguments[0])
    return MalformedCall('a call needs a "name" and one object of "arguments" (or "parameters")')

def _skip(text, pos):
    return SPACE.match(text, pos).end()

def _object(pairs):
    members = {valid_text(key): value for key, value in pairs}
    if len(members) < len(pairs):
        raise ValueError(f"a key twice in {str([key for key, _ in pairs])[:60]}")
    return members

JSON_DECODER = json.JSONDecoder(object_pairs_hook=_object)

def _checked(value, depth=1):
    # the value with valid texts; what is too deep or NaN or infinite is an error
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    if isinstance(value, dict):
        return {key: _checked(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_checked(inner, depth + 1) for inner in value]
    return valid_text(value) if isinstance(value, str) else value

def valid_text(text):
    """The text with U+FFFD for halves of surrogate pairs: JSON may have them, tokenizers refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def same_value(a, b):
    """JSON equality: 1 is 1.0, but True is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b

# ---- appendix: tool executor ----

def execute(calls, functions, timeout=2.0, max_chars=1000):
    """Run a turn's calls in order -> a text per call for the model, calls refused, calls failed.
    functions: {name: callable(**arguments)}, which raise InvalidArguments, or ValueError with a
    sentence for the model; anything else is the user's bug, logged once. A call may take `timeout`
    seconds, a turn four times that; then its thread is abandoned."""
    texts = []
    refused = failed = 0
    deadline = time.monotonic() + 4 * timeout
    for call in calls:
        outcome = [TimeoutError("the tool took too long")]
        thread = threading.Thread(target=_run, args=(call, functions, outcome), daemon=True)
        thread.start()
        thread.join(max(0.0, min(timeout, deadline - time.monotonic())))
        result = outcome[0]
        text = result
        if isinstance(result, BaseException):
            text = f"error: {result}"
            refused += isinstance(result, CallError)
            failed += not isinstance(result, CallError)
            if not isinstance(result, (ValueError, TimeoutError)):
                warn_once(f"the tool {call.name} failed, not by the model's fault: {result!r}")
        text = valid_text(text)
        texts.append(text if len(text) <= max_chars else text[:max_chars] + " … (cut)")
    return texts, refused, failed

warn_once = lru_cache(logging.getLogger("rest").warning)

def _run(call, functions, outcome):
    # writes the result as text, or the exception, to outcome[0]: it runs in a thread of its own
    try:
        if isinstance(call, CallError):
            raise call
        if call.name not in functions:
            known = ", ".join(functions)
            raise CallError(f"unknown tool {call.name[:60]!r}; the tools are {known}")
        function = functions[call.name]
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            raise InvalidArguments(str(error)) from None
        value = function(**call.arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        if not isinstance(value, str):  # a value that holds itself: RecursionError, the user's bug
            value = json.dumps(value, ensure_ascii=False, check_circular=False)
        outcome[0] = value
    except BaseException as error:  # whatever a tool raises, sys.exit too, the training run goes on
        outcome[0] = error

def offered(row, box):
    """The functions of a box that the row offers, or all where it lists none. Raises ValueError."""
    names = [tool["function"]["name"] for tool in row["tools"]] or list(box.functions)
    if missing := [name for name in names if not callable(box.functions.get(name))]:
        raise ValueError(f"the toolbox has no function for the tools offered: {', '.join(missing)}")
    return {name: box.functions[name] for name in names}

# ---- appendix: how a row becomes tokens ----

class Chat:
    """What the algorithm asks of a tokenizer and its chat template. What was sampled is never
    tokenised again. toy_tools/chat.py has the hardened one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_ids = {tokenizer.eos_token_id}  # ids that end a turn
        self.text = lru_cache(None)(lambda token: self.decode([token]))  # of one id, for regions

    def prompt(self, row):
        """Prompt ids, and the ids of a forced beginning of the completion, mostly none."""
        return tuple(map(self.encode, self.render(row["messages"], row["tools"])))

    def reply(self, row, results, last):
        """The ids between a turn, ended by the token `last`, and the next one, with tools' results;
        and a forced beginning of the next."""
        mark = "\u2016turn\u2016"
        turn = {"role": "assistant", "content": mark}
        answers = [{"role": "tool", "content": text} for text in results]
        text, opening = self.render([*row["messages"], turn, *answers], row["tools"])
        ids = self.encode(text.partition(mark)[2])
        already = ids[:1] == [last]  # the template's end token was sampled
        return ids[already:], self.encode(opening)

    def render(self, messages, tools):
        """The template's text up to the completion; "<think>" if the template itself opens it."""
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
        cut = re.search(r"(<think>\s*)?\Z", text).start()
        return text[:cut], text[cut:]

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

# ---- appendix: how the model is run ----

class Engine:
    """The plain way to run a causal language model: its own forward and cache, each prompt repeated
    for its completions. toy_tools/fast.py has one that keeps a group's prompt once."""

    def __init__(self, model):
        self.model = model
        if hasattr(model, "get_base_model"):  # an adapter takes what its base does
            model = model.get_base_model()
        self.accepts = set(inspect.signature(model.forward).parameters)
        # transformers renamed it in 5.24
        self.cache_name = "cache" if "cache" in self.accepts else "past_key_values"

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def tolerance(self):
        """How far, as a KL, two forwards of one policy may differ by rounding."""
        exact = next(self.model.parameters()).dtype == torch.float32 and not autocasts(self.model)
        return 1e-4 if exact else 2e-2

    @contextmanager
    def sampling(self):
        """While tokens are sampled nothing is random but the sampling itself."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.model):
                yield
        finally:
            for module in training:
                module.training = True

    def prefill(self, prompts, group, max_tokens):
        """Begin S = P*group rows behind P prompts (id lists): logits [S, V] of the first token."""
        repeated = [ids for ids in prompts for _ in range(group)]
        ids, self.mask = left_pad(repeated, self.device)  # (S, Lp)
        self.cache = None
        return self._forward(ids)

    def step(self, ids, t):
        """Feed ids int64 [S] of column t: logits [S, V] of the next, valid until the next step."""
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self._forward(ids[:, None])

    def _forward(self, ids):
        layers = getattr(self.cache, "layers", [])
        # state space models would read the mask as that of the tokens fed, not of all so far
        masked = self.cache is None or any(hasattr(layer, "keys") for layer in layers)
        options = {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        out = self._run(ids, self.mask, masked, **options)
        self.cache = out[self.cache_name]
        return out.logits[:, -1]

    def _run(self, ids, mask, masked=True, **options):
        """The model's own forward of the last columns of mask [S, L], given what it accepts."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        options |= {"position_ids": positions, "attention_mask": mask.long() if masked else None}
        options = {name: value for name, value in options.items() if name in self.accepts}
        return self.model(input_ids=ids, **options)

    def drop(self, done):
        """Take finished rows out of the batch where that makes it much smaller. done: a bool a row.
        Returns the rows that stay, in their new order, or None if all do."""
        keep = [s for s, finished in enumerate(done) if not finished]
        if len(keep) > 0.75 * len(done) or not self._can_drop():
            return None
        rows = to_device(keep, self.device)
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        return keep

    def _can_drop(self):
        # whether the cache is keys and values alone: recurrent states do not leave it
        layers = getattr(self.cache, "layers", None)
        if layers is None:
            return hasattr(self.cache, "batch_select_indices")
        states = any(hasattr(layer, "conv_states") for layer in layers)
        return type(self.cache).__name__ == "DynamicCache" and not states

    def micro_batches(self, batch, groups, budget):
        """Lists of these groups' rows, of at most `budget` tokens with padding, or of one row."""
        G = batch.group
        length = batch.length.tolist()
        prompt = [len(ids) for ids in batch.prompts for _ in range(G)]

        def tokens(rows):
            return len(rows) * (max(prompt[i] for i in rows) + max(length[i] for i in rows))

        parts = []
        for p in sorted(groups, key=lambda p: (max(length[p * G:p * G + G]), prompt[p * G])):
            for row in range(p * G, p * G + G):
                if parts and tokens([*parts[-1], row]) <= budget:
                    parts[-1].append(row)
                else:
                    parts.append([row])
        return parts

    def logps(self, batch, rows, temperature):
        """logp float32 [n, T] with gradient of the completions in these rows, T of the longest."""
        T = max(batch.length[rows].tolist())
        prompts = [batch.prompts[i // batch.group] for i in rows]
        prompts, mask = left_pad(prompts, self.device)  # (n, Lp)
        completions = batch.tokens[to_device(rows, self.device), :T]  # (n, T)
        ids = torch.cat([prompts, completions], 1)  # (n, Lp+T)
        # padding stands behind a completion, which never sees it
        mask = F.pad(mask, (0, T), value=True)  # (n, Lp+T)
        with autocast(self.model):
            logits = self._run(ids, mask, use_cache=False, logits_to_keep=T + 1).logits
            logits = logits[:, -T - 1:-1].flatten(0, 1)  # (n*T, V), those at t-1 predict token t
            return token_logps(logits, completions.flatten(), temperature).view(-1, T)

    def backward(self, loss):
        loss.backward()

def token_logps(logits, targets, temperature):
    """logp float32 [M] of targets int64 [M] under softmax(logits [M, V] / temperature)."""
    return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")

def left_pad(prompts, device):
    """P id lists -> ids int64 [P, Lp], mask bool [P, Lp]; their last tokens in the last column."""
    width = max(map(len, prompts))
    ids = to_device([[0] * (width - len(ids)) + ids for ids in prompts], device)
    count = to_device([len(ids) for ids in prompts], device)
    return ids, torch.arange(width, device=device) >= width - count[:, None]

def to_device(values, device):
    """Lists as a tensor there; from pinned memory, so that a GPU's queue is not waited for."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, pin_memory=pinned).to(device, non_blocking=True)

def autocasts(model):
    """Whether float32 weights compute in bfloat16: on GPUs that have it natively."""
    parameter = next(model.parameters(), torch.empty(0))
    return (parameter.is_cuda and parameter.dtype == torch.float32
            and torch.cuda.is_bf16_supported(including_emulation=False))

def autocast(model):
    """Context of a forward."""
    return torch.autocast("cuda", torch.bfloat16) if autocasts(model) else nullcontext()
