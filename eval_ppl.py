"""
Perplexity of causal and masked models on the same text. For a masked model the word has several meanings:
here are four definitions, each with its own name.

    python eval_ppl.py --checkpoint out/vlm --val                   # its validation split, no download
    python eval_ppl.py --checkpoint out/ar out/dar out/mlm out/vlm  # WikiText-2 raw test, one column each
    python eval_ppl.py --checkpoint out/mlm out/vlm --suffix matched --text book.txt --plot book.png
    python eval_ppl.py --checkpoint out/mlm out/vlm --method bound  # also: pseudo, confidence (masked models)
    python eval_ppl.py --checkpoint out/ar out/vlm --val --context 4 8 16 32    # what context is worth

    method         averaged over the text, nats per token             a likelihood?  forward passes per window
    left-to-right  -log P(x[k+1] | x[1..k])                           yes            causal 1, masked 1 per k
    bound          E_n E_|M|=n mean_{j in M} -log P(x[j] | x[not M])  upper bound    --samples
    pseudo         -log P(x[j] | x[not j])                            no             T
    confidence     -log P(x) / T, in the model's order of positions   yes            T

Only left-to-right compares all four objectives (the paper's measurement: perplexity against prompt length).
The other three do not apply to causal models. The text is cut into windows of T = block_size tokens that do
not overlap.

Standard errors are clustered by document (a file of the validation split, an article of WikiText): tokens of
one document are not independent. If the text is one document, windows are treated as independent.

Models with different vocabularies are compared by bits per byte or word perplexity, which are printed where
the numbers are lengths of a code. Both follow their definition on the text as it is. Published numbers
differ: lm-eval, for one, detokenises WikiText first.

All numbers, with sums per document, go to CHECKPOINT/eval_ppl_TEXT_METHOD.json, or below --results DIR. TEXT
is wikitext-2, val, or the name of FILE and the beginning of its sha256. METHOD may be followed by -one or
-matched, and by -N-windows with --max_windows N. Other flags write to the same file.
"""
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import texts
import tokenizer
from common import (Parser, add_device_flags, align, check_different, check_exists, check_plot,
                    command_line, load_checkpoint, one_line_errors, pick_device, result_path, save_figure,
                    write_result)
from objectives import OBJECTIVES, Draw, Options, mask_batch, options_of_run, spread, uniform_masks

SEED = 2407_00935               # of masks and sampled prompt lengths: the same in every run, for every model
LOGITS_LIMIT = 2 ** 25          # numbers in the largest (N, V) float32 buffer: 128 MiB

progress = partial(tqdm, unit="batch", dynamic_ncols=True, leave=False, disable=None)

# -----------------------------------------------------------------------------
# What is measured at a token

class Scores(NamedTuple):
    """Arrays of one shape with one number per token. A fourth number is one field here and one in `score`."""
    nats: np.ndarray            # -log P(the text's token)
    surest: np.ndarray          # -log P(the likeliest token)
    right: np.ndarray           # 1 where the text's token is the likeliest, else 0


def score(model, hidden, targets):
    """The scores of N predictions. hidden: (N, C). targets: (N,) the text's tokens. Fields are (N,) float64.

    The mask token and padded ids have logit -inf (model.logits): all probability is on ids of text.
    """
    rows = max(1, LOGITS_LIMIT // model.config.padded_vocab_size)
    parts = []
    for h, target in zip(hidden.split(rows), targets.split(rows)):
        logits = model.logits(h)                                        # (rows, V) float32
        log_total = logits.logsumexp(dim=1)                             # (rows,)
        of_target = logits.gather(1, target[:, None])[:, 0]             # (rows,)
        largest = logits.amax(dim=1)                                    # (rows,)
        scores = Scores(nats=log_total - of_target, surest=log_total - largest,
                        right=(of_target == largest).float())
        parts.append(torch.stack(scores))                               # (fields, rows)
    return Scores(*torch.cat(parts, dim=1).cpu().double().numpy())


def no_scores(n, T):
    """(fields, n, T) zeros, to be filled in: Scores(*array) names the fields."""
    return np.zeros((len(Scores._fields), n, T))


def batches(n, batch_size):
    """0 .. n-1 in arrays of batch_size."""
    return np.split(np.arange(n), range(batch_size, n, batch_size))

# -----------------------------------------------------------------------------
# The four definitions. x: (n, T) int64 windows of text. Each returns Scores with fields (n, T), 0 where a
# token was not scored, and weights (n, T): how many tokens each score stands for in the mean over all.

class Settings(NamedTuple):
    """How a method is run."""
    batch_size: int = 64                # sequences per forward pass
    samples: int = 8                    # per window: mask counts (bound), prompt lengths (left-to-right)
    prompt_lengths: tuple = ()          # left-to-right: lengths at which every window is scored
    masks: np.ndarray = None            # (T,) left-to-right: how many masks follow a prompt of k tokens


def left_to_right(model, x, settings):
    """-log P(x[k+1] | x[1..k]) for k = 1 .. T-1.

    A causal model is scored at all of them in one forward pass. A masked model needs a forward pass for every
    k: it is scored at settings.prompt_lengths and at a sample of all lengths, see `sampled`.
    """
    _, T = x.shape
    weights = sampled(x, T - 1 if model.config.causal else settings.samples)
    wanted = weights > 0
    wanted[:, list(settings.prompt_lengths)] = True
    return next_token(model, x, wanted, settings), weights


def sampled(x, samples):
    """Weights (n, T) of an even sample of prompt lengths, which stands for the mean over all of them.

    `samples` different ones per window. They depend on the shape of x (n, T) alone, so all models are scored
    on the same tokens.
    """
    n, T = x.shape
    lengths = 1 + grid(n, samples, levels=T - 1)                # (n, S), different ones in a row
    weights = np.zeros((n, T))                                  # a window's first token is only read
    np.put_along_axis(weights, lengths, (T - 1) / lengths.shape[1], axis=1)
    return weights


def next_token(model, x, wanted, settings):
    """-log P(x[k+1] | x[1..k]) at the wanted tokens, (n, T) bool, by the model's kind."""
    if model.config.causal:
        return left_to_right_causal(model, x, settings.batch_size)
    return left_to_right_masked(model, x, wanted, settings.masks, settings.batch_size)


def left_to_right_causal(model, x, batch_size):
    """-log P(x[k+1] | x[1..k]) at every token but the first, in one forward pass per window."""
    out = no_scores(*x.shape)
    for rows in progress(batches(len(x), batch_size)):
        window = x[rows]                                                # (B, T)
        hidden = model.features(window[:, :-1]).flatten(0, 1)           # (B * (T-1), C)
        scores = score(model, hidden, window[:, 1:].flatten())
        out[:, rows, 1:] = np.reshape(scores, (len(scores), len(rows), -1))
    return Scores(*out)


def left_to_right_masked(model, x, wanted, masks, batch_size):
    """-log P(x[k+1] | x[1..k]) of a masked model: x[1..k] visible, then masks only, read out at the first.

    x: (n, T). wanted: (n, T) bool, the tokens that are scored: at [i, k] the one after the first k of window
    i, never at [i, 0]. masks: (T,), how many follow a prompt of k tokens. Returns Scores with fields (n, T),
    0 where nothing is wanted.

    Every wanted token is a forward pass of k + masks[k] tokens. For speed, passes are sorted by length and
    done batch_size at a time. Where lengths differ within a batch, padding is hidden from attention.
    """
    rows, prompts = wanted.nonzero()                                    # (N,), (N,)
    row = torch.from_numpy(rows).to(x.device)
    k = torch.from_numpy(prompts).to(x.device)
    length = k + torch.from_numpy(masks).to(x.device)[k]                # (N,): prompt and masks
    out = no_scores(*x.shape)

    for job in progress(torch.argsort(length, stable=True).split(batch_size)):
        # Inputs: as many columns as the longest of these passes needs
        window = x[row[job]]                                            # (B, T)
        prompt = k[job, None]                                           # (B, 1)
        shortest, longest = length[job[[0, -1]]].tolist()               # host-device sync
        column = torch.arange(longest, device=x.device)                 # (L,)
        inputs = torch.where(column < prompt, window[:, :longest], model.config.mask_token)     # (B, L)
        valid = None if shortest == longest else column < length[job, None]                     # (B, L)

        # The prediction at the first mask
        hidden = model.features(inputs, valid)                          # (B, L, C)
        first_mask = hidden.take_along_dim(prompt[:, None], 1)[:, 0]    # (B, C)
        target = window.gather(1, prompt)[:, 0]                         # (B,)
        scores = score(model, first_mask, target)
        job = job.numpy(force=True)
        out[:, rows[job], prompts[job]] = scores
    return Scores(*out)


def bound(model, x, settings):
    """Monte Carlo estimate of the likelihood bound of a masked model:

        -log P(x) / T  <=  E_{n ~ U{1..T}} E_{|M| = n}  1/n sum_{j in M} -log P(x[j] | x[not M])

    P(x) is the mixture over all orders of generating the tokens one by one (Uria et al. 2014, Hoogeboom
    et al. 2022), and the bound follows by Jensen's inequality. It is minus the ELBO of masked diffusion.
    Each window gets `samples` counts n (see `grid`), and for each a uniform mask of exactly n positions, a
    pure function of (SEED, sample, window), not of the batch. A token's score is its share of the estimate.
    """
    n, T = x.shape
    options = Options(block_size=T, vocab_size=model.config.vocab_size, normalization="bound")
    counts = 1 + grid(n, settings.samples, levels=T)                    # (n, S)
    out = no_scores(n, T)

    jobs = [(rows, sample) for rows in batches(n, settings.batch_size)
            for sample in range(counts.shape[1])]
    for rows, sample in progress(jobs):
        # Masks, drawn as in training
        count = counts[rows, sample]                                    # (B,)
        draw = Draw(SEED, sample, rows)
        masked = uniform_masks(count, draw, options)                    # (B, T)
        batch = mask_batch(x[rows].cpu().numpy(), masked, count.sum(), draw, options)

        # Predictions at all masks. weights are 1/count
        inputs = torch.from_numpy(batch.inputs).to(x.device)            # (B, T)
        positions = torch.from_numpy(batch.positions).to(x.device)      # (N,)
        targets = torch.from_numpy(batch.targets[:, 0]).to(x.device)    # (N,)
        hidden = model.features(inputs).flatten(0, 1)[positions]        # (N, C)
        scores = np.array(score(model, hidden, targets))                # (fields, N)
        share = scores * batch.weights * (T / counts.shape[1])
        out[:, rows[batch.positions // T], batch.positions % T] += share
    return Scores(*out), np.ones((n, T))


def pseudo(model, x, settings):
    """Pseudo-log-likelihood (Salazar et al. 2020), -log P(x[j] | x[not j]) for every j, one mask at a time.

    Not a likelihood: every token is predicted from its future too, and exp(-sum) over all texts is not 1.
    """
    n, T = x.shape
    out = no_scores(n, T)
    for job in progress(batches(n * T, settings.batch_size)):
        row = job // T                                                  # (B,)
        j = job % T                                                     # (B,)
        window = x[row]                                                 # (B, T)
        position = torch.from_numpy(j[:, None]).to(x.device)            # (B, 1)
        inputs = window.scatter(1, position, model.config.mask_token)   # (B, T)
        hidden = model.features(inputs).take_along_dim(position[:, None], 1)[:, 0]      # (B, C)
        out[:, row, j] = score(model, hidden, window.gather(1, position)[:, 0])
    return Scores(*out), np.ones((n, T))


def confidence(model, x, settings):
    """Exact likelihood under deterministic unmasking (DUEL, arXiv 2603.01367):

        -log P(x) = sum_i -log P(x[j_i] | x[j_1], ..., x[j_{i-1}])

    Start from masks only. j_i is the masked position where the model is surest of some token (the first of
    equals, up to 1e-4 nats): a function of what is visible, not of x[j_i]. There the text's token is scored
    and shown, so exp(-sum) over all texts is 1: the probability that generation in this order writes x.
    """
    n, T = x.shape
    out = no_scores(n, T)
    for rows in batches(n, settings.batch_size):
        window = x[rows]                                                # (B, T)
        inputs = torch.full_like(window, model.config.mask_token)
        for left in progress(range(T, 0, -1)):                          # masks that are left in each row
            # Score the text's tokens at all masks
            position = (inputs == model.config.mask_token).nonzero()[:, 1].view(-1, left)   # (B, left)
            hidden = model.features(inputs).take_along_dim(position[:, :, None], 1)     # (B, left, C)
            flat = score(model, hidden.flatten(0, 1), window.gather(1, position).flatten())
            scores = Scores(*[field.reshape(-1, left) for field in flat])       # (B, left) each

            # Keep the score where the model is surest, and show the token there
            least = scores.surest.min(axis=1, keepdims=True)            # (B, 1)
            best = (scores.surest <= least + 1e-4).argmax(axis=1)       # (B,), the first of equals
            column = torch.from_numpy(best[:, None]).to(x.device)       # (B, 1)
            j = position.gather(1, column)                              # (B, 1), into the window
            row = np.arange(len(rows))
            out[:, rows, j[:, 0].numpy(force=True)] = [field[row, best] for field in scores]
            inputs = inputs.scatter(1, j, window.gather(1, j))
    return Scores(*out), np.ones((n, T))

# -----------------------------------------------------------------------------
# An even sample

def grid(n, samples, levels):
    """(n, S) of 0 .. levels-1: for each of n windows an even grid of S = min(samples, levels) numbers.

    Number s of window i is floor(levels * (s + u_i) / S), u_i = (u + i*phi) mod 1 with phi the golden ratio:
    all numbers are equally likely, every window is spread evenly, and so are the windows. S = levels: each
    exactly once.
    """
    S = min(samples, levels)
    u = spread(Draw(SEED, 0, []).offset, np.arange(n), 2 ** 24) / 2 ** 24              # (n,)
    return (levels * (np.arange(S) + u[:, None]) / S).astype(np.int64)

# -----------------------------------------------------------------------------
# The table of definitions. A fifth one goes here.

class Method(NamedTuple):
    """A definition of perplexity, and what the program must know about it."""
    function: Callable                  # (model, x, settings) -> (Scores, weights)
    windows: int                        # how many are taken by default
    note: str                           # what a reader of the numbers has to know
    needs_masks: bool = True            # does not apply to causal models
    code_length: bool = True            # the sum is the length of a code or bounds it: bits per byte exist
    by_prompt: bool = False             # the first token of a window is only read, and prompt lengths apply


METHODS = {
    "left-to-right": Method(
        left_to_right, windows=500, needs_masks=False, by_prompt=True,
        note="next token after a prompt"),
    "bound": Method(
        bound, windows=500,
        note="upper bound on the nats per token of generation in a random order, from sampled masks"),
    "pseudo": Method(
        pseudo, windows=50, code_length=False,
        note="pseudo-perplexity, NOT a likelihood: each token is predicted from both sides"),
    "confidence": Method(
        confidence, windows=50,
        note="exact likelihood of generation in the order of the model's confidence"),
}

# -----------------------------------------------------------------------------
# Left to right: what follows the prompt, and how far back it reaches

SUFFIXES = {                            # what a masked model sees after the prompt
    "full": "masks up to block_size",
    "one": "a single mask",
    "matched": "no more masks than in training",
}


def masks_after_prompt(suffix, T, most):
    """(T,) int64: how many masks follow a prompt of k tokens. most: masks of a sequence in training."""
    room = T - np.arange(T)
    if suffix == "one":
        return np.ones_like(room)
    if suffix == "matched":
        return np.minimum(room, most)
    return room


def standard_lengths(T):
    """Prompt lengths 1, 2, 4, ... and T - 1, a list."""
    powers = {2 ** i for i in range(T.bit_length()) if 2 ** i < T}
    return sorted(powers | {T - 1})


def last_tokens_only(model, x, wanted, m, settings):
    """-log P(x[k+1] | x[k-m+1..k]) at the wanted tokens: only the m tokens before it are visible.

    The model sees these m tokens as if the text began with them, in the first m positions. A masked model
    sees settings.masks[m] masks after them, as after any prompt of m tokens, and is read out at the first.
    So it is `left_to_right` after m tokens, but the same tokens can be scored for every m. wanted: (n, T)
    bool, with at least m tokens before each. Scores have fields (n, T).
    """
    rows, places = wanted.nonzero()                                     # (N,), (N,)
    causal = model.config.causal
    read_out = m - 1 if causal else m                                   # at the last token, or the first mask
    out = no_scores(*x.shape)
    for job in progress(batches(len(rows), settings.batch_size)):
        # Inputs: the m tokens before the target, then masks
        window = x[rows[job]]                                           # (B, T)
        target = torch.from_numpy(places[job, None]).to(x.device)       # (B, 1)
        last = target - m + torch.arange(m, device=x.device)            # (B, m) their places
        inputs = window.gather(1, last)                                 # (B, m)
        if not causal:
            masks = int(settings.masks[m])
            inputs = F.pad(inputs, (0, masks), value=model.config.mask_token)       # (B, m + masks)

        # The prediction of the target
        hidden = model.features(inputs)[:, read_out]                    # (B, C)
        scores = score(model, hidden, window.gather(1, target)[:, 0])
        out[:, rows[job], places[job]] = scores
    return Scores(*out)


def by_context(model, x, contexts, settings):
    """What context is worth at which distance: the same tokens, scored with more and more of it visible.

    {m: (Scores, weights)} with only the last m tokens visible, for each m of contexts, and {"all": ...} with
    everything before them in the window. `samples` tokens per window are scored, evenly spread, all with at
    least max(contexts) tokens before them.
    """
    n, T = x.shape
    far = max(contexts)
    places = far + grid(n, settings.samples, levels=T - far)            # (n, S)
    weights = np.zeros((n, T))
    np.put_along_axis(weights, places, 1, axis=1)
    wanted = weights > 0

    out = {m: last_tokens_only(model, x, wanted, m, settings) for m in contexts}
    out["all"] = next_token(model, x, wanted, settings)
    return {m: (scores, weights) for m, scores in out.items()}

# -----------------------------------------------------------------------------
# From scores to numbers

def evaluate(model, x, method, settings, contexts=()):
    """All that is measured of a model on windows x (n, T): {name: (Scores, weights)}, all of shape (n, T).

    Names: "all", for left-to-right every prompt length k, and "context M" and "context all" for contexts.
    "sample" is what a causal model scores on the tokens that stand for all of them in a masked one.
    """
    scores, weights = METHODS[method].function(model, x, settings)
    out = {"all": (scores, weights)}
    if model.config.causal:
        out["sample"] = scores, sampled(x, settings.samples)
    for k in settings.prompt_lengths:
        column = np.zeros(x.shape)
        column[:, k] = 1                                        # x[k+1], which has k tokens before it
        out[str(k)] = (scores, column)
    if contexts:
        measured = by_context(model, x, contexts, settings)
        out |= {f"context {m}": result for m, result in measured.items()}
    return out


class Sums(NamedTuple):
    """Sums over the scored tokens of each document, (documents,)."""
    nats: np.ndarray
    right: np.ndarray
    tokens: np.ndarray


@torch.inference_mode()
def measure(checkpoint, windows, method, settings, contexts, device):
    """The part of a report that is measured: sums per document, and the numbers that follow from them."""
    start = time.time()
    x = windows.ids[:, 1:]                                      # (n, T)
    measured = evaluate(checkpoint.model, torch.from_numpy(x).to(device), method, settings, contexts)

    # Bytes and words of the text that is scored
    token_bytes, token_words = texts.token_sizes(windows.ids, checkpoint.encoding)      # (n, T) each
    if METHODS[method].by_prompt:                               # a window's first token is only read
        token_bytes[:, 0] = 0
        token_words[:, 0] = 0

    # Sums over each document
    document, unit = texts.clusters(windows.document)           # (n, T)
    add_up = partial(sum_by, document)                          # (n, T) -> (documents,)
    n_bytes = add_up(token_bytes)
    n_words = add_up(token_words)
    sums = {}
    for name, (scores, weights) in measured.items():
        sums[name] = Sums(nats=add_up(scores.nats * weights),
                          right=add_up(scores.right * weights),
                          tokens=add_up(weights))

    # Numbers. Bytes and words are those of all positions, so only "all" may be divided by them
    results = {name: summary(total) for name, total in sums.items()}
    if checkpoint.ahead == 1 and METHODS[method].code_length:
        results["all"] = summary(sums["all"], n_bytes, n_words)

    visible = [*contexts, "all"] if contexts else []
    _, weights = measured["all"]
    n_windows = np.bincount(document[:, 0], minlength=len(n_bytes))         # (documents,)
    return {"windows": len(x), "block_size": x.shape[1], "clusters": unit,
            "seconds": time.time() - start,
            "all": results["all"],
            "sample": results.get("sample"),
            "prompt_lengths": {str(k): results[str(k)] for k in settings.prompt_lengths},
            "context": {str(m): results[f"context {m}"] for m in visible},
            "unigram": frequencies_alone(checkpoint, x, weights),
            "documents": {"windows": n_windows.tolist(),
                          "bytes": n_bytes.astype(int).tolist(),
                          "words": n_words.astype(int).tolist()},
            "nats": {name: total.nats.tolist() for name, total in sums.items()},
            "tokens": {name: total.tokens.tolist() for name, total in sums.items()}}


def sum_by(document, values):
    """(documents,): the sum of values, (n, T), over the tokens of each document."""
    return np.bincount(document.ravel(), values.ravel(), minlength=document.max() + 1)


def frequencies_alone(checkpoint, x, weights):
    """{"nats_per_token", "perplexity"} of the same tokens under the unigram model of the training tokens.

    "The same" means weighted as the model's own scores. For a masked model, left to right, these are a
    sample, so the number differs a little from that of a causal model on the same text.
    """
    nats = float((-checkpoint.unigram[x] * weights).sum() / weights.sum())
    return {"nats_per_token": nats, "perplexity": math.exp(nats)}


def ratio(totals, sizes):
    """sum(totals) / sum(sizes) and its standard error. Both (n,): sums over each of n independent clusters.

    The ratio estimator (Cochran 1977, chapter 6): for r = sum(totals) / sum(sizes),

        se = std over clusters of (total - r size) / (sqrt(n) mean(size))

    Both sums vary between clusters, so long documents count more. nan for a single cluster.
    """
    used = (totals != 0) | (sizes != 0)
    totals = totals[used]
    sizes = sizes[used]
    n = len(sizes)
    r = totals.sum() / sizes.sum()
    if n == 1:
        return r, math.nan
    return r, (totals - r * sizes).std(ddof=1) / (math.sqrt(n) * sizes.mean())


def summary(sums, n_bytes=None, n_words=None):
    """Means and standard errors of Sums in all units, {name: float, or None if it does not exist}.

    n_bytes, n_words: (documents,), size of the text that these nats are a code for. None: they are no code.
    """
    mean, se = ratio(sums.nats, sums.tokens)
    right, right_se = ratio(sums.right, sums.tokens)
    perplexity = exp(mean)
    result = {"nats_per_token": mean, "nats_per_token_se": se,
              "perplexity": perplexity, "perplexity_se": perplexity * se,       # d exp(a) = exp(a) da
              "first_guess_right": right, "first_guess_right_se": right_se}

    if n_bytes is not None and n_bytes.any():
        mean, se = ratio(sums.nats, n_bytes)
        result["bits_per_byte"] = mean / math.log(2)
        result["bits_per_byte_se"] = se / math.log(2)

        # Chinese or DNA has no white space between words, at most between lines: no word perplexity
        if n_bytes.sum() < 40 * n_words.sum():
            mean, se = ratio(sums.nats, n_words)
            result["word_perplexity"] = exp(mean)
            result["word_perplexity_se"] = exp(mean) * se
    return {name: float(value) if math.isfinite(value) else None
            for name, value in result.items()}


def exp(nats):
    """e^nats, without an overflow."""
    return math.exp(min(nats, 700))                             # float64 overflows beyond e^709

# -----------------------------------------------------------------------------
# Table and plot

UNITS = ["perplexity", "nats_per_token", "bits_per_byte", "word_perplexity", "first_guess_right"]


def cell(result, name):
    """A number and its standard error as text, "-" for one that does not exist."""
    value = result.get(name)
    se = result.get(name + "_se")
    if value is None:
        return "-"
    style = ".3f"
    if value >= 10:
        style = ".2f"
    if value >= 100:
        style = ".1f"
    if value >= 1e5:
        style = ".3g"
    error = "" if se is None else f" ± {se:{style}}"
    return f"{value:{style}}" + error


def table(reports):
    """The table of the reports as text, one column per model."""
    names = [Path(r["checkpoint"]).name for r in reports]
    if len(set(names)) < len(names):                                # same folder names: show whole paths
        names = [r["checkpoint"] for r in reports]
    rows = [["", *names]]

    def add_row(label, results, unit):
        rows.append([label, *[cell(result or {}, unit) for result in results]])

    # Perplexity by prompt length
    for k in sorted({k for r in reports for k in r["prompt_lengths"]}, key=int):
        results = [r["prompt_lengths"].get(k) for r in reports]
        add_row(f"perplexity after {k}", results, "perplexity")

    # All positions, in all units that some model has
    for unit in UNITS:
        add_row(f"all: {unit.replace('_', ' ')}", [r["all"] for r in reports], unit)
        if unit == "perplexity":
            if mixed(reports):
                add_row("all, sampled: perplexity", [r["sample"] or r["all"] for r in reports], unit)
            add_row("word frequencies alone", [r["unigram"] for r in reports], unit)

    # The same tokens with less and less of the text hidden
    visible = {m for r in reports for m in r["context"]}
    for m in sorted(visible - {"all"}, key=int) + sorted(visible & {"all"}):
        label = "whole prompt" if m == "all" else f"only last {m}"
        results = [r["context"].get(m) for r in reports]
        add_row(f"nats per token, {label} visible", results, "nats_per_token")
    return align(rows)


def mixed(reports):
    """Whether causal and masked models are compared, left to right."""
    return any(r["suffix"] for r in reports) and any(r["sample"] for r in reports)


def show(reports):
    """Print the table, and what a reader of it has to know."""
    first = reports[0]
    units = sorted({f"{len(r['tokens']['all'])} {r['clusters']}" for r in reports})
    print()
    print(f"{first['method']} on {first['text']}, ± standard error over {' or '.join(units)}")
    print(table(reports))

    for r in reports:
        if r["all"]["perplexity"] > 0.95 * r["unigram"]["perplexity"]:
            print(f"{r['checkpoint']} has not learned to use context yet: word frequencies alone do as well.")
    if mixed(reports):
        print("A masked model is scored on a sample of all positions (--samples). "
              "Compare it with a causal one on the same sample: all, sampled.")
    if any(r["suffix"] for r in reports):          # a masked model, left to right
        print("Word frequencies alone are scored on the same tokens as the model. For a masked model these "
              "are a sample (--samples).")
    if any(r["clusters"] == "windows" for r in reports):
        print("The text is one document: its windows are treated as independent.")
    if any("bits_per_byte" in r["all"] for r in reports):
        print("Bits per byte and word perplexity are those of the text as it is. Published ones differ: "
              "lm-eval detokenises WikiText first.")
    shapes = {(r["block_size"], r["windows"], sum(r["documents"]["bytes"])) for r in reports}
    if len(shapes) > 1:
        print("Windows differ between models (vocabulary or block_size): compare bits per byte and "
              "word perplexity.")


def plot(reports, path):
    """Perplexity against prompt length, one line per model. Needs matplotlib."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for r in reports:
        lengths = [int(k) for k in r["prompt_lengths"]]
        results = r["prompt_lengths"].values()
        perplexity = [result["perplexity"] for result in results]
        se = [result["perplexity_se"] or 0 for result in results]
        axes.errorbar(lengths, perplexity, se, marker="o", capsize=2, label=r["checkpoint"])
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)",
             ylabel=f"perplexity on {reports[0]['text']}")
    axes.legend()
    save_figure(axes.figure, path)

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    windows = [f"{method.windows} for {name}" for name, method in METHODS.items()]
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--checkpoint", nargs="+", required=True,
                   help="one or several folders written by train.py")
    p.add_argument("--method", choices=METHODS, default="left-to-right",
                   help="definition, see the top of the file")
    p.add_argument("--suffix", choices=SUFFIXES, default="full",
                   help="left-to-right, masked models: what follows the prompt. full: masks up to "
                        "block_size, as in generation; one: one mask; matched: at most as many masks as "
                        "the model saw in training")
    text = p.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE",
                      help="UTF-8 text to use in place of WikiText-2's raw test split")
    text.add_argument("--val", action="store_true",
                      help="use the validation split of the checkpoints' own dataset")
    p.add_argument("--wikitext_dir", default="data/wikitext-2",
                   help="where wiki.test.raw is, or is downloaded to")
    p.add_argument("--data_dir", help="--val: where the datasets are, if not where train.py read them")
    p.add_argument("--prompt_lengths", type=int, nargs="+", metavar="K",
                   help="left-to-right: tokens in the prompt (default: 1, 2, 4, ... and block_size - 1)")
    p.add_argument("--context", type=int, nargs="+", metavar="M",
                   help="left-to-right: also score the same tokens with only the last M tokens visible")
    p.add_argument("--max_windows", type=int,
                   help=f"take that many windows, evenly spread; 0: all (default: {', '.join(windows)})")
    p.add_argument("--samples", type=int, default=Settings().samples,
                   help="masked models: mask counts per window (bound) or prompt lengths per window "
                        "(left-to-right, for the mean over all positions), evenly spread; block_size takes "
                        "all of them. --context, all models: tokens per window")
    p.add_argument("--plot", nargs="?", const="perplexity.png", metavar="FILE",
                   help="draw perplexity by prompt length")
    p.add_argument("--batch_size", type=int, default=Settings().batch_size,
                   help="sequences per forward pass; does not change the result")
    p.add_argument("--results", metavar="DIR",
                   help="write to DIR/CHECKPOINT'S NAME instead of the checkpoint's own folder")
    add_device_flags(p, dtype="float32")
    return p


class LoadedCheckpoint(NamedTuple):
    """A model, and what of its training matters here."""
    path: str
    model: torch.nn.Module
    config: dict                        # config.json, with the step and the digest of the weights
    encoding: object                    # its tokenizer
    unigram: np.ndarray                 # (V,) log-probabilities by word frequencies alone, nats
    most_masks: int                     # of a sequence in training, None if causal or not known
    ahead: int                          # how far the targets of training reach beyond the inputs, tokens.
                                        # Above 1 it predicts a mixture of them, no code for the next one


def load(path, args):
    """A LoadedCheckpoint. Raises ValueError, one line."""
    model, config = load_checkpoint(path, args.device, args.dtype)

    # Word frequencies, which train.py copied from the dataset
    unigram = data.load_unigram(path)
    if len(unigram) != model.config.vocab_size:
        raise ValueError(f"{path}: unigram.npy does not belong to this model's vocabulary")

    # What its objective showed it, with the flags of its training
    train = config.setdefault("train", {})
    options = options_of_run(train, model.config)
    objective = OBJECTIVES.get(train.get("objective"))
    most_masks = objective.most_masks(options) if objective else None
    ahead = objective.ahead(options) if objective else 1
    encoding = tokenizer.load_tokenizer(path, model.config.vocab_size)
    return LoadedCheckpoint(path, model, config, encoding, unigram, most_masks, ahead)


def wanted_text(args, checkpoint):
    """The Text that is asked for, in the checkpoint's vocabulary. Raises ValueError or OSError, one line."""
    if args.val:
        train = checkpoint.config["train"]
        folder = Path(data.data_dir_of_run(train, args.data_dir), train["dataset"])
        return texts.validation_split(folder, checkpoint.path, checkpoint.encoding)
    if args.text:
        return texts.from_file(args.text, checkpoint.encoding)
    return texts.wikitext(args.wikitext_dir, checkpoint.encoding)


def check_flags(args):
    """Raises ValueError, one line, for flags that make no sense."""
    lengths = [*(args.prompt_lengths or []), *(args.context or [])]
    if min([args.samples, args.batch_size, *lengths]) < 1:
        raise ValueError("samples, batch_size, prompt_lengths and context must be at least 1")
    if args.max_windows is not None and args.max_windows < 0:
        raise ValueError("max_windows must be at least 0")
    for name, given in [("prompt_lengths", args.prompt_lengths), ("context", args.context),
                        ("suffix", args.suffix != "full"), ("plot", args.plot)]:
        if given and not METHODS[args.method].by_prompt:
            raise ValueError(f"--{name} needs --method left-to-right")
    check_exists("--text", args.text)
    check_exists("--data_dir", args.data_dir)
    check_different(args.checkpoint, args.results)
    check_plot(args.plot)


def check_model(path, config, args):
    """Raises ValueError, one line, if the flags do not fit a model. config: its model.Config."""
    longest = max([1, *(args.prompt_lengths or []), *(args.context or [])])
    if config.causal and METHODS[args.method].needs_masks:
        raise ValueError(f"{path} is causal, it cannot fill masks: --method {args.method} does not apply")
    if longest >= config.block_size:
        raise ValueError(f"{path}: prompt and next token must fit into block_size {config.block_size}")


def check(args, loaded):
    """Raises ValueError, one line, for what cannot be evaluated. loaded: a list of LoadedCheckpoints."""
    for checkpoint in loaded:
        path = checkpoint.path
        config = checkpoint.model.config
        check_model(path, config, args)
        if args.suffix == "matched" and not config.causal and checkpoint.most_masks is None:
            objective = checkpoint.config["train"].get("objective")
            raise ValueError(f"{path}: how many masks {objective} saw in training is not known, which "
                             "--suffix matched needs; take full or one")

    # --val: of one dataset
    datasets = {checkpoint.config["train"].get("dataset") for checkpoint in loaded}
    if args.val and (len(datasets) > 1 or None in datasets):
        raise ValueError("--val needs checkpoints that were trained on one and the same dataset; "
                         "use --text FILE")


def evaluate_checkpoint(checkpoint, text, windows, args, command):
    """Evaluate one checkpoint, write its JSON file. Returns the report, and whether it was written."""
    method = METHODS[args.method]
    masks_follow = method.by_prompt and not checkpoint.model.config.causal
    suffix = args.suffix if masks_follow else None

    # Where the numbers go. Those of some windows replace no full result
    name = f"eval_ppl_{text.name}_{args.method}"
    if suffix in ("one", "matched"):
        name += f"-{suffix}"
    if args.max_windows:
        name += f"-{args.max_windows}-windows"
    path = result_path(checkpoint.path, f"{name}.json", args.results)

    # What they are, in one line
    meaning = method.note
    if masks_follow:
        meaning += f" and {SUFFIXES[suffix]}; all: {args.samples} prompt lengths per window"
    notes = [meaning]
    if checkpoint.ahead > 1:
        notes.append(f"trained on targets up to {checkpoint.ahead} tokens ahead, "
                     "scored as if they were the next token")
    notes.append(f"{len(windows.ids)} windows -> {path}")
    print(f"{checkpoint.path}: {'; '.join(notes)}", flush=True)

    # Measure
    T = checkpoint.model.config.block_size
    lengths = (args.prompt_lengths or standard_lengths(T)) if method.by_prompt else []
    masks = masks_after_prompt(suffix, T, checkpoint.most_masks)
    settings = Settings(args.batch_size, args.samples, tuple(lengths), masks)
    contexts = args.context or []
    measured = measure(checkpoint, windows, args.method, settings, contexts, args.device)

    # Write
    config = checkpoint.config
    report = {"checkpoint": checkpoint.path, "step": config["step"],
              "weights": config["weights"], "command": command,
              "objective": config["train"].get("objective"), "ahead": checkpoint.ahead,
              "text": text.name, "text_sha256": text.sha256,
              "method": args.method, "suffix": suffix, "samples": args.samples,
              "dtype": str(checkpoint.model.dtype).removeprefix("torch."), "device": args.device,
              **measured}
    return report, write_result(path, report)


def run(args, command):
    """Evaluate the checkpoints one after the other, write their JSON files, print the table."""
    # Read and check everything before the work begins
    check_flags(args)
    args.device = pick_device(args.device)
    loaded = [load(path, args) for path in args.checkpoint]
    check(args, loaded)
    limit = METHODS[args.method].windows if args.max_windows is None else args.max_windows
    jobs = []
    for checkpoint in loaded:
        text = wanted_text(args, checkpoint)
        T = checkpoint.model.config.block_size
        windows = texts.cut_windows(text, T, limit, checkpoint.encoding.eot_token)
        jobs.append((checkpoint, text, windows))

    # The table shows what is done, also when a later checkpoint fails or Ctrl-C ends the program
    reports = []
    all_saved = True
    try:
        for job in jobs:
            report, saved = evaluate_checkpoint(*job, args, command)
            reports.append(report)
            all_saved = all_saved and saved
    finally:
        if reports:
            show(reports)
    if args.plot:
        plot(reports, args.plot)
    if not all_saved:
        sys.exit(2)


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args, command_line("eval_ppl.py", argv))


if __name__ == "__main__":
    main()
