"""
The graders of exercises 7 and 8 are graded: right solutions, however written, pass; wrong ones fail, each with
words that name the mistake.

    python -m pytest tests/test_grader_evals.py

A solution is a function that stands in for `left_to_right_masked` of eval_ppl.py or `probe` of probe.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_ppl
import probe as probe_file
from conftest import in_words
from eval_ppl import Scores, score

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
WRITTEN = {7: (eval_ppl, "left_to_right_masked"), 8: (probe_file, "probe")}
REFERENCE = {number: getattr(module, name) for number, (module, name) in WRITTEN.items()}


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


def grade(monkeypatch, number, solution, first_only=True):
    """Failures of the tests of one exercise, with this function in the place of ours."""
    monkeypatch.setattr(*WRITTEN[number], solution)
    failures = Failures()
    arguments = ["-m", f"exercise{number}", "-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
    if first_only:
        arguments.append("-x")
    file = ROOT / "tests" / f"test_exercise{number}.py"
    code = pytest.main([*arguments, str(file)], plugins=[failures])
    assert code == bool(failures.words)
    return failures


RIGHT = []      # (exercise, solution)
WRONG = []      # (exercise, solution, words of the first failure)


def right(number):
    def enter(solution):
        RIGHT.append(pytest.param(number, solution, id=f"{number}-{solution.__name__}"))
        return solution
    return enter


def wrong(number, words):
    def enter(solution):
        WRONG.append(pytest.param(number, solution, words, id=f"{number}-{solution.__name__}"))
        return solution
    return enter

# -----------------------------------------------------------------------------
# Exercise 7: right

def each_wanted(wanted):
    return [(int(i), int(k)) for i, k in zip(*np.nonzero(wanted))]


@right(7)
def loops(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for i in range(len(x)):
        for k in range(1, x.shape[1]):
            if wanted[i, k]:
                suffix = torch.full((masks[k],), model.config.mask_token, device=x.device)
                inputs = torch.cat((x[i, :k], suffix))
                hidden = model.features(inputs[None])[0]
                out[:, i, k] = np.concatenate(score(model, hidden[k:k + 1], x[i, k:k + 1]))
    return Scores(*out)


@right(7)
def a_batch_per_prompt_length(model, x, wanted, masks, batch_size):
    """From the longest prompt to the shortest, all windows at once, in float32."""
    fields = [np.zeros(tuple(x.shape), dtype=np.float32) for _ in range(3)]
    for k in reversed(range(1, x.shape[1])):
        inputs = F.pad(x[:, :k], (0, int(masks[k])), value=model.config.mask_token)
        scores = score(model, model.features(inputs)[:, k], x[:, k])
        for field, values in zip(fields, scores):
            field[:, k] = np.where(wanted[:, k], values, 0)
    return Scores(*fields)


@right(7)
def own_softmax_in_tensors(model, x, wanted, masks, batch_size):
    """Without `score`. The fields are tensors."""
    zeros = torch.zeros(x.shape, dtype=torch.float64)
    nats, surest, guessed = zeros.clone(), zeros.clone(), zeros.clone()
    for i, k in each_wanted(wanted):
        inputs = x[i].clone()[:k + int(masks[k])]
        inputs[k:] = model.config.mask_token
        z = (model.features(inputs[None])[0, k] @ model.wte.weight.T)[:model.config.vocab_size]
        log_p = torch.log(torch.softmax(z.double(), dim=0))
        nats[i, k] = -log_p[x[i, k]]
        surest[i, k] = -log_p.max()
        guessed[i, k] = log_p.argmax() == x[i, k]
    return Scores(nats, surest, guessed)


@right(7)
def whole_windows_with_hidden_ends(model, x, wanted, masks, batch_size):
    """Inputs are always T long; what follows the masks is hidden from attention."""
    T = x.shape[1]
    out = np.zeros((3, *x.shape))
    jobs = each_wanted(wanted)
    np.random.default_rng(0).shuffle(jobs)
    for start in range(0, len(jobs), batch_size):
        i, k = torch.tensor(jobs[start:start + batch_size]).T
        length = k + torch.as_tensor(masks)[k]
        column = torch.arange(T)
        inputs = torch.where(column < k[:, None], x[i], model.config.mask_token)
        hidden = model.features(inputs, column < length[:, None])
        scores = score(model, hidden[torch.arange(len(k)), k], x[i, k])
        out[:, i.numpy(), k.numpy()] = np.array(scores)
    return Scores(nats=out[0], surest=out[1], right=out[2])


@right(7)
def by_cross_entropy(model, x, wanted, masks, batch_size):
    """Lists of rows, put together at the end."""
    rows = []
    for window, asked in zip(x, wanted):
        row = []
        for k in range(len(window)):
            if not asked[k]:
                row.append((0.0, 0.0, 0.0))
                continue
            inputs = torch.tensor(window[:k].tolist() + [model.config.mask_token] * int(masks[k]))
            z = model.logits(model.features(inputs.unsqueeze(0)))[0, k]
            nats = F.cross_entropy(z[None], window[k:k + 1]).item()
            row.append((nats, -z.log_softmax(0).max().item(), float(z.argmax() == window[k])))
        rows.append(row)
    return Scores(*np.moveaxis(np.array(rows), 2, 0))

# -----------------------------------------------------------------------------
# Exercise 7: wrong

def almost(inputs=None, at=lambda k, m: k, target=lambda k: k, place=lambda k: k, combine=None):
    """The loops with one part replaced.

    inputs(row, k, m, mask) -> list of ids, m masks after the prompt. at(k, m) -> the position that is read
    out. target(k), place(k) -> columns of the target and of the result. combine(nats, wanted) -> nats.
    """
    def solution(model, x, wanted, masks, batch_size):
        mask = model.config.mask_token
        T = x.shape[1]
        out = np.zeros((3, *x.shape))
        for i, k in each_wanted(wanted):
            row, m = x[i].tolist(), int(masks[k])
            shown = row[:k] + [mask] * m if inputs is None else inputs(row, k, m, mask)
            hidden = model.features(torch.tensor([shown[:T]]))[0]
            last = len(hidden) - 1
            scores = score(model, hidden[min(at(k, m), last)][None], x[i, [min(target(k), T - 1)]])
            out[:, i, min(place(k), T - 1)] = np.concatenate(scores)
        if combine is not None:
            out[0] = combine(out[0], wanted)
        return Scores(*out)
    return solution


def wrong_loops(words, name, **replaced):
    solution = almost(**replaced)
    solution.__name__ = name
    wrong(7, words)(solution)


wrong_loops("the score is that of the causal script", "causal_script_in_loops",
            inputs=lambda row, k, m, mask: row, at=lambda k, m: k - 1)
wrong_loops("the target x[k+1] is visible: a leak", "everything_visible", inputs=lambda row, k, m, mask: row)
wrong_loops("the prompt has k+1 tokens: the target x[k+1] is visible, a leak", "prompt_with_the_target",
            inputs=lambda row, k, m, mask: row[:k + 1] + [mask] * (m - 1))
wrong_loops("the tokens after it are visible: the future is seen", "only_the_target_masked",
            inputs=lambda row, k, m, mask: row[:k] + [mask] + row[k + 1:])
wrong_loops("there is no mask: the prediction is read out at the prompt's last token", "prompt_alone",
            inputs=lambda row, k, m, mask: row[:k], at=lambda k, m: k - 1)
wrong_loops("one mask follows the prompt", "no_masks_behind", inputs=lambda row, k, m, mask: row[:k] + [mask])
wrong_loops("masks fill the window", "masks_to_the_end",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * (len(row) - k))
wrong_loops("one too many", "masks_one_too_many",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * (m + 1))
wrong_loops("read out at the prompt's last token", "reads_before_the_mask", at=lambda k, m: k - 1)
wrong_loops("read out at the last mask", "reads_at_the_last_mask", at=lambda k, m: k + m - 1)
wrong_loops("read out at the second mask", "reads_at_the_second_mask", at=lambda k, m: k + 1)
wrong_loops("the target is x[k], the prompt's last token: shifted by one", "target_of_the_prompt",
            target=lambda k: k - 1)
wrong_loops("the target is x[k+2]: shifted by one", "target_after_next", target=lambda k: k + 1)
wrong_loops("everything is masked", "prompt_masked", inputs=lambda row, k, m, mask: [mask] * (k + m))
wrong_loops("the prompt has k-1 tokens", "prompt_too_short",
            inputs=lambda row, k, m, mask: row[:k - 1] + [mask] * (m + 1))
wrong_loops("the masks are the id 0, which is text", "masks_with_id_0",
            inputs=lambda row, k, m, mask: row[:k] + [0] * m)
wrong_loops("the text goes on after the masks: nothing may follow them", "text_after_the_masks",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * m + row[k + m:])
wrong_loops("all tokens of a window have the same score, its sum", "sum_per_window",
            combine=lambda nats, wanted: wanted * nats.sum(1, keepdims=True))
wrong_loops("in bits (log2)", "bits", combine=lambda nats, wanted: nats / math.log(2))
wrong_loops("it must be minus that", "log_probabilities", combine=lambda nats, wanted: -nats)
wrong_loops("the score is the probability", "probabilities",
            combine=lambda nats, wanted: np.exp(-nats) * wanted)
wrong_loops("the score is a perplexity", "perplexities", combine=lambda nats, wanted: np.exp(nats) * wanted)
wrong_loops("all tokens of a window have the same score, its average", "average_per_window",
            combine=lambda nats, wanted: wanted * nats.sum(1, keepdims=True)
            / np.maximum(1, wanted.sum(1, keepdims=True)))
wrong_loops("divided by the number of tokens of the window", "divided_by_the_window",
            combine=lambda nats, wanted: nats / np.maximum(1, wanted.sum(1, keepdims=True)))
wrong_loops("the scores after k tokens stand in [i, k-1]", "one_column_too_early", place=lambda k: k - 1)
wrong_loops("the scores after k tokens stand in [i, k+1]", "one_column_too_late", place=lambda k: k + 1)
wrong_loops("the masks come before the prompt", "masks_first",
            inputs=lambda row, k, m, mask: [mask] * m + row[:k], at=lambda k, m: 0)
wrong_loops("the masks come before the prompt", "masks_first_and_read_out_at_k",
            inputs=lambda row, k, m, mask: [mask] * m + row[:k])
wrong_loops("the prompt lacks its first token", "first_token_dropped",
            inputs=lambda row, k, m, mask: row[1:k] + [mask] * m, at=lambda k, m: k - 1)
wrong_loops("read out at the first position", "reads_at_the_first_position", at=lambda k, m: 0)
wrong_loops("-log P of token 2 of window", "masks_counted_from_the_end",        # a mistake without a name
            inputs=lambda row, k, m, mask: row[:k] + [mask] * min(len(row) - k, [1, 2, 2, 2, 3, 3, 4, 5, 9][k]))
wrong_loops("the input is filled up with the id 0", "filled_up_with_0",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * m + [0] * (len(row) - k - m))


@wrong(7, "the score is that of the causal script")
def causal_script(model, x, wanted, masks, batch_size):
    """One forward pass per window, no masks, the loss at every position."""
    scores = eval_ppl.left_to_right_causal(model, x, batch_size)
    return Scores(*[field * wanted for field in scores])


def hidden_at_masks(model, row, k, masks):
    """(masks[k], C) hidden states of the masks that follow the first k tokens of a window."""
    inputs = torch.cat((row[:k], torch.full((int(masks[k]),), model.config.mask_token)))
    return model.features(inputs[None])[0, k:]


@wrong(7, "the score is a logit, not a log-probability")
def logits(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        scores.nats[i, k] = -model.logits(hidden_at_masks(model, x[i], k, masks)[0])[x[i, k]]
    return scores


@wrong(7, "the mask token and padding get probability")
def probability_on_padding(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        z = hidden_at_masks(model, x[i], k, masks)[:1] @ model.wte.weight.T
        scores.nats[i, k] = F.cross_entropy(z, x[i, k:k + 1])
    return scores


@wrong(7, "a score is infinite: its target has probability 0, as the mask token does")
def scores_the_mask_token(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for i, k in each_wanted(wanted):
        inputs = x[i].clone()
        inputs[k:] = model.config.mask_token
        hidden = model.features(inputs[None])[0, k]
        out[:, i, k] = np.concatenate(score(model, hidden[None], inputs[k:k + 1]))
    return Scores(*out)


@wrong(7, "the target is the mask token, which the input shows there")
def predicts_the_mask_token(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        z = hidden_at_masks(model, x[i], k, masks)[:1] @ model.wte.weight.T
        scores.nats[i, k] = F.cross_entropy(z, torch.tensor([model.config.mask_token]))
    return scores


@wrong(7, "is not wanted, but has a score: it must be 0")
def scores_what_is_not_wanted(model, x, wanted, masks, batch_size):
    everything = np.ones(x.shape, dtype=bool)
    everything[:, 0] = False
    return REFERENCE[7](model, x, everything, masks, batch_size)


@wrong(7, "is not wanted, but has a score: it must be 0, in all three fields")
def zeroes_nats_only(model, x, wanted, masks, batch_size):
    scores = scores_what_is_not_wanted(model, x, wanted, masks, batch_size)
    return scores._replace(nats=scores.nats * wanted)


@wrong(7, "what fills up the shorter ones must be hidden from attention (valid)")
def padding_is_seen(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    jobs = each_wanted(wanted)
    for start in range(0, len(jobs), batch_size):
        i, k = torch.tensor(jobs[start:start + batch_size]).T
        longest = int((k + torch.as_tensor(masks)[k]).max())
        inputs = torch.where(torch.arange(longest) < k[:, None], x[i, :longest], model.config.mask_token)
        hidden = model.features(inputs)[torch.arange(len(k)), k]
        out[:, i.numpy(), k.numpy()] = np.array(score(model, hidden, x[i, k]))
    return Scores(*out)


@wrong(7, "the scores are right but stand in the wrong places")
def sorted_and_not_put_back(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for field in scores:
        field[wanted] = field[wanted][::-1].copy()
    return scores


@wrong(7, "is the last, smaller batch forgotten?")
def forgets_the_last_batch(model, x, wanted, masks, batch_size):
    jobs = each_wanted(wanted)
    kept = np.zeros_like(wanted)
    whole = len(jobs) // batch_size * batch_size
    for i, k in jobs[:whole if batch_size == 3 else None]:
        kept[i, k] = True
    return REFERENCE[7](model, x, kept, masks, batch_size)


@wrong(7, "5 of 5 tokens that are wanted have no score, the first one token 5 of window 1: is a last batch of fewer")
def forgets_every_smaller_batch(model, x, wanted, masks, batch_size):
    jobs = each_wanted(wanted)
    kept = np.zeros_like(wanted)
    for i, k in jobs[:len(jobs) // batch_size * batch_size]:
        kept[i, k] = True
    return loops(model, x, kept, masks, batch_size)


@wrong(7, "no token has a score after a prompt of 8")
def leaves_out_the_longest_prompt(model, x, wanted, masks, batch_size):
    wanted = wanted.copy()
    wanted[:, -1] = False
    return loops(model, x, wanted, masks, batch_size)


@wrong(7, "the masks are hidden from attention")
def hides_the_masks(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for i, k in each_wanted(wanted):
        inputs = F.pad(x[i:i + 1, :k], (0, int(masks[k])), value=model.config.mask_token)
        hidden = model.features(inputs, torch.arange(inputs.size(1))[None] < k)
        out[:, i, k] = np.concatenate(score(model, hidden[:, k], x[i, k:k + 1]))
    return Scores(*out)


@wrong(7, "the score is the mean over all masks")
def mean_over_masks(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        hidden = hidden_at_masks(model, x[i], k, masks)
        scores.nats[i, k] = score(model, hidden, x[i, [k] * len(hidden)])[0].mean()
    return scores


@wrong(7, "surest must be -log P of the likeliest token")
def nats_in_all_fields(model, x, wanted, masks, batch_size):
    nats = REFERENCE[7](model, x, wanted, masks, batch_size).nats
    return Scores(nats, nats, nats)


@wrong(7, "one number per token")
def one_number_per_window(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    return Scores(*[field.sum(axis=1) / wanted.sum(axis=1) for field in scores])


@wrong(7, "returns a ndarray: it must return Scores")
def nats_alone(model, x, wanted, masks, batch_size):
    return REFERENCE[7](model, x, wanted, masks, batch_size).nats


@wrong(7, "returns a tuple: it must return Scores(nats, surest, right)")
def plain_tuple(model, x, wanted, masks, batch_size):
    return tuple(REFERENCE[7](model, x, wanted, masks, batch_size))


@wrong(7, "returns nothing (None)")
def returns_nothing(model, x, wanted, masks, batch_size):
    pass


@wrong(7, "changes x, wanted or masks")
def masks_in_place(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for k in reversed(range(1, x.shape[1])):
        target = x[:, k].clone()
        x[:, k] = model.config.mask_token
        hidden = model.features(x[:, :k + int(masks[k])])[:, k]
        out[:, :, k] = np.array(score(model, hidden, target)) * wanted[:, k]
    return Scores(*out)


@wrong(7, "misspelt raises AttributeError")
def misspelt(model, x, wanted, masks, batch_size):
    return model.feature(x)

# -----------------------------------------------------------------------------
# Exercise 8: right

def outcome(predictions, strength, held_out, grid, gradient=0.0):
    return predictions, {"strength": float(strength), "at_edge": strength in (min(grid), max(grid)),
                         "held_out": float(held_out), "gradient": float(gradient)}


def on_directions(train, tests, directions):
    """numpy arrays, on the leading directions if that is asked for."""
    train, tests = train.double(), [test.double() for test in tests]
    if directions is not None:
        train, *tests = probe_file.leading(train, tests, directions)
    return [part.numpy() for part in (train, *tests)]


def prepared(train, tests, directions):
    """The same, standardised."""
    X, *tests = on_directions(train, tests, directions)
    return [(part - X.mean(axis=0)) / deviation(X) for part in (X, *tests)]


def deviation(X):
    """Of each column. 0 counts as 1."""
    std = X.std(axis=0)
    return np.where(std == 0, 1, std)


def with_ones(X):
    return np.column_stack((X, np.ones(len(X))))


def newton(X, y, K, strength):
    """Softmax regression by Newton's method, the intercept in the last column, without penalty."""
    A = with_ones(X)
    n, C = A.shape
    penalty = np.r_[np.full(C - 1, strength), 1e-9]
    W = np.zeros((C, K))
    one_hot = np.eye(K)[y]

    def loss(W):
        scores = A @ W
        top = scores.max(axis=1)
        log_total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        return (log_total - scores[np.arange(n), y]).mean() + 0.5 * (penalty[:, None] * W ** 2).sum()

    for _ in range(40):
        scores = A @ W
        P = np.exp(scores - scores.max(axis=1, keepdims=True))
        P /= P.sum(axis=1, keepdims=True)
        gradient = A.T @ (P - one_hot) / n + penalty[:, None] * W
        if abs(gradient).max() < 1e-7:
            break
        # Blocks of the Hessian: one for each pair of classes
        H = np.zeros((K, C, K, C))
        for a in range(K):
            for b in range(K):
                curve = P[:, a] * ((a == b) - P[:, b]) / n
                H[a, :, b, :] = (A * curve[:, None]).T @ A + (a == b) * np.diag(penalty)
        step = np.linalg.lstsq(H.reshape(K * C, K * C), gradient.T.ravel(), rcond=None)[0].reshape(K, C).T
        size = 1.0
        while loss(W - size * step) > loss(W) and size > 1e-6:
            size /= 2
        W = W - size * step
    return W


def ridge(X, y, strength):
    A = with_ones(X)
    penalty = np.diag(np.r_[np.full(X.shape[1], strength), 0])
    return np.linalg.lstsq(A.T @ A / len(A) + penalty, A.T @ y / len(A), rcond=None)[0][:, None]


def classify(X, W, K):
    scores = with_ones(X) @ W
    return scores.argmax(axis=1) if K else scores[:, 0]


def folds_of(groups, number, seed=0):
    """(n,) 0 .. number-1: whole groups at random."""
    names = np.unique(groups)
    fold = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % number))
    return np.array([fold[name] for name in groups])


def by_folds(fit, grid, number, rounds=None):
    """A probe that cuts the groups into `number` folds, of which the first `rounds` are held out in turn."""
    def solution(train, y, groups, tests, K, metric, directions=None):
        X, *tests = prepared(train, tests, directions)
        fold = folds_of(groups, number)
        values = []
        for strength in grid:
            each = []
            for out in range(rounds or number):
                held = fold == out
                W = fit(X[~held], y[~held], K, strength) if K else ridge(X[~held], y[~held], strength)
                each.append(metric(classify(X[held], W, K), y[held]))
            values.append(np.mean(each))
        best = grid[int(np.argmax(values))]
        W = fit(X, y, K, best) if K else ridge(X, y, best)
        return outcome([classify(test, W, K) for test in tests], best, max(values), grid)
    return solution


GRID = [100.0, 10.0, 1.0, 0.1, 0.01, 0.001, 1e-4]


def gradient_descent(X, y, K, strength):
    """Plain steps of a size that fits the largest curvature; until the gradient is small."""
    A = with_ones(X)
    W = np.zeros((A.shape[1], K))
    one_hot = np.eye(K)[y]
    rate = 1 / (0.5 * np.linalg.norm(A, 2) ** 2 / len(A) + strength)
    mask = np.r_[np.ones(X.shape[1]), 0][:, None]
    for _ in range(1500):
        scores = A @ W
        P = np.exp(scores - scores.max(axis=1, keepdims=True))
        P /= P.sum(axis=1, keepdims=True)
        gradient = A.T @ (P - one_hot) / len(A) + strength * mask * W
        if abs(gradient).max() < 1e-4:
            break
        W -= rate * gradient
    return W


def lbfgs(X, y, K, strength, max_iter=300):
    """torch.optim.LBFGS on a linear layer, in float32; the penalty is summed, not halved."""
    X, y = torch.tensor(X, dtype=torch.float32), torch.as_tensor(y)
    layer = torch.nn.Linear(X.shape[1], K)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=max_iter, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(X), y) + strength * layer.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat((layer.weight.T, layer.bias[None])).detach().double().numpy()


for name, solution in {
        "newton_and_five_folds": by_folds(newton, GRID, 5),
        "gradient_descent_and_one_tenth": by_folds(gradient_descent, GRID, 10, rounds=1),
        "lbfgs_and_three_folds_of_another_grid": by_folds(lbfgs, [3.0 ** -k for k in range(-4, 9, 2)], 3),
        "newton_and_one_fifth": by_folds(newton, GRID[::-1], 5, rounds=1)}.items():
    solution.__name__ = name
    right(8)(solution)


@right(8)
def with_the_given_helpers(train, y, groups, tests, K, metric, directions=None):
    """One held-out tenth, fit_softmax and fit_ridge. The penalty is scaled instead of the features."""
    X, tests = train.double(), [test.double() for test in tests]
    if directions:
        X, *tests = probe_file.leading(X, tests, directions)
    scale = X.std(0).clamp(min=1e-12)                       # with n-1, and not centred
    scale[X.std(0) == 0] = 1
    X, tests = X / scale, [test / scale for test in tests]
    out = probe_file.held_out(groups)
    y = torch.from_numpy(y)

    def fit(X, y, strength):
        return probe_file.fit_softmax(X, y, K, strength) if K else probe_file.fit_ridge(X, y, strength)

    best, best_value = None, -math.inf
    for strength in probe_file.STRENGTHS:
        W, b, _ = fit(X[~out], y[~out], strength)
        value = metric(probe_file.predict(X[out], W, b, K), y[out].numpy())
        if value > best_value:
            best, best_value = strength, value
    W, b, gradient = fit(X, y, best)
    predictions = [probe_file.predict(test, W, b, K) for test in tests]
    return outcome(predictions, best, best_value, probe_file.STRENGTHS, gradient)

# -----------------------------------------------------------------------------
# Exercise 8: wrong

def spoilt(prepare=prepared, fit=newton, fit_scores=ridge, judge="held out", by_group=True, choose=np.argmax,
           value=None, last_fit="all", finish=None, judge_on=lambda metric: metric, folds=folds_of):
    """by_folds with parts replaced. value(metric's value, W) -> what is maximised."""
    def solution(train, y, groups, tests, K, metric, directions=None):
        X, *tests = prepare(train, tests, directions)
        fold = folds(groups if by_group else np.arange(len(y)), 5)
        fit_one = (lambda X, y, strength: fit(X, y, K, strength)) if K else fit_scores
        metric = judge_on(metric)
        values = []
        for strength in GRID:
            each = []
            for out in range(5):
                held = fold == out
                kept = ~held if judge == "held out" else np.ones(len(y), dtype=bool)
                W = fit_one(X[kept], y[kept], strength)
                score = metric(classify(X[held], W, K), y[held])
                each.append(score if value is None else value(score, strength))
            values.append(np.mean(each))
        best = GRID[int(choose(values))]
        used = np.ones(len(y), dtype=bool) if last_fit == "all" else fold != 0
        W = fit_one(X[used], y[used], best)
        predictions = [classify(test, W, K) for test in tests]
        if finish is not None:
            predictions = finish(predictions, X, tests, W, K)
        return outcome(predictions, best, max(values), GRID)
    return solution


def wrong_probe(words, name, **replaced):
    solution = spoilt(**replaced)
    solution.__name__ = name
    wrong(8, words)(solution)


def own_statistics(train, tests, directions):
    return [prepared(part, [], directions)[0] for part in (train, *tests)]


def joint_statistics(train, tests, directions):
    together = torch.cat((train, *tests)).double().numpy()
    return [(part.double().numpy() - together.mean(0)) / deviation(together) for part in (train, *tests)]


def not_standardised(train, tests, directions):
    return [part.double().numpy() for part in (train, *tests)]


def train_only_standardised(train, tests, directions):
    return [prepared(train, [], directions)[0], *not_standardised(train, tests, directions)[1:]]


def divided_by_zero(train, tests, directions):
    X, *tests = not_standardised(train, tests, directions)
    with np.errstate(invalid="ignore"):
        return [(part - X.mean(0)) / X.std(0) for part in (X, *tests)]


def no_directions(train, tests, directions):
    return prepared(train, tests, None)


def without_intercept(X, y, K, strength):
    W = gradient_descent(X, y, K, strength)
    W[-1] = 0
    return W


def ridge_without_intercept(X, y, strength):
    W = np.linalg.solve(X.T @ X / len(X) + strength * np.eye(X.shape[1]), X.T @ y / len(X))
    return np.r_[W, 0][:, None]


def ridge_with_penalised_intercept(X, y, strength):
    A = with_ones(X)
    return np.linalg.solve(A.T @ A / len(A) + strength * np.eye(A.shape[1]), A.T @ y / len(A))[:, None]


def no_penalty(X, y, K, strength):
    return newton(X, y, K, 1e-6)


def ridge_no_penalty(X, y, strength):
    return ridge(X, y, 1e-9)


def least_squares(X, y, K, strength):
    return np.column_stack([ridge(X, np.eye(K)[y][:, k], strength) for k in range(K)])


def with_penalised_intercept(X, y, K, strength):
    """The intercept as one more feature, always 1, and the one outside of the penalty undone."""
    A = with_ones(X)
    W = np.zeros((A.shape[1], K))
    rate = 1 / (0.5 * np.linalg.norm(A, 2) ** 2 / len(A) + strength)
    for _ in range(500):
        P = np.exp(A @ W)
        P /= P.sum(axis=1, keepdims=True)
        W -= rate * (A.T @ (P - np.eye(K)[y]) / len(A) + strength * W)
    return W


def directions_after_standardising(train, tests, directions):
    X, *tests = prepared(train, tests, None)
    if directions is None:
        return [X, *tests]
    axes = np.linalg.eigh(X.T @ X)[1][:, -directions:]
    return [part @ axes for part in (X, *tests)]


def three_steps(X, y, K, strength):
    """Three steps of gradient descent from 0."""
    A = with_ones(X)
    W = np.zeros((A.shape[1], K))
    for _ in range(3):
        P = np.exp(A @ W)
        P /= P.sum(axis=1, keepdims=True)
        W -= A.T @ (P - np.eye(K)[y]) / len(A)
    return W / (1 + strength)


def three_lbfgs_steps(X, y, K, strength):
    return lbfgs(X, y, K, strength, max_iter=3)


def summed_cross_entropy(X, y, K, strength):
    return newton(X, y, K, strength / len(X))


def scaled_but_not_shifted(train, tests, directions):
    train, *tests = on_directions(train, tests, directions)
    std = deviation(train)
    return [(train - train.mean(axis=0)) / std, *[test / std for test in tests]]


def contiguous_folds(groups, number):
    return np.arange(len(groups)) * number // len(groups)


def variance_instead_of_deviation(train, tests, directions):
    train, *tests = on_directions(train, tests, directions)
    variance = deviation(train) ** 2
    return [(part - train.mean(axis=0)) / variance for part in (train, *tests)]


def first_columns(train, tests, directions):
    return prepared(train[:, :directions], [test[:, :directions] for test in tests], None)


def uncentred_directions(train, tests, directions):
    if directions is None:
        return prepared(train, tests, None)
    axes = torch.linalg.eigh(train.double().T @ train.double())[1][:, -directions:]
    return prepared(train.double() @ axes, [test.double() @ axes for test in tests], None)


def smallest_directions(train, tests, directions):
    if directions is None:
        return prepared(train, tests, None)
    axes = torch.linalg.eigh(torch.cov(train.double().T))[1][:, :directions]
    return prepared(train.double() @ axes, [test.double() @ axes for test in tests], None)


def own_directions(train, tests, directions):
    if directions is None:
        return prepared(train, tests, None)
    train, *tests = [probe_file.leading(part.double(), [], directions)[0] for part in (train, *tests)]
    return prepared(train, tests, None)


def directions_not_standardised(train, tests, directions):
    if directions is None:
        return prepared(train, tests, None)
    train, *tests = on_directions(train, tests, directions)
    return [part - train.mean(axis=0) for part in (train, *tests)]


wrong_probe("copies of one example, with the same number in groups, are on both sides", "folds_of_neighbours",
            folds=contiguous_folds)
wrong_probe("copies of one example, with the same number in groups, are on both sides", "folds_of_positions",
            folds=lambda groups, number: np.arange(len(groups))[::-1] % number)
wrong_probe("standardise the features (divide by their standard deviation)", "divided_by_the_variance",
            prepare=variance_instead_of_deviation)
wrong_probe("with directions=", "directions_are_columns", prepare=first_columns)
wrong_probe("are they the directions of the largest variance of centred features?", "directions_not_centred",
            prepare=uncentred_directions)
wrong_probe("are they the directions of the largest variance", "directions_of_the_smallest_variance",
            prepare=smallest_directions)
wrong_probe("project the test sets on the directions of the training split", "directions_of_each_set",
            prepare=own_directions)
wrong_probe("standardise after `leading`", "directions_of_their_own_scale", prepare=directions_not_standardised)
wrong_probe("it must have the strength that was chosen", "one_strength_too_weak",
            choose=lambda values: min(len(values) - 1, np.argmax(values) + 1))
wrong_probe("on examples that were fitted", "chosen_on_the_fitted_examples", judge="fitted")
wrong_probe("copies of one example, with the same number in groups, are on both sides", "groups_ignored",
            by_group=False)
wrong_probe("must be those of the training split, for the test sets too", "test_set_standardised_by_itself",
            prepare=own_statistics)
wrong_probe("must be those of the training split, for the test sets too", "statistics_of_train_and_test",
            prepare=joint_statistics)
wrong_probe("standardise the features", "features_not_standardised", prepare=not_standardised)
wrong_probe("standardise the features", "only_the_training_split_standardised", prepare=train_only_standardised)
wrong_probe("does the matrix hold nan or inf, from a division by 0?", "division_by_a_deviation_of_0",
            prepare=divided_by_zero)
wrong_probe("divided by a standard deviation of 0", "division_by_0_unnoticed", prepare=divided_by_zero,
            fit=three_steps)
wrong_probe("is there an intercept", "no_intercept", fit=without_intercept)
wrong_probe("there is no intercept", "no_intercept_for_scores", fit_scores=ridge_without_intercept)
wrong_probe("is the intercept penalised", "intercept_penalised", fit_scores=ridge_with_penalised_intercept)
wrong_probe("spare the intercept", "intercept_of_classes_penalised", fit=with_penalised_intercept)
wrong_probe("the penalty must enter the loss", "penalty_ignored", fit=no_penalty)
wrong_probe("the penalty is ignored", "penalty_ignored_for_scores", fit_scores=ridge_no_penalty)
wrong_probe("larger is better", "the_worst_strength", choose=np.argmin)
wrong_probe("metric is never called", "chosen_by_accuracy",
            judge_on=lambda metric: lambda predicted, true: np.mean(predicted == true))
wrong_probe("the strength must be chosen by metric(predicted, true)", "always_the_strongest",
            value=lambda value, strength: strength)
wrong_probe("metric is called as metric(true, predicted)", "metric_of_true_and_predicted",
            judge_on=lambda metric: lambda predicted, true: metric(true, predicted))
wrong_probe("minimise the cross-entropy of a softmax, not the squared error", "least_squares_classifier",
            fit=least_squares)
wrong_probe("the fit must run to convergence", "three_steps_only", fit=three_steps)
wrong_probe("is the fit run to convergence", "three_steps_of_lbfgs", fit=three_lbfgs_steps)
wrong_probe("is the cross-entropy a sum over examples", "cross_entropy_summed", fit=summed_cross_entropy)
wrong_probe("subtract the training split's mean from the test sets too", "test_sets_not_shifted",
            prepare=scaled_but_not_shifted)
wrong_probe("are held-out examples missing in the last fit?", "last_fit_without_the_held_out", last_fit="kept")
wrong_probe("with directions=2 the third direction", "directions_ignored", prepare=no_directions)
wrong_probe("before you standardise", "directions_of_standardised_features",
            prepare=directions_after_standardising)
wrong_probe("classes are 0 .. 2", "classes_from_1",
            finish=lambda predictions, X, tests, W, K: [p + bool(K) for p in predictions])
wrong_probe("the predicted classes are shifted", "labels_shifted",
            finish=lambda predictions, X, tests, W, K: [(p + 1) % K if K else p for p in predictions])
wrong_probe("as many as training examples", "predicts_the_training_split",
            finish=lambda predictions, X, tests, W, K: [classify(X, W, K) for p in predictions])
wrong_probe("the predictions are those of the training examples", "predicts_the_first_training_examples",
            finish=lambda predictions, X, tests, W, K: [np.resize(classify(X, W, K), len(p)) for p in predictions])
wrong_probe("the class with the highest score", "scores_of_all_classes",
            finish=lambda predictions, X, tests, W, K: [with_ones(test) @ W for test in tests])
wrong_probe("for each of the 2 test sets", "first_test_set_only",
            finish=lambda predictions, X, tests, W, K: predictions[:1])
wrong_probe("an accuracy of 0.", "the_most_frequent_class",
            finish=lambda predictions, X, tests, W, K: [0 * p for p in predictions])


@wrong(8, "must return two things")
def predictions_alone(train, y, groups, tests, K, metric, directions=None):
    return REFERENCE[8](train, y, groups, tests, K, metric, directions)[0]


@wrong(8, "the dict that probe returns lacks at_edge, held_out, gradient")
def strength_alone(train, y, groups, tests, K, metric, directions=None):
    predictions, how = REFERENCE[8](train, y, groups, tests, K, metric, directions)
    return predictions, {"strength": how["strength"]}


@wrong(8, "strength in the dict that probe returns must be a number, not None")
def says_nothing_of_the_fit(train, y, groups, tests, K, metric, directions=None):
    predictions, how = REFERENCE[8](train, y, groups, tests, K, metric, directions)
    return predictions, dict.fromkeys(how)


@wrong(8, "at_edge is false")
def never_at_the_edge(train, y, groups, tests, K, metric, directions=None):
    predictions, how = REFERENCE[8](train, y, groups, tests, K, metric, directions)
    return predictions, {**how, "at_edge": False}


@wrong(8, "class numbers, not the scores of all classes")
def judges_scores(train, y, groups, tests, K, metric, directions=None):
    if K:
        metric(np.eye(K)[y], y)
    return REFERENCE[8](train, y, groups, tests, K, metric, directions)


@wrong(8, "classes_only raises IndexError")
def classes_only(train, y, groups, tests, K, metric, directions=None):
    """K = 0 is forgotten."""
    np.eye(K)[0]
    return REFERENCE[8](train, y, groups, tests, K, metric, directions)


@wrong(8, "changes features, y or groups")
def standardises_in_place(train, y, groups, tests, K, metric, directions=None):
    train -= train.mean(dim=0)
    return REFERENCE[8](train, y, groups, tests, K, metric, directions)

# -----------------------------------------------------------------------------

@pytest.mark.parametrize("number,solution", RIGHT)
def test_a_right_solution_passes(monkeypatch, number, solution):
    failures = grade(monkeypatch, number, solution)
    assert not failures.words and failures.passed


@pytest.mark.parametrize("number,solution,words", WRONG)
def test_a_wrong_solution_is_told_its_mistake(monkeypatch, number, solution, words):
    failures = grade(monkeypatch, number, solution)
    assert failures.words, "a wrong solution passes"
    assert words in failures.words[0]
    assert len(failures.words[0]) < 300 and "\n" not in failures.words[0]


@pytest.mark.parametrize("number", WRITTEN)
def test_every_test_of_an_exercise_fails_before_it_is_written(monkeypatch, number):
    def unwritten(*arguments):
        raise NotImplementedError(f"exercise {number}: see docs/EXERCISES.md")

    failures = grade(monkeypatch, number, unwritten, first_only=False)
    assert failures.passed == 0
    assert set(failures.words) == {"not yet written: see docs/EXERCISES.md"}
