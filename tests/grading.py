"""
What graded tests share: failures in words, and statistics with a stated false-alarm level.

A test grades the distribution of (context, target) pairs that a function stands for, not the way in which
it is written. So positions may come in any order, unused slots (weight 0) may be many or none, weights may
have any common factor, and random numbers may come from anywhere.
"""
import math
import os
import traceback

import numpy as np
import pytest

from objectives import OBJECTIVES, Batch, WrongBatch, check_batch, window_words


def explain(condition, message):
    """Like assert, but a failure is this one line and nothing else."""
    __tracebackhide__ = True
    if not condition:
        pytest.fail(message, pytrace=False)


def call(function, *arguments):
    """function(*arguments). An exception in it becomes one line that says where, instead of a traceback."""
    __tracebackhide__ = True
    try:
        return function(*arguments)
    except NotImplementedError:
        raise
    except WrongBatch as error:                             # a sentence already
        pytest.fail(f"{getattr(function, '__name__', 'the function')}: {error}", pytrace=False)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename]
        last = ours[-1]                                     # where it is, or what called the library
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        name = getattr(function, "__name__", "the function")
        where = f"line {last.lineno} of {os.path.basename(last.filename)}: {last.line}"
        pytest.fail(f"{name} raises {reason} ({where}){hint(error, arguments)}", pytrace=False)


def hint(error, arguments):
    """What an exception usually means."""
    if type(error).__name__ in ("LinAlgError", "_LinAlgError"):
        return "; does the matrix hold nan or inf, from a division by 0?"
    if "setting an array element with a sequence" in str(error):
        return "; index NumPy arrays with numbers or NumPy arrays, not with tensors"
    options = arguments[-1]
    objective = OBJECTIVES.get(getattr(options, "objective", None))
    if not isinstance(error, IndexError) or objective is None or not objective.causal:
        return ""
    return f". {window_words(options)}"


def make_batch(function, x, draw, options):
    """The Batch that an objective makes of the windows x, if it is one that can be trained on."""
    __tracebackhide__ = True
    given = x.copy()
    batch = call(function, given, draw, options)
    return checked(options.objective, batch, options, given, x)


def checked(name, batch, options, given, x):
    """The fields of a Batch as arrays.

    name: of the function that made it. given: the windows that were passed in, x: what they held before.
    """
    __tracebackhide__ = True
    explain(batch is not None, f"{name} returns nothing (None): it must return a Batch")
    try:
        check_batch(batch, options)
    except WrongBatch as error:
        pytest.fail(f"{name}: {error}", pytrace=False)
    explain(np.array_equal(given, x),
            f"{name} changes the token windows x that it was given: work on a copy")
    batch = Batch(*[np.asarray(value) for value in batch])
    explain(len(batch.inputs) == len(x),
            f"{name}: inputs have {len(batch.inputs)} rows for {len(x)} sequences")
    return batch

# -----------------------------------------------------------------------------
# Windows in which a token tells its place

def distinct_tokens(B, width, seed=0):
    """(B, width) ids 1 .. B*width, each once, in no order, so that nobody can compute the next token.

    Token 0 is not among them: what goes wrong with it has a test and a sentence of its own.
    """
    return 1 + np.random.default_rng(seed).permutation(B * width).reshape(B, width)


def place_of(tokens, x):
    """(row, column) of each token in x, windows of distinct tokens; -1 for an id that x does not hold."""
    where = np.full(max(x.max(), tokens.max()) + 1, -1)
    where[x.ravel()] = np.arange(x.size)
    place = where[tokens]
    row, column = divmod(place, x.shape[1])
    return np.where(place < 0, -1, row), np.where(place < 0, -1, column)


def used_slots(batch):
    """positions (N,), targets (N, K), weights (N,) of the slots in use."""
    used = batch.weights > 0
    return batch.positions[used], batch.targets[used], batch.weights[used].astype(float)

# -----------------------------------------------------------------------------
# Statistics

FALSE_ALARM = 1e-6      # of one statistical test, at most


def fits(observed, probabilities, tests=1):
    """Pearson's chi-square: could these counts come from these probabilities?

    For X ~ chi2(d), P(X > d + 2 sqrt(d a) + 2a) <= exp(-a) (Laurent & Massart 2000). A right program is
    called wrong with probability FALSE_ALARM at most, shared by the given number of tests.
    """
    observed = np.asarray(observed, dtype=float)
    expected = np.broadcast_to(np.asarray(probabilities, dtype=float), observed.shape) * observed.sum()
    if observed[expected == 0].any():
        return False
    observed = observed[expected > 0]
    expected = expected[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum()
    d = observed.size - 1
    a = math.log(tests / FALSE_ALARM)
    return chi2 < d + 2 * math.sqrt(a * d) + 2 * a


def extremes(observed, names):
    """The least and the most frequent outcome, in words."""
    observed = np.asarray(observed)
    low, high = observed.argmin(), observed.argmax()
    return (f"{names[low]} comes {observed[low]} times, {names[high]} {observed[high]} times, "
            f"of {observed.sum()}")


def explain_uniform(observed, names, what, tests=1):
    """All outcomes must be equally frequent."""
    __tracebackhide__ = True
    observed = np.asarray(observed)
    explain(fits(observed, 1 / observed.size, tests), f"{what}: {extremes(observed, names)}")


def far_from_independent(first, second, levels):
    """Whether two draws from 0..levels-1, each uniform, depend on each other so much that a pair is more
    often or more rarely seen than it should be by over 30 %.

    first, second: at least 500 * levels**2 numbers each, so that this is 6 standard deviations. Weaker
    dependence is a matter of taste (drawing without replacement lowers the variance).
    """
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    pairs = np.bincount(first * levels + second, minlength=levels ** 2)
    expected = n / levels ** 2
    return bool((np.abs(pairs - expected) > 0.3 * expected).any())
