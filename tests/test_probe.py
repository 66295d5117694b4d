"""
probe.py against independent references: a gradient by hand, least squares, planted signals.

    pytest tests/test_probe.py
"""
import numpy as np
import pytest
import torch

import probe
from glue_data import pearson


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_softmax_probe_has_zero_gradient_and_does_not_depend_on_the_start():
    rng = torch.Generator().manual_seed(0)
    X, y = torch.randn(200, 5, generator=rng, dtype=torch.float64), torch.randint(3, (200,), generator=rng)
    X *= torch.tensor([0.1, 0.3, 1.0, 2.0, 3.0])
    W, b, gradient = probe.fit_softmax(X, y, 3, 0.01)
    P = np.exp((X @ W + b).numpy())
    P = P / P.sum(1, keepdims=True) - np.eye(3)[y.numpy()]                  # d loss / d scores, by hand
    by_hand = X.numpy().T @ P / 200 + 0.01 * W.numpy()
    largest = max(abs(by_hand).max(), abs(P.mean(0)).max())
    assert largest < 1.1e-5 and gradient == pytest.approx(largest, rel=1e-3)
    other = torch.randn(5, 3, generator=rng, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    W2, *_ = probe.fit_softmax(X, y, 3, 0.01, start=other)
    assert (W - W2).abs().max() < 3e-3                          # gradient 1e-5 / curvature 0.01, twice


def test_ridge_is_least_squares_with_extra_rows():
    rng = np.random.default_rng(0)
    X, y, strength = rng.normal(size=(50, 4)) + 3, rng.normal(size=50), 0.3
    W, b, _ = probe.fit_ridge(torch.from_numpy(X), torch.from_numpy(y), strength)
    A = np.r_[np.c_[X, np.ones(50)], np.c_[np.eye(4) * (50 * strength) ** .5, np.zeros(4)]]
    expected = np.linalg.lstsq(A, np.r_[y, np.zeros(4)], rcond=None)[0]
    np.testing.assert_allclose(np.r_[W[:, 0].numpy(), float(b)], expected, atol=1e-9)


def planted(n, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 8)) * 10.0 ** np.arange(-3, 5)          # standardising must undo the scales
    return torch.from_numpy(X).float(), (X[:, 0] * 1e3 + X[:, 7] * 1e-4 > 0.8).astype(int)


def test_planted_signal_is_found_and_shuffled_labels_give_the_majority_rate():
    (X, y), (test, test_y) = planted(2000, 0), planted(1000, 1)
    groups = np.arange(2000)
    (found,), fit = probe.probe(X, y, groups, [test], 2)
    assert np.mean(found == test_y) > 0.97 and fit["gradient"] <= probe.TOLERANCE
    shuffled = np.random.default_rng(2).permutation(y)
    (guess,), _ = probe.probe(X, shuffled, groups, [test], 2)
    assert np.mean(guess == 0) > 0.95                                       # the more frequent class
    target = test[:, 3].numpy().astype(float)
    (scores,), _ = probe.probe(X, X[:, 3].numpy().astype(float), groups, [test], 0)
    assert pearson(scores, target) > 0.999


def test_held_out_keeps_groups_together():
    groups = np.repeat(np.arange(100), 7)
    out = probe.held_out(groups).reshape(100, 7)
    assert (out.all(1) == out.any(1)).all() and out[:, 0].sum() == 10


def test_a_class_that_never_occurs_in_training_does_no_harm():
    X, y = planted(200, 0)
    (p,), _ = probe.probe(X, y, np.arange(200), [X], 3)
    assert set(p) <= {0, 1}
