"""
The linear probe: what a linear classifier can read off frozen features (Alain and Bengio 2016).

Features -> standardised -> softmax regression with an L2 penalty, fitted to convergence (scores
instead of classes: ridge regression). Both are convex and start at 0, so no seed is involved: a
difference between two probes is a difference between their features.

    from probe import probe
    (predictions,), fit = probe(train, y, groups, [test], K, accuracy)
                        # (n, C), (n,), (n,), (m, C) -> (m,)

The strength of the penalty is chosen on training examples that were held out of the fit, never on
a test set, and by the metric that will be reported. The log loss would not do: on CoLA, where 70 %
of the sentences are in one class and small models know little, the constant class has the lowest
log loss and a Matthews correlation of exactly 0. A metric is a noisier judge than the log loss.
Hence up to ten tenths of the training split are held out in turn, until about 2000 examples are
judged (one tenth where that is enough), and of equally good strengths the strongest is taken.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

STRENGTHS = [100.0, 10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4]       # of the L2 penalty, strong to weak
ENOUGH = 2000               # held-out examples that the strength is chosen on
TOLERANCE = 1e-5            # largest component of the gradient at which a probe is fitted
CHOICE_TOLERANCE = 1e-3     # the same for the fits that only serve to choose the strength


def probe(train, y, groups, tests, K, metric, directions=None):
    """Fit a probe on the training split and predict the test sets.

    train: (n, C) features. y: (n,) class numbers below K, or scores if K = 0. groups: (n,), examples
    with equal numbers are held out together. tests: a list of (m, C) features. metric: a function
    (predicted, true) -> float of two NumPy arrays, larger is better. directions: None, or how many
    leading directions of the features are used, see `leading`.

    Returns (predictions on each test set, (m,) each; a dict that says how the fit was chosen):
    "strength" of the penalty, "at_edge" whether it is the grid's strongest or weakest, "held_out"
    value of the metric, "gradient" that was left (0 for ridge, which is in closed form).
    """
    y = torch.from_numpy(y)
    X, *tests = [features.double() for features in (train, *tests)]
    if directions is not None:
        X, *tests = leading(X, tests, directions)

    # Standardise: the penalty then treats all features alike
    mean = X.mean(dim=0)
    std = X.std(dim=0, correction=0)
    scale = torch.where(std > 1e-9, std, 1.0)
    X = (X - mean) / scale

    # Turn to principal axes: neither loss nor penalty notices, and the fit converges faster
    _, axes = torch.linalg.eigh(X.T @ X)                                        # (C, C)
    X = X @ axes

    # Choose the strength, then fit on all of the training split
    best, value = choose_strength(X, y, groups, K, metric)
    for fit in fit_path(X, y, K, STRENGTHS[:best + 1]):
        W, b, gradient = fit                    # the last is the chosen one, the others warm it up
    predictions = [predict((test - mean) / scale @ axes, W, b, K) for test in tests]
    return predictions, {"strength": STRENGTHS[best],
                         "at_edge": best in (0, len(STRENGTHS) - 1),
                         "held_out": value,
                         "gradient": gradient}


def choose_strength(X, y, groups, K, metric):
    """(index of the best of STRENGTHS, its value of the metric on held-out examples).

    Of equally good ones the strongest: it claims least.
    """
    tenth = tenths(groups)
    rounds = min(10, 1 + tenth.max(), math.ceil(10 * ENOUGH / len(y)))
    judged = tenth < rounds                                                     # (n,) bool

    # Predict every judged example by the probe that was fitted without its tenth
    predictions = np.zeros((len(STRENGTHS), len(y)))
    for number in range(rounds):
        out = tenth == number
        path = fit_path(X[~out], y[~out], K, STRENGTHS, CHOICE_TOLERANCE)
        for row, (W, b, _) in zip(predictions, path):
            row[out] = predict(X[out], W, b, K)

    true = y.numpy()[judged]
    values = [metric(row[judged], true) for row in predictions]
    best = int(np.argmax(values))                                               # the first of equals
    return best, values[best]


def tenths(groups):
    """(n,) int: in which tenth of the groups each example is, from 0. The same in every run.

    Tenths are rounded down to whole groups, so the groups that are left over get 10 and higher.
    """
    names, group = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    return (order // max(1, len(names) // 10))[group]


def held_out(groups):
    """(n,) bool: the first tenth, for choices that are too expensive to be made ten times."""
    return tenths(groups) == 0


def leading(train, tests, k):
    """Features (n, C) -> (n, k): projections on the k leading principal directions of `train`.

    Returns [train, *tests], the test sets projected on the same directions.

    The features are centred and not standardised first. The theory's rank-k bound is about the
    leading singular directions of the features as the model made them: a direction in which they
    vary little is not among them, and standardising would blow it up.
    """
    mean = train.mean(dim=0)
    centred = train - mean
    _, axes = torch.linalg.eigh(centred.T @ centred)        # (C, C), eigenvalues in ascending order
    axes = axes[:, -k:]                                     # (C, k)
    return [(features - mean) @ axes for features in (train, *tests)]


def predict(X, W, b, K):
    """X (m, C) -> (m,) numpy array: the class with the highest score, or the score if K = 0."""
    scores = X @ W + b                                                          # (m, K) or (m, 1)
    return (scores.argmax(dim=1) if K else scores[:, 0]).numpy()

# -----------------------------------------------------------------------------
# The two regressions

def fit_path(X, y, K, strengths, tolerance=TOLERANCE):
    """Yield (W, b, gradient) for each strength, see `fit_softmax` and (K = 0) `fit_ridge`.

    Each fit begins where the stronger one before it ended.
    """
    start = None
    for strength in strengths:
        if K:
            W, b, gradient = fit_softmax(X, y, K, strength, start, tolerance)
            start = W, b
        else:
            W, b, gradient = fit_ridge(X, y, strength)
        yield W, b, gradient


def fit_softmax(X, y, K, strength, start=None, tolerance=TOLERANCE):
    """Minimise mean cross-entropy + strength/2 |W|^2 over W (C, K) and b (K,) by L-BFGS.

    It ends at a gradient below the tolerance. X: (n, C) float64. y: (n,) int64. start: (W, b) to begin
    with, 0 unless given, which changes the time and not the result. Returns (W, b, largest component
    of the gradient).

    The steps are taken in V, where W = scale V with one scale for each column of X. If the columns
    are uncorrelated, as `probe` makes them, the loss at W = 0 is then equally curved in all
    directions, and few steps are needed.
    """
    curvature = X.square().mean(dim=0)[:, None] / K + strength                  # (C, 1)
    scale = curvature ** -0.5
    if start is None:
        start = X.new_zeros(X.size(1), K), X.new_zeros(K)
    W, b = start
    V = (W / scale).requires_grad_()
    b = b.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [V, b], max_iter=5000, max_eval=10000, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=tolerance * min(1, scale.min().item()), tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        weights = scale * V
        loss = F.cross_entropy(X @ weights + b, y) + strength / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    # The gradient with respect to W and b at the end
    closure()
    largest = (V.grad / scale).abs().max()
    gradient = torch.maximum(largest, b.grad.abs().max()).item()
    return (scale * V).detach(), b.detach(), gradient


def fit_ridge(X, y, strength):
    """Minimise mean (x W + b - y)^2 + strength |W|^2 in closed form.

    X: (n, C) and y: (n,) are centred here. Returns (W (C, 1), b, 0.0).
    """
    mean = X.mean(dim=0)
    y_mean = y.mean()
    Z = X - mean
    covariance = Z.T @ Z / len(X)
    penalty = strength * torch.eye(X.size(1), dtype=X.dtype)
    W = torch.linalg.solve(covariance + penalty, Z.T @ (y - y_mean)[:, None] / len(X))
    return W, y_mean - mean @ W, 0.0
