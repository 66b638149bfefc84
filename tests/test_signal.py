"""toy_tools/signal.py: its estimators on policies that are enumerated, on Gaussians whose moments are known, and the whole command."""

import csv
import itertools
import json
import math

import pytest
import torch
from torch.testing import assert_close as close

import rest
from toy_tools import signal

from test_theory import Policy


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gram_of(g):
    """Gram matrix [n, C, n, C] of gradients g [n, C, D]."""
    return torch.einsum("ird,jsd->irjs", g, g)


def gaussians(n, mean, spread, seed=0, dims=400):
    """Gradients float64 [n, C, D]: mean [C, C'] (coefficients of fixed orthonormal directions) plus noise spread [C, C] in every coordinate.
    True M = mean mean', true S = dims spread spread'."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.eye(mean.shape[1], dims, dtype=torch.float64)
    white = torch.randn(n, len(spread), dims, generator=draw, dtype=torch.float64)
    return mean @ base + torch.einsum("rs,nsd->nrd", spread, white)


MEAN = torch.tensor([[1.0, 0.2, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.1, 0.4]], dtype=torch.float64)
SPREAD = torch.tensor([[0.02, 0.0, 0.0], [0.01, 0.1, 0.0], [0.0, 0.02, 0.05]], dtype=torch.float64)
TRUE_M = MEAN @ MEAN.T
TRUE_S = 400 * SPREAD @ SPREAD.T
ONES = torch.ones(3, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ enumerated: exactly unbiased

def split_by_region(policy, A):
    """[N, 2, D]: the gradient of every sequence, split into the tokens that are word 1 and all others."""
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


@pytest.mark.parametrize("kind, V, T, end, n", [("tabular", 2, 2, None, 2), ("tabular", 3, 2, 0, 3), ("recurrent", 3, 2, None, 2)])
def test_moments_are_exactly_unbiased_on_an_enumerated_policy(float64, kind, V, T, end, n):
    """Guards M and S themselves: their mean over every possible set of n mini-batches is <E g_r, E g_s> and the trace of the covariance.
    The naive ||mean g||^2 is not: it is up by S/n."""
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
    """Mini-batches of whole groups of 2, group-normalised: still exactly unbiased, and S of batches of two groups is half of S of one."""
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
    """On the quadratic f(x) = ||x - x0||^2 / 2 with noisy gradients the best step length along g(w) gains eta(w) of what the true gradient
    gains: found here by trying step lengths, without the formula."""
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


# ------------------------------------------------------------------------------------------------ Gaussians: moments are known

def test_moments_are_unbiased_on_gaussians():
    """Mean of 300 measurements of 8 mini-batches within 4 standard errors of the true M and S; the odds of a false alarm are about 1 in 1,000."""
    found = torch.stack([torch.stack(signal.moments(gram_of(gaussians(8, MEAN, SPREAD, seed)))) for seed in range(300)])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - torch.stack([TRUE_M, TRUE_S])).abs() < 4 * error).all()


def test_a_negative_estimate_stays_negative():
    """Without signal M is 0 and half of its estimates are negative: a clamp would bias them up and hide that nothing was seen."""
    found = torch.stack([signal.moments(gram_of(gaussians(4, 0 * MEAN, SPREAD, seed)))[0] for seed in range(400)])
    total = found.sum((1, 2))
    assert 0.4 < (total < 0).double().mean() < 0.6
    assert total.mean().abs() < 4 * total.std() / math.sqrt(len(total))
    M, S = signal.moments(gram_of(gaussians(4, 0 * MEAN, SPREAD, int((total < 0).nonzero()[0]))))
    assert signal.noise(ONES, M, S) < 0 and signal.efficiency(ONES, M, S, ONES) < 0


def test_counts_stand_for_repeated_and_missing_mini_batches():
    """A count of 0 leaves a mini-batch out; a batch of draws gives what one draw at a time gives; pairs of a mini-batch with itself never enter M."""
    g = gaussians(6, MEAN, SPREAD)
    counts = torch.tensor([[1.0, 0, 1, 1, 0, 1], [2.0, 1, 0.5, 1, 3, 1]], dtype=torch.float64)
    M, S = signal.moments(gram_of(g), counts)
    for found, expected in zip((M[0], S[0]), signal.moments(gram_of(g[[0, 2, 3, 5]]))):
        close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    total = sum(counts[1, i] * counts[1, j] for i, j in pairs)
    close(M[1], sum(counts[1, i] * counts[1, j] * g[i] @ g[j].T for i, j in pairs) / total, rtol=1e-12, atol=1e-12)


def test_efficiency_has_no_scale_and_is_at_most_one():
    """eta(c w) = eta(w) for c > 0; without noise it is a squared cosine: 1 along the true gradient, at most 1 elsewhere, negative uphill."""
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
    """w* on a measured Gram matrix against 5,000 random weights, and w* >= 0 against the random weights that are >= 0; where w* is >= 0 by
    itself the two agree, and where it is not the constraint costs something."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(5000, 3, generator=draw, dtype=torch.float64)
    crossed = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.5, 0.0], [0.1, 0.5, 0.01]], dtype=torch.float64)  # noise of 3 goes with noise of 2
    for spread, sign in ((SPREAD, None), (crossed, False)):
        M, S = signal.moments(gram_of(gaussians(16, MEAN, spread)))
        free, bound = signal.best_weights(M, S), signal.best_weights(M, S, nonnegative=True)
        eta = signal.efficiency(weights, M, S, ONES)
        assert signal.efficiency(free, M, S, ONES) >= eta.max()
        inside = weights.abs()
        assert (bound >= 0).all() and signal.efficiency(bound, M, S, ONES) >= signal.efficiency(inside, M, S, ONES).max()
        if bool((free >= 0).all()):
            close(bound, free)
        elif sign is False:
            assert signal.efficiency(bound, M, S, ONES) < signal.efficiency(free, M, S, ONES)


def test_best_weights_without_an_answer_say_so():
    """A region that no token lies in gets 0, not NaN; where M + S is not positive there is no best direction, and where every region points
    downhill no weights >= 0 help: NaN, in a batch beside good ones too."""
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
    """Without signal w* found and scored on the same mini-batches shows progress every time; found on one half and scored on the other it
    shows none on average. 4 standard errors: a false alarm in about 1 of 15,000."""
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
    """With signal the cross-fitted gain over uniform weights lies between 1 and what the true best weights gain."""
    gram = gram_of(gaussians(64, MEAN, SPREAD, dims=400))
    M, S = signal.moments(gram)
    along, _, square = signal.cross_fitted(*signal.split_moments(gram)[1:], ONES)
    found = signal.ratio(along, square, M.sum()) / signal.efficiency(ONES, M, S, ONES)
    best = signal.best_weights(TRUE_M, TRUE_S)
    possible = signal.efficiency(best, TRUE_M, TRUE_S, ONES) / signal.efficiency(ONES, TRUE_M, TRUE_S, ONES)
    assert 1.0 < found < 1.1 * possible and possible > 1.2
