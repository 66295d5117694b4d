"""
The grader of exercise 7, left-to-right perplexity of a masked model: what `left_to_right_masked` must say
about a small random model whose every number can be recomputed, one forward pass per prediction.

    python -m pytest -m exercise7

Graded are the scores and nothing else: not the number or size of the forward passes, not their order. A wrong
number is compared with those of common mistakes, so that the mistake can be named. Tokens are counted from 1
in messages, as in the paper: x[k+1] is the token after a prompt of k tokens.
"""
import itertools
import math

import numpy as np
import pytest
import torch

import eval_ppl
from grading import call, explain
from model import Config, Transformer

pytestmark = pytest.mark.exercise7

T = 9
V = 7                                                       # ids of text; the mask token is 7
MASKS = np.array([9, 5, 4, 3, 3, 2, 2, 2, 1])               # after a prompt of k tokens: neither 1 nor T - k
FIELDS = eval_ppl.Scores._fields


def small_model(vocab_size=V, block_size=T):
    """Random weights; every prediction depends on the whole input.

    Were the mask token and padded ids not excluded, they would have most of the probability.
    """
    generator = torch.Generator().manual_seed(4)
    model = Transformer(Config(vocab_size, block_size, n_layer=2, n_head=2, n_embd=16, causal=False)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5, generator=generator)
        model.wte.weight[vocab_size:] *= 3
    return model


def windows(n):
    """(n, T) random text."""
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(1))


def run(model, x, wanted, masks, batch_size=64):
    """What the function under test returns, (3, n, T) float64, if it is of the right kind."""
    __tracebackhide__ = True
    wanted, masks = np.array(wanted), np.array(masks)
    given = [x.clone(), wanted.copy(), masks.copy()]
    with torch.inference_mode():
        scores = call(eval_ppl.left_to_right_masked, model, *given, batch_size)
    name = "left_to_right_masked"

    # The kind of the result
    explain(scores is not None, f"{name} returns nothing (None): it must return Scores")
    explain(all(hasattr(scores, field) for field in FIELDS),
            f"{name} returns a {type(scores).__name__}: it must return Scores({', '.join(FIELDS)})")
    scores = [getattr(scores, field) for field in FIELDS]
    shapes = [tuple(np.shape(field)) for field in scores]
    explain(set(shapes) == {tuple(x.shape)},
            f"{name}: every field of Scores must be (n, T) = {tuple(x.shape)}, not {shapes[0]}: one "
            "number per token")
    explain(torch.equal(given[0], x) and (given[1] == wanted).all() and (given[2] == masks).all(),
            f"{name} changes x, wanted or masks, which it was given: work on copies")
    scores = np.array([np.asarray(field, dtype=float) for field in scores])

    # Which tokens have scores
    nats = scores[0]
    explain(not np.isnan(scores).any(), f"{name}: a score is not a number (nan)")
    explain(not np.isinf(nats[wanted]).any(),
            "a score is infinite: its target has probability 0, as the mask token does. The target is the "
            "text's token x[k+1], not what the input shows there")
    return scores


def masked_input(row, k, masks):
    """What the model sees: the first k tokens, then masks."""
    return row[:k] + [V] * masks


@torch.no_grad()
def logits(model, inputs, at, valid=None):
    """(padded V,) float64: the logits of one position, of the mask token and padding too."""
    hidden = model.features(torch.tensor([inputs]), valid)[0, at]
    return (model.wte.weight @ hidden).double()


def nats(model, inputs, at, target, valid=None):
    return -logits(model, inputs, at, valid)[:V].log_softmax(0)[target].item()


def table(x, wanted, value):
    """(n, T) value(row, k) where wanted, nan where it is not defined, 0 elsewhere."""
    out = np.zeros(x.shape)
    for i, k in zip(*np.nonzero(wanted)):
        try:
            out[i, k] = value(x[i].tolist(), int(k))
        except (IndexError, ValueError):                    # such an input does not exist, or is too long
            out[i, k] = math.nan
    return out

# -----------------------------------------------------------------------------
# Common mistakes. Each is (words, function of (model, row, k, masks) -> the nats it would give)

def from_input(make):
    """make(row, k, m) -> (inputs, position that is read out, target), m masks after the prompt."""
    def value(model, row, k, masks):
        inputs, at, target = make(row, k, int(masks[k]))
        if not 0 <= at < len(inputs) <= T:
            raise IndexError
        return nats(model, inputs, at, target)
    return value


def at_all_masks(combine):
    """combine(nats of the target at each mask, (m,)) -> number, for the right input."""
    def value(model, row, k, masks):
        shown = masked_input(row, k, masks[k])
        return combine([nats(model, shown, at, row[k]) for at in range(k, len(shown))])
    return value


def masks_hidden(model, row, k, masks):
    """The nats if `valid` holds for the prompt only."""
    shown = masked_input(row, k, masks[k])
    return nats(model, shown, k, row[k], valid=torch.arange(len(shown))[None] < k)


def from_logits(make):
    """make(logits (padded V,), target) -> number, for the right input."""
    def value(model, row, k, masks):
        return make(logits(model, masked_input(row, k, masks[k]), k), row[k]).item()
    return value


MISTAKES = [
    ("the score is that of the causal script: the whole window is visible and x[k+1] is read out one "
     "position before it. A masked model then sees the target: a leak",
     from_input(lambda row, k, m: (row, k - 1, row[k]))),
    ("the score is that of the causal script: all tokens are visible and x[k+1] is read out one position "
     "before it. A masked model then sees the target: a leak",
     from_input(lambda row, k, m: (row[:-1], k - 1, row[k]))),
    ("the target x[k+1] is visible: a leak. It and all that follow it must be masked",
     from_input(lambda row, k, m: (row, k, row[k]))),
    ("the prompt has k+1 tokens: the target x[k+1] is visible, a leak",
     from_input(lambda row, k, m: (masked_input(row, k + 1, m), k, row[k]))),
    ("the prompt has k+1 tokens: the target x[k+1] is visible, a leak",
     from_input(lambda row, k, m: (masked_input(row, k + 1, m - 1), k, row[k]))),
    ("only the target is masked and the tokens after it are visible: the future is seen",
     from_input(lambda row, k, m: (row[:k] + [V] + row[k + 1:], k, row[k]))),
    ("only the target is masked and the tokens after it are visible: the future is seen",
     from_input(lambda row, k, m: (row[:k] + [V] + row[k + 1:k + m], k, row[k]))),
    ("the text goes on after the masks: nothing may follow them, or the future is seen",
     from_input(lambda row, k, m: (masked_input(row, k, m) + row[k + m:], k, row[k]))),
    ("there is no mask: the prediction is read out at the prompt's last token, as of a causal model",
     from_input(lambda row, k, m: (row[:k], k - 1, row[k]))),
    ("one mask follows the prompt: after a prompt of k tokens there must be masks[k] of them",
     from_input(lambda row, k, m: (masked_input(row, k, 1), k, row[k]))),
    ("masks fill the window: after a prompt of k tokens there must be masks[k] of them",
     from_input(lambda row, k, m: (masked_input(row, k, T - k), k, row[k]))),
    ("masks[k] + 1 masks follow the prompt, one too many",
     from_input(lambda row, k, m: (masked_input(row, k, m + 1), k, row[k]))),
    ("masks[k] - 1 masks follow the prompt, one too few",
     from_input(lambda row, k, m: (masked_input(row, k, m - 1), k, row[k]))),
    ("the input has masks[k] tokens: it must have k of the prompt and masks[k] masks",
     from_input(lambda row, k, m: (masked_input(row, k, m - k), k, row[k]))),
    ("the number of masks is masks[k-1]: a prompt of k tokens is followed by masks[k]",
     lambda model, row, k, masks: nats(model, masked_input(row, k, masks[k - 1]), k, row[k])),
    ("the number of masks is masks[k+1]: a prompt of k tokens is followed by masks[k]",
     lambda model, row, k, masks: nats(model, masked_input(row, k, masks[k + 1]), k, row[k])),
    ("the prediction is read out at the prompt's last token: read it out at the first mask, which stands in "
     "the target's place",
     from_input(lambda row, k, m: (masked_input(row, k, m), k - 1, row[k]))),
    ("the prediction is read out at the second mask: read it out at the first, in the target's place",
     from_input(lambda row, k, m: (masked_input(row, k, m), k + 1, row[k]))),
    ("the prediction is read out at the last mask: read it out at the first, in the target's place",
     from_input(lambda row, k, m: (masked_input(row, k, m), k + m - 1, row[k]))),
    ("the target is x[k], the prompt's last token: shifted by one, it must be x[k+1]",
     from_input(lambda row, k, m: (masked_input(row, k, m), k, row[k - 1]))),
    ("the target is x[k+2]: shifted by one, it must be x[k+1]",
     from_input(lambda row, k, m: (masked_input(row, k, m), k, row[k + 1]))),
    ("shifted by one: the score of x[k], after k-1 tokens, stands in the place of x[k+1]",
     lambda model, row, k, masks: nats(model, masked_input(row, k - 1, masks[k - 1]), k - 1, row[k - 1])),
    ("shifted by one: the score of x[k], after k-1 tokens, stands in the place of x[k+1]",
     from_input(lambda row, k, m: (masked_input(row, k - 1, m), k - 1, row[k - 1]))),
    ("shifted by one: the score of x[k+2], after k+1 tokens, stands in the place of x[k+1]",
     lambda model, row, k, masks: nats(model, masked_input(row, k + 1, masks[k + 1]), k + 1, row[k + 1])),
    ("the prompt has k-1 tokens: its last token is masked too",
     from_input(lambda row, k, m: (masked_input(row, k - 1, m + 1), k, row[k]))),
    ("the prompt has k-1 tokens, one too few",
     from_input(lambda row, k, m: (masked_input(row, k - 1, m), k - 1, row[k]))),
    ("the masks come before the prompt: they follow it, as the tokens that they hide do",
     from_input(lambda row, k, m: ([V] * m + row[:k], 0, row[k]))),
    ("the masks come before the prompt: they follow it, as the tokens that they hide do",
     from_input(lambda row, k, m: ([V] * m + row[:k], m - 1, row[k]))),
    ("the masks come before the prompt: they follow it, as the tokens that they hide do",
     from_input(lambda row, k, m: ([V] * m + row[:k], k, row[k]))),
    ("the input is filled up with the id 0, and attention sees it: hide what follows the masks (valid), or "
     "leave it out", from_input(lambda row, k, m: (masked_input(row, k, m) + [0] * (T - k - m), k, row[k]))),
    ("the masks are hidden from attention: valid must hold for the prompt and its masks",
     masks_hidden),
    ("the prompt lacks its first token", from_input(lambda row, k, m: (row[1:k] + [V] * m, k - 1, row[k]))),
    ("the prompt lacks its first token", from_input(lambda row, k, m: (row[1:k] + [V] * m, k, row[k]))),
    ("the prediction is read out at the first position: read it out at the first mask, in the target's place",
     from_input(lambda row, k, m: (masked_input(row, k, m), 0, row[k]))),
    ("the score is the mean over all masks: only the first stands in the target's place",
     at_all_masks(np.mean)),
    ("the score is the sum over all masks: only the first stands in the target's place",
     at_all_masks(np.sum)),
    ("the prompt is not seen: everything is masked",
     from_input(lambda row, k, m: (masked_input(row, 0, k + m), k, row[k]))),
    ("the masks are the id 0, which is text: the mask token is model.config.mask_token",
     from_input(lambda row, k, m: (row[:k] + [0] * m, k, row[k]))),
    ("the masks are the last id of the text: the mask token is model.config.mask_token",
     from_input(lambda row, k, m: (row[:k] + [V - 1] * m, k, row[k]))),
    ("the score is in bits (log2): it must be in nats (log)",
     from_logits(lambda z, t: -z[:V].log_softmax(0)[t] / math.log(2))),
    ("the score is the log-probability: it must be minus that, so that it is positive",
     from_logits(lambda z, t: z[:V].log_softmax(0)[t])),
    ("the score is the probability: it must be minus its logarithm",
     from_logits(lambda z, t: z[:V].softmax(0)[t])),
    ("the score is a perplexity: it must be minus the log-probability of one token, in nats",
     from_logits(lambda z, t: (-z[:V].log_softmax(0)[t]).exp())),
    ("the score is a logit, not a log-probability: a softmax over the ids of text is missing",
     from_logits(lambda z, t: z[t])),
    ("the score is a logit, not a log-probability: a softmax over the ids of text is missing",
     from_logits(lambda z, t: -z[t])),
    ("the mask token and padding get probability: they must not (model.logits excludes them)",
     from_logits(lambda z, t: -z.log_softmax(0)[t])),
    ("the mask token gets probability: it must not (model.logits excludes it)",
     from_logits(lambda z, t: -z[:V + 1].log_softmax(0)[t])),
    ("the target is the mask token, which the input shows there: it must be the text's token x[k+1]",
     from_logits(lambda z, t: -z.log_softmax(0)[V])),
    ("the target is the mask token, which the input shows there: it must be the text's token x[k+1]",
     from_logits(lambda z, t: -z[:V + 1].log_softmax(0)[V])),
    ("the score is that of the likeliest token (surest): nats is that of the text's token",
     from_logits(lambda z, t: -z[:V].log_softmax(0).max())),
]


def agree(got, expected, wanted):
    """Whether the numbers agree wherever both are defined, at half of the tokens at least."""
    defined = wanted & ~np.isnan(expected)
    if 2 * defined.sum() < wanted.sum():
        return False
    return np.allclose(got[defined], expected[defined], rtol=2e-3, atol=2e-4)


def explain_nats(model, x, wanted, masks, got):
    """Fails with the name of the mistake, if it is a known one, unless the nats are right."""
    __tracebackhide__ = True
    expected = table(x, wanted, lambda row, k: nats(model, masked_input(row, k, masks[k]), k, row[k]))
    if agree(got, expected, wanted):
        return

    # All in the column before or after
    for shift, place in ((1, "k-1"), (-1, "k+1")):
        moved = np.roll(got, shift, axis=1)
        explain(not ((moved != 0) == wanted).all() or not agree(moved, expected, wanted),
                f"the scores after k tokens stand in [i, {place}]: they belong in [i, k]")

    # Tokens that were left out
    left_out = wanted & (got == 0)
    if left_out.any():
        i, k = np.argwhere(left_out)[0]
        explain(False,
                f"{left_out.sum()} of {wanted.sum()} tokens that are wanted have no score, the first one token "
                f"{k + 1} of window {i + 1}: is a last batch of fewer than batch_size forgotten?")

    # One number for many tokens
    per_window = wanted.sum(axis=1, keepdims=True)
    mean = (expected * wanted).sum(axis=1, keepdims=True) / np.maximum(per_window, 1)
    several = per_window.max() > 1
    explain(not (several and agree(got, mean * wanted, wanted)),
            "all tokens of a window have the same score, its average: every token must have its own")
    explain(not (several and agree(got, mean * per_window * wanted, wanted)),
            "all tokens of a window have the same score, its sum: every token must have its own")
    explain(not (several and agree(got, expected / np.maximum(per_window, 1), wanted)),
            "the scores are divided by the number of tokens of the window: each must be that of one token")
    explain(not (several and agree(got, np.cumsum(expected, axis=1), wanted)),
            "the scores are summed up along the window: each must be that of one token")

    # Right numbers in a wrong place
    same = np.allclose(np.sort(got[wanted]), np.sort(expected[wanted]), rtol=2e-3, atol=2e-4)
    explain(not same,
            "the scores are right but stand in the wrong places: window i and prompt length k belong in [i, k]")

    # Mistakes with a name
    for words, value in MISTAKES:
        wrong = table(x, wanted, lambda row, k: value(model, row, k, masks))
        explain(not agree(got, wrong, wanted), words)

    # Any other
    off = np.where(wanted, np.abs(got - expected), 0)
    i, k = np.unravel_index(off.argmax(), off.shape)
    explain(False,
            f"-log P of token {k + 1} of window {i + 1} is {got[i, k]:.4f}: with the first {k} tokens visible, "
            f"then {masks[k]} masks, the first mask predicts it with {expected[i, k]:.4f} nats")

# -----------------------------------------------------------------------------
# In the order in which a student should see them

def test_one_prompt_length():
    """Every window after 4 tokens, which 3 masks follow."""
    model, x = small_model(), windows(5)
    wanted = np.zeros((5, T), dtype=bool)
    wanted[:, 4] = True
    scores = run(model, x, wanted, MASKS)
    explain_nats(model, x, wanted, MASKS, scores[0])


@pytest.mark.parametrize("k", [1, 8])
def test_the_shortest_and_the_longest_prompt(k):
    model, x = small_model(), windows(3)
    wanted = np.zeros((3, T), dtype=bool)
    wanted[:, k] = True
    scores = run(model, x, wanted, MASKS)
    explain(scores[0].any(),
            f"no token has a score after a prompt of {k}: prompts have 1 to T-1 = {T - 1} tokens here")
    explain_nats(model, x, wanted, MASKS, scores[0])


@pytest.mark.parametrize("name, masks", [
    ("given", MASKS), ("full", T - np.arange(T)), ("one", np.ones(T, dtype=int)),
    ("matched", np.minimum(T - np.arange(T), 4))])
def test_all_prompt_lengths(name, masks):
    """For every suffix of eval_ppl.py, and one that is none of them."""
    model, x = small_model(), windows(4)
    wanted = np.ones((4, T), dtype=bool)
    wanted[:, 0] = False
    scores = run(model, x, wanted, masks, batch_size=1)
    explain_nats(model, x, wanted, masks, scores[0])


def test_only_what_is_wanted_has_a_score():
    model, x = small_model(), windows(6)
    wanted = np.random.default_rng(0).random((6, T)) < 0.4
    wanted[:, 0] = False
    wanted[2] = False                                       # a window of which nothing is wanted
    scores = run(model, x, wanted, MASKS, batch_size=1)
    extra = (scores != 0).any(axis=0) & ~wanted
    i, k = np.argwhere(extra)[0] if extra.any() else (0, 0)
    explain(not extra.any(),
            f"token {k + 1} of window {i + 1} is not wanted, but has a score: it must be 0, in all three fields")
    explain_nats(model, x, wanted, MASKS, scores[0])


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_batch_size_does_not_matter(batch_size):
    """Prompts of different lengths may share a forward pass, if padding is hidden from attention."""
    model, x = small_model(), windows(6)
    wanted = np.random.default_rng(0).random((6, T)) < 0.6
    wanted[:, 0] = False
    one_by_one = run(model, x, wanted, MASKS, batch_size=1)[0]
    explain_nats(model, x, wanted, MASKS, one_by_one)
    got = run(model, x, wanted, MASKS, batch_size)[0]
    left_out = (wanted & (got == 0)).sum()
    explain(not left_out,
            f"{left_out} of {wanted.sum()} tokens have no score when batch_size is {batch_size}: is the last, "
            "smaller batch forgotten?")
    explain(agree(got, one_by_one, wanted),
            f"the scores change with batch_size, {batch_size} instead of 1: where prompts of different lengths "
            "share a batch, what fills up the shorter ones must be hidden from attention (valid)")


def test_the_other_scores():
    """surest and right, as `score` gives them."""
    model, x = small_model(), windows(8)
    wanted = np.ones((8, T), dtype=bool)
    wanted[:, 0] = False
    _, surest, right = run(model, x, wanted, MASKS)

    def log_p(row, k):
        return logits(model, masked_input(row, k, MASKS[k]), k)[:V].log_softmax(0)

    likeliest = table(x, wanted, lambda row, k: -log_p(row, k).max().item())
    explain(agree(surest, likeliest, wanted),
            "surest must be -log P of the likeliest token at the first mask (`score` computes it)")
    guessed = table(x, wanted, lambda row, k: float(log_p(row, k).argmax() == row[k]))
    explain((right == guessed).all(),
            "right must be 1 where the likeliest token at the first mask is the text's token, and 0 elsewhere "
            "(`score` computes it)")


def test_probabilities_of_all_texts_sum_to_one():
    """Given the first token: so it is a likelihood."""
    model = small_model(vocab_size=3, block_size=4)
    x = torch.tensor(list(itertools.product(range(3), repeat=4)))
    wanted = np.ones(x.shape, dtype=bool)
    wanted[:, 0] = False
    for masks in ([4, 3, 2, 1], [1, 1, 1, 1]):
        scores = run(model, x, wanted, masks)
        total = np.exp(-scores[0].sum(axis=1)).reshape(3, -1).sum(axis=1)
        explain(np.allclose(total, 1, atol=1e-3),
                f"the probabilities of all texts of 4 tokens that begin alike sum to {total[0]:.3f}, not to 1: "
                "it is no likelihood")
