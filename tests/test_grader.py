"""
The grader is graded: right solutions of exercises 1 to 4, however written, pass; wrong ones fail, each with
words that name the mistake.

    python -m pytest tests/test_grader.py       # three minutes

A solution is a function that stands in for one of objectives.py. The exercise's tests then run as
`python -m pytest -x -m exerciseN` would run them.
"""
import ast
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import objectives
from conftest import in_words
from objectives import OBJECTIVES, Batch, mask_count

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
REFERENCE = vars(objectives).copy()


class Failures:
    """A pytest plugin that keeps the words of every failure."""
    def __init__(self):
        self.words = []
        self.passed = 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.words.append(in_words(report))
        elif report.when == "call":
            self.passed += 1


def grade(monkeypatch, number, functions, first_only=True):
    """Failures of the tests of one exercise, with the functions {name: function} in objectives.py."""
    for name, function in functions.items():
        monkeypatch.setattr(objectives, name, function)
        if name in OBJECTIVES:
            monkeypatch.setitem(OBJECTIVES, name, OBJECTIVES[name]._replace(batch=function))
    failures = Failures()
    arguments = ["-m", f"exercise{number}", "-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
    if first_only:
        arguments.append("-x")
    if "uniform_masks" not in functions:        # its tests take longest and call nothing else
        arguments += ["-k", "not uniform_masks"]
    code = pytest.main([*arguments, str(ROOT / "tests" / "test_objectives.py")], plugins=[failures])
    assert code == bool(failures.words)
    return failures


RIGHT = []      # (exercise, function to replace, solution)
WRONG = []      # (exercise, function to replace, solution, words of the first failure)


def right(number, name):
    def enter(solution):
        RIGHT.append(pytest.param(number, name, solution, id=f"{name}-{solution.__name__}"))
        return solution
    return enter


def wrong(number, name, words):
    def enter(solution):
        WRONG.append(pytest.param(number, name, solution, words, id=f"{name}-{solution.__name__}"))
        return solution
    return enter


def ones(n):
    return np.ones(n, dtype=np.float32)

# -----------------------------------------------------------------------------
# Exercise 1: right

@right(1, "ar")
def ar_loops(x, draw, options):
    inputs, positions, targets = [], [], []
    for b, row in enumerate(x):
        inputs.append([row[k] for k in range(options.block_size)])
        for k in range(options.block_size):
            positions.append(b * options.block_size + k)
            targets.append([row[k + 1]])
    return Batch(np.array(inputs), np.array(positions), np.array(targets), ones(len(positions)))


@right(1, "ar")
def ar_shuffled_in_int32_as_a_tuple(x, draw, options):
    order = np.random.permutation(len(x) * options.block_size).astype(np.int32)
    targets = x[:, 1:].astype(np.int32).ravel()[order]
    return x[:, :-1].astype(np.int32), order, targets[:, None], ones(len(order))


@right(1, "ar")
def ar_tensors(x, draw, options):
    tokens = torch.from_numpy(x)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1, 1)
    return Batch(inputs, torch.arange(targets.shape[0]), targets, torch.ones(targets.shape[0]))


@right(1, "ar")
def ar_column_by_column_with_unused_slots(x, draw, options):
    B, T = len(x), options.block_size
    positions = np.arange(B * T).reshape(B, T).T.ravel()
    targets = np.concatenate([x[:, k + 1] for k in range(T)])
    unused = np.zeros(3, dtype=np.int64)
    return Batch(x[:, :T], np.concatenate((positions, unused)), np.concatenate((targets, unused))[:, None],
                 np.concatenate((2 * ones(B * T), 0 * ones(3))))


@right(1, "ar")
def ar_is_dar_with_lookahead_1(x, draw, options):
    return objectives.dar(x, draw, objectives.replace(options, lookahead=1))


@right(1, "ar")
def ar_from_lists_in_reverse_order(x, draw, options):
    pairs = [(row[:-1], row[1:]) for row in x.tolist()]
    inputs = np.array([before for before, after in pairs])
    targets = np.array([after for before, after in pairs]).reshape(-1, 1)
    positions = np.arange(len(targets), dtype=np.int32)
    return Batch(inputs, positions[::-1], targets[::-1], 0.5 * ones(len(targets)))


@right(1, "ar")
def ar_with_the_same_target_twice(x, draw, options):
    batch = REFERENCE["ar"](x, draw, options)
    return batch._replace(targets=np.repeat(batch.targets, 2, axis=1))

# -----------------------------------------------------------------------------
# Exercise 1: wrong

def causal(inputs, targets):
    return Batch(inputs, np.arange(targets.size), targets.reshape(-1, 1), ones(targets.size))


@wrong(1, "ar", "every target is the token at its own position, which the model sees")
def ar_predicts_its_input(x, draw, options):
    return causal(x[:, :-1], x[:, :-1])


@wrong(1, "ar", "which the model sees: offset -")
def ar_predicts_the_last_token(x, draw, options):
    return causal(x[:, :-1], np.roll(x[:, :-1], 1, axis=1))


@wrong(1, "ar", "3 tokens ahead")
def ar_two_too_far(x, draw, options):
    if options.block_size < 4:
        return REFERENCE["ar"](x, draw, options)
    targets = np.concatenate((x[:, 3:], x[:, -1:], x[:, -1:]), axis=1)
    return causal(x[:, :-1], targets)


@wrong(1, "ar", "which the model sees")
def ar_rolls_around(x, draw, options):
    return causal(x[:, :-1], np.roll(x[:, :-1], -1, axis=1))


@wrong(1, "ar", "the inputs must be the first T tokens")
def ar_shifts_the_inputs(x, draw, options):
    return causal(x[:, 1:], x[:, 1:])


@wrong(1, "ar", "inputs must be (B, T) with T = 16, not (3, 17)")
def ar_inputs_too_long(x, draw, options):
    return causal(x, x[:, 1:])


@wrong(1, "ar", "targets must be (N, K)")
def ar_flat_targets(x, draw, options):
    return REFERENCE["ar"](x, draw, options)._replace(targets=x[:, 1:].ravel())


@wrong(1, "ar", "every position must be scored, but position 1 of sequence 1 is not")
def ar_scores_the_last_only(x, draw, options):
    batch = REFERENCE["ar"](x, draw, options)
    weights = np.zeros(x[:, 1:].shape, dtype=np.float32)
    weights[:, -1] = 1
    return batch._replace(weights=weights.ravel())


@wrong(1, "ar", "token 0 are not scored: 0 is a token like any other")
def ar_drops_token_0(x, draw, options):
    batch = REFERENCE["ar"](x, draw, options)
    return batch._replace(weights=(batch.targets[:, 0] > 0).astype(np.float32))


@wrong(1, "ar", "all positions must have the same weight")
def ar_weighs_late_positions_more(x, draw, options):
    batch = REFERENCE["ar"](x, draw, options)
    return batch._replace(weights=1 + (batch.positions % options.block_size).astype(np.float32))


@wrong(1, "ar", "changes the token windows")
def ar_in_place(x, draw, options):
    batch = REFERENCE["ar"](x.copy(), draw, options)
    x[:, :-1] = x[:, 1:].copy()
    return batch


@wrong(1, "ar", "a target comes from another sequence")
def ar_flattens_first(x, draw, options):
    T = options.block_size
    rolled = np.roll(x[:, :T].ravel(), -1).reshape(-1, T)
    return causal(x[:, :T], rolled)


@wrong(1, "ar", "weights must be float32, not float64")
def ar_float64(x, draw, options):
    return REFERENCE["ar"](x, draw, options)._replace(weights=np.ones(x[:, 1:].size))


@wrong(1, "ar", "ar returns nothing (None)")
def ar_returns_nothing(x, draw, options):
    pass


@wrong(1, "ar", "ar_misspelt raises AttributeError")
def ar_misspelt(x, draw, options):
    return causal(x[:, :options.blocksize], x[:, 1:])


@wrong(1, "ar", "positions count on from sequence to sequence: b*T + k")
def ar_positions_begin_at_0_in_every_row(x, draw, options):
    T = options.block_size
    return REFERENCE["ar"](x, draw, options)._replace(positions=np.tile(np.arange(T), len(x)))


@wrong(1, "ar", "every position must be scored, but position 16 of sequence 1 is not")
def ar_without_the_last_position(x, draw, options):
    batch = REFERENCE["ar"](x, draw, options)
    kept = batch.positions % options.block_size < max(1, options.block_size - 1)
    return Batch(batch.inputs, *[field[kept] for field in batch[1:]])


@wrong(1, "ar", "inputs must be a NumPy array, not list")
def ar_lists(x, draw, options):
    return Batch(*[field.tolist() for field in REFERENCE["ar"](x, draw, options)])

# -----------------------------------------------------------------------------
# Exercise 2: right. `expectation` is the reference's where a solution only has another sample

def with_offsets(s, x, options):
    """The Batch in which position k of row b predicts x[b, k + s[b, k]]."""
    T = options.block_size
    place = np.arange(T) + s
    return causal(x[:, :T], np.take_along_axis(x, place, axis=1))


def is_sample(options):
    return options.dar_estimator == "sample"


@right(2, "dar")
def dar_loops(x, draw, options):
    T, t = options.block_size, options.lookahead
    rng = np.random.default_rng()
    positions, targets = [], []
    for b in range(len(x)):
        for k in range(T):
            positions.append(b * T + k)
            if is_sample(options):
                targets.append([x[b, k + rng.integers(1, t + 1)]])
            else:
                targets.append([x[b, k + s] for s in range(t, 0, -1)])
    return Batch(x[:, :T], np.array(positions), np.array(targets), ones(len(positions)))


@right(2, "dar")
def dar_random_numbers_from_the_step(x, draw, options):
    T, t = options.block_size, options.lookahead
    rng = np.random.default_rng(int(draw.offset))
    if not is_sample(options):
        return REFERENCE["dar"](x, draw, options)
    return with_offsets(rng.choice(np.arange(1, t + 1), size=(len(x), T)), x, options)


@right(2, "dar")
def dar_ceiling_of_a_uniform(x, draw, options):
    draw.per_sequence(3)
    s = np.ceil((1 - draw.per_sequence(options.block_size)) * options.lookahead).astype(np.int64)
    return with_offsets(s, x, options) if is_sample(options) else REFERENCE["dar"](x, draw, options)


@right(2, "dar")
def dar_torch(x, draw, options):
    T, t = options.block_size, options.lookahead
    ahead = torch.from_numpy(x).unfold(1, t, 1)[:, 1:]                      # (B, T, t)
    if is_sample(options):
        ahead = ahead.gather(2, torch.randint(t, (len(x), T, 1)))
    targets = ahead.reshape(len(x) * T, -1)
    return Batch(torch.from_numpy(x[:, :T]), torch.arange(len(targets)), targets, torch.ones(len(targets)))


@right(2, "dar")
def dar_one_slot_per_alternative(x, draw, options):
    T, t = options.block_size, options.lookahead
    if is_sample(options):
        return REFERENCE["dar"](x, draw, options)
    positions = np.tile(np.arange(len(x) * T), t)
    targets = np.concatenate([x[:, s:T + s].ravel() for s in range(1, t + 1)])
    return Batch(x[:, :T], positions, targets[:, None], ones(len(positions)) / np.float32(t))


@right(2, "dar")
def dar_offset_by_offset(x, draw, options):
    T, t = options.block_size, options.lookahead
    if not is_sample(options):
        return REFERENCE["dar"](x, draw, options)
    u = draw.per_sequence(T)
    parts = []
    for s in range(1, t + 1):
        row, k = np.nonzero((u >= (s - 1) / t) & (u < s / t))
        parts.append((row * T + k, x[row, k + s]))
    positions, targets = [np.concatenate(part) for part in zip(*parts)]
    return Batch(x[:, :T], positions, targets[:, None], ones(len(positions)))


@right(2, "dar")
def dar_every_offset_equally_often(x, draw, options):
    """Offsets 1..t in turn, in random order over the sequence: what is left over is drawn as well."""
    T, t = options.block_size, options.lookahead
    if not is_sample(options):
        return REFERENCE["dar"](x, draw, options)
    start = (draw.per_sequence(1) * t).astype(int)
    order = draw.per_sequence(T).argsort(axis=1)
    return with_offsets((order + start) % t + 1, x, options)


@right(2, "dar")
def dar_generator_of_each_sequence(x, draw, options):
    seeds = [[int(draw.offset), int(index)] for index in draw.indices]
    s = np.stack([np.random.default_rng(seed).integers(1, options.lookahead, options.block_size, endpoint=True)
                  for seed in seeds])
    return with_offsets(s, x, options) if is_sample(options) else REFERENCE["dar"](x, draw, options)


@right(2, "dar")
def dar_largest_of_t_numbers(x, draw, options):
    T, t = options.block_size, options.lookahead
    s = 1 + draw.per_sequence(T * t).reshape(len(x), T, t).argmax(axis=2)
    return with_offsets(s, x, options) if is_sample(options) else REFERENCE["dar"](x, draw, options)


@right(2, "dar")
def dar_shuffled_alternatives(x, draw, options):
    """All next tokens in random order: of these the first, or all."""
    T, t = options.block_size, options.lookahead
    rng = random.Random(int(draw.offset))
    targets = []
    for row in x.tolist():
        for k in range(T):
            following = row[k + 1:k + 1 + t]
            rng.shuffle(following)
            targets.append(following[:1] if is_sample(options) else following)
    return Batch(x[:, :T].astype(np.int32), np.arange(len(x) * T), np.array(targets), ones(len(targets)))

# -----------------------------------------------------------------------------
# Exercise 2: wrong

def wrong_sample(words):
    """For functions (x, draw, options) -> (B, T) offsets."""
    def enter(offsets):
        def dar(x, draw, options):
            if not is_sample(options):
                return REFERENCE["dar"](x, draw, options)
            s = np.broadcast_to(offsets(x, draw, options), (len(x), options.block_size))
            return with_offsets(s, x, options)
        dar.__name__ = offsets.__name__
        return wrong(2, "dar", words)(dar)
    return enter


@wrong_sample("which the model sees")
def dar_offsets_from_0(x, draw, options):
    return (draw.per_sequence(options.block_size) * options.lookahead).astype(int)


@wrong_sample("no target can lie farther ahead than 3")
def dar_offsets_to_t_plus_1(x, draw, options):
    return 1 + (draw.per_sequence(options.block_size) * (options.lookahead + 1)).astype(int)


@wrong_sample("with lookahead 2, offset 2 is never drawn")
def dar_offsets_below_t(x, draw, options):
    return 1 + (draw.per_sequence(options.block_size) * max(1, options.lookahead - 1)).astype(int)


@wrong_sample("all positions of a sequence share one offset")
def dar_one_offset_per_row(x, draw, options):
    return 1 + (draw.per_sequence(1) * options.lookahead).astype(int)


@wrong_sample("all positions of the batch have the same offset")
def dar_one_offset_per_batch(x, draw, options):
    return 1 + int(draw.offset) % options.lookahead


@wrong_sample("all sequences of a batch share the same offsets")
def dar_same_offsets_in_every_row(x, draw, options):
    return 1 + (draw.per_sequence(options.block_size)[:1] * options.lookahead).astype(int)


@wrong_sample("the same at every step")
def dar_same_offsets_at_every_step(x, draw, options):
    return np.random.default_rng(0).integers(1, options.lookahead + 1, size=(len(x), options.block_size))


@wrong_sample("are not equally frequent")
def dar_near_offsets_are_more_frequent(x, draw, options):
    return 1 + (draw.per_sequence(options.block_size) ** 1.5 * options.lookahead).astype(int)


@wrong_sample("are not equally frequent")
def dar_first_offset_10_percent_too_frequent(x, draw, options):
    u = draw.per_sequence(options.block_size)
    t = options.lookahead
    return np.where(u < 1.1 / t, 1, np.minimum(t, 2 + (u * (t - 1)).astype(int)))


@wrong_sample("are not equally frequent")
def dar_offsets_rounded(x, draw, options):
    return 1 + np.rint(draw.per_sequence(options.block_size) * (options.lookahead - 1)).astype(int)


@wrong_sample("sequences 1 and 3 of a batch have the same offset at 100 %")
def dar_halves_of_the_batch_share_offsets(x, draw, options):
    u = draw.per_sequence(options.block_size)
    half = len(u) // 2
    u = np.concatenate((u[:len(u) - half], u[:half]))
    return 1 + (u * options.lookahead).astype(int)


@wrong_sample("positions 1 and 9 have the same offset in 0 %")
def dar_halves_of_the_window_are_opposite(x, draw, options):
    u = draw.per_sequence(options.block_size)
    half = u.shape[1] // 2
    u = np.concatenate((u[:, :u.shape[1] - half], 1 - u[:, :half]), axis=1)
    return np.minimum(options.lookahead, 1 + (u * options.lookahead).astype(int))


@wrong_sample("positions 1 and 2 have the same offset in 100 %")
def dar_pairs_of_positions_share_an_offset(x, draw, options):
    s = 1 + (draw.per_sequence(options.block_size) * options.lookahead).astype(int)
    s[:, 1::2] = s[:, 0::2][:, :s[:, 1::2].shape[1]]
    return s


@wrong_sample("all positions of the batch have the same offset, 3")
def dar_always_the_farthest(x, draw, options):
    return options.lookahead


@wrong_sample("all sequences of a batch share the same offsets")
def dar_offsets_in_turn(x, draw, options):
    return 1 + np.arange(options.block_size) % options.lookahead


@wrong_sample("are not equally frequent")
def dar_offsets_end_with_the_window(x, draw, options):
    T = options.block_size
    s = 1 + (draw.per_sequence(T) * options.lookahead).astype(int)
    return np.minimum(s, np.maximum(1, T - np.arange(T)))


@wrong(2, "dar", "all positions of the batch have the same offset, 1")
def dar_is_ar(x, draw, options):
    return REFERENCE["ar"](x[:, :options.block_size + 1], draw, options)


@wrong(2, "dar", "one offset is drawn per position, but a position has several")
def dar_sample_is_expectation(x, draw, options):
    return REFERENCE["dar"](x, draw, objectives.replace(options, dar_estimator="expectation"))


@wrong(2, "dar", "dar expectation: with lookahead 3")
def dar_expectation_is_sample(x, draw, options):
    return REFERENCE["dar"](x, draw, objectives.replace(options, dar_estimator="sample"))


def wrong_expectation(words):
    """For functions (x, options) -> (B, T, K) targets."""
    def enter(alternatives):
        def dar(x, draw, options):
            if is_sample(options):
                return REFERENCE["dar"](x, draw, options)
            targets = alternatives(x, options)
            n = targets.shape[0] * targets.shape[1]
            return Batch(x[:, :options.block_size], np.arange(n), targets.reshape(n, -1), ones(n))
        dar.__name__ = alternatives.__name__
        return wrong(2, "dar", words)(dar)
    return enter


@wrong_expectation("which the model sees")
def dar_expectation_from_0(x, options):
    T, t = options.block_size, options.lookahead
    return np.stack([x[:, s:T + s] for s in range(t)], axis=2)


@wrong_expectation("has 2 of the 3 targets")
def dar_expectation_without_the_last(x, options):
    T, t = options.block_size, options.lookahead
    return np.stack([x[:, s:T + s] for s in range(1, max(2, t))], axis=2)


@wrong_expectation("must count the same, 1/3 each")
def dar_expectation_weighs_the_next_twice(x, options):
    T, t = options.block_size, options.lookahead
    return np.stack([x[:, s:T + s] for s in [1, *range(1, t + 1)]], axis=2)


@wrong(2, "dar", "of the 3 targets x[k+1] .. x[k+3]")
def dar_expectation_drawn_with_replacement(x, draw, options):
    T, t = options.block_size, options.lookahead
    if is_sample(options):
        return REFERENCE["dar"](x, draw, options)
    s = 1 + (draw.per_sequence(T * t) * t).astype(int).reshape(len(x), T * t)
    place = np.repeat(np.arange(T), t) + s
    targets = np.take_along_axis(x, place, axis=1).reshape(-1, t)
    return Batch(x[:, :T], np.arange(len(targets)), targets, ones(len(targets)))


@wrong_expectation("dar: a target")
def dar_expectation_averages_ids(x, options):
    T, t = options.block_size, options.lookahead
    return np.stack([x[:, s:T + s] for s in range(1, t + 1)], axis=2).mean(axis=2, keepdims=True).astype(int)


@wrong(2, "dar", "has 2 of the 3 targets")
def dar_lookahead_always_2(x, draw, options):
    return REFERENCE["dar"](x[:, :options.block_size + 2], draw, objectives.replace(options, lookahead=2)) \
        if options.lookahead == 3 and not is_sample(options) else REFERENCE["dar"](x, draw, options)

# -----------------------------------------------------------------------------
# Exercise 3: right

@right(3, "uniform_masks")
def masks_choice(counts, draw, options):
    rng = np.random.default_rng()
    masked = np.zeros((len(counts), options.block_size), dtype=bool)
    for i, count in enumerate(counts):
        masked[i, rng.choice(options.block_size, size=count, replace=False)] = True
    return masked


@right(3, "uniform_masks")
def masks_permuted(counts, draw, options):
    first = np.arange(options.block_size) < counts[:, None]
    return np.random.default_rng(int(draw.offset)).permuted(first, axis=1)


@right(3, "uniform_masks")
def masks_threshold(counts, draw, options):
    u = draw.per_sequence(options.block_size)
    threshold = np.sort(u, axis=1)[np.arange(len(u)), counts - 1]
    return u <= threshold[:, None]


@right(3, "uniform_masks")
def masks_one_by_one(counts, draw, options):
    """Selection sampling: each position in turn, with probability (still needed) / (still left)."""
    T = options.block_size
    u = draw.per_sequence(T)
    needed = np.array(counts)
    masked = np.zeros(u.shape, dtype=bool)
    for k in range(T):
        masked[:, k] = u[:, k] * (T - k) < needed
        needed -= masked[:, k]
    return masked


@right(3, "uniform_masks")
def masks_torch(counts, draw, options):
    rank = torch.rand(len(counts), options.block_size).argsort(dim=1).argsort(dim=1)
    return (rank < torch.from_numpy(np.asarray(counts))[:, None]).numpy()


@right(3, "uniform_masks")
def masks_random_sample_in_a_tensor(counts, draw, options):
    masked = torch.zeros(len(counts), options.block_size, dtype=torch.bool)
    for row, count in zip(masked, counts):
        row[random.sample(range(options.block_size), int(count))] = True
    return masked


@right(3, "uniform_masks")
def masks_by_rejection(counts, draw, options):
    """Each position on its own, again and again until the number is right."""
    T, rng = options.block_size, np.random.default_rng(int(draw.offset))
    masked = np.zeros((len(counts), T), dtype=bool)
    for row, count in zip(masked, counts):
        while row.sum() != count:
            row[:] = rng.random(T) < count / T
    return masked


@right(3, "mask_batch")
def mask_batch_torch(x, masked, slots, draw, options):
    """Unused slots come first, and point to a position that is scored."""
    x = torch.tensor(x[:, :options.block_size])
    hidden = torch.tensor(masked)
    inputs = x.masked_fill(hidden, options.mask_token)
    if options.corruption == "bert":
        u = torch.rand(x.shape)
        inputs = torch.where(hidden & (u < 0.2), torch.randint(options.vocab_size, x.shape), inputs)
        inputs = torch.where(hidden & (u < 0.1), x, inputs)
    positions = hidden.flatten().nonzero()[:, 0]
    weights = torch.ones(len(positions))
    if options.normalization == "bound":
        weights /= hidden.sum(1)[positions // options.block_size]
    unused = slots - len(positions)
    positions = torch.cat((positions[:1].expand(unused), positions))
    weights = torch.cat((torch.zeros(unused), weights / weights.sum()))
    return Batch(inputs, positions, x.flatten()[positions][:, None], weights)


@right(3, "mask_batch")
def mask_batch_one_random_number(x, masked, slots, draw, options):
    """One number per position decides what is shown, and which random token."""
    plain = objectives.replace(options, corruption="mask")
    batch = REFERENCE["mask_batch"](x, masked, slots, draw, plain)
    if options.corruption == "mask":
        return batch
    u = draw.per_sequence(options.block_size)
    other = ((u - 0.1) * 10 * options.vocab_size).astype(int) % options.vocab_size
    shown = np.select([~masked | (u < 0.1), u < 0.2], [x[:, :options.block_size], other], options.mask_token)
    return batch._replace(inputs=shown)


@right(3, "mlm")
def mlm_shuffles_a_list(x, draw, options):
    """Masks of its own, and more slots than needed."""
    T = options.block_size
    count = max(1, round(T * options.mask_ratio))
    masked = []
    for row in x:
        flags = [True] * count + [False] * (T - count)
        random.shuffle(flags)
        masked.append(flags)
    return objectives.mask_batch(x, np.array(masked), count * len(x) + 7, draw, options)


@right(3, "mask_batch")
def mask_batch_loops(x, masked, slots, draw, options):
    T, rng = options.block_size, np.random.default_rng()
    inputs = x[:, :T].copy()
    positions, targets, weights = [], [], []
    for b in reversed(range(len(x))):
        for k in range(T):
            if not masked[b, k]:
                continue
            positions.append(b * T + k)
            targets.append([x[b, k]])
            weights.append(1 / masked[b].sum() if options.normalization == "bound" else 1)
            inputs[b, k] = options.mask_token
            if options.corruption == "bert":
                kind = rng.random()
                if kind >= 0.9:
                    inputs[b, k] = x[b, k]
                elif kind >= 0.8:
                    inputs[b, k] = rng.integers(options.vocab_size)
    return Batch(inputs, np.array(positions), np.array(targets), np.array(weights, dtype=np.float32))


@right(3, "mask_batch")
def mask_batch_scatters(x, masked, slots, draw, options):
    """Unused slots point to the first position and have the target 0. Another scale of the weights."""
    T = options.block_size
    inputs = x[:, :T].copy()
    row, k = np.nonzero(masked)
    shuffle = np.random.permutation(len(row))
    row, k = row[shuffle], k[shuffle]
    positions, targets = np.zeros(slots, dtype=np.int64), np.zeros((slots, 1), dtype=np.int64)
    weights = np.zeros(slots, dtype=np.float32)
    positions[:len(row)], targets[:len(row), 0] = row * T + k, x[row, k]
    weights[:len(row)] = 1 / len(row)
    if options.normalization == "bound":
        weights[:len(row)] = T / masked.sum(axis=1)[row] / len(x)
    inputs[row, k] = options.mask_token
    if options.corruption == "bert":
        kind = np.random.choice(["mask", "random", "keep"], p=[0.8, 0.1, 0.1], size=len(row))
        random = np.random.randint(0, options.vocab_size, size=len(row))
        shown = np.where(kind == "random", random, x[row, k])
        inputs[row, k] = np.where(kind == "mask", options.mask_token, shown)
    return Batch(inputs, positions, targets, weights)


@right(3, "mask_batch")
def mask_batch_every_position_a_slot(x, masked, slots, draw, options):
    T = options.block_size
    x = x[:, :T]
    weights = masked.astype(np.float32)
    if options.normalization == "bound":
        weights = weights / np.maximum(masked.sum(axis=1, keepdims=True), 1).astype(np.float32)
    inputs = np.where(masked, options.mask_token, x)
    if options.corruption == "bert":            # a random token is another one than the original
        kind = draw.per_sequence(T)
        other = (x + 1 + (draw.per_sequence(T) * (options.vocab_size - 1)).astype(int)) % options.vocab_size
        inputs = np.where(masked & (kind < 0.1), other, inputs)
        inputs = np.where(masked & (kind >= 0.9), x, inputs)
    return Batch(inputs, np.arange(x.size), x.reshape(-1, 1), weights.ravel())


@right(3, "mlm")
def mlm_on_its_own(x, draw, options):
    B, T = len(x), options.block_size
    count = max(1, int(options.mask_ratio * T + 0.5))
    masked = masks_choice(np.full(B, count), draw, options)
    return mask_batch_loops(x, masked, None, draw, options)


@right(3, "mlm")
def mlm_rows(x, draw, options):
    """One sequence at a time, and the batches put together."""
    T = options.block_size
    count = np.array([max(1, round(options.mask_ratio * T))])
    parts = []
    for b in range(len(x)):
        masked = masks_choice(count, draw, options)
        part = mask_batch_scatters(x[b:b + 1], masked, count[0], draw, options)
        parts.append(part._replace(positions=part.positions + b * T))
    return Batch(*[np.concatenate(fields) for fields in zip(*parts)])

# -----------------------------------------------------------------------------
# Exercise 3: wrong

@wrong(3, "uniform_masks", "must have counts[")
def masks_bernoulli(counts, draw, options):
    return draw.per_sequence(options.block_size) < counts[:, None] / options.block_size


@wrong(3, "uniform_masks", "must have counts[")
def masks_with_replacement(counts, draw, options):
    masked = np.zeros((len(counts), options.block_size), dtype=bool)
    for i, count in enumerate(counts):
        masked[i, np.random.randint(options.block_size, size=count)] = True
    return masked


@wrong(3, "uniform_masks", "must have counts[")
def masks_one_too_many(counts, draw, options):
    return draw.per_sequence(options.block_size).argsort(axis=1).argsort(axis=1) <= counts[:, None]


@wrong(3, "uniform_masks", "must have counts[")
def masks_same_count_in_all_rows(counts, draw, options):
    return REFERENCE["uniform_masks"](np.full(len(counts), counts[0]), draw, options)


@wrong(3, "uniform_masks", "the same positions are masked in every sequence")
def masks_first_positions(counts, draw, options):
    return np.arange(options.block_size) < counts[:, None]


@wrong(3, "uniform_masks", "the same positions are masked in every sequence")
def masks_same_for_all_rows(counts, draw, options):
    return draw.per_sequence(options.block_size)[:1].argsort(axis=1).argsort(axis=1) < counts[:, None]


@wrong(3, "uniform_masks", "always neighbours")
def masks_spans(counts, draw, options):
    T = options.block_size
    start = (draw.per_sequence(1) * (T - counts[:, None] + 1)).astype(int)
    return (np.arange(T) >= start) & (np.arange(T) < start + counts[:, None])


@wrong(3, "uniform_masks", "the positions are not masked equally often")
def masks_favour_late_positions(counts, draw, options):
    u = draw.per_sequence(options.block_size) - 0.05 * np.arange(options.block_size)
    return u.argsort(axis=1).argsort(axis=1) < counts[:, None]


@wrong(3, "uniform_masks", "the positions are not masked equally often: position 1 comes 0 times")
def masks_never_the_first(counts, draw, options):
    u = draw.per_sequence(options.block_size)
    u[:, 0] = 2
    return u.argsort(axis=1).argsort(axis=1) < counts[:, None]


@wrong(3, "uniform_masks", "must have counts[0] = 1 masked positions, but has 5")
def masks_the_complement(counts, draw, options):
    return ~REFERENCE["uniform_masks"](counts, draw, options)


@wrong(3, "uniform_masks", "not all sets of positions are equally likely")
def masks_argsort_once(counts, draw, options):
    """Every k-th position from a random start: uniform for each position, but few sets occur."""
    T = options.block_size
    start = (draw.per_sequence(1) * T).astype(int)
    return ((np.arange(T) + start) * counts[:, None]) % T < counts[:, None]


@wrong(3, "uniform_masks", "the same at every step")
def masks_fixed_seed(counts, draw, options):
    return np.random.default_rng(0).permuted(np.arange(options.block_size) < counts[:, None], axis=1)


@wrong(3, "uniform_masks", "with 4 sequences at a time: the positions are not masked equally often")
def masks_ranked_over_sequences(counts, draw, options):
    return draw.per_sequence(options.block_size).argsort(axis=0).argsort(axis=1) < counts[:, None]


@wrong(3, "uniform_masks", "the masks of two sequences depend on each other")
def masks_pairs_of_rows(counts, draw, options):
    u = draw.per_sequence(options.block_size)
    u[1::2] = u[0::2][:len(u[1::2])]
    return u.argsort(axis=1).argsort(axis=1) < counts[:, None]


@wrong(3, "uniform_masks", "masked must be a bool array")
def masks_of_positions(counts, draw, options):
    return draw.per_sequence(options.block_size).argsort(axis=1)


def wrong_mask_batch(words):
    """For functions (batch, x, masked, options) -> Batch that spoil the right one."""
    def enter(spoil):
        def mask_batch(x, masked, slots, draw, options):
            batch = REFERENCE["mask_batch"](x, masked, slots, draw, options)
            return spoil(batch, x[:, :options.block_size], masked, options)
        mask_batch.__name__ = spoil.__name__
        return wrong(3, "mask_batch", words)(mask_batch)
    return enter


@wrong_mask_batch("no token is hidden: the model sees every target")
def masks_nothing(batch, x, masked, options):
    return batch._replace(inputs=x)


@wrong_mask_batch("not the mask token")
def masks_with_token_0(batch, x, masked, options):
    return batch._replace(inputs=np.where(masked, 0, x))


@wrong_mask_batch("not the mask token")
def masks_with_the_last_token(batch, x, masked, options):
    return batch._replace(inputs=np.where(masked, options.vocab_size - 1, x))


@wrong_mask_batch("a target is the mask token")
def predicts_the_mask_token(batch, x, masked, options):
    return batch._replace(targets=batch.inputs.ravel()[batch.positions, None])


@wrong_mask_batch("must predict its own token")
def predicts_the_next_token(batch, x, masked, options):
    return batch._replace(targets=np.roll(x.ravel(), -1)[batch.positions, None])


@wrong_mask_batch("is scored 2 times: a masked token has one slot")
def scores_the_first_twice(batch, x, masked, options):
    again = np.r_[0, np.arange(len(batch.positions))]
    return Batch(batch.inputs, *[field[again] for field in batch[1:]])


@wrong_mask_batch("a target is -100: targets are ids of text")
def targets_of_unused_slots_are_minus_100(batch, x, masked, options):
    return batch._replace(targets=np.where(batch.weights[:, None] > 0, batch.targets, -100))


@wrong_mask_batch("is hidden, but `masked` says visible")
def hides_the_first_as_well(batch, x, masked, options):
    inputs = batch.inputs.copy()
    inputs[:, 0] = options.mask_token
    return batch._replace(inputs=inputs)


@wrong_mask_batch("weights must be float32, not float64")
def weights_in_float64(batch, x, masked, options):
    return batch._replace(weights=batch.weights.astype(float))


@wrong_mask_batch("all positions are scored, the visible ones too")
def scores_all(batch, x, masked, options):
    return Batch(batch.inputs, np.arange(x.size), x.reshape(-1, 1), ones(x.size))


@wrong_mask_batch("is scored but not masked: the model sees its target")
def scores_the_unused_slots(batch, x, masked, options):
    return batch._replace(weights=np.maximum(batch.weights, batch.weights.max()))


@wrong_mask_batch("is hidden, but `masked` says visible")
def masks_the_others(batch, x, masked, options):
    return REFERENCE["mask_batch"](x, ~masked, x.size, objectives.Draw(0, 0, range(len(x))), options)


@wrong_mask_batch("masked positions are not scored")
def scores_half(batch, x, masked, options):
    keep = batch.weights * (np.arange(len(batch.weights)) % 2 == 0)
    return batch._replace(weights=keep.astype(np.float32))


@wrong_mask_batch("whose token is 0 are not scored: 0 is a token like any other")
def sentinel_0(batch, x, masked, options):
    if not (x[masked] > 0).any():
        return batch
    return batch._replace(weights=batch.weights * (batch.targets[:, 0] > 0))


@wrong_mask_batch("every masked token must have the same weight")
def weights_of_the_other_normalization(batch, x, masked, options):
    counts = np.maximum(masked.sum(axis=1), 1)[batch.positions // options.block_size]
    return batch._replace(weights=(batch.weights > 0) / counts.astype(np.float32))


@wrong_mask_batch("the weights of every sequence must have the same sum")
def bound_is_tokens(batch, x, masked, options):
    return batch._replace(weights=(batch.weights > 0).astype(np.float32))


@wrong_mask_batch("the weights of every sequence must have the same sum")
def bound_multiplies(batch, x, masked, options):
    if options.normalization == "tokens":
        return batch
    counts = masked.sum(axis=1)[batch.positions // options.block_size]
    return batch._replace(weights=((batch.weights > 0) * counts).astype(np.float32))


@wrong(3, "mask_batch", "changes the token windows")
def mask_batch_in_place(x, masked, slots, draw, options):
    original = x.copy()
    x[:, :options.block_size][masked] = options.mask_token
    return REFERENCE["mask_batch"](original, masked, slots, draw, options)


def wrong_bert(words, number=3, name="mask_batch"):
    """For functions (x, kind, random, options) -> what masked positions show. kind, random: in [0, 1)."""
    def enter(show):
        def mask_batch(x, masked, slots, draw, options):
            plain = objectives.replace(options, corruption="mask")
            batch = REFERENCE["mask_batch"](x, masked, slots, draw, plain)
            if options.corruption == "mask":
                return batch
            T = options.block_size
            shown = show(x[:, :T], draw.per_sequence(T), draw.per_sequence(T), options)
            return batch._replace(inputs=np.where(masked, shown, x[:, :T]).astype(np.int64))
        mask_batch.__name__ = show.__name__
        return wrong(number, name, words)(mask_batch)
    return enter


@wrong_bert("instead of 80, 10, 10")
def bert_ignored(x, kind, random, options):
    return np.full(x.shape, options.mask_token)


@wrong_bert("instead of 80, 10, 10")
def bert_80_20_0(x, kind, random, options):
    return np.where(kind < 0.8, options.mask_token, (random * options.vocab_size).astype(int))


@wrong_bert("instead of 80, 10, 10")
def bert_80_2_18(x, kind, random, options):
    """The second draw takes 10 % of what is left instead of half."""
    other = np.where(random < 0.1, (random * 10 * options.vocab_size).astype(int), x)
    return np.where(kind < 0.8, options.mask_token, other)


@wrong_bert("random tokens are not uniform on 0 .. vocab_size-1")
def bert_random_may_be_the_mask_token(x, kind, random, options):
    other = (random * (options.vocab_size + 1)).astype(int)
    return np.where(kind < 0.8, options.mask_token, np.where(kind < 0.9, other, x))


@wrong_bert("are not uniform")
def bert_random_is_never_0(x, kind, random, options):
    other = 1 + (random * (options.vocab_size - 1)).astype(int)
    return np.where(kind < 0.8, options.mask_token, np.where(kind < 0.9, other, x))


@wrong_bert("treated alike")
def bert_one_kind_per_sequence(x, kind, random, options):
    kind = (np.arange(len(x))[:, None] * 0.7 + 0.05) % 1 + 0 * kind
    other = (random * options.vocab_size).astype(int)
    return np.where(kind < 0.8, options.mask_token, np.where(kind < 0.9, other, x))


@wrong_bert("instead of 80, 10, 10")
def bert_two_draws_of_10_percent(x, kind, random, options):
    """Random tokens first, then a tenth of all unchanged: 81, 9, 10."""
    other = (np.random.random(x.shape) * options.vocab_size).astype(int)
    shown = np.where(kind < 0.1, other, options.mask_token)
    return np.where(random < 0.1, x, shown)


@wrong_bert("are masked, replaced or left together: each draws its own kind")
def bert_halves_share_their_kinds(x, kind, random, options):
    half = x.shape[1] // 2
    kind[:, half:2 * half] = kind[:, :half]
    other = (random * options.vocab_size).astype(int)
    return np.where(kind < 0.8, options.mask_token, np.where(kind < 0.9, other, x))


@wrong_bert("all sequences of a batch get the same random tokens")
def bert_random_tokens_per_position(x, kind, random, options):
    other = (random[:1] * options.vocab_size).astype(int)
    return np.where(kind < 0.8, options.mask_token, np.where(kind < 0.9, other, x))


@wrong(3, "mask_batch", "normalization bound: the weights of every sequence must have the same sum")
def bound_counts_the_mask_tokens(x, masked, slots, draw, options):
    """With corruption bert these are 80 %."""
    batch = REFERENCE["mask_batch"](x, masked, slots, draw, options)
    if options.normalization == "tokens":
        return batch
    used = batch.weights > 0
    counts = np.maximum(1, (batch.inputs == options.mask_token).sum(axis=1))
    weights = used / counts[batch.positions // options.block_size]
    return batch._replace(weights=weights.astype(np.float32))


@wrong(3, "mask_batch", "normalization bound: the weights of every sequence must have the same sum")
def bound_in_whole_numbers(x, masked, slots, draw, options):
    batch = REFERENCE["mask_batch"](x, masked, slots, draw, options)
    if options.normalization == "tokens":
        return batch
    counts = np.maximum(1, masked.sum(axis=1))[batch.positions // options.block_size]
    weights = options.block_size // counts * (batch.weights > 0)
    return batch._replace(weights=weights.astype(np.float32))


@wrong_bert("all sequences are treated alike")
def bert_one_kind_per_position(x, kind, random, options):
    other = (random * options.vocab_size).astype(int)
    return np.where(kind[:1] < 0.8, options.mask_token, np.where(kind[:1] < 0.9, other, x))


@wrong(3, "mask_batch", "masked positions are not scored")
def bert_scores_the_hidden_only(x, masked, slots, draw, options):
    batch = REFERENCE["mask_batch"](x, masked, slots, draw, options)
    hidden = batch.inputs.ravel()[batch.positions] == options.mask_token
    return batch._replace(weights=batch.weights * hidden)


def mask_chosen(masked, x, draw, options):
    return REFERENCE["mask_batch"](x, masked, int(masked.sum()), draw, options)


@wrong(3, "mlm", "the number of masked positions varies")
def mlm_bernoulli(x, draw, options):
    masked = draw.per_sequence(options.block_size) < options.mask_ratio
    masked[0, 0] = True
    return mask_chosen(masked, x, draw, options)


@wrong(3, "mlm", "= 3 positions of every sequence are masked, not 2")
def mlm_rounds_down(x, draw, options):
    count = max(1, int(options.mask_ratio * options.block_size))
    return mask_chosen(REFERENCE["uniform_masks"](np.full(len(x), count), draw, options), x, draw, options)


@wrong(3, "mlm", "no position is scored")
def mlm_masks_nothing_at_small_ratios(x, draw, options):
    count = round(options.mask_ratio * options.block_size)
    return mask_chosen(REFERENCE["uniform_masks"](np.full(len(x), count), draw, options), x, draw, options)


@wrong(3, "mlm", "round(0.4 * 16) = 6 positions of every sequence are masked, not 7")
def mlm_rounds_up(x, draw, options):
    count = int(np.ceil(options.mask_ratio * options.block_size))
    return mask_chosen(REFERENCE["uniform_masks"](np.full(len(x), count), draw, options), x, draw, options)


@wrong(3, "mlm", "round(0.4 * 16) = 6 positions of every sequence are masked, not 10")
def mlm_ratio_of_the_visible(x, draw, options):
    visible = max(1 - options.mask_ratio, 1e-9)
    return REFERENCE["mlm"](x, draw, objectives.replace(options, mask_ratio=visible))


@wrong(3, "mlm", "the number of masked positions varies")
def mlm_exact_over_the_batch_only(x, draw, options):
    T = options.block_size
    count = len(x) * mask_count(options.mask_ratio, T)
    masked = np.random.permutation(np.arange(len(x) * T) < count).reshape(-1, T)
    return mask_chosen(masked, x, draw, options)


@wrong(3, "mlm", "positions of every sequence are masked")
def mlm_always_15_percent(x, draw, options):
    return REFERENCE["mlm"](x, draw, objectives.replace(options, mask_ratio=0.15))


def spoilt_mlm(masks):
    def mlm(x, draw, options):
        count = np.full(len(x), mask_count(options.mask_ratio, options.block_size))
        return mask_chosen(masks(count, draw, options), x, draw, options)
    mlm.__name__ = "mlm_" + masks.__name__
    return mlm


@wrong(3, "mlm", "which positions are masked depends on their tokens")
def mlm_masks_rare_tokens_more(x, draw, options):
    T = options.block_size
    frequency = np.bincount(x.ravel())[x[:, :T]]
    rank = (draw.per_sequence(T) ** (1 / frequency)).argsort(axis=1).argsort(axis=1)
    count = mask_count(options.mask_ratio, T)
    return REFERENCE["mask_batch"](x, rank < count, count * len(x), draw, options)


wrong(3, "mlm", "mlm: the same positions are masked in every sequence")(spoilt_mlm(masks_first_positions))
wrong(3, "mlm", "mlm: the same positions are masked in every sequence")(spoilt_mlm(masks_same_for_all_rows))
wrong(3, "mlm", "mlm: the masked positions are always neighbours")(spoilt_mlm(masks_spans))
wrong(3, "mlm", "mlm: the masks are the same at every step")(spoilt_mlm(masks_fixed_seed))
wrong(3, "mlm", "mlm: the positions are not masked equally often")(spoilt_mlm(masks_favour_late_positions))
wrong(3, "mlm", "mlm: the positions are not masked equally often")(spoilt_mlm(masks_ranked_over_sequences))


@wrong(3, "mlm", "a visible token was changed")
def mlm_uses_the_last_T_tokens(x, draw, options):
    return REFERENCE["mlm"](x[:, 1:], draw, options)


@wrong(3, "mlm", "corruption bert")
def mlm_ignores_the_corruption(x, draw, options):
    return REFERENCE["mlm"](x, draw, objectives.replace(options, corruption="mask"))


@wrong(3, "mlm", "is scored but not masked")
def mlm_leaks_one(x, draw, options):
    batch = REFERENCE["mlm"](x, draw, options)
    inputs = batch.inputs.copy()
    inputs.flat[batch.positions[-1]] = batch.targets[-1, 0]
    return batch._replace(inputs=inputs) if len(batch.positions) > 1 else batch

# -----------------------------------------------------------------------------
# Exercise 4: right

def limits(options):
    return [mask_count(ratio, options.block_size) for ratio in options.mask_range]


def vlm_of(counts, x, draw, options):
    """The batch with these numbers of masked positions, in as many slots as needed."""
    return mask_chosen(REFERENCE["uniform_masks"](np.asarray(counts), draw, options), x, draw, options)


@right(4, "vlm")
def vlm_independent_counts(x, draw, options):
    low, high = limits(options)
    return vlm_of(np.random.randint(low, high + 1, size=len(x)), x, draw, options)


@right(4, "vlm")
def vlm_uniform_ratio(x, draw, options):
    low, high = options.mask_range
    ratio = low + (high - low) * draw.per_sequence(1)[:, 0]
    counts = np.maximum(1, np.rint(ratio * options.block_size)).astype(int)
    masked = REFERENCE["uniform_masks"](counts, draw, options)
    return mask_batch_scatters(x, masked, x.size, draw, options)


@right(4, "vlm")
def vlm_rows(x, draw, options):
    """One sequence at a time is mlm with a ratio of its own."""
    T, rng, parts = options.block_size, np.random.default_rng(int(draw.offset)), []
    for b in range(len(x)):
        low, high = options.mask_range
        own = objectives.replace(options, mask_ratio=rng.uniform(low, high))
        part = REFERENCE["mlm"](x[b:b + 1], Row(draw, b), own)
        parts.append(part._replace(positions=part.positions + b * T))
    return Batch(*[np.concatenate(fields) for fields in zip(*parts)])


class Row:
    """The numbers of one sequence of a draw."""
    def __init__(self, draw, b):
        self.generator = draw._generators[b]

    def per_sequence(self, n):
        return self.generator.random(n)[None]


@right(4, "vlm")
def vlm_every_position_a_slot(x, draw, options):
    low, high = limits(options)
    counts = low + (draw.per_sequence(1)[:, 0] * (high - low + 1)).astype(int)
    masked = masks_choice(counts, draw, options)
    return mask_batch_every_position_a_slot(x, masked, None, draw, options)


@right(4, "vlm")
def vlm_stratified(x, draw, options):
    """One random number for the step, the sequences equally spaced from there, in random order."""
    low, high = limits(options)
    rng = np.random.default_rng(int(draw.offset))
    u = (rng.random() + rng.permutation(len(x)) / len(x)) % 1
    return vlm_of(low + (u * (high - low + 1)).astype(int), x, draw, options)


@right(4, "vlm")
def vlm_torch_loops(x, draw, options):
    low, high = limits(options)
    counts = torch.randint(low, high + 1, (len(x),))
    masked = masks_torch(counts.numpy(), draw, options)
    return mask_batch_loops(x, masked, None, draw, options)


@right(4, "vlm")
def vlm_antithetic(x, draw, options):
    """The second half of the batch gets the opposite of the first half's counts."""
    low, high = limits(options)
    u = np.random.default_rng(int(draw.offset)).random((len(x) + 1) // 2)
    u = np.concatenate((u, 1 - u))[:len(x)]
    return vlm_of(np.minimum(low + (u * (high - low + 1)).astype(int), high), x, draw, options)


@right(4, "vlm")
def vlm_plain_python(x, draw, options):
    T = options.block_size
    masked = []
    for row in x:
        count = max(1, round(random.uniform(*options.mask_range) * T))
        chosen = set(random.sample(range(T), count))
        masked.append([k in chosen for k in range(T)])
    return objectives.mask_batch(x, np.array(masked), len(x) * T, draw, options)

# -----------------------------------------------------------------------------
# Exercise 4: wrong

def wrong_vlm(words):
    """For functions (x, draw, options) -> (B,) counts."""
    def enter(counts):
        def vlm(x, draw, options):
            chosen = np.broadcast_to(np.asarray(counts(x, draw, options)).astype(int), len(x))
            return vlm_of(np.clip(chosen, 1, options.block_size), x, draw, options)
        vlm.__name__ = counts.__name__
        return wrong(4, "vlm", words)(vlm)
    return enter


def uniform_count(low, high, u):
    return low + (u * (high - low + 1)).astype(int)


@wrong_vlm("all sequences of a batch share one mask ratio")
def vlm_one_ratio_per_batch(x, draw, options):
    return uniform_count(*limits(options), draw.per_sequence(1)[:1, 0])


@wrong_vlm("the number of masked positions is always 8")
def vlm_mean_count(x, draw, options):
    return sum(limits(options)) // 2


@wrong_vlm("sequences 1 and 3 of a batch always have the same number")
def vlm_halves_of_the_batch_share_counts(x, draw, options):
    counts = uniform_count(*limits(options), np.random.random(len(x)))
    half = len(x) // 2
    counts[len(x) - half:] = counts[:half]
    return counts


@wrong_vlm("the mask ratios are the same at every step")
def vlm_same_ratios_at_every_step(x, draw, options):
    return uniform_count(*limits(options), np.random.default_rng(0).random(len(x)))


@wrong_vlm("masked positions, but mask_range 0.25 0.75 of 16 positions is 4..12")
def vlm_ignores_the_range(x, draw, options):
    return uniform_count(1, options.block_size, draw.per_sequence(1)[:, 0])


@wrong_vlm("the most masked positions of 800 sequences are 11, but")
def vlm_without_the_highest_count(x, draw, options):
    low, high = limits(options)
    return low + (draw.per_sequence(1)[:, 0] * max(1, high - low)).astype(int)


@wrong_vlm("masked positions, but mask_range 0.25 0.75 of 16 positions is 4..12")
def vlm_one_count_too_many(x, draw, options):
    low, high = limits(options)
    return uniform_count(low, high + 1, draw.per_sequence(1)[:, 0])


@wrong_vlm("the most masked positions of 800 sequences are 11, but")
def vlm_ratio_rounded_down(x, draw, options):
    low, high = options.mask_range
    return (low + (high - low) * draw.per_sequence(1)[:, 0]) * options.block_size


@wrong_vlm("the fewest masked positions of 800 sequences are 5, but")
def vlm_ratio_rounded_up(x, draw, options):
    low, high = options.mask_range
    return np.ceil((low + (high - low) * draw.per_sequence(1)[:, 0]) * options.block_size)


@wrong_vlm("masked positions, but mask_range 0.15 1.0 of 16 positions is 2..16")
def vlm_ratio_of_the_visible(x, draw, options):
    return options.block_size - uniform_count(*limits(options), draw.per_sequence(1)[:, 0])


@wrong_vlm("the number of masked positions is always 2")
def vlm_uses_mask_ratio(x, draw, options):
    return mask_count(options.mask_ratio, options.block_size)


@wrong_vlm("the mask ratio is not uniform")
def vlm_sorted_counts(x, draw, options):
    return np.sort(uniform_count(*limits(options), draw.per_sequence(1)[:, 0]))


@wrong_vlm("the mask ratio is not uniform")
def vlm_beta(x, draw, options):
    low, high = limits(options)
    return uniform_count(low, high, (draw.per_sequence(2)).mean(axis=1))


@wrong_vlm("the mask ratio is not uniform")
def vlm_squared(x, draw, options):
    return uniform_count(*limits(options), draw.per_sequence(1)[:, 0] ** 1.5)


@wrong_vlm("the mask ratio is not uniform")
def vlm_either_end(x, draw, options):
    low, high = limits(options)
    return np.where(draw.per_sequence(1)[:, 0] < 0.5, low, high)


@wrong_vlm("the mask ratio is not uniform")
def vlm_log_uniform(x, draw, options):
    low, high = options.mask_range
    return np.rint(low * (high / low) ** draw.per_sequence(1)[:, 0] * options.block_size)


@wrong(4, "vlm", "positions, but mask_range 0.25 0.75 of 16 positions is 4..12")
def vlm_bernoulli(x, draw, options):
    low, high = options.mask_range
    ratio = low + (high - low) * draw.per_sequence(1)
    masked = draw.per_sequence(options.block_size) < ratio
    masked[:, 0] |= ~masked.any(axis=1)
    return mask_chosen(masked, x, draw, options)


@wrong(4, "vlm", "masked positions are not scored")
def vlm_drops_what_exceeds_the_mean(x, draw, options):
    low, high = limits(options)
    batch = REFERENCE["vlm"](x, draw, options)
    slots = len(x) * (low + high) // 2
    return Batch(batch.inputs, *[field[:slots] for field in batch[1:]])


@wrong(4, "vlm", "no position is scored")
def vlm_masks_nothing_at_small_ratios(x, draw, options):
    low, high = options.mask_range
    ratio = low + (high - low) * draw.per_sequence(1)[:, 0]
    counts = np.rint(ratio * options.block_size).astype(np.int64)
    return mask_chosen(REFERENCE["uniform_masks"](counts, draw, options), x, draw, options)


def spoilt_vlm(masks):
    def vlm(x, draw, options):
        counts = uniform_count(*limits(options), draw.per_sequence(1)[:, 0])
        return mask_chosen(masks(counts, draw, options), x, draw, options)
    vlm.__name__ = "vlm_" + masks.__name__
    return vlm


wrong(4, "vlm", "vlm: the same positions are masked in every sequence")(spoilt_vlm(masks_first_positions))
wrong(4, "vlm", "vlm: the same positions are masked in every sequence")(spoilt_vlm(masks_same_for_all_rows))
wrong(4, "vlm", "vlm: the masked positions are always neighbours")(spoilt_vlm(masks_spans))
wrong(4, "vlm", "vlm: the positions are not masked equally often")(spoilt_vlm(masks_favour_late_positions))
wrong(4, "vlm", "vlm: the positions are not masked equally often")(spoilt_vlm(masks_ranked_over_sequences))


@wrong(4, "vlm", "vlm, normalization bound: the weights of every sequence must have the same sum")
def vlm_ignores_the_normalization(x, draw, options):
    return REFERENCE["vlm"](x, draw, objectives.replace(options, normalization="tokens"))


@wrong(4, "vlm", "corruption bert")
def vlm_ignores_the_corruption(x, draw, options):
    return REFERENCE["vlm"](x, draw, objectives.replace(options, corruption="mask"))


@wrong(4, "vlm", "must predict its own token")
def vlm_targets_of_other_rows(x, draw, options):
    batch = REFERENCE["vlm"](x, draw, options)
    targets = np.roll(x[:, :options.block_size], 1, axis=0).ravel()[batch.positions, None]
    return batch._replace(targets=targets)


@wrong(4, "vlm", "the model sees every target")
def vlm_hides_nothing(x, draw, options):
    return REFERENCE["vlm"](x, draw, options)._replace(inputs=x[:, :options.block_size])

# -----------------------------------------------------------------------------

@pytest.mark.parametrize("number,name,solution", RIGHT)
def test_a_right_solution_passes(monkeypatch, number, name, solution):
    failures = grade(monkeypatch, number, {name: solution})
    assert not failures.words and failures.passed


@pytest.mark.parametrize("number,name,solution,words", WRONG)
def test_a_wrong_solution_is_told_its_mistake(monkeypatch, number, name, solution, words):
    failures = grade(monkeypatch, number, {name: solution})
    assert failures.words, "a wrong solution passes"
    assert words in failures.words[0]
    assert len(failures.words[0]) < 300 and "\n" not in failures.words[0]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_there_are_enough_solutions(number):
    assert sum(entry.values[0] == number for entry in RIGHT) >= 3
    assert sum(entry.values[0] == number for entry in WRONG) >= 6


WRITTEN = {1: ["ar"], 2: ["dar"], 3: ["uniform_masks", "mask_batch", "mlm"], 4: ["vlm"]}


@pytest.mark.parametrize("number", WRITTEN)
def test_every_test_of_an_exercise_fails_before_it_is_written(monkeypatch, number):
    def unwritten(*arguments):
        raise NotImplementedError(f"exercise {number}: see docs/EXERCISES.md")

    failures = grade(monkeypatch, number, dict.fromkeys(WRITTEN[number], unwritten), first_only=False)
    assert failures.passed == 0
    assert set(failures.words) == {"not yet written: see docs/EXERCISES.md"}


def blank(source, names):
    """The source with the bodies of these functions replaced by NotImplementedError."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            start = node.body[1].lineno - 1             # after the docstring
            number = next(number for number, of_it in WRITTEN.items() if node.name in of_it)
            words = f"exercise {number}: {node.name}"
            lines[start:node.end_lineno] = [f'    raise NotImplementedError("{words}")']
    return "\n".join(lines) + "\n"


def run_copy(folder, names, *arguments):
    """(exit code, output lines) of pytest on test_objectives.py in a copy where these bodies are missing."""
    for path in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
        shutil.copy(path, folder)
    (folder / "tests").mkdir()
    for name in ("conftest.py", "grading.py", "test_objectives.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    (folder / "objectives.py").write_text(blank((ROOT / "objectives.py").read_text(), names))
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
                         cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout.strip().splitlines()


def test_an_untouched_copy_scores_0(tmp_path):
    code, lines = run_copy(tmp_path, sum(WRITTEN.values(), []), "--exercises")
    assert code == 1
    rows = [line for line in lines if re.match(r"[1-4]  .* / 10$", line)]
    assert len(rows) == 4 and all(re.search(r" 0 +\d+ +0 / 10$", row) for row in rows)
    assert any(re.fullmatch(r"in all +0 / 40", line) for line in lines)
    assert lines[-4] == "exercise 1: not yet written: ar"


def test_what_is_not_graded_is_skipped_with_the_reason(tmp_path):
    """Without vlm, everything else passes, and what needs vlm is skipped."""
    code, lines = run_copy(tmp_path, ["vlm"], "-m", "not exercise4", "-rs")
    assert code == 0
    assert any("needs exercise 4: vlm" in line for line in lines)


def test_the_last_line_is_the_first_failure_in_words(tmp_path):
    code, lines = run_copy(tmp_path, ["dar"], "-m", "exercise2", "-x")
    assert code == 1 and lines[-1] == "exercise 2: not yet written: dar"
