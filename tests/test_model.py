"""
The grader of exercise 5, then the Transformer: what it may see, what it may predict, against a plain
float64 reference, the fast paths against their definitions, counts, devices, checkpoints.

    python -m pytest -m exercise5               # attention and the loss, graded in words
    python -m pytest tests/test_model.py        # everything, a few seconds on a CPU, no network

init_weights sets the last matrix of every attention and MLP to zero, so a fresh model is blind to its
context: every test of a model here works on randomised weights. Queries, keys and positions are counted
from 1 in messages.
"""
import json
import math
import os
import pickle
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from common import PEAK_FLOPS, load_checkpoint, peak_flops, pick_device, save_checkpoint, save_config
from grading import call, explain
from model import Config, CrossEntropy, Transformer, fast_attention, flops, num_params


def rng(seed):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# Exercise 5: attention. With the identity as values, the result is the weights themselves

def run_attention(q, k, v, causal=False, mask=None):
    """What the attention under test makes of these tensors, if it is a result of the right kind."""
    __tracebackhide__ = True
    B, H, T, D = q.shape
    given = [q.clone(), k.clone(), v.clone()]
    y = call(model_file.attention, *given, causal, mask)

    explain(y is not None,
            "attention returns nothing (None): it must return a tensor (B, H, T, D)")
    explain(torch.is_tensor(y),
            f"attention returns a {type(y).__name__}: it must return a tensor (B, H, T, D)")
    shape, expected = tuple(y.shape), (B, H, T, v.size(-1))
    explain(shape != (B, H, T, k.size(2)) or shape == expected,
            "attention returns the weights (B, H, T, S): they must still be applied to the "
            "values v")
    explain(shape == expected,
            f"attention returns the shape {shape} for queries of the shape {tuple(q.shape)}: "
            f"it must be {expected}, one mean of the values per query")
    explain(all(torch.equal(a, b) for a, b in zip(given, [q, k, v])),
            "attention changes q, k or v, which it was given: work on new tensors")
    hint = ": does the first query see a key? Its own position is visible" if causal else ""
    if mask is not None:
        hint = ": does a query see no key at all? The last axis of the mask is that of the keys"
    explain(y.isfinite().all(), f"attention gives nan or inf{hint}")
    return y


def weights_of(causal=False, mask=None, rising=0):
    """The weights that the attention under test gives, (2, 3, 12, 12), and q and k, (2, 3, 12, 16).

    rising: by how much the last key's score is above the first one's.
    """
    __tracebackhide__ = True
    q = 0.5 * torch.randn(2, 3, 12, 16, generator=rng(3))
    k = 0.5 * torch.randn(2, 3, 12, 16, generator=rng(4))
    if rising:
        q[..., 0] = 4
        k[..., 0] = torch.linspace(0, rising, 12)
    v = torch.eye(12, 16).expand(2, 3, 12, 16)
    y = run_attention(q, k, v, causal, mask)
    return y.detach()[..., :12].double(), q.double(), k.double()


def explain_sum(weights, seen):
    """The weights of a query must sum to 1 over the keys that it sees."""
    __tracebackhide__ = True
    total = weights.sum(dim=-1)
    worst = total.flatten()[(total - 1).abs().argmax()].item()
    explain(abs(worst - 1) < 1e-4,
            f"the weights of a query sum to {worst:.3f} over {seen}, not to 1: hide keys "
            "before the softmax, with the score -inf, not after it")


def explain_hidden(weights, hidden, what):
    """A hidden key must have no weight. hidden: bool, broadcast to (B, H, T, S)."""
    __tracebackhide__ = True
    weight = weights.masked_fill(~hidden, 0)
    place = np.unravel_index(weight.abs().argmax().item(), weight.shape)
    query, key = place[2] + 1, place[3] + 1
    explain(weight.abs().max() < 1e-6,
            f"query {query} gives the weight {weight[place].item():.2g} to key {key}, {what}")


def explain_visible(weights, visible, why):
    """A visible key must have a weight. visible: bool, broadcast to (B, H, T, S)."""
    __tracebackhide__ = True
    weight = weights.masked_fill(~visible, 1)
    place = np.unravel_index(weight.argmin().item(), weight.shape)
    query, key = place[2] + 1, place[3] + 1
    explain(weight.min() > 1e-20, f"query {query} gives no weight to key {key}: {why}")


@pytest.mark.exercise5
def test_attention_gives_one_result_per_query():
    for T, S, D in [(5, 7, 4), (1, 9, 6)]:
        q = torch.randn(2, 3, T, D, generator=rng(1))
        k = torch.randn(2, 3, S, D, generator=rng(2))
        run_attention(q, k, torch.randn(2, 3, S, D, generator=rng(3)))


@pytest.mark.exercise5
def test_attention_is_a_softmax_over_the_keys():
    weights, _, _ = weights_of()
    axes = {0: "sequences of the batch", 1: "heads", 2: "queries"}
    explain(weights.min() > -1e-6,
            "some weights are negative: is there a softmax over the scores?")
    sums_to_one = (weights.sum(dim=-1) - 1).abs().max() < 1e-4
    for axis, name in axes.items():
        explain(sums_to_one or (weights.sum(dim=axis) - 1).abs().max() > 1e-4,
                f"the softmax is over the wrong axis: weights sum to 1 over the {name}, not "
                "over the keys")
    worst = (weights.sum(dim=-1) - 1).abs().max().item()
    explain(not 1e-4 < worst < 1e-2,
            f"the weights of a query sum to 1 only up to {worst:.2g}: is something computed in 16 bits?")
    explain(worst < 1e-4,
            "the weights of a query do not sum to 1 over the keys (they are off by "
            f"{worst:.2g}): is there a softmax over the last axis?")


@pytest.mark.exercise5
def test_attention_keeps_heads_and_sequences_apart():
    q, k, v = [torch.randn(2, 3, 5, 4, generator=rng(seed)) for seed in (1, 2, 3)]
    before = run_attention(q, k, v)
    k[1, 2] += 1.0
    v[1, 2] += 1.0
    changed = (run_attention(q, k, v) - before).abs().amax(dim=(-2, -1)) > 1e-4         # (B, H)
    explain(not changed[0].any(),
            "a change in one sequence of the batch changes the result of another sequence")
    explain(not changed[1, :2].any(),
            "a change in one head changes the result of another head")
    explain(changed[1, 2], "the result does not depend on the keys and values")


@pytest.mark.exercise5
def test_attention_without_a_mask_sees_everything():
    weights, _, _ = weights_of()
    explain_visible(weights, torch.tensor(True), "without causal and mask, every query sees every key")


@pytest.mark.exercise5
def test_attention_scores_are_scaled():
    """log weight = scale * q.k + constant: the scale by least squares, and what it does not explain."""
    weights, q, k = weights_of()
    scores = torch.einsum("bhtd,bhsd->bhts", q, k)
    scores = scores - scores.mean(dim=-1, keepdim=True)
    logs = weights.clamp(min=1e-30).log()
    logs = logs - logs.mean(dim=-1, keepdim=True)
    scale = ((scores * logs).sum() / scores.square().sum()).item()
    rest = (logs - scale * scores).abs().max().item()

    explain(logs.abs().max() > 1e-3,
            "all keys get the same weight, whatever q and k are: the scores must be q k^T")
    explain(rest < 1e-2,
            "the weights are not a softmax of the dot products q k^T of each query with the "
            "keys of its own head and sequence")
    explain(abs(scale - 1) > 1e-3,
            "the scores are not scaled: divide them by sqrt(D), here 4")
    explain(abs(scale - 1 / 4) < 1e-3,
            f"the scores are q k^T times {scale:.3g}: it must be 1/sqrt(D), here 1/sqrt(16) = "
            "0.25")


@pytest.mark.exercise5
def test_causal_attention_sees_no_future():
    weights, _, _ = weights_of(causal=True)
    past = torch.ones(12, 12, dtype=torch.bool).tril()
    explain_hidden(weights, ~past, "which lies in its future: causal attention must not see it")
    weights, _, _ = weights_of(causal=True, rising=60)
    explain_hidden(weights, ~past, "which lies in its future and has a high score: the score of a hidden key is "
                                   "-inf, not a little lower")


@pytest.mark.exercise5
def test_causal_attention_sees_the_past_and_itself():
    weights, _, _ = weights_of(causal=True)
    past = torch.ones(12, 12, dtype=torch.bool).tril()
    explain_visible(weights, torch.eye(12, dtype=torch.bool), "a causal query sees its own position")
    explain_visible(weights, past, "a causal query sees all earlier positions")
    explain_sum(weights, "the past")


@pytest.mark.exercise5
def test_attention_hides_masked_keys():
    lengths = torch.tensor([7, 9])
    visible = (torch.arange(12) < lengths[:, None])[:, None, None, :]       # (B, 1, 1, S)
    weights, _, _ = weights_of(mask=visible)
    inverted = weights[0, ..., :7].abs().max() < 1e-6
    explain(not inverted,
            "the mask is read the wrong way round: True means that a key is visible")
    explain_hidden(weights, ~visible, "which the mask hides (False): masked keys must get no weight")
    explain_visible(weights, visible, "the mask says that it is visible (True)")
    explain_sum(weights, "the visible keys")
    weights, _, _ = weights_of(mask=visible, rising=60)
    explain_hidden(weights, ~visible, "which the mask hides (False) and which has a high score: the score of a "
                                      "hidden key is -inf, not a little lower")


@pytest.mark.exercise5
def test_attention_takes_a_mask_for_every_query():
    """(B, H, T, S). Together with causal too, unless that is refused: the model never asks for both."""
    random = torch.rand(2, 3, 12, 12, generator=rng(6)) < 0.6
    visible = random | torch.eye(12, dtype=torch.bool)
    weights, _, _ = weights_of(mask=visible)
    explain_hidden(weights, ~visible, "which the mask hides (False): masked keys must get no weight")
    explain_visible(weights, visible, "the mask says that it is visible (True)")

    try:
        model_file.attention(*torch.zeros(3, 2, 3, 12, 16), True, visible)
    except Exception as error:
        if str(error).startswith("exercise 5"):             # not yet written
            raise
        return
    seen = visible & torch.ones(12, 12, dtype=torch.bool).tril()
    weights, _, _ = weights_of(causal=True, mask=visible)
    explain_hidden(weights, ~seen, "although causal or the mask hides it: a key must be visible by both. Combine them, or "
                                  "refuse to (raise an error)")
    explain_visible(weights, seen, "it is visible by causal and by the mask")
    explain_sum(weights, "the visible keys")


@pytest.mark.exercise5
def test_attention_equals_its_definition():
    for T, S, D, causal in [(12, 12, 8, False), (12, 12, 8, True), (4, 9, 6, False), (1, 9, 6, False)]:
        q = torch.randn(2, 3, T, D, generator=rng(1))
        k, v = [torch.randn(2, 3, S, D, generator=rng(seed)) for seed in (2, 3)]
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        y = run_attention(q, k, v, causal).double()
        error = (y - expected).abs().max().item()
        fixed = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal, scale=1 / 4)
        explain((y - fixed).abs().max() > 1e-4, f"the scale is 1/4 whatever D is: with D = {D} it is 1/sqrt({D})")
        explain(error < 1e-4,
                f"attention is off by up to {error:.2g} from softmax(q k^T / sqrt(D)) v "
                f"(causal {causal}, {T} queries, {S} keys, D = {D})")


@pytest.mark.exercise5
def test_attention_can_be_trained():
    given = [torch.randn(2, 3, 6, 4, generator=rng(seed)).requires_grad_() for seed in (1, 2, 3)]
    y = call(model_file.attention, *given, True, None)
    explain(y.requires_grad,
            "no gradient reaches q, k and v: compute with tensors from end to end")
    y.square().sum().backward()
    plain = [x.detach().double().requires_grad_() for x in given]
    F.scaled_dot_product_attention(*plain, is_causal=True).square().sum().backward()
    for name, x, expected in zip("qkv", given, plain):
        explain(x.grad is not None,
                f"no gradient reaches {name}: compute with tensors from end to end")
        error = (x.grad - expected.grad).abs().max().item()
        explain(error < 1e-3,
                f"the gradient with respect to {name} is off by up to {error:.2g}")

# -----------------------------------------------------------------------------
# Exercise 5: the loss

def run_loss(hidden, weight, targets, weights, vocab_size):
    """What the loss under test says, a float, if it is one number."""
    __tracebackhide__ = True
    given = [hidden.clone(), weight.clone(), targets.clone(), weights.clone()]
    loss = call(model_file.plain_loss, *given, vocab_size)

    explain(loss is not None,
            "plain_loss returns nothing (None): it must return one number, a tensor")
    explain(torch.is_tensor(loss),
            f"plain_loss returns a {type(loss).__name__}: it must return a tensor, whose "
            "gradient can be taken")
    explain(loss.numel() == 1,
            f"plain_loss returns the shape {tuple(loss.shape)}: it must return one number, "
            "the sum over the positions")
    explain(all(torch.equal(a, b) for a, b in zip(given, [hidden, weight, targets, weights])),
            "plain_loss changes the tensors that it was given: work on new ones")
    explain(loss.isfinite().all(),
            f"the loss is {loss.item()}: is there a log of 0, or 0 times the -inf of an id "
            "that is never predicted?")
    return loss.item()


def loss_inputs(N, K, V=64, vocab_size=50, C=8, seed=4):
    """hidden (N, C), weight (V, C), targets (N, K), weights (N,): none of them 1."""
    hidden = torch.randn(N, C, generator=rng(seed))
    weight = torch.randn(V, C, generator=rng(seed + 1))
    targets = torch.randint(vocab_size, (N, K), generator=rng(seed + 2))
    weights = 0.25 + 2 * torch.rand(N, generator=rng(seed + 3))
    return hidden, weight, targets, weights, vocab_size


def losses_of_targets(hidden, weight, targets, vocab_size):
    """(N, K): minus the log-probability of each target, nats, by torch's own cross-entropy in float64."""
    logits = (hidden.double() @ weight.double().T)[:, :vocab_size]          # (N, vocab_size)
    columns = [F.cross_entropy(logits, column, reduction="none") for column in targets.T]
    return torch.stack(columns, dim=1)


def near(a, b):
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.exercise5
def test_loss_of_a_uniform_guess_is_log_vocab_size_nats():
    """64 ids, all of them text, and hidden = 0: each has probability 1/64."""
    _, weight, targets, _, _ = loss_inputs(1, 1)
    loss = run_loss(torch.zeros(1, 8), weight, targets, torch.ones(1), 64)
    explain(not near(loss, math.log2(64)),
            "the loss is in bits (log2): it must be in nats (log)")
    explain(loss > -1e-5,
            f"the loss is negative ({loss:.3f}): it is minus the log-probability")
    explain(not near(loss, 0),
            "the loss of a uniform guess is 0: is the softmax missing or over the wrong axis? "
            "It must be over the vocabulary")
    explain(not near(loss, math.log(63)),
            "the loss of a uniform guess among 64 ids is log 63: the last id is missing (ids "
            "are 0 .. vocab_size-1)")
    explain(near(loss, math.log(64)),
            f"the loss of a uniform guess among 64 ids is {loss:.3f}: it must be log 64 = "
            f"{math.log(64):.3f} nats")


@pytest.mark.exercise5
def test_mask_token_and_padding_have_no_probability():
    """The probabilities of the 50 text ids, one loss each, sum to 1: nothing is left for ids 50 .. 63."""
    hidden, weight, _, _, _ = loss_inputs(1, 1)
    losses = [run_loss(hidden, weight, torch.tensor([[i]]), torch.ones(1), 50) for i in range(50)]
    explain(losses[0] > 1e-6,
            "a target with the id 0 does not count: 0 is an ordinary token, no sign for "
            "unused")
    expected = losses_of_targets(hidden, weight, torch.arange(50)[None], 50)[0].numpy()
    slope, constant = np.polyfit(expected, losses, 1)
    is_line = np.allclose(slope * expected + constant, losses, atol=1e-3)
    explain(not is_line or abs(slope - 1) < 1e-2,
            f"the loss is {slope:.2f} times that of the target, plus a constant: it must be that of the target alone "
            "(is there label smoothing, or a temperature?)")
    total = sum(math.exp(-loss) for loss in losses)
    explain(total > 1 - 1e-4,
            f"the probabilities of the text ids sum to {total:.5f}, not to 1: the mask token "
            "or padding gets probability. Ids from vocab_size on must have the logit -inf")
    explain(total < 1 + 1e-4,
            f"the probabilities of the text ids sum to {total:.3f}, not to 1: is the softmax "
            "over the vocabulary?")

    # Padding that the model would like best
    weight[50:] = 60 * hidden / hidden.square().sum()
    loss = run_loss(hidden, weight, torch.tensor([[3]]), torch.ones(1), 50)
    expected = losses_of_targets(hidden, weight, torch.tensor([[3]]), 50).item()
    explain(loss < expected + 1,
            f"where the mask token and padding have high logits the loss grows from {expected:.2f} to {loss:.2f}: they "
            "get probability. Their logit must be -inf, not a little lower")


@pytest.mark.exercise5
def test_loss_is_that_of_the_target():
    hidden, weight, targets, _, vocab_size = loss_inputs(1, 1)
    loss = run_loss(hidden, weight, targets, torch.ones(1), vocab_size)
    expected = losses_of_targets(hidden, weight, targets, vocab_size).item()
    twice = (hidden @ weight[:vocab_size].T).softmax(dim=-1)
    twice = F.cross_entropy(twice, targets[:, 0]).item()
    explain(not near(loss, twice),
            "the softmax is taken twice: F.cross_entropy and log_softmax want logits, not probabilities")
    for shift in (-1, 1):
        other = losses_of_targets(hidden, weight, (targets + shift) % vocab_size, vocab_size).item()
        explain(not near(loss, other), f"the loss is that of the id {shift:+d} from the target")
    explain(near(loss, expected),
            f"the loss of one position with one target is {loss:.4f}: -log softmax(hidden "
            f"weight^T)[target] is {expected:.4f}")


@pytest.mark.exercise5
def test_loss_averages_the_alternatives():
    """One position with K = 3 targets: the mean of three losses."""
    hidden, weight, targets, _, vocab_size = loss_inputs(1, 3)
    losses = losses_of_targets(hidden, weight, targets, vocab_size)[0]
    loss = run_loss(hidden, weight, targets, torch.ones(1), vocab_size)
    explain(not near(loss, losses.sum().item()),
            "the K targets of a position are summed: their log-probabilities must be "
            "averaged")
    explain(not near(loss, -(-losses).exp().mean().log().item()),
            "the probabilities of the K targets are averaged: average their "
            "log-probabilities")
    explain(not near(loss, losses[0].item()),
            "only the first of the K targets of a position counts: their log-probabilities "
            "must be averaged")
    explain(near(loss, losses.mean().item()),
            f"with K = 3 targets the loss is {loss:.4f}: the mean over the three is "
            f"{losses.mean().item():.4f}")


@pytest.mark.exercise5
def test_loss_is_the_weighted_sum_over_positions():
    hidden, weight, targets, weights, vocab_size = loss_inputs(6, 1)
    losses = losses_of_targets(hidden, weight, targets, vocab_size)[:, 0]
    expected = (weights.double() * losses).sum().item()
    loss = run_loss(hidden, weight, targets, weights, vocab_size)
    explain(not near(loss, losses.sum().item()) and not near(loss, losses.mean().item()),
            "the weights are ignored: every position counts weights[n] times")
    explain(not near(loss, expected / weights.sum().item()),
            "the loss is divided by the sum of the weights: the training loop does that "
            "already, over the whole batch, so return the sum")
    explain(not near(loss, expected / 6),
            "the loss is the mean over the positions: return the sum, the training loop "
            "divides it by the sum of the weights")
    explain(not near(loss, (weights.double() ** 2 * losses).sum().item()),
            "the weights count twice")
    explain(near(loss, expected),
            f"the loss of six positions is {loss:.4f}: the sum of weights[n] times the loss "
            f"of position n is {expected:.4f}")


@pytest.mark.exercise5
def test_loss_keeps_positions_and_their_targets_together():
    """N = 6 and K = 2: which weight and which targets belong to which position."""
    hidden, weight, targets, weights, vocab_size = loss_inputs(6, 2)
    losses = losses_of_targets(hidden, weight, targets, vocab_size)             # (6, 2)
    expected = (losses.mean(dim=1) * weights).sum().item()
    loss = run_loss(hidden, weight, targets, weights, vocab_size)

    swapped = (losses.flatten() * weights.repeat(2)).sum().item() / 2
    explain(not near(loss, swapped),
            "the weight of one position goes to the targets of another: weights.repeat(K) is w[1] w[2] ... w[1] w[2], "
            "repeat_interleave(K) is w[1] w[1] w[2] w[2]")
    mixed = losses_of_targets(hidden.repeat(2, 1), weight, targets.flatten()[:, None], vocab_size)[:, 0]
    for kind in (weights.repeat(2), weights.repeat_interleave(2)):
        explain(not near(loss, (mixed * kind).sum().item() / 2),
                "the targets of one position are scored at another: repeat(K, 1) repeats all positions, "
                "repeat_interleave(K, 0) each one")
    explain(near(loss, expected),
            f"the loss of six positions with two targets each is {loss:.4f}: the sum of weights[n] times the mean over "
            f"the two is {expected:.4f}")


@pytest.mark.exercise5
def test_slots_of_weight_0_do_not_count():
    hidden, weight, targets, weights, vocab_size = loss_inputs(6, 2)
    weights[3:] = 0
    loss = run_loss(hidden, weight, targets, weights, vocab_size)
    used = run_loss(hidden[:3], weight, targets[:3], weights[:3], vocab_size)
    explain(near(loss, used),
            f"three slots of weight 0 change the loss from {used:.4f} to {loss:.4f}: they "
            "must not count")


@pytest.mark.exercise5
def test_loss_equals_its_definition():
    for N, K in [(1, 1), (5, 1), (7, 4)]:
        hidden, weight, targets, weights, vocab_size = loss_inputs(N, K)
        losses = losses_of_targets(hidden, weight, targets, vocab_size).mean(dim=1)
        expected = (weights.double() * losses).sum().item()
        loss = run_loss(hidden, weight, targets, weights, vocab_size)
        explain(near(loss, expected),
                f"the loss of N = {N} positions with K = {K} targets is {loss:.4f}: by its "
                f"definition it is {expected:.4f}")


@pytest.mark.exercise5
def test_loss_can_be_trained():
    hidden, weight, targets, weights, vocab_size = loss_inputs(5, 3)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = call(model_file.plain_loss, *ours, targets, weights, vocab_size)
    explain(loss.requires_grad,
            "no gradient reaches hidden and weight: compute with tensors from end to end")
    loss.sum().backward()

    plain = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    losses = losses_of_targets(*plain, targets, vocab_size).mean(dim=1)
    (weights.double() * losses).sum().backward()
    for name, x, expected in zip(["hidden", "weight"], ours, plain):
        explain(x.grad is not None,
                f"no gradient reaches {name}: compute with tensors from end to end")
        error = (x.grad - expected.grad).abs().max().item()
        explain(error < 1e-3,
                f"the gradient with respect to {name} is off by up to {error:.2g}")

# -----------------------------------------------------------------------------
# What a position of the model sees, and what it may predict

def make(causal, seed=0, **kwargs):
    """A small model with random weights everywhere."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 70, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, **kwargs}
    model = Transformer(Config(causal=causal, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def ids(B=3, T=12, seed=1):
    return torch.randint(71, (B, T), generator=rng(seed))           # text and the mask token


both = pytest.mark.parametrize("causal", [False, True])


@both
def test_causality(causal):
    model, x = make(causal), ids(B=1)
    before = model.features(x)
    for k in range(12):
        y = x.clone()
        y[0, k] = (x[0, k] + 1) % 70
        moved = (model.features(y) - before).abs().amax(dim=-1)[0] > 1e-4   # (T,)
        if causal:
            explain(not moved[:k].any(),
                    f"causal: token {k + 1} changes an earlier position: the model sees the "
                    "future")
            explain(moved[k:].all(),
                    f"causal: a position does not see the earlier token {k + 1}")
        else:
            explain(moved.all(), f"bidirectional: not every position sees token {k + 1}")


@both
def test_order_of_the_context_matters(causal):
    model, x = make(causal), torch.arange(12)[None]
    y = x.clone()
    y[0, [2, 7]] = x[0, [7, 2]]
    moved = (model.features(x) - model.features(y))[0, -1].abs().max()
    explain(moved > 1e-4,
            "two tokens of the context change places and nothing happens: positions are not "
            "encoded")


@both
def test_padding_does_not_change_real_tokens(causal):
    model, lengths = make(causal), [12, 7, 1]
    x = ids()
    valid = torch.arange(12) < torch.tensor(lengths)[:, None]
    features = model.features(x, valid=valid)
    for row, n in enumerate(lengths):
        alone = model.features(x[row:row + 1, :n])
        error = (features[row, :n] - alone[0]).abs().max()
        explain(error < 1e-4,
                f"padding changes the features of the {n} real tokens before it")


@pytest.mark.parametrize("vocab_size", [63, 64, 70])
def test_mask_token_and_padding_are_never_predicted(vocab_size):
    model = make(False, vocab_size=vocab_size)
    c = model.config
    assert c.mask_token == vocab_size < c.padded_vocab_size and c.padded_vocab_size % 64 == 0
    p = model.logits(model.features(ids() % (vocab_size + 1))).softmax(dim=-1)
    assert p.dtype == torch.float32 and p.shape == (3, 12, c.padded_vocab_size)
    explain((p[..., vocab_size] == 0).all(),
            "the model can predict the mask token: its logit must be -inf")
    explain((p[..., vocab_size:] == 0).all(),
            "the model can predict an id that only pads the vocabulary: its logit must be "
            "-inf")
    explain((p[..., :vocab_size] > 0).all(),
            "an id that stands for text can never be predicted")
    torch.testing.assert_close(p[..., :vocab_size].sum(dim=-1), torch.ones(3, 12))


def test_fresh_model_predicts_uniformly_enough():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=70, block_size=12, n_layer=2, n_head=2, n_embd=64))
    x = ids() % 70
    loss = model(x, torch.arange(36), torch.randint(70, (36, 1)), torch.ones(36)) / 36
    explain(abs(loss.item() - math.log(70)) < 0.1,
            f"the loss before training is {loss.item():.2f}, not that of a uniform guess, log "
            f"70 = {math.log(70):.2f}")


def test_odd_heads_are_refused():
    for sizes in ({"n_embd": 16, "n_head": 3}, {"n_embd": 15, "n_head": 3}):
        with pytest.raises(ValueError, match="n_head"):
            Transformer(Config(**sizes))

# -----------------------------------------------------------------------------
# The model against a plain reference: numpy, float64, one query at a time, complex rotary positions

def reference_features(model, inputs, layer=None):
    """inputs (T,) -> (T, C)."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    norm = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    D, T = c.n_embd // c.n_head, len(inputs)
    frequency = 10000.0 ** (-np.arange(D // 2) / (D / 2))

    def rotate(x, position):
        z = (x[:D // 2] + 1j * x[D // 2:]) * np.exp(1j * position * frequency)
        return np.concatenate((z.real, z.imag))

    x = norm(w["wte.weight"][inputs])
    for i in range(c.n_layer if layer is None else layer):
        # Attention
        qkv = norm(x) @ w[f"blocks.{i}.attn.c_attn.weight"].T
        mixed = np.zeros_like(x)
        for h in range(c.n_head):
            q, k, v = (qkv[:, j * c.n_embd + h * D:j * c.n_embd + (h + 1) * D] for j in range(3))
            for t in range(T):
                sees = range(t + 1) if c.causal else range(T)
                score = [rotate(norm(q[t]), t) @ rotate(norm(k[s]), s) / D ** 0.5 for s in sees]
                p = np.exp(np.array(score) - max(score))
                mixed[t, h * D:(h + 1) * D] = sum(a * v[s] for a, s in zip(p / p.sum(), sees))
        x = x + mixed @ w[f"blocks.{i}.attn.c_proj.weight"].T

        # MLP
        hidden = np.maximum(norm(x) @ w[f"blocks.{i}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + hidden @ w[f"blocks.{i}.mlp.c_proj.weight"].T
    return norm(x)


@both
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_features_equal_the_reference(causal, layer):
    model, x = make(causal), ids()
    expected = np.stack([reference_features(model, row, layer) for row in x.numpy()])
    np.testing.assert_allclose(model.features(x, layer=layer).detach().numpy(), expected, atol=2e-4)


@both
@pytest.mark.parametrize("K", [1, 3])
def test_loss_equals_the_reference(causal, K):
    model, x, g = make(causal), ids(), rng(2)
    positions = torch.randperm(36, generator=g)[:10]
    targets = torch.randint(70, (10, K), generator=g)
    weights = torch.rand(10, generator=g)
    weights[-2:] = 0                                                        # unused slots

    hidden = np.concatenate([reference_features(model, row) for row in x.numpy()])[positions]
    losses = losses_of_targets(torch.from_numpy(hidden), model.wte.weight.detach(), targets, 70)
    expected = (weights.double() * losses.mean(dim=1)).sum().item()
    assert model(x, positions, targets, weights).item() == pytest.approx(expected, rel=2e-5)


@both
def test_head_on_scored_positions_equals_full_head(causal):
    model, x = make(causal), ids()
    positions = torch.tensor([0, 5, 11, 12, 30, 35])
    targets = torch.tensor([[1], [2], [3], [4], [5], [69]])
    weights = torch.arange(1.0, 7)
    log_p = model.logits(model.features(x)).flatten(0, 1).log_softmax(-1)   # at all positions
    full = -(weights * log_p[positions, targets[:, 0]]).sum()
    gathered = model(x, positions, targets, weights)
    assert gathered.item() == pytest.approx(full.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(l, model.parameters()) for l in (full, gathered))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@both
def test_slots_of_weight_0_change_nothing(causal):
    model, x = make(causal), ids()
    p, t, w = torch.tensor([3, 20]), torch.tensor([[1], [2]]), torch.ones(2)
    p0, t0, w0 = torch.tensor([3, 20, 7, 8]), torch.tensor([[1], [2], [3], [4]]), torch.tensor([1.0, 1, 0, 0])
    assert model(x, p, t, w).item() == pytest.approx(model(x, p0, t0, w0).item(), rel=1e-6)

# -----------------------------------------------------------------------------
# The cache

@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_key_value_cache_equals_full_forward(prompt):
    model, x = make(True), ids()
    cache = [[] for _ in range(2)]
    parts = [model.features(x[:, :prompt], cache=cache)]                # the prompt at once, then one by one
    parts += [model.features(x[:, t:t + 1], cache=cache) for t in range(prompt, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(x), atol=1e-5, rtol=1e-4)


def test_cache_refuses_what_it_cannot_do():
    """Several tokens after a filled cache, or more than block_size in all."""
    model = make(causal=True)
    cache = [[] for _ in model.blocks]
    model.features(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="one by one"):
        model.features(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="block_size"):
        model.features(torch.zeros(1, model.config.block_size + 1, dtype=torch.int64))

# -----------------------------------------------------------------------------
# The fast versions against their definitions

def gradients(function, inputs):
    """[result, gradients of the sum of its squares], float64."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.double().square().sum().backward()
    return [y.detach().double(), *[x.grad.double() for x in inputs]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                              (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("causal, masked, T, S", [(False, False, 12, 12), (True, False, 12, 12),
                                                  (False, True, 12, 12), (False, False, 1, 9)])
def test_fast_attention_is_attention(dtype, tolerance, causal, masked, T, S):
    """Values and gradients, against the definition in float64. bfloat16 has 8 bits."""
    g = rng(3)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g).to(dtype) for n in (T, S, S))
    mask = torch.arange(S) < torch.tensor([[[[7]]], [[[S]]]]) if masked else None           # (2, 1, 1, S)
    assert fast_attention(q, k, v, causal, mask).dtype == dtype
    fast = gradients(lambda *x: fast_attention(*x, causal, mask), [q, k, v])
    plain = gradients(lambda *x: model_file.attention(*x, causal, mask),
                      [q.double(), k.double(), v.double()])
    for a, b in zip(fast, plain):
        assert (a - b).norm() < tolerance * b.norm()


def cross_entropy_case(K, V=70, vocab_size=66, N=23, C=8):
    hidden, weight, targets, weights, _ = loss_inputs(N, K, V, vocab_size, C)
    targets[0] = targets[0, :1]                                             # the same target K times
    return hidden, weight, targets, weights, vocab_size


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_cross_entropy_and_its_gradients_are_those_of_plain_loss(monkeypatch, K, rows, dtype, tolerance):
    """However the rows are cut into chunks. The gradient by hand against autograd in float64."""
    monkeypatch.setattr(model_file, "CPU_CHUNK", rows * 70)
    hidden, weight, targets, weights, vocab_size = cross_entropy_case(K)

    def fast(hidden, weight):
        return CrossEntropy.apply(hidden, weight, targets, weights, vocab_size)

    def plain(hidden, weight):
        return model_file.plain_loss(hidden, weight, targets, weights.double(), vocab_size)

    ours = gradients(fast, [hidden.to(dtype), weight.to(dtype)])
    expected = gradients(plain, [hidden.double(), weight.double()])
    for name, a, b in zip(["loss", "gradient with respect to hidden", "gradient with respect to weight"],
                          ours, expected):
        explain((a - b).norm() < tolerance * b.norm(),
                f"CrossEntropy's {name} is not that of plain_loss")


def test_the_scale_of_the_loss_is_not_rounded_to_16_bits():
    """The gradient of loss / 3 is a third, on average much nearer to it than bfloat16's 8 bits."""
    hidden, weight, targets, weights, vocab_size = cross_entropy_case(1)

    def gradient(scale):
        h = hidden.bfloat16().requires_grad_()
        loss = CrossEntropy.apply(h, weight.float(), targets, weights, vocab_size) * scale
        return torch.autograd.grad(loss, h)[0].double()

    whole = gradient(1)
    third = gradient(1 / 3)
    ratio = (third * whole).sum() / (whole * whole).sum()
    assert abs(3 * ratio - 1) < 1e-3, "1/3 in bfloat16 is 0.334, too large by 2e-3"


def test_plain_loss_is_torchs_own():
    hidden, weight, targets, weights, vocab_size = cross_entropy_case(3)
    losses = losses_of_targets(hidden, weight, targets, vocab_size).mean(dim=1)
    loss = model_file.plain_loss(hidden.double(), weight.double(), targets, weights.double(), vocab_size)
    torch.testing.assert_close(loss, (weights.double() * losses).sum(), rtol=1e-12, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, numbers."""
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.numel())
        return out


def test_cross_entropy_never_holds_all_logits(monkeypatch):
    """N = 200 rows, V = 4096, in chunks of 10 rows, against plain_loss."""
    monkeypatch.setattr(model_file, "CPU_CHUNK", 10 * 4096)
    case = cross_entropy_case(1, V=4096, vocab_size=4000, N=200)
    with LargestTensor() as fast:
        CrossEntropy.apply(*case)
    with LargestTensor() as plain:
        model_file.plain_loss(*case)
    assert plain.numel == 200 * 4096
    assert fast.numel == 10 * 4096, "larger than the logits of a chunk (and than the weight, 8 * 4096)"

# -----------------------------------------------------------------------------
# Counts

@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_embd": 32, "vocab_size": 64}])
def test_num_params(sizes):
    model = make(False, **sizes)
    assert num_params(model.config) == sum(p.numel() for p in model.parameters())


def test_flops_equal_those_that_torch_counts():
    model, x, N = make(False), ids(), 10
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):                     # attention as plain matrix products
        model(x, torch.arange(N), torch.ones(N, 1, dtype=torch.int64), torch.ones(N)).backward()
    assert flops(model.config, 3, 12, N) == counter.get_total_flops()


def test_flops_of_a_causal_model_count_the_lower_triangle():
    full, causal = (flops(make(c).config, 3, 12, 10) for c in (False, True))
    skipped = 12 * 11 // 2                                          # (query, key) pairs above the diagonal
    assert full - causal == 3 * 2 * (2 * 2 * 16 * skipped * 3)      # backward, layers, q k^T and p v, B

# -----------------------------------------------------------------------------
# Devices

@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("A100-SXM4-40GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71)])
def test_peak_of_a_card_in_the_table(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0") == peak * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA H800", "NVIDIA B200",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100X", "NVIDIA A10",
    "NVIDIA L40", "NVIDIA L4 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA RTX 4090", "NVIDIA H100", "NVIDIA A100", "Tesla T4",
    "AMD MI300X", ""])
def test_another_card_has_no_peak(monkeypatch, name):
    """No utilisation is better than that of a card which is faster or slower."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") is None


def test_a_peak_is_a_gpus():
    assert peak_flops("cpu") is None and peak_flops("mps") is None
    assert all(5e13 < peak < 2e15 for peak in PEAK_FLOPS.values()), "FLOP/s, dense bfloat16"


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_every_process_of_torchrun_touches_its_own_gpu_only(asked, monkeypatch):
    touched = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(device))
    assert pick_device(asked) == "cuda:3" and touched == ["cuda:3"]
    assert pick_device("cpu") == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reuse_memory is for Linux with glibc")
def test_reuse_memory_saves_the_page_faults_of_large_buffers():
    """Buffers of 64 MiB are 16,384 pages each, if the kernel has to clear them again, as it does at first."""
    code = """
import common, resource, torch

def faults():
    for _ in range(15):
        torch.ones(2 ** 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2 ** 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
common.reuse_memory()
print(faults())
"""
    root = os.path.dirname(model_file.__file__)
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
    without, kept = map(int, printed.split())
    assert kept < 500 and kept < without / 10

# -----------------------------------------------------------------------------
# Checkpoints

def save(path, model, step=7, **rest):
    optimizer = torch.optim.AdamW(model.parameters())
    save_config(path, model.config, **rest)
    save_checkpoint(path, model, [optimizer], step)


def refused(path):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value), "one line that names the folder"
    return str(error.value)


@both
def test_checkpoint_roundtrip(tmp_path, causal):
    model = make(causal)
    save(tmp_path, model, train={"objective": "dar", "mask_range": [0.15, 1.0]})
    loaded, config = load_checkpoint(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert config["step"] == 7 and config["train"] == {"objective": "dar", "mask_range": [0.15, 1.0]}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(),
                                                 strict=True))
    assert torch.equal(model.features(ids()), loaded.features(ids()))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "config.json"], "temporary files are left behind"


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)                                       # would run when unpickled


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_unpickling_attack_is_refused(tmp_path, how):
    model, proof = make(False), str(tmp_path / "attacked")
    save(tmp_path, model)
    state = {"model": model.state_dict(), "optimizer": [], "step": Attack(proof)}
    with open(tmp_path / "ckpt.pt", "wb") as file:
        torch.save(state, file) if how == "torch.save" else pickle.dump(state, file, protocol=2)
    refused(tmp_path)
    assert not os.path.exists(proof), "code from the checkpoint was run"


def test_missing_checkpoint(tmp_path):
    assert "the folder does not exist" in refused(tmp_path / "nowhere")
    message = refused(tmp_path)
    assert "config.json is missing" in message and "train.py" in message, \
        "say which file is missing and what to do"
    save_config(tmp_path, make(False).config)
    assert "ckpt.pt is missing" in refused(tmp_path)
    assert "is a file: give the folder" in refused(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["ckpt.pt", "config.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_corrupt_checkpoint(tmp_path, name, damage):
    save(tmp_path, make(False))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes({"half": data[:len(data) // 2], "empty": b"",
                                   "noise": b"\x93not it\n" * 50}[damage])
    message = refused(tmp_path)
    assert f"{tmp_path / name} cannot be read: " in message and "copy it again" in message
    assert name == "config.json" or "it is no checkpoint, or only a part of one" in message


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 200},
                                    {"colour": 1}, {"n_layer": "two"}, {"n_head": 3}])
def test_config_that_does_not_fit(tmp_path, change):
    save(tmp_path, make(False))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    old = make(False)
    save(tmp_path, old, step=1)

    def breaks(state, file, *args, **kwargs):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make(False, seed=9), [], 2)
    monkeypatch.undo()
    loaded, config = load_checkpoint(tmp_path)
    assert config["step"] == 1, "a save that was interrupted replaced the checkpoint"
    assert torch.equal(loaded.wte.weight, old.wte.weight)
