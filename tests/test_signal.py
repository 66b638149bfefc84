"""toy_tools/signal.py: its estimators on policies that are enumerated, on Gaussians whose moments are
known, and the whole command."""

import csv
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CALL, ROW, by_text, qwen3, write_rows
from test_theory import Policy
from torch.testing import assert_close as close

import rest
from toy_tools import fast, signal


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gram_of(g):
    """Gram matrix [n, C, n, C] of gradients g [n, C, D]."""
    return torch.einsum("ird,jsd->irjs", g, g)


def gaussians(n, mean, spread, seed=0, dims=400):
    """Gradients float64 [n, C, D]: mean [C, C'] (coefficients of fixed orthonormal directions) plus
    noise spread [C, C] in every coordinate. True M = mean mean', true S = dims spread spread'."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.eye(mean.shape[1], dims, dtype=torch.float64)
    white = torch.randn(n, len(spread), dims, generator=draw, dtype=torch.float64)
    return mean @ base + torch.einsum("rs,nsd->nrd", spread, white)


MEAN = torch.tensor([[1.0, 0.2, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.1, 0.4]], dtype=torch.float64)
SPREAD = torch.tensor([[0.02, 0.0, 0.0], [0.01, 0.1, 0.0], [0.0, 0.02, 0.05]], dtype=torch.float64)
TRUE_M = MEAN @ MEAN.T
TRUE_S = 400 * SPREAD @ SPREAD.T
ONES = torch.ones(3, dtype=torch.float64)


# --------------------------------------------------------------------- enumerated: exactly unbiased

def split_by_region(policy, A):
    """[N, 2, D]: the gradient of every sequence, split into the tokens that are word 1 and all
    others."""
    first = (policy.token == 1) & policy.alive
    return torch.stack([policy.gradient(A, mask.double()) for mask in (first, policy.alive & ~first)], 1)


def true_moments(prob, g):
    """Exact (M, S) [C, C] of gradients g [N, C, D] under prob [N]."""
    mean = torch.tensordot(prob, g, 1)
    M = mean @ mean.T
    return M, torch.einsum("n,nrd,nsd->rs", prob, g, g) - M


def expected_moments(prob, g, n):
    """E of the estimators over all N^n ways in which n independent mini-batches can come out."""
    M = S = 0.0
    for drawn in itertools.product(range(len(prob)), repeat=n):
        m, s = signal.moments(gram_of(g[list(drawn)]))
        chance = prob[list(drawn)].prod()
        M, S = M + chance * m, S + chance * s
    return M, S


@pytest.mark.parametrize("kind, V, T, end, n", [
    ("tabular", 2, 2, None, 2), ("tabular", 3, 2, 0, 3), ("recurrent", 3, 2, None, 2)])
def test_moments_are_exactly_unbiased_on_an_enumerated_policy(float64, kind, V, T, end, n):
    """Guards M and S themselves: their mean over every possible set of n mini-batches is <E g_r, E g_s>
    and the trace of the covariance. The naive ||mean g||^2 is not: it is up by S/n."""
    policy = Policy(kind, V=V, T=T, end=end)
    A = torch.linspace(-1.0, 2.0, len(policy.prob))
    g = split_by_region(policy, A)
    M, S = true_moments(policy.prob, g)
    found_M, found_S = expected_moments(policy.prob, g, n)
    close(found_M, M, rtol=1e-10, atol=1e-14)
    close(found_S, S, rtol=1e-10, atol=1e-14)
    naive = sum(policy.prob[list(d)].prod() * gram_of(g[list(d)].mean(0, keepdim=True))[0, :, 0]
                for d in itertools.product(range(len(policy.prob)), repeat=n))
    close(naive, M + S / n, rtol=1e-10, atol=1e-14)


def test_group_advantages_need_the_group_as_the_unit_and_noise_falls_with_the_prompts(float64):
    """Mini-batches of whole groups of 2, group-normalised: still exactly unbiased, and S of batches of
    two groups is half of S of one."""
    policy = Policy("tabular", V=2, T=2)
    reward = policy.token.sum(1).double()
    member, prob = policy.groups(2)
    A = rest.group_advantages(reward[member])                                      # (M, 2)
    g = (A[..., None, None] * split_by_region(policy, 1.0)[member]).mean(1)        # (M, regions, D)
    M, S = true_moments(prob, g)
    found_M, found_S = expected_moments(prob, g, 2)
    close(found_M, M, rtol=1e-10, atol=1e-14)
    close(found_S, S, rtol=1e-10, atol=1e-14)
    a, b = torch.cartesian_prod(*[torch.arange(len(prob))] * 2).T
    two_M, two_S = true_moments(prob[a] * prob[b], (g[a] + g[b]) / 2)
    close(two_M, M, rtol=1e-10, atol=1e-14)
    close(two_S, S / 2, rtol=1e-10, atol=1e-14)


def test_efficiency_is_what_the_best_step_gains(float64):
    """On the quadratic f(x) = ||x - x0||^2 / 2 with noisy gradients the best step length along g(w)
    gains eta(w) of what the true gradient gains: found here by trying step lengths, without the
    formula."""
    policy = Policy("tabular", V=3, T=2)
    g = split_by_region(policy, torch.linspace(-1.0, 2.0, len(policy.prob)))
    M, S = true_moments(policy.prob, g)
    true = torch.tensordot(policy.prob, g, 1).sum(0)  # gradient of the objective at x
    for w in (torch.tensor([1.0, 1.0]), torch.tensor([0.3, 2.0]), torch.tensor([-1.0, 1.0])):
        step = torch.einsum("r,nrd->nd", w, g)
        lengths = torch.linspace(0, 3, 30001)
        gain = lengths * (policy.prob @ step @ true) - lengths ** 2 / 2 * (policy.prob @ step.pow(2).sum(1))
        expected = gain.max() / (true @ true / 2)
        close(signal.efficiency(w, M, S, torch.ones(2)).clamp(min=0.0), expected, rtol=1e-4, atol=1e-8)


# --------------------------------------------------------------------- Gaussians: moments are known

def test_moments_are_unbiased_on_gaussians():
    """Mean of 300 measurements of 8 mini-batches within 4 standard errors of the true M and S; the odds
    of a false alarm are about 1 in 1,000."""
    grams = [gram_of(gaussians(8, MEAN, SPREAD, seed)) for seed in range(300)]
    found = torch.stack([torch.stack(signal.moments(gram)) for gram in grams])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - torch.stack([TRUE_M, TRUE_S])).abs() < 4 * error).all()


def test_a_negative_estimate_stays_negative():
    """Without signal M is 0 and half of its estimates are negative: a clamp would bias them up and hide
    that nothing was seen."""
    grams = [gram_of(gaussians(4, 0 * MEAN, SPREAD, seed)) for seed in range(400)]
    found = torch.stack([signal.moments(gram)[0] for gram in grams])
    total = found.sum((1, 2))
    assert 0.4 < (total < 0).double().mean() < 0.6
    assert total.mean().abs() < 4 * total.std() / math.sqrt(len(total))
    M, S = signal.moments(grams[int((total < 0).nonzero()[0])])
    assert signal.noise(ONES, M, S) < 0 and signal.efficiency(ONES, M, S, ONES) < 0


def test_counts_stand_for_repeated_and_missing_mini_batches():
    """A count of 0 leaves a mini-batch out; a batch of draws gives what one draw at a time gives; pairs
    of a mini-batch with itself never enter M."""
    g = gaussians(6, MEAN, SPREAD)
    counts = torch.tensor([[1.0, 0, 1, 1, 0, 1], [2.0, 1, 0.5, 1, 3, 1]], dtype=torch.float64)
    M, S = signal.moments(gram_of(g), counts)
    for found, expected in zip((M[0], S[0]), signal.moments(gram_of(g[[0, 2, 3, 5]]))):
        close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    total = sum(counts[1, i] * counts[1, j] for i, j in pairs)
    expected = sum(counts[1, i] * counts[1, j] * g[i] @ g[j].T for i, j in pairs) / total
    close(M[1], expected, rtol=1e-12, atol=1e-12)


def test_efficiency_has_no_scale_and_is_at_most_one():
    """eta(c w) = eta(w) for c > 0; without noise it is a squared cosine: 1 along the true gradient, at
    most 1 elsewhere, negative uphill."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(200, 3, generator=draw, dtype=torch.float64)
    for S in (TRUE_S, 0 * TRUE_S):
        eta = signal.efficiency(weights, TRUE_M, S, ONES)
        close(signal.efficiency(7.3 * weights, TRUE_M, S, ONES), eta, rtol=1e-12, atol=1e-12)
        assert (eta.abs() <= 1 + 1e-12).all() and (eta < 0).any() and (eta > 0).any()
        assert torch.equal(eta > 0, weights @ TRUE_M.sum(1) > 0)
    close(signal.efficiency(ONES, TRUE_M, 0 * TRUE_S, ONES), torch.tensor(1.0, dtype=torch.float64))
    assert signal.efficiency(ONES, TRUE_M, TRUE_S, ONES) < 1


def test_best_weights_beat_all_others_on_the_same_gram():
    """w* on a measured Gram matrix against 5,000 random weights, and w* >= 0 against the random weights
    that are >= 0; where w* is >= 0 by itself the two agree, and where it is not the constraint costs
    something."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(5000, 3, generator=draw, dtype=torch.float64)
    # the noise of region 3 goes with that of region 2
    crossed = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.5, 0.0], [0.1, 0.5, 0.01]], dtype=torch.float64)
    for spread, sign in ((SPREAD, None), (crossed, False)):
        M, S = signal.moments(gram_of(gaussians(16, MEAN, spread)))
        free, bound = signal.best_weights(M, S), signal.best_weights(M, S, nonnegative=True)
        eta = signal.efficiency(weights, M, S, ONES)
        assert signal.efficiency(free, M, S, ONES) >= eta.max()
        inside = signal.efficiency(weights.abs(), M, S, ONES)
        assert (bound >= 0).all() and signal.efficiency(bound, M, S, ONES) >= inside.max()
        if bool((free >= 0).all()):
            close(bound, free)
        elif sign is False:
            assert signal.efficiency(bound, M, S, ONES) < signal.efficiency(free, M, S, ONES)


def test_best_weights_without_an_answer_say_so():
    """A region that no token lies in gets 0, not NaN; where M + S is not positive there is no best
    direction, and where every region points downhill no weights >= 0 help: NaN, in a batch beside good
    ones too."""
    M = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    S = torch.diag(torch.tensor([1.0, 0.0, 6.0], dtype=torch.float64))
    expected = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    for nonnegative in (False, True):
        close(signal.best_weights(M, S, nonnegative), expected)
    bad = torch.stack([M, -2 * S, M])
    found = signal.best_weights(bad, S.expand(3, 3, 3))
    close(found[0], expected)
    assert found[1].isnan().all() and torch.equal(found[0], found[2])
    assert signal.best_weights(-0.1 * M, S, nonnegative=True).isnan().all()


def test_cross_fitting_does_not_flatter_on_pure_noise():
    """Without signal w* found and scored on the same mini-batches shows progress every time; found on
    one half and scored on the other it shows none on average. 4 standard errors: a false alarm in about
    1 of 15,000."""
    inside, across = [], []
    for seed in range(200):
        gram = gram_of(gaussians(8, 0 * MEAN, SPREAD, seed, dims=30))
        M, S = signal.moments(gram)
        w = signal.best_weights(M, S)
        inside.append(float(signal.slope(w / signal.quadratic(w, M + S).sqrt(), M, ONES)))
        across.append(float(signal.cross_fitted(*signal.split_moments(gram)[1:], ONES)[0]))
    across = torch.tensor(across)
    error = float(across.std()) / math.sqrt(len(across))
    assert min(inside) > 0 and sum(inside) / len(inside) > 5 * error
    assert abs(float(across.mean())) < 4 * error


def test_cross_fitting_finds_a_real_gain():
    """With signal the cross-fitted gain over uniform weights lies between 1 and what the true best
    weights gain."""
    gram = gram_of(gaussians(64, MEAN, SPREAD, dims=400))
    M, S = signal.moments(gram)
    along, _, square = signal.cross_fitted(*signal.split_moments(gram)[1:], ONES)
    found = signal.ratio(along, square, M.sum()) / signal.efficiency(ONES, M, S, ONES)
    best = signal.best_weights(TRUE_M, TRUE_S)
    possible = signal.efficiency(best, TRUE_M, TRUE_S, ONES) / signal.efficiency(ONES, TRUE_M, TRUE_S, ONES)
    assert 1.0 < found < 1.1 * possible and possible > 1.2


def test_intervals_hold_the_truth():
    """95% bootstrap intervals of M_1 and of the gain of fixed weights hold the true values in at least
    85% of 60 measurements (they are meant to be right or too wide; at a true 95% fewer than 51 have odds
    below 1 in 1,000); without signal there is no interval."""
    weights = torch.tensor([2.0, 0.3, 0.3], dtype=torch.float64)
    truth = signal.efficiency(weights, TRUE_M, TRUE_S, ONES) / signal.efficiency(ONES, TRUE_M, TRUE_S, ONES)
    held = torch.zeros(2)
    for seed in range(60):
        gram = gram_of(gaussians(32, MEAN, SPREAD, seed))
        M, S = signal.moments(gram, signal.bootstrap_counts(32, 200, seed))
        gain = signal.efficiency(weights, M, S, ONES) / signal.efficiency(ONES, M, S, ONES)
        for k, (draws, true) in enumerate(((M.sum((1, 2)), TRUE_M.sum()), (gain, truth))):
            low, high = signal.interval(draws)
            held[k] += low <= true <= high
    assert (held >= 51).all(), held
    draws = torch.arange(100.0)
    assert signal.interval(draws)[0] == pytest.approx(2.475)
    draws[:3] = math.nan
    assert math.isnan(signal.interval(draws)[0])


# ------------------------------------------------------------------------ gradients of mini-batches

TEXTS = [CALL, CALL.replace("sum", "a longer thought"),
         "<response>no</response>", CALL.replace('"b": 2', '"b": 3') + "!"]


def written(engine, talk, texts=TEXTS, group=2):
    """A Rollout in which ROW's policy wrote `texts`, with the log-probabilities it gives them, and
    advantages of +1 and -1 in turn."""
    ids = [talk.encode(text) + [talk.tokenizer.eos_token_id] for text in texts]
    N, T = len(ids), max(map(len, ids))
    length = torch.tensor([len(row) for row in ids])
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in ids])
    sampled = torch.arange(T) < length[:, None]
    rows = [ROW] * (N // group)
    batch = rest.Rollout(
        rows, [talk.prompt(row)[0] for row in rows], group, tokens, sampled, torch.zeros(N, T),
        torch.zeros(N, T), length, torch.zeros(N, dtype=torch.bool), [[(0, len(row))] for row in ids],
        [[text] for text in texts], [0] * N)
    with torch.no_grad():
        batch.logp = torch.where(sampled, rest.Engine(engine.model).logps(batch, list(range(N)), 1.0), 0.0)
    batch.entropy = torch.where(sampled, torch.rand(N, T, generator=torch.Generator().manual_seed(0)), 0.0)
    batch.region, batch.covers = rest.token_regions(batch, talk)
    return batch, torch.tensor([1.0, -1.0] * (N // 2))


@pytest.mark.parametrize("aggregation", ["sequence", "constant", "token"])
def test_region_gradients_add_up_to_the_whole_gradient(tokenizer, aggregation):
    """The five regions' gradients add up to the unweighted one, which is the gradient that training
    without weights takes; each is the sum over its own tokens; nothing depends on the size of
    micro-batches or on sharing prompts."""
    engine, talk = rest.Engine(qwen3()), rest.Chat(tokenizer)
    batch, advantages = written(engine, talk)
    cfg = rest.Config(method="grpo", group=2, prompts=2, aggregation=aggregation)
    found = signal.gradients(engine, batch, advantages, signal.columns(batch, cfg, 0.5, ()), cfg)[:, 0]
    whole = signal.gradients(engine, batch, advantages, [signal.unweighted(batch, cfg)], cfg)[0, 0]
    assert all(float(g.norm()) > 0 for g in found)
    close(found.sum(0), whole, rtol=1e-4, atol=1e-6)

    optimizer = torch.optim.SGD(engine.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    weight = rest.WEIGHTS["grpo"](batch, cfg, 0.5)
    rest.update(engine, optimizer, batch, advantages, weight, replace(cfg, max_grad_norm=1e9))
    after = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    close(before - after, whole, rtol=1e-3, atol=1e-5)

    model = qwen3()
    tokens = batch.sampled.sum(1)
    scale = {"sequence": 1 / (4 * tokens), "constant": torch.full((4,), 1 / (4 * cfg.max_completion_tokens)),
             "token": 1 / tokens.sum().expand(4)}[aggregation]
    for r, members in enumerate(rest.PAPER_REGIONS.values()):
        loss = 0.0
        for i in range(4):
            T = int(batch.length[i])
            prompt = batch.prompts[i // 2]
            ids = torch.tensor([prompt + batch.tokens[i, :T].tolist()])
            logp = model(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            for t in range(T):
                if int(batch.region[i, t]) in members:
                    loss = loss - scale[i] * advantages[i] * logp[t, ids[0, len(prompt) + t]]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        close(found[r], expected, rtol=1e-3, atol=1e-5)

    shared = fast.engine(qwen3())
    assert isinstance(shared, fast.SharedEngine)
    for other, budget in ((rest.Engine(qwen3()), 1), (shared, 4096), (shared, 1)):
        small = replace(cfg, micro_batch_tokens=budget)
        again = signal.gradients(other, batch, advantages, signal.columns(batch, small, 0.5, ()), small)[:, 0]
        close(again, found, rtol=1e-3, atol=1e-5)


def test_methods_get_the_gradient_that_training_with_them_takes(tokenizer):
    """A method's column is minus the step of rest.update with its weights; the columns stand in the
    order of the names."""
    talk, cfg = rest.Chat(tokenizer), rest.Config(group=2, prompts=2)
    methods = ("rest", "top-entropy", "shuffled")
    batch, advantages = written(rest.Engine(qwen3()), talk)
    engine = rest.Engine(qwen3())
    found = signal.gradients(engine, batch, advantages, signal.columns(batch, cfg, 0.5, methods), cfg)[5:, 0]
    for g, method in zip(found, methods):
        model = qwen3()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        weight = rest.WEIGHTS[method](batch, cfg, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rest.update(rest.Engine(model), optimizer, batch, advantages, weight, replace(cfg, max_grad_norm=1e9))
        close(before - torch.cat([p.detach().flatten() for p in model.parameters()]), g, rtol=1e-3, atol=1e-5)
    assert float((found[0] - found[1]).norm()) > 1e-3 and float((found[0] - found[2]).norm()) > 1e-3


def test_weights_of_regions_are_those_of_the_methods(tokenizer):
    """The linear methods' weights are rest.py's, a mean over tokens where mini-batches differ; the
    report scales any weights to a token mean of 1."""
    batch, _ = written(rest.Engine(qwen3()), rest.Chat(tokenizer))
    other = replace(batch, entropy=2 * batch.entropy, sampled=batch.sampled.clone(),
                    region=batch.region.clone())
    other.sampled[:3] = False
    other.region[:3] = -1
    cfg = rest.Config(raw_weight="inverse", alpha_thought=0.8)
    facts = signal.region_facts([batch, other], cfg, 0.5)
    for r, (name, members) in enumerate(rest.PAPER_REGIONS.items()):
        count = [sum(int((b.region == member).sum()) for member in members) for b in (batch, other)]
        assert int(facts["tokens"][r]) == sum(count) > 0
        for method, kind, at in (("curriculum", "inverse", 0.5), ("curriculum at the end", "inverse", 1.0),
                                 ("raw one-minus-exp", "one-minus-exp", 0.0)):
            of_kind = replace(cfg, raw_weight=kind)
            each = [rest.region_weights(b, of_kind, at)[members[0]] for b in (batch, other)]
            expected = sum(c * w for c, w in zip(count, each)) / sum(count)
            close(facts["linear"][method][r], expected, rtol=1e-5, atol=1e-6)
        without = 0.0 if name == "thought" else facts["linear"]["curriculum"][r]
        assert facts["linear"]["curriculum, no thought"][r] == without
        assert facts["linear"]["uniform"][r] == 1.0

    draw = torch.Generator().manual_seed(0)
    gram = gram_of(torch.randn(8, 5, 50, dtype=torch.float64, generator=draw) + 0.5)
    point = {"run": "a", "step": 1, "prompts": 2, "of_run": 2, "group": 2, "batches": 8,
             "columns": signal.REGIONS, "gram": dict.fromkeys(signal.COORDINATES, gram), **facts}
    share = facts["tokens"] / facts["tokens"].sum()
    for line in signal.table([point], 20):
        weights = torch.tensor([line[f"w_{name}"] for name in signal.REGIONS])
        if not line["method"].endswith("cross-fitted") and not weights.isnan().any():
            assert float((share * weights.abs()).sum()) == pytest.approx(1.0, rel=1e-4)


def test_groups_without_an_advantage_have_no_gradient(tokenizer):
    """All advantages 0: zeros of the right shape, kept or sketched, and no forward."""
    engine, cfg = rest.Engine(qwen3()), rest.Config(group=2, prompts=2)
    batch, advantages = written(engine, rest.Chat(tokenizer))
    engine.logps = None
    size = sum(p.numel() for p in engine.model.parameters())
    found = signal.gradients(engine, batch, 0 * advantages, signal.columns(batch, cfg, 0.0, ()), cfg)
    assert found.shape == (5, 1, size) and not found.any()
    project = signal.Sketch(size, 64)
    cols = signal.columns(batch, cfg, 0.0, ())
    found = signal.gradients(
        engine, batch, 0 * advantages, cols, cfg, lambda g: torch.stack([project(g)] * 3))
    assert found.shape == (5, 3, 64) and not found.any()


def test_sketches_are_linear_and_unbiased():
    """Over 400 sketches of 64 coordinates the mean inner product of two vectors is the true one within 4
    standard errors, and their spread is that of a count sketch; a sketch as wide as the vector is exact;
    inputs stay as they were."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1000, generator=draw)
    y = y + 0.5 * x
    before = x.clone()
    found = []
    for seed in range(400):
        project = signal.Sketch(1000, 64, seed=seed)
        close(project(2 * x - 3 * y), 2 * project(x) - 3 * project(y), rtol=1e-4, atol=1e-3)
        found.append(float(project(x) @ project(y)))
    found = torch.tensor(found)
    assert abs(float(found.mean() - x @ y)) < 4 * float(found.std()) / 20
    expected = float(((x @ x) * (y @ y) + (x @ y) ** 2) / 64) ** 0.5
    assert 0.8 * expected < float(found.std()) < 1.2 * expected
    wide = signal.Sketch(1000, 1000, seed=3)
    close(wide(x) @ wide(y), x @ y, rtol=1e-4, atol=1e-3)
    assert torch.equal(x, before)


def test_grams_scale_whole_gradients_and_take_sketches_as_they_are():
    """K in every coordinates against plain loops, over more coordinates than one chunk holds."""
    g = torch.randn(3, 2, 1, 70000, generator=torch.Generator().manual_seed(0))
    scales = [torch.ones(70000), torch.linspace(0.5, 2, 70000), torch.linspace(0.1, 3, 70000)]
    found = signal.grams(list(g), scales)
    assert list(found) == list(signal.COORDINATES)
    for K, scale in zip(found.values(), scales):
        for i, r, j, s in itertools.product(range(3), range(2), range(3), range(2)):
            expected = (g[i, r, 0].double() * scale * g[j, s, 0].double() * scale).sum()
            close(K[i, r, j, s], expected, rtol=1e-6, atol=1e-3)
    copies = torch.stack([g[:, :, 0] * scale for scale in scales], 2)  # (n, C, 3, m)
    for name, K in signal.grams(list(copies), scales).items():
        close(K, found[name], rtol=1e-5, atol=1e-2)


def test_second_moment_is_adamws_own():
    """After k steps of AdamW, v as one more step leaves it; before the first step the square itself; of
    another policy: a sentence."""
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    for k in range(4):
        square = torch.rand(10)
        v, eps = signal.second_moment(optimizer.state_dict(), square)
        if k == 0:
            close(v, square)
        parameters[0].grad, parameters[1].grad = square[:6].sqrt().view(3, 2), square[6:].sqrt()
        optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        expected = torch.cat([state["exp_avg_sq"].flatten() for state in states]) / (1 - 0.95 ** (k + 1))
        close(v, expected, rtol=1e-4, atol=1e-7)
        assert eps == 1e-8
    with pytest.raises(ValueError, match="not of this policy"):
        signal.second_moment(optimizer.state_dict(), torch.rand(11))


# -------------------------------------------------------------------------------------- the command

def make_run(folder, tokenizer, seed=0, steps=(0, 3), **options):
    """A run of a random policy that kept `steps` and ended at step 4, with AdamW's state from 1 on."""
    cfg = rest.Config(steps=4, prompts=2, group=2, max_completion_tokens=12, seed=seed)
    model = qwen3(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (*steps, 4):
        if step:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        path = folder / ("checkpoint" if step == 4 else f"kept/step{step}")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        torch.save({"optimizer": optimizer.state_dict(), "step": step}, path / "trainer.pt")
    rows = [ROW | {"messages": [{"role": "user", "content": f"{k}+2?"}]} for k in range(6)]
    run = {"dtype": "float32", "data": str(write_rows(folder / "rows.jsonl", rows))} | options
    (folder / "config.json").write_text(json.dumps({"config": asdict(cfg), "run": run}))
    return folder


SMALL = ["--batches", "8", "--device", "cpu"]


def lines_of(path):
    return list(csv.DictReader(open(path)))


def test_the_command_measures_pools_and_goes_on_after_an_interruption(
        tokenizer, tmp_path, monkeypatch, capsys):
    """Two runs measured: every line is there, uniform weights gain exactly 1, noise falls as 1/P;
    stopped in the middle of either pass the same command goes on and ends with the same numbers; a third
    time nothing is rolled out again; nothing but the result is left."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    drawn = signal.bootstrap_counts
    monkeypatch.setattr(signal, "bootstrap_counts", lambda n, draws, seed: drawn(n, 40, seed))
    runs = [make_run(tmp_path / name, tokenizer, seed) for seed, name in enumerate("ab")]
    command = [*map(str, runs), *SMALL, "--methods", "rest", "shuffled", "--steps", "3", "4"]
    original, calls = signal.gradients, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) in (4, 9, 16):
            raise KeyboardInterrupt
        return original(*args, **options)
    monkeypatch.setattr(signal, "gradients", stopping)
    for _ in range(3):
        with pytest.raises(SystemExit, match="interrupted"):
            signal.main([*command, "--out", str(tmp_path / "one")])
    signal.main([*command, "--out", str(tmp_path / "one")])
    assert len(calls) == 3 + 2 * 8 * 4
    printed = capsys.readouterr().out
    assert "step 3: 8 mini-batches of 2 prompts x 2; for the run's 2 prompts a step" in printed
    assert "pooled over 2, step 4: 16 mini-batches" in printed
    signal.main([*command, "--out", str(tmp_path / "two")])
    assert len(calls) == 3 + 2 * 8 * 4
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    left = {path.name for path in (runs[0] / "signal").rglob("*.*")}
    assert left == {"measured.pt", "settings.json"}

    for run in runs:
        for path in (run / "signal").rglob("*.*"):
            path.unlink()
    monkeypatch.setattr(signal, "gradients", original)
    signal.main([*command, "--out", str(tmp_path / "three")])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "three.csv").read_bytes()

    lines = lines_of(tmp_path / "one.csv")
    methods = 6 + 2 + 4
    assert len(lines) == 3 * 2 * len(signal.COORDINATES) * len(signal.FACTORS) * methods
    assert {line["run"] for line in lines} == {*map(str, runs), "pooled over 2"}
    for line in lines:
        if line["method"] == "uniform" and line["gain"]:
            assert float(line["gain"]) == 1.0
        if line["method"] in ("uniform", "rest"):
            keys = ("run", "step", "coordinates", "method")
            same = [other for other in lines if all(other[key] == line[key] for key in keys)]
            by_size = {float(other["prompts"]): float(other["noise"]) for other in same}
            assert by_size[0.5] == pytest.approx(4 * by_size[2.0], rel=1e-3)
            assert by_size[2.0] == pytest.approx(4 * by_size[8.0], rel=1e-3)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "one.png").stat().st_size > 10_000


def test_only_runs_that_differ_in_their_seed_are_pooled(tokenizer, tmp_path, monkeypatch):
    """Of the four the third was trained by another method, the fourth is another model."""
    def measured(point, folder, batches, methods, sketch, bar):
        return {"run": str(point.run), "step": point.step}
    pooled = []
    monkeypatch.setattr(signal, "measure", measured)
    monkeypatch.setattr(signal, "table", lambda points: pooled.append([p["run"][-1] for p in points]) or [])
    monkeypatch.setattr(signal, "summary", lambda lines: "")
    monkeypatch.setattr(signal, "write_csv", lambda lines, path: None)
    monkeypatch.setattr(signal, "figure", lambda lines, path: None)
    runs = [make_run(tmp_path / name, tokenizer, seed) for name, seed in zip("abcd", (0, 1, 0, 0))]
    settings = json.loads((runs[2] / "config.json").read_text())
    settings["config"]["method"] = "grpo"
    (runs[2] / "config.json").write_text(json.dumps(settings))
    qwen3(layers=1).save_pretrained(runs[3] / "checkpoint")
    signal.main([*map(str, runs), *SMALL, "--steps", "4"])
    assert pooled == [["a"], ["b"], ["c"], ["d"], ["a", "b"]]


def test_a_prolonged_run_is_measured_by_the_clock_it_had(tokenizer, tmp_path):
    """Steps before the prolongation had another progress, and so other weights and rewards."""
    run = make_run(tmp_path / "a", tokenizer, steps=(0, 1, 2))
    settings = json.loads((run / "config.json").read_text())
    args = SimpleNamespace(prompts=0, group=0, device="cpu", seed=0)
    for lengths, progress in (([[0, 4]], [0, 0.25, 0.5, 1]), ([[0, 2], [2, 4]], [0, 0.5, 0.5, 1])):
        (run / "config.json").write_text(json.dumps(settings | {"lengths": lengths}))
        points = [signal.load(run, step, folder, args) for step, folder in signal.checkpoints(run).items()]
        assert [point.progress for point in points] == progress


def test_without_matplotlib_the_figure_is_refused_in_words(monkeypatch, tmp_path):
    """Its absence gives the pip line, and nothing else is lost."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        signal.figure([], tmp_path / "x.png")


def test_pooling_a_checkpoint_with_itself_changes_no_estimate(tokenizer, tmp_path, monkeypatch):
    """Moments are averaged over runs, so twice the same run gives the same estimates; and sketched
    measurements agree with whole gradients to the accuracy of the sketch, exactly where it is as wide as
    the gradient."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    run = make_run(tmp_path / "a", tokenizer)
    args = signal.parse([str(run), *SMALL])
    size = sum(p.numel() for p in qwen3().parameters())
    found = {}
    for sketch in (0, size, 4096):
        point = signal.load(run, 3, run / "kept" / "step3", args)
        bar = signal.tqdm(disable=True)
        found[sketch] = signal.measure(point, tmp_path / f"sketch{sketch}", 8, ("rest",), sketch, bar)
    for name in signal.COORDINATES:
        exact, same, rough = (K["gram"][name] for K in found.values())
        norms = exact.flatten(0, 1).flatten(1, 2).diagonal().sqrt()
        error = (rough - exact).flatten(0, 1).flatten(1, 2).abs() / (norms[:, None] * norms).clamp(min=1e-12)
        assert 0 < float(error.max()) < 16 / 64
        close(same, exact, rtol=1e-4, atol=float(1e-5 * exact.abs().max()))
    single, double = signal.table([found[0]], 50), signal.table([found[0]] * 2, 50)
    larger = signal.table([found[0] | {"of_run": 8}], 50)  # a run with four times the prompts of a mini-batch
    assert {line["prompts"] for line in larger} == {2.0, 8.0, 32.0, 152.0}
    for line in larger:
        if line["prompts"] in (2.0, 8.0):
            (same,) = [one for one in single if all(one[key] == line[key] for key in (
                "coordinates", "prompts", "method"))]
            assert same["noise"] == pytest.approx(line["noise"], rel=1e-6, nan_ok=True)
    for a, b in zip(single, double):
        for key in ("signal", "spread", "efficiency", "w_text"):
            assert a[key] == pytest.approx(b[key], rel=1e-6, nan_ok=True), key


def test_adamw_coordinates_have_unit_mean_square(tokenizer, tmp_path, monkeypatch):
    """Before the first step v is the mean square of the clipped gradients, so in AdamW's coordinates
    these have a mean square of 1 in every coordinate that has a gradient; half-way it is the mean root
    of v."""
    monkeypatch.setattr(rest, "score_texts", by_text)
    run = make_run(tmp_path / "a", tokenizer)
    point = signal.load(run, 0, run / "kept" / "step0", signal.parse([str(run), *SMALL]))
    seen = []
    original = signal.second_moment
    monkeypatch.setattr(signal, "second_moment", lambda *args: seen.append(original(*args)) or seen[-1])
    gram = signal.measure(point, tmp_path / "out", 8, (), 0, signal.tqdm(disable=True))["gram"]
    (v, eps), = seen
    square = {name: K.sum((1, 3)).diagonal() for name, K in gram.items()}      # ||g_i||^2, [8]
    clipped = (point.cfg.max_grad_norm ** 2 / square["plain"]).clamp(max=1.0)
    assert float(clipped.min()) < 0.9  # else clipping is not seen here
    used = (v / (v.sqrt() + eps) ** 2).double().sum()
    assert float(used) > 1000
    close((clipped * square["plain"]).mean(), v.double().sum(), rtol=1e-3, atol=0)
    close((clipped * square["half-adamw"]).mean(), (v / (v.sqrt() + eps)).double().sum(), rtol=1e-3, atol=0)
    close((clipped * square["adamw"]).mean(), used, rtol=1e-3, atol=0)


@pytest.mark.parametrize("args, words", [
    (["--batches", "4"], "at least 8"), (["--methods", "magic"], "unknown method magic"),
    (["--steps", "7"], "it has those of 0, 3, 4"), (["--prompts", "500"], "lower --prompts"),
    (["--prompts", "-1"], "must not be negative")])
def test_wrong_options_get_one_sentence(tokenizer, tmp_path, args, words):
    run = make_run(tmp_path / "a", tokenizer)
    with pytest.raises(SystemExit, match=words):
        signal.main([str(run), *SMALL, *args])


def test_folders_that_cannot_be_measured_get_one_sentence(tokenizer, tmp_path):
    """No run, no checkpoint, a configuration of another version, a policy whose instructions are not
    known, and a measurement that began with other settings."""
    def fails(run, words, *args):
        with pytest.raises(SystemExit, match=words):
            signal.main([str(run), *SMALL, *args])
    fails(tmp_path / "nowhere", "no run with checkpoints")
    run = make_run(tmp_path / "a", tokenizer)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"config": settings["config"] | {"colour": 1}}))
    fails(run, "another version")
    (run / "config.json").write_text("[]")
    fails(run, "config.json is damaged")
    (run / "config.json").write_text(json.dumps(settings))
    other = tokenizer.__class__.from_pretrained(run / "checkpoint")
    other.chat_template = tokenizer.chat_template + " "
    other.save_pretrained(run / "checkpoint")
    fails(run, "instructions", "--steps", "4")
    folder = run / "signal" / "step3-P2-G2-n8-seed0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    fails(run, "delete it", "--steps", "3")
