"""
Every objective against brute force: enumeration, plain Python loops, and statistics with stated error bounds.

    pytest tests/test_objectives.py             # a few seconds, CPU, no network

A failure says in the field's terms what is wrong with the objective. Statistical tests have fixed seeds and a
false-alarm level below 1e-6 each (`assert_uniform`): a correct implementation with other random numbers
passes them as well.
"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import objectives
from model import Config, Transformer
from objectives import GOLDEN, OBJECTIVES, Batch, Draw, Options, check, spread, most_masked, window_size

MASKED = [("mlm", {}), ("vlm", {}), ("mlm", {"corruption": "bert"}), ("vlm", {"normalization": "bound"})]
ALL = [("ar", {}), ("dar", {"lookahead": 3}), ("dar", {"lookahead": 3, "dar_estimator": "expectation"}),
       *MASKED]


def options(name="vlm", **kwargs):
    return Options(**{"objective": name, "block_size": 16, "vocab_size": 50, **kwargs})


def tokens(o, B, seed=0):
    return np.random.default_rng(seed).integers(o.vocab_size, size=(B, window_size(o)))


def make(o, x, draw):
    return OBJECTIVES[o.objective].batch(x.copy(), draw, o)


def assert_uniform(observed, expected, what):
    """Pearson's chi-square. For X ~ chi2(d), P(X > d + 2 sqrt(d a) + 2a) <= exp(-a) (Laurent & Massart 2000);
    a = 14: 1e-6.
    """
    observed = np.asarray(observed, dtype=float)
    expected = np.broadcast_to(np.asarray(expected, dtype=float), observed.shape)
    d = observed.size - 1
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < d + 2 * math.sqrt(14 * d) + 28, \
        f"{what}: observed {observed.tolist()}, expected {expected.tolist()}"


def scored(batch, T):
    """{(row, position): (target, weight)} of the slots in use."""
    used = [n for n in range(len(batch.positions)) if batch.weights[n] != 0]
    table = {divmod(int(batch.positions[n]), T): (batch.targets[n].tolist(), float(batch.weights[n]))
             for n in used}
    assert len(table) == len(used), "a position is scored twice"
    return table


def same(a, b):
    return all(np.array_equal(p, q) for p, q in zip(a, b))


class FixedDraw:
    """Stands in for Draw where a test enumerates the random numbers:
    the same (B, n) numbers at each request.
    """
    def __init__(self, numbers):
        self.numbers = np.asarray(numbers, dtype=float)
        self.indices, self.offset = np.arange(len(self.numbers), dtype=np.uint64), np.uint64(0)

    def per_sequence(self, n):
        return self.numbers

# -----------------------------------------------------------------------------
# Autoregressive objectives

def test_ar_predicts_the_next_token():
    o = options("ar")
    x = tokens(o, 3)
    batch = make(o, x, Draw(0, 0, range(3)))
    assert np.array_equal(batch.inputs, x[:, :16]), "the inputs of ar are the first T tokens, unchanged"
    expected = {(b, k): ([int(x[b, k + 1])], 1.0) for b in range(3) for k in range(16)}
    assert scored(batch, 16) == expected, "ar: position k must predict x[k+1], at every k with weight 1"


@pytest.mark.parametrize("estimator", ["sample", "expectation"])
def test_dar_with_lookahead_1_is_ar(estimator):
    o = options("dar", lookahead=1, dar_estimator=estimator)
    x = tokens(o, 4)
    assert same(make(o, x, Draw(1, 2, range(4))), make(options("ar"), x, Draw(1, 2, range(4)))), \
        "dar with t = 1 is ar"


def dar_offsets(t, B=2000, step=0):
    """(B, T) offset of every target, read off windows whose token at position k is k."""
    o = options("dar", lookahead=t)
    x = np.repeat(np.arange(window_size(o))[None], B, axis=0)
    batch = make(o, x, Draw(3, step, range(B)))
    assert np.array_equal(batch.inputs, x[:, :16]), "the inputs of dar are the first T tokens, unchanged"
    assert np.array_equal(np.sort(batch.positions), np.arange(B * 16)) and (batch.weights == 1).all(), \
        "dar scores every position with weight 1"
    offsets = np.empty(B * 16, dtype=int)
    offsets[batch.positions] = batch.targets[:, 0]
    return offsets.reshape(B, 16) - np.arange(16)


@pytest.mark.parametrize("t", [2, 3, 5])
def test_dar_offset_is_uniform_on_1_to_t(t):
    s = dar_offsets(t)
    assert s.min() >= 1, f"dar: offset {s.min()}: the target is a token the model sees (offsets start at 1)"
    assert s.max() <= t, f"dar: offset {s.max()} is beyond the lookahead {t}"
    assert s.max() == t, f"dar: the offset never reaches the lookahead {t}, only {s.max()}"
    assert_uniform(np.bincount(s.ravel(), minlength=t + 1)[1:], s.size / t,
                   f"dar offsets 1..{t} are not equally frequent")
    for k in (0, 15):
        assert_uniform(np.bincount(s[:, k], minlength=t + 1)[1:], len(s) / t,
                       f"dar offsets at position {k} not uniform")


def test_dar_offset_is_drawn_for_every_position():
    t, s = 3, dar_offsets(3)
    assert (s != s[:, :1]).any(), "dar: all positions of a row share one offset; every position draws its own"
    assert (s != s[:1]).any(), "dar: all rows share the same offsets"
    neighbours = (s[:, 0::2] - 1) * t + s[:, 1::2] - 1                      # disjoint pairs within a row
    assert_uniform(np.bincount(neighbours.ravel(), minlength=9), neighbours.size / 9,
                   "dar offsets of neighbours depend")
    rows = (s[0::2] - 1) * t + s[1::2] - 1                                  # the same position of two rows
    assert_uniform(np.bincount(rows.ravel(), minlength=9), rows.size / 9,
                   "dar offsets of two rows depend on each other")


def test_dar_expectation_lists_all_t_next_tokens():
    o = options("dar", lookahead=4, dar_estimator="expectation")
    x = tokens(o, 3)
    batch = make(o, x, Draw(0, 0, range(3)))
    for n, p in enumerate(batch.positions):
        b, k = divmod(int(p), 16)
        expected = sorted(int(x[b, k + s]) for s in range(1, 5))
        assert sorted(batch.targets[n].tolist()) == expected, \
            f"dar expectation at {k}: targets must be x[k+1..k+t]"
    assert ((batch.weights == 1).all() and len(batch.positions) == 3 * 16
            and np.array_equal(batch.inputs, x[:, :16]))


def test_dar_expectation_is_the_mean_of_the_samples_in_loss_and_gradient():
    torch.manual_seed(0)
    t = 3
    model = Transformer(Config(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16,
                               causal=True)).double()
    model.dtype = torch.float64
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = tokens(options("dar", lookahead=t), 2)

    def loss_and_gradient(estimator, draw):
        batch = make(options("dar", lookahead=t, dar_estimator=estimator), x, draw)
        loss = model(*(torch.from_numpy(a) for a in batch))
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    samples = [loss_and_gradient("sample", FixedDraw(np.full((2, 16), (s + 0.5) / t))) for s in range(t)]
    loss, gradient = loss_and_gradient("expectation", Draw(0, 0, range(2)))
    assert loss == pytest.approx(sum(l for l, _ in samples) / t, rel=1e-5), \
        "expectation is not the mean over the offsets"
    mean = sum(g for _, g in samples) / t
    assert (gradient - mean).norm() < 1e-5 * mean.norm(), \
        "gradient of the expectation is not the mean of the samples'"

# -----------------------------------------------------------------------------
# Masked objectives

@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.17, 0.4, 0.5, 0.6, 1.0])
def test_mlm_masks_exactly_round_ratio_T(ratio):
    o = options("mlm", mask_ratio=ratio)
    batch = make(o, tokens(o, 50), Draw(1, 2, range(50)))
    count = max(1, round(ratio * 16))
    per_row = (batch.inputs == o.mask_token).sum(axis=1)
    assert (per_row == count).all(), \
        f"mlm: {count} of 16 positions of every row must be masked, not {per_row.tolist()}"


@pytest.mark.parametrize("name,kwargs", [("mlm", {}), ("vlm", {})])
def test_masked_positions_are_hidden_and_scored(name, kwargs):
    o = options(name, **kwargs)
    x = tokens(o, 9)
    batch = make(o, x, Draw(1, 2, range(9)))
    expected = {}
    for b in range(9):
        for k in range(16):
            if batch.inputs[b, k] == o.mask_token:
                expected[b, k] = ([int(x[b, k])], 1.0)
            else:
                assert batch.inputs[b, k] == x[b, k], "a visible token was changed"
    assert scored(batch, 16) == expected, \
        "exactly the masked positions are scored, each predicts its own token, weight 1"


@pytest.mark.parametrize("name", ["mlm", "vlm"])
def test_inputs_do_not_leak_the_targets(name):
    o = options(name)
    x = tokens(o, 6)
    batch = make(o, x, Draw(1, 2, range(6)))
    y = x.copy()
    for b, k in scored(batch, 16):
        y[b, k] = (x[b, k] + 1) % 50
    assert np.array_equal(make(o, y, Draw(1, 2, range(6))).inputs, batch.inputs), \
        "the inputs depend on the hidden tokens"


def test_mask_positions_are_uniform_among_all_sets():
    o = options("mlm", block_size=6, mask_ratio=0.5)
    sets = list(itertools.combinations(range(6), 3))                        # 20 sets of 3 of 6 positions
    x = tokens(o, 1000)
    seen = dict.fromkeys(sets, 0)
    for step in range(2):
        for row in make(o, x, Draw(1, step, range(1000))).inputs == o.mask_token:
            seen[tuple(np.flatnonzero(row).tolist())] += 1
    assert_uniform(list(seen.values()), 2000 / 20,
                   "mlm: not all sets of 3 of 6 positions are equally probable")


def test_vlm_with_equal_range_is_mlm():
    for r in (0.15, 0.5, 1.0):
        for kwargs in ({}, {"corruption": "bert"}, {"normalization": "bound"}):
            o, x = options("vlm", mask_range=(r, r), **kwargs), tokens(options(), 8)
            other = make(options("mlm", mask_ratio=r, **kwargs), x, Draw(1, 2, range(8)))
            assert same(make(o, x, Draw(1, 2, range(8))), other), \
                f"vlm with mask_range {r} {r} must be mlm {r} exactly"


def test_vlm_ratio_is_uniform_and_reaches_both_ends():
    o = options("vlm", mask_range=(0.25, 0.75))                             # 4 .. 12 of 16
    x = tokens(o, 4)
    counts = np.stack([(make(o, x, Draw(5, step, range(4))).inputs == o.mask_token).sum(axis=1)
                       for step in range(1500)])                            # (steps, 4)
    assert counts.min() == 4 and counts.max() == 12, \
        f"vlm: counts {counts.min()}..{counts.max()} instead of 4..12"
    for i in range(4):
        assert_uniform(np.bincount(counts[:, i], minlength=13)[4:13], 1500 / 9,
                       "vlm: the mask ratio is not uniform")


def test_vlm_ratio_differs_within_a_batch():
    o = options("vlm", mask_range=(0.0625, 1.0))                            # 1 .. 16 of 16
    for step in range(20):
        counts = (make(o, tokens(o, 32), Draw(5, step, range(64, 96))).inputs == o.mask_token).sum(axis=1)
        occurs = np.bincount(counts, minlength=17)[1:]
        assert occurs.min() >= 1, \
            f"vlm: 32 consecutive sequences must spread over all 16 mask counts: {counts.tolist()}"
        assert occurs.max() <= 4, \
            f"vlm: 32 consecutive sequences pile up on one mask count: {counts.tolist()}"


def test_lattice_is_the_golden_ratio_in_exact_arithmetic():
    golden = (math.isqrt(5 << 128) - (1 << 64)) // 2                        # 2**64 (sqrt(5) - 1) / 2
    assert abs(int(GOLDEN) - golden) <= 1
    rng = np.random.default_rng(0)
    for levels in (1, 2, 110, 1025):
        offset, i = rng.integers(2**64, dtype=np.uint64), rng.integers(2**40, size=300)
        expected = [(int(offset) + int(k) * int(GOLDEN)) % 2**64 * levels >> 64 for k in i]
        assert spread(offset, i, levels).tolist() == expected


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


@pytest.mark.parametrize("normalization", ["tokens", "bound"])
def test_vlm_loses_no_masked_position_and_keeps_its_shapes(normalization):
    o = options("vlm", mask_range=(0.0625, 1.0), normalization=normalization)
    slots = most_masked(1, 16, 5)
    for step in range(200):
        batch = make(o, tokens(o, 5), Draw(1, step, range(step, step + 5)))
        assert len(batch.positions) == slots, "the number of slots must be the same at every step"
        masked = np.flatnonzero(batch.inputs.ravel() == o.mask_token)
        assert np.array_equal(np.sort(batch.positions[batch.weights > 0]), masked), \
            "weight must be on the masked positions, all of them, and never on unused slots"
        assert (batch.weights >= 0).all() and np.isfinite(batch.weights).all()


@pytest.mark.parametrize("name", ["mlm", "vlm"])
def test_bert_corruption_is_80_10_10(name):
    o = options(name, vocab_size=4, mask_ratio=0.5, block_size=32, corruption="bert")
    plain = options(name, vocab_size=4, mask_ratio=0.5, block_size=32)
    x = np.random.default_rng(0).integers(4, size=(1500, 33))
    batch, hidden = (make(p, x, Draw(1, 2, range(1500))) for p in (o, plain))
    mask = hidden.inputs == 4
    assert np.array_equal(batch.inputs[~mask], x[:, :32][~mask]), \
        "a position that is not scored was corrupted"
    assert scored(batch, 32) == scored(hidden, 32), \
        "corrupted and kept positions must be scored on the original token"
    seen, true = batch.inputs[mask], x[:, :32][mask]
    n = [(seen == 4).sum(), ((seen != 4) & (seen != true)).sum(), (seen == true).sum()]
    # a random token is the original one in 1 of 4 cases, and never the mask token
    assert_uniform(n, np.array([0.8, 0.075, 0.125]) * mask.sum(),
                   "bert: [masked, replaced, unchanged] is not 80/10/10")
    random = (seen != 4) & (seen != true)
    pairs = np.bincount(seen[random] * 4 + true[random], minlength=16).reshape(4, 4)[~np.eye(4, dtype=bool)]
    assert_uniform(pairs, random.sum() / 12,                    # 12 pairs of different (random, original)
                   "bert: random tokens are not uniform over the vocabulary, whatever the original")

# -----------------------------------------------------------------------------
# What holds for all objectives

@pytest.mark.parametrize("name,kwargs", ALL)
def test_shapes_and_types(name, kwargs):
    o = options(name, **kwargs)
    batch = make(o, tokens(o, 5), Draw(1, 2, range(5)))
    N = len(batch.positions)
    K = o.lookahead if kwargs.get("dar_estimator") == "expectation" else 1
    assert batch.inputs.shape == (5, 16), "inputs must be (B, T)"
    assert batch.targets.shape == (N, K) and batch.weights.shape == (N,)
    assert batch.weights.dtype == np.float32 and batch.positions.dtype == np.int64
    assert batch.inputs.dtype == np.int64 and batch.targets.dtype == np.int64
    assert 0 <= batch.positions.min() and batch.positions.max() < 5 * 16, \
        "positions index the flattened (B*T) batch"
    assert len(set(batch.positions.tolist())) == N, "a position is scored twice"
    assert 0 <= batch.targets.min() and batch.targets.max() < o.vocab_size, \
        "a target must be text, never the mask token"


@pytest.mark.parametrize("name,kwargs", ALL)
def test_does_not_change_the_windows(name, kwargs):
    o = options(name, **kwargs)
    x = tokens(o, 4)
    before = x.copy()
    OBJECTIVES[name].batch(x, Draw(1, 2, range(4)), o)
    assert np.array_equal(x, before), "the objective writes into the token windows it was given"


@pytest.mark.parametrize("name,kwargs", ALL)
def test_does_not_depend_on_how_the_batch_is_cut(name, kwargs):
    o = options(name, **kwargs)
    x = tokens(o, 8)
    whole = make(o, x, Draw(1, 2, range(8)))
    for cut in (1, 3, 4):
        first, second = make(o, x[:cut], Draw(1, 2, range(cut))), make(o, x[cut:], Draw(1, 2, range(cut, 8)))
        message = f"inputs or scored positions change when the batch of 8 is cut after {cut}"
        assert np.array_equal(whole.inputs, np.concatenate((first.inputs, second.inputs))), message
        moved = {(row + cut, k): v for (row, k), v in scored(second, 16).items()}
        assert scored(whole, 16) == scored(first, 16) | moved, message


@pytest.mark.parametrize("name,kwargs", ALL[1:2] + MASKED)
def test_pure_function_of_seed_step_index(name, kwargs):
    o = options(name, **kwargs)
    x = np.repeat(np.arange(window_size(o))[None], 3, axis=0)               # three equal rows
    batch = make(o, x, Draw(1, 2, range(3)))
    assert same(batch, make(o, x, Draw(1, 2, range(3)))), \
        "the same (seed, step, index) must give the same batch"
    assert not same(batch, make(o, x, Draw(1, 3, range(3)))), "another step must draw other numbers"
    assert not same(batch, make(o, x, Draw(2, 2, range(3)))), "another seed must draw other numbers"
    rows = [{k: v for (r, k), v in scored(batch, 16).items() if r == row} for row in range(3)]
    assert rows[0] != rows[1] != rows[2], "every sequence of a batch needs its own random numbers"

# -----------------------------------------------------------------------------
# Normalisation: on a toy whose likelihood can be enumerated

TOY = options("vlm", block_size=3, vocab_size=2, mask_range=(1 / 3, 1.0))


def toy_model(seed):
    """nll(inputs row, position, token): -log of a random conditional distribution for every context."""
    rng = np.random.default_rng(seed)
    table = {c: rng.dirichlet((1, 1), size=3) for c in itertools.product(range(3), repeat=3)}
    return lambda row, k, token: -math.log(table[tuple(int(v) for v in row)][k][token])


def toy_loss(nll, batch):
    losses = [nll(batch.inputs[p // 3], p % 3, t[0]) for p, t in zip(batch.positions, batch.targets)]
    return sum(w * l for w, l in zip(batch.weights.tolist(), losses)) / batch.weights.sum(dtype=float)


def all_masks(x, normalization):
    """The batch in which every count 1..T and every order of the positions occurs once."""
    counts, orders = zip(*itertools.product((1, 2, 3), itertools.permutations(range(3))))
    o = options("vlm", block_size=3, vocab_size=2, normalization=normalization)
    rows = np.repeat(np.array([x]), len(counts), axis=0)
    draw = FixedDraw(np.array(orders) / 3 + 0.1)
    masked = objectives.uniform_masks(np.array(counts), draw, o)
    return objectives.mask_batch(rows, masked, sum(counts) + 2, draw, o)


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


@pytest.mark.parametrize("seed", range(3))
def test_bound_is_the_evidence_bound(seed):
    nll = toy_model(seed)
    for x in itertools.product((0, 1), repeat=3):
        loss, orders = toy_loss(nll, all_masks(x, "bound")), any_order_nll(nll, x)
        likelihood = sum(math.exp(-v) for v in orders) / 6                  # mean over orders
        assert 3 * loss == pytest.approx(sum(orders) / 6, rel=1e-5), \
            "bound: T * loss must be the mean over all orders of the negative log-likelihood"
        assert 3 * loss >= -math.log(likelihood) - 1e-6, \
            "bound: T * loss is below -log P(x): it bounds nothing"


@pytest.mark.parametrize("seed", range(3))
def test_tokens_weighs_every_masked_token_the_same(seed):
    nll, x = toy_model(seed), (0, 1, 1)
    batch = all_masks(x, "tokens")
    terms = [nll(row, k, x[k]) for row in batch.inputs for k in range(3) if row[k] == TOY.mask_token]
    loss = toy_loss(nll, batch)
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-6), \
        "tokens: the loss is the mean over all masked tokens"
    assert abs(loss - toy_loss(nll, all_masks(x, "bound"))) > 1e-3, "tokens and bound must differ"


def test_bound_gives_every_sequence_weight_1():
    o = options("vlm", normalization="bound")
    batch = make(o, tokens(o, 20), Draw(1, 2, range(20)))
    per_row = np.bincount(batch.positions // 16, weights=batch.weights, minlength=20)
    assert per_row == pytest.approx(np.ones(20), rel=1e-5), \
        "bound: the weights of every sequence must sum to 1"

# -----------------------------------------------------------------------------
# Options

@pytest.mark.parametrize("kwargs,word", [
    ({"name": "xlnet"}, "objective"), ({"block_size": 0}, "block_size"), ({"lookahead": 0}, "lookahead"),
    ({"mask_ratio": 0}, "mask_ratio"), ({"mask_ratio": 1.1}, "mask_ratio"),
    ({"mask_ratio": math.nan}, "mask_ratio"),
    ({"mask_range": (0, 1)}, "mask_range"), ({"mask_range": (0.5, 1.5)}, "mask_range"),
    ({"mask_range": (0.6, 0.5)}, "mask_range"), ({"mask_range": (math.nan, 1)}, "mask_range"),
    ({"lookahead": 1.5}, "lookahead"), ({"dar_estimator": "mean"}, "dar_estimator"),
    ({"corruption": "x"}, "corruption"), ({"normalization": "x"}, "normalization")])
def test_check_refuses(kwargs, word):
    with pytest.raises(ValueError, match=word) as error:
        check(options(**kwargs))
    assert "\n" not in str(error.value)


def test_check_accepts():
    for name, kwargs in ALL:
        check(options(name, **kwargs))
    check(options("mlm", mask_ratio=1.0, mask_range=(1.0, 1.0), lookahead=1, block_size=1))


def test_vlm_refuses_sequences_that_are_not_consecutive():
    """The buffer is sized for consecutive sequences; others could lose masked tokens,
    and must not do so silently.
    """
    o, refused = options("vlm"), 0
    for step in range(300):
        draw = Draw(0, step, [0, 55, 144, 233, 377, 610])
        try:
            batch = make(o, tokens(o, 6), draw)
        except ValueError:
            refused += 1
        else:
            assert (batch.weights > 0).sum() == (batch.inputs == o.mask_token).sum()
    assert refused


def test_window_size():
    assert [window_size(options(n, lookahead=4)) for n in ("ar", "dar", "mlm", "vlm")] == [17, 20, 17, 17]


def test_options_may_be_an_argparse_namespace():
    o = SimpleNamespace(**{**vars(options("vlm")), "mask_token": 50})
    assert same(make(o, tokens(o, 3), Draw(0, 0, range(3))),
                make(options("vlm"), tokens(o, 3), Draw(0, 0, range(3))))
    assert isinstance(make(o, tokens(o, 3), Draw(0, 0, range(3))), Batch)
