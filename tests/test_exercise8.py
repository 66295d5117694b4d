"""
The grader of exercise 8, the linear probe: what `probe` must predict on toys whose answer is known.

    python -m pytest -m exercise8

Graded are the predictions and which examples the metric judged, not how the fit is found, which strengths are
tried beside those of STRENGTHS, or how the held-out examples are cut. Where a weight is graded, it may be that
of any strength of the penalty. Random toys are fixed, so a right program does not fail by chance.
"""
import math

import numpy as np
import pytest
import torch

import probe as probe_file
from glue_data import accuracy
from grading import call, explain

pytestmark = pytest.mark.exercise8
KEYS = ("strength", "at_edge", "held_out", "gradient")


def is_number(value):
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def run(*arguments, **flags):
    """The predictions of `fit` alone."""
    __tracebackhide__ = True
    return fit(*arguments, **flags)[0]


def fit(X, y, tests, K, metric=accuracy, groups=None, directions=None):
    """What the function under test returns: (predictions on each of tests, arrays; a dict), if of the right kind."""
    __tracebackhide__ = True
    n = len(y)
    groups = np.arange(n) if groups is None else groups
    features = [torch.from_numpy(np.asarray(part)).float() for part in (X, *tests)]
    train, *tests = [part.clone() for part in features]
    given = np.array(y), np.array(groups)

    def judge(predicted, true):
        predicted, true = np.asarray(predicted), np.asarray(true)               # a tensor or a list will do
        explain(predicted.shape == true.shape,
                f"metric is given predictions of the shape {predicted.shape} for true values of the shape "
                f"{true.shape}" + (": class numbers, not the scores of all classes" if predicted.ndim == 2 else ""))
        return metric(predicted, true)

    out = call(probe_file.probe, train, given[0], given[1], tests, K, judge, directions)

    # The kind of the result
    explain(out is not None, "probe returns nothing (None): it must return (predictions, dict)")
    explain(isinstance(out, tuple) and len(out) == 2,
            f"probe returns a {type(out).__name__}: it must return two things, a list with predictions for "
            "each test set and a dict that says how the fit was chosen")
    predictions, how = out
    explain(isinstance(how, dict), f"the second thing that probe returns must be a dict, not {type(how).__name__}")
    missing = [key for key in KEYS if key not in how]
    explain(not missing, f"the dict that probe returns lacks {', '.join(missing)}")
    for key in ("strength", "held_out"):
        explain(is_number(how[key]), f"{key} in the dict that probe returns must be a number, not {how[key]!r}")
    explain(isinstance(predictions, (list, tuple)) and len(predictions) == len(tests),
            f"probe must return a list with predictions for each of the {len(tests)} test sets")
    unchanged = [torch.equal(a, b) for a, b in zip([train, *tests], features)]
    explain(all(unchanged) and (given[0] == y).all() and (given[1] == groups).all(),
            "probe changes features, y or groups, which it was given: work on copies")

    arrays = []
    for test, predicted in zip(tests, predictions):
        predicted = np.asarray(predicted)
        explain(predicted.shape != (n,) or len(test) == n,
                f"probe returns {n} predictions for a test set of {len(test)}: as many as training examples. "
                "Predict the test set")
        explain(predicted.shape == (len(test),),
                f"the predictions for a test set of {len(test)} must have the shape ({len(test)},), not "
                f"{predicted.shape}" + (": the class with the highest score" if predicted.ndim == 2 else ""))
        explain(np.isfinite(predicted).all(),
                "a prediction is not a number: is a feature that never varies divided by its standard "
                "deviation of 0?")
        if K:
            explain(np.isin(predicted, np.arange(K)).all(),
                    f"a prediction is {predicted[~np.isin(predicted, np.arange(K))][:1]}: classes are 0 .. {K - 1}")
        arrays.append(predicted.astype(float))
    return arrays, how


def blobs(n, seed, K=3):
    """Three standard deviations from 0, every class on an axis of its own: 96 % can be told."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % K)
    return 3 * np.eye(K)[y] + rng.normal(size=(n, K)), y

# -----------------------------------------------------------------------------
# In the order in which a student should see them

def test_it_finds_classes_that_are_far_apart():
    (X, y), (one, one_y), (two, two_y) = blobs(120, 0), blobs(300, 1), blobs(200, 2)
    found = run(X, y, [one, two], K=3)
    for predicted, true in zip(found, (one_y, two_y)):
        for shift in (1, 2):
            explain(accuracy((predicted + shift) % 3, true) < 0.88,
                    "the predicted classes are shifted: classes are numbered from 0, as in y")
        m = min(len(predicted), len(y))
        explain(accuracy(predicted[:m], y[:m]) < 0.88,
                "the predictions are those of the training examples: predict the test set")
        reached = accuracy(predicted, true)
        explain(reached > 0.88,
                f"three classes that are far apart are predicted with an accuracy of {reached:.2f} on a test "
                "set: it must be about 0.95")


@pytest.mark.parametrize("which, column", [("smallest", 0), ("largest", 7)])
def test_features_of_very_different_scales_count_alike(which, column):
    """One feature decides, the others are noise, up to ten million times as large or as small."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(700, 8)) * 10.0 ** np.arange(-3, 5)
    y = (X[:, column] > np.median(X[:400, column])).astype(int)
    predicted, = run(X[:400], y[:400], [X[400:]], K=2)
    reached = accuracy(predicted, y[400:])
    explain(reached > 0.9,
            f"the {which} of eight features tells the class, but the accuracy is {reached:.2f}: standardise "
            "the features (divide by their standard deviation), so that the penalty treats large and small ones alike")


def likes_little_variation(predicted, true):
    """A metric for scores that asks for a strong penalty."""
    return -float(np.var(np.asarray(predicted)))


def test_a_prediction_does_not_depend_on_the_other_test_examples():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3)) + [2, 0, -1]
    y = X[:, 0] - X[:, 1] + rng.normal(size=200)
    test = X[120:160]
    alone, = run(X[:120], y[:120], [test], 0, likes_little_variation)
    with_others = np.concatenate((test, 50 + 20 * X[160:]))
    together, _ = run(X[:120], y[:120], [with_others, X[160:]], 0, likes_little_variation)
    changed = (np.abs(alone - together[:40]) > 1e-3 * alone.std()).sum()
    explain(not changed,
            f"{changed} of 40 predictions change when the test set gets other examples as well: mean and "
            "standard deviation must be those of the training split, for the test sets too")


def test_test_sets_are_shifted_as_the_training_split_is():
    """Adding 5 to all features changes nothing."""
    (X, y), (test, true) = blobs(120, 0), blobs(300, 1)
    predicted, = run(X + 5, y, [test + 5], K=3)
    reached = accuracy(predicted, true)
    explain(reached > 0.88,
            f"the accuracy falls to {reached:.2f} where the mean of the features is not 0: subtract the training "
            "split's mean from the test sets too, as the standard deviation is divided out of both")


def test_the_more_frequent_class_where_features_say_nothing():
    """Two features that never vary: only the intercept is left."""
    y = np.random.default_rng(0).choice(3, size=100, p=[0.2, 0.2, 0.6])
    predicted, = run(np.ones((100, 2)) * [0, 5], y, [np.ones((7, 2)) * [0, 5]], K=3)
    explain((predicted == 2).all(),
            "where no feature varies, the most frequent class must be predicted: is there an intercept, and "
            "is nothing divided by a standard deviation of 0?")


def test_the_metric_is_given_predictions_first():
    """Scores that nothing predicts exactly: those that occur in y are the true ones."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 3))
    y = X[:, 0] + rng.normal(size=100)
    swapped = []

    def metric(predicted, true):
        in_y = [np.isclose(np.asarray(part).ravel()[:, None], y, atol=1e-5).any(axis=1).all()
                for part in (predicted, true)]
        swapped.append(in_y == [True, False])
        return -float(np.mean((np.asarray(predicted) - np.asarray(true)) ** 2))

    run(X, y, [X[:5]], 0, metric)
    explain(not any(swapped), "metric is called as metric(true, predicted): it is metric(predicted, true)")


def rare_and_frequent(n, seed, columns=60):
    """One class in five is rare; the features say a little about it."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.8).astype(int)
    X = rng.normal(size=(n, columns))
    X[:, 0] += 1.5 * y
    return X, y


def test_the_strength_is_chosen_by_the_metric():
    """One metric likes predictions of the rare class, 0, the other dislikes them."""
    (X, y), (test, _) = rare_and_frequent(300, 0), rare_and_frequent(500, 1)
    judged = []

    def likes(predicted, true):
        judged.append((np.asarray(predicted), np.asarray(true)))
        return float(np.mean(np.asarray(predicted) == 0))

    rare, = run(X, y, [test], 2, likes)
    explain(judged, "metric is never called: choose the strength of the penalty by it, on held-out examples")
    frequent, = run(X, y, [test], 2, lambda predicted, true: -likes(predicted, true))
    more = np.mean(rare == 0) - np.mean(frequent == 0)
    explain(more > -0.02,
            "the strength with the lowest value of the metric is chosen: larger is better")
    explain(more > 0.02,
            "a metric that likes predictions of the rare class and one that dislikes them lead to the same "
            "predictions: the strength must be chosen by metric(predicted, true), the penalty must enter the "
            "loss and spare the intercept, and the fit must run to convergence")


def test_a_small_difference_of_two_features_is_found():
    """The two vary together: it takes large weights, a weak penalty and a fit to convergence."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1200)
    X = rng.normal(size=(1200, 20))
    X[:, 1] = X[:, 0] + 0.05 * (2 * y - 1)
    predicted, = run(X[:400], y[:400], [X[400:]], K=2)
    reached = accuracy(predicted, y[400:])
    explain(reached > 0.9,
            "the small difference of two features tells the class, which asks for large weights, but the "
            f"accuracy is {reached:.2f}: is the fit run to convergence, and is a weak penalty tried, down to "
            "STRENGTHS[-1]?")


def test_the_intercept_of_classes_is_not_penalised():
    """However strong the penalty, the intercept still says that one class is more frequent, 70 %."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 10 // 3 > 0
    y = rng.permutation(y.astype(int))
    X = rng.normal(size=(400, 3)) + 2 * y[:, None]
    predicted, = run(X[:300], y[:300], [X[300:]], 2, lambda predicted, true: -np.mean(np.asarray(predicted) == 0))
    share = np.mean(predicted == 0)
    explain(share < 0.02,
            "the metric dislikes predictions of the rare class, so a penalty must be chosen that is strong enough "
            f"to leave the frequent class alone, but {100 * share:.0f} % are predicted rare: is the intercept "
            "penalised, or is the cross-entropy a sum over examples, not their mean?")


def noise(n, C, seed, copies=1):
    """Features and scores that have nothing to do with each other; more features than examples.

    Copies of one example are in one group, and stand anywhere.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, C))
    y = rng.normal(size=n)
    which = rng.permutation(np.repeat(np.arange(n), copies))
    return X[which], y[which], 1000 + 7 * which


def known_by_heart(X, y, groups):
    """Whether examples that the metric judged were known to the fit: nothing else predicts noise."""
    __tracebackhide__ = True
    known = []

    def metric(predicted, true):
        predicted, true = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
        if len(true) >= 10 and predicted.std() > 0 and true.std() > 0:
            known.append(np.corrcoef(predicted, true)[0, 1] > 0.9)
        return -float(np.mean((predicted - true) ** 2))

    run(X, y, [X[:5]], 0, metric, groups)
    explain(known, "metric is never called with predictions that differ: choose the strength of the penalty by "
                   "it, on held-out examples")
    return any(known)


def test_the_strength_is_chosen_on_examples_that_were_not_fitted():
    explain(not known_by_heart(*noise(150, 200, seed=0)),
            "the strength is chosen on examples that were fitted: the metric is shown scores that are pure "
            "noise, and the predictions agree with them. Judge examples that were held out of the fit")


def test_examples_of_one_group_are_held_out_together():
    explain(not known_by_heart(*noise(60, 200, seed=0, copies=4)),
            "copies of one example, with the same number in groups, are on both sides: some are fitted, "
            "others held out. Examples of one group must be held out together")


def test_outliers_do_not_decide():
    """A softmax regression does not mind points that are far on the right side. Least squares does."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 150)
    x = np.where(y == 1, 3.0, 0.0) + 0.7 * rng.normal(size=300)
    x[250:] = 60
    predicted, = run(x[:, None], y, [x[:, None]], K=2)
    reached = accuracy(predicted, y)
    explain(reached > 0.9,
            f"the accuracy falls to {reached:.2f} because of points that are far on the right side of the "
            "boundary: minimise the cross-entropy of a softmax, not the squared error")


def ridge_path(Z, y, strengths):
    """(strengths, C): the weights of ridge regression on centred Z at each strength."""
    values, axes = np.linalg.eigh(Z.T @ Z / len(Z))
    b = axes.T @ (Z.T @ (y - y.mean())) / len(Z)
    return np.stack([axes @ (b / (values + strength)) for strength in strengths])


def test_scores_are_predicted_by_ridge_regression():
    """K = 0. Predictions at the mean, and one standard deviation from it in each feature, give all weights.

    The metric likes predictions that vary little: a strong penalty.
    """
    rng = np.random.default_rng(0)
    scale = np.array([0.2, 1.0, 5.0, 20.0])
    X = rng.normal(size=(80, 4)) @ (np.eye(4) + 0.4) * scale + [3, 0, -2, 9]
    y = X / scale @ [1.0, -2.0, 0.5, 1.0] + rng.normal(size=80) + 7
    y[:8] += 30                                             # to see whether all examples are fitted
    X = X.astype(np.float32).astype(float)
    mean, std = X.mean(axis=0), X.std(axis=0)
    tests = np.concatenate((mean[None], mean + np.diag(std)))
    predicted, = run(X, y, [tests], 0, likes_little_variation)
    at_mean, weights = predicted[0], predicted[1:] - predicted[0]

    # The intercept
    explain(abs(at_mean) > 1e-4 * abs(y.mean()),
            "K = 0: for the mean features 0 is predicted: there is no intercept")
    explain(abs(at_mean - y.mean()) < 0.01 * y.std(),
            f"K = 0: for the mean features {at_mean:.3f} is predicted, not the mean score {y.mean():.3f} of all "
            "training examples: is the intercept penalised, or are held-out examples missing in the last fit?")

    # The weights, for one standard deviation of each feature
    strengths = np.logspace(-6, 5, 2000)
    path = ridge_path((X - mean) / std, y, strengths)
    raw = ridge_path(X - mean, y, strengths) * std

    def off(path):
        return (np.linalg.norm(path - weights, axis=1) / np.linalg.norm(path, axis=1)).min()

    explain(off(path) < 0.02 or off(raw) > 0.02,
            "K = 0: the weights are those of ridge regression on features that are not standardised")
    best = np.linalg.norm(path - weights, axis=1).argmin()
    explain(off(path) < 0.02,
            f"K = 0: the weights are off by {100 * off(path):.0f} % from those of ridge regression at any "
            "strength, on standardised features and all training examples")
    explain(strengths[best] > 0.01,
            "K = 0: the metric asks for a strong penalty, but the weights are those of least squares: the "
            "penalty is ignored, or the choice does not follow the metric")


def test_the_strength_is_the_one_that_the_metric_likes_best():
    """Scores that equal a feature: a strength shrinks predictions to 1/(1 + strength), and the metric asks for a tenth."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 1))
    y = X[:, 0] / X.std()
    judged = []

    def a_tenth(predicted, true):
        shrunk = np.std(predicted) / np.std(true)
        judged.append((-abs(np.log(10 * shrunk + 1e-9)), shrunk))
        return judged[-1][0]

    (predicted,), how = fit(X, y, [X], 0, a_tenth)
    best, final = max(judged)[1], predicted.std() / y.std()
    explain(abs(np.log(final / best)) < 0.5,
            f"the metric was highest for predictions that are {best:.3g} times as spread as the scores, but those of "
            f"the last fit are {final:.3g} times: it must have the strength that was chosen")
    explain(not how["at_edge"], "at_edge is true, but the best strength lies inside of the grid")
    _, how = fit(X, y, [X], 0, likes_little_variation)
    explain(how["at_edge"], "at_edge is false, but the metric asks for the strongest penalty of the grid")


def test_all_training_examples_are_in_the_last_fit():
    """Ten classes, each a group of its own: one that is held out is unknown to the fit."""
    y = np.repeat(np.arange(10), 6)
    X = 5 * np.eye(10)[y] + np.random.default_rng(0).normal(size=(60, 10))
    predicted, = run(X, y, [5 * np.eye(10)], 10, groups=y)
    missing = np.setdiff1d(np.arange(10), predicted)
    explain(not len(missing),
            f"class {missing[:1]} is never predicted, although it is as far from the others as any: after the "
            "choice of the strength, fit again on all training examples, those that were held out as well (or is the "
            "penalty not strength/2 |W|^2?)")


def test_a_class_that_never_occurs_in_training_does_no_harm():
    (X, y), (test, true) = blobs(120, 0), blobs(150, 1)
    predicted, = run(X[y > 0], y[y > 0] - 1, [test[true > 0]], K=3)
    explain((predicted < 2).all() and accuracy(predicted, true[true > 0] - 1) > 0.88,
            "with a third class that no training example has, the other two are no longer told apart")


def test_directions_keeps_the_leading_ones_only():
    """Two features with standard deviations 10 and 5 say nothing; two that nearly agree, about 1, tell the class.

    These two are the third direction of the features as they are. Standardised, they would be the first. Two
    more hardly vary, one of them about 100. In a second test set the two largest features are 0, so its own
    directions are others.
    """
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 6)) * [0.3, 1, 5, 10, 0.01, 0.01]
    y = (X[:, 1] > 0).astype(int)
    X[:, 0] += X[:, 1]
    X += [0, 0, 0, 0, 0, 100] - X[:300].mean(axis=0)
    quiet = X[300:] * [1, 1, 0, 0, 1, 1]
    reached = {}
    for k in (2, 3):
        predicted, of_quiet = run(X[:300], y[:300], [X[300:], quiet], 2, directions=k)
        reached[k] = accuracy(predicted, y[300:])
    explain(reached[2] < 0.7,
            "with directions=2 the third direction, the only one that tells the class, is still used: project "
            "on the leading directions, those of the largest variance, with `leading`, before you standardise")
    explain(reached[3] > 0.3 and (reached[3] < 0.85 or accuracy(of_quiet, y[300:]) > 0.85),
            "with directions=3 the accuracy on a test set falls where it varies in other directions than the training "
            "split: project the test sets on the directions of the training split")
    explain(reached[3] > 0.85,
            "with directions=3 the third direction, the only one that tells the class, is kept, but the accuracy "
            f"falls to {reached[3]:.2f}: are they the directions of the largest variance of centred features?")


def test_directions_are_standardised():
    """K = 0. Two directions, of standard deviations 10 and 1: a strong penalty shrinks both alike."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 3)) * [10, 1, 0.1]
    y = X @ [0.1, 1.0, 1.0] + 0.1 * rng.normal(size=80)
    predicted, = run(X, y, [X], 0, likes_little_variation, directions=2)
    A = np.column_stack((X[:, :2] / X[:, :2].std(axis=0), np.ones(80)))
    large, small, _ = np.linalg.lstsq(A, predicted, rcond=None)[0]
    explain(small > 0.5 * large,
            "with directions, a strong penalty shrinks the directions of little variance more: standardise after "
            "`leading`, so that the penalty treats them alike")
