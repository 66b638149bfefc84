"""How much can token weights help at all? Measured at fixed parameters: `python -m toy_tools.signal RUN…`.

n independent mini-batches i of P prompts are rolled out from one checkpoint. Mini-batch i's gradient of the
unweighted objective is split by region, g_{i,r}: weight 1 on region r, 0 elsewhere. For region weights w its
gradient is sum_r w_r g_{i,r}, so all that any region weights can do follows from the inner products, the
Gram matrix K[i,r,j,s] = <g_{i,r}, g_{j,s}>:

    M_rs = mean of K[i,r,j,s] over i != j         unbiased estimate of <E g_r, E g_s>; may come out negative
    S_rs = mean of K[i,r,i,s] over i, minus M_rs  trace of the covariance of g_r and g_s; falls as 1/P
    noise(w) = w'Sw / w'Mw
    eta(w) = (b'w)^2 / (M_1 w'(M + S)w),  b = M 1,  M_1 = 1'M 1

eta, the efficiency, is the guaranteed progress of the best step along g(w) on a smooth objective, over that
of the noiseless true gradient. It does not depend on the scale of w and is at most 1. The best weights are
w* ∝ (M + S)^-1 b; eta(w*)/eta(1) is the most that region weights can gain over GRPO there. A method whose
weights are not one number per region gets a column of its own in K: its own mini-batch gradient.

Per checkpoint: roll out and measure AdamW's v (see COORDINATES); then one forward and a backward pass per
column for each micro-batch; then K. What is done is kept in RUN/signal/, so that an interrupted measurement
goes on. Writes OUT.csv and OUT.png.
"""

import argparse
import csv
import math
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import rest
from toy_tools import chat, data, fast, policy, runs, tasks

# Gradients are divided by this power of AdamW's sqrt(v) + eps. adamw is what is stepped along; in half-adamw
# the inner product of two gradients is the progress along one of a step along the other.
COORDINATES = {"plain": 0.0, "half-adamw": 0.5, "adamw": 1.0}

# Batch sizes in units of the run's own, whatever P was rolled out. averaged: AdamW's first moment with
# beta1 = 0.9 has the variance of a batch (1 + .9)/(1 - .9) times as large, once it is full and as long as the
# parameters hardly move.
FACTORS = {"a quarter": 0.25, "as run": 1.0, "four times": 4.0, "averaged": 19.0}

REGIONS = list(rest.PAPER_REGIONS)
OWN = ("rest", "rest-official", "top-entropy", "low-prob", "token-entropy", "entropy-up", "shuffled")
CURVES = {"w* >= 0, cross-fitted": "black", "rest": "C3", "curriculum, no thought": "C4",
          "rest-official": "C1", "top-entropy": "C0", "low-prob": "C2", "shuffled": "0.6"}  # of the figure
EXACT = 2 ** 22   # up to so many parameters whole gradients are kept
SKETCH = 2 ** 18  # coordinates of a sketch, above that


# ---------------------------------------------------------- estimators: Gram matrix in, numbers out

def moments(gram, counts=None):
    """(M, S), each float64 [..., C, C], of a Gram matrix float64 [n, C, n, C]: n mini-batches, C columns.

    counts: float64 [..., n], how often each mini-batch counts (0 leaves one out); None: once each."""
    counts = gram.new_ones(len(gram)) if counts is None else counts
    own = gram.diagonal(dim1=0, dim2=2)                                       # (C, C, n)
    everything = torch.einsum("...i,irjs,...j->...rs", counts, gram, counts)
    same = torch.einsum("...i,rsi->...rs", counts ** 2, own)
    pairs = counts.sum(-1) ** 2 - (counts ** 2).sum(-1)
    M = (everything - same) / pairs[..., None, None]
    square = torch.einsum("...i,rsi->...rs", counts, own) / counts.sum(-1)[..., None, None]
    return M, square - M


def quadratic(w, A):
    """w'Aw of w [..., C] and A [..., C, C]."""
    return torch.einsum("...r,...rs,...s->...", w, A, w)


def noise(w, M, S):
    """w'Sw / w'Mw. Negative where the estimate of w'Mw is: then no signal was seen."""
    return quadratic(w, S) / quadratic(w, M)


def slope(w, M, uniform):
    """b'w with b = M uniform: how far g(w) points along the true gradient. w [..., C], uniform [C]."""
    return torch.einsum("...r,...rs,s->...", w, M, uniform)


def ratio(slope, square, signal):
    """eta from b'w, w'(M + S)w and M_1. Negative where g(w) points against the true gradient, and for
    uniform weights where the estimate M_1 is negative."""
    return slope * slope.abs() / (signal.abs() * square)


def efficiency(w, M, S, uniform):
    """eta(w) of w [..., C]. uniform [C]: the unweighted objective, 1 on the regions, 0 on other columns."""
    return ratio(slope(w, M, uniform), quadratic(w, M + S), slope(uniform, M, uniform))


def best_weights(M, S, nonnegative=False):
    """w* = (M + S)^-1 M 1 float64 [..., R] of M, S [..., R, R]: regions only. One without gradient gets 0.

    nonnegative: the best among weights >= 0, found by trying every set of regions. NaN where there is none:
    M + S not positive (S scaled to larger batches, M negative), or no weights >= 0 that point uphill."""
    R = M.shape[-1]
    A, b = M + S, M.sum(-1)
    best = torch.full_like(b, torch.nan)
    height = torch.full_like(b[..., 0], 0.0 if nonnegative else -torch.inf)
    for members in range(1, 2 ** R) if nonnegative else [2 ** R - 1]:
        inside = torch.tensor([members >> r & 1 for r in range(R)], device=M.device).bool()
        inside = inside & (A.diagonal(dim1=-2, dim2=-1) != 0)
        outside = torch.diag_embed((~inside).to(A.dtype))  # 1 w_r = 0
        block = torch.where(inside[..., None] & inside[..., None, :], A, outside)
        target = torch.where(inside, b, 0.0)
        factor, failed = torch.linalg.cholesky_ex(block)
        w = torch.cholesky_solve(target[..., None], factor)[..., 0]
        along = (b * w).sum(-1)  # b'w, which at the optimum is w'(M + S)w too
        better = (failed == 0) & (along > height)
        if nonnegative:
            better = better & (w >= 0).all(-1)
        best = torch.where(better[..., None], w, best)
        height = torch.where(better, along, height)
    return best


def cross_fitted(first, second, uniform, nonnegative=False):
    """(b'w, w'Mw, w'(M + S)w), float64 [...] each, of w* found on one half of the mini-batches and scored on
    the other; the mean of both ways.

    first, second: the halves' moments (M, S), float64 [..., C, C]. Each w* is scaled so that its own half
    gives w'(M + S)w = 1."""
    R = int(uniform.sum())
    found = 0.0
    for (M, S), (other_M, other_S) in ((first, second), (second, first)):
        own_M, own_S = M[..., :R, :R], S[..., :R, :R]
        w = best_weights(own_M, own_S, nonnegative)
        w = w / quadratic(w, own_M + own_S).sqrt()[..., None]
        w = F.pad(w, (0, len(uniform) - R))
        found = found + torch.stack(score(w, other_M, other_S, uniform)) / 2
    return found


def score(w, M, S, uniform):
    """(b'w, w'Mw, w'(M + S)w) of w [..., C]."""
    return slope(w, M, uniform), quadratic(w, M), quadratic(w, M + S)


def split_moments(gram, counts=None):
    """moments of all mini-batches, of the even and of the odd ones."""
    counts = gram.new_ones(len(gram)) if counts is None else counts
    even = torch.arange(len(gram)) % 2 == 0
    return [moments(gram, counts * part) for part in (torch.ones_like(even), even, ~even)]


def bootstrap_counts(n, draws, seed=0):
    """Counts float64 [draws, n] of a Bayesian bootstrap (Rubin 1981): exponential variables. None is 0, as it
    may be when drawing with replacement, so both halves keep pairs of distinct mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(draws, n, dtype=torch.float64).exponential_(generator=generator)


# ------------------------------------------------------------- gradients of mini-batches, by column


class Sketch:
    """A fixed random linear map of vectors float32 [D] to [width]: <sketch(x), sketch(y)> is <x, y> on
    average over seeds, with a variance of about (||x||^2 ||y||^2 + <x, y>^2) / width. A count sketch
    (Charikar, Chen, Farach-Colton 2002) whose buckets come from rolling whole blocks, so that no index is
    kept."""

    def __init__(self, size, width, device="cpu", seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.sign = torch.randint(0, 2, (size,), generator=draw, dtype=torch.int8).mul_(2).sub_(1).to(device)
        self.shift = torch.randint(0, width, (-(-size // width),), generator=draw).tolist()
        self.width = width

    def __call__(self, x):
        total = x.new_zeros(self.width)
        for block, sign, shift in zip(x.split(self.width), self.sign.split(self.width), self.shift):
            total += F.pad(block * sign, (0, self.width - len(block))).roll(shift)
        return total


def scale_of(batch, weight, cfg):
    return rest.loss_scale(batch.sampled, weight, cfg.aggregation, cfg.max_completion_tokens)


def unweighted(batch, cfg):
    """(weight, scale) of the unweighted objective."""
    ones = batch.sampled.float()
    return ones, scale_of(batch, ones, cfg)


def columns(batch, cfg, progress, methods):
    """[(weight float [N, T], scale float [N])]: the five regions, then `methods`. A region has weight 1 on
    its tokens, 0 elsewhere, and the denominators of the whole unweighted batch: the gradients of the
    regions add up to the unweighted one."""
    _, scale = unweighted(batch, cfg)
    found = []
    for members in rest.PAPER_REGIONS.values():
        inside = torch.isin(batch.region, torch.tensor(members, device=batch.region.device))
        found.append((inside.float(), scale))
    for method in methods:
        weight = rest.WEIGHTS[method](batch, cfg, progress)
        found.append((weight, scale_of(batch, weight, cfg)))
    return found


def gradients(engine, batch, advantages, cols, cfg, keep=lambda g: g[None]):
    """Gradients of rest.policy_loss with the weights and scales of `cols`, float32 [C, K, m]; keep maps a
    gradient [D] linearly to [K, m]. advantages float [N]. Zero where no group has an advantage.

    One forward per micro-batch, and a backward pass per column that has weight in it."""
    G = batch.group
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    total = torch.stack([keep(torch.zeros(size, device=advantages.device))] * len(cols))
    used = advantages.view(-1, G).ne(0).any(1).nonzero()[:, 0].tolist()  # other groups have no gradient
    for rows in engine.micro_batches(batch, used, cfg.micro_batch_tokens):
        logp = engine.logps(batch, rows, cfg.temperature)  # (n, T)
        rows = torch.tensor(rows, device=advantages.device)
        T = logp.shape[1]
        mask = batch.sampled[rows, :T]
        for c, (weight, scale) in enumerate(cols):
            weight = weight[rows, :T]
            if not bool((weight * mask).any()):
                continue
            loss = rest.policy_loss(
                logp, batch.logp[rows, :T], advantages[rows], weight, mask, scale[rows], cfg.clip)
            found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            total[c] += keep(torch.cat([g.flatten().float() for g in found]))
    return total


def roll_out(point, i):
    """Mini-batch i of a checkpoint, a function of the seed and i: (Rollout with regions, advantages [N])."""
    cfg = point.cfg
    drawn = random.Random(f"{point.seed}-{i}").sample(point.rows, cfg.prompts)
    seed = 2 ** 40 + point.seed * 1_000_003 + i  # not one that training used
    batch = rest.rollout(point.engine, point.chat, drawn, cfg, seed, toolbox_for=tasks.toolbox_for)
    batch.region, batch.covers = rest.token_regions(batch, point.chat)
    rewards = [rest.episode_reward(form, correct, point.progress, cfg.reward_scaling)
               for form, correct, _ in rest.score_batch(batch)]
    rewards = torch.tensor(rewards, device=batch.tokens.device).view(-1, batch.group)
    advantages = rest.group_advantages(rewards, cfg.method != "dr-grpo", cfg.delta)
    return batch, advantages.flatten()


def second_moment(optimizer, square):
    """(v float32 [D], eps): AdamW's bias-corrected second moment as one more step would leave it.

    optimizer: its state_dict; square float32 [D]: mean square of the mini-batches' gradients, which is v
    before the first step.

    The one step more matters: a coordinate that was never touched has v = 0, but its own gradient enters v
    before it is divided. Raises ValueError if the state is not of this policy."""
    group = optimizer["param_groups"][0]
    beta = group["betas"][1]
    states = [optimizer["state"][k] for k in group["params"] if k in optimizer["state"]]
    old = torch.zeros_like(square)
    steps = 0
    if states:
        old = torch.cat([state["exp_avg_sq"].flatten().float() for state in states]).to(square)
        steps = int(states[0]["step"])
    if old.shape != square.shape:
        raise ValueError(f"trainer.pt holds the optimiser's state of {len(old)} parameters, but the policy "
                         f"has {len(square)}: it is not of this policy")
    return (beta * old + (1 - beta) * square) / (1 - beta ** (steps + 1)), group["eps"]


def grams(gradients, scales):
    """{coordinates: K float64 [n, C, n, C]} of n tensors float32 [C, copies, m]. One copy: whole
    gradients, to be multiplied by each of `scales` [m]; as many as scales: sketches of gradients
    multiplied already."""
    n = len(gradients)
    C, copies, size = gradients[0].shape
    total = [torch.zeros(n * C, n * C, dtype=torch.float64) for _ in scales]
    for start in range(0, size, 2 ** 16):
        x = torch.stack([g[:, :, start:start + 2 ** 16] for g in gradients]).double()  # (n, C, copies, chunk)
        for k, scale in enumerate(scales):
            y = x[:, :, 0] * scale[start:start + 2 ** 16] if copies == 1 else x[:, :, k]
            y = y.flatten(0, 1)
            total[k] += y @ y.T
    return {name: K.view(n, C, n, C) for name, K in zip(COORDINATES, total)}


# ------------------------------------------------------------------------- one checkpoint, measured


@dataclass
class Point:
    """A checkpoint about to be measured."""
    run: Path
    step: int
    engine: object   # rest.Engine
    chat: object     # rest.Chat
    rows: list       # what mini-batches are drawn from
    cfg: object      # rest.Config of the run
    optimizer: dict  # AdamW's state_dict at that step
    of_run: int      # the prompts of a step of the run; cfg has those of a mini-batch
    seed: int = 0

    @property
    def progress(self):
        return self.step / max(1, self.cfg.steps)


def save(value, path):
    """Written beside and then moved, so that an interruption leaves no half of it."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def measure(point, folder, batches, methods, sketch, bar):
    """Everything that is known of a checkpoint afterwards, as a dictionary; kept as folder/measured.pt.

    sketch: coordinates of the sketched gradient, 0: whole gradients. bar: a progress bar, moved 2 * batches
    times."""
    cfg = point.cfg
    done = folder / "measured.pt"
    settings = {"config": asdict(cfg), "methods": list(methods), "sketch": sketch}
    if (folder / "settings.json").exists():
        if runs.read_json(folder / "settings.json") != settings:
            raise ValueError(f"{folder} was measured with other methods, sketch or configuration: delete it "
                             "to measure again")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(folder / "settings.json", settings)
    if done.exists():
        bar.update(2 * batches)
        found = torch.load(done, weights_only=True)
        return found | {"run": str(point.run), "of_run": point.of_run}  # it may have moved

    rollouts = [folder / f"rollout-{i}.pt" for i in range(batches)]
    squares = folder / "squares.pt"
    summed = 0.0
    first = 0
    if squares.exists():
        summed, first = torch.load(squares, map_location=point.engine.device, weights_only=True)
    bar.update(first)
    for i in range(first, batches):
        batch, advantages = roll_out(point, i)
        gradient = gradients(point.engine, batch, advantages, [unweighted(batch, cfg)], cfg)[0, 0]
        shrunk = cfg.max_grad_norm / gradient.norm().clamp(min=cfg.max_grad_norm)  # as the optimiser sees it
        summed = summed + (gradient * shrunk) ** 2
        save((batch, advantages), rollouts[i])
        save((summed, i + 1), squares)
        bar.update()

    v, eps = second_moment(point.optimizer, summed / batches)
    scales = [(v.sqrt() + eps) ** -power for power in COORDINATES.values()]
    keep = {}
    if sketch:
        project = Sketch(len(v), sketch, v.device)
        keep = {"keep": lambda g: torch.stack([project(g * scale) for scale in scales])}
    files = [folder / f"gradient-{i}.pt" for i in range(batches)]
    device = point.engine.device
    loaded = [torch.load(path, map_location=device, weights_only=False) for path in rollouts]
    for i, (path, (batch, advantages)) in enumerate(zip(files, loaded)):
        if not path.exists():
            shuffle = replace(cfg, seed=i)  # weights are shuffled anew in every mini-batch
            cols = columns(batch, shuffle, point.progress, methods)
            save(gradients(point.engine, batch, advantages, cols, cfg, **keep).cpu(), path)
        bar.update()
    kept = [torch.load(path, mmap=True, weights_only=True) for path in files]
    found = {"run": str(point.run), "step": point.step, "prompts": cfg.prompts, "group": cfg.group,
             "batches": batches, "columns": [*REGIONS, *methods],
             "gram": grams(kept, [scale.cpu() for scale in scales]),
             "of_run": point.of_run, **region_facts([batch for batch, _ in loaded], cfg, point.progress)}
    save(found, done)
    del kept
    for path in (*files, *rollouts, squares):
        path.unlink()
    return found


def region_facts(batches, cfg, progress):
    """{tokens [R], entropy [R] in nats, linear: {method: weights [R]}} over all rollouts. A method's
    weight of a region is its mean over the region's tokens."""
    firsts = [members[0] for members in rest.PAPER_REGIONS.values()]
    variants = {"raw one-minus-exp": ("one-minus-exp", 0.0), "raw inverse": ("inverse", 0.0),
                "curriculum": (cfg.raw_weight, progress), "curriculum at the end": (cfg.raw_weight, 1.0)}
    tokens = torch.zeros(len(REGIONS))
    entropy = torch.zeros(len(REGIONS))
    weights = {name: torch.zeros(len(REGIONS)) for name in variants}
    for batch in batches:
        count = torch.stack([weight.sum() for weight, _ in columns(batch, cfg, progress, ())]).cpu()
        tokens += count
        entropy += count * rest.region_entropy(batch)[firsts].cpu()
        for name, (kind, at) in variants.items():
            weight = rest.region_weights(batch, replace(cfg, raw_weight=kind), at)
            weights[name] += count * weight[firsts].cpu()
    linear = {"uniform": torch.ones(len(REGIONS))}
    linear |= {name: weight / tokens.clamp(min=1) for name, weight in weights.items()}
    linear["curriculum, no thought"] = linear["curriculum"].clone()
    linear["curriculum, no thought"][REGIONS.index("thought")] = 0.0
    return {"tokens": tokens, "entropy": entropy / tokens.clamp(min=1), "linear": linear}


# ------------------------------------------------------------------------------------------- report


def interval(draws):
    """95% percentile interval of bootstrap draws [B]; (nan, nan) where more than 2.5% have no value."""
    known = draws[~draws.isnan()]
    if len(known) < 0.975 * len(draws):
        return math.nan, math.nan
    return tuple(known.quantile(known.new_tensor([0.025, 0.975])).tolist())


def effects(points, each, whole, even, odd, uniform):
    """{method: (b'w, w'Mw, w'(M + S)w, each [B]; w [B or 1, R] or None)}, uniform weights first.

    each: moments (M, S) [B, C, C] per point; whole, even, odd: their means over points, of all and of half of
    the mini-batches."""
    R = len(REGIONS)
    found = {}
    for method in points[0]["linear"]:
        weights = [point["linear"][method].double() for point in points]
        scores = [score(F.pad(w, (0, len(uniform) - R)), M, S, uniform) for w, (M, S) in zip(weights, each)]
        along, signal, square = [sum(values) / len(points) for values in zip(*scores)]
        found[method] = along, signal, square, sum(weights)[None] / len(points)
    for c, method in enumerate(points[0]["columns"][R:], R):
        found[method] = (*score(torch.eye(len(uniform), dtype=torch.float64)[c], *whole, uniform), None)
    for nonnegative, method in ((False, "w*"), (True, "w* >= 0")):
        w = best_weights(*[A[..., :R, :R] for A in whole], nonnegative)
        found[method] = (*score(F.pad(w, (0, len(uniform) - R)), *whole, uniform), w)
        found[method + ", cross-fitted"] = (*cross_fitted(even, odd, uniform, nonnegative), None)
    return found


def table(points, draws=1000):
    """CSV lines (dictionaries) of checkpoints measured at the same step: one per coordinates, batch size and
    method. Several points are pooled: moments are averaged, mini-batches are drawn again inside each.

    A gain is eta over that of uniform weights; it has no value in a draw in which M_1 is not positive."""
    R = len(REGIONS)
    others = len(points[0]["columns"]) - R
    uniform = torch.tensor([1.0] * R + [0.0] * others, dtype=torch.float64)
    tokens = sum(point["tokens"] for point in points).double()
    share = tokens / tokens.sum()
    counts = []  # the first row counts every mini-batch once: the estimate itself
    for k, point in enumerate(points):
        drawn = bootstrap_counts(point["batches"], draws, seed=k)
        counts.append(torch.cat([torch.ones_like(drawn[:1]), drawn]))
    place = {"run": points[0]["run"] if len(points) == 1 else f"pooled over {len(points)}",
             "step": points[0]["step"], "group": points[0]["group"],
             "batches": sum(point["batches"] for point in points), "rolled_out": points[0]["prompts"]}

    lines = []
    for coordinates in COORDINATES:
        each = [split_moments(point["gram"][coordinates], c) for point, c in zip(points, counts)]
        for factor in FACTORS.values():
            prompts = factor * points[0]["of_run"]
            larger = prompts / points[0]["prompts"]
            scaled = [[(M, S / larger) for M, S in parts] for parts in each]
            whole, even, odd = [mean_moments(same) for same in zip(*scaled)]
            found = effects(points, [parts[0] for parts in scaled], whole, even, odd, uniform)
            M_1 = found["uniform"][1]
            reference = ratio(found["uniform"][0], found["uniform"][2], M_1)
            for method, (along, signal, square, w) in found.items():
                eta = ratio(along, square, M_1)
                gain = torch.where(M_1 > 0, eta / reference, torch.nan)
                spread = square - signal
                line = place | {"coordinates": coordinates, "prompts": prompts,
                                "method": method, "signal": float(signal[0]), "spread": float(spread[0]),
                                "noise": float(spread[0] / signal[0])}
                w = torch.full((1, R), torch.nan) if w is None else w
                w = w / (share * w.abs()).sum(-1, keepdim=True)
                measured = {"efficiency": eta, "gain": gain}
                measured |= {f"w_{name}": w[:, r] for r, name in enumerate(REGIONS)}
                for name, values in measured.items():
                    low, high = interval(values[1:]) if len(values) > 1 else (math.nan, math.nan)
                    line |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
                lines.append(line)
    return lines


def mean_moments(pairs):
    """The mean (M, S) of several."""
    return tuple(sum(matrices) / len(matrices) for matrices in zip(*pairs))


def summary(lines):
    """The table that is printed: plain coordinates, the batch size of the run."""
    first = lines[0]
    size = first["prompts"] / FACTORS["a quarter"]
    out = [f"{first['run']}, step {first['step']}: {first['batches']} mini-batches of {first['rolled_out']} "
           f"prompts x {first['group']}; for the run's {size:g} prompts a step:",
           f"  {'':26}{'noise':>9}{'gain over uniform (95%)':>28}  w, token mean 1: {', '.join(REGIONS)}"]
    for line in lines:
        if line["coordinates"] == "plain" and line["prompts"] == size:
            gain = f"{line['gain']:.2f} ({line['gain_low']:.2f} to {line['gain_high']:.2f})"
            gain = gain.replace("nan", "?")
            weights = "  ".join(f"{line[f'w_{name}']:5.2f}" for name in REGIONS).replace("  nan", "")
            out.append(f"  {line['method']:26}{line['noise']:9.3g}{gain:>28}  {weights}".rstrip())
    if any("?" in line for line in out):
        out.append("  ?: uniform weights' own signal cannot be told from 0, so that nothing can be compared "
                   "with it: take more or larger mini-batches")
    return "\n".join(out)


def write_csv(lines, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        for line in lines:
            texts = {key: f"{value:.5g}".replace("nan", "") for key, value in line.items()
                     if isinstance(value, float)}
            writer.writerow(line | texts)


def figure(lines, path):
    """Picture of a table's lines, pooled ones where there are several runs. A row per coordinates: w* >= 0
    over training beside ResT's weights, then gains over uniform weights for three batch sizes, with 95%
    intervals. No interval, no point: uniform weights' signal could not be told from 0 there. Raises
    ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    run = next((line["run"] for line in lines if line["run"].startswith("pooled")), lines[0]["run"])
    lines = [line for line in lines if line["run"] == run]
    steps = [line["step"] for line in lines]
    reach = max(steps) - min(steps) or 1
    factors = list(FACTORS.items())[:3]
    size = lines[0]["prompts"] / FACTORS["a quarter"]
    grid, axes = pyplot.subplots(len(COORDINATES), 4, figsize=(17, 3.6 * len(COORDINATES)), sharex=True)

    def draw(axis, k, method, column, **style):
        """The k-th curve of a panel; its intervals stand a little apart from the others'."""
        chosen = [line for line in here if line["method"] == method and line["prompts"] == prompts]
        if method != "curriculum":  # its weights are known
            chosen = [line for line in chosen if not math.isnan(line[f"{column}_low"])]
        if not chosen:  # not measured
            return
        at = [line["step"] + 0.008 * reach * k for line in chosen]
        low = [line[f"{column}_low"] for line in chosen]
        high = [line[f"{column}_high"] for line in chosen]
        axis.plot(at, [line[column] for line in chosen], marker=".", linewidth=1, **style)
        axis.vlines(at, low, high, style["color"], linewidth=0.6)

    for row, coordinates in zip(axes, COORDINATES):
        here = [line for line in lines if line["coordinates"] == coordinates]
        prompts = size
        for r, name in enumerate(REGIONS):
            draw(row[0], r, "w* >= 0", f"w_{name}", color=f"C{r}", label=name)
            draw(row[0], r, "curriculum", f"w_{name}", color=f"C{r}", linestyle="--")
        row[0].set_ylim(-0.1, 6)
        row[0].set_title(f"{coordinates}: weights, w* >= 0 solid, ResT dashed", fontsize=9)
        for axis, (label, factor) in zip(row[1:], factors):
            prompts = factor * size
            for k, (method, colour) in enumerate(CURVES.items()):
                draw(axis, k, method, "gain", color=colour, label=method)
            axis.axhline(1.0, color="0.8", linewidth=0.8)
            axis.set_ylim(-0.5, 5)
            axis.set_title(f"{coordinates}: gain over uniform, {prompts:g} prompts ({label})", fontsize=9)
    for axis in axes[0, :2]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    grid.suptitle(run)
    grid.tight_layout()
    grid.savefig(path, dpi=110)
    pyplot.close(grid)


# ------------------------------------------------------------------------------------------ command


def checkpoints(run, steps=()):
    """{step: folder} of the checkpoints that a run kept, and of its newest one. steps: only these.
    Raises FileNotFoundError or ValueError."""
    kept = [path for path in (run / "kept").glob("step*") if path.name[4:].isdigit()]
    found = {int(path.name[4:]): path for path in kept}
    last = run / "checkpoint"
    if (last / "trainer.pt").exists():
        step = torch.load(last / "trainer.pt", mmap=True, weights_only=True)["step"]
        found.setdefault(step, last)
    if not (run / "config.json").exists() or not found:
        raise FileNotFoundError(f"{run} is no run with checkpoints: it needs config.json, and kept/stepN or "
                                "checkpoint")
    missing = sorted(set(steps) - set(found))
    if missing:
        raise ValueError(f"{run} kept no checkpoint of step {missing[0]}; it has those of "
                         f"{', '.join(map(str, sorted(found)))}")
    return {step: found[step] for step in sorted(found) if not steps or step in steps}


def load(run, number, folder, args):
    """The Point of a checkpoint."""
    settings = runs.read_json(run / "config.json")
    options = settings["run"]
    of_run = settings["config"]["prompts"]
    try:
        cfg = rest.Config(**settings["config"])
    except TypeError as error:
        raise ValueError(f"{run}/config.json is of another version of this project: {error}") from None
    cfg = replace(cfg, prompts=args.prompts or cfg.prompts, group=args.group or cfg.group)
    for first, steps in settings.get("lengths", ()):  # a prolonged run trained by another clock before
        if first <= number:
            cfg = replace(cfg, steps=steps)
    model, tokenizer = policy.load_model(folder, getattr(torch, options["dtype"]))
    model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options["data"]:
        rows = data.load_rows(options["data"])
    else:
        mask_names = options["mask_names"]
        rows = tasks.make_rows(options["train_rows"], "train", seed=cfg.seed, mask_names=mask_names)
        if cfg.max_turns == 1:
            rows = [step for row in rows for step in tasks.decompose(row)]
    if len(rows) < cfg.prompts:
        raise ValueError(f"{len(rows)} training rows are fewer than the {cfg.prompts} prompts of a "
                         "mini-batch: lower --prompts")
    instructions = ""
    if tokenizer.chat_template != policy.CHAT_TEMPLATE:  # the embedded policy is given none
        if "instructions" not in settings:
            raise ValueError(f"{run}/config.json does not say which \"instructions\" the policy was given")
        instructions = settings["instructions"]
    talk = chat.TemplateChat(tokenizer, instructions, model)
    optimizer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)["optimizer"]
    return Point(run, number, fast.engine(model), talk, rows, cfg, optimizer, of_run, args.seed)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m toy_tools.signal", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folder of a run; several of other seeds alone are also pooled")
    parser.add_argument("--batches", type=int, default=32, help="mini-batches per checkpoint (n), at least 8")
    parser.add_argument("--prompts", type=int, default=0, help="prompts per mini-batch (P); 0: as the run")
    parser.add_argument("--group", type=int, default=0, help="completions per prompt (G); 0: as the run")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="only the checkpoints of these")
    parser.add_argument("--methods", nargs="*", default=OWN,
                        help=f"weightings with a gradient of their own [{' '.join(OWN)}]")
    parser.add_argument("--sketch", type=int, default=-1,
                        help="coordinates of the sketched gradient; 0: keep it whole; -1: whole up to "
                             f"{EXACT:,} parameters, else {SKETCH:,}")
    parser.add_argument("--out", type=Path, default=Path("signal"), help="OUT.csv and OUT.png are written")
    parser.add_argument("--device", default="", help="cuda or cpu; empty: the first of these that is there")
    parser.add_argument("--seed", type=int, default=0, help="of the mini-batches")
    args = parser.parse_args(argv)
    unknown = [method for method in args.methods if method not in rest.WEIGHTS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]}; there are {', '.join(rest.WEIGHTS)}")
    if args.batches < 8:
        raise ValueError(f"{args.batches} mini-batches are too few to estimate anything: --batches must be "
                         "at least 8, and 32 or more for a result")
    if args.prompts < 0 or args.group < 0 or args.sketch < -1:
        raise ValueError("--prompts, --group and --sketch must not be negative")
    return args


def main(argv=None):
    try:
        args = parse(argv)
        folders = {run: checkpoints(run, args.steps) for run in args.runs}
        points = []
        alike = {}  # what differs in its seed alone
        count = sum(map(len, folders.values()))
        with tqdm(total=2 * args.batches * count, desc="mini-batches", unit="") as bar:
            for run, kept in folders.items():
                for step, folder in kept.items():
                    point = load(run, step, folder, args)
                    cfg = point.cfg
                    size = sum(p.numel() for p in point.engine.model.parameters() if p.requires_grad)
                    sketch = args.sketch if args.sketch >= 0 else SKETCH * (size > EXACT)
                    name = f"step{step}-P{cfg.prompts}-G{cfg.group}-n{args.batches}-seed{args.seed}"
                    cache = run / "signal" / name
                    points.append(measure(point, cache, args.batches, args.methods, sketch, bar))
                    same = step, size, point.of_run, str(replace(cfg, seed=0))
                    alike.setdefault(same, []).append(points[-1])
        tables = [table([point]) for point in points]
        tables += [table(same) for same in alike.values() if len(same) > 1]
        lines = [line for part in tables for line in part]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(lines, f"{args.out}.csv")
        print("\n\n".join(map(summary, tables)))
        print(f"\nEvery coordinate and batch size: {args.out}.csv")
        try:
            figure(lines, f"{args.out}.png")
        except ImportError as missing:
            print(f"No {args.out}.png: {missing}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"toy_tools.signal: error: {error}")
    except KeyboardInterrupt:
        sys.exit("toy_tools.signal: interrupted; what was measured is kept, the same command goes on")


if __name__ == "__main__":
    main()
