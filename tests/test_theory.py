"""ResT's theory (lemmas 1-2, theorems 1-2 of the paper) and its fine print, checked by listing every
outcome.

A policy with V <= 5 words and T <= 4 steps can say only a few hundred things, so every expectation
below is a finite sum in float64: no sampling, no error bars. Where the paper claims more than is true,
the test asserts what is true.

z_t logits, p_t = softmax(z_t), s_t = e_{y_t} - p_t the score, J_t = d z_t / d theta, u_t = J_t^T s_t =
d log p_t(y_t) / d theta, H_t entropy (nats), w_t token weight, A advantage, g = A sum_t w_t u_t the
gradient of one trajectory, Var(g) = E||g||^2 - ||E g||^2.

`pytest -s tests/test_theory.py` prints the numbers that the README quotes; they are pinned too, so
neither can drift.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close as close

import rest


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def report(name, values, pinned):
    """Prints numbers that the README quotes, and fails if they are no longer these numbers (three digits)."""
    values = [0.0 if abs(v) < 1e-9 else float(v) for v in values]
    print("\n  " + "  ".join(f"{v:<8.3g}" for v in values) + "  " + name, end="")
    assert values == pytest.approx(pinned, rel=5e-3), name


# ----------------------------------------------------------------------------- policies, enumerated

class Policy:
    """A policy whose N sequences (T steps, V words) are all listed; S prefixes, D parameters.

    kind: "tabular" (own logits for every prefix, so ||J_t||_F^2 = V) or "recurrent" (a tanh RNN of
    width 3, parameters shared by all prefixes). end: the word that ends a sequence; None: fixed length.
    sharp: scale of the random logits.
    p [S, V], H [S], J [S, V, D]; prob [N]; state (index of the prefix), token, alive [N, T];
    u [N, T, D]."""

    def __init__(self, kind="recurrent", V=4, T=3, end=None, sharp=1.0, seed=0, theta=None):
        self.V = V
        self.T = T
        draw = np.random.RandomState(seed).randn  # numpy promises never to change this stream
        words = [v for v in range(V) if v != end]
        prefixes = [y for t in range(T) for y in itertools.product(words, repeat=t)]
        self.sequences = [(*y, v) for y in prefixes for v in range(V) if v == end or len(y) == T - 1]
        if kind == "tabular":
            sizes, scale = (len(prefixes) * V,), (sharp,)
        else:
            sizes, scale = (3, 9, 3 * V, 3 * V, V), (1, 1, 1, sharp / 2, sharp / 2)

        def logits(theta):
            if kind == "tabular":
                return theta.view(-1, V)
            first, W, inputs, out, bias = theta.split(sizes)
            W, inputs = W.view(3, 3), inputs.view(V, 3)
            hidden = [first[None]]  # one level of the tree of prefixes per step
            for _ in range(T - 1):
                following = torch.tanh((hidden[-1] @ W)[:, None] + inputs[words])  # (prefixes, words, 3)
                hidden.append(following.flatten(0, 1))
            return torch.cat(hidden) @ out.view(3, V) + bias  # (S, V)
        self.logits = logits
        random = torch.tensor(np.concatenate([c * draw(n) for n, c in zip(sizes, scale)]))
        self.theta = random if theta is None else theta
        self.J = torch.func.jacrev(logits)(self.theta)
        log_p = logits(self.theta).log_softmax(-1)
        self.p = log_p.exp()
        self.H = -(self.p * log_p).sum(-1)

        def table(entry):
            def line(y):
                return [entry(y, t) if t < len(y) else 0 for t in range(T)]
            return torch.tensor([line(y) for y in self.sequences])
        index = {y: i for i, y in enumerate(prefixes)}
        self.state = table(lambda y, t: index[y[:t]])
        self.token = table(lambda y, t: y[t])
        self.alive = table(lambda y, t: 1).bool()
        self.prob = torch.where(self.alive, log_p[self.state, self.token], 0.0).sum(1).exp()
        score = torch.eye(V) - self.p[:, None]  # (S, sampled word, V)
        u = torch.einsum("svd,syv->syd", self.J, score)  # (S, sampled word, D)
        self.u = u[self.state, self.token] * self.alive[..., None]

    def mean(self, x):
        """E[x] over sequences, x [N, ...]."""
        return torch.tensordot(self.prob, x, 1)

    def entropies(self):
        """Entropy of the distribution each token was sampled from, [N, T]; 0 after the end."""
        return self.H[self.state] * self.alive

    def beta(self, w=1.0):
        """E[ w_t^2 ||J_t||_F^2 (1 - exp(-H_t)) ], [T]; w scalar, [T] or [N, T]. Their sum times E[A^2]
        is the bound."""
        of_state = self.J.pow(2).sum((1, 2)) * (1 - torch.exp(-self.H))  # (S,)
        return self.mean(w ** 2 * of_state[self.state] * self.alive)

    def reward(self, kind, rng, places=None):
        """[N]: match with a gold sequence at `places` (default all): "exact" all or nothing, "partial"
        the share of hits. Gold is drawn from the policy itself, as after a warm start: a task that it
        sometimes solves."""
        prob = (self.prob / self.prob.sum()).numpy()
        gold = self.sequences[rng.choice(len(prob), p=prob)]
        places = places or range(self.T)
        hits = [[y[t:t + 1] == gold[t:t + 1] for t in places] for y in self.sequences]
        return torch.tensor([float(all(h)) if kind == "exact" else sum(h) / len(h) for h in hits])

    def standardise(self, reward):
        """(r - E r) / std r: GRPO's advantage in an endless group. E[A^2] = 1."""
        centred = reward - self.mean(reward)
        return centred / self.mean(centred ** 2).sqrt()

    def gradient(self, A, w=1.0):
        """g [N, D] = A sum_t w_t u_t; A scalar or [N], w scalar, [T] or [N, T]."""
        A = torch.as_tensor(A).expand(len(self.prob))  # (N,)
        w = torch.as_tensor(w)[..., None]
        return A[:, None] * (w * self.u).sum(1)

    def groups(self, G):
        """All N^G groups of independent sequences: member indices [M, G], joint probability [M]."""
        member = torch.cartesian_prod(*[torch.arange(len(self.prob))] * G).view(-1, G)
        return member, self.prob[member].prod(1)


def moments(prob, g):
    """E g [D] and Var(g), the trace of the covariance, of g [M, D] under prob [M]."""
    mean = prob @ g
    return mean, float(prob @ g.pow(2).sum(1) - mean @ mean)


def degrees(a, b):
    """Angle between two vectors; exact near 0, where an arc cosine is not."""
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def mean_one(w):
    """Weights [T] scaled to sum T: Theorem 2's constraint."""
    return w * len(w) / w.sum()


def proxies(H):
    """The paper's entropy proxies for w*, 1/(1 - exp(-H)) and 1/H, of entropies [T] clamped at 0.05 nats."""
    H = H.clamp(min=0.05)
    return mean_one(1 / (1 - torch.exp(-H))), mean_one(1 / H)


def of_prefix(policy):
    """A weight [N, T] that depends on y_<t only: the proxy of the very distribution the token is
    sampled from."""
    return 1 / (1 - torch.exp(-policy.H[policy.state].clamp(min=0.05)))


KINDS = ("tabular", "recurrent")
SHAPES = [  # V, T, end
    (2, 1, None), (5, 1, None), (3, 3, None), (2, 4, None), (4, 3, 0), (5, 2, 0), (3, 4, 0)]
SMALL = [(kind, *shape, sharp) for kind in KINDS for shape in SHAPES for sharp in (1.0, 3.0)]


def ensemble(kind, sharp, n, shortest=1):
    """n random policies of fixed length (V 2-4, T up to 4), each with the generator that draws its task."""
    for seed in range(n):
        rng = np.random.RandomState(1000 + seed)
        yield Policy(kind, rng.randint(2, 5), rng.randint(shortest, 5), sharp=sharp, seed=seed), rng


def of_three_sharpnesses(kind):
    """300 such policies of two steps or more."""
    return itertools.chain(*(ensemble(kind, sharp, 100, shortest=2) for sharp in (1, 2, 4)))


# -------------------------------------------------------------------------------- score and entropy

@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_enumeration_agrees_with_autograd(spec):
    """Claim: u = sum_t J_t^T (e_{y_t} - p_t) is the gradient of log p(y), E u = 0, E[r u] is the
    gradient of J = E[r].

    Autograd differentiates sequence probabilities and never sees a score or a Jacobian: this guards the
    rest."""
    policy = Policy(*spec)
    reward = torch.tensor(np.random.RandomState(9).randn(len(policy.prob)))
    u = policy.u.sum(1)

    def probability(theta):
        p = policy.logits(theta).softmax(-1)[policy.state, policy.token]  # (N, T)
        return p.where(policy.alive, 1.0).prod(1)
    d_prob = torch.func.jacrev(probability)(policy.theta)  # (N, D)
    assert float(policy.prob.sum()) == pytest.approx(1, abs=1e-13)
    close(u, d_prob / policy.prob[:, None], rtol=1e-9, atol=1e-9)
    close(policy.mean(u), torch.zeros_like(u[0]), rtol=0, atol=1e-13)
    close(policy.mean(policy.gradient(reward)), reward @ d_prob, rtol=1e-9, atol=1e-13)


def test_entropy_against_closed_forms():
    """Claim: H is in nats, from 0 (one word) to log V (uniform); a sequence's entropy is E[sum_t H_t],
    end or not.

    Closed forms: uniform on k of V words, two words, truncated geometric p_v ~ q^v. rest.py must read
    the same."""
    V = 5
    q = 0.4
    geometric = q ** torch.arange(V) * (1 - q) / (1 - q ** V)
    mean_v = q / (1 - q) - V * q ** V / (1 - q ** V)
    cases = [(torch.full((V,), 1 / V), math.log(V)), (torch.eye(V)[2], 0.0),
             (torch.tensor([.5, .5, 0, 0, 0]), math.log(2)),
             (torch.tensor([.9, .1, 0, 0, 0]), -.9 * math.log(.9) - .1 * math.log(.1)),
             (geometric, -math.log((1 - q) / (1 - q ** V)) - mean_v * math.log(q))]
    for p, H in cases:  # p is what is sampled from, at temperature 0.7
        read = rest.sample(0.7 * p.log()[None], torch.zeros(1), temperature=0.7)[2]
        assert float(read) == pytest.approx(H, abs=1e-6)
    for policy in (Policy(*spec) for spec in SMALL):
        read = rest.sample(policy.logits(policy.theta), torch.zeros(len(policy.H)), temperature=1.0)[2]
        close(read.double(), policy.H, rtol=0, atol=2e-6)
        assert 0 < float(policy.H.min()) and float(policy.H.max()) < math.log(policy.V)
        chain = float(policy.mean(policy.entropies()).sum())
        assert chain == pytest.approx(-float(policy.prob @ policy.prob.log()), rel=1e-12)


def test_lemma_2_score_norm_and_entropy():
    """Claim (Lemma 2): E||s||^2 = 1 - sum p^2 <= 1 - exp(-H). No assumption; equality iff p is uniform
    on its support.

    The numbers: the share of the bound that is real. It gets arbitrarily loose where entropy is low,
    just where the proxies put their weight: the score there is smaller still than 1 - exp(-H) says."""
    def norm_and_bound(p):
        norm = float(p @ (torch.eye(len(p)) - p).pow(2).sum(1))
        assert norm == pytest.approx(float(1 - p @ p), rel=1e-9, abs=1e-14)
        return norm, float(1 - torch.exp(torch.special.xlogy(p, p).sum()))
    rng = np.random.RandomState(0)
    for _ in range(2000):
        p = torch.tensor(rng.dirichlet(np.full(rng.randint(2, 6), rng.choice([0.05, 0.5, 5.0]))))
        norm, bound = norm_and_bound(p)
        assert norm <= bound + 1e-14
    for p in (torch.full((4,), 0.25), torch.eye(4)[1], torch.tensor([0.5, 0.5, 0.0, 0.0])):
        norm, bound = norm_and_bound(p)
        assert norm == pytest.approx(bound, abs=1e-15)
    found = [norm_and_bound(torch.tensor([1 - eps, eps])) for eps in (0.5, 1e-2, 1e-4, 1e-6)]
    report("E||s||^2 / (1-exp(-H)) at p = (1-eps, eps), eps = .5, 1e-2, 1e-4, 1e-6",
           [norm / bound for norm, bound in found], [1, .364, .196, .135])


# -------------------------------------------------------------- the variance: Lemma 1 and Theorem 1

@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_lemma_1_independent_trajectories(kind, G):
    """Claim (Lemma 1): a mean of G gradients has Var(single)/G. Assumption: independent terms, A_i of
    y_i alone."""
    policy = Policy(kind, V=3, T=3, end=0)
    g = policy.gradient(policy.reward("partial", np.random.RandomState(0)))
    member, prob = policy.groups(G)
    _, of_mean = moments(prob, g[member].mean(1))
    _, single = moments(policy.prob, g)
    assert of_mean == pytest.approx(single / G, rel=1e-11)


@pytest.mark.parametrize("by_std, pinned", [(True, [1.23, 1.17, 1.1]), (False, [1.23, 1.17, 1.14])])
def test_lemma_1_fails_under_group_advantages(by_std, pinned):
    """Claim: group-normalised advantages make the G terms dependent, and Lemma 1 false.

    The numbers: G Var(mean) / Var(single), 1 by Lemma 1, for an all-or-nothing reward and all 225 to
    50,625 groups of 2, 3, 4; "single" is one member's A_1 u_1 inside such a group. Above 1: averaging
    helps less than 1/G. At G = 2 with division by the std the covariance of the two terms is exactly
    ||E g||^2."""
    policy = Policy("recurrent", V=3, T=3, end=0)
    reward = policy.reward("exact", np.random.RandomState(0))
    u = policy.u.sum(1)
    ratios = []
    for G in (2, 3, 4):
        member, prob = policy.groups(G)
        g = rest.group_advantages(reward[member], by_std, delta=0.0)[..., None] * u[member]  # (M, G, D)
        mean, single = moments(prob, g[:, 0])
        ratios.append(G * moments(prob, g.mean(1))[1] / single)
        if by_std and G == 2:
            assert ratios[0] == pytest.approx(1 + float(mean @ mean) / single, rel=1e-9)
    report(f"G Var(mean)/Var(single), G = 2, 3, 4: {'GRPO' if by_std else 'Dr. GRPO'}", ratios, pinned)


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_theorem_1_under_its_assumption(spec):
    """Claim (Theorem 1): Var(g) <= E[A^2] sum_t E[w_t^2 ||J_t||_F^2 (1 - exp(-H_t))]. Assumption: A is
    independent of the tokens; w_t is deterministic or depends on y_<t only.

    Then E g = 0, so it bounds pure noise; steps are uncorrelated: Var(g) = E[A^2] sum_t E[w_t^2
    ||u_t||^2] exactly."""
    policy = Policy(*spec)
    A = torch.tensor([-1.0, 0.5, 3.0])
    A_prob = torch.tensor([0.5, 0.3, 0.2])  # E[A] = 0.25, whatever was sampled
    second = float(A_prob @ A ** 2)
    joint = (A_prob[:, None] * policy.prob).flatten()  # of A and the sequence
    drawn = torch.tensor(np.random.RandomState(5).rand(policy.T))
    for w in (torch.ones(policy.T), drawn, of_prefix(policy)):
        g = A[:, None, None] * policy.gradient(1.0, w)  # (3, N, D)
        mean, var = moments(joint, g.flatten(0, 1))
        assert float(mean.norm()) < 1e-12 * var ** 0.5
        of_steps = policy.mean((w * policy.u.norm(dim=-1)) ** 2)  # (T,)
        assert var == pytest.approx(second * float(of_steps.sum()), rel=1e-10)
        assert var <= second * float(policy.beta(w).sum())


def test_theorem_1_counterexample():
    """Claim: the bound is false once A depends on what was sampled, already at T = 1 with J = I.

    p = (.99, .01), A = 1 on the rare token, else 0. The numbers: Var(g), bound. A weight that depends
    on the sampled token (a region's label) breaks it likewise with A = 1 throughout, as w and A enter g
    as a product."""
    policy = Policy("tabular", V=2, T=1, theta=torch.tensor([0.99, 0.01]).log())
    rare = torch.tensor([0.0, 1.0])
    _, var = moments(policy.prob, policy.gradient(rare))
    bound = float(policy.mean(rare ** 2) * policy.beta().sum())
    report("Var(g), its bound by Theorem 1: p = (.99, .01), A = 1 on the rare token",
           [var, bound], [0.0194, 0.00109])
    assert var > bound
    _, by_weight = moments(policy.prob, policy.gradient(1.0, rare[:, None]))
    assert by_weight == pytest.approx(var, rel=1e-12)
    assert float(policy.beta(rare[:, None]).sum()) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("kind, sharp, pinned", [
    ("tabular", 1, [.822, .055, 2.06]),
    ("tabular", 2, [.561, .175, 26.5]),
    ("tabular", 4, [.315, .39, 7280]),
    ("recurrent", 1, [.86, .035, 4.28]),
    ("recurrent", 2, [.622, .16, 57.1]),
    ("recurrent", 4, [.357, .33, 30600])])
def test_theorem_1_with_rewards(kind, sharp, pinned):
    """Claim examined: does the bound hold for GRPO's advantages? Dropped: the independence of A from
    the tokens.

    200 random policies, w = 1, A = standardised exact-match reward (E[A^2] = 1). The numbers: mean
    entropy per token (nats), share of policies with Var(g) above the bound, largest Var(g)/bound. The
    surer the policy, the worse: A is large exactly when the improbable token with its large score
    came."""
    ratio = []
    entropy = []
    for policy, rng in ensemble(kind, sharp, 200):
        g = policy.gradient(policy.standardise(policy.reward("exact", rng)))
        _, var = moments(policy.prob, g)
        ratio.append(var / float(policy.beta().sum()))
        entropy.append(float(policy.mean(policy.entropies()).mean()))
    report(f"entropy, share above Theorem 1's bound, worst Var/bound: {kind}, logit scale {sharp}",
           [np.mean(entropy), np.mean(np.array(ratio) > 1), max(ratio)], pinned)


# ---------------------------------------------------------------------- Theorem 2: the best weights

def test_theorem_2_closed_form_is_the_minimiser():
    """Claim (Theorem 2): among weights of sum T, sum_t beta_t w_t^2 is least at w_t* = T (1/beta_t) /
    sum_u (1/beta_u). Assumption: T fixed, beta_t > 0.

    Against projected gradient descent, which knows no closed form, and random feasible steps. The least
    value is T^2 / sum_u (1/beta_u): the gain over uniform weights is the harmonic over the arithmetic
    mean of beta."""
    rng = np.random.RandomState(0)
    betas = [torch.tensor(rng.uniform(0.05, 1.0, T)) for T in (2, 3, 4) for _ in range(10)]
    for kind in KINDS:
        betas += [policy.beta() for policy, _ in ensemble(kind, 1.0, 10, shortest=2)]
    for beta in betas:
        best = mean_one(1 / beta)
        w = torch.ones(len(beta))
        rate = 0.5 / float(beta.max())
        for _ in range(1500):
            slope = 2 * beta * w
            w = w - rate * (slope - slope.mean())  # stays on sum w = T
        close(w, best, rtol=1e-8, atol=1e-8)
        least = float(beta @ best ** 2)
        step = torch.tensor(rng.randn(50, len(beta)))
        assert least == pytest.approx(len(beta) ** 2 / float((1 / beta).sum()), rel=1e-12)
        assert bool(((best + step - step.mean(1, keepdim=True)) ** 2 @ beta > least).all())


@pytest.mark.parametrize("kind, pinned", [
    ("tabular", [[.987, .936, .0496, 1], [.983, .943, .0386, 1]]),
    ("recurrent", [[.673, .974, .0327, 1.48], [.637, .977, .0192, 1.6]])])
def test_theorem_2_proxies_on_the_bound(kind, pinned):
    """Claim examined: do the entropy proxies lower the bound? bound(w*) <= bound(proxy), bound(uniform)
    is asserted.

    300 random policies (T 2-4, three sharpnesses), regions are positions, H_t the position's mean
    entropy. The numbers: share of policies in which the proxy beats uniform weights; median, least,
    greatest bound(proxy)/bound(uniform). Tabular policies have the same ||J_t|| at every step; shared
    parameters do not, and the proxies cannot see it."""
    ratios = []
    for policy, _ in of_three_sharpnesses(kind):
        beta = policy.beta()
        weights = mean_one(1 / beta), *proxies(policy.mean(policy.entropies())), torch.ones(policy.T)
        best, *bounds = (float(beta @ w ** 2) for w in weights)
        assert best <= min(bounds) * (1 + 1e-12)
        ratios.append([bound / bounds[-1] for bound in bounds[:-1]])
    for name, r, pin in zip(("1/(1-exp(-H))", "1/H"), np.array(ratios).T, pinned):
        report("share with a lower bound than uniform; bound ratio median, least, greatest: "
               f"{name}, {kind}",
               [np.mean(r < 1 - 1e-9), np.median(r), r.min(), r.max()], pin)


@pytest.mark.parametrize("kind, kind_of_reward, places, pinned", [
    ("tabular", "exact", "all", [.197, .197, .193, 1.12, 1.08, 1.12]),
    ("tabular", "partial", "all", [.103, .117, .117, 1.36, 1.26, 1.39]),
    ("tabular", "exact", "surer half", [.607, .623, .623, .973, .973, .956]),
    ("tabular", "exact", "less sure half", [.01, 2 / 300, 2 / 300, 1.59, 1.44, 1.67]),
    ("recurrent", "exact", "all", [.377, .273, .273, 1.01, 1.01, 1.02]),
    ("recurrent", "partial", "all", [.307, .2, .2, 1.14, 1.11, 1.16]),
    ("recurrent", "exact", "surer half", [.643, .887, .887, .92, .913, .885]),
    ("recurrent", "exact", "less sure half", [.283, .0133, .0133, 1.32, 1.23, 1.37])])
def test_theorem_2_proxies_on_the_true_noise(kind, kind_of_reward, places, pinned):
    """Claim examined: do entropy weights make the real gradient less noisy, that is lower Var(g)/||E
    g||^2 (which a mere rescaling of the weights leaves alone) under rewards that depend on the tokens?

    The same 300 policies. The numbers, each for w*, 1/(1-exp(-H)), 1/H: share of policies in which
    these weights beat uniform ones; median of noise(weights)/noise(uniform). It depends on where the
    reward looks. If it hangs on the low-entropy ("surer") half of the positions alone, entropy weights
    help; if on all or on the high-entropy half, they suppress signal with the noise and hurt, as does
    w* with the true beta: the bound knows nothing of the signal."""
    ratios = []
    for policy, rng in of_three_sharpnesses(kind):
        H = policy.mean(policy.entropies())
        half = policy.T // 2
        order = H.argsort().tolist()
        rewarded = {"all": order, "surer half": order[:half], "less sure half": order[-half:]}[places]
        A = policy.standardise(policy.reward(kind_of_reward, rng, rewarded))

        def noise(w):
            mean, var = moments(policy.prob, policy.gradient(A, w))
            return var / float(mean @ mean)
        uniform = noise(torch.ones(policy.T))
        assert noise(torch.full((policy.T,), 7.0)) == pytest.approx(uniform, rel=1e-9)
        weights = mean_one(1 / policy.beta()), *proxies(H)
        ratios.append([noise(w) / uniform for w in weights])
    report("w*, 1/(1-exp(-H)), 1/H: share less noisy than uniform; median noise ratio: "
           f"{kind}, {kind_of_reward} reward on {places}",
           [*np.mean(np.array(ratios) < 1 - 1e-9, 0), *np.median(ratios, 0)], pinned)


# ------------------------------------------------------------------------------ bias of the weights

# of the four words; word 0, a tag, is the end
REGION = torch.tensor([rest.TAG, rest.NAME, rest.PARAMS, rest.THOUGHT])


def talkers(n=50):
    """n policies with 40 sequences of 1 to 3 words, each with the standardised partial-credit reward of
    a task."""
    for seed in range(n):
        policy = Policy("recurrent", V=4, T=3, end=0, sharp=2.0, seed=seed)
        yield policy, policy.standardise(policy.reward("partial", np.random.RandomState(1000 + seed)))


def of_region(policy):
    """ResT in an endless batch: region entropies are constants, but the region is the sampled token's."""
    region = REGION[policy.token]  # (N, T)
    inside = torch.nn.functional.one_hot(region, 6) * policy.alive[..., None]  # (N, T, 6)
    total = policy.mean((inside * policy.entropies()[..., None]).sum(1))
    count = policy.mean(inside.sum(1).double()).clamp(min=1e-30)
    return rest.raw_weights(total / count)[region]


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_baselines_that_know_only_the_past_are_free(spec):
    """Claim: E[w_t u_t b_t] = 0 at every t, for a weight and a baseline that both depend on the prefix
    y_<t alone."""
    policy = Policy(*spec)
    baseline = torch.tensor(np.random.RandomState(2).randn(len(policy.H)))[policy.state]  # (N, T)
    terms = (of_prefix(policy) * baseline)[..., None] * policy.u
    assert bool((policy.mean(terms).abs() <= 1e-12 * policy.mean(terms.abs()) + 1e-13).all())


@pytest.mark.parametrize("name, weigh, pinned", [
    ("uniform weights", lambda policy: torch.ones(3), [0, 0, 0, 0]),
    ("weights 1.5, 1, .5", lambda policy: torch.tensor([1.5, 1.0, 0.5]), [0, 0, 8.38, 55]),
    ("weights by the prefix's entropy", of_prefix, [0, 0, 2.49, 24.9]),
    ("weights by the sampled token's region", of_region, [.0386, .265, 1.08, 16.1]),
    ("weights 1/T_i", lambda policy: 1 / policy.alive.sum(1, keepdim=True), [.328, .84, 8.38, 27.5]),
    ("weights by the prefix's entropy, then mean 1 per completion",
     lambda policy: rest.normalise_weights(of_prefix(policy), policy.alive), [.0375, .188, 2.3, 15.3])])
def test_weights_that_know_the_sampled_token_leak(name, weigh, pinned):
    """Claim: E[sum_t w_t u_t] = 0, so that a constant baseline is free, if w_t depends on y_<t only
    (first three), but not if it depends on tokens sampled at t or later: the sampled token's region,
    the 1/T_i of plain GRPO, normalisers.

    leak = ||E[sum w u]|| / ||E[A sum w u]||: how far a baseline of one std of the reward moves the
    expected gradient, in lengths of that gradient. angle: degrees from E[A sum w u] to grad J, above 0
    for all unequal weights. The numbers: median and largest of both over 50 policies. At T = 1 the leak
    E[w s] is p (w - E w)."""
    p = torch.tensor([0.7, 0.2, 0.1])
    w = torch.tensor([1.0, 2.0, 0.5])
    close(p @ (w[:, None] * (torch.eye(3) - p)), p * (w - p @ w), rtol=1e-14, atol=1e-16)
    found = []
    for policy, A in talkers():
        leak, mean = (policy.mean(policy.gradient(a, weigh(policy))) for a in (1.0, A))
        unweighted = policy.mean(policy.gradient(A))
        found.append([float(leak.norm() / mean.norm()), degrees(mean, unweighted)])
    (leak, angle), (most, widest) = np.median(found, 0), np.max(found, 0)
    report(f"leak median, largest; angle median, largest: {name}", [leak, most, angle, widest], pinned)


def test_batch_entropies_leak_less_in_larger_batches():
    """Claim: weights read off the batch's own entropies leak too: a token decides which later prefixes,
    and so which entropies, are averaged. Isolated: one region, w = 1/(1-exp(-mean H)), one number per
    batch.

    The numbers: median leak over 20 policies in batches of 1, 2, 3 completions (up to 64,000, all
    listed); it fades."""
    leaks = []
    for policy, A in talkers(20):
        H = policy.entropies().sum(1)
        length = policy.alive.sum(1)
        u = policy.u.sum(1)
        for G in (1, 2, 3):
            member, prob = policy.groups(G)
            weighted = prob * rest.raw_weights(H[member].sum(1) / length[member].sum(1))
            first = member[:, 0]  # by symmetry all members leak alike
            leak = weighted @ u[first]
            mean = (weighted * A[first]) @ u[first]
            leaks.append(float(leak.norm() / mean.norm()))
    report("median leak: weights by the mean entropy of a batch of 1, 2, 3",
           np.median(np.reshape(leaks, (-1, 3)), 0), [.0409, .0238, .0164])


def test_group_mean_with_ones_own_reward_scales_by_one_minus_one_over_g():
    """Claim: subtracting a group mean that contains one's own reward multiplies the expected gradient
    (of the centred reward) by exactly 1 - 1/G, for any weights that depend on the completion alone.
    Dividing by the std as well keeps the direction for all-or-nothing rewards on one prompt and bends
    it for graded ones: the numbers are the angles."""
    policy = Policy("recurrent", V=3, T=3, end=0, sharp=2.0)
    rng = np.random.RandomState(0)
    exact = policy.reward("exact", rng)
    graded = policy.reward("partial", rng) + policy.alive.sum(1)
    by_token = torch.tensor([0.5, 1.0, 2.0])[policy.token]
    cases = (("all-or-nothing", exact, [0, 0, 0]), ("graded", graded, [1.67, 1.18, .882]))
    for name, reward, pinned in cases:
        unweighted = policy.mean(policy.gradient(reward))
        angles = []
        for G in (2, 3, 4):
            member, prob = policy.groups(G)

            def expected(w, by_std):
                A = rest.group_advantages(reward[member], by_std, delta=0.0)[..., None]  # (M, G, 1)
                return prob @ (A * policy.gradient(1.0, w)[member]).mean(1)
            for w in (torch.ones(3), by_token):
                centred = policy.mean(policy.gradient(reward - policy.mean(reward), w))
                close(expected(w, False), (1 - 1 / G) * centred, rtol=1e-9, atol=1e-13)
            angles.append(degrees(expected(torch.ones(3), True), unweighted))
        report(f"degrees by which dividing by the std turns E g, G = 2, 3, 4: {name} reward",
               angles, pinned)


# --------------------------------------------------------------------------- rewards and advantages

def random_rewards(progress, format_varies=True):
    """Rewards [2000, 8] of random groups: format 0 or 1, correctness in quarters; the same for every
    progress."""
    rng = np.random.RandomState(4)
    form = rng.randint(0, 2, 16000) if format_varies else np.ones(16000)
    correct = rng.randint(0, 5, 16000) / 4
    rewards = [rest.episode_reward(f, c, progress) for f, c in zip(form, correct)]
    return torch.tensor(rewards).view(2000, 8)


def test_rescaling_the_whole_reward_changes_nothing():
    """Claim: c r + d, c > 0, has the same std-normalised advantages. Assumption: delta = 0. So the
    paper's factor on the whole reward does nothing, until delta matters (the number). Dr. GRPO ignores
    d; its advantages scale with c."""
    r = random_rewards(0.5)
    for c, d in ((2.0, 0.0), (0.01, 0.0), (1.0, -5.0), (7.0, 3.0)):
        for by_std, factor in ((True, 1.0), (False, c)):
            a, b = (rest.group_advantages(x, by_std, delta=0.0) for x in (r, c * r + d))
            close(b, factor * a, rtol=1e-9, atol=1e-11)
    a, b = (rest.group_advantages(x, delta=1e-4) for x in (r, 0.01 * r))
    report("largest relative change of an advantage when the reward shrinks to 1%, delta = 1e-4",
           [(1 - b / a)[a.abs() > 1e-6].abs().max()], [.0231])


def test_rescaling_the_parts_changes_the_advantages():
    """Claim: the dynamic schedule acts through the *relative* scale of format and correctness, and only
    through it: with one part constant it changes nothing. The numbers: range of correctness over range
    of format; then how many completions of random groups of 8 have an advantage of another sign at
    progress 1 than at 0."""
    def ratio(progress, scaling):
        low = rest.episode_reward(0, 0, progress, scaling)
        form = rest.episode_reward(1, 0, progress, scaling)
        correct = rest.episode_reward(0, 1, progress, scaling)
        return (correct - low) / (form - low)
    report("range of correctness over range of format: progress 0, progress 1, static",
           [ratio(0, "dynamic"), ratio(1, "dynamic"), ratio(0.5, "static")], [1, 2.35, 6])
    for varies, pinned in ((True, .187), (False, 0)):
        start = rest.group_advantages(random_rewards(0.0, varies), delta=0.0)
        end = rest.group_advantages(random_rewards(1.0, varies), delta=0.0)
        report("share of advantages of another sign at progress 1 than at 0: "
               f"format {'random' if varies else 'equal'}",
               [(start * end < -1e-12).double().mean()], [pinned])
    close(start, end, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------- rest.py's pure functions on the equations

def test_group_advantages_by_hand():
    """(r - mean)/(unbiased std + delta); equal rewards give exactly 0, even 12 times 0.3, where floats
    do not."""
    r = torch.tensor([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]])
    before = r.clone()
    std = math.sqrt((2 ** 2 + 1 ** 2 + 3 ** 2) / 2)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    close(rest.group_advantages(r, delta=0.1), expected / (std + 0.1), rtol=1e-13, atol=0)
    close(rest.group_advantages(r, scale_by_std=False), expected, rtol=1e-13, atol=0)
    assert torch.equal(r, before)
    for by_std in (True, False):
        assert not rest.group_advantages(torch.full((2, 12), 0.3, dtype=torch.float32), by_std).any()


def test_proxy_then_curriculum_then_mean_one():
    """raw_weights is Theorem 2's proxy, clamped, so finite at H = 0; curriculum moves format down to
    weight_min, parameters and thought up to weight_max; normalise_weights has mean 1 per completion, 0
    without weights."""
    H = torch.tensor([0.0, 0.0, 0.2, 0.4, 1.1, 2.0])
    for kind, expected in zip(("one-minus-exp", "inverse"), proxies(H)):
        close(mean_one(rest.raw_weights(H, kind)), expected, rtol=1e-13, atol=0)
    cfg = rest.Config(alpha_format=2.0, alpha_params=0.5, alpha_thought=9.0)
    raw = torch.tensor([1.5, 1.4, 1.2, 1.0, 0.8, 0.6])
    moved = ((0, [*raw]), (0.5, [0.5, 0.4, 1.2, 1.25, 5, 0.6]), (1, [0.2, 0.2, 1.2, 1.5, 5, 0.6]))
    for progress, expected in moved:
        close(rest.curriculum(raw, progress, cfg), torch.tensor(expected), rtol=1e-14, atol=0)
    mask = torch.tensor([[True, True, True, False], [True, False, True, False], [False] * 4, [True] * 4])
    weight = torch.tensor([[1.0, 2.0, 6.0, 9.0], [0.3, 9.0, 0.3, 9.0], [1.0] * 4, [0.0] * 4])
    expected = torch.tensor([[1 / 3, 2 / 3, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4])
    close(rest.normalise_weights(weight, mask), expected, rtol=1e-14, atol=0)
    mask = torch.ones(50, 50).tril().bool()
    values = torch.linspace(0.1, 9.7, 50, dtype=torch.float32)[:, None]
    equal = rest.normalise_weights(values.expand(50, 50), mask)
    assert torch.equal(equal, mask.float())  # exactly 1: GRPO bit for bit
