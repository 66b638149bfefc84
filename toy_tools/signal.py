"""How much can token weights help at all? Measured at fixed parameters: `python -m toy_tools.signal RUN…`.

n independent mini-batches i are rolled out from one checkpoint. Mini-batch i's gradient of the unweighted objective is split by
region, g_{i,r}: weight 1 on region r, 0 elsewhere. For region weights w its gradient is sum_r w_r g_{i,r}, so everything that any
region weights can do follows from inner products, the Gram matrix K[i,r,j,s] = <g_{i,r}, g_{j,s}>:

    M_rs = mean of K[i,r,j,s] over i != j         unbiased estimate of <E g_r, E g_s>; may come out negative, and stays so
    S_rs = mean of K[i,r,i,s] over i, minus M_rs  trace of the covariance of g_r and g_s; falls as 1/P with P prompts a batch
    noise(w) = w'Sw / w'Mw
    eta(w) = (b'w)^2 / (M_1 w'(M + S)w),  b = M 1,  M_1 = 1'M 1

eta, the efficiency, is the guaranteed progress of the best step along g(w) on a smooth objective, over that of the noiseless true
gradient. It does not depend on the scale of w and is at most 1. The best weights are w* ∝ (M + S)^-1 b, and eta(w*)/eta(1) is the
most that region weights can gain over GRPO there. A method whose weights are not one number per region gets a column of its own
in K, its own mini-batch gradient.
"""

import torch

# ---------------------------------------------------------------------------------------------- estimators: Gram matrix in, numbers out

def moments(gram, counts=None):
    """(M, S), each float64 [..., C, C], of a Gram matrix float64 [n, C, n, C] of n mini-batches and C columns.

    counts: float64 [..., n], how often each mini-batch counts (a bootstrap's weights; 0 leaves one out); None: once each."""
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
    """Noise over signal, w'Sw / w'Mw. Negative where the estimate of w'Mw is: then no signal was seen."""
    return quadratic(w, S) / quadratic(w, M)


def slope(w, M, uniform):
    """b'w with b = M uniform: how far g(w) points along the true gradient. w [..., C], M [..., C, C], uniform [C]."""
    return torch.einsum("...r,...rs,s->...", w, M, uniform)


def ratio(slope, square, signal):
    """eta from b'w, w'(M + S)w and M_1. Signed: negative where g(w) points against the true gradient, or where M_1 is negative."""
    return slope * slope.abs() / (signal.abs() * square)


def efficiency(w, M, S, uniform):
    """eta(w) of w [..., C]; uniform [C] is the w of the unweighted objective (1 on the regions, 0 on other columns)."""
    return ratio(slope(w, M, uniform), quadratic(w, M + S), slope(uniform, M, uniform))


def best_weights(M, S, nonnegative=False):
    """w* = (M + S)^-1 M 1 float64 [..., R] of M, S [..., R, R]: regions only, no other columns. A region without gradient gets 0.

    nonnegative: the best among weights >= 0, found by trying every set of regions. NaN where no such w exists: M + S not positive
    (possible when S is scaled to larger batches and M comes out negative), or, of weights >= 0, none that points uphill."""
    R = M.shape[-1]
    A, b = M + S, M.sum(-1)
    best = torch.full_like(b, torch.nan)
    height = torch.full_like(b[..., 0], 0.0 if nonnegative else -torch.inf)
    for members in range(1, 2 ** R) if nonnegative else [2 ** R - 1]:
        inside = torch.tensor([members >> r & 1 for r in range(R)], device=M.device).bool()
        inside = inside & (A.diagonal(dim1=-2, dim2=-1) != 0)
        rest_of_A = torch.diag_embed((~inside).to(A.dtype))  # a region outside solves 1 w_r = 0
        block = torch.where(inside[..., None] & inside[..., None, :], A, rest_of_A)
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


def cross_fitted(gram, regions, uniform, share=1.0, counts=None, nonnegative=False):
    """(b'w, w'Mw, w'(M + S)w), float64 [...] each, of w* found on one half of the mini-batches and scored on the other; mean of both ways.

    The first `regions` columns are the regions. share: S counts so much (P/P', for batches of P' prompts instead of P). The halves are
    the even and the odd mini-batches; each w* is scaled so that its own half gives it w'(M + S)w = 1."""
    counts = gram.new_ones(len(gram)) if counts is None else counts
    even = torch.arange(len(gram), device=gram.device) % 2 == 0
    halves = [moments(gram, torch.where(half, counts, 0.0)) for half in (even, ~even)]
    found = 0.0
    for (M, S), (other_M, other_S) in (halves, halves[::-1]):
        own_M, own_S = M[..., :regions, :regions], share * S[..., :regions, :regions]
        w = best_weights(own_M, own_S, nonnegative)
        w = w / quadratic(w, own_M + own_S).sqrt()[..., None]
        w = torch.nn.functional.pad(w, (0, len(uniform) - regions))
        signal = quadratic(w, other_M)
        found = found + torch.stack([slope(w, other_M, uniform), signal, signal + share * quadratic(w, other_S)]) / 2
    return found


def bootstrap_counts(n, draws, seed=0):
    """Weights float64 [draws, n] of a Bayesian bootstrap (Rubin 1981): exponential variables. Unlike counts of draws with replacement
    none is 0, so that every draw has pairs of distinct mini-batches in both halves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(draws, n, dtype=torch.float64).exponential_(generator=generator)
