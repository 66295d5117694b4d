"""
The four pretraining objectives of "Look Ahead or Look Around?" (Zhang et al., ICML 2024, arXiv 2407.00935).

An objective is a distribution over (context, target) pairs, and nothing else. Each function below
maps windows of token ids to what one training step needs:

    inputs     (B, T)  what the model sees
    positions  (N,)    which positions of the flattened (B*T) inputs are scored
    targets    (N, K)  what they must predict; the log-probabilities of the K targets are averaged
    weights    (N,)    weight of each scored position; the loss is sum(weight * loss) / sum(weight)

Model, loss, training loop and evaluation are the same for all objectives. To add a fifth one, write a
function and enter it in OBJECTIVES: training, sampling, evaluation and the tests then know it.

    python train.py --objective ar
    python train.py --objective dar --lookahead 2
    python train.py --objective mlm --mask_ratio 0.15
    python train.py --objective vlm --mask_range 0.15 1.0
    python -m pytest tests/test_objectives.py       # every objective against brute force
"""
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Callable, NamedTuple

import numpy as np


@dataclass
class Options:
    """What an objective may depend on. Each but vocab_size has a flag of the same name in flags.py."""
    objective: str = "vlm"
    block_size: int = 128               # T, tokens the model sees
    vocab_size: int = 2048              # ids that stand for text; the mask token is the next one
    lookahead: int = 2                  # dar: t, the target is one of the next t tokens
    dar_estimator: str = "sample"       # dar: sample | expectation
    mask_ratio: float = 0.15            # mlm: fraction of the T positions that is masked
    mask_range: tuple = (0.15, 1.0)     # vlm: lowest and highest fraction
    corruption: str = "mask"            # mlm, vlm: mask | bert (80 % mask, 10 % random, 10 % unchanged)
    normalization: str = "tokens"       # mlm, vlm: tokens | bound, see `mask_batch`

    def __post_init__(self):
        self.mask_range = tuple(self.mask_range)            # flags and JSON give lists

    @property
    def mask_token(self):
        return self.vocab_size


class Batch(NamedTuple):
    """What an objective returns."""
    inputs: np.ndarray                  # (B, T) int64
    positions: np.ndarray               # (N,) int64, into the flattened inputs
    targets: np.ndarray                 # (N, K) int64
    weights: np.ndarray                 # (N,) float32, 0 for an unused slot

# -----------------------------------------------------------------------------
# Look ahead: autoregressive objectives. Position k sees x[1..k].

def ar(x, draw, options):
    """Autoregressive, L = -E sum_k log P(x[k+1] | x[1..k]).

    x: (B, T+1) token ids. Every position is scored:

        x = [[5, 6, 7, 8]]  ->  inputs [[5, 6, 7]], targets [[6], [7], [8]]
    """
    T = options.block_size
    return score_every_position(x[:, :T], x[:, 1:T + 1, None])


def dar(x, draw, options):
    """Diversity-enhanced autoregressive, L = -E sum_k E_{s ~ U{1..t}} log P(x[k+s] | x[1..k]).

    t is options.lookahead, and t = 1 is `ar`. The model is not told s. With dar_estimator "sample" one s is
    drawn per position. "expectation" averages over all t: the same expected gradient with less variance.

    x: (B, T+t) token ids. With t = 2:

        x = [[5, 6, 7, 8, 9]]  ->  inputs       [[5, 6, 7]]
                                   sample       [[6], [8], [8]]             if s is 1, 2, 1
                                   expectation  [[6, 7], [7, 8], [8, 9]]
    """
    T = options.block_size
    t = options.lookahead

    # Every position with the t tokens after it
    ahead = np.lib.stride_tricks.sliding_window_view(x[:, 1:], t, axis=1)       # (B, T, t)

    # Pick one of them
    if options.dar_estimator == "sample":
        s = (draw.per_sequence(T) * t).astype(np.int64)                         # (B, T), 0..t-1
        ahead = np.take_along_axis(ahead, s[:, :, None], axis=2)                # (B, T, 1)

    return score_every_position(x[:, :T], ahead)


def score_every_position(inputs, targets):
    """inputs (B, T), targets (B, T, K) -> a Batch in which all N = B*T positions have weight 1."""
    require(targets.shape[:2] == inputs.shape,
            f"inputs {inputs.shape} and targets {targets.shape} do not have the same positions: inputs are "
            "the first T tokens, and a window reaches as far beyond them as `ahead` says in OBJECTIVES")
    n = inputs.size
    return Batch(inputs, np.arange(n), targets.reshape(n, -1), np.ones(n, dtype=np.float32))

# -----------------------------------------------------------------------------
# Look around: masked objectives. A masked position sees every visible one.

def mlm(x, draw, options):
    """Masked, L = -E_M sum_{j in M} log P(x[j] | x[not M]).

    M is uniform among the sets of round(mask_ratio * T) positions.

    x: (B, T+1) token ids, of which the first T are used. See `mask_batch` for an example.
    """
    count = mask_count(options.mask_ratio, options.block_size)
    masked = uniform_masks(np.full(len(x), count), draw, options)               # (B, T)
    return mask_batch(x, masked, count * len(x), draw, options)


def vlm(x, draw, options):
    """Variable-length masked: as mlm, but every sequence draws its own number of masked positions |M|.

    |M| is uniform on round(low * T) .. round(high * T), so that contexts of every length are seen in
    training. low = high = r is mlm.

    Drawing every count independently would do. `spread` draws the counts of one step so that they cover
    the range evenly: each is still uniform, and the number of masked tokens hardly varies between steps.
    """
    low, high = [mask_count(ratio, options.block_size) for ratio in options.mask_range]
    counts = low + spread(draw.offset, draw.indices, high - low + 1)            # (B,)
    masked = uniform_masks(counts, draw, options)                               # (B, T)
    return mask_batch(x, masked, most_masked(low, high, len(x)), draw, options)


def uniform_masks(counts, draw, options):
    """Choose counts[i] of the T positions of sequence i, every set equally likely: (B, T) bool."""
    T = options.block_size
    rank = draw.per_sequence(T).argsort(axis=1).argsort(axis=1)     # (B, T): 0..T-1 in random order
    return rank < counts[:, None]


def mask_batch(x, masked, slots, draw, options):
    """Hide the masked positions of x and predict the original tokens there.

    x: (B, >=T) token ids. masked: (B, T) bool, chosen in any way. slots: N, at least the number of masked
    positions. Compiled code needs the same shapes at every step, so N is fixed and the slots that are
    left over have weight 0. With the mask token 50 and slots = 3:

        x = [[5, 6, 7, 8]], masked at 2 and 4  ->  inputs [[5, 50, 7, 50]], positions [1, 3, 0],
                                                   targets [[6], [8], [5]], weights [1, 1, 0]

    options.normalization names what the step's loss is:

    tokens  The mean over the masked tokens of the batch. Every masked token counts the same, so a
            sequence counts in proportion to its mask ratio and long contexts (few masks) weigh little.
    bound   The mean over sequences of the mean over each sequence's masked tokens. Every context length
            counts the same. With counts uniform on 1..T this is the evidence bound of masked diffusion,
            -log P(x) / T <= loss.
    """
    T = options.block_size
    x = x[:, :T]
    masked = np.asarray(masked, dtype=bool)                                     # a tensor will do
    if masked.sum() > slots:
        raise WrongBatch(f"{masked.sum()} masked tokens do not fit {slots} slots: "
                         "slots must be at least the number of masked positions of any batch")

    # What the model sees. BERT's corruption: 80 % mask, 10 % a random token, 10 % unchanged
    inputs = np.where(masked, options.mask_token, x)
    if options.corruption == "bert":
        kind = draw.per_sequence(T)                                             # (B, T)
        other = (draw.per_sequence(T) * options.vocab_size).astype(np.int64)    # (B, T)
        replaced = np.where(kind < 0.9, other, x)
        inputs = np.where(masked & (kind >= 0.8), replaced, inputs)

    # The masked positions, in order, then unmasked ones for the slots that are left over
    positions = np.argsort(~masked.ravel(), kind="stable")[:slots]              # (N,)
    targets = x.ravel()[positions, None]                                        # (N, 1)

    # What each of them counts
    weights = masked.ravel()[positions].astype(np.float32)                      # (N,), 1 or 0
    if options.normalization == "bound":
        counts = np.maximum(masked.sum(axis=1), 1)                              # (B,)
        weights /= counts[positions // T]
    return Batch(inputs, positions, targets, weights)

# -----------------------------------------------------------------------------
# The table. A new objective goes here, with all that is special about it.

class Objective(NamedTuple):
    """All that is special about an objective."""
    batch: Callable                     # (x, draw, options) -> Batch
    causal: bool                        # attention: position k sees 1..k only, or all positions
    ahead: Callable = lambda options: 1             # how far the targets reach beyond the inputs, tokens
    most_masks: Callable = lambda options: None     # most masks of a sequence in training; None: no masks


OBJECTIVES = {
    "ar": Objective(ar, causal=True),
    "dar": Objective(dar, causal=True, ahead=lambda options: options.lookahead),
    "mlm": Objective(mlm, causal=False,
                     most_masks=lambda options: mask_count(options.mask_ratio, options.block_size)),
    "vlm": Objective(vlm, causal=False,
                     most_masks=lambda options: mask_count(options.mask_range[1], options.block_size)),
}


def options_of_run(train, config):
    """The Options of a run. train: the flags of its training, from config.json. config: of its model."""
    known = {field.name: train[field.name] for field in fields(Options) if field.name in train}
    return Options(**{**known, "block_size": config.block_size, "vocab_size": config.vocab_size})


def window_size(options):
    """Tokens per sequence: T inputs, and those beyond them that may be targets.

    The masked objectives need none, but get one that they ignore: ar, mlm and vlm train on the same windows.
    """
    return options.block_size + OBJECTIVES[options.objective].ahead(options)


# =============================================================================
# Behind the scenes: counts, random numbers, checks. Not needed to understand the objectives.
# =============================================================================

def mask_count(ratio, T):
    """Number of masked positions out of T at a ratio in (0, 1]; at least one."""
    return max(1, round(ratio * T))


class Draw:
    """The random numbers of some sequences of one training step.

    indices: (B,) consecutive positions in the global batch.

    A pure function of (seed, step, index): a sequence gets the same numbers in whichever process or
    micro-batch it is processed. So a run does not depend on how the batch is cut, and resuming needs no
    random state to be saved.
    """
    def __init__(self, seed, step, indices):
        def generator(index):
            counter = np.array([0, 0, step, index], dtype=np.uint64)
            return np.random.Generator(np.random.Philox(key=seed, counter=counter))

        whole_step = generator(2**64 - 1)
        self.indices = np.asarray(indices, dtype=np.uint64)
        self.offset = whole_step.integers(2**64, dtype=np.uint64)       # the same for every sequence
        self._generators = [generator(int(i)) for i in self.indices]

    def per_sequence(self, n):
        """(B, n) float64, uniform on [0, 1): the next n numbers of every sequence."""
        return np.stack([generator.random(n) for generator in self._generators])


GOLDEN = np.uint64(0x9E3779B97F4A7C15)      # phi = (sqrt(5) - 1) / 2, as a fraction of 2**64

def spread(offset, indices, levels):
    """(B,) int64 in 0 .. levels-1: floor(levels * ((u + i*phi) mod 1)) for each index i.

    A lattice: u is uniform, so each number is, and the golden ratio phi spreads any run of consecutive
    indices evenly over the levels. 64-bit integers, in which 2**64 stands for 1; the upper 32 bits decide.

    offset: u, one for the whole step. indices: (B,), i, positions in the global batch.
    """
    indices = np.asarray(indices, dtype=np.uint64)
    point = np.uint64(offset) + indices * GOLDEN                        # (B,), wraps around at 2**64
    return (((point >> np.uint64(32)) * np.uint64(levels)) >> np.uint64(32)).astype(np.int64)


@lru_cache
def most_masked(low, high, n):
    """The most masked tokens that n consecutive sequences of a vlm step can have, over every offset u.

    As u grows, the sum of the counts grows too, until some sequence's lattice point passes 1 and drops to
    0. So the maximum lies just before one of these n wraps: try them all. (Starting at a later sequence
    only shifts u.)
    """
    i = np.arange(n, dtype=np.uint64)
    just_before_wrap = np.uint64(2**64 - 1) - i * GOLDEN                # (n,) offsets
    sums = [int(spread(u, i, high - low + 1).sum()) for u in just_before_wrap]
    return n * low + max(sums)


CHOICES = {"dar_estimator": ("sample", "expectation"), "corruption": ("mask", "bert"),
           "normalization": ("tokens", "bound")}


def check(options):
    """Raises ValueError, one line, if the options make no sense."""
    if options.objective not in OBJECTIVES:
        raise ValueError(f"objective {options.objective!r} is not one of {', '.join(OBJECTIVES)}")
    entry = OBJECTIVES[options.objective]
    for name in ("batch", "ahead", "most_masks"):
        value = getattr(entry, name)
        if not callable(value):
            raise ValueError(f"{name} of {options.objective} in OBJECTIVES must be a function, "
                             f"such as lambda options: {value}, not {value!r}")
    for name in ("block_size", "lookahead"):
        value = getattr(options, name)
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
    for name, choices in CHOICES.items():
        if getattr(options, name) not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(options, name)!r}")

    low, high = options.mask_range
    if not 0 < options.mask_ratio <= 1:
        raise ValueError(f"mask_ratio must be in (0, 1], not {options.mask_ratio}")
    if not 0 < low <= high <= 1:
        raise ValueError(f"mask_range must be 0 < LOW <= HIGH <= 1, not {low} {high}")


# -----------------------------------------------------------------------------
# A wrong Batch gets a sentence before the first step

class WrongBatch(ValueError):
    """What is wrong with a Batch, in one line."""


def check_batch(batch, options):
    """Raises WrongBatch, one line, if no model can be trained on this Batch.

    For the first batch of a run. int32 will do for int64, and a tensor for an array: the model takes both.
    """
    T = options.block_size
    require(isinstance(batch, (tuple, list)) and len(batch) == 4,
            f"{options.objective} must return a Batch(inputs, positions, targets, weights), "
            f"not {type(batch).__name__}")

    # Types
    for field, value in zip(Batch._fields, batch):
        is_array = hasattr(value, "__array__")
        require(is_array, f"{field} must be a NumPy array, not {type(value).__name__}")
    batch = Batch(*map(np.asarray, batch))
    inputs, positions, targets, weights = batch
    for field in ("inputs", "positions", "targets"):
        dtype = getattr(batch, field).dtype
        require(dtype in (np.int32, np.int64), f"{field} must be int64, not {dtype}")
    require(weights.dtype == np.float32, f"weights must be float32, not {weights.dtype}")

    # Shapes
    require(inputs.ndim == 2 and inputs.shape[1] == T,
            f"inputs must be (B, T) with T = {T}, not {inputs.shape}")
    require(positions.ndim == 1, f"positions must be (N,), not {positions.shape}")
    N = len(positions)
    require(N > 0, "positions is empty: no position is scored")
    require(targets.ndim == 2 and len(targets) == N and targets.size > 0,
            f"targets must be (N, K) with N = {N} as in positions, not {targets.shape}")
    require(weights.shape == (N,),
            f"weights must be (N,) with N = {N} as in positions, not {weights.shape}")

    # Ids. Unused slots are looked up as well: 0 times an infinite loss is not a number
    mask_token = options.mask_token
    bad = first_outside(inputs, mask_token)
    require(bad is None, f"inputs hold the id {bad}: ids are 0 .. {mask_token}, "
                         f"of which {mask_token} is the mask token")
    require(not (targets == mask_token).any(),
            f"a target is the mask token, {mask_token}: targets are text, in unused slots too")
    bad = first_outside(targets, mask_token - 1)
    require(bad is None, f"a target is {bad}: targets are ids of text, 0 .. {mask_token - 1}, "
                         "in unused slots too (they have weight 0)")
    bad = first_outside(positions, inputs.size - 1)
    require(bad is None, f"positions hold {bad}: they index the flattened inputs, "
                         f"0 .. B*T-1 = {inputs.size - 1}")

    # Weights
    require(np.isfinite(weights).all(), "a weight is not finite")
    require((weights >= 0).all(), "a weight is negative")
    require((weights > 0).any(), "all weights are 0: no position is scored")
    if not OBJECTIVES[options.objective].causal:
        times = np.bincount(positions[weights > 0])             # how often each position is scored
        sequence, position = divmod(int(times.argmax()), T)
        require(times.max() == 1,
                f"position {position + 1} of sequence {sequence + 1} is scored {times.max()} "
                "times: a masked token has one slot")


def check_objective(options, same_shapes=True):
    """Raises WrongBatch, one line, if the objective itself is wrong.

    It is tried on windows in which no token occurs twice, so that a token tells its place. Then a target
    that the model sees is a leak. BERT's corruption shows some on purpose, so it is switched off here.
    same_shapes: the number of scored positions must not change from step to step.
    """
    B = 4
    width = window_size(options)
    vocab_size = max(options.vocab_size, B * width)
    options = replace(options, vocab_size=vocab_size, corruption="mask")
    name = options.objective
    slots = []

    for step in range(3):
        tokens = np.random.default_rng(step).permutation(vocab_size)
        x = tokens[:B * width].reshape(B, width)
        given = x.copy()
        batch = try_batch(given, Draw(0, step, range(B)), options)
        check_batch(batch, options)
        require(np.array_equal(given, x), f"{name} changes the windows that it is given")
        batch = Batch(*map(np.asarray, batch))
        check_leak(batch, options)
        check_most_masks(batch, options)

        # Compiled code needs the same shapes at every step
        slots.append(len(batch.positions))
        require(slots[0] == slots[-1] or not same_shapes,
                f"the number of scored positions, N, changes from {slots[0]} to {slots[-1]}: "
                "fill it up with slots of weight 0, so that it is the same at every step "
                "(not needed with --compile off)")


def try_batch(x, draw, options):
    """The objective's Batch. An index that is too large gets the window's size beside it."""
    try:
        return OBJECTIVES[options.objective].batch(x, draw, options)
    except IndexError as error:
        raise IndexError(f"{error}. {window_words(options)}") from error


def window_words(options):
    """How long a window is, for a message."""
    ahead = OBJECTIVES[options.objective].ahead(options)
    return (f"A window has {options.block_size} + {ahead} tokens: no target can lie farther ahead than "
            f"{ahead}, which `ahead` in OBJECTIVES says")


def check_leak(batch, options):
    """Raises WrongBatch if a target is among the tokens that its position sees. No token occurs twice."""
    causal = OBJECTIVES[options.objective].causal
    attention = "causal" if causal else "bidirectional"
    used = batch.weights > 0
    positions = batch.positions[used]
    targets = batch.targets[used]

    pairs = np.column_stack((positions, targets))
    twice = len(np.unique(pairs, axis=0)) < len(pairs)
    require(not twice, "a position is scored twice on the same target")
    for position, alternatives in zip(positions, targets):
        sequence, k = divmod(int(position), options.block_size)
        visible = batch.inputs[sequence, :k + 1] if causal else batch.inputs[sequence]
        leaked = np.isin(alternatives, visible).any()
        require(not leaked, f"leak: the target of position {k + 1} is a token that the model sees "
                            f"under {attention} attention")


def check_most_masks(batch, options):
    """Raises WrongBatch if a sequence has more masks than OBJECTIVES says.

    Sampling and evaluation go by that number: they show the model that many masks, and treat a model
    without masks as one of the next token.
    """
    most = OBJECTIVES[options.objective].most_masks(options)
    masks = (batch.inputs == options.mask_token).sum(axis=1).max()
    require(masks == 0 or most is not None,
            "inputs hold masks: the objective's entry in OBJECTIVES must say how many a sequence has at "
            f"most, such as most_masks=lambda options: {masks}")
    require(most is None or masks <= most,
            f"a sequence has {masks} masks, but most_masks in OBJECTIVES says {most} at most")


def never_read(options):
    """Names of the options that the objective never reads, so that they have no effect on it.

        objective "ar"  ->  ["vocab_size", "lookahead", "dar_estimator", "mask_ratio", ...]
    """
    read = set()

    class Observed(Options):
        """Options that note which of them are read."""
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    observed = Observed(**vars(options))
    read.clear()

    # Let the objective make a batch
    x = np.zeros((2, window_size(observed)), dtype=np.int64)
    draw = Draw(0, 0, range(2))
    try_batch(x, draw, observed)
    return [name for name in vars(options) if name not in read]


def first_outside(values, last):
    """The first of an array's values that is not in 0 .. last, or None."""
    bad = values[(values < 0) | (values > last)]
    return bad[0] if len(bad) else None


def require(condition, message):
    """Raises WrongBatch(message) unless the condition holds."""
    if not condition:
        raise WrongBatch(message)
