"""
The four pretraining objectives of "Look Ahead or Look Around?" (Zhang et al., ICML 2024, arXiv 2407.00935).

An objective is a distribution over (context, target) pairs, and nothing else. Each function below maps
windows of token ids to what one training step needs:

    inputs     (B, T)  what the model sees
    positions  (N,)    which positions of the flattened (B*T) batch are scored
    targets    (N, K)  what they must predict; with K > 1 the log-probabilities of the K targets are averaged
    weights    (N,)    weight of each scored position; the step's loss is sum(weight * loss) / sum(weight)

Model, loss, training loop and evaluation are the same for all objectives. To add a fifth one, write a
function and put it into OBJECTIVES at the bottom (and into CAUSAL if its attention is causal): train.py and
the evaluations pick it up.

    python train.py --objective ar | dar --lookahead 2 | mlm --mask_ratio 0.15 | vlm --mask_range 0.15 1.0
    pytest tests/test_objectives.py                 # every line below against brute force
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# -----------------------------------------------------------------------------
# Options, batch, and the randomness

@dataclass
class Options:
    """What an objective may depend on; train.py has a flag of the same name for each."""
    objective: str = "vlm"
    block_size: int = 128                   # T, tokens the model sees
    vocab_size: int = 2048                  # ids that stand for text; the mask token is the next one
    lookahead: int = 2                      # dar: t, the target is one of the next t tokens
    dar_estimator: str = "sample"           # dar: sample | expectation
    mask_ratio: float = 0.15                # mlm: fraction of the T positions that is masked
    mask_range: tuple = (0.15, 1.0)         # vlm: lowest and highest fraction
    corruption: str = "mask"                # mlm, vlm: mask | bert (80 % mask, 10 % random, 10 % unchanged)
    normalization: str = "tokens"           # mlm, vlm: tokens | bound, see `mask_batch`

    @property
    def mask_token(self):
        return self.vocab_size


class Batch(NamedTuple):
    inputs: np.ndarray                      # (B, T) int64
    positions: np.ndarray                   # (N,) int64, into the flattened inputs
    targets: np.ndarray                     # (N, K) int64
    weights: np.ndarray                     # (N,) float32, 0 for an unused slot


class Draw:
    """Random numbers for sequences `indices` ((B,) consecutive positions in the global batch)
    of one training step.

    A pure function of (seed, step, index): a sequence gets the same numbers in whichever process or
    micro-batch it is processed, so a run does not depend on how the batch is cut, and resuming needs no
    random state to be saved.
    """
    def __init__(self, seed, step, indices):
        def generator(index):
            counter = np.array([0, 0, step, index], dtype=np.uint64)
            return np.random.Generator(np.random.Philox(key=seed, counter=counter))
        self.indices = np.asarray(indices, dtype=np.uint64)
        self.offset = generator(2**64 - 1).integers(2**64, dtype=np.uint64)     # one for the whole step
        self._generators = [generator(int(i)) for i in self.indices]

    def per_sequence(self, n):
        """(B, n) float64, uniform on [0, 1); the next n numbers of every sequence."""
        return np.stack([g.random(n) for g in self._generators])

# -----------------------------------------------------------------------------
# Look ahead: autoregressive objectives. Position k sees x[1..k].

def ar(x, draw, o):
    """Autoregressive, L = -E sum_k log P(x[k+1] | x[1..k]).

    x: (B, T+1) token ids. Every position is scored.
    """
    T = o.block_size
    return every_position(x[:, :T], x[:, 1:T + 1, None])


def dar(x, draw, o):
    """Diversity-enhanced autoregressive, L = -E sum_k E_{s ~ U{1..t}} log P(x[k+s] | x[1..k]),
    t = o.lookahead.

    The model is not told s. With dar_estimator "sample" one s is drawn per position; "expectation" averages
    over all t, which has the same expected gradient and less variance. t = 1 is `ar`.
    x: (B, T+t) token ids.
    """
    T, t = o.block_size, o.lookahead
    ahead = np.lib.stride_tricks.sliding_window_view(x[:, 1:], t, axis=1)   # (B, T, t): x[k+1..k+t]
    if o.dar_estimator == "sample":
        s = (draw.per_sequence(T) * t).astype(np.int64)                     # (B, T), uniform on 0..t-1
        ahead = np.take_along_axis(ahead, s[:, :, None], axis=2)            # (B, T, 1)
    return every_position(x[:, :T], ahead)


def every_position(inputs, targets):
    """inputs (B, T), targets (B, T, K) -> a Batch in which all N = B*T positions are scored."""
    n = inputs.size
    return Batch(inputs, np.arange(n), targets.reshape(n, -1), np.ones(n, dtype=np.float32))

# -----------------------------------------------------------------------------
# Look around: masked objectives. A masked position sees every visible one.

def mlm(x, draw, o):
    """Masked, L = -E_M sum_{j in M} log P(x[j] | x[not M]),
    M uniform among the sets of round(mask_ratio * T) positions.
    """
    count = mask_count(o.mask_ratio, o.block_size)
    return mask_batch(x, np.full(len(x), count), count * len(x), draw, o)


def vlm(x, draw, o):
    """Variable-length masked: as mlm, but the number of masked positions |M| of every sequence is itself
    uniform on round(low * T) .. round(high * T), so that contexts of every length are seen in training.
    low = high = r is mlm.

    The counts of one step are not drawn independently but follow the lattice (u + i*phi) mod 1 over the
    sequence's index i in the global batch, phi the golden ratio, u uniform and drawn once per step. Each
    count is still exactly uniform, and any run of consecutive sequences is evenly spread over the range: less
    variance, and nearly the same number of masked tokens in every micro-batch.
    """
    low, high = (mask_count(r, o.block_size) for r in o.mask_range)
    counts = low + lattice(draw.offset, draw.indices, high - low + 1)               # (B,)
    return mask_batch(x, counts, most_masked(low, high, len(x)), draw, o)


def mask_batch(x, counts, slots, draw, o):
    """Mask counts[i] uniformly chosen positions of row i of x (B, >=T) and predict the original tokens there.

    The scored positions go into `slots` >= sum(counts) entries, so that shapes do not change from step to
    step; entries beyond the masked positions have weight 0. o.normalization names what the step's loss is:
      tokens  mean over the masked tokens of the batch: every masked token counts the same, so a sequence
              counts in proportion to its mask ratio and long contexts (few masks) weigh little.
      bound   mean over sequences of the mean over the sequence's masked tokens: every context length counts
              the same. With counts uniform on 1..T this is the evidence bound of masked diffusion,
              -log P(x) / T <= loss.
    """
    T = o.block_size
    x = x[:, :T]
    if counts.sum() > slots:
        raise ValueError(f"{counts.sum()} masked tokens do not fit {slots} slots: "
                         "are the indices consecutive?")
    rank = draw.per_sequence(T).argsort(axis=1).argsort(axis=1)     # (B, T) a random permutation a row
    masked = rank < counts[:, None]                                 # (B, T)
    inputs = np.where(masked, o.mask_token, x)
    if o.corruption == "bert":
        kind = draw.per_sequence(T)                                 # (B, T) 80 % mask, 10 % other, 10 % as is
        other = (draw.per_sequence(T) * o.vocab_size).astype(np.int64)
        inputs = np.where(masked & (kind >= 0.8), np.where(kind < 0.9, other, x), inputs)
    positions = np.argsort(~masked.ravel(), kind="stable")[:slots]  # (N,) masked first, in order
    weights = masked.ravel()[positions].astype(np.float32)          # (N,) 1 if masked, 0 if unused
    if o.normalization == "bound":
        weights /= counts[positions // T]
    return Batch(inputs, positions, x.ravel()[positions, None], weights)


def mask_count(ratio, T):
    """Number of masked positions out of T at a ratio in (0, 1]; at least one."""
    return max(1, round(ratio * T))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)      # (sqrt(5) - 1) / 2 as a fraction of 2**64

def lattice(offset, indices, levels):
    """(B,) int64, floor(levels * ((u + i*phi) mod 1)) for each index i,
    in exact 64-bit arithmetic (2**64 stands for 1).
    """
    h = np.uint64(offset) + np.asarray(indices, dtype=np.uint64) * GOLDEN           # wraps around at 2**64
    return (((h >> np.uint64(32)) * np.uint64(levels)) >> np.uint64(32)).astype(np.int64)


@lru_cache
def most_masked(low, high, n):
    """The largest number of masked tokens that n consecutive sequences of a vlm step can have,
    over every offset u.

    Exact: as u grows, the sum of the counts grows too until some sequence's lattice point passes 1 and drops
    to 0, so the maximum lies just before one of these n wraps. Try them all; starting at a later sequence
    only shifts u.
    """
    i = np.arange(n, dtype=np.uint64)
    just_before_wrap = np.uint64(2**64 - 1) - i * GOLDEN
    return n * low + max(int(lattice(u, i, high - low + 1).sum()) for u in just_before_wrap)

# -----------------------------------------------------------------------------
# The table. A new objective goes here.

OBJECTIVES = {"ar": ar, "dar": dar, "mlm": mlm, "vlm": vlm}
CAUSAL = {"ar", "dar"}                      # attention is causal for these, bidirectional for the others


def window_size(o):
    """Tokens an objective needs per sequence: T for the inputs,
    and those after the last position that may be targets.

    One more for all but dar (the masked objectives ignore it),
    so that ar, mlm and vlm train on the very same windows.
    """
    return o.block_size + (o.lookahead if o.objective == "dar" else 1)


CHOICES = {"dar_estimator": ("sample", "expectation"), "corruption": ("mask", "bert"),
           "normalization": ("tokens", "bound")}


def check(o):
    """Raises ValueError, one line, if the options make no sense."""
    low, high = o.mask_range
    if o.objective not in OBJECTIVES:
        raise ValueError(f"objective {o.objective!r} is not one of {', '.join(OBJECTIVES)}")
    for name in ("block_size", "lookahead"):
        if getattr(o, name) < 1 or getattr(o, name) != int(getattr(o, name)):
            raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(o, name)}")
    for name, choices in CHOICES.items():
        if getattr(o, name) not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(o, name)!r}")
    if not 0 < o.mask_ratio <= 1:
        raise ValueError(f"mask_ratio must be in (0, 1], not {o.mask_ratio}")
    if not 0 < low <= high <= 1:
        raise ValueError(f"mask_range must be 0 < LOW <= HIGH <= 1, not {low} {high}")
