"""
The linear probe: what a linear classifier can read off frozen features (Alain and Bengio 2016).

Features -> standardised -> softmax regression with an L2 penalty, fitted to convergence (scores instead of
classes: ridge regression). Both are convex and start at 0, so no seed is involved: a difference between two
probes is a difference between their features. The strength of the penalty is chosen on a tenth of the
training split, never on a test set.

    from probe import probe
    (predictions,), fit = probe(train, y, groups, [test], K)        # (n, C), (n,), (n,), (m, C) -> (m,)
"""
import numpy as np
import torch
import torch.nn.functional as F

STRENGTHS = [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4]              # of the L2 penalty, from strong to weak
TOLERANCE = 1e-5                            # largest component of the gradient at which a probe is fitted


def fit_softmax(X, y, K, strength, start=None):
    """Minimise mean cross-entropy + strength/2 |W|^2 over W (C, K) and b (K,), to a gradient below TOLERANCE.

    X: (n, C) float64. y: (n,) int64. start: (W, b) to begin with (0 otherwise); it changes the time, not the
    result. Returns (W, b, largest component of the gradient).

    The steps are taken in V, W = scale V, with one scale for each column of X: if these are uncorrelated, as
    `probe` makes them, the loss at W = 0 is equally curved along all of V, and few steps suffice.
    """
    scale = (X.square().mean(dim=0)[:, None] / K + strength) ** -0.5                    # (C, 1)
    W, b = start or (X.new_zeros(X.size(1), K), X.new_zeros(K))
    V, b = (W / scale).requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([V, b], max_iter=5000, max_eval=10000, history_size=20,
                                  tolerance_grad=TOLERANCE * min(1, scale.min().item()), tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        W = scale * V
        loss = F.cross_entropy(X @ W + b, y) + strength / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    gradient = max((V.grad / scale).abs().max().item(), b.grad.abs().max().item())      # that of W and b
    return (scale * V).detach(), b.detach(), gradient


def fit_ridge(X, y, strength):
    """Minimise mean (x W + b - y)^2 + strength |W|^2 in closed form;
    the columns of X and y are centred here."""
    mean, y_mean = X.mean(dim=0), y.mean()
    Z = X - mean
    gram = Z.T @ Z / len(X) + strength * torch.eye(X.size(1), dtype=X.dtype)
    W = torch.linalg.solve(gram, Z.T @ (y - y_mean)[:, None] / len(X))                  # (C, 1)
    return W, y_mean - mean @ W, 0.0


def fit_path(X, y, K, strengths):
    """Yield the fit for each strength, each begun where the stronger one ended. K = 0: ridge."""
    fit = None
    for strength in strengths:
        fit = fit_softmax(X, y, K, strength, fit and fit[:2]) if K else fit_ridge(X, y, strength)
        yield strength, fit


def held_out(groups):
    """(n,) bool: about a tenth of the groups, hence of the training examples; the same in every run."""
    names, number = np.unique(groups, return_inverse=True)
    chosen = np.random.default_rng(0).permutation(len(names)) < max(1, len(names) // 10)
    return chosen[number]


def probe(train, y, groups, tests, K):
    """Fit on the training split, strength chosen by the loss on a held-out tenth of it (from
    strong to weak, until it rises); never on a test set.

    train: (n, C) features. y: (n,) class numbers below K, or scores if K = 0. tests: a list of (m, C)
    features. Returns (the predictions on each test set, {"strength", "gradient"}).
    """
    X, y = train.double(), torch.from_numpy(y)
    mean, std = X.mean(dim=0), X.std(dim=0, correction=0)
    scale = torch.where(std > 1e-9, std, 1.0)
    X = (X - mean) / scale
    axes = torch.linalg.eigh(X.T @ X)[1]                # (C, C), the principal axes
    X = X @ axes                                        # a rotation: neither loss nor penalty notices
    out = torch.from_numpy(held_out(groups))

    def loss(fit):
        scores = X[out] @ fit[0] + fit[1]
        return (F.cross_entropy(scores, y[out]) if K else (scores[:, 0] - y[out]).square().mean()).item()

    best, least = None, float("inf")
    for strength, fit in fit_path(X[~out], y[~out], K, STRENGTHS):
        if (now := loss(fit)) >= least:                 # weaker ones overfit more, and take longest to fit
            break
        best, least = strength, now
    *_, (_, (W, b, gradient)) = fit_path(X, y, K, [s for s in STRENGTHS if s >= best])
    scores = [((test.double() - mean) / scale) @ axes @ W + b for test in tests]
    return ([(s.argmax(dim=1) if K else s[:, 0]).numpy() for s in scores],
            {"strength": best, "gradient": gradient})
