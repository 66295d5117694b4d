"""
probe.py against independent references: a gradient by hand, least squares, planted signals.

    pytest tests/test_probe.py
"""
import numpy as np
import pytest
import torch

import probe
from glue_data import accuracy, matthews, pearson


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

# -----------------------------------------------------------------------------
# The two regressions

def test_softmax_probe_has_zero_gradient_and_does_not_depend_on_the_start():
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(200, 5, generator=rng, dtype=torch.float64)
    X *= torch.tensor([0.1, 0.3, 1.0, 2.0, 3.0])
    y = torch.randint(3, (200,), generator=rng)
    W, b, gradient = probe.fit_softmax(X, y, 3, 0.01)

    # d loss / d scores, by hand
    P = np.exp((X @ W + b).numpy())
    P = P / P.sum(1, keepdims=True) - np.eye(3)[y.numpy()]
    by_hand = X.numpy().T @ P / 200 + 0.01 * W.numpy()
    largest = max(abs(by_hand).max(), abs(P.mean(0)).max())
    assert largest < 1.1e-5 and gradient == pytest.approx(largest, rel=1e-3)

    other = torch.randn(5, 3, generator=rng, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    W2, *_ = probe.fit_softmax(X, y, 3, 0.01, start=other)
    assert (W - W2).abs().max() < 3e-3                      # gradient 1e-5 / curvature 0.01, twice


def test_ridge_is_least_squares_with_extra_rows():
    rng = np.random.default_rng(0)
    X, y, strength = rng.normal(size=(50, 4)) + 3, rng.normal(size=50), 0.3
    W, b, _ = probe.fit_ridge(torch.from_numpy(X), torch.from_numpy(y), strength)
    extra = np.c_[np.eye(4) * (50 * strength) ** .5, np.zeros(4)]
    A = np.r_[np.c_[X, np.ones(50)], extra]
    expected = np.linalg.lstsq(A, np.r_[y, np.zeros(4)], rcond=None)[0]
    np.testing.assert_allclose(np.r_[W[:, 0].numpy(), float(b)], expected, atol=1e-9)

# -----------------------------------------------------------------------------
# The probe

def planted(n, seed):
    """Two of eight features tell the class; their scales differ by ten to the seventh."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 8)) * 10.0 ** np.arange(-3, 5)          # standardising must undo the scales
    return torch.from_numpy(X).float(), (X[:, 0] * 1e3 + X[:, 7] * 1e-4 > 0.8).astype(int)


def test_planted_signal_is_found_and_shuffled_labels_give_the_majority_rate():
    (X, y), (test, test_y) = planted(1000, 0), planted(1000, 1)
    groups = np.arange(1000)
    (found,), fit = probe.probe(X, y, groups, [test], 2, accuracy)
    assert np.mean(found == test_y) > 0.97 and fit["gradient"] <= probe.TOLERANCE
    shuffled = np.random.default_rng(2).permutation(y)
    (guess,), _ = probe.probe(X, shuffled, groups, [test], 2, accuracy)
    assert np.mean(guess == 0) > 0.95                                       # the more frequent class
    target = test[:, 3].numpy().astype(float)
    (scores,), _ = probe.probe(X, X[:, 3].numpy().astype(float), groups, [test], 0, pearson)
    assert pearson(scores, target) > 0.999


def weak(n, seed, columns=100):
    """Every feature says very little: fitted without a penalty, 150 examples are learned by heart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    X = rng.normal(size=(n, columns)) + 0.18 * (2 * y[:, None] - 1)
    return torch.from_numpy(X).float(), y


def strong(n, seed, columns=30):
    """The class is in a small difference of two features that vary together: needs large weights."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    X = rng.normal(size=(n, columns))
    X[:, 1] = X[:, 0] + 0.02 * (2 * y - 1)
    return torch.from_numpy(X).float(), y


def by_strength(make, n, strengths):
    """{strength: accuracy on test} of the probe with one strength to choose from."""
    (X, y), (test, test_y) = make(n, 0), make(1000, 1)
    result = {}
    for strength in strengths:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "STRENGTHS", [strength])
            (predicted,), _ = probe.probe(X, y, np.arange(n), [test], 2, accuracy)
        result[strength] = accuracy(predicted, test_y)
    return result


@pytest.mark.parametrize("make, good, bad", [(weak, 1.0, 1e-4), (strong, 1e-4, 1.0)])
def test_the_strength_matters_and_is_chosen_on_examples_that_were_not_fitted(make, good, bad):
    """Chosen on what was fitted, it would always be the weakest: wrong for `weak`. A fixed strong one is
    wrong for `strong`."""
    n = 150
    reached = by_strength(make, n, [good, bad])
    assert reached[good] > reached[bad] + 0.04              # else the toy tells nothing
    (X, y), (test, test_y) = make(n, 0), make(1000, 1)
    (predicted,), fit = probe.probe(X, y, np.arange(n), [test], 2, accuracy)
    assert abs(np.log10(fit["strength"] / good)) <= 1.01
    assert accuracy(predicted, test_y) > reached[bad] + 0.03


def test_examples_of_one_group_are_never_on_both_sides_of_the_choice():
    """Four copies of each example: if one of them were fitted, the others would be known by heart."""
    X, y = weak(150, 0)
    copies = np.repeat(np.arange(150), 4)
    _, fit = probe.probe(X[copies], y[copies], copies, [X], 2, accuracy)
    assert fit["held_out"] < 0.99 and fit["strength"] >= 0.1


def test_the_strength_is_chosen_by_the_metric(monkeypatch):
    """As in CoLA: 80 % are in one class and the features know a little. The log loss is lowest for the
    constant class, whose Matthews correlation is 0; the metric prefers a probe that dares to differ."""
    def draw(n, seed):
        rng = np.random.default_rng(seed)
        y = (rng.random(n) < 0.8).astype(int)
        X = rng.normal(size=(n, 80))
        X[:, 0] += 0.7 * y
        return torch.from_numpy(X).float(), y

    (X, y), (test, test_y) = draw(600, 0), draw(2000, 1)
    assert lowest_log_loss(X, y, test, test_y) == 1.0
    monkeypatch.setattr(probe, "STRENGTHS", [1.0])
    (predicted,), _ = probe.probe(X, y, np.arange(600), [test], 2, matthews)
    assert matthews(predicted, test_y) == 0
    monkeypatch.undo()
    (predicted,), fit = probe.probe(X, y, np.arange(600), [test], 2, matthews)
    assert fit["strength"] < 1 and matthews(predicted, test_y) > 0.05


def lowest_log_loss(X, y, test, test_y):
    """The strength with the lowest log loss on test."""
    mean, std = X.double().mean(0), X.double().std(0)
    losses = {}
    for strength in probe.STRENGTHS:
        W, b, _ = probe.fit_softmax((X - mean) / std, torch.from_numpy(y), 2, strength)
        scores = (test - mean) / std @ W + b
        losses[strength] = torch.nn.functional.cross_entropy(scores, torch.from_numpy(test_y)).item()
    return min(losses, key=losses.get)


def test_of_equally_good_strengths_the_strongest_is_taken_and_the_edge_is_noted():
    X, y = planted(300, 0)
    _, fit = probe.probe(X, y, np.arange(300), [X], 2, lambda predicted, true: 1.0)
    assert fit["strength"] == max(probe.STRENGTHS) and fit["at_edge"]
    X, y = weak(150, 0)
    _, fit = probe.probe(X, y, np.arange(150), [X], 2, accuracy)
    assert not fit["at_edge"]


def test_tenths_keep_groups_together():
    groups = np.repeat(np.arange(105), 7)
    tenth = probe.tenths(groups).reshape(105, 7)
    assert (tenth == tenth[:, :1]).all()
    assert np.bincount(tenth[:, 0]).tolist() == [10] * 10 + [5]
    out = probe.held_out(groups).reshape(105, 7)
    assert (out.all(1) == out.any(1)).all() and out[:, 0].sum() == 10

# -----------------------------------------------------------------------------
# Leading directions

def layered(n, seed):
    """Six uncorrelated features with standard deviations 10, 5, 2, 1, .5, .2, turned by a rotation and
    far from 0. The third largest tells the class, nothing else does."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 6))
    y = (X[:, 2] > 0).astype(int)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(6, 6)))[0]
    X = X * [10, 5, 2, 1, .5, .2] @ rotation + 1000 * np.ones(6)
    return torch.from_numpy(X), y


def test_leading_directions_are_those_of_largest_variance():
    """Two directions know nothing, three know all. Standardised first, or not centred, the order would
    be another."""
    (X, y), (test, test_y) = layered(2000, 0), layered(1000, 1)
    found = {}
    for k in (1, 2, 3, 6, None):
        (predicted,), _ = probe.probe(X, y, np.arange(2000), [test], 2, accuracy, k)
        found[k] = accuracy(predicted, test_y)
    assert max(found[1], found[2]) < 0.57 and min(found[3], found[6], found[None]) > 0.97


def test_leading_directions_are_those_of_the_training_split():
    """On a test set in which another direction varies most, the projection is still the training one's."""
    X = torch.tensor([[3., 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    test = torch.tensor([[2., 50, -70]], dtype=torch.float64)
    train, projected = probe.leading(X + 5, [test + 5], 1)
    assert train.shape == (4, 1) and projected.abs().item() == pytest.approx(2)
    assert train.abs()[:, 0].tolist() == pytest.approx([3, 3, 0, 0])


def test_all_directions_are_a_rotation_and_change_nothing():
    (X, y), (test, _) = weak(200, 0, columns=10), weak(200, 1, columns=10)
    X, test = X / X.std(0, correction=0), test / X.std(0, correction=0)
    axes = np.linalg.eigh(np.cov(X.numpy().T))[1]
    _, projected = probe.leading(X.double(), [test.double()], 10)
    np.testing.assert_allclose(abs(projected), abs((test - X.mean(0)).numpy() @ axes), atol=1e-5)
