"""
The grader of exercises 1 to 4, then what holds for every objective, then our own choices.

    python -m pytest -m exercise1               # ar; 2: dar, 3: masking and mlm, 4: vlm
    python -m pytest tests/test_objectives.py   # everything, a few seconds on a CPU, no network

A failure says in the field's terms what is wrong. The exercises' tests grade the distribution of
(context, target) pairs, see grading.py, and come from the specific to the general: with -x, the first
failure is the one that helps. Positions are counted from 1 in messages, as in the paper: position k sees
x[1..k].
"""
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import objectives
from grading import (call, checked, distinct_tokens, explain, explain_uniform, extremes, far_from_independent,
                     fits, make_batch, place_of, used_slots)
from model import Config, Transformer
from objectives import (GOLDEN, OBJECTIVES, Batch, Draw, Objective, Options, WrongBatch, check,
                        check_batch, check_objective, mask_batch, most_masked, spread, window_size)

T = 16          # block_size of most tests


def make_options(name, **given):
    return Options(**{"objective": name, "block_size": T, "vocab_size": 50, **given})


def random_tokens(options, B, seed=0):
    """(B, T + ahead) ids in which tokens occur more than once, token 0 among them."""
    return np.random.default_rng(seed).integers(options.vocab_size, size=(B, window_size(options)))


def make(options, x, draw):
    return make_batch(OBJECTIVES[options.objective].batch, x, draw, options)


def distinct_batch(name, B, step=0, indices=None, **given):
    """(x, batch, options): a batch of windows in which a token tells its place."""
    options = make_options(name, **given)
    options.vocab_size = B * window_size(options) + 1
    x = distinct_tokens(B, window_size(options))
    batch = make(options, x, Draw(7, step, range(B) if indices is None else indices))
    return x, batch, options

# -----------------------------------------------------------------------------
# What a batch of a causal objective stands for

def offset_shares(batch, x, options, most):
    """(B, T, most): how much of the loss at each position is on the target 1, 2, ... most tokens ahead.

    Fails unless the model sees the first T tokens, every position is scored with the same weight, and
    every target lies 1 .. most tokens ahead. x: windows of distinct tokens.
    """
    name, T = options.objective, options.block_size
    explain(np.array_equal(batch.inputs, x[:, :T]),
            f"{name}: the inputs must be the first T tokens of each sequence, unchanged")

    # Where each target comes from
    positions, targets, weights = used_slots(batch)
    row, k = divmod(positions, T)
    target_row, target_place = place_of(targets, x)                             # (N, K) each
    offsets = target_place - k[:, None]                                         # (N, K)
    explain((target_row >= 0).all(),
            f"{name}: a target is a token that the sequence does not hold")
    explain(not (offsets == 0).all(),
            f"{name}: every target is the token at its own position, which the model sees: "
            "position k must predict what follows x[k]")
    explain((target_row == row[:, None]).all(),
            f"{name}: a target comes from another sequence of the batch (positions count on from sequence to "
            "sequence: b*T + k)")

    # How far ahead it lies
    n = offsets.min(axis=1).argmin()
    explain(offsets.min() >= 1,
            f"{name}: the target of position {k[n] + 1} is x[{k[n] + 1 + offsets[n].min()}], "
            f"which the model sees: offset {offsets[n].min()}, but offsets start at 1")
    n = offsets.max(axis=1).argmax()
    explain(offsets.max() <= most,
            f"{name}: the target of position {k[n] + 1} is x[{k[n] + 1 + offsets[n].max()}], "
            f"{offsets[n].max()} tokens ahead; the farthest is {most}")

    # How much each position counts
    total = np.bincount(positions, weights=weights, minlength=batch.inputs.size)
    unscored = np.flatnonzero(total == 0)
    explain_all_positions(name, unscored, T)
    explain(np.allclose(total, total[0], rtol=1e-4),
            f"{name}: all positions must have the same weight")

    # Shares of the targets of one position
    shares = np.zeros((batch.inputs.size, most))
    each = np.broadcast_to((weights / targets.shape[1])[:, None], targets.shape)
    np.add.at(shares, (np.broadcast_to(positions[:, None], targets.shape), offsets - 1), each)
    return (shares / total[:, None]).reshape(*batch.inputs.shape, most)


def explain_all_positions(name, unscored, T):
    if len(unscored):
        explain(False,
                f"{name}: every position must be scored, but position {unscored[0] % T + 1} of "
                f"sequence {unscored[0] // T + 1} is not ({len(unscored)} positions are not)")


def explain_token_0(options):
    """Token 0 is a token like any other: a sequence of nothing else is scored as others are."""
    name, T = options.objective, options.block_size
    x = np.zeros((2, window_size(options)), dtype=np.int64)
    x[1] = 1
    positions, targets, weights = used_slots(make(options, x, Draw(3, 4, range(2))))
    unscored = np.setdiff1d(np.arange(2 * T), positions)
    explain(len(unscored) == 0, f"{name}: positions whose target is token 0 are not scored: "
                                "0 is a token like any other")

# -----------------------------------------------------------------------------
# Exercise 1: ar

@pytest.mark.exercise1
@pytest.mark.parametrize("block_size,B", [(16, 3), (7, 1), (1, 4), (1, 1)])
def test_ar_predicts_the_next_token(block_size, B):
    x, batch, options = distinct_batch("ar", B, block_size=block_size)
    offset_shares(batch, x, options, most=1)


@pytest.mark.exercise1
def test_ar_scores_token_0():
    explain_token_0(make_options("ar"))


@pytest.mark.exercise1
def test_ar_on_text_in_which_tokens_recur():
    options = make_options("ar", vocab_size=3)
    x = random_tokens(options, B=4)
    batch = make(options, x, Draw(1, 2, range(4)))
    positions, targets, weights = used_slots(batch)
    row, k = divmod(positions, T)
    explain_all_positions("ar", np.setdiff1d(np.arange(4 * T), positions), T)
    explain((targets == x[row, k + 1][:, None]).all(), "ar: position k must predict x[k+1]")
    total = np.bincount(positions, weights=weights)
    explain(np.allclose(total, total[0], rtol=1e-4),
            "ar: all positions must have the same weight, whatever their tokens are")

# -----------------------------------------------------------------------------
# Exercise 2: dar, both estimators

def drawn_offsets(t, B, step=0, block_size=T):
    """(B, T) the offset, 1..t, that dar drew at each position."""
    x, batch, options = distinct_batch("dar", B, step, lookahead=t, block_size=block_size)
    shares = offset_shares(batch, x, options, most=t)
    explain(np.allclose(shares.max(axis=2), 1),
            "dar sample: one offset is drawn per position, but a position has several "
            "different targets (that is the estimator \"expectation\")")
    return shares.argmax(axis=2) + 1


@pytest.mark.exercise2
@pytest.mark.parametrize("t,block_size,B", [(3, 16, 5), (2, 16, 1), (5, 3, 4), (1, 16, 2)])
def test_dar_predicts_one_of_the_next_t_tokens(t, block_size, B):
    drawn_offsets(t, B, block_size=block_size)


@pytest.mark.exercise2
def test_dar_draws_an_offset_for_every_position():
    """Three offsets, 20 sequences of 16 positions: they agree by chance with probability below 1e-100."""
    s = drawn_offsets(3, B=20)
    explain((s != s[0, 0]).any(),
            f"dar: all positions of the batch have the same offset, {s[0, 0]}: every position "
            "draws its own")
    explain((s != s[:, :1]).any(),
            "dar: all positions of a sequence share one offset: every position draws its own")
    explain((s != s[:1]).any(),
            "dar: all sequences of a batch share the same offsets: every one draws its own")
    other = drawn_offsets(3, B=20, step=1)
    explain((s != other).any(),
            "dar: the offsets are the same at every step: they must come from `draw`")


@pytest.mark.exercise2
@pytest.mark.parametrize("t", [2, 3, 5])
def test_dar_offset_is_uniform_on_1_to_t(t):
    """32,000 offsets: one that is 10 % too frequent is found (at t = 3 that adds 160 to chi-square, of which
    41 are allowed). Position by position, 2,000 each: one that is 50 % too frequent.
    """
    s = drawn_offsets(t, B=2000)
    names = [f"offset {i}" for i in range(1, t + 1)]
    counts = np.bincount(s.ravel(), minlength=t + 1)[1:]
    never = np.flatnonzero(counts == 0) + 1
    explain(len(never) == 0,
            f"dar: with lookahead {t}, offset {', '.join(map(str, never))} is never drawn: s "
            f"is uniform on 1..{t}")

    # At all positions, or at some only
    per_position = [np.bincount(column, minlength=t + 1)[1:] for column in s.T]
    wrong = [k for k, counts in enumerate(per_position) if not fits(counts, 1 / t, tests=T)]
    if len(wrong) < T / 2:
        for k in wrong:
            explain_uniform(per_position[k], names,
                            f"dar: at position {k + 1} the offsets are not equally frequent", tests=T)
    explain_uniform(counts, names, f"dar: the offsets 1..{t} are not equally frequent")
    explain(not wrong, "dar: at every position another offset is more frequent than others")


@pytest.mark.exercise2
def test_dar_offsets_are_drawn_independently():
    """Two offsets that agree 30 % more or less often than independent ones do are found. Of any two positions, or
    any two sequences of a small batch, those that agree in 65 or 35 % of all cases instead of 50 %: over 13
    standard deviations.
    """
    s = drawn_offsets(2, B=2000)                                                # (2000, T)
    k, other, share = most_dependent(s.T)
    explain(0.35 < share < 0.65,
            f"dar: positions {k + 1} and {other + 1} have the same offset in {100 * share:.0f} % of all sequences, "
            "with lookahead 2: every position draws its own")
    s = np.stack([drawn_offsets(2, B=4, step=step) for step in range(150)])     # (150, 4, T)
    i, other, share = most_dependent(s.transpose(1, 0, 2).reshape(4, -1))
    explain(0.35 < share < 0.65,
            f"dar: sequences {i + 1} and {other + 1} of a batch have the same offset at {100 * share:.0f} % of all "
            "positions, with lookahead 2: every sequence draws its own")
    s = drawn_offsets(3, B=2000) - 1
    explain(not far_from_independent(s[:, 0::2].ravel(), s[:, 1::2].ravel(), 3),
            "dar: the offsets of neighbouring positions depend on each other")
    explain(not far_from_independent(s[0::2].ravel(), s[1::2].ravel(), 3),
            "dar: the offsets of two sequences depend on each other")


def most_dependent(rows):
    """The two rows of (R, n), 1 or 2 in equal shares, that agree most or least often: (first, second, share of n)."""
    pairs = []
    for i, j in itertools.combinations(range(len(rows)), 2):
        pairs.append((i, j, (rows[i] == rows[j]).mean()))
    return max(pairs, key=lambda pair: abs(pair[2] - 0.5))


@pytest.mark.exercise2
@pytest.mark.parametrize("t,block_size,B", [(3, 16, 3), (4, 16, 1), (5, 3, 2), (1, 16, 2)])
def test_dar_expectation_averages_over_the_next_t_tokens(t, block_size, B):
    x, batch, options = distinct_batch("dar", B, lookahead=t, block_size=block_size,
                                       dar_estimator="expectation")
    shares = offset_shares(batch, x, options, most=t)                           # (B, T, t)
    counts = (shares > 0).sum(axis=2)
    explain((counts == t).all(),
            f"dar expectation: with lookahead {t}, position "
            f"{counts.ravel().argmin() % block_size + 1} has {counts.min()} of the {t} targets "
            f"x[k+1] .. x[k+{t}]")
    explain(np.allclose(shares, 1 / t, rtol=1e-4),
            f"dar expectation: the {t} next tokens must count the same, 1/{t} each")


@pytest.mark.exercise2
@pytest.mark.parametrize("estimator", ["sample", "expectation"])
def test_dar_scores_token_0(estimator):
    explain_token_0(make_options("dar", lookahead=3, dar_estimator=estimator))

# -----------------------------------------------------------------------------
# What a batch of a masked objective stands for

def scored_positions(batch, x, options, masked=None):
    """(B, T) bool: the positions that are hidden and predicted.

    Fails unless exactly these are hidden, each predicts its own token, and the weights are those of
    options.normalization, up to a factor. masked: (B, T) bool, which positions these must be, if known.
    """
    name = options.objective if masked is None else "mask_batch"
    T = options.block_size
    x = x[:, :T]
    positions, targets, weights = used_slots(batch)
    scored = np.zeros(x.size, dtype=bool)
    scored[positions] = True
    scored = scored.reshape(x.shape)
    corrupts_as_bert = options.corruption == "bert"
    if corrupts_as_bert:
        explain_bert_inputs(name, batch, x, scored, masked)
    else:
        explain_masked_inputs(name, batch, x, options.mask_token, scored, masked)

    # Targets
    wrong = np.flatnonzero((targets != x.ravel()[positions, None]).any(axis=1))
    if len(wrong):
        k = positions[wrong[0]] % T
        explain(False,
                f"{name}: position {k + 1} is masked and must predict its own token "
                f"x[{k + 1}], but its target is another token")

    # Weights
    per_row = np.bincount(positions // T, weights=weights, minlength=len(x))
    per_row = per_row[scored.any(axis=1)]
    per_token = weights
    if options.normalization == "tokens":
        explain(alike(per_token, per_token[0]),
                f"{name}, normalization tokens: every masked token must have the same weight, "
                f"but weights are {per_token.min():.3g} to {per_token.max():.3g}")
    else:
        explain(alike(per_row, per_row[0]),
                f"{name}, normalization bound: the weights of every sequence must have the "
                f"same sum, but the sums are {per_row.min():.3g} to {per_row.max():.3g}")
        expected = (per_row[0] / np.maximum(scored.sum(axis=1), 1))[positions // T]
        explain(alike(per_token, expected),
                f"{name}, normalization bound: the masked tokens of one sequence must have the "
                "same weight")
    return scored


def alike(weights, expected):
    """np.allclose for positive weights, without its cost: this is called for each of thousands of batches."""
    return (np.abs(weights - expected) <= 1e-4 * expected).all()


def explain_masked_inputs(name, batch, x, mask_token, scored, masked):
    shown = batch.inputs == mask_token
    changed = batch.inputs != x

    # Inputs
    explain(changed.any(), f"{name}: no token is hidden: the model sees every target")
    other = changed & ~shown
    if other.any():
        ids = np.unique(batch.inputs[other])
        explain(not (len(ids) == 1 and scored[other].all()),
                f"{name}: masked positions show the id {ids[:1]}, not the mask token {mask_token} "
                "(options.mask_token)")
        row, k = first_place(other)
        explain(False,
                f"{name}: a visible token was changed: position {k + 1} of sequence {row + 1} "
                f"shows {batch.inputs[row, k]} instead of {x[row, k]}, its token among the first T")
    if masked is not None:
        row, k = first_place(shown != masked)
        explain(np.array_equal(shown, masked),
                f"{name}: position {k + 1} of sequence {row + 1} is "
                f"{'hidden' if shown[row, k] else 'visible'}, but `masked` says "
                f"{'hidden' if masked[row, k] else 'visible'}")

    # Scored positions
    explain(not scored.all() or shown.all(),
            f"{name}: all positions are scored, the visible ones too: only masked positions "
            "are predicted")
    leak = scored & ~shown
    row, k = first_place(leak)
    explain(not leak.any(),
            f"{name}: position {k + 1} of sequence {row + 1} is scored but not masked: the "
            "model sees its target")
    missing = shown & ~scored
    explain_missing(name, x, missing, shown)


def explain_bert_inputs(name, batch, x, scored, masked):
    changed = batch.inputs != x
    unscored = changed & ~scored
    if masked is not None:
        explain(not (changed & ~masked).any(),
                f"{name}, corruption bert: a token outside `masked` was changed")
        explain_missing(f"{name}, corruption bert", x, masked & ~scored, masked)
        explain(np.array_equal(scored, masked),
                f"{name}, corruption bert: a position outside `masked` is scored")
    explain(not unscored.any(),
            f"{name}, corruption bert: a position was changed that is not scored: "
            "masked, replaced and unchanged ones are all predicted")


def explain_missing(name, x, missing, masked):
    """All masked positions must be scored, those with token 0 as well."""
    if missing.any():
        zero = (x[missing] == 0).all() and (x[masked & ~missing] != 0).all()
        explain(not zero,
                f"{name}: masked positions whose token is 0 are not scored: 0 is a token like "
                "any other")
        explain(False,
                f"{name}: {missing.sum()} of {masked.sum()} masked positions are not scored: "
                "each must be predicted, with a weight above 0")


def first_place(where):
    """(row, column) of the first True, or (0, 0)."""
    return divmod(int(where.argmax()), where.shape[1])


def explain_uniform_sets(masks, what):
    """masks: (steps, B, 6) bool, 3 of 6 positions in each row; all 20 such sets must be equally frequent.

    With 10,000 rows a position that is masked 15 % too often is found, and a set 60 % too often. Batches are
    small: where few sequences mix up their random numbers, it shows.
    """
    steps, B, width = masks.shape

    # Mistakes with a name
    explain((masks != masks[:, :1]).any(),
            f"{what}: the same positions are masked in every sequence: every sequence draws "
            "its own")
    explain((masks != masks[:1]).any(),
            f"{what}: the masks are the same at every step: they must come from `draw`")
    masks = masks.reshape(steps * B, width)
    changes = (np.diff(masks.astype(int), axis=1) == 1).sum(axis=1) + masks[:, 0]
    explain((changes > 1).any(),
            f"{what}: the masked positions are always neighbours (one span): all sets of "
            "positions must be equally likely")

    explain_equal_shares(masks, what)
    for k in range(width):
        explain(not far_from_independent(masks[0::2, k].astype(int), masks[1::2, k].astype(int), 2),
                f"{what}: the masks of two sequences depend on each other")


def explain_equal_shares(masks, what):
    """masks: (R, 6) bool, 3 of 6 positions in each row: all positions, and all 20 sets, equally often."""
    width = masks.shape[1]
    names = [f"position {k + 1}" for k in range(width)]
    explain_uniform(masks.sum(axis=0), names,
                    f"{what}: the positions are not masked equally often")
    sets = list(itertools.combinations(range(width), 3))
    number = np.zeros(2 ** width, dtype=int)
    for i, members in enumerate(sets):
        number[sum(1 << k for k in members)] = i
    seen = np.bincount(number[masks @ (1 << np.arange(width))], minlength=len(sets))
    names = ["the set " + str([k + 1 for k in members]) for members in sets]
    explain_uniform(seen, names, f"{what}: not all sets of positions are equally likely")


def explain_bert_shares(make_bert, what):
    """make_bert(vocab_size, step) -> (inputs, x, scored), (100, T) each, half of the positions scored.

    A share of 80 % that is 78.5 or 81.5 % is found, one of 10 % that is 9 %, or a random token that may be the
    mask token.
    """
    def bert_batches(vocab_size):
        """(steps, B, T) each: inputs, x, scored; about 100,000 scored positions of 32 per sequence."""
        return [np.stack(parts) for parts in zip(*[make_bert(vocab_size, step) for step in range(60)])]

    # Each position draws its own kind
    mask_token = 1000
    inputs, x, scored = bert_batches(vocab_size=mask_token)
    is_mask = np.where(scored, inputs == mask_token, -1)                        # -1: not scored
    one_kind = len(set(is_mask[scored])) == 1                                   # has a sentence below
    explain(one_kind or any(len(set(row[row >= 0])) > 1 for row in is_mask[0]),
            f"{what}, corruption bert: all masked positions of a sequence are treated alike: "
            "each draws its own kind")
    explain(one_kind or any(len(set(column[column >= 0])) > 1 for column in is_mask[0].T),
            f"{what}, corruption bert: all sequences are treated alike: each draws its own kinds")

    # 80 % mask, 10 % random, 10 % unchanged. Of 1000 tokens a random one is hardly ever the original
    seen, true = inputs[scored], x[scored]
    kinds = [(seen == mask_token).sum(), ((seen != mask_token) & (seen != true)).sum(), (seen == true).sum()]
    percent = ", ".join(f"{100 * kind / len(seen):.1f}" for kind in kinds)
    words = f"{what}, corruption bert: {percent} % of the scored positions are masked, random, unchanged"
    hint = ": do masks and kinds come from the same random numbers?" if one_kind else ""
    explain(fits(kinds, [0.8, 0.1, 0.1]) or fits(kinds, [0.8, 0.0999, 0.1001]),
            f"{words} instead of 80, 10, 10{hint}")

    # Any two positions, any two sequences of a batch
    kind = np.where(scored, (inputs == mask_token) - 0.8, 0)                    # mean 0, variance .16
    for name, axis in [("positions", 2), ("sequences of a batch", 1)]:
        first, second, correlation = most_correlated(np.moveaxis(kind, axis, 0), np.moveaxis(scored, axis, 0))
        explain(correlation < 0.3,
                f"{what}, corruption bert: {name} {first + 1} and {second + 1} are masked, replaced or left together: "
                "each draws its own kind")

    # Random tokens are text. Whether they may be the original one is left open
    inputs, x, scored = bert_batches(vocab_size=2)
    seen, true = inputs[scored], x[scored]
    kinds = [(seen == 2).sum(), ((seen != 2) & (seen != true)).sum(), (seen == true).sum()]
    explain(fits(kinds, [0.8, 0.05, 0.15]) or fits(kinds, [0.8, 0.1, 0.1]),
            f"{what}, corruption bert: of a vocabulary of 2 tokens, random tokens are not "
            "uniform on 0 .. vocab_size-1 (the mask token is none of them)")

    # ... and all of them alike
    inputs, x, scored = bert_batches(vocab_size=5)
    seen, true = inputs[scored], x[scored]
    replaced = (seen != 5) & (seen != true)
    pairs = np.bincount(seen[replaced] * 5 + true[replaced], minlength=25)
    pairs = pairs.reshape(5, 5)[~np.eye(5, dtype=bool)]
    names = [f"{a} for {b}" for a in range(5) for b in range(5) if a != b]
    explain_uniform(pairs, names,
                    f"{what}, corruption bert: random tokens are not uniform over the "
                    "vocabulary")

def most_correlated(kind, scored):
    """The two of the first axis whose kinds agree most where both are scored: (first, second, correlation).

    Of 1500 common places and more: 0.3 is over 11 standard deviations.
    """
    kind = kind.reshape(len(kind), -1)
    scored = scored.reshape(len(scored), -1).astype(float)
    correlation = (kind @ kind.T) / np.maximum(1, scored @ scored.T) / 0.16
    np.fill_diagonal(correlation, 0)
    first, second = divmod(int(correlation.argmax()), len(kind))
    return first, second, correlation.max()

# -----------------------------------------------------------------------------
# Exercise 3: masking and mlm

def draw_masks(counts, step=0, block_size=6):
    """(B, T) bool, what uniform_masks returns."""
    options = make_options("mlm", block_size=block_size)
    counts = np.asarray(counts)
    masked = call(objectives.uniform_masks, counts.copy(), Draw(7, step, range(len(counts))), options)
    explain(masked is not None,
            "uniform_masks returns nothing (None): it must return (B, T) bool")
    dtype = getattr(masked, "dtype", None)
    masked = np.asarray(masked)
    explain(dtype in (bool, torch.bool),
            f"uniform_masks: masked must be a bool array, not {dtype or 'a list'}")
    explain(masked.shape == (len(counts), block_size),
            f"uniform_masks: masked must be (B, T) = {len(counts), block_size}, not "
            f"{masked.shape}")
    return masked


@pytest.mark.exercise3
def test_uniform_masks_has_the_given_count_in_every_row():
    counts = np.array([1, 6, 3, 3, 5, 2, 4, 1])
    masked = draw_masks(counts)
    for i, count in enumerate(counts):
        explain(masked[i].sum() == count,
                f"uniform_masks: sequence {i + 1} must have counts[{i}] = {count} masked "
                f"positions, but has {masked[i].sum()}")


@pytest.mark.exercise3
@pytest.mark.parametrize("B,steps", [(100, 100), (4, 2500)])
def test_uniform_masks_draws_every_set_equally_often(B, steps):
    masked = np.stack([draw_masks(np.full(B, 3), step) for step in range(steps)])       # (steps, B, 6)
    counts = masked.sum(axis=2)
    explain((counts == 3).all(),
            "uniform_masks: every sequence must have 3 masked positions here, but they have "
            f"{counts.min()} to {counts.max()}")
    explain_uniform_sets(masked, f"uniform_masks with {B} sequences at a time")


@pytest.mark.exercise3
def test_uniform_masks_is_uniform_whatever_the_other_counts():
    masked = np.stack([draw_masks([1, 3, 5, 3], step) for step in range(4000)])         # (steps, 4, 6)
    explain_uniform_sets(masked[:, 1::2], "uniform_masks with different counts")
    names = [f"position {k + 1}" for k in range(6)]
    explain_uniform(masked[:, 0].sum(axis=0), names,
                    "uniform_masks: with a count of 1 the positions are not equally likely")
    explain_uniform((~masked[:, 2]).sum(axis=0), names,
                    "uniform_masks: with a count of 5 the positions are not equally likely")


def call_mask_batch(x, masked, spare=0, step=0, **given):
    """(batch, options), or a failure if it is no Batch."""
    options = make_options("mlm", block_size=masked.shape[1], **given)
    before, given_x, given_masked = masked.copy(), x.copy(), masked.copy()
    draw = Draw(7, step, range(len(x)))
    slots = min(int(masked.sum()) + spare, masked.size)
    batch = call(objectives.mask_batch, given_x, given_masked, slots, draw, options)
    batch = checked("mask_batch", batch, options, given_x, x)
    explain(np.array_equal(given_masked, before),
            "mask_batch changes the array `masked` that it was given")
    return batch, options


MASKS = {"spans": np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=bool),
         "all and none": np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], dtype=bool),
         "one sequence": np.array([[1, 0, 0, 1]], dtype=bool)}


@pytest.mark.exercise3
@pytest.mark.parametrize("spare", [0, 4])
@pytest.mark.parametrize("masks", MASKS)
def test_mask_batch_hides_and_predicts_the_masked_positions(masks, spare):
    masked = MASKS[masks]
    x = distinct_tokens(len(masked), masked.shape[1] + 1)
    batch, options = call_mask_batch(x, masked, spare, vocab_size=x.size + 1)
    scored_positions(batch, x, options, masked)


@pytest.mark.exercise3
def test_mask_batch_on_text_in_which_tokens_recur():
    rng = np.random.default_rng(0)
    for vocab_size in (3, 2, 1):
        x = rng.integers(vocab_size, size=(5, 17))
        masked = rng.random((5, 16)) < 0.4
        batch, options = call_mask_batch(x, masked, spare=3, vocab_size=vocab_size)
        scored_positions(batch, x, options, masked)


@pytest.mark.exercise3
@pytest.mark.parametrize("normalization", ["tokens", "bound"])
@pytest.mark.parametrize("masks", MASKS)
def test_mask_batch_weighs_as_the_normalization_says(normalization, masks):
    masked = MASKS[masks]
    x = distinct_tokens(len(masked), masked.shape[1] + 1)
    batch, options = call_mask_batch(x, masked, spare=2, vocab_size=x.size + 1, normalization=normalization)
    scored_positions(batch, x, options, masked)


@pytest.mark.exercise3
@pytest.mark.parametrize("normalization", ["tokens", "bound"])
def test_mask_batch_weighs_corrupted_tokens_alike(normalization):
    """Masked, replaced and unchanged ones."""
    masked = np.random.default_rng(0).random((20, 16)) < 0.5
    x = distinct_tokens(20, 17)
    batch, options = call_mask_batch(x, masked, vocab_size=x.size + 1, normalization=normalization, corruption="bert")
    scored_positions(batch, x, options, masked)


@pytest.mark.exercise3
def test_mask_batch_bert_corruption():
    def make_bert(vocab_size, step):
        rng = np.random.default_rng([vocab_size, step])
        x = rng.integers(vocab_size, size=(100, 32))
        masked = rng.random((100, 32)) < 0.5
        batch, options = call_mask_batch(x, masked, 5, step, vocab_size=vocab_size, corruption="bert")
        return batch.inputs, x, scored_positions(batch, x, options, masked)

    # About 30 random tokens per sequence, of a vocabulary that is much larger than the text
    masked = np.ones((8, 300), dtype=bool)
    x = distinct_tokens(8, 300)
    first, options = call_mask_batch(x, masked, vocab_size=100_000, corruption="bert")
    replaced = (first.inputs != options.mask_token) & (first.inputs != x)
    for seen, random in zip(first.inputs, replaced):
        explain(not random.any() or (seen[random] > x.max()).any(),
                "mask_batch, corruption bert: random tokens are tokens of the text: each must be drawn "
                "from the whole vocabulary")
        explain(random.sum() < 2 or len(set(seen[random])) > 1,
                "mask_batch, corruption bert: all random tokens of a sequence are the same: each must be "
                "drawn on its own")
    both = replaced[:, None] & replaced[None] & ~np.eye(8, dtype=bool)[:, :, None]      # (8, 8, 300)
    same = first.inputs[:, None] == first.inputs[None]
    explain(not both.any() or not same[both].all(),
            "mask_batch, corruption bert: all sequences of a batch get the same random tokens: each must be drawn on "
            "its own")

    explain_bert_shares(make_bert, "mask_batch")
    second, _ = call_mask_batch(x, masked, step=1, vocab_size=100_000, corruption="bert")
    explain((first.inputs != second.inputs).any(),
            "mask_batch, corruption bert: the corruption is the same at every step: it must "
            "come from `draw`")


@pytest.mark.exercise3
@pytest.mark.parametrize("block_size,ratio,count", [(16, 0.4, 6), (16, 0.17, 3), (16, 0.15, 2), (16, 0.5, 8),
                                                    (16, 1.0, 16), (20, 0.15, 3), (1, 1.0, 1), (16, 0.02, 1)])
def test_mlm_masks_round_ratio_T_positions(block_size, ratio, count):
    x, batch, options = distinct_batch("mlm", 12, block_size=block_size, mask_ratio=ratio)
    counts = scored_positions(batch, x, options).sum(axis=1)
    number = f"round({ratio} * {block_size})"
    if round(ratio * block_size) == 0:                              # at least one
        number = f"max(1, {number})"
    words = f"with mask_ratio {ratio} exactly {number} = {count} positions of every sequence are masked"
    low, high = counts.min(), counts.max()
    explain(not low < high, f"mlm: the number of masked positions varies, {low} to {high}: {words}")
    explain(low == count, f"mlm: {words}, not {low}")


def masks_of_steps(name, steps, B, **given):
    """(steps, B, T) bool: the positions that are hidden and predicted at each step of a run."""
    masks = []
    for step in range(steps):
        x, batch, options = distinct_batch(name, B, step, **given)
        masks.append(scored_positions(batch, x, options))
    return np.stack(masks)


@pytest.mark.exercise3
def test_mlm_draws_every_set_of_positions_equally_often():
    masks = masks_of_steps("mlm", steps=2500, B=4, block_size=6, mask_ratio=0.5)
    explain((masks.sum(axis=2) == 3).all(),
            "mlm: with mask_ratio 0.5 exactly 3 of 6 positions are masked")
    explain_uniform_sets(masks, "mlm")


def explain_recurring_tokens(name):
    for vocab_size in (50, 2, 1):
        options = make_options(name, vocab_size=vocab_size, mask_ratio=0.4)
        x = random_tokens(options, B=9)
        scored_positions(make(options, x, Draw(1, 2, range(9))), x, options)


def explain_masks_ignore_tokens(name, **given):
    """Windows of the tokens 0 0 0 1 1 2: no position must be masked more often than another."""
    options = make_options(name, block_size=6, vocab_size=3, **given)
    x = np.tile([0, 0, 0, 1, 1, 2, 0], (4, 1))[:, :window_size(options)]
    masks = []
    for step in range(600):
        batch = make(options, x, Draw(7, step, range(4)))
        masks.append(scored_positions(batch, x, options))
    masks = np.concatenate(masks)                                               # (2400, 6)
    names = [f"position {k + 1}" for k in range(6)]
    explain_uniform(masks.sum(axis=0), names,
                    f"{name}: which positions are masked depends on their tokens, here 0 0 0 1 1 2")


def bert_of(name):
    def make_bert(vocab_size, step):
        options = make_options(name, vocab_size=vocab_size, mask_ratio=0.5, block_size=32, corruption="bert",
                               mask_range=(0.25, 0.75))
        x = random_tokens(options, B=100, seed=step)
        batch = make(options, x, Draw(1, step, range(100)))
        return batch.inputs, x[:, :32], scored_positions(batch, x, options)
    return make_bert


@pytest.mark.exercise3
def test_mlm_on_text_in_which_tokens_recur():
    explain_recurring_tokens("mlm")
    explain_masks_ignore_tokens("mlm", mask_ratio=0.5)


@pytest.mark.exercise3
def test_mlm_bert_corruption():
    make_bert = bert_of("mlm")
    inputs, x, scored = make_bert(1000, step=0)
    counts = scored.sum(axis=1)
    explain((counts == 16).all(),
            "mlm, corruption bert: round(0.5 * 32) = 16 positions of every sequence are "
            f"scored, masked, replaced and unchanged ones, not {counts.min()} to {counts.max()}")
    explain_bert_shares(make_bert, "mlm")


@pytest.mark.exercise3
def test_mlm_normalization():
    for normalization, corruption in itertools.product(("tokens", "bound"), ("mask", "bert")):
        x, batch, options = distinct_batch("mlm", 10, normalization=normalization, corruption=corruption)
        scored_positions(batch, x, options)

# On a toy whose likelihood can be enumerated

TOY = make_options("vlm", block_size=3, vocab_size=2, mask_range=(1 / 3, 1.0))


def toy_model(seed):
    """nll(inputs row, position, token): -log of a random conditional distribution for every context."""
    rng = np.random.default_rng(seed)
    table = {}
    for context in itertools.product(range(3), repeat=3):
        table[context] = rng.dirichlet((1, 1), size=3)
    return lambda row, k, token: -math.log(table[tuple(int(v) for v in row)][k][token])


def toy_loss(nll, batch):
    losses = [nll(batch.inputs[p // 3], p % 3, t[0]) for p, t in zip(batch.positions, batch.targets)]
    return sum(w * l for w, l in zip(batch.weights.tolist(), losses)) / batch.weights.sum(dtype=float)


def all_masks(x, normalization):
    """The batch in which every count 1..T and every order of the positions occurs once."""
    masked = []
    for count in (1, 2, 3):
        for order in itertools.permutations(range(3)):
            masked.append([rank < count for rank in order])
    masked = np.array(masked)                                                   # (18, 3)
    rows = np.repeat(np.array([x]), len(masked), axis=0)
    return call_mask_batch(rows, masked, spare=2, vocab_size=2, normalization=normalization)[0]


def any_order_nll(nll, x):
    """-log P(x) in each of the 6 orders: tokens are revealed one by one."""
    values = []
    for order in itertools.permutations(range(3)):
        row, total = [TOY.mask_token] * 3, 0.0
        for k in order:
            total += nll(row, k, x[k])
            row[k] = x[k]
        values.append(total)
    return values


@pytest.mark.exercise3
@pytest.mark.parametrize("seed", range(3))
def test_bound_is_the_evidence_bound(seed):
    nll = toy_model(seed)
    for x in itertools.product((0, 1), repeat=3):
        loss, orders = toy_loss(nll, all_masks(x, "bound")), any_order_nll(nll, x)
        likelihood = sum(math.exp(-v) for v in orders) / 6                      # mean over orders
        explain(math.isclose(3 * loss, sum(orders) / 6, rel_tol=1e-5),
                "bound: T * loss must be the mean over all orders of the negative "
                "log-likelihood")
        explain(3 * loss >= -math.log(likelihood) - 1e-6,
                "bound: T * loss is below -log P(x): it bounds nothing")


@pytest.mark.exercise3
@pytest.mark.parametrize("seed", range(3))
def test_tokens_weighs_every_masked_token_the_same(seed):
    nll, x = toy_model(seed), (0, 1, 1)
    batch = all_masks(x, "tokens")
    terms = [nll(row, k, x[k]) for row in batch.inputs for k in range(3) if row[k] == TOY.mask_token]
    loss = toy_loss(nll, batch)
    explain(math.isclose(loss, sum(terms) / len(terms), rel_tol=1e-5),
            "tokens: the loss is the mean over all masked tokens")
    explain(abs(loss - toy_loss(nll, all_masks(x, "bound"))) > 1e-3,
            "tokens and bound must differ")

# -----------------------------------------------------------------------------
# Exercise 4: vlm

RANGE = (0.25, 0.75)        # 4 .. 12 of 16 positions


def vlm_counts(B, steps, mask_range=RANGE):
    """(steps, B) the number of masked positions of every sequence, at steps of a run."""
    counts = np.empty((steps, B), dtype=int)
    options = make_options("vlm", mask_range=mask_range)
    options.vocab_size = B * window_size(options) + 1
    x = distinct_tokens(B, window_size(options))
    for step in range(steps):
        batch = make(options, x, Draw(5, step, range(B)))
        counts[step] = scored_positions(batch, x, options).sum(axis=1)
    return counts


def rounded_ratio(mask_range):
    """Probability of each count when the ratio is uniform and ratio * T is rounded: less at the ends."""
    low, high = [ratio * T for ratio in mask_range]
    counts = np.arange(round(low), round(high) + 1)
    length = np.minimum(counts + 0.5, high) - np.maximum(counts - 0.5, low)
    return length / (high - low)


@pytest.mark.exercise4
@pytest.mark.parametrize("block_size,B,mask_range", [
    (16, 9, RANGE), (16, 1, (0.15, 1.0)), (5, 4, (0.2, 1.0))])
def test_vlm_hides_and_predicts_the_masked_positions(block_size, B, mask_range):
    for step in range(50):
        x, batch, options = distinct_batch("vlm", B, step, block_size=block_size, mask_range=mask_range)
        counts = scored_positions(batch, x, options).sum(axis=1)
        explain(counts.min() >= 1, "vlm: a sequence has no masked position")


@pytest.mark.exercise4
def test_vlm_draws_a_ratio_for_every_sequence():
    """8 sequences at 5 steps: all counts of a step agree, at every step, with probability below 1e-30."""
    counts = vlm_counts(B=8, steps=5)
    explain((counts != counts[0, 0]).any(),
            f"vlm: the number of masked positions is always {counts[0, 0]}: with mask_range "
            "0.25 0.75 it is uniform on 4..12")
    explain((counts != counts[:, :1]).any(),
            "vlm: all sequences of a batch share one mask ratio: every one draws its own")
    explain((counts != counts[:1]).any(),
            "vlm: the mask ratios are the same at every step: they must come from `draw`")


@pytest.mark.exercise4
def test_vlm_counts_lie_in_the_range():
    for mask_range, low, high in [(RANGE, 4, 12), ((0.15, 1.0), 2, 16), ((0.1, 0.78), 2, 12)]:
        counts = vlm_counts(B=4, steps=200, mask_range=mask_range)
        words = (f"mask_range {mask_range[0]} {mask_range[1]} of {T} positions is {low}..{high}, rounded to the "
                 "nearest")
        explain(counts.min() >= low,
                f"vlm: a sequence has {counts.min()} masked positions, but {words}")
        explain(counts.max() <= high,
                f"vlm: a sequence has {counts.max()} masked positions, but {words}")

        # Both ends occur
        if mask_range != RANGE:         # of a uniform ratio, 0.7 % are rounded to 2 of 16
            continue
        explain(counts.min() == low,
                f"vlm: the fewest masked positions of 800 sequences are {counts.min()}, but "
                f"{words}")
        explain(counts.max() == high,
                f"vlm: the most masked positions of 800 sequences are {counts.max()}, but "
                f"{words}")


@pytest.mark.exercise4
@pytest.mark.parametrize("B,steps,mask_range", [(1, 5000, RANGE), (4, 1500, RANGE), (1, 3000, (0.1, 1.0))])
def test_vlm_ratio_is_uniform(B, steps, mask_range):
    """A uniform count and a uniform ratio that is then rounded are both right. In 5,000 counts, a bias of
    15 % up at every other count is found, and one of 40 % at a single count; mild slopes from 30 % too few at
    one end to 30 % too many at the other are found as well.

    One sequence at a time: those of one step may be drawn to cover the range evenly.
    """
    counts = vlm_counts(B, steps, mask_range)
    for i, other in itertools.combinations(range(B), 2):
        explain((counts[:, i] != counts[:, other]).any(),
                f"vlm: sequences {i + 1} and {other + 1} of a batch always have the same number of masked positions: "
                "every one draws its own")
    low, high = [round(ratio * T) for ratio in mask_range]
    uniform = np.full(high - low + 1, 1 / (high - low + 1))
    for i in range(B):
        inside = counts[:, i].min() >= low and counts[:, i].max() <= high
        explain(inside, f"vlm: a count is outside {low}..{high}, the mask_range {mask_range}")
        seen = np.bincount(counts[:, i] - low, minlength=len(uniform))
        names = [f"a count of {count}" for count in range(low, high + 1)]
        explain(fits(seen, uniform, tests=B) or fits(seen, rounded_ratio(mask_range), tests=B),
                f"vlm: the mask ratio is not uniform on {mask_range[0]} .. {mask_range[1]}: "
                f"{extremes(seen, names)}")


@pytest.mark.exercise4
@pytest.mark.parametrize("ratio,count", [(0.15, 2), (0.4, 6), (1.0, 16), (0.02, 1)])
def test_vlm_with_one_ratio_masks_as_many_as_mlm(ratio, count):
    counts = vlm_counts(B=8, steps=5, mask_range=(ratio, ratio))
    explain((counts == count).all(),
            f"vlm with mask_range {ratio} {ratio} is mlm with mask_ratio {ratio}: {count} of "
            f"{T} positions, not {counts.min()} to {counts.max()}")


@pytest.mark.exercise4
def test_vlm_draws_every_set_of_positions_equally_often():
    masks = masks_of_steps("vlm", steps=2500, B=4, block_size=6, mask_range=(0.5, 0.5))
    explain((masks.sum(axis=2) == 3).all(),
            "vlm: with mask_range 0.5 0.5 exactly 3 of 6 positions are masked")
    explain_uniform_sets(masks, "vlm")

    # The same among the sequences of one count
    masks = masks_of_steps("vlm", steps=2500, B=4, block_size=6, mask_range=(1 / 3, 2 / 3))
    names = [f"position {k + 1}" for k in range(6)]
    for count in (2, 3, 4):
        rows = masks[masks.sum(axis=2) == count]
        explain_uniform(rows.sum(axis=0), names,
                        f"vlm: among sequences with {count} masked positions, the positions "
                        "are not masked equally often", tests=3)
        if count == 3:
            explain_equal_shares(rows, "vlm")


@pytest.mark.exercise4
def test_vlm_on_text_in_which_tokens_recur():
    explain_recurring_tokens("vlm")
    explain_masks_ignore_tokens("vlm", mask_range=(1 / 3, 2 / 3))


@pytest.mark.exercise4
def test_vlm_bert_corruption():
    make_bert = bert_of("vlm")
    inputs, x, scored = make_bert(1000, step=0)
    counts = scored.sum(axis=1)
    explain(counts.min() >= 8 and counts.max() <= 24,
            "vlm, corruption bert: 8..24 of 32 positions are scored, masked, replaced and "
            f"unchanged ones, not {counts.min()} to {counts.max()}")
    explain_bert_shares(make_bert, "vlm")


@pytest.mark.exercise4
def test_vlm_normalization():
    for normalization, corruption in itertools.product(("tokens", "bound"), ("mask", "bert")):
        x, batch, options = distinct_batch("vlm", 10, normalization=normalization, corruption=corruption,
                                           mask_range=(0.1, 1.0))
        scored_positions(batch, x, options)

# -----------------------------------------------------------------------------
# What holds for every objective of the table, a new one as well

EXERCISE = {"ar": pytest.mark.exercise1, "dar": pytest.mark.exercise2,
            "mlm": pytest.mark.exercise3, "vlm": pytest.mark.exercise4}
VARIANTS = {"dar": [{"lookahead": 3}, {"lookahead": 3, "dar_estimator": "expectation"}],
            "mlm": [{}, {"corruption": "bert"}, {"normalization": "bound"}],
            "vlm": [{}, {"corruption": "bert"}, {"normalization": "bound"}]}


def every_objective(graded):
    """Parameters (name, options given), with the marker of the exercise or of our own design."""
    parameters = []
    for name in OBJECTIVES:
        mark = EXERCISE.get(name, ()) if graded else pytest.mark.design
        for given in VARIANTS.get(name, [{}]):
            parameters.append(pytest.param(name, given, marks=mark))
    return pytest.mark.parametrize("name,given", parameters)


@every_objective(graded=True)
def test_a_model_can_be_trained_on_the_batch(name, given):
    options = make_options(name, **given)
    for B, step in [(5, 2), (1, 3)]:
        x = random_tokens(options, B, seed=step)
        make(options, x, Draw(1, step, range(B)))


@every_objective(graded=False)
def test_passes_the_check_before_training(name, given):
    check_objective(make_options(name, **given))
    check_objective(Options(objective=name, **given))


def same(a, b):
    return all(np.array_equal(p, q) for p, q in zip(a, b))


def slots_in_use(batch, block_size=T):
    """{(row, position): (target, weight)} of the slots in use."""
    positions, targets, weights = used_slots(batch)
    table = {}
    for position, target, weight in zip(positions, targets, weights):
        table[divmod(int(position), block_size)] = (target.tolist(), float(weight))
    assert len(table) == len(positions), "a position is scored twice"
    return table


@every_objective(graded=False)
def test_shapes_and_types(name, given):
    options = make_options(name, **given)
    batch = make(options, random_tokens(options, 5), Draw(1, 2, range(5)))
    check_batch(batch, options)
    if name in ("ar", "dar", "mlm", "vlm"):                 # a fifth one may choose its K, and int32
        K = options.lookahead if given.get("dar_estimator") == "expectation" else 1
        assert batch.targets.shape[1] == K
        assert {batch.inputs.dtype, batch.positions.dtype, batch.targets.dtype} == {np.dtype(np.int64)}


@every_objective(graded=False)
def test_does_not_depend_on_how_the_batch_is_cut(name, given):
    options = make_options(name, **given)
    x = random_tokens(options, 8)
    whole = make(options, x, Draw(1, 2, range(8)))
    for cut in (1, 3, 4):
        first = make(options, x[:cut], Draw(1, 2, range(cut)))
        second = make(options, x[cut:], Draw(1, 2, range(cut, 8)))
        message = f"inputs or scored positions change when the batch of 8 is cut after {cut}"
        assert np.array_equal(whole.inputs, np.concatenate((first.inputs, second.inputs))), message
        moved = {(row + cut, k): v for (row, k), v in slots_in_use(second).items()}
        assert slots_in_use(whole) == slots_in_use(first) | moved, message


@every_objective(graded=False)
def test_is_a_pure_function_of_seed_step_and_index(name, given):
    options = make_options(name, **given)
    x = np.repeat(np.arange(window_size(options))[None], 20, axis=0)            # equal rows
    batch = make(options, x, Draw(1, 2, range(20)))
    assert same(batch, make(options, x, Draw(1, 2, range(20)))), \
        "the same (seed, step, index) must give the same batch"
    rows = [{} for _ in range(20)]
    for (row, k), slot in slots_in_use(batch).items():
        rows[row][k] = slot

    # An objective draws nothing (all is the same), or draws for every seed, step and sequence
    draws = [not same(batch, make(options, x, Draw(1, 3, range(20)))),
             not same(batch, make(options, x, Draw(2, 2, range(20)))),
             any(row != rows[0] for row in rows)]
    assert all(draws) or not any(draws), \
        f"draws other numbers at [another step, another seed, another row]: {draws}"


def span(x, draw, options):
    """A fifth objective: one span of 4 neighbouring positions is masked."""
    start = (draw.per_sequence(1) * (options.block_size - 3)).astype(int)       # (B, 1)
    place = np.arange(options.block_size) - start                               # (B, T)
    return mask_batch(x, (place >= 0) & (place < 4), 4 * len(x), draw, options)


GENERIC = [test_a_model_can_be_trained_on_the_batch, test_passes_the_check_before_training,
           test_shapes_and_types, test_does_not_depend_on_how_the_batch_is_cut,
           test_is_a_pure_function_of_seed_step_and_index]


@pytest.mark.design
def test_a_fifth_objective_is_tested_once_it_is_in_the_table(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "span", Objective(span, causal=False, most_masks=lambda options: 4))
    marks = every_objective(graded=True).mark
    assert any(parameter.values == ("span", {}) for parameter in marks.args[1])
    check(make_options("span"))
    for test in GENERIC:
        test("span", {})

    def leaks(x, draw, options):
        batch = span(x, draw, options)
        return batch._replace(inputs=x[:, :options.block_size])

    monkeypatch.setitem(OBJECTIVES, "span", Objective(leaks, causal=False))
    with pytest.raises(WrongBatch, match="leak"):
        test_passes_the_check_before_training("span", {})

# -----------------------------------------------------------------------------
# A wrong Batch gets a sentence before the first step

def changed(**fields):
    """A function Batch -> Batch in which the named fields are replaced by function(field)."""
    return lambda batch: batch._replace(**{name: f(getattr(batch, name)) for name, f in fields.items()})


def put(value):
    """A function array -> the same with another first value."""
    def replaced(array):
        array = array.copy()
        array.flat[0] = value
        return array
    return replaced


@pytest.mark.parametrize("name,mistake,sentence", [
    ("ar", lambda batch: None, "ar must return a Batch(inputs, positions, targets, weights), not NoneType"),
    ("ar", lambda batch: batch[:3], "must return a Batch"),
    ("ar", changed(targets=np.ndarray.tolist), "targets must be a NumPy array, not list"),
    ("ar", changed(weights=lambda w: 1.0), "weights must be a NumPy array, not float"),
    ("ar", changed(inputs=lambda i: i.astype(float)), "inputs must be int64, not float64"),
    ("ar", changed(targets=lambda t: t.astype(np.uint16)), "targets must be int64, not uint16"),
    ("mlm", changed(positions=lambda p: p > 3), "positions must be int64, not bool"),
    ("mlm", changed(weights=lambda w: w.astype(float)), "weights must be float32, not float64"),
    ("ar", changed(inputs=lambda i: i[:, 1:]), "inputs must be (B, T) with T = 16, not (3, 15)"),
    ("ar", changed(inputs=np.ravel), "inputs must be (B, T)"),
    ("ar", changed(positions=lambda p: p.reshape(3, 16)), "positions must be (N,), not (3, 16)"),
    ("ar", changed(targets=np.ravel), "targets must be (N, K) with N = 48 as in positions, not (48,)"),
    ("ar", changed(targets=lambda t: t[1:]), "targets must be (N, K)"),
    ("ar", changed(weights=lambda w: w[:, None]), "weights must be (N,) with N = 48"),
    ("ar", lambda batch: Batch(batch.inputs, *[field[:0] for field in batch[1:]]), "no position is scored"),
    ("mlm", changed(inputs=put(51)), "inputs hold the id 51: ids are 0 .. 50, of which 50 is the mask token"),
    ("mlm", changed(targets=put(50)), "a target is the mask token, 50"),
    ("mlm", changed(targets=put(-100)), "a target is -100"),
    ("mlm", changed(targets=put(77)), "a target is 77"),
    ("mlm", changed(positions=put(48)), "positions hold 48: they index the flattened inputs"),
    ("mlm", changed(positions=put(-1)), "positions hold -1"),
    ("mlm", changed(weights=put(np.nan)), "a weight is not finite"),
    ("mlm", changed(weights=put(-1)), "a weight is negative"),
    ("mlm", changed(weights=np.zeros_like), "all weights are 0"),
    ("mlm", changed(positions=lambda p: p * 0 + 20), "position 5 of sequence 2 is scored")])
def test_a_wrong_batch_gets_a_sentence(name, mistake, sentence):
    options = make_options(name)
    batch = OBJECTIVES[name].batch(random_tokens(options, 3), Draw(0, 0, range(3)), options)
    check_batch(batch, options)
    with pytest.raises(WrongBatch) as error:
        check_batch(mistake(batch), options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_batch_may_be_a_tuple_of_tensors_or_of_int32():
    options = make_options("mlm")
    batch = OBJECTIVES["mlm"].batch(random_tokens(options, 3), Draw(0, 0, range(3)), options)
    check_batch([torch.from_numpy(field) for field in batch], options)
    narrow = changed(targets=lambda t: t.astype(np.int32), inputs=lambda i: i.astype(np.int32))
    check_batch(narrow(batch), options)


def looks_back(x, draw, options):
    batch = objectives.ar(x, draw, options)
    return batch._replace(targets=put(x[0, 0])(batch.targets))


def writes_into_windows(x, draw, options):
    batch = objectives.ar(x.copy(), draw, options)
    x[0, 0] = 0
    x[0, 1] = 0
    return batch


def shows_one(x, draw, options):
    batch = objectives.mlm(x, draw, options)
    inputs = batch.inputs.copy()
    inputs.flat[batch.positions[0]] = batch.targets[0, 0]
    return batch._replace(inputs=inputs)


def scores_twice(x, draw, options):
    batch = objectives.ar(x, draw, options)
    positions, targets = batch.positions.copy(), batch.targets.copy()
    positions[1] = positions[0]
    targets[1] = targets[0]
    return batch._replace(positions=positions, targets=targets)


def slots_as_needed(x, draw, options):
    batch = objectives.vlm(x, draw, options)
    used = batch.weights > 0
    return Batch(batch.inputs, *[field[used] for field in batch[1:]])


@pytest.mark.parametrize("name,function,sentence", [
    ("ar", looks_back, "the target of position 1 is a token that the model sees under causal attention"),
    ("ar", writes_into_windows, "ar changes the windows"),
    ("ar", scores_twice, "a position is scored twice on the same target"),
    ("mlm", shows_one, "is a token that the model sees under bidirectional attention"),
    ("vlm", slots_as_needed, "the number of scored positions, N, changes from"),
    ("vlm", lambda x, draw, options: None, "must return a Batch")])
def test_a_wrong_objective_gets_a_sentence(monkeypatch, name, function, sentence):
    monkeypatch.setitem(OBJECTIVES, name, OBJECTIVES[name]._replace(batch=function))
    with pytest.raises(WrongBatch) as error:
        check_objective(make_options(name))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("most_masks,sentence", [
    (lambda options: None, "inputs hold masks: .* such as most_masks=lambda options: 4"),
    (lambda options: 3, "a sequence has 4 masks, but most_masks in OBJECTIVES says 3 at most")])
def test_the_most_masks_are_told_where_the_table_does_not_hold_them(monkeypatch, most_masks, sentence):
    monkeypatch.setitem(OBJECTIVES, "span", Objective(span, causal=False, most_masks=most_masks))
    with pytest.raises(WrongBatch, match=sentence):
        check_objective(make_options("span"))


def test_targets_that_reach_farther_than_the_window_are_told(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "dar", OBJECTIVES["dar"]._replace(ahead=lambda options: 1))
    with pytest.raises(WrongBatch, match="as far beyond them as `ahead` says"):
        check_objective(make_options("dar", lookahead=3, dar_estimator="expectation"))


def test_an_index_beyond_the_window_is_told_how_long_it_is(monkeypatch):
    def two_ahead(x, draw, options):
        T = options.block_size
        targets = np.take_along_axis(x, np.arange(2, T + 2)[None], axis=1)
        return objectives.score_every_position(x[:, :T], targets[:, :, None])

    monkeypatch.setitem(OBJECTIVES, "skip", Objective(two_ahead, causal=True))
    for check_it in (check_objective, objectives.never_read):
        with pytest.raises(IndexError, match="out of bounds.* A window has 16 \\+ 1 tokens: .* `ahead` in OBJECTIVES"):
            check_it(make_options("skip"))


@pytest.mark.parametrize("entry", [dict(ahead=2), dict(most_masks=19), dict(batch=None)])
def test_an_entry_that_is_no_function_is_told(monkeypatch, entry):
    monkeypatch.setitem(OBJECTIVES, "span", Objective(span, causal=False)._replace(**entry))
    [(name, value)] = entry.items()
    with pytest.raises(ValueError, match=f"{name} of span in OBJECTIVES must be a function, .* not {value}"):
        check(make_options("span"))


@pytest.mark.parametrize("name,given,unused", [
    ("ar", dict(lookahead=4, mask_ratio=0.3), ["lookahead", "mask_ratio"]),
    ("dar", dict(lookahead=4, dar_estimator="expectation"), []), ("dar", dict(corruption="bert"), ["corruption"]),
    ("mlm", dict(mask_ratio=0.3, corruption="bert", normalization="bound"), []),
    ("mlm", dict(mask_range=[0.4, 0.6]), ["mask_range"]),
    ("vlm", dict(mask_range=[0.4, 0.6], normalization="bound"), []),
    ("vlm", dict(mask_range=[0.15, 1.0], mask_ratio=0.3), ["mask_ratio"])])
def test_settings_without_effect_are_found(name, given, unused):
    never_read = objectives.never_read(make_options(name, **given))
    assert [setting for setting in given if setting in never_read] == unused


def test_an_objective_may_be_written_with_replace(monkeypatch):
    """vlm as mlm with another ratio: its settings count as read."""
    def by_mlm(x, draw, options):
        return objectives.mlm(x, draw, replace(options, mask_ratio=options.mask_range[1]))

    monkeypatch.setitem(OBJECTIVES, "vlm", OBJECTIVES["vlm"]._replace(batch=by_mlm))
    assert objectives.never_read(make_options("vlm", mask_range=(0.4, 0.4))) == []


def test_a_leak_is_told_with_any_options(monkeypatch):
    """BERT's corruption shows some targets on purpose. That excuses no other leak."""
    monkeypatch.setitem(OBJECTIVES, "mlm", OBJECTIVES["mlm"]._replace(batch=shows_one))
    with pytest.raises(WrongBatch, match="leak"):
        check_objective(make_options("mlm", corruption="bert"))

# -----------------------------------------------------------------------------
# Our own choices: one set of slots, a lattice, random numbers that a cut of the batch does not change

@pytest.mark.design
@pytest.mark.parametrize("estimator", ["sample", "expectation"])
def test_dar_with_lookahead_1_is_ar(estimator):
    options = make_options("dar", lookahead=1, dar_estimator=estimator)
    x = random_tokens(options, 4)
    assert same(make(options, x, Draw(1, 2, range(4))), make(make_options("ar"), x, Draw(1, 2, range(4))))


class FixedDraw:
    """Stands in for Draw where a test enumerates the random numbers: the same (B, n) at each request."""
    def __init__(self, numbers):
        self.numbers = np.asarray(numbers, dtype=float)
        self.indices = np.arange(len(self.numbers), dtype=np.uint64)
        self.offset = np.uint64(0)

    def per_sequence(self, n):
        return self.numbers


@pytest.mark.design
def test_dar_expectation_is_the_mean_of_the_samples_in_loss_and_gradient():
    torch.manual_seed(0)
    t = 3
    config = Config(vocab_size=50, block_size=T, n_layer=1, n_head=2, n_embd=16, causal=True)
    model = Transformer(config).double()
    model.dtype = torch.float64
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = random_tokens(make_options("dar", lookahead=t), 2)

    def loss_and_gradient(estimator, draw):
        batch = make(make_options("dar", lookahead=t, dar_estimator=estimator), x, draw)
        loss = model(*(torch.from_numpy(a) for a in batch))
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    samples = [loss_and_gradient("sample", FixedDraw(np.full((2, T), (s + 0.5) / t))) for s in range(t)]
    loss, gradient = loss_and_gradient("expectation", Draw(0, 0, range(2)))
    assert loss == pytest.approx(sum(l for l, _ in samples) / t, rel=1e-5)
    mean = sum(g for _, g in samples) / t
    assert (gradient - mean).norm() < 1e-5 * mean.norm()


@pytest.mark.design
def test_vlm_with_equal_range_is_mlm_bit_by_bit():
    for r in (0.15, 0.5, 1.0):
        for given in ({}, {"corruption": "bert"}, {"normalization": "bound"}):
            options = make_options("vlm", mask_range=(r, r), **given)
            x = random_tokens(options, 8)
            other = make(make_options("mlm", mask_ratio=r, **given), x, Draw(1, 2, range(8)))
            assert same(make(options, x, Draw(1, 2, range(8))), other)


@pytest.mark.design
def test_a_low_ratio_masks_at_least_one_position():
    x, batch, options = distinct_batch("mlm", 5, mask_ratio=0.01)
    assert (scored_positions(batch, x, options).sum(axis=1) == 1).all()


@pytest.mark.design
def test_mask_batch_fills_the_slots_and_weighs_them_the_same_in_every_batch():
    options = make_options("mlm", block_size=4)
    x = np.array([[5, 6, 7, 8]])
    batch = mask_batch(x, np.array([[False, True, False, True]]), 3, Draw(0, 0, range(1)), options)
    assert batch.inputs.tolist() == [[5, 50, 7, 50]] and batch.positions.tolist() == [1, 3, 0]
    assert batch.targets.tolist() == [[6], [8], [5]] and batch.weights.tolist() == [1, 1, 0]
    options.normalization = "bound"
    batch = mask_batch(x, np.array([[False, True, False, True]]), 3, Draw(0, 0, range(1)), options)
    assert batch.weights.tolist() == [0.5, 0.5, 0]
    with pytest.raises(ValueError, match="2 masked tokens do not fit 1 slots"):
        mask_batch(x, np.array([[False, True, False, True]]), 1, Draw(0, 0, range(1)), options)


@pytest.mark.design
def test_vlm_covers_the_range_evenly_within_a_batch():
    options = make_options("vlm", mask_range=(0.0625, 1.0))                     # 1 .. 16 of 16
    for step in range(20):
        batch = make(options, random_tokens(options, 32), Draw(5, step, range(64, 96)))
        occurs = np.bincount((batch.inputs == options.mask_token).sum(axis=1), minlength=17)[1:]
        assert occurs.min() >= 1 and occurs.max() <= 4


@pytest.mark.design
def test_lattice_is_the_golden_ratio_in_exact_arithmetic():
    golden = (math.isqrt(5 << 128) - (1 << 64)) // 2                            # 2**64 (sqrt(5) - 1) / 2
    assert abs(int(GOLDEN) - golden) <= 1
    rng = np.random.default_rng(0)
    for levels in (1, 2, 110, 1025):
        offset, i = rng.integers(2**64, dtype=np.uint64), rng.integers(2**40, size=300)
        expected = [(int(offset) + int(k) * int(GOLDEN)) % 2**64 * levels >> 64 for k in i]
        assert spread(offset, i, levels).tolist() == expected


@pytest.mark.design
@pytest.mark.parametrize("low,high", [(1, 1), (3, 8), (1, 9), (2, 16)])
@pytest.mark.parametrize("n", [1, 2, 7, 13])
def test_most_masked_is_exact(low, high, n):
    """The sum of the counts only changes where a lattice point crosses a level:
    try every such offset, for any start.
    """
    levels, worst = high - low + 1, 0
    for start in (0, 5, 1000003):
        i = np.arange(start, start + n, dtype=np.uint64)
        for k in range(1, levels + 1):
            for j in i:
                for shift in (-2**33, -1, 0, 2**33):
                    offset = (k * 2**64 // levels + shift - int(j) * int(GOLDEN)) % 2**64
                    worst = max(worst, n * low + int(spread(offset, i, levels).sum()))
        for offset in np.random.default_rng(n).integers(2**64, size=50, dtype=np.uint64):
            worst = max(worst, n * low + int(spread(offset, i, levels).sum()))
    assert worst <= most_masked(low, high, n), "most_masked is exceeded: masked tokens would be lost"
    assert worst == most_masked(low, high, n), "most_masked is not attained: slots are wasted at every step"


@pytest.mark.design
@pytest.mark.parametrize("normalization", ["tokens", "bound"])
def test_vlm_loses_no_masked_position_and_keeps_its_shapes(normalization):
    options = make_options("vlm", mask_range=(0.0625, 1.0), normalization=normalization)
    slots = most_masked(1, 16, 5)
    for step in range(200):
        batch = make(options, random_tokens(options, 5), Draw(1, step, range(step, step + 5)))
        assert len(batch.positions) == slots, "the number of slots must be the same at every step"
        masked = np.flatnonzero(batch.inputs.ravel() == options.mask_token)
        assert np.array_equal(np.sort(batch.positions[batch.weights > 0]), masked)


@pytest.mark.design
def test_vlm_refuses_sequences_that_are_not_consecutive():
    """The buffer is sized for consecutive sequences; others could lose masked tokens,
    and must not do so silently.
    """
    options, refused = make_options("vlm"), 0
    for step in range(300):
        draw = Draw(0, step, [0, 55, 144, 233, 377, 610])
        try:
            batch = OBJECTIVES["vlm"].batch(random_tokens(options, 6), draw, options)
        except ValueError:
            refused += 1
        else:
            assert (batch.weights > 0).sum() == (batch.inputs == options.mask_token).sum()
    assert refused

# -----------------------------------------------------------------------------
# Options

@pytest.mark.parametrize("given,word", [
    ({"name": "xlnet"}, "objective"), ({"block_size": 0}, "block_size"), ({"lookahead": 0}, "lookahead"),
    ({"mask_ratio": 0}, "mask_ratio"), ({"mask_ratio": 1.1}, "mask_ratio"),
    ({"mask_ratio": math.nan}, "mask_ratio"),
    ({"mask_range": (0, 1)}, "mask_range"), ({"mask_range": (0.5, 1.5)}, "mask_range"),
    ({"mask_range": (0.6, 0.5)}, "mask_range"), ({"mask_range": (math.nan, 1)}, "mask_range"),
    ({"lookahead": 1.5}, "lookahead"), ({"dar_estimator": "mean"}, "dar_estimator"),
    ({"corruption": "x"}, "corruption"), ({"normalization": "x"}, "normalization")])
def test_check_refuses(given, word):
    with pytest.raises(ValueError, match=word) as error:
        check(make_options(**{"name": "vlm", **given}))
    assert "\n" not in str(error.value)


def test_check_accepts():
    for name in OBJECTIVES:
        for given in VARIANTS.get(name, [{}]):
            check(make_options(name, **given))
    check(make_options("mlm", mask_ratio=1.0, mask_range=(1.0, 1.0), lookahead=1, block_size=1))


def test_window_size():
    sizes = [window_size(make_options(name, lookahead=4)) for name in ("ar", "dar", "mlm", "vlm")]
    assert sizes == [17, 20, 17, 17]


@pytest.mark.design
def test_options_may_be_an_argparse_namespace():
    options = make_options("vlm")
    namespace = SimpleNamespace(**{**vars(options), "mask_token": 50})
    x = random_tokens(options, 3)
    assert same(make(namespace, x, Draw(0, 0, range(3))), make(options, x, Draw(0, 0, range(3))))
