"""
The grader of exercise 5 itself: right solutions pass, however they are written, and wrong ones are told
what is wrong.

    python -m pytest tests/test_grader_model.py
"""
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as model_file
import test_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def graded_tests():
    """The tests of exercise 5, in the order in which a student sees them."""
    tests = [value for name, value in vars(test_model).items() if name.startswith("test_")]
    return [test for test in tests
            if any(mark.name == "exercise5" for mark in getattr(test, "pytestmark", []))]


def first_failure(monkeypatch, name, solution):
    """What the grader says first about a solution, None if it passes. Anything but words is an error."""
    monkeypatch.setattr(model_file, name, solution)
    for test in graded_tests():
        try:
            test()
        except pytest.fail.Exception as failure:
            return str(failure)
    return None

# -----------------------------------------------------------------------------
# Right solutions of attention

def visible_keys(q, k, causal, mask):
    """(B, H, T, S) bool."""
    visible = torch.ones(*q.shape[:3], k.size(2), dtype=torch.bool)
    if causal:
        visible = visible.tril()
    return visible if mask is None else visible & mask


def attention_by_loops(q, k, v, causal, mask):
    visible = visible_keys(q, k, causal, mask)
    B, H, T, D = q.shape
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                sees = [s for s in range(k.size(2)) if visible[b, h, t, s]]
                scores = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(D) for s in sees])
                weights = torch.softmax(scores, 0)
                rows.append(sum(w * v[b, h, s] for w, s in zip(weights, sees)))
    return torch.stack(rows).view(B, H, T, v.size(-1))


def attention_by_einsum(q, k, v, causal, mask):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = torch.where(visible_keys(q, k, causal, mask), scores, torch.tensor(-1e9))
    return torch.einsum("bhts,bhsd->bhtd", F.softmax(scores, dim=3), v)


def attention_by_hand(q, k, v, causal, mask):
    """exp and sum, hidden keys multiplied by 0; in float64; the scale on the keys."""
    scores = (q.double() @ (k.double() / q.size(-1) ** 0.5).mT)
    parts = (scores - scores.amax(dim=-1, keepdim=True)).exp() * visible_keys(q, k, causal, mask)
    return ((parts @ v.double()) / parts.sum(dim=-1, keepdim=True)).to(q.dtype)


def attention_by_rows(q, k, v, causal, mask):
    """One query after the other, over the keys that exist for it."""
    rows = []
    for t in range(q.size(2)):
        last = t + 1 if causal else k.size(2)
        scores = (q[:, :, t:t + 1] * k[:, :, :last]).sum(-1) * q.size(-1) ** -0.5       # (B, H, last)
        if mask is not None:
            full = mask.expand(q.size(0), q.size(1), q.size(2), k.size(2))
            scores = scores.masked_fill(~full[:, :, t, :last], float("-inf"))
        rows.append((scores.softmax(-1)[..., None] * v[:, :, :last]).sum(2))
    return torch.stack(rows, dim=2)


def attention_fused(q, k, v, causal, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_with_added_bias(q, k, v, causal, mask):
    """-inf is added; one matrix product for all heads; causal and mask together are refused."""
    if causal and mask is not None:
        raise NotImplementedError("causal and mask never come together")
    B, H, T, D = q.shape
    S = k.size(2)
    bias = torch.zeros(T, S, dtype=q.dtype)
    if causal:
        bias.masked_fill_(torch.arange(S) > torch.arange(T)[:, None], float("-inf"))
    if mask is not None:
        bias = bias + torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    scores = torch.bmm(q.reshape(B * H, T, D), k.reshape(B * H, S, D).transpose(1, 2)).view(B, H, T, S)
    return torch.softmax(scores / math.sqrt(D) + bias, dim=-1) @ v


def attention_key_by_key(q, k, v, causal, mask):
    """The softmax built up as the keys come, as fast kernels do."""
    visible = visible_keys(q, k, causal, mask)
    largest = torch.full((*q.shape[:3], 1), -1e30)
    total, mean = torch.zeros(*q.shape[:3], 1), torch.zeros(*q.shape[:3], v.size(-1))
    for s in range(k.size(2)):
        sees = visible[..., s:s + 1]
        score = (q * k[:, :, s:s + 1]).sum(-1, keepdim=True) / q.size(-1) ** 0.5
        score = torch.where(sees, score, torch.tensor(-1e30))
        larger = torch.maximum(largest, score.detach())
        shrink = (largest - larger).exp()
        part = (score - larger).exp() * sees
        total = total * shrink + part
        mean = mean * shrink + part * v[:, :, s:s + 1]
        largest = larger
    return mean / total


@pytest.mark.parametrize("solution", [attention_by_loops, attention_by_einsum, attention_by_hand,
                                      attention_by_rows, attention_fused, attention_with_added_bias,
                                      attention_key_by_key])
def test_right_attention_passes(monkeypatch, solution):
    assert first_failure(monkeypatch, "attention", solution) is None

# -----------------------------------------------------------------------------
# Wrong solutions of attention

def almost(scale=None, axis=-1, hide=None, after=None, apply=None):
    """attention with one part replaced: each is a function or value for that part."""
    def solution(q, k, v, causal, mask):
        scores = q @ k.transpose(-1, -2) * (q.size(-1) ** -0.5 if scale is None else scale(q))
        hidden = ~visible_keys(q, k, causal, mask)
        if hide is None:
            scores = scores.masked_fill(hidden, -math.inf)
        else:
            scores = hide(scores, causal, mask)
        weights = scores.softmax(dim=axis) if axis is not None else scores
        if after is not None:
            weights = after(weights, hidden)
        return weights @ v if apply is None else apply(weights, v)
    return solution


def only_mask(scores, causal, mask):
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def only_causal(scores, causal, mask):
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if causal else scores


def hides_itself(scores, causal, mask):
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(0)
    return only_mask(scores.masked_fill(future, -math.inf) if causal else scores, causal, mask)


def sees_one_ahead(scores, causal, mask):
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(2)
    return only_mask(scores.masked_fill(future, -math.inf) if causal else scores, causal, mask)


def sees_the_future_only(scores, causal, mask):
    past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1)
    return only_mask(scores.masked_fill(past, -math.inf) if causal else scores, causal, mask)


def always_causal(scores, causal, mask):
    return only_causal(only_mask(scores, causal, mask), True, mask)


def score_zero(scores, causal, mask):
    scores = only_causal(scores, causal, mask)
    return scores if mask is None else scores * mask


def mask_inverted(scores, causal, mask):
    scores = only_causal(scores, causal, mask)
    return scores if mask is None else scores.masked_fill(mask, -math.inf)


def mixes_heads(q, k, v, causal, mask):
    B, H, T, D = q.shape
    q, k, v = [x.transpose(1, 2).reshape(B, H, -1, D) for x in (q, k, v)]
    return almost()(q, k, v, causal, mask)


def in_place(q, k, v, causal, mask):
    q *= q.size(-1) ** -0.5
    return almost(scale=lambda q: 1.0)(q, k, v, causal, mask)


def without_gradient(q, k, v, causal, mask):
    return torch.tensor(almost()(q, k, v, causal, mask).tolist())


def mask_transposed(scores, causal, mask):
    return only_causal(scores if mask is None else scores.masked_fill(~mask.mT, -math.inf), causal, None)


def mask_added(scores, causal, mask):
    return only_causal(scores if mask is None else scores + mask.float(), causal, None)


def a_little_lower(scores, causal, mask):
    future = torch.ones(scores.shape[-2:]).triu(1)
    return only_mask(scores - 20 * future if causal else scores, causal, mask)


def mask_a_little_lower(scores, causal, mask):
    return only_causal(scores if mask is None else scores - 20 * ~mask, causal, None)


def either_is_enough(scores, causal, mask):
    past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if causal else None
    seen = [part for part in (past, mask) if part is not None]
    visible = seen[0] if len(seen) == 1 else past | mask if seen else torch.tensor(True)
    return scores.masked_fill(~visible, -math.inf)


@pytest.mark.parametrize("solution, words", [
    (almost(scale=lambda q: 1.0), "not scaled: divide them by sqrt(D)"),
    (almost(scale=lambda q: 1 / q.size(-1)), "q k^T times 0.0625: it must be 1/sqrt(D)"),
    (almost(scale=lambda q: q.size(-1) ** 0.5), "q k^T times 4: it must be 1/sqrt(D)"),
    (almost(scale=lambda q: q.size(2) ** -0.5), "q k^T times 0.289: it must be 1/sqrt(D)"),
    (almost(scale=lambda q: -q.size(-1) ** -0.5), "q k^T times -0.25: it must be 1/sqrt(D)"),
    (almost(axis=-2), "the softmax is over the wrong axis: weights sum to 1 over the queries"),
    (almost(axis=1), "the softmax is over the wrong axis: weights sum to 1 over the heads"),
    (almost(axis=None, hide=only_causal), "is there a softmax over the scores?"),
    (almost(hide=only_mask), "which lies in its future: causal attention must not see it"),
    (almost(hide=sees_one_ahead), "query 1 gives the weight"),
    (almost(hide=sees_the_future_only), "which lies in its future"),
    (almost(hide=hides_itself), "Its own position is visible"),
    (almost(hide=always_causal), "without causal and mask, every query sees every key"),
    (almost(hide=only_causal), "which the mask hides (False): masked keys must get no weight"),
    (almost(hide=score_zero), "which the mask hides (False): masked keys must get no weight"),
    (almost(hide=mask_inverted), "the mask is read the wrong way round"),
    (almost(hide=mask_transposed), "The last axis of the mask is that of the keys"),
    (almost(hide=mask_added), "which the mask hides (False): masked keys must get no weight"),
    (almost(hide=either_is_enough), "a key must be visible by both"),
    (almost(hide=a_little_lower), "which lies in its future and has a high score"),
    (almost(hide=mask_a_little_lower), "which the mask hides (False) and which has a high score"),
    (almost(scale=lambda q: 1 / 4), "the scale is 1/4 whatever D is"),
    (lambda q, k, v, causal, mask: almost()(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal, mask).float(),
     "is something computed in 16 bits?"),
    (almost(after=lambda weights, hidden: (~hidden).float() / (~hidden).sum(dim=-1, keepdim=True)),
     "all keys get the same weight"),
    (almost(after=lambda weights, hidden: F.dropout(weights, 0.2)), "do not sum to 1 over the keys"),
    (almost(hide=lambda scores, causal, mask: scores, after=lambda weights, hidden: weights * ~hidden),
     "hide keys before the softmax, with the score -inf, not after it"),
    (almost(apply=lambda weights, v: weights), "the weights (B, H, T, S): they must still be applied"),
    (mixes_heads, "changes the result of another head"),
    (in_place, "changes q, k or v"),
    (almost(scale=lambda q: (q.size(1) * q.size(-1)) ** -0.5), "q k^T times 0.144: it must be 1/sqrt(D)"),
    (almost(after=lambda weights, hidden: weights * 0.25), "do not sum to 1 over the keys"),
    (lambda q, k, v, causal, mask: (almost()(q, k, v, causal, mask), None), "returns a tuple"),
    (lambda q, k, v, causal, mask: almost()(q, k.detach(), v, causal, mask), "no gradient reaches k"),
    (without_gradient, "no gradient reaches q, k and v"),
    (lambda q, k, v, causal, mask: None, "returns nothing (None)"),
    (lambda q, k, v, causal, mask: almost()(q, k, v, causal, mask).transpose(1, 2), "returns the shape"),
    (lambda q, k, v, causal, mask: q @ k, "raises RuntimeError"),
    (lambda q, k, v, causal, mask: almost()(k, q, v, causal, mask), "raises RuntimeError"),
])
def test_wrong_attention_is_told_what_is_wrong(monkeypatch, solution, words):
    said = first_failure(monkeypatch, "attention", solution)
    assert said is not None, "a wrong attention passes"
    assert words in said and "\n" not in said

# -----------------------------------------------------------------------------
# Right solutions of the loss

def loss_by_loops(hidden, weight, targets, weights, vocab_size):
    total = 0.0
    for h, row, w in zip(hidden, targets, weights):
        scores = torch.stack([h @ weight[i] for i in range(vocab_size)])
        log_total = scores.exp().sum().log()
        total = total + w * sum(log_total - scores[target] for target in row) / len(row)
    return total


def loss_by_cross_entropy(hidden, weight, targets, weights, vocab_size):
    N, K = targets.shape
    logits = F.linear(hidden, weight[:vocab_size]).repeat_interleave(K, dim=0)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(N, K).mean(1) @ weights


def loss_by_one_hot(hidden, weight, targets, weights, vocab_size):
    """The mean of one-hot targets is a distribution; its cross-entropy with the model."""
    logits = hidden @ weight.T + torch.where(torch.arange(len(weight)) < vocab_size, 0.0, -1e9)
    p = F.one_hot(targets, len(weight)).float().mean(dim=1)
    return (weights * (torch.logsumexp(logits, -1) - (p * logits).sum(-1))).sum()


def loss_in_float64(hidden, weight, targets, weights, vocab_size):
    log_p = torch.log(torch.softmax(hidden.double() @ weight[:vocab_size].double().T, dim=1))
    rows = torch.arange(len(targets))[:, None]
    return torch.einsum("nk,n->", -log_p[rows, targets], weights.double()) / targets.size(1)


@pytest.mark.parametrize("solution", [loss_by_loops, loss_by_cross_entropy, loss_by_one_hot, loss_in_float64])
def test_right_loss_passes(monkeypatch, solution):
    assert first_failure(monkeypatch, "plain_loss", solution) is None

# -----------------------------------------------------------------------------
# Wrong solutions of the loss

def nearly(ids=lambda vocab_size: vocab_size, axis=1, combine=None, total=None):
    """plain_loss with one part replaced."""
    def solution(hidden, weight, targets, weights, vocab_size):
        log_p = (hidden @ weight[:ids(vocab_size)].T).log_softmax(dim=axis)
        chosen = log_p.gather(1, targets)                                   # (N, K)
        losses = -chosen.mean(dim=1) if combine is None else combine(chosen)
        return (weights * losses).sum() if total is None else total(losses, weights)
    return solution


def one_hot_times_infinity(hidden, weight, targets, weights, vocab_size):
    logits = hidden @ weight.T
    logits[:, vocab_size:] = -math.inf
    p = F.one_hot(targets, len(weight)).float().mean(dim=1)
    return -(weights * (p * logits.log_softmax(dim=-1)).sum(dim=-1)).sum()


def ignores_token_0(hidden, weight, targets, weights, vocab_size):
    return nearly()(hidden, weight, targets, weights * (targets > 0).all(dim=1), vocab_size)


def zero_logits_for_padding(hidden, weight, targets, weights, vocab_size):
    logits = hidden @ weight.T * (torch.arange(len(weight)) < vocab_size)
    return -(weights * logits.log_softmax(dim=-1).gather(1, targets).mean(dim=1)).sum()


def padding_a_little_lower(hidden, weight, targets, weights, vocab_size):
    logits = hidden @ weight.T - 30 * (torch.arange(len(weight)) >= vocab_size)
    return -(weights * logits.log_softmax(dim=-1).gather(1, targets).mean(dim=1)).sum()


def label_smoothing(hidden, weight, targets, weights, vocab_size):
    logits = (hidden @ weight[:vocab_size].T).repeat_interleave(targets.size(1), 0)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=0.1)
    return (losses.view(targets.shape).mean(dim=1) * weights).sum()


def weights_repeated(hidden, weight, targets, weights, vocab_size):
    K = targets.size(1)
    logits = (hidden @ weight[:vocab_size].T).repeat_interleave(K, 0)
    return (F.cross_entropy(logits, targets.flatten(), reduction="none") * weights.repeat(K)).sum() / K


def positions_repeated(hidden, weight, targets, weights, vocab_size):
    K = targets.size(1)
    logits = (hidden @ weight[:vocab_size].T).repeat(K, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
    return (losses.mean(dim=1) * weights).sum()


def raw_logits(hidden, weight, targets, weights, vocab_size):
    return -(weights * (hidden @ weight[:vocab_size].T).gather(1, targets).mean(dim=1)).sum()


def softmax_twice(hidden, weight, targets, weights, vocab_size):
    probabilities = (hidden @ weight[:vocab_size].T).softmax(dim=-1)
    losses = [F.cross_entropy(probabilities, column, reduction="none") for column in targets.T]
    return (weights * torch.stack(losses).mean(dim=0)).sum()


@pytest.mark.parametrize("solution, words", [
    (ignores_token_0, "0 is an ordinary token"),
    (zero_logits_for_padding, "the mask token or padding gets probability"),
    (nearly(ids=lambda vocab_size: None), "the mask token or padding gets probability"),
    (nearly(ids=lambda vocab_size: vocab_size + 1), "the mask token or padding gets probability"),
    (nearly(ids=lambda vocab_size: vocab_size - 1), "the last id is missing"),
    (padding_a_little_lower, "where the mask token and padding have high logits"),
    (label_smoothing, "is there label smoothing, or a temperature?"),
    (weights_repeated, "the weight of one position goes to the targets of another"),
    (positions_repeated, "the targets of one position are scored at another"),
    (nearly(axis=0), "is the softmax missing or over the wrong axis?"),
    (nearly(combine=lambda chosen: -chosen.sum(dim=1)), "must be averaged"),
    (nearly(combine=lambda chosen: -chosen.exp().mean(dim=1).log()), "average their log-probabilities"),
    (nearly(combine=lambda chosen: -chosen[:, 0]), "only the first of the K targets"),
    (nearly(combine=lambda chosen: -chosen.amax(dim=1)), "the mean over the three is"),
    (raw_logits, "is the softmax missing or over the wrong axis?"),
    (softmax_twice, "the softmax is taken twice"),
    (lambda hidden, weight, targets, weights, vocab_size:
     nearly()(hidden, weight, (targets + 1) % vocab_size, weights, vocab_size),
     "the loss is that of the id +1 from the target"),
    (nearly(combine=lambda chosen: -chosen.mean(dim=1) / math.log(2)), "the loss is in bits"),
    (nearly(combine=lambda chosen: chosen.mean(dim=1)), "the loss is negative"),
    (nearly(combine=lambda chosen: chosen.exp().mean(dim=1)), "it must be log 64 = 4.159 nats"),
    (nearly(total=lambda losses, weights: losses.sum()), "the weights are ignored"),
    (nearly(total=lambda losses, weights: losses.mean()), "the weights are ignored"),
    (nearly(total=lambda losses, weights: (weights * losses).sum() / weights.sum()),
     "divided by the sum of the weights"),
    (nearly(total=lambda losses, weights: (weights * losses).mean()), "the mean over the positions"),
    (nearly(total=lambda losses, weights: (weights ** 2 * losses).sum()), "the weights count twice"),
    (nearly(total=lambda losses, weights: weights * losses), "returns the shape (6,)"),
    (nearly(total=lambda losses, weights: (weights * losses).sum().item()), "returns a float"),
    (nearly(total=lambda losses, weights: (weights * losses).sum().detach()), "no gradient reaches"),
    (one_hot_times_infinity, "0 times the -inf"),
    (lambda *given: None, "returns nothing (None)"),
])
def test_wrong_loss_is_told_what_is_wrong(monkeypatch, solution, words):
    said = first_failure(monkeypatch, "plain_loss", solution)
    assert said is not None, "a wrong loss passes"
    assert words in said and "\n" not in said

# -----------------------------------------------------------------------------
# As a student sees it

def test_the_last_line_says_it_in_words(tmp_path):
    """The command of the handout, in a copy whose attention sees the future."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pytest.ini"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    with open(tmp_path / "model.py", "a") as file:
        file.write("\n\ndef attention(q, k, v, causal, mask=None):\n"
                   "    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)\n")
    command = [sys.executable, "-m", "pytest", "-m", "exercise5", "tests/test_model.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "in its future: causal attention must not see it" in done.stdout.strip().splitlines()[-1]
