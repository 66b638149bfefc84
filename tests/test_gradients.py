"""The gradient that rest.update feeds the optimiser, against a float64 implementation written from the
equations with loops, one completion at a time; and what the loss must not depend on. Where a test pins
a pitfall, the broken variant is shown to fail."""

import copy
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import ROW, llama, qwen3
from transformers import GPT2Config, GPT2LMHeadModel

import rest
from rest import NAME, PARAMS, SCAFFOLD, TAG, TEXT, THOUGHT
from toy_tools import fast

P, G, T, V = 3, 4, 9, 40
ROWS = list(range(P * G))
ENGINES = {"plain": rest.Engine, "shared": fast.SharedEngine}
AGGREGATIONS = ("sequence", "token", "constant")


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)).eval()


MODELS = {
    "qwen3: GQA, tied": lambda: qwen3(V),
    "qwen3: untied": lambda: qwen3(V, tie=False, kv=4),
    "llama: one kv head": lambda: llama(V),
    "gpt2": gpt2}


class Recorder:
    """An optimiser that keeps the gradient it is given and changes nothing (or, with rate, takes a
    plain SGD step)."""
    param_groups = []

    def __init__(self, model, rate=0.0):
        self.model = model
        self.rate = rate
        self.grads = []

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self):
        self.grads.append(flat(self.model.parameters()))
        for p in self.model.parameters():
            p -= 0 if p.grad is None else self.rate * p.grad


def make_batch(model, seed=0, temperature=0.7, off_policy=0.3):
    """(Rollout, advantages) of random tokens: ragged prompts and lengths, a forced stretch inside some
    rows, behaviour logps off by up to `off_policy`, so that some ratios are clipped; with regions, two
    to a token. One group has advantage 0."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, V, (n,), generator=g).tolist() for n in (5, 2, 7)]
    length = torch.randint(3, T + 1, (P * G,), generator=g)
    length[0] = T
    tokens = torch.randint(0, V, (P * G, T), generator=g)
    column = torch.arange(T)
    inside = column < length[:, None]
    forced = (column >= 2) & (column < 4) & (torch.arange(P * G) % 3 == 1)[:, None]
    sampled = inside & ~forced
    tokens = torch.where(inside, tokens, 0)
    with torch.no_grad():
        exact = [reference_logp(model, prompts[i // G], tokens[i], temperature)[0] for i in ROWS]
    logp = torch.stack(exact).float()
    off = off_policy * (2 * torch.rand(logp.shape, generator=g) - 1)
    logp = torch.where(sampled, logp + off, 0.0)
    entropy = torch.where(sampled, 2 * torch.rand(logp.shape, generator=g), 0.0)
    region = torch.where(sampled, torch.randint(0, 6, logp.shape, generator=g), -1)
    extra = torch.randint(0, 6, logp.shape, generator=g)
    covers = (torch.stack([region, extra]).unsqueeze(-1) == torch.arange(6)).any(0) & sampled[..., None]
    advantages = torch.randn(P * G, generator=g)
    advantages[G:2 * G] = 0
    batch = rest.Rollout([{}] * P, prompts, G, tokens, sampled, logp, entropy, length,
                         torch.zeros(P * G, dtype=torch.bool), None, None, region=region, covers=covers)
    return batch, advantages


def flat(parameters):
    """Their gradients as one vector."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def labelled(region, entropy=None):
    """What the weights read of a Rollout, for tokens of one region each; -1 is not sampled."""
    entropy = torch.zeros(region.shape) if entropy is None else entropy
    covers = region[..., None] == torch.arange(6)
    return SimpleNamespace(region=region, covers=covers, entropy=entropy, logp=-entropy, sampled=region >= 0)


def reference_logp(model, prompt, tokens, temperature):
    """logp [T] and probabilities [T, V] of tokens behind a prompt: one unpadded row, whole float64
    softmax."""
    ids = torch.tensor(prompt + tokens.tolist())[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    log_p = torch.log_softmax(logits, -1)[len(prompt) - 1:-1]
    return torch.stack([log_p[t, x] for t, x in enumerate(tokens.tolist())]), log_p.exp()


def reference_weights(method, batch, step, steps, a=0.5, low=0.2, high=5.0, floor=0.05):
    """The weights of all methods, with loops over Python floats."""
    region = batch.region
    where = [(i, t) for i in range(P * G) for t in range(T) if batch.sampled[i, t]]
    w = {}
    if method in ("grpo", "dr-grpo"):
        w = {it: 1.0 for it in where}
    elif method == "top-entropy":
        count = max(1, round(0.2 * len(where)))
        least = sorted((float(batch.entropy[it]) for it in where), reverse=True)[count - 1]
        w = {it: float(float(batch.entropy[it]) >= least) for it in where}
    elif method == "low-prob":
        w = {it: 0.2 * math.exp(batch.logp[it]) + 0.8 for it in where}
    elif method == "token-entropy":
        w = {it: 1 / (1 - math.exp(-max(floor, float(batch.entropy[it])))) for it in where}
    elif method == "entropy-up":
        h = {it: float(batch.entropy[it]) for it in where}
        mean = statistics.mean(h.values())
        deviation = statistics.stdev(h.values())
        w = {it: max(0.0, 1 + 0.2 * (h[it] - mean) / deviation) for it in where}
    elif method == "rest-official":
        clock = 0.6 + 0.002 * step
        table = {TAG: 1.0, NAME: 1.2, PARAMS: min(1.2, clock), THOUGHT: min(1.0, clock),
                 SCAFFOLD: 0.0, TEXT: 0.0}
        w = {it: max(table[r] for r in range(6) if batch.covers[it][r]) for it in where}
    else:
        family = {it: TAG if region[it] == SCAFFOLD else int(region[it]) for it in where}
        raw = {}
        for r in (TAG, NAME, PARAMS, THOUGHT, TEXT):
            h = [float(batch.entropy[it]) for it in where if family[it] == r]
            raw[r] = 1 / (1 - math.exp(-max(floor, sum(h) / len(h))))
        mean = sum(raw[family[it]] for it in where) / len(where)
        nu = 0.0 if method == "rest-static" else step / steps
        raw = {r: x / mean for r, x in raw.items()}
        raw[TAG] = max(low, raw[TAG] - a * nu)
        raw[PARAMS] = min(high, raw[PARAMS] + a * nu)
        raw[THOUGHT] = 0.0 if method == "no-thought" else min(high, raw[THOUGHT] + a * nu)
        w = {it: raw[family[it]] for it in where}
    out = torch.zeros(P * G, T, dtype=torch.float64)
    for i in range(P * G):
        row = [w[i, t] for t in range(T) if (i, t) in w]
        if method == "rest-official":
            row = [x for x in row if x > 0]
        total = sum(row) / max(1, len(row))
        for t in range(T):
            if (i, t) in w and total > 0:
                out[i, t] = w[i, t] / total
    return out


def reference_gradient(model, batch, advantages, weight, cfg):
    """The objective's gradient, float64, flat: one completion, one token at a time."""
    model = copy.deepcopy(model).double()
    N = P * G
    loss = 0.0
    for i in range(N):
        n = int(batch.length[i])
        logp, _ = reference_logp(model, batch.prompts[i // G], batch.tokens[i, :n], cfg.temperature)
        T_i = int(batch.sampled[i].sum())
        A = advantages[i].double()
        own = 0.0
        for t in range(n):
            if batch.sampled[i, t]:
                rho = torch.exp(logp[t] - batch.logp[i, t].double())
                clipped = torch.clamp(rho, 1 - cfg.clip, 1 + cfg.clip)
                own = own + weight[i, t] * torch.min(rho * A, clipped * A)
        divisor = {"sequence": N * T_i, "constant": N * cfg.max_completion_tokens, "token": weight.sum()}
        loss = loss - own / divisor[cfg.aggregation]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item()


def weigh(batch, cfg, step):
    return rest.WEIGHTS[cfg.method](batch, cfg, step / cfg.steps)


def gradient(model, batch, advantages, weight, cfg, engine=fast.SharedEngine):
    """The gradient that rest.update gives to the optimiser, and its metrics."""
    recorder = Recorder(model)
    metrics = rest.update(engine(model), recorder, batch, advantages, weight, cfg)
    return recorder.grads[-1], metrics


def config(**kwargs):
    usual = {"prompts": P, "group": G, "max_completion_tokens": 12, "temperature": 0.7,
             "max_grad_norm": 1e9, "steps": 10}
    return rest.Config(**usual | kwargs)


def close(a, b, tolerance=2e-5):
    return float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


# ---------------------------------------------------------------------------- against the equations

@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("method", rest.WEIGHTS)
def test_gradient_and_loss_follow_the_equations(method, aggregation):
    """Every method and aggregation, at progress 0.4: weights, loss and gradient of the real update
    equal the float64 reference (relative error below 2e-5, float32 rounding), with ragged prompts,
    forced tokens, clipped ratios and T != 1."""
    model = qwen3(V)
    cfg = config(method=method, aggregation=aggregation)
    batch, advantages = make_batch(model)
    weight = weigh(batch, cfg, 4)
    expected = reference_weights(method, batch, 4, 10)
    if method == "shuffled":  # ResT's weights, each completion's in another order
        assert torch.allclose(weight.double().sort(1).values, expected.sort(1).values, atol=1e-5)
        assert not torch.allclose(weight.double(), expected, atol=1e-2)
        assert (weight[~batch.sampled] == 0).all()
        expected = weight.double()
    assert torch.allclose(weight.double(), expected, atol=1e-5)
    g, metrics = gradient(model, batch, advantages, weight, cfg)
    reference, loss = reference_gradient(model, batch, advantages, expected, cfg)
    assert close(g, reference) and metrics["loss"] == pytest.approx(loss, rel=1e-4)


def test_weights_average_one_in_every_completion():
    """Per-completion mean 1 over sampled tokens; over the positively weighted ones for rest-official; 0
    outside."""
    for method in rest.WEIGHTS:
        batch, _ = make_batch(qwen3(V))
        weight = weigh(batch, config(method=method), 7)
        assert (weight[~batch.sampled] == 0).all() and (weight >= 0).all()
        for row, mask in zip(weight, batch.sampled):
            kept = row[mask & (row > 0)] if method == "rest-official" else row[mask]
            if row.sum() > 0:
                assert float(kept.mean()) == pytest.approx(1.0, abs=1e-5), method


def test_the_curriculum_and_its_bounds():
    """Format falls to w_min = 0.2 at most, parameters and thoughts rise to w_max = 5 at most, name and
    free text stay; the input is not written to."""
    start = torch.tensor([0.6, 0.9, 1.5, 4.8, 4.6, 0.7])  # tag, scaffold, name, params, thought, text
    moved = {0.0: [0.6, 0.9, 1.5, 4.8, 4.6, 0.7],
             0.2: [0.5, 0.8, 1.5, 4.9, 4.7, 0.7],
             1.0: [0.2, 0.4, 1.5, 5.0, 5.0, 0.7]}
    for progress, end in moved.items():
        assert torch.allclose(rest.curriculum(start, progress, config()), torch.tensor(end))
    assert start[0] == 0.6


@pytest.mark.parametrize("field, value", [("raw_weight", "inverse"), ("min_entropy", 1.0),
                                          ("top_entropy_fraction", 0.5), ("alpha_format", 1.0),
                                          ("alpha_params", 0.1), ("alpha_thought", 0.1),
                                          ("weight_min", 2.0), ("weight_max", 0.5)])
def test_every_weight_option_matters(field, value):
    """None of them is read and forgotten on the way from the command line to the weights."""
    g = torch.Generator().manual_seed(0)
    region = torch.randint(0, 6, (3, 40), generator=g)
    entropy = torch.rand(3, 40, generator=g) + region / 3
    method = "top-entropy" if field.startswith("top") else "rest"

    def weights(**options):
        return weigh(labelled(region, entropy), rest.Config(method=method, **options), 40)
    assert not torch.allclose(weights(), weights(**{field: value}), atol=1e-3)


def test_the_official_clock_stops():
    """Parameters at 1.2, thoughts at 1.0, however long the run."""
    batch = labelled(torch.tensor([[NAME, PARAMS, THOUGHT, TAG]]))
    for step, params, thought in ((0, 0.6, 0.6), (250, 1.1, 1.0), (1000, 1.2, 1.0)):
        w = torch.tensor([1.2, params, thought, 1.0])
        got = weigh(batch, config(method="rest-official", steps=2000), step)[0]
        assert torch.allclose(got, w / w.mean(), atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equal_weights_are_grpo_bit_for_bit(aggregation):
    """When all regions have the same entropy and there is no curriculum, rest's weights are exactly 1.0
    and its gradient is grpo's, bit for bit."""
    model = qwen3(V)
    batch, advantages = make_batch(model)
    batch.entropy = torch.where(batch.sampled, 0.75, 0.0)  # sums of 0.75 are exact
    weights = {method: weigh(batch, config(method=method), 5) for method in ("rest-static", "grpo")}
    assert torch.equal(*weights.values()) and set(weights["grpo"].unique().tolist()) == {0.0, 1.0}
    a, b = (gradient(model, batch, advantages, weight, config(method=method, aggregation=aggregation))[0]
            for method, weight in weights.items())
    assert torch.equal(a, b) and a.norm() > 0


def test_on_policy_the_gradient_is_reinforce():
    """logp_old = logp: the ratio is exactly 1, the loss is -sum scale w A, its gradient is that of -sum
    scale w A log p."""
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(6, 5, generator=g).requires_grad_()
    mask = torch.rand(6, 5, generator=g) > 0.3
    A = torch.randn(6, generator=g)
    w = torch.rand(6, 5, generator=g)
    scale = torch.rand(6, generator=g)
    loss = rest.policy_loss(logp, logp.detach(), A, w, mask, scale, 0.2)
    loss.backward()
    coefficient = -(scale * A)[:, None] * w * mask
    assert torch.allclose(logp.grad, coefficient, rtol=1e-6)
    assert loss.item() == pytest.approx(float(coefficient.sum()), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_with_the_samplers_logps_the_ratio_is_one(tokenizer, engine):
    """Pitfall 5. Right after the rollout, at T = 0.7, the ratio is 1 within 1e-5; scored at T = 1 (the
    broken variant) it is not."""
    run = engine(qwen3())
    rows = [ROW, {**ROW, "tools": []}]
    batch = rest.rollout(run, rest.Chat(tokenizer), rows, config(max_completion_tokens=24), seed=1)
    for temperature, same in ((0.7, True), (1.0, False)):
        logp = run.logps(batch, list(range(2 * G)), temperature)
        error = (logp - batch.logp)[batch.sampled].exp().sub(1).abs().max()
        assert (error < 1e-5) == same


def test_clipping_zeroes_exactly_the_right_tokens():
    """Gradient is 0 where A > 0 and ratio > 1 + eps, or A < 0 and ratio < 1 - eps; everywhere else it
    is -scale w A ratio."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0]).repeat(2, 1)
    A = torch.tensor([1.5, -1.5])
    old = torch.full((2, 7), -1.0)
    logp = (old + ratio.log()).requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    rest.policy_loss(logp, old, A, torch.ones(2, 7), mask, torch.ones(2), 0.2).backward()
    dead = torch.stack([ratio[0] > 1.2, ratio[1] < 0.8])
    alive = (-A[:, None] * ratio)[~dead]
    assert torch.equal(logp.grad == 0, dead) and torch.allclose(logp.grad[~dead], alive, rtol=1e-5)


def test_clip_is_the_configured_one():
    """Another epsilon, another gradient."""
    model = qwen3(V)
    batch, advantages = make_batch(model)
    wide, narrow = (gradient(model, batch, advantages, torch.ones(P * G, T), config(clip=c))[0]
                    for c in (0.2, 0.05))
    assert not close(wide, narrow, 1e-2)


def test_one_advantage_of_zero_does_not_drop_its_group():
    """Only groups whose advantages are all zero need no forward."""
    model = qwen3(V)
    batch, advantages = make_batch(model)
    advantages[[1, 2 * G]] = 0.0
    weight = rest.normalise_weights(torch.ones(P * G, T), batch.sampled)
    g, _ = gradient(model, batch, advantages, weight, config())
    assert close(g, reference_gradient(model, batch, advantages, weight, config())[0])


def test_nothing_but_logp_carries_gradient_and_inputs_stay():
    """Pitfalls 9 and 10: weights, behaviour logps, advantages and entropies get no gradient; no input
    is written to."""
    g = torch.Generator().manual_seed(1)
    logp, old, w = (torch.randn(3, 4, generator=g).requires_grad_() for _ in range(3))
    A = torch.randn(3, generator=g).requires_grad_()
    entropy = torch.rand(3, 4, generator=g).requires_grad_()
    mask = torch.rand(3, 4, generator=g) > 0.2
    region = torch.where(mask, torch.randint(0, 6, (3, 4), generator=g), -1)
    inputs = (logp, old, w, A, entropy, mask, region)
    before = [x.detach().clone() for x in inputs]
    weight = weigh(labelled(region, entropy), config(), 3)
    assert not weight.requires_grad
    rest.policy_loss(logp, old, A, w, mask, torch.ones(3), 0.2).backward()
    assert logp.grad is not None and all(x.grad is None for x in (old, w, A, entropy))
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before))


def test_surprising_batches_stay_finite():
    """Pitfalls 7 and 8: H = 0, empty regions, fully masked rows, a batch without any sampled token; and
    12 equal rewards of 0.3 give exactly 0."""
    assert torch.equal(rest.group_advantages(torch.full((1, 12), 0.3)), torch.zeros(1, 12))
    residue = (torch.full((1, 12), 0.3) - torch.full((1, 12), 0.3).mean()) / 1e-8
    assert residue.abs().max() > 0.5  # the broken variant: float residue over a tiny delta
    zero = torch.zeros(2, 3)
    for region in (torch.tensor([[0, 0, 3], [-1, -1, -1]]), torch.full((2, 3), -1)):
        mask = region >= 0
        for method in rest.WEIGHTS:
            if not mask.any() and method in ("top-entropy", "entropy-up"):
                continue  # a batch has sampled tokens: these two rank or standardise them
            weight = weigh(labelled(region), config(method=method), 2)
            for aggregation in AGGREGATIONS:
                scale = rest.loss_scale(mask, weight, aggregation, 8)
                loss = rest.policy_loss(zero, zero, torch.ones(2), weight, mask, scale, 0.2)
                assert weight.isfinite().all() and loss.isfinite()


# ---------------------------------------------------------------------- which positions are trained

@pytest.fixture
def trained():
    """(batch, trained(mask)): at which columns d loss / d logits is not 0, row t - 1 of the logits
    answering for token t, if the loss is given this mask. Every completion ends with id 0, with which
    padding is filled: pad == eos."""
    model = qwen3(V)
    batch, advantages = make_batch(model, off_policy=0.0)
    batch.tokens[torch.arange(P * G), batch.length - 1] = 0
    advantages = torch.where(advantages == 0, 1.0, advantages)
    weight = rest.normalise_weights(torch.ones(P * G, T), batch.sampled)
    scale = rest.loss_scale(batch.sampled, weight, "sequence", T)
    engine = rest.Engine(model)
    old = engine.logps(batch, ROWS, 0.7).detach()
    kept = {}

    def keep(module, args, output):
        output.retain_grad()
        kept["logits"] = output

    def trained(mask):
        handle = model.lm_head.register_forward_hook(keep)
        logp = engine.logps(batch, ROWS, 0.7)
        handle.remove()
        rest.policy_loss(logp, old, advantages, torch.ones(P * G, T), mask, scale, 0.2).backward()
        return kept["logits"].grad[:, -T - 1:-1].abs().sum(-1) > 0
    return batch, trained


def test_exactly_the_sampled_positions_are_trained(trained):
    """Pitfalls 1, 2 and 4: nothing at forced and padding positions, something at every sampled one."""
    batch, trained = trained
    assert torch.equal(trained(batch.sampled), batch.sampled)
    assert batch.sampled.any() and not batch.sampled.all()


def test_the_end_token_is_trained_though_padding_has_its_id(trained):
    """Pitfall 1. Broken variant: a mask made from the pad id drops the end token."""
    batch, trained = trained
    last = torch.arange(P * G), batch.length - 1
    assert trained(batch.sampled)[last].all()
    assert not trained(batch.sampled & (batch.tokens != 0))[last].any()


@pytest.mark.parametrize("wrong", [lambda mask: ~mask, torch.ones_like, lambda mask: mask.roll(1, 1)],
                         ids=["inverted", "missing", "shifted"])
def test_a_wrong_mask_would_be_seen(trained, wrong):
    """Pitfalls 2 and 4. Broken variants: an inverted or a missing mask trains forced tokens, a shifted
    one neighbours."""
    batch, trained = trained
    assert not torch.equal(trained(wrong(batch.sampled)), batch.sampled)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_later_tokens_attend_to_forced_ones(engine):
    """Pitfall 2: no gradient at a forced token, yet what follows has seen it."""
    run = engine(qwen3(V))
    batch, _ = make_batch(run.model)
    before = run.logps(batch, ROWS, 0.7)
    i, t = (~batch.sampled & (torch.arange(T) < batch.length[:, None])).nonzero()[0].tolist()
    batch.tokens[i, t] = (batch.tokens[i, t] + 1) % V
    after = run.logps(batch, ROWS, 0.7)
    assert not torch.allclose(after[i, t + 1], before[i, t + 1])


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_logps_equal_the_reference(name, engine):
    """Pitfall 4: position-dependent logits. The logps of both engines equal the unpadded float64
    reference; shifted by one they don't."""
    model = MODELS[name]()
    batch, _ = make_batch(model)
    logp = engine(model).logps(batch, ROWS, 0.7)
    double = copy.deepcopy(model).double()
    for i in range(P * G):
        n = int(batch.length[i])
        expected, _ = reference_logp(double, batch.prompts[i // G], batch.tokens[i, :n], 0.7)
        mine = logp[i, :n].double()
        assert torch.allclose(mine, expected, atol=1e-4)
        assert not torch.allclose(mine[1:], expected[:-1], atol=1e-2)


# ------------------------------------------------------------- what the gradient must not depend on

def random_lengths(g, prompts=12, group=4):
    length = torch.randint(1, 160, (prompts * group,), generator=g)
    ids = [[0] * int(n) for n in torch.randint(1, 100, (prompts,), generator=g)]
    return SimpleNamespace(group=group, length=length, prompts=ids)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_micro_batches_keep_to_the_budget_with_their_padding(engine):
    """Random batches: every completion once; no forward above the budget, counted as padded, with a
    prompt for each group (shared) or for each completion, unless it is a single completion. Shared, a
    part has equally many of each of its groups, together."""
    g = torch.Generator().manual_seed(0)
    run = engine(qwen3())
    for budget in (50, 300, 2000):
        batch = random_lengths(g)
        used = [p for p in range(12) if p != 5]
        parts = run.micro_batches(batch, used, budget)
        assert sorted(row for part in parts for row in part) == [p * 4 + i for p in used for i in range(4)]
        for part in parts:
            groups = list(dict.fromkeys(row // 4 for row in part))
            prompt = max(len(batch.prompts[p]) for p in groups)
            completion = max(batch.length[part].tolist())
            copies = len(groups) if engine is fast.SharedEngine else len(part)
            assert copies * prompt + len(part) * completion <= budget or len(part) == 1
            if engine is fast.SharedEngine:
                n = len(part) // len(groups)
                assert [row // 4 for row in part] == [p for p in groups for _ in range(n)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_do_not_change_the_gradient(aggregation):
    """Pitfall 6. Budgets from one completion a forward to all at once: the same gradient within 1e-5.
    Dividing by each micro-batch's own sums, as the authors' code does, changes it by more than 1%."""
    model = qwen3(V)
    batch, advantages = make_batch(model)
    weight = weigh(batch, config(), 4)

    def within(budget):
        cfg = config(aggregation=aggregation, micro_batch_tokens=budget)
        return gradient(model, batch, advantages, weight, cfg)[0]
    whole = within(10**6)
    for budget in (1, 20, 30, 60):
        assert close(within(budget), whole, 1e-5)
    wrong = 0
    for rows in (range(0, 4), range(8, 12)):  # the broken variant: denominators of the micro-batch
        rows = list(rows)
        scale = rest.loss_scale(batch.sampled[rows], weight[rows], "token", 12) / 2
        logp = fast.SharedEngine(model).logps(batch, rows, 0.7)
        old, w, mask = (x[rows, :logp.shape[1]] for x in (batch.logp, weight, batch.sampled))
        model.zero_grad()
        rest.policy_loss(logp, old, advantages[rows], w, mask, scale, 0.2).backward()
        wrong = wrong + flat(model.parameters())
    right, _ = gradient(model, batch, advantages, weight, config(aggregation="token"))
    assert not close(wrong, right, 1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_shared_prefix_checkpointing_and_padding_do_not_change_the_gradient(name):
    """The shared forward, gradient checkpointing, and columns of padding behind the completions each
    leave the gradient as it was (relative error 1e-5)."""
    model = MODELS[name]()
    batch, advantages = make_batch(model)
    weight = weigh(batch, config(), 4)
    plain, _ = gradient(model, batch, advantages, weight, config(), rest.Engine)
    assert close(gradient(model, batch, advantages, weight, config())[0], plain, 1e-5)
    wide = copy.copy(batch)
    for name in ("tokens", "sampled", "logp", "entropy"):
        setattr(wide, name, torch.nn.functional.pad(getattr(batch, name), (0, 5)))
    wide_weight = torch.nn.functional.pad(weight, (0, 5))
    assert close(gradient(model, wide, advantages, wide_weight, config())[0], plain, 1e-5)
    model.gradient_checkpointing_enable()
    model.train()
    assert close(gradient(model, batch, advantages, weight, config())[0], plain, 1e-5)


def test_the_order_of_samples_does_not_change_the_gradient():
    model = qwen3(V)
    batch, advantages = make_batch(model)
    weight = weigh(batch, config(), 4)
    first, _ = gradient(model, batch, advantages, weight, config())
    groups = [2, 0, 1]
    order = torch.tensor([p * G + g for p in groups for g in (3, 1, 0, 2)])
    moved = copy.copy(batch)
    moved.prompts = [batch.prompts[p] for p in groups]
    for name in ("tokens", "sampled", "logp", "entropy", "length", "region", "covers"):
        setattr(moved, name, getattr(batch, name)[order])
    weight = weigh(moved, config(), 4)
    assert close(gradient(model, moved, advantages[order], weight, config())[0], first, 1e-5)


def test_chunked_logps_equal_whole_ones():
    """fast.head_logps in chunks of 3 rows equals one chunk and rest.token_logps of the logits, values
    and gradients."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    x = torch.randn(20, 8)
    y = torch.randint(0, 50, (20,))
    ways = (lambda h: fast.head_logps(h, y, 0.5, head),
            lambda h: fast.head_logps(h, y, 0.5, head, chunk_elements=150),
            lambda h: rest.token_logps(head(h), y, 0.5))
    results = []
    for logps in ways:
        leaf = x.clone().requires_grad_()
        logp = logps(leaf)
        (logp * torch.arange(20)).sum().backward()
        results.append((logp.detach(), leaf.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.allclose(a, b, atol=1e-6)
    log_p = torch.log_softmax((x @ head.weight.T).detach() / 0.5, -1)
    assert torch.allclose(results[0][0], log_p.gather(1, y[:, None])[:, 0], atol=1e-5)


# ------------------------------------------------------------------------------- update and metrics

class Unigram(torch.nn.Module):
    """A policy with the same logits everywhere, which can be enumerated."""

    def __init__(self, p):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(p).log())

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False, logits_to_keep=0):
        out = self.logits.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": out[:, -logits_to_keep:]})


def unigram_batch(old, new, counts):
    """One prompt, one-token completions, each token as often as `old` says: averages over the batch are
    exact expectations."""
    tokens = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])[:, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logp = torch.tensor(old).log()[tokens]
    length = torch.ones(len(tokens), dtype=torch.long)
    batch = rest.Rollout([{}], [[0]], len(tokens), tokens, mask, logp, torch.zeros_like(logp), length,
                         length < 0, None, None)
    return Unigram(new), batch


def test_logged_kl_and_clip_fraction_are_what_their_names_say():
    """Pitfall 12. Behaviour (4, 3, 1)/8, policy (4, 1, 3)/8, every token as often as its probability:
    `kl` is exactly KL(behaviour || policy); with A = +1 on all the clipped share is that of the token
    whose ratio is 3, with A = -1 that of the token whose ratio is 1/3."""
    old, new = [0.5, 0.375, 0.125], [0.5, 0.125, 0.375]
    model, batch = unigram_batch(old, new, (4, 3, 1))
    kl = sum(p * math.log(p / q) for p, q in zip(old, new))
    weight = torch.ones(8, 1)
    cfg = config(temperature=1.0)
    for sign, clipped in ((1.0, 1 / 8), (-1.0, 3 / 8)):
        _, metrics = gradient(model, batch, sign * torch.ones(8), weight, cfg, rest.Engine)
        assert metrics["kl"] == pytest.approx(kl, abs=1e-6)
        assert metrics["clip_fraction"] == pytest.approx(clipped)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_update_is_skipped_and_counted(bad):
    model, batch = unigram_batch([0.5, 0.25, 0.25], [0.5, 0.375, 0.125], (4, 2, 2))
    before = model.logits.detach().clone()
    recorder = Recorder(model, rate=1.0)
    advantages = torch.linspace(-1, 1, 8) * torch.tensor([bad] + [1.0] * 7)
    engine = rest.Engine(model)
    metrics = rest.update(engine, recorder, batch, advantages, torch.ones(8, 1), config(passes=2))
    assert metrics["skipped_updates"] == 2 and not recorder.grads
    assert torch.equal(model.logits.detach(), before)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
    """The loss alone does not tell."""
    model, batch = unigram_batch([0.5, 0.25, 0.25], [0.5, 0.375, 0.125], (4, 2, 2))
    model.logits.register_hook(lambda grad: grad * math.nan)
    recorder = Recorder(model, rate=1.0)
    advantages = torch.linspace(-1, 1, 8)
    metrics = rest.update(rest.Engine(model), recorder, batch, advantages, torch.ones(8, 1), config())
    assert metrics["skipped_updates"] == 1 and not recorder.grads
    assert math.isfinite(metrics["loss"])


def test_several_passes_keep_weights_and_behaviour_logps():
    """passes=2 is two updates on the same batch, the second one off policy: its ratio differs from 1,
    so it is not twice the first gradient."""
    batch, advantages = make_batch(qwen3(V), off_policy=0.0)
    weight = weigh(batch, config(), 4)
    two = qwen3(V)
    one = qwen3(V)
    recorder = Recorder(two, rate=0.05)
    single = Recorder(one, rate=0.05)
    metrics = rest.update(rest.Engine(two), recorder, batch, advantages, weight, config(passes=2))
    for _ in range(2):
        last = rest.update(rest.Engine(one), single, batch, advantages, weight, config())
    assert all(map(torch.equal, recorder.grads, single.grads))
    assert len(recorder.grads) == len(single.grads) == 2
    assert not close(recorder.grads[1], recorder.grads[0], 1e-3) and last["kl"] > 0
    # the mean over passes, the first of which has 0
    assert metrics["kl"] == pytest.approx(last["kl"] / 2, rel=1e-3, abs=1e-6)


def test_gradient_norm_is_clipped():
    model = qwen3(V)
    batch, advantages = make_batch(model)
    weight = rest.normalise_weights(torch.ones(P * G, T), batch.sampled)
    free, metrics = gradient(model, batch, advantages, weight, config())
    clipped, again = gradient(model, batch, advantages, weight, config(max_grad_norm=0.01))
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4) == again["grad_norm"]
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_batch_without_signal_changes_nothing():
    model = qwen3(V)
    batch, _ = make_batch(model)
    optimizer = torch.optim.AdamW(model.parameters())
    advantages = torch.zeros(P * G)
    weight = torch.ones(P * G, T)
    metrics = rest.update(rest.Engine(model), optimizer, batch, advantages, weight, config())
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0


# ---------------------------------------------------------------------------------------------- TRL

@pytest.mark.parametrize("loss_type, aggregation", [
    ("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")])
def test_uniform_weights_equal_trl(loss_type, aggregation, tmp_path):
    """With weight 1 our loss and gradient equal GRPOTrainer's on the same tensors: left-padded prompts,
    forced tokens as its tool_mask, clipped ratios."""
    trl = pytest.importorskip("trl")
    import datasets
    from conftest import byte_tokenizer
    model = qwen3(V)
    batch, advantages = make_batch(model)
    options = trl.GRPOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, beta=0.0, temperature=0.7, epsilon=0.2,
        max_completion_length=12, num_generations=G, per_device_train_batch_size=P * G,
        use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False)
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=byte_tokenizer(), args=options,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * 4}))
    trainer.current_gradient_accumulation_steps = 1
    ids, mask = rest.left_pad([prompt for prompt in batch.prompts for _ in range(G)], "cpu")
    inside = (torch.arange(T) < batch.length[:, None]).long()
    model.eval()
    model.zero_grad()
    loss = trainer._compute_loss(model, {
        "prompt_ids": ids, "prompt_mask": mask.long(),
        "completion_ids": batch.tokens, "completion_mask": inside, "tool_mask": batch.sampled.long(),
        "advantages": advantages, "old_per_token_logps": batch.logp,
        "num_items_in_batch": batch.sampled.sum()})
    loss.backward()
    theirs = flat(model.parameters())
    cfg = config(method="grpo", aggregation=aggregation)
    weight = weigh(batch, cfg, 0)
    ours, metrics = gradient(model, batch, advantages, weight, cfg)
    assert close(ours, theirs, 1e-5) and metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
